"""Timing of several units: synchronisation, shared ports and links, equal units simulated once."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backend_rngd.isa.descriptors import (
    DM_SLICE_STRIDE,
    UNIT_STRIDE,
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
    Mode,
    Notify,
    Op,
    Operand,
    Routine,
    Source,
    Space,
    Stream,
    VectorOp,
    Wait,
)
from backend_rngd.machine import load_machine
from backend_rngd.machine.formulas import collective_algorithms, collective_time
from runtime_sim.analysis import Analysis
from runtime_sim.engines import ENGINES, charges, totals
from runtime_sim.errors import SimulationError
from runtime_sim.event_core import Rates, Resources, execute
from runtime_sim.sites import Sites
from runtime_sim.timing import TimingResult, simulate
from runtime_sim.timing_result import SHARED
from runtime_sim.topology import Distance, Topology
from runtime_sim.trace import write_trace

BOOK = load_machine()
SILICON = load_machine(mode="silicon")
MAIN, SUB, DMA, CONTROL = Context.MAIN, Context.SUB, Context.DMA, Context.CONTROL
OWN_UNIT = 63  # launch register: own number times UNIT_STRIDE


def copy(packets: int) -> Exec:
    """f32 copy of 8-element packets: one flit a cycle."""
    return Exec(64, Fetch(0, ((packets * 8, 4),), Dtype.F32, 8), Commit(1 << 17, ((packets * 8, 4),), Dtype.F32, 8))


def scale(packets: int) -> Exec:
    """Multiply by 2 in the vector engine: two cycles a flit."""
    double = VectorOp(Alu.FP_MUL0, Op.MUL, Mode.STREAM_OPERAND, Operand(Source.CONST, 2.0))
    return replace(copy(packets), vector=(double,))


def load(nbytes: int) -> Dma:
    """HBM to 64 slices in 4 KB packets."""
    rows = nbytes // 64 // 4096
    return Dma(
        Endpoint(Space.HBM, 0), Endpoint(Space.DM, 0), ((64, nbytes // 64, DM_SLICE_STRIDE), (rows, 4096, 4096)), 4096
    )


def gather(units: int, nbytes: int, base: int = 0, register: int = 0) -> Dma:
    """`nbytes` of every unit's DM, a 64th from each slice, into the same slice of the own DM."""
    piece = nbytes // 64
    loops = ((64, DM_SLICE_STRIDE, DM_SLICE_STRIDE), (units, UNIT_STRIDE, piece))
    return Dma(Endpoint(Space.PEER_DM, base, register), Endpoint(Space.DM, 1 << 18), loops, piece)


def pull(unit: int, nbytes: int, space: Space = Space.PEER_DM, register: int = 0) -> Dma:
    """`nbytes` of one unit into the own DM in 4 KB packets."""
    rows = max(1, nbytes // 64 // 4096)
    packet = min(4096, nbytes // 64)
    inner = DM_SLICE_STRIDE if space is Space.PEER_DM else nbytes // 64
    loops = ((64, inner, DM_SLICE_STRIDE), (rows, 4096, 4096))
    return Dma(Endpoint(space, unit * UNIT_STRIDE, register), Endpoint(Space.DM, 0), loops, packet)


def to_all(units: int, semaphore: int = 0) -> Notify:
    return Notify(0, 0, ((units, 1),), semaphore)


def to(unit: int, semaphore: int = 0) -> Notify:
    return Notify(0, unit * UNIT_STRIDE, (), semaphore)


def stream(*items: tuple, **routines: tuple) -> Stream:
    def body(name, entries):
        return Routine(name, tuple(Instruction(c, a, w, 0) for c, w, a in entries))

    bodies = (body("main", items), *(body(n, e) for n, e in routines.items()))
    return Stream(0, 64, bodies, ("model.layers.0.mlp|tc.contract",))


def waiting_for(counts: list[int]) -> After:
    main, sub, dma = counts
    return After(main, sub, dma)


def launch(units: int) -> dict[int, tuple[int, ...]]:
    return {OWN_UNIT: tuple(u * UNIT_STRIDE for u in range(units))}


def accounts_close(result: TimingResult) -> None:
    """Every cycle of every engine has one cause, and the named causes agree with the classes of the contexts."""
    sites = Sites(result)
    for number, members in enumerate(result.classes.members):
        rows = charges(result, sites, number)
        assert min(row.cycles for row in rows) >= -1e-6
        assert all(row.instruction or row.resource for row in rows if row.kind in ("wait", "sync", "contention"))
        kinds = totals(rows)
        for engine in ENGINES:
            assert sum(kinds[engine].values()) == pytest.approx(result.cycles, rel=1e-9, abs=1e-6)
        stalls = result.stalls[members[0]]
        for engine, context in (("Main", "main"), ("Sub", "sub")):
            assert kinds[engine]["busy"] == pytest.approx(stalls[context]["busy"], abs=1e-6)
            assert kinds[engine]["tail"] == pytest.approx(stalls[context]["tail"], abs=1e-6)
            assert kinds[engine]["contention"] == pytest.approx(stalls[context]["contention_vector"], abs=1e-6)
        dma = [kinds[e] for e in ("TDMA", "PDMA", "Core")]
        assert sum(k["busy"] for k in dma) == pytest.approx(stalls["dma"]["busy"], abs=1e-6)
        shared = sum(stalls["dma"][kind] for kind in SHARED)
        assert sum(k["contention"] for k in dma) == pytest.approx(shared, abs=1e-6)


def closes(result: TimingResult) -> None:
    for unit in result.stalls:
        for row in unit.values():
            assert sum(row.values()) == pytest.approx(result.cycles, rel=1e-9, abs=1e-6)
            assert min(row.values()) >= -1e-6
    accounts_close(result)
    path = result.critical_path
    assert sum(result.path_cycles) == pytest.approx(result.cycles)
    for a, b in itertools.pairwise(path):
        if result.waker[b] == a:
            assert result.finish[a] <= result.finish[b]
        else:
            assert result.start[b] == result.finish[a]


# Synchronisation -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("other", "way"), [(1, 200), (4, 600), (8, 3000)], ids=["cluster", "chip", "card"])
def test_a_wait_ends_when_the_notify_arrives(other, way):
    """Unit 0 works 1,000 cycles and notifies; the way there depends on where the waiting unit sits."""
    units = [stream((MAIN, copy(1), After()))] * 9
    units[0] = stream((MAIN, copy(1000), After()), (DMA, to(other), After(main=1)))
    units[other] = stream((DMA, Wait(0, 1), After()), (MAIN, copy(10), After(dma=1)))
    result = simulate(units, BOOK, topology=Topology.of(BOOK, tensor=9))
    assert result.cycles == 1000 + way + 10
    stalls = result.stalls[other]
    assert stalls["dma"]["wait_sync"] == 1000 + way
    assert stalls["main"]["wait_sync"] == 1000 + way
    assert stalls["dma"]["busy"] == 0
    assert result.collective_share == pytest.approx(way / (1000 + way + 10))
    closes(result)


def test_issue_of_a_notify_costs_a_descriptor_a_unit():
    units = [stream((DMA, to_all(4), After()), (DMA, Wait(0, 3), After()))] * 4
    assert simulate(units, BOOK).cycles == 200
    result = simulate(units, SILICON)
    assert result.cycles == 3 * SILICON.notify_issue_cycles + 200
    assert result.stalls[2]["dma"]["issue"] == 30
    closes(result)


def test_the_nth_wait_needs_the_nth_notify_of_every_unit():
    """Unit 0 notifies twice at once, unit 1 after 1,000 and 2,000 cycles: two notifies of unit 0 do not end a wait."""
    fast = stream((DMA, to(2), After()), (DMA, to(2), After()))
    slow = stream(
        (MAIN, copy(1000), After()), (DMA, to(2), After(main=1)),
        (MAIN, copy(1000), After()), (DMA, to(2), After(main=2)),
    )  # fmt: skip
    last = stream((DMA, Wait(0, 2), After()), (DMA, Wait(0, 2), After()))
    result = simulate([fast, slow, last], BOOK)
    waits = result.flat.unit == 2
    assert result.finish[waits].tolist() == [1200, 2200]
    assert result.critical_path[-1] == len(result.flat) - 1
    closes(result)


def test_a_wait_for_something_that_came_before_is_free():
    units = [
        stream((DMA, to(1), After())),
        stream((MAIN, copy(500), After()), (DMA, Wait(0, 1), After(main=1)), (MAIN, copy(5), After(dma=1))),
    ]
    result = simulate(units, BOOK)
    assert result.cycles == 505
    assert result.stalls[1]["dma"]["wait_sync"] == 0
    closes(result)


def test_a_semaphore_shared_by_exchanges_of_different_size():
    """All four, then the pairs (0, 1) and (2, 3), then all four: arrivals are taken in program order."""
    pair = Notify(62, 0, ((2, 1),), 0)
    body = stream(
        (DMA, to_all(4), After()), (DMA, Wait(0, 3), After()),
        (DMA, pair, After()), (DMA, Wait(0, 1), After()),
        (DMA, to_all(4), After()), (DMA, Wait(0, 3), After()),
    )  # fmt: skip
    registers = {62: (0, 0, 2 * UNIT_STRIDE, 2 * UNIT_STRIDE)}
    result = simulate([body] * 4, BOOK, launch=registers)
    assert result.cycles == 600
    folded = simulate(body, BOOK, topology=Topology.of(BOOK, 4), launch=registers)
    assert folded.cycles == 600
    assert len(folded.flat) == 6


# Deadlocks -----------------------------------------------------------------------------------------------------------
def test_missing_notifies_are_named():
    waiting = stream((DMA, Wait(3, 1), After()))
    with pytest.raises(SimulationError, match="no unit notifies it") as caught:
        simulate([waiting, stream((MAIN, copy(1), After()))], BOOK)
    assert "unit 0 on card 0 PE 0 waits on semaphore 3" in str(caught.value)
    assert caught.value.kind == SimulationError.DEADLOCK
    twice = stream((DMA, Wait(0, 1), After()), (DMA, Wait(0, 1), After()))
    with pytest.raises(SimulationError, match=r"the 2\. notify of unit 1 on card 0 PE 1 does not exist"):
        simulate([twice, stream((DMA, to(0), After()))], BOOK)
    more = stream((DMA, Wait(0, 2), After()))
    with pytest.raises(SimulationError, match="more than the notifies of unit 1"):
        simulate([more, stream((DMA, to(0), After()))], BOOK)


def test_units_that_wait_for_each_other_are_named():
    def body(other: int) -> Stream:
        return stream((DMA, Wait(0, 1), After()), (DMA, to(other), After()))

    with pytest.raises(SimulationError) as caught:
        simulate([body(1), body(0)], BOOK)
    text = str(caught.value)
    assert "unit 0 on card 0 PE 0: dma head routine main, instruction 0" in text
    assert "waits for the notify of unit 1 on card 0 PE 1 at routine main, instruction 1" in text
    spmd = stream((DMA, Wait(0, 7), After()), (DMA, to_all(8), After()))
    with pytest.raises(SimulationError, match="unit 0 on card 0 PE 0 and 7 like it: dma head"):
        simulate(spmd, BOOK, topology=Topology.of(BOOK, 8))


def test_units_that_do_not_exist_and_memories_out_of_reach_are_refused():
    two = Topology.of(BOOK, tensor=2, pipeline=2)
    step = stream((DMA, Notify(OWN_UNIT, 2 * UNIT_STRIDE, (), 0), After()))  # next stage, same rank
    last = stream((DMA, Wait(0, 1), After()))
    assert simulate([step, last], BOOK, topology=two, launch=launch(2)).cycles == 200
    with pytest.raises(SimulationError, match="a first stage has no previous"):
        simulate([step, step], BOOK, topology=two, launch=launch(2))
    with pytest.raises(SimulationError, match="cards reach each other's HBM only") as caught:
        simulate(stream((DMA, gather(16, 1 << 14), After())), BOOK, topology=Topology.of(BOOK, 16))
    assert caught.value.site is not None


# Ports and links -----------------------------------------------------------------------------------------------------
def test_reading_a_neighbour_takes_both_directions_of_the_port():
    """Inside a cluster reads and writes serialise: 256 KB take 2,048 cycles, as over the link to the other cluster."""
    near = simulate([stream((DMA, pull(1, 1 << 18), After()))] + [stream()] * 7, BOOK)
    far = simulate([stream((DMA, pull(4, 1 << 18), After()))] + [stream()] * 7, BOOK)
    assert near.cycles == far.cycles == 500 + 2048
    assert near.per_unit[0]["cluster_bytes"] == 1 << 18 and near.per_unit[0]["chip_bytes"] == 0
    assert far.per_unit[0]["chip_bytes"] == 1 << 18
    assert near.per_unit[1]["dm_bytes"] == pytest.approx(1 << 18)
    assert near.per_unit[1]["dm_utilisation"] == pytest.approx((1 << 18) / 2548 / 256)


def test_a_unit_that_all_read_is_held_back_by_its_port():
    """Units read 256 KB of unit 0, 128 B a cycle each if alone; those in the other cluster share its way out (128)."""
    reader = stream((DMA, pull(0, 1 << 18), After()))
    near = simulate([stream()] + [reader] * 3 + [stream()] * 4, BOOK)
    assert near.cycles == pytest.approx(500 + 3 * (1 << 18) / 256)
    assert near.stalls[1]["dma"]["contention_dm"] == pytest.approx(3 * 1024 - 2048)
    closes(near)
    # Two in the other cluster get 64 each; 128 are left for the three of the own cluster.
    both = simulate([stream()] + [reader] * 3 + [reader] * 2 + [stream()] * 2, BOOK)
    assert both.stalls[4]["dma"]["contention_link"] + both.stalls[4]["dma"]["contention_dm"] > 2000
    assert both.cycles == pytest.approx(500 + 5 * (1 << 18) / 256)
    closes(both)


def test_the_link_between_cards_is_shared_by_a_card():
    """Eight units read 64 KB each of their partners on the other card: 524,288 B at 30 B a cycle."""
    body = stream((DMA, pull(0, 1 << 16, Space.PEER_HBM, OWN_UNIT), After()))
    partner = {OWN_UNIT: tuple(((u + 8) % 16) * UNIT_STRIDE for u in range(16))}
    topology = Topology.of(BOOK, 16)
    result = simulate(body, BOOK, topology=topology, launch=partner)
    assert result.cycles == pytest.approx(500 + 3000 + (1 << 19) / 30)
    assert result.stalls[5]["dma"]["contention_card"] == pytest.approx((1 << 19) / 30 * 7 / 8)
    assert result.per_card[0]["received_bytes"] == pytest.approx(1 << 19)
    assert len(result.flat) == 1
    closes(result)
    alone = simulate([body] + [stream()] * 15, BOOK, topology=topology, launch=partner)
    assert alone.cycles == pytest.approx(500 + 3000 + (1 << 16) / 30)


def test_weights_and_peers_share_the_port_of_data_memory():
    """Unit 0 loads weights at 256 B a cycle while unit 1 reads its memory at 128: each gets 128 of the port."""
    result = simulate([stream((DMA, load(1 << 18), After())), stream((DMA, pull(0, 1 << 17), After()))], BOOK)
    assert result.finish.tolist() == pytest.approx([500 + 1024 + 512, 500 + 1024])
    assert result.stalls[0]["dma"]["contention_dm"] == pytest.approx(512)
    assert result.stalls[0]["dma"]["contention_hbm"] == pytest.approx(0)
    closes(result)


def test_max_min_over_several_resources():
    """A line of links: one long transfer over both, one on each. Capacities 10 and 20: the long one and the
    first get 5, the one on the second link what is left of it, 15, of which it wants 12."""
    rates = Rates(np.zeros(3), np.full(3, 10.0), np.array([20.0, 20.0, 12.0]), np.zeros(3, bool), np.zeros(3, bool))
    resources = Resources(
        np.array([0, 2, 3, 4]), np.array([0, 1, 0, 1]), np.ones(4), np.array([10.0, 20.0]), np.array([2, 3])
    )
    start = np.array([0, 0, 0, 1, 1, 1, 2, 2, 2, 3])
    for jit in (False, True):
        times = execute(3, start, np.arange(3), np.zeros((3, 3), np.int64), np.arange(3), rates, resources, jit=jit)
        assert times.finish.tolist() == pytest.approx([40.0, 40.0, 10.0])
        assert times.lost[0].tolist() == pytest.approx([0, 0, 30, 0])
        assert times.lost[2].tolist() == [0, 0, 0, 0]


# Collectives ---------------------------------------------------------------------------------------------------------
def one_shot(units: int, nbytes: int) -> Stream:
    """All-reduce as `collective_time` has it, without its passes."""
    return stream(
        (DMA, to_all(units), After()),
        (DMA, Wait(0, units - 1), After()),
        (DMA, gather(units, nbytes), After()),
    )


@pytest.mark.parametrize("mode", ["documented", "silicon"])
@pytest.mark.parametrize("units", [2, 4, 8])
def test_collective_time_is_what_the_instructions_take(units, mode):
    """The closed form of the lowering's choice, less the passes for adding and broadcasting."""
    machine = load_machine(mode=mode)
    nbytes = 8192
    result = simulate(one_shot(units, nbytes), machine, topology=Topology.of(machine, units), launch=launch(units))
    whole = collective_time("all_reduce", "one_shot", nbytes, units, 1, machine, replicate=False)
    adding = machine.pass_issue_cycles + units * nbytes // 2 // 64 // 4
    assert result.cycles == pytest.approx(whole - adding, rel=0.02)
    assert result.collective_share == pytest.approx(1.0)
    closes(result)


def test_algorithms_of_collectives():
    assert collective_algorithms("all_reduce", 8, 1) == ("one_shot", "two_phase")
    assert collective_algorithms("all_gather", 8, 1) == ("one_shot",)
    assert collective_algorithms("reduce_scatter", 16, 2) == ("hierarchical",)
    with pytest.raises(ValueError, match="no one_shot all_reduce over 16 units on 2 cards"):
        collective_time("all_reduce", "one_shot", 8192, 16, 2, BOOK)
    with pytest.raises(ValueError, match="same number"):
        collective_algorithms("all_reduce", 9, 2)
    small = {a: collective_time("all_reduce", a, 8192, 8, 1, SILICON) for a in ("one_shot", "two_phase")}
    large = {a: collective_time("all_reduce", a, 8 << 20, 8, 1, SILICON) for a in ("one_shot", "two_phase")}
    assert small["one_shot"] < small["two_phase"] and large["two_phase"] < large["one_shot"]
    assert collective_time("all_reduce", "one_shot", 8192, 1, 1, SILICON) == 0


# Pipelines -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("stages", "batches"), [(1, 4), (2, 1), (4, 6)])
def test_micro_batches_overlap_in_a_pipeline(stages, batches):
    """Stages of 1,000 cycles: (stages + batches - 1) of them and the notifies on the way."""
    work = (MAIN, copy(1000), After())
    bodies = []
    for stage in range(stages):
        entry = [(MAIN, copy(1000), After(dma=1))] if stage else [work]
        first = [(DMA, Wait(0, 1), After())] if stage else []
        last = [(DMA, to(1), After(main=1))] if stage < stages - 1 else []
        bodies.append(stream(*first, *entry, *last))
    result = simulate(bodies, BOOK, topology=Topology.of(BOOK, 1, stages), repeats=batches)
    assert result.cycles == (stages + batches - 1) * 1000 + (stages - 1) * 200
    assert result.instructions == len(result.flat)
    closes(result)


# Equal units ---------------------------------------------------------------------------------------------------------
@st.composite
def spmd(draw, units: int, cards: int) -> Stream:
    """Random instructions of one unit with exchanges between all units in between."""
    items: list[tuple] = []
    counts = [0, 0, 0]
    local = units // cards
    for _ in range(draw(st.integers(1, 12))):
        after = waiting_for([draw(st.integers(0, n)) if draw(st.booleans()) else 0 for n in counts])
        kind = draw(st.sampled_from(["load", "copy", "scale", "sub", "gather", "hot", "card", "sync"]))
        size = draw(st.integers(1, 12))
        if kind == "load":
            what = [(DMA, load(size << 18), after)]
        elif kind in ("copy", "scale"):
            what = [(MAIN, copy(size * 50) if kind == "copy" else scale(size * 50), after)]
        elif kind == "sub":
            what = [(SUB, scale(size * 10), after)]
        elif kind == "gather":
            what = [(DMA, gather(local, size << 14, 0, 62), after)]
        elif kind == "hot":  # all units of a card read its first one
            what = [(DMA, pull(0, size << 18, Space.PEER_DM, 62), after)]
        elif kind == "card":
            what = [(DMA, pull(0, size << 14, Space.PEER_HBM, 61), after)]
        else:
            what = [(DMA, to_all(units), after)] + ([(DMA, Wait(0, units - 1), After())] if units > 1 else [])
        for item in what:
            items.append(item)
            counts[item[0]] += 1
    return stream(*items)


def registers(units: int, cards: int) -> dict[int, tuple[int, ...]]:
    """62: first unit of the own card; 61: the unit of equal rank on the next card."""
    local = units // cards
    return {
        62: tuple(u // local * local * UNIT_STRIDE for u in range(units)),
        61: tuple((u + local) % units * UNIT_STRIDE for u in range(units)),
    }


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_equal_units_are_simulated_once_exactly(data):
    """All units simulated, with and without the compiled loop, against one unit of each class."""
    units, cards = data.draw(st.sampled_from([(1, 1), (2, 1), (4, 1), (8, 1), (16, 2)]))
    body = data.draw(spmd(units, cards))
    topology = Topology.of(SILICON, units)
    every = simulate(body, SILICON, topology=topology, launch=registers(units, cards), fold=False)
    compiled = simulate(body, SILICON, topology=topology, launch=registers(units, cards), fold=False, jit=True)
    for name in ("start", "ready", "finish", "cause", "waker", "lost"):
        np.testing.assert_array_equal(getattr(every, name), getattr(compiled, name), err_msg=name)
    once = simulate(body, SILICON, topology=topology, launch=registers(units, cards))
    assert once.cycles == pytest.approx(every.cycles, rel=1e-9)
    assert len(once.classes.members) <= len(every.classes.members)
    closes(every)
    closes(once)
    for unit in range(units):
        mine = every.finish[every.flat.unit == unit]
        np.testing.assert_allclose(mine, once.finish[once.flat.unit == once.classes.of_unit[unit]], rtol=1e-9)
        for context in ("main", "sub", "dma"):
            for stall, cycles in every.stalls[unit][context].items():
                assert once.stalls[unit][context][stall] == pytest.approx(cycles, rel=1e-6, abs=1e-3), stall
    for resource, amount in every.load.items():
        if resource in once.load:
            assert once.load[resource] == pytest.approx(amount)
    assert (once.macs, once.hbm_read_bytes, once.instructions) == (every.macs, every.hbm_read_bytes, every.instructions)
    assert once.energy_joules() == pytest.approx(every.energy_joules())
    assert [row["dm_bytes"] for row in once.per_unit] == pytest.approx([row["dm_bytes"] for row in every.per_unit])
    bound = simulate(body, SILICON, topology=topology, launch=registers(units, cards), contention=False)
    assert bound.cycles <= once.cycles * (1 + 1e-9)


def handed_over(body: Stream, units: int, stage: int, stages: int) -> Stream:
    """A stage: wait for the previous one, work, notify the unit of equal rank of the next one (semaphore 1)."""
    first = [(DMA, Wait(1, 1), After())] if stage else []
    shift = len(first)
    items = [
        (x.context, x.what, replace(x.after, dma=x.after.dma + shift if x.after.dma else 0))
        for x in body.routines[0].instructions
    ]
    counts = [sum(c is context for c, _, _ in first + items) for context in (MAIN, SUB, DMA)]
    last = [(DMA, Notify(OWN_UNIT, units * UNIT_STRIDE, (), 1), waiting_for(counts))] if stage < stages - 1 else []
    return stream(*first, *items, *last)


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_pipelines_of_groups_are_simulated_once_exactly(data):
    """Stages of different work, several micro-batches and replicas, on one card or many."""
    units = data.draw(st.sampled_from([1, 2, 4, 8]))
    stages, replicas = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2))
    repeats = data.draw(st.integers(1, 3))
    bodies = [handed_over(data.draw(spmd(units, 1)), units, s, stages) for s in range(stages)]
    topology = Topology.of(SILICON, units, stages, replicas)
    values = {62: (0,) * units, 61: (0,) * units} | launch(units)
    # A stage lies on one card: what its units read of others stays inside.
    assert all(topology.distance(g * units, g * units + units - 1) < Distance.CARD for g in range(stages * replicas))
    once, every = (
        simulate(bodies, SILICON, topology=topology, launch=values, repeats=repeats, fold=fold)
        for fold in (True, False)
    )
    assert once.cycles == pytest.approx(every.cycles, rel=1e-9)
    closes(once)
    closes(every)
    for unit in range(len(topology)):
        mine = every.finish[every.flat.unit == unit]
        np.testing.assert_allclose(mine, once.finish[once.flat.unit == once.classes.of_unit[unit]], rtol=1e-9)


def test_what_is_symmetric_is_found_and_what_is_not_is_not():
    topology = Topology.of(BOOK, 8)
    equal = simulate(one_shot(8, 8192), BOOK, topology=topology, launch=launch(8))
    assert len(equal.flat.streams) == 1 and equal.units == 8
    hot = simulate(stream((DMA, pull(0, 1 << 18), After())), BOOK, topology=topology)
    # The unit that is read, its neighbours, and the other cluster.
    assert sorted(map(len, hot.classes.members)) == [1, 3, 4]
    replicas = simulate(stream((DMA, load(1 << 20), After())), BOOK, topology=Topology.of(BOOK, 1, 1, 8))
    assert replicas.cycles == pytest.approx(500 + 4096 * 4 / 3)
    assert len(replicas.flat) == 1
    uneven = Topology.of(BOOK, 12)  # eight units on a card, four on the next
    result = simulate(stream((DMA, load(1 << 20), After())), BOOK, topology=uneven)
    assert sorted(map(len, result.classes.members)) == [4, 8]
    assert result.stalls[11]["dma"]["contention_hbm"] == 0


def test_registers_of_calls_are_followed():
    """A routine reads the unit that a register of its caller names."""
    block = ((DMA, pull(0, 1 << 18, Space.PEER_DM, 5), After()),)
    entry = (
        (CONTROL, Call(1, ((5, OWN_UNIT, 0),)), After()),
        (CONTROL, Call(1, ((5, OWN_UNIT, UNIT_STRIDE),)), After()),
    )
    topology = Topology.of(BOOK, 2)
    values = {OWN_UNIT: (0, 0)}
    result = simulate(stream(*entry, block=block), BOOK, topology=topology, launch=values, fold=False)
    rows = [row["cluster_bytes"] for row in result.per_unit]
    assert rows == [1 << 18, 1 << 18]  # each reads itself once and the other once
    assert result.per_unit[0]["dm_bytes"] == pytest.approx(4 << 18)


def test_json_names_units_and_cards():
    data = simulate(one_shot(8, 8192), BOOK, topology=Topology.of(BOOK, 8, 1, 2), launch=launch(8)).to_json(True)
    assert [row["card"] for row in data["per_unit"]] == [0] * 8 + [1] * 8
    assert (data["units"], data["cards"], data["tensor"], data["replicas"]) == (16, 2, 8, 2)
    assert len(data["stalls"]) == 16
    assert data["instructions_executed"] == 48 and len(data["instructions"]["start"]) == 3


def test_a_trace_has_a_process_for_every_pe(tmp_path):
    """Units simulated once are all drawn; a wait names the unit whose notify ended it."""
    result = simulate(one_shot(8, 8192), BOOK, topology=Topology.of(BOOK, 8, 1, 2), launch=launch(8))
    file = tmp_path / "t.json"
    number = write_trace(Analysis(result), file).spans
    events = json.loads(file.read_text())["traceEvents"]
    names = [e["args"]["name"] for e in events if e["ph"] == "M" and e["name"] == "process_name"]
    assert names == [f"unit {u}: card {u // 8} PE {u % 8}" for u in range(16)]
    spans = [e for e in events if e["ph"] == "X"]
    assert len(spans) == number == 16 * 3
    waits = [e for e in spans if e["args"]["bottleneck"] == "wait"]
    assert {e["args"]["sync_cycles"] for e in waits} == {600.0}
    assert all(e["args"]["last_notify_of"].startswith("unit 0 on card 0") for e in waits)


@pytest.mark.parametrize("fold", [False, True])
def test_the_second_cluster_may_be_launched_later(fold):
    """The first exchange of both clusters waits for it, a second one does not; one cluster alone never does."""
    exchange = [(DMA, to_all(8), After()), (DMA, Wait(0, 7), After())]
    skewed = BOOK.model_copy(update={"launch_skew_cycles": 4000})

    def cycles(machine, items, units=8):
        topology = Topology.of(machine, units)
        return simulate(stream(*items), machine, topology=topology, launch=launch(units), fold=fold).cycles

    first = cycles(skewed, exchange) - cycles(BOOK, exchange)
    assert first == pytest.approx(4000)
    twice = [*exchange, (DMA, load(1 << 18), After()), *exchange]
    assert 3500 < cycles(skewed, twice) - cycles(BOOK, twice) <= 4000  # loads meet less
    alone = [(DMA, load(1 << 18), After())]
    assert cycles(skewed, alone, 4) == cycles(BOOK, alone, 4)
