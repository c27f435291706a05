"""Transfers of weights move forward, and nothing but time and memory changes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from isa_builders import copy_pass, load, store
from mutants import MACHINE, Program
from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import SSAValue

from backend_rngd.dialect import (
    EARLY,
    AllocOp,
    CallOp,
    DmaOp,
    ExecOp,
    GetGlobalOp,
    GlobalOp,
    InstructionOp,
    LaunchOp,
    RoutineOp,
    buffer_type,
)
from backend_rngd.emit import emit
from backend_rngd.hoist import hoist, undo
from backend_rngd.isa.descriptors import UNIT_STRIDE, Endpoint, Notify, Space, Wait
from backend_rngd.liveness import constant_values
from backend_rngd.place import place
from backend_rngd.schedule import schedule
from backend_rngd.sync_ops import NotifyOp, WaitOp
from runtime_sim.timing import simulate

HBM = buffer_type("hbm", 1 << 24)
KB = 1024


class Builder:
    """A routine of loads, passes and stores by name."""

    def __init__(self, kind: str = "weight") -> None:
        self.routine = RoutineOp("main")
        self.globals = [GlobalOp("w", "hbm", 1 << 24, kind), GlobalOp("y", "hbm", 1 << 24, "output")]
        self.w, self.y = (GetGlobalOp(n, HBM) for n in ("w", "y"))
        self.routine.block.add_ops([self.w, self.y])
        self.buffers: dict[str, AllocOp] = {}

    def value(self, name: str, nbytes: int) -> SSAValue:
        if name not in self.buffers:
            self.buffers[name] = AllocOp("dm", nbytes, name)
            self.routine.block.add_op(self.buffers[name])
        return self.buffers[name].results[0]

    def load(self, name: str, nbytes: int = 4 * KB) -> None:
        desc = load(4 * KB, 0)
        desc = (
            replace(desc, loops=(*desc.loops[:1], (nbytes // (4 * KB), 1 << 20, 4 * KB))) if nbytes > 4 * KB else desc
        )
        self.routine.block.add_op(DmaOp(desc, self.w.results[0], self.value(name, nbytes), location=f"load {name}"))

    def work(self, source: str, target: str, nbytes: int = 4 * KB) -> None:
        desc = copy_pass(0, 0, KB)
        self.routine.block.add_op(
            ExecOp(desc, self.value(source, nbytes), self.value(target, nbytes), location=f"{source} -> {target}")
        )

    def store(self, name: str, nbytes: int = 4 * KB) -> None:
        desc = store(4 * KB, 0, 0)
        self.routine.block.add_op(DmaOp(desc, self.value(name, nbytes), self.y.results[0], location=f"store {name}"))

    @property
    def module(self) -> ModuleOp:
        return ModuleOp([*self.globals, self.routine])

    @property
    def order(self) -> list[str]:
        return [op.where.data for op in self.routine.block.ops if isinstance(op, InstructionOp)]


def chain(kind: str = "weight") -> Builder:
    b = Builder(kind)
    b.load("a")
    b.work("a", "x")
    b.store("x")
    b.load("b")
    b.work("b", "z")
    b.store("z")
    return b


def test_weights_go_before_a_store_that_waits() -> None:
    b = chain()
    module = b.module
    moves = hoist(module, MACHINE)
    assert b.order == ["load a", "a -> x", "load b", "store x", "b -> z", "store z"]
    assert (moves.transfers, moves.extra_bytes) == (1, 4 * KB)
    module.verify()


def test_what_is_written_stays() -> None:
    b = chain("cache")
    order = b.order
    assert hoist(b.module, MACHINE).transfers == 0
    assert b.order == order


def test_undo_restores_the_order() -> None:
    b = chain()
    module = b.module
    text = str(module)
    moves = hoist(module, MACHINE)
    assert str(module) != text
    undo(moves)
    assert str(module) == text


def test_a_buffer_in_use_is_not_overwritten() -> None:
    """The second load goes to the buffer that the pass reads: it stays behind the pass."""
    b = Builder()
    b.load("a")
    b.work("a", "x")
    b.store("x")
    b.work("a", "y")
    b.load("a")
    b.work("a", "z")
    b.store("z")
    order = b.order
    hoist(b.module, MACHINE)
    assert b.order == order


def test_the_budget_is_kept() -> None:
    b = Builder()
    b.load("a", 300 * KB)
    b.work("a", "x", 300 * KB)
    b.store("x", 300 * KB)
    b.load("b", 300 * KB)
    b.work("b", "y", 300 * KB)
    b.store("y")
    order = b.order
    assert hoist(b.module, MACHINE).transfers == 0
    assert b.order == order


def test_arguments_bound_to_weights_only_are_constant() -> None:
    main = RoutineOp("main")
    block = RoutineOp("block", [HBM, HBM])
    gets = [GetGlobalOp(n, HBM) for n in ("w", "v", "k")]
    main.block.add_ops(gets)
    for i in (0, 1):
        main.block.add_op(CallOp("block", [gets[i].results[0], gets[i + 1].results[0]]))
    globals_ = [GlobalOp("w", "hbm", 1 << 24, "weight"), GlobalOp("v", "hbm", 1 << 24, "constant")]
    module = ModuleOp([*globals_, GlobalOp("k", "hbm", 1 << 24, "cache"), main, block])
    found = constant_values(module)
    assert block.block.args[0] in found
    assert block.block.args[1] not in found
    assert gets[2].results[0] not in found


def test_too_little_memory_places_without_moving() -> None:
    """Locals of the caller that live across the call are not in the callee's budget; placement then gives way."""
    b = Builder()
    b.load("a", 20 * KB)
    b.work("a", "x", 130 * KB)
    b.store("x")
    b.load("b", 130 * KB)
    b.work("b", "y")
    b.store("y")
    b.routine.properties["sym_name"] = type(b.routine.sym_name)("block")
    main = RoutineOp("main")
    big = AllocOp("dm", 260 * KB, "table")
    use = [ExecOp(copy_pass(0, 4096, 64), big.results[0], big.results[0]) for _ in range(2)]
    main.block.add_ops([big, use[0], CallOp("block", []), use[1]])
    module = ModuleOp([*b.globals, main, b.routine])
    order = b.order
    place(module, MACHINE)
    assert b.order == order


def test_segments_end_at_calls() -> None:
    b = chain()
    other = RoutineOp("block")
    c = Builder()
    stores = [op for op in b.routine.block.ops if isinstance(op, DmaOp) and op.where.data == "store x"]
    b.routine.block.insert_op_after(CallOp("block", []), stores[0])
    module = ModuleOp([*b.globals, b.routine, other])
    order = b.order
    hoist(module, MACHINE)
    assert b.order == order
    assert c.order == []


@pytest.mark.parametrize(
    ("name", "positions", "some"), [("decode", [20], True), ("prefill", list(range(3, 19)), False)]
)
def test_results_stay_and_time_falls(name: str, positions: list[int], some: bool) -> None:
    """some: whether there is anything to move; the first weights of a layer come early, and the others follow them."""
    plain = Program(f"tiny_llama_{name}.mlir", positions, prefetch=False)
    moved = Program(f"tiny_llama_{name}.mlir", positions)
    assert moved.expected == plain.expected
    assert (moved.stream != plain.stream) == some
    assert moved.emitted.check(MACHINE) == []
    before, after = (simulate(program.stream, MACHINE).cycles for program in (plain, moved))
    assert after < before if some else after == before


def test_weights_do_not_hold_up_other_units() -> None:
    """Once a unit has notified the others, it waits for them before long transfers of weights, not behind them."""
    b = Builder()
    b.load("a")
    b.work("a", "x")
    b.store("x")
    b.routine.block.add_op(NotifyOp(Notify(63, 0, ((2, UNIT_STRIDE),), 0), location="notify"))
    b.routine.block.add_op(WaitOp(Wait(0, 1), location="wait"))
    for name in "bc":
        b.load(name, 64 * KB)
        b.work(name, f"{name}'")
    moves = hoist(ModuleOp([*b.globals, LaunchOp(63, (0, UNIT_STRIDE)), b.routine]), MACHINE)
    assert moves.transfers == 1
    assert b.order[2:6] == ["load b", "store x", "notify", "wait"]


def test_what_is_needed_first_goes_first() -> None:
    """A result that only the end needs lets weights of the next pass by, even if both could start at once."""
    b = Builder()
    b.load("a")
    b.work("a", "x")
    b.store("x")
    b.load("b", 64 * KB)
    b.work("b", "y")
    assert hoist(b.module, MACHINE).transfers == 1
    assert b.order.index("load b") < b.order.index("store x")


def test_parts_of_a_tile_move_together() -> None:
    """The second transfer into a buffer is no obstacle to itself."""
    b = Builder()
    b.load("a")
    b.work("a", "x")
    b.store("x")
    b.load("b")
    b.load("b")
    b.work("b", "y")
    assert hoist(b.module, MACHINE).transfers == 2
    assert b.order.index("store x") > max(i for i, name in enumerate(b.order) if name == "load b")


def test_weights_stay_behind_early_ones() -> None:
    """What starts while the routine before is at work must not wait for weights that start after its end."""
    b = Builder()
    held = GlobalOp("early0", "dm", 4 * KB, EARLY)
    get = GetGlobalOp("early0", held.buffer_type)
    b.globals.append(held)
    b.routine.block.add_ops([get, DmaOp(load(4 * KB, 0), b.w.results[0], get.results[0], location="load early")])
    b.load("a")
    b.work("a", "x")
    b.routine.block.add_op(ExecOp(copy_pass(0, 0, KB), get.results[0], b.value("z", 4 * KB), location="early -> z"))
    order = b.order
    hoist(b.module, MACHINE)
    assert b.order == order


def test_loads_fill_the_waits() -> None:
    """Load, pass, store, eight times: the loads run while the passes compute."""

    def cycles(prefetch: bool) -> float:
        b = Builder()
        for i in range(8):
            b.load(f"a{i}")
            for _ in range(8):
                b.work(f"a{i}", f"x{i}")
            b.store(f"x{i}")
        module = b.module
        place(module, MACHINE, prefetch=prefetch)
        schedule(module)
        return simulate(emit(module, MACHINE).streams[0], MACHINE).cycles

    assert cycles(True) < 0.95 * cycles(False)


def test_hbm_endpoints_are_what_they_say() -> None:
    """The loads of these tests read HBM and write DM."""
    assert (load().source, load().destination) == (Endpoint(Space.HBM, 4096), Endpoint(Space.DM, 0))
