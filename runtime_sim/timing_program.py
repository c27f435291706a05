"""Streams made ready for the event loop: classes of equal units, costs, resources, synchronisation edges."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from backend_rngd.isa.descriptors import Call, Context, Dma, Exec, Instruction, Notify, Stream, Switch
from backend_rngd.machine import Machine
from backend_rngd.machine.formulas import OWN
from runtime_sim.costs import Cost, cost_of
from runtime_sim.event_core import Resources, Wakes
from runtime_sim.flatten import Unrolled, join, unroll
from runtime_sim.symmetry import Classes, refine, singletons
from runtime_sim.sync import latency, wakes
from runtime_sim.topology import Topology
from runtime_sim.traffic import (
    BANKS,
    CARD_IN,
    CARD_OUT,
    CHANNEL,
    DM,
    HBM,
    IN,
    KIND_OF,
    OUT,
    Flow,
    Launch,
    Resource,
    Special,
    Traffic,
)
from runtime_sim.traffic import capacity as capacity_of
from runtime_sim.traffic import uses as uses_of

SEMAPHORES = 8  # a unit's semaphores, beside the kinds of `traffic`


def engines_of(stream: Stream, machine: Machine) -> int:
    """PEs of a unit, each with one DMA engine."""
    return max(1, stream.slices // machine.slices_per_pe) * machine.dma_engines_per_pe


def name_of(resource: Resource) -> str:
    """Name of a resource for people; a channel counts as its HBM."""
    kind, owner = resource
    return {
        DM: f"data-memory port of unit {owner}",
        OUT: f"way out of the cluster of unit {owner}",
        IN: f"way into the cluster of unit {owner}",
        CARD_OUT: f"link out of card {owner}",
        CARD_IN: f"link into card {owner}",
    }.get(kind, f"HBM of card {owner}")


Row = tuple[int, int, int]  # cost row of (class, identity of a descriptor, site or -1)


@dataclass
class Program:
    """Everything the event loop needs. uses: for every cost, what all units of a class together take of a
    resource of each colour, in bytes a cycle at full speed."""

    machine: Machine
    topology: Topology
    streams: Sequence[Stream]  # by unit
    launch: Launch
    routine: int
    repeats: int
    fold: bool
    costs: list[Cost] = field(default_factory=list[Cost])
    uses: list[dict[int, float]] = field(default_factory=list[dict[int, float]])

    def __post_init__(self) -> None:
        self.own_costs: dict[tuple[int, int], Cost] = {}  # of transfers inside a unit
        self.traffic = Traffic(self.topology, self.launch)
        unrolled: dict[int, Unrolled] = {}
        special: dict[int, Special] = {}
        for stream in self.streams:
            if id(stream) not in unrolled:
                unrolled[id(stream)] = unroll(stream, self.routine, self.repeats)
                special[id(stream)] = Special(stream, unrolled[id(stream)])
        self.special = [special[id(s)] for s in self.streams]
        self._resolve()
        self.classes = self._classes()
        chosen = [self.streams[u] for u in self.classes.representatives]
        self.flat = join(chosen, [unrolled[id(s)] for s in chosen])
        self.first_row = np.searchsorted(self.flat.unit, np.arange(len(chosen))).tolist()
        self.number = self._number()
        if any(s.keys for s in self.special):
            self.wakes = wakes(
                self.topology, self.machine, self.special, self.classes, self.first_row, len(self.flat),
                lambda unit, key: self.targets[unit, key],
            )  # fmt: skip
        else:
            self.wakes = Wakes.none(len(self.flat))

    def _resolve(self) -> None:
        """Flows, costs and resources of every site in every unit."""
        self.flows: dict[tuple[int, int], Flow] = {}
        self.targets: dict[tuple[int, int], tuple[int, ...]] = {}
        self.taken: dict[tuple[int, int], dict[Resource, float]] = {}
        self.site_cost: dict[tuple[int, int], Cost] = {}
        known: dict[Hashable, Cost] = {}
        for unit, special in enumerate(self.special):
            engines = engines_of(self.streams[unit], self.machine)
            for key in range(len(special.keys)):
                what = special.what(key)
                assert not isinstance(what, Call)
                flow = None
                count = 0
                if isinstance(what, Dma):
                    flow = self.flows[unit, key] = self.traffic.flow(unit, special, key)
                elif isinstance(what, Notify):
                    self.targets[unit, key] = self.traffic.notified(unit, special, key)
                    count = len(self.targets[unit, key])
                reach = flow.reach if flow else OWN
                named = (id(what), engines, reach, count)
                if named not in known:
                    known[named] = cost_of(what, Context.DMA, self.machine, engines, reach, count)
                cost = self.site_cost[unit, key] = known[named]
                if isinstance(what, Dma):
                    self.taken[unit, key] = uses_of(what, cost, unit, flow, self.topology, self.machine)

    def _classes(self) -> Classes:
        """Which units behave alike, and numbers for what they share."""
        resources: dict[Resource, int] = {}
        for card in sorted({p.card for p in self.topology.places}):
            for kind in (HBM, CHANNEL, CARD_OUT, CARD_IN):
                resources[kind, card] = -1
        for unit in range(len(self.topology)):
            for kind in (DM, OUT, IN, BANKS, SEMAPHORES):
                resources[kind, unit] = unit
        if not self.fold:
            return singletons(len(self.topology), list(resources))
        stream_number = {id(s): n for n, s in enumerate(self.streams[::-1])}
        initial: list[Hashable] = [(stream_number[id(s)], self._late(u)) for u, s in enumerate(self.streams)]
        incidence: list[list[tuple[Hashable, Resource, float]]] = []
        for unit, special in enumerate(self.special):
            entries: list[tuple[Hashable, Resource, float]] = [
                (-1, (kind, self.topology.places[unit].card), 1.0) for kind in (HBM, CHANNEL, CARD_OUT, CARD_IN)
            ]
            for key in range(len(special.keys)):
                cost = self.site_cost[unit, key]
                entries.append(((key, "cost", cost.fixed, cost.work), (SEMAPHORES, unit), 1.0))
                entries += [(key, r, amount) for r, amount in self.taken.get((unit, key), {}).items()]
                for other in self.targets.get((unit, key), ()):
                    way = latency(self.topology, unit, other, self.machine)
                    entries.append(((key, way), (SEMAPHORES, other), 1.0))
            incidence.append(entries)
        return refine(initial, incidence, resources)

    def _number(self) -> NDArray[np.int64]:
        """Cost row of every executed instruction; fills `costs` and `uses`."""
        number = np.empty(len(self.flat), np.int64)
        starts = [*self.first_row, len(self.flat)]
        rows: dict[Row, int] = {}
        shared: dict[tuple[int, int, int], int] = {}  # rows that move no data, by descriptor, context and engines
        for c, members in enumerate(self.classes.members):
            stream, special = self.streams[members[0]], self.special[members[0]]
            here = slice(starts[c], starts[c + 1])
            offsets = np.cumsum([0, *(len(r.instructions) for r in stream.routines)])
            table = np.full(int(offsets[-1]), -1, np.int64)
            used = np.unique(offsets[self.flat.routine[here]] + self.flat.index[here])
            engines = engines_of(stream, self.machine)
            for position in (int(x) for x in used):
                r = int(np.searchsorted(offsets, position, side="right")) - 1
                instruction = stream.routines[r].instructions[position - int(offsets[r])]
                table[position] = self._row(instruction, c, members, engines, rows, shared)
            number[here] = table[offsets[self.flat.routine[here]] + self.flat.index[here]]
            if len(special.rows):
                sites = [self._site_row(c, members, key) for key in range(len(special.keys))]
                number[special.rows + starts[c]] = np.array(sites, np.int64)[special.key]
            self._configure(stream, here, offsets, number)
            self._launch(self._late(members[0]), here, number)
        return number

    def _late(self, unit: int) -> float:
        """Cycles after which a unit begins: those of the second cluster of a card are launched later."""
        behind = self.topology.places[unit].pe // self.topology.pes_per_cluster > 0
        return float(self.machine.launch_skew_cycles) if behind else 0.0

    def _launch(self, late: float, here: slice, number: NDArray[np.int64]) -> None:
        """The first instruction of every context of a unit takes the launch with it."""
        for context in Context.MAIN, Context.SUB, Context.DMA:
            rows = np.nonzero(self.flat.context[here] == int(context))[0]
            if late and len(rows):
                row = int(number[here.start + int(rows[0])])
                cost = self.costs[row]
                later = replace(cost, fixed=cost.fixed + late, overhead=cost.overhead + late)
                number[here.start + int(rows[0])] = self._add(later, self.uses[row])

    def _configure(self, stream: Stream, here: slice, offsets: NDArray[np.int64], number: NDArray[np.int64]) -> None:
        """Passes that use another switch configuration than the last one of their context load it first."""
        if not self.machine.switch_configuration_cycles:
            return
        known: dict[Switch, int] = {}
        table = np.array(
            [
                known.setdefault(x.what.switch, len(known)) if isinstance(x.what, Exec) and x.what.switch else -1
                for r in stream.routines
                for x in r.instructions
            ],
            np.int64,
        )
        wanted = table[offsets[self.flat.routine[here]] + self.flat.index[here]]
        with_load: dict[int, int] = {}
        for context in (Context.MAIN, Context.SUB):
            rows = np.nonzero((wanted >= 0) & (self.flat.context[here] == int(context)))[0]
            changed = rows[np.diff(wanted[rows], prepend=-1) != 0] + here.start
            rows_of: list[int] = np.unique(number[changed]).tolist()
            for row in rows_of:
                cost = self.costs[row]
                load = float(self.machine.switch_configuration_cycles)
                dearer = replace(cost, fixed=cost.fixed + load, overhead=cost.overhead + load)
                with_load.setdefault(row, self._add(dearer, {}))
            before: list[int] = number[changed].tolist()
            number[changed] = [with_load[row] for row in before]

    def _row(
        self,
        instruction: Instruction,
        c: int,
        members: Sequence[int],
        engines: int,
        rows: dict[Row, int],
        shared: dict[tuple[int, int, int], int],
    ) -> int:
        what = instruction.what
        assert not isinstance(what, Call)
        name = (c, id(what), -1)
        if name in rows:
            return rows[name]
        if not isinstance(what, Dma):
            named = id(what), int(instruction.context), engines
            if named not in shared:
                shared[named] = self._add(cost_of(what, instruction.context, self.machine, engines), {})
            return shared[named]
        if what.source.space.is_peer or what.destination.space.is_peer:
            return -1  # `_site_row`
        unit = members[0]
        name_of_cost = (id(what), engines)
        if name_of_cost not in self.own_costs:  # stages share instructions
            self.own_costs[name_of_cost] = cost_of(what, instruction.context, self.machine, engines)
        cost = self.own_costs[name_of_cost]
        taken = uses_of(what, cost, unit, None, self.topology, self.machine)
        card = self.topology.places[unit].card
        beside = sum(self.topology.places[m].card == card for m in members)
        amounts = {self.classes.of_resource[r]: x * beside if r[0] in (HBM, CHANNEL) else x for r, x in taken.items()}
        rows[name] = self._add(cost, amounts)
        return rows[name]

    def _site_row(self, c: int, members: Sequence[int], key: int) -> int:
        """A site's row: what all units of the class take of one resource of each colour."""
        unit = members[0]
        total: dict[Resource, float] = defaultdict(float)
        for member in members:
            for resource, amount in self.taken.get((member, key), {}).items():
                total[resource] += amount
        amounts = {self.classes.of_resource[r]: total[r] for r in self.taken.get((unit, key), {})}
        return self._add(self.site_cost[unit, key], amounts)

    def _add(self, cost: Cost, uses: dict[int, float]) -> int:
        self.costs.append(cost)
        self.uses.append(uses)
        return len(self.costs) - 1

    def resources(self, contention: bool) -> Resources:
        """What the costs use, per byte of what they want of their first resource.

        DM ports cannot hold back a unit's own transfers, which come one at a time: they count only if there are peers.
        Channels count only if a transfer loads them unevenly: else they are HBM as a whole. Banks count only where
        passes and a transfer together can want more than they have.
        """
        colours = 1 + max(self.classes.of_resource.values(), default=-1)
        capacity, kinds = np.zeros(colours), np.zeros(colours, np.int64)
        for resource, colour in self.classes.of_resource.items():
            kind, owner = resource
            if kind != SEMAPHORES:
                engines = engines_of(self.streams[owner], self.machine) if kind in (DM, OUT, IN) else 1
                capacity[colour] = capacity_of((kind, owner), engines, self.machine)
                kinds[colour] = KIND_OF[kind]
        channel = {c for (kind, _), c in self.classes.of_resource.items() if kind == CHANNEL}
        whole = {c for (kind, _), c in self.classes.of_resource.items() if kind == HBM}
        banks = self._banks(capacity)
        left_out: set[int] = set() if self.flows else {c for c in range(colours) if kinds[c] != KIND_OF[HBM]}
        left_out |= {c for (kind, _), c in self.classes.of_resource.items() if kind == BANKS}
        left_out -= set(banks.tolist())
        if not any(self._uneven(uses, channel, whole) for uses in self.uses):
            left_out |= channel
        starts: list[int] = [0]
        pool: list[int] = []
        weight: list[float] = []
        for cost, uses in zip(self.costs, self.uses, strict=True):
            for colour, amount in uses.items() if contention else ():
                if colour not in left_out:
                    pool.append(colour)
                    weight.append(amount / cost.demand)
            starts.append(len(pool))
        return Resources(
            np.array(starts, np.int64), np.array(pool, np.int64), np.array(weight, np.float64), capacity, kinds,
            banks if contention else None,
        )  # fmt: skip

    def _banks(self, capacity: NDArray[np.float64]) -> NDArray[np.int64]:
        """Of every represented unit the banks that can be short, else -1."""
        out = np.full(len(self.classes.representatives), -1, np.int64)
        for number, unit in enumerate(self.classes.representatives):
            colour = self.classes.of_resource[BANKS, unit]
            mine = self.flat.unit == number
            rows: list[list[int]] = [np.unique(self.number[mine & (self.flat.context == c)]).tolist() for c in range(3)]
            main, sub = (max((self.costs[row].press for row in own), default=0.0) for own in rows[:2])
            moved = max((self.uses[row].get(colour, 0.0) for row in rows[2]), default=0.0)
            if main + sub and moved and main + sub + moved > capacity[colour]:
                out[number] = colour
        return out

    @staticmethod
    def _uneven(uses: dict[int, float], channel: set[int], whole: set[int]) -> bool:
        on_channel = sum(x for c, x in uses.items() if c in channel)
        return on_channel > (1.0 + 1e-9) * sum(x for c, x in uses.items() if c in whole)

    def resource_names(self) -> list[dict[int, str]]:
        """Of every cost, by kind of contention the names of the resources it uses; units that are alike are counted."""
        of_colour: dict[int, list[Resource]] = defaultdict(list)
        for resource, colour in self.classes.of_resource.items():
            if resource[0] != SEMAPHORES:
                of_colour[colour].append(resource)
        names: dict[int, str] = {}
        for colour, found in of_colour.items():
            first = name_of(found[0])
            names[colour] = first + (f" and {len(found) - 1} like it" if len(found) > 1 else "")
        out: list[dict[int, str]] = []
        known: dict[tuple[int, ...], dict[int, str]] = {}
        for uses in self.uses:
            key = tuple(uses)
            if key not in known:
                by_kind: dict[int, list[str]] = defaultdict(list)
                for colour in key:
                    kind = KIND_OF[of_colour[colour][0][0]]
                    if names[colour] not in by_kind[kind]:
                        by_kind[kind].append(names[colour])
                known[key] = {kind: " or ".join(words) for kind, words in by_kind.items()}
            out.append(known[key])
        return out

    def load(self) -> dict[Resource, float]:
        """Bytes that went through every resource of the represented units and their cards."""
        times = np.bincount(self.number, minlength=len(self.costs))
        by_colour: dict[int, float] = defaultdict(float)
        for row, uses in enumerate(self.uses):
            for colour, amount in uses.items():
                by_colour[colour] += amount * self.costs[row].work * float(times[row])
        return {
            resource: by_colour.get(colour, 0.0)
            for resource, colour in self.classes.of_resource.items()
            if resource[0] not in (SEMAPHORES, CHANNEL, BANKS)
        }
