"""Contractions of the same tokens whose results a map joins element by element (a gated MLP), many tokens.

A group of passes leaves the same channels of every contraction in the same slices, so the map runs where they are, on
all tokens at once, and only its result is brought back to the slices of the tokens: half of the bytes, and while the
next group is multiplied.
"""

from __future__ import annotations

from collections.abc import Callable

from xdsl.ir import SSAValue

from backend_rngd.isa.descriptors import Dtype, Space
from backend_rngd.lowering.emitter import Emitter
from backend_rngd.lowering.stream_tokens import CHANNELS, Group, rows_home
from backend_rngd.lowering.tensor import Dim, RowSpace, Tensor

Join = Callable[[list[Tensor]], Tensor]


class Gated:
    """Takes the groups of `count` contractions (a `Sink`); `join` maps one group of all of them to the result's."""

    limit = 1  # passes of a group: the sooner the first channels are back, the sooner the contraction behind may start
    whole = narrow = True
    together = False

    def __init__(self, em: Emitter, count: int, dtype: Dtype, result: Tensor, join: Join) -> None:
        self.em = em
        self.count = count
        self.dtype = dtype
        self.result = result
        self.join = join
        self._held: list[Tensor] = []

    def area(self, stack: int, group: Group, rows: int) -> tuple[SSAValue, int]:
        """See `Sink`."""
        row = group.passes * CHANNELS * self.dtype.bytes
        return self.em.alloc(rows * row, "channels"), row

    def done(self, stack: int, group: Group, area: SSAValue, row: int) -> None:
        """See `Sink`."""
        tokens = self.result.rows
        assert tokens is not None
        # Every slice holds all tokens of its channels: as many local rows.
        everywhere = RowSpace(
            1, tokens.physical * tokens.slices, tokens.slices, tokens.physical, tokens.physical, False
        )
        dims = (Dim("tokens", everywhere.length), Dim("feature", row // self.dtype.bytes, self.dtype.bytes))
        self._held.append(Tensor(area, Space.DM, self.dtype, dims, everywhere, 0, row))
        if stack == self.count - 1:
            joined = self.join(self._held)
            self._held = []
            rows_home(self.em, joined.buffer, joined.pitch, group, self.result)
