"""Orders that the waits allow: a complete program gives the same bytes, a missing wait is found and named."""

from __future__ import annotations

from dataclasses import replace

import drawing as draw_
import numpy as np
import pytest

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
from runtime_sim.errors import SimulationError
from runtime_sim.functional import Card, Unit
from runtime_sim.orders import check_orders, random_orders

ROW = 256


def load(tile: int, buffer: int) -> Dma:
    """Tile `tile` of the input to DM buffer `buffer`, at register 8."""
    source = Endpoint(Space.HBM, tile * 4 * ROW, 8)
    return Dma(source, Endpoint(Space.DM, buffer * ROW), ((4, ROW, DM_SLICE_STRIDE),), ROW)


def double(buffer: int) -> Exec:
    """Twice the buffer plus VRF, into the result area."""
    vector = (
        VectorOp(Alu.FP_MUL0, Op.MUL, Mode.STREAM_OPERAND, Operand(Source.CONST, 2.0)),
        VectorOp(Alu.CLIP_ADD, Op.ADD, Mode.STREAM_OPERAND, Operand(Source.VRF, 0.0, 0, ((64, 4),))),
    )
    fetch = Fetch(buffer * ROW, ((64, 4),), Dtype.F32, 8)
    return Exec(4, fetch, Commit(4096 + buffer * ROW, ((64, 4),), Dtype.F32, 8), None, None, vector)


def store(tile: int, buffer: int) -> Dma:
    target = Endpoint(Space.HBM, 32768 + tile * 4 * ROW)
    return Dma(Endpoint(Space.DM, 4096 + buffer * ROW), target, ((4, DM_SLICE_STRIDE, ROW),), ROW)


# Two buffers in flight, four tiles: load, operand load, compute, store, each with the waits it needs.
WAITS = {
    ("load", 2): After(main=1),
    ("load", 3): After(main=2),
    ("vrf", 0): After(dma=1),
    ("vrf", 1): After(dma=2, main=1),
    ("vrf", 2): After(dma=4, main=2),
    ("vrf", 3): After(dma=6, main=3),
    ("double", 0): After(dma=1, sub=1),
    ("double", 1): After(dma=2, sub=2),
    ("double", 2): After(dma=4, sub=3),
    ("double", 3): After(dma=6, sub=4),
    ("store", 0): After(main=1),
    ("store", 1): After(main=2),
    ("store", 2): After(main=3),
    ("store", 3): After(main=4),
}


def pipeline(**dropped: After) -> tuple[Instruction, ...]:
    """dma order: load 0, load 1, store 0, load 2, store 1, load 3, store 2, store 3."""
    items: list[Instruction] = []

    def add(kind: str, tile: int) -> None:
        buffer = tile % 2
        what = {
            "load": lambda: load(tile, buffer),
            "vrf": lambda: LoadVrf(4, Fetch(buffer * ROW, ((64, 4),), Dtype.F32, 8), 0),
            "double": lambda: double(buffer),
            "store": lambda: store(tile, buffer),
        }[kind]()
        context = {"load": Context.DMA, "store": Context.DMA, "vrf": Context.SUB, "double": Context.MAIN}[kind]
        after = dropped.get(f"{kind}{tile}", WAITS.get((kind, tile), After()))
        items.append(Instruction(context, after, what, 0))

    for name in ("load0", "load1", "vrf0", "double0", "store0", "load2", "vrf1", "double1", "store1", "load3", "vrf2",
                 "double2", "store2", "vrf3", "double3", "store3"):  # fmt: skip
        add(name[:-1], int(name[-1]))
    return tuple(items)


def program(**dropped: After) -> Stream:
    return Stream(0, 4, (Routine("main", pipeline(**dropped)),), ("layer|op",))


def unit() -> Unit:
    card = Card(draw_.MACHINE, 1 << 17)
    card.write(0, np.random.default_rng(0).standard_normal(8192).astype(np.float32))
    card.clear(32768, 32768)
    return Unit(card, 4)


def test_a_program_with_all_waits_has_one_result():
    assert check_orders(program(), unit) == 8
    assert check_orders(program(), unit, orders=random_orders(20)) == 20


@pytest.mark.parametrize(
    ("dropped", "after", "victim", "other"),
    [
        ("double1", After(dma=2), 7, 6),  # read of VRF before it is loaded
        ("vrf1", After(dma=2), 6, 3),  # VRF overwritten while the previous pass needs it
        ("store1", After(), 8, 7),  # stored before it was computed
        ("vrf0", After(), 2, 0),  # loaded from a buffer not filled yet
    ],
)
def test_missing_waits_are_found_and_named(dropped, after, victim, other):
    with pytest.raises(SimulationError) as caught:
        check_orders(program(**{dropped: after}), unit)
    message = str(caught.value)
    assert caught.value.kind == SimulationError.RACE
    assert caught.value.site is not None
    assert caught.value.site.index == victim
    assert f"routine main, instruction {other}, layer|op" in message


@pytest.mark.parametrize(("dropped", "after"), [("double1", After(sub=2)), ("load2", After())])
def test_waits_that_others_imply_may_be_left_out(dropped, after):
    """The operand load waited for the transfer; the store before load 2 waited for the pass."""
    assert check_orders(program(**{dropped: after}), unit) == 8


def test_two_writers_of_the_same_bytes():
    def times(factor: float) -> Exec:
        constant = Operand(Source.CONST, factor)
        return replace(double(0), vector=(VectorOp(Alu.FP_MUL0, Op.MUL, Mode.STREAM_OPERAND, constant),))

    items = (
        Instruction(Context.DMA, After(), load(0, 0), 0),
        Instruction(Context.MAIN, After(dma=1), times(1.0), 0),
        Instruction(Context.SUB, After(dma=1), times(3.0), 0),
    )
    stream = Stream(0, 4, (Routine("main", items),), ("layer|op",))
    with pytest.raises(SimulationError, match="sub instruction does not wait for the main instruction"):
        check_orders(stream, unit)
    fixed = replace(items[2], after=After(dma=1, main=1))
    assert check_orders(Stream(0, 4, (Routine("main", (*items[:2], fixed)),), ("layer|op",)), unit) == 8


def test_calls_keep_their_registers_in_every_order():
    """Two calls on different inputs; without `enter` the second one's transfers overtake the first one's passes."""
    calls = tuple(Instruction(Context.CONTROL, After(), Call(1, ((8, 0, base),)), 0) for base in (0, 8192))
    safe = Stream(0, 4, (Routine("main", calls), Routine("block", pipeline())), ("layer|op",))
    assert check_orders(safe, unit) == 8
    hasty = pipeline(load0=After(enter=False), load1=After(enter=False))[:4]
    with pytest.raises(SimulationError, match=r"race between contexts at routine block"):
        check_orders(Stream(0, 4, (Routine("main", calls), Routine("block", hasty)), ("layer|op",)), unit)
