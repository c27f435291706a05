"""What changed between two device profiles, or a simulated run and a profile: spans by name, and when nothing ran.

A profile says when spans began and ended, not why: the differences are those of how many spans there are and how long
each takes, and of the time in which none ran.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import RenderableType
from rich.table import Table

from backend_rngd.machine import load_machine
from ir.errors import Problem, UserError
from runtime_sim.profile import Profile, ProfileError, read_profile
from runtime_sim.timing_tables import covered

Report = dict[str, Any]
SHOWN = 20


@dataclass(frozen=True)
class Spans:
    """Spans of one side: by name how many and their cycles; cycles from the first to the last, and in which any ran
    (None if the side has no times)."""

    source: str
    by_name: Mapping[str, tuple[int, float]]
    length: float
    running: float | None
    about: Mapping[str, Any]


def load_profile(path: Path) -> Profile | None:
    """The device profile in a file; None if it is no profile. Raises UserError if it is a broken one."""
    try:
        return read_profile(path)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError([Problem(f"{path} cannot be read", str(error), "give a report or a profile")]) from error
    except ProfileError as error:
        fix = "write it with `rngdc simulate OUT --profile FILE`, or export spans with begin_cycle and end_cycle"
        raise UserError([Problem(f"{path} is no device profile", str(error), fix)]) from error


def of_profile(profile: Profile) -> Spans:
    """A profile in cycles of the tensor clock. Files of cards do not say how long a tick is: then as in the machine
    description."""
    machine = load_machine()
    ticks = profile.ticks_per_cycle or machine.tick_hz / machine.clock_hz
    every = np.array([s for spans in profile.spans.values() for s in spans], np.float64).reshape(-1, 2) / ticks
    about = {"ticks_per_cycle": ticks} | {k: profile.about[k] for k in ("machine", "mode") if k in profile.about}
    return Spans(
        profile.source,
        {name: (len(s), sum(e - b for b, e in s) / ticks) for name, s in profile.spans.items()},
        profile.length / ticks,
        covered(every[:, 0], every[:, 1]) if profile.timed else None,
        about,
    )


def of_report(report: Report, names: list[str] | None) -> Spans:
    """The program of a simulated report. Raises UserError if it has several and none is chosen."""
    buckets = [b for b in report["buckets"] if not names or b["name"] in names]
    if len(buckets) != 1:
        have = ", ".join(b["name"] for b in report["buckets"])
        why = f"a profile is one program's, {report.get('artifact')} has {have}"
        raise UserError(
            [Problem(f"{len(buckets)} programs to compare with a profile", why, "choose one with --bucket")]
        )
    (b,) = buckets
    by_name = {
        o["location"].replace("|", " ").strip() or "unknown": (o["instructions"], o["main"] + o["sub"] + o["dma"])
        for o in b["operations"]
    }
    about = {k: report.get(k) for k in ("machine", "mode")}
    return Spans(f"{report.get('artifact')} {b['name']}", by_name, b["cycles"], None, about)


def compare_profiles(a: Spans, b: Spans) -> Report:
    """Rows for every name; differences are b - a in cycles, and the sum of `by_number` (more spans, as long as A's) and
    `by_length` (B's spans, longer each)."""
    rows: list[Report] = []
    for name in dict.fromkeys([*a.by_name, *b.by_name]):
        (n, x), (m, y) = a.by_name.get(name, (0, 0.0)), b.by_name.get(name, (0, 0.0))
        each = x / n if n else y / m if m else 0.0
        by_number = (m - n) * each
        where = "both" if n and m else "a" if n else "b"
        row = {"name": name, "in": where, "spans": [n, m], "cycles": [x, y], "difference": y - x}
        rows.append(row | {"by_number": by_number, "by_length": y - x - by_number})
    idle = [s.length - s.running if s.running is not None else None for s in (a, b)]
    return {
        "a": a.source,
        "b": b.source,
        "settings": {
            k: [a.about.get(k), b.about.get(k)]
            for k in ("machine", "mode", "ticks_per_cycle")
            if a.about.get(k) != b.about.get(k)
        },
        "cycles": [a.length, b.length],
        "difference": b.length - a.length,
        "idle": idle,
        "spans": sorted(rows, key=lambda row: -abs(row["difference"])),
    }


def profile_tables(report: Report) -> list[RenderableType]:
    """The comparison for people."""
    before, after = report["cycles"]
    out: list[RenderableType] = [f"A: {report['a']}\nB: {report['b']}"]
    out += [f"{name}: A {x}, B {y}" for name, (x, y) in report["settings"].items()]
    change = f" ({after / before - 1:+.2%})" if before else ""
    out.append(f"\n{before:,.0f} -> {after:,.0f} cycles{change}")
    if None not in report["idle"]:
        out.append(f"without any span: {report['idle'][0]:,.0f} -> {report['idle'][1]:,.0f} cycles")
    common = sum(row["in"] == "both" for row in report["spans"])
    if not common:
        out.append("no span has the same name on both sides: names are those of the compilers that made the programs")
    table = Table(title=f"spans: cycles by name, {common} names on both sides", title_justify="left")
    table.add_column("span")
    for name in ("A", "B", "difference", "by number", "by length"):
        table.add_column(name, justify="right")
    for row in report["spans"][:SHOWN]:
        label = row["name"] + (f" (only in {row['in'].upper()})" if row["in"] != "both" else "")
        sides = (f"{c:,.0f} in {n:,}" for n, c in zip(row["spans"], row["cycles"], strict=True))
        table.add_row(label, *sides, *(f"{row[key]:+,.0f}" for key in ("difference", "by_number", "by_length")))
    if rest := report["spans"][SHOWN:]:
        table.add_row(f"{len(rest)} more", "", "", f"{sum(r['difference'] for r in rest):+,.0f}", "", "")
    out.append(table)
    return out
