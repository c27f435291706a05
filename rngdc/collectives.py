"""`rngdc inspect --collectives`: what the units of a layer exchange and why, and what spreading a model costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from xdsl.dialects.builtin import ModuleOp
from xdsl.dialects.func import FuncOp

from backend_rngd.artifact import Artifact, Bucket
from backend_rngd.isa.descriptors import Dma, Notify, Stream
from backend_rngd.machine import load_machine
from ir.dialects import tc
from ir.text import parse_module
from passes.parallel_report import collectives_report as of_module
from passes.parallel_report import memory_report, waste_report

EXCHANGES = (tc.AllReduceOp, tc.AllGatherOp, tc.ReduceScatterOp)
Place = tuple[str, str]
"""Routine and location."""


def collectives_report(artifact: Artifact, buckets: Sequence[Bucket]) -> list[dict[str, Any]]:
    """For every bucket: its collectives, counts by kind for a layer and for the rest, padding, copies, and memory."""
    parallel = artifact.manifest.parallel
    machine = load_machine(artifact.manifest.machine.name)
    cards = -(-parallel.tensor // machine.pes_per_chip)
    return [_bucket(artifact, bucket, cards) for bucket in buckets]


def _bucket(artifact: Artifact, bucket: Bucket, cards: int) -> dict[str, Any]:
    module = parse_module(artifact.text(bucket.ir), bucket.ir)
    notifies, transfers = _instructions(artifact.stream(bucket))
    places = _places(module)
    alike = Counter(places)
    rows: list[dict[str, Any]] = []
    for found, place in zip(of_module(module), places, strict=True):
        steps = notifies[place] // alike[place]
        row = asdict(found) | {"where": place[1], "algorithm": _algorithm(found.kind, steps, cards), "notifies": steps}
        rows.append(row | {"transfers": transfers[place] // alike[place]})
    blocks = sorted({r["function"] for r in rows if r["function"].startswith("block")})
    layer = [r for r in rows if blocks and r["function"] == blocks[0]]
    rest = [r for r in rows if not r["function"].startswith("block")]
    memory = memory_report(module)
    return {
        "bucket": bucket.name,
        "per_layer": dict(Counter(r["kind"] for r in layer)),
        "elsewhere": dict(Counter(r["kind"] for r in rest)),
        "collectives": rows,
        "waste": [asdict(w) for w in waste_report(module)],
        "memory": asdict(memory),
    }


def _places(module: ModuleOp) -> list[Place]:
    """Where the instructions of every collective come from, in the order of the report."""
    return [
        (function.sym_name.data, f"{getattr(op.attributes.get('path'), 'data', '')}|{op.name}")
        for function in module.ops
        if isinstance(function, FuncOp)
        for op in function.body.block.ops
        if isinstance(op, EXCHANGES)
    ]


def _instructions(stream: Stream) -> tuple[Counter[Place], Counter[Place]]:
    """Notifies, and transfers from or to other units, by place."""
    notifies: Counter[Place] = Counter()
    transfers: Counter[Place] = Counter()
    for routine in stream.routines:
        for item in routine.instructions:
            place = routine.name, stream.locations[item.location] if item.location >= 0 else ""
            if isinstance(item.what, Notify):
                notifies[place] += 1
            elif isinstance(item.what, Dma) and (item.what.source.space.is_peer or item.what.destination.space.is_peer):
                transfers[place] += 1
    return notifies, transfers


def _algorithm(kind: str, notifies: int, cards: int) -> str:
    """How a collective was lowered: `formulas.collective_algorithms`. A one-shot synchronises once."""
    if cards > 1:
        return "hierarchical"
    return "two_phase" if kind == "all_reduce" and notifies > 1 else "one_shot"


def collectives_tables(reports: Sequence[dict[str, Any]]) -> list[RenderableType]:
    """The report for people."""
    out: list[RenderableType] = []
    for report in reports:
        counted = [
            f"{name}: " + (", ".join(f"{n} {kind}" for kind, n in report[key].items()) or "none")
            for name, key in (("a layer", "per_layer"), ("elsewhere", "elsewhere"))
        ]
        table = Table(title=f"Collectives of {report['bucket']} ({'; '.join(counted)})")
        for name in ("function", "kind", "axis", "bytes", "algorithm", "times", "why"):
            table.add_column(name, justify="right" if name in ("bytes", "times") else "left")
        for r in report["collectives"]:
            cells = (r["function"], r["kind"], r["axis"], f"{r['nbytes']:,}", r["algorithm"], str(r["calls"]), r["why"])
            table.add_row(*cells)
        out.append(table)
    for waste in reports[0]["waste"] if reports else ():
        out.append(
            f"padding: {waste['what']}: {waste['size']:,} become {waste['padded']:,} ({waste['share']:.1%} not needed) "
            f"in {waste['weights']} weights such as {waste['example']}"
        )
    if reports:
        memory = reports[0]["memory"]
        out.append(
            f"weights: {memory['weights'] / 1e6:,.1f} MB, {memory['weights_per_unit'] / 1e6:,.1f} MB in each unit; "
            f"caches: {memory['caches'] / 1e6:,.1f} MB, {memory['caches_per_unit'] / 1e6:,.1f} MB in each unit"
        )
    return out
