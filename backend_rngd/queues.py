"""Plays a stretch of instructions on the three in-order queues of a unit, by the closed forms of engine time.

`hoist` decides with it which transfers go first; the search for mappings takes the time that it finds as prediction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from xdsl.ir import SSAValue

from backend_rngd.attributes import bytes_of, space_of
from backend_rngd.dialect import AllocOp, DmaOp, InstructionOp
from backend_rngd.instructions import CONTEXTS
from backend_rngd.isa.descriptors import Context, Dma, Exec, LoadTrf, LoadVrf, Memset, Notify, Wait
from backend_rngd.isa.footprint import Interval, footprint
from backend_rngd.isa.hazards import SHARED_SPACES
from backend_rngd.machine import Machine
from backend_rngd.machine.crowd import crowded, judge
from backend_rngd.machine.formulas import sync_time, unit_cycles
from backend_rngd.sync_ops import SyncOp

PATIENCE = 2  # starts of a transfer for which the queue rather waits for other units than that weights hold them up
Intervals = tuple[Interval, ...]
Cycles = Callable[[InstructionOp, Context], float]
"""Time of an instruction that has its engines for itself."""


@dataclass
class Item:
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


class _Accesses:
    """Who touched a buffer last: for each context, positions of reads and writes by the bytes they touched."""

    def __init__(self) -> None:
        self.reads: tuple[dict[Intervals, int], ...] = ({}, {}, {})
        self.writes: tuple[dict[Intervals, int], ...] = ({}, {}, {})

    def note(self, position: int, context: int, intervals: Intervals, write: bool, needs: list[int]) -> None:
        """Raise `needs` to the last instruction of every other context that conflicts with this access."""
        for other in range(3):
            if other == context:
                continue
            tables = (self.writes[other], self.reads[other]) if write else (self.writes[other],)
            for table in tables:
                for touched, at in table.items():
                    if at > needs[other] and _overlap(touched, intervals):
                        needs[other] = at
        (self.writes if write else self.reads)[context][intervals] = position


def _overlap(a: Intervals, b: Intervals) -> bool:
    if len(a) == len(b) == 1:
        return a[0][0] < b[0][1] and b[0][0] < a[0][1]
    return any(low < end and first < high for low, high in a for first, end in b)


def items_of(segment: Sequence[InstructionOp], constants: set[SSAValue], cycles: Cycles) -> list[Item]:
    """The instructions of a segment with what they wait for, as if every buffer had a place of its own. constants:
    buffers that no instruction writes; transfers from them into locals are free to move."""
    notifies: dict[int, int] = {}  # semaphore -> position of the last notify
    buffers: dict[SSAValue, _Accesses] = {}
    touched: dict[SSAValue, int] = {}  # last instruction at a buffer that may not move; others keep their order
    begun: set[SSAValue] = set()
    items: list[Item] = []
    for i, op in enumerate(segment):
        context = CONTEXTS[op.context.data]
        needs = [-1, -1, -1]
        for value, space, intervals, write in _touched(op):
            if space in SHARED_SPACES:
                buffers.setdefault(value, _Accesses()).note(i, int(context), intervals, write, needs)
        item = Item(op, context, cycles(op, context), tuple(n for n in needs if n >= 0))
        if isinstance(op, DmaOp) and op.index is None and op.source in constants and space_of(op.destination) == "dm":
            item.free = isinstance(op.destination.owner, AllocOp) or op.destination in begun
            item.earliest = touched.get(op.destination, -1) + 1
            item.nbytes = bytes_of(op.destination) if op.destination not in begun else 0
        desc = op.descriptor
        if isinstance(desc, Notify):
            notifies[desc.semaphore] = i
        elif isinstance(desc, Wait):
            item.notify = notifies.get(desc.semaphore, -1)
        begun.update(op.operands)
        if not item.free:
            touched.update(dict.fromkeys(op.operands, i))
        items.append(item)
    return items


def _touched(op: InstructionOp) -> list[tuple[SSAValue, str, Intervals, bool]]:
    """Buffers with the bytes touched in them; of notifies and waits the whole buffers."""
    if isinstance(op, SyncOp):
        return [(value, space_of(value), ((0, bytes_of(value)),), role == "arrived") for role, value in op.roles()]
    found = zip(op.touched(), footprint(op.descriptor), strict=True)
    return [(value, access.space, access.intervals, access.write) for (_, value), access in found]


def measured(machine: Machine, units: int) -> Cycles:
    """Times on machines like this one as measured, of one of `units` units that do the same; of a wait what it takes
    when all have arrived."""
    name, share = machine.name, min(units, machine.pes_per_chip)
    notify = float(judge(name).notify_issue_cycles)

    def cycles(op: InstructionOp, context: Context) -> float:
        desc = op.descriptor
        if isinstance(desc, Dma):
            return crowded(desc, name, share)
        if isinstance(desc, Notify):
            return notify
        if isinstance(desc, Wait):
            return 0.0
        assert isinstance(desc, (Exec, LoadTrf, LoadVrf, Memset))
        return _pass_cycles(desc, context, name)

    return cycles


@lru_cache(maxsize=1 << 14)
def _pass_cycles(desc: Exec | LoadTrf | LoadVrf | Memset, context: Context, name: str) -> float:
    return unit_cycles(desc, context, judge(name)).total


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


def _ready(item: Item, items: Sequence[Item], latency: float) -> float | None:
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


def _due(items: Sequence[Item]) -> list[int]:
    """Position of the first instruction of the main context, or notify of other units, that waits for an instruction,
    directly or not; of a transfer also for those behind it in its queue."""
    due = [len(items)] * len(items)
    for i in range(len(items) - 1, -1, -1):
        item = items[i]
        if item.context == Context.MAIN or isinstance(item.op.descriptor, Notify):
            due[i] = i  # others wait for a notify
        for j in (*item.needs, item.notify) if item.notify >= 0 else item.needs:
            due[j] = min(due[j], due[i])
    soonest = {True: len(items), False: len(items)}
    for i in range(len(items) - 1, -1, -1):
        if items[i].context == Context.DMA:
            due[i] = soonest[items[i].free] = min(soonest[items[i].free], due[i])
    return due


def play(items: Sequence[Item], units: int, machine: Machine, moves: Callable[[int, int], bool]) -> None:
    """Set when every instruction finishes, by list scheduling: free transfers go first where they can start earlier,
    or where the main context waits for them earlier.

    moves(head, ahead): whether the free transfer `head` may move before the transfer `ahead`; if so, it does. It stays
    where it is if it would hold up a wait for the other of `units` units that is nearly over.
    """
    machine = judge(machine.name)
    latency = sync_time(units, -(-units // machine.pes_per_chip), machine)  # from a notify to the wait that answers it
    patience = PATIENCE * machine.dma_startup_cycles
    due = _due(items)
    queues = {
        c: _Queue([i for i, item in enumerate(items) if item.context == c and not item.free]) for c in CONTEXTS.values()
    }
    waiting = _Queue([i for i, item in enumerate(items) if item.free])
    dma = queues[Context.DMA]
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
            ready = _ready(items[head], items, latency)
            begin = math.inf if ready is None else max(ready, dma.time)
            holds_up = begin + patience > soon and begin + items[head].cycles > soon + patience
            sooner = best is None or begin < best[0]
            urgent = best is not None and best[2] is dma and begin <= best[0] and due[head] < due[best[1]]
            may = ready is not None and not holds_up and (sooner or urgent)
            if may and (ahead is None or ahead > head or moves(head, ahead)):
                best = (begin, head, waiting)
        if best is None:
            return
        start, position, queue = best
        items[position].finish = start + items[position].cycles
        queue.next += 1
        if queue is waiting or queue is dma:
            dma.time = items[position].finish
        else:
            queue.time = items[position].finish
