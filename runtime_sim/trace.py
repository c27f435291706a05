"""Timeline of a timing run for the Perfetto viewer (ui.perfetto.dev) or chrome://tracing.

One process a unit, named by its card and PE, with the lanes Layers, Main, Sub, DMA and Vector. A span carries the
fields of the vendor's device profile (category NPU, begin_cycle, end_cycle), so that a trace of a real card can be
compared span by span.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from runtime_sim.timing_result import SHARED, TimingResult
from runtime_sim.timing_tables import CONTEXTS

LANES = ("Layers", "Main", "Sub", "DMA", "Vector")
PROTOBUF_SUFFIXES = (".pftrace", ".perfetto-trace")
_CONTEXT_LANE = (1, 2, 3)


@dataclass(frozen=True)
class Span:
    """One rectangle: begin and end in cycles."""

    unit: int
    lane: int
    name: str
    begin: float
    end: float
    arguments: dict[str, Any]


def spans(result: TimingResult) -> Iterator[Span]:
    """Spans of a result, unit by unit and lane by lane, each lane in time order and without overlaps.

    Units that do the same at the same time (`TimingResult.classes`) are all shown.
    """
    yield from _layer_spans(result)
    of_class = [_class_spans(result, number) for number in range(len(result.classes.members))]
    for unit, number in enumerate(result.classes.of_unit):
        for span in of_class[number]:
            yield replace(span, unit=unit)


def _class_spans(result: TimingResult, number: int) -> list[Span]:
    """What the contexts and the vector engine of a unit of a class do."""
    flat = result.flat
    gaps, shared, locations = result.gaps, result.shared, result.locations
    out: list[Span] = []
    vector: list[Span] = []
    for context in range(len(CONTEXTS)):
        for i in np.nonzero((flat.unit == number) & (flat.context == context))[0].tolist():
            cost = result.costs[int(result.number[i])]
            name = short_name(locations[i])
            arguments: dict[str, Any] = {
                "location": locations[i],
                "routine": flat.streams[number].routines[int(flat.routine[i])].name,
                "instruction": int(flat.index[i]),
                "bottleneck": cost.bottleneck,
            }
            if gaps[i, 0] > 0 and result.cause[i] >= 0:
                cause = int(result.cause[i])
                arguments["waited_cycles"] = float(gaps[i, 0])
                arguments["waited_for"] = f"{CONTEXTS[int(flat.context[cause])]}: {short_name(locations[cause])}"
            if result.waker[i] >= 0:
                sender = int(flat.unit[int(result.waker[i])])
                arguments["sync_cycles"] = float(gaps[i, 2])
                arguments["last_notify_of"] = result.unit_name(sender)
            if gaps[i, 1] > 0:
                arguments["vector_engine_taken_cycles"] = float(gaps[i, 1])
            for what, cycles in zip(SHARED, shared[i].tolist(), strict=True):
                if cycles > 1e-6:
                    arguments[f"{what.removeprefix('contention_')}_shared_cycles"] = cycles
            if cost.moved_bytes:
                arguments["bytes"] = cost.moved_bytes
            if cost.macs:
                arguments["macs"] = cost.macs
            begin, end = float(result.start[i]), float(result.finish[i])
            out.append(Span(number, _CONTEXT_LANE[context], name, begin, end, arguments))
            if cost.vector:
                vector.append(Span(number, 4, name, begin, end, {"context": CONTEXTS[context]}))
    return out + sorted(vector, key=lambda span: span.begin)


def _layer_spans(result: TimingResult) -> Iterator[Span]:
    """Layers overlap (the next one's transfers start early): a lane shows when each one's completion advanced."""
    for unit in range(result.units):
        done = 0.0
        for layer in result.layers_of(unit):
            before = max(done, layer.start)
            done = max(before, layer.end)
            arguments = {"first_start_cycle": layer.start, "instructions": layer.instructions, "routine": layer.routine}
            yield Span(unit, 0, short_name(layer.name), before, done, arguments)


def short_name(location: str) -> str:
    """`module path op` of a location such as `model.layers.3.mlp.down_proj|tc.contract`."""
    return location.replace("|", " ") or "unknown"


def write_trace(result: TimingResult, path: str | Path) -> int:
    """Write a trace and return the number of spans: protobuf for .pftrace and .perfetto-trace, Chrome JSON for .json.

    Raises ValueError for another ending.
    """
    path = Path(path)
    if path.suffix in PROTOBUF_SUFFIXES:
        return _write_protobuf(result, path)
    if path.suffix == ".json":
        return _write_json(result, path)
    raise ValueError(f"trace file {path.name}: the name must end with .json, .pftrace or .perfetto-trace")


def _process_name(result: TimingResult, unit: int) -> str:
    return f"unit {unit}: {result.topology.describe(unit)}"


def _lane_ids(result: TimingResult) -> list[tuple[int, int, str]]:
    return [(unit, lane, LANES[lane]) for unit in range(result.units) for lane in range(len(LANES))]


def _write_json(result: TimingResult, path: Path) -> int:
    microseconds = result.machine.seconds_per_cycle * 1e6
    number = 0
    with path.open("w", encoding="utf-8") as file:
        file.write('{"displayTimeUnit":"ns","otherData":')
        json.dump({"machine": result.machine.name, "mode": result.machine.mode, "cycles": result.cycles}, file)
        file.write(',"traceEvents":[\n')
        meta: list[dict[str, Any]] = [
            {"ph": "M", "name": "process_name", "pid": u, "args": {"name": _process_name(result, u)}}
            for u in range(result.units)
        ]
        for unit, lane, name in _lane_ids(result):
            meta.append({"ph": "M", "name": "thread_name", "pid": unit, "tid": lane, "args": {"name": name}})
            meta.append(
                {"ph": "M", "name": "thread_sort_index", "pid": unit, "tid": lane, "args": {"sort_index": lane}}
            )
        file.write(",\n".join(json.dumps(event) for event in meta))
        for span in spans(result):
            event = {
                "ph": "X",
                "cat": "NPU",
                "name": span.name,
                "pid": span.unit,
                "tid": span.lane,
                "ts": span.begin * microseconds,
                "dur": (span.end - span.begin) * microseconds,
                "args": {"begin_cycle": span.begin, "end_cycle": span.end, **span.arguments},
            }
            file.write(",\n" + json.dumps(event))
            number += 1
        file.write("\n]}\n")
    return number


def _write_protobuf(result: TimingResult, path: Path) -> int:
    try:
        from perfetto.protos.perfetto.trace import perfetto_trace_pb2 as pb
    except ImportError as error:
        raise ValueError(
            f"trace file {path.name}: protobuf traces need the package perfetto; install it or use a .json file"
        ) from error
    nanoseconds = result.machine.seconds_per_cycle * 1e9
    trace = pb.Trace()
    sequence = 1

    def packet() -> Any:
        new = trace.packet.add()
        new.trusted_packet_sequence_id = sequence
        return new

    def track(unit: int, lane: int) -> int:
        return 1 + unit * 16 + lane

    for unit in range(result.units):
        described = packet().track_descriptor
        described.uuid = track(unit, 15)
        described.process.pid = unit + 1
        described.process.process_name = _process_name(result, unit)
    for unit, lane, name in _lane_ids(result):
        described = packet().track_descriptor
        described.uuid, described.parent_uuid = track(unit, lane), track(unit, 15)
        described.name = name
    number = 0
    for span in spans(result):
        begin, end = packet(), packet()
        begin.timestamp, end.timestamp = round(span.begin * nanoseconds), round(span.end * nanoseconds)
        for event, kind in (
            (begin.track_event, pb.TrackEvent.TYPE_SLICE_BEGIN),
            (end.track_event, pb.TrackEvent.TYPE_SLICE_END),
        ):
            event.type = kind
            event.track_uuid = track(span.unit, span.lane)
        begin.track_event.name = span.name
        begin.track_event.categories.append("NPU")
        for key, value in {"begin_cycle": span.begin, "end_cycle": span.end, **span.arguments}.items():
            note = begin.track_event.debug_annotations.add()
            note.name = key
            if isinstance(value, float):
                note.double_value = value
            elif isinstance(value, int):
                note.int_value = value
            else:
                note.string_value = str(value)
        number += 1
    path.write_bytes(trace.SerializeToString())
    return number
