"""Device texts: which processing elements (PEs) of which cards are meant.

npu:0         all PEs of card 0; the same as npu:0:*
npu:0:0-3     PEs 0 to 3, fused or used as a group: 1, 2, 4 or 8 that begin at a multiple of their number
npu:1:5       PE 5 of card 1
npu:0,npu:1   a list, in this order
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from backend_rngd.artifact import ArtifactError, ArtifactProblem

_TEXT = re.compile(r"npu:(?P<card>\d{1,6})(?::(?:(?P<all>\*)|(?P<first>\d{1,6})(?:-(?P<last>\d{1,6}))?))?")
FORM = "write npu:CARD, npu:CARD:*, npu:CARD:PE or npu:CARD:FIRST-LAST, several separated by commas"


@dataclass(frozen=True, order=True)
class Pe:
    """A processing element: its card, and its number on the card."""

    card: int
    number: int

    def __str__(self) -> str:
        return f"npu:{self.card}:{self.number}"


def fusion_sizes(pes_per_card: int) -> list[int]:
    """How many PEs may be named by a range: powers of two up to a card."""
    return [1 << i for i in range(pes_per_card.bit_length()) if 1 << i <= pes_per_card]


def parse_devices(devices: str | Sequence[str], pes_per_card: int) -> tuple[Pe, ...]:
    """The PEs that one text, or several, name, in this order. Raises ArtifactError with every problem."""
    texts = [devices] if isinstance(devices, str) else list(devices)
    words = [word.strip() for text in texts for word in str(text).split(",")]
    problems: list[ArtifactProblem] = []
    found: dict[Pe, str] = {}
    if not any(words):
        raise ArtifactError([ArtifactProblem("no device", "there is nothing to run on", FORM)])
    for word in words:
        for pe in _pes(word, pes_per_card, problems):
            if pe in found:
                what = f"device {word}" + (f" and {found[pe]}" if found[pe] != word else " twice")
                problems.append(ArtifactProblem(what, f"both hold {pe}", "name every processing element once"))
                break
            found[pe] = word
    if problems:
        raise ArtifactError(problems)
    return tuple(found)


def _pes(word: str, pes_per_card: int, problems: list[ArtifactProblem]) -> list[Pe]:
    match = _TEXT.fullmatch(word)
    if match is None:
        problems.append(ArtifactProblem(f"device {word!r}", "it is not the text of a device", FORM))
        return []
    card = int(match["card"])
    if match["first"] is None:
        return [Pe(card, number) for number in range(pes_per_card)]
    first = int(match["first"])
    last = first if match["last"] is None else int(match["last"])
    count, sizes = last - first + 1, fusion_sizes(pes_per_card)
    what = f"device {word}"
    if first > last or last >= pes_per_card:
        why = f"a card has processing elements 0 to {pes_per_card - 1}, the smaller number comes first"
        problems.append(ArtifactProblem(what, why, f"use npu:{card}:0-{pes_per_card - 1} or a part of it"))
    elif count not in sizes:
        why = f"{count} processing elements cannot be fused"
        problems.append(ArtifactProblem(what, why, f"use {', '.join(map(str, sizes))} of them"))
    elif first % count:
        why = f"{count} fused processing elements begin at a multiple of {count}"
        start = first - first % count
        problems.append(ArtifactProblem(what, why, f"use npu:{card}:{start}-{start + count - 1}"))
    else:
        return [Pe(card, number) for number in range(first, last + 1)]
    return []
