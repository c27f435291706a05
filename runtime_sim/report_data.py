"""The numbers of the HTML report, all from one Analysis; a table that says it sums to the makespan does."""

from __future__ import annotations

from typing import Any

from runtime_sim.analysis import BINS, MOMENTS, Analysis
from runtime_sim.engines import shortened
from runtime_sim.memory_timeline import Timeline
from runtime_sim.trace import LANES, spans

MAX_SPANS = 800  # of a lane; in a longer one neighbours too small to see are drawn as one
SMALLEST = 2000  # parts of the makespan that are seen
WIDEST = 8  # of those parts that a rectangle may join
MAX_GROUPS = 100
MAX_CAUSES = 12  # named for an engine
MAX_WRITERS = 9  # named in a memory


def report_data(analysis: Analysis) -> dict[str, Any]:
    """Everything the page shows, as a JSON object; cycles throughout. Timeline, account, roofline, memory and traffic
    are those of the unit that finishes last."""
    result = analysis.result
    unit, number = result.slowest, analysis.slowest
    every = list(spans(analysis, [unit]))
    lanes = [
        _joined([(s.name, s.begin, s.end) for s in every if s.lane == lane], result.cycles)
        for lane in range(len(LANES))
    ]
    path = [(_where(s), s["begin"], s["end"]) for s in analysis.path]
    account = shortened(analysis.charges(number), MAX_CAUSES)
    return {
        "machine": result.machine.name,
        "mode": result.machine.mode,
        "cycles": result.cycles,
        "microseconds": result.seconds * 1e6,
        "instructions": result.instructions,
        "unit": unit,
        "unit_name": result.topology.describe(unit),
        "units": result.units,
        "mac_utilisation": result.mac_utilisation,
        "hbm_utilisation": result.hbm_utilisation,
        "collective_share": result.collective_share,
        "energy_joules": [watts * result.seconds for watts in result.power],
        "bounds": result.bounds.to_json() if result.bounds is not None else None,
        "lanes": list(LANES),
        "spans": [[lane, *drawn] for lane, all_drawn in enumerate(lanes) for drawn in all_drawn],
        "spans_total": len(every),
        "engines": analysis.engine_totals(number),
        "causes": [{**row.to_json(), "cause": row.cause} for row in account],
        "operations": analysis.operations,
        "layers": analysis.layer_path,
        "path": [list(drawn) for drawn in _joined(path, result.cycles)],
        "path_total": len(path),
        "path_groups": sorted(analysis.path_groups, key=lambda g: -g["cycles"])[:MAX_GROUPS],
        "roofline": analysis.roofline,
        "rates": {"bin_cycles": (result.cycles or 1.0) / BINS, **analysis.rates(number)},
        "memory": [
            {**row, **_live(line)}
            for row, line in zip(
                analysis.memory(number), (analysis.data_memory(number), analysis.hbm(number)), strict=False
            )
            if line is not None
        ],
    }


Drawn = tuple[str, float, float, int]  # name, begin, end, how many


def _where(segment: dict[str, Any]) -> str:
    """Operation, layer, unit and context of a segment of the critical path."""
    operation = segment["location"].replace("|", " ").strip()
    return f"{operation}\n{segment['layer']}, unit {segment['unit']} {segment['context']}"


def _joined(items: list[tuple[str, float, float]], cycles: float) -> list[Drawn]:
    """What is drawn of a lane: everything if it is little, else neighbours too small to see as one rectangle, named
    after the one that takes most of it. Items are in order of time."""
    if len(items) <= MAX_SPANS:
        return [(name, begin, end, 1) for name, begin, end in items]
    small = cycles / SMALLEST
    out: list[Drawn] = []
    group: list[tuple[str, float, float]] = []

    def close() -> None:
        if group:
            total: dict[str, float] = {}
            for name, begin, end in group:
                total[name] = total.get(name, 0.0) + end - begin
            out.append((max(total, key=lambda name: total[name]), group[0][1], group[-1][2], len(group)))
            group.clear()

    for name, begin, end in items:
        if group and (begin - group[-1][2] > small or end - group[0][1] > WIDEST * small):
            close()
        if end - begin > small:
            close()
            out.append((name, begin, end, 1))
        else:
            group.append((name, begin, end))
    close()
    return out


def _live(line: Timeline) -> dict[str, Any]:
    """The moments with most live bytes in MOMENTS parts of the time, and what was live then by who wrote it."""
    moments, live = line.sampled(MOMENTS)
    order = sorted(range(len(line.names)), key=lambda n: -int(live[n].max()))
    named = {line.names[n]: live[n].tolist() for n in order[:MAX_WRITERS]}
    rest = live[order[MAX_WRITERS:]].sum(axis=0)
    if rest.any():
        named[f"{len(order) - MAX_WRITERS} others"] = rest.tolist()
    return {"moments": moments.tolist(), "live": named}
