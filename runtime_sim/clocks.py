"""What every context of every unit knows to be complete: vector clocks over all contexts of a group of units.

Entry 3 * unit + context of a clock counts instructions of that context since the start of the group's run. Inside a
unit knowledge comes from the waits of the instructions (`After`) and from calls; between units from notify and wait.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from backend_rngd.isa.descriptors import After, Context
from runtime_sim.errors import SimulationError

Clock = NDArray[np.int64]
Counts = tuple[int, int, int]
START: Counts = (0, 0, 0)


class Clocks:
    """The clocks of one unit's three contexts. Clocks are never changed in place."""

    def __init__(self, unit: int, units: int) -> None:
        self.first = 3 * unit
        self.known: list[Clock] = [np.zeros(3 * units, np.int64) for _ in range(3)]
        self.history: list[list[Clock]] = [[], [], []]  # what each instruction knew when it was complete

    @property
    def counts(self) -> Counts:
        """Instructions of each context so far."""
        return len(self.history[0]), len(self.history[1]), len(self.history[2])

    def require(self, context: int, need: Sequence[int]) -> Clock:
        """The next instruction of a context waits for counts of all contexts; returns what it knows at its start."""
        clock = self.known[context]
        for other, count in enumerate(need):
            if other != context and count > clock[self.first + other]:
                clock = np.maximum(clock, self.history[other][count - 1])
                clock[self.first + other] = max(count, int(clock[self.first + other]))
        self.known[context] = clock
        return clock

    def learn(self, context: int, clock: Clock) -> None:
        """The current instruction of a context has waited for another unit that knew `clock`."""
        self.known[context] = np.maximum(self.known[context], clock)

    def told(self, context: int) -> Clock:
        """What a notify that is the next instruction of a context tells: everything before it is complete."""
        clock = self.known[context].copy()
        clock[self.first + context] = len(self.history[context])
        return clock

    def complete(self, context: int) -> None:
        """The next instruction of a context has run."""
        self.history[context].append(self.known[context])

    def meet(self) -> None:
        """Everything so far is complete for every context."""
        counts = self.counts
        for context in range(3):
            self.require(context, counts)


class Frame:
    """One execution of a routine: turns the waits of its instructions into counts since the start of the run."""

    def __init__(self, clocks: Clocks, gate: Counts) -> None:
        """`gate`: what the call of the routine waits for."""
        self.clocks = clocks
        self.gate = gate
        self.entered = clocks.counts
        self.own: list[list[int]] = [[], [], []]
        self.calls: list[Counts] = []

    def need(self, after: After) -> Counts:
        """Counts that must be complete before an instruction starts. Raises SimulationError if that is never so."""
        need = list(self.gate)
        wanted = (after.main, after.sub, after.dma)
        if after.call > len(self.calls) or any(n > len(own) for n, own in zip(wanted, self.own, strict=True)):
            what = "an instruction waits for one that comes later"
            raise SimulationError(SimulationError.DEADLOCK, what, "a wait may not refer to the future")
        for c in range(3):
            if wanted[c]:
                need[c] = max(need[c], self.own[c][wanted[c] - 1])
            if after.enter:
                need[c] = max(need[c], self.entered[c])
            if after.call:
                need[c] = max(need[c], self.calls[after.call - 1][c])
        return need[0], need[1], need[2]

    def executed(self, context: Context) -> None:
        """An instruction of the routine itself has run."""
        self.clocks.complete(context)
        self.own[context].append(len(self.clocks.history[context]))

    def called(self) -> None:
        """A call of the routine has returned."""
        self.calls.append(self.clocks.counts)
