"""The weight table of a captured model: every parameter and buffer the graph names, and where its bytes are.

Parameters are ranges of the checkpoint's safetensors files; buffers that no checkpoint holds were computed by their
module's constructor and are stored inline. Tied weights share one name. Nothing is read but headers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import ml_dtypes
import numpy as np
import torch

from frontend.checkpoint import TensorRange
from frontend.resolve import ModelSource
from ir.errors import Problem, UserError
from ir.quantization import WEIGHT, Scheme
from ir.weights import WeightRef, WeightTable

Wanted = Mapping[str, tuple[tuple[int, ...], str]]
"""Name -> (shape, element type in the graph)."""


def parse_mode(text: str) -> tuple[str, int | None]:
    """`link`, `none`, `random` or `random:SEED` -> (mode, seed)."""
    match = re.fullmatch(r"(link|none|random)(?::(\d+))?", text)
    if match is None or (match[2] is not None and match[1] != "random"):
        why = "weights come from the checkpoint, from a random generator, or not at all"
        raise UserError([Problem(f"weights {text!r} is not known", why, "use link, random[:SEED] or none")])
    return match[1], int(match[2] or 0) if match[1] == "random" else None


def weight_table(
    source: ModelSource,
    wanted: Wanted,
    buffers: Mapping[str, torch.Tensor],
    aliases: Mapping[str, str],
    mode: str,
    schemes: Mapping[str, Scheme] | None = None,
) -> WeightTable:
    """References for all wanted names; of quantized ones (`schemes`) to what stands in for them.

    Raises UserError listing every tensor that is missing or has another shape.
    """
    kind, seed = parse_mode(mode)
    tied: dict[str, list[str]] = {}
    for alias, name in aliases.items():
        tied.setdefault(name, []).append(alias)
    refs: dict[str, WeightRef] = {}
    problems: list[Problem] = []
    for name, (shape, elem) in wanted.items():
        if schemes and name in schemes:
            parts = schemes[name].tensors(name, (shape[0], shape[1]))
            refs |= (
                _quantized(source, parts, problems)
                if kind == "link"
                else {part: _ref(part, sizes, number, seed=seed) for part, (sizes, number) in parts.items()}
            )
            continue
        scale = f"{name.removesuffix(WEIGHT)}.weight_scale"
        if kind == "link" and name.endswith(WEIGHT) and _find(source, [scale]) is not None:
            why = f"the checkpoint holds {scale}, but quantization_config does not say how it is stored"
            problems.append(Problem(f"weight {name} is quantized", why, "restore the checkpoint's config.json"))
            continue
        stored = _find(source, [name, *tied.get(name, [])]) if kind == "link" else None
        if stored is None and name in buffers:
            refs[name] = _ref(name, shape, elem, inline=to_numpy(buffers[name], elem))
        elif kind != "link":
            refs[name] = _ref(name, shape, elem, seed=seed)
        elif stored is None:
            why = "the checkpoint does not hold it"
            problems.append(Problem(f"weight {name} is missing", why, "check that the files belong to config.json"))
        elif stored.shape != tuple(shape):
            why = f"config.json makes it {list(shape)}, {stored.file.name} holds {list(stored.shape)}"
            problems.append(Problem(f"weight {name} has another shape", why, "use the config of this checkpoint"))
        elif elem in FLOATS and stored.dtype not in (*FLOATS, "f64"):
            why = f"the model computes with numbers, {stored.file.name} holds {stored.dtype}"
            fix = "use the checkpoint with the weights as bf16, f16 or f32"
            problems.append(Problem(f"weight {name} has another type", why, fix))
        else:
            refs[name] = WeightRef(
                name=name,
                shape=tuple(shape),
                dtype=stored.dtype,
                file=str(stored.file),
                tensor=stored.tensor,
                offset=stored.offset,
                nbytes=stored.nbytes,
                inline=None,
                seed=None,
            )
    if problems:
        raise UserError(problems)
    return WeightTable(refs)


FLOATS = ("bf16", "f16", "f32")


def _quantized(
    source: ModelSource, parts: Mapping[str, tuple[tuple[int, ...], str]], problems: list[Problem]
) -> dict[str, WeightRef]:
    """References to the tensors of a quantized weight; sizes of 1 are not counted, scales may be any float."""
    refs: dict[str, WeightRef] = {}
    for name, (shape, elem) in parts.items():
        stored = _find(source, [name])
        fix = "use the config of this checkpoint"
        if stored is None:
            why = "the checkpoint does not hold it, and quantization_config says that the layer is quantized"
            problems.append(Problem(f"weight {name} is missing", why, fix))
        elif [n for n in stored.shape if n != 1] != [n for n in shape if n != 1]:
            why = f"config.json makes it {list(shape)}, {stored.file.name} holds {list(stored.shape)}"
            problems.append(Problem(f"weight {name} has another shape", why, fix))
        elif stored.dtype != elem and (elem != "f32" or stored.dtype not in FLOATS):
            why = f"the scheme stores {elem}, {stored.file.name} holds {stored.dtype}"
            problems.append(Problem(f"weight {name} has another type", why, fix))
        else:
            where = (str(stored.file), stored.tensor, stored.offset, stored.nbytes)
            refs[name] = WeightRef(name, tuple(shape), stored.dtype, *where)
    return refs


def _ref(
    name: str, shape: tuple[int, ...], elem: str, *, inline: np.ndarray | None = None, seed: int | None = None
) -> WeightRef:
    return WeightRef(
        name=name, shape=tuple(shape), dtype=elem, file=None, tensor=None, offset=None, nbytes=None, inline=inline,
        seed=seed,
    )  # fmt: skip


def _find(source: ModelSource, names: list[str]) -> TensorRange | None:
    for name in names:
        for candidate in _spellings(name, source.architecture.base_prefixes):
            if candidate in source.tensors:
                return source.tensors[candidate]
    return None


def _spellings(name: str, prefixes: tuple[str, ...]) -> Iterator[str]:
    """The names a checkpoint may use: with or without the base model's prefix, and the old LayerNorm names."""
    variants = [name]
    for prefix in prefixes:
        variants.append(name.removeprefix(prefix) if name.startswith(prefix) else prefix + name)
    for variant in variants:
        yield variant
        if variant.endswith("LayerNorm.weight"):
            yield variant.removesuffix("weight") + "gamma"
        elif variant.endswith("LayerNorm.bias"):
            yield variant.removesuffix("bias") + "beta"


def to_numpy(tensor: torch.Tensor, elem: str) -> np.ndarray:
    """A tensor as a numpy array of the graph's element type."""
    tensor = tensor.detach().cpu().contiguous()
    if elem == "bf16":
        return tensor.to(torch.bfloat16).view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    array = tensor.to(torch.float32).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()
    return array.astype({"f32": np.float32, "i32": np.int32, "i1": np.bool_}[elem])
