"""What the instructions that reach other units ask of the machine: who talks to whom, and which resources that takes.

A *site* is an instruction of a stream together with what its address registers hold, written as a launch register plus
an offset; units of a group differ only in the values of launch registers. `Traffic` says for every unit and site which
units it names; `uses` what a transfer takes of every resource, in bytes a cycle at full speed.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from backend_rngd.isa.descriptors import UNIT_STRIDE, Call, Descriptor, Dma, Notify, Space, Stream, Wait
from backend_rngd.isa.peers import notified, split_unit_stride
from backend_rngd.machine import Machine
from backend_rngd.machine.address_map import HbmUse
from backend_rngd.machine.formulas import Reach, dma_work, slices_at_once, slices_touched
from runtime_sim.costs import Cost
from runtime_sim.errors import SimulationError, Site
from runtime_sim.flatten import CallSite, Unrolled, layer_of
from runtime_sim.topology import Distance, Topology

Launch = Mapping[int, Sequence[int]]
HBM, DM, OUT, IN, CARD_OUT, CARD_IN, CHANNEL, BANKS = range(8)
KIND_OF = (0, 1, 2, 2, 3, 3, 0, 1)  # of contention: HBM, DM port, link between clusters, link between cards
Resource = tuple[int, int]  # one of the above, and a card (HBM, CHANNEL, CARD_*) or a unit (DM, OUT, IN, BANKS)


class Value(NamedTuple):
    """Contents of a register: what a launch register holds, plus an offset."""

    root: int
    offset: int

    def on(self, launch: Launch, rank: int) -> int:
        """The number in the unit of a rank."""
        values = launch.get(self.root)
        return self.offset + (int(values[rank]) if values is not None else 0)


@dataclass(frozen=True)
class SiteKey:
    """An instruction and the values of its address registers (source and destination; of a notify only the first)."""

    routine: int
    index: int
    values: tuple[Value, Value]


class Special:
    """The executed instructions of one stream that involve other units.

    rows: their positions in the unrolled stream. keys, key: distinct sites and the number of each row's site.
    """

    def __init__(self, stream: Stream, unrolled: Unrolled) -> None:
        self.stream = stream
        table, calls = unrolled
        offsets = np.cumsum([0, *(len(r.instructions) for r in stream.routines)])
        special = np.array(
            [_is_special(x.what) for routine in stream.routines for x in routine.instructions] or [False], np.bool_
        )
        self.rows: NDArray[np.int64] = np.nonzero(special[offsets[table[:, 1]] + table[:, 2]])[0]
        registers: dict[int, dict[int, Value]] = {}
        numbers: dict[SiteKey, int] = {}
        key: list[int] = []
        for row in self.rows.tolist():
            routine, index, call = (int(x) for x in table[row, 1:4])
            inside = registers_of_call(stream, calls, call, registers)
            what = stream.routines[routine].instructions[index].what
            values = tuple(inside.get(r, Value(r, 0)) for r in _address_registers(what))
            site = SiteKey(routine, index, (values[0], values[1]))
            key.append(numbers.setdefault(site, len(numbers)))
        self.keys = list(numbers)
        self._calls, self._call = calls, table[self.rows, 3]
        self.key: NDArray[np.int64] = np.array(key, np.int64)

    def what(self, key: int) -> Descriptor:
        """The instruction of a site."""
        site = self.keys[key]
        return self.stream.routines[site.routine].instructions[site.index].what

    def site(self, key: int) -> Site:
        """Where it stands, in the first layer that executes it."""
        routine = self.stream.routines[self.keys[key].routine]
        index = self.keys[key].index
        layer = layer_of(self.stream, self._calls, int(self._call[int(np.argmax(self.key == key))]))
        return Site(routine.name, index, self.stream.locations[routine.instructions[index].location], layer)

    @cached_property
    def waits(self) -> list[tuple[int, Wait]]:
        """(row, instruction) of every executed wait, in order."""
        out: list[tuple[int, Wait]] = []
        for row, key in zip(self.rows.tolist(), self.key.tolist(), strict=True):
            what = self.what(key)
            if isinstance(what, Wait):
                out.append((row, what))
        return out


def _is_special(what: Descriptor) -> bool:
    if isinstance(what, Dma):
        return what.source.space.is_peer or what.destination.space.is_peer
    return isinstance(what, Notify | Wait)


def _address_registers(what: Descriptor) -> tuple[int, int]:
    if isinstance(what, Dma):
        sides = (what.source, what.destination)
        return tuple(s.register if s.space.is_peer else 0 for s in sides)  # type: ignore[return-value]
    return (what.register, 0) if isinstance(what, Notify) else (0, 0)


def registers_of_call(
    stream: Stream, calls: Sequence[CallSite], call: int, known: dict[int, dict[int, Value]]
) -> dict[int, Value]:
    """Registers inside a call that differ from what they held at the start of the program."""
    if call not in known:
        site = calls[call]
        if site.parent < 0:
            known[call] = {}
        else:
            outside = registers_of_call(stream, calls, site.parent, known)
            what = stream.routines[calls[site.parent].routine].instructions[site.index].what
            assert isinstance(what, Call)
            inside = dict(outside)
            for target, source, immediate in what.moves:
                root, offset = outside.get(source, Value(source, 0))
                inside[target] = Value(root, offset + immediate)
            known[call] = inside
    return known[call]


@dataclass(frozen=True)
class Flow:
    """A transfer of one unit. pairs: (unit read, unit written, share of the bytes)."""

    pairs: tuple[tuple[int, int, float], ...]
    reach: Reach


class Traffic:
    """Who a unit's sites name, for the units of a topology."""

    def __init__(self, topology: Topology, launch: Launch) -> None:
        self.topology = topology
        self.launch = launch

    def flow(self, unit: int, special: Special, key: int) -> Flow:
        """Units between which a transfer moves data. Raises SimulationError for units that cannot be reached so."""
        what = special.what(key)
        assert isinstance(what, Dma)
        rank = self.topology.places[unit].rank
        first = [
            (v.on(self.launch, rank) + side.base) // UNIT_STRIDE if side.space.is_peer else None
            for side, v in zip((what.source, what.destination), special.keys[key].values, strict=True)
        ]
        steps = [
            [(i * split_unit_stride(a)[0], i * split_unit_stride(b)[0]) for i in range(n)]
            for n, a, b in what.loops
            if (what.source.space.is_peer and split_unit_stride(a)[0])
            or (what.destination.space.is_peer and split_unit_stride(b)[0])
        ]
        total: dict[tuple[int, int], int] = {}
        for combination in itertools.product(*steps):
            pair = [
                unit if base is None else self._unit(unit, base + sum(step[side] for step in combination), special, key)
                for side, base in enumerate(first)
            ]
            total[pair[0], pair[1]] = total.get((pair[0], pair[1]), 0) + 1
        whole = sum(total.values())
        shares = [0.0] * len(Distance)
        for (a, b), times in total.items():
            far = max(self.topology.distance(unit, a), self.topology.distance(unit, b))
            for other, side in ((a, what.source), (b, what.destination)):
                if side.space is Space.PEER_DM and self.topology.distance(unit, other) is Distance.CARD:
                    text = f"the data memory of {self.topology.describe(other)} is read or written from another card"
                    raise SimulationError(
                        SimulationError.ILLEGAL, text, "cards reach each other's HBM only", special.site(key)
                    )
            shares[far] += times / whole
        pairs = tuple((a, b, times / whole) for (a, b), times in sorted(total.items()))
        return Flow(pairs, Reach(*shares))

    def notified(self, unit: int, special: Special, key: int) -> tuple[int, ...]:
        """Units that a notify raises, one entry for each addition."""
        what = special.what(key)
        assert isinstance(what, Notify)
        place = self.topology.places[unit]
        value = special.keys[key].values[0].on(self.launch, place.rank)
        logical = notified(what, value, place.rank)
        return tuple(self._unit(unit, other, special, key) for other in logical)

    def _unit(self, unit: int, logical: int, special: Special, key: int) -> int:
        try:
            return self.topology.resolve(unit, logical)
        except SimulationError as error:
            raise error.at(special.site(key)) from None


def uses(
    what: Dma, cost: Cost, unit: int, flow: Flow | None, topology: Topology, machine: Machine
) -> dict[Resource, float]:
    """Bytes a cycle that a transfer takes of every resource at full speed, its limiting memory first."""
    if cost.work <= 0.0:
        return {}
    work = dma_work(what, machine)
    line = machine.hbm_line_bytes
    out: dict[Resource, float] = {}
    card = topology.places[unit].card

    def add(kind: int, where: int, amount: float) -> None:
        if amount:
            out[kind, where] = out.get((kind, where), 0.0) + amount / cost.work

    def add_banks() -> None:
        """Of one slice of the own data memory, where passes of the unit come first."""
        pes = max(1, slices_touched(what) // machine.slices_per_pe)
        for side, column in ((what.source, 1), (what.destination, 2)):
            if side.space is Space.DM:
                beside = pes * slices_at_once(tuple((n[0], n[column]) for n in what.loops), what.packet, machine)
                most = machine.dm_banks * machine.dm_bank_bytes * cost.work  # while one slice hands over to the next
                add(BANKS, unit, min(cost.moved_bytes / beside, most) if beside else 0.0)

    def add_hbm(where: int, share: float, side: HbmUse | None) -> None:
        if side is not None:
            add(HBM, where, share * side.lines * line)
            add(CHANNEL, where, share * side.held * line)

    if flow is None:
        add_hbm(card, 1.0, work.read)
        add_hbm(card, 1.0, work.write)
        add(DM, unit, cost.moved_bytes * sum(s.space is Space.DM for s in (what.source, what.destination)))
        add_banks()
        return out
    hbm = [s.space in (Space.HBM, Space.PEER_HBM) for s in (what.source, what.destination)]
    for a, b, share in flow.pairs:
        for side, holder, use in ((0, a, work.read), (1, b, work.write)):
            if hbm[side]:
                add_hbm(topology.places[holder].card, share, use)
    for a, b, share in flow.pairs:
        moved = share * cost.moved_bytes
        for side, holder in ((0, a), (1, b)):
            if not hbm[side]:
                add(DM, holder, moved)
        source, target = topology.places[a].card, topology.places[b].card
        if source != target:
            add(CARD_OUT, source, moved)
            add(CARD_IN, target, moved)
            continue
        # HBM is equally far from both clusters: what counts is where the data memory and the engine are.
        start, end = (unit if hbm[0] else a), (unit if hbm[1] else b)
        if topology.distance(start, end) is Distance.CHIP:
            add(OUT, start, moved)
            add(IN, end, moved)
    add_banks()
    return out


def capacity(resource: Resource, engines: int, machine: Machine) -> float:
    """Bytes a cycle of a resource; `engines`: DMA engines of the unit whose port it is."""
    kind = resource[0]
    if kind in (HBM, CHANNEL):
        return machine.hbm_bytes_per_cycle * machine.hbm_efficiency
    if kind == BANKS:
        return machine.dm_banks * machine.dm_bank_bytes * (1.0 + 1e-9)
    if kind in (CARD_OUT, CARD_IN):
        return machine.pcie_peer_bytes_per_cycle * (1.0 + 1e-9)
    per_engine = machine.dm_port_bytes_per_cycle if kind == DM else machine.dm_cross_cluster_bytes_per_cycle
    # One transfer alone may take exactly this much; rounding must not count as contention.
    return per_engine * engines * (1.0 + 1e-9)
