"""The tokens of a sequence that a unit owns: which slices hold them among all tokens, and among its own."""

from __future__ import annotations

from typing import NamedTuple

from backend_rngd.lowering.group import Group
from backend_rngd.lowering.tensor import RowSpace


def own_rows(rows: RowSpace, group: Group) -> RowSpace | None:
    """The rows of a unit's part of `rows`; None unless parts are whole slices of the one card, full of tokens."""
    units = group.units
    if group.cards > 1 or rows.replicated or rows.batch > 1 or rows.length != rows.physical or rows.slices % units:
        return None
    part = rows.length // units
    mine = RowSpace.make(1, part, rows.slices)
    return mine if mine.physical == part and not mine.replicated and rows.local % mine.local == 0 else None


class TokenLoop(NamedTuple):
    """`size` tokens and the steps between them: slices and local rows among all tokens and among the unit's own."""

    size: int
    whole_slice: int
    whole_row: int
    own_slice: int
    own_row: int


def own_tokens(rows: RowSpace, mine: RowSpace) -> list[TokenLoop]:
    """Loops over a unit's own tokens, from the first slice of its share of `rows` and the first of `mine`."""
    split = rows.local // mine.local
    share = mine.physical // rows.local
    return [
        TokenLoop(split, 0, mine.local, 1, 0),
        TokenLoop(mine.local, 0, 1, 0, 1),
        TokenLoop(share, 1, 0, split, 0),
    ]
