"""Llama-3.1-8B's shapes: two layers at full width compute the right values (`benchmarks/build.py` times the builds)."""

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
    model = tmp_path / "model"
    model.mkdir()
    # The whole vocabulary would only repeat one contraction eight times, with minutes of random numbers.
    config = json.loads(CONFIG.read_text("utf-8")) | {"num_hidden_layers": 2, "vocab_size": 16032}
    (model / "config.json").write_text(json.dumps(config), "utf-8")
    arguments = ["-tp", "1", "--weights", "random:7", "-pb", "1,16", "-db", "1,32"]
    assert status("build", model, out, *arguments) == 0
    assert status("check", out, "--json", report) == 0
    assert all(b["streams"]["compared"] > 30 for b in json.loads(report.read_text("utf-8"))["buckets"])
