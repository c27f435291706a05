"""Several units: transfers between them, notify and wait, deadlocks and races."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import streams as s

from backend_rngd.isa.descriptors import (
    DM_SLICE_STRIDE,
    UNIT_STRIDE,
    After,
    Descriptor,
    Dma,
    Endpoint,
    Notify,
    Space,
    Stream,
    Wait,
)
from runtime_sim.errors import SimulationError
from runtime_sim.functional import Unit
from runtime_sim.group import Launch
from runtime_sim.system import System

STEP = 2  # the routine of a round
PUBLISH, NOTIFY, WAIT, PULL, NOTIFY_FREE, WAIT_FREE, SUM = range(7)  # its instructions


def refused(kind: str, message: str, stream: Stream, units: int = 2, rounds: int = 2) -> SimulationError:
    """The stream is refused whatever the order in which units take turns."""
    errors: list[SimulationError] = []
    for seed in (None, 0, 1):
        with pytest.raises(SimulationError, match=message) as caught:
            s.run(stream, s.inputs(units), seed, checks=False)
        assert caught.value.kind == kind
        assert caught.value.site is not None
        errors.append(caught.value)
    return errors[0]


@pytest.mark.parametrize("units", [2, 4, 8])
@pytest.mark.parametrize("rounds", [1, 3])
def test_sums_over_units(units, rounds):
    values = s.inputs(units)
    stream = s.all_reduce(units, rounds)
    for seed in (None, 1, 2, 3):
        assert np.array_equal(s.run(stream, values, seed), s.expected(values, rounds))


def test_many_units_take_little_memory():
    """32 units of 32 MB DM each cost what they touch."""
    machine = System(s.MACHINE, 32)
    before = peak_memory()
    for unit in machine.units:
        unit.window.clear(0, 4096)
    stream = replace(copy_only(), slices=64)
    machine.run({unit: [Launch(stream)] for unit in machine.units})
    assert peak_memory() - before < 100e6


def copy_only() -> Stream:
    return s.stream_of(s.routine("main", (s.load(s.IN), 0, 0), (s.store(s.IN, 0), 0, 1)))


def peak_memory() -> int:
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmRSS"))


@pytest.mark.parametrize("units", [2, 4])
def test_removing_a_notify_or_wait_is_caught(units):
    stream = s.all_reduce(units, 2)
    found = list(s.positions(stream, Notify, Wait))
    assert len(found) == 4
    for number, index in found:
        broken = s.without(stream, number, index)
        removed = stream.routines[number].instructions[index].what
        for seed in (None, *range(5)):
            with pytest.raises(SimulationError) as caught:
                s.run(broken, s.inputs(units), seed, checks=False)
            expected = {SimulationError.DEADLOCK, SimulationError.UNIT_RACE}
            assert caught.value.kind in (expected if isinstance(removed, Notify) else {SimulationError.UNIT_RACE})


@pytest.mark.parametrize("units", [2, 4])
def test_publishing_too_early_is_a_race(units):
    """A notify that does not wait for what it publishes."""
    stream = s.two_rounds(units)
    values = s.inputs(units)
    assert np.array_equal(s.run(stream, values), s.expected(values, 2))
    hasty = s.changed(stream, 0, 2, lambda i: replace(i, after=After()))
    refused(SimulationError.UNIT_RACE, "writes at routine main, instruction 1, layer.1|op", hasty, units)


@pytest.mark.parametrize("units", [2, 4])
def test_rewriting_too_early_is_a_race(units):
    """The published buffer is written again before it is known that all units have read it."""
    refused(SimulationError.UNIT_RACE, "and nothing puts the two in order", s.two_rounds(units, 5), units)


def test_deadlocks_say_who_waits_for_whom():
    stream = s.all_reduce(2, 1)
    broken = s.changed(stream, STEP, WAIT, lambda i: replace(i, what=Wait(s.READY, 2)))
    error = refused(SimulationError.DEADLOCK, "waits for semaphore 0 to be 2, it is 1", broken)
    text = str(error)
    assert "unit 0 (card 0 PE 0) at routine step, instruction 2, layer.2|op" in text
    assert "it can be notified by unit 1 (card 0 PE 1), which has notified it 1 times and waits at" in text
    broken = s.without(stream, STEP, NOTIFY)
    assert "no unit ever notifies it" in str(refused(SimulationError.DEADLOCK, "it is 0", broken))


def test_notifications_that_nobody_waits_for():
    stream = s.stream_of(s.routine("main", (s.notify(2, 3), 0, 0)))
    with pytest.raises(
        SimulationError, match=r"semaphore 3 of unit 0 .* is 1 at the end, notified by unit 1"
    ) as caught:
        s.run(stream, s.inputs(2))
    assert caught.value.kind == SimulationError.UNIT_RACE


def test_data_memory_of_another_card_is_out_of_reach():
    machine = s.system(16)
    for unit in machine.units:
        unit.window.clear(0, 1 << 14)
    stream = s.stream_of(s.routine("main", (s.load(s.MINE), 0, 0), (s.pull(16), 0, 1)))
    with pytest.raises(
        SimulationError, match="the DM of a unit of card 1; other cards are reached through HBM"
    ) as caught:
        machine.run({u: [Launch(stream)] for u in machine.units}, races=False)
    assert caught.value.kind == SimulationError.ILLEGAL


def test_units_that_do_not_exist():
    stream = s.stream_of(s.routine("main", (s.load(s.MINE), 0, 0), (s.pull(4), 0, 1)))
    with pytest.raises(SimulationError, match=r"transfer with unit 2, the program's units are \[0, 1\]"):
        s.run(stream, s.inputs(2))
    stream = s.stream_of(s.routine("main", (s.notify(4, 0), 0, 0)))
    with pytest.raises(SimulationError, match=r"notify of unit 2, the program's units are \[0, 1\]"):
        s.run(stream, s.inputs(2))


def test_a_unit_alone_refuses_to_synchronise():
    unit = s.system(2).units[0]
    with pytest.raises(SimulationError, match="notify in a program that runs on one unit"):
        unit.run(s.stream_of(s.routine("main", (s.notify(2, 0), 0, 0))))


def hbm_exchange(units: int, pull: bool, sync: bool = True) -> Stream:
    """Every unit gives its input to the next one through HBM: pulled from its window, or pushed into it.

    The launch register OWN holds the number of the unit at the other end.
    """
    there, here = 16384, 24576
    items: list[tuple[Descriptor, int, int]] = [(s.load(s.IN), 0, 0)]
    loops = ((s.SLICES, s.ROW, s.ROW),)
    if pull:
        items.append((s.store(s.IN, there), 0, 1))
        transfer = Dma(Endpoint(Space.PEER_HBM, there, s.OWN), Endpoint(Space.HBM, here), loops, s.ROW)
        after = [(s.notify(units, 0), 0, 2), (s.wait(units, 0), 0, 0), (transfer, 0, 0)]
    else:
        source = ((s.SLICES, DM_SLICE_STRIDE, s.ROW),)
        transfer = Dma(Endpoint(Space.DM, s.IN), Endpoint(Space.PEER_HBM, here, s.OWN), source, s.ROW)
        after = [(transfer, 0, 1), (s.notify(units, 0), 0, 0), (s.wait(units, 0), 0, 0)]
    items += [item for item in after if sync or not isinstance(item[0], (Notify, Wait))]
    items += [(s.load(s.SUM, here), 0, 0), (s.store(s.SUM), 0, len(items) + 1)]
    return s.stream_of(s.routine("main", *items))


@pytest.mark.parametrize("pull", [True, False])
@pytest.mark.parametrize("units", [2, 16])
def test_exchange_through_hbm(units, pull):
    """Also between cards: 16 units are two cards."""
    values = s.inputs(units)
    machine = s.system(units)
    step = -1 if pull else 1

    def work() -> dict[Unit, list[Launch]]:
        return {
            u: [Launch(hbm_exchange(units, pull), {s.OWN: (u.place.rank + step) % units * UNIT_STRIDE})]
            for u in machine.units
        }

    for seed in (None, 1):
        for unit, own in zip(machine.units, values, strict=True):
            unit.window.write(s.INPUT, own)
            unit.reset()
        machine.run(work(), seed=seed)
        for unit in machine.units:
            got = unit.window.read(s.OUTPUT, s.SLICES * s.ROW).view(np.float32).reshape(s.SLICES, s.WORDS)
            assert np.array_equal(got, values[unit.place.rank - 1])
    broken = {
        u: [Launch(hbm_exchange(units, pull, False), {s.OWN: (u.place.rank + step) % units * UNIT_STRIDE})]
        for u in machine.units
    }
    with pytest.raises(SimulationError, match="touches HBM of unit") as caught:
        machine.run(broken)
    assert caught.value.kind == SimulationError.UNIT_RACE


def test_broadcast_to_all_units_in_one_transfer():
    """Unit 0 writes the DM of every unit, its own included; the wait says what has arrived."""
    units = 4
    loops = ((units, 0, UNIT_STRIDE), (s.SLICES, DM_SLICE_STRIDE, DM_SLICE_STRIDE))
    push = Dma(Endpoint(Space.DM, s.IN), Endpoint(Space.PEER_DM, s.ALL), loops, s.ROW)
    copy, store = s.scale(s.ALL, s.SUM, 1.0), (s.store(s.SUM), 1, 0)
    root = s.stream_of(
        s.routine("main", (s.load(s.IN), 0, 0), (push, 0, 1), (s.notify(units, 0), 0, 0), (copy, 0, 2), store)
    )
    arrived = Wait(0, 1, (), ((s.ALL, s.ROW),))

    def leaf(after: int) -> Stream:
        return s.stream_of(
            s.routine("main", (arrived, 0, 0), (s.scale(s.ALL, s.SUM, 1.0), 0, after), (s.store(s.SUM), 1, 0))
        )

    values = s.inputs(units)
    for after in (1, 0):
        machine = s.system(units)
        for unit, own in zip(machine.units, values, strict=True):
            unit.window.write(s.INPUT, own)
        work = {u: [Launch(leaf(after) if u.place.rank else root)] for u in machine.units}
        if not after:
            with pytest.raises(SimulationError, match="touches DM of unit 1") as caught:
                machine.run(work)
            assert caught.value.kind == SimulationError.UNIT_RACE
            continue
        machine.run(work)
        for unit in machine.units:
            got = unit.window.read(s.OUTPUT, s.SLICES * s.ROW).view(np.float32).reshape(s.SLICES, s.WORDS)
            assert np.array_equal(got, values[0])


def test_reads_of_other_units_are_checked_for_what_nobody_wrote():
    stream = s.stream_of(
        s.routine("main", (s.load(s.IN), 0, 0), (s.notify(2, 0), 0, 0), (s.wait(2, 0), 0, 0), (s.pull(2), 0, 0))
    )
    with pytest.raises(SimulationError, match="DMA reads DM slice 0 byte 4096, which nothing has written"):
        s.run(stream, s.inputs(2))


def test_launches_follow_each_other():
    """Two programs in flight on two stages; the host reads and writes between the launches of a unit."""
    machine = s.system(1, pipeline=2)
    first, second = machine.units
    values = s.inputs(3)
    seen: list[np.ndarray] = []
    there = 16384
    source = ((s.SLICES, DM_SLICE_STRIDE, s.ROW),)
    send = Dma(Endpoint(Space.DM, s.IN), Endpoint(Space.PEER_HBM, UNIT_STRIDE + there), source, s.ROW)
    following, previous = Notify(0, UNIT_STRIDE, (), 0), Notify(0, 2 * UNIT_STRIDE, (), 1)
    sender = s.stream_of(s.routine("main", (s.load(s.IN), 0, 0), (send, 0, 1), (following, 0, 0), (Wait(1, 1), 0, 0)))
    receiver = s.stream_of(
        s.routine("main", (Wait(0, 1), 0, 0), (s.load(s.IN, there), 0, 0), (previous, 0, 0), (s.store(s.IN), 0, 2))
    )

    def feed(own: np.ndarray):
        return lambda: first.window.write(s.INPUT, own)

    def look() -> None:
        seen.append(second.window.read(s.OUTPUT, s.SLICES * s.ROW).view(np.float32).reshape(s.SLICES, s.WORDS))

    for seed in (None, 3):
        seen.clear()
        machine.run(
            {
                first: [Launch(sender, start=feed(own)) for own in values],
                second: [Launch(receiver, done=look) for _ in values],
            },
            seed=seed,
        )
        assert np.array_equal(np.stack(seen), values)
    racing = s.without(sender, 0, 3)
    unasked = s.without(receiver, 0, 2)
    with pytest.raises(SimulationError, match="touches HBM of unit 1") as caught:
        machine.run({first: [Launch(racing)] * 2, second: [Launch(unasked)] * 2})
    assert caught.value.kind == SimulationError.UNIT_RACE


def test_replicas_share_weights():
    """Two replicas of two units on a card: one copy of the weights, own caches."""
    machine = System(s.MACHINE, 2, 1, 2, s.SLICES, 1 << 16, 4096)
    one, other = machine.unit(1, 0, 0), machine.unit(1, 0, 1)
    one.window.write(0, bytes(range(8)))
    one.window.write(s.OUTPUT, bytes(8))
    other.window.write(s.OUTPUT, bytes([9] * 8))
    assert bytes(other.window.read(0, 8)) == bytes(range(8))
    assert bytes(one.window.read(s.OUTPUT, 8)) == bytes(8)
    assert bytes(machine.unit(0, 0, 1).window.read(0, 8)) == bytes(8)
    machine.unit(1, 0, 0).window.clear(0, 1 << 12)
    other.run(s.stream_of(s.routine("main", (s.load(s.IN), 0, 0), (s.store(s.IN), 0, 1))))
    with pytest.raises(SimulationError, match="begin in the shared weights"):
        other.run(s.stream_of(s.routine("main", (s.load(s.IN, 4000), 0, 0))))
