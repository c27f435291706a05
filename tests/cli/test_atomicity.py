"""An artifact is there as a whole or not at all, also when a build is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from backend_rngd.artifact import ArtifactWriter, open_artifact
from tests.cli.conftest import Command

# Stops in the middle of writing, when everything but the manifest is there.
STOPPING = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and so would we
from pathlib import Path
import backend_rngd.artifact.store as store
def wait(path):
    Path(sys.argv[1]).touch()
    time.sleep(60)
store.sha256 = wait
import rngdc.cli
rngdc.cli.main(sys.argv[2:])
"""


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_killed_build(rngdc: Command, model: Path, tmp_path: Path, how: signal.Signals) -> None:
    out, flag = tmp_path / "work" / "out", tmp_path / "reached"
    arguments = ["build", str(model), str(out), "-pb", "1,8", "-db", "1,8", "--weights", "random"]
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", STOPPING, str(flag), *arguments],
        env={**os.environ, "PYTHONPATH": str(root)}, stderr=subprocess.PIPE,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not flag.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert flag.exists(), process.communicate()[1].decode()
    assert len(list(out.parent.iterdir())) == 1  # the unfinished directory
    process.send_signal(how)
    process.communicate(timeout=30)
    assert not out.exists()
    if how == signal.SIGKILL:
        # Nobody could clean up; the next build of the same artifact does.
        assert len(list(out.parent.iterdir())) == 1
        assert rngdc(*arguments).status == 0
        assert [p.name for p in out.parent.iterdir()] == ["out"]
        open_artifact(out)
    else:
        assert not out.parent.exists()  # the build had made it


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), ArtifactWriter(tmp_path / "out") as writer:
        (writer.directory / "ir" / "x").write_text("x", "utf-8")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_overwrite_replaces_the_whole_artifact(rngdc: Command, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert rngdc("build", model, out, "-pb", "1,8", "-db", "1,8", "--weights", "random:1").status == 0
    assert rngdc("build", model, out, "-pb", "1,16", "-db", "1,16", "--weights", "random:1", "--overwrite").status == 0
    assert [b.name for b in open_artifact(out).buckets] == ["prefill_b1_s16_kv16", "decode_b1_kv16"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_builds_are_reproducible(rngdc: Command, model: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert rngdc("build", model, tmp_path / name, "-pb", "1,8", "-db", "1,8", "--no-cache").status == 0
    assert open_artifact(tmp_path / "a").manifest.digest == open_artifact(tmp_path / "b").manifest.digest
