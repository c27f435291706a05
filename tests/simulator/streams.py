"""Small programs for several units: publish, notify, wait, pull; sums over all units."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from backend_rngd.isa.descriptors import (
    DM_SLICE_STRIDE,
    UNIT_STRIDE,
    After,
    Alu,
    Call,
    Commit,
    Context,
    Descriptor,
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
from runtime_sim.group import Launch
from runtime_sim.system import System

MACHINE = load_machine()
SLICES = 4
OWN = 63  # launch register: the own unit's number times UNIT_STRIDE
WORDS = 64  # f32 values of a slice
ROW = WORDS * 4
IN, MINE, ALL, SUM = 0, 4096, 8192, 65536  # DM: input, published, gathered from all units, result
INPUT, OUTPUT = 0, 8192  # HBM
READY, FREE = 0, 1  # semaphores


def load(target: int, address: int = INPUT, register: int = 0) -> Dma:
    """HBM -> DM, `ROW` bytes a slice."""
    loops = ((SLICES, ROW, DM_SLICE_STRIDE),)
    return Dma(Endpoint(Space.HBM, address, register), Endpoint(Space.DM, target), loops, ROW)


def store(source: int, address: int = OUTPUT, register: int = 0) -> Dma:
    """DM -> HBM."""
    loops = ((SLICES, DM_SLICE_STRIDE, ROW),)
    return Dma(Endpoint(Space.DM, source), Endpoint(Space.HBM, address, register), loops, ROW)


def scale(source: int, target: int, factor: float) -> Exec:
    """target = source * factor in every slice."""
    fetch = Fetch(source, ((WORDS // 8, 32), (8, 4)), Dtype.F32, 8)
    times = VectorOp(Alu.FP_MUL0, Op.MUL, Mode.STREAM_OPERAND, Operand(Source.CONST, factor))
    return Exec(SLICES, fetch, Commit(target, ((WORDS, 4),), Dtype.F32, 8), None, None, (times,))


def total(source: int, target: int, units: int) -> Exec:
    """target[i] = sum over u of source[u, i]: the engine reduces the innermost axis, so fetch with units inside."""
    fetch = Fetch(source, ((WORDS // 8, 32), (units, ROW), (8, 4)), Dtype.F32, 8)
    add = VectorOp(Alu.REDUCE, Op.ADD, Mode.UNARY, count=units, inner=8)
    return Exec(SLICES, fetch, Commit(target, ((WORDS, 4),), Dtype.F32, 8), None, None, (add,))


def pull(units: int, source: int = MINE, target: int = ALL) -> Dma:
    """DM of every unit -> own DM, in one transfer."""
    loops = ((units, UNIT_STRIDE, ROW), (SLICES, DM_SLICE_STRIDE, DM_SLICE_STRIDE))
    return Dma(Endpoint(Space.PEER_DM, source), Endpoint(Space.DM, target), loops, ROW)


def notify(units: int, semaphore: int, *published: tuple[int, int]) -> Notify:
    """To every other unit of the group."""
    return Notify(0, 0, ((units, 1),), semaphore, published)


def wait(units: int, semaphore: int, *released: tuple[int, int]) -> Wait:
    """For every other unit of the group."""
    return Wait(semaphore, units - 1, released)


def context_of(op: Descriptor) -> Context:
    """Where an operation belongs."""
    if isinstance(op, (Dma, Notify, Wait)):
        return Context.DMA
    return Context.CONTROL if isinstance(op, Call) else Context.MAIN


def routine(name: str, *items: tuple[Descriptor, int, int]) -> Routine:
    """Items are (operation, main instructions and transfers of the routine to wait for)."""
    return Routine(
        name,
        tuple(
            Instruction(context_of(op), After(main, 0, dma), op, i) for i, (op, main, dma) in enumerate(items)
        ),
    )  # fmt: skip


def stream_of(*routines: Routine) -> Stream:
    """A stream with enough locations."""
    most = max(len(r.instructions) for r in routines)
    return Stream(0, SLICES, routines, tuple(f"layer.{i}|op" for i in range(most)))


def all_reduce(units: int, rounds: int = 1) -> Stream:
    """The sum over units of their inputs, doubled, `rounds` times in a row: one-shot pull by every unit.

    Round k publishes, tells the others, waits for theirs, pulls, says that it has read, sums, and waits until all have
    read before the next round writes the published buffer again.
    """
    own = (MINE, ROW)
    main = [Instruction(Context.CONTROL, After(), Call(1, ()), 0)]
    main += [Instruction(Context.CONTROL, After(call=k + 1), Call(2, ()), 1) for k in range(rounds)]
    main.append(Instruction(Context.CONTROL, After(call=rounds + 1), Call(3, ()), 2))
    begin = routine("begin", (load(IN), 0, 0))
    step = routine(
        "step",
        (scale(IN, MINE, 2.0), 0, 0),  # main 1
        (notify(units, READY, own), 1, 0),  # dma 1
        (wait(units, READY), 0, 0),  # dma 2
        (pull(units), 0, 0),  # dma 3
        (notify(units, FREE), 0, 0),  # dma 4
        (wait(units, FREE, own), 0, 0),  # dma 5
        (total(ALL, SUM, units), 0, 3),  # main 2
        (scale(SUM, IN, 1.0), 2, 0),  # main 3
    )
    end = routine("end", (store(IN), 0, 0))
    return stream_of(Routine("main", tuple(main)), begin, step, end)


def two_rounds(units: int, rewrite_after: int = 6) -> Stream:
    """Two all-reduces in one routine; the second publishes into the same buffer once `rewrite_after` transfers,
    notifies and waits are complete: 6 is the wait for the readers, 4 only the own reading."""
    own = (MINE, ROW)
    return stream_of(
        routine(
            "main",
            (load(IN), 0, 0),  # dma 1
            (scale(IN, MINE, 2.0), 0, 1),  # main 1
            (notify(units, READY, own), 1, 0),  # dma 2
            (wait(units, READY), 0, 0),  # dma 3
            (pull(units), 0, 0),  # dma 4
            (notify(units, FREE), 0, 0),  # dma 5
            (wait(units, FREE, own), 0, 0),  # dma 6
            (total(ALL, IN, units), 0, 4),  # main 2
            (scale(IN, MINE, 2.0), 2, rewrite_after),  # main 3
            (notify(units, READY, own), 3, 0),  # dma 7
            (wait(units, READY), 0, 0),  # dma 8
            (pull(units), 2, 0),  # dma 9
            (notify(units, FREE), 0, 0),  # dma 10
            (wait(units, FREE, own), 0, 0),  # dma 11
            (total(ALL, SUM, units), 0, 9),  # main 4
            (store(SUM), 4, 0),  # dma 12
        )
    )


def system(units: int, pipeline: int = 1, checks: bool = True) -> System:
    """Units with small windows."""
    return System(MACHINE, units, pipeline, 1, SLICES, 1 << 16, 0, checks)


def inputs(units: int, seed: int = 0) -> np.ndarray:
    """Whole numbers [unit, slice, word], so that sums are exact."""
    return np.random.default_rng(seed).integers(-8, 9, (units, SLICES, WORDS)).astype(np.float32)


def run(
    stream: Stream, values: np.ndarray, seed: int | None = None, races: bool = True, checks: bool = True
) -> np.ndarray:
    """Every unit's output."""
    machine = system(len(values), checks=checks)
    for unit, own in zip(machine.units, values, strict=True):
        unit.window.write(INPUT, own)
    work = {u: [Launch(stream, {OWN: u.place.rank * UNIT_STRIDE})] for u in machine.units}
    machine.run(work, races=races, seed=seed)
    raw = [unit.window.read(OUTPUT, SLICES * ROW) for unit in machine.units]
    return np.stack([r.view(np.float32).reshape(SLICES, WORDS) for r in raw])


def without(stream: Stream, number: int, index: int) -> Stream:
    """The stream without one instruction; waits of its routine count the remaining ones."""
    body = stream.routines[number]
    gone = body.instructions[index]
    dma_before = sum(i.context == Context.DMA for i in body.instructions[: index + 1])
    kept: list[Instruction] = []
    for i, item in enumerate(body.instructions):
        if i == index:
            continue
        assert gone.context == Context.DMA
        after = item.after
        if i > index and after.dma >= dma_before:
            after = replace(after, dma=after.dma - 1)
        kept.append(replace(item, after=after))
    routines = list(stream.routines)
    routines[number] = replace(body, instructions=tuple(kept))
    return replace(stream, routines=tuple(routines))


def changed(stream: Stream, number: int, index: int, change: Callable[[Instruction], Instruction]) -> Stream:
    """The stream with one instruction changed."""
    body = list(stream.routines[number].instructions)
    body[index] = change(body[index])
    routines = list(stream.routines)
    routines[number] = replace(routines[number], instructions=tuple(body))
    return replace(stream, routines=tuple(routines))


def positions(stream: Stream, *kinds: type) -> Iterator[tuple[int, int]]:
    """(routine, index) of every instruction of these kinds."""
    for number, body in enumerate(stream.routines):
        for index, item in enumerate(body.instructions):
            if isinstance(item.what, kinds):
                yield number, index


def expected(values: np.ndarray, rounds: int) -> np.ndarray:
    """What `all_reduce` computes."""
    for _ in range(rounds):
        values = np.broadcast_to(2 * values.sum(0), values.shape)
    return values
