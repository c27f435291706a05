"""Attention over K and V in HBM: scores, mask, softmax and the weighted sum, all inside a slice.

Rows of a slice are (token, query head of one KV head). Few tokens: every (batch, KV head) pair has its own slice, or
several that share its keys (`attention_split.py`). Many tokens: tokens stay on their slices and the KV heads are walked
one after the other; K and V arrive spread over the slices of a batch row and go round the ring. What happens inside a
slice is in `attention_head.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from xdsl.ir import SSAValue

from backend_rngd.isa.descriptors import DM_SLICE_STRIDE, Commit, Dtype, Space
from backend_rngd.lowering.attention_head import KEY_MULTIPLE, AttentionParams, Cache, HeadLowering, Rows
from backend_rngd.lowering.attention_loops import PairLoops, pair_loops
from backend_rngd.lowering.attention_split import SplitKeys, key_parts
from backend_rngd.lowering.emitter import Emitter, dm, hbm
from backend_rngd.lowering.move import load_rows, place_of, ring_broadcast, ring_packet
from backend_rngd.lowering.tensor import Dim, Tensor, feature_dims, round_up
from ir.errors import UnsupportedError

SCORE_BYTES = 64 * 1024  # scores of a chunk of rows a slice


class AttentionLowering:
    """Lowers one attention op."""

    def __init__(self, em: Emitter, iota: Callable[[int], SSAValue], spill: int) -> None:
        """iota(parts): DM buffer with the positions of the keys as f32, all in every slice or one of `parts` parts."""
        self.em = em
        self.iota = iota
        self.spill = spill

    def _head(self, parts: int = 1) -> HeadLowering:
        return HeadLowering(self.em, self.iota(parts))

    def run(self, q: Tensor, k: Cache, v: Cache, limit: Tensor, p: AttentionParams) -> Tensor:
        """q `b h s d`; limit: f32 per token (8 B apart); result `b s h e` with heads and values contiguous."""
        if k.width % 4 or v.width % 4:
            raise UnsupportedError(
                f"attention heads of {k.width} and {v.width} values",
                "a DMA writes multiples of 8 B (4 bf16)",
                "use a model whose head size is a multiple of 4",
            )
        rows = q.rows
        assert rows is not None
        self._need_contiguous(q)
        if k.padded != k.width and (q.space == Space.DM or rows.replicated):
            q = self._pad_heads(q if q.space == Space.DM else load_rows(self.em, q, rows.local), k.padded)
        if not rows.replicated:
            self.head = self._head()
            return self._tokens(q, k, v, limit, p)
        parts = key_parts(rows.batch, rows.length, p, k.keys, v.width, self.em.slices)
        if parts > 1 and rows.local * p.kv_heads * p.group * v.width * 2 <= self.spill:
            return SplitKeys(self, self._head(parts), parts).run(q, k, v, limit, p)
        self.head = self._head()
        return self._pairs(q, k, v, limit, p)

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

    def tile(self, cache: Cache, count: int, real: int) -> SSAValue:
        """A DM buffer for `count` keys of a cache, `real` of which exist; its padding is zero."""
        nbytes = count * cache.padded * 2
        tile = self.em.alloc(nbytes, "keys")
        if cache.padded != cache.width or real < count:
            self.em.memset(tile, 0, nbytes)
        return tile

    def load(
        self, cache: Cache, base: int, count: int, tile: SSAValue, target: int, loops: Sequence[tuple[int, int, int]]
    ) -> None:
        """Rows of a cache from HBM byte `base` to DM address `target` of `tile`, repeated by `loops`."""
        self.em.dma(
            hbm(cache.buffer, base),
            dm(tile, target),
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
        if used < rows.local and out.space == Space.DM:  # rows that no token uses take part in what follows
            em.memset(out.buffer, out.base + used * out.pitch, (rows.local - used) * out.pitch)
        pairs = [(b, h) for b in range(rows.batch) for h in range(p.kv_heads)]
        per_step = em.slices // p.kv_heads * p.kv_heads if rows.batch > 1 else em.slices
        if p.kv_heads > em.slices:
            per_step = em.slices
        for first in range(0, len(pairs), per_step):
            some = pairs[first : first + per_step]
            loops, b0, h0 = pair_loops(some)
            mine = em.alloc(tokens * group * head * 2, "queries")
            lim = em.alloc(tokens * 8, "limits")
            em.dma(
                place_of(q, b0 * tokens * q.pitch + h0 * group * q_head),
                dm(mine),
                [
                    *((n, b * tokens * q.pitch + h * group * q_head, s * DM_SLICE_STRIDE) for n, b, h, s in loops),
                    (tokens, q.pitch, group * head * 2),
                    (group, q_head, head * 2),
                ],
                head * 2,
            )
            em.dma(
                dm(limit.buffer, limit.base + b0 * tokens * limit.pitch),
                dm(lim),
                [
                    *((n, b * tokens * limit.pitch, s * DM_SLICE_STRIDE) for n, b, _, s in loops),
                    (tokens, limit.pitch, 8),
                ],
                8,
            )
            step = Rows(tokens, mine, 0, group * head * 2, head * 2, lim, 0, 8)

            def load(
                cache: Cache, start: int, count: int, b0: int = b0, h0: int = h0, loops: PairLoops = loops
            ) -> SSAValue:
                real = min(count, cache.keys - start)
                tile = self.tile(cache, count, real)
                base = b0 * cache.batch_stride + h0 * cache.head_stride + start * cache.width * 2
                steps = [
                    (n, b * cache.batch_stride + h * cache.head_stride, s * DM_SLICE_STRIDE) for n, b, h, s in loops
                ]
                self.load(cache, base, real, tile, 0, steps)
                return tile

            result = em.alloc(tokens * group * v.width * 2, "values")
            self.head.run(step, p, k, v, load, len(some), result, group * v.width * 2, v.width * 2)
            run = group * v.width * 2
            em.dma(
                dm(result),
                place_of(out, b0 * tokens * out.pitch + h0 * run),
                [
                    *([(em.slices, 0, DM_SLICE_STRIDE)] if out.space == Space.DM else []),
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
        if rows.local * pitch > self.spill:
            buffer = self.em.alloc(rows.physical * pitch, "attention", "hbm")
            return Tensor(buffer, Space.HBM, Dtype.BF16, dims, rows, 0, pitch)
        return Tensor(self.em.alloc(rows.local * pitch), Space.DM, Dtype.BF16, dims, rows, 0, pitch)

    def _queries(self, q: Tensor, head: int, p: AttentionParams, padded: int) -> Tensor:
        """The queries of one KV head in DM, `b h s d`, every head of `padded` values."""
        if q.space == Space.DM:
            return q.with_dims(q.dims, q.base + head * p.group * q.dims[1].stride)
        part = q.slice(1, head * p.group, p.group)
        assert part is not None
        assert q.rows is not None
        loaded = load_rows(self.em, part, q.rows.local)
        return loaded if padded == q.dims[3].size else self._pad_heads(loaded, padded)

    # Many tokens: rows stay where they are, KV heads one by one -------------------------------------------------------
    def _tokens(self, q: Tensor, k: Cache, v: Cache, limit: Tensor, p: AttentionParams) -> Tensor:
        em, rows = self.em, q.rows
        assert rows is not None
        if rows.length == 1 or rows.local > rows.batch_stride:
            return self._one_token_rows(q, k, v, limit, p)
        ring = rows.slices_per_batch
        out = self._output(q, v, p)
        out_head = v.width * 2
        for h in range(p.kv_heads):
            mine = self._queries(q, h, p, k.padded)
            q_head = mine.dims[1].stride if mine.dims[1].kind == "feature" else k.padded * 2
            goal = out
            if out.space == Space.HBM:
                pitch = p.group * out_head
                goal = Tensor(em.alloc(rows.local * pitch, "values"), Space.DM, Dtype.BF16, (), rows, 0, pitch)

            def load(cache: Cache, start: int, count: int, h: int = h) -> SSAValue:
                base = h * cache.head_stride + start * cache.width * 2
                real = min(count, cache.keys - start)
                if count % ring or real < count:  # keys do not fill the ring: every slice reads them from HBM
                    tile = self.tile(cache, count, real)
                    for group in range(em.slices // ring):
                        row = min(group, rows.batch - 1) * cache.batch_stride
                        self.load(
                            cache, base + row, real, tile, group * ring * DM_SLICE_STRIDE, [(ring, 0, DM_SLICE_STRIDE)]
                        )
                    return tile
                each = count // ring
                spread = self.tile(cache, each, each)
                step = each * cache.width * 2
                self.load(
                    cache,
                    base,
                    each,
                    spread,
                    0,
                    [(rows.batch, cache.batch_stride, ring * DM_SLICE_STRIDE), (ring, step, DM_SLICE_STRIDE)],
                )
                idle = em.slices - rows.batch * ring
                if idle:  # slices of batch rows that no request uses take part in the ring
                    self.load(
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
                step = Rows(
                    tokens,
                    mine.buffer,
                    mine.base + first * mine.pitch,
                    mine.pitch,
                    q_head,
                    limit.buffer,
                    limit.base + first * limit.pitch,
                    limit.pitch,
                )
                offset = first * goal.pitch + (h * p.group * out_head if goal is out else 0)
                self.head.run(
                    step,
                    p,
                    k,
                    v,
                    load,
                    em.slices,
                    goal.buffer,
                    goal.pitch,
                    out_head,
                    goal.base + offset,
                    multiple=ring if k.keys % ring == 0 else KEY_MULTIPLE,
                )
            if goal is not out:
                loops = [(em.slices, DM_SLICE_STRIDE, rows.local * out.pitch), (rows.local, goal.pitch, out.pitch)]
                em.dma(dm(goal.buffer), place_of(out, h * goal.pitch), loops, goal.pitch)
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
                    tile = self.tile(cache, count, real)
                    base = h * cache.head_stride + start * cache.width * 2
                    live = -(-(rows.batch - r) // rows.local)
                    self.load(
                        cache,
                        base + r * cache.batch_stride,
                        real,
                        tile,
                        0,
                        [(live, rows.local * cache.batch_stride, DM_SLICE_STRIDE)],
                    )
                    if live < em.slices:
                        self.load(
                            cache, base, real, tile, live * DM_SLICE_STRIDE, [(em.slices - live, 0, DM_SLICE_STRIDE)]
                        )
                    return tile

                step = Rows(
                    1,
                    q.buffer,
                    q.base + r * q.pitch + h * p.group * q_head,
                    q.pitch,
                    q_head,
                    limit.buffer,
                    limit.base + r * limit.pitch,
                    limit.pitch,
                )
                self.head.run(
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
