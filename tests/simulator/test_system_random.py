"""Random programs for several units: what the search for races says holds for every order of the units."""

from __future__ import annotations

from collections import Counter

import streams as s
from hypothesis import given, settings
from hypothesis import strategies as st

from backend_rngd.isa.descriptors import (
    DM_SLICE_STRIDE,
    UNIT_STRIDE,
    Descriptor,
    Dma,
    Endpoint,
    Notify,
    Space,
    Stream,
    Wait,
)
from runtime_sim.errors import SimulationError
from runtime_sim.group import Launch

BUFFERS = (4096, 8192, 12288)
Program = list[tuple[str, int, int]]


def copy(own: int, unit: int, there: int, push: bool) -> Dma:
    """Between the own buffer and the same or another one of any unit."""
    loops = ((s.SLICES, DM_SLICE_STRIDE, DM_SLICE_STRIDE),)
    mine, theirs = Endpoint(Space.DM, own), Endpoint(Space.PEER_DM, unit * UNIT_STRIDE + there)
    return Dma(mine, theirs, loops, s.ROW) if push else Dma(theirs, mine, loops, s.ROW)


def stream(program: Program, me: int, careless: bool) -> Stream:
    """Every instruction waits for all earlier ones of the other context; some do not, if `careless`."""
    items: list[tuple[Descriptor, int, int]] = [(s.load(b), 0, 0) for b in (s.IN, *BUFFERS)]
    main, dma = 0, len(items)
    for number, (kind, a, b) in enumerate(program):
        if kind == "compute":
            op = s.scale(BUFFERS[a], BUFFERS[(a + 1) % 3], 1.0 + b)
        elif kind in ("pull", "push"):
            op = copy(BUFFERS[a], b, BUFFERS[(a + b) % 3], kind == "push")
        elif kind == "notify":
            op = Notify(0, b * UNIT_STRIDE, (), me)  # a semaphore for every sender
        else:
            op = Wait(b, 1)
        alone = careless and number % 3 == 2
        items.append((op, 0 if kind == "compute" or alone else main, dma if kind == "compute" and not alone else 0))
        main, dma = main + (kind == "compute"), dma + (kind != "compute")
    # The results are brought into their place by the transfers that follow each other.
    items += [(s.store(b, s.OUTPUT + i * 1024), main, 0) for i, b in enumerate(BUFFERS)]
    return s.stream_of(s.routine("main", *items))


@st.composite
def programs(draw):
    """A program for each unit with as many waits for a sender as that one notifies."""
    units = draw(st.integers(2, 3))
    number = st.integers(0, units - 1)
    out: list[Program] = [[] for _ in range(units)]
    steps = draw(
        st.lists(st.tuples(st.sampled_from(["compute", "pull", "push", "sync", "sync"]), number, number), max_size=14)
    )
    late: list[tuple[int, int]] = []
    for kind, a, b in steps:
        if kind != "sync":
            out[a].append((kind, draw(st.integers(0, 2)), b))
        elif a != b:
            out[a].append(("notify", 0, b))
            if draw(st.booleans()):
                out[b].append(("wait", 0, a))
            else:
                late.append((a, b))
    for a, b in late:
        out[b].append(("wait", 0, a))
    return out


def outcome(streams: list[Stream], seed: int | None, races: bool) -> tuple[str, bytes]:
    machine = s.system(len(streams), checks=False)
    for unit, own in zip(machine.units, s.inputs(len(streams)), strict=True):
        unit.window.write(s.INPUT, own)
        unit.window.clear(s.OUTPUT, 4096)
    try:
        machine.run({u: [Launch(p)] for u, p in zip(machine.units, streams, strict=True)}, races=races, seed=seed)
    except SimulationError as error:
        return error.kind, b""
    return "", b"".join(bytes(unit.window.read(s.OUTPUT, 4096)) for unit in machine.units)


def test_programs_of_both_kinds_are_drawn():
    """The property below is about something: there are programs with and without races."""
    kinds: Counter[str] = Counter()

    @settings(max_examples=80, deadline=None, derandomize=True, database=None)
    @given(programs())
    def count(program):
        kinds[outcome([stream(p, i, False) for i, p in enumerate(program)], None, True)[0]] += 1

    count()
    assert kinds[SimulationError.UNIT_RACE] >= 10
    assert kinds[""] >= 10


@settings(max_examples=120, deadline=None)
@given(programs(), st.booleans())
def test_no_race_means_one_result(program, careless):
    """A verdict does not depend on the order in which units take turns; without a race the results do not either."""
    streams = [stream(p, i, careless) for i, p in enumerate(program)]
    verdict, result = outcome(streams, None, True)
    for seed in range(4):
        again, found = outcome(streams, seed, True)
        assert again == verdict
        assert found == result
    if not verdict:
        for seed in range(4, 8):
            assert outcome(streams, seed, False) == ("", result)


@settings(max_examples=60, deadline=None)
@given(programs())
def test_different_results_mean_a_race(program):
    """Whenever two orders give different results, a race is found in every order."""
    streams = [stream(p, i, False) for i, p in enumerate(program)]
    results = {outcome(streams, seed, False) for seed in range(5)}
    if len(results) > 1:
        for seed in (None, 0):
            assert outcome(streams, seed, True)[0] == SimulationError.UNIT_RACE
    assert {kind for kind, _ in results} == {""}
