"""`simulate --set` and `--ideal`, `compare` and `simulate --report` on a small model."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Command
from tests.cli.test_build_problems import refused

DECODE = ("--bucket", "decode_b2_kv32")


def test_set_and_ideal(rngdc: Command, artifact: Path) -> None:
    plain = rngdc("simulate", artifact, *DECODE, "--json", "-").json["buckets"][0]
    ran = rngdc("simulate", artifact, *DECODE, "--set", "dma_startup_cycles=2x", "--ideal", "hbm", "--json", "-")
    report = ran.json
    assert [(c["name"], c["before"]) for c in report["what_if"]["changes"]] == [
        ("hbm_channel_bytes_per_cycle", 48),
        ("dma_startup_cycles", 500),
    ]
    assert report["what_if"]["ideal"] == ["hbm"]
    assert report["buckets"][0]["unchanged_cycles"] == plain["cycles"]
    assert report["buckets"][0]["cycles"] > plain["cycles"]  # start-up is most of this small model
    assert "what_if" not in rngdc("simulate", artifact, *DECODE, "--json", "-").json
    shown = rngdc("simulate", artifact, *DECODE, "--set", "dma_startup_cycles=0")
    assert "times faster" in shown.out
    assert "500 -> 0 cycles" in shown.out
    refused(rngdc("simulate", artifact, "--set", "dma_startup=1"), "no such parameter", "dma_startup_cycles")
    refused(rngdc("simulate", artifact, "--ideal", "all"), "collectives, hbm, sync")


def test_operations_and_layers_sum_to_the_time(rngdc: Command, artifact: Path) -> None:
    for b in rngdc("simulate", artifact, "--json", "-", "--mode", "silicon").json["buckets"]:
        assert sum(o["path_cycles"] for o in b["operations"]) == pytest.approx(b["cycles"])
        assert sum(sum(o["causes"].values()) for o in b["operations"]) == pytest.approx(b["cycles"])
        assert sum(b["layer_path_cycles"].values()) == pytest.approx(b["cycles"])
        assert {"model.layers.0", "model.layers.1"} <= set(b["layer_path_cycles"])


def test_compare_names_what_changed(rngdc: Command, artifact: Path, tmp_path: Path) -> None:
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    rngdc("simulate", artifact, "--json", a)
    rngdc("simulate", artifact, "--json", b, "--set", "dma_startup_cycles=2x")
    ran = rngdc("compare", a, b, "--json", "-")
    assert ran.status == 0, ran.err
    report = ran.json
    assert [x["a"] for x in report["buckets"]] == ["prefill_b1_s16_kv16", "decode_b2_kv32"]
    assert report["settings"]["what_if"][0] is None
    for bucket in report["buckets"]:
        total = bucket["cycles"][1] - bucket["cycles"][0]
        assert total == bucket["difference"] > 0
        for table in ("operations", "causes", "layers"):
            assert sum(row["difference"] for row in bucket[table]) == pytest.approx(total), table
        for row in bucket["operations"]:
            assert sum(row["causes"].values()) == pytest.approx(row["difference"], abs=1e-6)
        assert bucket["causes"][0]["cause"] == "issue"
    shown = rngdc("compare", a, b, *DECODE)
    assert shown.status == 0
    assert "prefill" not in shown.out
    assert "issue +" in shown.out


def test_compare_artifacts(rngdc: Command, artifact: Path, tmp_path: Path) -> None:
    same = rngdc("compare", artifact, artifact, "--json", "-").json
    assert all(x["difference"] == 0 for x in same["buckets"])
    assert all(row["difference"] == 0 for x in same["buckets"] for row in x["operations"] + x["stalls"])
    a = tmp_path / "a.json"
    rngdc("simulate", artifact, "--json", a, "--mode", "silicon", *DECODE)
    mixed = rngdc("compare", a, artifact, "--json", "-").json
    assert mixed["settings"] == {"mode": ["silicon", "documented"]}
    assert mixed["only_b"] == ["prefill_b1_s16_kv16"]
    assert mixed["buckets"][0]["difference"] < 0


def test_compare_refuses(rngdc: Command, artifact: Path, tmp_path: Path) -> None:
    a, wrong = tmp_path / "a.json", tmp_path / "wrong.json"
    rngdc("simulate", artifact, "--json", a, *DECODE)
    wrong.write_text('{"buckets": [{"name": "x"}]}', "utf-8")
    refused(rngdc("compare", a, wrong), "no report of this version", "simulate OUT --json")
    wrong.write_text("[", "utf-8")
    refused(rngdc("compare", wrong, a), "cannot be read")
    refused(rngdc("compare", a, tmp_path / "nowhere"), "no such directory")
    refused(rngdc("compare", a, artifact, "--bucket", "prefill_b1_s16_kv16"), "not in both", "decode_b2_kv32")
    refused(rngdc("compare", a, artifact, "--bucket", "nope"), "not in both")


def test_report_of_a_program(rngdc: Command, artifact: Path, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    ran = rngdc("simulate", artifact, *DECODE, "--report", path, "--set", "dma_startup_cycles=0", "--json", "-")
    text = path.read_text("utf-8")
    assert f"{ran.json['buckets'][0]['cycles']:,.0f} cycles" in text
    assert "dma_startup_cycles 500 -&gt; 0 cycles" in text
    assert text.count("<circle") >= 8  # the matrix products of the model
    refused(rngdc("simulate", artifact, "--report", path), "--report with 2 buckets", "--bucket")
