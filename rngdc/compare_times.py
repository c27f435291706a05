"""What changed between two reports of `rngdc simulate`: operations, causes and layers, which sum to the total.

Beside the cycles that an operation gained or lost on the critical path stand reasons: more or fewer instructions, bytes
and multiplications, longer or shorter waits for a named operation, contention on a named resource.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from rich.console import RenderableType
from rich.table import Table

from ir.errors import Problem, UserError

Report = dict[str, Any]
SHOWN = 12  # rows of a table for people
NEEDED = {"name", "cycles", "time_us", "operations", "stalls", "layer_path_cycles", "causes"}  # of a bucket
AMOUNTS = {
    "instructions": "instructions",
    "hbm_bytes": "bytes of HBM",
    "noc_bytes": "bytes between PEs",
    "pcie_bytes": "bytes between cards",
    "dm_bytes": "bytes of data memory",
    "macs": "multiplications",
}
NOTICED = 0.005  # a smaller relative change of an amount, or of a wait beside the operation's own cycles, is no reason


def load_report(path: Path) -> Report:
    """A file of `rngdc simulate --json`. Raises UserError if it is something else."""
    try:
        report: object = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError([Problem(f"{path} cannot be read", str(error), "give a file of `simulate --json`")]) from error
    found = cast(Report, report) if isinstance(report, dict) else {}
    buckets = cast(list[Any], found["buckets"]) if isinstance(found.get("buckets"), list) else [None]
    if not all(isinstance(b, dict) and set(cast(Report, b)) >= NEEDED for b in buckets):
        why = "its buckets do not have times by operation"
        raise UserError([Problem(f"{path} is no report of this version", why, "write it with `simulate OUT --json`")])
    return found


def compare_reports(a: Report, b: Report, names: list[str] | None) -> Report:
    """Rows for every bucket that both have (or the only ones of both): totals, operations, causes, layers, stalls.

    Differences are b - a in cycles. Operations and layers are matched by name; what only one side has counts as 0 on
    the other. Raises UserError if there is nothing to compare.
    """
    left, right = ({x["name"]: x for x in report["buckets"]} for report in (a, b))
    if names:
        wrong = [n for n in names if n not in left or n not in right]
        if wrong:
            why = f"A has {', '.join(left)}; B has {', '.join(right)}"
            raise UserError([Problem(f"--bucket {n} is not in both", why, "choose one that both have") for n in wrong])
        pairs = [(n, n) for n in dict.fromkeys(names)]
    else:
        pairs = [(n, n) for n in left if n in right]
        if not pairs and len(left) == len(right) == 1:
            pairs = [(next(iter(left)), next(iter(right)))]
    if not pairs:
        why = f"A has {', '.join(left)}; B has {', '.join(right)}"
        raise UserError([Problem("no bucket is in both", why, "build both with the same buckets")])
    matched_a, matched_b = {p[0] for p in pairs}, {p[1] for p in pairs}
    about = ("machine", "mode", "clock_ghz", "tensor", "pipeline", "replicas", "micro_batches", "what_if")
    return {
        "a": str(a.get("artifact")),
        "b": str(b.get("artifact")),
        "settings": {k: [a.get(k), b.get(k)] for k in about if a.get(k) != b.get(k)},
        "only_a": [] if names else [n for n in left if n not in matched_a],
        "only_b": [] if names else [n for n in right if n not in matched_b],
        "buckets": [_compare(left[x], right[y]) for x, y in pairs],
    }


def _compare(a: Report, b: Report) -> Report:
    before = {o["location"]: o for o in a["operations"]}
    after = {o["location"]: o for o in b["operations"]}
    operations: list[Report] = []
    causes: dict[str, list[float]] = {}
    for location in dict.fromkeys([*before, *after]):
        x, y = before.get(location), after.get(location)
        old: dict[str, float] = x["causes"] if x else {}
        new: dict[str, float] = y["causes"] if y else {}
        for side, table in enumerate((old, new)):
            for cause, cycles in table.items():
                causes.setdefault(cause, [0.0, 0.0])[side] += cycles
        operations.append(
            {
                "location": location,
                "in": "both" if x and y else "a" if x else "b",
                **{name: [x[name] if x else 0, y[name] if y else 0] for name in AMOUNTS},
                "reasons": _reasons(x, y),
                **_pair(x["path_cycles"] if x else 0.0, y["path_cycles"] if y else 0.0),
                "causes": {
                    cause: new.get(cause, 0.0) - old.get(cause, 0.0)
                    for cause in dict.fromkeys([*old, *new])
                    if new.get(cause, 0.0) != old.get(cause, 0.0)
                },
            }
        )
    layers = dict.fromkeys([*a["layer_path_cycles"], *b["layer_path_cycles"]])
    return {
        "a": a["name"],
        "b": b["name"],
        **_pair(a["cycles"], b["cycles"]),
        "time_us": [a["time_us"], b["time_us"]],
        "operations": _sorted(operations),
        "causes": _sorted([{"cause": cause, **_pair(x, y)} for cause, (x, y) in causes.items()]),
        "layers": [
            {"layer": n, **_pair(a["layer_path_cycles"].get(n, 0.0), b["layer_path_cycles"].get(n, 0.0))}
            for n in layers
        ],
        "engines": _sorted(_engines(a["causes"], b["causes"])),
        "stalls": _sorted(
            [
                {"context": context, "stall": stall, **_pair(cycles, b["stalls"][context][stall])}
                for context, row in a["stalls"].items()
                for stall, cycles in row.items()
                if cycles or b["stalls"][context][stall]
            ]
        ),
    }


def _reasons(x: Report | None, y: Report | None) -> list[str]:
    """Why an operation takes longer or shorter, in words, what moves most first."""
    if x is None or y is None:
        return []
    out: list[str] = []
    for name, words in AMOUNTS.items():
        before, after = x[name], y[name]
        if abs(after - before) > NOTICED * max(before, after):
            out.append(f"{'more' if after > before else 'fewer'} {words} ({before:,} -> {after:,})")
    waits: dict[str, float] = {}
    for cause in dict.fromkeys([*x["waits"], *y["waits"]]):
        waits[cause] = y["waits"].get(cause, 0.0) - x["waits"].get(cause, 0.0)
    own = max(sum(row[c] for c in ("main", "sub", "dma")) for row in (x, y))
    for cause, cycles in sorted(waits.items(), key=lambda item: -abs(item[1])):
        if abs(cycles) > max(1.0, NOTICED * own):
            what = cause if cause.startswith(("contention", "vector", "sync")) else f"waiting for {cause}"
            out.append(f"{'more' if cycles > 0 else 'less'} {what} ({cycles:+,.0f} cycles)")
    return out


def _engines(a: list[Report], b: list[Report]) -> list[Report]:
    """What engines did, by kind and by the operation or resource that it was for; the rows of an engine sum to the
    difference of the makespans."""
    cycles: dict[tuple[str, str, str], list[float]] = {}
    for side, rows in enumerate((a, b)):
        for row in rows:
            on = row.get("instruction")
            # Numbers of instructions change from build to build: what counts is the operation.
            by = f"{on['context']} {on['location'].replace('|', ' ').strip()}" if on else ""
            cause = " ".join(x for x in (row.get("resource", ""), by) if x) or ("others" if row.get("others") else "")
            cycles.setdefault((row["engine"], row["kind"], cause), [0.0, 0.0])[side] += row["cycles"]
    return [
        {"engine": engine, "kind": kind, "cause": cause, **_pair(x, y)}
        for (engine, kind, cause), (x, y) in cycles.items()
    ]


def _pair(before: float, after: float) -> Report:
    return {"cycles": [before, after], "difference": after - before}


def _sorted(rows: list[Report]) -> list[Report]:
    return sorted(rows, key=lambda row: -abs(row["difference"]))


def compare_tables(report: Report) -> list[RenderableType]:
    """The comparison for people: totals, then what changed most."""
    out: list[RenderableType] = [f"A: {report['a']}\nB: {report['b']}"]
    out += [f"{name}: A {x}, B {y}" for name, (x, y) in report["settings"].items()]
    for side in ("a", "b"):
        if report[f"only_{side}"]:
            out.append(f"only in {side.upper()}: {', '.join(report[f'only_{side}'])}")
    for b in report["buckets"]:
        (before, after), (us_before, us_after) = b["cycles"], b["time_us"]
        name = b["a"] if b["a"] == b["b"] else f"{b['a']} and {b['b']}"
        change = f"{b['difference'] / before:+.2%}" if before else "new"
        total = f"{before:,.0f} -> {after:,.0f} cycles ({b['difference']:+,.0f}, {change})"
        out.append(f"\n{name}: {total}, {us_before:,.1f} -> {us_after:,.1f} us")
        for title, key in (("operation", "operations"), ("cause", "causes"), ("layer", "layers")):
            table = _table(b[key], title, key)
            if table is not None:
                out.append(table)
        if engines := _table(b["engines"], "engine", "engines"):
            out.append(engines)
    return out


def _table(rows: list[Report], title: str, key: str) -> Table | None:
    # That an engine ends earlier or later says nothing new.
    changed = _sorted([r for r in rows if abs(r["difference"]) > 1e-6 and r.get("kind") != "tail"])
    if not changed:
        return None
    of = "cycles of the unit that finishes last" if key == "engines" else "cycles of the critical path"
    table = Table(title=f"{key}: {of}", title_justify="left")
    table.add_column(title)
    for name in ("A", "B", "difference"):
        table.add_column(name, justify="right")
    if key == "operations":
        table.add_column("by cause")
        table.add_column("reasons")
    for row in changed[:SHOWN]:
        label = row.get("location", row.get(title))
        if key == "engines":
            label = f"{row['engine']} {row['kind']} {row['cause']}"
        label = str(label).replace("|", " ").strip()
        if row.get("in", "both") != "both":
            label += f" (only in {row['in'].upper()})"
        cells = [label, *(f"{x:,.0f}" for x in row["cycles"]), f"{row['difference']:+,.0f}"]
        if key == "operations":
            causes = sorted(row["causes"].items(), key=lambda item: -abs(item[1]))
            cells.append(", ".join(f"{name} {cycles:+,.0f}" for name, cycles in causes[:3] if abs(cycles) >= 0.5))
            cells.append("; ".join(row["reasons"][:3]))
        table.add_row(*cells)
    if rest := changed[SHOWN:]:
        last = [f"{len(rest)} more", "", "", f"{sum(r['difference'] for r in rest):+,.0f}"]
        table.add_row(*last, *(["", ""] if key == "operations" else []))
    return table
