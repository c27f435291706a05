"""Which notifies every wait needs: edges between units, known before anything runs.

The n-th wait of a unit on a semaphore needs the n-th notify of each unit that notifies it. Where waits of different
counts share a semaphore, arrivals are taken in program order instead (units of a group run the same stream, so that
notifies of one exchange stand at the same place).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from backend_rngd.isa.descriptors import Notify
from backend_rngd.machine import Machine
from runtime_sim.errors import SimulationError
from runtime_sim.event_core import Wakes
from runtime_sim.symmetry import Classes
from runtime_sim.topology import Distance, Topology
from runtime_sim.traffic import Special


@dataclass(frozen=True)
class Arrival:
    """One addition to a semaphore: row of the notify in its unit's program, the sending unit, cycles on the way."""

    row: int
    sender: int
    latency: float


def latency(topology: Topology, sender: int, receiver: int, machine: Machine) -> float:
    """Cycles from a completed notify to the unit that waits for it."""
    far = topology.distance(sender, receiver)
    if far is Distance.CARD:
        return float(machine.pcie_latency_cycles)
    return float(machine.cluster_sync_cycles if far is Distance.CHIP else machine.notify_cluster_cycles)


Targets = Callable[[int, int], tuple[int, ...]]  # (unit, site of a notify) -> units it raises


def wakes(
    topology: Topology,
    machine: Machine,
    special_of: Sequence[Special],
    classes: Classes,
    first_row: Sequence[int],
    instructions: int,
    targets: Targets,
) -> Wakes:
    """Edges from notifies to waits of the represented units.

    special_of: by unit. first_row: by class, where its instructions begin in the whole program. Raises SimulationError
    (deadlock) for a wait whose notifies do not exist, naming the units that should have sent them.
    """
    representative = {unit: number for number, unit in enumerate(classes.representatives)}
    arrivals: dict[tuple[int, int], list[Arrival]] = defaultdict(list)
    for sender in range(len(topology)):
        special = special_of[sender]
        for key in range(len(special.keys)):
            what = special.what(key)
            if not isinstance(what, Notify):
                continue
            rows = special.rows[special.key == key].tolist()
            for receiver in targets(sender, key):
                if receiver in representative:
                    cycles = latency(topology, sender, receiver, machine)
                    arrivals[receiver, what.semaphore] += [Arrival(row, sender, cycles) for row in rows]
    source: list[int] = []
    wait: list[int] = []
    way: list[float] = []
    for receiver, number in representative.items():
        for row, needed in _needed(topology, special_of, receiver, arrivals):
            best: dict[int, float] = {}
            for arrival in needed:
                notify = first_row[classes.of_unit[arrival.sender]] + arrival.row
                best[notify] = max(best.get(notify, 0.0), arrival.latency)
            for notify, cycles in best.items():
                source.append(notify)
                wait.append(first_row[number] + row)
                way.append(cycles)
    return _sorted(np.array(source, np.int64), np.array(wait, np.int64), np.array(way), first_row, instructions)


def _sorted(
    source: NDArray[np.int64],
    wait: NDArray[np.int64],
    way: NDArray[np.float64],
    first_row: Sequence[int],
    instructions: int,
) -> Wakes:
    order = np.argsort(source, kind="stable")
    starts = np.searchsorted(source[order], np.arange(instructions + 1)).astype(np.int64)
    number = np.searchsorted(np.array(first_row), wait, side="right") - 1  # the unit that waits
    missing = (
        np.bincount(wait, minlength=instructions).astype(np.int64) if len(wait) else np.zeros(instructions, np.int64)
    )
    return Wakes(starts, wait[order], (3 * number + 2)[order], way[order], missing)


def _needed(
    topology: Topology,
    special_of: Sequence[Special],
    receiver: int,
    arrivals: dict[tuple[int, int], list[Arrival]],
) -> list[tuple[int, list[Arrival]]]:
    """(row of a wait, the notifies it needs) of one unit."""
    special = special_of[receiver]
    out: list[tuple[int, list[Arrival]]] = []
    for semaphore in sorted({what.semaphore for _, what in special.waits}):
        waits = [(row, what.count) for row, what in special.waits if what.semaphore == semaphore]
        of_sender: dict[int, list[Arrival]] = defaultdict(list)
        for arrival in sorted(arrivals.get((receiver, semaphore), []), key=lambda a: a.row):
            of_sender[arrival.sender].append(arrival)
        if all(count == len(of_sender) for _, count in waits):
            for number, (row, _) in enumerate(waits):
                late = [unit for unit, sent in of_sender.items() if len(sent) <= number]
                if late:
                    raise _missing(topology, special_of, receiver, row, semaphore, number, late)
                out.append((row, [sent[number] for sent in of_sender.values()]))
            continue
        queue = sorted((a for sent in of_sender.values() for a in sent), key=lambda a: (a.row, a.sender))
        position = 0
        for number, (row, count) in enumerate(waits):
            if position + count > len(queue):
                raise _missing(topology, special_of, receiver, row, semaphore, number, list(of_sender), count)
            out.append((row, queue[position : position + count]))
            position += count
    return out


def _missing(
    topology: Topology,
    special_of: Sequence[Special],
    receiver: int,
    row: int,
    semaphore: int,
    number: int,
    units: list[int],
    count: int | None = None,
) -> SimulationError:
    special = special_of[receiver]
    key = int(special.key[np.searchsorted(special.rows, row)])
    names = ", ".join(f"unit {u} on {topology.describe(u)}" for u in sorted(units)[:8])
    what = f"unit {receiver} on {topology.describe(receiver)} waits on semaphore {semaphore} for the {number + 1}. time"
    if count is not None and not units:
        what += f" ({count} notifies), but no unit notifies it"
    elif count is not None:
        what += f" ({count} notifies), more than the notifies of {names} suffice for"
    else:
        what += f", but the {number + 1}. notify of {names} does not exist"
    return SimulationError(SimulationError.DEADLOCK, what, "every wait needs its notifies", special.site(key))
