"""What an instruction costs: cycles, bytes, multiply-accumulates and the engines it occupies."""

from __future__ import annotations

from dataclasses import dataclass

from backend_rngd.isa.check_stream import bank_hits
from backend_rngd.isa.descriptors import Context, Dma, Exec, LoadTrf, LoadVrf, Memset, Notify, Wait
from backend_rngd.machine import Machine
from backend_rngd.machine.formulas import OWN, Reach, dma_startup, dma_time, dma_work, macs, slice_bytes, unit_cycles


@dataclass(frozen=True)
class Cost:
    """What one instruction takes when it has the machine for itself.

    fixed: cycles in any case. work: further cycles of a transfer, stretched when a resource is shared. demand: bytes a
    cycle of `work` at full speed, of HBM lines if the transfer touches HBM (`HbmUse.held`): transfers that share a
    resource get equal parts of it. overhead: the part of `fixed` that moves no data (issue, fill, start-up). reach:
    shares of moved_bytes by where the peer side of a transfer lies. wait: a wait for other units, which takes as long
    as they take. collective: serves other units. starves: hits one bank of data memory so often in a row that transfers
    may be locked out (hardware.md 2.2). press: bytes a cycle that a pass takes of the data memory of every slice,
    before any transfer.
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
    reach: Reach = OWN
    wait: bool = False
    collective: bool = False
    starves: bool = False
    press: float = 0.0

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
    return (what.fetch.cast or what.fetch.raw).bytes != what.commit.dtype.bytes


def cost_of(
    what: Exec | LoadTrf | LoadVrf | Memset | Dma | Notify | Wait,
    context: Context,
    machine: Machine,
    engines: int = 1,
    reach: Reach = OWN,
    notified: int = 0,
) -> Cost:
    """Cost of one instruction. engines: tensor-DMA engines of the unit. reach: where a transfer's peer side lies.
    notified: units that a notify raises."""
    if isinstance(what, Dma):
        work = dma_work(what, machine)
        startup = dma_startup(what, machine, reach)
        rest = dma_time(what, machine, engines, reach) - startup
        moved = what.packet
        for n, _, _ in what.loops:
            moved *= n
        peer = what.source.space.is_peer or what.destination.space.is_peer
        lines = sum(side.held for side in (work.read, work.write) if side) * machine.hbm_line_bytes
        demand = (lines or moved) / rest if rest > 0 else 0.0
        return Cost(
            startup, rest, demand, startup, False, 0, work.hbm_read_bytes, work.hbm_write_bytes, moved, "dma", reach,
            collective=peer,
        )  # fmt: skip
    if isinstance(what, Wait):
        return Cost(0.0, 0.0, 0.0, 0.0, False, 0, 0, 0, 0, "wait", wait=True, collective=True)
    if isinstance(what, Notify):
        issue = float(machine.notify_issue_cycles * notified)
        return Cost(issue, 0.0, 0.0, issue, False, 0, 0, 0, 0, "notify", collective=True)
    time = unit_cycles(what, context, machine)
    overhead = time.total - max(time.stages.values())
    slowest = max(time.stages.values())
    press = slice_bytes(what) / slowest if slowest > 0 else 0.0
    starves = bank_hits(what, context, machine) >= machine.dm_starvation_hits
    if isinstance(what, Exec):
        return Cost(
            time.total, 0.0, 0.0, overhead, uses_vector_engine(what), macs(what), 0, 0, 0, time.bottleneck,
            starves=starves, press=press,
        )  # fmt: skip
    return Cost(time.total, 0.0, 0.0, overhead, False, 0, 0, 0, 0, time.bottleneck, starves=starves, press=press)
