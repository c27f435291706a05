"""Traces and profiles: lanes without overlaps, arrows in pairs, counters as in the report, files that read back."""

from __future__ import annotations

import itertools
import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
import streams

from backend_rngd.machine import load_machine
from runtime_sim import trace as trace_module
from runtime_sim.analysis import Analysis
from runtime_sim.profile import ProfileError, read_profile, write_profile
from runtime_sim.report_data import report_data
from runtime_sim.timing import simulate
from runtime_sim.topology import Topology
from runtime_sim.trace import LANES, number_of_spans, spans, write_trace

UNITS = 4


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    """Sums over four units, with syncs and contention."""
    machine = load_machine(mode="silicon")
    return Analysis(simulate([streams.all_reduce(UNITS, 3)], machine, topology=Topology.of(machine, UNITS)))


def check(events: list[dict[str, Any]], analysis: Analysis) -> None:
    """events: unit, lane, begin, end, sends, receives; times in cycles."""
    assert len(events) == number_of_spans(analysis)
    lanes: dict[tuple[int, str], list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        lanes[event["unit"], event["lane"]].append(event)
    for own in lanes.values():
        own.sort(key=lambda e: (e["begin"], e["end"]))
        assert all(a["end"] <= b["begin"] + 1e-6 for a, b in itertools.pairwise(own))
    result = analysis.result
    length = sum(e["end"] - e["begin"] for e in events if e["lane"] not in ("Layers", "VE"))
    assert length == pytest.approx(float(((result.finish - result.start) * result.copies).sum()))
    assert {lane for _, lane in lanes} >= {"Layers", "Main", "VE", "TDMA", "Core"}
    # Arrows: each number starts at one span and ends at one, which starts when the other ends or its notify arrives.
    starts = {i: e for e in events for i in e["sends"]}
    ends = {i: e for e in events for i in e["receives"]}
    assert starts.keys() == ends.keys()
    assert len(starts) == sum(len(e["sends"]) for e in events) == sum(len(e["receives"]) for e in events)
    crossing = 0
    for number, sender in starts.items():
        receiver = ends[number]
        if sender["unit"] != receiver["unit"]:
            crossing += 1
            assert receiver["lane"] == "Core"
            assert sender["end"] <= receiver["end"] + 1e-6
        else:
            assert sender["end"] == pytest.approx(receiver["begin"]) or receiver["lane"] == "Core"
    assert crossing == UNITS * 6  # two waits a round


def test_json(analysis: Analysis, tmp_path: Path) -> None:
    written = write_trace(analysis, tmp_path / "t.json")
    data = json.loads((tmp_path / "t.json").read_text("utf-8"))["traceEvents"]
    microseconds = analysis.result.machine.seconds_per_cycle * 1e6
    by_place = {
        (e["pid"], e["tid"], e["ts"], e["dur"]): {
            "unit": e["pid"], "lane": LANES[e["tid"]], "sends": [], "receives": [],
            "begin": e["ts"] / microseconds, "end": (e["ts"] + e["dur"]) / microseconds,
        }
        for e in data if e["ph"] == "X"
    }  # fmt: skip
    assert written.spans == len(by_place) == sum(e["ph"] == "X" for e in data)
    for e in data:
        if e["ph"] in "sf":
            inside = [
                s for (pid, tid, ts, dur), s in by_place.items()
                if (pid, tid) == (e["pid"], e["tid"]) and (ts == e["ts"] if e["ph"] == "f" else ts + dur / 2 == e["ts"])
            ]  # fmt: skip
            assert len(inside) == 1
            inside[0]["sends" if e["ph"] == "s" else "receives"].append(e["id"])
    check(list(by_place.values()), analysis)
    shown: dict[str, list[float]] = defaultdict(list)
    for e in data:
        if e["ph"] == "C" and e["pid"] == 0:
            shown[e["name"]] += e["args"].values()
    counters_are_the_reports(shown, analysis)
    first = next(e for e in data if e["ph"] == "X" and e["tid"] == LANES.index("Core"))
    assert first["cat"] == "NPU"
    assert {"begin_cycle", "end_cycle", "location", "layer"} <= set(first["args"])


def counters_are_the_reports(shown: dict[str, list[float]], analysis: Analysis) -> None:
    data = report_data(analysis)
    width = data["rates"]["bin_cycles"]
    assert shown["HBM read"][:-1] == pytest.approx([x / width for x in data["rates"]["hbm_read_bytes"]])
    assert shown["HBM written"][:-1] == pytest.approx([x / width for x in data["rates"]["hbm_write_bytes"]])
    assert shown["Active MACs"][:-1] == pytest.approx([x / width for x in data["rates"]["macs"]])
    live = [sum(column) for column in zip(*data["memory"][0]["live"].values(), strict=True)]
    assert shown["DM live"][:-1] == pytest.approx(live)
    assert max(live) == data["memory"][0]["peak_bytes"]


@pytest.mark.parametrize("suffix", ["pftrace", "perfetto-trace"])
def test_protobuf(analysis: Analysis, tmp_path: Path, suffix: str) -> None:
    """Decoded with Perfetto's own message classes; numbers of names are resolved as a viewer does."""
    pb = pytest.importorskip("perfetto.protos.perfetto.trace.perfetto_trace_pb2")
    file = tmp_path / f"t.{suffix}"
    written = write_trace(analysis, file)
    trace = pb.Trace.FromString(file.read_bytes())
    names: dict[str, dict[int, str]] = defaultdict(dict)
    tracks: dict[int, Any] = {}
    opened: dict[int, dict[str, Any]] = {}
    events: list[dict[str, Any]] = []
    shown: dict[str, list[float]] = defaultdict(list)
    assert trace.packet[0].sequence_flags & pb.TracePacket.SEQ_INCREMENTAL_STATE_CLEARED
    for packet in trace.packet:
        assert packet.trusted_packet_sequence_id == 1
        for table, entries in packet.interned_data.ListFields():
            for entry in entries:
                text = entry.name if hasattr(entry, "name") else entry.str.decode()
                names[table.name][entry.iid] = text
        if packet.HasField("track_descriptor"):
            tracks[packet.track_descriptor.uuid] = packet.track_descriptor
        event = packet.track_event
        if event.type == pb.TrackEvent.TYPE_SLICE_BEGIN:
            track = tracks[event.track_uuid]
            assert event.track_uuid not in opened
            keys = {
                names["debug_annotation_names"][a.name_iid]:
                names["debug_annotation_string_values"][a.string_value_iid] if a.string_value_iid else a.double_value
                for a in event.debug_annotations
            }  # fmt: skip
            opened[event.track_uuid] = {
                "unit": tracks[track.parent_uuid].process.pid - 1, "lane": track.name, "begin": keys["begin_cycle"],
                "end": keys["end_cycle"], "time": packet.timestamp, "sends": list(event.flow_ids),
                "receives": list(event.terminating_flow_ids), "name": names["event_names"][event.name_iid],
            }  # fmt: skip
            assert [names["event_categories"][i] for i in event.category_iids] == ["NPU"]
        elif event.type == pb.TrackEvent.TYPE_SLICE_END:
            done = opened.pop(event.track_uuid)
            assert packet.timestamp - done["time"] == pytest.approx(done["end"] - done["begin"], abs=1)
            events.append(done)
        elif event.type == pb.TrackEvent.TYPE_COUNTER:
            track = tracks[event.track_uuid]
            assert track.counter.unit_name
            if tracks[track.parent_uuid].process.pid == 1:
                shown[track.name].append(event.double_counter_value)
    assert not opened
    assert written.spans == len(events)
    check(events, analysis)
    counters_are_the_reports(shown, analysis)
    assert Counter(e["name"] for e in events) == Counter(s.name for s in spans(analysis))


def test_more_spans_than_viewers_read_as_json(
    analysis: Analysis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace_module, "MOST_JSON_SPANS", number_of_spans(analysis) - 1)
    written = write_trace(analysis, tmp_path / "t.json")
    assert written.path.name == "t.pftrace" and written.path.stat().st_size > 1000
    assert not (tmp_path / "t.json").exists()
    monkeypatch.setattr(trace_module, "MOST_JSON_SPANS", number_of_spans(analysis))
    assert write_trace(analysis, tmp_path / "t.json").path.name == "t.json"


def test_other_endings_are_refused(analysis: Analysis, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must end with"):
        write_trace(analysis, tmp_path / "t.txt")


def test_profile_reads_back(analysis: Analysis, tmp_path: Path) -> None:
    """Ticks of the profiler, two a cycle; a span an instruction of every unit."""
    file = tmp_path / "p.json"
    number = write_profile(analysis, file)
    profile = read_profile(file)
    assert profile is not None
    result = analysis.result
    assert profile.ticks_per_cycle == result.machine.tick_hz / result.machine.clock_hz == 2
    assert sum(len(s) for s in profile.spans.values()) == result.instructions < number  # VE is held besides
    assert profile.length == pytest.approx(2 * result.cycles, abs=2)
    events = json.loads(file.read_text("utf-8"))["traceEvents"]
    assert all(e["cat"] == "NPU" and isinstance(e["args"]["begin_cycle"], int) for e in events)


def test_profiles_of_cards_are_read(tmp_path: Path) -> None:
    """What exporters make of the vendor's spans: Chrome events, one object a line, and the table of stages."""
    fields = [{"cat": "NPU", "name": n, "begin_cycle": b, "end_cycle": e} for n, b, e in (("a", 0, 40), ("b", 50, 70))]
    chrome = [{"name": "NPU", "cat": "span::npu", "ph": "X", "ts": 0, "dur": 1, "args": f} for f in fields]
    lines = "\n".join(json.dumps({"target": "span::npu", "fields": f}) for f in fields)
    table = "leader_device,name,cycle\nnpu0pe0-3,a,40\nnpu0pe0-3,b,20\n"
    texts = {"list.json": json.dumps(chrome), "whole.json": json.dumps({"traceEvents": chrome}), "lines.json": lines}
    for name, text in (texts | {"table.csv": table}).items():
        (tmp_path / name).write_text(text, "utf-8")
        profile = read_profile(tmp_path / name)
        assert profile is not None
        assert profile.ticks_per_cycle is None
        assert {n: [e - b for b, e in s] for n, s in profile.spans.items()} == {"a": [40], "b": [20]}
        assert profile.length == (60 if name == "table.csv" else 70)
    (tmp_path / "report.json").write_text('{"buckets": []}', "utf-8")
    assert read_profile(tmp_path / "report.json") is None
    for text, words in (('{"traceEvents": []}', "no event"), (lines + "\n{", "line 3"), (table + "x,y\n", "line 4")):
        (tmp_path / "bad").write_text(text, "utf-8")
        with pytest.raises(ProfileError, match=words):
            read_profile(tmp_path / "bad")
