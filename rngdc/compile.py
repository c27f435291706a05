"""A compile task: variants of a bucket's program on the map that all buckets share, of which the fastest is kept.

A variant is lowered, its transfers are moved, it is placed, scheduled and emitted; the simulator says how long it
takes. The one that is kept goes through every static check.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from xdsl.dialects.builtin import IntegerAttr, ModuleOp, i64

from backend_rngd.artifact import Bucket, Cache, Port
from backend_rngd.emit import Emitted, emit
from backend_rngd.hoist import Moves, hoist, undo
from backend_rngd.lowering import Lowered, LoweringOptions, lower
from backend_rngd.lowering.program import IN_FLIGHT, LEAST_IN_FLIGHT
from backend_rngd.machine import Machine
from backend_rngd.place import place_in_order
from backend_rngd.schedule import schedule
from ir.errors import UserError
from ir.text import parse_module
from rngdc.buckets import BucketSpec
from rngdc.effort import EFFORTS, Variant
from rngdc.tasks import Compiled, CompileTask, Listener, Steps, dump, shared_images, triples

SMALLER = ((1.0, IN_FLIGHT), *((share, LEAST_IN_FLIGHT) for share in (1.0, 0.6, 0.4, 0.25, 0.12)))
"""What is tried for a program that does not fit DM: shares of the size from which on values lie in HBM, and tiles of a
weight in DM at a time."""

LESS_PREFETCH = 0.78
"""What is left of the memory for early transfers, if a program does not fit with all of it."""


class IllegalStreamError(AssertionError):
    """The compiler made a stream that breaks a rule of the machine: a bug."""


def compile_bucket(
    task: CompileTask, listen: Listener, lowered: Lowered | None = None, module: ModuleOp | None = None
) -> Compiled:
    """Do a task; `lowered` and `module` are what the pipeline builder has made, if it ran in this process."""
    steps = Steps(listen)
    out = Compiled(seconds=steps.seconds)
    effort = EFFORTS[task.lowering.opt_level]
    maker = _Maker(task, steps, lowered, module)
    first: UserError | None = None
    best: tuple[float, _Made] | None = None
    for variant in effort.variants:
        try:
            made = maker.make(variant)
        except UserError as error:
            first = first or error
            continue
        if made is None or (best is not None and made.emitted.streams[0] == best[1].emitted.streams[0]):
            continue
        size = sum(len(r.instructions) for r in made.emitted.streams[0].routines)
        if len(effort.variants) == 1 or size > effort.largest:
            best = best or (0.0, made)
            break
        steps("time")
        cycles = _cycles(made.emitted, task.machine)
        if best is None or cycles < best[0]:
            best = cycles, made
    if best is None:
        assert first is not None
        steps.close()
        out.problems = triples(first)
        return out
    made = best[1]
    steps("verify")
    verified(task.name, made.emitted, task.machine)
    steps("encode")
    out.peak, out.notes, out.variant = made.peak, made.notes, made.variant
    out.record = _record(task.bucket, made.lowered, made.emitted)
    out.caches = _caches(task.lowering, made.lowered, made.emitted)
    out.stream, out.debug = _encoded(made.emitted), _debug(made.emitted)
    out.emitted = made.emitted
    if task.dumps is not None:
        scheduled(task, made.variant, task.dumps)
    steps.close()
    return out


def scheduled(task: CompileTask, variant: Variant, dumps: str | None = None) -> ModuleOp:
    """The module of a variant that can be compiled, as it is emitted; `dumps` gets its steps as files."""
    made = _Maker(task, Steps(lambda _: None), None, None, dumps).make(variant)
    assert made is not None
    return made.lowered.module


@dataclass
class _Made:
    """A variant of a program that was placed, scheduled and emitted. The module of `lowered` may change after that."""

    variant: Variant
    lowered: Lowered
    emitted: Emitted
    peak: dict[str, int]
    notes: list[str]


class _Maker:
    """Makes variants of a program, one after another; a lowered module serves until one needs another spill size."""

    def __init__(
        self, task: CompileTask, steps: Steps, lowered: Lowered | None, module: ModuleOp | None,
        dumps: str | None = None,
    ) -> None:  # fmt: skip
        self.task, self.steps, self.module, self.dumps = task, steps, module, dumps
        self.spill, self.in_flight, self.lowered = task.lowering.spill_bytes, task.lowering.in_flight, lowered
        self.moves = Moves()

    def make(self, variant: Variant) -> _Made | None:
        """One variant. None: it needs images that the map does not have. Raises UserError."""
        notes: list[str] = []
        placed = self._place(variant, notes)
        if placed is None:
            return None
        lowered, peak = placed
        self.steps("schedule")
        schedule(lowered.module)
        dump(self.dumps, "schedule", lowered.module)
        self.steps("emit")
        emitted = emit(lowered.module, self.task.machine, self.task.lowering.slices)
        return _Made(variant, lowered, emitted, peak, notes)

    def _place(self, variant: Variant, notes: list[str]) -> tuple[Lowered, dict[str, int]] | None:
        """Move transfers and place; if DM is too small, lower again with more values in HBM. Raises UserError."""
        task, machine = self.task, self.task.machine
        first: UserError | None = None
        for share, in_flight in SMALLER:
            spill = int(task.lowering.spill_bytes * variant.spill * share)
            try:
                lowered = self._lowered(spill, min(in_flight, task.lowering.in_flight))
            except UserError:
                if first is None:
                    raise
                continue
            images = shared_images(lowered)
            if any(image.key not in task.addresses for _, image in images):
                if first is None:
                    return None
                continue  # another form of a weight, or a literal, that the map of all programs does not have
            if share < 1.0:
                notes[:] = [f"values larger than {spill} B a slice lie in HBM: DM is too small for larger ones"]
            for op, image in images:
                op.address = IntegerAttr(task.addresses[image.key], i64)
            self.steps("place")
            try:
                place_in_order(lowered.module, machine, task.hbm_base)
            except UserError as error:
                first = first or error
                continue
            for prefetch in (variant.prefetch, variant.prefetch * LESS_PREFETCH) if variant.prefetch else ():
                self.moves = hoist(lowered.module, machine, prefetch)
                try:
                    peak = place_in_order(lowered.module, machine, task.hbm_base)
                except UserError:
                    self._undo()  # early transfers keep buffers alive for longer
                    continue
                dump(self.dumps, "hoist", lowered.module)
                return lowered, peak
            dump(self.dumps, "hoist", lowered.module)
            return lowered, place_in_order(lowered.module, machine, task.hbm_base)
        assert first is not None
        raise first

    def _lowered(self, spill: int, in_flight: int) -> Lowered:
        """The program with all transfers in their order. Raises UserError."""
        self._undo()
        if self.lowered is None or (self.spill, self.in_flight) != (spill, in_flight):
            self.steps("lower")
            if self.module is None:
                self.module = parse_module(self.task.text, self.task.name)
            self.lowered = None
            options = replace(self.task.lowering, spill_bytes=spill, in_flight=in_flight)
            self.lowered = lower(self.module, self.task.machine, options)
            self.spill, self.in_flight = spill, in_flight
        return self.lowered

    def _undo(self) -> None:
        undo(self.moves)
        self.moves = Moves()


def verified(name: str, emitted: Emitted, machine: Machine) -> None:
    """Every static check of a program. Raises IllegalStreamError."""
    errors = [v for v in emitted.check(machine) if v.severity == "error"]
    if errors:
        listed = "\n".join(f"  {v}" for v in errors[:20])
        raise IllegalStreamError(f"{name}: the compiler made {len(errors)} illegal instructions:\n{listed}")


def _cycles(emitted: Emitted, machine: Machine) -> float:
    """How long a program takes on as many units as it is for, by the constants that were calibrated."""
    from runtime_sim.timing import simulate
    from runtime_sim.topology import Topology

    units = max((len(values) for values in emitted.launch.values()), default=1)
    stream = emitted.streams[0]
    if units == 1:
        return simulate(stream, machine, "silicon").cycles
    topology = Topology.of(machine, units)
    return simulate([stream], machine, "silicon", topology=topology, launch=emitted.launch).cycles


def _encoded(emitted: Emitted) -> bytes:
    from backend_rngd.isa.tables import encode

    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **encode(emitted.streams[0]))
    return buffer.getvalue()


def _debug(emitted: Emitted) -> str:
    names = ("value", "routine", "instructions", "space", "register", "address", "layout")
    return json.dumps([{n: getattr(p, n) for n in names} for p in emitted.probes]) + "\n"


def _record(bucket: BucketSpec, lowered: Lowered, emitted: Emitted) -> Bucket:
    def ports(found: list[Any]) -> tuple[Port, ...]:
        out: list[Port] = []
        for p in found:
            at = emitted.globals[p.buffer]
            out.append(
                Port(
                    name=p.name,
                    address=at.address + p.offset,
                    bytes=at.nbytes - p.offset,
                    dtype=p.dtype,
                    shape=p.shape,
                    strides=p.strides,
                )  # fmt: skip
            )
        return tuple(out)

    return Bucket(
        name=bucket.name,
        phase=bucket.phase,
        batch=bucket.batch,
        input_length=bucket.input_length,
        attention_size=bucket.attention_size,
        stream=f"streams/{bucket.name}.npz",
        ir=f"ir/{bucket.name}.mlir",
        debug=f"debug/{bucket.name}.json",
        instructions=sum(len(r.instructions) for r in emitted.streams[0].routines),
        inputs=ports(lowered.inputs),
        outputs=ports(lowered.outputs),
        row_registers=emitted.row_registers,
        launch=emitted.launch,
    )


def _caches(options: LoweringOptions, lowered: Lowered, emitted: Emitted) -> list[Cache]:
    out: list[Cache] = []
    for port in lowered.caches:
        at = emitted.globals[port.buffer]
        _, heads, _, width = port.shape
        out.append(
            Cache(
                name=port.name, address=at.address, bytes=at.nbytes, row_bytes=at.row_bytes, batch=options.cache_batch,
                heads=heads, capacity=options.cache_capacity, width=width, shard=port.shard,
            )
        )  # fmt: skip
    return out
