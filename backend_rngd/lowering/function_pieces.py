"""Element-wise operations of few tokens whose features lie in pieces on the slices, see `pieces.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from typing_extensions import override
from xdsl.ir import SSAValue

from backend_rngd.isa.descriptors import DM_SLICE_STRIDE, Dtype, Space
from backend_rngd.lowering.emitter import dm, hbm
from backend_rngd.lowering.function_base import FunctionBase
from backend_rngd.lowering.pieces import Pieces, can_cut, own_rows, sum_of_slices, to_pieces
from backend_rngd.lowering.tensor import Dim, Tensor
from backend_rngd.lowering.values import Weight, dtype_of, uniform
from ir import expr as ex
from ir.dialects import tc


class InPieces(FunctionBase):
    """Lowers maps and reductions of values in pieces."""

    def pieces(self, value: SSAValue) -> Pieces:
        """A value of few tokens in pieces."""
        v = self.env[value]
        if isinstance(v, Pieces):
            return v
        if value not in self.cut:
            self.cut[value] = to_pieces(self.em, self.tensor(value))
        return self.cut[value]

    @override
    def in_pieces(self, op: tc.MapOp | tc.ReduceOp, reduce: str | None) -> bool:
        number = next((i for i, o in enumerate(op.operands) if isinstance(self.env.get(o), Pieces)), None)
        if number is None:
            return False
        rule = op.rule()
        first, axes = self.env[op.operands[number]], rule.inputs[number]
        assert isinstance(first, Pieces)
        axis = axes[next(i for i, d in enumerate(first.dims) if d.kind == "feature")]
        result, dtype = op.results[0], dtype_of(op.results[0])
        stays = tuple(rule.output) == tuple(axes) and reduce is None
        summed = tuple(rule.output) == tuple(a for a in axes if a != axis) and reduce is not None and dtype == Dtype.F32
        sides = list(zip(op.operands, rule.inputs, strict=True))
        if not (stays or summed) or not all(self._fits(v, names, axes, axis, first) for v, names in sides):
            return False
        inputs: list[Tensor] = []
        names: list[tuple[str, ...]] = []
        substitution: dict[int, ex.Expr] = {}
        for i, (value, side) in enumerate(sides):
            v = self.env[value]
            constant = uniform(v) if isinstance(v, Weight) else None
            substitution[i] = ex.Const(constant) if constant is not None else ex.Input(len(inputs))
            if constant is None:
                inputs.append(self._held(value, axis in side, first))
                names.append(side)
        e = ex.substitute(op.expression(), substitution)
        held = self.vector.map(e, inputs, names, rule.output, dtype, reduce)
        if reduce is None:
            self.env[result] = Pieces(held, first.dims, first.rows)
        else:
            self.env[result] = sum_of_slices(self.em, held, reduce)
        return True

    def _fits(self, value: SSAValue, names: Sequence[str], axes: Sequence[str], axis: str, first: Pieces) -> bool:
        """Whether an operand with axes `names` can take part in pieces like `first`, whose axes are `axes`."""
        v = self.env.get(value)
        if isinstance(v, Weight):
            return uniform(v) is not None or axis not in names or tuple(names) == (axis,)
        if axis not in names:
            return isinstance(v, Tensor) and v.space == Space.DM and v.rows in (None, first.rows)
        same = tuple(names) == tuple(axes) and isinstance(v, (Tensor, Pieces)) and v.rows == first.rows
        if isinstance(v, Tensor):
            return same and v.dtype != Dtype.I32 and can_cut(v, self.em.slices)
        return same

    def _held(self, value: SSAValue, is_cut: bool, first: Pieces) -> Tensor:
        """What a slice has of an operand, its rows seen as rows of the slice's own."""
        v = self.env[value]
        if isinstance(v, Weight) and is_cut:
            if value not in self.cut_weights:
                self.cut_weights[value] = self._cut_weight(v)
            return self.cut_weights[value]
        held = self.pieces(value).held if is_cut else self.tensor(value)
        return replace(held, rows=own_rows(first.rows)) if held.rows is not None else held

    def _cut_weight(self, w: Weight) -> Tensor:
        size = w.shape[0] // self.em.slices
        nbytes = size * w.dtype.bytes
        buffer = self.em.alloc(nbytes, "piece")
        self.em.dma(hbm(w.vector()), dm(buffer), [(self.em.slices, nbytes, DM_SLICE_STRIDE)], nbytes)
        return Tensor(buffer, Space.DM, w.dtype, (Dim("feature", size, w.dtype.bytes),), None, 0, nbytes)
