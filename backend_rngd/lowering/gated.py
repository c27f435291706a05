"""Contractions of the same tokens whose results a map joins element by element (a gated MLP), many tokens.

A group of passes leaves the same channels of every contraction in the same slices, so the map runs where they are, on
all tokens at once, and only its result is brought back to the slices of the tokens: half of the bytes, and while the
next group is multiplied.
"""

from __future__ import annotations

from collections.abc import Callable

from xdsl.ir import SSAValue

from backend_rngd.isa.descriptors import DM_SLICE_STRIDE, Dtype, Space
from backend_rngd.lowering.channel_groups import Group
from backend_rngd.lowering.emitter import Emitter, dm
from backend_rngd.lowering.mapping import CHANNELS
from backend_rngd.lowering.rows_home import clear_unused, rows_home, spread_bytes
from backend_rngd.lowering.tensor import Dim, RowSpace, Tensor

BLOCK_TOKENS = 4  # of a slice, from which on blocks are longer pieces than a group's channels of a token
Join = Callable[[Emitter, list[Tensor]], Tensor]


class Gated:
    """Takes the groups of `count` contractions (a `Sink`); `join` maps one group of all of them to the result's."""

    limit = 2  # passes of a group, see `mapping.gated_passes`
    whole = narrow = True
    sums = False

    def __init__(self, em: Emitter, count: int, dtype: Dtype, result: Tensor, join: Join) -> None:
        self.em = em
        self.count = count
        self.dtype = dtype
        self.result = result
        self.join = join
        self._held: list[Tensor] = []
        self._areas: dict[int, SSAValue] = {}  # by stack
        clear_unused(em, result)

    def area(self, stack: int, group: Group, number: int, rows: int) -> tuple[SSAValue, int, int]:
        """See `Sink`."""
        row = group.passes * CHANNELS * self.dtype.bytes
        if number == 0:
            self._areas[stack] = self.em.alloc(rows * row, "channels")
        return self._areas[stack], row, number * CHANNELS * self.dtype.bytes

    def done(self, stack: int, group: Group, number: int, area: SSAValue, row: int) -> None:
        """See `Sink`."""
        tokens = self.result.rows
        assert tokens is not None
        if number < group.passes - 1:
            return
        # Every slice holds all tokens of its channels: as many local rows.
        everywhere = RowSpace(
            1, tokens.physical * tokens.slices, tokens.slices, tokens.physical, tokens.physical, False
        )
        dims = (Dim("tokens", everywhere.length), Dim("feature", row // self.dtype.bytes, self.dtype.bytes))
        self._held.append(Tensor(area, Space.DM, self.dtype, dims, everywhere, 0, row))
        if stack == self.count - 1:
            joined = self.join(self.em, self._held)
            self._held = []
            rows_home(self.em, joined.buffer, joined.pitch, group, self.result)


class GatedBlocks:
    """Takes the sums of passes in which a slice has the same 8 channels of two contractions (a `Sink`), joins them, and
    brings them home in blocks of 8 channels: the tokens of a slice are one piece of a transfer."""

    limit = 1
    whole = narrow = False
    sums = True
    BLOCK = CHANNELS // 2

    def __init__(self, em: Emitter, result: Tensor, join: Join) -> None:
        """`result` has blocks of `BLOCK` features."""
        self.em = em
        self.result = result
        self.join = join

    @classmethod
    def _stride(cls, rows: RowSpace, dtype: Dtype, em: Emitter) -> int:
        return spread_bytes(rows.local * cls.BLOCK * dtype.bytes, em.machine)

    @classmethod
    def suits(cls, rows: RowSpace, width: int, dtype: Dtype, most: int, em: Emitter) -> bool:
        """Whether the blocks of a result with `width` features are long enough pieces, and at most `most` bytes."""
        return rows.local >= BLOCK_TOKENS and width // cls.BLOCK * cls._stride(rows, dtype, em) <= most

    @classmethod
    def result_of(cls, em: Emitter, dims: tuple[Dim, ...], dtype: Dtype, rows: RowSpace, width: int) -> Tensor:
        """A result with `width` features, in DM."""
        pitch, stride = cls.BLOCK * dtype.bytes, cls._stride(rows, dtype, em)
        dims = (*dims[:-1], Dim("feature", width, dtype.bytes))
        buffer = em.alloc(width // cls.BLOCK * stride, "blocks")
        return Tensor(buffer, Space.DM, dtype, dims, rows, 0, pitch, cls.BLOCK, stride)

    def area(self, stack: int, group: Group, number: int, rows: int) -> tuple[SSAValue, int, int]:
        """See `Sink`."""
        raise AssertionError("it takes sums")

    def done(self, stack: int, group: Group, number: int, area: SSAValue, row: int) -> None:
        """See `Sink`."""
        tokens, em, ring = self.result.rows, self.em, group.ring
        assert tokens is not None
        # The ring leaves rows (local row, slice). Of a slice's tokens the local row counts as a feature here.
        slices = RowSpace(1, em.slices * ring, em.slices, ring, em.slices * ring, False)
        local = Dim("feature", tokens.local, ring * row) if tokens.local > 1 else Dim("one", 1)
        dims = (Dim("tokens", slices.length), local, Dim("feature", self.BLOCK, Dtype.F32.bytes))
        sums = [Tensor(area, Space.DM, Dtype.F32, dims, slices, i * self.BLOCK * Dtype.F32.bytes, row) for i in (0, 1)]
        joined = self.join(self.em, sums)
        run = tokens.local * self.result.pitch
        loops = [
            (em.slices // ring, ring * DM_SLICE_STRIDE, ring * DM_SLICE_STRIDE),
            (group.slices, DM_SLICE_STRIDE, self.result.block_stride),
            (ring, joined.pitch, DM_SLICE_STRIDE),
        ]
        first = group.start // CHANNELS * self.result.block_stride
        em.dma(dm(joined.buffer), dm(self.result.buffer, first), loops, run)
