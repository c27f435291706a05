"""`rngdc diff`: in what two artifacts differ."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rngdc.commands.app import Json, app, open_path, step_texts


@app.command(
    epilog="""\b
Examples:
  rngdc diff ./before ./after
  rngdc diff ./before ./after --json - | jq .programs.changed
  rngdc diff ./mine owner/name && echo equal"""
)
def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="An artifact, or its hub id.", show_default=False)],
    b: Annotated[Path, typer.Argument(metavar="B", help="What to compare it with.", show_default=False)],
    json: Json = None,
) -> None:
    """Show in what two artifacts differ: model, options, compiler, programs with their functions, weights, files.

    Exit status 0 if they are equal, 1 if they differ, 2 if one of them cannot be read.
    """
    from backend_rngd.artifact import Artifact, ArtifactError
    from ir.errors import Problem, UserError
    from rngdc.console import out as stdout
    from rngdc.console import write_json
    from rngdc.diff import diff_artifacts, diff_lines

    opened: list[Artifact] = []
    problems: list[Problem] = []
    for path in (a, b):
        try:
            opened.append(open_path(path))
        except (ArtifactError, UserError) as error:
            problems += [Problem(p.what, p.why, p.fix) for p in error.problems]
    if problems:
        raise UserError(problems)
    with step_texts() as show:
        report = diff_artifacts(opened[0], opened[1], lambda what: show(f"comparing {what}"))
    if json is not None:
        write_json(report, json)
    if json != "-":
        for line in diff_lines(report):
            stdout.print(line, markup=False)
    if not report["equal"]:
        raise typer.Exit(1)
