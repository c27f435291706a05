"""Loops over (batch row, KV head) pairs, one to a slice or to a few neighbouring slices."""

from __future__ import annotations

from ir.errors import UnsupportedError

PairLoops = list[tuple[int, int, int, int]]  # (count, batch step, head step, slice step)


def pair_loops(pairs: list[tuple[int, int]]) -> tuple[PairLoops, int, int]:
    """Loops (count, batch step, head step, slice step) over consecutive (batch, head) pairs, and the first pair."""
    b0, h0 = pairs[0]
    heads = sum(1 for b, _ in pairs if b == b0)
    batches = len(pairs) // heads
    if batches * heads != len(pairs):
        raise UnsupportedError(
            "attention pairs that end inside a batch row", "loops are rectangular", "use fewer heads"
        )
    return [(batches, 1, 0, heads), (heads, 0, 1, 1)], b0, h0
