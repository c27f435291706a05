"""Spans in the schema of the vendor's device profile, to compare a simulated run and one of a card span by span.

On a card, every span is an event of the target `span::npu` with the fields cat ("NPU"), name, begin_cycle and end_cycle
in profiler ticks (simulators.md 6, B). Files are Chrome traces whose events carry these fields as arguments, which
viewers and the common exporters understand; what only a simulation knows (lane, unit, layer) stands beside them. Also
read: one JSON object a line with these fields, and the runtime's table of stages (leader_device, name, cycle).
"""

from __future__ import annotations

import csv
import io
import json
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from runtime_sim.analysis import Analysis
from runtime_sim.trace import CATEGORY, LANES, spans

TARGET = "span::npu"
FORMAT = "rngdc-profile"
FIELDS = ("begin_cycle", "end_cycle")


class ProfileError(ValueError):
    """A file that is no profile."""


@dataclass
class Profile:
    """Spans by name: (begin, end) in ticks. ticks_per_cycle: of the tensor clock, None if the file does not say.
    about: what a simulation says of itself."""

    source: str
    spans: dict[str, list[tuple[float, float]]] = field(default_factory=lambda: defaultdict(list))
    ticks_per_cycle: float | None = None
    timed: bool = True
    about: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def length(self) -> float:
        """Ticks from the first begin to the last end; of a table without times, the sum."""
        every = [s for group in self.spans.values() for s in group]
        if not every:
            return 0.0
        if not self.timed:
            return sum(end - begin for begin, end in every)
        return max(end for _, end in every) - min(begin for begin, _ in every)


def write_profile(analysis: Analysis, path: str | Path) -> int:
    """Write the instructions of all units as a device profile; returns the number of spans."""
    result = analysis.result
    machine = result.machine
    ticks = machine.tick_hz / machine.clock_hz
    microseconds = machine.seconds_per_cycle * 1e6
    number = 0
    with Path(path).open("w", encoding="utf-8") as file:
        file.write('{"otherData":')
        about = {"machine": machine.name, "mode": machine.mode, "cycles": result.cycles}
        json.dump({"format": FORMAT, "target": TARGET, "ticks_per_cycle": ticks, **about}, file)
        file.write(',"traceEvents":[')
        for span in spans(analysis):
            if span.lane == 0:
                continue
            arguments = {
                "begin_cycle": round(span.begin * ticks),
                "end_cycle": round(span.end * ticks),
                "lane": LANES[span.lane],
                "unit": span.unit,
                **{key: span.arguments[key] for key in ("layer", "bytes", "macs") if key in span.arguments},
            }
            event = {
                "name": span.name, "cat": CATEGORY, "ph": "X", "pid": span.unit, "tid": span.lane,
                "ts": span.begin * microseconds, "dur": (span.end - span.begin) * microseconds, "args": arguments,
            }  # fmt: skip
            file.write((",\n" if number else "\n") + json.dumps(event))
            number += 1
        file.write("\n]}\n")
    return number


def read_profile(path: str | Path) -> Profile | None:
    """The profile in a file, or None if it is something else (a report, say). Raises ProfileError if it begins like a
    profile and is broken, OSError if it cannot be read."""
    path = Path(path)
    text = path.read_text("utf-8")
    head = text.lstrip()[:1]
    if head in ("{", "["):
        try:
            whole: object = json.loads(text)
        except ValueError:
            return _from_lines(text, str(path))
        if isinstance(whole, dict) and "traceEvents" in whole:
            found = cast(dict[str, Any], whole)
            return _from_events(found["traceEvents"], str(path), found.get("otherData") or {})
        if isinstance(whole, list):
            return _from_events(cast(list[Any], whole), str(path), {})
        return _from_events([whole], str(path), {}) if set(cast(dict[str, Any], whole)) >= {"name", *FIELDS} else None
    if text.startswith("leader_device,"):
        return _from_table(text, str(path))
    return None


def _from_lines(text: str, source: str) -> Profile | None:
    events: list[Any] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            events.append(json.loads(line))
        except ValueError as error:
            if number == 1:
                return None
            raise ProfileError(f"line {number} is no JSON: {error}") from error
    return _from_events(events, source, {})


def _from_events(events: list[Any], source: str, about: dict[str, Any]) -> Profile:
    """Chrome events, or objects that carry the fields themselves, in `fields` or in `args`."""
    profile = Profile(source, ticks_per_cycle=about.get("ticks_per_cycle"), about=about)
    for event in events:
        if not isinstance(event, dict):
            continue
        event = cast(dict[str, Any], event)
        inner: dict[str, Any] = event.get("args") or event.get("fields") or event
        if not all(isinstance(inner.get(key), int | float) for key in FIELDS):
            continue
        if inner.get("lane") == "VE":  # held besides Main or Sub by the same instruction
            continue
        name = str(inner.get("name") or event.get("name") or "")
        begin, end = float(inner["begin_cycle"]), float(inner["end_cycle"])
        if end < begin:
            raise ProfileError(f"span {name!r} ends at {end:.0f}, before it begins at {begin:.0f}")
        profile.spans[name].append((begin, end))
    if not profile.spans:
        raise ProfileError(f"no event has the fields {' and '.join(FIELDS)}")
    return profile


def _from_table(text: str, source: str) -> Profile:
    """A row a stage, with its length only."""
    profile = Profile(source, timed=False)
    for number, row in enumerate(csv.DictReader(io.StringIO(text)), 2):
        try:
            profile.spans[row["name"]].append((0.0, float(row["cycle"])))
        except (KeyError, TypeError, ValueError) as error:
            raise ProfileError(f"line {number} has no name and cycle") from error
    if not profile.spans:
        raise ProfileError("it has no rows")
    return profile
