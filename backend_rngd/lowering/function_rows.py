"""Element-wise operations over tokens in HBM: a few rows of every slice go through all of them, then the next few.

Nothing between the operations goes back to HBM, what they read arrives once, and the rows of the next chunk arrive
while this one is computed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from typing_extensions import override
from xdsl.ir import Operation, SSAValue

from backend_rngd.isa.descriptors import DM_SLICE_STRIDE, Dtype, Space
from backend_rngd.lowering.emitter import dm, hbm
from backend_rngd.lowering.function_base import FunctionBase
from backend_rngd.lowering.move import store_rows
from backend_rngd.lowering.program import SPILL_BYTES
from backend_rngd.lowering.tensor import RowSpace, Tensor, round_up
from backend_rngd.lowering.values import Value, Weight, dtype_of, uniform
from backend_rngd.lowering.vector import Wanted, output_tensor
from ir.dialects import tc
from ir.types import shape_of

ROW_WISE = (tc.MapOp, tc.ReduceOp, tc.ConcatOp, tc.SliceOp)


@dataclass
class _Source:
    """Bytes [start, end) of the rows of a buffer in HBM, which views in a region read."""

    view: Tensor
    start: int
    end: int

    @property
    def pitch(self) -> int:
        """Of a row in DM."""
        nbytes = self.end - self.start
        return round_up(nbytes, 64 if nbytes >= 64 else 16)


@dataclass
class _Region:
    """Operations in a row, over the same rows. made: their results; outside: those that others read."""

    rows: RowSpace
    ops: list[Operation] = field(default_factory=list[Operation])
    sources: list[_Source] = field(default_factory=list[_Source])
    given: dict[SSAValue, Tensor] = field(default_factory=dict[SSAValue, Tensor])
    made: list[SSAValue] = field(default_factory=list[SSAValue])
    outside: list[SSAValue] = field(default_factory=list[SSAValue])


class RowWise(FunctionBase):
    """Lowers chains of element-wise operations chunk by chunk."""

    @override
    def in_chunks(self, op: Operation) -> bool:
        region = self._region(op)
        if region is None:
            return False
        local = region.rows.local
        count = -(-local // self._chunks(region))
        held = self._load(region, 0, min(count, local))
        if count < local:
            self._constants(region)
        full: dict[SSAValue, Tensor] = {}
        before: dict[SSAValue, Value] = {v: self.env[v] for v in region.given}
        spill, self.vector.spill = self.vector.spill, self.em.machine.dm_slice_bytes  # all of a chunk stays in DM
        for row in range(0, local, count):
            rows = min(count, local - row)
            here, coming = held, row + count
            if coming < local:
                held = self._load(region, coming, min(count, local - coming))
            self._compute(region, here, row, rows, full)
        self.vector.spill = spill
        for value in region.made:
            self.env.pop(value, None)
        self.env |= before | full
        self.fused |= set(region.ops)
        return True

    # What belongs together ------------------------------------------------------------
    def _region(self, first: Operation) -> _Region | None:
        """The row-wise operations from `first` on that read the same rows; None unless some of them lie in HBM."""
        if not isinstance(first, ROW_WISE[:3]):
            return None
        rows = next((t.rows for o in first.operands if isinstance(t := self.env.get(o), Tensor) and t.rows), None)
        if rows is None or rows.replicated:
            return None
        region = _Region(rows)
        op: Operation | None = first
        while op is not None and self._belongs(op, region):
            region.ops.append(op)
            region.made += op.results
            op = op.next_op
        inside = set(region.ops)
        while region.ops and isinstance(region.ops[-1], tc.SliceOp):
            inside.discard(region.ops.pop())
        region.made = [r for o in region.ops for r in o.results]
        region.outside = [r for r in region.made if any(use.operation not in inside for use in r.uses)]
        if any(isinstance(r.owner, tc.SliceOp) for r in region.outside):
            return None
        for o in region.ops:
            region.given |= {
                v: t for v in o.operands if v not in region.made and isinstance(t := self.env[v], Tensor) and t.rows
            }
        for t in region.given.values():
            if t.space == Space.HBM:
                _add_source(region.sources, t)
        return region if region.sources and self._row_bytes(region) <= self._room() else None

    def _belongs(self, op: Operation, region: _Region) -> bool:
        if not isinstance(op, ROW_WISE) or op in self.fused:
            return False
        for value in op.operands:
            if value in region.made:
                continue
            held = self.env.get(value)
            if isinstance(held, Weight):
                continue
            if not isinstance(held, Tensor) or held.rows not in (None, region.rows) or held.dtype == Dtype.I32:
                return False
        axis = len(shape_of(op.results[0])) - 1
        if isinstance(op, tc.SliceOp):
            return op.bounds()[0] == axis
        return not isinstance(op, tc.ConcatOp) or int(op.axis.value.data) == axis

    def _chunks(self, region: _Region) -> int:
        """How many chunks: more of them hide more of the computation behind transfers, but each starts some."""
        machine, rows = self.em.machine, region.rows
        tokens, nbytes = rows.batch * rows.length, self._row_bytes(region)
        least = -(-rows.local // (self._room() // nbytes))
        work = 0.0
        for op in region.ops:
            if not isinstance(op, tc.SliceOp):
                shapes = [shape_of(v) for v in op.operands]
                widest = max(math.prod(shape) for shape in shapes)
                work += widest * sum(shape[-1:] == shapes[0][-1:] for shape in shapes)
        work *= rows.local / tokens / machine.vector_narrow
        stored = sum(self._output_of(v) is not None or rows.local * nbytes > self.spill for v in region.outside)
        started = (len(region.sources) + stored) * machine.dma_startup_cycles
        return max(1, min(rows.local, max(least, round(math.sqrt(work / started)))))

    def _row_bytes(self, region: _Region) -> int:
        """Bytes of a row of all values."""
        tokens = region.rows.batch * region.rows.length
        made = sum(math.prod(shape_of(v)) // tokens * dtype_of(v).bytes for v in region.made)
        return made + sum(s.pitch for s in region.sources)

    def _room(self) -> int:
        """Bytes of a slice for a chunk: two are on the way, beside weights that came early and a value that stays."""
        return (self.em.machine.dm_slice_bytes - self.em.early_bytes - SPILL_BYTES) // 2

    # Chunks ------------------------------------------------------------
    def _load(self, region: _Region, row: int, count: int) -> list[SSAValue]:
        """Rows [row, row + count) of every slice, a buffer for each source."""
        em, rows = self.em, region.rows
        buffers: list[SSAValue] = []
        for s in region.sources:
            buffers.append(em.alloc(count * s.pitch, "rows"))
            loops = [(em.slices, rows.local * s.view.pitch, DM_SLICE_STRIDE), (count, s.view.pitch, s.pitch)]
            start = hbm(s.view.buffer, s.start + row * s.view.pitch)
            em.dma(start, dm(buffers[-1]), loops, s.end - s.start)
        return buffers

    def _constants(self, region: _Region) -> None:
        """Bring the parameters of the first chunk behind its rows, ahead of those of the next."""
        for op in region.ops:
            for value in op.operands:
                held = self.env.get(value)
                if isinstance(held, Weight) and uniform(held) is None:
                    self.tensor(value)

    def _compute(
        self, region: _Region, buffers: Sequence[SSAValue], row: int, count: int, full: dict[SSAValue, Tensor]
    ) -> None:
        rows = replace(region.rows, local=count)
        for value, t in region.given.items():
            if t.space == Space.DM:
                self.env[value] = replace(t, rows=rows, base=t.base + row * t.pitch)
                continue
            i = next(i for i, s in enumerate(region.sources) if _same_rows(s.view, t))
            s = region.sources[i]
            self.env[value] = replace(
                t, buffer=buffers[i], space=Space.DM, rows=rows, base=t.base - s.start, pitch=s.pitch
            )
        for op in region.ops:
            result = op.results[0]
            if result in region.outside:
                self.vector.allocate = partial(self._allocate, result, region.rows, row, full)
            getattr(self, "op_" + op.name.replace(".", "_"))(op)
            self.vector.allocate = None
            if result in region.outside and full[result].space == Space.HBM:
                held, goal = self.tensor(result), full[result]
                store_rows(self.em, held, replace(goal, base=goal.base + row * goal.pitch), count)

    def _allocate(
        self, value: SSAValue, rows: RowSpace, row: int, full: dict[SSAValue, Tensor], wanted: Wanted
    ) -> Tensor:
        """Where a chunk of `value` goes: its place among all rows if they stay in DM, else a buffer of its own."""
        if value not in full:
            full[value] = self._whole(value, wanted._replace(rows=rows))
        whole = full[value]
        if whole.space == Space.DM:
            return replace(whole, rows=wanted.rows, base=whole.base + row * whole.pitch)
        return output_tensor(self.em, wanted, self.vector.spill)

    def _output_of(self, value: SSAValue) -> str | None:
        """The program output that a value is, whatever else reads it."""
        return self.output_name(value) or self.outputs.get(value)

    def _whole(self, value: SSAValue, wanted: Wanted) -> Tensor:
        name = self._output_of(value)
        if name is None:
            return output_tensor(self.em, wanted, self.spill)
        assert wanted.rows is not None
        dims, pitch = wanted._replace(spacing=None).layout()
        buffer = self.em.global_buffer(name, "hbm", wanted.rows.physical * pitch, "output")
        return Tensor(buffer, Space.HBM, wanted.dtype, dims, wanted.rows, 0, pitch)


def _same_rows(a: Tensor, b: Tensor) -> bool:
    return a.buffer is b.buffer and a.pitch == b.pitch


def _add_source(sources: list[_Source], t: Tensor) -> None:
    """Widen the source that holds the rows of `t`, or add one."""
    start = t.base // 16 * 16
    end = min(round_up(t.base + t.row_bytes, 16), t.pitch)
    for s in sources:
        if _same_rows(s.view, t):
            s.start, s.end = min(s.start, start), max(s.end, end)
            return
    sources.append(_Source(t, start, end))
