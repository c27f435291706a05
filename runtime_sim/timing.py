"""Timing simulator: when every instruction of the units runs, and why it did not run earlier.

    result = simulate(stream, load_machine(mode="silicon"))
    print(result.cycles, result.stalls)

Durations are the closed forms of `backend_rngd.machine.formulas`; contexts are in-order queues that wait for counts;
main and sub exclude each other on the vector engine; transfers of all units share the card's HBM max-min fairly.
Timing never looks at values.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from backend_rngd.isa.descriptors import Call, Context, Stream
from backend_rngd.machine import Machine, Mode
from runtime_sim.costs import Cost, cost_of
from runtime_sim.errors import SimulationError
from runtime_sim.event_core import execute
from runtime_sim.flatten import Flat, flatten
from runtime_sim.timing_result import TimingResult

__all__ = ["TimingResult", "simulate"]


def simulate(
    streams: Stream | Sequence[Stream],
    machine: Machine,
    mode: Mode | None = None,
    routine: int = 0,
    jit: bool | None = None,
    contention: bool = True,
) -> TimingResult:
    """Time the streams of the units of one card, all starting at cycle 0.

    mode: documented or silicon, the machine's own by default. jit: force or forbid the compiled event loop (by size if
    None). contention: whether units share HBM; without it the result is a lower bound. Raises SimulationError
    (deadlock) naming the first instruction that can never start.
    """
    machine = machine if mode is None else machine.in_mode(mode)
    units = (streams,) if isinstance(streams, Stream) else tuple(streams)
    flat = flatten(units, routine)
    costs, number = _costs(flat, machine)
    fixed = np.array([c.fixed for c in costs])[number]
    work = np.array([c.work for c in costs])[number]
    demand = np.array([c.demand for c in costs])[number]
    vector = np.array([c.vector for c in costs], np.bool_)[number]
    queue_start, queue = _queues(flat, len(units))
    capacity = machine.hbm_bytes_per_cycle * machine.hbm_efficiency if contention else float("inf")
    completed, start, ready, finish, cause = execute(
        len(units), queue_start, queue, flat.need, fixed, work, demand, vector, capacity, jit
    )
    if completed < len(flat):
        _deadlock(flat, queue_start, queue, finish)
    return TimingResult(machine, flat, costs, number, start, ready, finish, cause)


def _costs(flat: Flat, machine: Machine) -> tuple[list[Cost], NDArray[np.int64]]:
    """Distinct costs, and for every executed instruction the number of its cost."""
    costs: list[Cost] = []
    tables: dict[tuple[int, int], NDArray[np.int64]] = {}
    number = np.empty(len(flat), np.int64)
    seen: dict[tuple[int, int], int] = {}
    for u, stream in enumerate(flat.streams):
        engines = max(1, stream.slices // machine.slices_per_pe) * machine.dma_engines_per_pe
        for r, body in enumerate(stream.routines):
            table = np.zeros(len(body.instructions), np.int64)
            for i, instruction in enumerate(body.instructions):
                if isinstance(instruction.what, Call):
                    continue
                key = (id(instruction), engines)  # streams of several units share instruction objects
                if key not in seen:
                    seen[key] = len(costs)
                    costs.append(cost_of(instruction.what, instruction.context, machine, engines))
                table[i] = seen[key]
            tables[(u, r)] = table
    for (u, r), table in tables.items():
        here = (flat.unit == u) & (flat.routine == r)
        number[here] = table[flat.index[here]]
    return costs, number


def _queues(flat: Flat, units: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Instructions of queue 3 * unit + context, in program order, one queue after the other."""
    key = flat.unit * 3 + flat.context
    if len(flat) and int(flat.context.max()) > int(Context.DMA):
        bad = int(np.argmax(flat.context > int(Context.DMA)))
        raise SimulationError(
            SimulationError.ILLEGAL, "an instruction in the control context is not a call", site=flat.site(bad)
        )
    queue = np.argsort(key, kind="stable")
    start = np.searchsorted(key[queue], np.arange(3 * units + 1))
    return start.astype(np.int64), queue.astype(np.int64)


def _deadlock(
    flat: Flat, queue_start: NDArray[np.int64], queue: NDArray[np.int64], finish: NDArray[np.float64]
) -> None:
    heads: list[str] = []
    first: int | None = None
    for q in range(len(queue_start) - 1):
        for i in queue[queue_start[q] : queue_start[q + 1]].tolist():
            if finish[i] < 0.0:
                first = i if first is None else first
                need = flat.need[i].tolist()
                heads.append(f"{Context(q % 3).name.lower()} head {flat.site(i)} waits for counts {need}")
                break
    raise SimulationError(
        SimulationError.DEADLOCK,
        "; ".join(heads),
        "a wait refers to an instruction that comes later",
        flat.site(first) if first is not None else None,
    )
