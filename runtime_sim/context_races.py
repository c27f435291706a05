"""Races between the contexts of a unit: accesses to the same bytes that no wait puts in order.

The executed program is followed in program order, across calls: every instruction must know, by its own waits and by
what those it waits for knew, that earlier conflicting instructions of other contexts are complete. That holds for every
order the hardware may choose, not only for one that is run (`orders.py` runs others).
"""

from __future__ import annotations

from backend_rngd.isa.descriptors import Context, Stream
from backend_rngd.isa.footprint import Access, footprint
from backend_rngd.isa.hazards import Counts, Hazards
from runtime_sim.errors import SimulationError
from runtime_sim.flatten import Flat, flatten


def check_contexts(stream: Stream, routine: int = 0) -> None:
    """Raise SimulationError (race) naming both instructions, their operations and layers, and the bytes."""
    flat = flatten((stream,), routine)
    accesses = [[footprint(x.what) for x in r.instructions] for r in stream.routines]
    hazards = Hazards([a for body in accesses for a in body])
    issued: tuple[list[int], list[int], list[int]] = ([], [], [])
    for i in range(len(flat)):
        context, mine = Context(int(flat.context[i])), accesses[int(flat.routine[i])][int(flat.index[i])]
        wait: Counts = (int(flat.need[i, 0]), int(flat.need[i, 1]), int(flat.need[i, 2]))
        known = hazards.implied(context, wait)
        for other, count in enumerate(hazards.required(context, mine)):
            if count > known[other]:
                raise _race(flat, i, issued[other][count - 1], accesses)
        hazards.issue(context, mine, wait)
        issued[context].append(i)


def _race(flat: Flat, i: int, earlier: int, accesses: list[list[tuple[Access, ...]]]) -> SimulationError:
    mine, theirs = (accesses[int(flat.routine[k])][int(flat.index[k])] for k in (i, earlier))
    where = next(
        f"{x.space.upper()} bytes [{max(a, c)}, {min(b, d)})"
        for x in mine
        for y in theirs
        if x.space == y.space and (x.write or y.write)
        for a, b in x.intervals
        for c, d in y.intervals
        if a < d and c < b
    )
    first, second = (Context(int(flat.context[k])).name.lower() for k in (earlier, i))
    what = f"the {second} instruction does not wait for the {first} instruction at {flat.site(earlier)}"
    return SimulationError(
        SimulationError.RACE, f"{what}, which touches the same {where}", "add the missing wait", flat.site(i)
    )
