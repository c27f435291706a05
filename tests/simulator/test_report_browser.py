"""The HTML report in a real browser: QtWebEngine, that is Chromium (`pip install rngdc[browser]`)."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import streams
from two_layers import UNITS, block, program

from backend_rngd.machine import load_machine
from runtime_sim.analysis import Analysis, Resident
from runtime_sim.report_page import write_report
from runtime_sim.timing import simulate
from runtime_sim.topology import Topology

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        importlib.util.find_spec("PySide6") is None or importlib.util.find_spec("PySide6.QtWebEngineCore") is None,
        reason="needs a browser engine: pip install rngdc[browser]",
    ),
]
VIEWS = ["overview", "timeline", "stalls", "roofline", "memory", "operations", "layers"]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a browser makes of the report of a program with products and exchanges."""
    directory = tmp_path_factory.mktemp("page")
    machine = load_machine(mode="silicon")
    result = simulate([program(block())], machine, topology=Topology.of(machine, UNITS))
    area = Resident(1 << 20, 0, 0, (0, 1 << 16), ((streams.OUTPUT, streams.SLICES * streams.ROW),))
    page = directory / "report.html"
    write_report(Analysis(result, [area]), page, "two layers")
    driver = Path(__file__).with_name("browser.py")
    command = [sys.executable, str(driver), str(page), str(directory / "page.png")]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    report: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return report | {"page": page.as_uri()}


def test_it_loads_without_errors_and_without_network(seen: dict[str, Any]) -> None:
    assert seen["loaded"]
    assert seen["console"] == []
    assert set(seen["requests"]) == {seen["page"]}
    assert seen["colours"] > 20  # something is drawn


def test_every_view_shows_itself_and_nothing_else(seen: dict[str, Any]) -> None:
    assert list(seen["views"]) == VIEWS
    for name, sections in seen["views"].items():
        assert [s["id"] for s in sections if s["shown"]] == [f"view-{name}"]
        (shown,) = (s for s in sections if s["shown"])
        assert shown["parts"]
        for part in shown["parts"]:
            assert part["width"] > 300 and part["height"] > 15, (name, part)


def test_every_drawing_has_shapes(seen: dict[str, Any]) -> None:
    found = {p["id"]: p["shapes"] for sections in seen["views"].values() for s in sections for p in s["parts"]}
    for name in ("engines", "timeline", "path", "rate-macs", "rate-noc_bytes", "memory-0", "memory-1"):
        assert found[name] > 1, name
    assert found["roofline"] == 3 + 1  # roofs, and the operation with products


def test_zooming_and_sorting(seen: dict[str, Any]) -> None:
    zoom = seen["zoom"]
    x, _, width, _ = (float(v) for v in zoom["inside"].split())
    assert width == pytest.approx(880) and x == pytest.approx(110)  # around the middle
    assert zoom["zoomed"] != zoom["before"] == zoom["again"]
    down, up = seen["sort"]["down"], seen["sort"]["up"]
    assert down == sorted(down, reverse=True) and up == sorted(up) and len(set(down)) > 1
