"""Legality of a program that is cut into pipeline stages: every stage alone, and all of them together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from backend_rngd.isa.check_stream import HOST_REGISTERS, BufferSpan, check_stream, errors
from backend_rngd.isa.check_units import check_stages
from backend_rngd.isa.descriptors import Stream
from backend_rngd.isa.footprint import NO_LAUNCH, Launch, footprint
from backend_rngd.isa.rules import Violation
from backend_rngd.machine import Machine


def check_pipeline(
    streams: Sequence[Stream],
    machine: Machine,
    hbm_regions: Sequence[tuple[int, int]] | None = None,
    host_registers: Iterable[int] = HOST_REGISTERS,
    buffers: Sequence[BufferSpan] | None = None,
    launch: Launch = NO_LAUNCH,
    runs: int = 2,
) -> list[Violation]:
    """Every broken rule of the streams of all stages, see `check_stream`; together once each is legal alone.

    What stages do to each other (activations handed over, permissions to write them) is proved for `runs` runs that
    follow each other without waiting: batches in flight. Locations start with the stage where it matters.
    """
    host = tuple(host_registers)
    out: list[Violation] = []
    for stage, stream in enumerate(streams):
        found = check_stream(stream, machine, hbm_regions, host, buffers, launch)
        out += [replace(v, routine=f"stage {stage}: {v.routine}") for v in found]
    if errors(out):
        return out
    units = max((len(values) for values in launch.values()), default=1)
    registers = {r: (0,) * units for r in (0, *host)} | {r: tuple(values) for r, values in launch.items()}
    touched = [[[footprint(i.what, launch) for i in r.instructions] for r in stream.routines] for stream in streams]

    def report(routine: int, index: int, rule: str, message: str) -> None:
        found = streams[0].routines[routine]
        location = streams[0].locations[found.instructions[index].location]
        out.append(Violation(rule, message, found.name, index, location))

    check_stages(streams, units, registers, touched, report, runs)
    return out
