"""Contraction with few tokens: activations stay in TRF, one token a lane, while the weights stream from DM.

Output channels are spread over slices. A pass yields `[channel][lane]` in each slice; a ring broadcast brings the rows
back to every slice. What counts is that HBM never pauses, so the next weight tile loads while this one is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import NamedTuple

from xdsl.ir import SSAValue

from backend_rngd.isa.descriptors import (
    DM_SLICE_STRIDE,
    FLIT_BYTES,
    REDUCE,
    Commit,
    Contract,
    Dtype,
    LaneMode,
    Space,
    VectorOp,
)
from backend_rngd.lowering.choices import Piece, Streamed, record
from backend_rngd.lowering.contract_base import (
    N_MULTIPLE,
    ContractionMapping,
    Matrix,
    compact,
    k_multiple,
    needs_own_pass,
    placed,
    split_k,
)
from backend_rngd.lowering.emitter import dm, hbm
from backend_rngd.lowering.mapping import TILE_BYTES, Mapping, lane_bytes
from backend_rngd.lowering.move import ring_broadcast, ring_packet
from backend_rngd.lowering.packed import expand_numbers, group_sums, load, scaled_rows, staging
from backend_rngd.lowering.scales import ScaleOps
from backend_rngd.lowering.tensor import Dim, Tensor

SCALED_CHANNELS = 1024  # of a tile a slice, so that their scales fit half of VRF
SHORT = 4  # channels a slice of a short last tile
STARTS = 3  # times the start of a transfer that it has to save
RESULT_BYTES = 4  # of an element, at most


@dataclass(frozen=True)
class Tile:
    """Output channels [start, start + slices * per_slice): `per_slice` in each of `slices` slices."""

    start: int
    per_slice: int
    slices: int


class _Final(NamedTuple):
    """Where a tile's results go in every slice."""

    buffer: SSAValue
    base: int


class WeightsStream(ContractionMapping):
    """`x[rows, K] . w[N, K] -> y[rows, N]` for rows that every slice holds."""

    def run(
        self,
        x: Tensor,
        w: Matrix,
        dims: Sequence[Dim],
        dtype: Dtype,
        vector: Sequence[VectorOp],
        output: SSAValue | None,
        m: Mapping,
    ) -> Tensor:
        em = self.em
        assert x.rows is not None
        local = x.rows.local
        lanes = max(4, local)
        lane = lane_bytes(local, em.machine)
        element = w.dtype.bytes
        packet = k_multiple(w.k, element)
        packed = w.packed
        chunks = split_k(w.k, m.k_bytes // element, packet if packed is None else packed.multiple(packet))
        widest = max(k for _, k in chunks)
        most = m.tile_bytes // (widest * element)
        if self.scales.channels is not None:
            most = min(most, SCALED_CHANNELS)
        if packed is not None:
            most = min(most, scaled_rows(packed, widest))
        tiles = column_tiles(w.rows, max(4, most // 4 * 4), em.slices)
        if m.short_end and packed is None:
            tiles = self._short_end(w.rows, tiles, widest * element)
        largest = max(t.per_slice for t in tiles)
        scales = ScaleOps(em, self.scales)
        jobs = [(c, t) for c in range(len(chunks)) for t in range(len(tiles))]
        slots = min(m.in_flight, len(jobs))
        sizes = [max(tiles[t].per_slice * chunks[c][1] for c, t in jobs[i::slots]) * element for i in range(slots)]
        pieces = tuple(Piece(t.per_slice, t.slices, em.slices) for t in tiles)
        record(Streamed(em.location, "weights", local, tuple(k for _, k in chunks), pieces, slots))
        early = em.take_early(sizes) if packed is None else []
        buffers = early or [em.alloc(nbytes, "weights") for nbytes in sizes]
        stages = [] if packed is None else [staging(em, packed, largest, widest) for _ in buffers]
        split = len(chunks) > 1
        # Nothing of the float stages is left behind the sum over groups.
        apart = split or (packed is not None and bool(vector))
        own_epilogue = apart and (needs_own_pass(vector) or not split)
        parts = [[em.alloc(t.per_slice * lanes * 4, "partial") for t in tiles] for _ in range(2)] if apart else []
        kept = [t.per_slice * lanes * dtype.bytes for t in tiles]
        if output is None:
            finals = [_Final(em.alloc(nbytes, "channels"), 0) for nbytes in kept]
        else:  # side by side, so that few transfers store them
            whole = em.alloc(sum(kept), "channels")
            finals = [_Final(whole, sum(kept[:i])) for i in range(len(tiles))]
        for i, t in enumerate(tiles):
            if t.slices < em.slices:  # the ring and the sums read every slice, also those without channels
                em.memset(finals[i].buffer, finals[i].base, kept[i])
                for part in parts:
                    em.memset(part[i], 0, t.per_slice * lanes * 4)

        def fetch_tile(i: int) -> None:
            c, t = jobs[i]
            if packed is None:
                self._load_weights(w, tiles[t], *chunks[c], buffers[i % slots])
                return
            tile = tiles[t]
            steps = [(tile.slices, tile.per_slice, DM_SLICE_STRIDE), (tile.per_slice, 1, 0)]
            load(em, packed, stages[i % slots], tile.start, steps, *chunks[c])

        result = None
        if output is None:
            result = self.result(dims, dtype, x.rows, max(t.start + em.slices * t.per_slice for t in tiles))
        with em.at_start() if early else nullcontext():
            for i in range(max(len(early), min(slots - 1, len(jobs)), 1)):
                fetch_tile(i)
        base = 0
        for i, (c, t) in enumerate(jobs):
            coming = i + slots - 1
            if max(len(early), 1) <= coming < len(jobs):
                fetch_tile(coming)
            k0, k = chunks[c]
            before, groups = w.raised, 1
            if packed is not None:
                rows, slices = tiles[t].per_slice, tiles[t].slices
                expand_numbers(em, stages[i % slots], rows, k, buffers[i % slots], slices)
                before = group_sums(em, packed, stages[i % slots], rows, k0, k, lanes, slices)
                groups = packed.part(k0, k)[1]
            if t == 0:
                base = self._next_half(lane, k * element)
                self._tokens_to_trf(x, k0, k, lanes, base)
            tile, last = tiles[t], c == len(chunks) - 1
            after: tuple[VectorOp, ...] = ()
            if last:
                scales.load_channels(tile.start, tile.per_slice, tile.slices, em.slices)
                # The sums over chunks run in every slice, a pass over weights only where there are channels.
                after = (*scales.few(tile.per_slice, lanes, em.slices if split else tile.slices), *vector)
            where = finals[t] if not apart else _Final(parts[0 if c == 0 else 1][t], 0)
            self._weights_pass(
                buffers[i % slots],
                tile,
                k,
                packet,
                lanes,
                base,
                where,
                dtype if not apart else Dtype.F32,
                (*before, *(after if not apart else ())),
                w.dtype,
                groups,
            )
            count = tile.per_slice * lanes
            if split and c > 0:
                done = last and not own_epilogue
                goal = finals[t] if done else _Final(parts[0][t], 0)
                commit = compact(count, dtype if done else Dtype.F32, goal.base)
                self._add(parts[0][t], parts[1][t], count, commit, goal.buffer, after if done else ())
            if last and own_epilogue:
                self._apply(parts[0][t], count, compact(count, dtype, finals[t].base), finals[t].buffer, after)
            if last and result is not None:
                self._spread(finals[t].buffer, tile, lanes, local, dtype, result)
        if output is not None:
            self._store(tiles, finals, lanes * dtype.bytes, output)
            return Tensor(output, Space.HBM, dtype, channel_major(dims, lanes * dtype.bytes), x.rows, 0, dtype.bytes)
        assert result is not None
        return result

    def _short_end(self, rows: int, tiles: list[Tile], run: int) -> list[Tile]:
        """Tiles of which the last is short, if that saves time: nothing is left to load while the last one is used."""
        em, per_slice = self.em, max(t.per_slice for t in tiles)
        start = rows - SHORT * em.slices
        saved = (tiles[-1].per_slice - SHORT) * run / em.machine.fetch_main_bytes
        if start % N_MULTIPLE or tiles[-1].slices < em.slices or saved < STARTS * em.machine.dma_startup_cycles:
            return tiles
        return [*column_tiles(start, per_slice, em.slices), Tile(start, SHORT, em.slices)]

    def alternates(self, x: Tensor, matrices: Sequence[Matrix]) -> bool:
        """Whether `stacked` is possible and gives work to slices that would have none."""
        assert x.rows is not None
        em, first = self.em, matrices[0]
        count, networks = len(matrices), em.slices // em.machine.slices_per_dmn
        if networks < 2 or em.machine.slices_per_dmn % count or any(m.rows != first.rows for m in matrices):
            return False
        rows = count * first.rows
        fits = first.pitch <= lane_bytes(x.rows.local, em.machine) and rows * first.pitch <= TILE_BYTES * em.slices
        small = x.rows.local * rows * RESULT_BYTES <= self.spill
        return fits and small and first.rows % (4 * em.slices) != 0 and rows % (4 * em.slices) == 0

    def stacked(
        self, x: Tensor, matrices: Sequence[Matrix], dims: Sequence[Sequence[Dim]], dtype: Dtype
    ) -> list[Tensor]:
        """The results of contractions of `x` with matrices of one shape, in one pass.

        Each alone would fill some slices only, and a transfer to few slices that lie side by side has one data-memory
        network to write through. So the matrices take turns: of every network's slices each gets an equal part.
        """
        em = self.em
        assert x.rows is not None
        first, count, local = matrices[0], len(matrices), x.rows.local
        element, lanes = first.dtype.bytes, max(4, local)
        networks, share = em.slices // em.machine.slices_per_dmn, em.machine.slices_per_dmn // count
        tile = Tile(0, count * first.rows // em.slices, em.slices)
        pieces = (Piece(tile.per_slice, tile.slices, em.slices),)
        record(Streamed(em.location, "weights", local, (first.k,), pieces, 1))
        buffer = em.alloc(tile.per_slice * first.pitch, "weights")
        for i, m in enumerate(matrices):
            run = tile.per_slice * m.pitch
            loops = [
                (networks, share * run, em.machine.slices_per_dmn * DM_SLICE_STRIDE),
                (share, run, DM_SLICE_STRIDE),
                (tile.per_slice, m.pitch, m.pitch),
            ]
            em.dma(hbm(m.buffer), dm(buffer, i * share * DM_SLICE_STRIDE), loops, m.pitch)
        base = self._next_half(lane_bytes(local, em.machine), first.pitch)
        self._tokens_to_trf(x, 0, first.k, lanes, base)
        final = _Final(em.alloc(tile.per_slice * lanes * dtype.bytes, "channels"), 0)
        packet = k_multiple(first.k, element)
        self._weights_pass(buffer, tile, first.k, packet, lanes, base, final, dtype, first.raised, first.dtype, 1)
        whole = self.result(dims[0], dtype, x.rows, count * first.rows)
        piece = tile.per_slice * dtype.bytes
        around = ((networks, share * piece), (count, first.rows * dtype.bytes), (share, piece))
        self._spread(final.buffer, tile, lanes, local, dtype, whole, around)
        return [replace(whole, dims=placed(d, dtype)[0], base=i * first.rows * dtype.bytes) for i, d in enumerate(dims)]

    def _store(self, tiles: Sequence[Tile], finals: Sequence[_Final], row: int, output: SSAValue) -> None:
        """`[channel][lane]` of all tiles to HBM, `row` bytes a channel; equal tiles in one transfer."""
        first = 0
        while first < len(tiles):
            tile = tiles[first]
            same = sum((t.per_slice, t.slices) == (tile.per_slice, tile.slices) for t in tiles[first:])
            run = tile.per_slice * row
            loops = [(same, run, tile.slices * run), (tile.slices, DM_SLICE_STRIDE, run)]
            self.em.dma(dm(*finals[first]), hbm(output, tile.start * row), loops, run)
            first += same

    def _tokens_to_trf(self, x: Tensor, k0: int, k: int, lanes: int, base: int) -> None:
        """TRF lane l holds token l (tokens repeat when there are fewer than lanes)."""
        assert x.rows is not None
        width = x.dtype.bytes
        source, offset, pitch = x.buffer, x.base + k0 * width, x.pitch
        if x.space == Space.HBM:
            source = self.em.alloc(x.rows.local * k * width, "tokens")
            self.em.dma(
                hbm(x.buffer, offset),
                dm(source),
                [(self.em.slices, 0, DM_SLICE_STRIDE), (x.rows.local, x.pitch, k * width)],
                k * width,
            )
            offset, pitch = 0, k * width
        loops = [(lanes // x.rows.local, 0), (x.rows.local, pitch), (k, width)]
        self.em.load_trf(
            self.em.fetch(offset, loops, x.dtype, FLIT_BYTES // width), source, lanes, base, context="main"
        )

    def _weights_pass(
        self,
        weights: SSAValue,
        tile: Tile,
        k: int,
        packet: int,
        lanes: int,
        base: int,
        target: _Final,
        dtype: Dtype,
        vector: Sequence[VectorOp],
        multiplied: Dtype,
        groups: int,
    ) -> None:
        """Channels of a tile times tokens; `groups`: parts of K whose sums are kept apart for `vector`."""
        width, part = multiplied.bytes, k // groups
        self.em.execute(
            self.em.fetch(0, [(tile.per_slice, k * width), (k, width)], multiplied, packet),
            weights,
            Commit(target.base, ((tile.per_slice, lanes * dtype.bytes), (lanes, dtype.bytes)), dtype, lanes),
            target.buffer,
            slices=tile.slices,
            contract=Contract(
                lanes,
                packet * width // FLIT_BYTES,
                base,
                ((tile.per_slice, 0, 0), (groups, part * width, 0), (part // packet, packet * width, REDUCE)),
                packet,
                packet.bit_length() - 1,
                LaneMode.INTERLEAVED,
            ),
            vector=vector,
        )

    def _spread(
        self,
        channels: SSAValue,
        tile: Tile,
        lanes: int,
        local: int,
        dtype: Dtype,
        result: Tensor,
        around: Sequence[tuple[int, int]] = (),
    ) -> None:
        """`[channel][lane]` of every slice to rows of all channels in every slice. around: see `ring_broadcast`."""
        em, width = self.em, dtype.bytes
        target, base, pitch = result.buffer, result.base + tile.start * width, result.pitch
        spilled = result.space == Space.HBM
        if spilled:
            pitch = em.slices * tile.per_slice * width
            target, base = em.alloc(local * pitch, "rows"), 0
        flit = 32 // width
        packet = ring_packet(tile.per_slice, flit)
        ring_broadcast(
            em,
            channels,
            [(local, width), (tile.per_slice, lanes * width)],
            dtype,
            packet,
            0,
            em.slices,
            target,
            base,
            [(local, pitch), (tile.per_slice // packet, packet * width)],
            tile.per_slice * width,
            [(packet, width)],
            min(packet, flit),
            around=around,
        )
        if spilled:
            run = tile.slices * tile.per_slice * width
            em.dma(
                dm(target), hbm(result.buffer, result.base + tile.start * width), [(local, pitch, result.pitch)], run
            )

    def _load_weights(self, w: Matrix, tile: Tile, k0: int, k: int, buffer: SSAValue) -> None:
        width = w.dtype.bytes
        self.em.dma(
            hbm(w.buffer, tile.start * w.pitch + k0 * width),
            dm(buffer),
            [(tile.slices, tile.per_slice * w.pitch, DM_SLICE_STRIDE), (tile.per_slice, w.pitch, k * width)],
            k * width,
        )


def channel_major(dims: Sequence[Dim], element: int) -> tuple[Dim, ...]:
    """Feature strides of a `[channel][lane]` image."""
    out: list[Dim] = []
    stride = element
    for d in reversed(dims):
        if d.kind == "feature":
            out.append(Dim("feature", d.size, stride))
            stride *= d.size
        else:
            out.append(d)
    return tuple(reversed(out))


def column_tiles(rows: int, per_slice: int, slices: int) -> list[Tile]:
    """Tiles of `slices * per_slice` channels and a last one whose channels fill whole slices.

    rows is a multiple of 64; per_slice a multiple of 4.
    """
    tiles: list[Tile] = []
    start, width = 0, slices * per_slice
    while rows - start >= width:
        tiles.append(Tile(start, per_slice, slices))
        start += width
    rest = rows - start
    if rest:
        size = next(d for d in range(-(-rest // slices), rest + 1) if d % 4 == 0 and rest % d == 0)
        tiles.append(Tile(start, size, rest // size))
    return tiles
