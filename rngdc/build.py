"""`rngdc build`: resolve, capture, simplify; for each bucket specialise, lower, place, schedule, emit; artifact."""

from __future__ import annotations

import base64
import json
import re
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from backend_rngd.artifact import (
    Artifact,
    ArtifactError,
    ArtifactWriter,
    Compiler,
    LinkedFile,
    MachineId,
    Manifest,
    Model,
    Parallel,
    WeightSource,
)
from backend_rngd.artifact.store import link
from backend_rngd.machine import Machine, load_machine
from ir.errors import Problem, UserError
from rngdc import __version__
from rngdc.buckets import BucketRequest, BucketSpec, choose
from rngdc.model_files import copy_model_files, eos_ids, pooling

if TYPE_CHECKING:
    from xdsl.dialects.builtin import ModuleOp

    from frontend.resolve import ModelSource
    from ir.weights import WeightTable
    from rngdc.program import Programs

Progress = Callable[[str], None]
BUCKET_FIELDS = {"name", "phase", "batch", "input_length", "attention_size", "instructions"}
WEIGHT_MODES = r"link|copy|none|random(:\d+)?"


@dataclass
class BuildOptions:
    """What `rngdc build` was asked for. `weights`: link, copy, random[:SEED] or none."""

    model: str
    output: Path
    buckets: BucketRequest
    tensor_parallel_size: int = 1
    weights: str = "link"
    auto_bfloat16_cast: bool = False
    trust_remote_code: bool = False
    revision: str | None = None
    num_hidden_layers: int | None = None
    overwrite: bool = False
    dump_ir: Path | None = None
    machine: str = "rngd"


@dataclass
class BuildReport:
    """What a build did. Times are wall seconds; `peak_memory_bytes` is of the whole process."""

    artifact: str
    manifest: Manifest
    seconds: dict[str, float]
    notes: list[str]
    peak_bytes: dict[str, int]
    peak_memory_bytes: int = field(default_factory=lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)

    def to_json(self) -> dict[str, Any]:
        """The report of `rngdc build --json`."""
        m = self.manifest
        return {
            "artifact": self.artifact,
            "model": m.model.id,
            "architecture": m.model.architecture,
            "num_layers": m.model.num_layers,
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
            "notes": self.notes,
        }  # fmt: skip


def build(options: BuildOptions, progress: Progress, problems: list[Problem] | None = None) -> BuildReport:
    """Build an artifact. Raises UserError with every problem found (`problems`: those the caller has found already)."""
    started = time.perf_counter()
    seconds: dict[str, float] = {}
    notes: list[str] = []
    problems = list(problems or [])
    machine = load_machine(options.machine)
    writer = _check_options(options, problems)
    progress("resolving the model")
    source, buckets = _resolve(options, problems, notes)
    if problems or source is None or writer is None:
        raise UserError(problems)

    def timed(stage: str, begun: float) -> None:
        seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - begun

    timed("resolve", started)
    progress(f"capturing {source.name}")
    begun = time.perf_counter()
    from frontend.capture import capture

    mode = "link" if options.weights == "copy" else options.weights
    captured = capture(source, num_hidden_layers=options.num_hidden_layers, weights=mode)
    notes += captured.info.notes
    timed("capture", begun)

    from ir.text import print_module
    from passes.opt import run_pipeline
    from passes.pipeline import simplify_stage, specialise_stage

    captured_text = print_module(captured.module)
    progress("simplifying")
    begun = time.perf_counter()
    dumps = options.dump_ir
    cast_allowed = options.auto_bfloat16_cast
    run_pipeline(captured.module, simplify_stage(cast_allowed), dumps / "model" if dumps else None)
    modules: dict[BucketSpec, ModuleOp] = {}
    for bucket in buckets:
        module = captured.module.clone()
        kv = None if captured.info.kind == "encoder" else bucket.attention_size
        stage = specialise_stage(bucket.batch, bucket.input_length, kv)
        run_pipeline(module, stage, dumps / bucket.name if dumps else None)
        modules[bucket] = module
    timed("passes", begun)

    begun = time.perf_counter()
    programs = compile_modules(modules, machine, progress, dumps)
    timed("backend", begun)
    begun = time.perf_counter()
    with writer:
        progress("writing the artifact")
        (writer.directory / "ir" / "model.mlir").write_text(captured_text, "utf-8")
        has_tokenizer = bool(source.tokenizer_files)
        notes += copy_model_files(source.directory, writer.directory, has_tokenizer, options.trust_remote_code)
        weights, linked = _weights(captured.weights, options.weights, writer.directory, progress)
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
        manifest = write_programs(writer, programs, machine, model, options.weights, weights, linked)
    timed("write", begun)
    seconds["total"] = time.perf_counter() - started
    return BuildReport(str(options.output), manifest, seconds, notes, programs.peak)


def compile_modules(
    modules: dict[BucketSpec, ModuleOp], machine: Machine, progress: Progress, dumps: Path | None = None
) -> Programs:
    """Streams of all buckets, verified; `dumps` gets the `rngd` modules as numbered files."""
    from ir.text import print_module
    from rngdc.program import compile_programs

    def dump(step: str, bucket: BucketSpec, module: ModuleOp) -> None:
        if dumps is None:
            return
        directory = dumps / bucket.name
        directory.mkdir(parents=True, exist_ok=True)
        name = f"{len(list(directory.glob('*.mlir'))):02d}-rngd-{step}.mlir"
        rest = {"lower": "rngd-hoist,rngd-place,rngd-schedule", "hoist": "rngd-place,rngd-schedule"}.get(step, "")
        (directory / name).write_text(f"// rngdc opt -p '{rest}' {name}\n{print_module(module)}", "utf-8")

    def step(name: str, bucket: BucketSpec) -> None:
        progress(f"{bucket.name}: {name}")

    programs = compile_programs(modules, machine, machine.slices_per_pe, step, dump)
    for program in programs.programs:
        step("verify", program.bucket)
        assert program.emitted is not None
        errors = [v for v in program.emitted.check(machine) if v.severity == "error"]
        if errors:
            listed = "\n".join(f"  {v}" for v in errors[:20])
            raise AssertionError(
                f"{program.bucket.name}: the compiler made {len(errors)} illegal instructions:\n{listed}"
            )
    return programs


def write_programs(
    writer: ArtifactWriter,
    programs: Programs,
    machine: Machine,
    model: Model,
    mode: str,
    weights: list[WeightSource],
    linked: list[LinkedFile],
) -> Manifest:
    """Write streams, IR, probes and constants, and finish the artifact."""
    from backend_rngd.isa.tables import save_npz
    from ir.text import print_module

    for program in programs.programs:
        assert program.emitted is not None and program.record is not None
        save_npz(program.emitted.streams[0], writer.directory / program.record.stream)
        (writer.directory / program.record.ir).write_text(print_module(program.tc), "utf-8")
        (writer.directory / program.record.debug).write_text(json.dumps(program.probes) + "\n", "utf-8")
    (writer.directory / "constants.bin").write_bytes(programs.constant_bytes)
    return writer.finish(
        Manifest(
            compiler=Compiler(version=__version__),
            machine=MachineId(name=machine.name, digest=machine.digest()),
            model=model,
            parallel=Parallel(tensor=1, pipeline=1, units=1, slices=machine.slices_per_pe),
            weights_mode=mode,
            weights=tuple(weights),
            placements=tuple(programs.placements),
            constants=tuple(programs.constants),
            linked=tuple(linked),
            hbm=programs.hbm,
            caches=tuple(programs.caches),
            buckets=tuple(p.record for p in programs.programs if p.record is not None),
        )
    )


def _check_options(options: BuildOptions, problems: list[Problem]) -> ArtifactWriter | None:
    if options.tensor_parallel_size != 1:
        why = "tensor parallelism is not built yet: a model runs on one processing element"
        problems.append(Problem(f"-tp {options.tensor_parallel_size}", why, "use -tp 1, or leave it out"))
    if not re.fullmatch(WEIGHT_MODES, options.weights):
        why = "weights are linked, copied, random or left out"
        problems.append(Problem(f"--weights {options.weights!r}", why, "use link, copy, random[:SEED] or none"))
    if options.num_hidden_layers is not None and options.num_hidden_layers < 1:
        problems.append(Problem(f"--num-layers {options.num_hidden_layers}", "a model has layers", "use 1 or more"))
    try:
        return ArtifactWriter(options.output, options.overwrite)
    except ArtifactError as error:
        problems += [Problem(p.what, p.why, p.fix) for p in error.problems]
        return None


def _resolve(
    options: BuildOptions, problems: list[Problem], notes: list[str]
) -> tuple[ModelSource | None, list[BucketSpec]]:
    """The model and the buckets to build; appends every problem of both."""
    from frontend.resolve import resolve_model

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
        return source, choose(options.buckets, kind, positions, problems, notes, timing_only)
    # The model cannot be used, but its buckets may be wrong as well: say so at once.
    config = _config_anyway(options.model)
    kind = "encoder" if config.get("model_type") == "bert" else "decoder"
    positions = next(
        (config[k] for k in ("max_position_embeddings", "n_positions") if isinstance(config.get(k), int)), None
    )
    choose(options.buckets, kind, positions, problems, notes, timing_only)
    return None, []


def _config_anyway(model: str) -> dict[str, Any]:
    try:
        data: Any = json.loads((Path(model).expanduser() / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return cast("dict[str, Any]", data) if isinstance(data, dict) else {}


def _weights(
    table: WeightTable, mode: str, directory: Path, progress: Progress
) -> tuple[list[WeightSource], list[LinkedFile]]:
    """Where the artifact finds every weight of the model; mode `copy` writes them into it."""
    if mode == "copy":
        table = _copied(table, directory, progress)
    sources: list[WeightSource] = []
    files: dict[str, None] = {}
    for ref in table.values():
        inline = None
        if ref.inline is not None:
            inline = base64.b64encode(ref.inline.tobytes()).decode("ascii")
        file = ref.file
        if file is not None and mode == "link":
            file = str(Path(file).absolute())
            files[file] = None
        sources.append(
            WeightSource(
                name=ref.name,
                dtype=ref.dtype,
                shape=ref.shape,
                file=file,
                offset=ref.offset or 0,
                inline=inline,
                seed=ref.seed,
            )  # fmt: skip
        )
    linked: list[LinkedFile] = []
    for file in files:
        progress(f"checksum of {Path(file).name}")
        linked.append(link(Path(file)))
    return sources, linked


def _copied(table: WeightTable, directory: Path, progress: Progress) -> WeightTable:
    from dataclasses import replace

    from ir.weights import WeightTable, safetensors_refs, write_safetensors

    target = directory / "weights" / "model.safetensors"
    target.parent.mkdir()
    progress("copying the weights")
    write_safetensors(target, {name: table.load(name) for name, ref in table.items() if ref.file is not None})
    copied = {ref.name: replace(ref, file="weights/model.safetensors") for ref in safetensors_refs(target)}
    return WeightTable({name: copied.get(name, ref) for name, ref in table.items()}, base=directory)


def report_artifact(artifact: Artifact) -> dict[str, Any]:
    """A summary of an artifact, for `rngdc inspect`."""
    m = artifact.manifest
    return {
        "artifact": str(artifact.directory),
        "format": m.version.model_dump(),
        "compiler": m.compiler.model_dump(),
        "machine": m.machine.model_dump(),
        "model": m.model.model_dump(mode="json"),
        "parallel": m.parallel.model_dump(),
        "weights": {"mode": m.weights_mode, "tensors": len(m.weights), "images": len(m.placements)},
        "hbm_bytes": m.hbm.model_dump(),
        "buckets": [
            {**b.model_dump(mode="json", include=BUCKET_FIELDS),
             "inputs": {p.name: [p.dtype, *p.shape] for p in b.inputs},
             "outputs": {p.name: [p.dtype, *p.shape] for p in b.outputs}}
            for b in m.buckets
        ],
    }  # fmt: skip
