"""Attention of the rows of a slice with one KV head: mask, scores, softmax, weighted sum, all inside the slice.

Scores `[row][key]` (f32) come from K in TRF (lane = key) with queries streaming; the sum comes from the probabilities
in TRF (lane = row, PacketBroadcast) with V streaming, value columns in the packet and keys summed by the time reducer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from xdsl.ir import SSAValue

from backend_rngd.isa.descriptors import (
    BROADCAST,
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
    VectorOp,
)
from backend_rngd.lowering.contract_base import k_multiple
from backend_rngd.lowering.emitter import Emitter, operand_loops
from backend_rngd.lowering.tensor import round_up
from ir.errors import UnsupportedError

TILE_BYTES = 48 * 1024  # one K or V tile a slice
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
class Rows:
    """Rows of one step in a slice: `tokens` local tokens x `group` heads, q and limits given by strides."""

    tokens: int
    q: SSAValue
    q_base: int
    q_token: int
    q_head: int
    limit: SSAValue
    limit_base: int
    limit_token: int


class HeadLowering:
    """Lowers the work of one KV head; a `load(cache, start, count)` brings its keys and values into DM."""

    def __init__(self, em: Emitter, iota: SSAValue) -> None:
        """iota: DM buffer with 0, 1, 2, ... as f32 in every slice, at least as long as the keys."""
        self.em = em
        self.iota = iota
        self.half = 0

    def run(
        self,
        r: Rows,
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
        em, rows = self.em, r.tokens * p.group
        acc, stats = self.partial(r, p, k, v, load, slices, multiple)
        base = em.vrf_space(round_up(rows * 8, 32))
        em.load_vrf(em.fetch(rows * 8, [(rows * 2, 4)], Dtype.F32, 2), stats, base, slices)
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

    def partial(
        self,
        r: Rows,
        p: AttentionParams,
        k: Cache,
        v: Cache,
        load: Callable[[Cache, int, int], SSAValue],
        slices: int,
        multiple: int = KEY_MULTIPLE,
    ) -> tuple[SSAValue, SSAValue]:
        """Weighted sums `[row][padded value]` (f32) that are not divided yet, and `[2][row]` (f32, 8 B apart): the
        largest scores and the sums of the weights."""
        em = self.em
        rows = r.tokens * p.group
        lanes = 8 if rows > 4 else 4
        groups = -(-rows // lanes)
        keys = round_up(k.keys, KEY_MULTIPLE)
        scores = em.alloc(rows * keys * 4, "scores")
        mask = self._mask(r, p, keys, slices)
        per_lane = em.machine.trf_bytes_per_slice // 8 // 2
        tile = max(KEY_MULTIPLE, min(keys, TILE_BYTES // (k.padded * 2), per_lane // (k.padded * 2) * 8))
        tile = key_tile(keys, tile, max(KEY_MULTIPLE, multiple))
        for start in range(0, keys, tile):
            self._scores(r, p, load(k, start, tile), tile, start, k.padded, keys, scores, slices)
        probabilities = em.alloc(groups * lanes * keys * 2, "probabilities")
        if groups * lanes > rows:
            em.memset(probabilities, rows * keys * 2, (groups * lanes - rows) * keys * 2)
        stats = self._softmax(r, p, rows, keys, scores, mask, probabilities, slices)
        acc = em.alloc(groups * lanes * v.padded * 4, "sums")
        per_value = key_tile(keys, max(KEY_MULTIPLE, TILE_BYTES // (v.padded * 2)), max(KEY_MULTIPLE, multiple))
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
        return acc, stats

    def _mask(self, r: Rows, p: AttentionParams, keys: int, slices: int) -> SSAValue:
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
        r: Rows,
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
            context="main",
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
        r: Rows,
        p: AttentionParams,
        rows: int,
        keys: int,
        scores: SSAValue,
        mask: SSAValue,
        probabilities: SSAValue,
        slices: int,
    ) -> SSAValue:
        """probabilities = exp(score + mask - max), bf16; returns the maxima, then the sums, f32, 8 B a row."""
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
        stats = em.alloc(2 * rows * 8, "max and sum")
        em.execute(
            em.fetch(0, [(n, 4)], Dtype.F32, 8),
            scores,
            Commit(0, ((rows, 8), (2, 4)), Dtype.F32, 2),
            stats,
            slices=slices,
            vector=(VectorOp(Alu.REDUCE, Op.MAX, Mode.UNARY, count=keys, inner=1),),
        )
        base = em.vrf_space(round_up(rows * 8, 32))
        em.load_vrf(em.fetch(0, [(rows * 2, 4)], Dtype.F32, 2), stats, base, slices)
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
            Commit(rows * 8, ((rows, 8), (2, 4)), Dtype.F32, 2),
            stats,
            slices=slices,
            vector=(VectorOp(Alu.REDUCE, Op.ADD, Mode.UNARY, count=keys, inner=1),),
        )
        return stats

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
            context="main",
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


def key_tile(total: int, limit: int, multiple: int) -> int:
    """Largest divisor of `total` that is at most `limit` and a multiple of `multiple`."""
    for size in range(min(limit, total) // multiple * multiple, 0, -multiple):
        if total % size == 0:
            return size
    raise UnsupportedError(
        f"attention over {total} keys",
        f"keys are taken in tiles of a multiple of {multiple}, at most {limit}",
        f"use a bucket length that is a multiple of {math.lcm(multiple, 16)}",
    )
