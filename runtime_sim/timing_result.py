"""The result of a timing run: totals, exact stall accounting, critical path, per-layer and per-operation tables."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backend_rngd.isa.descriptors import Context
from backend_rngd.machine import Machine
from runtime_sim.costs import Cost
from runtime_sim.flatten import Flat

CONTEXTS = ("main", "sub", "dma")
STALLS = (
    "busy",  # data moves or is computed
    "issue",  # issue, pipeline fill, DMA start-up
    "wait_main",  # waiting for an instruction of the main context
    "wait_sub",
    "wait_dma",
    "contention_vector",  # the other context holds the vector engine
    "contention_hbm",  # transfers of other units take a share of the bandwidth
    "tail",  # nothing left to do
)


@dataclass(frozen=True)
class Layer:
    """One call of the entry routine. advance: how much later everything so far is complete than before this call."""

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


@dataclass(frozen=True)
class TimingResult:
    """Times are cycles of the tensor clock; arrays have one entry an executed instruction, in program order.

    start, ready (dependencies met and context free), finish; cause: instruction whose completion made it ready (-1:
    none). `number` says which of `costs` an instruction has.
    """

    machine: Machine
    flat: Flat
    costs: list[Cost]
    number: NDArray[np.int64]
    start: NDArray[np.float64]
    ready: NDArray[np.float64]
    finish: NDArray[np.float64]
    cause: NDArray[np.int64]

    def _column(self, name: str) -> NDArray[Any]:
        return np.array([getattr(c, name) for c in self.costs])[self.number] if len(self.flat) else np.zeros(0)

    @cached_property
    def cycles(self) -> float:
        """Makespan."""
        return float(self.finish.max()) if len(self.flat) else 0.0

    @property
    def seconds(self) -> float:
        """Makespan at the machine's clock."""
        return self.cycles * self.machine.seconds_per_cycle

    @property
    def units(self) -> int:
        """Units simulated."""
        return len(self.flat.streams)

    @cached_property
    def macs(self) -> int:
        """Multiply-accumulates, padding included."""
        return int(self._column("macs").sum())

    @cached_property
    def hbm_read_bytes(self) -> int:
        """Bytes read from HBM."""
        return int(self._column("read_bytes").sum())

    @cached_property
    def hbm_write_bytes(self) -> int:
        """Bytes written to HBM."""
        return int(self._column("write_bytes").sum())

    @property
    def mac_utilisation(self) -> float:
        """Share of the bf16 multipliers of the units' slices that was busy over the makespan."""
        per_cycle = sum(s.slices for s in self.flat.streams) * 8 * 32
        return self.macs / (self.cycles * per_cycle) if self.cycles else 0.0

    @property
    def hbm_utilisation(self) -> float:
        """Share of the card's peak HBM bandwidth used over the makespan."""
        moved = self.hbm_read_bytes + self.hbm_write_bytes
        return moved / (self.cycles * self.machine.hbm_bytes_per_cycle) if self.cycles else 0.0

    # Stalls ----------------------------------------------------------------------------------------------------------
    @cached_property
    def gaps(self) -> NDArray[np.float64]:
        """[n, 3]: cycles between the end of the previous instruction of the context and readiness, then to the start
        (vector engine taken), and excess over the uncontended duration (HBM shared)."""
        n = len(self.flat)
        out = np.zeros((n, 3))
        key = self.flat.unit * 3 + self.flat.context
        order = np.argsort(key, kind="stable")
        previous = np.zeros(n)
        if n:
            same = key[order][1:] == key[order][:-1]
            previous[order[1:]] = np.where(same, self.finish[order][:-1], 0.0)
        out[:, 0] = self.ready - previous
        out[:, 1] = self.start - self.ready
        out[:, 2] = self.finish - self.start - self._column("cycles")
        return out

    @cached_property
    def stalls(self) -> list[dict[str, dict[str, float]]]:
        """For every unit and context, cycles by the names in STALLS; they sum to the makespan."""
        out: list[dict[str, dict[str, float]]] = []
        duration, overhead = self._column("cycles"), self._column("overhead")
        causes = np.where(self.cause >= 0, self.flat.context[np.maximum(self.cause, 0)], -1) if len(self.flat) else None
        for unit in range(self.units):
            table: dict[str, dict[str, float]] = {}
            for c, name in enumerate(CONTEXTS):
                mine = (self.flat.unit == unit) & (self.flat.context == c)
                row: dict[str, float] = {stall: 0.0 for stall in STALLS}
                if causes is not None and mine.any():
                    gaps = self.gaps[mine]
                    row["issue"] = float(overhead[mine].sum())
                    row["busy"] = float(duration[mine].sum()) - row["issue"]
                    for other, label in enumerate(CONTEXTS):
                        row[f"wait_{label}"] = float(gaps[causes[mine] == other, 0].sum())
                    row["contention_vector"] = float(gaps[:, 1].sum())
                    row["contention_hbm"] = float(gaps[:, 2].sum())
                    row["tail"] = self.cycles - float(self.finish[mine].max())
                else:
                    row["tail"] = self.cycles
                table[name] = row
            out.append(table)
        return out

    @cached_property
    def critical_path(self) -> list[int]:
        """Instructions, first to last, each of which started when its predecessor on the path ended."""
        if not len(self.flat):
            return []
        key = self.flat.unit * 3 + self.flat.context
        path: list[int] = []
        i = int(self.finish.argmax())
        while i >= 0:
            path.append(i)
            if self.start[i] > self.ready[i]:  # waited for the vector engine of the other context
                other = (key == key[i] - self.flat.context[i] + 1 - self.flat.context[i]).nonzero()[0]
                i = int(other[np.searchsorted(self.finish[other], self.start[i])])
            else:
                i = int(self.cause[i])
        return path[::-1]

    # Tables ----------------------------------------------------------------------------------------------------------
    @cached_property
    def layers(self) -> list[Layer]:
        """Calls made by the entry routine of every unit, in order."""
        out: list[Layer] = []
        done: dict[int, float] = {}
        for call in self.flat.calls:
            if call.depth != 1 or call.end == call.first:
                continue
            stream = self.flat.streams[call.unit]
            parent = self.flat.calls[call.parent]
            location = stream.routines[parent.routine].instructions[call.index].location
            end = float(self.finish[call.first : call.end].max())
            before = done.get(call.unit, 0.0)
            done[call.unit] = max(before, end)
            out.append(
                Layer(
                    stream.locations[location],
                    stream.routines[call.routine].name,
                    call.unit,
                    float(self.start[call.first : call.end].min()),
                    end,
                    max(0.0, end - before),
                    call.end - call.first,
                )
            )
        return out

    @cached_property
    def locations(self) -> list[str]:
        """Source location of every executed instruction."""
        tables = {
            (u, r): [s.locations[x.location] for x in body.instructions]
            for u, s in enumerate(self.flat.streams)
            for r, body in enumerate(s.routines)
        }
        keys = zip(self.flat.unit.tolist(), self.flat.routine.tolist(), self.flat.index.tolist(), strict=True)
        return [tables[(u, r)][i] for u, r, i in keys]

    @cached_property
    def operations(self) -> list[Operation]:
        """Cycles of every source location over all calls and units, the costliest first."""
        names, group = np.unique(np.array(self.locations, dtype=object).astype(str), return_inverse=True)
        size = len(names)

        def total(values: NDArray[Any], where: NDArray[np.bool_] | None = None) -> NDArray[np.float64]:
            use = values if where is None else np.where(where, values, 0)
            return np.bincount(group, weights=use.astype(np.float64), minlength=size).astype(np.float64)

        duration = self.finish - self.start
        by_context = [total(duration, self.flat.context == c) for c in range(3)]
        stalled = total(self.gaps[:, 0] + self.gaps[:, 1])
        macs, moved = total(self._column("macs")), total(self._column("moved_bytes"))
        counts = np.bincount(group, minlength=size)
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

    def utilisation(self, unit: int = 0) -> dict[str, float]:
        """Share of the makespan that each context works."""
        table = self.stalls[unit]
        return {name: (table[name]["busy"] + table[name]["issue"]) / self.cycles for name in CONTEXTS}

    def energy_joules(self) -> float:
        """Board energy: idle power plus the measured power of a loaded PE for every PE in use (hardware.md 1.6)."""
        pes = sum(max(1, s.slices // self.machine.slices_per_pe) for s in self.flat.streams)
        watts = self.machine.power_idle_watts + pes * self.machine.power_pe_watts
        return watts * self.seconds

    def to_json(self, instructions: bool = False) -> dict[str, Any]:
        """JSON object; with `instructions` also one row an executed instruction."""
        path = self.critical_path
        on_path = dict.fromkeys(CONTEXTS, 0.0)
        for i in path:
            on_path[CONTEXTS[int(self.flat.context[i])]] += float(self.finish[i] - self.start[i])
        bottlenecks = [cost.bottleneck for cost in self.costs]
        out: dict[str, Any] = {
            "format": "rngdc-timing",
            "version": {"major": 1, "minor": 0},
            "machine": self.machine.name,
            "mode": self.machine.mode,
            "machine_digest": self.machine.digest(),
            "cycles": self.cycles,
            "seconds": self.seconds,
            "units": self.units,
            "instructions_executed": len(self.flat),
            "macs": self.macs,
            "mac_utilisation": self.mac_utilisation,
            "hbm_read_bytes": self.hbm_read_bytes,
            "hbm_write_bytes": self.hbm_write_bytes,
            "hbm_utilisation": self.hbm_utilisation,
            "energy_joules": self.energy_joules(),
            "stalls": self.stalls,
            "critical_path": {"instructions": len(path), "cycles_by_context": on_path},
            "layers": [asdict(layer) for layer in self.layers],
            "operations": [asdict(operation) for operation in self.operations],
        }
        if instructions:
            out["instructions"] = {
                "unit": self.flat.unit.tolist(),
                "context": [CONTEXTS[c] for c in self.flat.context.tolist()],
                "location": self.locations,
                "start": self.start.tolist(),
                "finish": self.finish.tolist(),
                "cause": self.cause.tolist(),
                "bottleneck": [bottlenecks[int(c)] for c in self.number],
            }
        return out


def context_name(context: int) -> str:
    """Lower-case name of a context number."""
    return Context(context).name.lower()
