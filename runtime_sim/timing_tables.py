"""Tables of a timing run: layers, operations, units, cards, and the JSON object with all of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from runtime_sim.traffic import CARD_IN, CARD_OUT, DM, HBM

if TYPE_CHECKING:
    from runtime_sim.timing_result import TimingResult

CONTEXTS = ("main", "sub", "dma")


@dataclass(frozen=True)
class Layer:
    """One call of the entry routine of a represented unit. advance: how much later everything so far is complete than
    before this call."""

    name: str
    routine: str
    unit: int
    start: float
    end: float
    advance: float
    instructions: int


@dataclass(frozen=True)
class Operation:
    """All instructions of one source location. stalled: idle cycles of their contexts right before them."""

    location: str
    instructions: int
    main: float
    sub: float
    dma: float
    stalled: float
    macs: int
    moved_bytes: int


def layers(result: TimingResult) -> list[Layer]:
    """Calls made by the entry routine of the represented units, in order."""
    out: list[Layer] = []
    done: dict[int, float] = {}
    for call in result.flat.calls:
        if call.depth != 1 or call.end == call.first:
            continue
        stream = result.flat.streams[call.unit]
        parent = result.flat.calls[call.parent]
        location = stream.routines[parent.routine].instructions[call.index].location
        end = float(result.finish[call.first : call.end].max())
        unit = result.classes.members[call.unit][0]
        before = done.get(unit, 0.0)
        done[unit] = max(before, end)
        out.append(
            Layer(
                stream.locations[location],
                stream.routines[call.routine].name,
                unit,
                float(result.start[call.first : call.end].min()),
                end,
                max(0.0, end - before),
                call.end - call.first,
            )
        )
    return out


def operations(result: TimingResult) -> list[Operation]:
    """Cycles of every source location over all calls and units, the costliest first."""
    names, group = np.unique(np.array(result.locations, dtype=object).astype(str), return_inverse=True)
    size = len(names)

    def total(values: NDArray[Any], where: NDArray[np.bool_] | None = None) -> NDArray[np.float64]:
        use = (values if where is None else np.where(where, values, 0)) * result.copies
        return np.bincount(group, weights=use.astype(np.float64), minlength=size).astype(np.float64)

    duration = result.finish - result.start
    by_context = [total(duration, result.flat.context == c) for c in range(3)]
    stalled = total(result.gaps[:, 0] + result.gaps[:, 1])
    macs, moved = total(result.column("macs")), total(result.column("moved_bytes"))
    counts = total(np.ones(len(result.flat)))
    rows = [
        Operation(
            str(names[g]),
            int(counts[g]),
            float(by_context[0][g]),
            float(by_context[1][g]),
            float(by_context[2][g]),
            float(stalled[g]),
            int(macs[g]),
            int(moved[g]),
        )
        for g in range(size)
    ]
    return sorted(rows, key=lambda r: -(r.main + r.sub + r.dma))


def per_unit(result: TimingResult) -> list[dict[str, Any]]:
    """A row a unit: place, shares of the makespan, bytes. `alike`: the first unit that does the same.

    dm_utilisation: share of the data memory's port, transfers of peers included. cluster_bytes, chip_bytes,
    card_bytes: moved by this unit from or to its cluster, the other cluster and other cards. collective_cycles: in
    which at least one instruction of a collective is at work or waits.
    """
    rows: list[dict[str, Any]] = []
    port = result.machine.dm_port_bytes_per_cycle
    reach = np.array([c.reach for c in result.costs]).reshape(-1, 4)[result.number]
    moved = result.column("moved_bytes")
    for number, members in enumerate(result.classes.members):
        mine = result.flat.unit == number
        first = members[0]
        dm = result.load.get((DM, first), 0.0)
        engines = max(1, result.flat.streams[number].slices // result.machine.slices_per_pe)
        _, cluster, chip, card = ((moved[mine, None] * reach[mine]).sum(axis=0).tolist()) if mine.any() else [0.0] * 4
        rows.append(
            {
                "alike": first,
                "finish": float(result.finish[mine].max()) if mine.any() else 0.0,
                "instructions": int(mine.sum()),
                **result.engines(first),
                "wait_sync_cycles": {name: result.stalls[first][name]["wait_sync"] for name in CONTEXTS},
                "collective_cycles": covered(
                    result.start[mine & result.collective], result.finish[mine & result.collective]
                ),
                "hbm_read_bytes": int(result.column("read_bytes")[mine].sum()),
                "hbm_write_bytes": int(result.column("write_bytes")[mine].sum()),
                "dm_bytes": dm,
                "dm_utilisation": dm / (result.cycles * port * engines) if result.cycles else 0.0,
                "cluster_bytes": cluster,
                "chip_bytes": chip,
                "card_bytes": card,
            }
        )
    out: list[dict[str, Any]] = []
    for unit, place in enumerate(result.topology.places):
        where = {"card": place.card, "pe": place.pe, "replica": place.replica, "stage": place.stage}
        out.append({"unit": unit, **where, "rank": place.rank, **rows[result.classes.of_unit[unit]]})
    return out


def per_card(result: TimingResult) -> list[dict[str, Any]]:
    """A row a card: bytes of HBM lines and of its link, and their shares of the peak."""
    out: list[dict[str, Any]] = []
    total = result.cycles or 1.0
    for card in sorted({p.card for p in result.topology.places}):
        hbm = result.load.get((HBM, card), 0.0)
        sent, received = result.load.get((CARD_OUT, card), 0.0), result.load.get((CARD_IN, card), 0.0)
        row = {"card": card, "hbm_bytes": hbm, "hbm_utilisation": hbm / total / result.machine.hbm_bytes_per_cycle}
        link = total * result.machine.pcie_peer_bytes_per_cycle
        out.append(
            row | {"sent_bytes": sent, "received_bytes": received, "link_utilisation": max(sent, received) / link}
        )
    return out


def to_json(result: TimingResult, instructions: bool = False) -> dict[str, Any]:
    """JSON object; with `instructions` also one row an executed instruction of the represented units."""
    path = result.critical_path
    on_path = dict.fromkeys(CONTEXTS, 0.0)
    for i, cycles in zip(path, result.path_cycles, strict=True):
        on_path[CONTEXTS[int(result.flat.context[i])]] += cycles
    bottlenecks = [cost.bottleneck for cost in result.costs]
    out: dict[str, Any] = {
        "format": "rngdc-timing",
        "version": {"major": 1, "minor": 1},
        "machine": result.machine.name,
        "mode": result.machine.mode,
        "machine_digest": result.machine.digest(),
        "cycles": result.cycles,
        "seconds": result.seconds,
        "bounds": result.bounds.to_json() if result.bounds else None,
        "units": result.units,
        "cards": result.topology.cards,
        "tensor": result.topology.tensor,
        "pipeline": result.topology.pipeline,
        "replicas": result.topology.replicas,
        "instructions_executed": result.instructions,
        "macs": result.macs,
        "mac_utilisation": result.mac_utilisation,
        "hbm_read_bytes": result.hbm_read_bytes,
        "hbm_write_bytes": result.hbm_write_bytes,
        "hbm_utilisation": result.hbm_utilisation,
        "energy_joules": result.energy_joules(),
        "power_watts": list(result.power),
        "collective_share": result.collective_share,
        "stalls": result.stalls,
        "critical_path": {"instructions": len(path), "cycles_by_context": on_path},
        "layers": [asdict(layer) for layer in result.layers],
        "operations": [asdict(operation) for operation in result.operations],
        "per_unit": result.per_unit,
        "per_card": result.per_card,
    }
    if instructions:
        representatives = result.classes.representatives
        out["instructions"] = {
            "unit": [representatives[c] for c in result.flat.unit.tolist()],
            "context": [CONTEXTS[c] for c in result.flat.context.tolist()],
            "location": result.locations,
            "start": result.start.tolist(),
            "finish": result.finish.tolist(),
            "cause": result.cause.tolist(),
            "bottleneck": [bottlenecks[int(c)] for c in result.number],
        }
    return out


def covered(start: NDArray[np.float64], finish: NDArray[np.float64]) -> float:
    """Length of the union of intervals."""
    if not len(start):
        return 0.0
    order = np.argsort(start, kind="stable")
    start, reached = start[order], np.maximum.accumulate(finish[order])
    begin = np.maximum(start, np.concatenate([[start[0]], reached[:-1]]))
    return float(np.maximum(reached - begin, 0.0).sum())
