"""What is free to choose when a contraction `[tokens, K] . [N, K]` is mapped, in one place.

The engines (`stream_weights.py`, `stream_tokens.py`) take a `Mapping` and do what it says; `fixed` has the one that is
taken without a search.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from backend_rngd.machine import Machine

LANES = 8
CHANNELS = 16  # 8 lanes x TimeBroadcast 2: each 64 B packet serves two cycles (hardware.md 2.8 supply limit)
TRF_K_BYTES = 2048  # half a TRF: 2 channels x 1024 bf16 a lane, the other half loads meanwhile
TILE_BYTES = 64 * 1024  # one weight tile a slice; activations need what is left of 512 KB
LONG_TILE_BYTES = 128 * 1024  # of a matrix that is long to load: fewer transfers
LONG_BYTES = 1024 * 1024  # of such a matrix, a slice, whatever stands beside it
LONG_ALONE_BYTES = 160 * 1024  # the same for one token, which needs little data memory
LONG_IN_FLIGHT = 2  # of its tiles
SHORT_ROWS = 1  # tokens a slice up to which transfers of weights take longer than passes: the larger, the faster
MOST_PASSES = 8  # of a group
GROUP_BYTES = 40 * 1024  # results of a group of passes a slice; two groups are in flight
TRIAL_PASSES = 16  # of a contraction that is tried, over all chunks of K
LEAST_PASSES = 4  # of it
PARTIAL_BYTES = 128 * 1024  # partial sums of a split K a slice, when the tokens have to be brought in again
BLOCK_BYTES = 64 * 1024  # tokens of a block a slice, if they lie in HBM
BLOCK_ROWS = 4  # of them a slice at least: with fewer, the weights take longer than the multiplications


@dataclass(frozen=True)
class Mapping:
    """How a contraction is done.

    streams: the operand that is not stationary in TRF. in_flight: tiles of weights in DM at a time, at most. k_bytes:
    of K in TRF at a time, of a token (weights stream) or of a channel (tokens stream); what fits half of TRF is loaded
    while the other half is used.

    tile_bytes: of a tile of weights, a slice. Where tokens stream a tile is the weights of a pass, or of several that
    are not larger than this together.

    Weights stream. short_end: nothing is loaded behind the last tile, which is a short one if that saves time.

    Tokens stream. passes: of 16 channels a slice, whose results go home together. small_rings: channels that do not
    fill all slices go to rings of fewer slices, which multiply less and load copies of the weights, where the formulas
    say so. partial_bytes: partial sums of a split K a slice, for passes that share a chunk of K. block_bytes: tokens
    that come from HBM at a time, a slice.
    """

    streams: Literal["weights", "tokens"]
    in_flight: int
    k_bytes: int
    tile_bytes: int = TILE_BYTES
    short_end: bool = False
    passes: int = 1
    small_rings: bool = True
    partial_bytes: int = PARTIAL_BYTES
    block_bytes: int = BLOCK_BYTES


def lane_bytes(tokens: int, machine: Machine) -> int:
    """Bytes of TRF for each of `tokens` tokens of a slice, which lie one a lane."""
    return machine.trf_bytes_per_slice // max(4, tokens)


def fixed_weights(
    tokens: int, rows: int, pitch: int, slices: int, in_flight: int, machine: Machine, ends: bool = False
) -> Mapping:
    """Few tokens, weights of `rows` rows of `pitch` bytes. ends: no contraction follows in the routine."""
    long = rows * pitch >= (LONG_ALONE_BYTES if tokens == 1 else LONG_BYTES) * slices
    return Mapping(
        "weights",
        min(in_flight, LONG_IN_FLIGHT) if long else in_flight,
        lane_bytes(tokens, machine),
        LONG_TILE_BYTES if long else TILE_BYTES,
        ends,
    )


def fixed_tokens(
    passes: int, in_flight: int, local: int, pitch: int, machine: Machine, tile_bytes: int = TILE_BYTES
) -> Mapping:
    """Many tokens, `local` of them a slice; weights of rows of `pitch` bytes; `passes` of a group; tile_bytes of few
    tokens."""
    if local > SHORT_ROWS:
        in_flight = in_flight if local < BLOCK_ROWS else min(in_flight, LONG_IN_FLIGHT)
        return Mapping("tokens", in_flight, TRF_K_BYTES, 0, passes=passes)
    if tile_bytes < CHANNELS * pitch <= LONG_TILE_BYTES and pitch % (machine.hbm_channels * machine.hbm_line_bytes):
        # Parts of such rows do not spread over all channels of HBM.
        in_flight, tile_bytes = min(in_flight, LONG_IN_FLIGHT), LONG_TILE_BYTES
    return Mapping("tokens", in_flight, 2 * TRF_K_BYTES, tile_bytes, passes=passes)


def gated_passes(local: int) -> int:
    """Passes of a group of a gated MLP, for `local` tokens a slice: the sooner the first channels are back, the sooner
    the contraction behind may start; with few tokens it waits for its weights, and fewer transfers count."""
    return 2 if local <= SHORT_ROWS else 1


def passes_home(tokens: int, element: int) -> int:
    """Passes of a group whose results, of `tokens` tokens and elements of so many bytes, are brought home together."""
    return max(1, min(MOST_PASSES, GROUP_BYTES // (tokens * CHANNELS * element)))


def block_rows(local: int, run: int, most: int) -> int:
    """Local rows of `run` bytes that come from HBM at a time: a divisor of `local` of at most `most` bytes."""
    fitting = [n for n in range(1, local) if local % n == 0 and n * run <= most]
    return fitting[-1] if fitting and fitting[-1] >= BLOCK_ROWS else local


def most_rows(rows: int, pitch: int, blocks: int, m: Mapping, slices: int) -> int:
    """Channels that a trial needs: of many tokens those that no full group has, and some full ones."""
    if m.streams == "weights":
        return rows
    width = slices * CHANNELS
    passes = max(LEAST_PASSES, TRIAL_PASSES // (blocks * -(-pitch // m.k_bytes)))
    return rows - max(0, rows // width - passes) * width


WEIGHTS_KNOBS = ("tiles", "k_bytes")
TOKENS_KNOBS = ("k_bytes", "passes", "tile_bytes", "small_rings", "in_flight")
HBM_KNOBS = ("partial_bytes", "block_bytes")  # of tokens that lie in HBM
TILES = ((32, 8), (32, 6), (48, 5), (64, 3), (64, 4), (96, 2), (128, 2), (128, 1), (256, 1))  # KB, in flight


def variants(m: Mapping, knob: str) -> Iterator[Mapping]:
    """Mappings that differ in one knob."""
    match knob:
        case "tiles":
            for kilobytes, count in TILES:
                yield replace(m, tile_bytes=kilobytes * 1024, in_flight=count)
        case "k_bytes":
            for nbytes in (m.k_bytes // 2, m.k_bytes * 2):
                if TRF_K_BYTES // 4 <= nbytes <= (2 * TRF_K_BYTES if m.streams == "tokens" else m.k_bytes):
                    yield replace(m, k_bytes=nbytes)
        case "tile_bytes":
            for nbytes in (0, TILE_BYTES // 2, TILE_BYTES, LONG_TILE_BYTES):
                yield replace(m, tile_bytes=nbytes)
        case "passes":
            for passes in (1, 2, 4, MOST_PASSES):
                yield replace(m, passes=passes)
        case "small_rings":
            yield replace(m, small_rings=not m.small_rings)
        case "in_flight":
            for count in (2, 3, 4, 6, 8):
                yield replace(m, in_flight=count)
        case "partial_bytes":
            for nbytes in (PARTIAL_BYTES // 2, PARTIAL_BYTES, 2 * PARTIAL_BYTES):
                yield replace(m, partial_bytes=nbytes)
        case "block_bytes":
            for nbytes in (BLOCK_BYTES // 2, BLOCK_BYTES, 2 * BLOCK_BYTES):
                yield replace(m, block_bytes=nbytes)
        case _:
            raise ValueError(f"no knob {knob!r}")


def describe(m: Mapping) -> str:
    """A mapping in words."""
    if m.streams == "weights":
        tiles = f"tiles of {m.tile_bytes // 1024} KB a slice, {m.in_flight} in DM"
        return f"tokens in TRF ({m.k_bytes:,} B of K), weights stream: {tiles}"
    large = f" of up to {m.tile_bytes // 1024} KB" if m.tile_bytes else ""
    groups = f"{m.passes} pass{'es' if m.passes > 1 else ''} a group, {m.in_flight} tiles{large} in DM"
    rings = "" if m.small_rings else ", whole rings"
    spilled = (
        ""
        if (m.partial_bytes, m.block_bytes) == (PARTIAL_BYTES, BLOCK_BYTES)
        else (f", {m.partial_bytes // 1024} KB of partial sums, blocks of {m.block_bytes // 1024} KB")
    )
    return f"weights in TRF ({m.k_bytes:,} B of K), tokens go round: {groups}{rings}{spilled}"
