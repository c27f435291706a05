"""The result of a timing run: totals, exact stall accounting, critical path, tables per unit, layer and operation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backend_rngd.isa.descriptors import Context
from backend_rngd.machine import Machine
from runtime_sim.bounds import Bounds
from runtime_sim.costs import Cost
from runtime_sim.flatten import Flat
from runtime_sim.symmetry import Classes
from runtime_sim.timing_tables import CONTEXTS, Layer, Operation, layers, operations, per_card, per_unit, to_json
from runtime_sim.topology import Topology
from runtime_sim.traffic import Launch, Resource

STALLS = (
    "busy",  # data moves or is computed
    "issue",  # issue, pipeline fill, DMA start-up
    "wait_main",  # waiting for an instruction of the main context
    "wait_sub",
    "wait_dma",
    "wait_sync",  # waiting for other units
    "contention_vector",  # the other context holds the vector engine
    "contention_hbm",  # transfers of other units take a share of the bandwidth
    "contention_dm",  # ... of a data memory's port
    "contention_link",  # ... of the way to the other cluster
    "contention_card",  # ... of a card's link
    "tail",  # nothing left to do
)


SHARED = ("contention_hbm", "contention_dm", "contention_link", "contention_card")  # by kind of resource
COLLECTIVES = frozenset({"tc.all_reduce", "tc.all_gather", "tc.reduce_scatter"})


@dataclass(frozen=True)
class TimingResult:
    """Times are cycles of the tensor clock; arrays have one entry an executed instruction, in program order.

    start, ready (dependencies met and context free), finish; cause: instruction whose completion made it ready (-1:
    none); waker: the notify that ended a wait (-1). `number` says which of `costs` an instruction has; lost: cycles a
    transfer lost to each kind of shared resource. Units of a class do the same at the same time: `flat` holds one unit
    of each class, `flat.unit` is the class. load: bytes through the resources of the cards and represented units.
    launch: values of launch registers by rank. resource_names: of every cost, what it uses by kind of resource.
    """

    machine: Machine
    flat: Flat
    costs: list[Cost]
    number: NDArray[np.int64]
    start: NDArray[np.float64]
    ready: NDArray[np.float64]
    finish: NDArray[np.float64]
    cause: NDArray[np.int64]
    waker: NDArray[np.int64]
    lost: NDArray[np.float64]
    topology: Topology
    classes: Classes
    load: dict[Resource, float]
    bounds: Bounds | None = None
    launch: Launch = field(default_factory=dict[int, Sequence[int]])
    resource_names: Sequence[Mapping[int, str]] = ()

    def column(self, name: str) -> NDArray[Any]:
        return np.array([getattr(c, name) for c in self.costs])[self.number] if len(self.flat) else np.zeros(0)

    def total(self, name: str) -> int:
        """Sum of a cost over the instructions of all units."""
        return int((self.column(name) * self.copies).sum())

    @cached_property
    def copies(self) -> NDArray[np.int64]:
        """Units that an instruction stands for."""
        return np.array([len(m) for m in self.classes.members], np.int64)[self.flat.unit]

    @cached_property
    def cycles(self) -> float:
        """Makespan."""
        return float(self.finish.max()) if len(self.flat) else 0.0

    @property
    def seconds(self) -> float:
        """Makespan at the machine's clock."""
        return self.cycles * self.machine.seconds_per_cycle

    @property
    def units(self) -> int:
        """Units simulated."""
        return len(self.topology)

    @property
    def instructions(self) -> int:
        """Instructions that all units together execute."""
        return int(self.copies.sum())

    def unit_name(self, number: int) -> str:
        """Name of a class for people."""
        first, *others = self.classes.members[number]
        return f"unit {first} on {self.topology.describe(first)}" + (f" and {len(others)} like it" if others else "")

    @cached_property
    def slowest(self) -> int:
        """The unit that finishes last (the first of them)."""
        return self.classes.members[int(self.flat.unit[int(self.finish.argmax())])][0] if len(self.flat) else 0

    @cached_property
    def macs(self) -> int:
        """Multiply-accumulates, padding included."""
        return self.total("macs")

    @cached_property
    def hbm_read_bytes(self) -> int:
        """Bytes read from HBM."""
        return self.total("read_bytes")

    @cached_property
    def hbm_write_bytes(self) -> int:
        """Bytes written to HBM."""
        return self.total("write_bytes")

    @property
    def mac_utilisation(self) -> float:
        """Share of the bf16 multipliers of the units' slices that was busy over the makespan."""
        per_cycle = sum(self.flat.streams[c].slices for c in self.classes.of_unit) * 8 * 32
        return self.macs / (self.cycles * per_cycle) if self.cycles else 0.0

    @property
    def hbm_utilisation(self) -> float:
        """Share of the cards' peak HBM bandwidth used over the makespan."""
        moved = self.hbm_read_bytes + self.hbm_write_bytes
        peak = self.cycles * self.machine.hbm_bytes_per_cycle * self.topology.cards
        return moved / peak if self.cycles else 0.0

    # Stalls ----------------------------------------------------------------------------------------------------------
    @cached_property
    def _queues(self) -> list[NDArray[np.int64]]:
        """Instructions of class * 3 + context, in order."""
        key = self.flat.unit * 3 + self.flat.context
        order = np.argsort(key, kind="stable")
        return np.split(order, np.searchsorted(key[order], np.arange(1, 3 * len(self.flat.streams))))

    @cached_property
    def gaps(self) -> NDArray[np.float64]:
        """[n, 3]: cycles between the end of the previous instruction of the context and readiness, then to the start
        (vector engine taken), and excess over the uncontended duration (resource shared, or a wait)."""
        out = np.zeros((len(self.flat), 3))
        previous = np.zeros(len(self.flat))
        for queue in self._queues:
            previous[queue[1:]] = self.finish[queue[:-1]]
        out[:, 0] = self.ready - previous
        out[:, 1] = self.start - self.ready
        out[:, 2] = self.finish - self.start - self.column("cycles")
        return out

    @cached_property
    def shared(self) -> NDArray[np.float64]:
        """[n, 4]: the excess of every transfer by kind of resource (order of SHARED); rows sum to it exactly."""
        excess = np.where(self.column("wait").astype(np.bool_), 0.0, self.gaps[:, 2]) if len(self.flat) else np.zeros(0)
        total = self.lost.sum(axis=1)
        scale = np.divide(excess, total, out=np.zeros_like(total), where=total > 0)
        out = self.lost * scale[:, None]
        out[:, 0] += excess - out.sum(axis=1)  # rounding of transfers that lost nothing
        return out

    @cached_property
    def stalls(self) -> list[dict[str, dict[str, float]]]:
        """For every unit and context, cycles by the names in STALLS; they sum to the makespan."""
        of_class: list[dict[str, dict[str, float]]] = []
        duration, overhead, waits = self.column("cycles"), self.column("overhead"), self.column("wait").astype(bool)
        before = np.maximum(self.cause, 0)
        for number in range(len(self.flat.streams)):
            table: dict[str, dict[str, float]] = {}
            for c, name in enumerate(CONTEXTS):
                mine = self._queues[3 * number + c]
                row: dict[str, float] = {stall: 0.0 for stall in STALLS}
                row["tail"] = self.cycles
                if len(mine):
                    gaps = self.gaps[mine]
                    row["issue"] = float(overhead[mine].sum())
                    row["busy"] = float(duration[mine].sum()) - row["issue"]
                    by_wait = (self.cause[mine] >= 0) & waits[before[mine]]
                    causes = np.where(self.cause[mine] >= 0, self.flat.context[before[mine]], -1)
                    for other, label in enumerate(CONTEXTS):
                        row[f"wait_{label}"] = float(gaps[(causes == other) & ~by_wait, 0].sum())
                    row["wait_sync"] = float(gaps[by_wait, 0].sum() + gaps[waits[mine], 2].sum())
                    row["contention_vector"] = float(gaps[:, 1].sum())
                    for label, cycles in zip(SHARED, self.shared[mine].sum(axis=0).tolist(), strict=True):
                        row[label] = cycles
                    row["tail"] = self.cycles - float(self.finish[mine].max())
                table[name] = row
            of_class.append(table)
        return [of_class[c] for c in self.classes.of_unit]

    @cached_property
    def critical_path(self) -> list[int]:
        """Instructions, first to last, each of which started when its predecessor on the path ended; a wait follows the
        notify that ended it."""
        if not len(self.flat):
            return []
        path: list[int] = []
        i = int(self.finish.argmax())
        while i >= 0:
            path.append(i)
            if self.waker[i] >= 0 and self.finish[i] > self.start[i]:
                i = int(self.waker[i])
            elif self.start[i] > self.ready[i]:  # waited for the vector engine of the other context
                other = self._queues[3 * int(self.flat.unit[i]) + 1 - int(self.flat.context[i])]
                i = int(other[np.searchsorted(self.finish[other], self.start[i])])
            else:
                i = int(self.cause[i])
        return path[::-1]

    @cached_property
    def path_cycles(self) -> list[float]:
        """What each instruction of the critical path adds to the makespan; the sum is the makespan."""
        finish = self.finish[self.critical_path]
        return np.diff(finish, prepend=0.0).tolist()

    @cached_property
    def collective(self) -> NDArray[np.bool_]:
        """Instructions that serve the exchange between units: transfers to and from peers, notifies, waits, and what a
        collective was lowered to."""
        if not len(self.flat):
            return np.zeros(0, np.bool_)
        marked = self.column("collective").astype(np.bool_)
        for number, stream in enumerate(self.flat.streams):
            named = np.array([name.rsplit("|", 1)[-1] in COLLECTIVES for name in stream.locations] or [False])
            offsets = np.cumsum([0, *(len(r.instructions) for r in stream.routines)])
            places = np.array([x.location for r in stream.routines for x in r.instructions], np.int64)
            mine = self.flat.unit == number
            marked[mine] |= named[places[offsets[self.flat.routine[mine]] + self.flat.index[mine]]]
        return marked

    @cached_property
    def collective_share(self) -> float:
        """Share of the makespan that the critical path spends in collectives, waits for other units included."""
        if not self.cycles:
            return 0.0
        return float(np.array(self.path_cycles)[self.collective[self.critical_path]].sum()) / self.cycles

    # Tables ----------------------------------------------------------------------------------------------------------
    @cached_property
    def locations(self) -> list[str]:
        """Source location of every executed instruction."""
        tables = {
            (u, r): [s.locations[x.location] for x in body.instructions]
            for u, s in enumerate(self.flat.streams)
            for r, body in enumerate(s.routines)
        }
        keys = zip(self.flat.unit.tolist(), self.flat.routine.tolist(), self.flat.index.tolist(), strict=True)
        return [tables[(u, r)][i] for u, r, i in keys]

    @cached_property
    def layers(self) -> list[Layer]:
        """Calls made by the entry routine of the represented units, in order."""
        return layers(self)

    @cached_property
    def operations(self) -> list[Operation]:
        """Cycles of every source location over all calls and units, the costliest first."""
        return operations(self)

    @cached_property
    def per_unit(self) -> list[dict[str, Any]]:
        """A row a unit: place, shares of the makespan, bytes (`timing_tables.per_unit`)."""
        return per_unit(self)

    @cached_property
    def per_card(self) -> list[dict[str, Any]]:
        """A row a card: bytes of HBM lines and of its link, and their shares of the peak."""
        return per_card(self)

    def utilisation(self, unit: int | None = None) -> dict[str, float]:
        """Share of the makespan that each context of a unit works, of the slowest one by default."""
        table = self.stalls[self.slowest if unit is None else unit]
        return {name: (table[name]["busy"] + table[name]["issue"]) / (self.cycles or 1.0) for name in CONTEXTS}

    def engines(self, unit: int | None = None) -> dict[str, float]:
        """`utilisation` and the share in which the vector engine is held."""
        unit = self.slowest if unit is None else unit
        mine = (self.flat.unit == self.classes.of_unit[unit]) & self.column("vector").astype(np.bool_)
        return {
            **self.utilisation(unit),
            "vector": float((self.finish - self.start)[mine].sum()) / (self.cycles or 1.0),
        }

    def layers_of(self, unit: int | None = None) -> list[Layer]:
        """Layers of a unit, of the slowest one by default."""
        first = self.classes.members[self.classes.of_unit[self.slowest if unit is None else unit]][0]
        return [layer for layer in self.layers if layer.unit == first]

    @cached_property
    def power(self) -> tuple[float, float]:
        """Board power in W, (low, high), of the fit of measured power over loaded PEs (hardware.md 1.6).

        high: every PE in use counts as loaded all the time. low: only while its main context works. Serving measured
        between the two, at 140 to 152 W (reference-product.md 9.3).
        """
        loaded: dict[int, list[float]] = {}
        for unit, place in enumerate(self.topology.places):
            pes = max(1, self.flat.streams[self.classes.of_unit[unit]].slices // self.machine.slices_per_pe)
            card = loaded.setdefault(place.card, [0.0, 0.0])
            card[0] += pes * self.utilisation(unit)["main"]
            card[1] += pes
        idle, each, most = (getattr(self.machine, f"power_{name}_watts") for name in ("idle", "pe", "card"))
        low, high = (sum(min(most, idle + each * card[side]) for card in loaded.values()) for side in (0, 1))
        return float(low), float(high)

    def energy_joules(self) -> float:
        """Board energy with every PE in use loaded all the time: the high end of `power`."""
        return self.power[1] * self.seconds

    def to_json(self, instructions: bool = False) -> dict[str, Any]:
        """JSON object; with `instructions` also one row an executed instruction of the represented units."""
        return to_json(self, instructions)


def context_name(context: int) -> str:
    """Lower-case name of a context number."""
    return Context(context).name.lower()
