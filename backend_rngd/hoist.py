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

from collections.abc import Sequence
from dataclasses import dataclass, field

from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import BlockArgument, Operation, SSAValue

from backend_rngd.dialect import (
    EARLY,
    AllocOp,
    CallOp,
    DmaOp,
    GetGlobalOp,
    GlobalOp,
    InstructionOp,
    LaunchOp,
    RoutineOp,
)
from backend_rngd.liveness import Live, constant_values, live_bytes
from backend_rngd.machine import Machine
from backend_rngd.queues import Item, items_of, measured, play


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
    out = Moves()
    budget = int(machine.dm_slice_bytes * share) - sum(
        op.buffer_type.nbytes.data
        for op in module.body.block.ops
        if isinstance(op, GlobalOp) and op.buffer_type.space.data == "dm"
    )
    early = {op.sym_name.data for op in module.body.block.ops if isinstance(op, GlobalOp) and op.kind.data == EARLY}
    units = max((len(op.value_list) for op in module.body.block.ops if isinstance(op, LaunchOp)), default=1)
    for routine in module.body.block.ops:
        if isinstance(routine, RoutineOp):
            live = live_bytes(routine)
            for segment in _segments(routine):
                _hoist_segment(segment, live, budget, constants, machine, units, early, out)
    return out


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


def _hoist_segment(
    segment: Sequence[InstructionOp],
    live: Live,
    budget: int,
    constants: set[SSAValue],
    machine: Machine,
    units: int,
    early: set[str],
    moves: Moves,
) -> None:
    items = items_of(segment, constants, measured(machine, units))
    if not any(item.free for item in items):
        return
    origin = live.index[segment[0]]
    before: dict[int, list[int]] = {}  # position -> free transfers that go right before it

    def move(head: int, ahead: int) -> bool:
        if _early(segment[ahead], early) or not _fits(items[head], ahead, head, origin, live, budget):
            return False
        before.setdefault(ahead, []).append(head)
        live.counts[origin + ahead : origin + head] += items[head].nbytes
        return True

    play(items, units, machine, move)
    _apply(segment, items, before, moves)


def _early(op: InstructionOp, early: set[str]) -> bool:
    """Whether a transfer may start while the routine before is at work: one that waits for its end stays behind it."""
    if not isinstance(op, DmaOp):
        return False
    owner = op.destination.owner
    return isinstance(owner, GetGlobalOp) and owner.symbol.string_value() in early


def _fits(item: Item, ahead: int, head: int, origin: int, live: Live, budget: int) -> bool:
    if ahead < item.earliest:
        return False
    return not item.nbytes or int(live.counts[origin + ahead : origin + head].max()) + item.nbytes <= budget


def _apply(segment: Sequence[InstructionOp], items: Sequence[Item], before: dict[int, list[int]], moves: Moves) -> None:
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
