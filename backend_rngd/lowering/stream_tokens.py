"""Contraction with many tokens: weights stay in TRF, 16 output channels a slice (8 lanes x TimeBroadcast 2).

Every slice's tokens reach all slices through the switch ring. 64 ring positions x 2 are the 128 accumulator slots of
the time reducer, so K accumulates inside the engine. A pass yields `[token][16 channels]` in each slice; a transfer
brings the tokens back to their slices. Several passes write channels that are neighbours, so that this transfer moves
longer pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from backend_rngd.lowering.choices import Piece, Streamed, record
from backend_rngd.lowering.contract_base import ContractionMapping, Matrix, k_multiple, needs_own_pass, split_k
from backend_rngd.lowering.emitter import Emitter, dm, hbm
from backend_rngd.lowering.packed import clear, expand, load, staging
from backend_rngd.lowering.scales import ScaleOps
from backend_rngd.lowering.tensor import Dim, Tensor, feature_dims
from backend_rngd.machine import Machine

LANES = 8
CHANNELS = 16  # 8 lanes x TimeBroadcast 2: each 64 B packet serves two cycles (hardware.md 2.8 supply limit)
NARROW = (12,)  # channels of a pass that is not full: fewer would be better off in smaller rings
TRF_K_BYTES = 2048  # half a TRF: 2 channels x 1024 bf16 a lane, the other half loads meanwhile
PARTIAL_BYTES = 128 * 1024  # partial sums of a split K a slice, when the tokens have to be brought in again
GROUP_BYTES = 40 * 1024  # results of a group of passes a slice; two groups are in flight


@dataclass(frozen=True)
class Group:
    """Output channels [start, start + slices * per_slice), `per_slice` in each of `slices` slices, 16 a pass.

    A last pass may have fewer channels; what it computes beside them is never read. ring: slices that exchange their
    tokens. Rings smaller than the unit hold copies of the same weights, and each works on the tokens of its own slices:
    a few channels keep all slices busy.
    """

    start: int
    per_slice: int
    slices: int
    ring: int

    @property
    def passes(self) -> int:
        """Passes that compute the channels of a slice."""
        return -(-self.per_slice // CHANNELS)

    def width(self, number: int) -> int:
        """Channels a slice of pass `number`."""
        return min(CHANNELS, self.per_slice - number * CHANNELS)


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
    def together(self) -> bool:
        """Whether a chunk of K is worked off for several passes before the next one, so that what makes the later
        chunks has time."""
        ...

    def area(self, matrix: int, group: Group, rows: int) -> tuple[SSAValue, int]:
        """A buffer for `rows` rows of a group, and the bytes of a row."""
        ...

    def done(self, matrix: int, group: Group, area: SSAValue, row: int) -> None:
        """All passes of a group have been issued."""
        ...


@dataclass(frozen=True)
class _Job:
    """One pass: matrix, group and pass of the group, chunk of K."""

    matrix: int
    group: int
    number: int
    chunk: int


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
    ) -> Tensor:
        """See `ContractLowering.run`."""
        assert x.rows is not None
        if output is not None:
            result = self._output(dims, dtype, x, w, output)
        else:
            result = self.result(dims, dtype, x.rows, w.rows)
        most = max(1, min(8, GROUP_BYTES // (x.rows.physical * CHANNELS * dtype.bytes)))
        plain = w.packed is None and self.scales.channels is None
        self.stream(x, [w], dtype, vector, RowsHome(self.em, result, most, narrow=plain))
        return result

    def stream(self, x: Tensor, matrices: Sequence[Matrix], dtype: Dtype, vector: Sequence[VectorOp], to: Sink) -> None:
        """Multiply by matrices of one shape, a group of channels of each after the other, and hand the results on."""
        em, rows, w = self.em, x.rows, matrices[0]
        assert rows is not None
        element = w.dtype.bytes
        packet = k_multiple(w.k, element)
        packed = w.packed
        chunks = split_k(w.k, TRF_K_BYTES // element, packet if packed is None else packed.multiple(packet))
        widest = max(k for _, k in chunks)
        count = rows.physical
        groups = channel_groups(
            w.rows, em.slices, to.limit, rows.local, w.pitch, em.machine, whole=to.whole, narrow=to.narrow
        )
        split = len(chunks) > 1
        own_epilogue = split and needs_own_pass(vector)
        resident = x.space == Space.DM
        passes = [(m, g, t) for g in range(len(groups)) for m in range(len(matrices)) for t in range(groups[g].passes)]
        # Tokens in HBM are brought in one K chunk at a time, for as many passes as partial sums fit.
        several = split and (not resident or to.together)
        batch = max(1, PARTIAL_BYTES // (count * CHANNELS * 4)) if several else 1
        jobs = [
            _Job(m, g, t, c)
            for first in range(0, len(passes), batch)
            for c in range(len(chunks))
            for m, g, t in passes[first : first + batch]
        ]
        pieces = tuple(Piece(g.per_slice, g.slices, g.ring) for g in groups)
        sizes_k = tuple(k for _, k in chunks)
        record(Streamed(em.location, "tokens", rows.local, w.rows, w.k, len(matrices), element, sizes_k, pieces, 2,
                        em.slices, resident, packed is not None, to.limit))  # fmt: skip
        # What takes part without channels needs some weights.
        spare = any(groups[job.group].width(job.number) < CHANNELS for job in jobs[:2])
        spare = spare or any(g.slices < g.ring for g in groups)
        nbytes = CHANNELS * widest * element
        early = em.take_early([nbytes] * min(2, len(jobs))) if packed is None and not spare else []
        buffers = early or [em.alloc(nbytes, "weights") for _ in range(2)]
        stages = [] if packed is None else [staging(em, packed, CHANNELS, widest) for _ in buffers]
        partial = CHANNELS * 4
        acc = [em.alloc(count * partial, "partial") for _ in range(min(batch, len(passes)))] if split else []
        part = em.alloc(count * partial, "partial") if split else None
        if spare:
            for buffer in buffers if packed is None else ():
                em.memset(buffer, 0, CHANNELS * widest * element)
            for place in stages:
                assert packed is not None
                clear(em, place, packed, CHANNELS, widest)

        def fetch_weights(i: int) -> None:
            job = jobs[i]
            if packed is None:
                self._load_weights(
                    matrices[job.matrix], groups[job.group], job.number, chunks[job.chunk], buffers[i % 2]
                )
                return
            group, ring = groups[job.group], groups[job.group].ring
            steps = [(em.slices // ring, 0, ring * DM_SLICE_STRIDE), (group.slices, group.per_slice, DM_SLICE_STRIDE)]
            start = group.start + job.number * CHANNELS
            load(em, packed, stages[i % 2], start, [*steps, (CHANNELS, 1, 0)], *chunks[job.chunk])

        with em.at_start() if early else nullcontext():
            for i in range(max(len(early), 1)):
                fetch_weights(i)
        tokens, loaded = x, (-1, -1)
        scales = ScaleOps(em, self.scales)
        area: tuple[SSAValue, int] | None = None
        for i, job in enumerate(jobs):
            if len(early) <= i + 1 < len(jobs):
                fetch_weights(i + 1)
            group, t, c = groups[job.group], job.number, job.chunk
            (k0, k), last = chunks[c], c == len(chunks) - 1
            number = passes.index((job.matrix, job.group, t))
            if not resident and loaded != (number // batch, c):
                tokens, loaded = self._tokens_chunk(x, k0, k), (number // batch, c)
            if packed is not None:
                expand(em, packed, stages[i % 2], CHANNELS, k0, k, buffers[i % 2], em.slices)
            run = k * element
            base = self._next_half(em.machine.trf_bytes_per_slice // LANES, 2 * run)
            channels = em.fetch(0, [(LANES, run), (2, LANES * run), (k, element)], w.dtype, FLIT_BYTES // element)
            em.load_trf(channels, buffers[i % 2], LANES, base)
            ring = group.ring
            seen = rows.local * ring  # tokens that a slice meets
            source = k0 if resident else 0
            mine = None if not split else Area(acc[number % batch], seen, partial, Dtype.F32)
            if not last:
                assert mine is not None and part is not None
                here = mine if c == 0 else replace(mine, buffer=part)
                self._pass(tokens, source, k, packet, base, here, ring, w.raised)
                if c > 0:
                    self._add(mine.buffer, part, seen * CHANNELS, mine.commit, mine.buffer, ())
                continue
            if t == 0:
                area = to.area(job.matrix, group, count)
                scales.broadcast_tokens(ring)
                scales.load_channels(group.start, group.per_slice, group.slices, ring)
            assert area is not None
            buffer, row = area
            final = Area(buffer, seen, row, dtype, t * CHANNELS * dtype.bytes)
            after = (*scales.many(seen, CHANNELS, t * CHANNELS), *vector)
            if mine is None or part is None:
                self._pass(tokens, source, k, packet, base, final, ring, (*w.raised, *after))
            else:
                self._pass(tokens, source, k, packet, base, replace(mine, buffer=part), ring, w.raised)
                goal, ops = (mine, ()) if own_epilogue else (final, after)
                self._add(mine.buffer, part, seen * CHANNELS, goal.commit, goal.buffer, ops)
                if own_epilogue:
                    self._apply(mine.buffer, seen * CHANNELS, final.commit, final.buffer, after)
            if t == group.passes - 1:
                to.done(job.matrix, group, buffer, row)

    def _output(self, dims: Sequence[Dim], dtype: Dtype, x: Tensor, w: Matrix, output: SSAValue) -> Tensor:
        """The result in an HBM buffer of the program, rows in physical order."""
        index = [i for i, d in enumerate(dims) if d.kind == "feature"]
        strides, pitch = feature_dims([dims[i].size for i in index], dtype.bytes)
        placed = list(dims)
        for i, stride in zip(index, strides, strict=True):
            placed[i] = Dim("feature", dims[i].size, stride)
        return Tensor(output, Space.HBM, dtype, tuple(placed), x.rows, 0, max(pitch, w.rows * dtype.bytes))

    def _load_weights(self, w: Matrix, group: Group, number: int, chunk: tuple[int, int], buffer: SSAValue) -> None:
        """The rows of the weight that a pass of a group needs to each of its slices, one K chunk."""
        (k0, k), element = chunk, w.dtype.bytes
        self.em.dma(
            hbm(w.buffer, (group.start + number * CHANNELS) * w.pitch + k0 * element),
            dm(buffer),
            [
                (self.em.slices // group.ring, 0, group.ring * DM_SLICE_STRIDE),
                (group.slices, group.per_slice * w.pitch, DM_SLICE_STRIDE),
                (group.width(number), w.pitch, k * element),
            ],
            k * element,
        )

    def _tokens_chunk(self, x: Tensor, k0: int, k: int) -> Tensor:
        rows = x.rows
        assert rows is not None
        run = k * x.dtype.bytes
        buffer = self.em.alloc(rows.local * run, "tokens")
        loops = [(self.em.slices, rows.local * x.pitch, DM_SLICE_STRIDE), (rows.local, x.pitch, run)]
        self.em.dma(hbm(x.buffer, x.base + k0 * x.dtype.bytes), dm(buffer), loops, run)
        return Tensor(buffer, Space.DM, x.dtype, (), rows, 0, run)

    def _pass(
        self, x: Tensor, k0: int, k: int, packet: int, base: int, target: Area, ring: int, vector: Sequence[VectorOp]
    ) -> None:
        """The tokens of a ring against the 16 channels that each slice holds; rows come out as (local row, slice)."""
        em, rows, width = self.em, x.rows, x.dtype.bytes
        assert rows is not None
        em.execute(
            em.fetch(x.base + k0 * width, [(rows.local, x.pitch), (k, width)], x.dtype, packet),
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


class RowsHome:
    """Brings every group back to the slices of its tokens (and on to HBM if the result is spilled)."""

    whole = together = False

    def __init__(self, em: Emitter, result: Tensor, limit: int, narrow: bool) -> None:
        self.em = em
        self.narrow = narrow
        self.result = result
        self.limit = limit
        self._areas: list[SSAValue] = []
        self._next = 0

    def area(self, matrix: int, group: Group, rows: int) -> tuple[SSAValue, int]:
        """See `Sink`: two buffers in turn, so that a group is brought home while the next one is computed."""
        machine = self.em.machine
        row = _row_bytes(self.limit * CHANNELS * self.result.dtype.bytes, machine.dm_banks * machine.dm_bank_bytes)
        if len(self._areas) < 2:
            self._areas.append(self.em.alloc(rows * row, "channels"))
        self._next += 1
        return self._areas[(self._next - 1) % len(self._areas)], row

    def done(self, matrix: int, group: Group, area: SSAValue, row: int) -> None:
        """See `Sink`."""
        rows_home(self.em, area, row, group, self.result)


def rows_home(em: Emitter, channels: SSAValue, row: int, group: Group, result: Tensor) -> None:
    """`[local row][slice][channel]` of every slice to rows on their own slices (and on to HBM if spilled)."""
    rows = result.rows
    assert rows is not None
    width, local = result.dtype.bytes, rows.local
    run = group.per_slice * width
    target, base, pitch = result.buffer, result.base + group.start * width, result.pitch
    spilled = result.space == Space.HBM
    if spilled:
        pitch = group.slices * run
        target, base = em.alloc(local * pitch, "rows"), 0
    loops = [
        (em.slices // group.ring, group.ring * DM_SLICE_STRIDE, group.ring * DM_SLICE_STRIDE),
        (group.slices, DM_SLICE_STRIDE, run),
        (group.ring, row, DM_SLICE_STRIDE),
        (local, group.ring * row, pitch),
    ]
    em.dma(dm(channels), dm(target, base), loops, run)
    if spilled:
        loops = [(em.slices, DM_SLICE_STRIDE, local * result.pitch), (local, pitch, result.pitch)]
        em.dma(dm(target), hbm(result.buffer, result.base + group.start * width), loops, group.slices * run)


def _row_bytes(nbytes: int, banks: int) -> int:
    """Bytes between rows of results; `banks`: bytes after which DM banks repeat.

    The ring writes 64 rows one after the other, which must not hit one bank 64 times (hardware.md 2.2).
    """
    return nbytes + FLIT_BYTES if nbytes % banks == 0 else nbytes


def channel_groups(
    rows: int,
    slices: int,
    limit: int,
    local: int,
    row: int,
    machine: Machine,
    whole: bool = False,
    narrow: bool = True,
) -> list[Group]:
    """Groups of at most `limit` passes that cover `rows` channels (a multiple of 64).

    local: tokens a slice, row: bytes of a channel's weights; they decide whether the channels that do not fill all
    slices go to smaller rings (less to multiply, more copies of the weights to transfer). whole: no smaller rings.
    narrow: a last pass may have fewer than 16 channels a slice.
    """
    groups: list[Group] = []
    start, width = 0, slices * CHANNELS

    def even(rest: int) -> bool:
        """Whether all slices can share `rest` channels equally in one group."""
        per_slice, odd = divmod(rest, slices)
        alone = per_slice % CHANNELS
        return not odd and per_slice <= limit * CHANNELS and (alone == 0 or (narrow and alone in NARROW))

    while rows - start >= width:
        rest = rows - start
        passes = -(-rest // width)
        if even(rest):
            groups.append(Group(start, rest // slices, slices, slices))
        elif passes <= limit and rest % (passes * CHANNELS) == 0:
            groups.append(Group(start, passes * CHANNELS, rest // (passes * CHANNELS), slices))
        else:
            groups.append(Group(start, min(limit, rest // width) * CHANNELS, slices, slices))
        start += groups[-1].slices * groups[-1].per_slice
    rest = rows - start
    if rest and whole:
        groups.append(
            Group(start, rest // slices, slices, slices)
            if even(rest)
            else Group(start, CHANNELS, rest // CHANNELS, slices)
        )
    elif rest:
        groups += _last_channels(start, rest // CHANNELS, slices, local, row, machine)
    return groups


def _last_channels(start: int, count: int, slices: int, local: int, row: int, machine: Machine) -> list[Group]:
    """Fewer blocks of 16 channels than slices: one large ring, or rings of powers of two that add up to `count`."""
    whole = [Group(start, CHANNELS, count, slices)]
    parts: list[Group] = []
    at = start
    ring = slices
    while count:
        ring //= 2
        if count >= ring:
            parts.append(Group(at, CHANNELS, ring, ring))
            at, count = at + ring * CHANNELS, count - ring

    def cycles(groups: Sequence[Group]) -> float:
        """Multiplications behind the transfer of the weights, or the transfer where that takes longer."""
        total = 0.0
        for g in groups:
            nbytes = g.slices * (slices // g.ring) * CHANNELS * row
            transfer = machine.dma_startup_cycles + nbytes / min(
                machine.dma_engine_bytes_per_cycle, machine.hbm_bytes_per_cycle / machine.pes_per_chip
            )
            total += max(local * (row / 64) * g.ring * 2, transfer) + machine.pass_issue_cycles
        return total

    return min(whole, parts, key=cycles)
