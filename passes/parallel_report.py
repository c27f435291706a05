"""What tensor parallelism costs, read off a partitioned module: collectives with their reasons, padding, and copies."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from xdsl.dialects.builtin import ModuleOp
from xdsl.dialects.func import CallOp, FuncOp
from xdsl.ir import SSAValue

from ir.dialects import tc
from ir.interpreter import find_function, names_of
from ir.placement import Shard
from ir.spmd import argument_shards
from ir.types import ELEMENT_BYTES, elem_of, shape_of


@dataclass(frozen=True)
class Collective:
    """One collective of the program. `nbytes` is the size of its whole result in one unit (all parts together).

    `dims` is the shape of its operand in one unit, `dim` the dimension that is gathered or scattered; `calls` says how
    often a run of @main carries it out.
    """

    function: str
    kind: str
    axis: str
    dim: int | None
    dims: tuple[int, ...]
    elem: str
    nbytes: int
    why: str
    calls: int


@dataclass(frozen=True)
class Waste:
    """Padding or copies of one kind. `size` elements become `padded`; `share` of what the units hold is not needed."""

    what: str
    size: int
    padded: int
    share: float
    weights: int
    example: str


@dataclass(frozen=True)
class Memory:
    """Bytes of weights and caches: of the whole model, and in each unit."""

    weights: int
    weights_per_unit: int
    caches: int
    caches_per_unit: int


def call_counts(module: ModuleOp) -> Counter[str]:
    """How often one run of @main enters every function."""
    counts: Counter[str] = Counter({"main": 1})
    pending = ["main"]
    while pending:
        name = pending.pop()
        for op in find_function(module, name).body.block.ops:
            if isinstance(op, CallOp):
                callee = op.callee.string_value()
                if callee not in counts:
                    pending.append(callee)
                counts[callee] += counts[name]
    return counts


def collectives_report(module: ModuleOp) -> list[Collective]:
    """All collectives in program order, function by function. `local_slice` exchanges nothing and is not listed."""
    counts = call_counts(module)
    found: list[Collective] = []
    for function in module.ops:
        if not isinstance(function, FuncOp):
            continue
        for op in function.body.block.ops:
            if not isinstance(op, (tc.AllReduceOp, tc.AllGatherOp, tc.ReduceScatterOp)):
                continue
            large = op.x if isinstance(op, tc.ReduceScatterOp) else op.result
            found.append(
                Collective(
                    function=function.sym_name.data,
                    kind=op.name.removeprefix("tc."),
                    axis=op.axis.data,
                    dim=None if isinstance(op, tc.AllReduceOp) else op.dim.value.data,
                    dims=tuple(shape_of(op.x)),
                    elem=elem_of(op.x),
                    nbytes=math.prod(shape_of(large)) * ELEMENT_BYTES[elem_of(large)],
                    why=op.why.data,
                    calls=counts[function.sym_name.data],
                )
            )
    return found


def waste_report(module: ModuleOp) -> list[Waste]:
    """What is padded, and which weights are copied over `r`: one record for each kind and size."""
    mesh = tc.mesh_of(module) or tc.mesh_of(module, tc.PLAN)
    if mesh is None:
        return []
    vocabulary = _vocabulary(module)
    padded: dict[tuple[str, int, int], list[str]] = {}
    for op in module.walk():
        if not isinstance(op, tc.WeightOp) or (shard := op.placement()) is None:
            continue
        for factor in (f for dim in shard.dims for f in dim if f.axis):
            if factor.padded(mesh) != factor.size:
                what = _kind(factor.axis or "", op.fqn.data in vocabulary)
                inner = _inside(shard, factor.size) if what in ("intermediate", "vocabulary") else 1
                padded.setdefault((what, factor.size * inner, factor.padded(mesh) * inner), []).append(op.fqn.data)
    return [
        Waste(what, size, full, 1 - size / full, len(names), names[0]) for (what, size, full), names in padded.items()
    ]


def _vocabulary(module: ModuleOp) -> set[str]:
    """The names of the weights that token numbers, or the logits, index."""
    names: set[str] = set()
    for op in module.walk():
        if isinstance(op, tc.WeightOp) and (op.fqn.data.startswith("lm_head") or _is_table(op.result, module)):
            names.add(op.fqn.data)
    return names


def _is_table(value: SSAValue, module: ModuleOp) -> bool:
    for use in value.uses:
        user = use.operation
        if isinstance(user, tc.GatherOp) and use.index == 0:
            return True
        if isinstance(user, CallOp):
            argument = find_function(module, user.callee.string_value()).body.block.args[use.index]
            if _is_table(argument, module):
                return True
    return False


def _kind(axis: str, vocabulary: bool) -> str:
    names = {"kv": "key-value heads", "r": "query heads of a group"}
    return names.get(axis) or ("vocabulary" if vocabulary else "intermediate")


def _inside(shard: Shard, size: int) -> int:
    """Elements behind one unit's step in a dimension such as `1792@tp 8`."""
    dim = next(d for d in shard.dims if any(f.axis and f.size == size for f in d))
    at = next(i for i, f in enumerate(dim) if f.axis and f.size == size)
    return math.prod(f.size for f in dim[at + 1 :])


def memory_report(module: ModuleOp) -> Memory:
    """Bytes of weights and caches, whole and in each unit: copies and padding are their quotient times the units."""
    weights = own = caches = own_caches = 0
    for op in module.walk():
        if isinstance(op, tc.WeightOp):
            size = ELEMENT_BYTES[elem_of(op.result)]
            shard = op.placement()
            own += math.prod(shape_of(op.result)) * size
            weights += math.prod(shard.shape if shard is not None else shape_of(op.result)) * size
    main = find_function(module, "main")
    arguments = main.body.block.args
    for name, value, shard in zip(
        names_of(main, "arg_names", len(arguments)), arguments, argument_shards(main), strict=True
    ):
        if name.startswith("cache."):
            size = ELEMENT_BYTES[elem_of(value)]
            own_caches += math.prod(shape_of(value)) * size
            caches += math.prod(shard.shape if shard is not None else shape_of(value)) * size
    return Memory(weights, own, caches, own_caches)
