"""Functional simulator: executes instruction streams on a unit's memories.

    card = Card(load_machine())
    unit = Unit(card, slices=64)
    card.write(address, weights)
    unit.run(stream, registers={1: row_offset})

Instructions run in program order, which the waits of a legal stream make equivalent to every order the hardware may
choose (`hazards.py` tests that). Each instruction is decoded once per unit; running it again is a few array operations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from backend_rngd.isa.descriptors import Call, Dma, Instruction, Stream
from backend_rngd.isa.legality import check
from backend_rngd.isa.rules import CANONICAL, RULES
from backend_rngd.machine import Machine
from runtime_sim.context_races import check_contexts
from runtime_sim.errors import SimulationError, Site, layer_name
from runtime_sim.memory import Card, Hbm, RowMemory
from runtime_sim.plans import Plan, plan_of
from runtime_sim.topology import Place
from runtime_sim.workers import single_threaded_blas

__all__ = ["Card", "Executed", "Program", "SimulationError", "Unit"]

REGISTERS = 64
Path = tuple[tuple[int, int], ...]  # calls (routine, index), outermost first


@dataclass(frozen=True)
class Executed:
    """What an observer sees after an instruction: its place, and the calls (routine, index) that led there."""

    routine: int
    index: int
    path: Path
    instruction: Instruction


Observer = Callable[[Executed], None]


class Program:
    """A stream decoded for one unit; plans are made when an instruction first runs."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.plans: list[list[Plan | None]] = [[None] * len(r.instructions) for r in stream.routines]
        self._peer_transfers: dict[int, list[tuple[int, Dma]]] = {}

    def plan(self, unit: Unit, routine: int, index: int) -> Plan:
        """The decoded instruction."""
        plan = self.plans[routine][index]
        if plan is None:
            instruction = self.stream.routines[routine].instructions[index]
            what = instruction.what
            assert not isinstance(what, Call)
            plan = plan_of(what, unit)
            for broken in check(what, unit.machine, instruction.context, absolute=True) if unit.legal else ():
                if broken.severity == "error" and broken.rule not in CANONICAL:
                    raise SimulationError(SimulationError.ILLEGAL, f"{broken.message} ({RULES[broken.rule]})")
            self.plans[routine][index] = plan
        return plan

    def peer_transfers(self, routine: int) -> list[tuple[int, Dma]]:
        """Transfers of a routine that name other units, with their indices."""
        found = self._peer_transfers.get(routine)
        if found is None:
            items = enumerate(self.stream.routines[routine].instructions)
            transfers = [(i, x.what) for i, x in items if isinstance(x.what, Dma)]
            found = [(i, op) for i, op in transfers if op.source.space.is_peer or op.destination.space.is_peer]
            self._peer_transfers[routine] = found
        return found

    def site(self, routine: int, index: int, path: Path = ()) -> Site:
        """Place of an instruction, for errors. path: the calls that led there."""
        layer = layer_name(self._location(*path[0])) if path else ""
        return Site(self.stream.routines[routine].name, index, self._location(routine, index), layer)

    def _location(self, routine: int, index: int) -> str:
        locations = self.stream.locations
        number = self.stream.routines[routine].instructions[index].location
        return locations[number] if 0 <= number < len(locations) else ""


class Unit:
    """One PE (64 slices) or several fused PEs: DM, TRF, VRF, 64 registers, and a window of the card's HBM.

    `checks` turns on the detection of uninitialised reads; bounds, and whatever has no meaning, are always refused.
    `legal` also refuses what has a meaning but breaks a documented limit of the hardware (`isa.rules`), and programs
    whose contexts may overtake each other. `peers` are the units that peer addresses name, by their numbers
    (`isa.descriptors`); `place.rank` is the unit's own.
    """

    def __init__(
        self, window: Hbm, slices: int, checks: bool = True, place: Place | None = None, legal: bool = False
    ) -> None:
        machine: Machine = window.machine
        self.window = window
        self.place = place or Place(0, 0, 0, 0, 0)
        self.peers: dict[int, Unit] = {0: self}
        self.machine = machine
        self.slices = slices
        self.checks = checks
        self.legal = legal
        self.dm = RowMemory("DM", slices, machine.dm_slice_bytes)
        self.trf = RowMemory("TRF", slices, machine.trf_bytes_per_slice)
        self.vrf = RowMemory("VRF", slices, machine.vrf_bytes)
        self.registers = [0] * REGISTERS
        self.generation = 0
        self._programs: dict[int, Program] = {}
        self._ordered: dict[tuple[int, int], Stream] = {}

    def reset(self) -> None:
        """Treat DM, TRF and VRF as uninitialised again (their bytes stay)."""
        for memory in (self.dm, self.trf, self.vrf):
            memory.forget()
        self.generation += 1

    def program(self, stream: Stream) -> Program:
        """The decoded stream, cached."""
        known = self._programs.get(id(stream))
        if known is None or known.stream is not stream:
            if stream.slices != self.slices:
                raise SimulationError(
                    SimulationError.ILLEGAL, f"stream for {stream.slices} slices on a unit of {self.slices}"
                )
            known = self._programs[id(stream)] = Program(stream)
        return known

    def ordered(self, stream: Stream, routine: int = 0) -> None:
        """Raise SimulationError (race) if contexts may overtake each other; a stream is looked at once."""
        key = (id(stream), routine)
        if key not in self._ordered:
            check_contexts(stream, routine)
            self._ordered[key] = stream  # which keeps the id taken

    def run(
        self,
        stream: Stream,
        registers: Mapping[int, int] | None = None,
        after_instruction: Observer | None = None,
        routine: int = 0,
    ) -> None:
        """Execute a routine of a stream. `registers` sets registers before the start (register 0 stays 0).

        Raises SimulationError (illegal, out of bounds, uninitialised, race) naming instruction, operation and layer.
        """
        program = self.program(stream)
        if self.legal:
            self.ordered(stream, routine)
        for register, value in (registers or {}).items():
            if not 0 < register < REGISTERS:
                raise SimulationError(SimulationError.ILLEGAL, f"register {register} cannot be set")
            self.registers[register] = int(value)
        with np.errstate(all="ignore"), single_threaded_blas():
            self._routine(program, routine, (), after_instruction)

    def _routine(self, program: Program, routine: int, path: Path, observer: Observer | None) -> None:
        for index, instruction in enumerate(program.stream.routines[routine].instructions):
            if isinstance(instruction.what, Call):
                self._call(program, instruction.what, (*path, (routine, index)), observer)
            else:
                self.step(program, routine, index, path)
            if observer is not None:
                observer(Executed(routine, index, path, instruction))

    def _call(self, program: Program, call: Call, path: Path, observer: Observer | None) -> None:
        if len(path) > 64:
            raise SimulationError(
                SimulationError.ILLEGAL, "calls nested deeper than 64", site=program.site(*path[-1], path)
            )
        saved = self.registers
        self.registers = moved(saved, call)
        try:
            self._routine(program, call.routine, path, observer)
        finally:
            self.registers = saved

    def step(self, program: Program, routine: int, index: int, path: Path = ()) -> None:
        """Execute one instruction with the current registers. path: the calls that led there, for errors."""
        try:
            plan = program.plan(self, routine, index)
            if self.checks:
                plan.check(self)
            plan.run(self)
        except SimulationError as error:
            raise error.at(program.site(routine, index, path)) from None


def moved(registers: list[int], call: Call) -> list[int]:
    """Registers inside a called routine."""
    inside = list(registers)
    for target, source, immediate in call.moves:
        if not 0 < target < REGISTERS or not 0 <= source < REGISTERS:
            raise SimulationError(SimulationError.ILLEGAL, f"register move {source} -> {target}")
        inside[target] = registers[source] + immediate
    return inside
