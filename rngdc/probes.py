"""Reading the values of `tc` operations out of the memories of a running program.

debug/<bucket>.json says for each value `function#operation.result` after how many instructions of a routine it is
complete, in which memory it lies, and where each element is.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backend_rngd.artifact import Artifact, Bucket
from backend_rngd.artifact.stages import CUT, PREPARE, passes_of, role
from backend_rngd.artifact.weights import DTYPES
from backend_rngd.isa.descriptors import Call, Stream
from runtime_sim.functional import Executed, Unit

Array = NDArray[Any]
Key = tuple[tuple[str, ...], str]
"""A value in a run: the chain of calls such as `("main", "block_0[3]")`, and `function#operation.result`."""


@dataclass(frozen=True)
class Probe:
    """Where a value lies: byte offsets of every index of every dimension, added up, and the slice likewise."""

    value: str
    space: str
    register: int
    address: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    slices: tuple[NDArray[np.int64], ...]
    offsets: tuple[NDArray[np.int64], ...]

    def read(self, unit: Unit) -> Array:
        """The value, from the memories as they are now."""
        slices = _outer_sum(self.slices, self.shape)
        offsets = _outer_sum(self.offsets, self.shape) + self.address
        if self.space == "hbm":
            flat, at = unit.window.hbm, offsets + unit.registers[self.register]
        else:
            flat, at = unit.dm.bytes, slices * unit.dm.pitch + offsets
        raw = flat[at[..., None] + np.arange(self.dtype.itemsize)]
        return np.ascontiguousarray(raw).view(self.dtype).reshape(self.shape)


def _outer_sum(parts: tuple[NDArray[np.int64], ...], shape: tuple[int, ...]) -> NDArray[np.int64]:
    total = np.zeros(shape, np.int64)
    for dim, part in enumerate(parts):
        total += part.reshape([-1 if d == dim else 1 for d in range(len(shape))])
    return total


def parse_probe(entry: dict[str, Any]) -> Probe:
    """A probe from its JSON form. Digits of a dimension run outer to inner: [dim, size, slice stride, byte stride]."""
    layout = entry["layout"]
    shape = tuple(int(n) for n in layout["shape"])
    slices: list[NDArray[np.int64]] = []
    offsets: list[NDArray[np.int64]] = []
    for dim, size in enumerate(shape):
        digits = [d for d in layout["digits"] if d[0] == dim]
        steps = list(itertools.product(*[range(d[1]) for d in digits]))[:size]
        steps = steps if digits else [()] * size
        slices.append(np.array([sum(i * d[2] for i, d in zip(s, digits, strict=True)) for s in steps], np.int64))
        offsets.append(np.array([sum(i * d[3] for i, d in zip(s, digits, strict=True)) for s in steps], np.int64))
    return Probe(
        entry["value"], entry["space"], entry["register"], entry["address"] + layout["base"], DTYPES[layout["dtype"]],
        shape, tuple(slices), tuple(offsets),
    )  # fmt: skip


Probes = dict[tuple[int, int], list[Probe]]
"""By routine and index of the instruction that completes the value."""


def read_probes(artifact: Artifact, bucket: Bucket) -> Probes:
    """The probes of a bucket's stream."""
    probes: Probes = defaultdict(list)
    for entry in json.loads(artifact.text(bucket.debug)):
        after = max(0, entry["instructions"] - 1)
        probes[entry["routine"], after].append(parse_probe(entry))
    return dict(probes)


class ProbeReader:
    """Observer of a run of a unit that keeps every probed value."""

    def __init__(self, probes: Probes, streams: Sequence[Stream], unit: Unit, stage: int = 0) -> None:
        """`streams`: those of the pipeline's stages, the unit executes `streams[stage]`."""
        self.unit = unit
        self.values: dict[Key, Array] = {}
        self.order: list[Key] = []
        self._calls = _call_names(streams, stage)
        stream = streams[stage]
        self._entry = stream.routines[0].name
        # The entry of a stage is made of calls, with other indices than those of the whole program.
        self._probes = {at: p for at, p in probes.items() if len(streams) == 1 or at[0] != 0}

    def __call__(self, executed: Executed) -> None:
        """Read what the instruction completed."""
        for probe in self._probes.get((executed.routine, executed.index), ()):
            chain = (self._entry, *[self._calls[site] for site in executed.path])
            self.values[chain, probe.value] = probe.read(self.unit)
            self.order.append((chain, probe.value))


def _call_names(streams: Sequence[Stream], stage: int) -> dict[tuple[int, int], str]:
    """(routine, index) of each call in a stage -> callee and its number among the calls of that callee in the routine.

    Calls of the entry are counted chunk by chunk through the stages, so they have the numbers of the whole program;
    every stage cuts and prepares for itself.
    """
    names: dict[tuple[int, int], str] = {}
    parts = [passes_of(stream) for stream in streams]
    seen: Counter[str] = Counter()
    for chunk in range(len(parts[stage])):
        for other, stream in enumerate(streams):
            for callee, index in _callees(stream, 0, parts[other][chunk]):
                if other == stage:
                    names[0, index] = f"{callee}[{seen[callee]}]"
                if other == stage or role(callee) not in (CUT, PREPARE):
                    seen[callee] += 1
    for number, routine in enumerate(streams[stage].routines):
        inner: Counter[str] = Counter()
        for callee, index in _callees(streams[stage], number, range(len(routine.instructions))) if number else ():
            names[number, index] = f"{callee}[{inner[callee]}]"
            inner[callee] += 1
    return names


def _callees(stream: Stream, routine: int, part: range) -> list[tuple[str, int]]:
    """(callee, index) of every call among the instructions `part` of a routine."""
    items = ((i, stream.routines[routine].instructions[i]) for i in part)
    return [(stream.routines[x.what.routine].name, i) for i, x in items if isinstance(x.what, Call)]
