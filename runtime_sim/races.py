"""Races between units: accesses to the same bytes that no notify and wait put in order.

Tracked are the bytes of DM and HBM that transfers of other units name, wherever they are read or written. Of every
context and every region of bytes the latest access is remembered with its place in the vector clock (`clocks.py`): an
access is safe if its context knows all earlier conflicting ones to be complete. That holds for every order that the
synchronisation allows, not only for the one that was executed. The indirect side of a gather or scatter is not looked
at (it cannot be in another unit's memory).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from backend_rngd.isa.descriptors import Dma, Stream
from runtime_sim.clocks import Clock
from runtime_sim.dma import DmaPlan
from runtime_sim.peers import PeerDmaPlan
from runtime_sim.plans import Plan, StaticPlan
from runtime_sim.views import GRANULE, Footprint, offsets

if TYPE_CHECKING:
    from runtime_sim.functional import Unit

Piece = tuple[tuple[int, int, int], Footprint]  # slices (start, stop, step) and bytes in each; one slice for HBM
ROW = 1 << 40  # more granules than a slice or an HBM window has
HBM_ROW = (0, 1, 1)


@dataclass(frozen=True)
class Instance:
    """An executed instruction: unit of the group, stream, routine, index, and the calls that led there."""

    unit: int
    stream: Stream
    routine: int
    index: int
    path: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Conflict:
    """The later of two accesses is not ordered behind the earlier one."""

    earlier: Instance
    earlier_writes: bool
    owner: int  # unit whose memory it is
    space: str


class Region:
    """Bytes of a DM or an HBM window, the same for every unit."""

    def __init__(self, pieces: tuple[Piece, ...]) -> None:
        self.pieces = pieces
        spans = [_span(footprint) for _, footprint in pieces]
        self.low, self.high = min(low for low, _ in spans), max(high for _, high in spans)
        self._granules: NDArray[np.int64] | None = None
        self._overlaps: dict[int, bool] = {}

    def granules(self) -> NDArray[np.int64]:
        """Sorted numbers of the touched granules."""
        if self._granules is None:
            parts: list[NDArray[np.int64]] = []
            for rows, footprint in self.pieces:
                starts = offsets(footprint.base, footprint.loops).reshape(-1)
                count = -(-(footprint.run + GRANULE - 1) // GRANULE)
                inside = starts[:, None] // GRANULE + np.arange(count)
                inside = inside[inside <= ((starts + footprint.run - 1) // GRANULE)[:, None]]
                parts.append((np.arange(*rows)[:, None] * ROW + inside).reshape(-1))
            self._granules = np.unique(np.concatenate(parts))
        return self._granules

    def overlaps(self, other: Region) -> bool:
        """Whether two regions have bytes in common."""
        if other is self:
            return True
        if self.high <= other.low or other.high <= self.low:
            return False
        known = self._overlaps.get(id(other))
        if known is None:
            mine, theirs = self.granules(), other.granules()
            known = len(np.intersect1d(mine, theirs, assume_unique=True)) > 0
            self._overlaps[id(other)] = other._overlaps[id(self)] = known
        return known


def _span(footprint: Footprint) -> tuple[int, int]:
    return footprint.base, footprint.base + sum((n - 1) * s for n, s in footprint.loops) + footprint.run


@dataclass(frozen=True)
class Touch:
    """An access to memory that other units touch too."""

    owner: int
    space: str
    region: Region
    write: bool


@dataclass
class _History:
    """Latest accesses to a region of one memory: context number -> (count, instruction)."""

    region: Region
    reads: dict[int, tuple[int, Instance]] = field(default_factory=dict[int, "tuple[int, Instance]"])
    writes: dict[int, tuple[int, Instance]] = field(default_factory=dict[int, "tuple[int, Instance]"])
    near: list[_History] = field(default_factory=list["_History"])


class Races:
    """Watches a group of units. What programs touch is found once; `start` begins another run."""

    def __init__(self, units: Sequence[Unit]) -> None:
        self.number = {id(unit): i for i, unit in enumerate(units)}
        self.spans: list[dict[str, list[tuple[int, int]]]] = [{"dm": [], "hbm": []} for _ in units]
        self._regions: dict[tuple[Piece, ...], Region] = {}
        self._touches: dict[tuple[int, ...], tuple[Plan, tuple[Touch, ...]]] = {}
        self._histories: dict[tuple[int, str], dict[int, _History]] = {}
        self._announced: dict[tuple[int, int, int], Plan] = {}

    def start(self) -> None:
        """Forget all accesses: the host has seen the end of everything before."""
        for table in self._histories.values():
            for history in table.values():
                history.reads.clear()
                history.writes.clear()

    def announce(self, plan: PeerDmaPlan, unit: Unit) -> None:
        """Note the bytes of other units that a transfer touches with the current registers, before the run."""
        key = (id(plan), unit.registers[plan.op.source.register], unit.registers[plan.op.destination.register])
        if key in self._announced:
            return
        self._announced[key] = plan
        for touch in self._of_peer(plan, unit):
            spans, span = self.spans[touch.owner][touch.space], (touch.region.low, touch.region.high)
            if span not in spans:
                spans.append(span)
                self._touches.clear()

    def _region(self, pieces: Iterable[Piece]) -> Region:
        key = tuple(pieces)
        region = self._regions.get(key)
        if region is None:
            region = self._regions[key] = Region(key)
        return region

    # Accesses --------------------------------------------------------------------------------------------------------
    def touches(self, unit: Unit, plan: Plan, what: object) -> tuple[Touch, ...]:
        """The tracked accesses of an instruction with the current registers."""
        key = (id(plan),)
        if isinstance(what, Dma):
            key = (id(plan), unit.registers[what.source.register], unit.registers[what.destination.register])
        found = self._touches.get(key)
        if found is None:
            found = self._touches[key] = (plan, tuple(self._find(unit, plan)))  # the plan lives as long as its id
        return found[1]

    def _find(self, unit: Unit, plan: Plan) -> list[Touch]:
        me = self.number[id(unit)]
        out: list[Touch] = []
        if isinstance(plan, PeerDmaPlan):
            out = self._of_peer(plan, unit, own=True)
        elif isinstance(plan, DmaPlan):
            out = self._of_dma(plan, unit)
        elif isinstance(plan, StaticPlan):
            for memory, footprint, rows, _ in plan.reads:
                if memory is unit.dm:
                    out.append(Touch(me, "dm", self._region([(_rows(rows), footprint)]), False))
            for memory, footprint, rows in plan.writes:
                if memory is unit.dm:
                    out.append(Touch(me, "dm", self._region([(_rows(rows), footprint)]), True))
        return [t for t in out if t.owner != me or self._shared(t)]

    def _shared(self, touch: Touch) -> bool:
        spans = self.spans[touch.owner][touch.space]
        return any(low < touch.region.high and touch.region.low < high for low, high in spans)

    def _of_peer(self, plan: PeerDmaPlan, unit: Unit, own: bool = False) -> list[Touch]:
        sides = (plan.op.source.space.is_peer, plan.op.destination.space.is_peer)
        return [
            touch
            for part in plan.parts(unit)
            for touch, is_peer in zip(self._of_dma(part, unit), sides, strict=True)
            if own or is_peer
        ]

    def _of_dma(self, plan: DmaPlan, unit: Unit) -> list[Touch]:
        out: list[Touch] = []
        index = plan.op.index
        for side, write in ((plan.source, False), (plan.target, True)):
            if index is not None and index.scatter == write:
                continue
            if side.in_dm:
                pieces = [(_rows(rows), footprint) for rows, footprint in plan.rows(side)]
            else:
                pieces = [(HBM_ROW, plan.footprint(side, side.address(unit)))]
            space = "dm" if side.in_dm else "hbm"
            out.append(Touch(self.number[id(side.unit)], space, self._region(pieces), write))
        return out

    # Checking --------------------------------------------------------------------------------------------------------
    def check(
        self, touches: tuple[Touch, ...], context: int, count: int, clock: Clock, instance: Instance
    ) -> Conflict | None:
        """An instruction makes its accesses: `context` (3 * unit + context) has run `count` instructions before it and
        knows `clock`. Returns an earlier access that it may collide with, or None."""
        for touch in touches:
            history = self._history(touch)
            for other in history.near:
                for kind, writes in ((other.writes, True), (other.reads, False)):
                    if not (writes or touch.write):
                        continue
                    for thread, (when, who) in kind.items():
                        if thread != context and when > clock[thread]:
                            return Conflict(who, writes, touch.owner, touch.space)
        for touch in touches:
            history = self._history(touch)
            (history.writes if touch.write else history.reads)[context] = (count + 1, instance)
        return None

    def _history(self, touch: Touch) -> _History:
        table = self._histories.setdefault((touch.owner, touch.space), {})
        history = table.get(id(touch.region))
        if history is None:
            history = _History(touch.region)
            for other in table.values():
                if other.region.overlaps(touch.region):
                    other.near.append(history)
                    history.near.append(other)
            history.near.append(history)
            table[id(touch.region)] = history
        return history


def _rows(rows: slice) -> tuple[int, int, int]:
    return rows.start or 0, rows.stop, rows.step or 1
