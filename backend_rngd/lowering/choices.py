"""What the lowering decided, for `rngdc explain`: mapped contractions, and choices between predicted times.

Lowering says what it does with `record` and `choose`; nobody listens unless somebody asked with `recording`.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal

from backend_rngd.lowering.mapping import CHANNELS, LANES


@dataclass(frozen=True)
class Piece:
    """Output channels of a contraction: `per_slice` in each of `slices` slices; `ring` slices exchange their tokens."""

    per_slice: int
    slices: int
    ring: int


@dataclass(frozen=True)
class Streamed:
    """How a contraction of tokens with weights was mapped.

    streams: what is not in TRF. local: tokens a slice (all, if the weights stream). chunks: sizes of K. slots: weight
    buffers that are loaded and used in turn.
    """

    where: str
    streams: Literal["weights", "tokens"]
    local: int
    chunks: tuple[int, ...]
    pieces: tuple[Piece, ...]
    slots: int


def described(s: Streamed) -> str:
    """What was built, in words."""
    chunks = f"K in {len(s.chunks)} chunks" if len(s.chunks) > 1 else "K whole"
    if s.streams == "weights":
        lanes = max(4, min(s.local, LANES))
        sweeps = -(-s.local // lanes)
        largest = max(p.per_slice for p in s.pieces)
        tiles = f"{len(s.pieces)} tile{'s' if len(s.pieces) > 1 else ''} of {largest} channels a slice"
        again = f", each used {sweeps} times for {lanes} tokens" if sweeps > 1 else ""
        copies = f", {s.slots} on the way" if s.slots > 1 else ""
        return f"tokens in TRF, weights stream: {tiles}{copies}{again}; {chunks}"
    found: dict[tuple[int, int, int], int] = {}
    for p in s.pieces:
        key = (-(-p.per_slice // CHANNELS), p.slices, p.ring)
        found[key] = found.get(key, 0) + 1
    parts = " + ".join(
        f"{n} x {passes} pass{'es' if passes > 1 else ''} on {slices} slices in rings of {ring}"
        for (passes, slices, ring), n in found.items()
    )
    return f"weights in TRF, tokens go round: {parts}; {chunks}"


@dataclass(frozen=True)
class Choice:
    """A decision between ways that all were possible. kind: of the operation. candidates: predicted cycles by name.
    why: what speaks for the chosen one."""

    where: str
    kind: Literal["contraction", "collective", "attention"]
    what: str
    candidates: Mapping[str, float]
    chosen: str
    why: str


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


@contextmanager
def unheard() -> Generator[None]:
    """Nobody hears what is lowered inside."""
    token = _listening.set(None)
    try:
        yield
    finally:
        _listening.reset(token)


def record(decision: Streamed | Choice) -> None:
    """Note a decision if somebody listens."""
    listening = _listening.get()
    if listening is not None:
        listening.append(decision)


def heard() -> bool:
    """Whether somebody listens."""
    return _listening.get() is not None


def choose(where: str, kind: Literal["collective", "attention"], what: str, candidates: Mapping[str, float]) -> str:
    """The fastest candidate; the first of equal ones."""
    chosen = min(candidates, key=lambda name: candidates[name])
    why = "the fastest by the formulas" if len(candidates) > 1 else "the only way that is possible"
    record(Choice(where, kind, what, dict(candidates), chosen, why))
    return chosen
