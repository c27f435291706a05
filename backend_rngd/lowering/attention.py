"""Attention over K and V in HBM: scores, mask, softmax and the weighted sum, all inside a slice.

Rows of a slice are (token, query head of one KV head). Few tokens: every (batch, KV head) pair has its own slice. Many
tokens: tokens stay on their slices and the KV heads are walked one after the other; K and V arrive spread over the
slices of a batch row and go round the ring.

Scores `[row][key]` (f32) come from K in TRF (lane = key) with queries streaming; the sum comes from the probabilities
in TRF (lane = row, PacketBroadcast) with V streaming, 32 value columns a packet and keys summed by the time reducer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from xdsl.ir import SSAValue

from backend_rngd.isa.descriptors import (
    BROADCAST,
    DM_SLICE_STRIDE,
    REDUCE,
    Alu,
    Commit,
    Contract,
    Dtype,
    LaneMode,
    Mode,
    Op,
    Operand,
    Source,
    Space,
    VectorOp,
)
from backend_rngd.lowering.contract import k_multiple
from backend_rngd.lowering.emitter import Emitter, operand_loops
from backend_rngd.lowering.move import ring_broadcast, ring_packet
from backend_rngd.lowering.tensor import Dim, Tensor, feature_dims, round_up
from ir.errors import UnsupportedError

SCORE_BYTES = 64 * 1024  # scores of a chunk of rows a slice
TILE_BYTES = 48 * 1024  # one K or V tile a slice
PairLoops = list[tuple[int, int, int, int]]  # (count, batch step, head step, slice step)
KEY_MULTIPLE = 16  # keys are padded (and masked) to whole flits of probabilities
HIDDEN = 1.0e30  # penalty per position of distance beyond what is visible


@dataclass(frozen=True)
class Cache:
    """K or V in HBM: `[batch][kv head][capacity][width]` bf16; `keys` of the capacity are looked at."""

    buffer: SSAValue
    batch_stride: int
    head_stride: int
    keys: int
    width: int

    @property
    def padded(self) -> int:
        """Values of a row in DM: whole flits (16 bf16), the rest zero."""
        return round_up(self.width, 16)


@dataclass(frozen=True)
class AttentionParams:
    """Attributes of the op. limit: last visible key of a row is its position (causal) or its length - 1."""

    scale: float
    causal: bool
    window: int
    softcap: float
    group: int
    kv_heads: int


@dataclass(frozen=True)
class _Rows:
    """Rows of one step in a slice: `tokens` local tokens x `group` heads, q and limits given by strides."""

    tokens: int
    q: SSAValue
    q_base: int
    q_token: int
    q_head: int
    limit: SSAValue
    limit_base: int
    limit_token: int


class AttentionLowering:
    """Lowers one attention op."""

    def __init__(self, em: Emitter, iota: SSAValue) -> None:
        """iota: DM buffer with 0, 1, 2, ... as f32 in every slice, at least as long as the keys."""
        self.em = em
        self.iota = iota
        self.half = 0

    def run(self, q: Tensor, k: Cache, v: Cache, limit: Tensor, p: AttentionParams) -> Tensor:
        """q `b h s d`; limit: f32 per token (8 B apart); result `b s h e` with heads and values contiguous."""
        if k.width % 4 or v.width % 4:
            raise UnsupportedError(
                f"attention heads of {k.width} and {v.width} values",
                "a DMA writes multiples of 8 B (4 bf16)",
                "use a model whose head size is a multiple of 4",
            )
        if q.space == Space.HBM:
            raise UnsupportedError(
                "attention over queries that do not fit DM", "they are read per head", "use a smaller bucket"
            )
        rows = q.rows
        assert rows is not None
        self._need_contiguous(q)
        if k.padded != k.width:
            q = self._pad_heads(q, k.padded)
        return self._pairs(q, k, v, limit, p) if rows.replicated else self._tokens(q, k, v, limit, p)

    def _pad_heads(self, q: Tensor, padded: int) -> Tensor:
        """q with zeros behind every head, so that contraction packets are whole flits."""
        em, rows = self.em, q.rows
        assert rows is not None
        heads, width = q.dims[1].size, q.dims[3].size
        pitch = heads * padded * 2
        buffer = em.alloc(rows.local * pitch, "queries")
        em.memset(buffer, 0, rows.local * pitch)
        em.execute(
            em.fetch(q.base, [(rows.local, q.pitch), (heads, q.dims[1].stride), (width, 2)], Dtype.BF16, 4),
            q.buffer,
            Commit(0, ((rows.local, pitch), (heads, padded * 2), (width, 2)), Dtype.BF16, 4),
            buffer,
        )
        dims = (q.dims[0], Dim("feature", heads, padded * 2), q.dims[2], Dim("feature", width, 2))
        return Tensor(buffer, Space.DM, q.dtype, dims, rows, 0, pitch)

    def _tile(self, cache: Cache, count: int, real: int) -> SSAValue:
        """A DM buffer for `count` keys of a cache, `real` of which exist; its padding is zero."""
        nbytes = count * cache.padded * 2
        tile = self.em.alloc(nbytes, "keys")
        if cache.padded != cache.width or real < count:
            self.em.memset(tile, 0, nbytes)
        return tile

    def _load(
        self, cache: Cache, base: int, count: int, tile: SSAValue, target: int, loops: Sequence[tuple[int, int, int]]
    ) -> None:
        """Rows of a cache from HBM byte `base` to DM address `target` of `tile`, repeated by `loops`."""
        self.em.dma(
            cache.buffer,
            Space.HBM,
            base,
            tile,
            Space.DM,
            target,
            [*loops, (count, cache.width * 2, cache.padded * 2)],
            cache.width * 2,
        )

    # Few tokens: one (batch, KV head) pair a slice -------------------------------------------------------------------
    def _pairs(self, q: Tensor, k: Cache, v: Cache, limit: Tensor, p: AttentionParams) -> Tensor:
        em, rows = self.em, q.rows
        assert rows is not None
        head, group, tokens = k.padded, p.group, rows.length
        q_head = q.dims[1].stride if q.dims[1].kind == "feature" else head * 2
        out = self._output(q, v, p)
        used = rows.batch * rows.length
        if used < rows.local:  # rows that no token uses take part in what follows
            em.memset(out.buffer, out.base + used * out.pitch, (rows.local - used) * out.pitch)
        pairs = [(b, h) for b in range(rows.batch) for h in range(p.kv_heads)]
        per_step = em.slices // p.kv_heads * p.kv_heads if rows.batch > 1 else em.slices
        if p.kv_heads > em.slices:
            per_step = em.slices
        for first in range(0, len(pairs), per_step):
            some = pairs[first : first + per_step]
            loops, b0, h0 = _pair_loops(some)
            mine = em.alloc(tokens * group * head * 2, "queries")
            lim = em.alloc(tokens * 8, "limits")
            em.dma(
                q.buffer,
                Space.DM,
                q.base + b0 * tokens * q.pitch + h0 * group * q_head,
                mine,
                Space.DM,
                0,
                [
                    *((n, b * tokens * q.pitch + h * group * q_head, s * DM_SLICE_STRIDE) for n, b, h, s in loops),
                    (tokens, q.pitch, group * head * 2),
                    (group, q_head, head * 2),
                ],
                head * 2,
            )
            em.dma(
                limit.buffer,
                Space.DM,
                limit.base + b0 * tokens * limit.pitch,
                lim,
                Space.DM,
                0,
                [
                    *((n, b * tokens * limit.pitch, s * DM_SLICE_STRIDE) for n, b, _, s in loops),
                    (tokens, limit.pitch, 8),
                ],
                8,
            )
            step = _Rows(tokens, mine, 0, group * head * 2, head * 2, lim, 0, 8)

            def load(
                cache: Cache, start: int, count: int, b0: int = b0, h0: int = h0, loops: PairLoops = loops
            ) -> SSAValue:
                real = min(count, cache.keys - start)
                tile = self._tile(cache, count, real)
                base = b0 * cache.batch_stride + h0 * cache.head_stride + start * cache.width * 2
                steps = [
                    (n, b * cache.batch_stride + h * cache.head_stride, s * DM_SLICE_STRIDE) for n, b, h, s in loops
                ]
                self._load(cache, base, real, tile, 0, steps)
                return tile

            result = em.alloc(tokens * group * v.width * 2, "values")
            self._heads(step, p, k, v, load, len(some), result, group * v.width * 2, v.width * 2)
            run = group * v.width * 2
            em.dma(
                result,
                Space.DM,
                0,
                out.buffer,
                Space.DM,
                out.base + b0 * tokens * out.pitch + h0 * run,
                [
                    (em.slices, 0, DM_SLICE_STRIDE),
                    *((n, s * DM_SLICE_STRIDE, b * tokens * out.pitch + h * run) for n, b, h, s in loops),
                    (tokens, run, out.pitch),
                ],
                run,
            )
        return out

    def _need_contiguous(self, q: Tensor) -> None:
        d = q.dims[3]
        if d.kind == "feature" and d.stride != 2:
            raise UnsupportedError(
                "queries whose head values are not contiguous", "packets read 32 of them", "copy them first"
            )

    def _output(self, q: Tensor, v: Cache, p: AttentionParams) -> Tensor:
        rows = q.rows
        assert rows is not None
        heads = p.kv_heads * p.group
        strides, pitch = feature_dims([heads, v.width], 2)
        dims = (
            q.dims[0],
            q.dims[2],
            Dim("feature", heads, strides[0]) if heads > 1 else Dim("one", 1),
            Dim("feature", v.width, strides[1]),
        )
        return Tensor(self.em.alloc(rows.local * pitch), Space.DM, Dtype.BF16, dims, rows, 0, pitch)

    # Many tokens: rows stay where they are, KV heads one by one -------------------------------------------------------
    def _tokens(self, q: Tensor, k: Cache, v: Cache, limit: Tensor, p: AttentionParams) -> Tensor:
        em, rows = self.em, q.rows
        assert rows is not None
        if rows.length == 1 or rows.local > rows.batch_stride:
            return self._one_token_rows(q, k, v, limit, p)
        ring = rows.slices_per_batch
        out = self._output(q, v, p)
        q_head = q.dims[1].stride if q.dims[1].kind == "feature" else k.padded * 2
        out_head = v.width * 2
        for h in range(p.kv_heads):

            def load(cache: Cache, start: int, count: int, h: int = h) -> SSAValue:
                base = h * cache.head_stride + start * cache.width * 2
                real = min(count, cache.keys - start)
                if count % ring or real < count:  # keys do not fill the ring: every slice reads them from HBM
                    tile = self._tile(cache, count, real)
                    for group in range(em.slices // ring):
                        row = min(group, rows.batch - 1) * cache.batch_stride
                        self._load(
                            cache, base + row, real, tile, group * ring * DM_SLICE_STRIDE, [(ring, 0, DM_SLICE_STRIDE)]
                        )
                    return tile
                each = count // ring
                spread = self._tile(cache, each, each)
                step = each * cache.width * 2
                self._load(
                    cache,
                    base,
                    each,
                    spread,
                    0,
                    [(rows.batch, cache.batch_stride, ring * DM_SLICE_STRIDE), (ring, step, DM_SLICE_STRIDE)],
                )
                idle = em.slices - rows.batch * ring
                if idle:  # slices of batch rows that no request uses take part in the ring
                    self._load(
                        cache, base, each, spread, rows.batch * ring * DM_SLICE_STRIDE, [(idle, 0, DM_SLICE_STRIDE)]
                    )
                if ring == 1:
                    return spread
                tile = em.alloc(count * cache.padded * 2, "keys")
                values = each * cache.padded
                packet = ring_packet(values, 16)
                ring_broadcast(
                    em,
                    spread,
                    [(values, 2)],
                    Dtype.BF16,
                    packet,
                    0,
                    ring,
                    tile,
                    0,
                    [(values // packet, packet * 2)],
                    values * 2,
                    [(packet, 2)],
                    16,
                )
                return tile

            per_token = p.group * round_up(k.keys, KEY_MULTIPLE) * 4
            chunk = max(1, SCORE_BYTES // per_token)
            for first in range(0, rows.local, chunk):
                tokens = min(chunk, rows.local - first)
                step = _Rows(
                    tokens,
                    q.buffer,
                    q.base + first * q.pitch + h * p.group * q_head,
                    q.pitch,
                    q_head,
                    limit.buffer,
                    limit.base + first * limit.pitch,
                    limit.pitch,
                )
                self._heads(
                    step,
                    p,
                    k,
                    v,
                    load,
                    em.slices,
                    out.buffer,
                    out.pitch,
                    out_head,
                    out.base + first * out.pitch + h * p.group * out_head,
                    multiple=ring if k.keys % ring == 0 else KEY_MULTIPLE,
                )
        return out

    def _one_token_rows(self, q: Tensor, k: Cache, v: Cache, limit: Tensor, p: AttentionParams) -> Tensor:
        """Large decode batches: every slice holds whole batch rows, so K and V come straight to their slice."""
        em, rows = self.em, q.rows
        assert rows is not None
        out = self._output(q, v, p)
        q_head = q.dims[1].stride if q.dims[1].kind == "feature" else k.padded * 2
        for r in range(rows.local):
            for h in range(p.kv_heads):

                def load(cache: Cache, start: int, count: int, h: int = h, r: int = r) -> SSAValue:
                    real = min(count, cache.keys - start)
                    tile = self._tile(cache, count, real)
                    base = h * cache.head_stride + start * cache.width * 2
                    live = -(-(rows.batch - r) // rows.local)
                    self._load(
                        cache,
                        base + r * cache.batch_stride,
                        real,
                        tile,
                        0,
                        [(live, rows.local * cache.batch_stride, DM_SLICE_STRIDE)],
                    )
                    if live < em.slices:
                        self._load(
                            cache, base, real, tile, live * DM_SLICE_STRIDE, [(em.slices - live, 0, DM_SLICE_STRIDE)]
                        )
                    return tile

                step = _Rows(
                    1,
                    q.buffer,
                    q.base + r * q.pitch + h * p.group * q_head,
                    q.pitch,
                    q_head,
                    limit.buffer,
                    limit.base + r * limit.pitch,
                    limit.pitch,
                )
                self._heads(
                    step,
                    p,
                    k,
                    v,
                    load,
                    em.slices,
                    out.buffer,
                    out.pitch,
                    v.width * 2,
                    out.base + r * out.pitch + h * p.group * v.width * 2,
                )
        return out

    # One KV head ------------------------------------------------------------------------------------------------------
    def _heads(
        self,
        r: _Rows,
        p: AttentionParams,
        k: Cache,
        v: Cache,
        load: Callable[[Cache, int, int], SSAValue],
        slices: int,
        target: SSAValue,
        target_token: int,
        target_head: int,
        target_base: int = 0,
        multiple: int = KEY_MULTIPLE,
    ) -> None:
        """Rows of one KV head: `target` receives `[token][head][value]` with the given strides."""
        em = self.em
        rows = r.tokens * p.group
        lanes = 8 if rows > 4 else 4
        groups = -(-rows // lanes)
        keys = round_up(k.keys, KEY_MULTIPLE)
        scores = em.alloc(rows * keys * 4, "scores")
        mask = self._mask(r, p, keys, slices)
        per_lane = em.machine.trf_bytes_per_slice // 8 // 2
        tile = max(KEY_MULTIPLE, min(keys, TILE_BYTES // (k.padded * 2), per_lane // (k.padded * 2) * 8))
        tile = _tile(keys, tile, max(KEY_MULTIPLE, multiple))
        for start in range(0, keys, tile):
            self._scores(r, p, load(k, start, tile), tile, start, k.padded, keys, scores, slices)
        probabilities = em.alloc(groups * lanes * keys * 2, "probabilities")
        if groups * lanes > rows:
            em.memset(probabilities, rows * keys * 2, (groups * lanes - rows) * keys * 2)
        total = self._softmax(r, p, rows, keys, scores, mask, probabilities, slices)
        acc = em.alloc(groups * lanes * v.padded * 4, "sums")
        per_value = _tile(keys, max(KEY_MULTIPLE, TILE_BYTES // (v.padded * 2)), max(KEY_MULTIPLE, multiple))
        half = em.machine.trf_bytes_per_slice // lanes // 2
        slots = 32 // lanes
        for start in range(0, keys, per_value):
            values = load(v, start, per_value)
            part = acc if start == 0 else em.alloc(groups * lanes * v.padded * 4, "partial")
            for g in range(0, groups, slots):
                count = min(slots, groups - g)
                self._values(
                    probabilities, keys, start, per_value, g, count, lanes, half, values, v.padded, part, slices
                )
            if start:
                n = groups * lanes * v.padded
                em.execute(
                    em.fetch(0, [(n, 4)], Dtype.F32, 8, None, (0, [4])),
                    acc,
                    Commit(0, ((n, 4),), Dtype.F32, 8),
                    acc,
                    second=part,
                    vector=(VectorOp(Alu.FP_FMA, Op.ADD, Mode.ZIP01),),
                    slices=slices,
                )
        base = em.vrf_space(round_up(rows * 8, 32))
        em.load_vrf(em.fetch(0, [(rows * 2, 4)], Dtype.F32, 2), total, base, slices)
        packet = 8 if v.width % 8 == 0 else 4
        divide = VectorOp(
            Alu.FP_DIV,
            Op.DIV,
            Mode.STREAM_OPERAND,
            Operand(Source.VRF, base=base, loops=operand_loops(((rows, 8), (v.width, 0)))),
        )
        em.execute(
            em.fetch(0, [(rows, v.padded * 4), (v.width, 4)], Dtype.F32, packet),
            acc,
            Commit(target_base, ((r.tokens, target_token), (p.group, target_head), (v.width, 2)), Dtype.BF16, packet),
            target,
            vector=(divide,),
            slices=slices,
        )

    def _mask(self, r: _Rows, p: AttentionParams, keys: int, slices: int) -> SSAValue:
        """`[token][key]`: 0 where visible, else minus the distance from the visible range."""
        em = self.em
        mask = em.alloc(r.tokens * keys * 4, "mask")

        def one_side(target: SSAValue, sign: float, offset: float) -> None:
            base = em.vrf_space(round_up(r.tokens * 8, 32))
            em.load_vrf(
                em.fetch(r.limit_base, [(r.tokens, r.limit_token), (2, 4)], Dtype.F32, 2), r.limit, base, slices
            )
            limit = Operand(Source.VRF, base=base, loops=operand_loops(((r.tokens, 8), (keys, 0))))
            mode = Mode.OPERAND_STREAM if sign > 0 else Mode.STREAM_OPERAND
            ops = [VectorOp(Alu.FP_FMA, Op.SUB, mode, limit)]
            if offset:
                ops.append(VectorOp(Alu.CLIP_ADD, Op.ADD, Mode.STREAM_OPERAND, Operand(Source.CONST, offset)))
            ops.append(VectorOp(Alu.CLIP_MIN, Op.MIN, Mode.STREAM_OPERAND, Operand(Source.CONST, 0.0)))
            em.execute(
                em.fetch(0, [(r.tokens, 0), (keys, 4)], Dtype.F32, 8),
                self.iota,
                Commit(0, ((r.tokens * keys, 4),), Dtype.F32, 8),
                target,
                vector=ops,
                slices=slices,
            )

        one_side(mask, 1.0, 0.0)
        if p.window:
            if not p.causal:
                raise UnsupportedError(
                    "a two-sided attention window", "only causal windows are lowered", "use full attention"
                )
            lower = em.alloc(r.tokens * keys * 4, "mask")
            one_side(lower, -1.0, float(p.window - 1))
            em.execute(
                em.fetch(0, [(r.tokens * keys, 4)], Dtype.F32, 8, None, (0, [4])),
                mask,
                Commit(0, ((r.tokens * keys, 4),), Dtype.F32, 8),
                mask,
                second=lower,
                vector=(VectorOp(Alu.FP_FMA, Op.ADD, Mode.ZIP01),),
                slices=slices,
            )
        return mask

    def _scores(
        self,
        r: _Rows,
        p: AttentionParams,
        keys_tile: SSAValue,
        count: int,
        start: int,
        width: int,
        keys: int,
        scores: SSAValue,
        slices: int,
    ) -> None:
        em = self.em
        lane_bytes = em.machine.trf_bytes_per_slice // 8
        used = count // 8 * width * 2
        base = self._next_half(lane_bytes, used)
        em.load_trf(
            em.fetch(0, [(8, width * 2), (count // 8, 8 * width * 2), (width, 2)], Dtype.BF16, 16),
            keys_tile,
            8,
            base,
            slices,
        )
        ops = [VectorOp(Alu.FP_MUL0, Op.MUL, Mode.STREAM_OPERAND, Operand(Source.CONST, p.scale))]
        if p.softcap:
            ops = [
                VectorOp(Alu.FP_MUL0, Op.MUL, Mode.STREAM_OPERAND, Operand(Source.CONST, p.scale / p.softcap)),
                VectorOp(Alu.FP_FPU, Op.TANH, Mode.UNARY),
                VectorOp(Alu.FP_MUL1, Op.MUL, Mode.STREAM_OPERAND, Operand(Source.CONST, p.softcap)),
            ]
        packet = k_multiple(width)
        em.execute(
            em.fetch(r.q_base, [(r.tokens, r.q_token), (p.group, r.q_head), (width, 2)], Dtype.BF16, packet),
            r.q,
            Commit(start * 4, ((r.tokens * p.group, keys * 4), (count, 4)), Dtype.F32, 8),
            scores,
            slices=slices,
            contract=Contract(
                8,
                packet // 16,
                base,
                ((r.tokens * p.group, 0, 0), (width // packet, packet * 2, REDUCE), (count // 8, width * 2, BROADCAST)),
                packet,
                packet.bit_length() - 1,
                LaneMode.INTERLEAVED,
            ),
            vector=ops,
        )

    def _next_half(self, lane_bytes: int, used: int) -> int:
        if used > lane_bytes // 2:
            return 0
        self.half ^= 1
        return self.half * (lane_bytes // 2)

    def _softmax(
        self,
        r: _Rows,
        p: AttentionParams,
        rows: int,
        keys: int,
        scores: SSAValue,
        mask: SSAValue,
        probabilities: SSAValue,
        slices: int,
    ) -> SSAValue:
        """probabilities = exp(score + mask - max), bf16; returns their sums, f32, 8 B a row."""
        em = self.em
        n = rows * keys
        em.execute(
            em.fetch(
                0,
                [(r.tokens, p.group * keys * 4), (p.group, keys * 4), (keys, 4)],
                Dtype.F32,
                8,
                None,
                (0, [keys * 4, 0, 4]),
            ),
            scores,
            Commit(0, ((n, 4),), Dtype.F32, 8),
            scores,
            second=mask,
            slices=slices,
            vector=(
                VectorOp(Alu.FP_MUL0, Op.MUL, Mode.STREAM_OPERAND, Operand(Source.CONST, HIDDEN), group=2),
                VectorOp(Alu.FP_FMA, Op.ADD, Mode.ZIP01),
            ),
        )
        top, total = em.alloc(rows * 8, "max"), em.alloc(rows * 8, "sum")
        em.execute(
            em.fetch(0, [(n, 4)], Dtype.F32, 8),
            scores,
            Commit(0, ((rows, 8), (2, 4)), Dtype.F32, 2),
            top,
            slices=slices,
            vector=(VectorOp(Alu.REDUCE, Op.MAX, Mode.UNARY, count=keys, inner=1),),
        )
        base = em.vrf_space(round_up(rows * 8, 32))
        em.load_vrf(em.fetch(0, [(rows * 2, 4)], Dtype.F32, 2), top, base, slices)
        em.execute(
            em.fetch(0, [(n, 4)], Dtype.F32, 8),
            scores,
            Commit(0, ((n, 2),), Dtype.BF16, 8),
            probabilities,
            slices=slices,
            vector=(
                VectorOp(
                    Alu.FP_FMA,
                    Op.SUB,
                    Mode.STREAM_OPERAND,
                    Operand(Source.VRF, base=base, loops=operand_loops(((rows, 8), (keys, 0)))),
                ),
                VectorOp(Alu.FP_EXP, Op.EXP, Mode.UNARY),
            ),
        )
        em.execute(
            em.fetch(0, [(n, 2)], Dtype.BF16, 8, Dtype.F32),
            probabilities,
            Commit(0, ((rows, 8), (2, 4)), Dtype.F32, 2),
            total,
            slices=slices,
            vector=(VectorOp(Alu.REDUCE, Op.ADD, Mode.UNARY, count=keys, inner=1),),
        )
        return total

    def _values(
        self,
        probabilities: SSAValue,
        keys: int,
        start: int,
        count: int,
        group: int,
        groups: int,
        lanes: int,
        half: int,
        values: SSAValue,
        width: int,
        target: SSAValue,
        slices: int,
    ) -> None:
        """target[row][value] (f32) = sum over `count` keys, rows of `groups` lane groups from `group` on."""
        em = self.em
        base = self._next_half(half * 2, groups * count * 2)
        first = group * lanes
        em.load_trf(
            em.fetch(
                (first * keys + start) * 2, [(lanes, keys * 2), (groups, lanes * keys * 2), (count, 2)], Dtype.BF16, 16
            ),
            probabilities,
            lanes,
            base,
            slices,
        )
        packet = k_multiple(width)
        em.execute(
            em.fetch(0, [(width // packet, packet * 2), (count, width * 2), (packet, 2)], Dtype.BF16, packet),
            values,
            Commit(
                first * width * 4,
                ((width // packet, packet * 4), (groups * lanes, width * 4), (packet, 4)),
                Dtype.F32,
                8,
            ),
            target,
            slices=slices,
            contract=Contract(
                lanes,
                packet // 16,
                base,
                ((width // packet, 0, 0), (count, 2, REDUCE), (groups, count * 2, BROADCAST)),
                1,
                0,
                LaneMode.SEQUENTIAL,
            ),
        )


def _pair_loops(pairs: list[tuple[int, int]]) -> tuple[PairLoops, int, int]:
    """Loops (count, batch step, head step, slice step) over consecutive (batch, head) pairs, and the first pair."""
    b0, h0 = pairs[0]
    heads = sum(1 for b, _ in pairs if b == b0)
    batches = len(pairs) // heads
    if batches * heads != len(pairs):
        raise UnsupportedError(
            "attention pairs that end inside a batch row", "loops are rectangular", "use fewer heads"
        )
    return [(batches, 1, 0, heads), (heads, 0, 1, 1)], b0, h0


def _tile(total: int, limit: int, multiple: int) -> int:
    """Largest divisor of `total` that is at most `limit` and a multiple of `multiple`."""
    for size in range(min(limit, total) // multiple * multiple, 0, -multiple):
        if total % size == 0:
            return size
    raise UnsupportedError(
        f"attention over {total} keys",
        f"keys are taken in tiles of a multiple of {multiple}, at most {limit}",
        f"use a bucket length that is a multiple of {math.lcm(multiple, 16)}",
    )


def iota(count: int) -> np.ndarray:
    """0, 1, 2, ... as f32."""
    return np.arange(count, dtype=np.float32)
