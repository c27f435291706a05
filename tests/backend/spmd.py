"""A small program that several units run: layers of two exchanges, written in the `rngd` dialect."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from isa_builders import SLICES, copy_pass, load, store
from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import SSAValue

from backend_rngd.dialect import (
    AllocOp,
    CallOp,
    DmaOp,
    ExecOp,
    GetGlobalOp,
    GlobalOp,
    LaunchOp,
    NotifyOp,
    RoutineOp,
    WaitOp,
    buffer_type,
)
from backend_rngd.emit import Emitted, emit
from backend_rngd.isa.descriptors import (
    DM_SLICE_STRIDE,
    UNIT_STRIDE,
    Dma,
    Endpoint,
    Instruction,
    Notify,
    Routine,
    Space,
    Stream,
    Wait,
)
from backend_rngd.isa.legality import Violation
from backend_rngd.machine import load_machine
from backend_rngd.place import place
from backend_rngd.schedule import schedule

MACHINE = load_machine()
PIECE = 256  # bytes of a slice that a unit publishes
HBM = buffer_type("hbm", SLICES * PIECE)
OWN, PART = 63, 62  # launch registers: the own unit's address, and the place of its part in a gathered buffer
UNIT_RULES = {"launch", "peer", "sync-range", "deadlock", "semaphore-balance", "wait-order", "unit-race"}
"""Rules of streams on several units: `test_units` breaks each of them."""


@dataclass
class Spmd:
    """`units` units; routines of loads, passes, exchanges and stores."""

    units: int
    globals: dict[str, GlobalOp] = field(default_factory=dict[str, GlobalOp])
    routines: dict[str, RoutineOp] = field(default_factory=dict[str, RoutineOp])
    current: RoutineOp = field(default_factory=lambda: RoutineOp("main"))

    def __post_init__(self) -> None:
        self.routines["main"] = self.current
        self.shared("x", "hbm", kind="input")
        self.shared("y", "hbm", kind="output")

    def shared(self, name: str, space: str, nbytes: int = 0, kind: str = "activation") -> None:
        size = nbytes or (SLICES * PIECE if space == "hbm" else PIECE)
        self.globals[name] = GlobalOp(name, space, size, kind)

    def routine(self, name: str) -> None:
        self.current = self.routines.setdefault(name, RoutineOp(name))

    def get(self, name: str) -> SSAValue:
        op = GetGlobalOp(name, self.globals[name].buffer_type)
        self.current.block.add_op(op)
        return op.result

    def local(self, nbytes: int = PIECE) -> SSAValue:
        op = AllocOp("dm", nbytes)
        self.current.block.add_op(op)
        return op.results[0]

    def value(self, what: str | SSAValue) -> SSAValue:
        return self.get(what) if isinstance(what, str) else what

    def load(self, source: str | SSAValue, target: str | SSAValue) -> None:
        self.current.block.add_op(DmaOp(load(PIECE, 0), self.value(source), self.value(target)))

    def store(self, source: str | SSAValue, target: str | SSAValue) -> None:
        self.current.block.add_op(DmaOp(store(PIECE, 0, 0), self.value(source), self.value(target)))

    def work(self, source: str | SSAValue, target: str | SSAValue) -> None:
        self.current.block.add_op(ExecOp(copy_pass(0, 0, PIECE // 4), self.value(source), self.value(target)))

    def notify(self, semaphore: int, *published: str) -> None:
        desc = Notify(0, 0, ((self.units, 1),), semaphore)
        self.current.block.add_op(NotifyOp(desc, [self.get(p) for p in published], location=f"notify {semaphore}"))

    def wait(self, semaphore: int, *released: str, arrived: Sequence[str] = (), count: int = 0) -> None:
        desc = Wait(semaphore, count or self.units - 1)
        values = [self.get(r) for r in released], [self.get(a) for a in arrived]
        self.current.block.add_op(WaitOp(desc, *values, location=f"wait {semaphore}"))

    def gather(self, source: str) -> SSAValue:
        """The pieces of all units, one after the other."""
        out = self.local(self.units * PIECE)
        hbm = self.globals[source].buffer_type.space.data == "hbm"
        inside = PIECE if hbm else DM_SLICE_STRIDE
        desc = Dma(
            Endpoint(Space.PEER_HBM if hbm else Space.PEER_DM, 0),
            Endpoint(Space.DM, 0),
            ((self.units, UNIT_STRIDE, PIECE), (SLICES, inside, DM_SLICE_STRIDE)),
            PIECE,
        )
        self.current.block.add_op(DmaOp(desc, self.get(source), out, location=f"gather {source}"))
        return out

    def push(self, source: SSAValue, target: str) -> None:
        """The own piece to its place in `target` of every unit."""
        desc = Dma(
            Endpoint(Space.DM, 0),
            Endpoint(Space.PEER_DM, 0, PART),
            ((self.units, 0, UNIT_STRIDE), (SLICES, DM_SLICE_STRIDE, DM_SLICE_STRIDE)),
            PIECE,
        )
        self.current.block.add_op(DmaOp(desc, source, self.get(target), location=f"push {target}"))

    def call(self, name: str, times: int = 1) -> None:
        for _ in range(times):
            self.current.block.add_op(CallOp(name, []))

    @property
    def module(self) -> ModuleOp:
        launch = [
            LaunchOp(OWN, [u * UNIT_STRIDE for u in range(self.units)]),
            LaunchOp(PART, [u * PIECE for u in range(self.units)]),
        ]
        return ModuleOp([*self.globals.values(), *launch, *self.routines.values()])

    def emit(self) -> Emitted:
        module = self.module
        module.verify()
        place(module, MACHINE)
        schedule(module)
        return emit(module, MACHINE)


def layers(units: int = 4, count: int = 6, releases: bool = True, space: str = "dm") -> Spmd:
    """Layers of two exchanges whose published buffers take turns: the wait of one releases the other's buffer.

    Each exchange also writes the other's buffer, by a pass that depends on nothing else than that release.
    """
    b = Spmd(units)
    b.shared("p", space)
    b.shared("q", space)
    b.routine("layer")
    x, z = b.local(), b.local()
    b.load("x", x)
    b.load("x", z)
    for number, (mine, other) in enumerate((("p", "q"), ("q", "p"))):
        if space == "dm":
            b.work(x, mine)
        else:
            b.store(x, mine)
        b.notify(number, mine)
        b.wait(number, *([other] if releases else []))
        if space == "dm":
            b.work(z, other)
        everything = b.gather(mine)
        x = b.local()
        b.work(everything, x)
    b.store(x, "y")
    b.routine("main")
    b.call("layer", count)
    return b


def rules(violations: Sequence[Violation]) -> set[str]:
    """Names of broken rules."""
    return {v.rule for v in violations}


def changed(emitted: Emitted, routine: int, body: Sequence[Instruction]) -> Emitted:
    """The program with another body of one routine."""
    stream = emitted.streams[0]
    routines = list(stream.routines)
    routines[routine] = Routine(routines[routine].name, tuple(body))
    new: Stream = replace(stream, routines=tuple(routines))
    return replace(emitted, streams=(new,))
