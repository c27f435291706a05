"""The published HBM address map (hardware.md 3.4): which channel, bank and row a line lies in, and what that costs.

Bits of an address: 0-7 byte, 8 stack, 9-12 channel, 13 and 19 bank group, 14-16 column, 17-18 bank, 20 and 34 stack
identifier (SID), 21-33 and 35 row. Channel bit i is the parity of bits 9+i, 13+i, 21+i and 25+i (bit 0 is published,
the others follow by position). 32 lines of 256 B in a row lie in 32 different channels.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from backend_rngd.machine.description import Machine

Addresses = NDArray[np.int64]

CHANNELS = 32
QUEUE = 64  # requests a channel may reorder (FR-FCFS)
ENUMERATED = 8192  # lines looked at, at most: what comes later repeats the pattern
_EVEN = CHANNELS * 8  # lines of a dense transfer from which its ends no longer matter


def channels(addresses: Addresses) -> Addresses:
    """Channel of every address: 0-15 in the first stack, 16-31 in the second."""
    folded = (addresses >> 9) ^ (addresses >> 13) ^ (addresses >> 21) ^ (addresses >> 25)
    return (folded & 15) | (((addresses >> 8) & 1) << 4)


def banks(addresses: Addresses) -> Addresses:
    """Bank of every address inside its channel: group, bank and SID."""
    group = ((addresses >> 13) & 1) | (((addresses >> 19) & 1) << 1)
    sid = ((addresses >> 20) & 1) | (((addresses >> 34) & 1) << 1)
    return group | (((addresses >> 17) & 3) << 2) | (sid << 4)


def rows(addresses: Addresses) -> Addresses:
    """Row of every address inside its bank."""
    return ((addresses >> 21) & 0x1FFF) | (((addresses >> 35) & 1) << 13)


class HbmUse(NamedTuple):
    """What one side of a transfer asks of HBM.

    lines: line transfers; a request across a line costs two. busiest: those of the busiest channel, with every
    read-modify-write as many as it takes. row_cycles: time of the channel that waits longest for rows, if no other
    transfer hides it. partial: requests that write part of a granule.
    """

    lines: int
    busiest: float
    row_cycles: float
    partial: int


def hbm_use(base: int, loops: tuple[tuple[int, int], ...], packet: int, write: bool, machine: Machine) -> HbmUse:
    """HBM use of runs of `packet` bytes at `base` plus every sum of steps of `loops` (count, stride), outermost first.

    What a register adds to `base` moves all lines alike, so that it counts as 0. Patterns of more than 8,192 lines that
    are not dense are judged by the first part of their outermost loops.
    """
    numbers = (
        machine.hbm_line_bytes, machine.hbm_write_granule_bytes if write else 0,
        float(machine.hbm_unaligned_write_factor), machine.hbm_row_switch_cycles,
        machine.hbm_line_bytes / machine.hbm_channel_bytes_per_cycle,
    )  # fmt: skip
    repeats = math.prod(n for n, s in loops if s == 0)
    own = tuple((n, s) for n, s in loops if s != 0 and n > 1)
    use = _use(base, own, packet, *numbers)
    if repeats == 1:
        return use
    return HbmUse(use.lines * repeats, use.busiest * repeats, use.row_cycles, use.partial * repeats)


@lru_cache(maxsize=1 << 16)
def _use(
    base: int,
    loops: tuple[tuple[int, int], ...],
    packet: int,
    line: int,
    granule: int,
    factor: float,
    row_switch: int,
    per_line: float,
) -> HbmUse:
    packets = math.prod(n for n, _ in loops)
    aligned = not any(x % line for x in (base, packet, *(s for _, s in loops)))
    whole = not granule or not any(x % granule for x in (base, packet, *(s for _, s in loops)))
    dense = _dense(loops, packet)
    if dense and (aligned or packets * packet > _EVEN * line):
        lines = _lines(base, loops, packets, packet, line)
        partial = 0 if whole else packets * -(-packet // line)
        weighted = lines if whole else lines * factor
        return HbmUse(lines, math.ceil(weighted / CHANNELS), 0.0, partial)
    touched, kept = _enumerate(base, loops, packet, line)
    starts, ends = touched
    channel = channels(starts)
    weight = np.ones(len(starts))
    incomplete = np.zeros(len(starts), np.bool_)
    if not whole:
        incomplete = (starts % granule != 0) | (ends % granule != 0)
        weight[incomplete] = factor
    scale = packets / kept
    lines = round(len(starts) * scale)
    busiest = float(np.bincount(channel, weight, CHANNELS).max()) * scale
    waits = _row_switches(starts, channel) * row_switch * scale
    worst = waits if waits > busiest * per_line else 0.0
    return HbmUse(lines, busiest, worst, round(int(incomplete.sum()) * scale))


def _dense(loops: tuple[tuple[int, int], ...], packet: int) -> bool:
    """Whether the runs fill one region of memory, each byte once, in whatever order."""
    extent = packet
    for n, stride in sorted(loops, key=lambda loop: abs(loop[1])):
        if abs(stride) != extent:
            return False
        extent *= n
    return True


def _lines(base: int, loops: tuple[tuple[int, int], ...], packets: int, packet: int, line: int) -> int:
    """Line transfers of all runs; exact when every run starts at the same offset in a line, else offsets count as
    equally frequent."""
    step = math.gcd(line, base, *(s for _, s in loops))
    offsets = [base % line] if all(s % line == 0 for _, s in loops) else range(base % step, line, step)
    full, rest = divmod(packet, line)
    total = sum(full * (1 + (o != 0)) + (1 + (o + rest > line) if rest else 0) for o in offsets)
    return round(packets * total / len(offsets))


def _enumerate(
    base: int, loops: tuple[tuple[int, int], ...], packet: int, line: int
) -> tuple[tuple[Addresses, Addresses], int]:
    """Start and end address of every line touched by every request, in order, and the number of runs looked at."""
    requests = -(-packet // line)
    room = max(1, ENUMERATED // requests)
    address = np.zeros(1, np.int64)
    for n, stride in reversed(loops):  # innermost first: outer loops are cut
        count = max(1, min(n, room // len(address)))
        address = (np.arange(count)[:, None] * stride + address[None, :]).reshape(-1)
    start = (base + address)[:, None] + np.arange(requests) * line
    end = np.minimum(start + line, (base + address)[:, None] + packet)
    edge = (start // line + 1) * line  # where a request leaves its first line
    both = np.stack([start, edge], axis=-1).reshape(-1)
    until = np.stack([np.minimum(edge, end), end], axis=-1).reshape(-1)
    touched = until > both
    return (both[touched], until[touched]), len(address)


def _row_switches(addresses: Addresses, channel: Addresses) -> int:
    """Row activations of the bank that has most of them: requests of a channel are served in groups of its queue, in
    which those of one row follow each other."""
    bank = channel * 64 + banks(addresses)
    order = np.argsort(channel, kind="stable")
    sorted_channel = channel[order]
    first = np.searchsorted(sorted_channel, sorted_channel)
    window = np.empty(len(addresses), np.int64)
    window[order] = (np.arange(len(addresses)) - first) // QUEUE
    opened = np.unique(np.stack([bank, window, rows(addresses)], axis=1), axis=0)
    # The scheduler starts a window with a row that is open already, if a request wants it.
    order = np.lexsort((opened[:, 1], opened[:, 2], opened[:, 0]))
    by_row = opened[order]
    again = np.zeros(len(by_row), np.bool_)
    same = (by_row[1:, 0] == by_row[:-1, 0]) & (by_row[1:, 2] == by_row[:-1, 2])
    again[1:] = same & (by_row[1:, 1] == by_row[:-1, 1] + 1)
    kept = np.unique(by_row[again, :2], axis=0)
    banked = np.bincount(opened[:, 0])
    banked[: int(kept[:, 0].max(initial=-1)) + 1] -= np.bincount(kept[:, 0])
    return int(banked.max())
