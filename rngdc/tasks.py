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
from xdsl.dialects.builtin import ModuleOp

from backend_rngd.artifact import Bucket, Cache
from backend_rngd.dialect import GlobalOp
from backend_rngd.emit import Emitted
from backend_rngd.lowering import Lowered, LoweringOptions, lower
from backend_rngd.machine import Machine
from ir.errors import UserError
from ir.text import parse_module, print_module
from rngdc.buckets import BucketSpec
from rngdc.cache import source_digest
from rngdc.effort import EFFORTS, Variant
from rngdc.searches import remembered

if TYPE_CHECKING:
    from rngdc.estimate import Memory

Listener = Callable[[str], None]
"""Called with the name of each step before it."""


@dataclass(frozen=True)
class BuildTask:
    """Passes and lowering of a bucket. `text`: the simplified model; `passes`: a pipeline as `rngdc opt -p` takes it,
    the last of which outlines.

    `digest` stands for files that passes read (a user's plan). `dumps`: directory for the IR after every pass. `cache`:
    directory with mappings that were found before.
    """

    bucket: BucketSpec
    text: str
    passes: str
    machine: Machine
    lowering: LoweringOptions
    digest: str = ""
    dumps: str | None = None
    cache: str | None = None

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
        return self.text, f"{self.passes},{last}"

    def run(self, listen: Listener, module: ModuleOp | None = None) -> Built:
        """Do it; `module` is the parsed text if the caller has it (it stays as it is)."""
        with remembered(self.cache):
            return _build(self, listen, module)


@dataclass(frozen=True)
class CompileTask:
    """Placement, schedule, stream and verification of a bucket. `text`: its `tc` module after the passes.

    `addresses`: HBM address of every shared image by its key; the bucket's own area starts at `hbm_base`. `cache`: see
    `BuildTask`.
    """

    bucket: BucketSpec
    text: str
    machine: Machine
    lowering: LoweringOptions
    addresses: Mapping[str, int]
    hbm_base: int
    dumps: str | None = None
    cache: str | None = None

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
        from rngdc.compile import compile_bucket

        with remembered(self.cache):
            return compile_bucket(self, listen, lowered, module)


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


class Steps:
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


def triples(error: UserError) -> list[tuple[str, str, str]]:
    """Problems as plain values, which go between processes."""
    return [(p.what, p.why, p.fix) for p in error.problems]


@lru_cache(maxsize=1)
def _model(text: str) -> ModuleOp:
    """A worker gets the same model for every bucket."""
    return parse_module(text, "model")


# Pipeline builder ----------------------------------------------------------------------------------------------------
def _build(task: BuildTask, listen: Listener, model: ModuleOp | None) -> Built:
    from passes.notes import notes
    from passes.opt import run_pipeline
    from rngdc.estimate import memory_of

    steps = Steps(listen)
    out = Built(seconds=steps.seconds)
    steps("passes")
    module = (model if model is not None else _model(task.text)).clone()
    try:
        run_pipeline(module, task.passes, Path(task.dumps) if task.dumps else None)
    except UserError as error:
        steps.close()
        out.pass_problems = triples(error)
        return out
    out.memory, out.notes = memory_of([module]), notes(module)
    steps("lower")
    machine = task.machine
    try:
        lowered = lower(module, machine, task.lowering)
    except UserError as error:
        steps.close()
        out.problems = triples(error)
        return out
    dump(task.dumps, "lower", lowered.module)
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


def dump(dumps: str | None, step: str, module: ModuleOp) -> None:
    """Write a module as the next numbered file, headed by the command that continues from it."""
    if dumps is None:
        return
    directory = Path(dumps)
    directory.mkdir(parents=True, exist_ok=True)
    name = f"{len(list(directory.glob('*.mlir'))):02d}-rngd-{step}.mlir"
    rest = {"lower": "rngd-hoist,rngd-place,rngd-schedule", "hoist": "rngd-place,rngd-schedule"}.get(step, "")
    (directory / name).write_text(f"// rngdc opt -p '{rest}' {name}\n{print_module(module)}", "utf-8")
