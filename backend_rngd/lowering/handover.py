"""Routines `send` and `receive`: activations from a pipeline stage to the next one.

Both stages run the same stream's routines, so a value lies at the same address in both. `receive` tells the sender
that the buffer may be written, waits for the data, and brings it to where the layers expect it; `send` waits for that
permission, writes into the next stage's HBM (over PCIe if it is another card) and notifies. Unit i of a group talks to
unit i of the other one. A program that is walked in chunks calls them once a chunk. One of one stage never does.
"""

from __future__ import annotations

from dataclasses import replace

from backend_rngd.artifact.stages import RECEIVE, SEND
from backend_rngd.isa.descriptors import DM_SLICE_STRIDE, UNIT_STRIDE, Notify, Space, Wait
from backend_rngd.lowering.context import Program
from backend_rngd.lowering.emitter import Emitter, Place
from backend_rngd.lowering.move import feature_loops, move_rows
from backend_rngd.lowering.slots import Slots
from backend_rngd.lowering.tensor import Tensor
from backend_rngd.lowering.values import in_global
from backend_rngd.sync_ops import NotifyOp, WaitOp
from ir.errors import UnsupportedError


def add_handover(program: Program, slots: Slots) -> None:
    """Add both routines for the buffers that go from one layer to the next; nothing if there are none."""
    handed = slots.handed_over()
    if not handed:
        return
    if any(t.rows is None for values in handed.values() for t in values.values()):
        raise UnsupportedError("a value without tokens between layers", "stages hand over tokens", "pass tokens")
    ready, sent = program.semaphore(), program.semaphore()
    for ending, values in handed.items():
        _add(program, ending, values, ready, sent)


def _add(program: Program, ending: str, values: dict[str, Tensor], ready: int, sent: int) -> None:
    own = program.own_unit
    following, previous = program.units * UNIT_STRIDE, 2 * program.units * UNIT_STRIDE
    receive, send = (_emitter(program, name + ending) for name in (RECEIVE, SEND))
    receive.add(NotifyOp(Notify(own, previous, (), ready), location=RECEIVE))
    receive.add(WaitOp(Wait(sent, 1), location=RECEIVE))
    send.add(WaitOp(Wait(ready, 1), location=SEND))
    for name, like in values.items():
        arrived = _mailbox(receive, name, like)
        target = in_global(like, name, receive)
        if arrived.buffer is not target.buffer:
            move_rows(receive, arrived, target)
        source, place = in_global(like, name, send), _mailbox(send, name, like)
        _push(send, source, place, own, following)
    send.add(NotifyOp(Notify(own, following, (), sent), location=SEND))


def _emitter(program: Program, name: str) -> Emitter:
    block = program.routine(name).block
    return Emitter(program.out.module, block, program.machine, program.options.slices, name, program.options.probes)


def _mailbox(em: Emitter, name: str, like: Tensor) -> Tensor:
    """Where the value arrives in HBM: its own buffer if that lies in HBM, else an image of it."""
    if like.space == Space.HBM:
        return in_global(like, name, em)
    return in_global(replace(like, space=Space.HBM), f"{name}.received", em)


def _push(em: Emitter, source: Tensor, place: Tensor, register: int, units: int) -> None:
    """Write all rows to the same place in another unit."""
    rows = source.rows
    assert rows is not None
    target = Place(place.buffer, Space.PEER_HBM, place.base + units, register)
    loops, packet = feature_loops(source, place)
    if source.space == Space.HBM:
        row_loops = [(rows.physical, source.pitch, place.pitch)]
    else:
        slices = 1 if rows.replicated else em.slices
        row_loops = [(slices, DM_SLICE_STRIDE, rows.local * place.pitch), (rows.local, source.pitch, place.pitch)]
    em.dma(Place(source.buffer, source.space, source.base), target, [*row_loops, *loops], packet)
