"""What an instruction must wait for: RAW, WAR and WAW between contexts, without waits that others already imply.

Contexts run in order, so a wait is a count of completed instructions, and only the latest conflicting instruction of
each context matters. HBM needs no waits inside a unit: only the DMA context touches it, in order.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from backend_rngd.isa.descriptors import Context
from backend_rngd.isa.footprint import Access

CONTEXTS = (Context.MAIN, Context.SUB, Context.DMA)
SHARED_SPACES = ("dm", "trf", "vrf")

Counts = tuple[int, int, int]


class Hazards:
    """Walks the instructions of a routine in program order.

    Call `required` and then `issue` for every instruction. Counts are numbers of instructions of main, sub and dma.
    """

    def __init__(self, accesses: Sequence[Sequence[Access]]) -> None:
        """`accesses`: footprints of all instructions to come (they give the grid of byte ranges)."""
        self._cuts: dict[str, np.ndarray] = {}
        self._writes: dict[str, np.ndarray] = {}
        self._reads: dict[str, np.ndarray] = {}
        points: dict[str, set[int]] = {space: set() for space in SHARED_SPACES}
        for footprint in accesses:
            for access in footprint:
                if access.space in points:
                    for low, high in access.intervals:
                        points[access.space].update((low, high))
        self._index: dict[str, dict[int, int]] = {}
        for space, values in points.items():
            cuts = sorted(values)
            self._index[space] = {value: i for i, value in enumerate(cuts)}
            self._writes[space] = np.zeros((3, max(len(cuts) - 1, 1)), np.int32)
            self._reads[space] = np.zeros((3, max(len(cuts) - 1, 1)), np.int32)
        self._issued = [0, 0, 0]
        self._clock: list[list[int]] = [[0, 0, 0] for _ in CONTEXTS]  # what each context knows to be complete
        self._history: list[list[Counts]] = [[], [], []]  # what each instruction knew when it started

    @property
    def issued(self) -> Counts:
        """Instructions issued so far, by context."""
        return (self._issued[0], self._issued[1], self._issued[2])

    def required(self, context: Context, accesses: Sequence[Access]) -> Counts:
        """Instructions of each context that conflict with these accesses (the latest one's count; own context 0)."""
        need = np.zeros(3, np.int32)
        for access in accesses:
            if access.space not in self._index:
                continue
            index = self._index[access.space]
            writes, reads = self._writes[access.space], self._reads[access.space]
            for low, high in access.intervals:
                a, b = index[low], index[high]
                np.maximum(need, writes[:, a:b].max(axis=1), out=need)
                if access.write:
                    np.maximum(need, reads[:, a:b].max(axis=1), out=need)
        need[int(context)] = 0
        return (int(need[0]), int(need[1]), int(need[2]))

    def unmet(self, context: Context, need: Counts) -> Counts:
        """`need` without what the context knows already and without waits that another one of them implies."""
        known = self._clock[int(context)]
        left = [n if n > k else 0 for n, k in zip(need, known, strict=True)]
        for d in range(3):
            for e in range(3):
                if left[d] and left[e] and d != e and self._history[e][left[e] - 1][d] >= left[d]:
                    left[d] = 0
        return (left[0], left[1], left[2])

    def known(self, context: Context) -> Counts:
        """Instructions that must be complete when the next one of this context starts, without waits of its own."""
        clock = self._clock[int(context)]
        return (clock[0], clock[1], clock[2])

    def implied(self, context: Context, wait: Counts) -> Counts:
        """What is known to be complete once the context has waited for `wait`."""
        clock = list(self._clock[int(context)])
        for d, count in enumerate(wait):
            if count > clock[d]:
                clock[d] = count
            if count:
                past = self._history[d][count - 1]
                clock = [max(a, b) for a, b in zip(clock, past, strict=True)]
        return (clock[0], clock[1], clock[2])

    def barrier(self) -> None:
        """A call: everything before it is complete for every instruction behind it."""
        for table in (*self._writes.values(), *self._reads.values()):
            table[:] = 0
        self._clock = [list(self._issued) for _ in CONTEXTS]

    def issue(self, context: Context, accesses: Sequence[Access], wait: Counts) -> None:
        """The instruction starts after `wait` and makes these accesses."""
        c = int(context)
        clock = list(self.implied(context, wait))
        self._issued[c] += 1
        count = self._issued[c]
        self._history[c].append((clock[0], clock[1], clock[2]))
        clock[c] = count  # the next instruction of this context starts after this one
        self._clock[c] = clock
        for access in accesses:
            if access.space not in self._index:
                continue
            table = (self._writes if access.write else self._reads)[access.space]
            index = self._index[access.space]
            for low, high in access.intervals:
                table[c, index[low] : index[high]] = count
