"""`rngdc simulate`: times of an artifact's programs as JSON and as tables."""

from __future__ import annotations

import math
from typing import Any

from rich.console import RenderableType
from rich.table import Table

from backend_rngd.artifact import Bucket
from ir.errors import Problem, UserError
from runtime_sim.analysis import Analysis
from runtime_sim.engines import KINDS, shortened
from runtime_sim.hbm_requests import WindowError, hbm_requests
from runtime_sim.runtime import Device
from runtime_sim.timing_result import TimingResult
from runtime_sim.what_if import WhatIf

MOST_CAUSES = 40  # named for an engine; the rest is summed
STALLED = ("wait", "sync", "contention")
SHOWN = 10  # operations shown to people
PER_UNIT = (
    "unit", "card", "pe", "replica", "stage", "rank", "alike", "main", "sub", "dma", "vector", "collective_cycles",
    "hbm_read_bytes", "hbm_write_bytes", "dm_utilisation", "cluster_bytes", "chip_bytes", "card_bytes",
)  # fmt: skip


def simulate_report(
    device: Device, buckets: list[Bucket], analyses: list[Analysis], repeats: int = 1
) -> dict[str, Any]:
    """The report of `rngdc simulate --json`, of buckets and their analyses.

    Engines and utilisations are shares of the program's time. `account` (cycles of every engine by kind) and `causes`
    (the same by named instruction or resource) are those of the unit that finishes last, and sum to its time.
    """
    machine, topology = device.machine, device.system.topology
    return {
        "artifact": str(device.artifact.directory),
        "machine": machine.name,
        "mode": machine.mode,
        "clock_ghz": machine.clock_hz * machine.clock_scale / 1e9,
        "tensor": topology.tensor,
        "pipeline": topology.pipeline,
        "replicas": topology.replicas,
        "cards": topology.cards,
        "micro_batches": repeats,
        "buckets": [_bucket(b, a) for b, a in zip(buckets, analyses, strict=True)],
    }


def add_what_if(report: dict[str, Any], what_if: WhatIf, before: dict[str, float]) -> None:
    """Say which parameters were changed, and add to every bucket its cycles on the machine as described."""
    report["what_if"] = what_if.to_json()
    for b in report["buckets"]:
        b["unchanged_cycles"] = before[b["name"]]


def _bounds_table(report: dict[str, Any]) -> Table:
    """What no schedule of these instructions can leave, and the energy of a token."""
    table = Table(title="bounds of the time, and board energy", title_justify="left")
    table.add_column("bucket")
    for name in ("at least", "cycles", "at most", "power", "a token"):
        table.add_column(name, justify="right")
    table.add_column("bound by")
    for b in report["buckets"]:
        limits = b["bounds"]
        table.add_row(
            b["name"], f"{limits['lower']:,.0f}", f"{b['cycles']:,.0f}", f"{limits['upper']:,.0f}",
            "{:.0f} to {:.0f} W".format(*b["power_watts"]),
            "{:.3g} to {:.3g} mJ".format(*(1e3 * x for x in b["energy_per_token_joules"])), limits["binds"],
        )  # fmt: skip
    return table


def _what_if_tables(report: dict[str, Any]) -> list[RenderableType]:
    changed = report.get("what_if")
    if changed is None:
        return []
    table = Table(title="what if: " + "; ".join(
        [*(f"ideal {name}" for name in changed["ideal"])]
        + [f"{c['name']} {c['before']:g} -> {c['after']:g} {c['unit']}" for c in changed["changes"]]
    ))  # fmt: skip
    table.add_column("bucket")
    for name in ("cycles as described", "cycles changed", "times faster"):
        table.add_column(name, justify="right")
    for b in report["buckets"]:
        ratio = b["unchanged_cycles"] / b["cycles"] if b["cycles"] else 1.0
        table.add_row(b["name"], f"{b['unchanged_cycles']:,.0f}", f"{b['cycles']:,.0f}", f"{ratio:.3f}")
    return [table]


def _bucket(bucket: Bucket, analysis: Analysis) -> dict[str, Any]:
    result, number = analysis.result, analysis.slowest
    slowest = result.slowest
    tokens = bucket.batch * bucket.input_length
    account = shortened(analysis.charges(number), MOST_CAUSES)
    return {
        "name": bucket.name,
        "phase": bucket.phase,
        "batch": bucket.batch,
        "input_length": bucket.input_length,
        "attention_size": bucket.attention_size,
        "instructions": result.instructions,
        "cycles": result.cycles,
        "time_us": result.seconds * 1e6,
        "time_with_host_us": result.seconds * 1e6 + result.machine.host_step_us,
        "mac_utilization": result.mac_utilisation,
        "hbm_bytes_read": result.hbm_read_bytes,
        "hbm_bytes_written": result.hbm_write_bytes,
        "hbm_utilization": result.hbm_utilisation,
        "collective_share": result.collective_share,
        "engines": result.engines(),
        "stalls": result.stalls[slowest],
        "layers": [{"name": layer.name.split("|")[0], "cycles": layer.advance} for layer in result.layers_of()],
        "layer_path_cycles": analysis.layer_path,
        "operations": analysis.operations,
        "account": analysis.engine_totals(number),
        "causes": [{**row.to_json(), "cause": row.cause} for row in account],
        "critical_path": {"instructions": len(result.critical_path), "groups": analysis.path_groups},
        "roofs": {name: value for name, value in analysis.roofline.items() if name != "points"},
        "memory": analysis.memory(number),
        "units": [{key: row[key] for key in PER_UNIT if key in row} for row in result.per_unit],
        "energy_joules": result.energy_joules(),
        "power_watts": list(result.power),
        "energy_per_token_joules": [watts * result.seconds / tokens for watts in result.power],
        "bounds": result.bounds.to_json() if result.bounds is not None else None,
    }


def add_hbm_requests(report: dict[str, Any], result: TimingResult, window: str) -> None:
    """Play the window START:END request by request, on every card. Raises UserError for a window that is none."""
    flag = f"--hbm-requests {window}"
    try:
        start, end = (float(part) for part in window.split(":"))
    except ValueError:
        start = end = 0.0
    if not 0 <= start < end < math.inf:
        raise UserError([Problem(flag, "a window is two cycles, the first one smaller", "write START:END, as 0:50000")])
    try:
        cards = [hbm_requests(result, start, end, card) for card in range(result.topology.cards)]
    except WindowError as error:
        raise UserError([Problem(flag, f"{error.what}: {error.why}", error.fix)]) from None
    report["hbm_requests"] = [c.to_json(result.machine) for c in cards]


def _request_tables(report: dict[str, Any]) -> list[RenderableType]:
    if "hbm_requests" not in report:
        return []
    table = Table(title="HBM request by request, and as the result has it", title_justify="left")
    table.add_column("card")
    for name in ("transfers", "lines", "cycles", "as fluid", "difference", "of the engines' time", "of a transfer"):
        table.add_column(name, justify="right")
    for c in report["hbm_requests"]:
        table.add_row(
            str(c["card"]), f"{c['transfers']:,}", f"{c['lines']:,}", f"{c['requests']:,.0f}", f"{c['fluid']:,.0f}",
            f"{c['difference']:+.1%}", f"{c['busy_difference']:+.1%}", f"{c['median']:+.1%}",
        )  # fmt: skip
    return [table]


def simulate_tables(report: dict[str, Any]) -> list[RenderableType]:
    """The report for people."""
    several = report["tensor"] * report["pipeline"] * report["replicas"] > 1
    spread = ""
    if several:
        spread = (
            f", tensor {report['tensor']}, pipeline {report['pipeline']}, data {report['replicas']} on "
            f"{report['cards']} card(s)"
        )
        spread += f", {report['micro_batches']} runs in flight" if report["micro_batches"] > 1 else ""
    table = Table(title=f"{report['machine']}, {report['mode']} mode, {report['clock_ghz']:.3g} GHz{spread}")
    table.add_column("bucket")
    names = ["instructions", "cycles", "time", "MAC", "HBM", "HBM read", "main", "sub", "dma", "vector"]
    for name in [*names, *(["collectives"] if several else [])]:
        table.add_column(name, justify="right")
    for b in report["buckets"]:
        shares = [f"{b['engines'][name]:.0%}" for name in ("main", "sub", "dma", "vector")]
        table.add_row(
            b["name"], f"{b['instructions']:,}", f"{b['cycles']:,.0f}", f"{b['time_us']:,.1f} us",
            f"{b['mac_utilization']:.1%}", f"{b['hbm_utilization']:.1%}", f"{b['hbm_bytes_read'] / 1e6:,.1f} MB",
            *shares, *([f"{b['collective_share']:.1%}"] if several else []),
        )  # fmt: skip
    out: list[RenderableType] = [table, _bounds_table(report), *_what_if_tables(report), *_request_tables(report)]
    return out + _explanation(report["buckets"][0]) if len(report["buckets"]) == 1 else out


def _explanation(b: dict[str, Any]) -> list[RenderableType]:
    """Of one program: what its engines do, the operations on the critical path, and memory."""
    total = b["cycles"] or 1.0
    account = Table(title="share of the time, of the unit that finishes last", title_justify="left")
    account.add_column("engine")
    for kind in KINDS:
        account.add_column(kind, justify="right")
    account.add_column("waits most for")
    for engine, kinds in b["account"].items():
        waits = [c for c in b["causes"] if c["engine"] == engine and c["kind"] in STALLED and not c.get("others")]
        most = max(waits, key=lambda c: c["cycles"], default=None)
        cause = f"{most['cause']} {most['cycles'] / total:.0%}" if most else ""
        account.add_row(engine, *(f"{kinds[kind] / total:.1%}" for kind in KINDS), cause)
    operations = Table(title="operations on the critical path", title_justify="left")
    operations.add_column("operation")
    for name in ("cycles", "share", "HBM", "of its roof"):
        operations.add_column(name, justify="right")
    operations.add_column("why")
    for o in b["operations"][:SHOWN]:
        causes = sorted(o["causes"].items(), key=lambda item: -item[1])[:2]
        roof = f"{o['attained'] / o['bound']:.0%} ({o['by']})" if o["bound"] else ""
        operations.add_row(
            o["location"].replace("|", " ").strip(), f"{o['path_cycles']:,.0f}", f"{o['path_cycles'] / total:.1%}",
            f"{o['hbm_bytes'] / 1e6:,.1f} MB", roof, ", ".join(f"{k} {v:,.0f}" for k, v in causes),
        )  # fmt: skip
    memory = [
        f"{m['memory']}: at most {m['peak_bytes'] / 1e6:,.2f} of {m['capacity'] / 1e6:,.2f} MB live"
        + "".join(f", {name} {size / 1e6:,.1f} MB" for name, size in m["resident"].items() if size)
        for m in b["memory"]
    ]
    return [account, operations, *memory]
