"""`rngdc build --dry-run`: everything a build checks before it lowers, and what would come out of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.console import RenderableType
from rich.table import Table

from backend_rngd.machine import Machine, load_machine
from ir.errors import Problem, UserError
from rngdc.buckets import BucketSpec
from rngdc.build import Clock, Progress, check_all, front, shard_modules, specialise_modules
from rngdc.estimate import Estimate, Memory, estimate, memory_of, memory_problems, operations_of, work_of
from rngdc.options import BuildOptions, ParallelOptions

SECONDS_AN_OPERATION = 0.003
"""Backend time of an operation of `tc` on one core of a server of 2024; a function that is called often counts once."""
CHECKSUM_BYTES_A_SECOND = 0.8e9


@dataclass
class Plan:
    """What a build would do."""

    model: str
    layers: int
    machine: Machine
    parallel: ParallelOptions
    memory: Memory
    estimates: dict[BucketSpec, Estimate]
    build_seconds: float
    notes: list[str]

    @property
    def cards(self) -> int:
        """Cards for the stages that were asked for."""
        units = self.parallel.tensor * self.parallel.pipeline
        return -(-units // self.machine.pes_per_chip)

    def to_json(self) -> dict[str, Any]:
        """The report of `--json`."""
        weights, caches = self.memory.largest(self.parallel.pipeline)
        return {
            "model": self.model,
            "num_layers": self.layers,
            "tensor_parallel_size": self.parallel.tensor,
            "pipeline_parallel_size": self.parallel.pipeline,
            "cards": self.cards,
            "hbm_bytes_per_pe": {"weights": weights, "caches": caches},
            "hbm_bytes_per_card": self.machine.hbm_usable_bytes,
            "buckets": [
                {"name": b.name, "phase": b.phase, "batch": b.batch, "input_length": b.input_length,
                 "attention_size": b.attention_size, "logits": b.logits, "estimated_us": e.seconds * 1e6,
                 "arithmetic_us": e.arithmetic * 1e6, "hbm_us": e.traffic * 1e6, "collectives_us": e.collectives * 1e6,
                 "collectives": len(e.work.exchanges), "macs_per_pe": e.work.macs}
                for b, e in self.estimates.items()
            ],
            "estimated_build_seconds": self.build_seconds,
            "notes": self.notes,
        }  # fmt: skip

    def tables(self) -> list[RenderableType]:
        """The report for people."""
        head = Table(show_header=False, box=None)
        head.add_column(style="bold")
        head.add_column()
        weights, caches = self.memory.largest(self.parallel.pipeline)
        card = self.memory.card(self.parallel.tensor, self.parallel.pipeline, self.machine)
        rows = {
            "model": f"{self.model}, {self.layers} layers",
            "parallel": f"{self.parallel.tensor} processing element(s) a layer, {self.parallel.pipeline} stage(s), "
            f"{self.cards} card(s)",
            "HBM of a processing element": f"{weights / 1e6:,.1f} MB of weights, {caches / 1e6:,.1f} MB of caches",
            "HBM of a card": f"{card / 1e9:,.2f} of {self.machine.hbm_usable_bytes / 1e9:,.2f} GB",
            "build": f"about {self.build_seconds:,.0f} s",
        }
        for name, text in rows.items():
            head.add_row(name, text)
        table = Table(title="Programs (times are lower bounds: peak arithmetic or HBM bandwidth, and collectives)")
        table.add_column("bucket")
        for name in ("time", "arithmetic", "HBM", "collectives", "number"):
            table.add_column(name, justify="right")
        for bucket, e in self.estimates.items():
            times = [f"{s * 1e6:,.0f} us" for s in (e.seconds, e.arithmetic, e.traffic, e.collectives)]
            table.add_row(bucket.name, *times, str(len(e.work.exchanges)))
        return [head, table]


def dry_run(options: BuildOptions, progress: Progress, problems: list[Problem] | None = None) -> Plan:
    """Check everything and estimate. Raises UserError with every problem found; writes nothing but `--dump-ir`."""
    from passes.opt import run_pipeline
    from passes.pipeline import outline_stage

    clock, notes, machine = Clock(), list[str](), load_machine(options.machine)
    found = list(problems or [])
    source, buckets, _ = check_all(options, machine, found, notes, progress)
    captured = front(options, source, notes, clock, progress, options.work.open_cache(), store=False)
    modules = specialise_modules(options, captured, buckets, progress)
    modules = shard_modules(options, modules, notes, progress)
    progress("estimating")
    for module in modules.values():
        run_pipeline(module, outline_stage())
    memory = memory_of(modules.values())
    if short := memory_problems(memory, options.parallel, machine, options.device):
        raise UserError(short)
    estimates = {b: estimate(work_of(m), machine, options.parallel.tensor) for b, m in modules.items()}
    seconds = clock.total() + SECONDS_AN_OPERATION * sum(operations_of(m) for m in modules.values())
    if options.weights in ("link", "copy"):
        seconds += sum(f.stat().st_size for f in source.weight_files) / CHECKSUM_BYTES_A_SECOND
    return Plan(
        source.name, captured.info.layers, machine, options.parallel, memory, estimates, seconds, notes
    )  # fmt: skip
