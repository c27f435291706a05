"""Small quantized models for tests: a random llama in the layout of compressed-tensors, written by hand.

`Stored.values` gives the numbers that the tensors of a layer stand for, in f32.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ir.weights import write_safetensors
from tests.cli.small_models import CONFIG, tensors, write_tokenizer

Array = NDArray[Any]
BF16, F8 = np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn)
INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
FP8 = {"num_bits": 8, "type": "float", "symmetric": True}
TOKEN, STATIC = {"strategy": "token", "dynamic": True}, {"strategy": "tensor", "dynamic": False}


def config_of(scheme: str) -> dict[str, Any]:
    """quantization_config of `int8`, `fp8-channel`, `fp8-tensor` (static activations) or `int4-32` (group size)."""
    if scheme.startswith("int4"):
        size = int(scheme.split("-")[1])
        weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": size}
        group: dict[str, Any] = {"weights": weights, "input_activations": None}
        name = "pack-quantized"
    elif scheme == "int8":
        group = {"weights": INT8 | {"strategy": "channel"}, "input_activations": INT8 | TOKEN}
        name = "int-quantized"
    else:
        static = scheme == "fp8-tensor"
        weights = FP8 | {"strategy": "tensor" if static else "channel"}
        group = {"weights": weights, "input_activations": FP8 | (STATIC if static else TOKEN)}
        name = "float-quantized"
    group |= {"targets": ["Linear"], "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": name,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }


@dataclass(frozen=True)
class Stored:
    """The tensors of a linear layer by the last part of their name, and the numbers they stand for."""

    tensors: dict[str, Array]
    values: Array


def quantize(w: Array, scheme: str) -> Stored:
    """Round a weight [N, K] to nearest with scales from the largest magnitudes."""
    w = w.astype(np.float32)
    if scheme.startswith("int4"):
        size = int(scheme.split("-")[1])
        groups = w.reshape(w.shape[0], -1, size)
        scale = (np.abs(groups).max(axis=2) / 7.5).astype(BF16)
        q = np.clip(np.rint(groups / scale.astype(np.float32)[:, :, None]), -8, 7)
        values = (q * scale.astype(np.float32)[:, :, None]).reshape(w.shape)
        words = (q.reshape(w.shape[0], -1, 8) + 8).astype(np.uint32)
        packed = (words << np.arange(0, 32, 4, dtype=np.uint32)).sum(axis=2, dtype=np.uint32).view(np.int32)
        shape = np.array(w.shape, np.int64)
        return Stored({"weight_packed": packed, "weight_scale": scale, "weight_shape": shape}, values)
    if scheme == "fp8-tensor":
        scale = np.array([np.abs(w).max() / 448]).astype(BF16)
        q = np.clip(w / scale.astype(np.float32), -448, 448).astype(F8)
        inputs = np.array([6.0 / 448]).astype(BF16)
        values = q.astype(np.float32) * scale.astype(np.float32)
        return Stored({"weight": q, "weight_scale": scale, "input_scale": inputs}, values)
    largest = 127.5 if scheme == "int8" else 448
    scale = (np.abs(w).max(axis=1, keepdims=True) / largest).astype(BF16)
    ratio = w / scale.astype(np.float32)
    q = np.clip(np.rint(ratio), -128, 127).astype(np.int8) if scheme == "int8" else np.clip(ratio, -448, 448).astype(F8)
    return Stored({"weight": q, "weight_scale": scale}, q.astype(np.float32) * scale.astype(np.float32))


def is_linear(name: str) -> bool:
    """Whether a tensor of the small llama is the weight of a quantized layer."""
    return name.endswith("_proj.weight")


def write_quantized(directory: Path, scheme: str, seed: int = 0, **changes: Any) -> dict[str, Array]:
    """A quantized checkpoint in Hugging Face layout; returns the numbers of all weights by name, in f32."""
    directory.mkdir(parents=True)
    config = CONFIG | changes
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": config_of(scheme)}), "utf-8")
    written: dict[str, Array] = {}
    values: dict[str, Array] = {}
    for name, array in tensors(config, seed=seed).items():
        if not is_linear(name):
            written[name], values[name] = array, array.astype(np.float32)
            continue
        stored = quantize(array, scheme)
        values[name] = stored.values
        written |= {f"{name.removesuffix('weight')}{part}": a for part, a in stored.tensors.items()}
    write_safetensors(directory / "model.safetensors", written)
    write_tokenizer(directory, config["vocab_size"])
    return values
