"""Whether the units of a group keep out of each other's way: every access of one unit to bytes of another is ordered.

All units run the same stream, so one abstract run of all of them shows the order of everything. A unit's *clock* says
how many instructions of the DMA context of every unit have certainly been completed; a notify carries it, a wait takes
it over. An access is safe if all conflicting accesses of other units to the same bytes are covered by the clock. Which
notifies a wait answers is decided by their order; afterwards it is proved that no unit can run ahead so far that a wait
is satisfied by others. Values do not matter and the order in which units advance does not either: what is found in one
run holds for all.

Calls repeat (layers): a call that leaves everything as the same call before did is not run again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from backend_rngd.isa.descriptors import Notify, Stream, Wait
from backend_rngd.isa.expand import Chunk, Expansion, Item, Registers
from backend_rngd.isa.footprint import Access

Clock = NDArray[np.int64]
Reporter = Callable[[int, int, str, str], None]
"""Reports (routine, index, rule, message)."""


@dataclass(frozen=True)
class _Raise:
    """A notification on its way to one unit: who sent it, when, and what that unit knew to be complete."""

    unit: int
    position: int  # of the notify in the sender's DMA context
    clock: Clock
    item: Item


@dataclass
class _Semaphore:
    """One semaphore of one unit."""

    pending: list[_Raise] = field(default_factory=list[_Raise])
    sent: list[_Raise] = field(default_factory=list[_Raise])
    waits: list[tuple[int, list[_Raise], Item]] = field(default_factory=list[tuple[int, list[_Raise], Item]])


@dataclass
class _Unit:
    """How far a unit is."""

    clock: Clock
    history: list[tuple[int, Clock]]  # (instructions of the DMA context complete, clock from then on)
    todo: list[tuple[int, Item]] = field(default_factory=list[tuple[int, Item]])  # (position of its chunk, item)
    next: int = 0


class _Memory:
    """The last access of every unit to every cell of every unit's memory: its end as a clock, and the item."""

    def __init__(self, units: int, cells: int) -> None:
        self.ends = np.zeros((units, cells, units), np.int64)
        self.items = np.zeros((units, cells, units), np.int32)


class _Run:
    """The abstract run of all units."""

    def __init__(self, expansion: Expansion, report: Reporter) -> None:
        n = expansion.units
        self.expansion = expansion
        self.report = report
        self.units = [_Unit(np.zeros(n, np.int64), [(0, np.zeros(n, np.int64))]) for _ in range(n)]
        self.reads = _Memory(n, expansion.grid.count)
        self.writes = _Memory(n, expansion.grid.count)
        self.semaphores: dict[tuple[int, int], _Semaphore] = {}  # (unit, number)
        self.outside = expansion.outside
        self.numbers: dict[int, int] = {}  # by identity: the expansion keeps its items
        self.known: list[Item] = []
        self.reported: set[tuple[str, int, int, int, int]] = set()
        self.origin = 0

    # Control ---------------------------------------------------------------------------------------------------------
    def all(self, runs: int) -> None:
        """Run every chunk `runs` times, skip repetitions that change nothing, then look at semaphores."""
        before: tuple[Chunk, _State] | None = None
        settled: Chunk | None = None
        for chunk in runs * self.expansion.chunks:
            if settled is not None and chunk.items == settled.items and chunk.transfers == settled.transfers:
                continue
            settled = None
            finished = self._chunk(chunk)
            if not finished:
                before = None
                continue
            state = self._state()
            if before is not None and before[0].items == chunk.items and before[0].transfers == chunk.transfers:
                settled = chunk if state.repeats(before[1]) else None
            before = (chunk, state)
        for number, unit in enumerate(self.units):
            if unit.next < len(unit.todo):
                self._deadlock(number, unit.todo[unit.next][1])
        for (number, semaphore), found in self.semaphores.items():
            self._balance(number, semaphore, found)
            self._answers(number, semaphore, found)

    def _chunk(self, chunk: Chunk) -> bool:
        """Run a chunk on all units as far as possible; whether all have finished it."""
        for unit in self.units:
            unit.todo += [(self.origin, item) for item in chunk.items]
        progress = True
        while progress:
            progress = False
            for number in range(len(self.units)):
                progress |= self._advance(number)
        self.origin += chunk.transfers
        for unit in self.units:
            if unit.next == len(unit.todo):
                unit.todo, unit.next = [], 0
                unit.history = [(0, unit.clock.copy())]
        return all(not unit.todo for unit in self.units)

    def _advance(self, number: int) -> bool:
        """Run one unit to its next wait that is not satisfied."""
        unit = self.units[number]
        start = unit.next
        while unit.next < len(unit.todo):
            origin, item = unit.todo[unit.next]
            if isinstance(item.sync, Wait) and not self._wait(number, item.sync, origin + item.low, item):
                break
            if isinstance(item.sync, Notify):
                self._notify(number, item.sync, origin + item.low, item)
            for visit in item.visits[number] if item.visits else ():
                self._visit(number, origin, item, np.array(visit.units), np.array(visit.cells), visit.write)
            unit.next += 1
        return unit.next > start

    # Semaphores ------------------------------------------------------------------------------------------------------
    def _semaphore(self, unit: int, number: int) -> _Semaphore:
        return self.semaphores.setdefault((unit, number), _Semaphore())

    def _notify(self, number: int, desc: Notify, position: int, item: Item) -> None:
        clock = self.units[number].clock.copy()
        clock[number] = position + 1
        for target in item.targets[number]:
            if target < self.expansion.units:
                found = self._semaphore(target, desc.semaphore)
                message = _Raise(number, position, clock, item)
                found.pending.append(message)
                found.sent.append(message)

    def _wait(self, number: int, desc: Wait, position: int, item: Item) -> bool:
        if desc.semaphore in self.outside:
            return True
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
            f"unit {number} waits for {item.sync.count} notifications of semaphore {item.sync.semaphore} and gets"
            f" {have} before all units wait: notify it earlier or lower the count"
        )
        self._once("deadlock", item, item, message)

    def _balance(self, number: int, semaphore: int, found: _Semaphore) -> None:
        if found.pending:
            item = found.pending[0].item
            message = (
                f"{len(found.pending)} notifications of semaphore {semaphore} of unit {number} are never waited for:"
                " add a wait or correct its count"
            )
            self._once("semaphore-balance", item, item, message)

    def _answers(self, number: int, semaphore: int, found: _Semaphore) -> None:
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
                        f"the wait of unit {number} on semaphore {semaphore} can be over before unit {message.unit} has"
                        " notified, because others may have notified twice: use another semaphore, or let them wait"
                        " first"
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
        memory.items[units[:, None], cells[None, :], number] = self._number(item)
        others = units[units != number]
        if not write and len(others):
            self._written(number, item, others, cells)

    def _compare(
        self, number: int, item: Item, memory: _Memory, at: tuple[NDArray[np.int64], ...], seen: Clock, write: bool
    ) -> None:
        late = memory.ends[at] > seen
        if not late.any():
            return
        for i, j, other in np.argwhere(late):
            owner, cell = int(at[0].ravel()[i]), int(at[1].ravel()[j])
            theirs = self.known[int(memory.items[owner, cell, other])]
            mine = "writes" if write else "reads"
            verb = "writes" if memory is self.writes else "reads"
            message = (
                f"unit {number} {mine} {self.expansion.grid.name(cell)} of unit {owner}, which unit {other} {verb} in"
                f" {self._where(theirs)}: put a notify of unit {other} behind that and a wait of unit {number} before"
                " this, and name the buffer in both"
            )
            self._once("unit-race", item, theirs, message)

    def _written(self, number: int, item: Item, others: NDArray[np.int64], cells: NDArray[np.int64]) -> None:
        """DM of other units is read only after somebody wrote it."""
        dm = cells[cells < self.expansion.grid.dm_cells]
        empty = self.writes.ends[others[:, None], dm[None, :], :].max(axis=2, initial=0) == 0
        if empty.any():
            i, j = np.argwhere(empty)[0]
            message = (
                f"unit {number} reads {self.expansion.grid.name(int(dm[j]))} of unit {int(others[i])}, which no unit"
                " has written: correct the address, or write them first"
            )
            self._once("unit-race", item, item, message)

    # Reports ---------------------------------------------------------------------------------------------------------
    def _number(self, item: Item) -> int:
        found = self.numbers.get(id(item))
        if found is None:
            found = self.numbers[id(item)] = len(self.known)
            self.known.append(item)
        return found

    def _where(self, item: Item) -> str:
        stream = self.expansion.stream
        routine = stream.routines[item.routine]
        instruction = routine.instructions[item.index]
        location = stream.locations[instruction.location]
        return f"{type(instruction.what).__name__.lower()} {routine.name}[{item.index}] {location}".rstrip()

    def _once(self, rule: str, item: Item, other: Item, message: str) -> None:
        key = (rule, item.routine, item.index, other.routine, other.index)
        if key not in self.reported:
            self.reported.add(key)
            self.report(item.routine, item.index, rule, message)

    def _state(self) -> _State:
        clocks = np.array([unit.clock for unit in self.units])
        pending = {
            key: [(m.unit, self.origin - m.position, m.clock) for m in found.pending]
            for key, found in self.semaphores.items()
            if found.pending
        }
        return _State(self.origin, clocks, self.reads.ends.copy(), self.writes.ends.copy(), pending)


@dataclass(frozen=True)
class _State:
    """Everything that decides what happens next, at a place where all units have finished the same chunks."""

    origin: int
    clocks: NDArray[np.int64]
    reads: NDArray[np.int64]
    writes: NDArray[np.int64]
    pending: dict[tuple[int, int], list[tuple[int, int, Clock]]]

    def repeats(self, before: _State) -> bool:
        """Whether this is the same state as one repetition earlier: every number stayed or moved along."""
        step = self.origin - before.origin

        def moved(a: NDArray[np.int64], b: NDArray[np.int64]) -> bool:
            return bool(((a == b) | (a == b + step)).all())

        if self.pending.keys() != before.pending.keys():
            return False
        for key, messages in self.pending.items():
            others = before.pending[key]
            if [m[:2] for m in messages] != [m[:2] for m in others]:
                return False
            if not all(moved(m[2], o[2]) for m, o in zip(messages, others, strict=True)):
                return False
        pairs = ((self.clocks, before.clocks), (self.reads, before.reads), (self.writes, before.writes))
        return all(moved(a, b) for a, b in pairs)


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
    _Run(Expansion(stream, units, registers, footprints), report).all(runs)
