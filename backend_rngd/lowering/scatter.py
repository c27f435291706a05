"""Reduce-scatter of a contraction's result while the contraction still runs (many tokens, sequence parallelism).

A group of passes leaves `[token][channels]` in every slice. As soon as all units have done a group, each reads its own
tokens of it from all of them, adds them, and brings the sums to the slices of its tokens, while the next group is
multiplied. Nothing goes through HBM, and no unit ever holds all tokens of a sum.
"""

from __future__ import annotations

from dataclasses import dataclass

from xdsl.ir import SSAValue

from backend_rngd.isa.descriptors import DM_SLICE_STRIDE, UNIT_STRIDE, Commit, Space
from backend_rngd.lowering.channel_groups import Group
from backend_rngd.lowering.emitter import dm
from backend_rngd.lowering.exchange import Exchange, peer
from backend_rngd.lowering.mapping import CHANNELS, LANES
from backend_rngd.lowering.shares import own_tokens
from backend_rngd.lowering.tensor import RowSpace, Tensor


@dataclass(frozen=True)
class _Pulled:
    """The own tokens of a pass of a group, from all units."""

    group: Group
    number: int
    copies: SSAValue


class TokenScatter:
    """Takes the groups of a contraction (a `Sink`) and leaves in `result` the sums of the unit's own tokens."""

    limit = 2  # passes of a group, which goes home in one piece; every pass is exchanged by itself
    whole = True
    narrow = sums = False

    def __init__(self, exchange: Exchange, rows: RowSpace, result: Tensor, where: str) -> None:
        """rows: of all tokens; result: of the own ones; where: location of the collective."""
        assert result.rows is not None and result.space == Space.DM
        self.exchange = exchange
        self.where = where
        self.rows = rows
        self.mine = result.rows
        self.result = result
        self._waiting: _Pulled | None = None
        self._total: SSAValue | None = None  # sums of the group

    def area(self, stack: int, group: Group, number: int, rows: int) -> tuple[SSAValue, int, int]:
        """See `Sink`: a buffer that the others can read."""
        units = self.exchange.group
        row = CHANNELS * self.result.dtype.bytes
        return units.publish(units.card_scope, "dm", rows * row), row, 0

    def done(self, stack: int, group: Group, number: int, area: SSAValue, row: int) -> None:
        """See `Sink`: pull the own tokens from all units; what was pulled before is added meanwhile."""
        with self.exchange.em.at(self.where):
            copies = self._pull(group, area, row)
            self._add()
        self._waiting = _Pulled(group, number, copies)

    def _pull(self, group: Group, area: SSAValue, row: int) -> SSAValue:
        units, em, rows = self.exchange.group, self.exchange.em, self.rows
        share = em.slices // units.units
        copy = rows.local * share * row
        copies = em.alloc(units.units * copy, "copies")
        units.exchange(units.card_scope, area)
        own = units.register(on_card=share * row, card=1)
        loops = [
            (units.units, UNIT_STRIDE, copy),
            (group.slices, DM_SLICE_STRIDE, DM_SLICE_STRIDE),
            (rows.local, em.slices * row, share * row),
        ]
        em.dma(peer(area, Space.DM, 0, own), dm(copies), loops, share * row)
        return copies

    def finish(self) -> None:
        """Add the last pass."""
        with self.exchange.em.at(self.where):
            self._add()

    def _add(self) -> None:
        waiting, self._waiting = self._waiting, None
        if waiting is None:
            return
        em, result, group = self.exchange.em, self.result, waiting.group
        units, width = self.exchange.group.units, result.dtype.bytes
        row = group.per_slice * width
        share = em.slices // units
        if waiting.number == 0:
            self._total = em.alloc(self.mine.physical * row, "sum")
        assert self._total is not None
        sums = ((self.mine.physical, row), (CHANNELS, width))
        commit = Commit(waiting.number * CHANNELS * width, sums, result.dtype, LANES)
        self.exchange.add(waiting.copies, units, commit, self._total, group.slices)
        if waiting.number < group.passes - 1:
            return
        loops = [
            (group.slices, DM_SLICE_STRIDE, row),
            *(
                (
                    t.size,
                    (t.whole_row * share + t.whole_slice) * row,
                    t.own_slice * DM_SLICE_STRIDE + t.own_row * result.pitch,
                )
                for t in own_tokens(self.rows, self.mine)
            ),
        ]
        em.dma(dm(self._total), dm(result.buffer, result.base + group.start * width), loops, row)
