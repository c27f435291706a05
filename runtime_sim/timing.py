"""Timing simulator: when every instruction of the units runs, and why it did not run earlier.

    result = simulate(stream, load_machine(mode="silicon"))
    print(result.cycles, result.stalls)

Durations are the closed forms of `backend_rngd.machine.formulas`; contexts are in-order queues that wait for counts;
main and sub exclude each other on the vector engine; transfers share HBM, DM ports and links max-min fairly; waits end
when their notifies have arrived. Units that do the same at the same time are simulated once. Timing never looks at
values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from backend_rngd.isa.descriptors import Context, Dma, Space, Stream
from backend_rngd.machine import Machine, Mode
from runtime_sim.bounds import bounds
from runtime_sim.errors import SimulationError
from runtime_sim.event_core import Rates, Wakes, execute
from runtime_sim.flatten import Flat
from runtime_sim.timing_program import Program, engines_of
from runtime_sim.timing_result import TimingResult
from runtime_sim.topology import Topology
from runtime_sim.traffic import Launch

__all__ = ["TimingResult", "simulate"]


def simulate(
    streams: Stream | Sequence[Stream],
    machine: Machine,
    mode: Mode | None = None,
    routine: int = 0,
    jit: bool | None = None,
    contention: bool = True,
    topology: Topology | None = None,
    launch: Launch | None = None,
    repeats: int = 1,
    fold: bool | None = None,
    free_collectives: bool = False,
) -> TimingResult:
    """Time the streams of all units, all starting at cycle 0.

    streams: with `topology` one a pipeline stage (all units of a stage run it) or one a unit; without, one a unit of a
    group that sits on one card. mode: documented or silicon, the machine's own by default. jit: force or forbid the
    compiled event loop (by size if None). contention: whether units share memories and links; without it the result is
    a lower bound. launch: values of launch registers, one for each rank of a group. repeats: how often every unit runs
    its stream (micro-batches). fold: simulate equal units once, exactly; by default where a topology is given.
    free_collectives: what if transfers between units, notifies and waits took no time (units still wait for others).

    Raises SimulationError (deadlock) naming the first instruction that can never start and whom it waits for, and
    BoundsError if the makespan is outside its bounds, which is a fault of the model.
    """
    machine = machine if mode is None else machine.in_mode(mode)
    given = (streams,) if isinstance(streams, Stream) else tuple(streams)
    if topology is None:
        topology = Topology.on_one_card(machine, [engines_of(s, machine) for s in given])
        of_unit = given
    else:
        if len(given) not in (topology.pipeline, len(topology)):
            raise ValueError(f"{len(given)} streams for {topology.pipeline} stages and {len(topology)} units")
        by_stage = len(given) == topology.pipeline
        of_unit = tuple(given[p.stage] for p in topology.places) if by_stage else given
        fold = True if fold is None else fold
    program = Program(machine, topology, of_unit, launch or {}, routine, repeats, bool(fold))
    if free_collectives:
        program.costs[:] = [replace(c, fixed=0.0, work=0.0, overhead=0.0) if c.collective else c for c in program.costs]
    flat, costs, number = program.flat, program.costs, program.number
    queue_start, queue = _queues(flat, len(flat.streams))
    rates = Rates(
        np.array([c.fixed for c in costs]),
        np.array([c.work for c in costs]),
        np.array([c.demand for c in costs]),
        np.array([c.vector for c in costs], np.bool_),
        np.array([c.wait for c in costs], np.bool_),
        np.array([c.press for c in costs]),
    )
    resources = program.resources(contention)
    times = execute(
        len(flat.streams), queue_start, queue, flat.need, number, rates, resources, program.wakes, jit
    )  # fmt: skip
    result = TimingResult(
        machine, flat, costs, number, times.start, times.ready, times.finish, times.cause, times.waker, times.lost,
        topology, program.classes, program.load(), resource_names=program.resource_names(),
    )  # fmt: skip
    if times.completed < len(flat):
        _deadlock(result, queue_start, queue, program.wakes)
    _starvation(result)
    limits = bounds(program, resources, queue_start, queue, rates, jit)
    limits.check(result.cycles)
    return replace(result, bounds=limits, launch=program.launch)


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


def _starvation(result: TimingResult) -> None:
    """Raise an error for a transfer to or from data memory beside a pass that may lock it out: on a card the network
    times out and the cluster resets (hardware.md 2.2)."""
    starving = np.nonzero(result.column("starves").astype(np.bool_))[0]
    if not len(starving):
        return
    flat = result.flat
    moves = np.nonzero((flat.context == int(Context.DMA)) & (result.column("moved_bytes") > 0))[0]
    for i in starving.tolist():
        beside = (flat.unit[moves] == flat.unit[i]) & (result.start[moves] < result.finish[i])
        beside &= result.finish[moves] > result.start[i]
        for j in moves[beside].tolist():
            instruction = (
                flat.streams[int(flat.unit[j])].routines[int(flat.routine[j])].instructions[int(flat.index[j])]
            )
            what = instruction.what
            assert isinstance(what, Dma)
            if any(s.space in (Space.DM, Space.PEER_DM) for s in (what.source, what.destination)):
                raise SimulationError(
                    SimulationError.ILLEGAL,
                    f"a pass hits one bank {result.machine.dm_starvation_hits} times or more in a row beside the "
                    f"transfer at {flat.site(j)}",
                    "the transfer can be locked out until the network times out; let one wait for the other",
                    flat.site(i),
                )


def _deadlock(result: TimingResult, queue_start: NDArray[np.int64], queue: NDArray[np.int64], notifies: Wakes) -> None:
    """Raise the error that says of every unit what stands at the head of its contexts and what that waits for."""
    flat, finish = result.flat, result.finish
    senders = np.repeat(np.arange(len(flat)), np.diff(notifies.start))
    heads: list[str] = []
    first: int | None = None
    for q in range(len(queue_start) - 1):
        own = queue[queue_start[q] : queue_start[q + 1]]
        blocked = own[finish[own] < 0.0]
        if not len(blocked):
            continue
        i = int(blocked[0])
        first = i if first is None else first
        head = f"{Context(q % 3).name.lower()} head {flat.site(i)}"
        if len(flat.streams) > 1 or len(result.topology) > 1:
            head = f"{result.unit_name(q // 3)}: {head}"
        lacking = senders[notifies.wait == i]
        lacking = lacking[finish[lacking] < 0.0]
        if len(lacking) and result.costs[int(result.number[i])].wait:
            by = [f"{result.unit_name(int(flat.unit[s]))} at {flat.site(int(s))}" for s in lacking[:4].tolist()]
            heads.append(f"{head} waits for the notify of " + " and ".join(by))
        else:
            heads.append(f"{head} waits for counts {flat.need[i].tolist()}")
    raise SimulationError(
        SimulationError.DEADLOCK,
        "; ".join(heads),
        "a wait refers to an instruction that comes later",
        flat.site(first) if first is not None else None,
    )
