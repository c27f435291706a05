"""Where every operation stands below the roofs of its unit: multipliers, its share of HBM, its DMA engines."""

from __future__ import annotations

from typing import Any

import numpy as np

from backend_rngd.isa.descriptors import FLIT_BYTES, Descriptor, Exec
from runtime_sim.sites import TRAFFIC, Sites
from runtime_sim.timing_result import TimingResult
from runtime_sim.timing_tables import covered

FLITS = 2  # that the contraction engine joins to a packet (hardware.md 2.8)


def products_per_lane(what: Descriptor) -> int:
    """Multiplications a cycle of a lane: 32 for 2-byte elements, 64 for 1-byte ones; 0 if it does not contract."""
    if not isinstance(what, Exec) or what.contract is None:
        return 0
    return FLITS * FLIT_BYTES // (what.fetch.cast or what.fetch.raw).bytes


def roofline(result: TimingResult, sites: Sites, unit: int) -> dict[str, Any]:
    """Roofs of a unit of a class, and a point for every operation it executes.

    intensity: MACs for each byte of HBM. attained, bound: MACs a cycle while any of the operation's instructions runs,
    and what the lowest roof (`by`: compute, HBM or DMA) allows; of operations without MACs, HBM bytes a cycle.
    hbm_share: of the card's bandwidth, an equal part for each unit on the card, at most what is there.
    """
    machine = result.machine
    mine = np.nonzero(result.flat.unit == unit)[0]
    slices = result.flat.streams[unit].slices
    first = result.classes.members[unit][0]
    card = result.topology.places[first].card
    sharing = sum(place.card == card for place in result.topology.places)
    engines = max(1, slices // machine.slices_per_pe) * machine.dma_engines_per_pe
    dma = float(engines * machine.dma_engine_bytes_per_cycle)
    share = machine.hbm_bytes_per_cycle / sharing
    per_cycle = slices * machine.trf_lanes
    memory, by = min((share, "HBM"), (dma, "DMA"))
    locations = np.array(result.locations, dtype=object).astype(str)[mine]
    names, group = np.unique(locations, return_inverse=True)
    products = sites.column([products_per_lane(x) for x in sites.instructions])[mine]
    macs, traffic = result.column("macs")[mine], sites.traffic[mine]
    points: list[dict[str, Any]] = []
    for number, location in enumerate(names.tolist()):
        inside = group == number
        amount, moved = int(macs[inside].sum()), [int(x) for x in traffic[inside].sum(axis=0)]
        busy = covered(result.start[mine[inside]], result.finish[mine[inside]])
        peak = per_cycle * int(products[inside].max())
        intensity = amount / moved[0] if moved[0] else None
        bound, limit = float(peak), "compute"
        if not amount:
            bound, limit = (memory, by) if moved[0] else (0.0, "")
        elif intensity is not None and intensity * memory < peak:
            bound, limit = intensity * memory, by
        points.append(
            {
                "location": location,
                "macs": amount,
                **dict(zip(TRAFFIC, moved, strict=True)),
                "cycles": busy,
                "intensity": intensity,
                "attained": (amount or moved[0]) / busy if busy else 0.0,
                "bound": bound,
                "by": limit,
            }
        )
    return {
        "points": points,
        "macs_per_cycle": per_cycle * FLITS * FLIT_BYTES // 2,
        "hbm_bytes_per_cycle": machine.hbm_bytes_per_cycle,
        "hbm_share_bytes_per_cycle": share,
        "dma_bytes_per_cycle": dma,
    }
