"""The cache: hits and misses, damage, concurrent builds, what is in its keys, listing and pruning."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import zipfile
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pytest

from backend_rngd.lowering import LoweringOptions
from backend_rngd.machine import load_machine
from rngdc import front
from rngdc.buckets import BucketSpec
from rngdc.cache import Cache, compiler_digest, default_directory, key_of
from rngdc.results import from_files
from rngdc.tasks import BuildTask, CompileTask
from tests.cli.conftest import Command
from tests.cli.small_models import write_model
from tests.cli.test_workers import ROOT, files

BUCKETS = ("-pb", "1,8", "-db", "1,16")


def build(rngdc: Command, model: Path, out: Path, cache: Path, *flags: str) -> list[str]:
    """Steps that buckets went through; the build must succeed."""
    report = out.parent / f"{out.name}.json"
    arguments = (*BUCKETS, "--cache-dir", cache, "--build-report", report, *flags)
    ran = rngdc("build", model, out, *arguments)
    assert ran.status == 0, ran.err
    steps = json.loads(report.read_text("utf-8"))["steps"]
    return sorted(f"{bucket}: {step}" for bucket, times in steps.items() for step in times)


def entries(cache: Path) -> list[Path]:
    return sorted(cache.rglob("*.rngdc"))


def test_a_second_build_does_no_work(rngdc: Command, model: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert any(s.endswith("lower") for s in build(rngdc, model, tmp_path / "a", cache))
    assert [p.relative_to(cache).parts[0] for p in entries(cache)] == [
        "capture", "compile", "compile", "pipeline-builder", "pipeline-builder", "tokenizer",
    ]  # fmt: skip
    assert build(rngdc, model, tmp_path / "b", cache) == []
    assert files(tmp_path / "a") == files(tmp_path / "b")
    # Without a cache all is done again, with the same result.
    ran = rngdc("build", model, tmp_path / "c", *BUCKETS, "--no-cache")
    assert ran.status == 0
    assert files(tmp_path / "a") == files(tmp_path / "c")


def test_a_warm_build_needs_no_torch(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    code = (
        "import sys; from rngdc.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as e: assert not e.code\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    loaded: list[str] = []
    for name in ("a", "b"):
        command = [sys.executable, "-c", code, "build", str(model), str(tmp_path / name), *BUCKETS]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "RNGDC_CACHE_DIR": str(tmp_path / "cache")}
        ran = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        loaded.append(ran.stdout.splitlines()[-1])
    assert loaded == ["['torch', 'transformers']", "[]"]
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_one_bucket_more(rngdc: Command, model: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    build(rngdc, model, tmp_path / "a", cache)
    # The new program shares the map of the others, which stay as they are.
    steps = build(rngdc, model, tmp_path / "b", cache, "-db", "1,8")
    assert steps and all(s.startswith("decode_b1_kv8:") for s in steps)


def test_weights_are_in_no_key(rngdc: Command, tmp_path: Path) -> None:
    one, other = write_model(tmp_path / "one"), write_model(tmp_path / "other")
    data = bytearray((other / "model.safetensors").read_bytes())
    data[-64:] = bytes(64)
    (other / "model.safetensors").write_bytes(data)
    cache = tmp_path / "cache"
    build(rngdc, one, tmp_path / "a", cache)
    assert build(rngdc, other, tmp_path / "b", cache, "--weights", "copy") == []
    # Each artifact has its own weights all the same.
    assert (tmp_path / "b" / "weights" / "model.safetensors").read_bytes()[-64:] == bytes(64)
    linked = json.loads((tmp_path / "a" / "artifact.json").read_text("utf-8"))["linked"]
    assert [Path(f["path"]).parent.name for f in linked] == ["one"]


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "other"])
def test_damaged_entries_are_built_again(rngdc: Command, model: Path, tmp_path: Path, damage: str) -> None:
    cache = tmp_path / "cache"
    build(rngdc, model, tmp_path / "a", cache)
    before = entries(cache)
    for path in before:
        data = path.read_bytes()
        changed = {
            "flip": data[:-100] + bytes([data[-100] ^ 1]) + data[-99:], "cut": data[: len(data) // 2], "empty": b"",
            "other": b"something else entirely\n" + data,
        }  # fmt: skip
        path.write_bytes(changed[damage])
    ran = rngdc("build", model, tmp_path / "b", *BUCKETS, "--cache-dir", cache)
    assert ran.status == 0
    assert "damaged" in ran.err
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert entries(cache) == before
    assert build(rngdc, model, tmp_path / "c", cache) == []


def test_an_entry_that_is_no_result(rngdc: Command, model: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    build(rngdc, model, tmp_path / "a", cache)
    store = Cache(cache)
    for entry in list(store.entries()):
        store.put(entry.kind, entry.key, {"result.json": b"{}"}, {})
    assert build(rngdc, model, tmp_path / "b", cache)
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_concurrent_builds_share_a_cache(model: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    command = [sys.executable, "-c", "from rngdc.cli import main; main()", "build", str(model)]
    running = [
        subprocess.Popen(
            [*command, str(tmp_path / name), *BUCKETS, "--cache-dir", str(cache)],
            env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )
        for name in ("a", "b")
    ]  # fmt: skip
    for process in running:
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors.decode()
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert len(entries(cache)) == 6
    assert list((cache / "unfinished").iterdir()) == []


def test_readers_never_see_half_an_entry(tmp_path: Path) -> None:
    key, big = "0" * 64, os.urandom(1 << 20)
    stop, bad = threading.Event(), list[object]()

    def write() -> None:
        while not stop.is_set():
            Cache(tmp_path).put("compile", key, {"x.npz": big}, {})

    def read() -> None:
        cache = Cache(tmp_path)
        while not stop.is_set():
            found = cache.get("compile", key)
            if found is not None and found["x.npz"] != big:
                bad.append(found)
        bad.extend(cache.notes)

    threads = [threading.Thread(target=f) for f in (write, write, read, read)]
    for t in threads:
        t.start()
    time.sleep(1)
    stop.set()
    for t in threads:
        t.join()
    assert bad == []


def test_a_cache_that_cannot_be_written(rngdc: Command, model: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    for kind in ("capture", "compile", "pipeline-builder"):
        (cache / kind).write_text("in the way", "utf-8")
    ran = rngdc("build", model, tmp_path / "out", *BUCKETS, "--cache-dir", cache)
    assert ran.status == 0, ran.err
    assert "cannot be" in ran.err
    ran = rngdc("build", model, tmp_path / "o", *BUCKETS, "--cache-dir", cache / "compile")
    assert ran.status == 2
    assert "--cache-dir" in ran.err


RNGD = load_machine("rngd")
TASK = BuildTask(BucketSpec("decode", 1, 1, 8), "text", "simplify", RNGD, LoweringOptions())
COMPILE = CompileTask(TASK.bucket, "text", RNGD, LoweringOptions(), {"w": 0}, 64)


def test_everything_that_matters_is_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = [
        TASK, replace(TASK, text="other"), replace(TASK, passes="x"), replace(TASK, digest="plan"),
        replace(TASK, machine=RNGD.model_copy(update={"hbm_usable_bytes": 1})),
        replace(TASK, bucket=BucketSpec("decode", 2, 1, 8)), replace(TASK, lowering=LoweringOptions(32)),
        COMPILE, replace(COMPILE, text="other"), replace(COMPILE, addresses={"w": 64}), replace(COMPILE, hbm_base=128),
        replace(COMPILE, lowering=LoweringOptions(spill_bytes=1)),
    ]  # fmt: skip
    keys = [key_of(t.inputs()) for t in tasks]
    assert len(set(keys)) == len(keys)
    assert key_of(replace(TASK, dumps="somewhere").inputs()) == keys[0]
    import rngdc.cache

    monkeypatch.setattr(rngdc.cache, "compiler_digest", lambda: "another compiler")
    assert key_of(TASK.inputs()) != keys[0]
    assert len(compiler_digest()) == 64


def test_entries_hold_no_pickle(rngdc: Command, model: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    build(rngdc, model, tmp_path / "a", cache)
    names = set[str]()
    for path in entries(cache):
        with zipfile.ZipFile(BytesIO(path.read_bytes().split(b"\n", 1)[1])) as archive:
            names |= set(archive.namelist())
            for name in archive.namelist():
                if name.endswith(".json"):
                    json.loads(archive.read(name))
    assert {Path(n).suffix for n in names} == {".json", ".jinja", ".mlir", ".npz"}
    for entry in Cache(cache).entries():
        found = Cache(cache).get(entry.kind, entry.key)
        assert found is not None
        if entry.kind == "compile":
            assert from_files(COMPILE, found).record is not None  # type: ignore[union-attr]
        if entry.kind == "capture":
            assert front.load(Cache(cache), entry.key) is not None


def test_ls_and_prune(rngdc: Command, model: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert "0 entries" in rngdc("cache", "ls", "--cache-dir", cache).out
    build(rngdc, model, tmp_path / "a", cache)
    listed = rngdc("cache", "ls", "--cache-dir", cache)
    assert "decode_b1_kv16" in listed.out and "6 entries" in listed.out
    data = rngdc("cache", "ls", "--cache-dir", cache, "--json", "-").json
    assert {e["kind"] for e in data["entries"]} == {"capture", "compile", "pipeline-builder", "tokenizer"}
    assert sum(e["bytes"] for e in data["entries"]) == data["bytes"] == sum(p.stat().st_size for p in entries(cache))
    assert rngdc("cache", "prune", "--cache-dir", cache).status == 2
    for flags, text in (("--older-than", "soon"), ("--max-size", "much")):
        ran = rngdc("cache", "prune", "--cache-dir", cache, flags, text)
        assert ran.status == 2 and flags in ran.err
    assert "0 entries" in rngdc("cache", "prune", "--cache-dir", cache, "--older-than", "1h").out
    old = entries(cache)[0]
    os.utime(old, (time.time() - 7200, time.time() - 7200))
    stale = cache / "unfinished" / f"{os.getpid()}.x"
    stale.write_bytes(b"")
    os.utime(stale, (time.time() - 7200, time.time() - 7200))
    assert "1 entries" in rngdc("cache", "prune", "--cache-dir", cache, "--older-than", "1h").out
    assert not old.exists() and not stale.exists()
    # The least recently used go first, and a hit is a use.
    paths = entries(cache)
    for age, path in enumerate(paths):
        used = time.time() - 100 * (age + 1)
        os.utime(path, (used, used))
    assert Cache(cache).get(paths[-1].parts[-3], paths[-1].stem) is not None
    rngdc("cache", "prune", "--cache-dir", cache, "--max-size", str(paths[-1].stat().st_size))
    assert entries(cache) == [paths[-1]]
    assert rngdc("cache", "prune", "--cache-dir", cache, "--all").status == 0
    assert entries(cache) == []


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RNGDC_CACHE_DIR", str(tmp_path))
    assert default_directory() == tmp_path
    monkeypatch.delenv("RNGDC_CACHE_DIR")
    assert default_directory().name == "rngdc"
