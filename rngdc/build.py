"""`rngdc build`: resolve, capture, simplify; specialise, shard, lower, place, schedule, emit each bucket."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from backend_rngd.artifact import ArtifactError, ArtifactWriter, Manifest, Model, Parallel
from backend_rngd.machine import Machine, load_machine
from ir.errors import Problem, UserError
from rngdc.buckets import BucketSpec, choose
from rngdc.effort import EFFORTS
from rngdc.memory import peak_memory_bytes as peak_of_process
from rngdc.model_files import check_model_files, copy_model_files, eos_ids, pooling, read_tokenizer
from rngdc.options import BuildOptions, ParallelOptions, check_options, check_stages, recorded, shard_passes
from rngdc.places import check_directory, check_space, explained, problem_of
from rngdc.work import TextWatcher, Watcher
from rngdc.write import weight_sources, write_programs

if TYPE_CHECKING:
    from xdsl.dialects.builtin import ModuleOp

    from frontend.resolve import ModelSource
    from rngdc.cache import Cache
    from rngdc.front import FrontModel
    from rngdc.program import Programs

Progress = Callable[[str], None]


@dataclass
class Clock:
    """Wall seconds by stage, and by bucket and step."""

    started: float = field(default_factory=time.perf_counter)
    stages: dict[str, float] = field(default_factory=dict[str, float])
    steps: dict[str, dict[str, float]] = field(default_factory=dict[str, "dict[str, float]"])

    @contextmanager
    def stage(self, name: str) -> Generator[None]:
        """Count the time of a block."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.stages[name] = self.stages.get(name, 0.0) + time.perf_counter() - begun

    def total(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.started


@dataclass
class BuildReport:
    """What a build did. Times are wall seconds; `peak_memory_bytes` is of the whole process."""

    artifact: str
    manifest: Manifest
    seconds: dict[str, float]
    steps: dict[str, dict[str, float]]
    """Seconds of each bucket by step."""
    notes: list[str]
    peak_bytes: dict[str, int]
    worker_memory_bytes: int = 0
    """Of the largest worker process, 0 if there was none."""
    peak_memory_bytes: int = field(default_factory=peak_of_process)

    def to_json(self) -> dict[str, Any]:
        """The report of `rngdc build --json`."""
        m = self.manifest
        return {
            "artifact": self.artifact,
            "model": m.model.id,
            "architecture": m.model.architecture,
            "num_layers": m.model.num_layers,
            "parallel": m.parallel.model_dump(),
            "weights": m.weights_mode,
            "buckets": [
                {"name": b.name, "phase": b.phase, "batch": b.batch, "input_length": b.input_length,
                 "attention_size": b.attention_size, "instructions": b.instructions}
                for b in m.buckets
            ],
            "hbm_bytes": m.hbm.model_dump(),
            "peak_bytes": self.peak_bytes,
            "seconds": {k: round(v, 3) for k, v in self.seconds.items()},
            "peak_memory_bytes": self.peak_memory_bytes,
            "worker_memory_bytes": self.worker_memory_bytes,
            "notes": self.notes,
        }  # fmt: skip


def build(
    options: BuildOptions, progress: Progress, problems: list[Problem] | None = None, watcher: Watcher | None = None
) -> BuildReport:
    """Build an artifact. `watcher` is told what happens to every bucket (default: as texts to `progress`).

    Raises UserError with every problem found (`problems`: those the caller has found already), and BuildFailedError for
    bugs and processes that died.
    """
    clock, notes, machine = Clock(), list[str](), load_machine(options.machine)
    with clock.stage("resolve"):
        source, buckets, writer = check_all(options, machine, list(problems or []), notes, progress)
    cache = options.work.open_cache()
    captured = front(options, source, notes, clock, progress, cache)
    with clock.stage("tokenizer"):
        tokenizer = read_tokenizer(source, cache)
    with clock.stage("backend"):
        programs = make_programs(options, captured, buckets, machine, notes, watcher or TextWatcher(progress), cache)
    clock.steps.update(programs.seconds)
    with clock.stage("write"), explained(f"{options.output} cannot be written"), writer:
        progress("writing the artifact")
        (writer.directory / "ir" / "model.mlir").write_text(captured.captured, "utf-8")
        notes += copy_model_files(source.directory, writer.directory, tokenizer)
        weights, linked = weight_sources(captured.weights, options.weights, writer.directory, progress, cache)
        model = Model(
            id=source.name,
            architecture=source.architecture_class or source.model_type,
            model_type=source.model_type,
            kind=cast(Any, captured.info.kind),
            num_layers=captured.info.layers,
            vocab_size=captured.info.vocab_size,
            max_positions=source.max_positions,
            eos_ids=eos_ids(source.directory, source.config),
            pooling=pooling(source.directory) if captured.info.kind == "encoder" else None,
        )
        parallel = Parallel(
            tensor=options.parallel.tensor,
            pipeline=options.parallel.pipeline,
            units=options.parallel.tensor,
            slices=machine.slices_per_pe,
            mesh=programs.mesh,
        )
        manifest = write_programs(
            writer, programs, machine, model, parallel, options.weights, weights, linked, recorded(options)
        )
    seconds = clock.stages | {"total": clock.total()}
    return BuildReport(
        str(options.output), manifest, seconds, clock.steps, notes, programs.peak, programs.worker_memory
    )


def check_all(
    options: BuildOptions, machine: Machine, problems: list[Problem], notes: list[str], progress: Progress
) -> tuple[ModelSource, list[BucketSpec], ArtifactWriter]:
    """Everything that can be checked before work begins. Raises UserError with all problems."""
    check_options(options, machine, problems)
    writer = _writer(options, problems)
    source, buckets = resolve(options, problems, notes, progress)
    if problems or source is None or writer is None:
        raise UserError(problems)
    return source, buckets, writer


def front(
    options: BuildOptions,
    source: ModelSource,
    notes: list[str],
    clock: Clock,
    progress: Progress,
    cache: Cache | None = None,
    store: bool = True,
) -> FrontModel:
    """The captured model, simplified; taken from the cache unless its IR is to be dumped, and put there (`store`)."""
    from rngdc import front as fronts

    mode = "link" if options.weights == "copy" else options.weights
    effort = EFFORTS[options.opt_level]
    with clock.stage("capture"):
        name = None
        if cache is not None and options.dump_ir is None:
            name = fronts.key(source, options.num_hidden_layers, mode, options.auto_bfloat16_cast, effort.fuse)
        if cache is not None and name is not None and (known := fronts.load(cache, name)) is not None:
            notes += known.info.notes
            return known
        progress(f"capturing {source.name}")
        from frontend.capture import capture

        captured = capture(source, num_hidden_layers=options.num_hidden_layers, weights=mode)
        notes += captured.info.notes
    with clock.stage("passes"):
        from ir.text import print_module
        from passes.opt import run_pipeline
        from passes.pipeline import bind_stage, simplify_stage

        run_pipeline(captured.module, bind_stage())
        text = print_module(captured.module)
        progress("simplifying")
        dumps = options.dump_ir / "model" if options.dump_ir else None
        run_pipeline(captured.module, simplify_stage(options.auto_bfloat16_cast, effort.fuse), dumps)
    info = fronts.ModelInfo(
        captured.info.kind, captured.info.layers, captured.info.vocab_size, list(captured.info.notes)
    )
    model = fronts.FrontModel(text, print_module(captured.module), captured.weights, info, captured.module)
    if store and cache is not None and name is not None:
        fronts.store(cache, name, model, {"model": options.model})
    return model


def specialise_modules(
    options: BuildOptions, captured: FrontModel, buckets: list[BucketSpec], progress: Progress
) -> dict[BucketSpec, ModuleOp]:
    """The module of every bucket, of static sizes."""
    from passes.opt import run_pipeline
    from passes.pipeline import specialise_stage

    modules: dict[BucketSpec, ModuleOp] = {}
    for bucket in buckets:
        progress(f"{bucket.name}: specialise")
        module = captured.module.clone()
        kv = None if captured.info.kind == "encoder" else bucket.attention_size
        stage = specialise_stage(bucket.batch, bucket.input_length, kv, bucket.logits)
        run_pipeline(module, stage, options.dump_ir / bucket.name if options.dump_ir else None)
        modules[bucket] = module
    return modules


def shard_modules(
    options: BuildOptions, modules: dict[BucketSpec, ModuleOp], notes: list[str], progress: Progress
) -> dict[BucketSpec, ModuleOp]:
    """With tensor parallelism, every module becomes that of one unit. Raises UserError for all buckets."""
    from passes.notes import notes as module_notes
    from passes.opt import run_pipeline

    spread = options.parallel
    stage = shard_passes(spread, load_machine(options.machine))
    if spread.sequence and spread.tensor == 1:
        notes.append("--sequence-parallel has no effect with -tp 1")
    if not stage:
        return modules
    found: dict[tuple[str, str, str], Problem] = {}
    for bucket, module in modules.items():
        progress(f"{bucket.name}: shard")
        try:
            run_pipeline(module, stage, options.dump_ir / bucket.name / "shard" if options.dump_ir else None)
        except UserError as error:
            found |= {(p.what, p.why, p.fix): p for p in error.problems}
        notes += [n for n in module_notes(module) if n not in notes]
    if found:
        raise UserError(list(found.values()))
    return modules


def make_programs(
    options: BuildOptions,
    captured: FrontModel,
    buckets: list[BucketSpec],
    machine: Machine,
    notes: list[str],
    watcher: Watcher,
    cache: Cache | None,
) -> Programs:
    """The programs of all buckets, by the workers and from the cache as the options say."""
    from rngdc.estimate import memory_problems
    from rngdc.program import Request, build_programs, lowering_options

    work, plan = options.work, options.parallel.plan
    # Stages share the one map out when the artifact is loaded; `memory_problems` judges each of them.
    roomy = machine.model_copy(update={"hbm_usable_bytes": machine.hbm_usable_bytes * options.parallel.pipeline})
    request = Request(
        passes={b: bucket_passes(options, captured.info.kind, b) for b in buckets},
        text=captured.text,
        model=captured.held,
        machine=roomy,
        lowering=lowering_options(buckets, machine.slices_per_pe, opt_level=options.opt_level),
        digest=hashlib.sha256(plan.read_bytes()).hexdigest() if plan is not None else "",
        check=lambda memory: memory_problems(memory, options.parallel, machine, options.device),
        dumps=options.dump_ir,
        fast_fail=work.fast_fail,
        workers=(work.builders, work.compilers),
        meta={"model": options.model},
    )
    if options.parallel.sequence and options.parallel.tensor == 1:
        notes.append("--sequence-parallel has no effect with -tp 1")
    programs = build_programs(request, work.open_executor(), cache, watcher)
    notes += [n for n in programs.notes if n not in notes]
    notes += cache.notes if cache is not None else []
    return programs


def bucket_passes(options: BuildOptions, kind: str, bucket: BucketSpec) -> str:
    """The passes that make a bucket of the simplified model, as `rngdc opt -p` takes them."""
    from passes.pipeline import outline_stage, spec, specialise_stage

    kv = None if kind == "encoder" else bucket.attention_size
    stage = specialise_stage(bucket.batch, bucket.input_length, kv, bucket.logits)
    shard = shard_passes(options.parallel, load_machine(options.machine))
    return spec([*stage, *shard, *outline_stage()])


def compile_modules(
    modules: dict[BucketSpec, ModuleOp],
    machine: Machine,
    progress: Progress,
    dumps: Path | None = None,
    seconds: dict[str, dict[str, float]] | None = None,
) -> Programs:
    """Streams of modules of static sizes, verified; `dumps` gets the `rngd` modules as numbered files, `seconds` the
    times."""
    from rngdc.program import compile_programs

    programs = compile_programs(modules, machine, TextWatcher(progress), dumps)
    if seconds is not None:
        seconds.update(programs.seconds)
    return programs


def _writer(options: BuildOptions, problems: list[Problem]) -> ArtifactWriter | None:
    try:
        writer = ArtifactWriter(options.output, options.overwrite)
    except ArtifactError as error:
        problems += [Problem(p.what, p.why, p.fix) for p in error.problems]
        return None
    except OSError as error:
        problems.append(problem_of(error, f"{options.output} cannot be written"))
        return None
    check_directory("output", options.output.absolute().parent, problems)
    return writer


def resolve(
    options: BuildOptions, problems: list[Problem], notes: list[str], progress: Progress
) -> tuple[ModelSource | None, list[BucketSpec]]:
    """The model and the buckets to build; appends every problem of both."""
    from frontend.resolve import resolve_model

    progress("resolving the model")
    local = options.model.startswith((".", "/", "~"))
    need_weights = options.weights in ("link", "copy") and (local or not problems)
    source: ModelSource | None = None
    try:
        source = resolve_model(
            options.model,
            options.revision,
            options.trust_remote_code,
            auto_bfloat16_cast=options.auto_bfloat16_cast,
            need_weights=need_weights,
        )
    except UserError as error:
        problems += error.problems
    timing_only = options.weights == "none"
    if source is not None:
        kind, positions = source.architecture.kind, source.max_positions
        check_model_files(source, problems)
        if options.weights == "copy":
            check_space("--weights copy", options.output, sum(f.stat().st_size for f in source.weight_files), problems)
        _check_depth(options, source.text_config, problems)
        return source, choose(options.buckets, kind, positions, problems, notes, timing_only)
    # The model cannot be used, but its buckets may be wrong as well: say so at once.
    config = _config_anyway(options.model)
    kind = "encoder" if config.get("model_type") == "bert" else "decoder"
    positions = next(
        (config[k] for k in ("max_position_embeddings", "n_positions") if isinstance(config.get(k), int)), None
    )
    _check_depth(options, config, problems)
    choose(options.buckets, kind, positions, problems, notes, timing_only)
    return None, []


def _check_depth(options: BuildOptions, config: dict[str, Any], problems: list[Problem]) -> None:
    """Layers and stages against the depth that the config states."""
    depth = next((config[k] for k in ("num_hidden_layers", "n_layer") if isinstance(config.get(k), int)), None)
    asked = options.num_hidden_layers
    if depth is not None and asked is not None and asked > depth:
        why = f"the model has {depth} layers"
        problems.append(Problem(f"--num-hidden-layers {asked}", why, f"use 1 to {depth}"))
    layers = depth if asked is None or depth is None else min(asked, depth)
    check_stages(options.parallel, layers, problems)


def _config_anyway(model: str) -> dict[str, Any]:
    try:
        data: Any = json.loads((Path(model).expanduser() / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return cast("dict[str, Any]", data) if isinstance(data, dict) else {}


def single_unit(machine: Machine) -> Parallel:
    """The parallel record of what runs on one processing element."""
    return Parallel(tensor=1, pipeline=1, units=1, slices=machine.slices_per_pe)


__all__ = ["BuildOptions", "BuildReport", "ParallelOptions", "build", "compile_modules", "single_unit"]
