"""`simulate --set` and `--ideal`, `compare` and `simulate --report` on a small model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Command
from tests.cli.test_build_problems import refused

DECODE = ("--bucket", "decode_b2_kv32")


def test_set_and_ideal(rngdc: Command, artifact: Path) -> None:
    plain = rngdc("simulate", artifact, *DECODE, "--json", "-").json["buckets"][0]
    ran = rngdc("simulate", artifact, *DECODE, "--set", "dma_startup_cycles=2x", "--ideal", "hbm", "--json", "-")
    report = ran.json
    changes = {c["name"]: c["before"] for c in report["what_if"]["changes"]}
    assert changes["hbm_channel_bytes_per_cycle"] == 48
    assert changes["dma_startup_cycles"] == 1100
    assert report["what_if"]["ideal"] == ["hbm"]
    assert report["buckets"][0]["unchanged_cycles"] == plain["cycles"]
    assert report["buckets"][0]["cycles"] > plain["cycles"]  # start-up is most of this small model
    assert "what_if" not in rngdc("simulate", artifact, *DECODE, "--json", "-").json
    shown = rngdc("simulate", artifact, *DECODE, "--set", "dma_startup_cycles=0")
    assert "times faster" in shown.out
    assert "1100 -> 0 cycles" in shown.out
    refused(rngdc("simulate", artifact, "--set", "dma_startup=1"), "no such parameter", "dma_startup_cycles")
    refused(rngdc("simulate", artifact, "--ideal", "all"), "collectives, hbm, sync, dma, issue, links")


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
        for engine in ("Main", "Sub", "VE", "TDMA", "PDMA", "Core"):
            mine = [row["difference"] for row in bucket["engines"] if row["engine"] == engine]
            assert sum(mine) == pytest.approx(total, abs=1e-6), engine
        for row in bucket["operations"]:
            assert row["instructions"][0] == row["instructions"][1]
            assert not any(words in reason for reason in row["reasons"] for words in ("bytes", "multiplications"))
            assert sum(row["causes"].values()) == pytest.approx(row["difference"], abs=1e-6)
        assert bucket["causes"][0]["cause"] == "issue"
    shown = rngdc("compare", a, b, *DECODE)
    assert shown.status == 0
    assert "prefill" not in shown.out
    assert "waiting for" in shown.out
    assert "issue +" in shown.out


def test_compare_says_what_there_is_more_of(rngdc: Command, artifact: Path, tmp_path: Path) -> None:
    """A decode of two rows against a prefill of 16 tokens: the only programs of both files are compared."""
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    rngdc("simulate", artifact, "--json", a, *DECODE)
    rngdc("simulate", artifact, "--json", b, "--bucket", "prefill_b1_s16_kv16")
    (bucket,) = rngdc("compare", a, b, "--json", "-").json["buckets"]
    row = next(o for o in bucket["operations"] if o["location"] == "self_attn.q_proj|tc.contract")
    for name, words in (
        ("instructions", "instructions"),
        ("macs", "multiplications"),
        ("dm_bytes", "bytes of data memory"),
    ):
        before, after = row[name]
        more = "more" if after > before else "fewer"
        assert f"{more} {words} ({before:,} -> {after:,})" in row["reasons"]


def test_profiles(rngdc: Command, artifact: Path, tmp_path: Path) -> None:
    """A profile against the program it is of, against another machine's, and against one of a card."""
    same, slow, card = tmp_path / "same.json", tmp_path / "slow.json", tmp_path / "card.csv"
    rngdc("simulate", artifact, *DECODE, "--profile", same)
    rngdc("simulate", artifact, *DECODE, "--profile", slow, "--set", "dma_startup_cycles=2x")
    equal = rngdc("compare", artifact, same, *DECODE, "--json", "-").json
    assert equal["cycles"][1] == pytest.approx(equal["cycles"][0], abs=1)
    for row in equal["spans"]:
        assert row["in"] == "both" and row["spans"][0] == row["spans"][1]
        assert row["difference"] == pytest.approx(0, abs=row["spans"][0])  # ticks are whole
    longer = rngdc("compare", same, slow, "--json", "-").json
    assert longer["difference"] > 0
    assert sum(row["by_length"] for row in longer["spans"]) > 0
    assert all(row["by_number"] == 0 for row in longer["spans"])
    card.write_text("leader_device,name,cycle\nnpu0pe0-3,Tokenwise #0,4000\n", "utf-8")
    shown = rngdc("compare", same, card)
    assert "no span has the same name" in shown.out
    assert "Tokenwise #0" in shown.out
    refused(rngdc("compare", artifact, same), "2 programs to compare with a profile", "--bucket")
    refused(rngdc("simulate", artifact, "--profile", same), "--profile with 2 buckets")
    card.write_text("leader_device,name,cycle\nx\n", "utf-8")
    refused(rngdc("compare", artifact, card), "no device profile", "line 2")


def test_simulate_explains_one_program(rngdc: Command, artifact: Path) -> None:
    (b,) = rngdc("simulate", artifact, *DECODE, "--mode", "silicon", "--json", "-").json["buckets"]
    for kinds in b["account"].values():
        assert sum(kinds.values()) == pytest.approx(b["cycles"])
    for engine, kinds in b["account"].items():
        for kind, cycles in kinds.items():
            named = [c["cycles"] for c in b["causes"] if (c["engine"], c["kind"]) == (engine, kind)]
            assert sum(named) == pytest.approx(cycles, abs=1e-6)
    assert sum(g["cycles"] for g in b["critical_path"]["groups"]) == pytest.approx(b["cycles"])
    assert {"model.layers.0", "model.layers.1"} <= {g["layer"] for g in b["critical_path"]["groups"]}
    data, hbm = b["memory"]
    assert 0 < data["peak_bytes"] == sum(data["peak_by"].values()) < data["capacity"]
    assert 0 < hbm["peak_bytes"] == sum(hbm["peak_by"].values()) <= hbm["capacity"]
    assert hbm["resident"]["weights"] > 0 < hbm["resident"]["caches"]
    assert all(0 < o["attained"] <= o["bound"] for o in b["operations"] if o["macs"])
    shown = rngdc("simulate", artifact, *DECODE)
    assert "TDMA" in shown.out and "of its roof" in shown.out and "live" in shown.out


def test_compare_artifacts(rngdc: Command, artifact: Path, tmp_path: Path) -> None:
    same = rngdc("compare", artifact, artifact, "--json", "-").json
    assert all(x["difference"] == 0 for x in same["buckets"])
    assert all(row["difference"] == 0 for x in same["buckets"] for row in x["operations"] + x["stalls"])
    a = tmp_path / "a.json"
    rngdc("simulate", artifact, "--json", a, *DECODE)
    mixed = rngdc("compare", a, artifact, "--mode", "documented", "--json", "-").json
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
    path, trace = tmp_path / "page.html", tmp_path / "trace.json"
    files = ("--report", path, "--trace", trace, "--json", "-")
    ran = rngdc("simulate", artifact, *DECODE, *files, "--set", "dma_startup_cycles=0")
    text = path.read_text("utf-8")
    assert f"{ran.json['buckets'][0]['cycles']:,.0f} cycles" in text
    assert "dma_startup_cycles 1100 -&gt; 0 cycles" in text
    # The page, the tables and the traces are views of one analysis.
    (b,) = ran.json["buckets"]
    data = json.loads(text.partition('<script type="application/json" id="data">')[2].partition("</script>")[0])
    assert data["engines"] == b["account"]
    assert data["operations"] == b["operations"]
    assert data["layers"] == b["layer_path_cycles"]
    for drawn, row in zip(data["memory"], b["memory"], strict=True):
        assert {k: drawn[k] for k in row} == row
    events = json.loads(trace.read_text("utf-8"))["traceEvents"]
    instructions = [e for e in events if e["ph"] == "X" and e["tid"] not in (0, 3)]  # neither layers nor VE
    assert len(instructions) == b["instructions"]
    assert max(e["args"]["end_cycle"] for e in instructions) == b["cycles"]
    assert text.count("<circle") >= 8  # the matrix products of the model
    refused(rngdc("simulate", artifact, "--report", path), "--report with 2 buckets", "--bucket")


def test_hbm_requests(rngdc: Command, artifact: Path) -> None:
    report = rngdc("simulate", artifact, *DECODE, "--hbm-requests", "0:1e9", "--json", "-").json
    (card,) = report["hbm_requests"]
    b = report["buckets"][0]
    assert card["lines"] * 256 >= b["hbm_bytes_read"] + b["hbm_bytes_written"]
    assert card["fluid"] <= b["cycles"]
    assert abs(card["difference"]) < 0.12
    assert "request by request" in rngdc("simulate", artifact, *DECODE, "--hbm-requests", "0:20000").out
    refused(rngdc("simulate", artifact, *DECODE, "--hbm-requests", "5"), "two cycles", "0:50000")
    refused(rngdc("simulate", artifact, *DECODE, "--hbm-requests", "9:3"), "the first one smaller")
    refused(rngdc("simulate", artifact, *DECODE, "--hbm-requests", "1e12:2e12"), "no transfer", "the program takes")
    refused(rngdc("simulate", artifact, "--hbm-requests", "0:5"), "--hbm-requests with 2 buckets")
