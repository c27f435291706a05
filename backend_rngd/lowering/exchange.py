"""What all collectives share: the published buffer, the sum of copies, images of rows in HBM."""

from __future__ import annotations

import math
from dataclasses import replace

from xdsl.ir import SSAValue

from backend_rngd.isa.descriptors import DM_SLICE_STRIDE, Alu, Commit, Dtype, Mode, Op, Space, VectorOp
from backend_rngd.lowering.contract_base import compact
from backend_rngd.lowering.emitter import Emitter, Place, dm, hbm
from backend_rngd.lowering.group import Group
from backend_rngd.lowering.move import load_rows, move_rows, store_rows
from backend_rngd.lowering.tensor import Dim, RowSpace, Tensor, round_up

SLOT_BYTES = 128 * 1024  # copies of all units that a slice holds at a time while values in HBM are added


def peer(buffer: SSAValue, space: Space, base: int, register: int) -> Place:
    """A byte of an own buffer in another unit: register holds unit * UNIT_STRIDE, plus what differs between units."""
    return Place(buffer, Space.PEER_DM if space == Space.DM else Space.PEER_HBM, base, register)


class Exchange:
    """What all collectives of one routine share: publishing, adding copies, rows in HBM."""

    def __init__(self, group: Group, em: Emitter, spill: int) -> None:
        self.group = group
        self.em = em
        self.spill = spill
        self.reserved: SSAValue | None = None  # what the next collective publishes, if it was computed in place

    def reserve(self, space: Space, nbytes: int, shared: bool, padded: bool = False) -> SSAValue:
        """A published buffer for the operand of the next collective. shared: see `Group.publish`. padded: its bytes
        that hold no value are zero."""
        self.reserved = buffer = self.group.publish(self.group.card_scope, space.name.lower(), nbytes, shared)
        if padded and space == Space.DM:
            self.em.memset(buffer, 0, nbytes)
        return buffer

    def published(self, x: Tensor, whole_rows: bool) -> Tensor:
        """`x` itself if it was computed into a published buffer, else a copy in one. whole_rows: padding is read."""
        reserved, self.reserved = self.reserved, None
        if x.buffer is reserved:
            return x
        rows = x.rows
        assert rows is not None
        count = rows.physical if x.space == Space.HBM else rows.local
        shared = not rows.replicated
        held = replace(x, buffer=self.reserve(x.space, count * x.pitch, shared, whole_rows), base=0)
        if x.space == Space.HBM:
            move_rows(self.em, x, held)
        else:
            width = x.dtype.bytes
            features = round_up(feature_count(x), 8 // width)  # rows start on 8 B
            packet = next(n for n in (8, 4, 2) if features % n == 0)
            loops = [(rows.local, x.pitch), (features, width)]
            commit = Commit(0, ((rows.local, held.pitch), (features, width)), x.dtype, packet)
            self.em.execute(self.em.fetch(x.base, loops, x.dtype, packet), x.buffer, commit, held.buffer)
        self.reserved = None
        return held

    def add_in_pieces(self, source: Place, copies: int, distance: int, count: int, x: Tensor, sums: SSAValue) -> None:
        """sums[row] = sum over the copies, `distance` bytes apart, of `count` rows in HBM; slices share the rows."""
        em, run = self.em, row_bytes(x)
        slices = max(n for n in range(1, min(em.slices, count) + 1) if count % n == 0)
        per_slice = count // slices
        chunk = max(1, min(per_slice, SLOT_BYTES // (copies * run)))
        for first in range(0, per_slice, chunk):
            rows = min(chunk, per_slice - first)
            slots = em.alloc(copies * rows * run, "copies")
            loops = [(slices, per_slice * x.pitch, DM_SLICE_STRIDE), (copies, distance, rows * run)]
            begin = source._replace(base=source.base + first * x.pitch)
            em.dma(begin, dm(slots), [*loops, (rows, x.pitch, run)], run)
            total = em.alloc(rows * run, "sum")
            self.add(slots, copies, compact(rows * run // x.dtype.bytes, x.dtype), total, slices)
            loops = [(slices, DM_SLICE_STRIDE, per_slice * x.pitch), (rows, run, x.pitch)]
            em.dma(dm(total), hbm(sums, first * x.pitch), loops, run)

    def add(self, slots: SSAValue, copies: int, commit: Commit, target: SSAValue, slices: int) -> None:
        """Element i of `commit` = sum over the copies of slots[copy][i], in f32."""
        count, dtype, packet = math.prod(n for n, _ in commit.loops), commit.dtype, commit.valid
        width = dtype.bytes
        self.em.execute(
            self.em.fetch(
                0,
                [(count // packet, packet * width), (copies, count * width), (packet, width)],
                dtype,
                packet,
                Dtype.F32 if dtype == Dtype.BF16 else None,
            ),
            slots,
            commit,
            target,
            slices=slices,
            vector=(VectorOp(Alu.REDUCE, Op.ADD, Mode.UNARY, count=copies, inner=packet),),
        )

    def image(self, x: Tensor) -> Tensor:
        """`x` in a published HBM buffer, rows in physical order."""
        rows = x.rows
        assert rows is not None
        if x.space == Space.HBM:
            return self.published(x, False)
        image = replace(x, buffer=self.reserve(Space.HBM, rows.physical * x.pitch, False), space=Space.HBM, base=0)
        store_rows(self.em, x, image, rows.local)
        return image

    def exchange_with_all(self, published: SSAValue) -> None:
        """All units of the group have published an HBM buffer: those of the card, then those of equal rank, which have
        heard of their cards."""
        self.group.exchange(self.group.card_scope, published, in_dm=False)
        if self.group.cards > 1:
            self.group.exchange(self.group.rank_scope, published, in_dm=False)

    def where_it_fits(self, t: Tensor) -> Tensor:
        """In DM, or in HBM if it is large."""
        rows = t.rows
        assert rows is not None
        return t if rows.local * t.pitch > self.spill else load_rows(self.em, t, rows.local)

    def fill(self, first: Place, target: SSAValue, rows: RowSpace, like: Tensor) -> None:
        """Passes over whole slices read rows that hold no token: they get the row at `first`."""
        used = rows.batch * rows.length
        if rows.physical == used:
            return
        start = used if rows.batch_stride == rows.length else 0
        loops = [(rows.physical - start, 0, like.pitch)]
        self.em.dma(first, hbm(target, start * like.pitch), loops, row_bytes(like))


def feature(size: int, stride: int) -> Dim:
    """A feature dimension, or none of size 1."""
    return Dim("feature", size, stride) if size > 1 else Dim("one", 1)


def row_dim(d: Dim, rows: RowSpace) -> Dim:
    """Dimension `d` of a value with other rows."""
    match d.kind:
        case "batch":
            return Dim("batch", rows.batch)
        case "length":
            return Dim("length", rows.length)
        case "tokens":
            return Dim("tokens", rows.batch * rows.length)
        case _:
            return d


def feature_count(x: Tensor) -> int:
    """Elements of a row."""
    total = 1
    for d in x.features:
        total *= d.size
    return total


def row_bytes(x: Tensor) -> int:
    """Bytes of a dense row, whole 8 B."""
    return round_up(feature_count(x) * x.dtype.bytes, 8)


def dense(x: Tensor) -> bool:
    """Whether the features of a row are contiguous, in some order."""
    return x.row_bytes == feature_count(x) * x.dtype.bytes


def piece_size(features: int, units: int, slices: int) -> int | None:
    """The smallest multiple of 4 features that cuts them into at most `slices` pieces, as many for every unit."""
    for size in range(4, features + 1, 4):
        if features % (size * units) == 0 and features // size <= slices:
            return size
    return None
