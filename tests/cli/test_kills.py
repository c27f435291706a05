"""Builds that are killed at random points: no half artifact, no leftovers, and the next build goes on from the cache.

Every round takes entries out of the cache, begins a build (alone, with workers, or over an older artifact), ends it
with SIGKILL, SIGINT or SIGTERM at a random time, and builds again. `pytest -m slow` does fifty rounds.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from backend_rngd.artifact import open_artifact
from tests.cli.conftest import Command
from tests.cli.test_workers import ROOT

SIZES = ("-pb", "1,8", "-pb", "1,16", "-db", "1,16", "-tp", "1", "--weights", "copy")
TWO = ("--num-pipeline-builder-workers", "2", "--num-compile-workers", "2")
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGINT, signal.SIGTERM)
MAIN = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # background jobs may ignore it
    "from rngdc.cli import main; main()"
)


class Rounds:
    """Builds of one model into one directory with one cache."""

    def __init__(self, rngdc: Command, model: Path, place: Path, seed: int) -> None:
        self.rngdc, self.model, self.place = rngdc, model, place
        self.cache, self.out = place / "cache", place / "work" / "out"
        self.out.parent.mkdir()
        self.random = random.Random(seed)
        self.new = self.build(place / "new")
        self.old = self.build(place / "old", "--name", "old")
        self.seconds = 2.0
        """How long builds take here, from what was seen."""

    def arguments(self, out: Path, *flags: str) -> list[str]:
        return ["build", str(self.model), str(out), *SIZES, "--cache-dir", str(self.cache), *flags]

    def build(self, out: Path, *flags: str) -> str:
        """Build in this process, without a complaint; returns the digest of the artifact, which was verified."""
        ran = self.rngdc(*self.arguments(out, *flags))
        assert ran.status == 0, ran.err
        assert "cache" not in ran.err, ran.err
        return open_artifact(out).manifest.digest

    def entries(self) -> dict[Path, int]:
        return {path: path.stat().st_ino for path in self.cache.rglob("*.rngdc")}

    def forget(self) -> None:
        """Take entries out of the cache: of captures seldom, because torch takes its time."""
        for path in sorted(self.entries()):
            slow = path.relative_to(self.cache).parts[0] in ("capture", "tokenizer")
            if self.random.random() < (0.1 if slow else 0.6):
                path.unlink()

    def kill(self, how: signal.Signals, over: bool, workers: bool, whole_group: bool) -> bool:
        """Begin a build and end it; whether it was still running."""
        flags = (*(("--overwrite",) if over else ()), *(TWO if workers else ()))
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        begun = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-c", MAIN, *self.arguments(self.out, *flags)], env=environment, start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            process.wait(self.random.uniform(0.2, 1.1 * self.seconds))
            self.seconds = max(1.0, 0.5 * self.seconds + 0.5 * (time.monotonic() - begun))
            killed = False
        except subprocess.TimeoutExpired:
            self.seconds = min(30.0, self.seconds * 1.05)
            (os.killpg if whole_group else os.kill)(process.pid, how)
            killed = True
        process.wait(60)
        deadline = time.monotonic() + 60
        while group_lives(process.pid):  # workers whose parent was killed
            assert time.monotonic() < deadline, "processes of the build go on"
            time.sleep(0.02)
        return killed

    def round(self) -> bool:
        """One build that is killed, and one that is not; whether the first was killed in time."""
        over, workers = self.random.random() < 0.4, self.random.random() < 0.4
        how, whole_group = self.random.choice(SIGNALS), self.random.random() < 0.5
        if over:
            shutil.copytree(self.place / "old", self.out)
        self.forget()
        killed = self.kill(how, over, workers, whole_group)
        if self.out.exists():
            digest = open_artifact(self.out).manifest.digest  # whole, or this raises
            assert digest in ({self.old, self.new} if over else {self.new})
        else:
            assert not over, "the old artifact is gone"
        if self.out.parent.exists():
            assert all(p == self.out or p.name.endswith(".partial") for p in self.out.parent.iterdir())
        before = self.entries()
        assert self.build(self.out, "--overwrite") == self.new
        after = self.entries()
        assert {p: after.get(p) for p in before} == before, "finished work was done again"
        assert [p.name for p in self.out.parent.iterdir()] == ["out"]
        assert list((self.cache / "unfinished").iterdir()) == []
        shutil.rmtree(self.out)
        return killed


def group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def test_three_kills(rngdc: Command, model: Path, tmp_path: Path) -> None:
    rounds = Rounds(rngdc, model, tmp_path, 11)
    assert sum(rounds.round() for _ in range(3)) >= 1


@pytest.mark.slow
def test_fifty_kills(rngdc: Command, model: Path, tmp_path: Path) -> None:
    rounds = Rounds(rngdc, model, tmp_path, 50)
    killed = tries = 0
    while killed < 50:
        killed += rounds.round()
        tries += 1
        assert tries < 150, f"only {killed} of {tries} builds were killed in time"
