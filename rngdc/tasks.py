"""The two kinds of work on a bucket, as functions of small inputs, so that any process on any machine can do them.

A pipeline builder runs the passes of the bucket and lowers it: it finds out what the program needs in HBM. When all
have, the buckets share one map. A compiler then places, schedules, emits and verifies the program on that map. Inputs
and results are texts and numbers; nobody holds weights.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from xdsl.dialects.builtin import IntegerAttr, ModuleOp, i64

from backend_rngd.artifact import Bucket, Cache, Port
from backend_rngd.dialect import GlobalOp
from backend_rngd.emit import Emitted, emit
from backend_rngd.hoist import Moves, hoist, undo
from backend_rngd.lowering import Lowered, LoweringOptions, lower
from backend_rngd.machine import Machine
from backend_rngd.place import place_in_order
from backend_rngd.schedule import schedule
from ir.errors import UserError
from ir.text import parse_module, print_module
from rngdc.buckets import BucketSpec
from rngdc.cache import source_digest
from rngdc.effort import EFFORTS, Variant

if TYPE_CHECKING:
    from rngdc.estimate import Memory

SPILL_SHARES = (1.0, 0.6, 0.4, 0.25, 0.12)
"""What is tried for a program that does not fit DM: shares of the size from which on values lie in HBM."""

LESS_PREFETCH = 0.78
"""What is left of the memory for early transfers, if a program does not fit with all of it."""

Listener = Callable[[str], None]
"""Called with the name of each step before it."""


@dataclass(frozen=True)
class BuildTask:
    """Passes and lowering of a bucket. `text`: the simplified model; `passes`: a pipeline as `rngdc opt -p` takes it.

    `digest` stands for files that passes read (a user's plan). `dumps`: directory for the IR after every pass.
    """

    bucket: BucketSpec
    text: str
    passes: str
    machine: Machine
    lowering: LoweringOptions
    digest: str = ""
    dumps: str | None = None

    stage = "pipeline builder"

    @property
    def name(self) -> str:
        """The bucket's name."""
        return self.bucket.name

    @property
    def weight(self) -> int:
        """Grows with the expected time."""
        return self.bucket.batch * self.bucket.input_length

    def inputs(self) -> dict[str, Any]:
        """Everything that the result depends on, as JSON."""
        return {
            "stage": self.stage, "bucket": asdict(self.bucket), "text": _sha256(self.text), "passes": self.passes,
            "digest": self.digest,
            "machine": _sha256(self.machine.model_dump_json()), "lowering": asdict(self.lowering),
        }  # fmt: skip

    def reproducer(self, directory: Path) -> tuple[str, str]:
        """(module text, passes) that do the same with `rngdc opt`."""
        low = self.lowering
        sizes = f"capacity={low.cache_capacity} batch={low.cache_batch} opt={low.opt_level}"
        last = f"rngd-lower{{machine={self.machine.name} {sizes}}}"
        return self.text, ",".join(filter(None, [self.passes, "outline", last]))

    def run(self, listen: Listener, module: ModuleOp | None = None) -> Built:
        """Do it; `module` is the parsed text if the caller has it (it stays as it is)."""
        return _build(self, listen, module)


@dataclass(frozen=True)
class CompileTask:
    """Placement, schedule, stream and verification of a bucket. `text`: its `tc` module after the passes.

    `addresses`: HBM address of every shared image by its key; the bucket's own area starts at `hbm_base`.
    """

    bucket: BucketSpec
    text: str
    machine: Machine
    lowering: LoweringOptions
    addresses: Mapping[str, int]
    hbm_base: int
    dumps: str | None = None

    stage = "compile"

    @property
    def name(self) -> str:
        """The bucket's name."""
        return self.bucket.name

    @property
    def weight(self) -> int:
        """Grows with the expected time."""
        return self.bucket.batch * self.bucket.input_length * (4096 + self.bucket.attention_size)

    def inputs(self) -> dict[str, Any]:
        """Everything that the result depends on, as JSON."""
        return {
            "stage": self.stage, "bucket": asdict(self.bucket), "text": _sha256(self.text),
            "machine": _sha256(self.machine.model_dump_json()), "lowering": asdict(self.lowering),
            "addresses": dict(self.addresses), "hbm_base": self.hbm_base,
            # Where the simulator chooses between variants, its times count.
            "simulator": source_digest("runtime_sim") if len(EFFORTS[self.lowering.opt_level].variants) > 1 else "",
        }  # fmt: skip

    def reproducer(self, directory: Path) -> tuple[str, str]:
        """(module text, passes) that do the same with `rngdc opt`; options and map go to a file in the directory."""
        from rngdc.reproduce import save_task

        return self.text, f'rngd-compile{{task="{save_task(self, directory)}"}}'

    def run(self, listen: Listener, lowered: Lowered | None = None, module: ModuleOp | None = None) -> Compiled:
        """Do it; `lowered` and `module` are what the pipeline builder has made, if it ran in this process."""
        return _compile(self, listen, lowered, module)


Task = BuildTask | CompileTask


@dataclass(frozen=True)
class SharedImage:
    """Bytes in HBM that programs share: `weight` (placement in `form`), `literal` (`images`: one, or one a unit) or
    `cache`. Equal keys mean equal bytes."""

    kind: str
    key: str
    nbytes: int
    name: str
    form: dict[str, Any] = field(default_factory=dict[str, Any])
    images: tuple[bytes, ...] = ()
    per_unit: bool = False


@dataclass
class Built:
    """What a pipeline builder found: the `tc` module, and what its program needs.

    `pass_problems` and `problems`: what a pass and the lowering refuse, as (what, why, fix); then the rest is empty.
    `module` and `lowered` exist only in the process that made them.
    """

    text: str = ""
    mesh: str = ""
    units: int = 1
    notes: list[str] = field(default_factory=list[str])
    memory: Memory | None = None
    images: list[SharedImage] = field(default_factory=list[SharedImage])
    pass_problems: list[tuple[str, str, str]] = field(default_factory=list[tuple[str, str, str]])
    problems: list[tuple[str, str, str]] = field(default_factory=list[tuple[str, str, str]])
    seconds: dict[str, float] = field(default_factory=dict[str, float])
    module: ModuleOp | None = None
    lowered: Lowered | None = None

    @property
    def refused(self) -> bool:
        """Whether there is no program."""
        return bool(self.pass_problems or self.problems)

    def plain(self) -> Built:
        """Without the objects of this process."""
        return replace(self, module=None, lowered=None)


@dataclass
class Compiled:
    """A program: stream and debug information as the artifact stores them. `peak`: bytes used by memory.

    `problems`: why there is none. `variant`: which one it is. `emitted` exists only in the process that made it.
    """

    stream: bytes = b""
    debug: str = ""
    record: Bucket | None = None
    caches: list[Cache] = field(default_factory=list[Cache])
    peak: dict[str, int] = field(default_factory=dict[str, int])
    notes: list[str] = field(default_factory=list[str])
    problems: list[tuple[str, str, str]] = field(default_factory=list[tuple[str, str, str]])
    seconds: dict[str, float] = field(default_factory=dict[str, float])
    variant: Variant | None = None
    emitted: Emitted | None = None

    @property
    def refused(self) -> bool:
        """Whether there is no program."""
        return bool(self.problems)

    def plain(self) -> Compiled:
        """Without the objects of this process."""
        return replace(self, emitted=None)


Result = Built | Compiled


class IllegalStreamError(AssertionError):
    """The compiler made a stream that breaks a rule of the machine: a bug."""


@contextlib.contextmanager
def without_collections() -> Generator[None]:
    """Modules are many small objects that stay: looking for garbage among them only costs time.

    What a block leaves is collected when it ends, without looking at what was there before.
    """
    collecting = gc.isenabled()
    gc.disable()
    gc.freeze()
    try:
        yield
    finally:
        gc.collect()
        gc.unfreeze()
        if collecting:
            gc.enable()


class _Steps:
    """Tells the listener which step begins, and adds up the seconds of each."""

    def __init__(self, listen: Listener) -> None:
        self.seconds: dict[str, float] = {}
        self._listen = listen
        self._open: tuple[str, float] | None = None

    def __call__(self, name: str) -> None:
        self.close()
        self._listen(name)
        self._open = (name, time.perf_counter())

    def close(self) -> None:
        """End the current step."""
        if self._open is not None:
            name, begun = self._open
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begun
        self._open = None


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _triples(error: UserError) -> list[tuple[str, str, str]]:
    return [(p.what, p.why, p.fix) for p in error.problems]


@lru_cache(maxsize=1)
def _model(text: str) -> ModuleOp:
    """A worker gets the same model for every bucket."""
    return parse_module(text, "model")


# Pipeline builder ----------------------------------------------------------------------------------------------------
def _build(task: BuildTask, listen: Listener, model: ModuleOp | None) -> Built:
    from passes.notes import notes
    from passes.opt import run_pipeline
    from passes.outline import outline
    from rngdc.estimate import memory_of

    steps = _Steps(listen)
    out = Built(seconds=steps.seconds)
    steps("passes")
    module = (model if model is not None else _model(task.text)).clone()
    try:
        if task.passes:
            run_pipeline(module, task.passes, Path(task.dumps) if task.dumps else None)
    except UserError as error:
        steps.close()
        out.pass_problems = _triples(error)
        return out
    outline(module)
    out.memory, out.notes = memory_of([module]), notes(module)
    steps("lower")
    machine = task.machine
    try:
        lowered = lower(module, machine, task.lowering)
    except UserError as error:
        steps.close()
        out.problems = _triples(error)
        return out
    _dump(task.dumps, "lower", lowered.module)
    out.images = [image for _, image in shared_images(lowered)]
    out.mesh, out.units = _mesh(module)
    steps("print")
    out.text, out.module, out.lowered = print_module(module), module, lowered
    steps.close()
    return out


def _mesh(module: ModuleOp) -> tuple[str, int]:
    from ir.dialects import tc

    mesh = tc.mesh_of(module)
    return ("", 1) if mesh is None else (str(mesh), mesh.size)


def shared_images(lowered: Lowered) -> list[tuple[GlobalOp, SharedImage]]:
    """The globals of a program that lie in the map of all programs."""
    out: list[tuple[GlobalOp, SharedImage]] = []
    for op in lowered.module.body.block.ops:
        if not isinstance(op, GlobalOp) or op.buffer_type.space.data != "hbm":
            continue
        name, kind, nbytes = op.sym_name.data, op.kind.data, op.buffer_type.nbytes.data
        if kind == "weight":
            form = asdict(lowered.placements[name])
            del form["name"], form["bytes"]
            out.append((op, SharedImage("weight", json.dumps(form, sort_keys=True), nbytes, name, form)))
        elif kind == "constant":
            rows = lowered.unit_constants.get(name)
            images = tuple(_padded(v, nbytes) for v in (rows if rows is not None else [lowered.constants[name]]))
            digest = hashlib.sha256(b"".join(images)).hexdigest()
            key = f"{digest} {nbytes} {len(images) if rows is not None else 'all'}"
            out.append((op, SharedImage("literal", key, nbytes, name, {}, images, rows is not None)))
        elif kind == "cache":
            out.append((op, SharedImage("cache", name, nbytes, name)))
    return out


def _padded(values: Any, nbytes: int) -> bytes:
    raw = np.ascontiguousarray(values).tobytes()
    return raw + bytes(nbytes - len(raw))


# Compile -------------------------------------------------------------------------------------------------------------
def _compile(task: CompileTask, listen: Listener, lowered: Lowered | None, module: ModuleOp | None) -> Compiled:
    steps = _Steps(listen)
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
        out.problems = _triples(first)
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
    made = _Maker(task, _Steps(lambda _: None), None, None, dumps).make(variant)
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
        self, task: CompileTask, steps: _Steps, lowered: Lowered | None, module: ModuleOp | None,
        dumps: str | None = None,
    ) -> None:  # fmt: skip
        self.task, self.steps, self.module, self.dumps = task, steps, module, dumps
        self.spill, self.lowered = task.lowering.spill_bytes, lowered
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
        _dump(self.dumps, "schedule", lowered.module)
        self.steps("emit")
        emitted = emit(lowered.module, self.task.machine, self.task.lowering.slices)
        return _Made(variant, lowered, emitted, peak, notes)

    def _place(self, variant: Variant, notes: list[str]) -> tuple[Lowered, dict[str, int]] | None:
        """Move transfers and place; if DM is too small, lower again with more values in HBM. Raises UserError."""
        task, machine = self.task, self.task.machine
        first: UserError | None = None
        for share in SPILL_SHARES:
            spill = int(task.lowering.spill_bytes * variant.spill * share)
            try:
                lowered = self._lowered(spill)
            except UserError:
                if first is None:
                    raise
                continue
            images = shared_images(lowered)
            if any(image.key not in task.addresses for _, image in images):
                if first is None:
                    return None
                continue  # another form of a weight, or a literal, that the map of all programs does not have
            if first is not None:
                notes[:] = [f"values larger than {spill} B a slice lie in HBM: DM is too small for larger ones"]
            for op, image in images:
                op.address = IntegerAttr(task.addresses[image.key], i64)
            self.steps("place")
            for prefetch in (variant.prefetch, variant.prefetch * LESS_PREFETCH, 0.0) if variant.prefetch else (0.0,):
                self.moves = hoist(lowered.module, machine, prefetch) if prefetch else Moves()
                _dump(self.dumps, "hoist", lowered.module)
                try:
                    return lowered, place_in_order(lowered.module, machine, task.hbm_base)
                except UserError as error:
                    first = first or error
                self._undo()  # early transfers keep buffers alive for longer
        assert first is not None
        raise first

    def _lowered(self, spill: int) -> Lowered:
        """The program with all transfers in their order. Raises UserError."""
        self._undo()
        if self.lowered is None or self.spill != spill:
            self.steps("lower")
            if self.module is None:
                self.module = parse_module(self.task.text, self.task.name)
            self.lowered = None
            self.lowered = lower(self.module, self.task.machine, replace(self.task.lowering, spill_bytes=spill))
            self.spill = spill
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


def _dump(dumps: str | None, step: str, module: ModuleOp) -> None:
    """Write a module as the next numbered file, headed by the command that continues from it."""
    if dumps is None:
        return
    directory = Path(dumps)
    directory.mkdir(parents=True, exist_ok=True)
    name = f"{len(list(directory.glob('*.mlir'))):02d}-rngd-{step}.mlir"
    rest = {"lower": "rngd-hoist,rngd-place,rngd-schedule", "hoist": "rngd-place,rngd-schedule"}.get(step, "")
    (directory / name).write_text(f"// rngdc opt -p '{rest}' {name}\n{print_module(module)}", "utf-8")


def _encoded(emitted: Emitted) -> bytes:
    import io

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
