"""Contraction with many tokens: weights stay in TRF, 16 output channels a slice (8 lanes x TimeBroadcast 2).

Every slice's tokens reach all slices through the switch ring. 64 ring positions x 2 are the 128 accumulator slots of
the time reducer, so K accumulates inside the engine. A pass yields `[token][16 channels]` in each slice; a transfer
brings the tokens back to their slices. Several passes write channels that are neighbours, so that this transfer moves
longer pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
from backend_rngd.lowering.contract_base import ContractionMapping, Matrix, k_multiple, needs_own_pass, split_k
from backend_rngd.lowering.emitter import dm, hbm
from backend_rngd.lowering.packed import clear, expand, load, staging
from backend_rngd.lowering.scales import ScaleOps
from backend_rngd.lowering.tensor import Dim, Tensor, feature_dims
from backend_rngd.machine import Machine

CHANNELS = 16  # 8 lanes x TimeBroadcast 2: each 64 B packet serves two cycles (hardware.md 2.8 supply limit)
TRF_K_BYTES = 2048  # half a TRF: 2 channels x 1024 bf16 a lane, the other half loads meanwhile
PARTIAL_BYTES = 128 * 1024  # partial sums of a split K a slice, when the tokens have to be brought in again
GROUP_BYTES = 40 * 1024  # results of a group of passes a slice; two groups are in flight


@dataclass(frozen=True)
class Group:
    """Output channels [start, start + slices * passes * 16); slice j of a ring holds `passes * 16` of them, 16 a pass.

    ring: slices that exchange their tokens. Rings smaller than the unit hold copies of the same weights, and each works
    on the tokens of its own slices: a few channels keep all slices busy.
    """

    start: int
    passes: int
    slices: int
    ring: int

    @property
    def per_slice(self) -> int:
        """Channels of a slice."""
        return self.passes * CHANNELS


@dataclass(frozen=True)
class _Area:
    """Where a pass leaves its results: row r of `rows` at byte base + r * row, 16 channels."""

    buffer: SSAValue
    rows: int
    row: int
    dtype: Dtype
    base: int = 0

    @property
    def commit(self) -> Commit:
        """Commit of all rows in order."""
        width = self.dtype.bytes
        return Commit(self.base, ((self.rows, self.row), (CHANNELS, width)), self.dtype, 8)


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
        em, rows = self.em, x.rows
        assert rows is not None
        element = w.dtype.bytes
        packet = k_multiple(w.k, element)
        packed = w.packed
        chunks = split_k(w.k, TRF_K_BYTES // element, packet if packed is None else packed.multiple(packet))
        widest = max(k for _, k in chunks)
        count = rows.physical
        limit = max(1, min(8, GROUP_BYTES // (count * CHANNELS * dtype.bytes)))
        groups = channel_groups(w.rows, em.slices, limit, rows.local, w.pitch, em.machine)
        result = self._output(dims, dtype, x, w, output) if output is not None else self._result(dims, dtype, x, w.rows)
        split = len(chunks) > 1
        own_epilogue = split and needs_own_pass(vector)
        resident = x.space == Space.DM
        passes = [(g, t) for g in range(len(groups)) for t in range(groups[g].passes)]
        # Tokens in HBM are brought in one K chunk at a time, for as many passes as partial sums fit.
        batch = 1 if resident else max(1, PARTIAL_BYTES // (count * CHANNELS * 4))
        jobs = [
            (g, t, c)
            for first in range(0, len(passes), batch)
            for c in range(len(chunks))
            for g, t in passes[first : first + batch]
        ]
        buffers = [em.alloc(CHANNELS * widest * element, "weights") for _ in range(2)]
        stages = [] if packed is None else [staging(em, packed, CHANNELS, widest) for _ in buffers]
        row = _row_bytes(max(g.per_slice for g in groups) * dtype.bytes, em.machine.dm_banks * em.machine.dm_bank_bytes)
        finals = [em.alloc(count * row, "channels") for _ in range(min(2, len(groups)))]
        partial = CHANNELS * 4
        acc = [em.alloc(count * partial, "partial") for _ in range(batch)] if split else []
        part = em.alloc(count * partial, "partial") if split else None
        if any(g.slices < g.ring for g in groups):  # slices without channels take part with zero weights
            for buffer in buffers if packed is None else ():
                em.memset(buffer, 0, CHANNELS * widest * element)
            for place in stages:
                assert packed is not None
                clear(em, place, packed, CHANNELS, widest)

        def fetch_weights(i: int) -> None:
            if packed is None:
                self._load_weights(w, groups, jobs[i], chunks, buffers[i % 2])
                return
            group, ring = groups[jobs[i][0]], groups[jobs[i][0]].ring
            steps = [(em.slices // ring, 0, ring * DM_SLICE_STRIDE), (group.slices, group.per_slice, DM_SLICE_STRIDE)]
            start = group.start + jobs[i][1] * CHANNELS
            load(em, packed, stages[i % 2], start, [*steps, (CHANNELS, 1, 0)], *chunks[jobs[i][2]])

        fetch_weights(0)
        tokens, loaded = x, (-1, -1)
        scales = ScaleOps(em, self.scales)
        for i, (g, t, c) in enumerate(jobs):
            if i + 1 < len(jobs):
                fetch_weights(i + 1)
            (k0, k), last = chunks[c], c == len(chunks) - 1
            number = passes.index((g, t))
            if not resident and loaded != (number // batch, c):
                tokens, loaded = self._tokens_chunk(x, k0, k), (number // batch, c)
            if packed is not None:
                expand(em, packed, stages[i % 2], CHANNELS, k0, k, buffers[i % 2], em.slices)
            run = k * element
            base = self._next_half(em.machine.trf_bytes_per_slice // 8, 2 * run)
            channels = em.fetch(0, [(8, run), (2, 8 * run), (k, element)], w.dtype, FLIT_BYTES // element)
            em.load_trf(channels, buffers[i % 2], 8, base)
            ring = groups[g].ring
            seen = rows.local * ring  # tokens that a slice meets
            final = _Area(finals[g % len(finals)], seen, row, dtype, t * CHANNELS * dtype.bytes)
            after: tuple[VectorOp, ...] = ()
            if last:
                if t == 0:
                    scales.broadcast_tokens(ring)
                    scales.load_channels(groups[g].start, groups[g].per_slice, groups[g].slices, ring)
                after = (*scales.many(seen, CHANNELS, t * CHANNELS), *vector)
            if not split:
                self._pass(tokens, k0 if resident else 0, k, packet, base, final, ring, (*w.raised, *after))
            else:
                assert part is not None
                mine = _Area(acc[number % batch], seen, partial, Dtype.F32)
                here = mine if c == 0 else _Area(part, seen, partial, Dtype.F32)
                self._pass(tokens, k0 if resident else 0, k, packet, base, here, ring, w.raised)
                if c > 0:
                    goal = final if last and not own_epilogue else mine
                    ops = after if last and not own_epilogue else ()
                    self._add(mine.buffer, part, seen * CHANNELS, goal.commit, goal.buffer, ops)
                if last and own_epilogue:
                    self._apply(mine.buffer, seen * CHANNELS, final.commit, final.buffer, after)
            if last and t == groups[g].passes - 1:
                self._rows_home(final.buffer, row, groups[g], result)
        return result

    def _output(self, dims: Sequence[Dim], dtype: Dtype, x: Tensor, w: Matrix, output: SSAValue) -> Tensor:
        """The result in an HBM buffer of the program, rows in physical order."""
        index = [i for i, d in enumerate(dims) if d.kind == "feature"]
        strides, pitch = feature_dims([dims[i].size for i in index], dtype.bytes)
        placed = list(dims)
        for i, stride in zip(index, strides, strict=True):
            placed[i] = Dim("feature", dims[i].size, stride)
        return Tensor(output, Space.HBM, dtype, tuple(placed), x.rows, 0, max(pitch, w.rows * dtype.bytes))

    def _load_weights(
        self,
        w: Matrix,
        groups: Sequence[Group],
        job: tuple[int, int, int],
        chunks: Sequence[tuple[int, int]],
        buffer: SSAValue,
    ) -> None:
        """16 rows of the weight to each slice of the group, one K chunk."""
        group, (k0, k), element = groups[job[0]], chunks[job[2]], w.dtype.bytes
        self.em.dma(
            hbm(w.buffer, (group.start + job[1] * CHANNELS) * w.pitch + k0 * element),
            dm(buffer),
            [
                (self.em.slices // group.ring, 0, group.ring * DM_SLICE_STRIDE),
                (group.slices, group.per_slice * w.pitch, DM_SLICE_STRIDE),
                (CHANNELS, w.pitch, k * element),
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
        self, x: Tensor, k0: int, k: int, packet: int, base: int, target: _Area, ring: int, vector: Sequence[VectorOp]
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

    def _rows_home(self, channels: SSAValue, row: int, group: Group, result: Tensor) -> None:
        """`[local row][slice][channel]` of every slice to rows on their own slices (and on to HBM if spilled)."""
        em, rows = self.em, result.rows
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


def channel_groups(rows: int, slices: int, limit: int, local: int, row: int, machine: Machine) -> list[Group]:
    """Groups of at most `limit` passes that cover `rows` channels (a multiple of 64).

    local: tokens a slice, row: bytes of a channel's weights; they decide whether the channels that do not fill all
    slices go to smaller rings (less to multiply, more copies of the weights to transfer).
    """
    groups: list[Group] = []
    start, width = 0, slices * CHANNELS
    while rows - start >= width:
        rest = rows - start
        passes = -(-rest // width)
        if passes > limit or rest % (passes * CHANNELS):
            passes = max(1, min(limit, rest // width))
            groups.append(Group(start, passes, min(slices, rest // (passes * CHANNELS)), slices))
        else:
            groups.append(Group(start, passes, rest // (passes * CHANNELS), slices))
        start += groups[-1].slices * groups[-1].per_slice
    if start < rows:
        groups += _last_channels(start, (rows - start) // CHANNELS, slices, local, row, machine)
    return groups


def _last_channels(start: int, count: int, slices: int, local: int, row: int, machine: Machine) -> list[Group]:
    """Fewer blocks of 16 channels than slices: one large ring, or rings of powers of two that add up to `count`."""
    whole = [Group(start, 1, count, slices)]
    parts: list[Group] = []
    at = start
    ring = slices
    while count:
        ring //= 2
        if count >= ring:
            parts.append(Group(at, 1, ring, ring))
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
