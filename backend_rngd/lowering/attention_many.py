"""Attention of many tokens: tokens stay on their slices, KV heads are walked one after the other.

K and V of a batch row arrive spread over its slices and go round the ring, K before it is loaded into TRF, V as the
stream of the contraction. The rows of a slice are cut into blocks, the keys into tiles; the scores of a block with a
tile are all that must fit a slice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from xdsl.ir import SSAValue

from backend_rngd.isa.descriptors import DM_SLICE_STRIDE, Dtype, Space
from backend_rngd.lowering.attention_few import Iota, tile_of
from backend_rngd.lowering.attention_head import (
    KEY_MULTIPLE,
    AttentionParams,
    Cache,
    HeadLowering,
    Rows,
    Values,
    sub_tile,
)
from backend_rngd.lowering.emitter import Emitter, dm, hbm
from backend_rngd.lowering.move import place_of, ring_broadcast, ring_packet
from backend_rngd.lowering.tensor import RowSpace, Tensor, round_up

TILE_BYTES = 224 * 1024  # scores, probabilities and mask of a block of rows with a tile of keys, a slice
BLOCK_ROWS = 64  # rows that share a tile of keys, which costs as much as 16 of them
TILE_KEYS = 512  # keys of a tile if more do not fit at once: four groups of eight rows then share half of TRF


@dataclass
class _Source:
    """K and V of a KV head from HBM, `keys` of them from byte `base` of a head on."""

    em: Emitter
    k: Cache
    v: Cache
    rows: RowSpace
    head: int
    tile: int
    ring: int
    held: tuple[int, SSAValue] | None = None

    @property
    def value_chunk(self) -> int:
        """See `KeySource`."""
        return self.tile

    def keys(self, start: int, count: int) -> tuple[SSAValue, int]:
        """See `KeySource`."""
        tile = start // self.tile * self.tile
        whole = min(self.tile, round_up(self.k.keys, KEY_MULTIPLE) - tile)
        if self.held is None or self.held[0] != tile:
            self.held = (tile, self._load(self.k, tile, whole))
        if self.ring == 1:
            return self.held[1], (start - tile) * self.k.padded * 2
        return self._round(self.held[1], (start - tile) // self.ring, count), 0

    def values(self, start: int, count: int) -> Values:
        """See `KeySource`."""
        return Values(self._load(self.v, start, count), 0, self.ring)

    def _load(self, cache: Cache, start: int, count: int) -> SSAValue:
        """Keys from `start` on: whole in every slice, or one after the other in the slices of the ring."""
        em, ring, row = self.em, self.ring, cache.width * 2
        own, real = count // ring, min(count, cache.keys - start)
        buffer = em.alloc(own * cache.padded * 2, "spread" if ring > 1 else "keys")
        if cache.padded != cache.width or real < count:
            em.memset(buffer, 0, own * cache.padded * 2)
        base = self.head * cache.head_stride + start * row
        places = self.rows.slices_per_batch
        across = (places, 0, DM_SLICE_STRIDE) if ring == 1 else (ring, row, DM_SLICE_STRIDE)
        keys = (real // ring, ring * row, cache.padded * 2)
        live = self.rows.batch * places
        loops = [(self.rows.batch, cache.batch_stride, places * DM_SLICE_STRIDE), across, keys]
        em.dma(hbm(cache.buffer, base), dm(buffer), loops, row)
        if live < em.slices:  # slices of batch rows that no request uses take part in the ring
            loops = [((em.slices - live) // places, 0, places * DM_SLICE_STRIDE), across, keys]
            em.dma(hbm(cache.buffer, base), dm(buffer, live * DM_SLICE_STRIDE), loops, row)
        return buffer

    def _round(self, spread: SSAValue, first: int, count: int) -> SSAValue:
        """`count` keys from the spread ones, `first` of every slice on, whole in every slice."""
        em, ring, padded = self.em, self.ring, self.k.padded
        tile = em.alloc(count * padded * 2, "keys")
        own, packet = count // ring, ring_packet(padded, 16)
        ring_broadcast(
            em, spread, [(own * padded, 2)], Dtype.BF16, packet, first * padded * 2, ring, tile, 0,
            [(own, ring * padded * 2), (padded // packet, packet * 2)], padded * 2, [(packet, 2)], 16,
        )  # fmt: skip
        return tile


class ManyTokens:
    """Lowers one attention op."""

    def __init__(
        self, em: Emitter, p: AttentionParams, iota: Iota, tile_bytes: int = TILE_BYTES, tile_keys: int = TILE_KEYS
    ) -> None:
        """iota: see `FewTokens`."""
        self.em = em
        self.p = p
        self.iota = iota
        self.tile_bytes = tile_bytes
        self.tile_keys = tile_keys

    def run(
        self, queries: Callable[[int, int, int], Tensor], k: Cache, v: Cache, limit: Tensor, out: Tensor, shared: bool
    ) -> Tensor:
        """queries(head, first, count): `b h s d` in DM of local rows `first` ... of the heads of a KV head; limit: f32
        per token (8 B apart), shared by the tokens of a batch row or not; result `b s h e` in `out`."""
        em, p, rows = self.em, self.p, out.rows
        assert rows is not None
        sub = sub_tile(k.padded, em.machine.trf_bytes_per_slice)
        ring = rows.slices_per_batch
        if k.keys % ring:  # keys do not fill the ring: every slice reads them from HBM
            ring = 1
        sub = max(sub // ring * ring, ring) if ring > 1 else sub
        blocks = -(-rows.local // max(1, BLOCK_ROWS // p.group))
        block = -(-rows.local // blocks)
        keys = round_up(k.keys, KEY_MULTIPLE)
        tile = tile_of(block * p.group, 1 if shared else block, keys, max(sub, ring), self.tile_bytes)
        if tile < keys:
            tile = max(sub, min(tile, self.tile_keys) // sub * sub)
        head = HeadLowering(em, p, self.iota(tile, 1, 0), em.slices, sub)
        value = v.width * 2
        for h in range(p.kv_heads):
            for first in range(0, rows.local, block):
                tokens = min(block, rows.local - first)
                mine = queries(h, first, tokens)
                q_head = mine.dims[1].stride if mine.dims[1].kind == "feature" else k.padded * 2
                at = limit.base + first * limit.pitch
                work = Rows(tokens, mine.buffer, mine.base, mine.pitch, q_head, limit.buffer, at, limit.pitch, shared)
                source = _Source(em, k, v, rows, h, tile, ring)
                state = head.attend(work, source, (k.padded, v.padded), keys, tile)
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
