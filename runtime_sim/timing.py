"""Timing simulator: when every instruction of the units runs, and why it did not run earlier.

    result = simulate(stream, load_machine(mode="silicon"))
    print(result.cycles, result.stalls)

Durations are the closed forms of `backend_rngd.machine.formulas`; contexts are in-order queues that wait for counts;
main and sub exclude each other on the vector engine; transfers share HBM, DM ports and links max-min fairly; waits end
when their notifies have arrived. Units that do the same at the same time are simulated once. Timing never looks at
values.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from backend_rngd.isa.descriptors import Call, Context, Dma, Instruction, Notify, Stream
from backend_rngd.machine import Machine, Mode
from backend_rngd.machine.formulas import OWN
from runtime_sim.costs import Cost, cost_of
from runtime_sim.errors import SimulationError
from runtime_sim.event_core import Rates, Resources, Wakes, execute
from runtime_sim.flatten import Flat, Unrolled, join, unroll
from runtime_sim.symmetry import Classes, refine, singletons
from runtime_sim.sync import latency, wakes
from runtime_sim.timing_result import TimingResult
from runtime_sim.topology import Topology
from runtime_sim.traffic import CARD_IN, CARD_OUT, DM, HBM, IN, KIND_OF, OUT, Flow, Launch, Resource, Special, Traffic
from runtime_sim.traffic import capacity as capacity_of
from runtime_sim.traffic import uses as uses_of

__all__ = ["TimingResult", "simulate"]


def simulate(
    streams: Stream | Sequence[Stream],
    machine: Machine,
    mode: Mode | None = None,
    routine: int = 0,
    jit: bool | None = None,
    contention: bool = True,
    topology: Topology | None = None,
    launch: Launch | None = None,
    repeats: int = 1,
    fold: bool | None = None,
) -> TimingResult:
    """Time the streams of all units, all starting at cycle 0.

    streams: with `topology` one a pipeline stage (all units of a stage run it); without, one a unit of a group that
    sits on one card. mode: documented or silicon, the machine's own by default. jit: force or forbid the compiled event
    loop (by size if None). contention: whether units share memories and links; without it the result is a lower bound.
    launch: values of launch registers, one for each rank of a group. repeats: how often every unit runs its stream
    (micro-batches). fold: simulate equal units once, exactly; by default where a topology is given.

    Raises SimulationError (deadlock) naming the first instruction that can never start and whom it waits for.
    """
    machine = machine if mode is None else machine.in_mode(mode)
    given = (streams,) if isinstance(streams, Stream) else tuple(streams)
    if topology is None:
        topology = Topology.on_one_card(machine, [_engines(s, machine) for s in given])
        of_unit = given
    else:
        if len(given) != topology.pipeline:
            raise ValueError(f"{len(given)} streams for {topology.pipeline} pipeline stages")
        of_unit = tuple(given[p.stage] for p in topology.places)
        fold = True if fold is None else fold
    program = _Program(machine, topology, of_unit, launch or {}, routine, repeats, bool(fold))
    flat, costs, number = program.flat, program.costs, program.number
    queue_start, queue = _queues(flat, len(flat.streams))
    rates = Rates(
        np.array([c.fixed for c in costs]),
        np.array([c.work for c in costs]),
        np.array([c.demand for c in costs]),
        np.array([c.vector for c in costs], np.bool_),
        np.array([c.wait for c in costs], np.bool_),
    )
    times = execute(
        len(flat.streams), queue_start, queue, flat.need, number, rates, program.resources(contention),
        program.wakes, jit,
    )  # fmt: skip
    result = TimingResult(
        machine, flat, costs, number, times.start, times.ready, times.finish, times.cause, times.waker, times.lost,
        topology, program.classes, program.load(),
    )  # fmt: skip
    if times.completed < len(flat):
        _deadlock(result, queue_start, queue, program.wakes)
    return result


def _engines(stream: Stream, machine: Machine) -> int:
    """PEs of a unit."""
    return max(1, stream.slices // machine.slices_per_pe)


Row = tuple[int, int, int]  # cost row of (class, identity of an instruction, site or -1)


@dataclass
class _Program:
    """Everything the event loop needs. uses: for every cost, resource -> (amount of its whole class, its own)."""

    machine: Machine
    topology: Topology
    streams: Sequence[Stream]  # by unit
    launch: Launch
    routine: int
    repeats: int
    fold: bool
    costs: list[Cost] = field(default_factory=list[Cost])
    uses: list[dict[int, tuple[float, float]]] = field(default_factory=list[dict[int, tuple[float, float]]])

    def __post_init__(self) -> None:
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
            engines = _engines(self.streams[unit], self.machine)
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
        resources: dict[Hashable, tuple[Hashable, int]] = {}
        for card in sorted({p.card for p in self.topology.places}):
            for kind in (HBM, CARD_OUT, CARD_IN):
                resources[kind, card] = (kind, -1)
        for unit in range(len(self.topology)):
            for kind in (DM, OUT, IN, _SEMAPHORES):
                resources[kind, unit] = (kind, unit)
        if not self.fold:
            return singletons(len(self.topology), list(resources))
        stream_number = {id(s): n for n, s in enumerate(self.streams[::-1])}
        initial: list[Hashable] = [stream_number[id(s)] for s in self.streams]
        incidence: list[list[tuple[Hashable, Hashable, float]]] = []
        for unit, special in enumerate(self.special):
            entries: list[tuple[Hashable, Hashable, float]] = [
                (-1, (kind, self.topology.places[unit].card), 1.0) for kind in (HBM, CARD_OUT, CARD_IN)
            ]
            for key in range(len(special.keys)):
                cost = self.site_cost[unit, key]
                entries.append(((key, "cost", cost.fixed, cost.work), (_SEMAPHORES, unit), 1.0))
                entries += [(key, r, amount) for r, amount in self.taken.get((unit, key), {}).items()]
                for other in self.targets.get((unit, key), ()):
                    way = latency(self.topology, unit, other, self.machine)
                    entries.append(((key, way), (_SEMAPHORES, other), 1.0))
            incidence.append(entries)
        return refine(initial, incidence, resources)

    def _number(self) -> NDArray[np.int64]:
        """Cost row of every executed instruction; fills `costs` and `uses`."""
        number = np.empty(len(self.flat), np.int64)
        starts = [*self.first_row, len(self.flat)]
        rows: dict[Row, int] = {}
        shared: dict[tuple[int, int], int] = {}  # rows that move no data, by instruction and engines
        for c, members in enumerate(self.classes.members):
            stream, special = self.streams[members[0]], self.special[members[0]]
            here = slice(starts[c], starts[c + 1])
            offsets = np.cumsum([0, *(len(r.instructions) for r in stream.routines)])
            table = np.full(int(offsets[-1]), -1, np.int64)
            used = np.unique(offsets[self.flat.routine[here]] + self.flat.index[here])
            engines = _engines(stream, self.machine)
            for position in used.tolist():
                r = int(np.searchsorted(offsets, position, side="right")) - 1
                instruction = stream.routines[r].instructions[position - int(offsets[r])]
                table[position] = self._row(instruction, c, members, engines, rows, shared)
            number[here] = table[offsets[self.flat.routine[here]] + self.flat.index[here]]
            if len(special.rows):
                sites = [self._site_row(c, members, key) for key in range(len(special.keys))]
                number[special.rows + starts[c]] = np.array(sites, np.int64)[special.key]
        return number

    def _row(
        self,
        instruction: Instruction,
        c: int,
        members: Sequence[int],
        engines: int,
        rows: dict[Row, int],
        shared: dict[tuple[int, int], int],
    ) -> int:
        what = instruction.what
        assert not isinstance(what, Call)
        name = (c, id(instruction), -1)
        if name in rows:
            return rows[name]
        if not isinstance(what, Dma):
            if (id(instruction), engines) not in shared:
                shared[id(instruction), engines] = self._add(
                    cost_of(what, instruction.context, self.machine, engines), {}
                )
            return shared[id(instruction), engines]
        if what.source.space.is_peer or what.destination.space.is_peer:
            return -1  # `_site_row`
        unit = members[0]
        cost = cost_of(what, instruction.context, self.machine, engines)
        taken = uses_of(what, cost, unit, None, self.topology, self.machine)
        card = self.topology.places[unit].card
        beside = sum(self.topology.places[m].card == card for m in members)
        amounts = {self.classes.of_resource[r]: (x * beside if r[0] == HBM else x, x) for r, x in taken.items()}
        rows[name] = self._add(cost, amounts)
        return rows[name]

    def _site_row(self, c: int, members: Sequence[int], key: int) -> int:
        """A site's row: what all units of the class take of one resource of each colour."""
        unit = members[0]
        total: dict[Resource, float] = defaultdict(float)
        for member in members:
            for resource, amount in self.taken.get((member, key), {}).items():
                total[resource] += amount
        amounts: dict[int, tuple[float, float]] = {}
        for resource, amount in self.taken.get((unit, key), {}).items():
            colour = self.classes.of_resource[resource]
            own = amounts.get(colour, (0.0, 0.0))[1] + amount
            amounts[colour] = (total[resource], own)
        return self._add(self.site_cost[unit, key], amounts)

    def _add(self, cost: Cost, uses: dict[int, tuple[float, float]]) -> int:
        self.costs.append(cost)
        self.uses.append(uses)
        return len(self.costs) - 1

    def resources(self, contention: bool) -> Resources:
        """What the costs use, per byte of what they want of their first resource.

        DM ports cannot hold back a unit's own transfers, which come one at a time: they count only if there are peers.
        """
        colours = 1 + max(self.classes.of_resource.values(), default=-1)
        capacity, kinds = np.zeros(colours), np.zeros(colours, np.int64)
        for resource, colour in self.classes.of_resource.items():
            kind, owner = resource  # type: ignore[misc]
            if kind != _SEMAPHORES:
                engines = _engines(self.streams[owner], self.machine) if kind in (DM, OUT, IN) else 1
                capacity[colour] = capacity_of((kind, owner), engines, self.machine)
                kinds[colour] = KIND_OF[kind]
        peers = bool(self.flows)
        starts, resource, weight = [0], [], []
        for cost, uses in zip(self.costs, self.uses, strict=True):
            for colour, (amount, _) in uses.items() if contention else ():
                if peers or kinds[colour] == KIND_OF[HBM]:
                    resource.append(colour)
                    weight.append(amount / cost.demand)
            starts.append(len(resource))
        return Resources(
            np.array(starts, np.int64), np.array(resource, np.int64), np.array(weight, np.float64), capacity, kinds
        )

    def load(self) -> dict[Resource, float]:
        """Bytes that went through every resource of the represented units and their cards."""
        times = np.bincount(self.number, minlength=len(self.costs))
        by_colour: dict[int, float] = defaultdict(float)
        for row, uses in enumerate(self.uses):
            for colour, (amount, _) in uses.items():
                by_colour[colour] += amount * self.costs[row].work * float(times[row])
        return {
            resource: by_colour.get(colour, 0.0)
            for resource, colour in self.classes.of_resource.items()
            if resource[0] != _SEMAPHORES  # type: ignore[index]
        }  # type: ignore[return-value]


_SEMAPHORES = 6  # a unit's semaphores, beside the kinds of `traffic`


def _queues(flat: Flat, units: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Instructions of queue 3 * unit + context, in program order, one queue after the other."""
    key = flat.unit * 3 + flat.context
    if len(flat) and int(flat.context.max()) > int(Context.DMA):
        bad = int(np.argmax(flat.context > int(Context.DMA)))
        raise SimulationError(
            SimulationError.ILLEGAL, "an instruction in the control context is not a call", site=flat.site(bad)
        )
    queue = np.argsort(key, kind="stable")
    start = np.searchsorted(key[queue], np.arange(3 * units + 1))
    return start.astype(np.int64), queue.astype(np.int64)


def _deadlock(result: TimingResult, queue_start: NDArray[np.int64], queue: NDArray[np.int64], notifies: Wakes) -> None:
    """Raise the error that says of every unit what stands at the head of its contexts and what that waits for."""
    flat, finish = result.flat, result.finish
    senders = np.repeat(np.arange(len(flat)), np.diff(notifies.start))
    heads: list[str] = []
    first: int | None = None
    for q in range(len(queue_start) - 1):
        own = queue[queue_start[q] : queue_start[q + 1]]
        blocked = own[finish[own] < 0.0]
        if not len(blocked):
            continue
        i = int(blocked[0])
        first = i if first is None else first
        head = f"{Context(q % 3).name.lower()} head {flat.site(i)}"
        if len(flat.streams) > 1 or len(result.topology) > 1:
            head = f"{result.unit_name(q // 3)}: {head}"
        lacking = senders[notifies.wait == i]
        lacking = lacking[finish[lacking] < 0.0]
        if len(lacking) and result.costs[int(result.number[i])].wait:
            by = [f"{result.unit_name(int(flat.unit[s]))} at {flat.site(int(s))}" for s in lacking[:4].tolist()]
            heads.append(f"{head} waits for the notify of " + " and ".join(by))
        else:
            heads.append(f"{head} waits for counts {flat.need[i].tolist()}")
    raise SimulationError(
        SimulationError.DEADLOCK,
        "; ".join(heads),
        "a wait refers to an instruction that comes later",
        flat.site(first) if first is not None else None,
    )
