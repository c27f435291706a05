"""Tiles of weights for many tokens: every pass finds its weights, and what no tile writes is known."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from backend_rngd.lowering.mapping import CHANNELS
from backend_rngd.lowering.weight_tiles import Job, Tile, gaps, tiles_of

CHUNKS = st.lists(st.sampled_from([64, 512, 768, 1024]), min_size=1, max_size=4)
GROUPS = st.lists(st.sampled_from([12, 16, 28, 64, 92]), min_size=1, max_size=3)


def in_order(per_slice: list[int], count: int, stacks: int, by_chunk: bool) -> list[Job]:
    """Jobs as contractions order them: pass by pass, or a chunk of K for several passes."""
    passes = [(m, g, t) for g, n in enumerate(per_slice) for t in range(-(-n // CHANNELS)) for m in range(stacks)]
    if by_chunk:
        return [Job(m, g, t, c) for c in range(count) for m, g, t in passes]
    return [Job(m, g, t, c) for m, g, t in passes for c in range(count)]


@given(CHUNKS, GROUPS, st.integers(1, 2), st.booleans(), st.sampled_from([0, 16 * 1024, 32 * 1024, 64 * 1024]))
def test_every_job_reads_its_weights(
    sizes: list[int], per_slice: list[int], stacks: int, by_chunk: bool, most: int
) -> None:
    """An element of a tile is (row of the slice, column of K): jobs must find theirs where `start` says."""
    chunks = [(sum(sizes[:i]), size) for i, size in enumerate(sizes)]
    jobs = in_order(per_slice, len(chunks), stacks, by_chunk)
    tiles = tiles_of(jobs, chunks, per_slice, most)
    starts = [tile.first for tile in tiles]
    assert starts[0] == 0
    assert starts == sorted(set(starts))
    for tile, end in zip(tiles, [*starts[1:], len(jobs)], strict=True):
        mine = jobs[tile.first : end]
        assert len(mine) == 1 or tile.read <= most
        assert 0 < tile.rows <= min(tile.passes * CHANNELS, per_slice[tile.group] - tile.number * CHANNELS)
        for job in mine:
            k0, k = chunks[job.chunk]
            row, column = divmod(tile.start(job, k0), tile.k)
            assert (tile.stack, tile.group) == (job.stack, job.group)
            assert (tile.number * CHANNELS + row, tile.k0 + column) == (job.number * CHANNELS, k0)
            assert column + k <= tile.k
            live = min(CHANNELS, per_slice[job.group] - job.number * CHANNELS)
            assert row + live <= tile.rows
            assert (row + CHANNELS) * tile.k <= tile.read


@given(
    st.lists(st.tuples(st.integers(1, 3), st.integers(1, 15), st.integers(1, 4), st.integers(0, 1)), min_size=1),
    st.integers(1, 4),
)
def test_gaps_are_read_before_they_are_written(shapes: list[tuple[int, int, int, int]], slots: int) -> None:
    """Exactly the elements that a pass reads and no tile before or of it has written in its buffer."""
    everywhere = [True, False]
    tiles = [
        Tile(i, 0, group, 0, passes, passes * CHANNELS - missing, 0, k)
        for i, (passes, missing, k, group) in enumerate(shapes)
    ]
    for slot, (low, high) in enumerate(gaps(tiles, everywhere, slots)):
        written: set[int] = set()
        unset: set[int] = set()
        for tile in tiles[slot::slots]:
            written |= set(range(tile.elements if everywhere[tile.group] else 0))
            unset |= set(range(tile.read)) - written
        assert unset <= set(range(low, high))
        assert (not unset and low == high == 0) or (min(unset), max(unset) + 1) == (low, high)
