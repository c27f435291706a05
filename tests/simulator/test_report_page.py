"""The HTML report: what it draws and embeds equals the timing result, and it loads nothing."""

from __future__ import annotations

import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import streams

from backend_rngd.machine import load_machine
from runtime_sim import report_data as numbers
from runtime_sim.analysis import Analysis
from runtime_sim.report_drawings import LABELS, WIDTH
from runtime_sim.report_page import write_report
from runtime_sim.timing import simulate
from runtime_sim.topology import Topology

VOID = {"meta"}


class Page(HTMLParser):
    """Elements by the drawing or table they are in; checks that tags nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.inside = ""
        self.shapes: dict[str, list[dict[str, Any]]] = {}
        self.cells: dict[str, list[list[str]]] = {}
        self.data = ""
        self.attributes: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {k: v or "" for k, v in attrs}
        self.attributes += [(k, v) for k, v in found.items()]
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("svg", "table") or found.get("id") == "data":
            self.inside = found["id"]
        if tag in ("rect", "circle", "polyline", "polygon"):
            self.shapes.setdefault(self.inside, []).append(found | {"tag": tag})
        if tag == "tr":
            self.cells.setdefault(self.inside, []).append([])

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[self.inside][-1].append(data)
        if self.inside == "data" and self.open and self.open[-1] == "script" and not self.data:
            self.data = data


def run(units: int) -> Analysis:
    """A reduction with contention, in silicon mode."""
    machine = load_machine(mode="silicon")
    return Analysis(simulate([streams.all_reduce(units, 3)], machine, topology=Topology.of(machine, units)))


@pytest.mark.parametrize("units", [2, 8])
def test_numbers_are_those_of_the_result(units: int, tmp_path: Path) -> None:
    analysis = run(units)
    result = analysis.result
    path = tmp_path / "report.html"
    write_report(analysis, path, "a <b> & c", "ideal hbm")
    text = path.read_text("utf-8")
    page = Page(text)
    data = json.loads(page.data)
    cycles = result.cycles
    assert data["cycles"] == cycles
    assert data["engines"] == analysis.engine_totals(analysis.slowest)
    assert sum(c["cycles"] for c in data["causes"]) == pytest.approx(cycles * len(data["engines"]))
    assert sum(o["path_cycles"] for o in data["operations"]) == pytest.approx(cycles)
    assert sum(data["layers"].values()) == pytest.approx(cycles)
    mine = next(row for row in result.per_unit if row["unit"] == result.slowest)
    assert sum(data["rates"]["hbm_read_bytes"]) == pytest.approx(mine["hbm_read_bytes"])
    assert sum(data["rates"]["hbm_write_bytes"]) == pytest.approx(mine["hbm_write_bytes"])
    # Drawings: rectangles of an engine's account, and of the critical path, fill the width.
    rows: dict[str, float] = {}
    for shape in page.shapes["engines"]:
        rows[shape["y"]] = rows.get(shape["y"], 0.0) + float(shape["width"])
    assert len(rows) == 6
    assert all(width == pytest.approx(WIDTH - LABELS, abs=0.5) for width in rows.values())
    assert sum(float(s["width"]) for s in page.shapes["path"]) == pytest.approx(WIDTH, abs=0.5)
    assert len(page.shapes["timeline"]) == len(data["spans"]) == data["spans_total"]
    assert [row[-1] for row in page.cells["stall-table"][1:]] == [f"{cycles:,.0f}"] * 6
    assert len(page.shapes["memory-0"]) == len(data["memory"][0]["live"])
    names = [v for k, v in page.attributes if k == "id"]
    assert len(names) == len(set(names))
    assert "a &lt;b&gt; &amp; c" in text
    assert "What if: ideal hbm" in text


def test_it_loads_nothing(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_report(run(2), path)
    text = path.read_text("utf-8")
    assert not [a for a in Page(text).attributes if a[0] in ("src", "href", "srcset", "action")]
    assert not re.search(r"https?://|@import|url\(|fetch\(|import\(", text)


def test_long_runs_are_cut_and_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numbers, "MAX_SPANS", 1)
    monkeypatch.setattr(numbers, "SMALLEST", 10)
    path = tmp_path / "report.html"
    write_report(run(2), path)
    text = path.read_text("utf-8")
    page = Page(text)
    data = json.loads(page.data)
    drawn = data["spans"]
    assert len(drawn) == len(page.shapes["timeline"]) < data["spans_total"]
    assert sum(count for *_, count in drawn) == data["spans_total"]
    assert f"{data['spans_total']:,} spans as {len(drawn)} rectangles" in text
    # A rectangle joins what is close and small; what can be seen stands for itself.
    seen = data["cycles"] / numbers.SMALLEST
    for lane in range(len(data["lanes"])):
        mine = [(begin, end, count) for at, _, begin, end, count in drawn if at == lane]
        assert all(a[1] <= b[0] + 1e-6 for a, b in itertools.pairwise(mine))
        assert all(count == 1 or end - begin <= numbers.WIDEST * seen + 1e-6 for begin, end, count in mine)


def test_roofline_peaks_bound_every_operation() -> None:
    analysis = run(2)
    result, line = analysis.result, analysis.roofline
    assert line["macs_per_cycle"] == result.flat.streams[0].slices * 256
    assert line["hbm_bytes_per_cycle"] == result.machine.hbm_bytes_per_cycle == 2 * line["hbm_share_bytes_per_cycle"]
    assert {p["location"] for p in line["points"]} == {o.location for o in result.operations}
    for p in line["points"]:
        assert p["macs"] <= p["cycles"] * line["macs_per_cycle"]
        assert p["hbm_bytes"] <= p["cycles"] * line["dma_bytes_per_cycle"]
