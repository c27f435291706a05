"""The `rngdc` command. Each subcommand imports what it needs when it runs, so that `--help` is immediate."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from rngdc import __version__
from rngdc.guard import foreign_packages

if TYPE_CHECKING:
    from backend_rngd.artifact import Artifact, Bucket
    from ir.errors import Problem

app = typer.Typer(
    name="rngdc",
    help="Compile Hugging Face models to RNGD instruction streams, and run them on a simulated card.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

Json = Annotated[
    str | None, typer.Option("--json", metavar="FILE|-", help="Write the report as JSON to FILE, or to stdout for -.")
]
Mode = Annotated[str, typer.Option("--mode", help="Timing mode: documented or silicon.")]
ArtifactPath = Annotated[
    Path, typer.Argument(metavar="OUT", help="An artifact, made by `rngdc build`.", show_default=False)
]
Target = Annotated[
    Path,
    typer.Argument(metavar="OUT|FILE.mlir", help="An artifact, or a file with one `tc` function.", show_default=False),
]


def _version(value: bool) -> None:
    if value:
        typer.echo(f"rngdc {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Compile Hugging Face models to RNGD instruction streams, and run them on a simulated card."""


@app.command(
    epilog="""\b
[bold]Examples[/]

rngdc build ./SmolLM2-135M-Instruct ./smollm2 -pb 1,128 -db 1,512\n
rngdc build meta-llama/Llama-3.1-8B ./llama -pb 1,512 -db 1,1024 --weights none\n
rngdc build ./all-MiniLM-L6-v2 ./minilm -pb 1,128 --auto-bfloat16-cast --weights copy"""
)
def build(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A hub id, or a local directory or .gguf file (starting with . / or ~).",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to create.", show_default=False)],
    prefill_buckets: Annotated[
        list[str] | None,
        typer.Option(
            "--prefill-buckets", "-pb", metavar="B,S", help="Batch, input length of a prefill program. Repeatable."
        ),
    ] = None,
    decode_buckets: Annotated[
        list[str] | None,
        typer.Option(
            "--decode-buckets", "-db", metavar="B,S", help="Batch, attention size of a decode program. Repeatable."
        ),
    ] = None,
    tensor_parallel_size: Annotated[
        int,
        typer.Option("--tensor-parallel-size", "-tp", metavar="N", help="Processing elements of a layer."),
    ] = 1,
    weights: Annotated[
        str,
        typer.Option(
            metavar="MODE",
            help="link: refer to the model's files with checksums. copy: make the artifact self-contained. "
            "random\\[:SEED]: random numbers. none: for timing only; like random, needs just config.json.",
        ),
    ] = "link",
    auto_bfloat16_cast: Annotated[
        bool, typer.Option("--auto-bfloat16-cast", help="Compute an fp16 or fp32 checkpoint in bfloat16.")
    ] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")] = None,
    num_hidden_layers: Annotated[
        int | None, typer.Option("--num-layers", metavar="N", help="Build only the first N layers.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is an artifact.")] = False,
    dump_ir: Annotated[
        Path | None, typer.Option("--dump-ir", metavar="DIR", help="Write the IR after every pass to numbered files.")
    ] = None,
    print_pipeline: Annotated[
        bool, typer.Option("--print-pipeline", help="Print the passes that would run, and exit.")
    ] = False,
    json: Json = None,
) -> None:
    """Compile a model: one capture, one program a bucket, an artifact in OUT.

    Without buckets there is one prefill and one decode bucket of the model's positions (at most 2,048).
    All problems are reported at once, and a build that fails leaves nothing behind.
    """
    from ir.errors import UserError
    from rngdc.buckets import BucketRequest, parse_pairs
    from rngdc.console import err, print_notes, steps, write_json
    from rngdc.console import out as stdout

    problems: list[Problem] = []
    request = BucketRequest(
        parse_pairs("-pb", prefill_buckets or [], problems), parse_pairs("-db", decode_buckets or [], problems)
    )
    if print_pipeline:
        if problems:
            raise UserError(problems)
        stdout.print(_pipeline_text(auto_bfloat16_cast), markup=False)
        return
    from rngdc.build import BuildOptions
    from rngdc.build import build as run_build

    if model.startswith((".", "/", "~")):  # a download shows its own progress, a local model only ours
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

    options = BuildOptions(
        model, out, request, tensor_parallel_size, weights, auto_bfloat16_cast, trust_remote_code, revision,
        num_hidden_layers, overwrite, dump_ir,
    )  # fmt: skip
    with steps() as progress:
        report = run_build(options, lambda text: progress.update(cast(Any, 0), description=text), problems)
    print_notes(report.notes)
    if json is not None:
        write_json(report.to_json(), json)
    if json != "-":
        for bucket in report.manifest.buckets:
            stdout.print(f"{bucket.name}: {bucket.instructions:,} instructions")
        stdout.print(f"{out}: {report.manifest.hbm.total / 1e6:,.1f} MB of HBM")
    err.print(
        f"built in {report.seconds['total']:.1f} s, {report.peak_memory_bytes / 1e9:.2f} GB of memory at the peak"
    )


def _pipeline_text(auto_bfloat16_cast: bool) -> str:
    from passes.pipeline import simplify_stage, spec, specialise_stage

    return "\n".join(
        [
            "capture      frontend.capture",
            f"simplify     {spec(simplify_stage(auto_bfloat16_cast))}",
            f"specialise   {spec(specialise_stage(1, 512, 512))}  (for each bucket)",
            "map          rngd-lower",
            "place        rngd-hoist,rngd-place",
            "schedule     rngd-schedule",
            "emit         backend_rngd.emit, isa.legality",
        ]
    )


@app.command(
    epilog="""\b
[bold]Examples[/]

rngdc run ./smollm2 --chat --prompt "What is the capital of France?"\n
rngdc run ./smollm2 --prompt-file story.txt --max-tokens 100 --json -\n
rngdc run ./minilm --prompt "A man is eating food." --json -"""
)
def run(
    artifact: ArtifactPath,
    prompt: Annotated[str | None, typer.Option(help="Text to continue or to embed.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(metavar="FILE", help="Read the prompt from a file.")] = None,
    prompt_ids: Annotated[str | None, typer.Option(metavar="ID,ID,...", help="The prompt as token ids.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    max_tokens: Annotated[int, typer.Option(metavar="N", help="Stop after N tokens.")] = 32,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after a stop token.")] = False,
    mode: Mode = "documented",
    strict: Annotated[
        bool, typer.Option("--strict", help="Also find reads of memory that nothing wrote (slower).")
    ] = False,
    json: Json = None,
) -> None:
    """Generate text, or embed it, on the simulated card. The tokens come from the instruction streams alone."""
    from rngdc.console import bar, write_json
    from rngdc.console import out as stdout
    from runtime_sim.generate import embed, generate
    from runtime_sim.runtime import Device

    opened = _open(artifact)
    model = opened.manifest.model
    ids, text_model = _prompt(opened, prompt, prompt_file, prompt_ids, chat)
    device = Device(opened, _mode(mode), strict)
    with bar() as progress:
        loading = progress.add_task("loading weights", total=None)
        device.load(lambda done, total: progress.update(loading, completed=done, total=total))
        if model.kind == "encoder":
            working = progress.add_task("embedding", total=1)
            embedding = embed(device, ids)
            progress.advance(working)
            report: dict[str, Any] = {
                "artifact": str(artifact),
                "mode": mode,
                "prompt_ids": embedding.prompt_ids,
                "embedding": [float(x) for x in embedding.vector],
                "time_us": embedding.seconds * 1e6,
            }
            shown = (
                "[" + ", ".join(f"{x:.4f}" for x in embedding.vector[:8]) + f", ...] ({len(embedding.vector)} numbers)"
            )
            timing = f"simulated: {report['time_us']:,.0f} us"
        else:
            answering = progress.add_task("answering", total=max_tokens)
            stop = () if ignore_eos else model.eos_ids

            def advance(row: int, token: int, logits: object) -> None:
                progress.advance(answering)

            (row,) = generate(device, [ids], max_tokens, stop, advance)
            progress.update(answering, total=len(row.token_ids))
            kept = row.token_ids[:-1] if row.finish == "eos" else row.token_ids
            shown = text_model.decode(kept) if text_model is not None else " ".join(map(str, row.token_ids))
            report = {
                "artifact": str(artifact),
                "mode": mode,
                "prompt_ids": row.prompt_ids,
                "token_ids": row.token_ids,
                "text": shown if text_model is not None else None,
                "finish": row.finish,
                "ttft_us": row.ttft_us,
                "tpot_us": row.tpot_us,
            }
            timing = f"simulated: first token {row.ttft_us:,.0f} us"
            if row.tpot_us is not None:
                timing += f", then {row.tpot_us:,.0f} us a token ({1e6 / row.tpot_us:,.0f} tokens/s)"
    if json is not None:
        write_json(report, json)
    if json != "-":
        stdout.print(shown, markup=False)
    from rngdc.console import err

    err.print(timing)


@app.command(
    epilog="""\b
[bold]Examples[/]

rngdc simulate ./smollm2\n
rngdc simulate ./smollm2 --bucket decode_b1_kv512 --trace decode.json\n
rngdc simulate matmul.mlir --json -"""
)
def simulate(
    target: Target,
    bucket: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Only this program. Repeatable.")] = None,
    trace: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a trace for the Perfetto viewer (needs one bucket).")
    ] = None,
    mode: Mode = "documented",
    json: Json = None,
) -> None:
    """Tell how long each program takes and where the time goes. Needs no weights."""
    from rngdc.console import out as stdout
    from rngdc.console import steps, write_json
    from rngdc.report import simulate_report, simulate_table
    from runtime_sim.runtime import Device

    timing = _mode(mode)
    with _target(target) as opened:
        buckets = _buckets(opened, bucket)
        if trace is not None and len(buckets) != 1:
            _refuse(
                f"--trace with {len(buckets)} buckets", "a trace shows one program", f"add --bucket {buckets[0].name}"
            )
        device = Device(opened, timing)
        with steps() as progress:
            for b in buckets:
                progress.update(cast(Any, 0), description=f"timing {b.name}")
                device.time(b)
        report = simulate_report(device, buckets)
        if trace is not None:
            from runtime_sim.trace import write_trace

            write_trace(device.time(buckets[0]), trace)
        if target.suffix == ".mlir":
            report["artifact"] = str(target)
    if json is not None:
        write_json(report, json)
    if json != "-":
        stdout.print(simulate_table(report))


@app.command(
    epilog="""\b
[bold]Examples[/]

rngdc check ./smollm2\n
rngdc check ./smollm2 --bucket prefill_b1_s128_kv128 --json -\n
rngdc check attention.mlir"""
)
def check(
    target: Target,
    bucket: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Only this program. Repeatable.")] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of the inputs.")] = 0,
    json: Json = None,
) -> None:
    """Run every level on the same inputs: tc before the passes, tc after, and the streams. Exit 1 if two disagree.

    The first operation that disagrees is named, with its place in the model.
    """
    from rngdc.check import check as run_check
    from rngdc.check import check_lines
    from rngdc.console import out as stdout
    from rngdc.console import steps, write_json
    from runtime_sim.runtime import Device

    with _target(target) as opened, steps() as progress:
        device = Device(opened, checks=True)
        progress.update(cast(Any, 0), description="loading weights")
        device.load()
        buckets = _buckets(opened, bucket)
        report = run_check(device, buckets, seed, lambda text: progress.update(cast(Any, 0), description=text))
    if target.suffix == ".mlir":
        report.artifact = str(target)
    if json is not None:
        write_json(report.to_json(), json)
    if json != "-":
        for line in check_lines(report):
            stdout.print(line, markup=False)
    if not report.agrees:
        raise typer.Exit(1)


@app.command(
    epilog="""\b
[bold]Examples[/]

rngdc inspect ./smollm2\n
rngdc inspect ./smollm2 --json -"""
)
def inspect(artifact: ArtifactPath, json: Json = None) -> None:
    """Show what an artifact holds: model, buckets, inputs and outputs, memory."""
    from rngdc.build import report_artifact
    from rngdc.console import out as stdout
    from rngdc.console import write_json
    from rngdc.tables import inspect_tables

    opened = _open(artifact)
    if json is not None:
        write_json(report_artifact(opened), json)
    if json != "-":
        for item in inspect_tables(opened):
            stdout.print(item)


@app.command(
    epilog="""\b
[bold]Examples[/]

rngdc disasm ./smollm2 --bucket decode_b1_kv512 --pe 0 | less"""
)
def disasm(
    artifact: ArtifactPath,
    bucket: Annotated[
        str | None, typer.Option(metavar="NAME", help="The program; may be left out if there is one.")
    ] = None,
    pe: Annotated[int, typer.Option(metavar="K", help="The processing element.")] = 0,
) -> None:
    """Print the instruction stream of a processing element as assembly, which assembles to the same stream."""
    from backend_rngd.isa.text import format_stream

    opened = _open(artifact)
    chosen = _buckets(opened, [bucket] if bucket is not None else None)
    if len(chosen) != 1:
        _refuse("no bucket was named", f"the artifact has {', '.join(b.name for b in chosen)}", "add --bucket NAME")
    if not 0 <= pe < opened.manifest.parallel.units:
        _refuse(f"--pe {pe}", f"the artifact has {opened.manifest.parallel.units} processing element(s)", "use --pe 0")
    sys.stdout.write(format_stream(opened.stream(chosen[0])))


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    epilog="""\b
[bold]Examples[/]

rngdc opt -p simplify,fuse-elementwise block.mlir\n
rngdc opt -p 'specialise{batch=1 seq=64 kv=64},rngd-lower' model.mlir --dump-ir passes/""",
)
def opt(ctx: typer.Context) -> None:
    """Run any passes on an IR file (`rngdc opt --help` lists the options)."""
    from rngdc.opt import opt_main

    raise typer.Exit(opt_main(ctx.args))


# Shared by the commands ----------------------------------------------------------------------------------------------
def _refuse(what: str, why: str, fix: str) -> None:
    from ir.errors import Problem, UserError

    raise UserError([Problem(what, why, fix)])


def _mode(text: str) -> Any:
    if text not in ("documented", "silicon"):
        _refuse(f"--mode {text}", "there are two timing modes", "use documented or silicon")
    return text


def _open(path: Path) -> Artifact:
    from backend_rngd.artifact import open_artifact

    return open_artifact(path)


@contextmanager
def _target(path: Path) -> Generator[Artifact]:
    """An artifact, or one made of a single function in a temporary directory."""
    if path.suffix != ".mlir":
        with nullcontext():
            yield _open(path)
        return
    from rngdc.console import steps
    from rngdc.function import build_function

    with tempfile.TemporaryDirectory(prefix="rngdc-") as directory:
        with steps() as progress:
            opened = build_function(
                path, Path(directory) / "out", lambda text: progress.update(cast(Any, 0), description=text)
            )
        yield opened


def _buckets(artifact: Artifact, names: list[str] | None) -> list[Bucket]:
    """The named buckets, or all; raises ArtifactError listing every unknown name."""
    from backend_rngd.artifact import ArtifactError

    if not names:
        return list(artifact.buckets)
    found: list[Bucket] = []
    problems: list[Any] = []
    for name in dict.fromkeys(names):
        try:
            found.append(artifact.bucket(name))
        except ArtifactError as error:
            problems += error.problems
    if problems:
        raise ArtifactError(problems)
    return found


def _prompt(
    artifact: Artifact, prompt: str | None, prompt_file: Path | None, prompt_ids: str | None, chat: bool
) -> tuple[list[int], Any]:
    """(token ids, tokenizer or None); exactly one of the three sources must be given."""
    from ir.errors import Problem, UserError
    from rngdc.text import TextModel

    given = [x for x in (prompt, prompt_file, prompt_ids) if x is not None]
    if len(given) != 1:
        what = "no prompt was given" if not given else "more than one prompt was given"
        _refuse(what, "a run has one prompt", "use one of --prompt, --prompt-file and --prompt-ids")
    if prompt_ids is not None:
        fields = prompt_ids.replace(",", " ").split()
        if bad := [f for f in fields if not f.isdecimal()]:
            raise UserError([Problem(f"--prompt-ids {bad[0]!r}", "a token id is a number", "write them as 1,2,3")])
        has_text = (artifact.directory / "tokenizer.json").is_file()
        return [int(f) for f in fields], TextModel(artifact.directory) if has_text else None
    model = TextModel(artifact.directory)
    if prompt_file is not None:
        try:
            prompt = prompt_file.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError([Problem(f"{prompt_file} cannot be read", str(error), "check the path")]) from error
    assert prompt is not None
    return (model.chat(prompt) if chat else model.encode(prompt)), model


def _terminated(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def _crash(error: BaseException) -> None:
    """A bug: keep everything in a file, show the short form."""
    with tempfile.NamedTemporaryFile("w", prefix="rngdc-crash-", suffix=".txt", delete=False, encoding="utf-8") as file:
        file.write(f"rngdc {__version__}: {' '.join(sys.argv)}\n\n")
        file.writelines(traceback.format_exception(error))
    text = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
    print(f"internal error: {type(error).__name__}: {text}\n  details: {file.name}", file=sys.stderr)


def main(argv: list[str] | None = None) -> None:
    """Entry point of the `rngdc` command. Exit status: 0 done, 1 a check failed, 2 the input is at fault, 3 a bug."""
    if foreign := foreign_packages():
        print("\n".join(f"error: {text}" for text in foreign), file=sys.stderr)
        raise SystemExit(2)
    arguments = sys.argv[1:] if argv is None else argv
    before = signal.signal(signal.SIGTERM, _terminated)  # so that a build that is stopped removes its files
    try:
        _run(arguments)
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(arguments: list[str]) -> None:
    """Run the command; every error becomes a message and an exit status."""
    from backend_rngd.artifact.errors import ArtifactError
    from ir.errors import UserError

    try:
        app(arguments, prog_name="rngdc", standalone_mode=True)
    except (UserError, ArtifactError) as error:
        from rngdc.console import print_problems

        print_problems(error.problems)
        raise SystemExit(2) from None
    except BrokenPipeError:
        sys.stderr.close()
        raise SystemExit(141) from None
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except Exception as error:
        from runtime_sim.errors import SimulationError

        if isinstance(error, SimulationError):
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(1) from None
        _crash(error)
        raise SystemExit(3) from None
