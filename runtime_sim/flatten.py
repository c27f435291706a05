"""Streams unrolled for timing: every executed instruction with the completion counts it waits for.

A routine's `After` counts from its own start; here they become counts from the start of the program, so that one rule
(`need`) covers waits inside a routine, waits for completed calls and waits for everything before the routine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from backend_rngd.isa.descriptors import Call, Context, Routine, Stream
from runtime_sim.errors import SimulationError, Site, layer_name

Counts = tuple[int, int, int]


@dataclass(frozen=True)
class CallSite:
    """One executed call. parent: index of the caller's entry (-1 for the entry routine), depth 0 for the entry."""

    unit: int
    routine: int
    parent: int
    index: int
    depth: int
    first: int
    end: int


@dataclass(frozen=True)
class Flat:
    """Executed instructions in program order, unit after unit.

    unit, context, routine, index (of the instruction in its routine), call (index in `calls`); need [n, 3]:
    instructions of main, sub and dma of the same unit, from the start of the program, that must be complete.
    """

    streams: tuple[Stream, ...]
    unit: NDArray[np.int64]
    context: NDArray[np.int64]
    routine: NDArray[np.int64]
    index: NDArray[np.int64]
    call: NDArray[np.int64]
    need: NDArray[np.int64]
    calls: tuple[CallSite, ...]

    def __len__(self) -> int:
        return len(self.unit)

    def site(self, i: int) -> Site:
        """Place of an executed instruction."""
        stream = self.streams[int(self.unit[i])]
        routine = stream.routines[int(self.routine[i])]
        instruction = routine.instructions[int(self.index[i])]
        layer = layer_of(stream, self.calls, int(self.call[i]))
        return Site(routine.name, int(self.index[i]), stream.locations[instruction.location], layer)


def layer_of(stream: Stream, calls: Sequence[CallSite], call: int) -> str:
    """Layer that an executed call belongs to: the location of the entry routine's call, empty in the entry itself."""
    while calls[call].depth > 1:
        call = calls[call].parent
    site = calls[call]
    if site.depth == 0:
        return ""
    caller = stream.routines[calls[site.parent].routine]
    return layer_name(stream.locations[caller.instructions[site.index].location])


class _Leaf:
    """A routine without calls as arrays relative to its start."""

    def __init__(self, routine: Routine) -> None:
        items = routine.instructions
        self.context = np.array([int(x.context) for x in items], np.int64)
        self.after = np.array([(x.after.main, x.after.sub, x.after.dma) for x in items], np.int64).reshape(-1, 3)
        self.enter = np.array([x.after.enter for x in items], np.bool_)
        before = np.stack([np.cumsum(self.context == c) - (self.context == c) for c in range(3)], axis=1)
        future = np.argwhere(self.after > before)
        self.future: tuple[int, str] | None = None
        if len(future):
            i, c = (int(x) for x in future[0])
            name = Context(c).name.lower()
            self.future = (i, f"waits for {self.after[i, c]} {name} instructions, {before[i, c]} come before it")
        self.totals: Counts = tuple(int((self.context == c).sum()) for c in range(3))  # type: ignore[assignment]


class _Unroller:
    def __init__(self, unit: int, stream: Stream) -> None:
        self.unit = unit
        self.stream = stream
        self.rows: list[NDArray[np.int64]] = []  # columns: context, routine, index, call, need x 3
        self.calls: list[CallSite] = []
        self.counts = [0, 0, 0]
        self.length = 0
        self.leaves: dict[int, _Leaf] = {}
        self.calling = [any(isinstance(x.what, Call) for x in routine.instructions) for routine in stream.routines]

    def run(self, routine: int, gate: Counts, parent: int, index: int, depth: int) -> None:
        """Append one execution of a routine; `gate` is what the call itself waits for."""
        if depth > 64:
            raise SimulationError(SimulationError.ILLEGAL, "calls nested deeper than 64")
        me = len(self.calls)
        first = self.length
        self.calls.append(CallSite(self.unit, routine, parent, index, depth, first, first))
        if self.calling[routine]:
            self._with_calls(routine, gate, me, depth)
        else:
            self._leaf(routine, gate, me)
        self.calls[me] = CallSite(self.unit, routine, parent, index, depth, first, self.length)

    def _leaf(self, routine: int, gate: Counts, me: int) -> None:
        leaf = self.leaves.get(routine)
        if leaf is None:
            leaf = self.leaves[routine] = _Leaf(self.stream.routines[routine])
            if leaf.future is not None:
                index, what = leaf.future
                raise SimulationError(
                    SimulationError.DEADLOCK, what, "a wait may not refer to the future", self._site(routine, index, me)
                )
        n = len(leaf.context)
        base = np.array(self.counts, np.int64)
        need = np.where(leaf.after > 0, leaf.after + base, 0)
        need = np.maximum(need, np.where(leaf.enter[:, None], base, 0))
        need = np.maximum(need, np.array(gate, np.int64))
        rows = np.empty((n, 7), np.int64)
        rows[:, 0] = leaf.context
        rows[:, 1] = routine
        rows[:, 2] = np.arange(n)
        rows[:, 3] = me
        rows[:, 4:] = need
        self.rows.append(rows)
        self.length += n
        for c in range(3):
            self.counts[c] += leaf.totals[c]

    def _with_calls(self, routine: int, gate: Counts, me: int, depth: int) -> None:
        entered = tuple(self.counts)
        own: list[list[int]] = [[], [], []]  # program-wide count after the n-th own instruction of a context
        after_call: list[Counts] = []
        for index, item in enumerate(self.stream.routines[routine].instructions):
            after = item.after
            need = list(gate)
            for c, wanted in enumerate((after.main, after.sub, after.dma)):
                if wanted > len(own[c]):
                    raise SimulationError(
                        SimulationError.DEADLOCK,
                        f"waits for {wanted} {Context(c).name.lower()} instructions, {len(own[c])} come before it",
                        "a wait may not refer to the future",
                        self._site(routine, index, me),
                    )
                if wanted:
                    need[c] = max(need[c], own[c][wanted - 1])
                if after.enter:
                    need[c] = max(need[c], entered[c])
                if after.call:
                    if after.call > len(after_call):
                        raise SimulationError(
                            SimulationError.DEADLOCK,
                            f"waits for {after.call} calls, {len(after_call)} come before it",
                            "a wait may not refer to the future",
                            self._site(routine, index, me),
                        )
                    need[c] = max(need[c], after_call[after.call - 1][c])
            if isinstance(item.what, Call):
                self.run(item.what.routine, (need[0], need[1], need[2]), me, index, depth + 1)
                after_call.append((self.counts[0], self.counts[1], self.counts[2]))
                continue
            self.rows.append(np.array([[int(item.context), routine, index, me, *need]], np.int64))
            self.length += 1
            self.counts[item.context] += 1
            own[item.context].append(self.counts[item.context])

    def _site(self, routine: int, index: int, call: int) -> Site:
        body = self.stream.routines[routine]
        location = self.stream.locations[body.instructions[index].location]
        return Site(body.name, index, location, layer_of(self.stream, self.calls, call))


Unrolled = tuple[NDArray[np.int64], list[CallSite]]


def unroll(stream: Stream, routine: int = 0, repeats: int = 1) -> Unrolled:
    """A stream executed `repeats` times in a row: rows (context, routine, index, call, need x 3) and its calls."""
    unroller = _Unroller(0, stream)
    for _ in range(repeats):
        unroller.run(routine, (0, 0, 0), -1, 0, 0)
    rows = np.concatenate(unroller.rows) if unroller.rows else np.zeros((0, 7), np.int64)
    return rows, unroller.calls


def join(streams: Sequence[Stream], parts: Sequence[Unrolled]) -> Flat:
    """Unrolled streams as the units 0, 1, ... of one program."""
    blocks: list[NDArray[np.int64]] = []
    calls: list[CallSite] = []
    position = 0
    for number, (rows, own) in enumerate(parts):
        shift = len(calls)
        calls += [
            CallSite(number, c.routine, c.parent + shift if c.parent >= 0 else -1, c.index, c.depth,
                     c.first + position, c.end + position)
            for c in own
        ]  # fmt: skip
        position += len(rows)
        blocks.append(rows + np.array([0, 0, 0, shift, 0, 0, 0]) if shift else rows)
    table = blocks[0] if len(blocks) == 1 else np.concatenate(blocks)
    return Flat(
        tuple(streams),
        np.repeat(np.arange(len(parts), dtype=np.int64), [len(rows) for rows, _ in parts]),
        np.ascontiguousarray(table[:, 0]),
        np.ascontiguousarray(table[:, 1]),
        np.ascontiguousarray(table[:, 2]),
        np.ascontiguousarray(table[:, 3]),
        np.ascontiguousarray(table[:, 4:]),
        tuple(calls),
    )


def flatten(streams: Sequence[Stream], routine: int = 0, repeats: int = 1) -> Flat:
    """Unroll the streams of all units, each `repeats` times in a row."""
    known: dict[int, Unrolled] = {}
    for stream in streams:
        if id(stream) not in known:
            known[id(stream)] = unroll(stream, routine, repeats)
    return join(streams, [known[id(stream)] for stream in streams])
