"""`rngdc diff`: nothing between equal artifacts, and exactly what was changed between others."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backend_rngd.artifact import open_artifact
from backend_rngd.artifact.store import _digest, sha256
from backend_rngd.isa.descriptors import Exec, Op, Stream
from backend_rngd.isa.tables import encode
from rngdc.diff import diff_artifacts, executed
from runtime_sim.runtime import Device
from tests.cli.conftest import Command
from tests.cli.test_build_problems import refused

BUCKETS = ("-pb", "1,16", "-db", "2,32", "-tp", "1")
NOTHING = {"removed": [], "added": [], "changed": []}


@pytest.fixture
def other(artifact: Path, tmp_path: Path) -> Path:
    """A copy of the artifact that may be changed."""
    return Path(shutil.copytree(artifact, tmp_path / "other"))


def sign(artifact: Path) -> None:
    """Make the checksums fit what the directory holds."""
    path = artifact / "artifact.json"
    data = json.loads(path.read_text("utf-8"))
    data["files"] = {name: sha256(artifact / name) for name in data["files"]}
    data["digest"] = _digest(data)
    path.write_text(json.dumps(data), "utf-8")


def diff(rngdc: Command, a: Path, b: Path) -> Any:
    """The JSON report; equal or not, status and text agree with it."""
    ran = rngdc("diff", a, b, "--json", "-")
    assert ran.status == (0 if ran.json["equal"] else 1), ran.err
    text = rngdc("diff", a, b)
    assert text.status == ran.status
    assert ("are equal" in text.out) is ran.json["equal"]
    return ran.json


def differing(report: dict[str, Any]) -> set[str]:
    """Parts of a report that say something."""
    parts = {k: v for k, v in report.items() if k not in ("a", "b", "equal")}
    return {k for k, v in parts.items() if (any(v.values()) if isinstance(v, dict) else v)}


def write_stream(artifact: Path, name: str, stream: Stream) -> None:
    np.savez_compressed(artifact / name, allow_pickle=False, **encode(stream))


def test_two_builds_of_the_same_are_equal(rngdc: Command, model: Path, artifact: Path, tmp_path: Path) -> None:
    assert rngdc("build", model, tmp_path / "again", *BUCKETS, "--no-cache").status == 0
    report = diff(rngdc, artifact, tmp_path / "again")
    assert report["equal"] and not differing(report)


def test_a_changed_operation_is_found_in_its_function(rngdc: Command, artifact: Path, other: Path) -> None:
    opened = open_artifact(other)
    bucket = opened.buckets[0]
    stream = opened.stream(bucket)
    number = next(i for i, r in enumerate(stream.routines) if r.name == "block_0")
    instructions = list(stream.routines[number].instructions)
    at = next(i for i, x in enumerate(instructions) if any(v.op == Op.SIGMOID for v in getattr(x.what, "vector", ())))
    what = instructions[at].what
    assert isinstance(what, Exec)
    vector = tuple(replace(v, op=Op.TANH) if v.op == Op.SIGMOID else v for v in what.vector)
    instructions[at] = replace(instructions[at], what=replace(what, vector=vector))
    routines = list(stream.routines)
    routines[number] = replace(routines[number], instructions=tuple(instructions))
    write_stream(other, bucket.stream, replace(stream, routines=tuple(routines)))
    sign(other)
    report = diff(rngdc, artifact, other)
    assert differing(report) == {"programs", "files"}
    assert report["files"] == NOTHING | {"changed": [bucket.stream]}
    (program,) = report["programs"]["changed"]
    assert (program["name"], program["changed_files"], program["fields"]) == (bucket.name, ["stream"], [])
    functions = program["functions"]
    assert (functions["removed"], functions["added"]) == ([], [])
    assert [(f["name"], f["only_hbm_addresses"]) for f in functions["changed"]] == [("block_0", False)]
    assert all(before == after for before, after in program["instructions"].values())
    assert "~ block_0 (function): as many of each kind" in rngdc("diff", artifact, other).out

    # one instruction more in that function, which every layer executes
    routines[number] = replace(stream.routines[number], instructions=(*instructions, instructions[at]))
    write_stream(other, bucket.stream, replace(stream, routines=tuple(routines)))
    sign(other)
    (program,) = diff(rngdc, artifact, other)["programs"]["changed"]
    more = {kind: after - before for kind, (before, after) in program["instructions"].items() if after != before}
    assert more == {"pass": open_artifact(artifact).manifest.model.num_layers}
    (function,) = program["functions"]["changed"]
    assert {k: b - a for k, (a, b) in function["instructions"].items() if a != b} == {"pass": 1}


def test_counted_instructions_are_those_that_are_executed(artifact: Path) -> None:
    device = Device(open_artifact(artifact))
    for bucket in device.artifact.buckets:
        counts = executed(device.artifact.stream(bucket))
        assert sum(counts.values()) - counts["call"] == device.time(bucket).instructions


def test_a_changed_weight_is_named(rngdc: Command, model: Path, artifact: Path, tmp_path: Path) -> None:
    """Also between linked and copied weights, whose files differ: bytes are compared."""
    name = "model.layers.1.mlp.down_proj.weight"
    source = open_artifact(artifact)
    weight = next(w for w in source.manifest.weights if w.name == name)
    path, copied, changed = model / "model.safetensors", tmp_path / "copied", tmp_path / "changed"
    assert rngdc("build", model, copied, *BUCKETS, "--weights", "copy").status == 0
    assert diff(rngdc, artifact, copied)["weights"] == NOTHING
    before = path.read_bytes()
    data = bytearray(before)
    data[weight.offset + 1] ^= 1
    try:
        path.write_bytes(data)
        assert rngdc("build", model, changed, *BUCKETS, "--weights", "copy").status == 0
    finally:
        path.write_bytes(before)
    report = diff(rngdc, copied, changed)
    assert differing(report) == {"weights", "files"}
    assert [w["name"] for w in report["weights"]["changed"]] == [name]
    (entry,) = report["weights"]["changed"]
    assert entry["a"]["sha256"] != entry["b"]["sha256"]
    assert entry["a"]["shape"] == entry["b"]["shape"] == list(weight.shape)
    assert [w["name"] for w in diff(rngdc, artifact, changed)["weights"]["changed"]] == [name]


def test_options_and_programs(rngdc: Command, model: Path, artifact: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ("-pb", "1,8", "-db", "2,32", "-tp", "2", "--num-hidden-layers", "1", "--name", "mine")
    assert rngdc("build", model, out, *arguments).status == 0
    report = diff(rngdc, artifact, out)
    fields = {f["field"]: (f["a"], f["b"]) for f in report["fields"]}
    assert fields["options.tensor_parallel_size"] == fields["parallel.tensor"] == (1, 2)
    assert fields["model.num_layers"] == (2, 1)
    assert fields["name"] == ("", "mine")
    assert fields["options.prefill_buckets"] == ([[1, 16]], [[1, 8]])
    assert "hbm.total" in fields
    programs = report["programs"]
    assert (programs["removed"], programs["added"]) == (["prefill_b1_s16_kv16"], ["prefill_b1_s8_kv8"])
    (decode,) = programs["changed"]
    assert decode["name"] == "decode_b2_kv32" and {"stream", "ir"} <= set(decode["changed_files"])
    assert decode["instructions"]["notify"][0] == 0 < decode["instructions"]["notify"][1]
    before, after = decode["memory_per_pe"]["hbm_bytes_touched"]
    assert 0 < after < before
    assert all(0 < n <= 32 << 20 for n in decode["memory_per_pe"]["dm_bytes"])
    assert any("layers.1." in name for name in report["weights"]["removed"])
    assert report["caches"]["removed"] == ["cache.k.1", "cache.v.1"]
    text = rngdc("diff", artifact, out).out
    for part in ("~ parallel.tensor: 1 -> 2", "- prefill_b1_s16_kv16", "+ prefill_b1_s8_kv8", "hbm bytes touched"):
        assert part in text


def test_programs_that_only_moved(rngdc: Command, model: Path, artifact: Path, tmp_path: Path) -> None:
    """A bucket of more rows needs larger caches, so that what is behind them lies elsewhere; nothing else changes."""
    assert rngdc("build", model, tmp_path / "out", *BUCKETS, "-db", "64,32").status == 0
    report = diff(rngdc, artifact, tmp_path / "out")
    assert report["programs"]["added"] == ["decode_b64_kv32"]
    changed = report["programs"]["changed"]
    assert [p["name"] for p in changed] == ["prefill_b1_s16_kv16", "decode_b2_kv32"]
    for program in changed:
        assert program["functions"]["changed"] and all(f["only_hbm_addresses"] for f in program["functions"]["changed"])
        assert "inputs.input_ids.address" in {f["field"] for f in program["fields"]}
    assert "other HBM addresses only: main" in rngdc("diff", artifact, tmp_path / "out").out


def test_no_field_of_the_manifest_is_overlooked(artifact: Path, other: Path) -> None:
    """Whatever is changed in artifact.json is in the report."""
    original = json.loads((artifact / "artifact.json").read_text("utf-8"))
    opened = open_artifact(artifact)
    cases: list[tuple[str, Any]] = [("name", "x"), ("weights_mode", "copy"), ("of_a_newer_version", 1)]
    cases += [
        (part, original[part] | {"more": 1}) for part in ("compiler", "machine", "options", "model", "parallel", "hbm")
    ]
    for part in ("weights", "placements", "caches", "buckets"):
        first = original[part][0]
        cases.append((part, [first | {"shape" if part == "weights" else "more": [1]}, *original[part][1:]]))
        cases.append((part, original[part][:-1]))
    cases.append(("linked", [original["linked"][0] | {"sha256": "0" * 64}]))
    for field, value in cases:
        data = original | {field: value}
        data["digest"] = _digest(data)
        (other / "artifact.json").write_text(json.dumps(data), "utf-8")
        report = diff_artifacts(opened, open_artifact(other))
        assert not report["equal"], (field, value)
        parts = {"buckets": "programs"}.get(field, field)
        assert parts in differing(report) or field in str(report["fields"]), (field, differing(report))


def test_config_and_tokenizer_files(rngdc: Command, artifact: Path, other: Path) -> None:
    config = json.loads((other / "config.json").read_text("utf-8")) | {"rope_theta": 5.0}
    del config["bos_token_id"]
    (other / "config.json").write_text(json.dumps(config), "utf-8")
    (other / "tokenizer.json").write_text("{}", "utf-8")
    sign(other)
    report = diff(rngdc, artifact, other)
    assert differing(report) == {"config", "files"}
    assert {(f["field"], f["a"], f["b"]) for f in report["config"]} == {
        ("rope_theta", None, 5.0), ("bos_token_id", 1, None),
    }  # fmt: skip
    assert report["files"]["changed"] == ["config.json", "tokenizer.json"]


def test_what_is_no_artifact_is_an_error(rngdc: Command, artifact: Path, tmp_path: Path) -> None:
    refused(rngdc("diff", tmp_path / "x", tmp_path / "y"), f"{tmp_path / 'x'} is no", f"{tmp_path / 'y'} is no")
    refused(rngdc("diff", artifact, tmp_path / "y"), "there is no such directory")
    assert "Exit status 0 if they are equal, 1 if they differ" in " ".join(rngdc("diff", "--help").out.split())
