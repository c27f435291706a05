"""What units of a group do to each other: correct programs pass, every mistake in their synchronisation is found."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from mutants import leaves, replaced
from spmd import MACHINE, OWN, PART, PIECE, UNIT_RULES, Spmd, changed, layers, rules
from xdsl.dialects.builtin import ModuleOp

from backend_rngd.dialect import (
    DmaOp,
    GlobalOp,
    InstructionOp,
    LaunchOp,
    NotifyOp,
    RoutineOp,
    WaitOp,
    buffer_type,
)
from backend_rngd.emit import Emitted, emit
from backend_rngd.hoist import hoist
from backend_rngd.isa.cells import Grid, Piece, own_piece, peer_pieces
from backend_rngd.isa.check_units import check_units
from backend_rngd.isa.descriptors import (
    DM_SLICE_STRIDE,
    UNIT_STRIDE,
    Context,
    Dma,
    Endpoint,
    Index,
    Instruction,
    Notify,
    Space,
    Wait,
)
from backend_rngd.isa.footprint import footprint
from backend_rngd.isa.legality import errors
from backend_rngd.isa.peers import notified, split_address, split_unit_stride
from backend_rngd.isa.unit_state import Raise
from backend_rngd.place import place
from backend_rngd.schedule import schedule
from ir.errors import UnsupportedError


# Addresses -----------------------------------------------------------------------------------------------------------
def test_addresses() -> None:
    assert split_address(3 * UNIT_STRIDE + 5) == (3, 5)
    assert split_unit_stride(2 * UNIT_STRIDE - 64) == (2, -64)
    assert split_unit_stride(-UNIT_STRIDE + DM_SLICE_STRIDE) == (-1, DM_SLICE_STRIDE)
    desc = Notify(63, UNIT_STRIDE, ((2, 4), (3, 1)), 0)
    assert notified(desc, 0) == (1, 2, 3, 5, 6, 7)
    assert notified(desc, 2 * UNIT_STRIDE + 64, own=4) == (3, 5, 7, 8, 9)


def test_footprint_of_a_peer_side() -> None:
    """The own unit may be meant: its DM counts, with the places of all units; HBM is ordered by the DMA context."""
    side = Endpoint(Space.PEER_DM, 4096, 62)
    desc = Dma(side, Endpoint(Space.DM, 0), ((4, UNIT_STRIDE, 128), (64, DM_SLICE_STRIDE, DM_SLICE_STRIDE)), 128)
    read, write = footprint(desc, {62: (0, UNIT_STRIDE + 256)})
    assert (read.space, read.intervals, read.write) == ("dm", ((4096, 4224), (4352, 4480)), False)
    assert (write.space, write.intervals) == ("dm", ((0, 512),))
    far = replace(desc, source=Endpoint(Space.PEER_HBM, UNIT_STRIDE + 4096))
    assert footprint(far)[0].space == "peer_hbm"
    assert footprint(Notify(0, 0, (), 0, ((64, 8),)))[0].write is False
    assert [a.write for a in footprint(Wait(0, 1, ((64, 8),), ((0, 8),)))] == [False, True]


def test_pieces_and_cells() -> None:
    side = Endpoint(Space.PEER_DM, UNIT_STRIDE + 2 * DM_SLICE_STRIDE + 64)
    found = peer_pieces(side, ((2, 2 * UNIT_STRIDE + DM_SLICE_STRIDE), (4, DM_SLICE_STRIDE), (2, 256)), 32, 0, 8)
    assert [unit for unit, _ in found] == [1, 3]
    assert [piece.slices for _, piece in found] == [(2, 6), (3, 7)]
    assert found[0][1].pieces == ((64, 96), (320, 352))
    with pytest.raises(ValueError, match="loops over 9 units"):
        peer_pieces(side, ((9, UNIT_STRIDE),), 8, 0, 8)
    hbm = own_piece(Endpoint(Space.HBM, 64, 9), ((2, 128),), 64, 1000)
    assert hbm.pieces == ((1064, 1128), (1192, 1256))
    grid = Grid([*[piece for _, piece in found], hbm])
    mine = grid.cells(found[0][1])
    assert set(mine) & set(grid.cells(found[1][1]))
    assert not set(mine) & set(grid.cells(hbm))
    assert grid.cells(Piece(False, (0, 2), ((0, 4096),))) == ()
    assert set(grid.cells(Piece(False, (0, 64), ((90, 100),)))) <= set(grid.cells(Piece(False, (0, 64), ((64, 352),))))
    assert grid.name(mine[0]) == "DM bytes [64, 96) of slices [2, 3)"


# Correct programs ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("space", ["dm", "hbm"])
@pytest.mark.parametrize("units", [2, 3, 4, 8])
def test_layers_of_exchanges_pass(units: int, space: str) -> None:
    out = layers(units, 5, space=space).emit()
    assert out.units == units
    assert out.launch[OWN] == tuple(u * UNIT_STRIDE for u in range(units))
    assert out.check(MACHINE) == []


def pushing(arrived: bool = True, second: bool = True) -> Spmd:
    """Units write their piece into all others; a second exchange lets them do it again.

    The second notify names what the pass that reads the slots writes, so it follows that pass.
    """
    b = Spmd(4)
    b.shared("slots", "dm", 4 * PIECE)
    b.shared("sum", "dm", 4 * PIECE)
    b.routine("layer")
    x = b.local()
    b.load("x", x)
    b.push(x, "slots")
    b.notify(0)
    b.wait(0, arrived=["slots"] if arrived else [])
    b.work("slots", "sum")
    if second:
        b.notify(1, "sum")
        b.wait(1)
    b.store("sum", "y")
    b.routine("main")
    b.call("layer", 3)
    return b


def test_units_may_write_into_others() -> None:
    assert pushing().emit().check(MACHINE) == []


def test_ranges_come_from_buffers() -> None:
    b = layers()
    out = b.emit()
    p, q = out.globals["p"].address, out.globals["q"].address
    found = [i.what for r in out.streams[0].routines for i in r.instructions if isinstance(i.what, (Notify, Wait))]
    assert [w.ranges for w in found] == [((p, PIECE),), ((q, PIECE),), ((q, PIECE),), ((p, PIECE),)]
    loop = ((4, 1),)
    assert isinstance(found[0], Notify)
    assert (found[0].units, found[0].register) == (loop, 0)


def test_a_notify_waits_for_what_it_publishes_and_a_write_for_the_release() -> None:
    body = layers().emit().streams[0].routines[1].instructions
    at = {type(i.what).__name__ + str(n): (n, i) for n, i in enumerate(body)}
    notifies = [i for _, i in at.values() if isinstance(i.what, Notify)]
    assert [i.after.main for i in notifies] == [1, 4]  # the passes that write p and q
    waits = [n for n, i in enumerate(body) if isinstance(i.what, Wait)]
    second_write = body[waits[1] + 1]
    dma = len([i for i in body[: waits[1] + 1] if i.context == Context.DMA])
    assert second_write.context == Context.MAIN
    assert second_write.after.dma == dma  # the wait that releases p, not the transfer before it


# Mistakes ------------------------------------------------------------------------------------------------------------
def found_in(out: Emitted) -> set[str]:
    return rules(errors(out.check(MACHINE)))


def without_release() -> Spmd:
    return layers(releases=False)


def one_buffer() -> Spmd:
    """The next layer writes what others may still read."""
    b = Spmd(4)
    b.shared("p", "dm")
    b.routine("layer")
    x = b.local()
    b.load("x", x)
    b.work(x, "p")
    b.notify(0, "p")
    b.wait(0)
    y = b.local(4 * PIECE)
    b.work(b.gather("p"), y)
    b.store(y, "y")
    b.routine("main")
    b.call("layer", 2)
    return b


def notified_too_early() -> Spmd:
    b = Spmd(4)
    b.shared("p", "dm")
    x = b.local()
    b.load("x", x)
    b.notify(0)
    b.work(x, "p")
    b.wait(0)
    b.store(b.gather("p"), "y")
    return b


def not_published() -> Spmd:
    """The notify does not name the buffer, so it does not wait for the pass that writes it."""
    b = Spmd(4)
    b.shared("p", "dm")
    x = b.local()
    b.load("x", x)
    b.work(x, "p")
    b.notify(0)
    b.wait(0)
    b.store(b.gather("p"), "y")
    return b


def never_written() -> Spmd:
    b = Spmd(4)
    b.shared("p", "dm")
    b.notify(0)
    b.wait(0)
    b.store(b.gather("p"), "y")
    return b


def not_arrived() -> Spmd:
    return pushing(arrived=False)


def pushed_again() -> Spmd:
    """The next layer writes into units that may still read."""
    return pushing(second=False)


def waits_first() -> Spmd:
    b = Spmd(4)
    b.wait(0)
    b.notify(0)
    return b


def waits_for_more() -> Spmd:
    b = Spmd(4)
    b.notify(0)
    b.wait(0, count=4)
    return b


def waits_for_fewer() -> Spmd:
    b = Spmd(4)
    b.notify(0)
    b.wait(0, count=2)
    return b


def waits_in_two_steps() -> Spmd:
    """After the first wait it is not known who has notified."""
    b = Spmd(4)
    b.notify(0)
    b.wait(0, count=1)
    b.wait(0, count=2)
    return b


def overtaken() -> Spmd:
    """Nobody waits for the slowest before notifying again."""
    b = Spmd(4)
    b.notify(0)
    b.notify(0)
    b.wait(0)
    b.wait(0)
    return b


MISTAKES: list[tuple[Callable[[], Spmd], set[str]]] = [
    (without_release, {"unit-race"}),
    (one_buffer, {"unit-race"}),
    (notified_too_early, {"unit-race"}),
    (not_published, {"unit-race"}),
    (never_written, {"unit-race"}),
    (not_arrived, {"unit-race"}),
    (pushed_again, {"unit-race"}),
    (waits_first, {"deadlock"}),
    (waits_for_more, {"deadlock", "semaphore-balance"}),
    (waits_for_fewer, {"semaphore-balance", "wait-order"}),
    (waits_in_two_steps, {"wait-order"}),
    (overtaken, {"wait-order"}),
]


@pytest.mark.parametrize(("build", "wanted"), MISTAKES, ids=[build.__name__ for build, _ in MISTAKES])
def test_mistakes(build: Callable[[], Spmd], wanted: set[str]) -> None:
    assert found_in(build().emit()) == wanted


def test_a_single_layer_hides_what_the_next_one_shows() -> None:
    b = one_buffer()
    call = list(b.routines["main"].block.ops)[-1]
    call.detach()
    call.erase()
    assert b.emit().check(MACHINE) == []


def test_the_next_run_may_start_before_others_have_finished() -> None:
    """One exchange a run: what it publishes may still be read when the next run writes it."""
    b = one_buffer()
    call = list(b.routines["main"].block.ops)[-1]
    call.detach()
    call.erase()
    out = b.emit()
    assert out.check(MACHINE) == []
    assert rules(out.check(MACHINE, runs=2)) == {"unit-race"}
    assert layers(4, 1).emit().check(MACHINE, runs=2) == []


def test_a_report_names_both_instructions_and_the_remedy() -> None:
    found = errors(without_release().emit().check(MACHINE))
    text = next(str(v) for v in found if "gather p" in str(v))
    assert text.startswith("layer[")
    assert "writes DM bytes [0, 256) of slices [0, 64) of unit" in text
    assert "gather p: put a notify of unit" in text
    assert "and name the buffer in both" in text


def without(out: Emitted, routine: int, index: int) -> Emitted:
    """The program without one DMA instruction; counts and lifetimes adjusted."""
    body = out.streams[0].routines[routine].instructions
    number = len([i for i in body[: index + 1] if i.context == Context.DMA])
    left: list[Instruction] = []
    for i, item in enumerate(body):
        if i != index:
            less = item.after.dma >= number
            left.append(replace(item, after=replace(item.after, dma=item.after.dma - less)))
    spans = [
        replace(b, first=b.first - (b.first > index), last=b.last - (b.last > index)) if b.routine == routine else b
        for b in out.buffers
    ]
    return replace(changed(out, routine, left), buffers=tuple(spans))


@pytest.mark.parametrize("space", ["dm", "hbm"])
@pytest.mark.parametrize("units", [2, 4])
def test_any_notify_or_wait_that_is_removed_is_missed(units: int, space: str) -> None:
    out = layers(units, 3, space=space).emit()
    for r, routine in enumerate(out.streams[0].routines):
        for index, instruction in enumerate(routine.instructions):
            if isinstance(instruction.what, (Notify, Wait)):
                assert found_in(without(out, r, index)), (r, index)


@pytest.mark.parametrize("space", ["dm", "hbm"])
@pytest.mark.parametrize("number", range(4))
def test_any_notify_or_wait_that_is_never_written_is_missed(number: int, space: str) -> None:
    """Left out before scheduling, so that everything inside a unit is in order."""
    b = layers(4, 3, space=space)
    op = [op for op in b.routines["layer"].block.ops if isinstance(op, (NotifyOp, WaitOp))][number]
    op.detach()
    found = found_in(b.emit())
    assert found
    assert found <= {"deadlock", "semaphore-balance", "unit-race", "wait-order"}


@pytest.mark.parametrize("build", [layers, pushing], ids=["pull", "push"])
def test_any_changed_field_of_a_notify_or_wait_is_found(build: Callable[[], Spmd]) -> None:
    """Semaphores, counts, targets and ranges, each changed in several ways."""
    out = build().emit()
    tried = 0
    for r, routine in enumerate(out.streams[0].routines):
        for index, instruction in enumerate(routine.instructions):
            what = instruction.what
            if not isinstance(what, (Notify, Wait)):
                continue
            for path, value in leaves(what):
                unit = UNIT_STRIDE if path[0] == "base" else 1
                for new in {value + unit, value - unit, value * 2, value // 2, value + 8, 0} - {value}:
                    body = list(routine.instructions)
                    body[index] = replace(instruction, what=replaced(what, path, new))
                    tried += 1
                    assert found_in(changed(out, r, body)), (r, index, path, value, new)
            for f in dataclasses.fields(what):
                if getattr(what, f.name) and isinstance(getattr(what, f.name), tuple):
                    body = list(routine.instructions)
                    body[index] = replace(instruction, what=replace(what, **{f.name: ()}))
                    tried += 1
                    assert found_in(changed(out, r, body)), (r, index, f.name)
    assert tried > 50


@pytest.mark.parametrize("units", [2, 4])
def test_any_changed_peer_address_is_found(units: int) -> None:
    out = layers(units).emit()
    for r, routine in enumerate(out.streams[0].routines):
        for index, instruction in enumerate(routine.instructions):
            what = instruction.what
            if not isinstance(what, Dma) or what.source.space != Space.PEER_DM:
                continue
            size, stride, step = what.loops[0]
            sources = [
                replace(what.source, base=what.source.base + PIECE),
                replace(what.source, base=what.source.base + UNIT_STRIDE * 3 * units),
                replace(what.source, base=what.source.base + 8),
                replace(what.source, register=OWN - 1 if units == 4 else 61),
                Endpoint(Space.DM, what.source.base),
            ]
            changes = [replace(what, source=source) for source in sources]
            changes.append(replace(what, loops=((size, stride + DM_SLICE_STRIDE, step), *what.loops[1:])))
            changes.append(replace(what, loops=((size, 4 * stride, step), *what.loops[1:])))
            for new in changes:
                body = list(routine.instructions)
                body[index] = replace(instruction, what=new)
                assert found_in(changed(out, r, body)), (r, index, new)


# Launch registers, addresses, ranges ---------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "launch",
    [{63: (0, 1 << 40), 62: (0, 256, 512)}, {63: (0, -1)}, {64: (0, 0)}, {0: (0, 0)}, {1: (0, 0)}],
)
def test_launch_registers(launch: dict[int, tuple[int, ...]]) -> None:
    out = replace(layers(2).emit(), launch=launch, row_registers={64: 1})
    assert found_in(out) == {"launch"}


def test_peer_addresses_stay_in_the_map_of_every_unit() -> None:
    out = pushing().emit()
    too_far = dict(out.launch)
    too_far[62] = (*out.launch[62][:3], 4 * PIECE)  # inside the next buffer
    assert found_in(replace(out, launch=too_far)) == {"dm-bounds"}
    too_far[62] = (*out.launch[62][:3], 64 * PIECE)  # outside of all
    assert found_in(replace(out, launch=too_far)) == {"dm-bounds", "peer"}
    out = layers(4, space="hbm").emit()
    size = out.globals["q"].address + out.globals["q"].nbytes - out.globals["p"].address
    body = list(out.streams[0].routines[1].instructions)
    index = next(i for i, one in enumerate(body) if isinstance(one.what, Dma) and one.what.source.space.is_peer)
    read = body[index].what
    assert isinstance(read, Dma)
    body[index] = replace(body[index], what=replace(read, source=replace(read.source, base=read.source.base + size)))
    assert found_in(changed(out, 1, body)) == {"peer"}
    out = pushing().emit()
    alone = replace(out, launch={r: values[:1] for r, values in out.launch.items()})
    assert found_in(alone) == {"peer"}


def test_the_own_memory_is_addressed_as_such() -> None:
    b = Spmd(2)
    b.shared("p", "dm")
    x = b.local()
    b.load("x", x)
    b.work(x, "p")
    loops = ((64, DM_SLICE_STRIDE, DM_SLICE_STRIDE),)
    b.current.block.add_op(
        DmaOp(Dma(Endpoint(Space.PEER_DM, 0, OWN), Endpoint(Space.DM, 0), loops, PIECE), b.get("p"), x)
    )
    b.store(x, "y")
    assert found_in(b.emit()) == {"peer"}


def test_ranges_are_whole_shared_buffers() -> None:
    out = layers(2).emit()
    body = list(out.streams[0].routines[1].instructions)
    index = next(i for i, one in enumerate(body) if isinstance(one.what, Notify))
    notify = body[index].what
    assert isinstance(notify, Notify)
    body[index] = replace(body[index], what=replace(notify, ranges=((notify.ranges[0][0], 248),)))
    assert found_in(changed(out, 1, body)) == {"sync-range"}


def test_registers_of_notifies_are_set() -> None:
    out = layers(2).emit()
    body = list(out.streams[0].routines[1].instructions)
    index = next(i for i, one in enumerate(body) if isinstance(one.what, Notify))
    notify = body[index].what
    assert isinstance(notify, Notify)
    body[index] = replace(body[index], what=replace(notify, register=40))
    assert found_in(changed(out, 1, body)) == {"register"}


@pytest.mark.parametrize(("register", "values"), [(1, None), (50, (0, 64))])
def test_notifies_name_whole_units(register: int, values: tuple[int, ...] | None) -> None:
    """A row register, and a launch register with a part of a buffer."""
    out = layers(2).emit()
    body = list(out.streams[0].routines[1].instructions)
    index = next(i for i, one in enumerate(body) if isinstance(one.what, Notify))
    notify = body[index].what
    assert isinstance(notify, Notify)
    body[index] = replace(body[index], what=replace(notify, register=register))
    launch = out.launch | ({register: values} if values else {})
    new = replace(changed(out, 1, body), launch=launch, row_registers={64: 1})
    assert found_in(new) == {"notify-units"}


def test_every_rule_of_units_is_covered() -> None:
    here = {"launch", "peer", "sync-range"}.union(*[wanted for _, wanted in MISTAKES])
    assert here == UNIT_RULES


# Repetition, other stages --------------------------------------------------------------------------------------------
def test_repeated_calls_are_looked_at_until_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []
    sent = Raise.__init__

    def counted(self: Raise, *values: Any) -> None:
        ran.append(1)
        sent(self, *values)

    out = layers(4, 100).emit()
    monkeypatch.setattr(Raise, "__init__", counted)
    assert out.check(MACHINE) == []
    assert len(ran) <= 4 * 3 * 2 * 4  # 4 units notify 3 others twice in each of at most 4 layers


@pytest.mark.parametrize("build", [without_release, one_buffer])
def test_more_repetitions_change_nothing(build: Callable[[], Spmd]) -> None:
    few, many = build(), build()
    many.routine("main")
    many.call("layer", 40)
    assert list(map(str, few.emit().check(MACHINE))) == list(map(str, many.emit().check(MACHINE)))


def test_other_stages_are_left_to_the_simulator() -> None:
    """A stage waits for notifications from another one, which this stream sends to the next."""

    def stage(following: int) -> Emitted:
        b = Spmd(2)
        b.current.block.add_op(WaitOp(Wait(4, 1)))
        b.current.block.add_op(NotifyOp(Notify(OWN, following * UNIT_STRIDE, (), 4)))
        return b.emit()

    assert stage(2).check(MACHINE) == []
    assert found_in(stage(6)) == {"peer"}


def test_indices_that_others_write_are_seen() -> None:
    """A gather reads its byte offsets from HBM, into which another unit may write."""

    def program(waits: bool) -> Emitted:
        b = Spmd(2)
        b.shared("offsets", "hbm", nbytes=512)
        b.shared("table", "hbm", kind="weight")
        x, rows = b.local(), b.local()
        b.load("x", x)
        write = Dma(Endpoint(Space.DM, 0), Endpoint(Space.PEER_HBM, 0, PART), ((2, 0, UNIT_STRIDE),), PIECE)
        b.current.block.add_op(DmaOp(write, x, b.get("offsets"), location="push"))
        if waits:
            b.notify(0)
            b.wait(0)
        loops = ((64, 0, DM_SLICE_STRIDE),)
        gather = Dma(Endpoint(Space.HBM, 0), Endpoint(Space.DM, 0), loops, PIECE, Index(0, 0, (8,), False))
        b.current.block.add_op(DmaOp(gather, b.get("table"), rows, index=b.get("offsets"), location="gather"))
        b.store(rows, "y")
        return b.emit()

    assert program(waits=True).check(MACHINE) == []
    assert found_in(program(waits=False)) == {"unit-race"}


def test_check_units_reports_by_routine_and_index() -> None:
    out = without_release().emit()
    stream = out.streams[0]
    touched = [[footprint(i.what, out.launch) for i in r.instructions] for r in stream.routines]
    found: list[tuple[int, int, str]] = []
    registers = {0: (0,) * 4} | out.launch
    check_units(stream, 4, registers, touched, lambda r, i, rule, _: found.append((r, i, rule)))
    assert {(routine, rule) for routine, _, rule in found} == {(1, "unit-race")}
    assert len({index for _, index, _ in found}) == 2  # one pass of each exchange


# Passes of the backend -----------------------------------------------------------------------------------------------
def with_weights(target: str = "") -> Spmd:
    """An exchange with a load of weights behind it that nothing but the end needs."""
    b = Spmd(4)
    b.shared("p", "dm")
    b.shared("w", "hbm", kind="weight")
    x, w = b.local(), b.local()
    b.load("x", x)
    b.work(x, "p")
    b.notify(0, "p")
    b.wait(0)
    y = b.local(4 * PIECE)
    b.work(b.gather("p"), y)
    b.load("w", target or w)
    b.work(target or w, y)
    b.store(y, "y")
    return b


def names(b: Spmd) -> list[str]:
    """Instructions of main: notify, wait, gather and the loads and passes in between."""
    out: list[str] = []
    for op in b.routines["main"].block.ops:
        if isinstance(op, InstructionOp):
            weights = isinstance(op, DmaOp) and "@w" in str(op.source.owner)
            out.append("weights" if weights else op.where.data or type(op).__name__)
    return out


def test_weights_move_before_a_wait_and_nothing_else_does() -> None:
    b = with_weights()
    before = [n for n in names(b) if n != "weights"]
    module = b.module
    assert names(b).index("weights") > names(b).index("gather p")
    assert hoist(module, MACHINE).transfers == 1
    after = names(b)
    assert [n for n in after if n != "weights"] == before
    assert after.index("weights") < after.index("wait 0")
    place(module, MACHINE, prefetch=False)
    schedule(module)
    assert emit(module, MACHINE).check(MACHINE) == []


def test_weights_do_not_move_into_a_published_buffer() -> None:
    """Only locals are loaded ahead: others may still read what was published."""
    b = with_weights("p")
    module = b.module
    order = names(b)
    assert hoist(module, MACHINE).transfers == 0
    assert names(b) == order


def test_arguments_leave_room_for_launch_registers() -> None:
    def module(count: int) -> ModuleOp:
        routine = RoutineOp("main", [buffer_type("hbm", 64)] * count)
        return ModuleOp([LaunchOp(60, [0, UNIT_STRIDE]), routine])

    assert emit(module(52), MACHINE).launch == {60: (0, UNIT_STRIDE)}
    with pytest.raises(UnsupportedError, match="registers 8 to 59"):
        emit(module(53), MACHINE)


def test_launch_registers_fit_together() -> None:
    twice = ModuleOp([LaunchOp(60, [0, 8]), LaunchOp(60, [0, 8]), RoutineOp("main")])
    with pytest.raises(ValueError, match="launch register 60 is given twice"):
        emit(twice, MACHINE)
    uneven = ModuleOp([LaunchOp(60, [0, 8]), LaunchOp(61, [0, 8, 16]), RoutineOp("main")])
    with pytest.raises(ValueError, match="different numbers of units"):
        emit(uneven, MACHINE)


def test_a_peer_side_has_one_register() -> None:
    """A cache is addressed through the register of its batch row, so no second register can name the unit."""
    b = Spmd(2)
    b.globals["k"] = GlobalOp("k", "hbm", 64 * PIECE, "cache", row_bytes=32 * PIECE)
    x = b.local(2 * PIECE)
    loops = ((2, UNIT_STRIDE, PIECE), (64, PIECE, DM_SLICE_STRIDE))
    desc = Dma(Endpoint(Space.PEER_HBM, 0, OWN), Endpoint(Space.DM, 0), loops, PIECE)
    b.current.block.add_op(DmaOp(desc, b.get("k"), x))
    with pytest.raises(ValueError, match="one register"):
        b.emit()
