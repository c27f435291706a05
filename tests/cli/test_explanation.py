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
