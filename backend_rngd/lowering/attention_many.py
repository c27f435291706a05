"""Attention of many tokens: tokens stay on their slices, KV heads are walked one after the other.

K and V of a batch row arrive spread over its slices and go round the ring, K before it is loaded into TRF, V as the
stream of the contraction. The rows of a slice are cut into blocks, the keys into tiles; the scores of a block with a
tile are all that must fit a slice. Long ones are a routine for some tiles of a block, called with their HBM addresses:
queries, limits and what was summed so far have a fixed place then, and programs do not grow with tokens times keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from xdsl.ir import SSAValue

from backend_rngd.dialect import CallOp, bytes_of
from backend_rngd.isa.descriptors import DM_SLICE_STRIDE, Alu, Commit, Dtype, Mode, Op, Operand, Source, Space, VectorOp
from backend_rngd.lowering.attention_few import LOAD_BYTES, tile_of
from backend_rngd.lowering.attention_head import KEY_MULTIPLE, SEQUENTIAL_SLOTS, HeadLowering, sub_tile
from backend_rngd.lowering.attention_types import AttentionParams, Cache, Host, Rows, State, Values
from backend_rngd.lowering.contract_base import k_multiple
from backend_rngd.lowering.emitter import Emitter, dm, hbm
from backend_rngd.lowering.move import place_of, ring_broadcast
from backend_rngd.lowering.tensor import RowSpace, Tensor, round_up

TILE_BYTES = 224 * 1024  # scores, probabilities and mask of a block of rows with a tile of keys, a slice
ROUND_BYTES = 128 * 1024  # of K that goes round the ring at once
BLOCK_ROWS = 64  # rows that share a tile of keys, which costs as much as 16 of them
INLINE_INSTRUCTIONS = 1500  # more are a routine
CALL_INSTRUCTIONS = 1500  # of a routine, which runs alone: what goes before and after is not hidden
LOWEST = 0xFF7FC99E  # -3.4e38 as f32: below all scores, visible or not


@dataclass
class _Source:
    """K and V of a KV head from HBM, from byte `k_base` and `v_base` of a batch row on."""

    em: Emitter
    k: Cache
    v: Cache
    rows: RowSpace
    tile: int
    sub: int
    ring: int
    k_base: int = 0
    v_base: int = 0
    held: tuple[int, SSAValue] | None = None
    whole: tuple[int, SSAValue] | None = None

    @property
    def value_chunk(self) -> int:
        """See `KeySource`."""
        return self.tile

    def keys(self, start: int, count: int) -> tuple[SSAValue, int]:
        """See `KeySource`."""
        tile = start // self.tile * self.tile
        if self.held is None or self.held[0] != tile:
            whole = min(self.tile, round_up(self.k.keys, KEY_MULTIPLE) - tile)
            self.held = (tile, self._load(self.k, self.k_base, tile, whole))
        if self.ring == 1:
            return self.held[1], (start - tile) * self.k.padded * 2
        most = max(1, ROUND_BYTES // (self.k.padded * 2) // self.sub) * self.sub
        first = tile + (start - tile) // most * most
        if self.whole is None or self.whole[0] != first:
            end = min(first + most, tile + self.tile, round_up(self.k.keys, KEY_MULTIPLE))
            self.whole = (first, self._round(self.held[1], (first - tile) // self.ring, end - first))
        return self.whole[1], (start - first) * self.k.padded * 2

    def values(self, start: int, count: int) -> Values:
        """See `KeySource`."""
        return Values(self._load(self.v, self.v_base, start, count), 0, self.ring)

    def _load(self, cache: Cache, base: int, start: int, count: int) -> SSAValue:
        """Keys from `start` on: whole in every slice, or one after the other in the slices of the ring."""
        em, ring, row = self.em, self.ring, cache.width * 2
        own, real = count // ring, min(count, cache.keys - start)
        buffer = em.alloc(own * cache.padded * 2, "spread" if ring > 1 else "keys")
        if cache.padded != cache.width or real < count:
            em.memset(buffer, 0, own * cache.padded * 2)
        places = self.rows.slices_per_batch
        across = (places, 0, DM_SLICE_STRIDE) if ring == 1 else (ring, row, DM_SLICE_STRIDE)
        keys = (real // ring, ring * row, cache.padded * 2)
        live = self.rows.batch * places
        source = hbm(cache.buffer, base + start * row)
        loops = [(self.rows.batch, cache.batch_stride, places * DM_SLICE_STRIDE), across, keys]
        em.dma(source, dm(buffer), loops, row)
        if live < em.slices:  # slices of batch rows that no request uses take part in the ring
            loops = [((em.slices - live) // places, 0, places * DM_SLICE_STRIDE), across, keys]
            em.dma(source, dm(buffer, live * DM_SLICE_STRIDE), loops, row)
        return buffer

    def _round(self, spread: SSAValue, first: int, count: int) -> SSAValue:
        """`count` keys from the spread ones, `first` of every slice on, whole in every slice."""
        em, ring, padded = self.em, self.ring, self.k.padded
        tile = em.alloc(count * padded * 2, "keys")
        # Packets as those of V, so that both use one configuration of the switch if they go round for a whole tile.
        own, packet = count // ring, k_multiple(padded)
        ring_broadcast(
            em, spread, [(own * padded, 2)], Dtype.BF16, packet, first * padded * 2, ring, tile, 0,
            [(own, ring * padded * 2), (padded // packet, packet * 2)], padded * 2, [(packet, 2)], 16,
        )  # fmt: skip
        return tile


@dataclass(frozen=True)
class _Plan:
    """Blocks of `block` tokens of a slice; keys in tiles of `tile`, loaded into TRF `sub` at a time. ring: slices over
    which K and V are spread."""

    block: int
    tile: int
    sub: int
    ring: int

    @property
    def instructions(self) -> int:
        """Of a block with a tile, roughly: those of every part that is loaded into TRF, and those of the softmax."""
        return self.tile // self.sub * (3 + self.block // 4) + 20


class ManyTokens:
    """Lowers one attention op."""

    def __init__(self, em: Emitter, p: AttentionParams, host: Host) -> None:
        self.em = em
        self.p = p
        self.host = host
        self.way = ""  # in words, when it has run

    def run(
        self, queries: Callable[[int, int, int], Tensor], k: Cache, v: Cache, limit: Tensor, out: Tensor, shared: bool
    ) -> Tensor:
        """queries(head, first, count): `b h s d` in DM of local rows `first` ... of the heads of a KV head; limit: f32
        per token (8 B apart), shared by the tokens of a batch row or not; result `b s h e` in `out`."""
        em, p, rows = self.em, self.p, out.rows
        assert rows is not None
        plan = self._plan(rows, k, shared)
        blocks = -(-rows.local // plan.block)
        tiles = -(-k.keys // plan.tile)
        self.way = f"tokens stay on their slices, {blocks} blocks of {plan.block}; keys in {tiles} tiles of {plan.tile}"
        calls = tiles > 1 and tiles * blocks * p.kv_heads * plan.instructions > INLINE_INSTRUCTIONS
        self.way += ", by calls of a routine, which are not in the prediction" if calls else ""
        value = v.width * 2
        for h in range(p.kv_heads):
            for first in range(0, rows.local, plan.block):
                tokens = min(plan.block, rows.local - first)
                mine = queries(h, first, tokens)
                q_head = mine.dims[1].stride if mine.dims[1].kind == "feature" else k.padded * 2
                at = limit.base + first * limit.pitch
                work = Rows(tokens, mine.buffer, mine.base, mine.pitch, q_head, limit.buffer, at, limit.pitch, shared)
                bases = (h * k.head_stride, h * v.head_stride)
                if calls:
                    state = self._by_calls(work, plan, rows, k, v, bases)
                else:
                    state = self._attend(work, plan, rows, k, v, bases)
                head = self._head(em, plan)
                start = first * out.pitch + h * p.group * value
                if out.space == Space.DM:
                    head.finish(work, state, v.width, out.buffer, out.base + start, out.pitch, value)
                    continue
                run = p.group * value
                result = em.alloc(tokens * run, "values")
                head.finish(work, state, v.width, result, 0, run, value)
                loops = [(em.slices, DM_SLICE_STRIDE, rows.local * out.pitch), (tokens, run, out.pitch)]
                em.dma(dm(result), place_of(out, start), loops, run)
        return out

    def _head(self, em: Emitter, plan: _Plan) -> HeadLowering:
        return HeadLowering(em, self.p, self.host.iota(em, plan.tile), em.slices, plan.sub)

    def _plan(self, rows: RowSpace, k: Cache, shared: bool) -> _Plan:
        group, trf = self.p.group, self.em.machine.trf_bytes_per_slice
        sub, ring = sub_tile(k.padded, trf), rows.slices_per_batch
        if k.keys % ring and k.keys * k.padded * 2 <= LOAD_BYTES:  # few that do not fill the ring: whole everywhere
            ring = 1
        sub = max(sub // ring * ring, ring)
        blocks = -(-rows.local // max(1, BLOCK_ROWS // group))
        block = -(-rows.local // blocks)
        keys, count = round_up(k.keys, KEY_MULTIPLE), block * group
        tile = tile_of(count, 1 if shared else block, keys, sub, TILE_BYTES)
        if tile < keys:
            # The rows of a pass over V, as many as there are sums for, share half of TRF.
            lanes = 8 if count > 4 else 4
            together = min(-(-count // lanes), SEQUENTIAL_SLOTS // lanes)
            tile = max(sub, min(tile, trf // lanes // 2 // (2 * together)) // sub * sub)
        return _Plan(block, tile, sub, ring)

    def _attend(
        self,
        work: Rows,
        plan: _Plan,
        rows: RowSpace,
        k: Cache,
        v: Cache,
        bases: tuple[int, int],
        first: int = 0,
        origin: int = 0,
        state: State | None = None,
    ) -> State:
        """Keys from `first` on, whose limits count from key `origin`. What does not fill the ring lies whole in every
        slice."""
        head, found = self._head(self.em, plan), k.keys - first
        full = found // plan.ring * plan.ring
        for start, count, ring in ((first, full, plan.ring), (first + full, found - full, 1)):
            if count:
                k_base, v_base = (base + start * c.width * 2 for base, c in zip(bases, (k, v), strict=True))
                part = replace(k, keys=count), replace(v, keys=count)
                source = _Source(self.em, *part, rows, plan.tile, plan.sub, ring, k_base, v_base)
                padded = (k.padded, v.padded)
                keys = round_up(count, KEY_MULTIPLE)
                state = head.attend(work, source, padded, keys, plan.tile, state, start - origin)
        assert state is not None
        return state

    # Long contexts ------------------------------------------------------------
    def _by_calls(self, work: Rows, plan: _Plan, rows: RowSpace, k: Cache, v: Cache, bases: tuple[int, int]) -> State:
        """The state of a block after all keys."""
        em, whole = self.em, k.keys // plan.tile
        # Calls of equal size that leave little; that is done here.
        most = min(max(1, CALL_INSTRUCTIONS // plan.instructions), whole)
        tiles = min(range(most // 2 + 1, most + 1), key=lambda n: (whole % n, -n))
        step = tiles * plan.tile
        padded = (k.padded, v.padded)
        held, state = self._held(em, work, plan, padded)
        self._copy(em, work, held, k.padded)
        em.memset(state.sums, 0, bytes_of(state.sums))
        count = plan.block * self.p.group * 8
        em.memset(state.stats, 0, count, LOWEST)
        em.memset(state.stats, count, count)
        arguments = [k.buffer, v.buffer]
        shapes = [(bytes_of(c.buffer), c.batch_stride, c.width) for c in (k, v)]
        key = ("attention", self.p, plan, rows, *shapes, step, work.shared)
        name, inner, new = self.host.subroutine(key, arguments, em.location)
        if new:
            self._routine(inner, work, plan, rows, replace(k, keys=step), replace(v, keys=step))
        calls = whole // tiles
        for i in range(calls):
            offsets = [base + i * step * c.width * 2 for base, c in zip(bases, (k, v), strict=True)]
            em.add(CallOp(name, arguments, em.location, offsets))
        return self._attend(held, plan, rows, k, v, bases, calls * step, calls * step, state)

    def _routine(self, em: Emitter, work: Rows, plan: _Plan, rows: RowSpace, k: Cache, v: Cache) -> None:
        """All tiles of `k` and `v`, which lie at the routine's arguments."""
        padded, step = (k.padded, v.padded), k.keys
        held, state = self._held(em, work, plan, padded)
        args = em.block.args
        source = _Source(
            em, replace(k, buffer=args[0]), replace(v, buffer=args[1]), rows, plan.tile, plan.sub, plan.ring
        )
        done = self._head(em, plan).attend(held, source, padded, step, plan.tile, state)
        n = bytes_of(state.stats) // 4
        em.execute(em.fetch(0, [(n, 4)], Dtype.F32, 4), done.stats, Commit(0, ((n, 4),), Dtype.F32, 4), state.stats)
        # Positions count from the first key of a call.
        n = held.limits * 2
        less = VectorOp(Alu.FP_FMA, Op.SUB, Mode.STREAM_OPERAND, Operand(Source.CONST, float(step)))
        commit = Commit(0, ((n, 4),), Dtype.F32, 2)
        em.execute(em.fetch(0, [(n, 4)], Dtype.F32, 2), held.limit, commit, held.limit, vector=(less,))

    def _held(self, em: Emitter, work: Rows, plan: _Plan, padded: tuple[int, int]) -> tuple[Rows, State]:
        """The fixed places of a block, the same for all routines with blocks of this size."""
        group = self.p.group
        rows = plan.block * group
        shape = f"{plan.block}.{group}.{padded[0]}.{padded[1]}"

        def place(name: str, nbytes: int) -> SSAValue:
            return em.global_buffer(f"dm.attention.{name}.{shape}", "dm", nbytes, "scratch")

        q = place("queries", rows * padded[0] * 2)
        limit = place("limits", plan.block * 8)
        state = State(place("sums", round_up(rows, 8) * padded[1] * 4), place("max and sum", 2 * rows * 8), rows)
        pitch = group * padded[0] * 2
        return Rows(plan.block, q, 0, pitch, padded[0] * 2, limit, 0, 8, work.shared), state

    def _copy(self, em: Emitter, work: Rows, held: Rows, width: int) -> None:
        """Queries and limits of a block into their places. Those of a short last block leave the former ones behind."""
        queries = [(work.tokens, work.q_token), (self.p.group, work.q_head), (width, 2)]
        n = work.tokens * self.p.group * width
        em.execute(em.fetch(work.q_base, queries, Dtype.BF16, 16), work.q, Commit(0, ((n, 2),), Dtype.BF16, 16), held.q)
        limits = [(work.limits, work.limit_token), (2, 4)]
        commit = Commit(0, ((work.limits * 2, 4),), Dtype.F32, 2)
        em.execute(em.fetch(work.limit_base, limits, Dtype.F32, 2), work.limit, commit, held.limit)
