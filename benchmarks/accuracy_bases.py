"""Clocks and time bases of the measurements (docs/accuracy.md, "Time bases"), and the bounds of a figure."""

from __future__ import annotations

from dataclasses import dataclass

from backend_rngd.machine import Machine, load_machine
from runtime_sim.timing import TimingResult

HP_CLOCK = 0.8  # of the nominal tensor clock: HP's profiler counted 1,599.9 M ticks a second under load


@dataclass(frozen=True)
class Base:
    """A card and how its times were written down. us: of one cycle, in the unit of the published figure."""

    machine: Machine
    us: float

    def of(self, result: TimingResult) -> float:
        """Makespan in published us."""
        return result.cycles * self.us

    def bound(self, macs: float, hbm: float, pes: int) -> tuple[float, str]:
        """Published us and what binds, at documented peaks: what no mapping can beat."""
        limits = {
            "compute": macs / (16_384 * pes),
            "HBM": hbm / self.machine.hbm_bytes_per_cycle,
            "DM": hbm / (256 * pes),
        }
        binds = max(limits, key=lambda k: limits[k])
        return limits[binds] * self.us, binds


SILICON = load_machine(mode="silicon")
HOST_US = SILICON.host_step_us
NOMINAL = Base(SILICON, SILICON.seconds_per_cycle * 1e6)
_SLOW = SILICON.at_clock(HP_CLOCK)
HP_TRACE = Base(_SLOW, _SLOW.seconds_per_cycle * 1e6)  # ticks converted at the measured clock
HP_PROFILER = Base(_SLOW, 2 / SILICON.tick_hz * 1e6)  # ticks converted at the nominal clock


def ticks(count: float) -> float:
    """us of profiler ticks at the nominal clock (KK, ED)."""
    return count / SILICON.tick_hz * 1e6
