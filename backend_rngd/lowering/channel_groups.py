"""Output channels of a contraction of many tokens: which slices compute them in which passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from backend_rngd.isa.descriptors import (
    DM_SLICE_STRIDE,
)
from backend_rngd.lowering.mapping import CHANNELS
from backend_rngd.machine import Machine

WEAVE = 4  # neighbouring slices, whose results can travel together
NARROW = (12,)  # channels of a pass that is not full: fewer would be better off in smaller rings


@dataclass(frozen=True)
class Group:
    """Output channels [start, start + slices * per_slice), `per_slice` in each of `slices` slices, 16 a pass.

    A last pass may have fewer channels; what it computes beside them is never read. ring: slices that exchange their
    tokens. Rings smaller than the unit hold copies of the same weights, and each works on the tokens of its own slices:
    a few channels keep all slices busy.
    """

    start: int
    per_slice: int
    slices: int
    ring: int
    woven: bool = False  # WEAVE slices of one half of the ring and of the other one in turn: a network each

    def steps(self, first: int, count: int, step: int, ring: int = 1) -> tuple[int, list[tuple[int, int, int]]]:
        """`count` slices from number `first` of the group on: DM address of the first one, and loops over them of
        (size, `step` bytes elsewhere a slice, DM stride). ring: only the first of every so many."""
        if not self.woven:
            return first * DM_SLICE_STRIDE, [(count // ring, ring * step, ring * DM_SLICE_STRIDE)]
        half, pair = self.ring // 2 * DM_SLICE_STRIDE, 2 * WEAVE
        return first // 2 * DM_SLICE_STRIDE, [
            (count // pair, pair * step, WEAVE * DM_SLICE_STRIDE),
            (2, WEAVE * step, half),
            (WEAVE // ring, ring * step, ring * DM_SLICE_STRIDE),
        ]

    @property
    def passes(self) -> int:
        """Passes that compute the channels of a slice."""
        return -(-self.per_slice // CHANNELS)

    def width(self, number: int) -> int:
        """Channels a slice of pass `number`."""
        return min(CHANNELS, self.per_slice - number * CHANNELS)


def channel_groups(
    rows: int,
    slices: int,
    limit: int,
    local: int,
    row: int,
    machine: Machine,
    whole: bool = False,
    narrow: bool = True,
) -> list[Group]:
    """Groups of at most `limit` passes that cover `rows` channels (a multiple of 64).

    local: tokens a slice, row: bytes of a channel's weights; they decide whether the channels that do not fill all
    slices go to smaller rings (less to multiply, more copies of the weights to transfer). whole: no smaller rings.
    narrow: a last pass may have fewer than 16 channels a slice.
    """
    groups: list[Group] = []
    start, width = 0, slices * CHANNELS

    def even(rest: int) -> bool:
        """Whether all slices can share `rest` channels equally in one group."""
        per_slice, odd = divmod(rest, slices)
        alone = per_slice % CHANNELS
        return not odd and per_slice <= limit * CHANNELS and (alone == 0 or (narrow and alone in NARROW))

    while rows - start >= width:
        rest = rows - start
        passes = -(-rest // width)
        if even(rest):
            groups.append(Group(start, rest // slices, slices, slices))
        elif passes <= limit and rest % (passes * CHANNELS) == 0:
            groups.append(Group(start, passes * CHANNELS, rest // (passes * CHANNELS), slices))
        else:
            groups.append(Group(start, min(limit, rest // width) * CHANNELS, slices, slices))
        start += groups[-1].slices * groups[-1].per_slice
    rest = rows - start
    if rest and whole:
        groups.append(
            Group(start, rest // slices, slices, slices)
            if even(rest)
            else Group(start, CHANNELS, rest // CHANNELS, slices)
        )
    elif rest:
        groups += _last_channels(start, rest // CHANNELS, slices, local, row, machine)
    return groups


def _last_channels(start: int, count: int, slices: int, local: int, row: int, machine: Machine) -> list[Group]:
    """Fewer blocks of 16 channels than slices: one large ring, or rings of powers of two that add up to `count`."""
    whole = [Group(start, CHANNELS, count, slices)]
    parts: list[Group] = []
    at = start
    ring = slices
    while count:
        ring //= 2
        if count >= ring:
            parts.append(Group(at, CHANNELS, ring, ring))
            at, count = at + ring * CHANNELS, count - ring

    return min(whole, parts, key=lambda groups: group_cycles(groups, slices, local, row, machine))


def group_cycles(groups: Sequence[Group], slices: int, local: int, row: int, machine: Machine) -> float:
    """Multiplications behind the transfer of the weights, or the transfer where that takes longer; `row`: bytes of a
    channel's weights."""
    total = 0.0
    for g in groups:
        nbytes = g.slices * (slices // g.ring) * g.per_slice * row
        transfer = machine.dma_startup_cycles + nbytes / min(
            machine.dma_hbm_bytes_per_cycle, machine.hbm_bytes_per_cycle / machine.pes_per_chip
        )
        total += max(g.passes * local * (row / 64) * g.ring * 2, transfer) + machine.pass_issue_cycles
    return total
