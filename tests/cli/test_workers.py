"""Worker processes: the same artifact as without, failures that cost one task, nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ir.text import parse_module
from rngdc.executor import Failure, InlineExecutor, Listeners, ProcessExecutor
from rngdc.tasks import without_collections
from rngdc.work import BuildFailedError, FailedTask
from tests.cli.conftest import Command

ROOT = Path(__file__).parents[2]
BUCKETS = ("-pb", "1,8", "-pb", "1,16", "-db", "1,8", "-db", "2,16")
TWO = ("--num-pipeline-builder-workers", "2", "--num-compile-workers", "2")


class Sum:
    """A stand-in for a task: returns numbers, or does what `how` says."""

    stage = "compile"

    def __init__(self, name: str, how: str = "", weight: int = 1, flag: str = "") -> None:
        self.name, self.how, self.weight, self.flag = name, how, weight, flag

    def run(self, listen: Any) -> Any:
        listen("first")
        if self.how == "raise":
            raise ValueError(f"{self.name} is bad\nsecond line")
        if self.how == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "exit":
            os.write(2, b"last words")
            os._exit(7)
        if self.how == "wait":
            Path(self.flag).write_text(str(os.getpid()), "utf-8")
            time.sleep(120)
        return Plain(self.name, os.getpid())

    def reproducer(self, directory: Path) -> tuple[str, str]:
        return "builtin.module {\n}\n", "simplify"


class Plain:
    """Its result."""

    def __init__(self, name: str, pid: int) -> None:
        self.name, self.pid = name, pid

    def plain(self) -> Plain:
        return self


def files(directory: Path) -> dict[str, bytes]:
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def test_same_bytes_for_any_number_of_workers(rngdc: Command, model: Path, tmp_path: Path) -> None:
    for name, workers in (("one", ()), ("two", TWO), ("uneven", ("--num-compile-workers", "3"))):
        ran = rngdc("build", model, tmp_path / name, *BUCKETS, *workers, "--no-cache")
        assert ran.status == 0, ran.err
    one = files(tmp_path / "one")
    assert len(one) > 10
    assert files(tmp_path / "two") == one
    assert files(tmp_path / "uneven") == one


def test_the_report_tells_of_workers(rngdc: Command, model: Path, tmp_path: Path) -> None:
    ran = rngdc("build", model, tmp_path / "out", *BUCKETS, *TWO, "--no-cache", "--json", "-")
    report = json.loads(ran.out)
    assert 20e6 < report["worker_memory_bytes"] < 1.5e9
    assert len(report["buckets"]) == 4


def test_failures_cost_one_task() -> None:
    tasks: list[Any] = [Sum("a"), Sum("b", "raise"), Sum("c", "die"), Sum("d", "exit"), Sum("e"), Sum("f")]
    steps: list[tuple[str, str]] = []
    with ProcessExecutor() as executor:
        listeners = Listeners(step=lambda task, step: steps.append((task.name, step)))
        found = {tasks[f.index].name: f.outcome for f in executor.run(tasks, 2, listeners)}
        # The workers go on for another round.
        again = {f.index: f.outcome for f in executor.run(tasks[:1], 2, Listeners())}
    assert [n for n in "aef" if isinstance(found[n], Plain)] == ["a", "e", "f"]
    assert isinstance(again[0], Plain)
    failures = {name: outcome for name, outcome in found.items() if isinstance(outcome, Failure)}
    assert sorted(failures) == ["b", "c", "d"]
    assert failures["b"].what == "ValueError: b is bad"
    assert "second line" in failures["b"].details
    assert "SIGKILL" in failures["c"].what
    assert "status 7" in failures["d"].what
    assert "last words" in failures["d"].details
    assert sorted(steps) == [(n, "first") for n in "abcdef"]


def test_workers_are_other_processes_and_end() -> None:
    with ProcessExecutor() as executor:
        found = list(executor.run([Sum(str(i)) for i in range(4)], 2, Listeners()))  # type: ignore[list-item]
        pids = executor.pids
        assert len(pids) == 2
        assert {f.outcome.pid for f in found} <= set(pids)  # type: ignore[union-attr]
        assert os.getpid() not in pids
    assert not any(alive(pid) for pid in pids)


def test_longest_first_and_stop() -> None:
    tasks: list[Any] = [Sum("short", weight=1), Sum("long", "raise", weight=9), Sum("middle", weight=5)]
    begun: list[str] = []
    with ProcessExecutor() as executor:
        for item in executor.run(tasks, 1, Listeners(start=lambda task: begun.append(task.name))):
            assert item.index == 1
            executor.stop()
    assert begun == ["long"]
    inline = InlineExecutor()
    seen = [inline.stop() or f.index for f in inline.run(tasks, 1, Listeners())]
    assert seen == [0]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text("utf-8").rsplit(")", 1)[1].split()[0] != "Z"


PARENT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and so would we
from rngdc.executor import Listeners, ProcessExecutor
from tests.cli.test_workers import Sum
with ProcessExecutor() as executor:
    print("begin", flush=True)
    list(executor.run([Sum("a", "wait", flag=sys.argv[1]), Sum("b", "wait", flag=sys.argv[2])], 2, Listeners()))
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_worker_outlives_its_parent(tmp_path: Path, how: signal.Signals) -> None:
    flags = [tmp_path / "a", tmp_path / "b"]
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT, *map(str, flags)], env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    pids = [int(until(lambda flag=flag: flag.is_file() and flag.read_text("utf-8"))) for flag in flags]
    assert all(alive(pid) for pid in pids)
    process.send_signal(how)
    process.wait(30)
    until(lambda: not any(alive(pid) for pid in pids))


def until(condition: Any, seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.05)
    return found


# A compiler with a bug in one bucket, in this process and in workers (which import sitecustomize from PYTHONPATH).
BROKEN = """
import os, signal
import rngdc.compile as compiling, rngdc.tasks as tasks
real = compiling.emit
def emit(module, machine, slices):
    stage = os.environ["BROKEN"]
    if "16" in current[0]:
        if stage == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("a bug in emit")
    return real(module, machine, slices)
current = [""]
run = tasks.CompileTask.run
def named(self, *arguments, **named):
    current[0] = self.name
    return run(self, *arguments, **named)
compiling.emit, tasks.CompileTask.run = emit, named
"""
MAIN = "import broken, rngdc.executor as e; e.WORKER = e.WORKER.replace('from rngdc', 'import broken; from rngdc', 1)"


@pytest.mark.parametrize(
    ("how", "flags", "failed"),
    [
        ("raise", (), 1),
        pytest.param("raise", ("--no-fast-fail",), 2, marks=pytest.mark.slow),
        pytest.param("raise", (*TWO, "--no-fast-fail"), 2, marks=pytest.mark.slow),
        ("kill", (*TWO, "--no-fast-fail"), 2),
    ],
)
def test_a_bug_is_reported_and_the_rest_is_kept(
    model: Path, tmp_path: Path, how: str, flags: tuple[str, ...], failed: int
) -> None:
    (tmp_path / "broken.py").write_text(BROKEN, "utf-8")
    environment = {
        **os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}", "BROKEN": how, "RNGDC_CACHE_DIR": str(tmp_path / "cache"),
        "TMPDIR": str(tmp_path),
    }  # fmt: skip
    out = tmp_path / "out"
    arguments = ["build", str(model), str(out), *BUCKETS, *flags]
    command = f"{MAIN}; from rngdc.cli import main; main()"
    ran = subprocess.run([sys.executable, "-c", command, *arguments], env=environment, capture_output=True, text=True)
    assert ran.returncode == 3, ran.stderr
    assert not out.exists()
    reasons = ran.stderr.count("compile failed: RuntimeError: a bug in emit") + ran.stderr.count("by SIGKILL")
    assert reasons == failed
    assert ("--no-fast-fail" in ran.stderr) == (failed == 1)
    # The others' work is in the cache.
    entries = list((tmp_path / "cache" / "compile").rglob("*.rngdc"))
    assert len(entries) == (2 if failed == 2 else 1)
    # The reproducer does the same once more: with the bug it fails in the same way, without it gives the program.
    line = next(line for line in ran.stderr.splitlines() if "reproduce: " in line)
    pipeline, file = line.split("-p '")[1].split("'")[0], line.rsplit(" ", 1)[1]
    for first, status in (("import broken; ", 3), ("", 0)):
        again = subprocess.run(
            [sys.executable, "-c", f"{first}from rngdc.cli import main; main()", "opt", "-p", pipeline, file],
            env={**environment, "BROKEN": "raise"}, capture_output=True, text=True,
        )  # fmt: skip
        assert again.returncode == status, again.stderr
        assert ("a bug in emit" in again.stderr) == bool(status), again.stderr
    assert "rngd.exec" in again.stdout and '"after(' in again.stdout
    # Without the bug the build takes up where it was.
    command = "from rngdc.cli import main; main()"
    ran = subprocess.run([sys.executable, "-c", command, *arguments], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert out.is_dir()


def test_a_reproducer_file_is_a_module(tmp_path: Path) -> None:
    item = FailedTask(Sum("b"), Failure("RuntimeError: x", "all of it"))  # type: ignore[arg-type]
    item.save(tmp_path)
    assert item.file is not None and item.report is not None
    parse_module(item.file.read_text("utf-8"))
    assert "all of it" in item.report.read_text("utf-8")
    text = str(BuildFailedError([item], [], 3))
    assert item.command in text and "3 task(s)" in text


def test_garbage_is_collected_again() -> None:
    import gc

    assert gc.isenabled()
    with without_collections():
        assert not gc.isenabled()
    assert gc.isenabled()


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (("--num-compile-workers", "0"), "--num-compile-workers 0"),
        (("--num-pipeline-builder-workers", "-1"), "--num-pipeline-builder-workers -1"),
        (("--executor", "slurm"), "--executor slurm"),
        (("--ray-address", "host:1"), "--ray-address host:1"),
    ],
)
def test_wrong_options(rngdc: Command, model: Path, tmp_path: Path, flags: tuple[str, ...], text: str) -> None:
    ran = rngdc("build", model, tmp_path / "out", *BUCKETS, *flags)
    assert ran.status == 2
    assert text in ran.err
    assert "fix:" in ran.err


def test_without_ray(rngdc: Command, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "ray" else real(name, *a))
    ran = rngdc("build", model, tmp_path / "out", *BUCKETS, "--executor", "ray")
    assert ran.status == 2
    assert "pip install 'rngdc[ray]'" in ran.err


RAY = """
import json, subprocess, sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
try:
    cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    command = [sys.executable, "-c", "from rngdc.cli import main; main()", *json.loads(sys.argv[1])]
    sys.exit(subprocess.run([*command, "--executor", "ray", "--ray-address", cluster.address], timeout=150).returncode)
finally:
    cluster.shutdown()
"""


@pytest.mark.slow
def test_a_ray_cluster_of_two_nodes(rngdc: Command, model: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed (extra rngdc[ray])")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    arguments = json.dumps(["build", str(model), str(tmp_path / "ray"), *BUCKETS, *TWO, "--no-cache"])
    ran = subprocess.run(
        [sys.executable, "-c", RAY, arguments], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert rngdc("build", model, tmp_path / "one", *BUCKETS, "--no-cache").status == 0
    assert files(tmp_path / "ray") == files(tmp_path / "one")
