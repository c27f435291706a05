"""Sequencer loops as strided numpy views, and the footprints they touch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Loops = tuple[tuple[int, int], ...]
GRANULE = 8  # bytes a bit of the initialisation maps stands for
MAX_RUNS = 16


def count(loops: Iterable[tuple[int, ...]]) -> int:
    """Steps of a loop nest."""
    return math.prod(entry[0] for entry in loops)


def merged(loops: Iterable[tuple[int, int]]) -> Loops:
    """Drop loops of size 1 and merge neighbours that continue each other."""
    out: list[tuple[int, int]] = []
    for size, stride in loops:
        if size == 1:
            continue
        if out and out[-1][1] == size * stride:
            out[-1] = (out[-1][0] * size, stride)
        else:
            out.append((size, stride))
    return tuple(out)


def split(loops: Sequence[tuple[int, int]], sizes: Sequence[int]) -> list[Loops] | None:
    """Cut a nest into consecutive groups of `sizes` steps; None if a boundary falls inside a loop unevenly."""
    rest = list(loops)
    groups: list[Loops] = []
    for size in reversed(sizes):
        group: list[tuple[int, int]] = []
        left = size
        while left > 1:
            if not rest:
                return None
            n, stride = rest.pop()
            if n <= left:
                if left % n:
                    return None
                group.append((n, stride))
                left //= n
            else:
                if n % left:
                    return None
                group.append((left, stride))
                rest.append((n // left, stride * left))
                left = 1
        groups.append(tuple(reversed(group)))
    if count(rest) != 1:
        return None
    return groups[::-1]


def sizes_of(loops: Iterable[tuple[int, int]]) -> tuple[int, ...]:
    """Shape of a nest."""
    return tuple(n for n, _ in loops)


def strides_of(loops: Iterable[tuple[int, int]]) -> tuple[int, ...]:
    """Byte strides of a nest."""
    return tuple(s for _, s in loops)


def extent(base: int, loops: Iterable[tuple[int, int]], width: int) -> tuple[int, int]:
    """First byte and one past the last byte that a nest of `width`-byte accesses touches."""
    low = high = base
    for size, stride in loops:
        reach = (size - 1) * stride
        low += min(reach, 0)
        high += max(reach, 0)
    return low, high + width


@dataclass(frozen=True)
class Footprint:
    """Bytes touched: runs of `run` bytes starting at `base` plus the steps of `loops` (positive strides > run)."""

    base: int
    run: int
    loops: Loops

    @staticmethod
    def of(base: int, loops: Iterable[tuple[int, int]], width: int) -> Footprint:
        """Union of the accesses; a gap is never counted as touched."""
        entries: list[tuple[int, int]] = []
        for size, stride in loops:
            if size == 1 or stride == 0:
                continue
            if stride < 0:
                base += (size - 1) * stride
                stride = -stride
            entries.append((size, stride))
        entries.sort(key=lambda e: e[1])
        run = width
        while entries and entries[0][1] <= run:
            size, stride = entries.pop(0)
            run += (size - 1) * stride
        return Footprint(base, run, merged(reversed(entries)))

    def bits(self, bitmap: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
        """Views of `bitmap` [rows, granules] that cover the touched granules of every row."""
        rows = bitmap.shape[0]
        if all(stride % GRANULE == 0 for _, stride in self.loops):
            first = self.base // GRANULE
            last = -(-(self.base + self.run) // GRANULE)
            view = np.lib.stride_tricks.as_strided(
                bitmap[:, first:],
                (rows, *sizes_of(self.loops), last - first),
                (bitmap.strides[0], *(s // GRANULE * bitmap.strides[1] for _, s in self.loops), bitmap.strides[1]),
            )
            return [view]
        starts = offsets(self.base, self.loops).reshape(-1)
        return [bitmap[:, s // GRANULE : -(-(s + self.run) // GRANULE)] for s in starts.tolist()]


def offsets(base: int, loops: Iterable[tuple[int, int]]) -> NDArray[np.int64]:
    """Address of every step, as an array of the nest's shape."""
    out = np.full((), base, np.int64)
    for size, stride in loops:
        out = out[..., None] + np.arange(size, dtype=np.int64) * stride
    return out


def nd(
    memory: NDArray[np.uint8], dtype: np.dtype[Any], offset: int, shape: Sequence[int], strides: Sequence[int]
) -> NDArray[Any]:
    """A view of a contiguous byte array; numpy refuses views that leave the array."""
    return np.ndarray(tuple(shape), dtype, memory, offset, tuple(strides))
