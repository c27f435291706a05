"""Sum over all units of a contraction's result, many tokens in DM, without bringing the parts home first.

A group of passes leaves `[token][channels]` in every slice. A unit reads its tokens of it from all units, adds them
where they are, and publishes the sums; then every unit reads all tokens from their owners, straight to their slices.
The parts themselves never move inside a unit. Only slices that hold tokens take part.
"""

from __future__ import annotations

from xdsl.ir import SSAValue

from backend_rngd.isa.descriptors import DM_SLICE_STRIDE, UNIT_STRIDE, Space
from backend_rngd.lowering.channel_groups import Group
from backend_rngd.lowering.contract_base import compact
from backend_rngd.lowering.emitter import dm
from backend_rngd.lowering.exchange import Exchange, peer
from backend_rngd.lowering.mapping import CHANNELS, MOST_PASSES
from backend_rngd.lowering.tensor import RowSpace, Tensor


def token_share(rows: RowSpace, units: int) -> int | None:
    """Slices whose tokens one of `units` units adds; None if they cannot be shared that way."""
    share = -(-rows.used_slices // units)
    return share if not rows.replicated and share * units <= rows.slices else None


class SumHome:
    """Takes the groups of a contraction (a `Sink`) and leaves the sums of all tokens in `result`, which lies in DM."""

    limit = MOST_PASSES
    whole = True
    narrow = sums = False

    def __init__(self, exchange: Exchange, result: Tensor, share: int, where: str) -> None:
        """share: see `token_share`; where: location of the collective."""
        assert result.rows is not None and result.space == Space.DM
        self.exchange = exchange
        self.rows = result.rows
        self.result = result
        self.share = share
        self.where = where
        self._area: SSAValue | None = None
        if share * exchange.group.local < result.rows.slices:  # what no token uses takes part in passes all the same
            exchange.em.memset(result.buffer, 0, result.rows.local * result.pitch)

    def area(self, stack: int, group: Group, number: int, rows: int) -> tuple[SSAValue, int, int]:
        """See `Sink`: a buffer that the others can read."""
        units, width = self.exchange.group, self.result.dtype.bytes
        row = group.per_slice * width
        if number == 0:
            self._area = units.publish(units.card_scope, "dm", rows * row)
        assert self._area is not None
        return self._area, row, number * CHANNELS * width

    def done(self, stack: int, group: Group, number: int, area: SSAValue, row: int) -> None:
        """See `Sink`."""
        if number == group.passes - 1:
            with self.exchange.em.at(self.where):
                self._sum(group, area, row)

    def _sum(self, group: Group, area: SSAValue, row: int) -> None:
        units, em, rows, result, share = self.exchange.group, self.exchange.em, self.rows, self.result, self.share
        scope, local, slices = units.card_scope, rows.local, (group.slices, DM_SLICE_STRIDE, DM_SLICE_STRIDE)
        copy = local * share * row
        copies = em.alloc(units.local * copy, "copies")
        units.exchange(scope, area)
        loops = [(units.local, UNIT_STRIDE, copy), slices, (local, em.slices * row, share * row)]
        own = units.register(on_card=share * row, card=1)
        em.dma(peer(area, Space.DM, 0, own), dm(copies), loops, share * row)
        total = units.publish(scope, "dm", copy)
        count = copy // result.dtype.bytes
        self.exchange.add(copies, units.local, compact(count, result.dtype), total, group.slices)
        units.exchange(scope, total)
        loops = [
            (units.local, UNIT_STRIDE, share * DM_SLICE_STRIDE),
            (share, row, DM_SLICE_STRIDE),
            (group.slices, DM_SLICE_STRIDE, row),
            (local, share * row, result.pitch),
        ]
        base = result.base + group.start * result.dtype.bytes
        em.dma(peer(total, Space.DM, 0, scope.register), dm(result.buffer, base), loops, row)
