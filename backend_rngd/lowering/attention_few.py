"""Attention of few tokens a batch row: every (batch row, KV head) pair has slices of its own.

Pairs are taken in rounds that fill the slices. Where there are more slices than pairs, the keys of a pair are split
into parts, one a slice, and added up afterwards (`attention_parts.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from xdsl.ir import SSAValue

from backend_rngd.isa.descriptors import DM_SLICE_STRIDE, Commit, Dtype, Space, Switch, SwitchKind
from backend_rngd.lowering.attention_head import KEY_MULTIPLE, HeadLowering, sub_tile
from backend_rngd.lowering.attention_parts import Parts
from backend_rngd.lowering.attention_types import AttentionParams, Cache, Host, Rows, Values
from backend_rngd.lowering.emitter import Emitter, dm, hbm
from backend_rngd.lowering.move import place_of, ring_packet
from backend_rngd.lowering.tensor import Dim, RowSpace, Tensor, feature_dims, power_of_two, round_up
from ir.errors import UnsupportedError

KEYS_A_SLICE = 64  # with fewer keys a slice the fixed cost of a pass outweighs the work that is saved
KEYS_ALONE = 128  # the same if all slices work for one pair, whose parts are longer to add
ALONE_BYTES = 128 * 1024  # of the weighted sums of all slices
WEIGHT_BYTES = 2048  # weights of the parts in VRF
LOAD_BYTES = 64 * 1024  # K or V a slice that one transfer brings: 4 MB over 64 slices, behind which its start-up hides
BANKS_BYTES = 128  # of data memory, from a bank to the same one
TILE_BYTES = 160 * 1024  # scores, probabilities and mask of a tile of keys a slice


@dataclass(frozen=True)
class Round:
    """Pairs that are computed together: pair (i, j) is batch row `batch + i * batch_step`, KV head `head + j`; it
    occupies slices [(i * heads + j) * parts, ...)."""

    batch: int
    batch_step: int
    batches: int
    head: int
    heads: int
    parts: int

    @property
    def used(self) -> int:
        """Slices that hold a pair."""
        return self.batches * self.heads * self.parts

    def nest(self, row: int, head: int, part: int) -> list[tuple[int, int, int]]:
        """DMA loops into the round's slices; the source steps by these bytes a row, head and part."""
        steps = [(self.batches, self.heads * self.parts, row), (self.heads, self.parts, head)]
        return [(n, far, s * DM_SLICE_STRIDE) for n, s, far in (*steps, (self.parts, 1, part))]


def rounds(rows: RowSpace, heads: int, parts: int) -> list[Round]:
    """All pairs. Rows that lie on slices go with those of the same place in their slice."""
    together = max(1, min(heads, rows.slices // parts))
    across = max(1, rows.slices // (together * parts))
    step = 1 if rows.replicated else rows.local
    out: list[Round] = []
    for local in range(step):
        live = -(-(rows.batch - local) // step)
        for first in range(0, live, across):
            for head in range(0, heads, together):
                batches = min(across, live - first)
                out.append(Round(local + first * step, step, batches, head, min(together, heads - head), parts))
    return out


def key_parts(rows: RowSpace, p: AttentionParams, keys: int, width: int) -> int:
    """Into how many parts (a power of two) the keys of a pair are split."""
    pairs, count = rows.batch * p.kv_heads, rows.length * p.group
    parts = 1
    while (
        parts * KEYS_A_SLICE < keys
        and 2 * parts * pairs <= rows.slices
        and keys % (2 * parts * KEY_MULTIPLE) == 0
        and width % (2 * parts * 4) == 0
        and 2 * parts * count * 4 <= WEIGHT_BYTES
    ):
        parts *= 2
    slices, padded = rows.slices, round_up(width, 16)
    alone = pairs == 1 and keys % (slices * KEY_MULTIPLE) == 0 and keys >= slices * KEYS_ALONE
    return slices if alone and slices * count * padded * 4 <= ALONE_BYTES and count * 4 <= WEIGHT_BYTES // 64 else parts


@dataclass
class _Source:
    """K and V of a round from HBM; a slice holds the keys of its part."""

    em: Emitter
    k: Cache
    v: Cache
    round: Round
    each: int
    chunk: int
    held: tuple[int, SSAValue] | None = None

    @property
    def value_chunk(self) -> int:
        """See `KeySource`."""
        return max(KEY_MULTIPLE, LOAD_BYTES // (self.v.padded * 2) // KEY_MULTIPLE * KEY_MULTIPLE)

    def keys(self, start: int, count: int) -> tuple[SSAValue, int]:
        """See `KeySource`."""
        first = start // self.chunk * self.chunk
        if self.held is None or self.held[0] != first:
            self.held = (first, self._load(self.k, first, max(count, min(self.chunk, self.each - first)), "keys"))
        return self.held[1], (start - first) * self.k.padded * 2

    def values(self, start: int, count: int) -> Values:
        """See `KeySource`."""
        return Values(self._load(self.v, start, count, "values"))

    def _load(self, cache: Cache, start: int, count: int, name: str) -> SSAValue:
        count = round_up(count, KEY_MULTIPLE)
        real = min(count, self.each - start)
        tile = self.em.alloc(count * cache.padded * 2, name)
        if cache.padded != cache.width or real < count:
            self.em.memset(tile, 0, count * cache.padded * 2)
        row, r = cache.width * 2, self.round
        base = r.batch * cache.batch_stride + r.head * cache.head_stride + start * row
        loops = r.nest(cache.batch_stride * r.batch_step, cache.head_stride, self.each * row)
        self.em.dma(hbm(cache.buffer, base), dm(tile), [*loops, (real, row, cache.padded * 2)], row)
        return tile


class FewTokens:
    """Lowers one attention op."""

    def __init__(self, em: Emitter, p: AttentionParams, host: Host, ring_bytes: int) -> None:
        """ring_bytes: the largest result that all slices hold."""
        self.em = em
        self.p = p
        self.host = host
        self.ring_bytes = ring_bytes
        self.way = ""  # in words, when it has run
        self._joined: SSAValue | None = None  # queries and limits of all tokens, in their slices

    def run(self, q: Tensor, k: Cache, v: Cache, limit: Tensor, out: Callable[[], Tensor]) -> Tensor:
        """q `b h s d`; limit: f32 per token (8 B apart); result `b s h e` with heads and values contiguous, in a
        tensor of `out` or a new one."""
        rows, p = q.rows, self.p
        assert rows is not None
        parts = key_parts(rows, p, k.keys, v.width)
        each, count = k.keys // parts, rows.length * p.group
        sub = sub_tile(k.padded, self.em.machine.trf_bytes_per_slice)
        tile = tile_of(count, rows.length, round_up(each, KEY_MULTIPLE), sub, TILE_BYTES)
        chunk = max(sub, LOAD_BYTES // (k.padded * 2) // sub * sub)
        iota = self.host.iota(self.em, tile, parts, each)
        todo = rounds(rows, p.kv_heads, parts)
        split = f"keys in {parts} parts" if parts > 1 else "keys whole"
        self.way = (
            f"slices for every batch row and KV head, {len(todo)} rounds: {split}, tiles of {min(tile, each)} keys"
        )
        alone = parts == self.em.slices
        by_ring = not alone and len(todo) == 1 and rows.replicated and self._by_ring(rows, v.width, parts)
        target = None if by_ring else self._clean(out())
        for r in todo:
            head = HeadLowering(self.em, p, iota, r.used, sub)
            work = self._rows(q, limit, r)
            source = _Source(self.em, k, v, r, each, chunk)
            adder = Parts(self.em, parts, r.batches * r.heads)
            ring = parts > 1 and target is not None and (alone or adder.by_ring(count, v.width, v.padded))
            weighed = partial(adder.weigh_early, rows=count) if ring and not alone else None
            keys = round_up(each, KEY_MULTIPLE)
            state = head.attend(work, source, (k.padded, v.padded), keys, tile, weighed=weighed)
            if target is not None and _at_home(rows, r, p) and target.space == Space.DM:
                at = target.base + r.batch * target.pitch
                head.finish(work, state, v.width, target.buffer, at, target.pitch, v.width * 2)
                continue
            if alone or ring:
                values = adder.whole(state, v.width, v.padded)
            elif parts == 1:
                values = self.em.alloc(count * v.width * 2, "values")
                if by_ring and r.used < self.em.slices:  # the ring that follows reads every slice
                    self.em.memset(values, 0, count * v.width * 2)
                head.finish(work, state, v.width, values, 0, p.group * v.width * 2, v.width * 2)
            else:
                values = adder.combine(state, v.width, v.padded)
            if alone and target is not None:
                self._copy(values, target, v.width)
                continue
            if target is None:
                return self._everywhere(values, q, v, parts)
            self._send(values, target, r, v, 1 if ring else parts)
        assert target is not None
        return target

    # Placing queries and results ------------------------------------------------------------
    def _clean(self, out: Tensor) -> Tensor:
        """Rows that no token uses take part in what follows."""
        rows = out.rows
        assert rows is not None
        used = rows.batch * rows.length
        if out.space == Space.DM and rows.replicated and used < rows.local:
            self.em.memset(out.buffer, out.base + used * out.pitch, (rows.local - used) * out.pitch)
        elif out.space == Space.DM and not rows.replicated and used < rows.physical:
            self.em.memset(out.buffer, out.base, rows.local * out.pitch)
        return out

    def _rows(self, q: Tensor, limit: Tensor, r: Round) -> Rows:
        """The round's queries and limits, in its slices."""
        em, p, rows = self.em, self.p, q.rows
        assert rows is not None
        head, tokens = q.dims[3].size * 2, rows.length
        q_head = q.dims[1].stride if q.dims[1].kind == "feature" else head
        if q.space == Space.DM and (_at_home(rows, r, p) or (rows.replicated and r.batches * r.heads == 1)):
            row, first = r.batch * tokens, r.head * p.group * q_head
            return Rows(
                tokens, q.buffer, q.base + row * q.pitch + first, q.pitch, q_head,
                limit.buffer, limit.base + row * limit.pitch, limit.pitch,
            )  # fmt: skip
        if q.space == limit.space == Space.DM and not rows.replicated:
            return self._rows_with_limits(q, limit, r, q_head)
        mine = em.alloc(tokens * p.group * head, "queries")
        base, step = _row_address(q, r)
        em.dma(
            place_of(q, base + r.head * p.group * q_head),
            dm(mine),
            [*r.nest(step, p.group * q_head, 0), (tokens, q.pitch, p.group * head), (p.group, q_head, head)],
            head,
        )
        if rows.replicated and rows.batch == 1:
            lim, lim_base, lim_pitch = limit.buffer, limit.base, limit.pitch
        else:
            lim, lim_base, lim_pitch = em.alloc(tokens * 8, "limits"), 0, 8
            base, step = _row_address(limit, r)
            em.dma(place_of(limit, base), dm(lim), [*r.nest(step, 0, 0), (tokens, limit.pitch, 8)], 8)
        return Rows(tokens, mine, 0, p.group * head, head, lim, lim_base, lim_pitch)

    def _rows_with_limits(self, q: Tensor, limit: Tensor, r: Round, q_head: int) -> Rows:
        """The round's queries and limits from the slices of their tokens: side by side first, so that one transfer
        brings both."""
        em, p, rows = self.em, self.p, q.rows
        assert rows is not None
        head = q.dims[3].size * 2
        run = p.group * head
        each = round_up(run + 8, em.machine.dm_alignment)  # queries of a token and KV head, and the token's limit
        pitch = p.kv_heads * each
        if self._joined is None:
            self._joined = joined = em.alloc(rows.local * pitch, "queries and limits")
            packet = next(n for n in (16, 8, 4) if head // 2 % n == 0)
            heads = [(rows.local, q.pitch), (p.kv_heads, p.group * q_head), (p.group, q_head), (head // 2, 2)]
            places = ((rows.local, pitch), (p.kv_heads, each), (p.group, head), (head // 2, 2))
            fetch = em.fetch(q.base, heads, Dtype.BF16, packet)
            em.execute(fetch, q.buffer, Commit(0, places, Dtype.BF16, packet), joined)
            fetch = em.fetch(limit.base, [(rows.local, limit.pitch), (p.kv_heads, 0), (2, 4)], Dtype.F32, 2)
            places = ((rows.local, pitch), (p.kv_heads, each), (2, 4))
            em.execute(fetch, limit.buffer, Commit(run, places, Dtype.F32, 2), joined)
        mine = em.alloc(rows.length * each, "queries and limits")
        base, step = _row_address(replace(q, buffer=self._joined, base=0, pitch=pitch), r)
        em.dma(
            dm(self._joined, base + r.head * each),
            dm(mine),
            [*r.nest(step, each, 0), (rows.length, pitch, each)],
            run + 8,
        )
        return Rows(rows.length, mine, 0, each, head, mine, run, each)

    def _send(self, values: SSAValue, out: Tensor, r: Round, v: Cache, cut: int) -> None:
        """`[row][width / cut]` of every slice to the rows of `out`; cut 1: those of a pair's first slice."""
        rows, p = out.rows, self.p
        assert rows is not None
        base, step = _row_address(out, r)
        copies = [(self.em.slices, 0, DM_SLICE_STRIDE)] if out.space == Space.DM and rows.replicated else []
        run = v.width // cut * 2
        self.em.dma(
            dm(values),
            place_of(out, base + r.head * p.group * v.width * 2),
            [
                *copies,
                (r.batches, r.heads * r.parts * DM_SLICE_STRIDE, step),
                (r.heads, r.parts * DM_SLICE_STRIDE, p.group * v.width * 2),
                (cut, DM_SLICE_STRIDE, run),
                (rows.length, p.group * run, out.pitch),
                (p.group, run, v.width * 2),
            ],
            run,
        )

    def _copy(self, values: SSAValue, out: Tensor, width: int) -> None:
        """The rows of the only pair, which every slice holds, to their places."""
        rows, run = out.rows, self.p.group * width
        assert rows is not None
        if out.space == Space.HBM:
            self.em.dma(dm(values), place_of(out), [(rows.length, run * 2, out.pitch)], run * 2)
            return
        packet = max(n for n in (4, 8, 16) if width % n == 0)
        commit = Commit(out.base, ((rows.length, out.pitch), (run, 2)), Dtype.BF16, packet)
        fetch = self.em.fetch(0, [(rows.length * run, 2)], Dtype.BF16, packet)
        self.em.execute(fetch, values, commit, out.buffer)

    def _ring(self, rows: RowSpace, width: int, parts: int) -> tuple[int, int, int]:
        """What a ring over all slices enumerates: batch rows, KV heads of a row, and the bytes of a row of results."""
        places, run = self.em.slices // parts, self.p.group * width * 2
        batches, across = (1, places) if rows.batch == 1 else (places // self.p.kv_heads, self.p.kv_heads)
        _, pitch = feature_dims([self.p.kv_heads * self.p.group, width], 2)
        return batches, across, max(pitch, across * run)

    def _by_ring(self, rows: RowSpace, width: int, parts: int) -> bool:
        """Whether one ring over all slices enumerates whole rows, whose result then fits, without hitting one bank all
        the time (see `ring_packet`)."""
        heads = self.p.kv_heads
        if rows.batch > 1 and power_of_two(heads) != heads:
            return False
        batches, across, pitch = self._ring(rows, width, parts)
        run = self.p.group * width * 2
        step = run if across > 1 else rows.length * pitch  # from a slice to the next one
        if parts == 1 and step % BANKS_BYTES == 0 and ring_packet(run // 2, 16) * 2 < BANKS_BYTES:
            return False
        return max(rows.local, batches * rows.length) * pitch <= self.ring_bytes

    def _everywhere(self, values: SSAValue, q: Tensor, v: Cache, parts: int) -> Tensor:
        """The columns of all pairs as `b s h e` in every slice. Slices that hold no pair write behind the result."""
        em, rows, p = self.em, q.rows, self.p
        assert rows is not None
        heads, run = p.kv_heads * p.group, p.group * v.width * 2
        strides, _ = feature_dims([heads, v.width], 2)
        batches, across, pitch = self._ring(rows, v.width, parts)
        out = em.alloc(max(rows.local, batches * rows.length) * pitch, "attention")
        tokens_used = batches * rows.length
        if tokens_used < rows.local:  # rows that no token uses take part in what follows
            em.memset(out, tokens_used * pitch, (rows.local - tokens_used) * pitch)
        # Long packets keep consecutive writes on different banks, see `ring_packet`.
        group, piece = (1, p.group * v.width) if parts == 1 else (p.group, v.width // parts)
        packet = ring_packet(piece, 16)
        blocks = piece // packet
        em.execute(
            em.fetch(0, [(rows.length * group * piece, 2)], Dtype.BF16, packet),
            values,
            Commit(
                0,
                (
                    (rows.length, pitch),
                    (group, v.width * 2),
                    (blocks, packet * 2),
                    (batches, rows.length * pitch),
                    (across, run),
                    (parts, piece * 2),
                    (packet, 2),
                ),
                Dtype.BF16,
                min(packet, 16),
            ),
            out,
            switch=Switch(SwitchKind.BROADCAST01, 1, em.slices, rows.length * group * blocks),
        )
        dims = (
            q.dims[0],
            q.dims[2],
            Dim("feature", heads, strides[0]) if heads > 1 else Dim("one", 1),
            Dim("feature", v.width, strides[1]),
        )
        return Tensor(out, Space.DM, Dtype.BF16, dims, rows, 0, pitch)


def _row_address(t: Tensor, r: Round) -> tuple[int, int]:
    """Bytes from the tensor's base to the round's first batch row, and from there to the next one."""
    rows = t.rows
    assert rows is not None
    if rows.replicated:
        return r.batch * rows.length * t.pitch, rows.length * t.pitch
    if t.space == Space.HBM:
        return r.batch * t.pitch, rows.local * t.pitch
    return r.batch // rows.local * DM_SLICE_STRIDE + r.batch % rows.local * t.pitch, DM_SLICE_STRIDE


def _at_home(rows: RowSpace, r: Round, p: AttentionParams) -> bool:
    """Whether every pair lies in the slice of its batch row."""
    return not rows.replicated and r.parts == p.kv_heads == 1 and r.batch < rows.local


def tile_of(rows: int, tokens: int, keys: int, sub: int, budget: int) -> int:
    """Keys of a tile: equal tiles whose scores, probabilities and mask take at most `budget` bytes a slice."""
    most = budget // (rows * 4 + round_up(rows, 8) * 2 + tokens * 4)
    most = most // sub * sub or most // KEY_MULTIPLE * KEY_MULTIPLE
    if not most:
        raise UnsupportedError(
            f"attention of {rows} rows (tokens x query heads of a KV head) in a slice",
            f"scores of {KEY_MULTIPLE} keys take more than {budget} B of its data memory",
            "use a smaller bucket or more tensor parallelism",
        )
    if keys <= most:
        return keys
    return min(most, round_up(-(-keys // -(-keys // most)), sub))
