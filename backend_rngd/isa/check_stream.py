"""Legality of whole streams: control flow, registers, memory map, waits and races.

The race check walks every routine in program order and asks, for every instruction, which earlier instructions of other
contexts touch the same bytes; `after` must cover them (directly or through what those waited for) and must not say
more. What several units do to each other is looked at in `check_units`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from backend_rngd.isa.check_memory import MemoryCheck, Ranges, check_ranges
from backend_rngd.isa.check_one import check
from backend_rngd.isa.check_units import check_units
from backend_rngd.isa.descriptors import (
    After,
    Call,
    Commit,
    Context,
    Dma,
    Dtype,
    Exec,
    Fetch,
    Instruction,
    LoadTrf,
    LoadVrf,
    Memset,
    Notify,
    Routine,
    Space,
    Stream,
    Wait,
)
from backend_rngd.isa.early import EarlyBytes, may_start_early, written
from backend_rngd.isa.expand import synchronises
from backend_rngd.isa.footprint import NO_LAUNCH, Access, Interval, Launch, footprint, slice_range, within_unit
from backend_rngd.isa.hazards import CONTEXTS, Hazards
from backend_rngd.isa.rules import Violation
from backend_rngd.isa.shape import access_bytes
from backend_rngd.machine import Machine

HOST_REGISTERS = range(1, 8)  # set by the host at launch (batch rows of caches); register 0 is zero
NO_WAIT = After()


@dataclass(frozen=True)
class BufferSpan:
    """A DM buffer: `nbytes` of every slice at `address`, alive for instructions first..last of routine `routine`.

    routine -1: alive everywhere.
    """

    routine: int
    first: int
    last: int
    address: int
    nbytes: int
    name: str = ""


def errors(violations: Iterable[Violation]) -> list[Violation]:
    """Violations that are not warnings."""
    return [v for v in violations if v.severity == "error"]


@dataclass
class _Place:
    """Reports violations of one instruction."""

    out: list[Violation]
    stream: Stream
    routine: str = ""
    index: int = -1
    location: str = ""

    def at(self, routine: Routine, index: int) -> _Place:
        instruction = routine.instructions[index]
        known = 0 <= instruction.location < len(self.stream.locations)
        location = self.stream.locations[instruction.location] if known else ""
        return _Place(self.out, self.stream, routine.name, index, location)

    def add(self, rule: str, message: str) -> None:
        self.out.append(Violation(rule, message, self.routine, self.index, self.location))


def check_stream(
    stream: Stream,
    machine: Machine,
    hbm_regions: Sequence[tuple[int, int]] | None = None,
    host_registers: Iterable[int] = HOST_REGISTERS,
    buffers: Sequence[BufferSpan] | None = None,
    launch: Launch = NO_LAUNCH,
    runs: int = 1,
) -> list[Violation]:
    """Every broken rule of a stream, warnings included (see `errors`).

    Waits, registers and the memory map are looked at once every instruction alone is legal.
    hbm_regions: (address, bytes) of the buffers of the memory map; None leaves HBM bounds to the card's size.
    host_registers: registers that the host sets before the entry (row registers of caches).
    buffers: where DM buffers lie and when they live; with them every DM access must stay inside one that is alive.
    launch: launch registers with their value in every unit of the group; all units run this stream.
    runs: 2 if a unit may start the next run of the stream before others have finished this one.
    """
    out: list[Violation] = []
    place = _Place(out, stream)
    _check_header(stream, machine, place)
    _check_launch(launch, frozenset(host_registers), machine, place)
    if out:
        return out
    order = _check_calls(stream, place)
    for routine in stream.routines:
        for index, instruction in enumerate(routine.instructions):
            where = place.at(routine, index)
            found = check(instruction.what, machine, instruction.context, absolute=True)
            out += [replace(v, routine=where.routine, index=index, location=where.location) for v in found]
    if order is None or errors(out):
        return out  # footprints of illegal instructions mean nothing
    footprints = [[footprint(i.what, launch) for i in r.instructions] for r in stream.routines]
    stashes = any(_stashes(i) for r in stream.routines for i in r.instructions)
    early = [
        interval
        for routine, touched in zip(stream.routines, footprints, strict=True)
        for instruction, accesses in zip(routine.instructions, touched, strict=True)
        if not instruction.after.enter
        for interval in written(accesses)
    ]
    for number, (routine, touched) in enumerate(zip(stream.routines, footprints, strict=True)):
        if buffers is not None:
            _check_buffers(number, routine, touched, place, buffers)
        for index, instruction in enumerate(routine.instructions):
            _check_unit(place.at(routine, index), instruction, stream.slices, machine, touched[index], stashes)
        _check_waits(routine, touched, place, early)
        _check_types(routine, touched, place)
    _check_memory(stream, footprints, place, machine, hbm_regions, buffers, frozenset(host_registers), launch, runs)
    return out


def _check_header(stream: Stream, machine: Machine, place: _Place) -> None:
    if stream.slices not in (machine.slices_per_pe, 2 * machine.slices_per_pe, machine.slices_per_cluster):
        place.add("header", f"a unit of {stream.slices} slices")
    if not stream.routines:
        place.add("header", "no routine")
    names = [r.name for r in stream.routines]
    if len(set(names)) != len(names):
        place.add("header", "two routines of one name")
    for routine in stream.routines:
        for index, instruction in enumerate(routine.instructions):
            if not 0 <= instruction.location < len(stream.locations):
                place.at(routine, index).add("header", f"location {instruction.location}")


def _stashes(instruction: Instruction) -> bool:
    what = instruction.what
    return isinstance(what, Exec) and (what.stash_input or any(op.stash for op in what.vector))


def _check_calls(stream: Stream, place: _Place) -> list[int] | None:
    """Routines with callers first, or None if calls make no sense."""
    broken = len(place.out)
    callees: list[list[int]] = []
    for routine in stream.routines:
        found: list[int] = []
        for index, instruction in enumerate(routine.instructions):
            what = instruction.what
            if not isinstance(what, Call):
                continue
            where = place.at(routine, index)
            if instruction.after != NO_WAIT:
                where.add("useless-wait", "a call waits for nothing: the instructions of the routine do")
            if not 0 <= what.routine < len(stream.routines):
                where.add("call", f"routine {what.routine} of {len(stream.routines)}")
            elif not stream.routines[what.routine].instructions:
                where.add("call", f"routine {stream.routines[what.routine].name} is empty")
            else:
                found.append(what.routine)
        callees.append(found)
    state = [0] * len(stream.routines)
    order: list[int] = []

    def visit(i: int) -> bool:
        if state[i] == 1:
            return False
        if state[i] == 0:
            state[i] = 1
            if not all(visit(j) for j in dict.fromkeys(callees[i])):
                return False
            state[i] = 2
            order.append(i)
        return True

    for i in range(len(stream.routines)):
        if not visit(i):
            place.add("call", f"routine {stream.routines[i].name} calls itself")
            return None
    return order[::-1] if len(place.out) == broken else None


def _check_unit(
    where: _Place, instruction: Instruction, slices: int, machine: Machine, touched: Sequence[Access], stashes: bool
) -> None:
    """What depends on the unit or the program: its slices, the stash's part of VRF, bank hits."""
    what = instruction.what
    if isinstance(what, (Exec, LoadTrf, LoadVrf, Memset)) and what.slices > slices:
        where.add("slices", f"{what.slices} slices on a unit of {slices}")
    if isinstance(what, Dma):
        sides = ((what.source, 1), (what.destination, 2))
        for side, column in sides:
            endpoint, loops = within_unit(side, [(loop[0], loop[column]) for loop in what.loops])
            if endpoint.space == Space.DM:
                last = slice_range(endpoint, loops)[1]
                if last > slices:
                    where.add("slices", f"slice {last - 1} of a unit of {slices}")
    if stashes:
        limit = machine.vrf_bytes - machine.vrf_stash_bytes
        if any(a.space == "vrf" and a.high > limit for a in touched):
            where.add("stash-space", f"VRF bytes beyond {limit}")
    if isinstance(what, (Exec, LoadTrf, LoadVrf)):
        hits = bank_hits(what, instruction.context, machine)
        if hits >= machine.dm_starvation_hits:
            where.add("bank-starvation", f"{hits} accesses in a row hit one bank")


def _row_hits(loops: Iterable[tuple[int, int]], row: int) -> int:
    """Consecutive steps (loops inner to outer) that stay on the same bank: strides that are multiples of a row of
    banks."""
    hits = 1
    for size, stride in loops:
        if stride % row:
            break
        hits *= size
    return hits


def bank_hits(what: Exec | LoadTrf | LoadVrf | Memset, context: Context, machine: Machine) -> int:
    """Longest series of accesses of a pass that hit one DM bank."""
    if isinstance(what, Memset):
        return 1
    hits = bank_hits_fetch(what.fetch, machine, context == Context.SUB)
    return max(hits, bank_hits_commit(what.commit, machine)) if isinstance(what, Exec) else hits


def bank_hits_fetch(fetch: Fetch, machine: Machine, sub: bool) -> int:
    """Longest series of accesses of a fetch that hit one DM bank."""
    access = access_bytes(fetch, machine.fetch_sub_bytes if sub else machine.fetch_main_bytes)
    row = machine.dm_banks * machine.dm_bank_bytes
    inner = list(reversed(fetch.loops))
    width = fetch.dtype.bytes
    if inner and inner[0][1] == width:
        if inner[0][0] * width > access:
            return 1
        inner = inner[1:]
    return _row_hits(inner, row)


def bank_hits_commit(commit: Commit, machine: Machine) -> int:
    """Longest series of writes of a commit that hit one DM bank."""
    row = machine.dm_banks * machine.dm_bank_bytes
    inner = list(reversed(commit.loops))
    if inner[0][0] > commit.valid:
        return 1
    return _row_hits(inner[1:], row)


# Waits ---------------------------------------------------------------------------------------------------------------
def _check_waits(
    routine: Routine, touched: Sequence[Sequence[Access]], place: _Place, early: Sequence[Interval]
) -> None:
    """Waits inside a routine; `early`: bytes that transfers of any routine overwrite without waiting for others."""
    hazards = Hazards(touched)
    watch = EarlyBytes(early)

    def check_open(where: _Place) -> None:
        for context in watch.open(hazards):
            where.add("race", f"{context.name.lower()} may still use bytes that the next routine overwrites")

    calls = 0
    seen = [0, 0, 0]
    for index, instruction in enumerate(routine.instructions):
        context, after = instruction.context, instruction.after
        where = place.at(routine, index)
        if isinstance(instruction.what, Call):
            calls += 1
            check_open(where)
            hazards.barrier()
            continue
        if context not in CONTEXTS:
            continue  # reported by the descriptor's check
        given = (after.main, after.sub, after.dma)
        issued = hazards.issued
        if any(not 0 <= n <= have for n, have in zip(given, issued, strict=True)) or given[context]:
            where.add("future", f"waits for {given} of {issued} instructions issued")
            given = (0, 0, 0)
        if not 0 <= after.call <= calls:
            where.add("future", f"waits for {after.call} of {calls} calls")
        elif seen[context] < calls and after.call < calls:
            where.add("race", f"starts before call {calls} is complete")
        elif after.call and seen[context] >= calls:
            where.add("useless-wait", f"waits for call {after.call} again")
        seen[context] = calls
        need = hazards.required(context, touched[index])
        wanted = hazards.unmet(context, need)
        have = hazards.implied(context, given)
        uncovered = [CONTEXTS[d].name.lower() for d in range(3) if have[d] < need[d]]
        if uncovered:
            missing = ", ".join(f"{CONTEXTS[d].name.lower()} {need[d]}" for d in range(3) if have[d] < need[d])
            where.add("race", f"does not wait for {missing}, which touch the same bytes")
        elif given != wanted:
            where.add("useless-wait", f"waits for {given} of (main, sub, dma) where {wanted} is enough")
        if not after.enter and not may_start_early(instruction.what):
            where.add("race", "does not wait for what was issued before the routine")
        hazards.issue(context, touched[index], given if not uncovered else wanted)
        watch.touch(context, touched[index], hazards.issued[context])
    if routine.instructions:
        check_open(place.at(routine, len(routine.instructions) - 1))


# Buffers -------------------------------------------------------------------------------------------------------------
def _check_buffers(
    number: int, routine: Routine, touched: Sequence[Sequence[Access]], place: _Place, buffers: Sequence[BufferSpan]
) -> None:
    mine = [b for b in buffers if b.routine in (-1, number)]
    mine.sort(key=lambda b: b.first if b.routine >= 0 else -1)
    alive: list[BufferSpan] = []
    upcoming = 0
    for index in range(len(routine.instructions)):
        while upcoming < len(mine) and (mine[upcoming].routine < 0 or mine[upcoming].first <= index):
            alive.append(mine[upcoming])
            upcoming += 1
        alive = [b for b in alive if b.routine < 0 or b.last >= index]
        for access in touched[index]:
            if access.space != "dm":
                continue
            if not any(b.address <= access.low and access.high <= b.address + b.nbytes for b in alive):
                verb = "writes" if access.write else "reads"
                message = f"{verb} DM bytes [{access.low}, {access.high}), which lie in no live buffer"
                place.at(routine, index).add("dm-bounds", message)


# Types ---------------------------------------------------------------------------------------------------------------
def _check_types(routine: Routine, touched: Sequence[Sequence[Access]], place: _Place) -> None:
    """Bytes are read as the type they were written as, where both sides know it (transfers and memset do not)."""
    spaces = ("dm", "trf", "vrf")
    points: dict[str, set[int]] = {space: set() for space in spaces}
    for footprint_ in touched:
        for access in footprint_:
            if access.space in points:
                for low, high in access.intervals:
                    points[access.space].update((low, high))
    grid = {space: {x: i for i, x in enumerate(sorted(values))} for space, values in points.items()}
    held = {space: np.zeros(max(len(g), 1), np.int8) for space, g in grid.items()}
    for index, instruction in enumerate(routine.instructions):
        if isinstance(instruction.what, Call):
            for known in held.values():
                known[:] = 0
            continue
        for access in sorted(touched[index], key=lambda a: a.write):
            if access.space not in grid:
                continue
            known, at = held[access.space], grid[access.space]
            for low, high in access.intervals:
                part = known[at[low] : at[high]]
                if access.write:
                    part[:] = access.dtype or 0
                elif access.dtype and bool(((part != 0) & (part != access.dtype)).any()):
                    other = Dtype(int(part[(part != 0) & (part != access.dtype)][0]))
                    message = (
                        f"reads {access.space} bytes [{low}, {high}) as {access.dtype.name}, written as {other.name}"
                    )
                    place.at(routine, index).add("type", message)
                    break


# Registers, HBM, other units -----------------------------------------------------------------------------------------
def _check_memory(
    stream: Stream,
    footprints: Sequence[Sequence[Sequence[Access]]],
    place: _Place,
    machine: Machine,
    regions: Sequence[tuple[int, int]] | None,
    buffers: Sequence[BufferSpan] | None,
    host: frozenset[int],
    launch: Launch,
    runs: int,
) -> None:
    """Registers are set, addresses stay in the memory map, and units keep out of each other's way."""
    units = max((len(values) for values in launch.values()), default=1)
    registers = {r: (0,) * units for r in (0, *host)} | {r: tuple(values) for r, values in launch.items()}
    hbm = Ranges(regions if regions is not None else [(0, machine.hbm_bytes)])
    fixed = [(b.address, b.nbytes) for b in buffers or () if b.routine < 0]
    shared = Ranges(fixed if buffers is not None else [(0, machine.dm_slice_bytes)])
    reported: set[tuple[int, int, str]] = set()

    def report(routine: int, index: int, rule: str, message: str) -> None:
        if (routine, index, rule) not in reported:
            reported.add((routine, index, rule))
            place.at(stream.routines[routine], index).add(rule, message)

    for number, routine in enumerate(stream.routines if buffers is not None else ()):
        for index, instruction in enumerate(routine.instructions):
            what = instruction.what
            if isinstance(what, (Notify, Wait)):
                ranges = what.ranges if isinstance(what, Notify) else (*what.ranges, *what.arrived)
                if message := check_ranges(ranges, shared):
                    report(number, index, "sync-range", message)
    found = MemoryCheck(stream, footprints, units, hbm, shared, host, frozenset(launch), report)
    found.enter(0, registers)
    if not errors(place.out) and synchronises(stream):
        check_units(stream, units, registers, footprints, report, runs)


def _check_launch(launch: Launch, host: frozenset[int], machine: Machine, place: _Place) -> None:
    """Launch registers: their own, with a value of every unit."""
    if len({len(values) for values in launch.values()}) > 1:
        place.add("launch", "launch registers have values for different numbers of units")
    for register, values in launch.items():
        if not 0 < register < machine.registers or register in host:
            place.add("launch", f"register {register}")
        if any(not 0 <= value < 1 << 63 for value in values):
            place.add("launch", f"register {register} holds {tuple(values)}")
