"""How the work of a build is divided, watched and reported: options, progress of every bucket, failures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ir.errors import Problem
from rngdc.places import check_directory

if TYPE_CHECKING:
    from rngdc.cache import Cache
    from rngdc.executor import Executor, Failure
    from rngdc.tasks import Task

EXECUTORS = ("local", "ray")
MAX_WORKERS = 1024


@dataclass(frozen=True)
class WorkOptions:
    """Who builds, and what earlier builds are used for.

    `builders` and `compilers`: processes (1 and 1: this one). `cache_dir`: None for the user's cache directory.
    `fast_fail`: begin nothing new after the first failure.
    """

    builders: int = 1
    compilers: int = 1
    executor: str = "local"
    ray_address: str | None = None
    cache: bool = True
    cache_dir: Path | None = None
    fast_fail: bool = True

    def open_cache(self) -> Cache | None:
        """The cache to use, None for none."""
        from rngdc.cache import Cache, default_directory

        return Cache(self.cache_dir or default_directory()) if self.cache else None

    def open_executor(self) -> Executor:
        """Who does the tasks. Raises UserError if Ray is asked for and cannot be used."""
        from rngdc.executor import InlineExecutor, ProcessExecutor

        if self.executor == "ray":
            from rngdc.executor_ray import RayExecutor

            return RayExecutor(self.ray_address)
        return InlineExecutor() if (self.builders, self.compilers) == (1, 1) else ProcessExecutor()


def check_work(work: WorkOptions, dumps: Path | None, problems: list[Problem]) -> None:
    """Append a problem for everything about the division of work that cannot be."""
    for flag, number in (
        ("--num-pipeline-builder-workers", work.builders),
        ("--num-compile-workers", work.compilers),
    ):
        if not 1 <= number <= MAX_WORKERS:
            fix = f"use 1 to {MAX_WORKERS}; 1 and 1 build in one process"
            problems.append(Problem(f"{flag} {number}", "work is done by at least one process", fix))
    if work.executor not in EXECUTORS:
        fix = f"use {' or '.join(EXECUTORS)}"
        problems.append(Problem(f"--executor {work.executor}", "there is no such executor", fix))
    if work.ray_address is not None and work.executor != "ray":
        why = "the address is that of a Ray cluster"
        problems.append(Problem(f"--ray-address {work.ray_address}", why, "add --executor ray, or leave it out"))
    if work.executor == "ray":
        _check_ray(dumps, problems)
    if work.cache_dir is not None and work.cache:
        check_directory("--cache-dir", work.cache_dir, problems)
    if work.cache_dir is not None and not work.cache:
        why = "the one names a cache and the other turns it off"
        problems.append(Problem("--cache-dir with --no-cache", why, "leave one of them out"))


def _check_ray(dumps: Path | None, problems: list[Problem]) -> None:
    from importlib.util import find_spec

    if find_spec("ray") is None:
        why = "Ray is not installed"
        problems.append(
            Problem("--executor ray", why, "pip install 'rngdc\\[ray]', or use --executor local".replace("\\", ""))
        )
    if dumps is not None:
        why = "the IR would be written on the machines of the cluster"
        problems.append(Problem("--dump-ir with --executor ray", why, "use --executor local"))


class Watcher:
    """Is told what happens to every task of a build, in this process, whoever does it."""

    def round(self, stage: str, names: Sequence[str]) -> None:
        """A round of tasks begins."""

    def start(self, task: Task) -> None:
        """A task is begun."""

    def step(self, task: Task, step: str) -> None:
        """A task gets to a step."""

    def done(self, task: Task, cached: bool = False) -> None:
        """A task has its result."""

    def failed(self, task: Task) -> None:
        """A task has none."""


class TextWatcher(Watcher):
    """Tells a function of one text, such as a spinner's."""

    def __init__(self, show: Callable[[str], None]) -> None:
        self.show = show

    def step(self, task: Task, step: str) -> None:
        """Show the bucket and the step."""
        self.show(f"{task.name}: {step}")


@dataclass
class FailedTask:
    """A task that ended with a bug, or whose process died. `file` and `command` do the same once more."""

    task: Task
    failure: Failure
    file: Path | None = None
    command: str = ""
    report: Path | None = None

    def save(self, directory: Path) -> None:
        """Write the module with the command that reproduces the failure, and everything known about it."""
        text, passes = self.task.reproducer(directory)
        file = directory / f"{self.task.name}.mlir"
        self.command = f"rngdc opt -p '{passes}' {file}"
        file.write_text(f"// {self.task.stage}: {self.failure.what}\n// {self.command}\n{text}", "utf-8")
        self.report = directory / f"{self.task.name}.txt"
        self.report.write_text(
            f"{self.task.stage} of {self.task.name}\n{self.command}\n\n{self.failure.details}", "utf-8"
        )
        self.file = file

    def to_json(self) -> dict[str, Any]:
        """For reports."""
        return {
            "bucket": self.task.name, "stage": self.task.stage, "what": self.failure.what, "reproducer": self.command,
            "details": str(self.report),
        }  # fmt: skip


@dataclass(eq=False)
class BuildFailedError(Exception):
    """Tasks failed by a bug or the death of their process; `problems` are what others refused. `skipped`: not begun."""

    failed: list[FailedTask]
    problems: list[Problem] = field(default_factory=list[Problem])
    skipped: int = 0

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self) -> list[str]:
        """What to tell the user."""
        out: list[str] = []
        for item in self.failed:
            out += [
                f"{item.task.name}: {item.task.stage} failed: {item.failure.what}",
                f"  reproduce: {item.command}",
                f"  details: {item.report}",
            ]
        if self.skipped > 0:
            out.append(
                f"  {self.skipped} task(s) were not begun; --no-fast-fail tries all, finished ones are in the cache"
            )
        return out
