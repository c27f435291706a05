"""Progress of a build on stderr: one line for the step of the whole, one bar a round, one line for each busy bucket."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from rngdc.work import Watcher

if TYPE_CHECKING:
    from rngdc.tasks import Task

SHOWN = 16
"""Lines for buckets that are worked on at the same time; more workers than that are only counted."""


class BuildProgress(Watcher):
    """Shows a build. Every line belongs to a bucket, so any number of workers can be told of."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self._line = progress.add_task("starting", total=None)
        self._round: TaskID | None = None
        self._busy: dict[str, TaskID] = {}
        self.failures = 0

    def text(self, text: str) -> None:
        """The step of the whole build."""
        self.progress.update(self._line, description=escape(text))

    def round(self, stage: str, names: Sequence[str]) -> None:
        """A bar of so many buckets."""
        self._end_round()
        self.text(f"{stage}s" if stage.endswith("r") else stage)
        self._round = self.progress.add_task(f"  {stage}", total=len(names))

    def start(self, task: Task) -> None:
        """A line for the bucket."""
        if len(self._busy) < SHOWN:
            self._busy[task.name] = self.progress.add_task(f"    {task.name}", total=None)

    def step(self, task: Task, step: str) -> None:
        """Its step."""
        if task.name in self._busy:
            self.progress.update(self._busy[task.name], description=f"    {task.name}: {step}")

    def done(self, task: Task, cached: bool = False) -> None:
        """The line goes, the bar grows."""
        self._end(task.name)

    def failed(self, task: Task) -> None:
        """The same, and it is counted."""
        self.failures += 1
        self._end(task.name)

    def _end(self, name: str) -> None:
        if name in self._busy:
            self.progress.remove_task(self._busy.pop(name))
        if self._round is not None:
            self.progress.advance(self._round)

    def _end_round(self) -> None:
        for name in list(self._busy):
            self.progress.remove_task(self._busy.pop(name))
        if self._round is not None:
            self.progress.update(self._round, visible=False)
        self._round = None


@contextmanager
def build_progress() -> Generator[BuildProgress]:
    """Show a build as long as the block lasts; nothing stays on the screen."""
    from rngdc.console import err

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=err, transient=True) as progress:
        yield BuildProgress(progress)
