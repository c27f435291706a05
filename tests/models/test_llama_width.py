"""Llama-3.1-8B's shapes: two layers at full width compute the right values; build time does not grow with depth."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rngdc.cli import main

CONFIG = Path(__file__).parents[1] / "configs" / "llama-3.1-8b" / "config.json"


def status(*arguments: object) -> int:
    try:
        main([str(a) for a in arguments])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.mark.slow
def test_two_layers_at_full_width(tmp_path: Path) -> None:
    out, report = tmp_path / "out", tmp_path / "report.json"
    arguments = ["--weights", "random:7", "--num-layers", "2", "-pb", "1,16", "-db", "1,32"]
    assert status("build", CONFIG.parent, out, *arguments) == 0
    assert status("check", out, "--json", report) == 0
    assert all(b["streams"]["compared"] > 30 for b in json.loads(report.read_text("utf-8"))["buckets"])


@pytest.mark.slow
def test_build_time_does_not_grow_with_depth(tmp_path: Path) -> None:
    seconds: dict[int, float] = {}
    for layers in (32, 80):
        model = tmp_path / f"model{layers}"
        model.mkdir()
        config = json.loads(CONFIG.read_text("utf-8")) | {"num_hidden_layers": layers}
        (model / "config.json").write_text(json.dumps(config), "utf-8")
        best = []
        for attempt in range(3):
            report = tmp_path / f"report{layers}.json"
            out = tmp_path / f"out{layers}-{attempt}"
            arguments = ["--weights", "none", "-pb", "1,512", "-db", "1,1024", "--json", report]
            assert status("build", model, out, *arguments) == 0
            best.append(json.loads(report.read_text("utf-8"))["seconds"]["total"])
        seconds[layers] = min(best)
    assert seconds[80] <= 1.3 * seconds[32], seconds
