"""Moves transfers of weights forward, so that they fill the times in which the DMA queue would wait for results.

before: ``dma(result of pass 7), dma(weights of pass 8)``: the queue is in order, so the weights wait for pass 7 as well
after:  ``dma(weights of pass 8), dma(result of pass 7)``

A transfer may move if it reads what no instruction writes (weights and constants) and as far as the last instruction
before it that touches its target buffer. Which transfers go first is decided by list scheduling with the closed forms
of engine time, as they were measured; the memory that the longer life of the targets costs is kept within a budget.
Everything else stays in order: transfers that are not free, notifies and waits among them, so that what a wait leaves
idle is filled with weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import BlockArgument, Operation, SSAValue

from backend_rngd.attributes import bytes_of, space_of
from backend_rngd.dialect import AllocOp, CallOp, DmaOp, GetGlobalOp, GlobalOp, InstructionOp, LaunchOp, RoutineOp
from backend_rngd.isa.descriptors import Context, Dma, Exec, LoadTrf, LoadVrf, Memset, Notify, Wait
from backend_rngd.isa.footprint import Access, footprint
from backend_rngd.isa.hazards import Hazards
from backend_rngd.liveness import Live, constant_values, live_bytes
from backend_rngd.machine import Machine, load_machine
from backend_rngd.machine.formulas import dma_time, sync_time, unit_cycles
from backend_rngd.sync_ops import SyncOp

PATIENCE = 2  # starts of a transfer for which the queue rather waits for other units than that weights hold them up
CONTEXTS = {"main": Context.MAIN, "sub": Context.SUB, "dma": Context.DMA}


@dataclass
class _Item:
    """An instruction of a segment (a stretch without calls)."""

    op: InstructionOp
    context: Context
    cycles: float
    needs: tuple[int, ...] = ()  # instructions that must be finished, as positions in the segment
    earliest: int = 0  # first position it may stand at (free transfers only)
    free: bool = False
    notify: int = -1  # a wait: the own notify that it answers; others send theirs at about the same time
    nbytes: int = 0  # DM bytes that live longer if it moves forward
    finish: float = -1.0


@dataclass
class Moves:
    """What was moved: number of transfers, and the most DM bytes they add at any place."""

    transfers: int = 0
    extra_bytes: int = 0
    order: list[tuple[Operation, Operation]] = field(default_factory=list[tuple[Operation, Operation]])


def hoist(module: ModuleOp, machine: Machine, share: float = 0.9) -> Moves:
    """Move transfers in every routine; DM in use stays below `share` of the capacity where a transfer moved.

    Run before `place`. Routines are taken one by one; a buffer that lives across a call counts in the caller only, so
    leave room for it with `share`.
    """
    constants = constant_values(module)
    machine = load_machine(machine.name, mode="silicon")  # the documented rates are not reached
    out = Moves()
    budget = int(machine.dm_slice_bytes * share) - sum(
        op.buffer_type.nbytes.data
        for op in module.body.block.ops
        if isinstance(op, GlobalOp) and op.buffer_type.space.data == "dm"
    )
    latency = _latency(module, machine)
    for routine in module.body.block.ops:
        if isinstance(routine, RoutineOp):
            live = live_bytes(routine)
            for segment in _segments(routine):
                _hoist_segment(segment, live, budget, constants, machine, latency, out)
    return out


def _latency(module: ModuleOp, machine: Machine) -> float:
    """Cycles from a notify to the end of the wait that answers it, when all units of the group are equally far."""
    units = max((len(op.value_list) for op in module.body.block.ops if isinstance(op, LaunchOp)), default=1)
    return sync_time(units, -(-units // machine.pes_per_chip), machine)


def undo(moves: Moves) -> None:
    """Put every moved operation back where it was."""
    for op, before in reversed(moves.order):
        op.detach()
        block = before.parent
        assert block is not None
        block.insert_op_before(op, before)


def _segments(routine: RoutineOp) -> list[list[InstructionOp]]:
    out: list[list[InstructionOp]] = [[]]
    for op in routine.block.ops:
        if isinstance(op, CallOp):
            out.append([])
        elif isinstance(op, InstructionOp):
            out[-1].append(op)
    return [segment for segment in out if segment]


def _virtual(segment: Sequence[InstructionOp]) -> list[list[Access]]:
    """Footprints as if every buffer had a place of its own, so that buffers never conflict with each other."""
    base: dict[SSAValue, int] = {}
    top = {"hbm": 0, "dm": 0, "trf": 0, "vrf": 0}
    out: list[list[Access]] = []
    for op in segment:
        found: list[Access] = []
        for value, access in _touched(op):
            if value not in base:
                space = space_of(value)
                base[value] = top[space]
                top[space] += max(bytes_of(value), 1 << 16)  # TRF accesses span all lanes whatever the buffer's size
            shift = base[value]
            moved = tuple((low + shift, high + shift) for low, high in access.intervals)
            found.append(Access(access.space, moved, access.write))
        out.append(found)
    return out


def _touched(op: InstructionOp) -> list[tuple[SSAValue, Access]]:
    """Buffers with the bytes touched in them; of notifies and waits the whole buffers."""
    if isinstance(op, SyncOp):
        return [
            (value, Access(space_of(value), ((0, bytes_of(value)),), role == "arrived")) for role, value in op.roles()
        ]
    found = zip(op.touched(), footprint(op.descriptor), strict=True)
    return [(value, access) for (_, value), access in found]


def _items(segment: Sequence[InstructionOp], constants: set[SSAValue], machine: Machine) -> list[_Item]:
    accesses = _virtual(segment)
    notifies: dict[int, int] = {}  # semaphore -> position of the last notify
    hazards = Hazards(accesses)
    queues: dict[Context, list[int]] = {c: [] for c in CONTEXTS.values()}
    touched: dict[SSAValue, int] = {}
    items: list[_Item] = []
    for i, (op, access) in enumerate(zip(segment, accesses, strict=True)):
        context = CONTEXTS[op.context.data]
        need = hazards.required(context, access)
        hazards.issue(context, access, hazards.unmet(context, need))
        needs = tuple(queues[c][n - 1] for c, n in zip(queues, need, strict=True) if n)
        item = _Item(op, context, _cycles(op, context, machine), needs)
        if isinstance(op, DmaOp) and op.index is None and op.source in constants and space_of(op.destination) == "dm":
            item.free = isinstance(op.destination.owner, AllocOp) or op.destination in touched
            item.earliest = touched.get(op.destination, -1) + 1
            item.nbytes = bytes_of(op.destination) if op.destination not in touched else 0
        desc = op.descriptor
        if isinstance(desc, Notify):
            notifies[desc.semaphore] = i
        elif isinstance(desc, Wait):
            item.notify = notifies.get(desc.semaphore, -1)
        for value in op.operands:
            touched[value] = i
        queues[context].append(i)
        items.append(item)
    return items


def _cycles(op: InstructionOp, context: Context, machine: Machine) -> float:
    desc = op.descriptor
    if isinstance(desc, Dma):
        return dma_time(desc, machine)
    if isinstance(desc, Notify):
        return float(machine.notify_issue_cycles)
    if isinstance(desc, Wait):
        return 0.0
    assert isinstance(desc, (Exec, LoadTrf, LoadVrf, Memset))
    return unit_cycles(desc, context, machine).total


class _Queue:
    """The instructions of one in-order queue that are still to come."""

    def __init__(self, positions: list[int]) -> None:
        self.positions = positions
        self.next = 0
        self.time = 0.0

    @property
    def head(self) -> int | None:
        """Position of the next instruction, or None."""
        return self.positions[self.next] if self.next < len(self.positions) else None


def _ready(item: _Item, items: Sequence[_Item], latency: float) -> float | None:
    """When everything it needs is finished, or None if some of that has not even started."""
    at = 0.0
    if item.notify >= 0:
        if items[item.notify].finish < 0:
            return None
        at = items[item.notify].finish + latency
    for j in item.needs:
        if items[j].finish < 0:
            return None
        at = max(at, items[j].finish)
    return at


def _hoist_segment(
    segment: Sequence[InstructionOp],
    live: Live,
    budget: int,
    constants: set[SSAValue],
    machine: Machine,
    latency: float,
    moves: Moves,
) -> None:
    items = _items(segment, constants, machine)
    if not any(item.free for item in items):
        return
    origin = live.index[segment[0]]
    before: dict[int, list[int]] = {}  # position -> free transfers that go right before it
    queues = {
        c: _Queue([i for i, item in enumerate(items) if item.context == c and not item.free]) for c in CONTEXTS.values()
    }
    waiting = _Queue([i for i, item in enumerate(items) if item.free])
    dma = queues[Context.DMA]
    patience = PATIENCE * machine.dma_startup_cycles
    while True:
        best: tuple[float, int, _Queue] | None = None
        soon = math.inf  # when a wait that is next in order is over
        for queue in queues.values():
            head = queue.head
            if head is None or (queue is dma and waiting.head is not None and waiting.head < head):
                continue  # a transfer never moves back
            ready = _ready(items[head], items, latency)
            if ready is not None and (best is None or max(ready, queue.time) < best[0]):
                best = (max(ready, queue.time), head, queue)
            if ready is not None and items[head].notify >= 0:
                soon = max(ready, dma.time)
        head = waiting.head
        if head is not None:
            ahead = dma.head
            moved = ahead is not None and ahead < head
            ready = _ready(items[head], items, latency)
            allowed = not moved or (ahead is not None and _fits(items[head], ahead, head, origin, live, budget))
            begin = math.inf if ready is None else max(ready, dma.time)
            holds_up = begin + patience > soon and begin + items[head].cycles > soon + patience
            if ready is not None and allowed and not holds_up and (best is None or begin < best[0]):
                if moved and ahead is not None:
                    before.setdefault(ahead, []).append(head)
                    live.counts[origin + ahead : origin + head] += items[head].nbytes
                best = (begin, head, waiting)
        if best is None:
            break
        start, position, queue = best
        items[position].finish = start + items[position].cycles
        queue.next += 1
        if queue is waiting or queue is dma:
            dma.time = items[position].finish
        else:
            queue.time = items[position].finish
    _apply(segment, items, before, moves)


def _fits(item: _Item, ahead: int, head: int, origin: int, live: Live, budget: int) -> bool:
    if ahead < item.earliest:
        return False
    return not item.nbytes or int(live.counts[origin + ahead : origin + head].max()) + item.nbytes <= budget


def _apply(
    segment: Sequence[InstructionOp], items: Sequence[_Item], before: dict[int, list[int]], moves: Moves
) -> None:
    for position, transfers in before.items():
        target = segment[position]
        block = target.parent
        assert block is not None
        for i in transfers:
            op = segment[i]
            owner = op.operands[-1].owner
            if isinstance(owner, AllocOp) and items[i].nbytes:
                _move(owner, target, moves)
            source = op.operands[0]
            if not isinstance(source, BlockArgument) and isinstance(source.owner, GetGlobalOp):
                _move(source.owner, target, moves)
            _move(op, target, moves)
            moves.transfers += 1
            moves.extra_bytes = max(moves.extra_bytes, items[i].nbytes)


def _move(op: Operation, target: Operation, moves: Moves) -> None:
    """Move `op` to right before `target`, if it stands behind it."""
    if op.is_before_in_block(target):
        return
    following = op.next_op
    block = target.parent
    assert block is not None
    if following is None:
        raise ValueError("an instruction at the end of a block has nothing to be put back before")
    moves.order.append((op, following))
    op.detach()
    block.insert_op_before(op, target)
