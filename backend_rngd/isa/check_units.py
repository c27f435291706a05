"""Whether units keep out of each other's way: every access of one unit to bytes of another is ordered.

The units of a group run the same stream (groups of other pipeline stages another one), so one abstract run of all units
shows the order of everything. A unit's *clock* says
how many instructions of the DMA context of every unit have certainly been completed; a notify carries it, a wait takes
it over. An access is safe if all conflicting accesses of other units to the same bytes are covered by the clock. Which
notifies a wait answers is decided by their order; afterwards it is proved that no unit can run ahead so far that a wait
is satisfied by others. Values do not matter and the order in which units advance does not either: what is found in one
run holds for all.

Calls repeat (layers): a call that leaves everything as the same call before did is not run again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from backend_rngd.isa.cells import Grid
from backend_rngd.isa.descriptors import Notify, Stream, Wait
from backend_rngd.isa.expand import Chunk, Expansion, Item, Registers
from backend_rngd.isa.footprint import Access
from backend_rngd.isa.unit_state import Clock, Memory, Raise, Semaphore, State, Unit

Reporter = Callable[[int, int, str, str], None]
"""Reports (routine, index, rule, message)."""


@dataclass
class _Track:
    """The units of one pipeline stage on their way through their chunks."""

    expansion: Expansion
    chunks: list[Chunk]
    units: range
    origin: int = 0  # position of the next chunk
    before: tuple[Chunk, State] | None = None  # the last chunk and the state behind it
    settled: Chunk | None = None  # a chunk that changes nothing any more


class _Run:
    """The abstract run of all units."""

    def __init__(self, expansions: Sequence[Expansion], grid: Grid, report: Reporter, runs: int) -> None:
        self.grid = grid
        self.report = report
        self.group = expansions[0].units
        n = self.group * len(expansions)
        self.tracks = [
            _Track(e, runs * e.chunks, range(i * self.group, (i + 1) * self.group)) for i, e in enumerate(expansions)
        ]
        self.units = [Unit(i % self.group, np.zeros(n, np.int64), [(0, np.zeros(n, np.int64))]) for i in range(n)]
        self.reads = Memory(n, grid.count)
        self.writes = Memory(n, grid.count)
        self.semaphores: dict[tuple[int, int], Semaphore] = {}  # (unit, number)
        self.numbers: dict[int, int] = {}  # by identity: the expansions keep their items
        self.known: list[tuple[Item, Expansion]] = []
        self.reported: set[tuple[str, int, int, int, int]] = set()

    # Control ---------------------------------------------------------------------------------------------------------
    def all(self) -> None:
        """Run every chunk of every stage, then look at semaphores."""
        while any([self._drive(track) for track in self.tracks]):
            pass
        for number, unit in enumerate(self.units):
            if unit.next < len(unit.todo):
                self._deadlock(number, unit.todo[unit.next][1])
        for (number, semaphore), found in self.semaphores.items():
            self._balance(number, semaphore, found)
            self._answers(number, semaphore, found)

    def _drive(self, track: _Track) -> bool:
        """Run a stage as far as it goes while the others stand still, without repetitions that change nothing; whether
        it got any further."""
        track.before = track.settled = None
        further = self._units(track)
        while track.chunks:
            if any(self.units[i].todo for i in track.units) and all(self.units[i].todo for i in track.units):
                break  # all of them wait
            chunk = track.chunks.pop(0)
            further = True
            if track.settled is not None and _same(chunk, track.settled):
                continue
            track.settled = None
            for i in track.units:
                self.units[i].todo += [(track.origin, item) for item in chunk.items]
            self._units(track)
            track.origin += chunk.transfers
            if any(self.units[i].todo for i in track.units):
                track.before = None
                continue
            state = self._state(track)
            if track.before is not None and _same(chunk, track.before[0]) and state.repeats(track.before[1]):
                track.settled = chunk
            track.before = (chunk, state)
        return further

    def _units(self, track: _Track) -> bool:
        """Run the units of a stage to waits that are not satisfied, or to the end of what they have; whether any got
        further."""
        further = progress = False
        while True:
            progress = any([self._advance(i, track.expansion) for i in track.units])
            if not progress:
                break
            further = True
        for i in track.units:
            unit = self.units[i]
            if unit.next == len(unit.todo):
                unit.todo, unit.next = [], 0
                unit.history = [(0, unit.clock.copy())]
        return further

    def _advance(self, number: int, expansion: Expansion) -> bool:
        """Run one unit to its next wait that is not satisfied."""
        unit = self.units[number]
        outside = expansion.outside
        start = unit.next
        while unit.next < len(unit.todo):
            origin, item = unit.todo[unit.next]
            if (
                isinstance(item.sync, Wait)
                and item.sync.semaphore not in outside
                and not self._wait(number, item.sync, origin + item.low, item)
            ):
                break
            if isinstance(item.sync, Notify):
                self._notify(number, item.sync, origin + item.low, item)
            for visit in item.visits[unit.rank] if item.visits else ():
                self._visit(number, origin, item, np.array(visit.units), np.array(visit.cells), visit.write)
            unit.next += 1
        return unit.next > start

    # Semaphores ------------------------------------------------------------------------------------------------------
    def _semaphore(self, unit: int, number: int) -> Semaphore:
        return self.semaphores.setdefault((unit, number), Semaphore())

    def _notify(self, number: int, desc: Notify, position: int, item: Item) -> None:
        clock = self.units[number].clock.copy()
        clock[number] = position + 1
        for target in item.targets[self.units[number].rank]:
            found = self._semaphore(target, desc.semaphore)
            message = Raise(number, position, clock, item)
            found.pending.append(message)
            found.sent.append(message)

    def _wait(self, number: int, desc: Wait, position: int, item: Item) -> bool:
        found = self._semaphore(number, desc.semaphore)
        if len(found.pending) < desc.count:
            return False
        found.pending.sort(key=lambda message: message.position)
        answered, found.pending = found.pending[: desc.count], found.pending[desc.count :]
        unit = self.units[number]
        clock = unit.clock.copy()
        for message in answered:
            np.maximum(clock, message.clock, out=clock)
        unit.clock = clock
        unit.history.append((position + 1, clock))
        found.waits.append((position, answered, item))
        return True

    def _deadlock(self, number: int, item: Item) -> None:
        assert isinstance(item.sync, Wait)
        have = len(self._semaphore(number, item.sync.semaphore).pending)
        message = (
            f"{self._unit(number)} waits for {item.sync.count} notifications of semaphore {item.sync.semaphore} and"
            f" gets {have} before all units wait: notify it earlier or lower the count"
        )
        self._once("deadlock", item, item, message)

    def _balance(self, number: int, semaphore: int, found: Semaphore) -> None:
        if found.pending:
            item = found.pending[0].item
            message = (
                f"{len(found.pending)} notifications of semaphore {semaphore} of {self._unit(number)} are never waited"
                " for: add a wait or correct its count"
            )
            self._once("semaphore-balance", item, item, message)

    def _answers(self, number: int, semaphore: int, found: Semaphore) -> None:
        """Whether every wait can only be satisfied by the notifies it is meant for: without one of them, all that may
        have been sent before the wait is complete must be fewer than have been taken."""
        if not found.sent:
            return
        clocks = np.array([m.clock for m in found.sent])
        taken = 0
        for position, answered, item in found.waits:
            taken += len(answered)
            open_ = clocks[:, number] <= position  # sent without knowing this wait
            for message in answered:
                behind = clocks[:, message.unit] > message.position  # sent after the message was (itself included)
                if int((open_ & ~behind).sum()) >= taken:
                    text = (
                        f"the wait of {self._unit(number)} on semaphore {semaphore} can be over before"
                        f" {self._unit(message.unit)} has notified, because others may have notified twice: use another"
                        " semaphore, or let them wait first"
                    )
                    self._once("wait-order", item, message.item, text)

    # Memory ----------------------------------------------------------------------------------------------------------
    def _visit(
        self, number: int, origin: int, item: Item, units: NDArray[np.int64], cells: NDArray[np.int64], write: bool
    ) -> None:
        """Check one access against the last ones of all units, and note it."""
        history = self.units[number].history
        at = np.ix_(units, cells)
        seen = next(clock for since, clock in reversed(history) if since <= origin + item.low).copy()
        seen[number] = np.iinfo(np.int64).max  # own accesses: see the waits inside a unit
        self._compare(number, item, self.writes, at, seen, write)
        if write:
            self._compare(number, item, self.reads, at, seen, write)
        memory = self.writes if write else self.reads
        end = origin + item.high + 1
        memory.ends[units[:, None], cells[None, :], number] = end
        memory.items[units[:, None], cells[None, :], number] = self._number(item, number)
        others = units[units != number]
        if not write and len(others):
            self._written(number, item, others, cells)

    def _compare(
        self, number: int, item: Item, memory: Memory, at: tuple[NDArray[np.int64], ...], seen: Clock, write: bool
    ) -> None:
        late = memory.ends[at] > seen
        if not late.any():
            return
        for i, j, other in np.argwhere(late):
            owner, cell = int(at[0].ravel()[i]), int(at[1].ravel()[j])
            theirs, expansion = self.known[int(memory.items[owner, cell, other])]
            mine = "writes" if write else "reads"
            verb = "writes" if memory is self.writes else "reads"
            message = (
                f"{self._unit(number)} {mine} {self.grid.name(cell)} of {self._unit(owner)}, which"
                f" {self._unit(int(other))} {verb} in {_where(theirs, expansion.stream)}: put a notify of"
                f" {self._unit(int(other))} behind that and a wait of {self._unit(number)} before this, and name the"
                " buffer in both"
            )
            self._once("unit-race", item, theirs, message)

    def _written(self, number: int, item: Item, others: NDArray[np.int64], cells: NDArray[np.int64]) -> None:
        """DM of other units is read only after somebody wrote it."""
        dm = cells[cells < self.grid.dm_cells]
        empty = self.writes.ends[others[:, None], dm[None, :], :].max(axis=2, initial=0) == 0
        if empty.any():
            i, j = np.argwhere(empty)[0]
            message = (
                f"{self._unit(number)} reads {self.grid.name(int(dm[j]))} of {self._unit(int(others[i]))}, which no"
                " unit has written: correct the address, or write them first"
            )
            self._once("unit-race", item, item, message)

    # Reports ---------------------------------------------------------------------------------------------------------
    def _number(self, item: Item, number: int) -> int:
        found = self.numbers.get(id(item))
        if found is None:
            found = self.numbers[id(item)] = len(self.known)
            self.known.append((item, self.tracks[number // self.group].expansion))
        return found

    def _unit(self, number: int) -> str:
        stage, rank = divmod(number, self.group)
        return f"unit {rank}" + (f" of stage {stage}" if len(self.tracks) > 1 else "")

    def _once(self, rule: str, item: Item, other: Item, message: str) -> None:
        key = (rule, item.routine, item.index, other.routine, other.index)
        if key not in self.reported:
            self.reported.add(key)
            self.report(item.routine, item.index, rule, message)

    def _state(self, track: _Track) -> State:
        clocks = np.array([unit.clock for unit in self.units])
        pending = {
            key: [(m.unit, np.append(m.clock, m.position)) for m in found.pending]
            for key, found in self.semaphores.items()
            if found.pending
        }
        return State(track.origin, clocks, self.reads.ends.copy(), self.writes.ends.copy(), pending)


def _same(a: Chunk, b: Chunk) -> bool:
    return a.transfers == b.transfers and a.items == b.items


def _where(item: Item, stream: Stream) -> str:
    routine = stream.routines[item.routine]
    instruction = routine.instructions[item.index]
    location = stream.locations[instruction.location]
    return f"{type(instruction.what).__name__.lower()} {routine.name}[{item.index}] {location}".rstrip()


def check_units(
    stream: Stream,
    units: int,
    registers: Registers,
    footprints: Sequence[Sequence[Sequence[Access]]],
    report: Reporter,
    runs: int = 1,
) -> None:
    """Report races, deadlocks and semaphores that do not add up in a stream that `units` units run.

    registers: values at the entry by unit, of every register that is read. Descriptors must be legal and waits inside
    the unit correct. What units of other pipeline stages do is not looked at. runs: how often the program runs without
    the host waiting for all units in between: 2 shows whatever more can show.
    """
    check_stages([stream], units, registers, [footprints], report, runs)


def check_stages(
    streams: Sequence[Stream],
    units: int,
    registers: Registers,
    footprints: Sequence[Sequence[Sequence[Sequence[Access]]]],
    report: Reporter,
    runs: int = 1,
) -> None:
    """`check_units` for all pipeline stages together: streams and footprints by stage, groups of `units` units."""
    stages = len(streams)
    expansions = [
        Expansion(stream, units, registers, footprint, stage, stages)
        for stage, (stream, footprint) in enumerate(zip(streams, footprints, strict=True))
    ]
    grid = Grid(piece for expansion in expansions for piece in expansion.pieces)
    for expansion in expansions:
        expansion.expand(grid)
        for routine, index in sorted(expansion.missing) if stages > 1 else ():
            report(routine, index, "peer", f"stage {expansion.stage} of {stages} has no neighbour there")
    _Run(expansions, grid, report, runs).all()
