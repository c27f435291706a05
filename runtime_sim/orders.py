"""Races between contexts, found by running: the same program in other orders that its waits allow.

The hardware may let a context run ahead as far as the waits permit. `check_orders` runs the program once in program
order and again with every context in turn as eager or as late as allowed, and compares what every instruction writes.
A difference means that a wait is missing; the error names the instruction that went wrong and the one it raced with.
"""

from __future__ import annotations

import itertools
import random
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from backend_rngd.isa.descriptors import Call, Context, Stream
from backend_rngd.isa.footprint import Access, footprint
from runtime_sim.errors import SimulationError
from runtime_sim.flatten import Flat, flatten
from runtime_sim.functional import Program, Unit, moved
from runtime_sim.workers import single_threaded_blas

Picker = Callable[[Sequence[int]], int]


@dataclass(frozen=True)
class Order:
    """How to choose among the contexts whose next instruction may run."""

    name: str
    pick: Picker


def eager_orders() -> list[Order]:
    """Every ranking of the three contexts: the first one runs ahead as far as it can, the last one lags."""
    contexts = (int(Context.MAIN), int(Context.SUB), int(Context.DMA))
    return [
        Order(
            " before ".join(Context(c).name.lower() for c in ranking),
            lambda ready, ranking=ranking: next(c for c in ranking if c in ready),
        )
        for ranking in itertools.permutations(contexts)
    ]


def random_orders(count: int, seed: int = 0) -> list[Order]:
    """Reproducible random choices."""
    return [Order(f"random {seed + k}", random.Random(seed + k).choice) for k in range(count)]


def sequence(flat: Flat, pick: Picker) -> Iterator[int]:
    """Executed instructions of the first unit in an order the waits allow."""
    queues = [np.nonzero((flat.unit == 0) & (flat.context == c))[0].tolist() for c in range(3)]
    need = flat.need.tolist()
    done = [0, 0, 0]
    total = sum(len(q) for q in queues)
    for _ in range(total):
        ready = [
            c
            for c in range(3)
            if done[c] < len(queues[c]) and all(n <= d for n, d in zip(need[queues[c][done[c]]], done, strict=True))
        ]
        if not ready:
            stuck = [queues[c][done[c]] for c in range(3) if done[c] < len(queues[c])]
            raise SimulationError(SimulationError.DEADLOCK, "no context can continue", site=flat.site(stuck[0]))
        chosen = pick(ready)
        yield queues[chosen][done[chosen]]
        done[chosen] += 1


def run_in_order(
    unit: Unit, stream: Stream, flat: Flat, order: Sequence[int], registers: Mapping[int, int] | None = None
) -> list[int]:
    """Execute instructions in the given order; returns a checksum of what each one wrote, in program order."""
    for register, value in (registers or {}).items():
        unit.registers[register] = int(value)
    program = unit.program(stream)
    inside = _registers(unit, stream, flat)
    sums = [0] * len(flat)
    saved = unit.registers
    checks, unit.checks = unit.checks, False
    try:
        with np.errstate(all="ignore"), single_threaded_blas():
            for i in order:
                unit.registers = inside[int(flat.call[i])]
                routine, index = int(flat.routine[i]), int(flat.index[i])
                unit.step(program, routine, index)
                sums[i] = _checksum(program, unit, routine, index)
    finally:
        unit.registers = saved
        unit.checks = checks
    return sums


def _registers(unit: Unit, stream: Stream, flat: Flat) -> list[list[int]]:
    """Registers inside every executed call."""
    out: list[list[int]] = []
    for call in flat.calls:
        if call.parent < 0:
            out.append(unit.registers)
            continue
        caller = flat.calls[call.parent]
        what = stream.routines[caller.routine].instructions[call.index].what
        assert isinstance(what, Call)
        out.append(moved(out[call.parent], what))
    return out


def _checksum(program: Program, unit: Unit, routine: int, index: int) -> int:
    return zlib.crc32(np.ascontiguousarray(program.plan(unit, routine, index).written(unit)).tobytes())


def check_orders(
    stream: Stream,
    make_unit: Callable[[], Unit],
    registers: Mapping[int, int] | None = None,
    orders: Sequence[Order] | None = None,
) -> int:
    """Run in program order and in other legal orders; returns the number of orders compared.

    make_unit: a new unit with the inputs in its memories, the same every time. Raises SimulationError (race) naming the
    instruction whose result changed, the instruction it raced with and the order.
    """
    flat = flatten((stream,))
    straight = range(len(flat))
    expected_unit = make_unit()
    expected = run_in_order(expected_unit, stream, flat, straight, registers)
    chosen = list(orders) if orders is not None else [*eager_orders(), *random_orders(2)]
    for order in chosen:
        steps = list(sequence(flat, order.pick))
        unit = make_unit()
        sums = run_in_order(unit, stream, flat, steps, registers)
        for i in straight:
            if sums[i] != expected[i]:
                raise _race(flat, stream, i, steps, order, expected_unit)
        for memory, same in ((unit.dm, expected_unit.dm), (unit.trf, expected_unit.trf), (unit.vrf, expected_unit.vrf)):
            if not np.array_equal(memory.bytes, same.bytes):
                raise _overwritten(flat, stream, steps, order, expected_unit)
    return len(chosen)


def _accesses(flat: Flat, stream: Stream, i: int, registers: list[int]) -> list[Access]:
    what = stream.routines[int(flat.routine[i])].instructions[int(flat.index[i])].what
    out: list[Access] = []
    for access in footprint(what):
        shift = registers[access.register] if access.space == "hbm" else 0
        moved_by = tuple((low + shift, high + shift) for low, high in access.intervals)
        out.append(Access(access.space, moved_by, access.write))
    return out


def _swapped(flat: Flat, steps: Sequence[int], i: int) -> list[int]:
    """Instructions of other contexts that ran on the other side of `i` than in program order, nearest first."""
    position = {step: n for n, step in enumerate(steps)}
    out = [j for j in range(len(flat)) if flat.context[j] != flat.context[i] and (j < i) != (position[j] < position[i])]
    return sorted(out, key=lambda j: abs(j - i))


def _conflict(a: Sequence[Access], b: Sequence[Access]) -> str | None:
    for x in a:
        for y in b:
            if x.space != y.space or not (x.write or y.write):
                continue
            for low, high in x.intervals:
                for other_low, other_high in y.intervals:
                    if low < other_high and other_low < high:
                        return f"{x.space.upper()} bytes [{max(low, other_low)}, {min(high, other_high)})"
    return None


def _race(flat: Flat, stream: Stream, i: int, steps: Sequence[int], order: Order, unit: Unit) -> SimulationError:
    inside = _registers(unit, stream, flat)
    mine = _accesses(flat, stream, i, inside[int(flat.call[i])])
    for j in _swapped(flat, steps, i):
        where = _conflict(mine, _accesses(flat, stream, j, inside[int(flat.call[j])]))
        if where:
            return _error(flat, i, j, where, order)
    what = f"its result depends on the order of the contexts ({order.name})"
    return SimulationError(SimulationError.RACE, what, "add the missing wait", flat.site(i))


def _overwritten(flat: Flat, stream: Stream, steps: Sequence[int], order: Order, unit: Unit) -> SimulationError:
    inside = _registers(unit, stream, flat)
    accesses = [[a for a in _accesses(flat, stream, i, inside[int(flat.call[i])]) if a.write] for i in range(len(flat))]
    for i in range(len(flat)):
        for j in _swapped(flat, steps, i):
            where = _conflict(accesses[i], accesses[j]) if j < i else None
            if where:
                return _error(flat, i, j, where, order)
    return SimulationError(SimulationError.RACE, f"memories differ after the order {order.name}")


def _error(flat: Flat, i: int, j: int, where: str, order: Order) -> SimulationError:
    first, second = (j, i) if j < i else (i, j)
    names = [Context(int(flat.context[k])).name.lower() for k in (first, second)]
    return SimulationError(
        SimulationError.RACE,
        f"the {names[1]} instruction does not wait for the {names[0]} instruction at {flat.site(first)}, which touches "
        f"the same {where}; with {order.name} the result differs",
        "add the missing wait",
        flat.site(second),
    )
