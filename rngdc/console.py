"""What the command writes: progress and problems on stderr, results on stdout, JSON where it was asked for."""

from __future__ import annotations

import json
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from rngdc.work import BuildFailedError

WIDE = 160
"""Columns of tables that go to a file or a pipe."""

out = Console(soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() else WIDE)
err = Console(stderr=True, highlight=False, soft_wrap=True)


class ProblemLike(Protocol):
    """What a user can act on, from whichever layer."""

    @property
    def what(self) -> str: ...
    @property
    def why(self) -> str: ...
    @property
    def fix(self) -> str: ...


def print_problems(problems: Sequence[ProblemLike]) -> None:
    """Every problem: what is wrong, why, and what fixes it."""
    for problem in problems:
        err.print(f"[bold red]error:[/] {escape(problem.what)}: {escape(problem.why)}")
        err.print(f"  [bold]fix:[/] {escape(problem.fix)}")


def print_notes(notes: Sequence[str]) -> None:
    """Things worth knowing that are no errors."""
    for note in notes:
        err.print(f"[yellow]note:[/] {escape(note)}")


def print_failures(error: BuildFailedError) -> None:
    """What a build refused, and what failed in it with the command that does the same once more."""
    print_problems(error.problems)
    for line in error.lines():
        err.print(f"internal error: {line}" if not line.startswith(" ") else line, markup=False)


@contextmanager
def steps() -> Generator[Progress]:
    """A spinner with the name of the current step; `progress.update(0, description=...)` changes it."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True) as progress:
        progress.add_task("starting", total=None)
        yield progress


@contextmanager
def bar() -> Generator[Progress]:
    """A progress bar for tasks of known length."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err) as progress:
        yield progress


def write_json(data: Any, target: str) -> None:
    """Write JSON to a file, or to stdout for `-`. Raises OSError."""
    text = json.dumps(data, indent=1, ensure_ascii=False) + "\n"
    if target == "-":
        sys.stdout.write(text)
        sys.stdout.flush()
    else:
        Path(target).write_text(text, "utf-8")
