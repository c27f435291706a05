"""Runs the programs of an artifact on a simulated card: loads weights, feeds inputs, reads outputs, tells the time.

    device = Device(open_artifact(path))
    device.load()
    logits = device.run(bucket, {"input_ids": ids, ...})["logits"]
    device.time(bucket).seconds

`generate.py` builds text generation and embedding on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from backend_rngd.artifact import Artifact, ArtifactError, ArtifactProblem, Bucket, Cache, Port, placed
from backend_rngd.artifact.weights import DTYPES
from backend_rngd.machine import Machine, load_machine
from backend_rngd.machine.description import Mode
from runtime_sim.functional import Card, Observer, Unit
from runtime_sim.timing import TimingResult, simulate

Array = NDArray[Any]
PAGE = 4096


class Device:
    """A simulated card with an artifact on it."""

    def __init__(self, artifact: Artifact, mode: Mode = "documented", checks: bool = False) -> None:
        """`checks` finds uninitialised reads. Raises ArtifactError if the machine description has changed."""
        self.artifact = artifact
        manifest = artifact.manifest
        self.machine = machine_of(artifact, mode)
        self.card = Card(self.machine, -(-manifest.hbm.total // PAGE) * PAGE)
        self.unit = Unit(self.card, manifest.parallel.slices, checks)
        self._times: dict[str, TimingResult] = {}

    def load(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Copy weights and constants to HBM and clear the caches. `progress(done, total)` counts bytes.

        Raises ArtifactError with all linked files that are missing or changed, or if the artifact has no weights.
        """
        manifest = self.artifact.manifest
        if manifest.weights_mode == "none":
            fix = "build with --weights link, copy or random to compute tokens"
            what = f"{self.artifact.directory} has no weights"
            raise ArtifactError([ArtifactProblem(what, "it was built for timing only (--weights none)", fix)])
        self.artifact.check_linked()
        total = sum(p.bytes for p in manifest.placements)
        done = 0
        for placement in manifest.placements:
            self.card.write(placement.address, placed(self.artifact.weight(placement.weight), placement))
            done += placement.bytes
            if progress is not None:
                progress(done, total)
        raw = self.artifact.constant_bytes()
        for constant in manifest.constants:
            self.card.write(constant.address, raw[constant.offset : constant.offset + constant.bytes])
        self.clear_caches()

    def clear_caches(self) -> None:
        """Zero every KV cache."""
        for cache in self.artifact.manifest.caches:
            self.card.clear(cache.address, cache.bytes)

    def run(
        self, bucket: Bucket, inputs: Mapping[str, Array], row: int = 0, observer: Observer | None = None
    ) -> dict[str, Array]:
        """Execute a program and return its outputs by name.

        `inputs` have the shapes of the bucket's ports; inputs that the program does not have are ignored, missing ones
        are an error. `row` is the cache row of the program's first batch row. Raises SimulationError.
        """
        for port in bucket.inputs:
            write_port(self.card, port, inputs[port.name])
        self.unit.reset()
        registers = {register: row * nbytes for nbytes, register in bucket.row_registers.items()}
        self.unit.run(self.artifact.stream(bucket), registers, observer)
        return {port.name: read_port(self.card, port) for port in bucket.outputs}

    def time(self, bucket: Bucket) -> TimingResult:
        """When a program's instructions run; simulated once a bucket, for it does not depend on values."""
        if bucket.name not in self._times:
            self._times[bucket.name] = simulate(self.artifact.stream(bucket), self.machine)
        return self._times[bucket.name]


def read_cache(card: Card, cache: Cache, rows: int, length: int) -> Array:
    """Keys or values [rows, heads, length, width] of the first rows and positions of a cache."""
    shape = (cache.batch, cache.heads, cache.capacity, cache.width)
    whole = card.read(cache.address, cache.bytes).view(DTYPES["bf16"])[: math.prod(shape)].reshape(shape)
    return whole[:rows, :, :length]


def write_cache(card: Card, cache: Cache, values: Array) -> None:
    """Write keys or values [rows, heads, length, width] to the start of a cache; the rest becomes zero."""
    shape = (cache.batch, cache.heads, cache.capacity, cache.width)
    whole = np.zeros(shape, DTYPES["bf16"])
    whole[: values.shape[0], :, : values.shape[2]] = values
    card.write(cache.address, whole)


def machine_of(artifact: Artifact, mode: Mode) -> Machine:
    """The machine an artifact was built for. Raises ArtifactError if its description has changed since."""
    made_for = artifact.manifest.machine
    machine = load_machine(made_for.name, mode)
    if machine.digest() != made_for.digest:
        why = "its numbers differ from those of this version, so that addresses and times may be wrong"
        what = f"{artifact.directory} was built for another description of machine {made_for.name}"
        raise ArtifactError([ArtifactProblem(what, why, "build it again")])
    return machine


def write_port(card: Card, port: Port, values: Array) -> None:
    """Write an input: zeros everywhere, then every element at its place."""
    dtype = DTYPES[port.dtype]
    if tuple(values.shape) != port.shape:
        raise ValueError(f"input {port.name} has shape {list(values.shape)}, the program takes {list(port.shape)}")
    raw = np.zeros(port.bytes, np.uint8)
    _elements(raw, port)[...] = (
        np.ascontiguousarray(values.astype(dtype)).view(np.uint8).reshape(*port.shape, dtype.itemsize)
    )
    card.write(port.address, raw)


def read_port(card: Card, port: Port) -> Array:
    """Read an output as a dense array of its element type."""
    dtype = DTYPES[port.dtype]
    span = sum((n - 1) * s for n, s in zip(port.shape, port.strides, strict=True)) + dtype.itemsize
    raw = card.read(port.address, span)
    return np.ascontiguousarray(_elements(raw, port)).view(dtype).reshape(port.shape)


def _elements(raw: NDArray[np.uint8], port: Port) -> NDArray[np.uint8]:
    """The bytes of every element of a port: shape + (element size,)."""
    size = DTYPES[port.dtype].itemsize
    return as_strided(raw, (*port.shape, size), (*port.strides, 1))
