"""The drawings of the HTML report: plain SVG, a function each, from the numbers of `report_data`."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from html import escape
from typing import Any

from runtime_sim.engines import KINDS

WIDTH = 1100
LABELS = 60  # left of bars
COLOURS = {
    "busy": "#2a7f62", "issue": "#e0a526", "wait": "#9fb4d9", "sync": "#8a63b8", "contention": "#c0392b",
    "tail": "#e6e6e6",
}  # fmt: skip
LANE = 30  # height
PALETTE = (
    "#4c78a8", "#f58518", "#54a24b", "#e45756", "#72b7b2", "#b279a2", "#eeca3b", "#9d755d", "#ff9da6", "#bab0ac",
)  # fmt: skip
RATES = (
    ("HBM read", "hbm_read_bytes", "#3b6fb6", "B/cycle"),
    ("HBM written", "hbm_write_bytes", "#c0504d", "B/cycle"),
    ("multiplications", "macs", "#2a7f62", "MACs/cycle"),
    ("between PEs", "noc_bytes", "#8a63b8", "B/cycle"),
    ("between cards", "pcie_bytes", "#b07d2b", "B/cycle"),
)


def svg(height: int, inside: str, name: str, stretch: bool = False) -> str:
    """A drawing of WIDTH by `height`; stretched ones take any width without keeping their shape."""
    ratio = "none" if stretch else "xMinYMid"
    size = f'viewBox="0 0 {WIDTH} {height}" height="{height}" preserveAspectRatio="{ratio}"'
    return f'<svg id="{name}" {size}>{inside}</svg>'


def rect(x: float, y: float, width: float, height: float, colour: str, title: str) -> str:
    """A rectangle that tells `title` under the pointer."""
    return (
        f'<rect x="{x:.3f}" y="{y:.2f}" width="{max(width, 0.02):.3f}" height="{height:.2f}" fill="{colour}">'
        f"<title>{escape(title)}</title></rect>"
    )


def text(x: float, y: float, words: str, anchor: str = "start") -> str:
    """A label."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def colour(name: str) -> str:
    """Always the same colour for a name."""
    return f"hsl({zlib.crc32(name.encode()) % 360},48%,58%)"


def plain(location: str) -> str:
    """`module path op` of a location."""
    return location.replace("|", " ").strip()


def key(entries: Sequence[tuple[str, str]]) -> str:
    """Colours and what they mean."""
    parts = (f'<span class="key"><i style="background:{c}"></i>{escape(name)}</span>' for name, c in entries)
    return f'<p class="keys">{"".join(parts)}</p>'


def timeline(data: dict[str, Any]) -> str:
    """Lanes of spans over the critical path and what moves, all on one axis that the page's script zooms."""
    scale = WIDTH / (data["cycles"] or 1.0)
    drawn = "".join(
        rect(
            begin * scale, lane * LANE + 3, (end - begin) * scale, LANE - 6, colour(name),
            f"{data['lanes'][lane]}: {name}{_others(count)}\n{begin:,.1f} to {end:,.1f} ({end - begin:,.1f} cycles)",
        )
        for lane, name, begin, end, count in data["spans"]
    )  # fmt: skip
    lanes = [*data["lanes"], "Critical path"]
    rows = svg(LANE * len(data["lanes"]), drawn, "timeline", stretch=True) + _path(data)
    used = [rate for rate in RATES if any(data["rates"][rate[1]])]
    for title, name, shade, measure in used:
        lanes.append(title)
        rows += _rate(data, name, shade, measure)
    labels = "".join(f"<div>{escape(name)}</div>" for name in lanes)
    axis = '<div id="axis"></div>'
    return f'<div class="lanes"><div class="labels">{labels}</div><div class="rows">{rows}{axis}</div></div>'


def _others(count: int) -> str:
    return f" and {count - 1} neighbours" if count > 1 else ""


def _path(data: dict[str, Any]) -> str:
    scale = WIDTH / (data["cycles"] or 1.0)
    drawn = "".join(
        rect(
            begin * scale, 3, (end - begin) * scale, LANE - 6, colour(name.partition("\n")[0]),
            f"{name}{_others(count)}\n{begin:,.1f} to {end:,.1f} ({end - begin:,.1f} cycles)",
        )
        for name, begin, end, count in data["path"]
    )  # fmt: skip
    return svg(LANE, drawn, "path", stretch=True)


def _rate(data: dict[str, Any], name: str, shade: str, measure: str) -> str:
    values = [v / data["rates"]["bin_cycles"] for v in data["rates"][name]]
    top, step = max(values), WIDTH / len(values)
    drawn = "".join(
        rect(i * step, LANE - v / top * (LANE - 4), step, v / top * (LANE - 4), shade,
             f"{v:,.1f} {measure} (highest: {top:,.1f})")
        for i, v in enumerate(values)
        if v > 0
    )  # fmt: skip
    return svg(LANE, drawn, f"rate-{name}", stretch=True)


def engines(data: dict[str, Any], name: str) -> str:
    """A bar an engine; every bar is as long as the makespan."""
    scale = (WIDTH - LABELS) / (data["cycles"] or 1.0)
    drawn = ""
    for row, (engine, kinds) in enumerate(data["engines"].items()):
        drawn += text(4, row * LANE + 20, engine)
        x = float(LABELS)
        for kind in KINDS:
            if kinds[kind] > 0:
                share = kinds[kind] / (data["cycles"] or 1.0)
                title = f"{engine} {kind}: {kinds[kind]:,.1f} cycles, {share:.1%}"
                drawn += rect(x, row * LANE + 4, kinds[kind] * scale, LANE - 8, COLOURS[kind], title)
                x += kinds[kind] * scale
    legend = key([(kind, COLOURS[kind]) for kind in KINDS])
    return svg(LANE * len(data["engines"]) + 4, drawn, name) + legend


def memory(row: dict[str, Any], number: int, cycles: float) -> str:
    """Live bytes over time, stacked by who wrote them."""
    height, names = 200, list(row["live"])
    shade = {name: PALETTE[n % len(PALETTE)] for n, name in enumerate(names)}
    top = max(row["peak_bytes"], 1)
    xs = [WIDTH * t / (cycles or 1.0) for t in row["moments"]]
    base = [0.0] * len(xs)
    drawn = ""
    for name in reversed(names):
        upper = [b + v for b, v in zip(base, row["live"][name], strict=True)]
        points = [(x, v) for x, v in zip(xs, upper, strict=True)]
        points += [(x, v) for x, v in zip(reversed(xs), reversed(base), strict=True)]
        route = " ".join(f"{x:.1f},{height - 1 - v / top * (height - 8):.1f}" for x, v in points)
        most = max(row["live"][name])
        title = escape(f"{name}: at most {most:,} B")
        drawn += f'<polygon points="{route}" fill="{shade[name]}"><title>{title}</title></polygon>'
        base = upper
    return svg(height, drawn, f"memory-{number}", stretch=True) + key(list(shade.items()))


def roofline(data: dict[str, Any]) -> str:
    """Operations below their roofs, both axes logarithmic."""
    line = data["roofline"]
    points = [p for p in line["points"] if p["macs"] and p["intensity"] and p["attained"]]
    peak, height = max([line["macs_per_cycle"], *(p["bound"] for p in points)]), 400
    roofs = {
        "HBM of the card": line["hbm_bytes_per_cycle"],
        "DMA engines of the unit": line["dma_bytes_per_cycle"],
        "the unit's share of HBM": line["hbm_share_bytes_per_cycle"],
    }
    left = min([p["intensity"] for p in points] + [peak / max(roofs.values())]) / 4
    right = max([p["intensity"] for p in points] + [peak / min(roofs.values())]) * 4
    low, high = min([p["attained"] for p in points] + [peak / 100]) / 4, peak * 2

    def x_of(value: float) -> float:
        return LABELS + (WIDTH - 80) * math.log(value / left) / math.log(right / left)

    def y_of(value: float) -> float:
        return height - 30 - (height - 50) * math.log(value / low) / math.log(high / low)

    drawn = _grid(left, right, low, high, x_of, y_of, height)
    for number, (name, rate) in enumerate(sorted(roofs.items(), key=lambda roof: -roof[1])):
        start, knee = max(left, low / rate), peak / rate
        route = " ".join(
            f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in ((start, start * rate), (knee, peak), (right, peak))
        )
        drawn += f'<polyline points="{route}" fill="none" stroke="#555"><title>{escape(name)}</title></polyline>'
        middle = start * (knee / start) ** 0.7
        below = number == 2  # neighbouring roofs have their names on different sides
        where = (x_of(middle) + 10, y_of(middle * rate) + 14) if below else (x_of(middle) - 8, y_of(middle * rate) - 6)
        drawn += text(*where, f"{name}: {rate:,.0f} B/cycle", "start" if below else "end")
    drawn += text(WIDTH - 24, y_of(peak) - 6, f"{peak:,.0f} MACs/cycle", "end")
    for p in points:
        title = (
            f"{plain(p['location'])}\n{p['intensity']:,.3g} MACs/B, {p['attained']:,.1f} MACs/cycle: "
            f"{p['attained'] / p['bound']:.1%} of what {p['by']} allows\n"
            f"{p['macs']:,} MACs, {p['hbm_bytes']:,} B of HBM, {p['cycles']:,.0f} cycles"
        )
        drawn += f'<circle cx="{x_of(p["intensity"]):.1f}" cy="{y_of(p["attained"]):.1f}" r="6" '
        drawn += f'fill="{colour(plain(p["location"]))}" stroke="#fff"><title>{escape(title)}</title></circle>'
    drawn += text(WIDTH / 2, height - 4, "MACs for each byte of HBM", "middle") + text(4, 12, "MACs a cycle")
    return svg(height, drawn, "roofline")


def _grid(left: float, right: float, low: float, high: float, x_of: Any, y_of: Any, height: int) -> str:
    """Powers of ten."""
    drawn = ""
    for power in range(math.ceil(math.log10(left)), math.floor(math.log10(right)) + 1):
        x = x_of(10.0**power)
        drawn += f'<line x1="{x:.1f}" y1="20" x2="{x:.1f}" y2="{height - 30}" stroke="#e4e4e4"></line>'
        drawn += text(x, height - 17, f"{10.0**power:g}", "middle")
    for power in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1):
        y = y_of(10.0**power)
        drawn += f'<line x1="{LABELS}" y1="{y:.1f}" x2="{WIDTH - 20}" y2="{y:.1f}" stroke="#e4e4e4"></line>'
        drawn += text(LABELS - 6, y + 4, f"{10.0**power:g}", "end")
    return drawn
