"""Collects `.mlir` files as tests: their `// RUN: rngdc opt %s ... | filecheck %s` lines run in this process.

The lines stay valid for `lit`; without a process per tool they take milliseconds. Understood: `rngdc opt`, `filecheck`,
pipes between them, `not` before a tool that must fail, and `2>&1`.
"""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

# The same examples in every run, so that a change is at fault when a run fails;
# `--hypothesis-profile=random` draws others.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, print_blob=True)
hypothesis.settings.register_profile("random", derandomize=False, deadline=None, print_blob=True)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Builds of the tests leave the user's cache alone."""
    before = os.environ.get("RNGDC_CACHE_DIR")
    os.environ["RNGDC_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["RNGDC_CACHE_DIR"]
    else:
        os.environ["RNGDC_CACHE_DIR"] = before


def pytest_collect_file(parent: pytest.Collector, file_path: Path) -> pytest.Collector | None:
    """Take every `.mlir` file below `tests/filecheck`."""
    if file_path.suffix == ".mlir" and "filecheck" in file_path.parts:
        return MlirFile.from_parent(parent, path=file_path)
    return None


class MlirFile(pytest.File):
    """One file; each RUN line is a test. A file without one fails, because it would test nothing."""

    def collect(self) -> Iterator[pytest.Item]:
        lines = self.path.read_text("utf-8").splitlines()
        runs = [line.split("RUN:", 1)[1].strip() for line in lines if line.lstrip().startswith("// RUN:")]
        for index, run in enumerate(runs or [""]):
            yield MlirRun.from_parent(self, name=f"RUN[{index}]", run=run)


class MlirRun(pytest.Item):
    """One RUN line."""

    def __init__(self, *, run: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.run = run

    def runtest(self) -> None:
        if not self.run:
            raise RunFailedError("the file has no RUN line")
        text = ""
        for stage in self.run.split("|"):
            words = shlex.split(stage.replace("%s", str(self.path)))
            merge = "2>&1" in words
            words = [w for w in words if w != "2>&1"]
            must_fail = words[0] == "not"
            tool, *args = words[1:] if must_fail else words
            status, out, err = run_tool(tool, args, text)
            if (status == 0) is must_fail:
                wanted = "fail" if must_fail else "succeed"
                raise RunFailedError(f"'{stage.strip()}' did not {wanted}\n{err}\n--- input ---\n{text}")
            text = err + out if merge else out

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        if isinstance(excinfo.value, RunFailedError):
            return f"{self.run}\n{excinfo.value}"
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, int, str]:
        return self.path, 0, f"{self.path.name}::{self.name}"


class RunFailedError(Exception):
    """A tool of a RUN line failed, or did not fail although it should."""


def run_tool(tool: str, args: list[str], text: str) -> tuple[int, str, str]:
    """Run `rngdc` or `filecheck` on stdin `text`: exit status, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        if tool == "rngdc" and args[0] == "opt":
            status = run_opt(args[1:], text)
        elif tool == "filecheck":
            status = run_filecheck(args, text)
        else:
            raise RunFailedError(f"unknown tool '{tool} {args[0]}'")
    return status, out.getvalue(), err.getvalue()


def run_opt(args: list[str], text: str) -> int:
    """`rngdc opt` with the dialects and passes of the product."""
    from backend_rngd.registry import get_rngd_dialects, get_rngd_passes
    from passes.opt import opt_main

    stdin, sys.stdin = sys.stdin, io.TextIOWrapper(io.BytesIO(text.encode()))
    try:
        return opt_main(args, get_rngd_dialects(), get_rngd_passes())
    except SystemExit as stop:  # argparse
        return int(stop.code or 0)
    finally:
        sys.stdin = stdin


def run_filecheck(args: list[str], text: str) -> int:
    """`filecheck` on stdin `text`."""
    from filecheck.finput import FInput
    from filecheck.matcher import Matcher
    from filecheck.options import parse_argv_options
    from filecheck.parser import Parser, pattern_for_opts

    options = parse_argv_options(["filecheck", *args])
    with open(options.match_filename, encoding="utf-8") as checks:
        parser = Parser(options, checks, *pattern_for_opts(options))
        return Matcher(options, FInput("rngdc opt output", text), parser).run()
