"""What changed between two reports of `rngdc simulate`: operations, causes and layers, which sum to the total."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from rich.console import RenderableType
from rich.table import Table

from ir.errors import Problem, UserError

Report = dict[str, Any]
SHOWN = 12  # rows of a table for people
NEEDED = {"name", "cycles", "time_us", "operations", "stalls", "layer_path_cycles"}  # of a bucket


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
                "instructions": [x["instructions"] if x else 0, y["instructions"] if y else 0],
                "moved_bytes": [x["moved_bytes"] if x else 0, y["moved_bytes"] if y else 0],
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
        "stalls": _sorted(
            [
                {"context": context, "stall": stall, **_pair(cycles, b["stalls"][context][stall])}
                for context, row in a["stalls"].items()
                for stall, cycles in row.items()
                if cycles or b["stalls"][context][stall]
            ]
        ),
    }


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
        if stalls := _table(b["stalls"], "context", "stalls"):
            out.append(stalls)
    return out


def _table(rows: list[Report], title: str, key: str) -> Table | None:
    changed = _sorted([r for r in rows if abs(r["difference"]) > 1e-6])
    if not changed:
        return None
    of = "cycles of the contexts" if key == "stalls" else "cycles of the critical path"
    table = Table(title=f"{key}: {of}", title_justify="left")
    table.add_column(title)
    for name in ("A", "B", "difference"):
        table.add_column(name, justify="right")
    if key == "operations":
        table.add_column("by cause")
    for row in changed[:SHOWN]:
        label = f"{row['context']} {row['stall']}" if key == "stalls" else row.get("location", row.get(title))
        label = str(label).replace("|", " ").strip()
        if row.get("in", "both") != "both":
            label += f" (only in {row['in'].upper()})"
        cells = [label, *(f"{x:,.0f}" for x in row["cycles"]), f"{row['difference']:+,.0f}"]
        if key == "operations":
            causes = sorted(row["causes"].items(), key=lambda item: -abs(item[1]))
            cells.append(", ".join(f"{name} {cycles:+,.0f}" for name, cycles in causes[:3] if abs(cycles) >= 0.5))
        table.add_row(*cells)
    if rest := changed[SHOWN:]:
        last = [f"{len(rest)} more", "", "", f"{sum(r['difference'] for r in rest):+,.0f}"]
        table.add_row(*last, *([""] if key == "operations" else []))
    return table
