"""`rngdc explain`: how contractions and collectives of a program were mapped, what else was possible, and why.

The program is lowered once more from the `tc` module in the artifact, while the lowering says what it decides. Beside
the predicted time of every candidate stands what the simulator finds for the one that was taken.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from rich.console import RenderableType
from rich.table import Table

from backend_rngd.artifact import Artifact, Bucket
from backend_rngd.dialect import InstructionOp, RoutineOp
from backend_rngd.instructions import DmaOp
from backend_rngd.isa.descriptors import Call, Dma, Space, Stream
from backend_rngd.lowering import Lowered, lower
from backend_rngd.lowering.choices import Choice, Streamed, described, recording
from backend_rngd.lowering.tensor import RowSpace
from backend_rngd.machine import Machine, load_machine
from backend_rngd.machine.formulas import CollectiveKind, collective_algorithms, collective_time
from ir.errors import UserError
from ir.text import parse_module
from rngdc.buckets import BucketSpec
from rngdc.collectives import collectives_report
from rngdc.compile import SMALLER
from rngdc.effort import DEFAULT, EFFORTS
from rngdc.program import lowering_options
from runtime_sim.runtime import Device
from runtime_sim.timing_result import TimingResult
from runtime_sim.timing_tables import covered

LISTED = 6
"""So many candidates are in the tables; the report as JSON has all."""


@dataclass(frozen=True)
class Candidate:
    """A way to do an operation. cycles: predicted."""

    name: str
    cycles: float
    chosen: bool = False


@dataclass(frozen=True)
class Simulated:
    """What the simulator finds for an operation, on the slowest unit, mean of `executions`. cycles: in which any of its
    instructions is at work. path: that the critical path spends in it."""

    where: str
    executions: int
    cycles: float
    path: float


@dataclass(frozen=True)
class Explanation:
    """A contraction, attention or collective: every operation of the same kind and size is in `simulated`. built: what
    became of the chosen candidate."""

    kind: str
    what: str
    built: str
    candidates: list[Candidate]
    why: str
    simulated: list[Simulated]

    @property
    def predicted(self) -> float | None:
        """Cycles of the candidate that was taken."""
        return next((c.cycles for c in self.candidates if c.chosen), None)

    def to_json(self) -> dict[str, Any]:
        """A JSON-able form."""
        return asdict(self) | {"predicted": self.predicted}


@dataclass(frozen=True)
class Explained:
    """A program."""

    bucket: str
    mode: str
    explanations: list[Explanation]
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        """A JSON-able form."""
        rows = [e.to_json() for e in self.explanations]
        return {"bucket": self.bucket, "mode": self.mode, "operations": rows, "notes": self.notes}


def explain(device: Device, bucket: Bucket, named: str | None = None) -> Explained:
    """The decisions of a program's lowering, in the order of the program.

    named: only operations whose place in the model contains this text. Times are those of the device's mode.
    """
    artifact, machine = device.artifact, device.machine
    decisions, share = _decisions(artifact, bucket)
    result = device.time(bucket)
    found = _choices(decisions, result)
    found += _collectives(artifact, bucket, decisions, machine, result)
    if named is not None:
        found = [e for e in found if any(named in s.where for s in e.simulated)]
    notes = list[str]()
    if share is None:
        notes.append(
            f"{bucket.name}: no lowering of this version makes the program in the artifact; what is shown is the first"
        )
    elif share < 1.0:
        notes.append(
            f"{bucket.name}: values above {share:.0%} of the usual size lie in HBM, because data memory was too small "
            "or because the simulator found that faster"
        )
    return Explained(bucket.name, machine.mode, found, notes)


def _decisions(artifact: Artifact, bucket: Bucket) -> tuple[list[Streamed | Choice], float | None]:
    """What was decided for the program in the artifact, and the share of the usual size above which values lie in HBM.

    The build tries several, also with fewer tiles of weights in flight: the one is found whose instructions and buffers
    are those of the artifact (None: there is none).
    """
    manifest = artifact.manifest
    specs = [BucketSpec(b.phase, b.batch, b.input_length, b.attention_size) for b in manifest.buckets]
    level = manifest.options.opt_level if manifest.options is not None else DEFAULT
    options = lowering_options(specs, manifest.parallel.slices, opt_level=level)
    if manifest.caches:  # the artifact may hold fewer programs than were built
        options = replace(options, cache_capacity=manifest.caches[0].capacity, cache_batch=manifest.caches[0].batch)
    machine, module = load_machine(manifest.machine.name), parse_module(artifact.text(bucket.ir), bucket.ir)
    made, buffers = _of_stream(artifact.stream(bucket))
    tried = {
        (int(options.spill_bytes * v.spill * share), min(tiles, options.in_flight)): v.spill * share
        for v in EFFORTS[level].variants
        for share, tiles in SMALLER
    }
    first: list[Streamed | Choice] = []
    best: tuple[int, list[Streamed | Choice], float] | None = None
    for (spill, tiles), share in sorted(tried.items(), reverse=True):
        try:
            with recording() as decisions:
                lowered = lower(module, machine, replace(options, spill_bytes=spill, in_flight=tiles))
        except UserError:
            continue
        first = first or decisions
        ours, theirs = _of_module(lowered)
        far = abs(theirs - buffers)
        if ours == made and (best is None or far < best[0]):
            best = far, decisions, share
    return (first, None) if best is None else best[1:]


def _of_module(lowered: Lowered) -> tuple[Counter[str], int]:
    """Instructions by the operation they were made for, and buffers that transfers from HBM fill, of all operations."""
    routines = [op for op in lowered.module.body.block.ops if isinstance(op, RoutineOp)]
    items = [(r, op) for r in routines for op in r.body.block.ops if isinstance(op, InstructionOp)]
    filled = {
        (r.sym_name.data, op.where.data, op.destination)
        for r, op in items
        if isinstance(op, DmaOp) and isinstance(op.descriptor, Dma) and _fills(op.descriptor)
    }
    return Counter(op.where.data for _, op in items), len(filled)


def _of_stream(stream: Stream) -> tuple[Counter[str], int]:
    """The same of an emitted program: a buffer has one address."""
    items = [
        (r.name, stream.locations[i.location] if i.location >= 0 else "", i.what)
        for r in stream.routines
        for i in r.instructions
        if not isinstance(i.what, Call)
    ]
    filled = {(r, place, what.destination.base) for r, place, what in items if isinstance(what, Dma) and _fills(what)}
    return Counter(place for _, place, _ in items), len(filled)


def _fills(what: Dma) -> bool:
    return what.source.space == Space.HBM and what.destination.space == Space.DM


# Contractions and attention ------------------------------------------------------------------------------------------
def _choices(decisions: Sequence[Streamed | Choice], result: TimingResult) -> list[Explanation]:
    """One for every distinct shape and choice."""
    built: dict[str, str] = {}
    for s in decisions:
        if isinstance(s, Streamed) and described(s) not in built.setdefault(s.where, described(s)):
            built[s.where] += f"; {described(s)}"
    groups: dict[str, tuple[Choice, list[str]]] = {}
    for c in decisions:
        if isinstance(c, Choice) and c.kind != "collective":
            _, places = groups.setdefault(f"{replace(c, where='')} {built.get(c.where)}", (c, []))
            if c.where not in places:
                places.append(c.where)
    out: list[Explanation] = []
    for c, places in groups.values():
        found = [Candidate(name, cycles, name == c.chosen) for name, cycles in c.candidates.items()]
        found.sort(key=lambda x: x.cycles)
        simulated = [_simulated(place, result) for place in places]
        out.append(Explanation(c.kind, c.what, built.get(c.where, ""), found, c.why, simulated))
    return out


def _simulated(where: str, result: TimingResult) -> Simulated:
    mine = result.flat.unit == result.classes.of_unit[result.slowest]
    names = np.array(result.locations, dtype=object) == where
    spans = [(c.first, c.end) for c in result.flat.calls if c.depth == 1 and mine[c.first : c.end].any()]
    inside = np.zeros(len(mine), np.bool_)
    for first, end in spans:
        inside[first:end] = True
    chosen = [np.nonzero(names[a:b] & mine[a:b])[0] + a for a, b in spans]
    chosen.append(np.nonzero(names & mine & ~inside)[0])
    ran = [rows for rows in chosen if len(rows)]
    cycles = sum(covered(result.start[rows], result.finish[rows]) for rows in ran)
    on_path = sum(c for i, c in zip(result.critical_path, result.path_cycles, strict=True) if names[i])
    count = max(1, len(ran))
    return Simulated(where, len(ran), float(cycles) / count, on_path / count)


# Collectives -----------------------------------------------------------------------------------------------------
def _collectives(
    artifact: Artifact,
    bucket: Bucket,
    decisions: Sequence[Streamed | Choice],
    machine: Machine,
    result: TimingResult,
) -> list[Explanation]:
    """One for every kind and size."""
    decided = {d.where: d for d in decisions if isinstance(d, Choice) and d.kind == "collective"}
    units = artifact.manifest.parallel.tensor
    cards = -(-units // machine.pes_per_chip)
    everywhere = RowSpace.make(bucket.batch, bucket.input_length, artifact.manifest.parallel.slices).replicated
    groups: dict[tuple[str, int, str], list[str]] = {}
    for row in collectives_report(artifact, [bucket])[0]["collectives"]:
        places = groups.setdefault((row["kind"], row["nbytes"], row["algorithm"]), [])
        if row["where"] not in places:
            places.append(row["where"])
    out: list[Explanation] = []
    for (name, nbytes, algorithm), places in groups.items():
        kind: CollectiveKind = _kind(name)
        choice = next((decided[p] for p in places if p in decided), None)
        ways = collective_algorithms(kind, units, cards)
        if choice is not None:  # with the padding of rows, which the value's bytes do not tell
            found = [Candidate(a, cycles, a == algorithm) for a, cycles in choice.candidates.items()]
        else:
            times = {a: collective_time(kind, a, nbytes, units, cards, machine, replicate=everywhere) for a in ways}
            found = [Candidate(a, cycles, a == algorithm) for a, cycles in times.items()]
        found.sort(key=lambda c: c.cycles)
        what = f"{name} of {nbytes:,} B over {units} units"
        simulated = [_simulated(p, result) for p in places]
        out.append(Explanation("collective", what, "", found, _why(kind, choice, ways, algorithm), simulated))
    return out


def _kind(name: str) -> CollectiveKind:
    if name == "all_reduce":
        return "all_reduce"
    return "all_gather" if name == "all_gather" else "reduce_scatter"


def _why(kind: str, choice: Choice | None, ways: Sequence[str], algorithm: str) -> str:
    if choice is not None and len(choice.candidates) > 1:
        times = ", ".join(f"{name} {cycles:,.0f}" for name, cycles in choice.candidates.items())
        return f"the fastest of what the lowering compared: {times} cycles"
    if len(ways) == 1:
        return f"fixed: {algorithm} is the only way"
    if kind == "all_reduce" and algorithm == "two_phase":
        return "fixed: a unit has no room for all units' copies of what it would add, so each adds a part"
    return f"fixed: only {algorithm} can share the values out"


# For people ------------------------------------------------------------------------------------------------------
def explain_tables(explained: Explained) -> list[RenderableType]:
    """A table an operation: candidates, fastest first, and what was simulated."""
    out: list[RenderableType] = [f"{explained.bucket}, {explained.mode} mode, cycles"]
    for e in explained.explanations:
        table = Table(title=f"{e.kind} {e.what}", title_justify="left", caption=_caption(e), caption_justify="left")
        table.add_column("")
        table.add_column("candidate", overflow="fold")
        table.add_column("predicted", justify="right")
        shown = [c for i, c in enumerate(e.candidates) if i < LISTED or c.chosen]
        for c in shown:
            table.add_row("->" if c.chosen else "", c.name, f"{c.cycles:,.0f}")
        if len(shown) < len(e.candidates):
            table.add_row("", f"and {len(e.candidates) - len(shown)} slower ones (--json)", "")
        out.append(table)
    return out


def _caption(e: Explanation) -> str:
    lines = [e.why, *([f"built: {e.built}"] if e.built else [])]
    for s in e.simulated:
        place = s.where.replace("|", " ").strip()
        times = f"simulated {s.cycles:,.0f}, {s.path:,.0f} of them on the critical path"
        lines.append(f"{place}: {times}" + (f" (mean of {s.executions})" if s.executions > 1 else ""))
        if e.predicted is not None and s.cycles:
            lines[-1] += f"; predicted {e.predicted / s.cycles - 1:+.0%}"
    return "\n".join(lines)
