"""`rngdc inspect`, `rngdc disasm` and `rngdc opt`: what an artifact holds, and passes on IR files."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from rngdc.commands.app import ArtifactPath, BucketNames, Json, app, named_buckets, open_path, refuse


@app.command(
    epilog="""\b
Examples:
  rngdc inspect ./smollm2
  rngdc inspect ./smollm2 --json -
  rngdc inspect ./llama --collectives --bucket decode_b1_kv1024"""
)
def inspect(
    artifact: ArtifactPath,
    collectives: Annotated[
        bool, typer.Option("--collectives", help="What units of a layer exchange, why, and what padding costs.")
    ] = False,
    bucket: BucketNames = None,
    json: Json = None,
) -> None:
    """Show what an artifact holds: model, buckets, inputs and outputs, memory, collectives."""
    from rngdc.console import out as stdout
    from rngdc.console import write_json
    from rngdc.tables import inspect_tables, report_artifact

    opened = open_path(artifact)
    chosen = named_buckets(opened, bucket)
    report, tables = report_artifact(opened, chosen), inspect_tables(opened, chosen)
    if collectives:
        from rngdc.collectives import collectives_report, collectives_tables

        found = collectives_report(opened, chosen)
        report["collectives"] = found
        tables += collectives_tables(found)
    if json is not None:
        write_json(report, json)
    if json != "-":
        for item in tables:
            stdout.print(item)


@app.command(
    epilog="""\b
Examples:
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

    opened = open_path(artifact)
    chosen = named_buckets(opened, [bucket] if bucket is not None else None)
    if len(chosen) != 1:
        refuse("no bucket was named", f"the artifact has {', '.join(b.name for b in chosen)}", "add --bucket NAME")
    units = opened.manifest.parallel.units
    if not 0 <= pe < units:
        refuse(f"--pe {pe}", f"the artifact has {units} processing element(s)", f"use 0 to {units - 1}")
    launch = "".join(f"; r{register} = {values[pe]}\n" for register, values in sorted(chosen[0].launch.items()))
    if units > 1:
        sys.stdout.write(f"; PE {pe} of {units}: all execute this stream, with their own registers\n{launch}")
    sys.stdout.write(format_stream(opened.stream(chosen[0])))


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    epilog="""\b
Examples:
  rngdc opt -p simplify,fuse-elementwise block.mlir
  rngdc opt -p 'specialise{batch=1 seq=64 kv=64},rngd-lower' model.mlir --dump-ir passes/""",
)
def opt(ctx: typer.Context) -> None:
    """Run any passes on an IR file (`rngdc opt --help` lists the options)."""
    from rngdc.opt import opt_main

    raise typer.Exit(opt_main(ctx.args))
