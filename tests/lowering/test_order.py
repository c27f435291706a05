"""The order of a transfer's loops: the same bytes, in the time that the machine allows."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backend_rngd.isa.descriptors import DM_SLICE_STRIDE, Dma, Endpoint, Space
from backend_rngd.lowering.order import Entries, best_order
from backend_rngd.machine import load_machine
from backend_rngd.machine.formulas import dma_startup, dma_time

MACHINE, SILICON = load_machine(), load_machine(mode="silicon")
SOURCE, TARGET = (Space.HBM, 0, 0), (Space.DM, 0, 0)


def tile(slices: int, rows: int, run: int, pitch: int) -> Entries:
    """`rows` rows of `run` bytes for each slice, `pitch` apart in HBM."""
    return ((slices, rows * pitch, DM_SLICE_STRIDE, 0), (rows, pitch, run, 0))


def pairs(entries: Entries, packet: int) -> set[tuple[int, int]]:
    """Source and target of every 256 bytes."""
    found: set[tuple[int, int]] = set()
    for steps in itertools.product(*(range(n) for n, *_ in entries)):
        a, b = (sum(i * e[side] for i, e in zip(steps, entries, strict=True)) for side in (1, 2))
        found.update((a + at, b + at) for at in range(0, packet, 256))
    return found


@given(st.sampled_from([64, 48, 32, 16]), st.integers(1, 12), st.integers(1, 16), st.booleans())
@settings(max_examples=30, deadline=None)
def test_the_same_bytes(slices: int, rows: int, lines: int, dense: bool) -> None:
    run = lines * 256
    entries = tile(slices, rows, run, run if dense else run + 512)
    ordered, packet = best_order(entries, run, SOURCE, TARGET, MACHINE)
    assert pairs(ordered, packet) == pairs(entries, run)


@pytest.mark.parametrize(("rows", "run"), [(8, 4096), (16, 3584), (28, 3584), (36, 3584), (12, 2816), (20, 1792)])
def test_weights_come_as_fast_as_engines_go(rows: int, run: int) -> None:
    """Also rows whose length is no power of two, which are cut so that the networks take turns more often."""
    ordered, packet = best_order(tile(64, rows, run, run), run, SOURCE, TARGET, MACHINE)
    desc = Dma(Endpoint(Space.HBM, 0), Endpoint(Space.DM, 0), tuple((n, a, b) for n, a, b, _ in ordered), packet)
    moving = dma_time(desc, SILICON) - dma_startup(desc, SILICON)
    assert moving <= 1.01 * 64 * rows * run / SILICON.dma_hbm_bytes_per_cycle
