"""What every engine does at every moment: the exact account behind "why is it slow".

Engines are the lanes of the vendor's schedule viewer. Main, Sub and VE (the vector engine) belong to the Tensor Unit;
the transfers of the dma context are TDMA (tensor DMA) or, if they reach another card, PDMA; Core is the command
processor, which raises notifies and waits for them. For every engine the cycles of

* busy: data moves or is computed, at the speed it has alone,
* issue: issue, pipeline fill, DMA start-up,
* wait: idle until a named instruction is complete,
* sync: idle or blocked until a named instruction of another unit has notified,
* contention: held up by a named resource: an HBM, a port, a link, or the vector engine in the hands of an instruction,
* tail: nothing left to do

sum to the makespan.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime_sim.sites import Named, Sites
from runtime_sim.timing_result import SHARED, TimingResult

ENGINES = ("Main", "Sub", "VE", "TDMA", "PDMA", "Core")
MAIN, SUB, VE, TDMA, PDMA, CORE = range(len(ENGINES))
KINDS = ("busy", "issue", "wait", "sync", "contention", "tail")
START = "the start of the program"
SHORT = {  # kinds of shared resources, for people
    "contention_hbm": "HBM",
    "contention_dm": "data-memory ports",
    "contention_link": "the way between clusters",
    "contention_card": "links of cards",
}
Key = tuple[str, int | str]  # kind, and the number of an instruction or the name of a resource


@dataclass(frozen=True)
class Charge:
    """Cycles of an engine. instruction: what it waits for (wait, sync, a taken vector engine); resource: of
    contention. times: how often. others: causes that a row sums instead of naming one."""

    engine: str
    kind: str
    cycles: float
    times: int
    instruction: Named | None = None
    resource: str = ""
    others: int = 0

    @property
    def cause(self) -> str:
        """The named instruction or resource, for people."""
        by = str(self.instruction) if self.instruction is not None else f"{self.others} others" if self.others else ""
        return f"{self.resource}: {by}" if self.resource and by else self.resource or by

    def to_json(self) -> dict[str, Any]:
        """Fields that hold something."""
        row: dict[str, Any] = {"engine": self.engine, "kind": self.kind, "cycles": self.cycles, "times": self.times}
        if self.instruction is not None:
            row["instruction"] = asdict(self.instruction)
        row |= {"resource": self.resource} if self.resource else {}
        return row | ({"others": self.others} if self.others else {})


def engine_of(result: TimingResult) -> NDArray[np.int64]:
    """The engine of every executed instruction (passes of the vector engine hold VE besides)."""
    control = np.array([c.wait or c.bottleneck == "notify" for c in result.costs] or [False])[result.number]
    far = np.array([c.reach.card > 0 for c in result.costs] or [False])[result.number]
    dma = np.where(control, CORE, np.where(far, PDMA, TDMA))
    return np.where(result.flat.context < 2, result.flat.context, dma)


def rows_of(result: TimingResult, engines: NDArray[np.int64], unit: int, engine: int) -> NDArray[np.int64]:
    """Instructions of a class of units that occupy an engine, in order of time."""
    mine = result.flat.unit == unit
    if engine == VE:
        rows = np.nonzero(mine & result.column("vector").astype(np.bool_))[0]
    else:
        rows = np.nonzero(mine & (engines == engine))[0]
    return rows[np.argsort(result.start[rows], kind="stable")]


def charges(result: TimingResult, sites: Sites, unit: int) -> list[Charge]:
    """The account of a class of units: for every engine, rows whose cycles sum to the makespan."""
    engines = engine_of(result)
    account = _Account(result, sites, unit)
    out: list[Charge] = []
    for engine, name in enumerate(ENGINES):
        cycles, times = account.of(rows_of(result, engines, unit, engine))
        rows = [
            Charge(name, kind, total, times[kind, what], *account.named(kind, what))
            for (kind, what), total in cycles.items()
            if total > 1e-9 or kind == "tail"
        ]
        out += sorted(rows, key=lambda c: (KINDS.index(c.kind), -c.cycles))
    return out


def totals(rows: list[Charge]) -> dict[str, dict[str, float]]:
    """Cycles by engine and kind; every engine's sum to the makespan."""
    out: dict[str, dict[str, float]] = {engine: {kind: 0.0 for kind in KINDS} for engine in ENGINES}
    for row in rows:
        out[row.engine][row.kind] += row.cycles
    return out


def shortened(rows: list[Charge], most: int) -> list[Charge]:
    """The `most` largest rows of every engine; the others are summed by kind, so that sums stay what they are."""
    out: list[Charge] = []
    for engine in ENGINES:
        mine = sorted((r for r in rows if r.engine == engine), key=lambda r: -r.cycles)
        out += mine[:most]
        for kind in KINDS:
            rest = [r for r in mine[most:] if r.kind == kind]
            if rest:
                times = sum(r.times for r in rest)
                out.append(Charge(engine, kind, sum(r.cycles for r in rest), times, others=len(rest)))
    return out


class _Account:
    """Charges the cycles of one engine after the other."""

    def __init__(self, result: TimingResult, sites: Sites, unit: int) -> None:
        self.result, self.sites, self.unit = result, sites, unit
        self.waits = result.column("wait").astype(np.bool_)
        self.overhead = result.column("overhead")
        flat = result.flat
        self.others = [np.nonzero((flat.unit == unit) & (flat.context == 1 - c))[0] for c in (0, 1)]

    def named(self, kind: str, what: int | str) -> tuple[Named | None, str]:
        if isinstance(what, str):
            return None, what
        return (self.sites.names[what] if what >= 0 else None), "vector engine" if kind == "contention" else ""

    def of(self, rows: NDArray[np.int64]) -> tuple[dict[Key, float], dict[Key, int]]:
        """Cycles and occurrences by kind and cause of an engine that executes `rows`."""
        result = self.result
        self.cycles: dict[Key, float] = {}
        self.times: dict[Key, int] = {}
        if len(rows):
            previous = np.concatenate([[0.0], result.finish[rows[:-1]]])
            self._running(rows)
            self._taken(rows, previous)
            self._waiting(rows, previous)
        end = float(result.finish[rows].max()) if len(rows) else 0.0
        self._charge("tail", "", result.cycles - end)
        return self.cycles, self.times

    def _charge(self, kind: str, what: int | str, cycles: float, times: int = 1) -> None:
        key = (kind, what)
        self.cycles[key] = self.cycles.get(key, 0.0) + cycles
        self.times[key] = self.times.get(key, 0) + times

    def _charge_sites(self, kind: str, causes: NDArray[np.int64], cycles: NDArray[np.float64]) -> None:
        """Charge cycles to the instructions that caused them."""
        if not len(causes):
            return
        numbers = self.sites.number[causes]
        found, group = np.unique(numbers, return_inverse=True)
        total = np.bincount(group, weights=cycles)
        for number, amount, times in zip(found.tolist(), total.tolist(), np.bincount(group).tolist(), strict=True):
            self._charge(kind, number, amount, times)

    def _running(self, rows: NDArray[np.int64]) -> None:
        """From starts to ends."""
        result = self.result
        blocked = rows[self.waits[rows]]
        length = result.finish - result.start
        known = blocked[result.waker[blocked] >= 0]
        self._charge_sites("sync", result.waker[known], length[known])
        unknown = float(length[blocked].sum() - length[known].sum())
        if unknown:
            self._charge("sync", START, unknown)
        working = rows[~self.waits[rows]]
        shared = result.shared[working]
        issue = float(self.overhead[working].sum())
        self._charge("issue", "", issue, len(working))
        self._charge("busy", "", float(length[working].sum()) - issue - float(shared.sum()), len(working))
        for column, kind in enumerate(SHARED):
            cycles = shared[:, column]
            late = working[cycles > 0]
            numbers: list[int] = np.unique(result.number[late]).tolist()
            for number in numbers:
                mine = result.number[working] == number
                name = result.resource_names[number].get(column, SHORT[kind])
                self._charge("contention", name, float(cycles[mine].sum()), int((cycles[mine] > 0).sum()))

    def _taken(self, rows: NDArray[np.int64], previous: NDArray[np.float64]) -> None:
        """From readiness to starts: the other context holds the vector engine."""
        result = self.result
        gap = result.start[rows] - np.maximum(result.ready[rows], previous)
        late = gap > 0
        for context, other in enumerate(self.others):
            here = rows[late & (result.flat.context[rows] == context)]
            if len(here):
                holder = other[np.searchsorted(result.finish[other], result.start[here])]
                self._charge_sites("contention", holder, gap[late & (result.flat.context[rows] == context)])

    def _waiting(self, rows: NDArray[np.int64], previous: NDArray[np.float64]) -> None:
        """From the end of what the engine did before to readiness."""
        result = self.result
        gap = result.ready[rows] - previous
        idle = gap > 0
        rows, previous, gap = rows[idle], previous[idle], gap[idle]
        cause = result.cause[rows]
        plain = (cause >= 0) & ~self.waits[np.maximum(cause, 0)]
        self._charge_sites("wait", cause[plain], gap[plain])
        for i, since in zip(rows[~plain].tolist(), previous[~plain].tolist(), strict=True):
            for kind, what, cycles in self._behind_waits(i, since):
                self._charge(kind, what, cycles)

    def _behind_waits(self, i: int, since: float) -> Iterator[tuple[str, int | str, float]]:
        """Back from an instruction that a wait made ready: blocked in the wait, and before that for what it waited."""
        result = self.result
        until, cause = float(result.ready[i]), int(result.cause[i])
        while until > since:
            if cause < 0:
                yield "wait", START, until - since
                return
            if not self.waits[cause]:
                yield "wait", int(self.sites.number[cause]), until - since
                return
            begin = max(since, float(result.start[cause]))
            waker = int(result.waker[cause])
            yield "sync", int(self.sites.number[waker]) if waker >= 0 else START, until - begin
            until, cause = begin, int(result.cause[cause])
