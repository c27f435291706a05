"""Attention of the rows of a slice with one KV head: mask, scores, softmax, weighted sum, all inside the slice.

Keys are taken in tiles. Scores `[row][key]` (f32) of a tile come from K in TRF (lane = key) with queries streaming; the
mask rides in the same pass as an operand from VRF. The sum comes from the probabilities in TRF (lane = row,
PacketBroadcast) with V streaming, value columns in the packet and keys summed by the time reducer. From the second
tile on, what was summed before is scaled to the new largest score.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

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
    Switch,
    SwitchKind,
    VectorOp,
)
from backend_rngd.lowering.attention_types import AttentionParams, KeySource, Rows, State, Values
from backend_rngd.lowering.contract_base import k_multiple
from backend_rngd.lowering.emitter import Emitter, operand_loops
from backend_rngd.lowering.tensor import round_up
from ir.errors import UnsupportedError

KEY_MULTIPLE = 16  # keys are padded (and masked) to whole flits of probabilities
HIDDEN = 2.0**100  # penalty per position beyond what is visible; a power of two, so that it scales positions exactly
MASK_ELEMENTS = 896  # of VRF for the mask of a pass: half of what stashes leave, so that the next one loads meanwhile
SUB_ROWS = 48  # rows whose scores take as long as loading keys in the sub context, at a quarter of the main one's rate
SEQUENTIAL_SLOTS = 32  # sums of a lane that the time reducer holds: lanes x groups of rows of a pass


def sub_tile(padded: int, trf_bytes: int) -> int:
    """Keys of `padded` bf16 values in half of TRF, 8 lanes."""
    keys = trf_bytes // 8 // 2 // (padded * 2) * 8
    if keys < KEY_MULTIPLE:
        raise UnsupportedError(
            f"attention heads of {padded} values",
            f"{KEY_MULTIPLE} keys of a head must fit half of the {trf_bytes} B of a slice's tensor registers",
            "use a model with smaller heads",
        )
    if padded == KEY_MULTIPLE:  # a lane's keys, a flit each, lie in one bank: 64 in a row can starve DMA
        keys = min(keys, 63 * 8)
    return min(keys // KEY_MULTIPLE * KEY_MULTIPLE, MASK_ELEMENTS)


class HeadLowering:
    """Lowers the work of one KV head."""

    def __init__(self, em: Emitter, p: AttentionParams, iota: SSAValue, slices: int, sub: int) -> None:
        """iota: DM buffer with the positions of the keys of the first tile as f32. sub: see `sub_tile`."""
        self.em = em
        self.p = p
        self.iota = iota
        self.slices = slices
        self.sub = sub
        self.half = self.mask_half = 0
        if p.window and not p.causal:
            raise UnsupportedError(
                "a two-sided attention window", "only causal windows are lowered", "use full attention"
            )

    def attend(
        self,
        r: Rows,
        source: KeySource,
        padded: tuple[int, int],
        keys: int,
        tile: int,
        state: State | None = None,
        position: int = 0,
        weighed: Callable[[SSAValue], None] | None = None,
    ) -> State:
        """All keys of `source` in tiles; padded: values of a key and of a value in DM; position: of the first key.
        `state` is updated. weighed: emitted as soon as the statistics are complete."""
        for start in range(0, keys, tile):
            last = weighed if start == 0 and keys <= tile and state is None else None
            state = self._step(r, source, padded, start, min(tile, keys - start), state, position + start, last)
            if weighed is not None and last is None and start + tile >= keys:
                weighed(state.stats)
        assert state is not None
        return state

    def finish(self, r: Rows, state: State, width: int, target: SSAValue, base: int, token: int, head: int) -> None:
        """Divide: `target` receives `[token][head][value]` bf16 with the given strides."""
        rows = r.tokens * self.p.group
        packet = 8 if width % 8 == 0 else 4
        self.em.execute(
            self.em.fetch(0, [(rows, round_up(width, 16) * 4), (width, 4)], Dtype.F32, packet),
            state.sums,
            Commit(base, ((r.tokens, token), (self.p.group, head), (width, 2)), Dtype.BF16, packet),
            target,
            vector=(self._by_row(Alu.FP_DIV, Op.DIV, state.stats, state.rows * 8, rows, width),),
            slices=self.slices,
        )

    def _step(
        self,
        r: Rows,
        source: KeySource,
        padded: tuple[int, int],
        start: int,
        count: int,
        before: State | None,
        position: int,
        weighed: Callable[[SSAValue], None] | None,
    ) -> State:
        em, rows = self.em, r.tokens * self.p.group
        scores = em.alloc(rows * count * 4, "scores")
        mask = self._mask(r, position, count)
        loaded: dict[int, int] = {}

        def load(at: int, context: str) -> None:
            keys, base = source.keys(start + at, min(self.sub, count - at))
            loaded[at] = self._load_keys(keys, base, min(self.sub, count - at), padded[0], context)

        for at in range(0, count, self.sub):
            if at not in loaded:
                load(at, "main")
            behind = at + self.sub
            # Every other part is loaded in the sub context while the one before is used, if that takes as long.
            soon = behind < count and behind not in loaded and len(loaded) % 2 and rows >= SUB_ROWS
            after = partial(load, behind, "sub") if soon else None
            self._scores(r, loaded[at], padded[0], at, min(self.sub, count - at), count, mask, scores, after)
        lanes = 8 if rows > 4 else 4
        rows_held = round_up(rows, lanes)
        probabilities = em.alloc(rows_held * count * 2, "probabilities")
        if rows_held > rows:
            em.memset(probabilities, rows * count * 2, (rows_held - rows) * count * 2)
        stats = em.alloc(2 * rows * 8, "max and sum")
        decay = self._largest(rows, count, scores, stats, before)
        total, at_total = (stats, rows * 8) if before is None else (em.alloc(rows * 8, "sum"), 0)
        self._weights(rows, count, scores, stats, probabilities)
        if weighed is not None:  # while the values are on the way
            self._add_weights(rows, count, probabilities, total, at_total)
            weighed(stats)
        sums = None if before is None else before.sums
        chunk = min(source.value_chunk, count)
        for at in range(0, count, chunk):
            some = min(chunk, count - at)
            values = source.values(start + at, some)
            part = em.alloc(rows_held * padded[1] * 4, "sums")
            self._values(probabilities, count, at, some, rows_held // lanes, lanes, values, padded[1], part)
            if at == 0 and weighed is None:
                self._add_weights(rows, count, probabilities, total, at_total)
            if sums is None:
                sums = part
            else:
                self._add(sums, 0, part, sums, rows, padded[1], decay if at == 0 else None)
        assert sums is not None
        if before is not None:
            self._add(before.stats, rows * 8, total, stats, rows, 2, decay)
        return State(sums, stats, rows)

    # Scores ------------------------------------------------------------
    def _mask(self, r: Rows, start: int, count: int) -> SSAValue:
        """`[token][key]` bf16: 0 where visible, else at most -HIDDEN."""
        em, tokens = self.em, r.limits

        def one_side(sign: float, offset: float) -> SSAValue:
            target = em.alloc(tokens * count * 2, "mask")
            base = em.vrf_space(round_up(tokens * 8, 32))
            loops = [(tokens, r.limit_token), (2, 4)]
            em.load_vrf(em.fetch(r.limit_base, loops, Dtype.F32, 2), r.limit, base, self.slices)
            limit = Operand(Source.VRF, base=base, loops=operand_loops(((tokens, 8), (count, 0))))
            mode = Mode.OPERAND_STREAM if sign > 0 else Mode.STREAM_OPERAND
            ops = [VectorOp(Alu.FP_FMA, Op.SUB, mode, limit), _constant(Alu.FP_MUL0, Op.MUL, HIDDEN)]
            if offset:
                ops.append(_constant(Alu.CLIP_ADD, Op.ADD, offset * HIDDEN))
            ops.append(_constant(Alu.CLIP_MIN, Op.MIN, 0.0))
            em.execute(
                em.fetch(0, [(tokens, 0), (count, 4)], Dtype.F32, 8),
                self.iota,
                Commit(0, ((tokens * count, 2),), Dtype.BF16, 8),
                target,
                vector=ops,
                slices=self.slices,
            )
            return target

        mask = one_side(1.0, -float(start))
        if self.p.window:
            lower = one_side(-1.0, float(start + self.p.window - 1))
            n = tokens * count
            em.execute(
                em.fetch(0, [(n, 2)], Dtype.BF16, 8, Dtype.F32, (0, [2])),
                mask,
                Commit(0, ((n, 2),), Dtype.BF16, 8),
                mask,
                second=lower,
                vector=(VectorOp(Alu.FP_FMA, Op.ADD, Mode.ZIP01),),
                slices=self.slices,
            )
        return mask

    def _scores(
        self,
        r: Rows,
        base: int,
        width: int,
        at: int,
        count: int,
        pitch: int,
        mask: SSAValue,
        scores: SSAValue,
        after: Callable[[], None] | None,
    ) -> None:
        """scores[row][at ...] = scale * q.k + mask for `count` keys at `base` of TRF; `pitch` keys a row of scores and
        mask. after: emitted behind the first two passes, whose masks VRF holds."""
        em, p = self.em, self.p
        ops = [_constant(Alu.FP_MUL0, Op.MUL, p.scale)]
        if p.softcap:
            ops = [
                _constant(Alu.FP_MUL0, Op.MUL, p.scale / p.softcap),
                VectorOp(Alu.FP_FPU, Op.TANH, Mode.UNARY),
                _constant(Alu.FP_MUL1, Op.MUL, p.softcap),
            ]
        packet = k_multiple(width)
        most = r.tokens if r.shared else max(1, MASK_ELEMENTS // count)
        together = -(-r.tokens // -(-r.tokens // most))
        for first in range(0, r.tokens, together):
            tokens = min(together, r.tokens - first)
            rows = tokens * p.group
            queries = [(tokens, r.q_token), (p.group, r.q_head), (width, 2)]
            em.execute(
                em.fetch(r.q_base + first * r.q_token, queries, Dtype.BF16, packet),
                r.q,
                Commit((first * p.group * pitch + at) * 4, ((rows, pitch * 4), (count, 4)), Dtype.F32, 8),
                scores,
                slices=self.slices,
                contract=Contract(
                    8,
                    packet // 16,
                    base,
                    ((rows, 0, 0), (width // packet, packet * 2, REDUCE), (count // 8, width * 2, BROADCAST)),
                    packet,
                    packet.bit_length() - 1,
                    LaneMode.INTERLEAVED,
                ),
                vector=[*ops, self._hide(r, mask, pitch, first, tokens, at, count)],
            )
            if after is not None and (first == together or first + tokens == r.tokens):
                after()
                after = None

    def _load_keys(self, keys: SSAValue, at: int, count: int, width: int, context: str) -> int:
        """`count` keys from byte `at` on into TRF; returns where they lie there."""
        base = self._next_half(8, count // 8 * width * 2)
        lanes = [(8, width * 2), (count // 8, 8 * width * 2), (width, 2)]
        self.em.load_trf(self.em.fetch(at, lanes, Dtype.BF16, 16), keys, 8, base, self.slices, context=context)
        return base

    def _hide(self, r: Rows, mask: SSAValue, pitch: int, first: int, tokens: int, at: int, count: int) -> VectorOp:
        """Adds the mask of some tokens and keys, which takes half of VRF."""
        em = self.em
        self.mask_half ^= 1
        held = self.mask_half * MASK_ELEMENTS * 4
        masked, row = (1, 0) if r.shared else (tokens, first)
        loops = [(masked, pitch * 2), (count, 2)]
        em.load_vrf(em.fetch((row * pitch + at) * 2, loops, Dtype.BF16, 4, Dtype.F32), mask, held, self.slices)
        used = ((tokens, 0 if r.shared else count * 4), (self.p.group, 0), (count, 4))
        operand = Operand(Source.VRF, base=held, loops=operand_loops(used))
        return VectorOp(Alu.FP_FMA, Op.ADD, Mode.STREAM_OPERAND, operand)

    def _next_half(self, lanes: int, used: int) -> int:
        """TRF byte of a lane for `used` bytes: the half that the pass before does not use, if they fit one."""
        lane = self.em.machine.trf_bytes_per_slice // lanes
        if used > lane // 2:
            return 0
        self.half ^= 1
        return self.half * (lane // 2)

    # Softmax ------------------------------------------------------------
    def _largest(
        self, rows: int, keys: int, scores: SSAValue, stats: SSAValue, before: State | None
    ) -> SSAValue | None:
        """Largest scores up to here, into `stats`; returns the factors by row that scale what was summed before."""
        em, pairs = self.em, rows * 2
        here = stats if before is None else em.alloc(rows * 8, "max")
        em.execute(
            em.fetch(0, [(rows * keys, 4)], Dtype.F32, 8),
            scores,
            Commit(0, ((rows, 8), (2, 4)), Dtype.F32, 2),
            here,
            slices=self.slices,
            vector=(VectorOp(Alu.REDUCE, Op.MAX, Mode.UNARY, count=keys, inner=1),),
        )
        if before is None:
            return None
        flat = Commit(0, ((pairs, 4),), Dtype.F32, 2)
        two = em.fetch(0, [(pairs, 4)], Dtype.F32, 2, None, (0, [4]))
        latest = VectorOp(Alu.CLIP_MAX, Op.MAX, Mode.ZIP01)
        em.execute(two, here, flat, stats, second=before.stats, slices=self.slices, vector=(latest,))
        decay = em.alloc(rows * 8, "decay")
        fall = (VectorOp(Alu.FP_FMA, Op.SUB, Mode.ZIP01), VectorOp(Alu.FP_EXP, Op.EXP, Mode.UNARY))
        em.execute(two, before.stats, flat, decay, second=stats, slices=self.slices, vector=fall)
        return decay

    def _weights(self, rows: int, keys: int, scores: SSAValue, stats: SSAValue, probabilities: SSAValue) -> None:
        """probabilities = exp(score - largest), bf16."""
        em, n = self.em, rows * keys
        lower = self._by_row(Alu.FP_FMA, Op.SUB, stats, 0, rows, keys)
        em.execute(
            em.fetch(0, [(n, 4)], Dtype.F32, 8),
            scores,
            Commit(0, ((n, 2),), Dtype.BF16, 8),
            probabilities,
            slices=self.slices,
            vector=(lower, VectorOp(Alu.FP_EXP, Op.EXP, Mode.UNARY)),
        )

    def _add_weights(self, rows: int, keys: int, probabilities: SSAValue, total: SSAValue, at: int) -> None:
        """Sums of a row's weights, in the sub context while the main one contracts."""
        self.em.execute(
            self.em.fetch(0, [(rows * keys, 2)], Dtype.BF16, 8, Dtype.F32),
            probabilities,
            Commit(at, ((rows, 8), (2, 4)), Dtype.F32, 2),
            total,
            slices=self.slices,
            vector=(VectorOp(Alu.REDUCE, Op.ADD, Mode.UNARY, count=keys, inner=1),),
            context="sub",
        )

    def _by_row(self, alu: Alu, op: Op, stats: SSAValue, offset: int, rows: int, inner: int) -> VectorOp:
        """An operation with a number by row, used for `inner` elements each."""
        em = self.em
        base = em.vrf_space(round_up(rows * 8, 32))
        em.load_vrf(em.fetch(offset, [(rows * 2, 4)], Dtype.F32, 2), stats, base, self.slices)
        operand = Operand(Source.VRF, base=base, loops=operand_loops(((rows, 8), (inner, 0))))
        return VectorOp(alu, op, Mode.STREAM_OPERAND, operand)

    # Weighted sum ------------------------------------------------------------
    def _values(
        self,
        probabilities: SSAValue,
        pitch: int,
        at: int,
        count: int,
        groups: int,
        lanes: int,
        values: Values,
        width: int,
        target: SSAValue,
    ) -> None:
        """target[row][value] (f32) = sum over keys `at` ... of a row of `pitch` probabilities; `groups` x `lanes`
        rows."""
        em = self.em
        half = em.machine.trf_bytes_per_slice // lanes // 2
        packet, ring = k_multiple(width), values.ring
        own = count // ring
        together = max(1, min(groups, SEQUENTIAL_SLOTS // lanes, half // (count * 2)))
        for group in range(0, groups, together):
            some = min(together, groups - group)
            base = self._next_half(lanes, some * count * 2)
            first = group * lanes
            em.load_trf(
                em.fetch(
                    (first * pitch + at) * 2,
                    [(lanes, pitch * 2), (some, lanes * pitch * 2), (count, 2)],
                    Dtype.BF16,
                    16,
                ),
                probabilities,
                lanes,
                base,
                self.slices,
                context="sub" if group else "main",
            )
            em.execute(
                em.fetch(
                    values.base, [(width // packet, packet * 2), (own, width * 2), (packet, 2)], Dtype.BF16, packet
                ),
                values.buffer,
                Commit(
                    first * width * 4,
                    ((width // packet, packet * 4), (some * lanes, width * 4), (packet, 4)),
                    Dtype.F32,
                    8,
                ),
                target,
                slices=self.slices,
                switch=Switch(SwitchKind.BROADCAST01, 1, ring, width // packet * own) if ring > 1 else None,
                contract=Contract(
                    lanes,
                    packet // 16,
                    base,
                    ((width // packet, 0, 0), (count, 2, REDUCE), (some, count * 2, BROADCAST)),
                    1,
                    0,
                    LaneMode.SEQUENTIAL,
                ),
            )

    def _add(
        self,
        before: SSAValue,
        at: int,
        part: SSAValue,
        target: SSAValue,
        rows: int,
        width: int,
        decay: SSAValue | None,
    ) -> None:
        """target = before * decay + part, f32; before and target from byte `at` on."""
        em, n = self.em, rows * width
        packet = min(width, 8)
        ops: list[VectorOp] = []
        if decay is not None:
            ops.append(replace(self._by_row(Alu.FP_MUL0, Op.MUL, decay, 0, rows, width), group=1))
        ops.append(VectorOp(Alu.FP_FMA, Op.ADD, Mode.ZIP01))
        em.execute(
            em.fetch(at, [(n, 4)], Dtype.F32, packet, None, (0, [4])),
            before,
            Commit(at, ((n, 4),), Dtype.F32, packet),
            target,
            second=part,
            vector=ops,
            slices=self.slices,
        )


def _constant(alu: Alu, op: Op, value: float) -> VectorOp:
    return VectorOp(alu, op, Mode.STREAM_OPERAND, Operand(Source.CONST, value))
