"""What the abstract run of `check_units` keeps: clocks of units, last accesses, notifications on their way."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from backend_rngd.isa.expand import Item

Clock = NDArray[np.int64]
"""By unit: how many instructions of its DMA context are certainly complete."""


@dataclass(frozen=True)
class Raise:
    """A notification on its way to one unit: who sent it, when, and what that unit knew to be complete."""

    unit: int
    position: int  # of the notify in the sender's DMA context
    clock: Clock
    item: Item


@dataclass
class Semaphore:
    """One semaphore of one unit."""

    pending: list[Raise] = field(default_factory=list[Raise])
    sent: list[Raise] = field(default_factory=list[Raise])
    waits: list[tuple[int, list[Raise], Item]] = field(default_factory=list[tuple[int, list[Raise], Item]])


@dataclass
class Unit:
    """How far a unit is. rank: its number in the group."""

    rank: int

    clock: Clock
    history: list[tuple[int, Clock]]  # (instructions of the DMA context complete, clock from then on)
    todo: list[tuple[int, Item]] = field(default_factory=list[tuple[int, Item]])  # (position of its chunk, item)
    next: int = 0


class Memory:
    """The last access of every unit to every cell of every unit's memory: its end as a clock, and the item."""

    def __init__(self, units: int, cells: int) -> None:
        self.ends = np.zeros((units, cells, units), np.int64)
        self.items = np.zeros((units, cells, units), np.int32)


@dataclass(frozen=True)
class State:
    """Everything that decides what happens next, when all units of a stage have finished the same chunks."""

    origin: int
    clocks: NDArray[np.int64]
    reads: NDArray[np.int64]
    writes: NDArray[np.int64]
    pending: dict[tuple[int, int], list[tuple[int, Clock]]]

    def repeats(self, before: State) -> bool:
        """Whether this is the same state as one repetition earlier: every number stayed or moved along."""
        step = self.origin - before.origin

        def moved(a: NDArray[np.int64], b: NDArray[np.int64]) -> bool:
            return bool(((a == b) | (a == b + step)).all())

        if self.pending.keys() != before.pending.keys():
            return False
        for key, messages in self.pending.items():
            others = before.pending[key]
            if [unit for unit, _ in messages] != [unit for unit, _ in others]:
                return False
            if not all(moved(m, o) for (_, m), (_, o) in zip(messages, others, strict=True)):
                return False
        pairs = ((self.clocks, before.clocks), (self.reads, before.reads), (self.writes, before.writes))
        return all(moved(a, b) for a, b in pairs)
