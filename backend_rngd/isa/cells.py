"""Bytes that units share, numbered: which pieces of which memories the peer sides of transfers touch."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from backend_rngd.isa.descriptors import DM_SLICE_STRIDE, Dma, Endpoint, Space
from backend_rngd.isa.footprint import Interval, intervals, slice_range, split_stride
from backend_rngd.isa.peers import split_address, split_unit_stride

MAX_PIECES = 4096  # intervals kept of a transfer's side; beyond it gaps count as touched


@dataclass(frozen=True)
class Piece:
    """Bytes of one unit's memory: in HBM, or the same bytes of some slices of DM."""

    hbm: bool
    slices: Interval
    pieces: tuple[Interval, ...]


def sides(desc: Dma) -> Iterator[tuple[Endpoint, list[tuple[int, int]], bool]]:
    """Endpoint, loops and whether it is written, of both sides."""
    yield desc.source, [(n, a) for n, a, _ in desc.loops], False
    yield desc.destination, [(n, b) for n, _, b in desc.loops], True


def reach(endpoint: Endpoint, loops: Sequence[tuple[int, int]], packet: int) -> tuple[int, int]:
    """First byte and end of what a side touches, its register left out."""
    low = endpoint.base + sum((n - 1) * s for n, s in loops if s < 0)
    return low, endpoint.base + sum((n - 1) * s for n, s in loops if s > 0) + packet


def peer_pieces(
    endpoint: Endpoint, loops: Sequence[tuple[int, int]], packet: int, value: int, limit: int
) -> list[tuple[int, Piece]]:
    """(unit, bytes) that a peer side touches when its register holds `value`.

    Raises ValueError if its loops over units have more than `limit` steps.
    """
    outer = [loop for loop in loops if split_unit_stride(loop[1])[0]]
    inner = [loop for loop in loops if not split_unit_stride(loop[1])[0]]
    steps = 1
    for size, _ in outer:
        steps *= size
    if steps > limit:
        raise ValueError(f"loops over {steps} units")
    out: list[tuple[int, Piece]] = []
    inner_loops = tuple(inner)
    for counters in itertools.product(*[range(size) for size, _ in outer]):
        address = value + endpoint.base + sum(i * stride for i, (_, stride) in zip(counters, outer, strict=True))
        unit, inside = split_address(address)
        space = Space.HBM if endpoint.space == Space.PEER_HBM else Space.DM
        out.append((unit, own_piece(Endpoint(space, inside), inner_loops, packet)))
    return out


@lru_cache(maxsize=4096)
def own_piece(endpoint: Endpoint, loops: tuple[tuple[int, int], ...], packet: int, value: int = 0) -> Piece:
    """Bytes that a side touches inside one memory; value: contents of its register."""
    if endpoint.space == Space.HBM:
        return Piece(True, (0, 1), intervals(endpoint.base + value, loops, packet, MAX_PIECES))
    inside = [(size, split_stride(stride)[1]) for size, stride in loops]
    found = intervals(endpoint.base % DM_SLICE_STRIDE, inside, packet, MAX_PIECES)
    return Piece(False, slice_range(endpoint, loops), found)


class Grid:
    """Numbers of the bytes that peer sides touch: cells of (slices, bytes) in DM, pieces of HBM."""

    def __init__(self, pieces: Iterable[Piece]) -> None:
        slices: set[int] = set()
        dm: set[int] = set()
        hbm: set[int] = set()
        for piece in pieces:
            target = hbm if piece.hbm else dm
            for low, high in piece.pieces:
                target.update((low, high))
            if not piece.hbm:
                slices.update(piece.slices)
        self._slices, self._dm, self._hbm = sorted(slices), sorted(dm), sorted(hbm)
        self.dm_cells = max(len(self._slices) - 1, 0) * max(len(self._dm) - 1, 0)
        self.count = self.dm_cells + max(len(self._hbm) - 1, 0)
        self._known: dict[Piece, tuple[int, ...]] = {}

    def cells(self, piece: Piece) -> tuple[int, ...]:
        """Cells that share bytes with a piece."""
        found = self._known.get(piece)
        if found is None:
            found = self._known[piece] = self._find(piece)
        return found

    def own_cells(
        self, endpoint: Endpoint, loops: Sequence[tuple[int, int]], packet: int, value: int = 0
    ) -> tuple[int, ...]:
        """Cells that a side touches inside one memory; value: contents of its register."""
        if endpoint.space == Space.HBM:
            low, high = reach(endpoint, loops, packet)
            if not self.in_hbm(low + value, high + value):
                return ()
        return self.cells(own_piece(endpoint, tuple(loops), packet, value))

    def in_hbm(self, low: int, high: int) -> bool:
        """Whether bytes [low, high) of HBM lie between the first and the last that a peer side touches."""
        return bool(self._hbm) and low < self._hbm[-1] and high > self._hbm[0]

    def _find(self, piece: Piece) -> tuple[int, ...]:
        cuts = self._hbm if piece.hbm else self._dm
        columns: set[int] = set()
        for interval in piece.pieces:
            columns.update(_overlapping(cuts, interval))
        if piece.hbm:
            return tuple(self.dm_cells + c for c in sorted(columns))
        width = len(self._dm) - 1
        return tuple(row * width + c for row in _overlapping(self._slices, piece.slices) for c in sorted(columns))

    def name(self, cell: int) -> str:
        """Where a cell lies, for messages."""
        if cell >= self.dm_cells:
            low, high = self._hbm[cell - self.dm_cells :][:2]
            return f"HBM bytes [{low}, {high})"
        row, column = divmod(cell, len(self._dm) - 1)
        return (
            f"DM bytes [{self._dm[column]}, {self._dm[column + 1]})"
            f" of slices [{self._slices[row]}, {self._slices[row + 1]})"
        )


def _overlapping(cuts: Sequence[int], interval: Interval) -> range:
    """Numbers of the pieces between neighbouring cuts that share bytes with an interval."""
    first = max(bisect.bisect_right(cuts, interval[0]) - 1, 0)
    last = min(bisect.bisect_left(cuts, interval[1]), len(cuts) - 1)
    return range(first, last)
