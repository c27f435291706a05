"""Gives every buffer an address: globals first, then each routine's locals by liveness.

before: ``%a = rngd.alloc "a" align 64 : !rngd.buffer<dm, 64>``
after:  ``%a = rngd.alloc "a" align 64 address 4096 : !rngd.buffer<dm, 64>``

A local lives from its first to its last use in its routine. Locals that live across a call lie below the area of the
callee. Memory is reused as late as possible (next fit), so that a transfer into a new buffer seldom waits for readers
of an old one; best fit and largest-first follow when next fit does not fit.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from xdsl.dialects.builtin import IntegerAttr, ModuleOp, i64
from xdsl.ir import Operation

from backend_rngd.dialect import SPACES, AllocOp, BufferType, CallOp, GetGlobalOp, GlobalOp, ProbeOp, RoutineOp
from backend_rngd.hoist import hoist, undo
from backend_rngd.machine import Machine
from ir.errors import Problem, UserError

SMALL = 4  # a buffer is small if the largest one is more than so many times larger
SMALL_ROOM = (2.0, 1.25)  # times the bytes of small buffers alive at once, so that a place is not reused at once


@dataclass(frozen=True)
class Request:
    """A buffer to place: lives at positions start..end (inclusive) of its routine."""

    size: int
    align: int
    start: int
    end: int


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


# Pure placement ------------------------------------------------------------------------------------------------------
class _Active:
    """Placed buffers that may still be alive, sorted by address."""

    def __init__(self) -> None:
        self.spans: list[tuple[int, int, int]] = []  # (address, end address, last position)

    def retire(self, position: int) -> None:
        """Forget buffers that died before `position`."""
        if any(last < position for _, _, last in self.spans):
            self.spans = [s for s in self.spans if s[2] >= position]

    def add(self, address: int, size: int, last: int) -> None:
        """Insert a buffer."""
        bisect.insort(self.spans, (address, address + size, last))

    def gaps(self, base: int, capacity: int) -> list[tuple[int, int]]:
        """Free ranges, ascending."""
        out: list[tuple[int, int]] = []
        at = base
        for low, high, _ in self.spans:
            if low > at:
                out.append((at, low))
            at = max(at, high)
        if capacity > at:
            out.append((at, capacity))
        return out


def next_fit(requests: Sequence[Request], base: int, capacity: int) -> list[int] | None:
    """Addresses going round the area in order of first use, or None if one does not fit."""
    out = [0] * len(requests)
    active = _Active()
    pointer = base
    for i in sorted(range(len(requests)), key=lambda i: (requests[i].start, -requests[i].size)):
        r = requests[i]
        active.retire(r.start)
        gaps = active.gaps(base, capacity)
        ahead = [(max(low, pointer), high) for low, high in gaps if high > pointer]
        found = next((a for low, high in (*ahead, *gaps) if (a := _up(low, r.align)) + r.size <= high), None)
        if found is None:
            return None
        out[i] = found
        pointer = found + r.size
        active.add(found, r.size, r.end)
    return out


def best_fit(requests: Sequence[Request], base: int, capacity: int) -> list[int] | None:
    """Addresses in the smallest gap that is large enough, in order of first use, or None."""
    out = [0] * len(requests)
    active = _Active()
    for i in sorted(range(len(requests)), key=lambda i: (requests[i].start, -requests[i].size)):
        r = requests[i]
        active.retire(r.start)
        fitting = [
            (high - low, a) for low, high in active.gaps(base, capacity) if (a := _up(low, r.align)) + r.size <= high
        ]
        if not fitting:
            return None
        out[i] = min(fitting)[1]
        active.add(out[i], r.size, r.end)
    return out


def largest_first(requests: Sequence[Request], base: int, capacity: int) -> list[int] | None:
    """Addresses lowest first for the largest buffers (quadratic, packs best), or None."""
    out = [0] * len(requests)
    placed: list[tuple[int, int, int, int]] = []  # (address, end address, start, end)
    for i in sorted(range(len(requests)), key=lambda i: (-requests[i].size, requests[i].start)):
        r = requests[i]
        at = base
        for low, high, start, end in placed:
            if start > r.end or end < r.start:
                continue
            if _up(at, r.align) + r.size <= low:
                break
            at = max(at, high)
        at = _up(at, r.align)
        if at + r.size > capacity:
            return None
        out[i] = at
        bisect.insort(placed, (at, at + r.size, r.start, r.end))
    return out


def apart(requests: Sequence[Request], base: int, capacity: int) -> list[int] | None:
    """`next_fit` for large buffers, and at the end of the area for small ones, or None: small ones between large ones
    would keep a buffer of the same size from the place of one that has been read."""
    limit = max((r.size for r in requests), default=0) // SMALL
    small = [i for i, r in enumerate(requests) if r.size < limit]
    large = [i for i, r in enumerate(requests) if r.size >= limit]
    most = peak_bytes([requests[i] for i in small])
    for share in SMALL_ROOM:
        end = max(base, capacity - int(share * most))
        above = next_fit([requests[i] for i in small], end, capacity)
        below = next_fit([requests[i] for i in large], base, end)
        if above is not None and below is not None:
            found = dict(zip([*small, *large], [*above, *below], strict=True))
            return [found[i] for i in range(len(requests))]
    return None


def peak_bytes(requests: Sequence[Request]) -> int:
    """Most bytes that are alive at once."""
    events: dict[int, int] = {}
    for r in requests:
        events[r.start] = events.get(r.start, 0) + r.size
        events[r.end + 1] = events.get(r.end + 1, 0) - r.size
    return max(itertools.accumulate(events[at] for at in sorted(events)), default=0)


Strategy = Callable[[Sequence[Request], int, int], list[int] | None]
REUSE_LATE: tuple[Strategy, ...] = (apart, next_fit, best_fit, largest_first)
REUSE_SOON: tuple[Strategy, ...] = (best_fit, largest_first)


def fit(requests: Sequence[Request], base: int, capacity: int, strategies: Sequence[Strategy]) -> list[int] | None:
    """Addresses by the first strategy that finds room, or None."""
    for strategy in strategies:
        if (found := strategy(requests, base, capacity)) is not None:
            return found
    return None


# The IR --------------------------------------------------------------------------------------------------------------
@dataclass
class _Local:
    op: AllocOp
    request: Request
    crosses: bool  # lives across a call


def _locals(routine: RoutineOp) -> tuple[list[_Local], list[str]]:
    """Locals with lifetimes, and the routines called."""
    first: dict[Operation, int] = {}
    last: dict[Operation, int] = {}
    calls: list[int] = []
    callees: list[str] = []
    allocs: list[AllocOp] = []
    for position, op in enumerate(routine.block.ops):
        if isinstance(op, AllocOp):
            allocs.append(op)
            continue
        if isinstance(op, CallOp):
            calls.append(position)
            callees.append(op.callee.string_value())
        for operand in op.operands:
            owner = operand.owner
            if isinstance(owner, AllocOp):
                if not isinstance(op, ProbeOp):
                    first.setdefault(owner, position)
                last[owner] = position
    out: list[_Local] = []
    for op in allocs:
        if op not in first:
            continue  # never used by an instruction
        start, end = first[op], last[op]
        kind = op.result.type
        at = bisect.bisect_left(calls, start)
        crosses = at < len(calls) and calls[at] <= end
        request = Request(kind.nbytes.data, op.align.value.data, start, end)
        out.append(_Local(op, request, crosses))
    return out, callees


def _capacity(machine: Machine, space: str) -> int:
    return {
        "hbm": machine.hbm_usable_bytes,
        "dm": machine.dm_slice_bytes,
        "trf": machine.trf_bytes_per_slice,
        "vrf": machine.vrf_bytes,
    }[space]


def place_globals(module: ModuleOp, machine: Machine, hbm_base: int = 0) -> dict[str, int]:
    """Address of every global without one; returns the first free byte of each memory.

    HBM globals keep an address that is set already (a map shared by the programs of an artifact); the others follow
    behind `hbm_base` and everything that is set, aligned to `machine.hbm_map_alignment`.
    """
    free = {space: 0 for space in SPACES}
    free["hbm"] = hbm_base
    found = [op for op in module.body.block.ops if isinstance(op, GlobalOp)]
    for op in found:
        if op.address is not None:
            space = op.buffer_type.space.data
            free[space] = max(free[space], op.address.value.data + op.buffer_type.nbytes.data)
    for op in found:
        if op.address is None:
            space = op.buffer_type.space.data
            align = machine.hbm_map_alignment if space == "hbm" else machine.dm_alignment
            at = _up(free[space], align)
            op.address = IntegerAttr(at, i64)
            free[space] = at + op.buffer_type.nbytes.data
    for space in SPACES:
        if free[space] > _capacity(machine, space):
            sizes = [(op.sym_name.data, op.buffer_type) for op in found if op.buffer_type.space.data == space]
            raise UserError([_does_not_fit(space, "global buffers", sizes, machine)])
    return free


def _does_not_fit(space: str, what: str, sizes: list[tuple[str, BufferType]], machine: Machine) -> Problem:
    total = sum(kind.nbytes.data for _, kind in sizes)
    largest = sorted(sizes, key=lambda s: -s[1].nbytes.data)[:5]
    names = ", ".join(f"{name or '(unnamed)'} {kind.nbytes.data:,} B" for name, kind in largest)
    where = "HBM" if space == "hbm" else f"{space.upper()} of a slice"
    fix = (
        "use more cards, quantized weights or a smaller KV cache"
        if space == "hbm"
        else "use a smaller bucket (batch, input length or attention size)"
    )
    return Problem(
        f"{what} do not fit in {where}",
        f"{total:,} B are live at once, {_capacity(machine, space):,} B exist; the largest are {names}",
        fix,
    )


def _peak(found: Sequence[_Local]) -> list[_Local]:
    """The locals that are alive where most bytes are."""
    events: dict[int, int] = {}
    for item in found:
        events[item.request.start] = events.get(item.request.start, 0) + item.request.size
        events[item.request.end + 1] = events.get(item.request.end + 1, 0) - item.request.size
    level = best = at = 0
    for position in sorted(events):
        level += events[position]
        if level > best:
            best, at = level, position
    return [item for item in found if item.request.start <= at <= item.request.end]


PREFETCH_SHARES = (0.9, 0.7)  # of DM that may be in use where a transfer moved forward; less if that does not fit


def place(module: ModuleOp, machine: Machine, hbm_base: int = 0, prefetch: bool = True) -> dict[str, int]:
    """Set the address of every global and of every local that is used; returns the highest byte used of each memory.

    prefetch: first move transfers of weights forward (see `hoist`) as far as memory allows. Raises UserError if memory
    is too small, naming the largest buffers that are live together.
    """
    for share in PREFETCH_SHARES if prefetch else ():
        moves = hoist(module, machine, share)
        try:
            return place_in_order(module, machine, hbm_base)
        except UserError:
            undo(moves)
    return place_in_order(module, machine, hbm_base)


def place_in_order(module: ModuleOp, machine: Machine, hbm_base: int = 0) -> dict[str, int]:
    """`place` without moving anything."""
    free = place_globals(module, machine, hbm_base)
    routines = {op.sym_name.data: op for op in module.body.block.ops if isinstance(op, RoutineOp)}
    analysed = {name: _locals(op) for name, op in routines.items()}
    base: dict[str, dict[str, int]] = {name: dict(free) for name in routines}
    top = dict(free)
    problems: list[Problem] = []
    for name in _callers_first(analysed):
        found, callees = analysed[name]
        for space in SPACES:
            here = [item for item in found if item.op.result.type.space.data == space]
            low, capacity = base[name][space], _capacity(machine, space)
            crossing = [item for item in here if item.crosses]
            inner = [item for item in here if not item.crosses]
            strategies = REUSE_SOON if space == "hbm" else REUSE_LATE  # no transfer waits for HBM, see isa.hazards
            above = _place_group(crossing, low, capacity, REUSE_SOON)
            end = None if above is None else _place_group(inner, above, capacity, strategies)
            if above is None or end is None:
                group = crossing if above is None else [*_peak(inner), *crossing]
                sizes = [(item.op.buffer_name.data, item.op.result.type) for item in group]
                problems.append(_does_not_fit(space, f"buffers of routine {name}", sizes, machine))
                continue
            top[space] = max(top[space], end)
            for callee in callees:
                base[callee][space] = max(base[callee][space], above)
    if problems:
        raise UserError(problems)
    return top


def _place_group(group: Sequence[_Local], low: int, capacity: int, strategies: Sequence[Strategy]) -> int | None:
    """Place locals in [low, capacity); the byte after the highest, or None if they do not fit."""
    found = fit([item.request for item in group], low, capacity, strategies)
    if found is None:
        return None
    for item, address in zip(group, found, strict=True):
        item.op.address = IntegerAttr(address, i64)
    return max([low, *(a + item.request.size for item, a in zip(group, found, strict=True))])


def _callers_first(analysed: dict[str, tuple[list[_Local], list[str]]]) -> list[str]:
    """Routines in an order in which callers come before callees; raises UserError on recursion or unknown callees."""
    order: list[str] = []
    state: dict[str, int] = {}

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name not in analysed:
            raise ValueError(f"routine {path[-1]} calls {name}, which does not exist")
        if state.get(name) == 1:
            raise ValueError(f"routines call each other in a circle: {' -> '.join((*path, name))}")
        if state.get(name) == 2:
            return
        state[name] = 1
        for callee in dict.fromkeys(analysed[name][1]):
            visit(callee, (*path, name))
        state[name] = 2
        order.append(name)

    for name in analysed:
        visit(name, ())
    return order[::-1]


def global_name(op: GetGlobalOp) -> str:
    """Name of the global that a routine reads."""
    return op.symbol.string_value()
