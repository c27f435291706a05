"""A stream as every unit of a group runs it: calls followed, registers resolved, reduced to what other units can see.

What is kept: notifies, waits, transfers with a peer side, and every access of a unit to bytes of its own memory that
some unit of the group reads or writes through a peer side. Such bytes are numbered as *cells*: pieces that every peer
side touches as a whole or not at all.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from backend_rngd.isa.cells import Grid, Piece, peer_pieces, reach, sides
from backend_rngd.isa.descriptors import (
    Call,
    Context,
    Dma,
    Endpoint,
    Exec,
    LoadTrf,
    LoadVrf,
    Memset,
    Notify,
    Routine,
    Space,
    Stream,
    Wait,
)
from backend_rngd.isa.footprint import Access
from backend_rngd.isa.hazards import CONTEXTS, Hazards
from backend_rngd.isa.peers import notified

INDEX_BYTES = 4
Registers = Mapping[int, tuple[int, ...]]


@dataclass(frozen=True)
class Visit:
    """What one unit touches with one access: the same cells of the memories of `units`."""

    units: tuple[int, ...]
    cells: tuple[int, ...]
    write: bool


@dataclass(frozen=True)
class Item:
    """An instruction that other units can notice, in one chunk.

    Positions count instructions of the DMA context from the start of the chunk. It starts after `low` of them are
    complete and is complete before number `high` starts; a DMA instruction itself is number `low`. targets: units that
    a notify raises, by executing unit. visits: by executing unit.
    """

    routine: int
    index: int
    low: int
    high: int
    sync: Notify | Wait | None
    targets: tuple[tuple[int, ...], ...]
    visits: tuple[tuple[Visit, ...], ...]


@dataclass(frozen=True)
class Chunk:
    """A call made by the entry, or instructions of the entry between two calls: everything before is complete."""

    items: tuple[Item, ...]
    transfers: int  # instructions of the DMA context


@dataclass(frozen=True)
class _Step:
    """An instruction in its stretch between calls, positions counted from the start of the stretch."""

    index: int
    at: int
    low: int
    high: int


@dataclass
class _Stretch:
    steps: list[_Step]
    transfers: int  # instructions of the DMA context
    call: Call | None  # made behind it


def synchronises(stream: Stream) -> bool:
    """Whether a stream has anything to do with other units, in what its entry reaches (routines that hand activations
    to another pipeline stage are there in every stream)."""
    reached = [0]
    for number in reached:
        for i in stream.routines[number].instructions:
            what = i.what
            if isinstance(what, (Notify, Wait)):
                return True
            if isinstance(what, Dma) and (what.source.space.is_peer or what.destination.space.is_peer):
                return True
            if isinstance(what, Call) and what.routine not in reached:
                reached.append(what.routine)
    return False


class Expansion:
    """Chunks of a stream for the units of one group.

    Units are numbered over all pipeline stages: stage * units + rank. After the constructor, `pieces` says what peer
    sides touch; `expand` needs a grid of the pieces of all stages.
    """

    def __init__(
        self,
        stream: Stream,
        units: int,
        registers: Registers,
        footprints: Sequence[Sequence[Sequence[Access]]],
        stage: int = 0,
        stages: int = 1,
    ) -> None:
        """registers: values at the entry, by rank. footprints: of every instruction, launch values included."""
        self.stream = stream
        self.units = units
        self.stage = stage
        self.stages = stages
        self.chunks: list[Chunk] = []
        self.missing: set[tuple[int, int]] = set()  # (routine, index) of instructions that name an absent stage
        self._footprints = footprints
        self._everything = [_stretches(r, f) for r, f in zip(stream.routines, footprints, strict=True)]
        self._ranks = tuple(range(units))
        self._entry = registers
        self.outside = frozenset[int]() if stages > 1 else self._outside()
        self._own: dict[tuple[int, int], list[tuple[tuple[int, ...], bool]]] = {}
        # Transfers that others can notice only through own HBM: register, first byte and end of those sides.
        self._hbm_only: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
        self._items: dict[tuple[int, int, int, int, tuple[tuple[int, ...], ...]], Item | None] = {}
        self.pieces: set[Piece] = set()
        self._stretches = [self._kept(number, self._with_peers) for number in range(len(self._everything))]
        self._walk(0, registers, 0, self._collect)

    def expand(self, grid: Grid) -> None:
        """Fill `chunks`."""
        self.grid = grid
        self._stretches = [self._kept(number, self._noticed) for number in range(len(self._everything))]
        self.chunks = self._chunks(self._entry)

    def known(self, unit: int) -> int | None:
        """The number over all stages of a unit as the group numbers it; None if that stage is not there."""
        group, rank = divmod(unit, self.units)
        stage = self.stage + (0, 1, -1)[group]
        return stage * self.units + rank if 0 <= stage < self.stages else None

    def _outside(self) -> frozenset[int]:
        """Semaphores that units of other pipeline stages notify: the same ones that this stream notifies of others."""
        return frozenset(
            i.what.semaphore
            for routine in self.stream.routines
            for i in routine.instructions
            if isinstance(i.what, Notify)
            and any(unit >= self.units for v in self._entry.get(i.what.register, ()) for unit in notified(i.what, v))
        )

    def _collect(self, number: int, step: _Step, registers: Registers) -> None:
        """Note the bytes of the peer sides of a transfer, for every rank."""
        what = self.stream.routines[number].instructions[step.index].what
        assert isinstance(what, Dma)
        for endpoint, loops, _ in sides(what):
            if endpoint.space.is_peer:
                for value in set(registers[endpoint.register]):
                    for unit, piece in peer_pieces(endpoint, loops, what.packet, value, 3 * self.units):
                        if self.known(unit) is None:
                            self.missing.add((number, step.index))
                        else:
                            self.pieces.add(piece)

    def _kept(self, number: int, wanted: Callable[[int, int], bool]) -> list[_Stretch]:
        return [
            _Stretch([step for step in stretch.steps if wanted(number, step.index)], stretch.transfers, stretch.call)
            for stretch in self._everything[number]
        ]

    def _with_peers(self, number: int, index: int) -> bool:
        what = self.stream.routines[number].instructions[index].what
        return isinstance(what, Dma) and (what.source.space.is_peer or what.destination.space.is_peer)

    def _noticed(self, number: int, index: int) -> bool:
        """Whether other units can notice an instruction, for some values of registers."""
        what = self.stream.routines[number].instructions[index].what
        if isinstance(what, (Notify, Wait)) or self._with_peers(number, index):
            return True
        if isinstance(what, Dma) and self.grid.count > self.grid.dm_cells:
            hbm = [(e.register, *reach(e, loops, what.packet)) for e, loops, _ in sides(what) if e.space == Space.HBM]
            if self._own_cells(number, index):
                return True
            if hbm and what.index is None:
                self._hbm_only[number, index] = hbm
            return bool(hbm)
        return bool(self._own_cells(number, index))

    def _own_cells(self, number: int, index: int) -> list[tuple[tuple[int, ...], bool]]:
        """Cells of the own DM that an instruction touches, and whether it writes them."""
        found = self._own.get((number, index))
        if found is None:
            found = self._own[number, index] = []
            what = self.stream.routines[number].instructions[index].what
            if isinstance(what, Dma):
                for endpoint, loops, write in sides(what):
                    if endpoint.space == Space.DM and (cells := self.grid.own_cells(endpoint, loops, what.packet)):
                        found.append((cells, write))
            else:
                slices = (0, cast("Exec | LoadTrf | LoadVrf | Memset", what).slices)
                for access in self._footprints[number][index]:
                    if access.space == "dm" and (cells := self.grid.cells(Piece(False, slices, access.intervals))):
                        found.append((cells, access.write))
        return found

    def _walk(self, number: int, registers: Registers, at: int, visit: Callable[[int, _Step, Registers], None]) -> int:
        """Visit the instructions of a routine and of its callees in order; the position behind it."""
        for stretch in self._stretches[number]:
            for step in stretch.steps:
                visit(number, _Step(step.index, step.at + at, step.low + at, step.high + at), registers)
            at += stretch.transfers
            if stretch.call is not None:
                at = self._walk(stretch.call.routine, moved(stretch.call, registers), at, visit)
        return at

    def _chunks(self, registers: Registers) -> list[Chunk]:
        out: list[Chunk] = []
        for stretch in self._stretches[0]:
            items: list[Item] = []

            def keep(number: int, step: _Step, values: Registers, items: list[Item] = items) -> None:
                item = self._item(number, step, values)
                if item is not None:
                    items.append(item)

            for step in stretch.steps:
                keep(0, step, registers)
            out.append(Chunk(tuple(items), stretch.transfers))
            if stretch.call is not None:
                items.clear()
                inside = moved(stretch.call, registers)
                count = self._walk(stretch.call.routine, inside, 0, keep)
                out.append(Chunk(tuple(items), count))
        return [chunk for chunk in out if chunk.transfers or chunk.items]

    def _item(self, number: int, step: _Step, registers: Registers) -> Item | None:
        hbm = self._hbm_only.get((number, step.index))
        if hbm is not None and not any(
            self.grid.in_hbm(min(registers[register]) + low, max(registers[register]) + high)
            for register, low, high in hbm
        ):
            return None  # the usual case: weights
        what = self.stream.routines[number].instructions[step.index].what
        used: tuple[tuple[int, ...], ...] = ()
        if isinstance(what, Notify):
            used = (registers[what.register],)
        elif isinstance(what, Dma):
            index = what.index.register if what.index is not None else 0
            used = (registers[what.source.register], registers[what.destination.register], registers[index])
        key = (number, step.index, step.low, step.high, used)
        if key not in self._items:
            self._items[key] = self._new_item(number, step, used)
        return self._items[key]

    def _new_item(self, number: int, step: _Step, used: tuple[tuple[int, ...], ...]) -> Item | None:
        what = self.stream.routines[number].instructions[step.index].what
        targets: tuple[tuple[int, ...], ...] = ()
        visits: tuple[tuple[Visit, ...], ...] = ()
        if isinstance(what, Notify):
            targets = tuple(self._targets(number, step.index, what, used[0][rank], rank) for rank in self._ranks)
        elif isinstance(what, Dma):
            idle: set[tuple[int, ...]] = set()  # registers with which it touches nothing that counts, on any unit
            every: list[tuple[Visit, ...]] = []
            for rank, found in enumerate(zip(*used, strict=True)):
                every.append(() if found in idle else self._transfer(what, found, rank))
                if not every[-1]:
                    idle.add(found)
            visits = tuple(every)
        elif not isinstance(what, Wait):
            found = self._own_cells(number, step.index)
            first = self.stage * self.units
            visits = tuple(tuple(Visit((first + r,), cells, write) for cells, write in found) for r in self._ranks)
        sync = what if isinstance(what, (Notify, Wait)) else None
        if sync is None and not any(visits):
            return None
        return Item(number, step.index, step.low, step.high, sync, targets, visits)

    def _targets(self, number: int, index: int, desc: Notify, value: int, rank: int) -> tuple[int, ...]:
        """Units that a notify of a unit raises; value: contents of its register."""
        out: list[int] = []
        for unit in notified(desc, value, rank):
            found = self.known(unit)
            if found is None:
                self.missing.add((number, index))
            else:
                out.append(found)
        return tuple(out)

    def _transfer(self, desc: Dma, registers: tuple[int, ...], rank: int) -> tuple[Visit, ...]:
        """Cells touched by a transfer of a unit; registers: values for source, destination and index."""
        out: list[Visit] = []
        if desc.index is not None:
            steps = [(n, step) for (n, _, _), step in zip(desc.loops, desc.index.strides, strict=True)]
            place = Endpoint(Space.HBM, desc.index.base)
            if cells := self.grid.own_cells(place, steps, INDEX_BYTES, registers[2]):
                out.append(Visit((self.stage * self.units + rank,), cells, False))
        for (endpoint, loops, write), value in zip(sides(desc), registers, strict=False):
            if not endpoint.space.is_peer:
                if cells := self.grid.own_cells(endpoint, loops, desc.packet, value):
                    out.append(Visit((self.stage * self.units + rank,), cells, write))
                continue
            by_cells: dict[tuple[int, ...], list[int]] = {}
            for unit, piece in peer_pieces(endpoint, loops, desc.packet, value, 3 * self.units):
                found = self.known(unit)
                if found is not None:
                    by_cells.setdefault(self.grid.cells(piece), []).append(found)
            out += [Visit(tuple(units), cells, write) for cells, units in by_cells.items()]
        return tuple(out)


def moved(call: Call, registers: Registers) -> Registers:
    """Registers of a callee."""
    inside = dict(registers)
    for target, source, immediate in call.moves:
        inside[target] = tuple(value + immediate for value in registers[source])
    return inside


def _stretches(routine: Routine, touched: Sequence[Sequence[Access]]) -> list[_Stretch]:
    """Instructions between calls, with what the DMA context has certainly done before each and after each."""
    hazards = Hazards(touched)
    out: list[_Stretch] = []
    steps: list[tuple[int, Context, int, int, int]] = []  # index, context, its number there, transfers before, low
    knows: list[tuple[int, int, int]] = []  # instructions of each context complete when a transfer starts
    start = 0

    def close(call: Call | None) -> None:
        found: list[_Step] = []
        for index, context, count, at, low in steps:
            if context == Context.DMA:
                found.append(_Step(index, at, at, at))
            else:
                high = bisect.bisect_left(knows, count, key=lambda k: k[context])
                found.append(_Step(index, at, low, high))
        out.append(_Stretch(found, len(knows), call))

    for index, instruction in enumerate(routine.instructions):
        if isinstance(instruction.what, Call):
            close(instruction.what)
            steps, knows = [], []
            hazards.barrier()
            start = hazards.issued[Context.DMA]
            continue
        context, after = instruction.context, instruction.after
        if context not in CONTEXTS:
            continue
        given = (after.main, after.sub, after.dma)
        known = hazards.implied(context, given)
        steps.append((index, context, hazards.issued[context] + 1, len(knows), max(known[Context.DMA] - start, 0)))
        if context == Context.DMA:
            knows.append(known)
        hazards.issue(context, touched[index], given)
    close(None)
    return out
