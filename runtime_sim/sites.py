"""The distinct instructions behind the executed ones: names for people, and what each of them moves."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backend_rngd.isa.descriptors import Call, Commit, Descriptor, Dma, Exec, Fetch, LoadTrf, LoadVrf, Memset, Space
from runtime_sim.costs import Cost
from runtime_sim.timing_result import TimingResult
from runtime_sim.timing_tables import CONTEXTS

TRAFFIC = ("hbm_bytes", "dm_bytes", "noc_bytes", "pcie_bytes")


@dataclass(frozen=True)
class Named:
    """A distinct instruction. unit: the first unit that executes it."""

    unit: int
    context: str
    routine: str
    index: int
    location: str

    def __str__(self) -> str:
        return f"{self.context}: {self.location.replace('|', ' ').strip() or 'unknown'} ({self.routine} {self.index})"


class Sites:
    """Of a result: `number` is the distinct instruction of every executed one, `names` say which those are."""

    def __init__(self, result: TimingResult) -> None:
        self.result = result
        flat = result.flat
        self.names: list[Named] = []
        self.instructions: list[Descriptor] = []
        self.number: NDArray[np.int64] = np.zeros(len(flat), np.int64)
        for unit, stream in enumerate(flat.streams):
            first = len(self.names)
            sizes = [len(r.instructions) for r in stream.routines]
            offsets = np.cumsum([0, *sizes]) + first
            for routine in stream.routines:
                for index, item in enumerate(routine.instructions):
                    context = "call" if isinstance(item.what, Call) else CONTEXTS[int(item.context)]
                    member = result.classes.members[unit][0]
                    self.names.append(Named(member, context, routine.name, index, stream.locations[item.location]))
                    self.instructions.append(item.what)
            mine = flat.unit == unit
            self.number[mine] = offsets[flat.routine[mine]] + flat.index[mine]

    @cached_property
    def operations(self) -> tuple[list[str], NDArray[np.int64]]:
        """Names of operations for people, and the number of each executed instruction's."""
        plain = [name.location.replace("|", " ").strip() for name in self.names]
        names = sorted(set(plain))
        numbers = {name: number for number, name in enumerate(names)}
        return names, self.column([numbers[name] for name in plain])

    @cached_property
    def traffic(self) -> NDArray[np.int64]:
        """[executed, TRAFFIC]: bytes that every executed instruction moves in each memory and network."""
        cost_of: dict[int, int] = dict(zip(self.number.tolist(), self.result.number.tolist(), strict=True))
        table = np.zeros((len(self.names), len(TRAFFIC)), np.int64)
        for site in cost_of:
            table[site] = moved_bytes(self.instructions[site], self.result.costs[cost_of[site]])
        # A transfer between units may differ from place to place only in where its peer lies.
        out = table[self.number]
        reach = np.array([c.reach for c in self.result.costs]).reshape(-1, 4)[self.result.number]
        moved = self.result.column("moved_bytes")
        out[:, 2] = np.rint(moved * (reach[:, 1] + reach[:, 2]))
        out[:, 3] = np.rint(moved * reach[:, 3])
        return out

    def column(self, values: list[Any]) -> NDArray[Any]:
        """A value of every distinct instruction, spread over the executed ones."""
        return np.array(values)[self.number]


def moved_bytes(what: Descriptor, cost: Cost) -> tuple[int, int, int, int]:
    """Bytes in HBM, in data memories (fetched and committed ones included), between PEs and between cards."""
    if isinstance(what, Dma):
        sides = sum(s.space in (Space.DM, Space.PEER_DM) for s in (what.source, what.destination))
        near = cost.reach.cluster + cost.reach.chip
        return (
            cost.read_bytes + cost.write_bytes,
            cost.moved_bytes * sides,
            round(cost.moved_bytes * near),
            round(cost.moved_bytes * cost.reach.card),
        )
    if isinstance(what, Exec):
        return 0, what.slices * (_elements(what.fetch) + _elements(what.commit)), 0, 0
    if isinstance(what, LoadTrf | LoadVrf):
        return 0, what.slices * _elements(what.fetch), 0, 0
    if isinstance(what, Memset):
        return 0, what.slices * what.bytes, 0, 0
    return 0, 0, 0, 0


def _elements(nest: Fetch | Commit) -> int:
    """Bytes of a slice that a sequencer touches, repetitions counted."""
    total = nest.dtype.bytes * (2 if isinstance(nest, Fetch) and nest.second is not None else 1)
    for size, _ in nest.loops:
        total *= size
    return total
