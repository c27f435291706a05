"""Streams from a placed and scheduled module: absolute addresses, register moves of calls, locations, probes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from xdsl.dialects.builtin import ModuleOp

from backend_rngd.addresses import FIRST_ARGUMENT_REGISTER, AddressBook
from backend_rngd.dialect import AllocOp, CallOp, InstructionOp, ProbeOp, RoutineOp, space_of
from backend_rngd.instructions import CONTEXTS
from backend_rngd.isa.descriptors import After, Call, Context, Instruction, Routine, Stream
from backend_rngd.isa.legality import BufferSpan, Violation, check_pipeline, check_stream
from backend_rngd.machine import Machine
from ir.errors import UnsupportedError

ENTRY = "main"


@dataclass(frozen=True)
class GlobalPlace:
    """Where a global lies. row_register: register that the host sets to batch row * row_bytes (0: none)."""

    space: str
    address: int
    nbytes: int
    kind: str
    row_bytes: int = 0
    row_register: int = 0


@dataclass(frozen=True)
class Probe:
    """The `tc` value `value` is complete after `instructions` instructions of `routine` (an index of the stream).

    Its bytes start at register + address (HBM) or at `address` of every slice; `layout` says where each element lies.
    """

    routine: int
    instructions: int
    value: str
    space: str
    register: int
    address: int
    layout: dict[str, Any]


@dataclass(frozen=True)
class Emitted:
    """The stream of all units of a group and what the host must know to use it."""

    streams: tuple[Stream, ...]  # one: units differ in launch registers only
    globals: dict[str, GlobalPlace]
    probes: tuple[Probe, ...]
    locations: tuple[str, ...]
    row_registers: dict[int, int] = field(default_factory=dict[int, int])  # bytes of a batch row -> register
    buffers: tuple[BufferSpan, ...] = ()  # DM buffers, for `check_stream`
    scratch: tuple[int, int] = (0, 0)  # address and bytes of the area of HBM locals
    launch: dict[int, tuple[int, ...]] = field(default_factory=dict[int, tuple[int, ...]])  # register -> value by unit

    @property
    def units(self) -> int:
        """Units of the group."""
        return max((len(values) for values in self.launch.values()), default=1)

    def check(self, machine: Machine, runs: int = 1) -> list[Violation]:
        """Every broken rule of the streams, with the memory map and the registers of this program.

        runs: 2 if a unit may start the next run before other units have finished this one (batches in flight).
        """
        regions = self._regions()
        out: list[Violation] = []
        for stream in self.streams:
            out += check_stream(stream, machine, regions, self.row_registers.values(), self.buffers, self.launch, runs)
        return out

    def check_stages(self, streams: Sequence[Stream], machine: Machine, runs: int = 2) -> list[Violation]:
        """Every broken rule of the streams of pipeline stages, made from this program's (`artifact.stages`)."""
        rows = self.row_registers.values()
        return check_pipeline(streams, machine, self._regions(), rows, self.buffers, self.launch, runs)

    def _regions(self) -> list[tuple[int, int]]:
        """(address, bytes) of the buffers in HBM."""
        found = [(p.address, p.nbytes) for p in self.globals.values() if p.space == "hbm"]
        return [*found, self.scratch] if self.scratch[1] else found


class _Locations:
    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def number(self, text: str) -> int:
        return self.numbers.setdefault(text, len(self.numbers))


def emit(module: ModuleOp, machine: Machine, slices: int | None = None) -> Emitted:
    """The stream of a module that went through `place` and `schedule`; all units of a group run it (SPMD).

    slices: slices of the unit (default: one PE). Routine 0 of the stream is `@main`. Raises ValueError if something is
    not placed or scheduled, UnsupportedError if a routine has more arguments than there are registers.
    """
    book = AddressBook(module)
    found = [op for op in module.body.block.ops if isinstance(op, RoutineOp)]
    found.sort(key=lambda op: op.sym_name.data != ENTRY)
    if not found or found[0].sym_name.data != ENTRY:
        raise ValueError(f"the module has no routine @{ENTRY}")
    numbers = {op.sym_name.data: i for i, op in enumerate(found)}
    locations = _Locations()
    probes: list[Probe] = []
    routines = tuple(_routine(op, numbers, book, machine, locations, probes) for op in found)
    names = tuple(locations.numbers)
    stream = Stream(0, slices or machine.slices_per_pe, routines, names)
    places: dict[str, GlobalPlace] = {}
    for name, op in book.globals.items():
        at = book.of_global(op)
        row = op.row_bytes.value.data if op.row_bytes is not None else 0
        kind = op.buffer_type
        places[name] = GlobalPlace(kind.space.data, at.offset, kind.nbytes.data, op.kind.data, row, at.register)
    spans = [BufferSpan(-1, 0, 0, p.address, p.nbytes, name) for name, p in places.items() if p.space == "dm"]
    for op in found:
        spans += _buffers(op, numbers[op.sym_name.data], book)
    rows = dict(book.row_registers)
    return Emitted((stream,), places, tuple(probes), names, rows, tuple(spans), _scratch(found), dict(book.launch))


def _scratch(routines: list[RoutineOp]) -> tuple[int, int]:
    """Address and bytes of the area that HBM locals of all routines lie in."""
    spans = [
        (op.address.value.data, op.result.type.nbytes.data)
        for routine in routines
        for op in routine.block.ops
        if isinstance(op, AllocOp) and op.result.type.space.data == "hbm" and op.address is not None
    ]
    low = min((a for a, _ in spans), default=0)
    return low, max((a + n for a, n in spans), default=0) - low


def _buffers(op: RoutineOp, number: int, book: AddressBook) -> list[BufferSpan]:
    """DM buffers of a routine with the first and last instruction that uses them."""
    uses: dict[AllocOp, tuple[int, int]] = {}
    position = 0
    for item in op.block.ops:
        if isinstance(item, (InstructionOp, CallOp)):
            for operand in item.operands:
                owner = operand.owner
                if isinstance(owner, AllocOp) and owner.result.type.space.data == "dm":
                    uses[owner] = (uses.get(owner, (position, position))[0], position)
            position += 1
    return [
        BufferSpan(number, first, last, book.of(a.result).offset, a.result.type.nbytes.data, a.buffer_name.data)
        for a, (first, last) in uses.items()
    ]


def _routine(
    op: RoutineOp,
    numbers: dict[str, int],
    book: AddressBook,
    machine: Machine,
    locations: _Locations,
    probes: list[Probe],
) -> Routine:
    end = min([machine.registers, *book.launch])
    if FIRST_ARGUMENT_REGISTER + len(op.block.args) > end:
        raise UnsupportedError(
            f"routine @{op.sym_name.data} with {len(op.block.args)} buffers",
            f"arguments lie in registers {FIRST_ARGUMENT_REGISTER} to {end - 1}",
            "pass fewer buffers (pack small weights of a block into one)",
        )
    out: list[Instruction] = []
    number = numbers[op.sym_name.data]
    for item in op.block.ops:
        if isinstance(item, InstructionOp):
            if item.after is None:
                raise ValueError(f"an instruction of @{op.sym_name.data} has no dependencies: run schedule first")
            where = locations.number(item.where.data)
            out.append(Instruction(CONTEXTS[item.context.data], item.after.data, book.absolute(item), where))
        elif isinstance(item, CallOp):
            moves: list[tuple[int, int, int]] = []
            for i, (value, offset) in enumerate(zip(item.arguments, item.offset_list, strict=True)):
                at = book.of(value)
                moves.append((FIRST_ARGUMENT_REGISTER + i, at.register, at.offset + offset))
            call = Call(numbers[item.callee.string_value()], tuple(moves))
            out.append(Instruction(Context.CONTROL, After(), call, locations.number(item.where.data)))
        elif isinstance(item, ProbeOp):
            at = book.of(item.buffer)
            layout = json.loads(item.layout.data)
            probes.append(
                Probe(number, len(out), item.value.data, space_of(item.buffer), at.register, at.offset, layout)
            )
    return Routine(op.sym_name.data, tuple(out))
