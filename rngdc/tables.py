"""What `rngdc inspect` shows: as JSON and as tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import RenderableType
from rich.table import Table

from backend_rngd.artifact import Artifact, Bucket, Port

BUCKET_FIELDS = {"name", "phase", "batch", "input_length", "attention_size", "instructions"}


def report_artifact(artifact: Artifact, buckets: Sequence[Bucket]) -> dict[str, Any]:
    """A summary of an artifact, for `rngdc inspect --json`."""
    m = artifact.manifest
    return {
        "artifact": str(artifact.directory),
        "name": m.name,
        "format": m.version.model_dump(),
        "compiler": m.compiler.model_dump(),
        "machine": m.machine.model_dump(),
        "model": m.model.model_dump(mode="json"),
        "parallel": m.parallel.model_dump(),
        "options": m.options.model_dump(mode="json") if m.options is not None else None,
        "rebuild": artifact.rebuild(),
        "weights": {"mode": m.weights_mode, "tensors": len(m.weights), "images": len(m.placements)},
        "hbm_bytes": m.hbm.model_dump(),
        "buckets": [
            {**b.model_dump(mode="json", include=BUCKET_FIELDS),
             "inputs": {p.name: [p.dtype, *p.shape] for p in b.inputs},
             "outputs": {p.name: [p.dtype, *p.shape] for p in b.outputs}}
            for b in buckets
        ],
    }  # fmt: skip


def inspect_tables(artifact: Artifact, buckets: Sequence[Bucket]) -> list[RenderableType]:
    """What an artifact holds, for people."""
    m = artifact.manifest
    head = Table(show_header=False, box=None)
    head.add_column(style="bold")
    head.add_column()
    rows = {"name": m.name} if m.name else {}
    spread = f"{m.parallel.tensor} processing element(s) of {m.parallel.slices} slices a layer"
    if m.parallel.mesh:
        spread += f" ({m.parallel.mesh})"
    each = " of a processing element" if m.parallel.units > 1 else ""
    rows |= {
        "model": f"{m.model.id} ({m.model.architecture}, {m.model.num_layers} layers)",
        "format": f"{m.version.major}.{m.version.minor}, {m.compiler.name} {m.compiler.version}",
        "machine": f"{m.machine.name} {m.machine.digest[:12]}",
        "parallel": f"{spread}; {m.parallel.pipeline} pipeline stage(s) preferred",
        "weights": f"{m.weights_mode}: {len(m.weights)} tensors, {m.hbm.weights / 1e6:,.1f} MB in HBM{each}",
        "caches": f"{m.hbm.caches / 1e6:,.1f} MB{each}",
        "HBM": f"{m.hbm.total / 1e6:,.1f} MB{each}",
        "build again": artifact.rebuild(),
    }
    for name, text in rows.items():
        head.add_row(name, text)
    table = Table()
    for name in ("bucket", "instructions", "inputs", "outputs"):
        table.add_column(name, justify="right" if name == "instructions" else "left")
    for b in buckets:
        table.add_row(b.name, f"{b.instructions:,}", _ports(b.inputs), _ports(b.outputs))
    return [head, table]


def _ports(ports: tuple[Port, ...]) -> str:
    return "\n".join(f"{p.name} {p.dtype}{list(p.shape)}" for p in ports)
