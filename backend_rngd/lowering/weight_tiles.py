"""Tiles of weights for many tokens: what one transfer brings into DM, which is more than one load of TRF.

A pass takes 16 channels a slice and one chunk of K. While tokens are few the transfers take longer than the passes, and
a long transfer moves more bytes a cycle than several short ones: so neighbouring chunks of K come together, and passes
of a group whose channels follow each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from backend_rngd.lowering.mapping import CHANNELS


@dataclass(frozen=True)
class Job:
    """One pass: stack of matrices, group and pass of the group, chunk of K."""

    stack: int
    group: int
    number: int
    chunk: int


@dataclass(frozen=True)
class Tile:
    """Channels of `passes` passes of a group from pass `number` on, elements [k0, k0 + k) of K, row by row. first: its
    first job. rows: channels a slice that exist; the last pass may read beyond them."""

    first: int
    stack: int
    group: int
    number: int
    passes: int
    rows: int
    k0: int
    k: int

    @property
    def elements(self) -> int:
        """Elements a slice that exist."""
        return self.rows * self.k

    @property
    def read(self) -> int:
        """Elements a slice that passes read."""
        return self.passes * CHANNELS * self.k

    def start(self, job: Job, k0: int) -> int:
        """Element where the channels of a job begin; k0: where its chunk of K does."""
        return (job.number - self.number) * CHANNELS * self.k + k0 - self.k0


def tiles_of(jobs: Sequence[Job], chunks: Sequence[tuple[int, int]], per_slice: Sequence[int], most: int) -> list[Tile]:
    """Tiles of the jobs in their order, of at most `most` elements a slice where more than one job shares a tile.

    chunks: (start, size) of the parts of K. per_slice: channels a slice, by group.
    """
    out: list[Tile] = []
    first = 0
    while first < len(jobs):
        job = jobs[first]
        wide = passes = 1

        def follows(count: int, job: Job = job, first: int = first, wide: int = 1) -> bool:
            """Whether `count` jobs are the next passes, each over the same `wide` chunks."""
            wanted = [Job(job.stack, job.group, job.number + n // wide, job.chunk + n % wide) for n in range(count)]
            return list(jobs[first : first + count]) == wanted

        def size(wide: int, passes: int, job: Job = job) -> int:
            return passes * CHANNELS * sum(k for _, k in chunks[job.chunk : job.chunk + wide])

        while job.chunk + wide < len(chunks) and size(wide + 1, 1) <= most and follows(wide + 1, wide=wide + 1):
            wide += 1
        while size(wide, passes + 1) <= most and follows(wide * (passes + 1), wide=wide):
            passes += 1
        k0, k = chunks[job.chunk][0], size(wide, 1) // CHANNELS
        rows = min(passes * CHANNELS, per_slice[job.group] - job.number * CHANNELS)
        out.append(Tile(first, job.stack, job.group, job.number, passes, rows, k0, k))
        first += wide * passes
    return out


def gaps(tiles: Sequence[Tile], everywhere: Sequence[bool], slots: int) -> list[tuple[int, int]]:
    """Elements [low, high) of each of `slots` buffers, which the tiles use in turn, that passes read although no tile
    has written them. everywhere: whether every slice gets channels, by group."""
    out: list[tuple[int, int]] = []
    for slot in range(slots):
        written = high = 0
        low: int | None = None
        for tile in tiles[slot::slots]:
            written = max(written, tile.elements if everywhere[tile.group] else 0)
            if tile.read > written:
                low, high = written if low is None else low, tile.read
                written = tile.read
        out.append((low or 0, high))
    return out
