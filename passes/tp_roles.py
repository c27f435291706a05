"""What a projection is for: where the output axis of a contraction goes decides how its weight is cut.

The axis is followed through element-wise operations, layout changes and cache updates to the heads of an attention, to
the summed axis of another contraction, or to the logits. Packed projections (qkv, gate and up) reach several ends by
slices.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from xdsl.dialects.func import CallOp, FuncOp, ReturnOp
from xdsl.ir import Operation, SSAValue

from ir.axes import factors
from ir.dialects import tc
from ir.interpreter import names_of
from ir.types import dims_of, shape_of

LOGITS = "logits"


@dataclass(frozen=True)
class End:
    """Where a part of an axis ends: `heads` or `kv` of `op`, `contract`, `logits`, or `other` with a reason."""

    kind: str
    op: Operation
    part: tuple[int, int]
    reason: str = ""


@dataclass
class Follower:
    """Follows axes through one function."""

    function: FuncOp
    seen: set[tuple[SSAValue, int, tuple[int, int]]] = field(default_factory=set[tuple[SSAValue, int, tuple[int, int]]])

    def ends(self, value: SSAValue, dim: int) -> list[End]:
        """Every end of a dimension of a value. `part` is (start, size) in that dimension."""
        self.seen.clear()
        return list(self._follow(value, dim, (0, shape_of(value)[dim])))

    def _follow(self, value: SSAValue, dim: int, part: tuple[int, int]) -> Iterator[End]:
        if (value, dim, part) in self.seen:
            return
        self.seen.add((value, dim, part))
        for use in value.uses:
            yield from self._use(use.operation, use.index, dim, part)

    def _use(self, op: Operation, index: int, dim: int, part: tuple[int, int]) -> Iterator[End]:
        match op:
            case ReturnOp():
                name = names_of(self.function, "result_names", len(op.operands))[index]
                if name == LOGITS:
                    yield End(LOGITS, op, part)
                elif not name.startswith("cache."):
                    yield End("other", op, part, f"it is part of result {name}")
            case tc.AttentionOp() if dim == 1 and index in (0, 1, 2):
                yield End("heads" if index == 0 else "kv", op, part)
            case tc.ReshapeOp():
                yield from self._reshape(op, dim, part)
            case tc.SliceOp() if op.axis.value.data == dim:
                _, start, size = op.bounds()
                if part != (0, shape_of(op.x)[dim]):
                    yield End("other", op, part, "it is sliced twice")
                else:
                    yield from self._follow(op.result, dim, (start, size))
            case (
                tc.ContractOp()
                | tc.MapOp()
                | tc.ReduceOp()
                | tc.TransposeOp()
                | tc.SliceOp()
                | tc.ConcatOp()
                | (tc.KvUpdateOp() | tc.GatherOp())
            ):
                rule = op.rule()
                name = rule.inputs[index][dim]
                if name in rule.output and name not in rule.unsharded:
                    yield from self._follow(op.results[0], rule.output.index(name), part)
                elif isinstance(op, tc.ContractOp):
                    yield End("contract", op, part)
                elif not isinstance(op, tc.ReduceOp):  # units combine what they reduce
                    yield End("other", op, part, f"{op.name} needs all of it")
            case CallOp():
                yield End("other", op, part, f"it is passed to @{op.callee.string_value()}")
            case _:
                yield End("other", op, part, f"{op.name} needs all of it")

    def _reshape(self, op: tc.ReshapeOp, dim: int, part: tuple[int, int]) -> Iterator[End]:
        """The outermost part of a dimension is what can be cut; it must stay outermost."""
        rule = op.rule()
        sizes = rule.sizes([dims_of(op.x), dims_of(op.result)])
        names = [a for a in factors(rule.inputs[0][dim]) if sizes.get(a) != 1]
        for place, target in enumerate(rule.output):
            found = [a for a in factors(target) if sizes.get(a) != 1]
            if names and found and names[0] == found[0] and names[0] not in rule.unsharded:
                yield from self._follow(op.result, place, part)
                return
        yield End("other", op, part, "a reshape merges it into another dimension")
