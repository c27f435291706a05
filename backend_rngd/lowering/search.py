"""Bounded search for the mapping of a contraction, by predicted time.

A candidate is lowered alone, into a module that is thrown away, and its instructions are played on the in-order queues
of a unit (`backend_rngd.queues`) with the closed forms of the machine as measured and the unit's share of HBM. So the
prediction knows what the engines really emit, and an engine that changes needs no other model.

What counts is what a contraction adds to a program, in which weights are fetched ahead as far as DM has room. So two of
them are lowered, the second with the result of the first as its tokens, and the prediction is what the second adds.
Candidates must not take more DM than the fixed mapping, so that the program around them is placed as before.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from typing import Any, Protocol, TypeVar, cast

import numpy as np
from numpy.typing import NDArray
from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import Attribute, Operation, SSAValue

from backend_rngd.attributes import bytes_of, space_of
from backend_rngd.dialect import GlobalOp, InstructionOp, RoutineOp
from backend_rngd.liveness import constant_values, live_bytes
from backend_rngd.lowering.choices import Choice, heard, record, unheard
from backend_rngd.lowering.emitter import Emitter
from backend_rngd.lowering.mapping import Mapping, describe, variants
from backend_rngd.machine import Machine
from backend_rngd.queues import items_of, measured, play

TRIALS = 24  # candidates of a contraction at most
INSTRUCTIONS = 2000  # of all its trials together at most
ROUNDS = 2  # over all knobs
WORTH = 0.02  # of the time: what the predictions cannot tell apart stays as it is
DM_SHARE = 0.9  # of data memory, for what is fetched ahead
LEAST_BUFFER = 8  # bytes
LEAST_BYTES = 1 << 20  # of weights: less is over before a mapping matters

T = TypeVar("T")
Attempt = Callable[[Emitter, Mapping], SSAValue]
"""Lowers the contraction with stand-ins for everything that it touches; returns that of the tokens."""


@dataclass(frozen=True)
class Shape:
    """What the search is for: everything that a mapping's time depends on, as plain values.

    what: kind of the contraction, for people. operand, result: where they lie and how. weights: rows and columns of the
    matrices. mapping: the fixed one. knobs: what may be changed of it. scale: times that the contraction is as large as
    what is tried.
    """

    what: str
    operand: str
    result: str
    weights: str
    early: int
    mapping: Mapping
    knobs: tuple[str, ...]
    scale: float = 1.0


@dataclass(frozen=True)
class Trial:
    """A candidate that was lowered alone. nbytes: DM of a slice. early: whether weights come before the routine."""

    cycles: float
    nbytes: int
    early: bool
    instructions: int = 0


@dataclass(frozen=True)
class Found:
    """What was tried, in order, the fixed mapping first; `best` is the number of the one that is taken."""

    mappings: tuple[Mapping, ...]
    cycles: tuple[float, ...]
    best: int

    def to_json(self) -> dict[str, Any]:
        """A JSON-able form."""
        return {"mappings": [asdict(m) for m in self.mappings], "cycles": list(self.cycles), "best": self.best}

    @staticmethod
    def from_json(data: dict[str, Any]) -> Found:
        """The inverse. Raises KeyError, TypeError or ValueError for anything else."""
        return Found(tuple(Mapping(**m) for m in data["mappings"]), tuple(data["cycles"]), int(data["best"]))


class Memory(Protocol):
    """Results of earlier searches by their key."""

    def get(self, key: dict[str, Any]) -> dict[str, Any] | None:
        """What was put there, or None."""
        ...

    def put(self, key: dict[str, Any], found: dict[str, Any]) -> None:
        """Keep a result."""
        ...


_memory: ContextVar[Memory | None] = ContextVar("_memory", default=None)


@contextmanager
def remembering(memory: Memory | None) -> Generator[None]:
    """Searches inside ask `memory` first, and tell it what they find."""
    token = _memory.set(memory)
    try:
        yield
    finally:
        _memory.reset(token)


_FOUND: dict[tuple[Shape, str, int, int], Found] = {}
_MOST_FOUND = 4096


@dataclass
class Search:
    """Chooses mappings for a program of `units` units on machines like `machine`."""

    machine: Machine
    slices: int
    units: int
    enabled: bool = True

    def best(self, shape: Shape, nbytes: int, where: str, attempt: Attempt) -> Mapping:
        """The mapping that is predicted to be fastest, for a contraction with `nbytes` bytes of weights."""
        if self.enabled and nbytes >= LEAST_BYTES:
            found = self._found(shape, attempt)
        elif heard():
            found = Found((shape.mapping,), (shape.scale * self.tried(attempt, shape.mapping, shape.early).cycles,), 0)
        else:
            return shape.mapping
        names = [describe(m) for m in found.mappings]
        why = self._why(found, nbytes)
        record(
            Choice(
                where, "contraction", shape.what, dict(zip(names, found.cycles, strict=True)), names[found.best], why
            )
        )
        return found.mappings[found.best]

    def _why(self, found: Found, nbytes: int) -> str:
        fixed, least = found.cycles[0], min(found.cycles)
        if not self.enabled:
            return "fixed: this -O level does not search"
        if nbytes < LEAST_BYTES:
            return f"fixed: {nbytes:,} B of weights are not worth a search"
        if found.best:
            return f"{1 - least / fixed:.1%} less than the fixed mapping"
        if least < fixed:
            return f"the fixed mapping; {1 - least / fixed:.1%} less is not more than predictions tell apart"
        return "the fixed mapping; no other one that was tried takes less"

    def _found(self, shape: Shape, attempt: Attempt) -> Found:
        key = (shape, self.machine.name, self.slices, self.units)
        if key in _FOUND:
            return _FOUND[key]
        memory = _memory.get()
        inputs = {
            "shape": asdict(shape), "machine": self.machine.name, "slices": self.slices, "units": self.units
        }  # fmt: skip
        known = memory.get(inputs) if memory is not None else None
        if known is not None:
            found = Found.from_json(known)
        else:
            found = self._search(shape, attempt)
            if memory is not None:
                memory.put(inputs, found.to_json())
        if len(_FOUND) >= _MOST_FOUND:
            _FOUND.clear()
        _FOUND[key] = found
        return found

    def _search(self, shape: Shape, attempt: Attempt) -> Found:
        """One knob after the other, from the fixed mapping on."""
        fixed = self.tried(attempt, shape.mapping, shape.early)
        tried: dict[Mapping, float] = {shape.mapping: fixed.cycles}
        known = {shape.mapping}  # also those that need too much memory
        best, left = shape.mapping, INSTRUCTIONS - fixed.instructions
        for _ in range(ROUNDS):
            before = best
            for knob in shape.knobs:
                for other in variants(best, knob):
                    if other in known or len(known) >= TRIALS or left <= 0:
                        continue
                    trial = self.tried(attempt, other, shape.early)
                    known.add(other)
                    left -= trial.instructions
                    if trial.nbytes <= fixed.nbytes and trial.early == fixed.early:
                        tried[other] = trial.cycles
                best = min(tried, key=lambda m: tried[m])
            if best == before:
                break
        if tried[best] > (1 - WORTH) * fixed.cycles:
            best = shape.mapping
        order = list(tried)
        return Found(tuple(order), tuple(shape.scale * tried[m] for m in order), order.index(best))

    def tried(self, attempt: Attempt, mapping: Mapping, early: int = 0) -> Trial:
        """Predicted time of a mapping. early: bytes a slice for weights that come before the routine."""
        module, routine = ModuleOp([]), RoutineOp("trial", [])
        module.body.block.add_op(routine)
        em = Emitter(module, routine.block, self.machine, self.slices, "trial", probes=False, early_bytes=early)
        em.memset(em.alloc(LEAST_BUFFER), 0, LEAST_BUFFER)  # weights that come early go before what stands first
        halves: list[int] = []
        operand: SSAValue | None = None
        with unheard():
            for _ in range(2):
                operand = attempt(em, mapping)
                halves.append(sum(isinstance(op, InstructionOp) for op in routine.block.ops))
        assert operand is not None
        cycles = self._predicted(module, routine, halves[0], operand)
        return Trial(cycles, int(live_bytes(routine).counts.max()), em.early_bytes < early, halves[1])

    def _predicted(self, module: ModuleOp, routine: RoutineOp, half: int, operand: SSAValue) -> float:
        """Cycles that the second of two equal contractions adds, whose tokens are what the first computes."""
        cycles = measured(self.machine, self.units)
        segment = [op for op in routine.block.ops if isinstance(op, InstructionOp)]
        items = items_of(segment, constant_values(module), cycles)
        last = {item.context: i for i, item in enumerate(items[:half])}
        for item in items[half:]:
            if operand in item.op.operands:
                item.needs = (*item.needs, *last.values())
        taken = sum(
            op.buffer_type.nbytes.data
            for op in module.body.block.ops
            if isinstance(op, GlobalOp) and op.buffer_type.space.data == "dm"
        )
        budget = int(self.machine.dm_slice_bytes * DM_SHARE) - taken
        live = live_bytes(routine)
        times: list[float] = []
        for count in (half, len(items)):
            counts = live.counts.copy()
            for item in items:
                item.finish = -1.0

            def moves(head: int, ahead: int, counts: NDArray[np.int64] = counts) -> bool:
                item = items[head]
                if ahead < item.earliest or counts[ahead:head].max() + item.nbytes > budget:
                    return False
                counts[ahead:head] += item.nbytes
                return True

            play(items[:count], self.units, self.machine, moves)
            times.append(max(item.finish for item in items[:count]))
        return times[1] - times[0]


def tell_attention(em: Emitter, before: Operation | None, units: int, what: str, way: str, why: str) -> None:
    """Record how an attention was done, which has no alternatives yet: its instructions are those behind `before`, and
    what they take by themselves, in their order, is the prediction."""
    if not heard():
        return
    op = em.block.first_op if before is None else before.next_op
    segment: list[InstructionOp] = []
    while op is not None:
        if isinstance(op, InstructionOp):
            segment.append(op)
        op = op.next_op
    items = items_of(segment, set(), measured(em.machine, units))
    play(items, units, em.machine, lambda head, ahead: False)
    cycles = max((item.finish for item in items), default=0.0)
    record(Choice(em.location, "attention", what, {way: cycles}, way, why))


class StandIns:
    """Buffers of a trial in place of those of the program."""

    def __init__(self, em: Emitter) -> None:
        self.em = em
        self._of: dict[SSAValue, SSAValue] = {}

    def __call__(self, value: T, kind: str = "activation") -> T:
        """`value` with all its buffers replaced by globals of `kind`."""
        return cast(T, self._replaced(value, kind))

    def _replaced(self, value: Any, kind: str) -> Any:
        if isinstance(value, SSAValue):
            value = cast("SSAValue[Attribute]", value)
            if value not in self._of:
                name = f"stand-in {len(self._of)}"
                self._of[value] = self.em.global_buffer(name, space_of(value), bytes_of(value), kind)
            return self._of[value]
        if isinstance(value, tuple):
            return tuple(self._replaced(v, kind) for v in cast("Sequence[Any]", value))
        if is_dataclass(value) and not isinstance(value, type):
            changed = {f.name: self._replaced(getattr(value, f.name), kind) for f in fields(value)}
            old = {name: getattr(value, name) for name in changed}
            new = {name: v for name, v in changed.items() if v is not old[name]}
            return replace(value, **new) if new else value
        return value


@dataclass
class Alone:
    """The units of a trial that exchanges values (see `group.Units`)."""

    machine: Machine
    units: int
    phases: int = 0

    def launch_register(self, values: tuple[int, ...]) -> int:
        """Any register: nothing is executed."""
        return int(any(values))

    def semaphore(self) -> int:
        """The next one; a trial may have more exchanges than there are."""
        self.phases += 1
        return (self.phases - 1) % self.machine.semaphores
