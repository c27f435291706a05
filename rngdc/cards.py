"""`--device`: which cards a build is for, so that what does not fit them is refused before any work.

A number N stands for the cards 0 to N-1, each whole; a text such as `npu:0:*,npu:1:0-3` names processing elements (PEs)
as `runtime_sim.devices` reads them. Loading may choose other devices: nothing of them is in the streams.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ir.errors import Problem

if TYPE_CHECKING:
    from backend_rngd.machine import Machine
    from rngdc.options import ParallelOptions

MAX_CARDS = 1024


def room_of(text: str, machine: Machine, problems: list[Problem]) -> list[int] | None:
    """PEs of every card that is meant, in order. None with a problem if the text cannot be understood."""
    from backend_rngd.artifact import ArtifactError
    from runtime_sim.devices import parse_devices

    if text.strip().lstrip("-").isdecimal():
        count = int(text)
        if 1 <= count <= MAX_CARDS:
            return [machine.pes_per_chip] * count
        why = f"a build is for 1 to {MAX_CARDS} cards"
        problems.append(Problem(f"--device {text}", why, "give the number of cards, or devices such as npu:0:0-3"))
        return None
    try:
        found = parse_devices(text, machine.pes_per_chip)
    except ArtifactError as error:
        problems += [
            Problem(f"--device: {p.what}", p.why, f"{p.fix}; or give the number of cards") for p in error.problems
        ]
        return None
    return list(Counter(pe.card for pe in found).values())


def stages_of(room: Sequence[int], tensor: int, machine: Machine) -> list[int]:
    """How many pipeline stages each card, or group of cards that share a layer, has room for."""
    whole = machine.pes_per_chip
    if tensor <= whole:
        return [pes // tensor for pes in room]
    return [1] * (sum(pes == whole for pes in room) // (tensor // whole))


def check_cards(text: str, parallel: ParallelOptions, machine: Machine, problems: list[Problem]) -> None:
    """Append a problem if the devices cannot be understood, or have fewer PEs than the stages need."""
    from rngdc.options import tensor_parallel_sizes

    room = room_of(text, machine, problems)
    sizes = [n for some in tensor_parallel_sizes(machine) for n in some]
    if room is None or parallel.tensor not in sizes or parallel.pipeline < 1:
        return
    stages = sum(stages_of(room, parallel.tensor, machine))
    if stages >= parallel.pipeline:
        return
    need = parallel.tensor * parallel.pipeline
    what = f"-tp {parallel.tensor} -pp {parallel.pipeline} needs {need} processing elements"
    why = f"--device {text} has {sum(room)}, room for {stages} stage(s) of {parallel.tensor}"
    fixes = [f"--device {-(-need // machine.pes_per_chip)}"]
    if stages:
        fixes.append(f"-pp {stages}")
    else:
        fixes += [f"-tp {n}" for n in reversed(sizes) if sum(stages_of(room, n, machine)) >= parallel.pipeline][:1]
    problems.append(Problem(what, why, f"use {' or '.join(fixes)}"))
