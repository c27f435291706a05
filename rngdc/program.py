"""From a model in `tc` to the streams of all its buckets, on one HBM map: they share weights, literals and caches.

Two rounds of tasks (`rngdc.tasks`) with the map between them, done by an executor, with results of earlier builds taken
from the cache.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xdsl.dialects.builtin import ModuleOp

from backend_rngd.artifact import Bucket, Cache, Constant, HbmMap, Placement
from backend_rngd.emit import Emitted
from backend_rngd.lowering import LoweringOptions
from backend_rngd.machine import Machine
from ir.errors import Problem, UserError
from rngdc.buckets import BucketSpec
from rngdc.cache import Cache as ResultCache
from rngdc.cache import key_of
from rngdc.effort import DEFAULT as DEFAULT_LEVEL
from rngdc.effort import EFFORTS
from rngdc.estimate import Memory
from rngdc.executor import Executor, Failure, InlineExecutor, Listeners
from rngdc.results import from_files, to_files
from rngdc.tasks import BuildTask, Built, Compiled, CompileTask, Result, SharedImage, Task
from rngdc.work import BuildFailedError, FailedTask, Watcher

KEPT_MODULES = 8
"""Up to so many buckets keep their modules between the rounds; those of more are read again, to save memory."""


@dataclass
class Program:
    """A finished bucket: what the artifact stores of it. `emitted` exists if the program was made in this process."""

    bucket: BucketSpec
    ir: str
    stream: bytes
    debug: str
    record: Bucket
    notes: list[str] = field(default_factory=list[str])
    emitted: Emitted | None = None


@dataclass
class Programs:
    """All buckets of an artifact with the HBM map they share.

    `seconds`: by bucket and step, as measured where the step was done; empty for results from the cache.
    `worker_memory`: bytes at the peak of the largest worker process.
    """

    programs: list[Program]
    placements: list[Placement]
    constants: list[Constant]
    constant_bytes: bytes
    caches: list[Cache]
    hbm: HbmMap
    peak: dict[str, int] = field(default_factory=dict[str, int])
    mesh: str = ""
    units: int = 1
    notes: list[str] = field(default_factory=list[str])
    seconds: dict[str, dict[str, float]] = field(default_factory=dict[str, "dict[str, float]"])
    worker_memory: int = 0


@dataclass
class Request:
    """What to build. `passes`: pipeline of every bucket, as text; `text`: the simplified module they start from, and
    `model` the same if it is at hand.

    `digest` stands for files that the passes read. `check`: what the memory of the programs must satisfy. `fast_fail`:
    begin nothing new after the first failure. `workers`: pipeline builders, compilers.
    """

    passes: Mapping[BucketSpec, str]
    text: str
    machine: Machine
    lowering: LoweringOptions
    model: ModuleOp | None = None
    digest: str = ""
    check: Callable[[Memory], list[Problem]] = field(default=lambda _: [])
    dumps: Path | None = None
    fast_fail: bool = True
    workers: tuple[int, int] = (1, 1)
    meta: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def buckets(self) -> list[BucketSpec]:
        """In the order of the artifact."""
        return list(self.passes)


def lowering_options(
    buckets: Sequence[BucketSpec], slices: int, probes: bool = True, opt_level: int = DEFAULT_LEVEL
) -> LoweringOptions:
    """The KV cache has room for the largest program."""
    capacity = max((b.attention_size for b in buckets), default=0)
    batch = max((b.batch for b in buckets), default=1)
    return LoweringOptions(
        slices=slices,
        cache_capacity=capacity,
        cache_batch=batch,
        probes=probes,
        opt_level=opt_level,
        search=EFFORTS[opt_level].search,
    )


def build_programs(
    request: Request, executor: Executor | None = None, cache: ResultCache | None = None, watch: Watcher | None = None
) -> Programs:
    """Build every bucket. Raises UserError with all that cannot be built, BuildFailedError if tasks failed."""
    with executor or InlineExecutor() as does:
        return _Build(request, does, cache, watch or Watcher()).run()


def compile_programs(
    modules: Mapping[BucketSpec, ModuleOp], machine: Machine, watch: Watcher | None = None, dumps: Path | None = None
) -> Programs:
    """Streams of modules that went through the passes but `outline`, made in this process.

    Raises as `build_programs` does.
    """
    made: list[Programs] = []
    options = lowering_options(list(modules), machine.slices_per_pe)
    builders = {
        b: BuildTask(b, "", "outline", machine, options, "", str(dumps / b.name) if dumps else None) for b in modules
    }
    with InlineExecutor() as executor:
        request = Request(dict.fromkeys(modules, ""), "", machine, options, dumps=dumps, fast_fail=False)
        work = _Build(request, executor, None, watch or Watcher())
        made.append(work.run({b: (builders[b], m) for b, m in modules.items()}))
    return made[0]


class _Build:
    """The two rounds of one build."""

    def __init__(self, request: Request, executor: Executor, cache: ResultCache | None, watch: Watcher) -> None:
        self.request = request
        self.executor = executor
        self.cache = cache
        self.watch = watch
        self.seconds: dict[str, dict[str, float]] = {}
        self.worker_memory = 0
        self.failed: list[FailedTask] = []
        self.skipped = 0

    def run(self, given: Mapping[BucketSpec, tuple[BuildTask, ModuleOp]] | None = None) -> Programs:
        """Build; `given` has the task and the module of every bucket if its passes have run already."""
        request = self.request
        kept = len(request.passes) <= KEPT_MODULES or given is not None
        models = {task.bucket: module for task, module in (given or {}).values()}
        tasks = [task for task, _ in given.values()] if given else self._builders()

        def build(task: Task, listen: Callable[[str], None]) -> Result:
            assert isinstance(task, BuildTask)
            out = task.run(listen, models.get(task.bucket, request.model))
            return out if kept else out.plain()

        found = self._round(tasks, request.workers[0], build, stop_at_refusal=False)
        built = {b: r for b, r in zip(request.buckets, found, strict=True) if isinstance(r, Built)}
        problems = self._check_built(built)
        built = {b: r for b, r in built.items() if not r.refused}
        shared = SharedMap(request.machine.hbm_map_alignment)
        for result in built.values():
            shared.collect(result.images)
        hbm = shared.assign()
        compilers = [self._compiler(b, r, shared, hbm.shared) for b, r in built.items()]

        def compile_one(task: Task, listen: Callable[[str], None]) -> Result:
            assert isinstance(task, CompileTask)
            before = built[task.bucket]
            out = task.run(listen, before.lowered, before.module)
            before.lowered = before.module = None
            return out if kept else out.plain()

        results = self._round(compilers, request.workers[1], compile_one, stop_at_refusal=request.fast_fail)
        done = {b: r for b, r in zip(built, results, strict=True) if isinstance(r, Compiled)}
        problems += [Problem(f"{b.name}: {w}", why, fix) for b, r in done.items() for w, why, fix in r.problems]
        self._raise(problems)
        return self._programs(built, done, shared, hbm)

    def _builders(self) -> list[BuildTask]:
        r = self.request
        return [
            BuildTask(b, r.text, passes, r.machine, r.lowering, r.digest, self._dumps(b), self._directory)
            for b, passes in r.passes.items()
        ]

    def _compiler(self, bucket: BucketSpec, built: Built, shared: SharedMap, base: int) -> CompileTask:
        r = self.request
        addresses = {image.key: shared.address[image.key] for image in built.images}
        # The map may hold a form or a literal that only another bucket has asked for so far.
        return CompileTask(
            bucket, built.text, r.machine, r.lowering, addresses, base, self._dumps(bucket), self._directory
        )

    @property
    def _directory(self) -> str | None:
        return str(self.cache.directory) if self.cache is not None else None

    def _dumps(self, bucket: BucketSpec) -> str | None:
        return str(self.request.dumps / bucket.name) if self.request.dumps is not None else None

    def _round(
        self,
        tasks: Sequence[Task],
        workers: int,
        do: Callable[[Task, Callable[[str], None]], Result],
        stop_at_refusal: bool,
    ) -> list[Result | None]:
        """The results in the order of the tasks; None for those that failed or were not begun."""
        if not tasks:
            return []
        self.watch.round(tasks[0].stage, [t.name for t in tasks])
        out: list[Result | None] = [None] * len(tasks)
        keys = [key_of(t.inputs()) if self.cache is not None else "" for t in tasks]
        todo: list[int] = []
        for i, task in enumerate(tasks):
            out[i] = self._cached(task, keys[i])
            if out[i] is None:
                todo.append(i)
            else:
                self.seconds.setdefault(task.name, {})
                self.watch.done(task, cached=True)
        listeners = Listeners(self.watch.start, self.watch.step)
        part = [tasks[i] for i in todo]
        if isinstance(self.executor, InlineExecutor):
            finished = self.executor.run(part, workers, listeners, do)
        else:
            finished = self.executor.run(part, workers, listeners)
        begun = 0
        for item in finished:
            begun += 1
            index, outcome = todo[item.index], item.outcome
            task = tasks[index]
            self.worker_memory = max(self.worker_memory, item.memory)
            if isinstance(outcome, Failure):
                self.failed.append(FailedTask(task, outcome))
                self.watch.failed(task)
                if self.request.fast_fail:
                    self.executor.stop()
                continue
            self.seconds.setdefault(task.name, {}).update(
                {k: self.seconds.get(task.name, {}).get(k, 0.0) + v for k, v in outcome.seconds.items()}
            )
            out[index] = outcome
            if outcome.refused:
                self.watch.failed(task)
                if stop_at_refusal:
                    self.executor.stop()
                continue
            self.watch.done(task)
            if self.cache is not None and keys[index]:
                meta = {"bucket": task.name, "stage": task.stage, **self.request.meta}
                self.cache.put(task.stage, keys[index], to_files(outcome), meta)
        self.skipped += len(todo) - begun
        return out

    def _cached(self, task: Task, key: str) -> Result | None:
        if self.cache is None or task.dumps is not None:  # a dump shows what the passes do
            return None
        files = self.cache.get(task.stage, key)
        if files is None:
            return None
        try:
            return from_files(task, files)
        except (KeyError, ValueError, TypeError):  # written by something else under this key
            return None

    def _check_built(self, built: Mapping[BucketSpec, Built]) -> list[Problem]:
        """Raise for what the first round refused: first passes, then memory, then lowering.

        Without fast fail what the lowering refuses is returned, and the others go on.
        """
        refused = [Problem(*p) for p in dict.fromkeys(p for r in built.values() for p in r.pass_problems)]
        if refused or (self.failed and self.request.fast_fail):
            self._raise(refused)
        memory = _joined([r.memory for r in built.values() if r.memory is not None])
        if memory is not None and (short := self.request.check(memory)):
            self._raise(short)
        problems = [Problem(f"{b.name}: {w}", why, fix) for b, r in built.items() for w, why, fix in r.problems]
        if self.request.fast_fail:
            self._raise(problems)
        return problems

    def _raise(self, problems: list[Problem]) -> None:
        if self.failed:
            for item in self.failed:
                item.save(Path(tempfile.mkdtemp(prefix="rngdc-crash-")))
            raise BuildFailedError(self.failed, problems, self.skipped)
        if problems:
            raise UserError(problems)

    def _programs(
        self, built: Mapping[BucketSpec, Built], done: Mapping[BucketSpec, Compiled], shared: SharedMap, hbm: HbmMap
    ) -> Programs:
        meshes = {(r.mesh, r.units) for r in built.values()}
        if len(meshes) > 1:
            raise AssertionError(f"buckets with different meshes: {', '.join(sorted(m for m, _ in meshes))}")
        mesh, units = next(iter(meshes), ("", 1))
        programs: list[Program] = []
        peak: dict[str, int] = {}
        caches: dict[str, Cache] = {}
        for bucket, result in done.items():
            assert result.record is not None
            ir = built[bucket].text
            programs.append(
                Program(bucket, ir, result.stream, result.debug, result.record, result.notes, result.emitted)
            )
            for space, used in result.peak.items():
                peak[space] = max(peak.get(space, 0), used)
            caches |= {c.name: c for c in result.caches}
        total = max(hbm.shared, peak.get("hbm", 0))
        notes = [n for r in built.values() for n in r.notes]
        constants, data = shared.constants()
        return Programs(
            programs, shared.placements(), constants, data, list(caches.values()),
            hbm.model_copy(update={"total": total}), peak, mesh, units, list(dict.fromkeys(notes)), self.seconds,
            self.worker_memory,
        )  # fmt: skip


def _joined(found: Sequence[Memory]) -> Memory | None:
    """The memory of all programs: the calls of the longest entry, and at each the largest."""
    if not found:
        return None
    longest = max(found, key=lambda m: len(m.calls))

    def largest(rows: list[tuple[int, ...]]) -> tuple[int, ...]:
        return tuple(max(row[i] for row in rows if i < len(row)) for i in range(len(longest.calls)))

    return Memory(longest.calls, largest([m.weights for m in found]), largest([m.caches for m in found]))


class SharedMap:
    """Weights, literals and caches of all buckets: equal ones once, each kind in one piece."""

    KINDS = ("weight", "literal", "cache")

    def __init__(self, alignment: int) -> None:
        """`alignment`: bytes that every image starts at a multiple of."""
        self.alignment = alignment
        self.images: dict[str, dict[str, SharedImage]] = {kind: {} for kind in self.KINDS}
        self.address: dict[str, int] = {}

    def collect(self, images: Sequence[SharedImage]) -> None:
        """Note what a bucket needs; of equal keys the largest counts."""
        for image in images:
            table = self.images[image.kind]
            if image.key not in table or table[image.key].nbytes < image.nbytes:
                table[image.key] = image

    def assign(self) -> HbmMap:
        """Give every image an address; returns the sizes of the areas (`total` is that of the shared ones)."""
        at = 0
        ends: list[int] = []
        for kind in self.KINDS:
            for key, image in self.images[kind].items():
                self.address[key] = at
                at += -(-image.nbytes // self.alignment) * self.alignment
            ends.append(at)
        return HbmMap(weights=ends[0], constants=ends[1] - ends[0], caches=ends[2] - ends[1], shared=at, total=at)

    def placements(self) -> list[Placement]:
        """The images of weights; further forms of a weight get a number behind their name."""
        forms: dict[str, int] = {}
        out: list[Placement] = []
        for key, image in self.images["weight"].items():
            weight = image.form["weight"]
            number = forms[weight] = forms.get(weight, -1) + 1
            name = f"{weight}#{number}" if number else weight
            out.append(Placement(name=name, address=self.address[key], bytes=image.nbytes, **image.form))
        return out

    def constants(self) -> tuple[list[Constant], bytes]:
        """The literals, and constants.bin."""
        data = bytearray()
        out: list[Constant] = []
        for key, image in self.images["literal"].items():
            place = {"address": self.address[key], "offset": len(data), "bytes": len(image.images[0])}
            data += b"".join(image.images)
            out.append(Constant(name=image.name, per_unit=image.per_unit, **place))
        return out, bytes(data)
