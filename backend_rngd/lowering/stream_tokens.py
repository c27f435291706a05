"""Contraction with many tokens: weights stay in TRF, 16 output channels a slice (8 lanes x TimeBroadcast 2).

Every slice's tokens reach all slices through the switch ring. 64 ring positions x 2 are the 128 accumulator slots of
the time reducer, so K accumulates inside the engine. A pass yields `[token][16 channels]` in each slice; a transfer
brings the tokens back to their slices. Several passes write channels that are neighbours, so that this transfer moves
longer pieces.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Protocol

from xdsl.ir import SSAValue

from backend_rngd.isa.descriptors import (
    BROADCAST,
    DM_SLICE_STRIDE,
    FLIT_BYTES,
    REDUCE,
    Commit,
    Contract,
    Dtype,
    LaneMode,
    Space,
    Switch,
    SwitchKind,
    VectorOp,
)
from backend_rngd.lowering.channel_groups import Group, channel_groups
from backend_rngd.lowering.choices import Piece, Streamed, record
from backend_rngd.lowering.contract_base import ContractionMapping, Matrix, Stack, k_multiple, needs_own_pass, split_k
from backend_rngd.lowering.emitter import dm, hbm
from backend_rngd.lowering.mapping import BLOCK_ROWS, CHANNELS, LANES, Mapping, block_rows
from backend_rngd.lowering.packed import clear, expand, load, staging
from backend_rngd.lowering.rows_home import RowsHome, can_weave, slices_of
from backend_rngd.lowering.scales import ScaleOps
from backend_rngd.lowering.tensor import Dim, Tensor, feature_dims
from backend_rngd.lowering.weight_tiles import Job, Tile, gaps, tiles_of


@dataclass(frozen=True)
class Area:
    """Where a pass leaves its results: row r of `rows` at byte base + r * row, 16 channels."""

    buffer: SSAValue
    rows: int
    row: int
    dtype: Dtype
    base: int = 0

    @property
    def commit(self) -> Commit:
        """Commit of all rows in order."""
        return Commit(self.base, ((self.rows, self.row), (CHANNELS, self.dtype.bytes)), self.dtype, LANES)


class Sink(Protocol):
    """Takes the results of passes: `[token][channels]` of a group in every slice, tokens in the order (local row of the
    slice, slice of the ring)."""

    @property
    def limit(self) -> int:
        """Passes of a group at most."""
        ...

    @property
    def whole(self) -> bool:
        """Whether every group needs the tokens of all slices."""
        ...

    @property
    def narrow(self) -> bool:
        """Whether channels that no one asked for may stand behind those of a slice."""
        ...

    @property
    def sums(self) -> bool:
        """Whether it takes the f32 sums of a pass as they are: its groups have one pass, and it has no areas."""
        ...

    def area(self, stack: int, group: Group, number: int, rows: int) -> tuple[SSAValue, int, int]:
        """Where pass `number` of a group of stack number `stack` leaves `rows` rows: a buffer, the bytes between rows,
        the byte of the first."""
        ...

    def done(self, stack: int, group: Group, number: int, area: SSAValue, row: int) -> None:
        """Pass `number` of a group has been issued. An area of sums serves another pass afterwards."""
        ...


class TokensStream(ContractionMapping):
    """`x[rows, K] . w[N, K] -> y[rows, N]` for rows spread over slices."""

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
        """See `ContractLowering.run`."""
        assert x.rows is not None
        if output is not None:
            result = self._output(dims, dtype, x, w, output)
        else:
            result = self.result(dims, dtype, x.rows, w.rows)
        plain = w.packed is None and self.scales.channels is None
        for first, part in self._blocks(x, w, m):
            assert part.rows is not None
            home = RowsHome(self.em, result, m.passes, plain, first, part.rows, output is not None)
            self.stream(part, [Stack((w,))], dtype, vector, home, m)
        return result

    def _blocks(self, x: Tensor, w: Matrix, m: Mapping) -> Iterator[tuple[int, Tensor]]:
        """The tokens to multiply at a time, and the first local row of each block of them. Tokens in HBM come into DM
        in blocks of whole rows, if that leaves enough of them to hide the weights, which every block needs again; the
        next block is on the way while one is multiplied."""
        rows = x.rows
        assert rows is not None
        run = w.k * w.dtype.bytes
        local, em = block_rows(rows.local, run, m.block_bytes), self.em
        if x.space == Space.DM or self.scales.tokens is not None or local == rows.local:
            yield 0, x
            return
        part = replace(rows, local=local, batch=1, length=local * rows.slices, batch_stride=local * rows.slices)

        def bring(first: int) -> tuple[int, Tensor]:
            buffer = em.alloc(local * run, "tokens")
            loops = [(em.slices, rows.local * x.pitch, DM_SLICE_STRIDE), (local, x.pitch, run)]
            em.dma(hbm(x.buffer, x.base + first * x.pitch), dm(buffer), loops, run)
            return first, Tensor(buffer, Space.DM, x.dtype, (), part, 0, run)

        coming = bring(0)
        for first in range(local, rows.local, local):
            here, coming = coming, bring(first)
            yield here
        yield coming

    def stream(
        self,
        x: Tensor,
        stacks: Sequence[Stack],
        dtype: Dtype,
        vector: Sequence[VectorOp],
        to: Sink,
        m: Mapping,
    ) -> None:
        """Multiply by stacks of one height, a group of channels of each after the other, and hand the results on."""
        em, rows, w = self.em, x.rows, stacks[0].like
        assert rows is not None
        element = w.dtype.bytes
        packet = k_multiple(w.k, element)
        packed = w.packed
        chunks = split_k(w.k, m.k_bytes // element, packet if packed is None else packed.multiple(packet))
        widest = max(k for _, k in chunks)
        count = rows.physical
        most, whole = min(m.passes, to.limit), to.whole or not m.small_rings
        groups = channel_groups(
            stacks[0].rows, em.slices, most, rows.local, w.pitch, em.machine, whole=whole, narrow=to.narrow
        )
        if len(stacks[0].parts) > 1 and not stacks[0].interleaved:
            groups = [replace(g, woven=can_weave(stacks[0], g, em.slices)) for g in groups]
        split = len(chunks) > 1
        own_epilogue = split and needs_own_pass(vector)
        resident = x.space == Space.DM
        # A last pass of fewer channels comes when full ones have written all that it reads.
        passes = [(m, g, t) for g in range(len(groups)) for t in range(groups[g].passes) for m in range(len(stacks))]
        # Tokens in HBM are brought in one K chunk at a time, for as many passes as partial sums fit.
        batch = max(1, m.partial_bytes // (count * CHANNELS * 4)) if split and not resident else 1
        jobs = [
            Job(m, g, t, c)
            for first in range(0, len(passes), batch)
            for c in range(len(chunks))
            for m, g, t in passes[first : first + batch]
        ]
        most_tile = m.tile_bytes // element if packed is None else 0
        tiles = tiles_of(jobs, chunks, [g.per_slice for g in groups], most_tile)
        at = {tile.first: n for n, tile in enumerate(tiles)}
        largest = max(tile.read for tile in tiles) * element
        idle = em.read_early(largest)[: max(0, len(tiles) - m.in_flight)] if packed is None else []
        slots = min(m.in_flight + len(idle), len(tiles))
        # What takes part without channels needs some weights.
        unset = gaps(tiles, [g.slices == g.ring for g in groups], slots)
        sizes = [max(tile.read for tile in tiles[n::slots]) * element for n in range(slots)]
        first, em.clears_early = em.clears_early and em.early_bytes > 0, False  # contraction of the routine
        may = packed is None and rows.local < BLOCK_ROWS and not any(high for _, high in unset[:2])
        early = em.take_early(sizes[:2]) if may else []
        pieces = tuple(Piece(g.per_slice, g.slices, g.ring) for g in groups)
        record(Streamed(em.location, "tokens", rows.local, tuple(k for _, k in chunks), pieces, slots))
        with em.at_start() if first else nullcontext():
            buffers = [*early, *(em.alloc(n, "weights") for n in sizes[len(early) : slots - len(idle)]), *idle]
            stages = [] if packed is None else [staging(em, packed, CHANNELS, widest) for _ in buffers]
            for n, (low, high) in enumerate(unset):
                if high and packed is not None:
                    clear(em, stages[n], packed, CHANNELS, widest)
                elif high:
                    em.memset(buffers[n], low * element, (high - low) * element)
        partial = CHANNELS * 4
        room = min(batch, len(passes)) + min(2, len(chunks) - 1) if split else 2 if to.sums else 0
        sums = deque(em.alloc(count * partial, "partial") for _ in range(room))
        held: dict[int, Area] = {}  # sums of the passes that have begun

        def fetch_weights(n: int) -> None:
            tile = tiles[n]
            group = groups[tile.group]
            if packed is None:
                self._load_weights(stacks[tile.stack], group, tile, buffers[n % slots])
                return
            steps = [
                (em.slices // group.ring, 0, group.ring * DM_SLICE_STRIDE),
                (group.slices, group.per_slice, DM_SLICE_STRIDE),
            ]
            start = group.start + tile.number * CHANNELS
            load(em, packed, stages[n % slots], start, [*steps, (CHANNELS, 1, 0)], tile.k0, tile.k)

        bases: dict[int, int] = {}  # TRF address of a job's weights

        lane = em.machine.trf_bytes_per_slice // LANES
        beside = 4 * widest * element <= lane  # passes; what takes more of TRF is loaded in the main context, faster
        current = 0  # tile

        def prepare(i: int) -> None:
            """Weights of a job into the TRF half that the job before it does not use."""
            nonlocal current
            current = at.get(i, current)
            (k0, k), tile, buffer = chunks[jobs[i].chunk], tiles[current], buffers[current % slots]
            if packed is not None:
                expand(em, packed, stages[current % slots], CHANNELS, k0, k, buffer, em.slices)
            run, pitch = k * element, tile.k * element
            bases[i] = self._next_half(lane, 2 * run)
            loops = [(LANES, pitch), (2, LANES * pitch), (k, element)]
            channels = em.fetch(tile.start(jobs[i], k0) * element, loops, w.dtype, FLIT_BYTES // element)
            em.load_trf(channels, buffer, LANES, bases[i], context="sub" if beside else "main")

        with em.at_start() if early else nullcontext():
            for i in range(len(early)):
                fetch_weights(i)
        for i in range(len(early), max(slots - 1, 1)):
            fetch_weights(i)
        tokens, loaded = x, (-1, -1)
        scales = ScaleOps(em, self.scales)
        if beside:
            prepare(0)
        later: list[Callable[[], None]] = []  # what needs a sum that the sub context is adding up
        for i, job in enumerate(jobs):
            if i in at and max(len(early), slots - 1, 1) <= at[i] + slots - 1 < len(tiles):
                fetch_weights(at[i] + slots - 1)
            group, t, c = groups[job.group], job.number, job.chunk
            (k0, k), last = chunks[c], c == len(chunks) - 1
            number = passes.index((job.stack, job.group, t))
            if not resident and loaded != (number // batch, c):
                tokens, loaded = self._tokens_chunk(x, k0, k), (number // batch, c)
            ring = group.ring
            seen = rows.local * ring  # tokens that a slice meets
            final, after = None, ()
            if last and not to.sums:
                if t == 0:
                    scales.broadcast_tokens(ring)
                    scales.load_channels(group.start, group.per_slice, group.slices, ring)
                area, row, base = to.area(job.stack, group, t, count)
                final = Area(area, seen, row, dtype, base)
                after = (*scales.many(seen, CHANNELS, t * CHANNELS), *vector)
            place = Area(sums.popleft(), seen, partial, Dtype.F32) if split or final is None else final
            ops = (*w.raised, *after) if place is final else w.raised
            if not beside:
                prepare(i)
            self._pass(tokens, k0 if resident else 0, k, packet, bases[i], place, ring, ops)
            if beside and i + 1 < len(jobs):
                prepare(i + 1)  # before the sub context is busy with sums
            while later:
                later.pop(0)()
            total = held.setdefault(number, place)
            if c > 0:
                goal, ops, context = (total, (), "sub") if final is None or own_epilogue else (final, after, "main")
                self._add(total.buffer, place.buffer, seen * CHANNELS, goal.commit, goal.buffer, ops, context)
                sums.append(place.buffer)
            if not last:
                continue
            del held[number]

            def finish(
                job: Job = job, total: Area = total, final: Area | None = final, after: Sequence[VectorOp] = after
            ) -> None:
                if final is not None and own_epilogue:
                    self._apply(total.buffer, total.rows * CHANNELS, final.commit, final.buffer, after)
                left = final or total
                to.done(job.stack, groups[job.group], job.number, left.buffer, left.row)
                if total is not final:
                    sums.append(total.buffer)

            if final is None or own_epilogue:
                later.append(finish)
            else:
                finish()
        while later:
            later.pop(0)()

    def _output(self, dims: Sequence[Dim], dtype: Dtype, x: Tensor, w: Matrix, output: SSAValue) -> Tensor:
        """The result in an HBM buffer of the program, rows in physical order."""
        index = [i for i, d in enumerate(dims) if d.kind == "feature"]
        strides, pitch = feature_dims([dims[i].size for i in index], dtype.bytes)
        placed = list(dims)
        for i, stride in zip(index, strides, strict=True):
            placed[i] = Dim("feature", dims[i].size, stride)
        return Tensor(output, Space.HBM, dtype, tuple(placed), x.rows, 0, max(pitch, w.rows * dtype.bytes))

    def _load_weights(self, w: Stack, group: Group, tile: Tile, buffer: SSAValue) -> None:
        """The rows of the weights that passes of a group need to each of its slices, some chunks of K."""
        element, pitch = w.like.dtype.bytes, w.like.pitch
        run = tile.k * element
        copies = (self.em.slices // group.ring, 0, group.ring * DM_SLICE_STRIDE)
        if w.interleaved:
            block = CHANNELS // len(w.parts)
            for i, matrix in enumerate(w.parts):
                first = group.start // len(w.parts)
                self.em.dma(
                    hbm(matrix.buffer, first * pitch + tile.k0 * element),
                    dm(buffer, i * block * run),
                    [copies, (group.slices, block * pitch, DM_SLICE_STRIDE), (block, pitch, run)],
                    run,
                )
            return
        for part, first, slices, before in slices_of(w, group):
            base, over_slices = group.steps(before, slices, group.per_slice * pitch)
            self.em.dma(
                hbm(w.parts[part].buffer, (first + tile.number * CHANNELS) * pitch + tile.k0 * element),
                dm(buffer, base),
                [copies, *over_slices, (tile.rows, pitch, run)],
                run,
            )

    def _tokens_chunk(self, x: Tensor, k0: int, k: int) -> Tensor:
        rows = x.rows
        assert rows is not None
        run = k * x.dtype.bytes
        buffer = self.em.alloc(rows.local * run, "tokens")
        if rows.used_slices < rows.slices:
            self.em.memset(buffer, 0, rows.local * run)
        loops = [(rows.used_slices, rows.local * x.pitch, DM_SLICE_STRIDE), (rows.local, x.pitch, run)]
        self.em.dma(hbm(x.buffer, x.base + k0 * x.dtype.bytes), dm(buffer), loops, run)
        return Tensor(buffer, Space.DM, x.dtype, (), rows, 0, run)

    def _pass(
        self, x: Tensor, k0: int, k: int, packet: int, base: int, target: Area, ring: int, vector: Sequence[VectorOp]
    ) -> None:
        """The tokens of a ring against the 16 channels that each slice holds; rows come out as (local row, slice)."""
        em, rows, width = self.em, x.rows, x.dtype.bytes
        assert rows is not None
        start, features = x.base + k0 * width, [(k, width)]
        if x.block:
            start = x.base + k0 // x.block * x.block_stride
            features = [(k // x.block, x.block_stride), (x.block, width)]
        em.execute(
            em.fetch(start, [(rows.local, x.pitch), *features], x.dtype, packet),
            x.buffer,
            target.commit,
            target.buffer,
            switch=Switch(SwitchKind.BROADCAST01, 1, ring, rows.local * (k // packet)),
            contract=Contract(
                8,
                packet * width // FLIT_BYTES,
                base,
                ((rows.local, 0, 0), (k // packet, packet * width, REDUCE), (ring, 0, 0), (2, k * width, BROADCAST)),
                packet,
                packet.bit_length() - 1,
                LaneMode.INTERLEAVED,
            ),
            vector=vector,
        )
