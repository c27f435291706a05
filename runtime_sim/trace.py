"""Timeline of a run for the Perfetto viewer (ui.perfetto.dev) or chrome://tracing.

One process a unit, named by its card and PE, with the lanes of the vendor's schedule viewer (`engines.ENGINES`) below
one of the model's layers; arrows from what an instruction waited for, and from notifies to waits; counters of HBM
bandwidth, multiplications and live data memory. Every span carries the fields of the vendor's device profile.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from runtime_sim.analysis import BINS, MOMENTS, Analysis
from runtime_sim.engines import ENGINES, VE
from runtime_sim.perfetto import PerfettoFile
from runtime_sim.timing_result import SHARED
from runtime_sim.timing_tables import CONTEXTS

LANES = ("Layers", *ENGINES)
FIRST_ENGINE = 1
PROTOBUF_SUFFIXES = (".pftrace", ".perfetto-trace")
MOST_JSON_SPANS = 200_000  # viewers take long to read more as JSON
CATEGORY = "NPU"  # of the vendor's device profile


@dataclass(frozen=True)
class Span:
    """One rectangle: begin and end in cycles. sends, receives: numbers of arrows that start and end here."""

    unit: int
    lane: int
    name: str
    begin: float
    end: float
    arguments: dict[str, Any]
    sends: tuple[int, ...] = ()
    receives: tuple[int, ...] = ()


@dataclass(frozen=True)
class Counter:
    """Values of a unit at moments (cycles); each holds until the next."""

    unit: int
    name: str
    measure: str
    times: tuple[float, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class Written:
    """A trace file and the number of spans in it."""

    path: Path
    spans: int


def number_of_spans(analysis: Analysis) -> int:
    """Spans that `spans` yields."""
    result = analysis.result
    executed = 1 + result.column("vector").astype(np.int64)
    return int((executed * result.copies).sum()) + sum(len(result.layers_of(u)) for u in range(result.units))


def spans(analysis: Analysis, units: Sequence[int] | None = None) -> Iterator[Span]:
    """Spans of all units or of some, unit by unit and lane by lane, each lane in time order and without overlaps.

    Units that do the same at the same time (`TimingResult.classes`) are all shown.
    """
    result = analysis.result
    chosen = range(result.units) if units is None else units
    of_class: dict[int, list[tuple[int, Span]]] = {}
    arrows = _Arrows(analysis)
    for unit in chosen:
        yield from _layer_spans(analysis, unit)
        number = result.classes.of_unit[unit]
        if number not in of_class:
            of_class[number] = _class_spans(analysis, number)
        for row, span in of_class[number]:
            sends, receives = arrows.of(unit, row) if row >= 0 else ((), ())
            yield Span(unit, span.lane, span.name, span.begin, span.end, span.arguments, sends, receives)


class _Arrows:
    """Numbers of arrows: one for every instruction that something made ready, one for every wait a notify ended."""

    def __init__(self, analysis: Analysis) -> None:
        result = self.result = analysis.result
        gaps = result.gaps
        self.receivers: dict[int, list[int]] = {}  # by instruction: those it made ready
        waited = np.nonzero((gaps[:, 0] > 0) & (result.cause >= 0))[0]
        for i, cause in zip(waited.tolist(), result.cause[waited].tolist(), strict=True):
            self.receivers.setdefault(cause, []).append(i)
        self.ready = np.zeros(len(result.flat), np.bool_)
        self.ready[waited] = True
        self.woken: dict[int, list[int]] = {}  # by instruction: waits it ended
        for i in np.nonzero(result.waker >= 0)[0].tolist():
            self.woken.setdefault(int(result.waker[i]), []).append(i)

    def _number(self, unit: int, row: int, notify: bool) -> int:
        return 1 + (unit * len(self.result.flat) + row) * 2 + int(notify)

    def _sender(self, unit: int, row: int) -> int:
        """The unit whose notify ended a wait of `unit`: one of the class that did it, another one if there is one."""
        result = self.result
        members = result.classes.members[int(result.flat.unit[int(result.waker[row])])]
        replica = result.topology.places[unit].replica
        others = [m for m in members if m != unit]
        near = [m for m in others if result.topology.places[m].replica == replica]
        return (near or others or [unit])[0]

    def of(self, unit: int, row: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Arrows that start and end at an instruction of a unit."""
        result = self.result
        sends = [self._number(unit, i, False) for i in self.receivers.get(row, ())]
        for i in self.woken.get(row, ()):
            for other in result.classes.members[int(result.flat.unit[i])]:
                if self._sender(other, i) == unit:
                    sends.append(self._number(other, i, True))
        receives = [self._number(unit, row, False)] if self.ready[row] else []
        if result.waker[row] >= 0:
            receives.append(self._number(unit, row, True))
        return tuple(sends), tuple(receives)


def _class_spans(analysis: Analysis, number: int) -> list[tuple[int, Span]]:
    """What the engines of a unit of a class do, with the instruction (-1: the span has no arrows)."""
    result, sites = analysis.result, analysis.sites
    flat, gaps, shared, locations = result.flat, result.gaps, result.shared, result.locations
    out: list[tuple[int, Span]] = []
    vector: list[tuple[int, Span]] = []
    mine = np.nonzero(flat.unit == number)[0]
    order: list[int] = mine[np.lexsort((result.start[mine], analysis.engine[mine]))].tolist()
    for i in order:
        cost = result.costs[int(result.number[i])]
        site = sites.names[int(sites.number[i])]
        name = short_name(locations[i])
        begin, end = float(result.start[i]), float(result.finish[i])
        arguments: dict[str, Any] = {
            "begin_cycle": begin,
            "end_cycle": end,
            "location": locations[i],
            "layer": analysis.layers[i],
            "routine": site.routine,
            "instruction": site.index,
            "bottleneck": cost.bottleneck,
        }
        if gaps[i, 0] > 0 and result.cause[i] >= 0:
            arguments["waited_cycles"] = float(gaps[i, 0])
            arguments["waited_for"] = str(sites.names[int(sites.number[int(result.cause[i])])])
        if result.waker[i] >= 0:
            arguments["sync_cycles"] = float(gaps[i, 2])
            arguments["last_notify_of"] = result.unit_name(int(flat.unit[int(result.waker[i])]))
        if gaps[i, 1] > 0:
            arguments["vector_engine_taken_cycles"] = float(gaps[i, 1])
        for what, cycles in zip(SHARED, shared[i].tolist(), strict=True):
            if cycles > 1e-6:
                arguments[f"{what.removeprefix('contention_')}_shared_cycles"] = cycles
        if cost.moved_bytes:
            arguments["bytes"] = cost.moved_bytes
        if cost.macs:
            arguments["macs"] = cost.macs
        engine = int(analysis.engine[i])
        out.append((i, Span(number, FIRST_ENGINE + engine, name, begin, end, arguments)))
        if cost.vector:
            context: dict[str, Any] = {"begin_cycle": begin, "end_cycle": end, "layer": analysis.layers[i]}
            context["context"] = CONTEXTS[int(flat.context[i])]
            vector.append((-1, Span(number, FIRST_ENGINE + VE, name, begin, end, context)))
    return out + sorted(vector, key=lambda pair: pair[1].begin)


def _layer_spans(analysis: Analysis, unit: int) -> Iterator[Span]:
    """Layers overlap (the next one's transfers start early): a lane shows when each one's completion advanced."""
    done = 0.0
    for layer in analysis.result.layers_of(unit):
        before = max(done, layer.start)
        done = max(before, layer.end)
        arguments = {
            "begin_cycle": before,
            "end_cycle": done,
            "first_start_cycle": layer.start,
            "instructions": layer.instructions,
            "routine": layer.routine,
        }
        yield Span(unit, 0, short_name(layer.name), before, done, arguments)


def counters(analysis: Analysis) -> Iterator[Counter]:
    """Counters of every unit: bytes and MACs a cycle in BINS parts of the time, and in each of MOMENTS parts the
    most live bytes of data memory."""
    result = analysis.result
    of_class = [list(_class_counters(analysis, number)) for number in range(len(result.classes.members))]
    for unit, number in enumerate(result.classes.of_unit):
        yield from (replace(counter, unit=unit) for counter in of_class[number])


def _class_counters(analysis: Analysis, number: int) -> Iterator[Counter]:
    """Counters of a unit of a class."""
    cycles = analysis.result.cycles
    width = (cycles or 1.0) / BINS
    edges = tuple(k * width for k in range(BINS + 1))
    rates = analysis.rates(number)
    for name, title, measure in (
        ("hbm_read_bytes", "HBM read", "B/cycle"), ("hbm_write_bytes", "HBM written", "B/cycle"),
        ("macs", "Active MACs", "MACs/cycle"),
    ):  # fmt: skip
        yield Counter(number, title, measure, edges, (*(x / width for x in rates[name]), 0.0))
    moments, live = analysis.data_memory(number).sampled(MOMENTS)
    yield Counter(number, "DM live", "B", (*moments.tolist(), edges[-1]), (*live.sum(axis=0).tolist(), 0.0))


def short_name(location: str) -> str:
    """`module path op` of a location such as `model.layers.3.mlp.down_proj|tc.contract`."""
    return location.replace("|", " ").strip() or "unknown"


def write_trace(analysis: Analysis, path: str | Path) -> Written:
    """Write a trace: protobuf for .pftrace and .perfetto-trace, Chrome JSON for .json.

    Above MOST_JSON_SPANS a .json file would be unusable: it becomes protobuf, with the ending .pftrace. Raises
    ValueError for another ending.
    """
    path = Path(path)
    if path.suffix not in (*PROTOBUF_SUFFIXES, ".json"):
        raise ValueError(f"trace file {path.name}: the name must end with .json, .pftrace or .perfetto-trace")
    if path.suffix == ".json" and number_of_spans(analysis) > MOST_JSON_SPANS:
        path = path.with_suffix(PROTOBUF_SUFFIXES[0])
    number = _write_json(analysis, path) if path.suffix == ".json" else _write_protobuf(analysis, path)
    return Written(path, number)


def _process_name(analysis: Analysis, unit: int) -> str:
    return f"unit {unit}: {analysis.result.topology.describe(unit)}"


def _write_json(analysis: Analysis, path: Path) -> int:
    result = analysis.result
    microseconds = result.machine.seconds_per_cycle * 1e6
    number = 0
    with path.open("w", encoding="utf-8") as file:
        file.write('{"displayTimeUnit":"ns","otherData":')
        json.dump({"machine": result.machine.name, "mode": result.machine.mode, "cycles": result.cycles}, file)
        file.write(',"traceEvents":[\n')
        meta: list[dict[str, Any]] = []
        for unit in range(result.units):
            meta.append(
                {"ph": "M", "name": "process_name", "pid": unit, "args": {"name": _process_name(analysis, unit)}}
            )
            for lane, name in enumerate(LANES):
                lane_of = {"ph": "M", "pid": unit, "tid": lane}
                meta.append({**lane_of, "name": "thread_name", "args": {"name": name}})
                meta.append({**lane_of, "name": "thread_sort_index", "args": {"sort_index": lane}})
        file.write(",\n".join(json.dumps(event) for event in meta))
        for span in spans(analysis):
            number += 1
            at = {"pid": span.unit, "tid": span.lane, "cat": CATEGORY}
            begin, length = span.begin * microseconds, (span.end - span.begin) * microseconds
            events = [{**at, "ph": "X", "name": span.name, "ts": begin, "dur": length, "args": span.arguments}]
            arrow = {**at, "name": "made ready"}
            events += [{**arrow, "ph": "f", "bp": "e", "id": i, "ts": begin} for i in span.receives]
            # An arrow belongs to the span around its time; its end may already be the next span's.
            events += [{**arrow, "ph": "s", "id": i, "ts": begin + length / 2} for i in span.sends]
            file.write(",\n" + ",\n".join(json.dumps(event) for event in events))
        for counter in counters(analysis):
            for time, value in zip(counter.times, counter.values, strict=True):
                event = {"ph": "C", "name": counter.name, "pid": counter.unit, "ts": time * microseconds}
                file.write(",\n" + json.dumps({**event, "args": {counter.measure: value}}))
        file.write("\n]}\n")
    return number


def _write_protobuf(analysis: Analysis, path: Path) -> int:
    result = analysis.result
    nanoseconds = result.machine.seconds_per_cycle * 1e9
    each = 64  # tracks kept for a unit
    number = 0
    with path.open("wb") as raw:
        file = PerfettoFile(raw, CATEGORY)
        for unit in range(result.units):
            file.process(unit * each + 1, unit + 1, _process_name(analysis, unit))
            for lane, name in enumerate(LANES):
                file.lane(unit * each + 2 + lane, unit * each + 1, name, lane)
        for span in spans(analysis):
            track = span.unit * each + 2 + span.lane
            begin, end = round(span.begin * nanoseconds), round(span.end * nanoseconds)
            file.span(track, span.name, begin, end, span.arguments, span.sends, span.receives)
            number += 1
        for order, counter in enumerate(counters(analysis)):
            track = (result.units + 1) * each + order
            file.counter_track(track, counter.unit * each + 1, counter.name, counter.measure)
            for time, value in zip(counter.times, counter.values, strict=True):
                file.counter(track, round(time * nanoseconds), value)
    return number
