"""Single-field changes of streams, and a small program to try them on."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from backend_rngd.emit import Emitted, emit
from backend_rngd.isa.descriptors import Call, Instruction, Routine, Stream
from backend_rngd.isa.legality import errors
from backend_rngd.lowering import Lowered, LoweringOptions, lower
from backend_rngd.machine import load_machine
from backend_rngd.place import place
from backend_rngd.schedule import schedule
from ir.text import parse_module
from passes.outline import outline
from runtime_sim.errors import SimulationError
from runtime_sim.functional import Card, Unit

MACHINE = load_machine()
DATA = Path(__file__).parent / "data"
Path_ = tuple[str | int, ...]


# Mutation ------------------------------------------------------------------------------------------------------------
def leaves(value: Any, path: Path_ = ()) -> Iterator[tuple[Path_, Any]]:
    """Every number, flag and choice inside a descriptor, with the path to it."""
    if dataclasses.is_dataclass(value):
        for f in dataclasses.fields(value):
            yield from leaves(getattr(value, f.name), (*path, f.name))
    elif isinstance(value, tuple):
        for i, item in enumerate(value):
            yield from leaves(item, (*path, i))
    elif value is not None:
        yield path, value


def replaced(value: Any, path: Path_, new: Any) -> Any:
    """`value` with the leaf at `path` set to `new`."""
    if not path:
        return new
    head, rest = path[0], path[1:]
    if isinstance(head, int):
        return (*value[:head], replaced(value[head], rest, new), *value[head + 1 :])
    return dataclasses.replace(value, **{head: replaced(getattr(value, head), rest, new)})


def another(value: Any, rng: random.Random) -> Any:
    """A plausible wrong value: the next count, half, double, one flit or line off, another choice."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, IntEnum):
        return rng.choice([m for m in type(value) if m != value])
    if isinstance(value, int):
        steps = [value + 1, value - 1, value * 2, value // 2, value + 8, value + 32, value - 32, value + 256, 0]
        return rng.choice([x for x in steps if x != value])
    return rng.choice([x for x in (value * 2, value + 1.0, -value, value * 1.01) if x != value])


@dataclass(frozen=True)
class Mutant:
    """One changed field."""

    stream: Stream
    routine: int
    index: int
    path: Path_
    old: Any
    new: Any

    def __str__(self) -> str:
        what = type(self.stream.routines[self.routine].instructions[self.index].what).__name__
        return f"r{self.routine}[{self.index}] {what} {'.'.join(map(str, self.path))}: {self.old} -> {self.new}"


def category(path: Path_, value: Any) -> str:
    """Kind of field: address, stride, count, choice (types, ALUs, modes), operand or sync."""
    names = [p for p in path if isinstance(p, str)]
    if names[0] in ("after", "context"):
        return "sync"
    if isinstance(value, bool | IntEnum) or names[-1] == "group":
        return "choice"
    if names[-1] in ("value", "operand2"):
        return "operand"
    if names[-1] in ("base", "trf_base", "register", "moves", "routine") or path[-2:] == ("second", 0):
        return "address"
    if names[-1] in ("strides", "second") or (names[-1] == "loops" and path[-1] != 0):
        return "stride"
    return "count"


def reachable(stream: Stream) -> list[int]:
    """Routines that the entry calls, directly or not (those of other pipeline stages are in the stream as well)."""
    found = [0]
    for number in found:
        for i in stream.routines[number].instructions:
            if isinstance(i.what, Call) and i.what.routine not in found:
                found.append(i.what.routine)
    return sorted(found)


def anything(_: Instruction) -> bool:
    """Every instruction may be changed."""
    return True


def mutate(stream: Stream, rng: random.Random, wanted: Callable[[Instruction], bool] = anything) -> Mutant:
    """One random field of one random instruction changed (not its source location, which has no meaning to hardware).

    wanted: which instructions may be changed. The kind of field is drawn before the field, so that the many dependency
    counts do not crowd out the rest.
    """
    places = [(r, i) for r in reachable(stream) for i, one in enumerate(stream.routines[r].instructions) if wanted(one)]
    r, i = rng.choice(places)
    instruction = stream.routines[r].instructions[i]
    found: dict[str, list[tuple[Path_, Any]]] = {}
    for path, value in leaves(instruction):
        if path != ("location",):
            found.setdefault(category(path, value), []).append((path, value))
    path, old = rng.choice(found[rng.choice(sorted(found))])
    # Small integers in a memset are subnormal numbers, which are zero: take patterns that are not.
    fill = type(instruction.what).__name__ == "Memset" and path[-1] == "value"
    new = rng.choice([0x3F803F80, 0x7FC07FC0]) if fill else another(old, rng)
    body = list(stream.routines[r].instructions)
    changed: Instruction = replaced(instruction, path, new)
    body[i] = changed
    routines = list(stream.routines)
    routines[r] = Routine(stream.routines[r].name, tuple(body))
    return Mutant(dataclasses.replace(stream, routines=tuple(routines)), r, i, path, old, new)


# Program -------------------------------------------------------------------------------------------------------------
class Program:
    """A lowered `tc` module with random weights and inputs, ready to run on the functional simulator."""

    def __init__(self, name: str, positions: list[int], prefetch: bool = True) -> None:
        module = parse_module((DATA / name).read_text("utf-8"))
        outline(module)
        self.lowered: Lowered = lower(module, MACHINE, LoweringOptions(cache_capacity=32, cache_batch=2))
        self.top = place(self.lowered.module, MACHINE, prefetch=prefetch)
        schedule(self.lowered.module)
        self.emitted: Emitted = emit(self.lowered.module, MACHINE)
        self.stream = self.emitted.streams[0]
        # The second batch row of the caches, so that a wrong register is a wrong address.
        self.registers = {register: row for row, register in self.emitted.row_registers.items()}
        self.memory = self._memory(positions)
        self.checked = [
            (self.emitted.globals[p.buffer].address, self.emitted.globals[p.buffer].nbytes)
            for p in (*self.lowered.outputs, *self.lowered.caches)
        ]
        self.expected = self.run(self.stream)

    def _memory(self, positions: list[int]) -> dict[int, np.ndarray[Any, Any]]:
        rng = np.random.default_rng(7)
        out: dict[int, np.ndarray[Any, Any]] = {}
        places = self.emitted.globals
        for name, p in self.lowered.placements.items():
            if p.dtype == "f32":
                values = rng.uniform(0.05, 1.0, p.bytes // 4).astype(np.float32)
            else:
                values = rng.normal(0, 0.3, p.bytes // 2).astype(ml_dtypes.bfloat16)
            out[places[name].address] = values
        for port in self.lowered.caches:
            out[places[port.buffer].address] = rng.normal(0, 1, places[port.buffer].nbytes // 2).astype(
                ml_dtypes.bfloat16
            )
        for name, values in self.lowered.constants.items():
            out[places[name].address] = values
        tokens = rng.integers(0, 1024, len(positions)).astype(np.int32)
        contents = {"input_ids": tokens, "position_ids": np.array(positions, np.int32)}
        contents["last"] = np.array([len(positions) - 1], np.int32)
        for port in self.lowered.inputs:
            place_ = places[port.buffer]
            image = np.zeros(place_.nbytes, np.uint8)
            image[: len(contents[port.name]) * 8].view(np.int32)[::2] = contents[port.name]
            out[place_.address] = image
        return out

    def run(self, stream: Stream) -> list[bytes]:
        """Outputs and caches after running a stream; raises SimulationError."""
        card = Card(MACHINE, self.top["hbm"] + 4096)
        for address, values in self.memory.items():
            card.write(address, values)
        Unit(card, stream.slices).run(stream, self.registers)
        return [card.read(address, nbytes).tobytes() for address, nbytes in self.checked]

    def verdict(self, stream: Stream) -> str:
        """How a changed stream is caught: the rule, `simulator`, `result`, or an empty string if nothing differs."""
        found = errors(dataclasses.replace(self.emitted, streams=(stream,)).check(MACHINE))
        if found:
            return found[0].rule
        try:
            return "result" if self.run(stream) != self.expected else ""
        except SimulationError:
            return "simulator"
