"""The commands on artifacts for several processing elements, stages and replicas."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from backend_rngd.artifact import open_artifact
from backend_rngd.isa.descriptors import Exec, Op
from backend_rngd.isa.text import parse_stream
from rngdc.check import check
from rngdc.cli import main
from runtime_sim.runtime import Device
from tests.cli.conftest import Command
from tests.cli.small_models import write_model
from tests.cli.test_build_problems import refused

PROMPT = ("--prompt-ids", "5,17,40", "--max-tokens", "5", "--ignore-eos", "--json", "-")


@pytest.fixture(scope="module")
def spread(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small llama of `artifact`, on two processing elements a layer."""
    out = tmp_path_factory.mktemp("spread") / "llama"
    try:
        main(["build", str(model), str(out), "-pb", "1,16", "-db", "2,32", "-tp", "2", "-pp", "2"])
    except SystemExit as stop:
        assert not stop.code
    return out


def test_tokens_do_not_depend_on_how_the_model_is_spread(rngdc: Command, artifact: Path, spread: Path) -> None:
    one = rngdc("run", artifact, *PROMPT).json["token_ids"]
    for arguments in ([], ["-pp", "1"], ["-dp", "2"]):
        assert rngdc("run", spread, *PROMPT, *arguments).json["token_ids"] == one


def test_manifest(spread: Path) -> None:
    parallel = open_artifact(spread).manifest.parallel
    assert (parallel.tensor, parallel.pipeline, parallel.units, parallel.mesh) == (2, 2, 2, "kv=2,r=1")


def test_check_judges_every_unit_and_stage(rngdc: Command, spread: Path, artifact: Path) -> None:
    whole = rngdc("check", artifact, "--json", "-").json
    for stages in ("1", "2"):
        ran = rngdc("check", spread, "-pp", stages, "--json", "-")
        assert ran.status == 0, ran.out + ran.err
        for bucket, alone in zip(ran.json["buckets"], whole["buckets"], strict=True):
            assert bucket["passes"]["agrees"]
            assert bucket["streams"]["units"] == 2
            assert bucket["streams"]["compared"] > 1.8 * alone["streams"]["compared"]


def test_check_names_the_unit_at_fault(spread: Path) -> None:
    """Another function in the MLP of one unit's second layer is found there."""
    opened = open_artifact(spread)
    bucket = opened.buckets[1]
    device = Device(opened, pipeline_parallel_size=1)
    device.load()
    stream = device.residence.stream(bucket, 0)
    number = next(i for i, r in enumerate(stream.routines) if r.name == "block_0")
    instructions = list(stream.routines[number].instructions)
    at = next(i for i, x in enumerate(instructions) if any(v.op == Op.SIGMOID for v in getattr(x.what, "vector", ())))
    what = instructions[at].what
    assert isinstance(what, Exec)
    vector = tuple(replace(v, op=Op.TANH) if v.op == Op.SIGMOID else v for v in what.vector)
    instructions[at] = replace(instructions[at], what=replace(what, vector=vector))
    routines = list(stream.routines)
    routines[number] = replace(routines[number], instructions=tuple(instructions))
    device.residence._streams[bucket.name, 0] = replace(stream, routines=tuple(routines))
    report = check(device, [bucket])
    first = report.buckets[0].streams.first
    assert first is not None
    assert first.calls == ("main", "block_0[0]", "unit 0")
    assert first.path == "mlp"


def test_inspect_collectives(rngdc: Command, spread: Path) -> None:
    reports = rngdc("inspect", spread, "--collectives", "--json", "-").json["collectives"]
    assert [r["bucket"] for r in reports] == ["prefill_b1_s16_kv16", "decode_b2_kv32"]
    for report in reports:
        assert report["per_layer"] == {"all_reduce": 2}
        assert report["elsewhere"] == {"all_reduce": 1, "all_gather": 1}
        assert sum(c["calls"] for c in report["collectives"]) == 2 * 2 + 2
        for c in report["collectives"]:
            assert c["why"]
            assert c["notifies"] >= 1
            assert c["transfers"] >= 1
        assert report["memory"]["weights_per_unit"] < 0.6 * report["memory"]["weights"]
    text = rngdc("inspect", spread, "--collectives", "--bucket", "decode_b2_kv32")
    assert "a layer: 2 all_reduce" in text.out
    assert "o_proj" in text.out
    assert "prefill" not in text.out
    refused(rngdc("inspect", spread, "--bucket", "x"), "bucket 'x'")


def test_padding_is_reported(rngdc: Command, tmp_path: Path) -> None:
    model = write_model(
        tmp_path / "m", hidden_size=96, num_attention_heads=3, num_key_value_heads=3, head_dim=32, vocab_size=130
    )
    assert rngdc("build", model, tmp_path / "out", "-pb", "1,8", "-db", "1,16", "-tp", "2").status == 0
    ran = rngdc("inspect", tmp_path / "out", "--collectives", "--json", "-")
    waste = {w["what"]: w for w in ran.json["collectives"][0]["waste"]}
    assert waste["key-value heads"]["size"] == 3
    assert waste["key-value heads"]["padded"] == 4
    assert "padding" in rngdc("inspect", tmp_path / "out", "--collectives").out


def test_simulate(rngdc: Command, spread: Path) -> None:
    one = rngdc("simulate", spread, "-pp", "1", "--json", "-").json
    assert (one["tensor"], one["pipeline"], one["replicas"], one["cards"]) == (2, 1, 1, 1)
    for b in one["buckets"]:
        assert 0 < b["collective_share"] < 1
        assert [u["unit"] for u in b["units"]] == [0, 1]
    stages = rngdc("simulate", spread, "--micro-batches", "4", "--json", "-").json
    assert (stages["pipeline"], stages["micro_batches"]) == (2, 4)
    for four, b in zip(stages["buckets"], one["buckets"], strict=True):
        assert b["time_us"] < four["time_us"] < 4 * b["time_us"]  # stages overlap
    text = rngdc("simulate", spread, "-dp", "4")
    assert "tensor 2, pipeline 2, data 4 on 2 card(s)" in text.out
    refused(rngdc("simulate", spread, "--micro-batches", "0"), "--micro-batches 0")
    refused(rngdc("simulate", spread, "-pp", "3"), "3 pipeline stages")
    refused(rngdc("simulate", spread, "-pp", "0"), "size 0")
    refused(rngdc("simulate", spread, "-dp", "0"), "size 0")


def test_disasm_of_a_unit(rngdc: Command, spread: Path) -> None:
    opened = open_artifact(spread)
    bucket = opened.bucket("decode_b2_kv32")
    texts = [rngdc("disasm", spread, "--bucket", bucket.name, "--pe", k).out for k in (0, 1)]
    for pe, text in enumerate(texts):
        assert parse_stream(text) == opened.stream(bucket)
        assert f"PE {pe} of 2" in text
        registers = {int(r): int(v) for r, v in re.findall(r"^; r(\d+) = (\d+)$", text, re.MULTILINE)}
        assert registers == {r: values[pe] for r, values in bucket.launch.items()}
    assert texts[0] != texts[1]
    refused(rngdc("disasm", spread, "--bucket", bucket.name, "--pe", "2"), "--pe 2", "use 0 to 1")


def test_a_users_plan(rngdc: Command, model: Path, tmp_path: Path) -> None:
    """Replicating the MLP leaves one collective a layer; a plan that names nothing of the model is refused."""
    plan = tmp_path / "plan.yaml"
    plan.write_text("layers.*.mlp.*_proj: replicate\n", "utf-8")
    arguments = ("-pb", "1,8", "-db", "1,16", "-tp", "2", "--tensor-parallel-plan", plan)
    ran = rngdc("build", model, tmp_path / "out", *arguments)
    assert ran.status == 0, ran.err
    report = rngdc("inspect", tmp_path / "out", "--collectives", "--json", "-").json["collectives"][0]
    assert report["per_layer"] == {"all_reduce": 1}
    assert rngdc("check", tmp_path / "out").status == 0
    plan.write_text("layers.*.mpl.gate: colwise\n", "utf-8")
    refused(rngdc("build", model, tmp_path / "other", *arguments), "layers.*.mpl.gate")


def test_sequence_parallel(rngdc: Command, model: Path, tmp_path: Path) -> None:
    arguments = ("-pb", "1,16", "-db", "2,16", "-tp", "2", "--sequence-parallel")
    ran = rngdc("build", model, tmp_path / "out", *arguments)
    assert ran.status == 0, ran.err
    prefill = rngdc("inspect", tmp_path / "out", "--collectives", "--json", "-").json["collectives"][0]
    assert prefill["per_layer"] == {"reduce_scatter": 2, "all_gather": 2}
    assert rngdc("check", tmp_path / "out").status == 0
    report = rngdc("build", model, "--dry-run", *arguments, "--json", "-").json
    assert prefill["elsewhere"] == {"reduce_scatter": 1, "all_gather": 2}  # embedding, last tokens, logits
    assert report["buckets"][0]["collectives"] == 2 * 4 + 3


def test_memory_of_a_unit_is_its_part(rngdc: Command, artifact: Path, spread: Path) -> None:
    whole, part = (open_artifact(p).manifest for p in (artifact, spread))
    assert part.hbm.weights < 0.75 * whole.hbm.weights
    assert [c.bytes for c in part.caches] == [c.bytes // 2 for c in whole.caches]
