"""The HBM address map and what it costs transfers; the data-memory networks."""

from __future__ import annotations

import numpy as np
import pytest

from backend_rngd.isa.descriptors import DM_SLICE_STRIDE, Dma, Endpoint, Space
from backend_rngd.machine import Machine, load_machine
from backend_rngd.machine import formulas as f
from backend_rngd.machine.address_map import CHANNELS, banks, channels, hbm_use, rows
from backend_rngd.machine.transfers import network_cycles

BOOK = load_machine("rngd", "documented")
SILICON = load_machine("rngd", "silicon")


def load(loops: tuple[tuple[int, int, int], ...], packet: int, base: int = 0) -> Dma:
    """HBM to DM."""
    return Dma(Endpoint(Space.HBM, base), Endpoint(Space.DM, 0), loops, packet)


def test_channel_bits() -> None:
    """Bit 0 as published: 9, 13, 21 and 25; the stack is bit 8; any 32 lines in a row use all channels."""
    for bit in (9, 13, 21, 25):
        assert int(channels(np.array([1 << bit]))[0]) == 1
    assert int(channels(np.array([1 << 8]))[0]) == 16
    assert int(channels(np.array([(1 << 12) | (1 << 16)]))[0]) == 0
    for start in (0, 5 << 8, 123_456_768, 7 << 30):
        lines = start // 8192 * 8192 + np.arange(32) * 256
        assert sorted(channels(lines).tolist()) == list(range(CHANNELS))


def test_geometry_is_48_gib() -> None:
    """Channel, bank, row and column tell all lines of 48 GiB apart (bits 34 and 35 are never both set)."""
    rng = np.random.default_rng(0)
    lines = np.unique(rng.integers(0, 48 << 22, 200_000)) << 8
    column = (lines >> 14) & 7
    place = ((channels(lines) * 64 + banks(lines)) * (1 << 14) + rows(lines)) * 8 + column
    assert len(np.unique(place)) == len(lines)
    assert int(rows(lines).max()) < 1 << 14


def test_row_conflicts_follow_from_addresses() -> None:
    """Case 23 of the book: [64, 2048, 1024] read along its first axis opens a row for every request of a channel."""
    across = load(((2048, 1024, 1024), (64, 1 << 21, DM_SLICE_STRIDE)), 1024)
    along = load(((64, 1 << 21, DM_SLICE_STRIDE), (2048, 1024, 1024)), 1024)
    assert f.dma_time(across, BOOK, engines=8) == 655_860
    assert f.dma_time(along, BOOK, engines=8) == pytest.approx(500 + 16_384 * 16 / 3, abs=6)


def test_a_stride_that_keeps_the_channel_serialises() -> None:
    """Lines 128 KiB apart share their channel: 2,048 of them take as long as one channel needs."""
    use = hbm_use(0, ((2048, 1 << 17),), 256, False, BOOK)
    spread = hbm_use(0, ((2048, 256),), 256, False, BOOK)
    assert use.lines == spread.lines == 2048
    assert spread.busiest == 2048 / CHANNELS
    assert use.busiest == pytest.approx(2048 / 16, rel=0.5)  # bits 21 to 27 reach other channels of the stack


@pytest.mark.parametrize(("offset", "packet", "transfers"), [(0, 256, 1), (8, 256, 2), (128, 1920, 15), (0, 1920, 8)])
def test_a_request_across_a_line_is_two(offset: int, packet: int, transfers: int) -> None:
    assert hbm_use(offset, ((7, 4096),), packet, False, BOOK).lines == 7 * transfers


def test_partial_writes_hold_their_channel() -> None:
    """A line written in pieces is read, modified and written for each: the busiest channel decides."""
    whole = hbm_use(0, ((64, 256),), 256, True, BOOK)
    pieces = hbm_use(0, ((64, 120),), 120, True, BOOK)
    assert whole.busiest == 2 and whole.partial == 0
    assert pieces.busiest == 4 * 50  # one line holds parts of four pieces
    assert hbm_use(0, ((64, 120),), 120, False, BOOK).busiest <= 4


def test_dense_transfers_in_any_order_are_even() -> None:
    ordered = hbm_use(0, ((64, 98304), (24, 4096)), 4096, False, SILICON)
    turned = hbm_use(0, ((32, 98304), (24, 4096), (2, 32 * 98304)), 4096, False, SILICON)
    assert ordered == turned
    assert ordered.busiest == ordered.lines / CHANNELS


def test_networks_take_turns_inside_the_window() -> None:
    """Short bursts use both networks of a PE, long ones half of the time one of them."""
    size = 64 * 1 << 15

    def cycles(loops: tuple[tuple[int, int], ...], packet: int) -> float:
        return network_cycles(loops, packet, SILICON)

    short = cycles(((128, 256), (64, DM_SLICE_STRIDE)), 256)
    long = cycles(((64, DM_SLICE_STRIDE), (8, 4096)), 4096)
    turned = cycles(((32, DM_SLICE_STRIDE), (8, 4096), (2, 32 * DM_SLICE_STRIDE)), 4096)
    assert short == turned == size / 256
    assert long == pytest.approx(size / 128, rel=0.05)
    assert cycles(((32, DM_SLICE_STRIDE), (8, 4096)), 4096) == size / 2 / 128  # one network only
    assert network_cycles(((64, DM_SLICE_STRIDE), (8, 4096)), 4096, BOOK) == 0  # the book's formulas have no such term


def test_a_slower_tensor_clock_leaves_memory_alone() -> None:
    slow = SILICON.at_clock(0.8)
    stream = load(((128, 1 << 14, 256), (64, 256, DM_SLICE_STRIDE)), 256)

    def seconds(machine: Machine) -> float:
        return (f.dma_time(stream, machine) - machine.dma_startup_cycles) * machine.seconds_per_cycle

    assert seconds(slow) == pytest.approx(seconds(SILICON))
    assert slow.hbm_bytes_per_cycle == pytest.approx(1920)
    assert slow.digest() != SILICON.digest()
    assert slow.at_clock(1.0).hbm_bytes_per_cycle == pytest.approx(1536)
