"""The way home of results that passes leave as `[token][channels]` in every slice: a transfer brings each token back to
its slice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from xdsl.ir import SSAValue

from backend_rngd.isa.descriptors import (
    DM_SLICE_STRIDE,
    FLIT_BYTES,
    Dtype,
    Space,
)
from backend_rngd.lowering.channel_groups import WEAVE, Group, channel_groups, group_cycles
from backend_rngd.lowering.contract_base import Matrix, Stack
from backend_rngd.lowering.emitter import Emitter, dm, hbm
from backend_rngd.lowering.mapping import CHANNELS, SHORT_ROWS
from backend_rngd.lowering.move import ring_broadcast, ring_packet
from backend_rngd.lowering.tensor import RowSpace, Tensor
from backend_rngd.machine import Machine


class RowsHome:
    """Brings every group back to the slices of its tokens (and on to HBM if the result is spilled)."""

    whole = sums = False

    def __init__(
        self,
        em: Emitter,
        result: Tensor,
        limit: int,
        narrow: bool,
        first: int = 0,
        block: RowSpace | None = None,
        returned: bool = False,
    ) -> None:
        """`block`: the tokens that are multiplied, local rows of the result from `first` on; all if it is None.
        returned: nobody reads rows of HBM without a token."""
        self.em = em
        self.narrow = narrow
        self.result = result
        self.limit = limit
        self._first, self._block, self._returned = first, block, returned
        clear_unused(em, result)
        self._areas: list[SSAValue] = []
        self._next = 0

    def area(self, stack: int, group: Group, number: int, rows: int) -> tuple[SSAValue, int, int]:
        """See `Sink`: two buffers in turn, so that a group is brought home while the next one is computed."""
        width = CHANNELS * self.result.dtype.bytes
        row = spread_bytes(self.limit * width, self.em.machine)
        if number == 0:
            if len(self._areas) < 2:
                self._areas.append(self.em.alloc(rows * row, "channels"))
            self._next += 1
        return self._areas[(self._next - 1) % len(self._areas)], row, number * width

    def done(self, stack: int, group: Group, number: int, area: SSAValue, row: int) -> None:
        """See `Sink`."""
        if number == group.passes - 1:
            rows_home(
                self.em, area, row, group, self.result,
                first=self._first, block=self._block, returned=self._returned,
            )  # fmt: skip


class StackHome:
    """Brings the results of stacked matrices home, side by side into rows of one tensor if that fits DM, else each to
    a tensor of its own."""

    limit = 1  # of passes, so that a slice holds channels of one matrix
    whole = narrow = sums = False

    def __init__(self, em: Emitter, stack: Stack, results: Sequence[Tensor]) -> None:
        self.em = em
        self.stack = stack
        self.results = results
        self._home = RowsHome(em, results[0], self.limit, narrow=False)

    def area(self, stack: int, group: Group, number: int, rows: int) -> tuple[SSAValue, int, int]:
        """See `Sink`."""
        return self._home.area(stack, group, number, rows)

    def done(self, stack: int, group: Group, number: int, area: SSAValue, row: int) -> None:
        """See `Sink`."""
        if len({r.buffer for r in self.results}) == 1:
            rows_home(self.em, area, row, group, self.results[0])
            return
        for part, first, slices, before in slices_of(self.stack, group):
            mine = replace(group, start=first, slices=slices)
            rows_home(self.em, area, row, mine, self.results[part], before)


def slices_of(stack: Stack, group: Group) -> list[tuple[int, int, int, int]]:
    """Slices of a group by matrix: (part, first channel of it, slices, slices of the group before them)."""
    cut = stack.cut(group.start, group.slices * group.per_slice)
    return [(part, first, n // group.per_slice, before // group.per_slice) for part, first, n, before in cut]


def can_weave(stack: Stack, group: Group, slices: int) -> bool:
    """Whether the matrices of a group that leaves slices free may alternate between the halves of a unit."""
    even = all(n % (2 * WEAVE) == before % (2 * WEAVE) == 0 for _, _, n, before in slices_of(stack, group))
    return even and group.slices < group.ring == slices


def rows_home(
    em: Emitter,
    channels: SSAValue,
    row: int,
    group: Group,
    result: Tensor,
    first_slice: int = 0,
    first: int = 0,
    block: RowSpace | None = None,
    returned: bool = False,
) -> None:
    """`[local row][slice][channel]` of every slice from `first_slice` on to rows on their own slices (and on to HBM if
    spilled). block, returned: see `RowsHome`."""
    rows = result.rows
    assert rows is not None
    width, local = result.dtype.bytes, (block or rows).local
    run = group.per_slice * width
    pitch = result.pitch
    target, base = result.buffer, result.base + first * pitch + group.start * width
    home, spilled = base, result.space == Space.HBM
    if spilled:
        pitch = group.slices * run
        target, base = em.alloc(local * pitch, "rows"), 0
    tokens, stored, together = group.ring, em.slices, 1
    if local <= SHORT_ROWS and group.ring == em.slices:
        tokens = stored = rows.used_slices if returned or not spilled else em.slices
        together = _neighbours(group, run, em.machine)
    if together > 1:
        channels, row = _side_by_side(em, channels, row, tokens * local, group.per_slice, result.dtype, together)
    begin, over_slices = group.steps(first_slice, group.slices, run, together)
    run *= together
    loops = [
        (em.slices // group.ring, group.ring * DM_SLICE_STRIDE, group.ring * DM_SLICE_STRIDE),
        *((n, there, here) for n, here, there in over_slices),
        (tokens, row, DM_SLICE_STRIDE),
        (local, group.ring * row, pitch),
    ]
    em.dma(dm(channels, begin), dm(target, base), loops, run)
    if spilled:
        loops = [(stored, DM_SLICE_STRIDE, rows.local * result.pitch), (local, pitch, result.pitch)]
        em.dma(dm(target), hbm(result.buffer, home), loops, pitch)


def _neighbours(group: Group, run: int, machine: Machine) -> int:
    """Slices whose `run` bytes of a token should travel together, so that fewer requests are needed."""
    fitting = [n for n in (1, 2, WEAVE) if group.slices % n == 0 and n * run <= machine.dma_request_bytes]
    return max(fitting, default=1)


def _side_by_side(
    em: Emitter, channels: SSAValue, row: int, rows: int, per_slice: int, dtype: Dtype, ring: int
) -> tuple[SSAValue, int]:
    """`[row][slice of the ring][channel]` in every slice of rings of `ring` slices, and the bytes of a row."""
    run = per_slice * dtype.bytes
    target = em.alloc(rows * ring * run, "neighbours")
    packet = ring_packet(per_slice, FLIT_BYTES // dtype.bytes)
    ring_broadcast(
        em, channels, [(rows, row), (per_slice, dtype.bytes)], dtype, packet, 0, ring, target, 0,
        [(rows, ring * run), (per_slice // packet, packet * dtype.bytes)], run, [(packet, dtype.bytes)],
        min(packet, FLIT_BYTES // dtype.bytes),
    )  # fmt: skip
    return target, ring * run


def clear_unused(em: Emitter, result: Tensor) -> None:
    """Zero what `rows_home` leaves out: slices without tokens take part in passes all the same."""
    rows = result.rows
    assert rows is not None
    if rows.local <= SHORT_ROWS and result.space == Space.DM and rows.used_slices < em.slices:
        em.memset(result.buffer, result.base, rows.local * result.pitch)


def spread_bytes(nbytes: int, machine: Machine) -> int:
    """Bytes between pieces of `nbytes` that a pass walks through.

    A pass must not hit one bank 64 times in a row (hardware.md 2.2).
    """
    return nbytes + FLIT_BYTES if nbytes % (machine.dm_banks * machine.dm_bank_bytes) == 0 else nbytes


def best_stack(matrices: Sequence[Matrix], slices: int, local: int, machine: Machine) -> tuple[int, ...]:
    """Which of the matrices should share their passes: none, all, or all but the largest, whatever takes least time."""
    row = matrices[0].pitch
    largest = max(range(len(matrices)), key=lambda i: matrices[i].rows)
    everything = tuple(range(len(matrices)))
    rest = tuple(i for i in everything if i != largest)

    def cycles(stack: tuple[int, ...]) -> float:
        rows = sum(matrices[i].rows for i in stack)
        groups = channel_groups(rows, slices, StackHome.limit, local, row, machine, narrow=False) if stack else []
        for i in everything:
            if i not in stack:
                groups += channel_groups(matrices[i].rows, slices, 8, local, row, machine)
        return group_cycles(groups, slices, local, row, machine)

    candidates = [(), everything, *([rest] if len(rest) > 1 else [])]
    return min(candidates, key=cycles)
