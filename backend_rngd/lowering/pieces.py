"""Few tokens between contractions: the features of a row lie in pieces, one in each slice, instead of in every slice.

Element-wise work is then 64 times shorter, and only what a contraction reads goes round the ring to all slices. Sums
over units come out of their last addition in this form (`collective.py`), sums over features of pieces go round the
ring once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from xdsl.ir import SSAValue

from backend_rngd.isa.descriptors import DM_SLICE_STRIDE, Alu, Commit, Dtype, Mode, Op, Space, VectorOp
from backend_rngd.lowering.emitter import Emitter, dm
from backend_rngd.lowering.move import place_of, ring_broadcast, ring_packet
from backend_rngd.lowering.tensor import Dim, RowSpace, Tensor, round_up
from backend_rngd.lowering.vector import REDUCED_SPACING

SUMS = {"add": Op.ADD, "max": Op.MAX, "min": Op.MIN}


@dataclass(frozen=True)
class Pieces:
    """`held`: what a slice has, with rows of its own; `dims` and `rows`: of the value as a whole."""

    held: Tensor
    dims: tuple[Dim, ...]
    rows: RowSpace


def own_rows(rows: RowSpace) -> RowSpace:
    """Rows that every slice has, as rows of its own: what it holds of them differs from slice to slice."""
    return replace(rows, replicated=False)


def can_cut(t: Tensor, slices: int) -> bool:
    """Whether every slice gets whole packets of the only feature axis of a row that all slices hold."""
    if t.rows is None or not t.rows.replicated or len(t.features) != 1 or t.block:
        return False
    return t.features[0].size % (4 * slices) == 0 and t.features[0].stride == t.dtype.bytes


def in_pieces(t: Tensor, buffer: SSAValue, slices: int) -> Pieces:
    """The value `t` in pieces that lie dense in `buffer`."""
    assert t.rows is not None
    size, width = t.features[0].size // slices, t.dtype.bytes
    dims = tuple(Dim("feature", size, width) if d.kind == "feature" else d for d in t.dims)
    return Pieces(Tensor(buffer, Space.DM, t.dtype, dims, own_rows(t.rows), 0, size * width), t.dims, t.rows)


def to_pieces(em: Emitter, t: Tensor) -> Pieces:
    """Of a row in every slice, or in HBM, its piece to each slice."""
    assert t.rows is not None
    nbytes = t.features[0].size // em.slices * t.dtype.bytes
    buffer = em.alloc(t.rows.local * nbytes, "pieces")
    across = nbytes + (DM_SLICE_STRIDE if t.space == Space.DM else 0)
    em.dma(place_of(t), dm(buffer), [(em.slices, across, DM_SLICE_STRIDE), (t.rows.local, t.pitch, nbytes)], nbytes)
    return in_pieces(t, buffer, em.slices)


def to_whole(em: Emitter, p: Pieces) -> Tensor:
    """The rows in every slice."""
    held, width = p.held, p.held.dtype.bytes
    size = held.features[0].size
    pitch = round_up(em.slices * size, 32) * width
    buffer = em.alloc(p.rows.local * pitch, "rows")
    packet = ring_packet(size, 32 // width)
    ring_broadcast(
        em, held.buffer, [(p.rows.local, held.pitch), (size, width)], held.dtype, packet, held.base, em.slices,
        buffer, 0, [(p.rows.local, pitch), (size // packet, packet * width)], size * width, [(packet, width)],
        min(packet, 32 // width),
    )  # fmt: skip
    dims = tuple(Dim("feature", d.size, width) if d.kind == "feature" else d for d in p.dims)
    return Tensor(buffer, Space.DM, held.dtype, dims, p.rows, 0, pitch)


def sum_of_slices(em: Emitter, part: Tensor, kind: str) -> Tensor:
    """The reduction over slices of one f32 a row, in every slice."""
    rows = part.rows
    assert rows is not None
    assert part.dtype == Dtype.F32
    gathered = em.alloc(rows.local * em.slices * REDUCED_SPACING, "parts")
    run = em.slices * REDUCED_SPACING
    ring_broadcast(
        em, part.buffer, [(rows.local, part.pitch), (2, 4)], Dtype.F32, 2, part.base, em.slices,
        gathered, 0, [(rows.local, run)], REDUCED_SPACING, [(2, 4)], 2,
    )  # fmt: skip
    out = replace(part, buffer=em.alloc(rows.local * part.pitch), base=0, rows=replace(rows, replicated=True))
    em.execute(
        em.fetch(0, [(rows.local, run), (2 * em.slices, 4)], Dtype.F32, 2),
        gathered,
        Commit(0, ((rows.local, out.pitch), (2, 4)), Dtype.F32, 2),
        out.buffer,
        vector=[VectorOp(Alu.REDUCE, SUMS[kind], Mode.UNARY, count=em.slices, inner=2)],
    )
    return out
