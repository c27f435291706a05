"""What lies in memory while a program runs: live bytes of data memory and of HBM's working area, by who wrote them.

A value lives from the start of the write that makes it to the end of its last read before the bytes are written again;
what is read without having been written was there before the program. Bytes are followed in pieces that the program
never touches in part. In data memory an instruction counts for every slice, as in `isa.footprint`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from backend_rngd.isa.descriptors import Call, Dma, Endpoint, Space
from backend_rngd.isa.footprint import footprint, intervals
from runtime_sim.sites import Sites
from runtime_sim.timing_result import TimingResult
from runtime_sim.traffic import Value, registers_of_call

MOST_PIECES = 4096  # of a memory; finer ones are joined, which can only make values larger
Ranges = Sequence[tuple[int, int]]
BEFORE = "(before the program)"


@dataclass(frozen=True)
class Timeline:
    """Live bytes of a memory. writer (number in `names`), begin, end, nbytes: one entry a value of a piece."""

    memory: str
    capacity: int
    cycles: float
    names: tuple[str, ...]
    writer: NDArray[np.int64]
    begin: NDArray[np.float64]
    end: NDArray[np.float64]
    nbytes: NDArray[np.int64]

    @cached_property
    def steps(self) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Times at which the number of live bytes changes, and what it is from then on."""
        moments = np.concatenate([self.begin, self.end])
        change = np.concatenate([self.nbytes, -self.nbytes])
        times, place = np.unique(moments, return_inverse=True)
        total = np.zeros(len(times), np.int64)
        np.add.at(total, place, change)
        return times, np.cumsum(total)

    @cached_property
    def peak(self) -> tuple[float, int]:
        """When most bytes are live, and how many."""
        times, live = self.steps
        if not len(times):
            return 0.0, 0
        most = int(live.argmax())
        return float(times[most]), int(live[most])

    def at(self, moments: NDArray[np.float64]) -> NDArray[np.int64]:
        """[names, moments]: live bytes at each moment by who wrote them."""
        out = np.zeros((len(self.names), len(moments)), np.int64)
        for number in range(len(self.names)):
            mine = self.writer == number
            for edge, sign in ((self.begin, 1), (self.end, -1)):
                order = np.argsort(edge[mine], kind="stable")
                total = np.concatenate([[0], np.cumsum(self.nbytes[mine][order])])
                out[number] += sign * total[np.searchsorted(edge[mine][order], moments, side="right")]
        return out

    def sampled(self, bins: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """In each of `bins` equal parts of the time, the moment with most live bytes, and [names, bins] those."""
        width = (self.cycles or 1.0) / bins
        edges: NDArray[np.float64] = np.arange(bins, dtype=np.float64) * width
        times, live = self.steps
        moments = edges.copy()
        if len(times):
            at_edge = np.where(times[0] <= edges, live[np.maximum(np.searchsorted(times, edges, "right") - 1, 0)], 0)
            best = at_edge.astype(np.int64)
            where = np.minimum((times / width).astype(np.int64), bins - 1)
            for place, moment, value in zip(where.tolist(), times.tolist(), live.tolist(), strict=True):
                if value > best[place]:
                    best[place], moments[place] = value, moment
        return moments, self.at(moments)


def data_memory(result: TimingResult, sites: Sites, unit: int) -> Timeline:
    """The data memory of a class of units."""
    touched: list[tuple[int, int, int, bool]] = []  # site, low, high, write
    mine = np.nonzero(result.flat.unit == unit)[0]
    used: list[int] = np.unique(sites.number[mine]).tolist()
    for site in used:
        what = sites.instructions[site]
        if isinstance(what, Call):
            continue
        for access in footprint(what, result.launch):
            if access.space == "dm":
                touched += [(site, low, high, access.write) for low, high in access.intervals]
    slices = result.flat.streams[unit].slices
    rows = np.array(touched, np.int64).reshape(-1, 4)
    # One entry for every executed instruction and range.
    order = np.argsort(sites.number[mine], kind="stable")
    numbers = sites.number[mine][order]
    first, last = np.searchsorted(numbers, rows[:, 0], "left"), np.searchsorted(numbers, rows[:, 0], "right")
    times = last - first
    executed = mine[order][_ranges(first, times)]
    spread = np.repeat(np.arange(len(rows)), times)
    capacity = result.machine.dm_slice_bytes * slices
    return _timeline(
        f"DM of {result.unit_name(unit)}", capacity, slices, result, sites, executed,
        rows[spread, 1], rows[spread, 2], rows[spread, 3].astype(np.bool_),
    )  # fmt: skip


def working_area(result: TimingResult, sites: Sites, unit: int, area: tuple[int, int], outputs: Ranges) -> Timeline:
    """Addresses [low, high) of a unit's HBM: inputs, outputs and what does not fit the data memory.

    outputs: (address, bytes) that the host reads at the end.
    """
    flat = result.flat
    stream = flat.streams[unit]
    mine = np.nonzero((flat.unit == unit) & (flat.context == 2))[0]
    rank = result.topology.places[result.classes.members[unit][0]].rank
    registers: dict[int, dict[int, Value]] = {}
    executed: list[int] = []
    spans: list[tuple[int, int, bool]] = []
    known: dict[tuple[int, int, int], list[tuple[int, int, bool]]] = {}
    for row, call in zip(mine.tolist(), flat.call[mine].tolist(), strict=True):
        site = int(sites.number[row])
        what = sites.instructions[site]
        if not isinstance(what, Dma) or Space.HBM not in (what.source.space, what.destination.space):
            continue
        inside = registers_of_call(stream, flat.calls, call, registers)
        first, second = (
            inside.get(s.register, Value(s.register, 0)).on(result.launch, rank)
            for s in (what.source, what.destination)
        )
        key = (site, first, second)
        if key not in known:
            known[key] = _hbm_spans(what, (first, second), area)
        spans += known[key]
        executed += [row] * len(known[key])
    table = np.array(spans, np.int64).reshape(-1, 3)
    return _timeline(
        f"HBM working area of {result.unit_name(unit)}", area[1] - area[0], 1, result, sites,
        np.array(executed, np.int64), table[:, 0], table[:, 1], table[:, 2].astype(np.bool_), outputs,
    )  # fmt: skip


def _hbm_spans(what: Dma, bases: Sequence[int], area: tuple[int, int]) -> list[tuple[int, int, bool]]:
    """The parts of the area that a transfer reads or writes."""
    out: list[tuple[int, int, bool]] = []
    sides: tuple[Endpoint, Endpoint] = (what.source, what.destination)
    for number, (side, base) in enumerate(zip(sides, bases, strict=True)):
        write = number == 1
        indirect = what.index is not None and what.index.scatter == write
        if side.space is not Space.HBM or indirect:
            continue
        loops = [(loop[0], loop[1 + number]) for loop in what.loops]
        for low, high in intervals(side.base + base, loops, what.packet):
            low, high = max(low, area[0]), min(high, area[1])
            if low < high:
                out.append((low, high, write))
    return out


def _ranges(first: NDArray[np.int64], count: NDArray[np.int64]) -> NDArray[np.int64]:
    """first[0], first[0] + 1, ... (count[0] of them), first[1], ..."""
    ends = np.cumsum(count)
    return np.arange(int(ends[-1]) if len(ends) else 0) - np.repeat(ends - count, count) + np.repeat(first, count)


def _timeline(
    memory: str,
    capacity: int,
    copies: int,
    result: TimingResult,
    sites: Sites,
    executed: NDArray[np.int64],
    low: NDArray[np.int64],
    high: NDArray[np.int64],
    write: NDArray[np.bool_],
    kept: Ranges = (),
) -> Timeline:
    """Values from accesses: executed instruction, byte range, whether it writes. kept: (address, bytes) that are read
    at the end."""
    begin, end = result.start[executed], result.finish[executed]
    if kept:
        extra = np.array([(a, a + n) for a, n in kept], np.int64).reshape(-1, 2)
        low, high = np.concatenate([low, extra[:, 0]]), np.concatenate([high, extra[:, 1]])
        write = np.concatenate([write, np.zeros(len(extra), np.bool_)])
        last = np.full(len(extra), result.cycles)
        begin, end = np.concatenate([begin, last]), np.concatenate([end, last])
        executed = np.concatenate([executed, np.full(len(extra), -1)])
    edges = np.unique(np.concatenate([low, high]))
    if len(edges) > MOST_PIECES:
        edges = np.unique(edges[np.linspace(0, len(edges) - 1, MOST_PIECES).astype(np.int64)])
    first = np.searchsorted(edges, low, "right") - 1
    count = np.searchsorted(edges, high, "left") - first
    piece = _ranges(first, count)
    of = np.repeat(np.arange(len(low)), count)
    # In each piece by time; an instruction that reads and writes a piece reads first.
    order = np.lexsort((write[of], begin[of], piece))
    piece, of = piece[order], of[order]
    if not len(piece):
        empty = np.zeros(0, np.int64)
        return Timeline(memory, capacity, result.cycles, (), empty, np.zeros(0), np.zeros(0), empty)
    fresh = np.concatenate([[True], piece[1:] != piece[:-1]])
    value = np.cumsum(fresh | write[of]) - 1
    head = np.nonzero(np.concatenate([[True], value[1:] != value[:-1]]))[0]
    made = write[of[head]]
    since = np.where(made, begin[of[head]], 0.0)
    until = np.maximum.reduceat(end[of], head)
    follower = np.concatenate([piece[head[1:]] == piece[head[:-1]], [False]])
    until = np.where(follower, np.minimum(until, np.concatenate([since[1:], [0.0]])), until)
    lengths = (edges[1:] - edges[:-1])[piece[head]] * copies
    live = until > since
    operations, number = sites.operations
    writers = np.where(made, number[executed[of[head]]], len(operations))
    used, writer = np.unique(writers[live], return_inverse=True)
    names = tuple([*operations, BEFORE][int(n)] for n in used)
    return Timeline(memory, capacity, result.cycles, names, writer, since[live], until[live], lengths[live])
