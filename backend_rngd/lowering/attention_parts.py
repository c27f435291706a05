"""Adds up what the slices of a pair computed of their parts of the keys.

Every slice holds weighted sums, largest scores and sums of weights of its part. Each of them gets the parts' statistics
by the ring and its share of the values' columns by a transfer, or all columns by the ring (if all slices work for one
pair, or only one of a pair's has to have the result), adds the parts with weights exp(own maximum - maximum), and
divides. A part without a visible key has a maximum far below the others and gets weight 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from xdsl.ir import SSAValue

from backend_rngd.isa.descriptors import (
    DM_SLICE_STRIDE,
    FLIT_BYTES,
    Alu,
    Commit,
    Dtype,
    Mode,
    Op,
    Operand,
    Source,
    VectorOp,
)
from backend_rngd.lowering.attention_types import State
from backend_rngd.lowering.emitter import Emitter, dm, operand_loops
from backend_rngd.lowering.move import ring_broadcast, ring_packet
from backend_rngd.lowering.tensor import round_up
from backend_rngd.machine.formulas import dma_requests


class _Weights(NamedTuple):
    """Of every part `[row][part]` and their `[row]` sums, by which they are divided already if it is None. scale: the
    multiplication by them, if VRF holds them."""

    weights: SSAValue
    total: SSAValue | None
    scale: VectorOp | None


class Parts:
    """`pairs` pairs of `parts` neighbouring slices each."""

    def __init__(self, em: Emitter, parts: int, pairs: int) -> None:
        self.em = em
        self.parts = parts
        self.pairs = pairs
        self._early: _Weights | None = None

    @property
    def slices(self) -> int:
        """Slices that hold a part."""
        return self.pairs * self.parts

    def combine(self, state: State, width: int, padded: int) -> SSAValue:
        """`[row][width / parts]` bf16 of every slice: its share of the columns of the pair's result."""
        rows, share, step = state.rows, width // self.parts, self.parts * DM_SLICE_STRIDE
        gathered = self.em.alloc(self.parts * rows * share * 4, "parts")
        self.em.dma(
            dm(state.sums),
            dm(gathered),
            [
                (self.pairs, step, step),
                (self.parts, share * 4, DM_SLICE_STRIDE),
                (self.parts, DM_SLICE_STRIDE, rows * share * 4),
                (rows, padded * 4, share * 4),
            ],
            share * 4,
        )
        return self._add(self.weigh(state.stats, rows), gathered, rows, share, share * 4, rows * share * 4)

    def whole(self, state: State, width: int, padded: int) -> SSAValue:
        """`[row][width]` bf16 of every slice: the pair's result."""
        rows = state.rows
        own = rows * padded
        step = own * 4 + FLIT_BYTES  # one column of all parts is read in a row: not always from the same bank
        every = self.em.alloc(self.parts * step, "parts")
        packet = ring_packet(own, 8)
        ring_broadcast(
            self.em, state.sums, [(own, 4)], Dtype.F32, packet, 0, self.parts, every, 0,
            [(own // packet, packet * 4)], step, [(packet, 4)], 8, slices=self.slices,
        )  # fmt: skip
        weights = self._early or self.weigh(state.stats, rows)
        return self._add(weights, every, rows, width, padded * 4, step)

    def by_ring(self, rows: int, width: int, padded: int) -> bool:
        """Whether `whole` takes less time than `combine`: a transfer of all shares, or a ring and longer passes."""
        machine, share = self.em.machine, width // self.parts
        requests = dma_requests(self.slices * self.parts * rows, share * 4, machine.dma_request_bytes)
        transfer = machine.dma_startup_cycles + 2 * requests
        ring = machine.switch_configuration_cycles + self.parts * rows * padded * 4 // FLIT_BYTES
        return ring + self.parts * rows * (width - share) // machine.vector_narrow < transfer

    def weigh_early(self, stats: SSAValue, rows: int) -> None:
        """As soon as the statistics of all parts are complete, before their sums are."""
        w, count = self.weigh(stats, rows), rows * self.parts
        assert w.total is not None
        divided = self.em.alloc(count * 4, "weights of parts")
        divide = self._operand(Alu.FP_DIV, Op.DIV, w.total, rows * 2, ((rows, 8), (self.parts, 0)), self.slices)
        commit = Commit(0, ((count, 4),), Dtype.F32, min(self.parts, 8))
        self._pass(w.weights, 0, [(count, 4)], commit, divided, self.slices, divide)
        self._early = _Weights(divided, None, None)  # VRF is used for other things meanwhile

    def weigh(self, stats: SSAValue, rows: int) -> _Weights:
        """What the parts' sums are multiplied by, and the sum of all weights."""
        em, parts, slices = self.em, self.parts, self.slices
        own = 16 * rows  # bytes of a part's statistics
        every = em.alloc(parts * own, "all maxima and sums")
        packet = 8 if rows % 2 == 0 else 4
        ring_broadcast(
            em, stats, [(4 * rows, 4)], Dtype.F32, packet, 0, parts, every, 0,
            [(4 * rows // packet, packet * 4)], own, [(packet, 4)], packet, slices=slices,
        )  # fmt: skip
        by_row = [(rows, 8), (parts, own)]
        one = Commit(0, ((rows, 8), (2, 4)), Dtype.F32, 2)
        top = em.alloc(rows * 8, "maximum")
        self._pass(every, 0, by_row, one, top, slices, VectorOp(Alu.REDUCE, Op.MAX, Mode.UNARY, count=parts, inner=1))
        weights = em.alloc(rows * parts * 4, "weights of parts")
        lower = self._operand(Alu.FP_FMA, Op.SUB, top, rows * 2, ((rows, 8), (parts, 0)), slices)
        whole = Commit(0, ((rows * parts, 4),), Dtype.F32, min(parts, 8))
        self._pass(every, 0, by_row, whole, weights, slices, lower, VectorOp(Alu.FP_EXP, Op.EXP, Mode.UNARY))
        total = em.alloc(rows * 8, "sum")
        scale = self._operand(Alu.FP_MUL0, Op.MUL, weights, rows * parts, ((rows * parts, 4),), slices)
        add = VectorOp(Alu.REDUCE, Op.ADD, Mode.UNARY, count=parts, inner=1)
        self._pass(every, rows * 8, by_row, one, total, slices, scale, add)
        return _Weights(weights, total, scale)

    def _add(self, w: _Weights, gathered: SSAValue, rows: int, share: int, pitch: int, step: int) -> SSAValue:
        """`[row][share]` bf16 of every slice: the parts' sums, weighted and divided. `gathered` has `pitch` bytes from
        row to row and `step` from part to part."""
        em, parts, slices = self.em, self.parts, self.slices
        inner = 8 if share % 8 == 0 else 4
        blocks = [(rows, pitch), (share // inner, inner * 4), (parts, step), (inner, 4)]
        repeated = ((rows, parts * 4), (share // inner, 0), (parts, 4), (inner, 0))
        if w.scale is None:
            scale = self._operand(Alu.FP_MUL0, Op.MUL, w.weights, rows * parts, repeated, slices)
        else:
            scale = replace(w.scale, operand=replace(w.scale.operand, loops=operand_loops(repeated)))
        values = em.alloc(rows * share * 2, "values")
        if slices < em.slices:  # the ring that follows reads every slice
            em.memset(values, 0, rows * share * 2)
        sums = values if w.total is None else em.alloc(rows * share * 4, "sums")
        dtype = Dtype.BF16 if w.total is None else Dtype.F32
        em.execute(
            em.fetch(0, blocks, Dtype.F32, inner),
            gathered,
            Commit(0, ((rows * share, dtype.bytes),), dtype, inner),
            sums,
            vector=(scale, VectorOp(Alu.REDUCE, Op.ADD, Mode.UNARY, count=parts, inner=inner)),
            slices=slices,
        )
        if w.total is None:
            return values
        divide = self._operand(Alu.FP_DIV, Op.DIV, w.total, rows * 2, ((rows, 8), (share, 0)), slices)
        em.execute(
            em.fetch(0, [(rows * share, 4)], Dtype.F32, inner),
            sums,
            Commit(0, ((rows * share, 2),), Dtype.BF16, inner),
            values,
            vector=(divide,),
            slices=slices,
        )
        return values

    def _pass(
        self,
        source: SSAValue,
        base: int,
        loops: Sequence[tuple[int, int]],
        commit: Commit,
        target: SSAValue,
        slices: int,
        *vector: VectorOp,
    ) -> None:
        """A pass over f32 numbers that lie apart."""
        fetch = self.em.fetch(base, loops, Dtype.F32, min(self.parts, 8))
        self.em.execute(fetch, source, commit, target, vector=vector, slices=slices)

    def _operand(
        self, alu: Alu, op: Op, source: SSAValue, count: int, loops: tuple[tuple[int, int], ...], slices: int
    ) -> VectorOp:
        """Load `count` f32 of `source` to VRF for an operation that walks them with `loops`."""
        em = self.em
        base = em.vrf_space(round_up(count * 4, 32))
        em.load_vrf(em.fetch(0, [(count, 4)], Dtype.F32, 2 if count % 4 else 4), source, base, slices)
        return VectorOp(alu, op, Mode.STREAM_OPERAND, Operand(Source.VRF, base=base, loops=operand_loops(loops)))
