"""Quantized checkpoints: what `quantization_config` of compressed-tensors says about every linear layer.

Read are the schemes that the device computes (`ir.quantization`); everything else is refused with the reason. The
layout of the tensors follows from the scheme: `weight` (8 bits) or `weight_packed` (4 bits), `weight_scale`, and
`input_scale` for static activations.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from xdsl.dialects.builtin import ModuleOp
from xdsl.dialects.func import CallOp, FuncOp
from xdsl.ir import SSAValue

from ir.dialects import tc
from ir.errors import Problem
from ir.quantization import PER_WORD, WEIGHT, Scheme
from ir.types import shape_of

METHOD = "compressed-tensors"
FORMATS = {"int8": ("int-quantized",), "fp8": ("float-quantized",), "int4": ("pack-quantized",)}
SUPPORTED = (
    "W8A8 int8, FP8 (per channel or tensor, dynamic or static) and W4A16 (groups) of compressed-tensors are read"
)
FIX = "use the bf16 checkpoint of the model, or one quantized in a scheme that is read"
Json = Mapping[str, Any]


@dataclass(frozen=True)
class Quantization:
    """Schemes with the modules they are for; the first that matches counts. `ignore` goes before all."""

    groups: tuple[tuple[tuple[str, ...], Scheme], ...]
    ignore: tuple[str, ...]

    def scheme_of(self, module: str) -> Scheme | None:
        """The scheme of a linear layer by its path, such as `model.layers.0.mlp.up_proj`."""
        if any(_matches(pattern, module) for pattern in self.ignore):
            return None
        for targets, scheme in self.groups:
            if any(target == "Linear" or _matches(target, module) for target in targets):
                return scheme
        return None


def _matches(pattern: str, module: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern.removeprefix("re:"), module) is not None
    return pattern == module


def read_quantization(config: Json, problems: list[Problem]) -> Quantization | None:
    """Understand a `quantization_config`; appends every problem and returns None if there is one."""
    method = str(config.get("quant_method", "unknown"))
    found: list[Problem] = []
    if method != METHOD:
        problems.append(Problem(f"the checkpoint is quantised ({method})", SUPPORTED, FIX))
        return None
    for key, what in (("kv_cache_scheme", "a quantised KV cache"), ("transform_config", "transformed weights")):
        if config.get(key):
            why = "keys and values are kept in bf16" if key == "kv_cache_scheme" else "rotations are not computed"
            found.append(Problem(f"the checkpoint has {what} ({key})", why, FIX))
    sparsity = _object(config.get("sparsity_config"))
    if sparsity.get("format", "dense") != "dense":
        found.append(Problem(f"the weights are sparse ({sparsity['format']})", "only dense tensors are read", FIX))
    groups: list[tuple[tuple[str, ...], Scheme]] = []
    listed = _object(config.get("config_groups"))
    if not listed:
        found.append(Problem("quantization_config has no config_groups", "they say how weights are stored", FIX))
    for name, group in listed.items():
        scheme = _scheme(f"group {name}", _object(group), config, found)
        targets = tuple(str(t) for t in _object(group).get("targets") or ())
        if scheme is not None:
            groups.append((targets, scheme))
    problems += found
    ignore = tuple(str(p) for p in cast("list[Any]", config.get("ignore") or []))
    return None if found else Quantization(tuple(groups), ignore)


def _object(value: Any) -> Json:
    return cast("Json", value) if isinstance(value, Mapping) else {}


def _scheme(name: str, group: Json, config: Json, problems: list[Problem]) -> Scheme | None:
    """The scheme of a config group, None with a problem if it is not one of those that are read."""
    weights, inputs = _object(group.get("weights")), _object(group.get("input_activations"))

    def refuse(what: str, why: str) -> None:
        problems.append(Problem(f"quantization {name}: {what}", why, FIX))

    bits, kind = weights.get("num_bits"), weights.get("type")
    strategy = str(weights.get("strategy") or ("group" if weights.get("group_size") else "tensor"))
    if group.get("output_activations"):
        return refuse("outputs are quantised", "results are bf16")
    if weights.get("symmetric", True) is not True:
        return refuse("weights have zero points", "symmetric numbers are read")
    if weights.get("actorder") == "group":
        return refuse("groups follow the activations' order (actorder group)", "groups of neighbours are read")
    if (bits, kind) == (4, "int"):
        if inputs:
            return refuse("4-bit weights with quantised activations", "with 4-bit weights activations stay bf16")
        if strategy not in ("group", "channel"):
            return refuse(f"4-bit weights with scales per {strategy}", "scales are per channel and group of inputs")
        size = int(weights.get("group_size") or 0) if strategy == "group" else 0
        if size % PER_WORD or (size and size < 32):
            return refuse(f"groups of {size} weights", "groups are multiples of 32")
        scheme = Scheme("int4", group=size)
    elif (bits, kind) in ((8, "int"), (8, "float")):
        if strategy not in ("channel", "tensor"):
            return refuse(f"8-bit weights with scales per {strategy}", "scales are per channel or per tensor")
        if (inputs.get("num_bits"), inputs.get("type")) != (bits, kind):
            stored = f"{inputs.get('num_bits')}-bit {inputs.get('type')}" if inputs else "bf16"
            return refuse(f"8-bit {kind} weights and {stored} activations", "both sides have one kind of numbers")
        if inputs.get("symmetric", True) is not True:
            return refuse("activations have zero points", "symmetric numbers are read")
        dynamic = inputs.get("dynamic", False)
        wanted = "token" if dynamic is True else "tensor"
        if dynamic not in (True, False) or inputs.get("strategy", wanted) != wanted:
            what = f"activations with scales per {inputs.get('strategy')} (dynamic: {dynamic})"
            return refuse(what, "scales are dynamic per token or static per tensor")
        scheme = Scheme("int8" if kind == "int" else "fp8", strategy == "channel", dynamic)
    else:
        return refuse(f"{bits}-bit {kind} weights", SUPPORTED)
    stored_as = str(group.get("format") or config.get("format"))
    if stored_as not in FORMATS[scheme.kind]:
        return refuse(f"format {stored_as}", f"such weights are stored as {FORMATS[scheme.kind][0]}")
    return scheme


def linear_weights(module: ModuleOp) -> set[str]:
    """Weights [N, K] that contractions over K read and nothing else does: those of linear layers."""
    functions = {f.sym_name.data: f for f in module.ops if isinstance(f, FuncOp)}

    def linear(value: SSAValue) -> bool:
        for use in value.uses:
            op = use.operation
            if isinstance(op, CallOp):
                if not linear(functions[op.callee.string_value()].body.block.args[use.index]):
                    return False
            elif not isinstance(op, tc.ContractOp) or op.rule().inputs[use.index][-1] in op.rule().output:
                return False
        return True

    weights = [op for op in module.walk() if isinstance(op, tc.WeightOp) and len(shape_of(op.result)) == 2]
    return {op.fqn.data for op in weights if linear(op.result)}


def module_schemes(module: ModuleOp, quantization: Quantization | None) -> dict[str, Scheme]:
    """The quantized weights of a captured module: name -> scheme."""
    if quantization is None:
        return {}
    found = {n: quantization.scheme_of(n.removesuffix(WEIGHT)) for n in sorted(linear_weights(module))}
    return {name: scheme for name, scheme in found.items() if scheme is not None}
