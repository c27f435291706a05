"""What an instruction costs: cycles, bytes, multiply-accumulates and the engines it occupies."""

from __future__ import annotations

from dataclasses import dataclass

from backend_rngd.isa.descriptors import Context, Dma, Exec, LoadTrf, LoadVrf, Memset
from backend_rngd.machine import Machine
from backend_rngd.machine.formulas import dma_time, dma_work, macs, unit_cycles


@dataclass(frozen=True)
class Cost:
    """What one instruction takes when it has the machine for itself.

    fixed: cycles in any case. work: further cycles of a transfer, stretched when HBM is shared; demand: the HBM bytes a
    cycle it takes at full speed. overhead: the part of `fixed` that moves no data (issue, fill, start-up).
    """

    fixed: float
    work: float
    demand: float
    overhead: float
    vector: bool
    macs: int
    read_bytes: int
    write_bytes: int
    moved_bytes: int
    bottleneck: str

    @property
    def cycles(self) -> float:
        """Duration without contention."""
        return self.fixed + self.work


def uses_vector_engine(what: Exec) -> bool:
    """Whether a pass holds the vector engine: its ALUs or the cast engine (hardware.md 2.10)."""
    if what.vector or what.stash_input:
        return True
    if what.contract is not None:
        return what.commit.dtype.bytes != 4
    return (what.fetch.cast or what.fetch.dtype).bytes != what.commit.dtype.bytes


def cost_of(
    what: Exec | LoadTrf | LoadVrf | Memset | Dma, context: Context, machine: Machine, engines: int = 1
) -> Cost:
    """Cost of one instruction. engines: tensor-DMA engines of the unit."""
    if isinstance(what, Dma):
        work = dma_work(what, machine)
        startup = float(machine.dma_startup_cycles)
        rest = dma_time(what, machine, engines) - startup
        lines = work.hbm_lines * machine.hbm_line_bytes
        moved = what.packet
        for n, _, _ in what.loops:
            moved *= n
        return Cost(
            startup, rest, lines / rest if rest > 0 else 0.0, startup, False, 0,
            work.hbm_read_bytes, work.hbm_write_bytes, moved, "dma",
        )  # fmt: skip
    time = unit_cycles(what, context, machine)
    overhead = time.total - max(time.stages.values())
    if isinstance(what, Exec):
        return Cost(time.total, 0.0, 0.0, overhead, uses_vector_engine(what), macs(what), 0, 0, 0, time.bottleneck)
    return Cost(time.total, 0.0, 0.0, overhead, False, 0, 0, 0, 0, time.bottleneck)
