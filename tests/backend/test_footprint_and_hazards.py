"""Footprints against enumeration; waits against a brute-force happens-before relation."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st
from isa_builders import chain, copy_pass, gather_of, instruction, load, matmul, store, stream, trf, vrf

from backend_rngd.isa.descriptors import (
    DM_SLICE_STRIDE,
    After,
    Alu,
    Contract,
    Descriptor,
    Dma,
    Dtype,
    Endpoint,
    Instruction,
    Memset,
    Mode,
    Op,
    Operand,
    Source,
    Space,
    VectorOp,
)
from backend_rngd.isa.footprint import MAX_PIECES, contract_access, footprint, intervals, slice_range, split_stride
from backend_rngd.isa.hazards import CONTEXTS, Hazards
from backend_rngd.isa.legality import check_stream
from backend_rngd.machine import load_machine

MACHINE = load_machine()
LOOPS = st.lists(st.tuples(st.integers(1, 6), st.integers(-40, 40)), max_size=3)


def touched(base: int, loops: Sequence[tuple[int, int]], unit: int) -> set[int]:
    out: set[int] = set()
    for steps in itertools.product(*[range(n) for n, _ in loops]):
        at = base + sum(i * s for i, (_, s) in zip(steps, loops, strict=True))
        out.update(range(at, at + unit))
    return out


@given(st.integers(0, 64), LOOPS, st.integers(1, 16))
def test_intervals_cover_what_is_touched(base: int, loops: list[tuple[int, int]], unit: int) -> None:
    found = intervals(base, loops, unit)
    covered = {x for low, high in found for x in range(low, high)}
    exact = touched(base, loops, unit)
    assert exact <= covered
    assert (min(covered), max(covered)) == (min(exact), max(exact))
    assert all(a[1] < b[0] for a, b in itertools.pairwise(found))


@given(st.integers(0, 64), st.lists(st.integers(1, 5), max_size=3), st.integers(1, 16), st.data())
def test_intervals_are_exact_when_loops_nest(base: int, sizes: list[int], unit: int, data: st.DataObject) -> None:
    """Strides that step over everything inside them leave gaps that must not be counted."""
    loops: list[tuple[int, int]] = []
    extent = unit
    for size in sizes:
        stride = extent + data.draw(st.integers(0, 9))
        loops.insert(0, (size, stride))
        extent += (size - 1) * stride
    covered = {x for low, high in intervals(base, loops, unit, 10_000) for x in range(low, high)}
    assert covered == touched(base, loops, unit)


def test_many_pieces_become_few() -> None:
    loops = ((100, 1000), (10, 50))
    found = intervals(0, loops, 8)
    assert len(found) <= MAX_PIECES
    assert found[0][0] == 0
    assert found[-1][1] == 99 * 1000 + 9 * 50 + 8


def test_dm_addresses_of_a_dma_are_offsets_and_slices() -> None:
    assert split_stride(3 * DM_SLICE_STRIDE + 64) == (3, 64)
    assert split_stride(DM_SLICE_STRIDE - 64) == (1, -64)
    loops = ((4, DM_SLICE_STRIDE), (2, 512))
    assert slice_range(Endpoint(Space.DM, 5 * DM_SLICE_STRIDE + 8), loops) == (5, 9)
    desc = Dma(
        Endpoint(Space.HBM, 64, 9),
        Endpoint(Space.DM, 5 * DM_SLICE_STRIDE + 8),
        ((4, 32, DM_SLICE_STRIDE), (2, 512, 512)),
        16,
    )
    read, write = footprint(desc)
    assert (read.space, read.register, read.write) == ("hbm", 9, False)
    assert (write.space, write.intervals, write.write) == ("dm", ((8, 24), (520, 536)), True)


def test_lanes_share_trf() -> None:
    loops = ((4, 0, 0), (4, 64, 1), (2, 256, 2))
    access = contract_access(Contract(8, 2, 4096, loops, 32, 5, matmul().contract.mode), Dtype.BF16)  # type: ignore[union-attr]
    assert access.intervals == tuple((lane * 8192 + 4096, lane * 8192 + 4608) for lane in range(8))
    (_, write) = footprint(trf(2048, base=0, lanes=1))
    assert write.intervals == ((0, 4096),)


def test_every_access_of_a_pass() -> None:
    op = VectorOp(Alu.FP_MUL0, Op.MUL, Mode.STREAM_OPERAND, Operand(Source.VRF, base=256, loops=((8, 0), (8, 4))))
    found = footprint(replace(chain(op), fetch=chain(second=True).fetch))
    assert [(a.space, a.intervals, a.write) for a in found] == [
        ("dm", ((0, 256),), False),
        ("dm", ((16384, 16640),), False),
        ("vrf", ((256, 288),), False),
        ("dm", ((8192, 8448),), True),
    ]
    assert [a.space for a in footprint(gather_of())] == ["hbm", "dm", "hbm"]


# Waits ---------------------------------------------------------------------------------------------------------------
PLACES = st.integers(0, 7).map(lambda i: i * 512)
MAKERS: list[st.SearchStrategy[Descriptor]] = [
    st.builds(load, st.just(512), st.just(4096), PLACES),
    st.builds(store, st.just(1024), PLACES),
    st.builds(copy_pass, PLACES, PLACES.map(lambda x: x + 8192), st.sampled_from([64, 256])),
    st.builds(copy_pass, PLACES.map(lambda x: x + 8192), PLACES, st.sampled_from([64, 256])),
    st.builds(trf, st.just(1024), PLACES, st.sampled_from([0, 256, 4096])),
    st.builds(vrf, st.just(64), PLACES, st.sampled_from([0, 256])),
    st.builds(Memset, st.just(64), PLACES, st.sampled_from([512, 2048])),
    st.just(matmul()),
    st.just(chain(VectorOp(Alu.FP_MUL0, Op.MUL, Mode.STREAM_OPERAND, Operand(Source.VRF, base=0, loops=((64, 4),))))),
]
PROGRAMS = st.lists(st.one_of(MAKERS), min_size=1, max_size=14)


def scheduled(program: Sequence[Descriptor]) -> list[Instruction]:
    """Instructions with the waits that `Hazards` asks for."""
    accesses = [footprint(d) for d in program]
    hazards = Hazards(accesses)
    out: list[Instruction] = []
    for desc, access in zip(program, accesses, strict=True):
        context = instruction(desc).context
        wait = hazards.unmet(context, hazards.required(context, access))
        hazards.issue(context, access, wait)
        out.append(instruction(desc, After(*wait)))
    return out


def conflict(a: Descriptor, b: Descriptor) -> bool:
    for x in footprint(a):
        for y in footprint(b):
            shared = x.space == y.space != "hbm" and (x.write or y.write)
            if shared and any(p[0] < q[1] and q[0] < p[1] for p in x.intervals for q in y.intervals):
                return True
    return False


def ordered(program: Sequence[Instruction]) -> list[set[int]]:
    """For every instruction, which earlier ones are surely complete when it starts (transitively)."""
    before: list[set[int]] = []
    queues: dict[int, list[int]] = {c: [] for c in CONTEXTS}
    for i, item in enumerate(program):
        known: set[int] = set()
        direct = queues[item.context][-1:]
        for context, count in zip(CONTEXTS, (item.after.main, item.after.sub, item.after.dma), strict=True):
            direct += queues[context][:count]
        for j in direct:
            known |= {j} | before[j]
        before.append(known)
        queues[item.context].append(i)
    return before


def uncovered(program: Sequence[Instruction]) -> bool:
    before = ordered(program)
    return any(
        program[i].context != program[j].context and conflict(program[i].what, program[j].what) and i not in before[j]
        for j in range(len(program))
        for i in range(j)
    )


@given(PROGRAMS)
@settings(max_examples=300, deadline=None)
def test_every_conflict_is_covered(program: list[Descriptor]) -> None:
    items = scheduled(program)
    assert not uncovered(items)
    assert {v.rule for v in check_stream(stream(items), MACHINE)} <= {"type"}  # the programs mix types at random


@given(PROGRAMS, st.data())
@settings(max_examples=300, deadline=None)
def test_every_wait_is_needed_and_its_loss_is_found(program: list[Descriptor], data: st.DataObject) -> None:
    """Shortening any wait by one leaves a conflict open, and the race check says so."""
    items = scheduled(program)
    waits = [(i, f) for i, item in enumerate(items) for f in ("main", "sub", "dma") if getattr(item.after, f)]
    if not waits:
        return
    index, field = data.draw(st.sampled_from(waits))
    shorter = replace(items[index].after, **{field: getattr(items[index].after, field) - 1})
    items[index] = replace(items[index], after=shorter)
    assert uncovered(items)
    found = check_stream(stream(items), MACHINE)
    assert "race" in {v.rule for v in found}


@given(PROGRAMS, st.data())
@settings(max_examples=300, deadline=None)
def test_a_wait_too_many_is_found(program: list[Descriptor], data: st.DataObject) -> None:
    items = scheduled(program)
    index = data.draw(st.integers(0, len(items) - 1))
    field = data.draw(st.sampled_from(["main", "sub", "dma"]))
    items[index] = replace(
        items[index], after=replace(items[index].after, **{field: getattr(items[index].after, field) + 1})
    )
    assert {v.rule for v in check_stream(stream(items), MACHINE)} & {"useless-wait", "future"}
