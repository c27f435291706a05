"""`rngdc build`: from a model to an artifact."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rngdc import defaults
from rngdc.commands.app import app, refuse, step_texts
from rngdc.effort import DEFAULT as DEFAULT_LEVEL
from rngdc.effort import EFFORTS

if TYPE_CHECKING:
    from ir.errors import Problem
    from rngdc.build import BuildReport
    from rngdc.options import BuildOptions, ParallelOptions

_NOT_SETTINGS = {"config", "json", "help"}
_NONE = "none"


def _levels() -> str:
    return ", ".join(f"{i}: {effort.help}" for i, effort in enumerate(EFFORTS))


def _configure(ctx: typer.Context, value: Path | None) -> Path | None:
    """Make the settings of the file the defaults of the other options."""
    if value is not None:
        from rngdc.config_file import read_config

        names = {str(p.name) for p in ctx.command.params} - _NOT_SETTINGS
        ctx.default_map = {**(ctx.default_map or {}), **read_config(value, names)}
    return value


@app.command(
    epilog="""\b
Examples:
  rngdc build ./SmolLM2-135M-Instruct ./smollm2 -pb 1,128 -db 1,512
  rngdc build meta-llama/Llama-3.1-8B ./llama -tp 8 -pb 1,512 -db 4,2048 --weights none
  rngdc build ./all-MiniLM-L6-v2 ./minilm -pb 1,128 --auto-bfloat16-cast --weights copy
  rngdc build meta-llama/Llama-3.1-70B -tp 8 -pp 4 --dry-run
  rngdc build --config llama.yaml -tp 4"""
)
def build(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="A hub id, or a local directory or .gguf file (starting with . / or ~).",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Argument(metavar="OUT", help="Directory to create.", show_default=False)
    ] = None,
    max_seq_len_to_capture: Annotated[
        int | None,
        typer.Option(
            "--max-seq-len-to-capture",
            "--max-model-len",
            metavar="N",
            help="Longest sequence, prompt and answer together.",
            show_default="2048, or the model's positions if there are fewer; with buckets, the longest",
        ),
    ] = None,
    prefill_buckets: Annotated[
        list[str] | None,
        typer.Option(
            "--prefill-buckets",
            "-pb",
            metavar="B,S",
            help="Batch, input length of a prefill program. Repeatable.",
            show_default="1 and the longest sequence, if no bucket is given",
        ),
    ] = None,
    decode_buckets: Annotated[
        list[str] | None,
        typer.Option(
            "--decode-buckets",
            "-db",
            metavar="B,S",
            help="Batch, attention size of a decode program. Repeatable.",
            show_default="1 and the longest sequence, if no bucket is given",
        ),
    ] = None,
    prefill_chunk_size: Annotated[
        int | None,
        typer.Option(metavar="N", help="Read longer prompts in chunks of N tokens.", show_default="no chunks"),
    ] = None,
    tensor_parallel_size: Annotated[
        int,
        typer.Option(
            "--tensor-parallel-size",
            "-tp",
            metavar="N",
            help="Processing elements of a layer: 1, 2, 4, 8 on a card; 16, 32 over cards.",
        ),
    ] = defaults.TENSOR_PARALLEL,
    pipeline_parallel_size: Annotated[
        int,
        typer.Option(
            "--pipeline-parallel-size",
            "-pp",
            metavar="N",
            help="Stages that the layers are divided into. A preference: loading may choose another.",
        ),
    ] = defaults.PIPELINE_PARALLEL,
    tensor_parallel_plan: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="YAML with placements of weights.", show_default="the model's own"),
    ] = None,
    sequence_parallel: Annotated[
        bool | None,
        typer.Option(
            "--sequence-parallel/--no-sequence-parallel",
            help="Norms and residuals on a part of the tokens each.",
            show_default="where every PE gets whole slices of tokens",
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            "--device",
            "--devices",
            metavar="N|DEVICES",
            help="Cards that the artifact is for: their number, or devices such as npu:0:*,npu:1:0-3. "
            "What does not fit them is refused; loading may choose others.",
            show_default="as many cards as -tp and -pp take",
        ),
    ] = None,
    opt_level: Annotated[
        int,
        typer.Option(
            "-O",
            "--opt-level",
            metavar="0-3",
            help=f"Time spent to make programs faster. {_levels()}.",
        ),
    ] = DEFAULT_LEVEL,
    weights: Annotated[
        str,
        typer.Option(
            metavar="MODE",
            help="link: refer to the model's files with checksums. copy: make the artifact self-contained. "
            "random[:SEED]: random numbers. none: for timing only; like random, needs just config.json.",
        ),
    ] = "link",
    auto_bfloat16_cast: Annotated[
        bool,
        typer.Option(
            "--auto-bfloat16-cast", help="Compute an fp16 or fp32 checkpoint in bfloat16.", show_default="off"
        ),
    ] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.", show_default="off")
    ] = False,
    revision: Annotated[
        str | None, typer.Option(metavar="NAME", help="Branch, tag or commit of a hub model.", show_default="main")
    ] = None,
    num_hidden_layers: Annotated[
        int | None,
        typer.Option(
            "--num-hidden-layers", "--num-layers", metavar="N", help="Only the first N layers.", show_default="all"
        ),
    ] = None,
    additional_model_config: Annotated[
        list[str] | None,
        typer.Option(
            "--additional-model-config",
            metavar="KEY=VALUE",
            help="A setting of the model: num_hidden_layers, seed_for_random_weight. Repeatable.",
            show_default=_NONE,
        ),
    ] = None,
    name: Annotated[str, typer.Option(metavar="TEXT", help="Name of the artifact.", show_default="the model's")] = "",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT if it is an artifact.", show_default="off")
    ] = False,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Options from a YAML file, `option: value` a line; the command line wins.",
            callback=_configure,
            is_eager=True,
            show_default=_NONE,
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Check everything, print buckets, memory and estimated times; write nothing.",
            show_default="off",
        ),
    ] = False,
    build_report: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write where the time and memory went: .json, or text.", show_default=_NONE),
    ] = None,
    suggest_buckets: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.csv",
            help="Print buckets for requests of these lengths (prompt,output a line), and exit.",
            show_default=_NONE,
        ),
    ] = None,
    num_pipeline_builder_workers: Annotated[
        int,
        typer.Option(metavar="N", help="Processes that run the passes of buckets. They hold no weights."),
    ] = 1,
    num_compile_workers: Annotated[
        int,
        typer.Option(metavar="N", help="Processes that place, schedule and verify buckets."),
    ] = 1,
    executor: Annotated[str, typer.Option(help="Where these are: local, or ray for a Ray cluster.")] = "local",
    ray_address: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="The cluster.", show_default="RAY_ADDRESS, or one on this machine"),
    ] = None,
    cache: Annotated[
        bool, typer.Option("--cache/--no-cache", help="Take results of earlier builds with the same IR.")
    ] = True,
    cache_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where they are kept.", show_default="the user's cache directory"),
    ] = None,
    fast_fail: Annotated[
        bool, typer.Option("--fast-fail/--no-fast-fail", help="Begin nothing new after the first failure.")
    ] = True,
    dump_ir: Annotated[
        Path | None,
        typer.Option(
            "--dump-ir", metavar="DIR", help="Write the IR after every pass to numbered files.", show_default=_NONE
        ),
    ] = None,
    print_pipeline: Annotated[
        bool, typer.Option("--print-pipeline", help="Print the passes that would run, and exit.", show_default="off")
    ] = False,
    json: Annotated[
        str | None,
        typer.Option(
            "--json", metavar="FILE|-", help="Write the report as JSON to FILE, or to stdout for -.", show_default=_NONE
        ),
    ] = None,
    quantization_artifact_path: Annotated[str | None, typer.Option(hidden=True)] = None,
    kv_cache_sharing_across_beams_config: Annotated[str | None, typer.Option(hidden=True)] = None,
    bundle_binaries: Annotated[bool | None, typer.Option("--bundle-binaries/--no-bundle-binaries", hidden=True)] = None,
    data_parallel_size: Annotated[str | None, typer.Option("--data-parallel-size", "-dp", hidden=True)] = None,
    model_id: Annotated[str | None, typer.Option(hidden=True)] = None,
    paged_attention_num_blocks: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Compile a model: one capture, one program a bucket, an artifact in OUT.

    All problems are reported at once, before any work, and a build that fails leaves nothing behind.
    """
    from ir.errors import UserError
    from rngdc.buckets import BucketRequest, parse_pairs
    from rngdc.console import out as stdout
    from rngdc.options import BuildOptions, ParallelOptions
    from rngdc.places import check_file
    from rngdc.reference_options import apply_additional, refuse_replaced
    from rngdc.work import WorkOptions

    problems: list[Problem] = []
    request = BucketRequest(
        parse_pairs("-pb", prefill_buckets or [], problems), parse_pairs("-db", decode_buckets or [], problems),
        max_seq_len_to_capture, prefill_chunk_size,
    )  # fmt: skip
    parallel = ParallelOptions(
        tensor_parallel_size, pipeline_parallel_size, tensor_parallel_plan, sequence_parallel
    )  # fmt: skip
    if suggest_buckets is not None:
        _suggest(suggest_buckets, json)
        return
    if print_pipeline:
        if problems:
            raise UserError(problems)
        stdout.print(_pipeline_text(auto_bfloat16_cast, parallel, opt_level), markup=False)
        return
    replaced = {
        "--quantization-artifact-path": quantization_artifact_path,
        "--kv-cache-sharing-across-beams-config": kv_cache_sharing_across_beams_config,
        "--bundle-binaries": "" if bundle_binaries else None,
        "--data-parallel-size": data_parallel_size,
        "--model-id": model_id,
        "--paged-attention-num-blocks": paged_attention_num_blocks,
    }
    refuse_replaced({flag: value for flag, value in replaced.items() if value is not None}, problems)
    if model is None and problems:
        raise UserError(problems)
    if model is None:
        refuse("no model was given", "there is nothing to build", "rngdc build MODEL OUT, see `rngdc build --help`")
    if output is None:
        if not dry_run:
            refuse("no output was given", "the artifact needs a directory", f"rngdc build {model} OUT")
        output = Path(f"{Path(model).name}-artifact")
    if model.startswith((".", "/", "~")):  # a download shows its own progress, a local model only ours
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    options = BuildOptions(
        model=model,
        output=output,
        buckets=request,
        parallel=parallel,
        weights=weights,
        auto_bfloat16_cast=auto_bfloat16_cast,
        trust_remote_code=trust_remote_code,
        revision=revision,
        num_hidden_layers=num_hidden_layers,
        name=name,
        overwrite=overwrite,
        dump_ir=dump_ir,
        opt_level=opt_level,
        device=device,
        work=WorkOptions(
            num_pipeline_builder_workers, num_compile_workers, executor, ray_address, cache, cache_dir, fast_fail
        ),
    )
    options = apply_additional(options, additional_model_config or [], problems)
    for flag, path in (("--build-report", build_report), ("--json", Path(json) if json not in (None, "-") else None)):
        if path is not None:
            check_file(flag, path, problems)
    if dry_run:
        _dry_run(options, problems, json)
        return
    from rngdc.build import build as run_build
    from rngdc.progress import build_progress

    with build_progress() as watcher:
        report = run_build(options, watcher.text, problems, watcher)
    _show(report, build_report, json)


def _show(report: BuildReport, build_report: Path | None, json: str | None) -> None:
    """Print what was built, and write the reports."""
    from rngdc.build_report import write_build_report
    from rngdc.console import err, print_notes, write_json
    from rngdc.console import out as stdout

    print_notes(report.notes)
    if build_report is not None:
        write_build_report(report, build_report)
    if json is not None:
        write_json(report.to_json(), json)
    if json != "-":
        for bucket in report.manifest.buckets:
            stdout.print(f"{bucket.name}: {bucket.instructions:,} instructions")
        stdout.print(f"{report.artifact}: {report.manifest.hbm.total / 1e6:,.1f} MB of HBM a processing element")
    err.print(
        f"built in {report.seconds['total']:.1f} s, {report.peak_memory_bytes / 1e9:.2f} GB of memory at the peak"
    )


def _dry_run(options: BuildOptions, problems: list[Problem], json: str | None) -> None:
    from rngdc.console import out as stdout
    from rngdc.console import print_notes, write_json
    from rngdc.dry_run import dry_run

    with step_texts() as show:
        plan = dry_run(options, show, problems)
    print_notes(plan.notes)
    if json is not None:
        write_json(plan.to_json(), json)
    if json != "-":
        for item in plan.tables():
            stdout.print(item)


def _suggest(path: Path, json: str | None) -> None:
    from rngdc.console import out as stdout
    from rngdc.console import write_json
    from rngdc.suggest import read_lengths, suggest

    suggestion = suggest(read_lengths(path))
    if json is not None:
        write_json(suggestion.to_json(), json)
    if json != "-":
        for line in suggestion.lines():
            stdout.print(line, markup=False)


def _pipeline_text(auto_bfloat16_cast: bool, parallel: ParallelOptions, opt_level: int) -> str:
    from backend_rngd.machine import load_machine
    from passes.pipeline import outline_stage, simplify_stage, spec, specialise_stage
    from rngdc.options import shard_passes

    if not 0 <= opt_level < len(EFFORTS):
        refuse(f"-O{opt_level}", "there is no such optimisation level", f"use -O0 to -O{len(EFFORTS) - 1}")
    effort = EFFORTS[opt_level]
    shard = spec(shard_passes(parallel, load_machine()))
    lines = [
        "capture      frontend.capture",
        f"simplify     {spec(simplify_stage(auto_bfloat16_cast, effort.fuse))}",
        f"specialise   {spec(specialise_stage(1, 512, 512))}  (for each bucket)",
        *([f"shard        {shard}"] if shard else []),
        f"outline      {spec(outline_stage())}",
        f"map          rngd-lower{{opt={opt_level}}}",
        f"place        {'rngd-hoist,' if effort.variants[0].prefetch else ''}rngd-place{{prefetch=false}}",
        "schedule     rngd-schedule",
        "emit         rngd-emit",
    ]
    if len(effort.variants) > 1:
        lines.append(f"             map to emit in {len(effort.variants)} variants, of which the simulator chooses")
    return "\n".join(lines)
