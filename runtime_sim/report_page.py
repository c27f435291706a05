"""A timing run as one HTML file: drawings are plain SVG, the numbers are embedded as JSON, nothing is loaded."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from runtime_sim.report_data import report_data
from runtime_sim.timing_result import STALLS, TimingResult

WIDTH = 1100
COLOURS = {
    "busy": "#2a7f62", "issue": "#e0a526", "wait_main": "#9fb4d9", "wait_sub": "#b7c6e2", "wait_dma": "#7f9bd1",
    "wait_sync": "#8a63b8", "contention_vector": "#d9534f", "contention_hbm": "#c0392b", "contention_dm": "#e07b39",
    "contention_link": "#b03a6b", "contention_card": "#7b241c", "tail": "#e3e3e3",
}  # fmt: skip
STYLE = """body{font:14px/1.45 system-ui,sans-serif;margin:24px auto;max-width:1120px;color:#222}
h2{margin:28px 0 6px}svg{background:#fafafa;border:1px solid #ddd;width:100%}table{border-collapse:collapse}
td,th{padding:2px 10px;text-align:right;border-bottom:1px solid #eee}td:first-child,th:first-child{text-align:left}
.key{display:inline-block;width:11px;height:11px;margin:0 4px 0 12px}p{margin:4px 0}text{font:11px system-ui}"""
SCRIPT = """const s=document.getElementById('timeline'),full=s.viewBox.baseVal.width;let x=0,w=full;
const show=()=>{w=Math.min(w,full);x=Math.max(0,Math.min(x,full-w));s.setAttribute('viewBox',x+' 0 '+w+' '+
s.viewBox.baseVal.height)};
s.addEventListener('wheel',e=>{e.preventDefault();const b=s.getBoundingClientRect(),f=(e.clientX-b.left)/b.width,
at=x+f*w;w*=e.deltaY<0?0.8:1.25;w=Math.min(w,full);x=at-f*w;show()},{passive:false});
let from=null;s.addEventListener('pointerdown',e=>{from=e.clientX});
window.addEventListener('pointerup',()=>{from=null});
s.addEventListener('pointermove',e=>{if(from!==null){x-=(e.clientX-from)*w/s.getBoundingClientRect().width;
from=e.clientX;show()}});s.addEventListener('dblclick',()=>{x=0;w=full;show()});"""


def write_report(result: TimingResult, path: str | Path, title: str = "", changed: str = "") -> None:
    """Write the report of a run. changed: what a what-if run changed, in words."""
    Path(path).write_text(page(report_data(result), title, changed), encoding="utf-8")


def page(data: dict[str, Any], title: str = "", changed: str = "") -> str:
    """The HTML text for the numbers of `report_data`."""
    facts = [
        f"{data['cycles']:,.0f} cycles, {data['microseconds']:,.1f} us",
        f"{data['instructions']:,} instructions on {data['units']} unit(s)",
        f"multipliers {data['mac_utilisation']:.1%}, HBM {data['hbm_utilisation']:.1%}, "
        f"collectives {data['collective_share']:.1%} of the critical path, {data['energy_joules'] * 1e3:,.2f} mJ",
    ]
    if changed:
        facts.append(f"What if: {changed}")
    shown = f"{len(data['spans']):,} of {data['spans_total']:,} spans (the longest)"
    path_shown = f"the {len(data['path']):,} longest of {data['path_total']:,} segments"
    unit = f"unit {data['unit']} ({data['unit_name']}), which finishes last"
    sections = [
        ("Timeline", f"{unit}; {shown}. Wheel: zoom, drag: move, double click: all.", _timeline(data)),
        ("Where the cycles go", f"{unit}: every row sums to {data['cycles']:,.0f} cycles.", _stalls(data)),
        ("Operations", "Cycles of the critical path; the column sums to the makespan.", _operations(data)),
        ("Layers", "Cycles of the critical path; they sum to the makespan.", _layers(data)),
        ("Roofline", f"{unit}. Operations without multiplications have no place in it.", _roofline(data)),
        ("HBM traffic over time", f"{unit}: bytes a cycle, read (blue) and written (red).", _traffic(data)),
        ("Critical path", f"Along the makespan, {path_shown}; the colour is the operation's.", _path(data)),
    ]
    body = "".join(f"<h2>{escape(h)}</h2><p>{escape(p)}</p>{drawing}" for h, p, drawing in sections)
    name = escape(title or "timing report")
    embedded = json.dumps(data).replace("<", "\\u003c")
    head = (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{name}</title><style>{STYLE}</style></head>'
    )
    top = f"<h1>{name}</h1><p>{escape(data['machine'])}, {escape(data['mode'])} mode</p>"
    lines = "".join(f"<p>{escape(f)}</p>" for f in facts)
    return (
        f'{head}<body>{top}{lines}{body}<script type="application/json" id="data">{embedded}</script>'
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def _svg(height: int, inside: str, name: str, stretch: bool = False) -> str:
    ratio = ' preserveAspectRatio="none"' if stretch else ""
    return f'<svg id="{name}" viewBox="0 0 {WIDTH} {height}" height="{height}"{ratio}>{inside}</svg>'


def _rect(x: float, y: float, width: float, height: float, colour: str, title: str) -> str:
    return (
        f'<rect x="{x:.3f}" y="{y:.2f}" width="{max(width, 0.02):.3f}" height="{height:.2f}" fill="{colour}">'
        f"<title>{escape(title)}</title></rect>"
    )


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _colour(name: str) -> str:
    return f"hsl({zlib.crc32(name.encode()) % 360},55%,58%)"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], name: str) -> str:
    cells = "".join(f"<th>{escape(h)}</th>" for h in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    return f'<table id="{name}"><tr>{cells}</tr>{body}</table>'


def _timeline(data: dict[str, Any]) -> str:
    scale = WIDTH / (data["cycles"] or 1.0)
    drawn = "".join(
        _rect(
            begin * scale, lane * 34 + 4, (end - begin) * scale, 26, _colour(name),
            f"{data['lanes'][lane]}: {name}\n{begin:,.1f} to {end:,.1f} ({end - begin:,.1f} cycles)",
        )
        for lane, name, begin, end in data["spans"]
    )  # fmt: skip
    lanes = f"<p>Lanes from above: {escape(', '.join(data['lanes']))}.</p>"
    return _svg(34 * len(data["lanes"]), drawn, "timeline", stretch=True) + lanes


def _stalls(data: dict[str, Any]) -> str:
    scale = (WIDTH - 60) / (data["cycles"] or 1.0)
    drawn = ""
    for row, (context, stalls) in enumerate(data["stalls"].items()):
        drawn += _text(4, row * 30 + 20, context)
        x = 60.0
        for stall in STALLS:
            if stalls[stall] > 0:
                title = f"{context} {stall}: {stalls[stall]:,.1f} cycles"
                drawn += _rect(x, row * 30 + 4, stalls[stall] * scale, 22, COLOURS[stall], title)
                x += stalls[stall] * scale
    used = [s for s in STALLS if any(row[s] > 1e-6 for row in data["stalls"].values())]
    keys = "".join(f'<span class="key" style="background:{COLOURS[s]}"></span>{s}' for s in used)
    rows = [[c, *(f"{r[s]:,.0f}" for s in used), f"{sum(r.values()):,.0f}"] for c, r in data["stalls"].items()]
    return _svg(94, drawn, "stalls") + f"<p>{keys}</p>" + _table(["context", *used, "sum"], rows, "stall-table")


def _operations(data: dict[str, Any], limit: int = 25) -> str:
    total = data["cycles"] or 1.0
    rows = [
        [
            o["location"].replace("|", " "), f"{o['path_cycles']:,.0f}", f"{o['path_cycles'] / total:.1%}",
            ", ".join(f"{k} {v:,.0f}" for k, v in sorted(o["causes"].items(), key=lambda i: -i[1])[:3] if v >= 0.5),
            f"{o['main']:,.0f}", f"{o['sub']:,.0f}", f"{o['dma']:,.0f}", f"{o['macs']:,}", f"{o['moved_bytes']:,}",
        ]
        for o in data["operations"][:limit]
    ]  # fmt: skip
    if rest := data["operations"][limit:]:
        cycles = sum(o["path_cycles"] for o in rest)
        rows.append([f"{len(rest)} more", f"{cycles:,.0f}", f"{cycles / total:.1%}", *[""] * 6])
    head = ("operation", "path cycles", "share", "why", "main", "sub", "dma", "MACs", "bytes moved")
    return _table(head, rows, "operations")


def _layers(data: dict[str, Any]) -> str:
    total = data["cycles"] or 1.0
    rows = [[name, f"{cycles:,.0f}", f"{cycles / total:.1%}"] for name, cycles in data["layers"].items()]
    return _table(("layer", "path cycles", "share"), rows, "layers")


def _roofline(data: dict[str, Any]) -> str:
    line = data["roofline"]
    points = [p for p in line["points"] if p["macs"] and p["hbm_bytes"] and p["cycles"]]
    peak, height = line["macs_per_cycle"], 360
    roofs = {"HBM of the card": line["hbm_bytes_per_cycle"], "DMA engines of the unit": line["dma_bytes_per_cycle"]}
    places = [(p["macs"] / p["hbm_bytes"], p["macs"] / p["cycles"], p) for p in points]
    left = min([x for x, _, _ in places] + [peak / max(roofs.values())]) / 4
    right = max([x for x, _, _ in places] + [peak / min(roofs.values())]) * 4
    low, high = min([y for _, y, _ in places] + [peak / 100]) / 4, peak * 2

    def x_of(value: float) -> float:
        return 60 + (WIDTH - 80) * math.log(value / left) / math.log(right / left)

    def y_of(value: float) -> float:
        return height - 30 - (height - 50) * math.log(value / low) / math.log(high / low)

    drawn = ""
    for name, rate in roofs.items():
        start, knee = max(left, low / rate), peak / rate
        route = [(start, start * rate), (knee, peak), (right, peak)]
        places_text = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in route)
        drawn += f'<polyline points="{places_text}" fill="none" stroke="#555"><title>{name}</title></polyline>'
        middle = math.sqrt(start * knee)
        drawn += _text(x_of(middle) + 8, y_of(middle * rate), f"{name}: {rate:,.0f} B/cycle")
    drawn += _text(WIDTH - 20, y_of(peak) - 6, f"{peak:,} MACs/cycle", "end")
    for x, y, p in places:
        bound = min(peak, x * min(roofs.values()))
        title = (
            f"{p['location']}\n{x:,.3g} MACs/B, {y:,.1f} MACs/cycle: {y / bound:.1%} of its roof\n"
            f"{p['macs']:,} MACs, {p['hbm_bytes']:,} B, {p['cycles']:,.0f} cycles"
        )
        drawn += f'<circle cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="5" fill="{_colour(p["location"])}">'
        drawn += f"<title>{escape(title)}</title></circle>"
    drawn += _text(WIDTH / 2, height - 6, "MACs per HBM byte (log)", "middle") + _text(4, 14, "MACs a cycle (log)")
    return _svg(height, drawn, "roofline")


def _traffic(data: dict[str, Any]) -> str:
    traffic, height = data["traffic"], 140
    rates = [[b / traffic["bin_cycles"] for b in traffic[k]] for k in ("read_bytes", "write_bytes")]
    top = max([r + w for r, w in zip(*rates, strict=True)] + [1e-9])
    step = WIDTH / len(rates[0])
    drawn = ""
    for i, (read, write) in enumerate(zip(*rates, strict=True)):
        low = height - 5
        for name, rate, colour in (("read", read, "#4a7fc1"), ("written", write, "#c0504d")):
            size = rate / top * (height - 25)
            if size > 0:
                low -= size
                drawn += _rect(i * step, low, step, size, colour, f"{name}: {rate:,.1f} B/cycle")
    return _svg(height, drawn + _text(4, 14, f"highest bar: {top:,.1f} B/cycle"), "traffic")


def _path(data: dict[str, Any]) -> str:
    scale = WIDTH / (data["cycles"] or 1.0)
    drawn = "".join(
        _rect(
            s["begin"] * scale, 4, (s["end"] - s["begin"]) * scale, 32, _colour(s["location"].replace("|", " ")),
            f"{s['location'].replace('|', ' ')}\n{s['layer']}, unit {s['unit']} {s['context']}, "
            f"{s['instructions']} instruction(s)\n{s['begin']:,.1f} to {s['end']:,.1f}",
        )
        for s in data["path"]
    )  # fmt: skip
    return _svg(40, drawn, "path", stretch=True)
