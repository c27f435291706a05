"""The numbers of the HTML report, all from a TimingResult; a table that says it sums to the makespan does."""

from __future__ import annotations

from collections import defaultdict
from itertools import islice
from typing import Any

import numpy as np

from runtime_sim.accounting import layer_path, operation_rows, path_segments
from runtime_sim.timing_result import TimingResult
from runtime_sim.timing_tables import covered
from runtime_sim.trace import LANES, spans

MAX_SPANS = 3000
MAX_SEGMENTS = 400
BINS = 200
MACS_PER_SLICE = 8 * 32  # bf16 multipliers: lanes by columns (as in `TimingResult.mac_utilisation`)


def report_data(result: TimingResult) -> dict[str, Any]:
    """Everything the page shows, as a JSON object; cycles throughout. Timeline, roofline and traffic are those of the
    unit that finishes last."""
    unit = result.slowest
    every = [s for s in spans(result) if s.unit == unit]
    kept = sorted(every, key=lambda s: s.begin - s.end)[:MAX_SPANS]
    segments = path_segments(result)
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
        "energy_joules": result.energy_joules(),
        "lanes": list(LANES),
        "spans": [[s.lane, s.name, s.begin, s.end] for s in sorted(kept, key=lambda s: (s.lane, s.begin))],
        "spans_total": len(every),
        "stalls": result.stalls[unit],
        "operations": operation_rows(result),
        "layers": layer_path(result),
        "path": list(islice(sorted(segments, key=lambda s: s["begin"] - s["end"]), MAX_SEGMENTS)),
        "path_total": len(segments),
        "roofline": _roofline(result, unit),
        "traffic": _traffic(result, unit),
    }


def _roofline(result: TimingResult, unit: int) -> dict[str, Any]:
    """Of every operation of a unit: MACs, HBM bytes and the cycles in which any of its instructions runs."""
    number = result.classes.of_unit[unit]
    groups: dict[str, list[int]] = defaultdict(list)
    for i in np.nonzero(result.flat.unit == number)[0].tolist():
        groups[result.locations[i]].append(i)
    macs = result.column("macs")
    moved = result.column("read_bytes") + result.column("write_bytes")
    points: list[dict[str, Any]] = []
    for location, members in groups.items():
        points.append(
            {
                "location": location,
                "macs": int(macs[members].sum()),
                "hbm_bytes": int(moved[members].sum()),
                "cycles": covered(result.start[members], result.finish[members]),
            }
        )
    machine = result.machine
    slices = result.flat.streams[number].slices
    engines = max(1, slices // machine.slices_per_pe) * machine.dma_engines_per_pe
    return {
        "points": points,
        "macs_per_cycle": slices * MACS_PER_SLICE,
        "hbm_bytes_per_cycle": machine.hbm_bytes_per_cycle,
        "dma_bytes_per_cycle": engines * machine.dma_engine_bytes_per_cycle,
    }


def _traffic(result: TimingResult, unit: int) -> dict[str, Any]:
    """HBM bytes that a unit reads and writes in each of BINS equal parts of the makespan; a transfer's bytes are spread
    evenly over the time between its start-up and its end."""
    mine = result.flat.unit == result.classes.of_unit[unit]
    width = (result.cycles or 1.0) / BINS
    edges = np.arange(BINS + 1) * width
    begin = (result.start + result.column("overhead"))[mine]
    end = result.finish[mine]
    out: dict[str, Any] = {"bin_cycles": width}
    for name in ("read_bytes", "write_bytes"):
        total = np.zeros(BINS)
        moved = result.column(name)[mine]
        for a, b, amount in zip(begin.tolist(), end.tolist(), moved.tolist(), strict=True):
            if not amount:
                continue
            if b - a <= 0:
                total[min(BINS - 1, int(b / width))] += amount
                continue
            first, last = int(a / width), min(BINS - 1, int(b / width))
            inside = np.minimum(edges[first + 1 : last + 2], b) - np.maximum(edges[first : last + 1], a)
            total[first : last + 1] += amount * inside / inside.sum()
        out[name] = total.tolist()
    return out
