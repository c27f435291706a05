"""Time of transfers while all units of a card are busy with such transfers, on the machine as measured.

The compiler decides by these times whatever mode it is asked for: the documented rates know no difference between
orders of a transfer, and not what units take from each other.
"""

from __future__ import annotations

from functools import lru_cache

from backend_rngd.isa.descriptors import Dma
from backend_rngd.machine.description import Machine, load_machine
from backend_rngd.machine.transfers import OWN, Reach, dma_startup, dma_time, dma_work


@lru_cache
def judge(name: str) -> Machine:
    """The machine as measured."""
    return load_machine(name, mode="silicon")


def share_of_hbm(machine: Machine, units: int) -> float:
    """Bytes a cycle of HBM for one engine, if so many engines of a card are busy."""
    return machine.hbm_bytes_per_cycle * machine.hbm_efficiency / units


@lru_cache(maxsize=1 << 14)
def crowded(desc: Dma, name: str, units: int) -> float:
    """Cycles of a transfer if so many engines of the card are busy with such transfers."""
    machine = judge(name)
    reach = _everywhere(units, machine) if desc.source.space.is_peer else OWN
    work = dma_work(desc, machine)
    lines = sum(side.busiest for side in (work.read, work.write) if side is not None)
    together = lines * machine.hbm_channels * machine.hbm_line_bytes / share_of_hbm(machine, units)
    return max(dma_time(desc, machine, reach=reach), dma_startup(desc, machine) + together)


def _everywhere(units: int, machine: Machine) -> Reach:
    """Where the bytes lie that a unit of a card reads from all units evenly."""
    near = min(units, machine.pes_per_cluster)
    return Reach(1 / units, (near - 1) / units, (units - near) / units)
