"""More bandwidth, less delay, fewer bytes or one instruction less never makes a schedule slower, but for queueing.

Several units that share memories, passes beside a transfer, or two contexts that share the vector engine, can do worse
with more: what starts earlier may take its turn before something more urgent. That noise is explained: a run is slower
than the original by no more than what the accounting of its own critical path names as contention. What can be short
nowhere is monotone without noise.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backend_rngd.isa.descriptors import (
    DM_SLICE_STRIDE,
    After,
    Alu,
    Commit,
    Context,
    Dma,
    Dtype,
    Endpoint,
    Exec,
    Fetch,
    Instruction,
    Mode,
    Op,
    Operand,
    Routine,
    Source,
    Space,
    Stream,
    Switch,
    SwitchKind,
    VectorOp,
)
from backend_rngd.machine import load_machine
from runtime_sim.bounds import BoundsError
from runtime_sim.timing import TimingResult, simulate
from runtime_sim.what_if import CHANGEABLE

MAIN, SUB, DMA = Context.MAIN, Context.SUB, Context.DMA
SILICON = load_machine(mode="silicon")
# Of the machine: what more of makes faster, and what less of does. The rest is energy.
BANDWIDTHS = {
    "commit_sub_bytes", "dm_cross_cluster_bytes_per_cycle", "dma_engine_bytes_per_cycle", "dma_hbm_bytes_per_cycle",
    "dmn_bytes_per_cycle", "dmn_window_bytes", "hbm_channel_bytes_per_cycle", "hbm_efficiency", "lookup_keys_per_cycle",
    "pcie_peer_bytes_per_cycle",
}  # fmt: skip
ENERGY = {"power_card_watts", "power_idle_watts", "power_pe_watts"}
SKEW = {"launch_skew_cycles"}  # 0: nothing is less
DELAYS = CHANGEABLE - BANDWIDTHS - ENERGY - SKEW

Item = tuple[Context, Any, tuple[int, int, int]]


def load(pattern: int, size: int) -> Dma:
    """From HBM: whole runs, short runs, off a line, or a stride that stays in a few channels."""
    run, stride, inner = ((4096, 4096, 1), (256, 256, 1), (1920, 1920, 1), (256, 1 << 17, 1))[pattern]
    loops = ((size, 64 * stride, run * inner), (64, stride, DM_SLICE_STRIDE))
    return Dma(Endpoint(Space.HBM, 0), Endpoint(Space.DM, 0), loops, run)


def store(size: int) -> Dma:
    """Parts of lines to HBM."""
    return Dma(Endpoint(Space.DM, 0), Endpoint(Space.HBM, 1 << 28), ((size, 8, 8192), (64, DM_SLICE_STRIDE, 120)), 120)


def work(size: int, vector: bool, ring: int) -> Exec:
    """A pass, by the vector engine or round a ring."""
    double = VectorOp(Alu.FP_MUL0, Op.MUL, Mode.STREAM_OPERAND, Operand(Source.CONST, 2.0))
    fetch, commit = (
        Fetch(0, ((size * 64, 4),), Dtype.F32, 8),
        Commit(1 << 17, ((size * 64 * max(ring, 1), 4),), Dtype.F32, 8),
    )
    switch = Switch(SwitchKind.BROADCAST01, 1, ring, size * 8) if ring else None
    return Exec(64, fetch, commit, switch, None, (double,) if vector else ())


@st.composite
def items(draw: st.DrawFn, vector: bool) -> list[Item]:
    """Random instructions whose waits refer to the past."""
    out: list[Item] = []
    counts = [0, 0, 0]
    for _ in range(draw(st.integers(1, 16))):
        context = draw(st.sampled_from([MAIN, SUB, DMA]))
        size = draw(st.integers(1, 12))
        after = tuple(draw(st.integers(0, n)) if draw(st.booleans()) else 0 for n in counts)
        if context is DMA:
            what: Any = store(size) if draw(st.booleans()) else load(draw(st.integers(0, 3)), 4 * size)
        else:
            what = work(size, vector and draw(st.booleans()), draw(st.sampled_from([0, 2, 4])))
        out.append((context, what, (after[0], after[1], after[2])))
        counts[context] += 1
    return out


def stream(program: list[Item]) -> Stream:
    body = tuple(Instruction(c, After(*after), what) for c, what, after in program)
    return Stream(0, 64, (Routine("main", body),), ("test",))


def without(program: list[Item], position: int) -> list[Item]:
    """One instruction less; waits count those that are left."""
    gone = program[position][0]
    number = sum(c is gone for c, _, _ in program[: position + 1])
    out: list[Item] = []
    for i, (context, what, after) in enumerate(program):
        if i == position:
            continue
        counts = list(after)
        if i > position and counts[gone] >= number:
            counts[gone] -= 1
        out.append((context, what, (counts[0], counts[1], counts[2])))
    return out


def noise(result: TimingResult) -> float:
    """Contention on the critical path."""
    path = result.critical_path
    return float(result.shared[path].sum() + result.gaps[path, 1].sum())


def not_slower(after: TimingResult, before: TimingResult) -> None:
    assert after.bounds is not None and before.bounds is not None
    allowed = noise(after) if after.bounds.queued else 0.0
    assert after.cycles <= before.cycles * (1 + 1e-9) + allowed * (1 + 1e-9)
    assert after.bounds.path <= before.bounds.path * (1 + 1e-9)


def test_every_parameter_is_tried() -> None:
    assert BANDWIDTHS < CHANGEABLE and ENERGY < CHANGEABLE
    assert all(getattr(SILICON, name) > 0 for name in BANDWIDTHS | DELAYS)


@pytest.mark.parametrize("units", [1, 3])
@settings(deadline=None, max_examples=25)
@given(st.data())
def test_a_better_machine_is_not_slower(units: int, data: st.DataObject) -> None:
    """Without the vector engine and with it."""
    programs = [stream(data.draw(items(units > 1))) for _ in range(units)]
    name = data.draw(st.sampled_from(sorted(BANDWIDTHS | DELAYS)))
    factor = data.draw(st.floats(1.01, 4))
    value = getattr(SILICON, name) * (factor if name in BANDWIDTHS else 1 / factor)
    better = SILICON.model_copy(update={name: value})
    not_slower(simulate(programs, better), simulate(programs, SILICON))


@pytest.mark.parametrize("units", [1, 3])
@settings(deadline=None, max_examples=40)
@given(st.data())
def test_less_to_do_is_not_slower(units: int, data: st.DataObject) -> None:
    """Fewer bytes of a transfer, or one instruction less."""
    programs = [data.draw(items(units > 1)) for _ in range(units)]
    before = simulate([stream(p) for p in programs], SILICON)
    position = data.draw(st.integers(0, len(programs[0]) - 1))
    context, what, after = programs[0][position]
    if len(programs[0]) > 1:
        removed = [without(programs[0], position), *programs[1:]]
        if not isinstance(what, Exec) or what.switch is None:  # else its configuration may have to be loaded later
            not_slower(simulate([stream(p) for p in removed], SILICON), before)
    if isinstance(what, Dma) and what.loops[0][0] > 1:
        loops = ((data.draw(st.integers(1, what.loops[0][0] - 1)), *what.loops[0][1:]), *what.loops[1:])
        smaller = Dma(what.source, what.destination, loops, what.packet)
        programs[0][position] = (context, smaller, after)
        not_slower(simulate([stream(p) for p in programs], SILICON), before)


def test_bounds_are_tight_where_nothing_is_shared_and_checked() -> None:
    """One transfer is its own bound; several units that want more than HBM has are bound by it."""
    alone = simulate(stream([(DMA, load(0, 8), (0, 0, 0))]), SILICON)
    assert alone.bounds is not None
    assert alone.bounds.lower == alone.bounds.upper == pytest.approx(alone.cycles)
    many = simulate([stream([(DMA, load(1, 64), (0, 0, 0))])] * 16, SILICON)
    assert many.bounds is not None and many.bounds.binds == "HBM"
    assert many.cycles == pytest.approx(many.bounds.lower + SILICON.dma_startup_cycles)
    assert many.cycles < many.bounds.upper
    for wrong in (many.bounds.lower * 0.999, many.bounds.upper * 1.001):
        with pytest.raises(BoundsError, match="outside the bounds"):
            many.bounds.check(wrong)


@settings(deadline=None, max_examples=10)
@given(st.data())
def test_two_runs_are_alike(data: st.DataObject) -> None:
    programs = [stream(data.draw(items(True))) for _ in range(3)]
    first, second = simulate(programs, SILICON), simulate(programs, SILICON)
    assert (first.finish == second.finish).all() and first.bounds == second.bounds
