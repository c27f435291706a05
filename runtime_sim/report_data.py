"""The numbers of the HTML report, all from one Analysis; a table that says it sums to the makespan does."""

from __future__ import annotations

from itertools import islice
from typing import Any

from runtime_sim.analysis import BINS, MOMENTS, Analysis
from runtime_sim.engines import shortened
from runtime_sim.memory_timeline import Timeline
from runtime_sim.trace import LANES, spans

MAX_SPANS = 800  # of a lane
MAX_SEGMENTS = 400
MAX_GROUPS = 100
MAX_CAUSES = 12  # named for an engine
MAX_WRITERS = 9  # named in a memory


def report_data(analysis: Analysis) -> dict[str, Any]:
    """Everything the page shows, as a JSON object; cycles throughout. Timeline, account, roofline, memory and traffic
    are those of the unit that finishes last."""
    result = analysis.result
    unit, number = result.slowest, analysis.slowest
    every = list(spans(analysis, [unit]))
    lanes = [sorted((s for s in every if s.lane == n), key=lambda s: s.begin - s.end) for n in range(len(LANES))]
    kept = [s for lane in lanes for s in sorted(lane[:MAX_SPANS], key=lambda s: s.begin)]
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
        "spans": [[s.lane, s.name, s.begin, s.end] for s in kept],
        "spans_total": len(every),
        "engines": analysis.engine_totals(number),
        "causes": [{**row.to_json(), "cause": row.cause} for row in account],
        "operations": analysis.operations,
        "layers": analysis.layer_path,
        "path": list(islice(sorted(analysis.path, key=lambda s: s["begin"] - s["end"]), MAX_SEGMENTS)),
        "path_total": len(analysis.path),
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


def _live(line: Timeline) -> dict[str, Any]:
    """The moments with most live bytes in MOMENTS parts of the time, and what was live then by who wrote it."""
    moments, live = line.sampled(MOMENTS)
    order = sorted(range(len(line.names)), key=lambda n: -int(live[n].max()))
    named = {line.names[n]: live[n].tolist() for n in order[:MAX_WRITERS]}
    rest = live[order[MAX_WRITERS:]].sum(axis=0)
    if rest.any():
        named[f"{len(order) - MAX_WRITERS} others"] = rest.tolist()
    return {"moments": moments.tolist(), "live": named}
