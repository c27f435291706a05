"""One analysis of a timing run, from which every view is drawn: tables, JSON, trace, profile and the HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from runtime_sim.accounting import layer_names, layer_path, operation_rows, path_groups, path_segments
from runtime_sim.engines import SHORT, Charge, charges, engine_of, totals
from runtime_sim.memory_timeline import Timeline, data_memory, working_area
from runtime_sim.rates import rates
from runtime_sim.roofline import roofline
from runtime_sim.sites import TRAFFIC, Sites
from runtime_sim.timing_result import SHARED, TimingResult
from runtime_sim.timing_tables import CONTEXTS

if TYPE_CHECKING:
    from backend_rngd.artifact import Bucket
    from runtime_sim.runtime import Device

BINS = 200  # parts of the time for what moves
MOMENTS = 800  # parts of the time for what lies in memory
WAITS = 8  # causes named for an operation; the rest is summed


@dataclass(frozen=True)
class Resident:
    """HBM of a unit of a stage: bytes that stay, the working area [low, high), and what the host reads at the end."""

    weights: int
    constants: int
    caches: int
    area: tuple[int, int]
    outputs: tuple[tuple[int, int], ...]


def analyse(device: Device, bucket: Bucket, repeats: int = 1) -> Analysis:
    """The analysis of a program of an artifact; see `Device.time`."""
    hbm = device.artifact.manifest.hbm
    outputs = tuple((p.address, p.bytes) for p in bucket.outputs)
    residents: list[Resident] = []
    for stage, held in enumerate(device.residence.needs):
        weights = sum(p.bytes for p in held.placements)
        caches = sum(c.bytes for c in held.caches)
        read = outputs if stage == device.stages - 1 else ()
        residents.append(Resident(weights, hbm.constants, caches, (hbm.shared, hbm.total), read))
    return Analysis(device.time(bucket, repeats), tuple(residents))


class Analysis:
    """Everything that can be said about a run. Tables of a class of units are those of one of its units.

    residents: what lies in HBM, by pipeline stage; without it `hbm` is None.
    """

    def __init__(self, result: TimingResult, residents: Sequence[Resident] = ()) -> None:
        self.result = result
        self.residents = residents
        self._charges: dict[int, list[Charge]] = {}
        self._rates: dict[int, dict[str, list[float]]] = {}
        self._data_memory: dict[int, Timeline] = {}
        self._hbm: dict[int, Timeline] = {}

    @property
    def slowest(self) -> int:
        """Class of the unit that finishes last."""
        return self.result.classes.of_unit[self.result.slowest]

    @cached_property
    def sites(self) -> Sites:
        """The distinct instructions."""
        return Sites(self.result)

    @cached_property
    def engine(self) -> NDArray[np.int64]:
        """Number in ENGINES of every executed instruction."""
        return engine_of(self.result)

    @cached_property
    def layers(self) -> list[str]:
        """Layer of every executed instruction."""
        return layer_names(self.result)

    def charges(self, number: int) -> list[Charge]:
        """The account of every engine of a class of units: see `engines`."""
        if number not in self._charges:
            self._charges[number] = charges(self.result, self.sites, number)
        return self._charges[number]

    def engine_totals(self, number: int) -> dict[str, dict[str, float]]:
        """Cycles by engine and kind; every engine's sum to the makespan."""
        return totals(self.charges(number))

    def rates(self, number: int) -> dict[str, list[float]]:
        """Bytes and MACs of a unit in each of BINS parts of the time."""
        if number not in self._rates:
            self._rates[number] = rates(self.result, self.sites, number, BINS)
        return self._rates[number]

    def data_memory(self, number: int) -> Timeline:
        """Live bytes of the data memory of a unit."""
        if number not in self._data_memory:
            self._data_memory[number] = data_memory(self.result, self.sites, number)
        return self._data_memory[number]

    def resident(self, number: int) -> Resident | None:
        """What stays in the HBM of a unit."""
        first = self.result.classes.members[number][0]
        return self.residents[self.result.topology.places[first].stage] if self.residents else None

    def hbm(self, number: int) -> Timeline | None:
        """Live bytes of the working area of a unit's HBM."""
        resident = self.resident(number)
        if resident is None:
            return None
        if number not in self._hbm:
            self._hbm[number] = working_area(self.result, self.sites, number, resident.area, resident.outputs)
        return self._hbm[number]

    @cached_property
    def roofline(self) -> dict[str, Any]:
        """Roofs and points of the unit that finishes last."""
        return roofline(self.result, self.sites, self.slowest)

    @cached_property
    def operations(self) -> list[dict[str, Any]]:
        """A row an operation, over all units: cycles, causes on the critical path, traffic, what it waited for, and its
        place under the roofs."""
        traffic: dict[str, NDArray[np.int64]] = {}
        moved = self.sites.traffic * self.result.copies[:, None]
        names = np.array(self.result.locations, dtype=object).astype(str)
        found, group = np.unique(names, return_inverse=True)
        table = np.stack([np.bincount(group, weights=moved[:, c], minlength=len(found)) for c in range(len(TRAFFIC))])
        traffic = dict(zip(found.tolist(), table.T, strict=True))
        place = {p["location"]: p for p in self.roofline["points"]}
        waits = self._waits(group, [str(x) for x in found])
        return [
            row
            | {name: int(x) for name, x in zip(TRAFFIC, traffic[row["location"]].tolist(), strict=True)}
            | {"waits": waits.get(row["location"], {})}
            | {key: place.get(row["location"], {}).get(key) for key in ("intensity", "attained", "bound", "by")}
            for row in operation_rows(self.result)
        ]

    def _waits(self, group: NDArray[np.int64], names: list[str]) -> dict[str, dict[str, float]]:
        """By operation, cycles that its instructions were late by what they waited for: an operation in a context, a
        sync with other units, the vector engine, or a shared resource. Over all units; the largest are named."""
        result = self.result
        copies = result.copies.astype(np.float64)
        out: dict[str, dict[str, float]] = {}

        def add(what: str, rows: NDArray[np.int64], cycles: NDArray[np.float64]) -> None:
            total = np.bincount(group[rows], weights=cycles * copies[rows], minlength=len(names))
            for number in np.nonzero(total > 0)[0].tolist():
                row = out.setdefault(names[number], {})
                row[what] = row.get(what, 0.0) + float(total[number])

        gaps, waits = result.gaps, result.column("wait").astype(np.bool_)
        before = np.maximum(result.cause, 0)
        label = group[before] * len(CONTEXTS) + result.flat.context[before]
        late = (gaps[:, 0] > 0) & (result.cause >= 0)
        plain = late & ~waits[before]
        labels: list[int] = np.unique(label[plain]).tolist()
        for value in labels:
            rows = np.nonzero(plain & (label == value))[0]
            operation = names[value // len(CONTEXTS)].replace("|", " ").strip()
            add(f"{CONTEXTS[value % len(CONTEXTS)]} {operation}", rows, gaps[rows, 0])
        synced = np.nonzero(late & waits[before])[0]
        add("sync with other units", synced, gaps[synced, 0])
        blocked = np.nonzero(waits)[0]
        add("sync with other units", blocked, gaps[blocked, 2])
        every = np.arange(len(group))
        add("vector engine taken", every, gaps[:, 1])
        for column, kind in enumerate(SHARED):
            add(f"contention on {SHORT.get(kind, kind.removeprefix('contention_'))}", every, result.shared[:, column])
        for location, row in out.items():
            ordered = sorted(row.items(), key=lambda item: -item[1])
            rest = sum(cycles for _, cycles in ordered[WAITS:])
            out[location] = dict(ordered[:WAITS]) | ({"other": rest} if rest else {})
        return out

    @cached_property
    def layer_path(self) -> dict[str, float]:
        """Cycles of the critical path by layer."""
        return layer_path(self.result)

    @cached_property
    def path(self) -> list[dict[str, Any]]:
        """The critical path, neighbours of one operation, unit and context joined."""
        return path_segments(self.result)

    @cached_property
    def path_groups(self) -> list[dict[str, Any]]:
        """The critical path by layer and operation, in the order of its first instruction."""
        return path_groups(self.result)

    def memory(self, number: int) -> list[dict[str, Any]]:
        """Memories of a unit: capacity, bytes that stay, the peak of live bytes and who holds them."""
        out: list[dict[str, Any]] = []
        resident = self.resident(number)
        stays = (
            {"weights": resident.weights, "constants": resident.constants, "caches": resident.caches}
            if resident is not None
            else {}
        )
        for line, staying in ((self.data_memory(number), {}), (self.hbm(number), stays)):
            if line is None:
                continue
            time, live = line.peak
            holders = zip(line.names, line.at(np.array([time]))[:, 0].tolist(), strict=True)
            out.append(
                {
                    "memory": line.memory,
                    "capacity": line.capacity,
                    "resident": staying,
                    "peak_bytes": live,
                    "peak_cycle": time,
                    "peak_by": {n: x for n, x in sorted(holders, key=lambda item: -item[1]) if x},
                }
            )
        return out
