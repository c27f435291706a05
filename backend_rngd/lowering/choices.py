"""What the lowering decided, for `rngdc explain`: mapped contractions, and choices between predicted times.

Lowering says what it does with `record` and `choose`; nobody listens unless somebody asked with `recording`.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Piece:
    """Output channels of a contraction: `per_slice` in each of `slices` slices; `ring` slices exchange their tokens."""

    per_slice: int
    slices: int
    ring: int


@dataclass(frozen=True)
class Streamed:
    """How a contraction `[tokens, k] . [rows, k]` with weights was mapped.

    streams: what is not in TRF. local: tokens a slice (all, if the weights stream). matrices: of the same shape that
    are multiplied together. element: bytes. chunks: sizes of K. slots: weight buffers that are loaded and used in turn.
    resident: the tokens lie in DM. packed: weights of 4 bits, expanded in DM. limit: passes of a group at most.
    scattered: every unit takes its own tokens from all units and adds them.
    """

    where: str
    streams: Literal["weights", "tokens"]
    local: int
    rows: int
    k: int
    matrices: int
    element: int
    chunks: tuple[int, ...]
    pieces: tuple[Piece, ...]
    slots: int
    slices: int
    resident: bool = True
    packed: bool = False
    limit: int = 1
    scattered: bool = False


@dataclass(frozen=True)
class Choice:
    """A decision between ways that all were possible. candidates: predicted cycles by name."""

    where: str
    what: str
    candidates: Mapping[str, float]
    chosen: str


_listening: ContextVar[list[Streamed | Choice] | None] = ContextVar("_listening", default=None)


@contextmanager
def recording() -> Generator[list[Streamed | Choice]]:
    """What is lowered inside is written to the list, in order."""
    found: list[Streamed | Choice] = []
    token = _listening.set(found)
    try:
        yield found
    finally:
        _listening.reset(token)


def record(decision: Streamed | Choice) -> None:
    """Note a decision if somebody listens."""
    listening = _listening.get()
    if listening is not None:
        listening.append(decision)


def choose(where: str, what: str, candidates: Mapping[str, float]) -> str:
    """The fastest candidate; the first of equal ones."""
    chosen = min(candidates, key=lambda name: candidates[name])
    record(Choice(where, what, dict(candidates), chosen))
    return chosen
