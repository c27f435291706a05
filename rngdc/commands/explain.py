"""`rngdc explain`: the candidates of the lowering, their predicted time, and why one was taken."""

from __future__ import annotations

import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rngdc.commands.app import (
    BucketNames,
    Json,
    ModeOption,
    app,
    named_buckets,
    open_target,
    refuse,
    step_texts,
    timing_mode,
)

if TYPE_CHECKING:
    from backend_rngd.artifact import Artifact


@app.command(
    epilog="""\b
Examples:
  rngdc explain ./llama --bucket decode_b1_kv1024
  rngdc explain ./llama --op down_proj --json -
  rngdc explain ./Llama-3.1-8B -tp 8 -db 1,1024 --mode silicon
  rngdc explain block.mlir"""
)
def explain(
    target: Annotated[
        Path,
        typer.Argument(
            metavar="OUT|MODEL|FILE.mlir",
            help="An artifact, a model (its config is enough), or a file with one `tc` function.",
            show_default=False,
        ),
    ],
    bucket: BucketNames = None,
    op: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Only operations whose place contains NAME.", show_default="all"),
    ] = None,
    prefill_buckets: Annotated[
        list[str] | None,
        typer.Option("--prefill-buckets", "-pb", metavar="B,S", help="Of a model, as for `build`. Repeatable."),
    ] = None,
    decode_buckets: Annotated[
        list[str] | None,
        typer.Option("--decode-buckets", "-db", metavar="B,S", help="Of a model, as for `build`. Repeatable."),
    ] = None,
    tensor_parallel_size: Annotated[
        int | None,
        typer.Option(
            "--tensor-parallel-size",
            "-tp",
            metavar="N",
            help="Of a model, as for `build`.",
            show_default="as for build",
        ),
    ] = None,
    mode: ModeOption = "documented",
    json: Json = None,
) -> None:
    """Show how contractions and collectives were mapped, what else was possible, and why.

    Predicted times come from the formulas of the machine that the lowering uses, simulated ones are of the program.
    """
    from rngdc.console import out as stdout
    from rngdc.console import print_notes, write_json
    from rngdc.explain import explain as explain_program
    from rngdc.explain import explain_tables
    from runtime_sim.runtime import Device

    timing = timing_mode(mode)
    asked = (prefill_buckets or [], decode_buckets or [], tensor_parallel_size)
    with _opened(target, *asked) as opened:
        device = Device(opened, timing)
        found = [explain_program(device, b, op) for b in named_buckets(opened, bucket)]
    if op is not None and not any(e.explanations for e in found):
        refuse(
            f"--op {op}",
            "no contraction or collective of these programs has a place that contains it",
            "leave it out to see all places",
        )
    print_notes([n for e in found for n in e.notes])
    if json is not None:
        write_json({"target": str(target), "programs": [e.to_json() for e in found]}, json)
    if json != "-":
        for item in (x for e in found for x in explain_tables(e)):
            stdout.print(item)


@contextmanager
def _opened(target: Path, prefill: list[str], decode: list[str], tensor: int | None) -> Generator[Artifact]:
    """An artifact: the given one, or one built for timing in a temporary directory."""
    asked = bool(prefill or decode or tensor is not None)
    local_model = (target / "config.json").is_file() and not (target / "artifact.json").exists()
    if not (local_model or (asked and not target.exists())):
        if asked:
            fix = "leave out -pb, -db and -tp"
            refuse(f"buckets for {target}", "it was built already, or is a single function", fix)
        with open_target(target) as opened:
            yield opened
        return
    from backend_rngd.artifact import open_artifact
    from ir.errors import Problem
    from rngdc.buckets import BucketRequest, parse_pairs
    from rngdc.build import BuildOptions, ParallelOptions, build

    problems: list[Problem] = []
    buckets = BucketRequest(parse_pairs("-pb", prefill, problems), parse_pairs("-db", decode, problems))
    model = str(target.absolute()) if local_model else str(target)
    with tempfile.TemporaryDirectory(prefix="rngdc-") as directory:
        parallel = ParallelOptions() if tensor is None else ParallelOptions(tensor)
        options = BuildOptions(model, Path(directory) / "out", buckets, parallel, weights="none")
        with step_texts() as show:
            build(options, show, problems)
        yield open_artifact(Path(directory) / "out")
