"""Placement: live buffers never overlap, alignment holds, callers and callees keep out of each other's way."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from xdsl.dialects.builtin import ModuleOp

from backend_rngd.dialect import (
    AllocOp,
    CallOp,
    GetGlobalOp,
    GlobalOp,
    InstructionOp,
    MemsetOp,
    ProbeOp,
    RoutineOp,
    buffer_type,
)
from backend_rngd.isa.descriptors import Memset
from backend_rngd.machine import load_machine
from backend_rngd.place import Request, Strategy, apart, best_fit, largest_first, next_fit, place
from ir.errors import UserError

MACHINE = load_machine()
REQUESTS = st.lists(
    st.builds(
        lambda size, align, start, length: Request(size, align, start, start + length),
        st.integers(1, 300),
        st.sampled_from([1, 8, 64]),
        st.integers(0, 20),
        st.integers(0, 10),
    ),
    max_size=25,
)


@pytest.mark.parametrize("strategy", [apart, next_fit, best_fit, largest_first])
@given(requests=REQUESTS, base=st.integers(0, 100), room=st.integers(64, 4000))
@settings(max_examples=200, deadline=None)
def test_strategies(strategy: Strategy, requests: list[Request], base: int, room: int) -> None:
    found = strategy(requests, base, base + room)
    if found is None:
        return
    for r, address in zip(requests, found, strict=True):
        assert base <= address
        assert address + r.size <= base + room
        assert address % r.align == 0
    for (r, a), (q, b) in itertools.combinations(zip(requests, found, strict=True), 2):
        if r.start <= q.end and q.start <= r.end:
            assert a + r.size <= b or b + q.size <= a


@pytest.mark.parametrize("strategy", [apart, next_fit, best_fit, largest_first])
def test_a_strategy_that_fails_says_so(strategy: Strategy) -> None:
    assert strategy([Request(60, 1, 0, 5), Request(60, 1, 5, 9)], 0, 100) is None
    assert strategy([Request(60, 1, 0, 5), Request(60, 1, 6, 9)], 0, 100) is not None


def test_memory_is_reused_late() -> None:
    """Short-lived buffers go round, so that a transfer into one seldom waits for readers of the last."""
    found = next_fit([Request(100, 1, i, i) for i in range(5)], 0, 350)
    assert found == [0, 100, 200, 0, 100]


def test_small_buffers_do_not_stand_between_large_ones() -> None:
    """A large buffer finds the whole place of one that is over, whatever small ones came between them."""
    requests = [r for i in range(6) for r in (Request(100, 1, i, i + 1), Request(5, 1, i, i + 2))]
    found = apart(requests, 0, 250)
    assert found is not None
    large = found[::2]
    assert large == [0, 100, 0, 100, 0, 100]
    assert all(address >= 200 for address in found[1::2])


# Modules -------------------------------------------------------------------------------------------------------------
def touch(op: AllocOp) -> MemsetOp:
    return MemsetOp(Memset(64, 0, 8), op.results[0])


def module_of(*routines: RoutineOp, globals_: tuple[GlobalOp, ...] = ()) -> ModuleOp:
    return ModuleOp([*globals_, *routines])


def address(op: AllocOp) -> int:
    assert op.address is not None
    return op.address.value.data


def lives(routine: RoutineOp) -> list[tuple[AllocOp, int, int]]:
    positions: dict[AllocOp, list[int]] = {}
    for i, op in enumerate(routine.block.ops):
        if isinstance(op, InstructionOp | ProbeOp | CallOp):
            for operand in op.operands:
                if isinstance(operand.owner, AllocOp):
                    positions.setdefault(operand.owner, []).append(i)
    return [(op, min(p), max(p)) for op, p in positions.items()]


def assert_disjoint(routine: RoutineOp) -> None:
    for (a, a0, a1), (b, b0, b1) in itertools.combinations(lives(routine), 2):
        if a0 <= b1 and b0 <= a1:
            x, y = address(a), address(b)
            assert x + a.result.type.nbytes.data <= y or y + b.result.type.nbytes.data <= x


@given(st.lists(st.tuples(st.integers(1, 120), st.integers(0, 6)), min_size=1, max_size=20), st.data())
@settings(max_examples=100, deadline=None)
def test_module_buffers(sizes: list[tuple[int, int]], data: st.DataObject) -> None:
    """Random allocations (KB) with later uses."""
    allocs = [AllocOp("dm", size * 1024, f"b{i}") for i, (size, _) in enumerate(sizes)]
    routine = RoutineOp("main")
    routine.block.add_ops(allocs)
    for i, (_, again) in enumerate(sizes):
        routine.block.add_op(touch(allocs[i]))
        for _ in range(again):
            routine.block.add_op(touch(allocs[data.draw(st.integers(max(0, i - 1), i))]))
    module = module_of(routine)
    top = place(module, MACHINE)
    assert_disjoint(routine)
    assert all(address(op) % 64 == 0 for op in allocs)
    assert top["dm"] == max(address(op) + op.result.type.nbytes.data for op in allocs) <= MACHINE.dm_slice_bytes


def test_globals_lie_below_locals_and_keep_given_addresses() -> None:
    given_ = GlobalOp("w", "hbm", 5000, "weight", address=1 << 20)
    globals_ = (given_, GlobalOp("x", "hbm", 100, "input"), GlobalOp("t", "dm", 1000, "scratch"))
    routine = RoutineOp("main")
    local, host = AllocOp("dm", 64), AllocOp("hbm", 64)
    routine.block.add_ops([local, host, touch(local), ProbeOp(host.results[0], "v", "{}"), touch(local)])
    routine.block.add_op(MemsetOp(Memset(64, 0, 8), host.results[0]))  # not verified: only its operand matters
    place(module_of(routine, globals_=globals_), MACHINE)
    found = [op.address.value.data for op in globals_ if op.address is not None]
    assert found == [1 << 20, (1 << 20) + 8192, 0]
    assert address(local) == 1024
    assert address(host) >= found[1] + 100


def test_hbm_base_is_kept() -> None:
    module = module_of(RoutineOp("main"), globals_=(GlobalOp("x", "hbm", 8, "input"),))
    assert place(module, MACHINE, hbm_base=10_000)["hbm"] == 12288 + 8


def test_locals_across_a_call_are_not_in_the_callee() -> None:
    callee = RoutineOp("block", [])
    inner = [AllocOp("dm", 1024), AllocOp("dm", 1024)]
    callee.block.add_ops([*inner, touch(inner[0]), touch(inner[1]), touch(inner[0])])
    main = RoutineOp("main")
    across, before, after = AllocOp("dm", 4096), AllocOp("dm", 512), AllocOp("dm", 512)
    main.block.add_ops([across, before, after, touch(across), touch(before)])
    main.block.add_ops([CallOp("block", []), touch(across), touch(after)])
    place(module_of(main, callee), MACHINE)
    assert_disjoint(main)
    assert_disjoint(callee)
    for op in inner:
        assert address(op) >= address(across) + 4096 or address(op) + 1024 <= address(across)
    assert min(address(op) for op in inner) == 4096


def test_trf_halves() -> None:
    """A buffer aligned to half a TRF takes one half, a second one the other."""
    routine = RoutineOp("main")
    halves = [AllocOp("trf", 32768, "a", 32768), AllocOp("trf", 32768, "b", 32768)]
    routine.block.add_ops(halves)
    for op in (*halves, *halves):
        routine.block.add_op(touch(op))
    place(module_of(routine), MACHINE)
    assert sorted(address(op) for op in halves) == [0, 32768]


def test_too_much_names_the_largest() -> None:
    routine = RoutineOp("main")
    allocs = [AllocOp("dm", 300_000, "scores"), AllocOp("dm", 300_000, "mask"), AllocOp("dm", 64, "early")]
    routine.block.add_ops([*allocs, touch(allocs[2]), touch(allocs[0]), touch(allocs[1]), touch(allocs[0])])
    with pytest.raises(UserError) as e:
        place(module_of(routine), MACHINE)
    (problem,) = e.value.problems
    assert "buffers of routine main do not fit in DM of a slice" in problem.what
    assert "600,000 B are live at once" in problem.why
    assert "scores 300,000 B" in problem.why
    assert "early" not in problem.why


def test_too_many_weights() -> None:
    module = module_of(RoutineOp("main"), globals_=(GlobalOp("w", "hbm", 60 << 30, "weight"),))
    with pytest.raises(UserError, match="global buffers do not fit in HBM"):
        place(module, MACHINE)


def test_recursion_is_refused() -> None:
    main, block = RoutineOp("main"), RoutineOp("block")
    main.block.add_op(CallOp("block", []))
    block.block.add_op(CallOp("main", []))
    with pytest.raises(ValueError, match="in a circle: main -> block -> main"):
        place(module_of(main, block), MACHINE)


def test_arguments_take_no_space() -> None:
    block = RoutineOp("block", [buffer_type("hbm", 64)])
    main = RoutineOp("main")
    x = GetGlobalOp("x", buffer_type("hbm", 64))
    main.block.add_ops([x, CallOp("block", [x.results[0]])])
    top = place(module_of(main, block, globals_=(GlobalOp("x", "hbm", 64, "input"),)), MACHINE)
    assert top == {"hbm": 64, "dm": 0, "trf": 0, "vrf": 0}


def test_ten_thousand_buffers_take_about_a_second() -> None:
    import time

    routine = RoutineOp("main")
    allocs = [AllocOp("dm", 4096 + 64 * (i % 50), f"b{i}") for i in range(10_000)]
    routine.block.add_ops(allocs)
    for i in range(10_000):
        routine.block.add_op(touch(allocs[i]))
        routine.block.add_op(touch(allocs[max(0, i - 30)]))
    begin = time.process_time()
    place(module_of(routine), MACHINE)
    assert time.process_time() - begin < 5
