"""Units that run together: each executes its own programs until a wait blocks it, with real semaphores between them."""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from backend_rngd.isa.descriptors import Call, Context, Instruction, Notify, Stream, Wait
from backend_rngd.isa.peers import notified
from runtime_sim.clocks import START, Clock, Clocks, Counts, Frame
from runtime_sim.errors import SimulationError, Site
from runtime_sim.functional import REGISTERS, Executed, Observer, Program, Unit, moved
from runtime_sim.peers import PeerDmaPlan
from runtime_sim.races import Instance, Races
from runtime_sim.workers import single_threaded_blas

Steps = Generator[None, None, None]
Path = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Launch:
    """One program for one unit: `registers` are set before it starts; `start` and `done` are what the host does before
    and after it (write inputs, read outputs)."""

    stream: Stream
    registers: Mapping[int, int] = field(default_factory=dict[int, int])
    start: Callable[[], None] | None = None
    done: Callable[[], None] | None = None
    observer: Observer | None = None
    routine: int = 0


@dataclass(frozen=True)
class _Token:
    """One addition to a semaphore."""

    sender: int
    clock: Clock | None


class Group:
    """Units with their semaphores. `run` may be called again and again; regions of memory are analysed once."""

    def __init__(self, units: Sequence[Unit], names: Sequence[str] | None = None) -> None:
        """`names` are those of the units in messages."""
        self.units = list(units)
        self.names = list(names or (f"unit {i} (card {u.place.card} PE {u.place.pe})" for i, u in enumerate(units)))
        self.number = {id(unit): i for i, unit in enumerate(self.units)}
        self.races = Races(self.units)

    def run(self, work: Sequence[Sequence[Launch]], races: bool = True, seed: int | None = None) -> None:
        """Run the launches of every unit, one after the other on each, all units at once.

        Without a seed a unit runs until it must wait, then the next one; with a seed the units take turns at random
        after every instruction. races: look for accesses of units that no notify and wait put in order. Raises
        SimulationError, also for a deadlock (naming who waits for whom), notifications that nobody waited for, and
        contexts of a unit that may overtake each other.
        """
        if len(work) != len(self.units):
            raise ValueError(f"work for {len(work)} units, the group has {len(self.units)}")
        run = _Run(self, work, races, seed)
        try:
            with np.errstate(all="ignore"), single_threaded_blas():
                run.all()
        finally:
            run.close()
        if races or self.units[0].legal:
            for launch in (launch for launches in work for launch in launches):
                self.units[0].ordered(launch.stream, launch.routine)


class _Run:
    """State of one `Group.run`."""

    def __init__(self, group: Group, work: Sequence[Sequence[Launch]], races: bool, seed: int | None) -> None:
        self.group = group
        self.tokens: dict[tuple[int, int], deque[_Token]] = {}
        self.sent: Counter[tuple[int, int, int]] = Counter()  # (sender, receiver, semaphore)
        self.runners = [_Runner(self, i, launches) for i, launches in enumerate(work)]
        self.random = None if seed is None else random.Random(seed)
        self.races: Races | None = None
        if races:
            self.races = group.races
            self.races.start()
            for runner in self.runners:
                runner.announce(self.races)

    def all(self) -> None:
        """Run to the end."""
        active = list(self.runners)
        turn = 0
        while active:
            ready = [runner for runner in active if runner.ready()]
            if not ready:
                raise self._deadlock(active)
            if self.random is not None:
                runner = self.random.choice(ready)
            else:
                runner = next((r for r in ready if r.me >= turn), ready[0])
                turn = runner.me + 1
            if not runner.advance():
                active.remove(runner)
        self._leftovers()

    def close(self) -> None:
        """Leave the programs, wherever they are."""
        for runner in self.runners:
            runner.close()

    def notify(self, sender: int, receiver: Unit, semaphore: int, clock: Clock | None) -> None:
        """Add 1 to a semaphore."""
        number = self.group.number.get(id(receiver))
        if number is None:
            raise SimulationError(SimulationError.ILLEGAL, "notify of a unit that does not take part")
        self.tokens.setdefault((number, semaphore), deque()).append(_Token(sender, clock))
        self.sent[sender, number, semaphore] += 1

    def available(self, receiver: int, semaphore: int) -> int:
        """Value of a semaphore."""
        return len(self.tokens.get((receiver, semaphore), ()))

    def take(self, receiver: int, semaphore: int, count: int) -> list[_Token]:
        """Subtract `count` from a semaphore."""
        queue = self.tokens[receiver, semaphore]
        return [queue.popleft() for _ in range(count)]

    def _deadlock(self, blocked: Sequence[_Runner]) -> SimulationError:
        lines: list[str] = []
        for runner in blocked:
            assert runner.waits is not None
            what, site = runner.waits
            value = self.available(runner.me, what.semaphore)
            name = self.group.names[runner.me]
            line = f"{name} at {site} waits for semaphore {what.semaphore} to be {what.count}, it is {value}"
            lines.append(f"{line}; {self._senders(runner.me, what.semaphore)}")
        first = blocked[0].waits
        assert first is not None
        fix = "a notify is missing, comes too late or names other units"
        return SimulationError(SimulationError.DEADLOCK, "\n  ".join(lines), fix, first[1])

    def _senders(self, receiver: int, semaphore: int) -> str:
        found: list[str] = []
        for runner in self.runners:
            if runner.me == receiver or not runner.notifies(receiver, semaphore):
                continue
            state = "has ended" if runner.waits is None else f"waits at {runner.waits[1]}"
            sent = self.sent[runner.me, receiver, semaphore]
            found.append(f"{self.group.names[runner.me]}, which has notified it {sent} times and {state}")
        return f"it can be notified by {'; '.join(found)}" if found else "no unit ever notifies it"

    def _leftovers(self) -> None:
        left = {key: tokens for key, tokens in self.tokens.items() if tokens}
        if not left:
            return
        lines = [
            f"semaphore {semaphore} of {self.group.names[receiver]} is {len(tokens)} at the end, notified by "
            + ", ".join(self.group.names[s] for s in sorted({t.sender for t in tokens}))
            for (receiver, semaphore), tokens in sorted(left.items())
        ]
        what = "nobody waits for a notification: " + "; ".join(lines)
        raise SimulationError(SimulationError.UNIT_RACE, what, "add the missing wait, or raise its count")


class _Runner:
    """One unit on its way through its launches."""

    def __init__(self, run: _Run, me: int, launches: Sequence[Launch]) -> None:
        self.run = run
        self.me = me
        self.unit = run.group.units[me]
        self.launches = list(launches)
        self.waits: tuple[Wait, Site] | None = None
        self.clocks: Clocks | None = None
        self._steps = self._all()

    # Scheduling ------------------------------------------------------------------------------------------------------
    def ready(self) -> bool:
        """Whether the unit can go on."""
        return self.waits is None or self.run.available(self.me, self.waits[0].semaphore) >= self.waits[0].count

    def advance(self) -> bool:
        """Run until the next point where another unit may take over; False at the end."""
        for _ in self._steps:
            return True
        return False

    def close(self) -> None:
        """Leave the program; the unit gets the registers back that it had outside of all calls."""
        self._steps.close()

    def _all(self) -> Steps:
        if self.run.races is not None:
            self.clocks = Clocks(self.me, len(self.run.group.units))
        for launch in self.launches:
            if launch.start is not None:
                launch.start()
            program = self.unit.program(launch.stream)
            self._set_registers(launch)
            if self.clocks is not None:
                self.clocks.meet()
            yield from self._routine(program, launch.routine, (), launch.observer, START)
            if launch.done is not None:
                launch.done()

    def _set_registers(self, launch: Launch) -> None:
        for register, value in launch.registers.items():
            if not 0 < register < REGISTERS:
                raise SimulationError(SimulationError.ILLEGAL, f"register {register} cannot be set")
            self.unit.registers[register] = int(value)

    # Execution -------------------------------------------------------------------------------------------------------
    def _routine(self, program: Program, routine: int, path: Path, observer: Observer | None, gate: Counts) -> Steps:
        frame = Frame(self.clocks, gate) if self.clocks is not None else None
        stepwise = self.run.random is not None
        for index, instruction in enumerate(program.stream.routines[routine].instructions):
            what = instruction.what
            try:
                need = frame.need(instruction.after) if frame is not None else START
            except SimulationError as error:
                raise error.at(program.site(routine, index, path)) from None
            if isinstance(what, Call):
                yield from self._call(program, what, (*path, (routine, index)), observer, need)
                if frame is not None:
                    frame.called()
            else:
                if stepwise:
                    yield
                if self.clocks is not None:
                    self.clocks.require(instruction.context, need)
                if isinstance(what, Wait):
                    yield from self._wait(what, instruction.context, program.site(routine, index, path))
                elif isinstance(what, Notify):
                    self._notify(what, instruction.context, program.site(routine, index, path))
                else:
                    self._step(program, routine, index, instruction, path)
                if frame is not None:
                    frame.executed(instruction.context)
            if observer is not None:
                observer(Executed(routine, index, path, instruction))

    def _call(self, program: Program, call: Call, path: Path, observer: Observer | None, gate: Counts) -> Steps:
        if len(path) > 64:
            raise SimulationError(
                SimulationError.ILLEGAL, "calls nested deeper than 64", site=program.site(*path[-1], path)
            )
        saved = self.unit.registers
        self.unit.registers = moved(saved, call)
        try:
            yield from self._routine(program, call.routine, path, observer, gate)
        finally:
            self.unit.registers = saved

    def _wait(self, what: Wait, context: Context, site: Site) -> Steps:
        while self.run.available(self.me, what.semaphore) < what.count:
            self.waits = (what, site)
            yield
        self.waits = None
        for token in self.run.take(self.me, what.semaphore, what.count):
            if self.clocks is not None and token.clock is not None:
                self.clocks.learn(context, token.clock)

    def _notify(self, what: Notify, context: Context, site: Site) -> None:
        clock = self.clocks.told(context) if self.clocks is not None else None
        for number in notified(what, self.unit.registers[what.register], self.unit.place.rank):
            receiver = self.unit.peers.get(number)
            if receiver is None:
                known = sorted(self.unit.peers)
                raise SimulationError(
                    SimulationError.ILLEGAL, f"notify of unit {number}, the program's units are {known}", site=site
                )
            self.run.notify(self.me, receiver, what.semaphore, clock)

    def _step(self, program: Program, routine: int, index: int, instruction: Instruction, path: Path) -> None:
        races, clocks = self.run.races, self.clocks
        if races is not None and clocks is not None:
            try:
                touches = races.touches(self.unit, program.plan(self.unit, routine, index), instruction.what)
            except SimulationError as error:
                raise error.at(program.site(routine, index, path)) from None
            if touches:
                context = int(instruction.context)
                me = Instance(self.me, program.stream, routine, index, path)
                count = len(clocks.history[context])
                conflict = races.check(touches, clocks.first + context, count, clocks.known[context], me)
                if conflict is not None:
                    raise self._race(conflict.earlier, conflict.earlier_writes, conflict.owner, conflict.space, me)
        self.unit.step(program, routine, index, path)

    def _race(self, other: Instance, other_writes: bool, owner: int, space: str, me: Instance) -> SimulationError:
        names = self.run.group.names
        there = self.run.group.units[other.unit].program(other.stream).site(other.routine, other.index, other.path)
        here = self.unit.program(me.stream).site(me.routine, me.index, me.path)
        verb = "writes" if other_writes else "reads"
        what = (
            f"{names[me.unit]} touches {space.upper()} of {names[owner]} that {names[other.unit]} {verb} at {there}, "
            "and nothing puts the two in order"
        )
        return SimulationError(SimulationError.UNIT_RACE, what, "add the missing notify, wait or `after`", here)

    # What the programs can do ----------------------------------------------------------------------------------------
    def _visits(self) -> Iterable[tuple[Launch, int, tuple[int, ...], Path]]:
        """Every call of every launch: (launch, routine, registers inside, calls that led there)."""
        for launch in self.launches:
            registers = list(self.unit.registers)
            for register, value in launch.registers.items():
                registers[register] = int(value)
            stack: list[tuple[int, list[int], Path]] = [(launch.routine, registers, ())]
            while stack:
                routine, inside, path = stack.pop()
                yield launch, routine, tuple(inside), path
                calls = [
                    (what.routine, moved(inside, what), (*path, (routine, index)))
                    for index, what in enumerate(x.what for x in launch.stream.routines[routine].instructions)
                    if isinstance(what, Call)
                ]
                stack += reversed(calls)  # in the order of the program

    def announce(self, races: Races) -> None:
        """Tell which bytes of other units the programs touch."""
        seen: set[tuple[object, ...]] = set()
        saved = self.unit.registers
        try:
            for launch, routine, registers, path in self._visits():
                program = self.unit.program(launch.stream)
                for index, operation in program.peer_transfers(routine):
                    pair = (registers[operation.source.register], registers[operation.destination.register])
                    if (id(program), routine, index, pair) in seen:
                        continue
                    seen.add((id(program), routine, index, pair))
                    self.unit.registers = list(registers)
                    try:
                        plan = program.plan(self.unit, routine, index)
                        assert isinstance(plan, PeerDmaPlan)
                        races.announce(plan, self.unit)
                    except SimulationError as error:
                        raise error.at(program.site(routine, index, path)) from None
        finally:
            self.unit.registers = saved

    def notifies(self, receiver: int, semaphore: int) -> bool:
        """Whether any program of this unit ever notifies a semaphore of another unit."""
        target = self.run.group.units[receiver]
        for launch, routine, registers, _ in self._visits():
            for instruction in launch.stream.routines[routine].instructions:
                what = instruction.what
                if isinstance(what, Notify) and what.semaphore == semaphore:
                    numbers = notified(what, registers[what.register], self.unit.place.rank)
                    if any(self.unit.peers.get(n) is target for n in numbers):
                        return True
        return False
