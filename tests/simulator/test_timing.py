"""Timing on cases small enough to compute by hand, and properties every run must have."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backend_rngd.isa.descriptors import (
    DM_SLICE_STRIDE,
    After,
    Alu,
    Call,
    Commit,
    Context,
    Dma,
    Dtype,
    Endpoint,
    Exec,
    Fetch,
    Instruction,
    LoadVrf,
    Mode,
    Op,
    Operand,
    Routine,
    Source,
    Space,
    Stream,
    VectorOp,
)
from backend_rngd.machine import load_machine
from backend_rngd.machine.formulas import dma_time, unit_cycles
from runtime_sim.errors import SimulationError
from runtime_sim.event_core import Rates, Resources, execute
from runtime_sim.timing import simulate

BOOK = load_machine()
MAIN, SUB, DMA, CONTROL = Context.MAIN, Context.SUB, Context.DMA, Context.CONTROL


def load(nbytes: int) -> Dma:
    """HBM to 64 slices, `nbytes` in 4 KB packets."""
    return Dma(
        Endpoint(Space.HBM, 0),
        Endpoint(Space.DM, 0),
        ((64, nbytes // 64, DM_SLICE_STRIDE), (nbytes // 64 // 4096, 4096, 4096)),
        4096,
    )


def copy(packets: int) -> Exec:
    """f32 copy of 8-element packets: one flit a cycle, no vector engine."""
    return Exec(64, Fetch(0, ((packets * 8, 4),), Dtype.F32, 8), Commit(1 << 17, ((packets * 8, 4),), Dtype.F32, 8))


def scale(packets: int) -> Exec:
    """Multiply by 2 in the vector engine: two cycles a flit."""
    double = VectorOp(Alu.FP_MUL0, Op.MUL, Mode.STREAM_OPERAND, Operand(Source.CONST, 2.0))
    return Exec(
        64,
        Fetch(0, ((packets * 8, 4),), Dtype.F32, 8),
        Commit(1 << 17, ((packets * 8, 4),), Dtype.F32, 8),
        None,
        None,
        (double,),
    )


def stream(*items: tuple[Context, object, After], **routines: tuple) -> Stream:
    """items: (context, descriptor, after); further routines by name, in order of their number from 1."""

    def body(name, entries):
        return Routine(name, tuple(Instruction(c, a, w, 0) for c, w, a in entries))

    bodies = (body("main", items), *(body(n, e) for n, e in routines.items()))
    return Stream(0, 64, bodies, ("model.layers.0.mlp|tc.contract",))


def closes(result) -> None:
    """Every context's cycles are all accounted for."""
    for unit in result.stalls:
        for row in unit.values():
            assert sum(row.values()) == pytest.approx(result.cycles, rel=1e-9, abs=1e-6)
            assert min(row.values()) >= -1e-6


def test_one_transfer():
    """256 KB by one engine at 256 B a cycle behind a start-up of 500 cycles."""
    result = simulate(stream((DMA, load(1 << 18), After())), BOOK)
    assert result.cycles == 500 + 1024
    assert result.hbm_read_bytes == 1 << 18
    assert result.stalls[0]["dma"]["issue"] == 500
    assert result.stalls[0]["dma"]["busy"] == 1024
    assert result.stalls[0]["main"]["tail"] == 1524
    closes(result)


def test_pass_hides_behind_transfer_and_waits_are_charged():
    """dma 1524; main: a pass of 100 at once, then one that waits for the transfer."""
    result = simulate(
        stream((DMA, load(1 << 18), After()), (MAIN, copy(100), After()), (MAIN, copy(50), After(dma=1))), BOOK
    )
    assert result.finish.tolist() == [1524, 100, 1574]
    main = result.stalls[0]["main"]
    assert (main["busy"], main["wait_dma"], main["tail"]) == (150, 1424, 0)
    assert result.stalls[0]["dma"]["tail"] == 50
    assert result.critical_path == [0, 2]
    closes(result)


def test_silicon_adds_issue_and_startup():
    fast = stream((DMA, load(1 << 18), After()), (MAIN, copy(100), After(dma=1)))
    silicon = simulate(fast, BOOK, mode="silicon")
    machine = BOOK.in_mode("silicon")
    dma, main = silicon.finish.tolist()
    assert dma == pytest.approx(dma_time(load(1 << 18), machine))
    assert dma > 1524
    assert main - dma == pytest.approx(100 + machine.pass_issue_cycles)
    assert silicon.stalls[0]["main"]["issue"] == machine.pass_issue_cycles
    closes(silicon)


def test_wait_chain_across_contexts():
    """dma -> sub -> main -> dma: everything serial."""
    vrf = LoadVrf(64, Fetch(0, ((800, 4),), Dtype.F32, 8), 0)
    result = simulate(
        stream(
            (DMA, load(1 << 18), After()),
            (SUB, vrf, After(dma=1)),
            (MAIN, copy(10), After(sub=1)),
            (DMA, load(1 << 18), After(main=1)),
        ),
        BOOK,
    )
    loading = unit_cycles(vrf, SUB, BOOK).total
    assert loading == 400  # 3,200 B at 8 B a cycle
    assert result.finish.tolist() == [1524, 1924, 1934, 3458]
    assert result.stalls[0]["dma"]["wait_main"] == 410
    assert result.critical_path == [0, 1, 2, 3]
    closes(result)


def test_main_and_sub_share_the_vector_engine():
    """Two vector passes at once: one of them waits for the engine, copies do not."""
    both = simulate(stream((MAIN, scale(100), After()), (SUB, scale(100), After())), BOOK)
    main, sub = (unit_cycles(scale(100), c, BOOK).total for c in (MAIN, SUB))
    assert both.finish.tolist() == [main, main + sub]
    assert both.stalls[0]["sub"]["contention_vector"] == main
    assert both.critical_path == [0, 1]
    closes(both)
    free = simulate(stream((MAIN, scale(100), After()), (SUB, copy(100), After())), BOOK)
    assert free.stalls[0]["sub"]["contention_vector"] == 0
    closes(free)


def test_vector_engine_goes_to_the_context_that_was_ready_first():
    """Main has pass after pass; sub is ready before main's second and gets the engine between them."""
    result = simulate(stream((MAIN, scale(100), After()), (MAIN, scale(100), After()), (SUB, scale(10), After())), BOOK)
    one = unit_cycles(scale(100), MAIN, BOOK).total
    assert result.start[2] == one
    assert result.start[1] == result.finish[2]
    closes(result)


def test_a_pass_without_the_vector_engine_starts_beside_one_that_waited_for_it():
    """Main's second pass needs no vector engine: it starts together with sub's, which waited for main's first."""
    result = simulate(stream((MAIN, scale(100), After()), (MAIN, copy(50), After()), (SUB, scale(10), After())), BOOK)
    one = unit_cycles(scale(100), MAIN, BOOK).total
    assert result.start.tolist() == [0, one, one]
    closes(result)


def test_units_share_hbm():
    """Eight engines want 2,048 B a cycle of 1,536: every transfer takes 4/3 of its time behind the start-up."""
    one = stream((DMA, load(1 << 20), After()))
    alone = simulate(one, BOOK)
    assert alone.cycles == 500 + 4096
    result = simulate([one] * 8, BOOK)
    assert result.cycles == pytest.approx(500 + 4096 * 4 / 3)
    assert result.stalls[3]["dma"]["contention_hbm"] == pytest.approx(4096 / 3)
    closes(result)
    six = simulate([one] * 6, BOOK)
    assert six.cycles == pytest.approx(500 + 4096)


def test_bandwidth_is_shared_max_min_fairly():
    """Two small flows keep what they want, the big ones split the rest; a flow that ends frees its share.

    Capacity 10: flows want 1, 6 and 6 with 10, 60 and 60 units of work -> rates 1, 0.75, 0.75 until the first ends.
    """
    n = 3
    queue_start = np.array([0, 0, 0, 1, 1, 1, 2, 2, 2, 3])
    rates = Rates(
        np.zeros(n), np.array([10.0, 60.0, 60.0]), np.array([1.0, 6.0, 6.0]), np.zeros(n, np.bool_),
        np.zeros(n, np.bool_),
    )  # fmt: skip
    one = np.zeros(n, np.int64)
    resources = Resources(np.arange(n + 1), one, np.ones(n), np.array([10.0]), np.zeros(1, np.int64))
    times = execute(3, queue_start, np.arange(n), np.zeros((n, 3), np.int64), np.arange(n), rates, resources, jit=False)
    finish = times.finish
    assert times.completed == 3
    # After 10 cycles 45/60 of... the wide flows have 60 - 7.5 = 52.5 left at rate 10 / 12.
    assert finish.tolist() == pytest.approx([10.0, 10 + 52.5 / (10 / 12), 10 + 52.5 / (10 / 12)])


def test_calls_and_counters():
    """Two calls of a routine: with `enter` the second waits for all of the first, without it the transfer overlaps."""

    def block(enter: bool) -> tuple:
        return ((DMA, load(1 << 18), After(enter=enter)), (MAIN, copy(1000), After(dma=1, enter=True)))

    calls = ((CONTROL, Call(1, ()), After()), (CONTROL, Call(1, ()), After()))
    strict = simulate(stream(*calls, (MAIN, copy(1), After(call=2)), block=block(True)), BOOK)
    assert strict.cycles == 2 * (1524 + 1000) + 1
    loose = simulate(stream(*calls, (MAIN, copy(1), After(call=2)), block=block(False)), BOOK)
    assert loose.cycles == 1524 + 1524 + 1000 + 1
    assert [layer.advance for layer in loose.layers] == [2524, 1524]
    assert sum(layer.advance for layer in strict.layers) == strict.cycles - 1
    closes(strict)
    closes(loose)


def test_waiting_for_the_future_is_a_deadlock():
    with pytest.raises(SimulationError, match="deadlock at routine main, instruction 0"):
        simulate(stream((MAIN, copy(1), After(dma=1)), (DMA, load(1 << 18), After())), BOOK)
    with pytest.raises(SimulationError, match="waits for 1 calls, 0 come before it"):
        simulate(
            stream((MAIN, copy(1), After(call=1)), (CONTROL, Call(1, ()), After()), block=((MAIN, copy(1), After()),)),
            BOOK,
        )


@st.composite
def programs(draw, vector: bool) -> Stream:
    """Random instructions whose waits refer to the past."""
    items = []
    counts = [0, 0, 0]
    for _ in range(draw(st.integers(1, 25))):
        context = draw(st.sampled_from([MAIN, SUB, DMA]))
        after = After(*[draw(st.integers(0, n)) if draw(st.booleans()) else 0 for n in counts], call=0)
        size = draw(st.integers(1, 20))
        kinds = [copy(size * 20), scale(size * 20)] if vector else [copy(size * 20)]
        what = load(size << 18) if context is DMA else draw(st.sampled_from(kinds))
        items.append((context, what, after))
        counts[context] += 1
    return stream(*items)


@settings(deadline=None, max_examples=50)
@given(st.lists(programs(True), min_size=1, max_size=9))
def test_accounting_closes_and_order_holds(streams):
    result = simulate(streams, BOOK)
    closes(result)
    path = result.critical_path
    assert result.finish[path[-1]] == result.cycles
    assert result.start[path[0]] == 0
    for a, b in itertools.pairwise(path):
        assert result.start[b] == result.finish[a]
    flat = result.flat
    for i in range(len(flat)):
        for c in range(3):
            before = np.nonzero((flat.unit == flat.unit[i]) & (flat.context == c))[0][: flat.need[i, c]]
            assert (result.finish[before] <= result.start[i]).all()
    users = [i for i in range(len(flat)) if result.costs[result.number[i]].vector]
    for i in users:
        for j in users:
            if i < j and flat.unit[i] == flat.unit[j]:
                assert result.finish[i] <= result.start[j] or result.finish[j] <= result.start[i]


@settings(deadline=None, max_examples=40)
@given(programs(False), st.floats(1.01, 4))
def test_a_faster_machine_is_never_slower(program, factor):
    """One unit without the vector engine's arbitration is monotone in start-up, issue cost and bandwidth, but for
    passes that now run beside a transfer and take banks from it.

    (Units that share HBM are not: a transfer that starts earlier may take bandwidth from a more urgent one.)
    """
    base = BOOK.in_mode("silicon")
    slow = simulate(program, base).cycles
    for change in (
        {"dma_startup_cycles": round(base.dma_startup_cycles / factor)},
        {"pass_issue_cycles": round(base.pass_issue_cycles / factor)},
        {"hbm_channel_bytes_per_cycle": round(base.hbm_channel_bytes_per_cycle * factor)},
        {"dma_engine_bytes_per_cycle": round(base.dma_engine_bytes_per_cycle * factor)},
    ):
        fast = simulate(program, base.model_copy(update=change))
        assert fast.cycles <= (slow + fast.shared[fast.critical_path].sum()) * (1 + 1e-9)


@settings(deadline=None, max_examples=30)
@given(st.lists(programs(False), min_size=1, max_size=9))
def test_contention_only_delays(streams):
    alone = simulate(streams, BOOK, contention=False)
    shared = simulate(streams, BOOK)
    assert (alone.finish <= shared.finish + 1e-6).all()
    assert alone.cycles == pytest.approx(max(simulate(s, BOOK).cycles for s in streams))


@settings(deadline=None, max_examples=30)
@given(st.lists(programs(True), min_size=1, max_size=9))
def test_compiled_and_plain_event_loops_agree(streams):
    plain, compiled = simulate(streams, BOOK, jit=False), simulate(streams, BOOK, jit=True)
    np.testing.assert_array_equal(plain.start, compiled.start)
    np.testing.assert_array_equal(plain.finish, compiled.finish)
    np.testing.assert_array_equal(plain.cause, compiled.cause)


@pytest.fixture
def traced():
    block = (
        (DMA, load(1 << 18), After(enter=False)),
        (MAIN, scale(1000), After(dma=1)),
        (SUB, scale(10), After(dma=1)),
    )
    calls = tuple((CONTROL, Call(1, ()), After()) for _ in range(3))
    return simulate([stream(*calls, block=block)] * 2, BOOK)


def test_json_result(traced):
    data = json.loads(json.dumps(traced.to_json(instructions=True)))
    assert data["cycles"] == traced.cycles
    assert len(data["layers"]) == 6
    assert len(data["instructions"]["start"]) == 18 == data["instructions_executed"]
    assert data["operations"][0]["location"] == "model.layers.0.mlp|tc.contract"
    assert data["critical_path"]["cycles_by_context"]["dma"] > 0


def test_a_pass_that_starves_transfers_is_an_error_beside_one():
    """64 reads of one bank in a row: legal alone, an error while data memory is read or written by a transfer."""
    starving = Exec(64, Fetch(0, ((64, 128), (2, 4)), Dtype.F32, 2), Commit(1 << 17, ((128, 4),), Dtype.F32, 2))
    short = load(1 << 12)
    assert simulate(stream((MAIN, starving, After()), (DMA, short, After(main=1))), BOOK).cycles > 64
    busy = simulate(stream((DMA, short, After()), (MAIN, starving, After(dma=1))), BOOK)
    assert busy.start[1] == busy.finish[0]
    with pytest.raises(SimulationError, match=r"hits one bank 64 times or more.*network times out"):
        simulate(stream((DMA, load(1 << 18), After()), (MAIN, starving, After())), BOOK)
    to_itself = Dma(Endpoint(Space.HBM, 0), Endpoint(Space.HBM, 1 << 24), ((64, 4096, 4096),), 4096)
    simulate(stream((DMA, to_itself, After()), (MAIN, starving, After())), BOOK)  # never in data memory


def test_passes_come_first_in_the_banks_of_a_slice():
    """A copy takes 64 of 128 B a cycle of every slice: a transfer that fills one slice after the other is halved while
    it runs, one that spreads over the slices is not."""
    machine = BOOK.in_mode("silicon")
    long_pass = copy(60_000)
    one_by_one = ((64, 1 << 15, 1 << 22), (8, 4096, 4096)), 4096
    spread = ((128, 1 << 14, 256), (64, 256, 1 << 22)), 256
    for (loops, packet), slowed in ((one_by_one, True), (spread, False)):
        move = Dma(Endpoint(Space.HBM, 0), Endpoint(Space.DM, 0), loops, packet)
        alone = simulate(stream((DMA, move, After())), machine).cycles
        both = simulate(stream((DMA, move, After()), (MAIN, long_pass, After())), machine)
        data = alone - machine.dma_startup_cycles
        assert both.finish[1] > both.finish[0]  # the pass is there all the time
        assert both.finish[0] - alone == pytest.approx(data if slowed else 0.0, rel=0.05, abs=1)
        assert both.stalls[0]["dma"]["contention_dm"] == pytest.approx(both.finish[0] - alone, abs=1e-3)
        closes(both)
        after = simulate(stream((MAIN, copy(2_000), After()), (DMA, move, After(main=1))), machine)
        assert after.stalls[0]["dma"]["contention_dm"] == 0
