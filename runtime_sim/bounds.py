"""What no simulated time may leave: a lower bound without sharing, a roofline, and an upper bound of strict queues.

Lower: the longest path when nothing is shared, and what every queue, vector engine and shared resource has to do alone.
Upper: the longest path plus everything that is done on something shared, one after the other. Why that holds: walk back
from the last instruction along what each one waited for. At any time on that walk an instruction advances at full
speed, which the longest path counts; or a transfer is slowed, and then (max-min fair rates) one of its resources is
full, for no longer than all its bytes take; or a pass waits for the vector engine, which works for the other context.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from runtime_sim.event_core import Rates, Resources, execute
from runtime_sim.timing_program import Program

NAMES = ("HBM", "DM port", "link", "link", "card link", "card link", "HBM", "DM banks")  # by kind, see `traffic`
TOLERANCE = 1e-6  # of rounding in sums of many cycles


class BoundsError(RuntimeError):
    """A simulated time outside its bounds: the model contradicts itself."""


@dataclass(frozen=True)
class Bounds:
    """Cycles. path: longest path without sharing. roofline: the busiest queue or resource alone, which `binds`. queued:
    everything on shared resources one after the other."""

    path: float
    roofline: float
    binds: str
    queued: float

    @property
    def lower(self) -> float:
        """No schedule is faster."""
        return max(self.path, self.roofline)

    @property
    def upper(self) -> float:
        """No schedule without idle resources is slower."""
        return self.path + self.queued

    def check(self, cycles: float) -> None:
        """Raises BoundsError for a makespan outside."""
        if not self.lower * (1.0 - TOLERANCE) <= cycles <= self.upper * (1.0 + TOLERANCE):
            raise BoundsError(
                f"{cycles:.1f} cycles are outside the bounds {self.lower:.1f} ({self.binds}) and {self.upper:.1f}: the "
                "timing model contradicts itself; please report the program"
            )

    def to_json(self) -> dict[str, Any]:
        """All parts, `lower` and `upper`."""
        return asdict(self) | {"lower": self.lower, "upper": self.upper}


def bounds(
    program: Program,
    resources: Resources,
    queue_start: NDArray[np.int64],
    queue: NDArray[np.int64],
    rates: Rates,
    jit: bool | None,
) -> Bounds:
    """Bounds of a program that the event loop can complete."""
    flat, number = program.flat, program.number
    alone = Resources(
        np.zeros_like(resources.use_start), resources.use_resource[:0], resources.use_weight[:0], resources.capacity,
        resources.kind,
    )  # fmt: skip
    free = Rates(rates.fixed, rates.work, rates.demand, np.zeros_like(rates.vector), rates.waits)
    times = execute(len(flat.streams), queue_start, queue, flat.need, number, free, alone, program.wakes, jit)
    path = float(times.finish.max(initial=0.0))
    duration = (rates.fixed + rates.work)[number]
    by_queue = np.bincount(flat.unit * 3 + flat.context, duration, 3 * len(flat.streams))
    roofline, binds = path, "longest path"
    if len(by_queue) and by_queue.max() > roofline:
        busiest = int(by_queue.argmax())
        roofline, binds = float(by_queue[busiest]), f"{('main', 'sub', 'dma')[busiest % 3]} context"
    held = rates.vector[number]
    main, sub = (
        np.bincount(flat.unit, duration * (held & (flat.context == c)), len(flat.streams)) for c in (0, 1)
    )  # both contexts of a unit hold the vector engine in turn
    both = main + sub
    if len(both) and both.max() > roofline:
        roofline, binds = float(both.max()), "vector engine"
    queued = float(both[(main > 0) & (sub > 0)].sum())
    for time, short, name in _shared(program, resources, rates):
        if time > roofline:
            roofline, binds = float(time), name
        queued += short
    return Bounds(path, roofline, binds, float(queued))


class Need(NamedTuple):
    """Cycles that a shared resource is needed for, when it is free and when it is as short as it gets (0: never
    short)."""

    free: float
    short: float
    name: str


def _shared(program: Program, resources: Resources, rates: Rates) -> list[Need]:
    """What is needed of every shared resource."""
    flat, number = program.flat, program.number
    times = np.bincount(number, minlength=len(rates.work))
    rows = np.repeat(np.arange(len(rates.work)), np.diff(resources.use_start))
    rate = resources.use_weight * rates.demand[rows]  # bytes a cycle of an entry at full speed
    need = np.bincount(resources.use_resource, rate * rates.work[rows] * times[rows], len(resources.capacity))
    # One transfer of a unit at a time: what all units want at once is the sum of what each wants at most.
    unit_of = np.zeros(len(rates.work), np.int64)
    unit_of[number] = flat.unit
    most: dict[tuple[int, int], float] = defaultdict(float)
    for resource, row, amount in zip(resources.use_resource.tolist(), rows.tolist(), rate.tolist(), strict=True):
        if times[row]:
            key = resource, int(unit_of[row])
            most[key] = max(most[key], amount)
    wanted = np.zeros(len(resources.capacity))
    for (resource, _), amount in most.items():
        wanted[resource] += amount
    names = {colour: NAMES[kind] for (kind, _), colour in program.classes.of_resource.items() if kind < len(NAMES)}
    least = _least(program, resources, rates)
    return [
        Need(need[r] / resources.capacity[r], need[r] / least[r] if wanted[r] > least[r] else 0.0, names.get(r, ""))
        for r in range(len(resources.capacity))
        if resources.capacity[r] > 0
    ]


def _least(program: Program, resources: Resources, rates: Rates) -> NDArray[np.float64]:
    """What passes always leave of every resource."""
    out = resources.capacity.copy()
    if resources.bank is not None and rates.press is not None:
        flat, press = program.flat, rates.press[program.number]
        for unit, bank in enumerate(resources.bank.tolist()):
            for context in (0, 1) if bank >= 0 else ():
                out[bank] -= press[(flat.unit == unit) & (flat.context == context)].max(initial=0.0)
    return out
