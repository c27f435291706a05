"""Facts about buffers of `rngd` routines: which are never written, how many bytes are alive where."""

from __future__ import annotations

import numpy as np
from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import Operation, SSAValue

from backend_rngd.attributes import bytes_of, space_of
from backend_rngd.dialect import AllocOp, CallOp, GetGlobalOp, GlobalOp, InstructionOp, RoutineOp

CONSTANT_KINDS = frozenset({"weight", "constant"})


def constant_values(module: ModuleOp) -> set[SSAValue]:
    """HBM buffers that no instruction writes: weight and constant globals, and arguments always bound to them."""
    kinds = {op.sym_name.data: op.kind.data for op in module.body.block.ops if isinstance(op, GlobalOp)}
    routines = {op.sym_name.data: op for op in module.body.block.ops if isinstance(op, RoutineOp)}
    bound: dict[tuple[str, int], list[SSAValue]] = {}
    out: set[SSAValue] = set()
    for routine in routines.values():
        for op in routine.block.ops:
            if isinstance(op, GetGlobalOp) and kinds.get(op.symbol.string_value()) in CONSTANT_KINDS:
                out.add(op.result)
            elif isinstance(op, CallOp):
                for i, value in enumerate(op.arguments):
                    bound.setdefault((op.callee.string_value(), i), []).append(value)
    changed = True
    while changed:  # callers may pass on arguments of their own
        changed = False
        for (name, i), values in bound.items():
            argument = routines[name].block.args[i]
            if argument not in out and all(v in out for v in values):
                out.add(argument)
                changed = True
    return out


class Live:
    """DM bytes alive at each instruction of a routine (all segments), by index."""

    def __init__(self, index: dict[Operation, int], counts: np.ndarray) -> None:
        self.index = index
        self.counts = counts


def live_bytes(routine: RoutineOp) -> Live:
    """Bytes of DM locals between their first and last use."""
    index: dict[Operation, int] = {}
    first: dict[SSAValue, int] = {}
    last: dict[SSAValue, int] = {}
    for op in routine.block.ops:
        if isinstance(op, (InstructionOp, CallOp)):
            index[op] = len(index)
        elif isinstance(op, AllocOp | GetGlobalOp):
            continue
        for value in op.operands:
            if isinstance(value.owner, AllocOp) and space_of(value) == "dm":
                at = max(len(index) - 1, 0)
                first.setdefault(value, at)
                last[value] = at
    counts = np.zeros(len(index) + 1, np.int64)
    for value, start in first.items():
        counts[start : last[value] + 1] += bytes_of(value)
    return Live(index, counts)
