"""How many tokens a chunk of `chunk-tokens` has, and how many keys its tokens can see."""

from __future__ import annotations

import math

from xdsl.dialects.func import CallOp, FuncOp

from ir.types import ELEMENT_BYTES, axis_names, elem_of, shape_of

KEY_LIMITS = 4
"""Most variants of a layer's function, which differ in the number of keys that their tokens can see."""

KEY_MULTIPLE = 128

VALUE_BYTES = 5 << 20
"""Largest value that layers hand on: 80 KB in each of 64 slices of 512 KB, so that those of a layer fit beside it."""


def chunk_size(batch: int, length: int, token_bytes: int, tokens: int | None = None) -> int:
    """Tokens of a row in a chunk: equal chunks, as few as hold at most `tokens` tokens of all rows.

    The default is the largest power of two with which a value of `token_bytes` a token takes at most `VALUE_BYTES`.
    The length itself if nothing has to be, or can be, cut.
    """
    if tokens is None:
        tokens = 1 << max(0, (VALUE_BYTES // max(1, token_bytes)).bit_length() - 1)
    most = tokens // batch
    return -(-length // -(-length // most)) if 0 < most < length else length


def key_limits(keys: int, length: int, size: int) -> list[int]:
    """For each chunk how many of `keys` keys its attention reads: what the last of its group of chunks can see.

    Slots grow along the tokens and end before `keys`, so token i stands at `keys - length + i` or before.
    """
    count = -(-length // size)
    groups = min(KEY_LIMITS, count)
    limits: list[int] = []
    for chunk in range(count):
        group = chunk * groups // count
        last = -(-(group + 1) * count // groups)  # the first chunk of the next group
        end = keys - length + min(length, last * size)
        limits.append(min(keys, -(-end // KEY_MULTIPLE) * KEY_MULTIPLE))
    return limits


def token_sizes(main: FuncOp) -> tuple[int, int, int] | None:
    """Batch, length, and bytes a token of the largest value between calls; None if there are no tokens."""
    tokens = next((a for a in main.body.block.args if axis_names(a)[:2] == ["B", "S"]), None)
    if tokens is None or -1 in shape_of(tokens):
        return None
    batch, length = shape_of(tokens)[:2]
    calls = [op for op in main.body.block.ops if isinstance(op, CallOp)]
    passed = [v for call in calls for v in call.results if axis_names(v)[:2] == ["B", "S"]]
    widths = [math.prod(shape_of(v)[2:]) * ELEMENT_BYTES[elem_of(v)] for v in passed]  # units may hold a part of S
    return (batch, length, max(widths)) if widths else None
