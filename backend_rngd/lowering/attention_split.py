"""Attention of few tokens with the keys of a (batch row, KV head) pair split over several slices.

Every slice computes largest score, sum of weights and weighted sum of its part of the keys. Then each of them gets the
parts' statistics by the ring and its share of the values' columns by a transfer, adds the parts with weights
exp(own maximum - maximum), divides, and a ring broadcast brings the result to all slices. A part without a visible key
has a maximum far below the others and gets weight 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from xdsl.ir import SSAValue

from backend_rngd.isa.descriptors import (
    DM_SLICE_STRIDE,
    Alu,
    Commit,
    Dtype,
    Mode,
    Op,
    Operand,
    Source,
    Space,
    Switch,
    SwitchKind,
    VectorOp,
)
from backend_rngd.lowering.attention_head import KEY_MULTIPLE, AttentionParams, Cache, HeadLowering, Rows
from backend_rngd.lowering.attention_loops import pair_loops
from backend_rngd.lowering.emitter import dm, operand_loops
from backend_rngd.lowering.move import place_of, ring_broadcast, ring_packet
from backend_rngd.lowering.tensor import Dim, Tensor, feature_dims, round_up

if TYPE_CHECKING:
    from backend_rngd.lowering.attention import AttentionLowering

KEYS_A_SLICE = 64  # with fewer keys a slice the fixed cost of a pass outweighs the work that is saved
WEIGHT_BYTES = 2048  # weights of the parts in VRF


def key_parts(batch: int, tokens: int, p: AttentionParams, keys: int, width: int, slices: int) -> int:
    """Into how many parts (a power of two) the keys of a pair are split; 1: not at all."""
    pairs, rows = batch * p.kv_heads, tokens * p.group
    if batch > 1 and slices % p.kv_heads:
        return 1  # the result's ring broadcast enumerates whole batch rows
    parts = 1
    while (
        parts * KEYS_A_SLICE < keys
        and 2 * parts * pairs <= slices
        and keys % (2 * parts * KEY_MULTIPLE) == 0
        and width % (2 * parts * 4) == 0
        and 2 * parts * rows * 4 <= WEIGHT_BYTES
    ):
        parts *= 2
    return parts


class SplitKeys:
    """Lowers one attention op; pair i occupies slices [i * parts, (i + 1) * parts)."""

    def __init__(self, attention: AttentionLowering, head: HeadLowering, parts: int) -> None:
        self.attention = attention
        self.em = attention.em
        self.head = head
        self.parts = parts

    def run(self, q: Tensor, k: Cache, v: Cache, limit: Tensor, p: AttentionParams) -> Tensor:
        """See `AttentionLowering.run`."""
        em, parts, rows = self.em, self.parts, q.rows
        assert rows is not None
        head, tokens, group = k.padded, rows.length, p.group
        q_head = q.dims[1].stride if q.dims[1].kind == "feature" else head * 2
        pairs = [(b, h) for b in range(rows.batch) for h in range(p.kv_heads)]
        loops, _, _ = pair_loops(pairs)
        used = len(pairs) * parts
        count = tokens * group
        copies = (parts, 0, DM_SLICE_STRIDE)
        step = parts * DM_SLICE_STRIDE
        if len(pairs) == 1:  # every slice holds what it needs
            work = Rows(tokens, q.buffer, q.base, q.pitch, q_head, limit.buffer, limit.base, limit.pitch)
        else:
            mine = em.alloc(count * head * 2, "queries")
            em.dma(
                place_of(q),
                dm(mine),
                [
                    *((n, b * tokens * q.pitch + h * group * q_head, s * step) for n, b, h, s in loops),
                    copies,
                    (tokens, q.pitch, group * head * 2),
                    (group, q_head, head * 2),
                ],
                head * 2,
            )
            if rows.batch == 1:
                lim, lim_base, lim_pitch = limit.buffer, limit.base, limit.pitch
            else:
                lim = em.alloc(tokens * 8, "limits")
                where = [*((n, b * tokens * limit.pitch, s * step) for n, b, _, s in loops), copies]
                em.dma(dm(limit.buffer, limit.base), dm(lim), [*where, (tokens, limit.pitch, 8)], 8)
                lim_base, lim_pitch = 0, 8
            work = Rows(tokens, mine, 0, group * head * 2, head * 2, lim, lim_base, lim_pitch)

        def load(cache: Cache, start: int, keys: int) -> SSAValue:
            tile = self.attention.tile(cache, keys, keys)
            where = [(n, b * cache.batch_stride + h * cache.head_stride, s * step) for n, b, h, s in loops]
            where.append((parts, cache.keys * cache.width * 2, DM_SLICE_STRIDE))
            self.attention.load(cache, start * cache.width * 2, keys, tile, 0, where)
            return tile

        own = [replace(cache, keys=cache.keys // parts) for cache in (k, v)]
        acc, stats = self.head.partial(work, p, own[0], own[1], load, used)
        share = v.width // parts
        gathered = em.alloc(parts * count * share * 4, "parts")
        em.dma(
            dm(acc),
            dm(gathered),
            [
                (len(pairs), step, step),
                (parts, share * 4, DM_SLICE_STRIDE),
                (parts, DM_SLICE_STRIDE, count * share * 4),
                (count, v.padded * 4, share * 4),
            ],
            share * 4,
        )
        values = self._combine(stats, gathered, count, share, used)
        return self._everywhere(values, q, p, v, share)

    def _combine(self, stats: SSAValue, gathered: SSAValue, rows: int, share: int, slices: int) -> SSAValue:
        """`[row][share]` bf16 of every slice: the parts' sums, weighted and divided."""
        em, parts = self.em, self.parts
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
        inner = 8 if share % 8 == 0 else 4
        blocks = [(rows, share * 4), (share // inner, inner * 4), (parts, rows * share * 4), (inner, 4)]
        repeated = operand_loops(((rows, parts * 4), (share // inner, 0), (parts, 4), (inner, 0)))
        scale = replace(scale, operand=replace(scale.operand, loops=repeated))
        sums = em.alloc(rows * share * 4, "sums")
        em.execute(
            em.fetch(0, blocks, Dtype.F32, inner),
            gathered,
            Commit(0, ((rows * share, 4),), Dtype.F32, inner),
            sums,
            vector=(scale, VectorOp(Alu.REDUCE, Op.ADD, Mode.UNARY, count=parts, inner=inner)),
            slices=slices,
        )
        values = em.alloc(rows * share * 2, "values")
        if slices < em.slices:  # the ring that follows reads every slice
            em.memset(values, 0, rows * share * 2)
        divide = self._operand(Alu.FP_DIV, Op.DIV, total, rows * 2, ((rows, 8), (share, 0)), slices)
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

    def _everywhere(self, values: SSAValue, q: Tensor, p: AttentionParams, v: Cache, share: int) -> Tensor:
        """The columns of all pairs as `b s h e` in every slice. Slices that hold no pair write behind the result."""
        em, parts, rows = self.em, self.parts, q.rows
        assert rows is not None
        heads, places = p.kv_heads * p.group, em.slices // parts
        strides, pitch = feature_dims([heads, v.width], 2)
        run = p.group * v.width * 2
        batches = 1 if rows.batch == 1 else places // p.kv_heads
        across = places if rows.batch == 1 else p.kv_heads
        pitch = max(pitch, across * run)
        nbytes = max(rows.local, batches * rows.length) * pitch
        out = em.alloc(nbytes, "attention")
        tokens_used = batches * rows.length
        if tokens_used < rows.local:  # rows that no token uses take part in what follows
            em.memset(out, tokens_used * pitch, (rows.local - tokens_used) * pitch)
        # Long packets keep consecutive writes on different banks, see `ring_packet`.
        packet = ring_packet(share, 16)
        blocks = share // packet
        em.execute(
            em.fetch(0, [(rows.length * p.group * share, 2)], Dtype.BF16, packet),
            values,
            Commit(
                0,
                (
                    (rows.length, pitch),
                    (p.group, v.width * 2),
                    (blocks, packet * 2),
                    (batches, rows.length * pitch),
                    (across, run),
                    (parts, share * 2),
                    (packet, 2),
                ),
                Dtype.BF16,
                min(packet, 16),
            ),
            out,
            switch=Switch(SwitchKind.BROADCAST01, 1, em.slices, rows.length * p.group * blocks),
        )
        dims = (
            q.dims[0],
            q.dims[2],
            Dim("feature", heads, strides[0]) if heads > 1 else Dim("one", 1),
            Dim("feature", v.width, strides[1]),
        )
        return Tensor(out, Space.DM, Dtype.BF16, dims, rows, 0, pitch)
