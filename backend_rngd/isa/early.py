"""Transfers that start before everything that was issued before their routine is complete (`After.enter` false).

The first weights of a layer may come while the layer before is still computed. What they overwrite must have been read:
nothing orders them behind the other contexts of earlier routines but the in-order DMA queue. So every routine has to
leave the queue in the knowledge that all accesses to such bytes are over: some later transfer has waited for them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from backend_rngd.isa.descriptors import Context, Descriptor, Dma, Space
from backend_rngd.isa.footprint import Access, Interval
from backend_rngd.isa.hazards import Hazards


def may_start_early(what: Descriptor) -> bool:
    """Whether an instruction is a plain transfer from the own HBM, which only the DMA queue touches, to the own DM."""
    if not isinstance(what, Dma) or what.index is not None:
        return False
    return (what.source.space, what.destination.space) == (Space.HBM, Space.DM)


def written(accesses: Iterable[Access]) -> list[Interval]:
    """DM bytes that an early transfer overwrites."""
    return [i for access in accesses if access.write and access.space == "dm" for i in access.intervals]


class EarlyBytes:
    """Follows one routine: do its accesses to bytes that early transfers overwrite end in time?"""

    def __init__(self, intervals: Sequence[Interval]) -> None:
        self.intervals = intervals
        self._last = [0, 0, 0]

    def touch(self, context: Context, accesses: Iterable[Access], count: int) -> None:
        """Instruction number `count` of a context makes these accesses."""
        for access in accesses:
            if access.space == "dm" and any(
                low < end and start < high for low, high in access.intervals for start, end in self.intervals
            ):
                self._last[int(context)] = count

    def open(self, hazards: Hazards) -> list[Context]:
        """Contexts whose accesses the DMA queue does not know to be complete: ask before a call and at the end."""
        known = hazards.known(Context.DMA)
        return [c for c in (Context.MAIN, Context.SUB) if self._last[int(c)] > known[int(c)]]
