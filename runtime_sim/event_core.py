"""The event loop of the timing simulator: in-order queues, completion counters, a shared engine and fluid bandwidth.

`run` is plain Python over flat lists and compiles unchanged with numba over arrays; both give the same numbers bit for
bit. Queue `3 * unit + context` holds the instructions of a context in order. An instruction starts when its queue is
free, when every context of its unit has completed the count it waits for, and, if it uses the vector engine, when the
other context of the unit does not hold it (first ready, first served; the main context on a tie). It then takes `fixed`
cycles, after which its `work` cycles advance at a rate in (0, 1]: transfers share the memory's bandwidth max-min fairly
(progressive filling), where `demand` is what one takes at rate 1, in bytes a cycle.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

JIT_FROM = 30_000  # instructions; below, loading the compiler costs more than it saves


Integers = list[int]
Floats = list[float]


def run(
    units: int,
    queue_start: Integers,
    queue: Integers,
    need: Integers,
    fixed: Floats,
    work: Floats,
    demand: Floats,
    vector: list[bool],
    capacity: float,
    start: Floats,
    ready: Floats,
    finish: Floats,
    cause: Integers,
    rate: Floats,
    flows: Integers,
) -> int:
    """Fill start, ready, finish (cycles) and cause (instruction whose completion made this one ready, -1 none).

    rate, flows: scratch of one entry a queue. Returns the number of completed instructions; fewer than given means
    that the rest waits for something that never happens.
    """
    queues = 3 * units
    inf = 1e300
    head = [0] * queues
    current = [-1] * queues
    phase = [0] * queues  # 1 fixed part, 2 fluid part
    end = [inf] * queues
    left = [0.0] * queues
    updated = [0.0] * queues
    done = [0] * queues
    waiting = [-1] * queues  # head instruction already known to be ready
    holder = [-1] * units
    for q in range(queues):
        head[q] = queue_start[q]
        rate[q] = 0.0
    active = 0
    completed = 0
    time = 0.0
    last = -1
    dirty = False
    first_unit = 0
    last_unit = units
    while True:
        # Start what can start, in the units that changed.
        for unit in range(first_unit, last_unit):
            base = 3 * unit
            for c in range(3):
                q = base + c
                if current[q] >= 0 or head[q] >= queue_start[q + 1] or waiting[q] >= 0:
                    continue
                i = queue[head[q]]
                if (
                    need[3 * i] <= done[base]
                    and need[3 * i + 1] <= done[base + 1]
                    and need[3 * i + 2] <= done[base + 2]
                ):
                    waiting[q] = i
                    ready[i] = time
                    cause[i] = last
            for turn in range(3):
                c = turn
                both = turn < 2 and waiting[base] >= 0 and waiting[base + 1] >= 0
                if both and ready[waiting[base + 1]] < ready[waiting[base]]:
                    c = 1 - turn
                q = base + c
                i = waiting[q]
                if i < 0:
                    continue
                if vector[i]:
                    if holder[unit] >= 0:
                        continue
                    holder[unit] = q
                waiting[q] = -1
                current[q] = i
                start[i] = time
                phase[q] = 1
                end[q] = time + fixed[i]
                if demand[i] <= 0.0:
                    end[q] = time + fixed[i] + work[i]
        if dirty:
            # Progressive filling: flows that want less than an equal share get it, the others split the rest.
            for j in range(active):
                q = flows[j]
                left[q] -= rate[q] * (time - updated[q])
                if left[q] < 0.0:
                    left[q] = 0.0
                updated[q] = time
                rate[q] = -1.0
            rest = capacity
            open_flows = active
            while open_flows > 0:
                share = rest / open_flows
                changed = False
                for j in range(active):
                    q = flows[j]
                    if rate[q] < 0.0 and demand[current[q]] <= share:
                        rate[q] = 1.0
                        rest -= demand[current[q]]
                        open_flows -= 1
                        changed = True
                if not changed:
                    for j in range(active):
                        q = flows[j]
                        if rate[q] < 0.0:
                            rate[q] = share / demand[current[q]]
                    open_flows = 0
            for j in range(active):
                q = flows[j]
                end[q] = time + left[q] / rate[q]
            dirty = False
        # Next event.
        best = 0
        for q in range(1, queues):
            if end[q] < end[best]:
                best = q
        if end[best] >= inf:
            return completed
        time = end[best]
        i = current[best]
        unit = best // 3
        if phase[best] == 1 and demand[i] > 0.0 and work[i] > 0.0:
            phase[best] = 2
            left[best] = work[i]
            updated[best] = time
            rate[best] = 0.0
            end[best] = inf
            flows[active] = best
            active += 1
            dirty = True
            first_unit = 0
            last_unit = 0
            continue
        if phase[best] == 2:
            for j in range(active):
                if flows[j] == best:
                    flows[j] = flows[active - 1]
                    break
            active -= 1
            dirty = True
        finish[i] = time
        completed += 1
        done[best] += 1
        head[best] += 1
        current[best] = -1
        phase[best] = 0
        end[best] = inf
        if holder[unit] == best:
            holder[unit] = -1
        last = i
        first_unit = unit
        last_unit = unit + 1


@cache
def compiled() -> Callable[..., int] | None:
    """`run` compiled with numba and kept on disk between processes; None if numba is not installed."""
    try:
        import numba  # half a second, so only when it pays
    except ImportError:
        return None
    jitted: Callable[..., int] = cast(Any, numba).njit(cache=True)(run)
    return jitted


def execute(
    units: int,
    queue_start: NDArray[np.int64],
    queue: NDArray[np.int64],
    need: NDArray[np.int64],
    fixed: NDArray[np.float64],
    work: NDArray[np.float64],
    demand: NDArray[np.float64],
    vector: NDArray[np.bool_],
    capacity: float,
    jit: bool | None = None,
) -> tuple[int, NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """Run the loop; returns (completed, start, ready, finish, cause). need is [instructions, 3]."""
    n = len(queue)
    arrays: list[Any] = [queue_start, queue, need.reshape(-1), fixed, work, demand, vector]
    outputs: list[Any] = [np.zeros(n), np.zeros(n), np.full(n, -1.0), np.full(n, -1, np.int64)]
    scratch: list[Any] = [np.zeros(3 * units), np.zeros(3 * units, np.int64)]
    loop = compiled() if (jit if jit is not None else n >= JIT_FROM) else None
    if loop is not None:
        completed = loop(units, *arrays, float(capacity), *outputs, *scratch)
        return int(completed), outputs[0], outputs[1], outputs[2], outputs[3]
    lists = [a.tolist() for a in arrays]
    results = [a.tolist() for a in outputs]
    plain = cast(Callable[..., int], run)
    completed = plain(units, *lists, float(capacity), *results, *(a.tolist() for a in scratch))
    return (
        completed,
        np.array(results[0], np.float64),
        np.array(results[1], np.float64),
        np.array(results[2], np.float64),
        np.array(results[3], np.int64),
    )
