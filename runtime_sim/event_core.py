"""The event loop of the timing simulator: in-order queues, completion counters, synchronisation, fluid resources.

`run` is plain Python over flat lists and compiles unchanged with numba over arrays; both give the same numbers bit for
bit. Queue `3 * unit + context` holds the instructions of a context in order. An instruction starts when its queue is
free, when every context of its unit has completed the count it waits for, and, if it uses the vector engine, when the
other context of the unit does not hold it (first ready, first served; the main context on a tie). What it then takes
follows from its cost, a row that many instructions share:

* `fixed` cycles, after which its `work` cycles advance at a rate in (0, 1]. A transfer uses resources (HBM of a card,
  DM ports, links) and takes `demand` bytes a cycle of its first one at rate 1; `use_weight` is what it takes of each
  resource for every byte of demand. Rates are max-min fair in demand (progressive filling) and change only when a
  transfer starts or ends.
* a pass takes `press` of the capacity of its unit's banks (`bank`, -1: they cannot be short) while it runs.
* a wait (`waits`) ends when all its notifies have arrived: when the last one completed plus its latency.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

JIT_FROM = 30_000  # instructions; below, loading the compiler costs more than it saves
KINDS = 4  # of resources; see `Resources.kind`


Integers = list[int]
Floats = list[float]


def run(
    units: int,
    queue_start: Integers,
    queue: Integers,
    need: Integers,
    number: Integers,
    fixed: Floats,
    work: Floats,
    demand: Floats,
    vector: list[bool],
    waits: list[bool],
    press: Floats,
    bank: Integers,
    use_start: Integers,
    use_resource: Integers,
    use_weight: Floats,
    capacity: Floats,
    kind: Integers,
    wake_start: Integers,
    wake: Integers,
    wake_queue: Integers,
    wake_latency: Floats,
    missing: Integers,
    arrival: Floats,
    start: Floats,
    ready: Floats,
    finish: Floats,
    cause: Integers,
    waker: Integers,
    lost: Floats,
    rate: Floats,
    flows: Integers,
    slack: Floats,
    load: Floats,
    users: Integers,
    pools: Integers,
) -> int:
    """Fill start, ready, finish (cycles), cause (instruction whose completion made this one ready, -1 none), waker (the
    notify that ended a wait) and lost (cycles a transfer lost to each kind of resource).

    missing: notifies a wait still lacks. rate, flows (an entry a queue), slack, load, users, pools (an entry a
    resource): scratch. Returns the number of completed instructions; fewer than given means that the rest waits for
    something that never happens.
    """
    queues = 3 * units
    inf = 1e300
    n = 0
    head = [0] * queues
    current = [-1] * queues
    phase = [0] * queues  # 1 fixed part, 2 fluid part
    end = [inf] * queues
    left = [0.0] * queues
    updated = [0.0] * queues
    planned = [0.0] * queues
    tight = [-1] * queues  # kind of the resource that limits a transfer
    pressed = [-1] * queues
    costs = [0] * queues  # cost row of the current instruction
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
    synchronised = len(wake) > 0
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
            both = waiting[base] >= 0 and waiting[base + 1] >= 0
            sub_first = both and ready[waiting[base + 1]] < ready[waiting[base]]
            for turn in range(3):
                q = base + (1 - turn if sub_first and turn < 2 else turn)
                i = waiting[q]
                if i < 0:
                    continue
                n = number[i]
                costs[q] = n
                if vector[n]:
                    if holder[unit] >= 0:
                        continue
                    holder[unit] = q
                waiting[q] = -1
                current[q] = i
                start[i] = time
                phase[q] = 1
                if press[n] > 0.0 and bank[unit] >= 0:
                    capacity[bank[unit]] -= press[n]
                    dirty = dirty or phase[base + 2] == 2
                if waits[n]:
                    end[q] = inf if missing[i] > 0 else max(time, arrival[i])
                elif use_start[n] == use_start[n + 1]:
                    end[q] = time + fixed[n] + work[n]
                else:
                    end[q] = time + fixed[n]
        if dirty:
            # Progressive filling: all transfers grow together until they have what they want or a resource is full.
            touched = 0
            for j in range(active):
                q = flows[j]
                planned[q] = -1.0
                pressed[q] = -1
                n = costs[q]
                for e in range(use_start[n], use_start[n + 1]):
                    r = use_resource[e]
                    if users[r] == 0:
                        slack[r] = capacity[r]
                        load[r] = 0.0
                        pools[touched] = r
                        touched += 1
                    users[r] += 1
                    load[r] += use_weight[e]
            open_flows = active
            while open_flows > 0:
                share = inf
                for j in range(touched):
                    r = pools[j]
                    if users[r] > 0 and slack[r] < load[r] * share:
                        share = slack[r] / load[r]
                before = open_flows
                for j in range(active):
                    q = flows[j]
                    n = costs[q]
                    if planned[q] == -1.0 and demand[n] <= share:
                        planned[q] = 1.0
                        open_flows -= 1
                        for e in range(use_start[n], use_start[n + 1]):
                            r = use_resource[e]
                            slack[r] -= use_weight[e] * demand[n]
                            load[r] -= use_weight[e]
                            users[r] -= 1
                if open_flows < before:
                    continue
                # Every open transfer on a full resource stops growing (marked first, for slack changes below).
                for j in range(active):
                    q = flows[j]
                    if planned[q] != -1.0:
                        continue
                    n = costs[q]
                    for e in range(use_start[n], use_start[n + 1]):
                        r = use_resource[e]
                        if slack[r] <= load[r] * share * (1.0 + 1e-12):
                            planned[q] = -2.0
                            pressed[q] = kind[r]
                            break
                for j in range(active):
                    q = flows[j]
                    if planned[q] == -2.0:
                        n = costs[q]
                        planned[q] = share / demand[n]
                        open_flows -= 1
                        for e in range(use_start[n], use_start[n + 1]):
                            r = use_resource[e]
                            slack[r] -= use_weight[e] * share
                            load[r] -= use_weight[e]
                            users[r] -= 1
            for j in range(active):
                q = flows[j]
                if planned[q] == rate[q] and pressed[q] == tight[q]:
                    continue
                passed = time - updated[q]
                left[q] -= rate[q] * passed
                if left[q] < 0.0:
                    left[q] = 0.0
                if tight[q] >= 0:
                    lost[KINDS * current[q] + tight[q]] += (1.0 - rate[q]) * passed
                updated[q] = time
                rate[q] = planned[q]
                tight[q] = pressed[q]
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
        n = costs[best]
        unit = best // 3
        if phase[best] == 1 and use_start[n] != use_start[n + 1] and work[n] > 0.0:
            phase[best] = 2
            left[best] = work[n]
            updated[best] = time
            rate[best] = 0.0
            tight[best] = -1
            end[best] = inf
            flows[active] = best
            active += 1
            dirty = True
            first_unit = 0
            last_unit = 0
            continue
        if phase[best] == 2:
            if tight[best] >= 0:
                lost[KINDS * i + tight[best]] += (1.0 - rate[best]) * (time - updated[best])
            for j in range(active):
                if flows[j] == best:
                    flows[j] = flows[active - 1]
                    break
            active -= 1
            dirty = True
        if press[n] > 0.0 and bank[unit] >= 0:
            capacity[bank[unit]] += press[n]
            dirty = dirty or phase[3 * unit + 2] == 2
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
        if not synchronised:
            continue
        for e in range(wake_start[i], wake_start[i + 1]):
            w = wake[e]
            moment = time + wake_latency[e]
            if moment >= arrival[w]:
                arrival[w] = moment
                waker[w] = i
            missing[w] -= 1
            if missing[w] == 0 and current[wake_queue[e]] == w:
                end[wake_queue[e]] = max(time, arrival[w])


@cache
def compiled() -> Callable[..., int] | None:
    """`run` compiled with numba and kept on disk between processes; None if numba is not installed."""
    try:
        import numba  # half a second, so only when it pays
    except ImportError:
        return None
    jitted: Callable[..., int] = cast(Any, numba).njit(cache=True)(run)
    return jitted


@dataclass(frozen=True)
class Rates:
    """Cost rows, one for every distinct cost: columns of `run`."""

    fixed: NDArray[np.float64]
    work: NDArray[np.float64]
    demand: NDArray[np.float64]
    vector: NDArray[np.bool_]
    waits: NDArray[np.bool_]
    press: NDArray[np.float64] | None = None


@dataclass(frozen=True)
class Resources:
    """What cost rows use: row n has entries use_start[n]:use_start[n + 1] of (resource, weight).

    capacity: bytes a cycle. kind: 0 HBM, 1 data memory, 2 link between clusters, 3 link between cards. bank: of every
    unit the banks that its passes take a part of (`Rates.press`), -1 for none.
    """

    use_start: NDArray[np.int64]
    use_resource: NDArray[np.int64]
    use_weight: NDArray[np.float64]
    capacity: NDArray[np.float64]
    kind: NDArray[np.int64]
    bank: NDArray[np.int64] | None = None


@dataclass(frozen=True)
class Wakes:
    """Notifies: instruction i ends with entries start[i]:start[i + 1] of (wait, its queue, latency)."""

    start: NDArray[np.int64]
    wait: NDArray[np.int64]
    queue: NDArray[np.int64]
    latency: NDArray[np.float64]
    missing: NDArray[np.int64]  # an entry an instruction: notifies it waits for

    @staticmethod
    def none(instructions: int) -> Wakes:
        """A program without synchronisation."""
        empty = np.zeros(0, np.int64)
        return Wakes(np.zeros(instructions + 1, np.int64), empty, empty, np.zeros(0), np.zeros(instructions, np.int64))


@dataclass(frozen=True)
class Times:
    """What `run` found out, an entry an instruction; lost is [n, KINDS]."""

    completed: int
    start: NDArray[np.float64]
    ready: NDArray[np.float64]
    finish: NDArray[np.float64]
    cause: NDArray[np.int64]
    waker: NDArray[np.int64]
    lost: NDArray[np.float64]


def execute(
    units: int,
    queue_start: NDArray[np.int64],
    queue: NDArray[np.int64],
    need: NDArray[np.int64],
    number: NDArray[np.int64],
    rates: Rates,
    resources: Resources,
    wakes: Wakes | None = None,
    jit: bool | None = None,
) -> Times:
    """Run the loop. need is [instructions, 3], number the cost row of every instruction."""
    n = len(queue)
    wakes = wakes or Wakes.none(n)
    inputs: list[Any] = [
        queue_start, queue, need.reshape(-1), number,
        rates.fixed, rates.work, rates.demand, rates.vector, rates.waits,
        np.zeros(len(rates.fixed)) if rates.press is None else rates.press,
        np.full(units, -1, np.int64) if resources.bank is None else resources.bank,
        resources.use_start, resources.use_resource, resources.use_weight, resources.capacity.copy(), resources.kind,
        wakes.start, wakes.wait, wakes.queue, wakes.latency, wakes.missing.copy(), np.zeros(n),
    ]  # fmt: skip
    outputs: list[Any] = [
        np.zeros(n), np.zeros(n), np.full(n, -1.0), np.full(n, -1, np.int64), np.full(n, -1, np.int64),
        np.zeros(n * KINDS),
    ]  # fmt: skip
    pools = len(resources.capacity)
    scratch: list[Any] = [
        np.zeros(3 * units), np.zeros(3 * units, np.int64), np.zeros(pools), np.zeros(pools),
        np.zeros(pools, np.int64), np.zeros(pools, np.int64),
    ]  # fmt: skip
    loop = compiled() if (jit if jit is not None else n >= JIT_FROM) else None
    if loop is not None:
        completed = int(loop(units, *inputs, *outputs, *scratch))
    else:
        results = [a.tolist() for a in outputs]
        plain = cast(Callable[..., int], run)
        completed = plain(units, *(a.tolist() for a in inputs), *results, *(a.tolist() for a in scratch))
        outputs = [np.array(values, a.dtype) for values, a in zip(results, outputs, strict=True)]
    start, ready, finish, cause, waker, lost = outputs
    return Times(completed, start, ready, finish, cause, waker, lost.reshape(n, KINDS))
