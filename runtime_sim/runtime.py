"""Runs the programs of an artifact on simulated cards: loads weights, feeds inputs, reads outputs, tells the time.

    device = Device(open_artifact(path), pipeline_parallel_size=2)
    device.load()
    logits = device.run(bucket, {"input_ids": ids, ...})["logits"]
    device.time(bucket).seconds

`generate.py` builds text generation and embedding on it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby

from backend_rngd.artifact import Artifact, ArtifactError, ArtifactProblem, Bucket, Cache, Placement, placed
from backend_rngd.artifact.shards import replicas
from backend_rngd.machine import Machine, load_machine
from backend_rngd.machine.description import Mode
from runtime_sim.functional import Observer, Unit
from runtime_sim.group import Launch
from runtime_sim.load import LoadPlan, LoadRequest, plan_load
from runtime_sim.ports import Array, join_cache, read_cache, read_port, split_cache, write_cache, write_port
from runtime_sim.system import System
from runtime_sim.timing import TimingResult, simulate
from runtime_sim.what_if import WhatIf

PAGE = 4096


@dataclass(frozen=True)
class Invocation:
    """One run of a program. `row` is the cache row of the program's first batch row; `observers` see what units do."""

    bucket: Bucket
    inputs: Mapping[str, Array]
    row: int = 0
    observers: Mapping[Unit, Observer] = field(default_factory=dict[Unit, Observer])


class Device:
    """Simulated cards with an artifact on them.

    The artifact fixes how many units work on a layer; pipeline stages (the built number by default) and data-parallel
    replicas are chosen here. Units are neighbours in the order replica, stage, rank.
    """

    def __init__(
        self,
        artifact: Artifact,
        mode: Mode = "documented",
        checks: bool = False,
        pipeline_parallel_size: int | None = None,
        data_parallel_size: int = 1,
        plan: LoadPlan | None = None,
    ) -> None:
        """`checks` finds uninitialised reads, and races between units. `plan` decides on programs, stages, replicas and
        places instead of the two sizes. Raises ArtifactError with everything that is wrong: the machine description
        has changed, the stages do not fit the model, a card is too small."""
        self.machine = machine_of(artifact, mode)
        if plan is None:
            request = LoadRequest(pipeline_parallel_size=pipeline_parallel_size, data_parallel_size=data_parallel_size)
            plan = plan_load(artifact, request, self.machine, need_weights=False, even=False)
        self.artifact = artifact = plan.artifact
        self.residence, topology = plan.residence, plan.topology
        self.checks = checks
        hbm = artifact.manifest.hbm
        self.system = System(
            self.machine, topology.tensor, topology.pipeline, topology.replicas, artifact.manifest.parallel.slices,
            -(-hbm.total // PAGE) * PAGE, hbm.weights + hbm.constants, checks, topology,
        )  # fmt: skip
        self.runs: Counter[str] = Counter()
        """How often each program was run, on all replicas."""
        self.free_collectives = False
        self._times: dict[tuple[str, int], TimingResult] = {}

    @property
    def units(self) -> list[Unit]:
        """All units: replica after replica, stage after stage, rank after rank."""
        return self.system.units

    @property
    def unit(self) -> Unit:
        """The first unit."""
        return self.system.units[0]

    @property
    def stages(self) -> int:
        """Pipeline stages."""
        return self.system.topology.pipeline

    @property
    def replicas(self) -> int:
        """Data-parallel replicas."""
        return self.system.topology.replicas

    # Contents of HBM -------------------------------------------------------------------------------------------------
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
        holders = {p.name: self._holders(p) for p in manifest.placements}
        total = sum(p.bytes * len(holders[p.name]) for p in manifest.placements)
        done = 0
        for placement in manifest.placements:
            done += self._place(placement, holders[placement.name])
            if progress is not None:
                progress(done, total)
        raw = self.artifact.constant_bytes()
        for unit in self.units:
            if unit.window.shared is not None:
                continue
            for constant in manifest.constants:
                first = constant.offset + constant.bytes * (unit.place.rank if constant.per_unit else 0)
                unit.window.write(constant.address, raw[first : first + constant.bytes])
        self.clear_caches()

    def _holders(self, placement: Placement) -> list[Unit]:
        """Units whose windows an image is written to."""
        stages = {s for s, held in enumerate(self.residence.needs) if placement in held.placements}
        return [u for u in self.units if u.place.stage in stages and u.window.shared is None]

    def _place(self, placement: Placement, holders: Sequence[Unit]) -> int:
        """Write an image; returns the bytes written. It is laid out once for all units that hold the same part."""
        if not holders:
            return 0
        mesh = self.artifact.manifest.parallel.mesh
        array = self.artifact.weight(placement.weight)
        parts: dict[int, list[Unit]] = {}
        for unit in holders:
            same = replicas(placement.shard, mesh, unit.place.rank)[0] if placement.shard else 0
            parts.setdefault(same, []).append(unit)
        for rank, units in parts.items():
            image = placed(array, placement, mesh, rank)
            for unit in units:
                unit.window.write(placement.address, image)
        return placement.bytes * len(holders)

    def clear_caches(self) -> None:
        """Zero every KV cache."""
        for unit in self.units:
            for cache in self.residence.needs[unit.place.stage].caches:
                unit.window.clear(cache.address, cache.bytes)

    def read_cache(self, cache: Cache, rows: int, length: int, replica: int = 0) -> Array:
        """Keys or values [rows, heads, length, width] of the first rows and positions of a cache, all heads."""
        units = self.system.stage(self.residence.stage_of(cache.name), replica)
        parts = [read_cache(unit.window, cache, rows, length) for unit in units]
        return join_cache(cache, parts, self.artifact.manifest.parallel.mesh)

    def write_cache(self, cache: Cache, values: Array, replica: int = 0) -> None:
        """Write keys or values [rows, heads, length, width] of all heads to the start of a cache; the rest is zero."""
        mesh = self.artifact.manifest.parallel.mesh
        for unit in self.system.stage(self.residence.stage_of(cache.name), replica):
            write_cache(unit.window, cache, split_cache(cache, values, mesh, unit.place.rank))

    # Running ---------------------------------------------------------------------------------------------------------
    def run(
        self,
        bucket: Bucket,
        inputs: Mapping[str, Array],
        row: int = 0,
        observers: Mapping[Unit, Observer] | None = None,
        replica: int = 0,
    ) -> dict[str, Array]:
        """Execute a program and return its outputs by name.

        `inputs` have the shapes of the bucket's ports; inputs that the program does not have are ignored, missing ones
        are an error. `row` is the cache row of the program's first batch row. Raises SimulationError.
        """
        return self.run_all([Invocation(bucket, inputs, row, observers or {})], replica)[0]

    def run_all(self, invocations: Sequence[Invocation], replica: int = 0) -> list[dict[str, Array]]:
        """Execute programs on a replica. With stages, runs of one program that follow each other are in flight at once;
        another program begins when they have left, for its buffers lie elsewhere. Raises SimulationError."""
        self.runs.update(invocation.bucket.name for invocation in invocations)
        units = self.system.replica(replica)
        outputs: list[dict[str, Array]] = [{} for _ in invocations]
        if len(units) == 1:
            for invocation, found in zip(invocations, outputs, strict=True):
                self._alone(units[0], invocation, found)
            return outputs
        pairs = zip(invocations, outputs, strict=True)
        for _, equal in groupby(pairs, key=lambda pair: pair[0].bucket.name):
            self._together(list(equal), replica)
        return outputs

    def _together(self, work: Sequence[tuple[Invocation, dict[str, Array]]], replica: int) -> None:
        """Runs of one program on all units of a replica, each with what it finds."""
        units = self.system.replica(replica)
        for unit in units:
            unit.reset()
        last = self.system.unit(0, self.stages - 1, replica)
        launches = {
            unit: [
                Launch(
                    self.residence.stream(invocation.bucket, unit.place.stage),
                    self._registers(unit, invocation),
                    partial(_write_inputs, unit, invocation),
                    partial(_read_outputs, unit, invocation, found) if unit is last else None,
                    invocation.observers.get(unit),
                )
                for invocation, found in work
            ]
            for unit in units
        }
        self.system.run(launches, replica, races=self.checks)

    def _alone(self, unit: Unit, invocation: Invocation, found: dict[str, Array]) -> None:
        """A unit without others: no synchronisation to look after."""
        unit.reset()
        _write_inputs(unit, invocation)
        stream = self.residence.stream(invocation.bucket, 0)
        unit.run(stream, self._registers(unit, invocation), invocation.observers.get(unit))
        _read_outputs(unit, invocation, found)

    @staticmethod
    def _registers(unit: Unit, invocation: Invocation) -> dict[int, int]:
        bucket = invocation.bucket
        rows = {register: invocation.row * nbytes for nbytes, register in bucket.row_registers.items()}
        return rows | {register: values[unit.place.rank] for register, values in bucket.launch.items()}

    # Time ------------------------------------------------------------------------------------------------------------
    def retime(self, what_if: WhatIf) -> None:
        """Let `time` speak of another machine from now on; what programs compute stays as it is."""
        self.machine, self.free_collectives = what_if.machine, what_if.free_collectives
        self._times.clear()

    def time(self, bucket: Bucket, repeats: int = 1) -> TimingResult:
        """When a program's instructions run; simulated once, for it does not depend on values.

        `repeats`: how many runs of the program follow each other through the stages (micro-batches).
        """
        key = (bucket.name, repeats)
        if key not in self._times:
            streams = [self.residence.stream(bucket, s) for s in range(self.stages)]
            if len(self.units) == 1 and repeats == 1:
                self._times[key] = simulate(streams[0], self.machine)
            else:
                self._times[key] = simulate(
                    streams, self.machine, topology=self.system.topology, launch=bucket.launch, repeats=repeats,
                    free_collectives=self.free_collectives,
                )  # fmt: skip
        return self._times[key]


def _write_inputs(unit: Unit, invocation: Invocation) -> None:
    for port in invocation.bucket.inputs:
        write_port(unit.window, port, invocation.inputs[port.name])


def _read_outputs(unit: Unit, invocation: Invocation, found: dict[str, Array]) -> None:
    found |= {port.name: read_port(unit.window, port) for port in invocation.bucket.outputs}


def machine_of(artifact: Artifact, mode: Mode) -> Machine:
    """The machine an artifact was built for. Raises ArtifactError if its description has changed since."""
    made_for = artifact.manifest.machine
    machine = load_machine(made_for.name, mode)
    if machine.digest() != made_for.digest:
        why = "its numbers differ from those of this version, so that addresses and times may be wrong"
        what = f"{artifact.directory} was built for another description of machine {made_for.name}"
        raise ArtifactError([ArtifactProblem(what, why, f"build it again: {artifact.rebuild()}")])
    return machine
