"""`rngdc compare`: what made a program faster or slower."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from rngdc.commands.app import BucketNames, Json, ModeOption, app, open_path, step_texts, timing_mode


@app.command(
    epilog="""\b
Examples:
  rngdc compare ./before ./after
  rngdc compare before.json after.json --bucket decode_b1_kv512
  rngdc compare ./before ./after --mode silicon --json -
  rngdc compare ./llama card-profile.json --bucket decode_b1_kv1024 --mode silicon"""
)
def compare(
    a: Annotated[
        Path,
        typer.Argument(
            metavar="A",
            help="An artifact, a file of `rngdc simulate --json`, or a device profile (of `--profile` or of a card).",
            show_default=False,
        ),
    ],
    b: Annotated[Path, typer.Argument(metavar="B", help="What to compare it with.", show_default=False)],
    bucket: BucketNames = None,
    mode: ModeOption = "silicon",
    json: Json = None,
) -> None:
    """Name the operations, causes and layers that made B faster or slower than A.

    The differences of each table sum to the total. --mode is for artifacts; a file has its own. A device profile knows
    spans only: they are compared by name.
    """
    from rngdc.compare_profiles import compare_profiles, load_profile, of_profile, of_report, profile_tables
    from rngdc.compare_times import compare_reports, compare_tables
    from rngdc.console import out as stdout
    from rngdc.console import write_json

    timing = timing_mode(mode)
    profiles = [load_profile(x) if x.is_file() else None for x in (a, b)]
    if any(profiles):
        spans = [
            of_profile(p) if p is not None else of_report(_report(x, timing, bucket), bucket)
            for p, x in zip(profiles, (a, b), strict=True)
        ]
        report = compare_profiles(*spans)
        tables = profile_tables(report)
    else:
        report = compare_reports(_report(a, timing, bucket), _report(b, timing, bucket), bucket)
        tables = compare_tables(report)
    if json is not None:
        write_json(report, json)
    if json != "-":
        for item in tables:
            if isinstance(item, str):
                stdout.print(item, markup=False)
            else:
                stdout.print(item)


def _report(path: Path, mode: Any, names: list[str] | None) -> dict[str, Any]:
    """The report in a file, or of an artifact's programs."""
    from rngdc.compare_times import load_report

    if path.is_file():
        return load_report(path)
    from rngdc.report import simulate_report
    from runtime_sim.analysis import analyse
    from runtime_sim.runtime import Device

    opened = open_path(path)
    device = Device(opened, mode)
    # A name that one side lacks is refused when both are known.
    chosen = [x for x in opened.buckets if not names or x.name in names] or list(opened.buckets)
    with step_texts() as show:
        for x in chosen:
            show(f"timing {x.name} of {path}")
            device.time(x)
    report = simulate_report(device, chosen, [analyse(device, x) for x in chosen])
    report["artifact"] = str(path)
    return report
