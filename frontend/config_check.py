"""What in a config.json cannot be, found without transformers, so that all of it is said at once and before any work.

Only what every supported architecture agrees on is checked here; transformers checks the rest when it reads the config.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, cast

from ir.errors import Problem

SIZES = (
    "hidden_size", "n_embd", "num_hidden_layers", "n_layer", "num_attention_heads", "n_head", "num_key_value_heads",
    "head_dim", "intermediate_size", "vocab_size", "max_position_embeddings", "n_positions",
)  # fmt: skip
"""Positive integers, in the names of one family or another; null stands for a size that follows from the others."""
DERIVED = ("num_key_value_heads", "head_dim", "intermediate_size")
POSITIVE = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "rope_theta", "query_pre_attn_scalar")
DTYPES = {"bfloat16": "bf16", "float16": "f16", "half": "f16", "float32": "f32", "float": "f32", "float64": "f64"}
"""Names of element types in a config -> as the IR spells them. "auto" leaves it to the weights."""
DECODER_CLASSES = ("ForCausalLM", "LMHeadModel", "Model")
"""How the names of classes end that are, or hold, a language model without another head."""
FIX = "correct the config, or download the model again"


def check_config(config: dict[str, Any], kind: str | None, problems: list[Problem]) -> None:
    """Append a problem for every value that no model can have. `kind`: decoder, encoder, None if it is not known."""
    for name, value in _floats(config):
        if not math.isfinite(value):
            problems.append(Problem(f"config.json: {name} is {value}", "it must be a finite number", FIX))
    nested = config.get("text_config")
    if nested is not None and not isinstance(nested, dict):
        problems.append(Problem(f"config.json: text_config is {nested!r}", "it must be an object", FIX))
    parts = [("", config)] + ([("text_config.", cast("dict[str, Any]", nested))] if isinstance(nested, dict) else [])
    for prefix, part in parts:
        for name in SIZES:
            value = part.get(name)
            if name in part and not (value is None and name in DERIVED) and not _is_size(value):
                what = f"config.json: {prefix}{name} is {value!r}"
                problems.append(Problem(what, "it must be a positive integer", FIX))
        for name in POSITIVE:
            value = part.get(name)
            if isinstance(value, bool) or (isinstance(value, (int, float)) and value <= 0):
                what = f"config.json: {prefix}{name} is {value}"
                problems.append(Problem(what, "it must be a positive number", FIX))
    quantization = config.get("quantization_config")
    if "quantization_config" in config and not isinstance(quantization, dict):
        problems.append(Problem(f"config.json: quantization_config is {quantization!r}", "it must be an object", FIX))
    _check_dtype(config, problems)
    _check_classes(config, kind, problems)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _check_dtype(config: dict[str, Any], problems: list[Problem]) -> None:
    for name in ("dtype", "torch_dtype"):
        value = config.get(name)
        if value in (None, "auto"):
            continue
        if not isinstance(value, str) or value.removeprefix("torch.") not in DTYPES:
            known = "bfloat16, float16 or float32"
            problems.append(Problem(f"config.json: {name} is {value!r}", f"models are stored in {known}", FIX))


def _check_classes(config: dict[str, Any], kind: str | None, problems: list[Problem]) -> None:
    listed = config.get("architectures")
    if listed is None:
        return
    classes = cast("list[Any]", listed) if isinstance(listed, list) else [None]
    if not all(isinstance(c, str) for c in classes):
        why = "it must be a list with the name of the model's class"
        problems.append(Problem(f"config.json: architectures is {listed!r}", why, FIX))
        return
    name = classes[0] if len(classes) == 1 else None
    if kind == "decoder" and isinstance(name, str) and not name.endswith(DECODER_CLASSES):
        why = "of decoders the language model is built; another head would be left out silently"
        fix = f"use a ...ForCausalLM checkpoint; if {name} is only a wrong name, correct config.json"
        problems.append(Problem(f"config.json names the class {name}", why, fix))


def _floats(data: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Every float of a JSON value with where it stands."""
    if isinstance(data, float):
        yield path, data
    elif isinstance(data, dict):
        for key, value in cast("dict[str, Any]", data).items():
            yield from _floats(value, f"{path}.{key}" if path else str(key))
    elif isinstance(data, list):
        for i, value in enumerate(cast("list[Any]", data)):
            yield from _floats(value, f"{path}[{i}]")
