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
UNEVEN = 1.1  # times the mean: from here on the busiest channel counts
FEW = 8  # lines of a channel
BANKS = 64  # of a channel: 16 banks in 3 of 4 SIDs
ROW_BITS = 14
QUEUE = 64  # requests a channel holds
IN_FLIGHT = 256  # requests of an engine on the way (simulators.md 5; no figure is published)
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

    @property
    def held(self) -> float:
        """Lines of all channels for which the transfer holds HBM up: all wait for the busiest channel. A few lines
        never spread evenly, and are over before it matters."""
        whole = self.busiest * CHANNELS
        return whole if self.busiest >= FEW and whole > UNEVEN * self.lines else float(self.lines)


def hbm_use(base: int, loops: tuple[tuple[int, int], ...], packet: int, write: bool, machine: Machine) -> HbmUse:
    """HBM use of runs of `packet` bytes at `base` plus every sum of steps of `loops` (count, stride), outermost first.

    What a register adds to `base` moves all lines alike, so that it counts as 0. Patterns of more than 8,192 lines that
    are not dense are judged by the first part of their outermost loops.
    """
    timing = Timing(
        machine.hbm_line_bytes, machine.hbm_write_granule_bytes if write else 0,
        float(machine.hbm_unaligned_write_factor), machine.hbm_row_switch_cycles,
        machine.hbm_line_bytes / machine.hbm_channel_bytes_per_cycle, bool(machine.hbm_reorders),
    )  # fmt: skip
    repeats = math.prod(n for n, s in loops if s == 0)
    own = tuple((n, s) for n, s in loops if s != 0 and n > 1)
    use = _use(base, own, packet, timing)
    if repeats == 1:
        return use
    return HbmUse(use.lines * repeats, use.busiest * repeats, use.row_cycles * repeats, use.partial * repeats)


class Timing(NamedTuple):
    """Numbers of the machine that matter here. granule: 0 for reads."""

    line: int
    granule: int
    factor: float
    row_switch: float
    per_line: float
    reorders: bool


@lru_cache(maxsize=1 << 16)
def _use(base: int, loops: tuple[tuple[int, int], ...], packet: int, timing: Timing) -> HbmUse:
    line, granule = timing.line, timing.granule
    packets = math.prod(n for n, _ in loops)
    aligned = not any(x % line for x in (base, packet, *(s for _, s in loops)))
    whole = not granule or not any(x % granule for x in (base, packet, *(s for _, s in loops)))
    if _dense(loops, packet) and (aligned or packets * packet > _EVEN * line):
        lines = _lines(base, loops, packets, packet, line)
        partial = 0 if whole else packets * -(-packet // line)
        uneven, waits = _in_order(loops, packet, timing)
        busiest = math.ceil((lines if whole else lines * timing.factor) / CHANNELS) * uneven
        return HbmUse(lines, busiest, waits if waits > busiest * timing.per_line else 0.0, partial)
    (starts, ends), kept = _enumerate(base, loops, packet, line)
    channel = channels(starts)
    weight = np.ones(len(starts))
    incomplete = np.zeros(len(starts), np.bool_)
    if not whole:
        incomplete = (starts % granule != 0) | (ends % granule != 0)
        weight[incomplete] = timing.factor
    scale = packets / kept
    busiest = _busiest(channel, weight) * scale
    waits = _row_cycles(starts, channel, timing) * scale
    return HbmUse(
        round(len(starts) * scale),
        busiest,
        waits if waits > busiest * timing.per_line else 0.0,
        round(int(incomplete.sum()) * scale),
    )


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


@lru_cache(maxsize=1 << 12)
def _in_order(loops: tuple[tuple[int, int], ...], packet: int, timing: Timing) -> tuple[float, float]:
    """Of a dense transfer wherever it begins: lines of the busiest channel for each that is its share, and
    `_row_cycles`. (1, 0) for one in the order of its addresses."""
    if list(loops) == sorted(loops, key=lambda loop: -abs(loop[1])):
        return 1.0, 0.0
    base = sum(-s * (n - 1) for n, s in loops if s < 0)
    (starts, _), kept = _enumerate(base, loops, packet, timing.line)
    channel = channels(starts)
    uneven = _busiest(channel, np.ones(len(starts))) * CHANNELS / len(starts)
    return max(1.0, uneven), _row_cycles(starts, channel, timing) * math.prod(n for n, _ in loops) / kept


def _busiest(channel: Addresses, weight: NDArray[np.float64]) -> float:
    """Lines that a transfer waits for: of the busiest channel in every group of requests on the way at once."""
    group = np.arange(len(channel)) // IN_FLIGHT
    groups = int(group[-1]) + 1
    return float(np.bincount(group * CHANNELS + channel, weight, groups * CHANNELS).reshape(groups, -1).max(1).sum())


def _row_cycles(addresses: Addresses, channel: Addresses, timing: Timing) -> float:
    """Cycles of the channel that needs longest when opening rows counts: in every group of requests as long as its
    queue, banks open rows side by side. Requests for one row follow each other if the channel reorders. A few lines
    open their rows while the transfer starts."""
    if len(channel) < _EVEN:
        return 0.0
    order = np.argsort(channel, kind="stable")
    channel, addresses = channel[order], addresses[order]
    group = (np.arange(len(channel)) - np.searchsorted(channel, channel)) // QUEUE
    bank, row = banks(addresses), rows(addresses)
    groups = int(group.max()) + 1
    place = (channel * groups + group) * BANKS + bank
    if timing.reorders:
        opened = np.unique(place << ROW_BITS | row) >> ROW_BITS
    else:
        by_bank = np.argsort(channel * BANKS + bank, kind="stable")
        same = np.diff(channel[by_bank] * BANKS + bank[by_bank], prepend=-1) == 0
        opened = place[by_bank][~(same & (np.diff(row[by_bank], prepend=-1) == 0))]
    most = np.bincount(opened, minlength=CHANNELS * groups * BANKS).reshape(CHANNELS, groups, BANKS).max(axis=2)
    lines = np.bincount(channel * groups + group, minlength=CHANNELS * groups).reshape(CHANNELS, groups)
    return float(np.maximum(lines * timing.per_line, most * timing.row_switch).sum(axis=1).max())
