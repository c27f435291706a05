"""Faults put into a program that is correct: each is found while it runs, and the message names the instruction, the
source operation and the layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import streams
from two_layers import BF16, CONTRACT, LOCATIONS, SLICES, UNITS, block, program

from backend_rngd.isa.descriptors import (
    DM_SLICE_STRIDE,
    UNIT_STRIDE,
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
    LoadVrf,
    Lookup,
    Mode,
    Notify,
    Op,
    Operand,
    Source,
    Space,
    Stream,
    Switch,
    SwitchKind,
    VectorOp,
    Wait,
)
from backend_rngd.machine import load_machine
from runtime_sim.errors import SimulationError
from runtime_sim.group import Launch
from runtime_sim.system import System
from runtime_sim.timing import simulate

MACHINE = load_machine()
OWN = streams.OWN


def run(stream: Stream) -> None:
    system = System(MACHINE, UNITS, 1, 1, SLICES, 1 << 16, 0)
    for unit in system.units:
        unit.window.clear(0, 4096)
        unit.window.write(0, np.zeros(1024, np.float32))
    system.run({u: [Launch(stream, {OWN: u.place.rank * UNIT_STRIDE})] for u in system.units})


def test_the_program_without_faults_runs() -> None:
    run(program(block()))
    assert simulate([program(block())] * UNITS, MACHINE).cycles > 0


def change(index: int, what: Callable[[Any], Any]) -> Callable[[list[Instruction]], None]:
    def do(body: list[Instruction]) -> None:
        body[index] = replace(body[index], what=what(body[index].what))

    return do


def in_sub(body: list[Instruction]) -> None:
    """The contraction in the sub context, with waits that fit."""
    body[3] = replace(body[3], context=Context.SUB)
    for index, counts in ((4, After(sub=2)), (9, After(sub=2, dma=5)), (10, After(main=1))):
        body[index] = replace(body[index], after=counts)


def loops(op: Dma) -> Dma:
    """The same bytes with nine loops."""
    return replace(op, loops=tuple((2, 0, 0) for _ in range(8)) + op.loops)


def ring(slice0: int) -> Callable[[Exec], Exec]:
    return lambda op: replace(op, switch=Switch(SwitchKind.BROADCAST01, 1, slice0, 8))


ILLEGAL, BOUNDS, UNINITIALISED = SimulationError.ILLEGAL, SimulationError.BOUNDS, SimulationError.UNINITIALISED
UNIT_RACE, DEADLOCK = SimulationError.UNIT_RACE, SimulationError.DEADLOCK
FAULTS: dict[str, tuple[Callable[[list[Instruction]], None], str, str, int, int]] = {
    "read of what nobody wrote": (
        change(9, lambda op: replace(op, fetch=replace(op.fetch, base=32768))),
        UNINITIALISED, "DM slice 0 byte 32768", 9, 0,
    ),
    "TRF that nobody filled": (
        change(3, lambda op: replace(op, contract=replace(CONTRACT, trf_base=4096))), UNINITIALISED, "TRF", 3, 0,
    ),
    "read behind the data memory": (
        change(9, lambda op: replace(op, fetch=replace(op.fetch, base=MACHINE.dm_slice_bytes - 8))),
        BOUNDS, "DM bytes", 9, 0,
    ),
    "write behind HBM": (
        change(10, lambda op: replace(op, destination=Endpoint(Space.HBM, (1 << 16) - 8))), BOUNDS, "HBM bytes", 10, 0,
    ),
    "partially live ring": (change(9, ring(8)), ILLEGAL, "ring", 9, 0),
    "ring of three": (change(9, ring(3)), ILLEGAL, "ring", 9, 0),
    "packet over two flits": (
        change(3, lambda op: replace(
            op, fetch=Fetch(0, ((4, 128), (64, 2)), Dtype.BF16, 64),
            contract=replace(CONTRACT, pack=4, loops=((4, 0, 0),), trf_read=32),
            commit=Commit(4096, ((128, 4),), Dtype.F32, 8),
        )), ILLEGAL, "packets of 4 flits", 3, 0,
    ),
    "nine loops": (change(0, loops), ILLEGAL, "at most 8", 0, 0),
    "misaligned transfer": (
        change(0, lambda op: replace(op, destination=Endpoint(Space.DM, 4))), ILLEGAL, "8 B", 0, 0,
    ),
    "misaligned commit": (
        change(9, lambda op: replace(op, commit=replace(op.commit, base=16388))), ILLEGAL, "multiples of 8 B", 9, 0,
    ),
    "contraction in the sub context": (in_sub, ILLEGAL, "context", 3, 0),
    "commit of five values": (
        change(9, lambda op: replace(op, commit=replace(op.commit, valid=5))), ILLEGAL, "keep", 9, 0,
    ),
    "write of what others still read": (
        lambda body: body.__delitem__(slice(7, 9)), UNIT_RACE, "writes at routine block_0, instruction 3", 6, 0,
    ),
    "VRF loaded by the main context": (
        change(9, lambda op: LoadVrf(SLICES, replace(op.fetch, base=4096), 0)), ILLEGAL, "context", 9, 0,
    ),
    "table results into TRF": (
        change(2, lambda op: replace(op, fetch=replace(BF16, dtype=Dtype.I8, lookup=Lookup.I4_F8E4M3))),
        ILLEGAL, "table", 2, 0,
    ),
    "clip before the product": (
        change(9, lambda op: replace(op, vector=(VectorOp(
            Alu.CLIP_ADD, Op.ADD, Mode.STREAM_OPERAND, Operand(Source.CONST, 1.0)), *op.vector))),
        ILLEGAL, "stage", 9, 0,
    ),
    "a wait that nobody ends": (
        change(5, lambda op: Wait(op.semaphore, 2)), DEADLOCK, "waits for semaphore 0 to be 2", 5, 0,
    ),
    "a notify that is missing": (
        change(4, lambda op: Notify(op.register, op.base, op.units, 3, op.ranges)),
        DEADLOCK, "no unit ever notifies", 5, 0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_found_and_named(name: str) -> None:
    fault, kind, words, index, layer = FAULTS[name]
    body = block()
    fault(body)
    stream = program(body)
    with pytest.raises(SimulationError) as caught:
        run(stream)
    error = caught.value
    assert error.kind == kind, error
    text = str(error)
    assert words in text, text
    assert error.site is not None
    assert (error.site.routine, error.site.index) == ("block_0", index), text
    assert error.site.location == LOCATIONS[body[index].location]
    assert error.site.layer == f"model.layers.{layer}"
    assert f"routine block_0, instruction {index}, {error.site.location}, in model.layers.{layer}" in text


@pytest.mark.parametrize(("index", "counts"), [(3, {"dma": 2}), (9, {"main": 1}), (10, {"main": 1})])
def test_races_between_contexts_are_named(index: int, counts: dict[str, int]) -> None:
    """A wait is missing: the pass may run before its operands are there."""
    body = block()
    body[index] = replace(body[index], after=After(**counts, enter=True))
    with pytest.raises(SimulationError) as caught:
        run(program(body))
    error = caught.value
    assert error.kind == SimulationError.RACE
    assert error.site is not None
    assert error.site.routine == "block_0"
    assert index in (error.site.index, int(str(error).split("instruction ")[-1].split(",")[0]))
    assert "in model.layers.0" in str(error)
    assert str(error).count("tc.") >= 2, "both instructions with their operations"


def test_deadlock_of_the_timing_simulator_is_named() -> None:
    body = block()
    body[5] = replace(body[5], what=Wait(0, 2))
    with pytest.raises(SimulationError) as caught:
        simulate([program(body)] * UNITS, MACHINE)
    assert caught.value.kind == DEADLOCK
    assert caught.value.site is not None
    assert caught.value.site.location == "mlp|tc.all_reduce"
    assert caught.value.site.layer.startswith("model.layers.")
    body = block()
    body[3] = replace(body[3], after=After(main=1))
    with pytest.raises(
        SimulationError, match=r"routine block_0, instruction 3, self_attn.*, in model.layers.0"
    ) as caught:
        simulate(program(body), MACHINE)
    assert caught.value.kind == DEADLOCK


def test_unreachable_memory_is_named() -> None:
    """A pull from a unit that does not exist, found before anything runs."""
    body = block()
    pull = Dma(
        Endpoint(Space.PEER_DM, 5 * UNIT_STRIDE), Endpoint(Space.DM, 8192),
        ((SLICES, DM_SLICE_STRIDE, DM_SLICE_STRIDE),), streams.ROW,
    )  # fmt: skip
    body[6] = replace(body[6], what=pull)
    for go in (lambda: run(program(body)), lambda: simulate([program(body)] * UNITS, MACHINE)):
        with pytest.raises(SimulationError) as caught:
            go()
        assert caught.value.site is not None
        assert (caught.value.site.index, caught.value.site.location) == (6, "mlp|tc.all_reduce")
        assert "in model.layers.0" in str(caught.value)


def test_limits_and_races_are_found_without_strict_checks() -> None:
    """A unit of a system that runs alone, with the checks of values turned off."""
    unit = System(MACHINE, 1, 1, 1, SLICES, 1 << 16, 0, checks=False).unit()
    unit.window.write(0, np.zeros(1024, np.float32))
    body = [
        Instruction(Context.DMA, After(), streams.load(0), 2),
        Instruction(Context.MAIN, After(dma=1), streams.scale(0, 4096, 2.0), 4),
        Instruction(Context.DMA, After(main=1), streams.store(4096), 4),
    ]
    unit.run(program(body))
    with pytest.raises(
        SimulationError, match=r"race between contexts at routine block_0, instruction 2, mlp.down_proj"
    ):
        unit.run(program([*body[:2], replace(body[2], after=After())]))
    nine = replace(body[0], what=loops(streams.load(0)))
    with pytest.raises(
        SimulationError, match=r"illegal instruction at routine block_0, instruction 0, self_attn.*at most 8"
    ):
        unit.run(program([nine, *body[1:]]))
