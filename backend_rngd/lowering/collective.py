"""Collectives as instructions: publish, notify, wait, one transfer that reads all partners, one pass that adds.

Values whose rows every slice holds (few tokens):
* one-shot: every slice reads its piece of the features from all units, adds the pieces, and a ring broadcast returns
  the sum to all slices. One synchronisation.
* two-phase: as above, but a unit adds only its own part of the features, publishes the sum, and reads the parts of the
  others. Over several cards the sums are exchanged between units of equal rank on the way, through HBM.
Values whose rows lie on slices (many tokens): two-phase, a unit owns the rows of some slices; while it adds, the
features of a row are spread over slices, so that all of them work. Values in HBM are walked in pieces that fit.

Every sum is computed in f32 in one order and rounded once, so all units hold the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from xdsl.ir import SSAValue

from backend_rngd.isa.descriptors import (
    DM_SLICE_STRIDE,
    UNIT_STRIDE,
    Alu,
    Commit,
    Dtype,
    Mode,
    Op,
    Space,
    VectorOp,
)
from backend_rngd.lowering.contract_base import compact
from backend_rngd.lowering.emitter import Emitter, Place, dm, hbm
from backend_rngd.lowering.group import Group, Scope
from backend_rngd.lowering.move import load_rows, move_rows, place_of, ring_broadcast, ring_packet, store_rows
from backend_rngd.lowering.tensor import Dim, RowSpace, Tensor, feature_dims, round_up
from backend_rngd.machine.formulas import collective_time
from ir.errors import UnsupportedError

SLOT_BYTES = 128 * 1024  # copies of all units that a slice holds at a time while values in HBM are added


def peer(buffer: SSAValue, space: Space, base: int, register: int) -> Place:
    """A byte of an own buffer in another unit: register holds unit * UNIT_STRIDE, plus what differs between units."""
    return Place(buffer, Space.PEER_DM if space == Space.DM else Space.PEER_HBM, base, register)


class CollectiveLowering:
    """Lowers collectives of one routine."""

    def __init__(self, group: Group, em: Emitter, spill: int) -> None:
        self.group = group
        self.em = em
        self.spill = spill
        self.reserved: SSAValue | None = None  # what the next collective publishes, if it was computed in place

    # All-reduce ------------------------------------------------------------
    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over all units, laid out like `x`, whose features are contiguous (`dense`)."""
        rows = x.rows
        assert rows is not None
        if self.group.units == 1:
            return x
        if x.space == Space.HBM:
            return self._sum_in_hbm(x)
        if rows.replicated:
            return self._sum_of_few(x)
        return self._sum_of_many(x)

    def reserve(self, space: Space, nbytes: int, shared: bool, padded: bool = False) -> SSAValue:
        """A published buffer for the operand of the next collective. shared: see `Group.publish`. padded: its bytes
        that hold no value are zero."""
        self.reserved = buffer = self.group.publish(self.group.card_scope, space.name.lower(), nbytes, shared)
        if padded and space == Space.DM:
            self.em.memset(buffer, 0, nbytes)
        return buffer

    def _published(self, x: Tensor, whole_rows: bool) -> Tensor:
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
            features, width = _features(x), x.dtype.bytes
            packet = 8 if features % 8 == 0 else 4
            loops = [(rows.local, x.pitch), (features, width)]
            commit = Commit(0, ((rows.local, held.pitch), (features, width)), x.dtype, packet)
            self.em.execute(self.em.fetch(x.base, loops, x.dtype, packet), x.buffer, commit, held.buffer)
        self.reserved = None
        return held

    def needs_padding(self, features: int, pitch: int, replicated: bool) -> bool:
        """Whether an all-reduce of rows of `pitch` elements exchanges the padding behind the features too."""
        return self._width(features, pitch, replicated) != features

    def _width(self, features: int, pitch: int, replicated: bool) -> int:
        """Elements of a row that are exchanged: the features, or with their padding where only that divides."""
        group = self.group

        def fits(width: int) -> bool:
            if not replicated:
                return width % (4 * group.local) == 0
            return _piece(width, group.local, self.em.slices) is not None

        if fits(features):
            return features
        if fits(pitch):
            return pitch
        raise UnsupportedError(
            f"an all-reduce of {features} features over {group.units} units",
            f"neither {features} nor {pitch} elements are a multiple of 4 for each of {group.local} units of a card",
            "use fewer units (-tp), or a hidden size that is a multiple of 4 times their number",
        )

    def _sum_of_few(self, x: Tensor) -> Tensor:
        """Rows in every slice."""
        group, em = self.group, self.em
        width = x.dtype.bytes
        rows = x.rows
        assert rows is not None
        count = rows.local
        features = self._width(_features(x), x.pitch // width, True)
        whole = count * features * width
        one_shot = _piece(features, 1, em.slices)
        two_phase = _piece(features, group.local, em.slices)
        times = self._times(whole, one_shot is not None, two_phase is not None)
        scope = group.card_scope
        held = self._published(x, features != _features(x))
        group.exchange(scope, held.buffer)
        if min(times, key=lambda name: times[name]) == "one_shot":
            assert one_shot is not None
            size, parts = one_shot, features // one_shot
            slots = em.alloc(group.local * count * size * width, "copies")
            loops = [
                (parts, DM_SLICE_STRIDE + size * width, DM_SLICE_STRIDE),
                (group.local, UNIT_STRIDE, count * size * width),
                (count, held.pitch, size * width),
            ]
            em.dma(peer(held.buffer, held.space, held.base, scope.register), dm(slots), loops, size * width)
            total = self._spread_buffer(count * size * width, parts)
            self._add(slots, group.local, count * size, x.dtype, total, parts)
            return self._to_all_slices(x, total, count, size)
        assert two_phase is not None
        size = two_phase
        parts = features // (size * group.local)
        slots = em.alloc(group.local * count * size * width, "copies")
        loops = [
            (parts, DM_SLICE_STRIDE + size * width, DM_SLICE_STRIDE),
            (group.local, UNIT_STRIDE, count * size * width),
            (count, held.pitch, size * width),
        ]
        own = group.register(on_card=parts * size * width, card=1)
        em.dma(peer(held.buffer, held.space, held.base, own), dm(slots), loops, size * width)
        nbytes = count * size * width
        mine = self._between_cards(slots, count * size, x.dtype, parts, False)
        group.exchange(scope, mine)
        total = self._spread_buffer(nbytes, parts * group.local)
        loops = [(group.local, UNIT_STRIDE, parts * DM_SLICE_STRIDE), (parts, DM_SLICE_STRIDE, DM_SLICE_STRIDE)]
        em.dma(peer(mine, Space.DM, 0, scope.register), dm(total), loops, nbytes)
        return self._to_all_slices(x, total, count, size)

    def _times(self, nbytes: int, one_shot: bool, two_phase: bool) -> dict[str, float]:
        """Cycles of the algorithms that are possible."""
        group, machine = self.group, self.em.machine
        out: dict[str, float] = {}
        if one_shot and group.cards == 1:
            out["one_shot"] = collective_time("all_reduce", "one_shot", nbytes, group.units, 1, machine)
        if two_phase:
            name = "two_phase" if group.cards == 1 else "hierarchical"
            out[name] = collective_time("all_reduce", name, nbytes, group.units, group.cards, machine)
        return out

    def _between_cards(self, slots: SSAValue, count: int, dtype: Dtype, slices: int, shared: bool) -> SSAValue:
        """Sum of the card's copies, then of the cards' sums, in a published buffer: `count` elements of `slices`."""
        group, em = self.group, self.em
        nbytes = count * dtype.bytes
        if group.cards == 1:
            total = group.publish(group.card_scope, "dm", nbytes, shared)
            self._add(slots, group.local, count, dtype, total, slices)
            return total
        mine = em.alloc(nbytes, "card sum") if group.local > 1 else slots
        if group.local > 1:
            self._add(slots, group.local, count, dtype, mine, slices)
        scope = group.rank_scope
        image = group.publish(scope, "hbm", slices * nbytes, False)
        em.dma(dm(mine), hbm(image), [(slices, DM_SLICE_STRIDE, nbytes)], nbytes)
        group.exchange(scope, image, in_dm=False)
        copies = em.alloc(group.cards * nbytes, "card sums")
        loops = [(slices, nbytes, DM_SLICE_STRIDE), (group.cards, group.local * UNIT_STRIDE, nbytes)]
        em.dma(peer(image, Space.HBM, 0, scope.register), dm(copies), loops, nbytes)
        total = group.publish(group.card_scope, "dm", nbytes, shared)
        self._add(copies, group.cards, count, dtype, total, slices)
        return total

    def _spread_buffer(self, nbytes: int, slices: int) -> SSAValue:
        """A buffer of which `slices` slices will be written; the ring reads all of them."""
        buffer = self.em.alloc(nbytes, "sum")
        if slices < self.em.slices:
            self.em.memset(buffer, 0, nbytes)
        return buffer

    def _to_all_slices(self, x: Tensor, total: SSAValue, rows: int, size: int) -> Tensor:
        """`[row][size]` of every slice to whole rows in every slice."""
        em, width = self.em, x.dtype.bytes
        pitch = max(x.pitch, round_up(em.slices * size, 32) * width)
        target = em.alloc(rows * pitch)
        packet = ring_packet(size, 32 // width)
        ring_broadcast(
            em,
            total,
            [(rows, size * width), (size, width)],
            x.dtype,
            packet,
            0,
            em.slices,
            target,
            0,
            [(rows, pitch), (size // packet, packet * width)],
            size * width,
            [(packet, width)],
            min(packet, 32 // width),
        )
        return replace(x, buffer=target, base=0, pitch=pitch)

    def _sum_of_many(self, x: Tensor) -> Tensor:
        """Rows on slices: the unit with number u on its card owns the rows of slices [u * share, (u + 1) * share)."""
        group, em = self.group, self.em
        rows, width = x.rows, x.dtype.bytes
        assert rows is not None
        features = self._width(_features(x), x.pitch // width, False)
        scope = group.card_scope
        held = self._published(x, features != _features(x))
        group.exchange(scope, held.buffer)
        share, size = em.slices // group.local, features // group.local
        piece = size * width
        slot = rows.local * piece
        slots = em.alloc(group.local * slot, "copies")
        own = group.register(on_card=share * DM_SLICE_STRIDE, card=1)
        loops = [
            (share, DM_SLICE_STRIDE, group.local * DM_SLICE_STRIDE),
            (group.local, piece, DM_SLICE_STRIDE),
            (group.local, UNIT_STRIDE, slot),
            (rows.local, held.pitch, piece),
        ]
        em.dma(peer(held.buffer, held.space, held.base, own), dm(slots), loops, piece)
        mine = self._between_cards(slots, rows.local * size, x.dtype, em.slices, True)
        group.exchange(scope, mine)
        # The others have read what this unit published, so the result may take its place.
        loops = [
            (group.local, UNIT_STRIDE, share * DM_SLICE_STRIDE),
            (share, group.local * DM_SLICE_STRIDE, DM_SLICE_STRIDE),
            (group.local, DM_SLICE_STRIDE, piece),
            (rows.local, piece, held.pitch),
        ]
        em.dma(peer(mine, Space.DM, 0, scope.register), dm(held.buffer, held.base), loops, piece)
        return held

    def _sum_in_hbm(self, x: Tensor) -> Tensor:
        """Rows in HBM: the unit with number u on its card owns an equal share of the physical rows."""
        group, em = self.group, self.em
        rows = x.rows
        assert rows is not None
        if rows.physical % group.local:
            raise UnsupportedError(
                f"an all-reduce of {rows.physical} rows over {group.units} units",
                "every unit adds an equal share of the rows",
                "use a bucket whose length is a multiple of 64",
            )
        scope = group.card_scope
        held = self._published(x, False)
        group.exchange(scope, held.buffer, in_dm=False)
        share = rows.physical // group.local
        own = group.register(on_card=share * x.pitch, card=1)
        rank = group.rank_scope
        then = rank if group.cards > 1 else scope
        sums = self._add_rows(peer(held.buffer, Space.HBM, held.base, own), group.local, 1, share, x, then)
        if group.cards > 1:
            group.exchange(rank, sums, in_dm=False)
            source = peer(sums, Space.HBM, 0, rank.register)
            sums = self._add_rows(source, group.cards, group.local, share, x, scope)
        group.exchange(scope, sums, in_dm=False)
        loops = [(group.local, UNIT_STRIDE, share * x.pitch), (share, x.pitch, x.pitch)]
        em.dma(peer(sums, Space.HBM, 0, scope.register), hbm(held.buffer, held.base), loops, _row_bytes(x))
        return held

    def _add_rows(self, source: Place, copies: int, step: int, share: int, x: Tensor, scope: Scope) -> SSAValue:
        """Sum of `copies` images of `share` rows, `step` units apart, in a buffer that `scope` will publish."""
        sums = self.group.publish(scope, "hbm", share * x.pitch, False)
        self._add_in_pieces(source, copies, step * UNIT_STRIDE, share, x, sums)
        return sums

    def _add_in_pieces(self, source: Place, copies: int, distance: int, count: int, x: Tensor, sums: SSAValue) -> None:
        """sums[row] = sum over the copies, `distance` bytes apart, of `count` rows in HBM; slices share the rows."""
        em, run = self.em, _row_bytes(x)
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
            self._add(slots, copies, rows * run // x.dtype.bytes, x.dtype, total, slices)
            loops = [(slices, DM_SLICE_STRIDE, per_slice * x.pitch), (rows, run, x.pitch)]
            em.dma(dm(total), hbm(sums, first * x.pitch), loops, run)

    def _add(self, slots: SSAValue, copies: int, count: int, dtype: Dtype, target: SSAValue, slices: int) -> None:
        """target[i] = sum over the copies of slots[copy][i], `count` elements a slice, in f32."""
        packet = 8 if count % 8 == 0 else 4
        width = dtype.bytes
        whole = compact(count, dtype)
        self.em.execute(
            self.em.fetch(
                0,
                [(count // packet, packet * width), (copies, count * width), (packet, width)],
                dtype,
                packet,
                Dtype.F32 if dtype == Dtype.BF16 else None,
            ),
            slots,
            Commit(0, whole.loops, dtype, packet),
            target,
            slices=slices,
            vector=(VectorOp(Alu.REDUCE, Op.ADD, Mode.UNARY, count=copies, inner=packet),),
        )

    # Sequence parallel and logits ------------------------------------------------------------
    def all_gather(self, x: Tensor, dim: int, output: Callable[[int], SSAValue]) -> Tensor:
        """The parts of all units along dimension `dim`; `output` gives an HBM buffer for gathered features."""
        if self.group.units == 1:
            return x
        if x.dims[dim].is_row:
            return self._gather_rows(x, dim)
        return self._gather_features(x, dim, output)

    def _image(self, x: Tensor) -> Tensor:
        """`x` in a published HBM buffer, rows in physical order."""
        rows = x.rows
        assert rows is not None
        if x.space == Space.HBM:
            return self._published(x, False)
        image = replace(x, buffer=self.reserve(Space.HBM, rows.physical * x.pitch, False), space=Space.HBM, base=0)
        store_rows(self.em, x, image, rows.local)
        return image

    def _exchange_with_all(self, published: SSAValue) -> None:
        """All units of the group have published an HBM buffer: those of the card, then those of equal rank, which have
        heard of their cards."""
        self.group.exchange(self.group.card_scope, published, in_dm=False)
        if self.group.cards > 1:
            self.group.exchange(self.group.rank_scope, published, in_dm=False)

    def _gather_features(self, x: Tensor, dim: int, output: Callable[[int], SSAValue]) -> Tensor:
        """Features: the image of every unit is a part of the result in all rows."""
        group, em = self.group, self.em
        rows = x.rows
        assert rows is not None
        features = [d for d in x.dims if d.kind == "feature"]
        held = self._image(x)
        self._exchange_with_all(held.buffer)
        outermost = x.dims[dim].stride == max(d.stride for d in features) and x.dims[dim].size > 1
        if outermost and x.pitch <= min(d.stride for d in features):  # channel-major: images lie one after the other
            nbytes = x.dims[dim].size * x.dims[dim].stride
            target = output(group.units * nbytes)
            em.dma(
                peer(held.buffer, Space.HBM, held.base, 0), hbm(target), [(group.units, UNIT_STRIDE, nbytes)], nbytes
            )
            dims = list(x.dims)
            dims[dim] = Dim("feature", x.dims[dim].size * group.units, x.dims[dim].stride)
            return replace(x, buffer=target, space=Space.HBM, dims=tuple(dims), base=0)
        sizes = [d.size * group.units if i == dim else d.size for i, d in enumerate(x.dims) if not d.is_row]
        strides, pitch = feature_dims(sizes, x.dtype.bytes)
        outer = sizes[: [i for i, d in enumerate(x.dims) if not d.is_row].index(dim)]
        if any(n > 1 for n in outer):
            raise UnsupportedError(
                f"an all-gather of dimension {dim} of {x.shape}",
                "only the outermost feature dimension is gathered",
                "transpose the value first",
            )
        target = output(rows.physical * pitch)
        run = _features(x) * x.dtype.bytes
        em.dma(
            peer(held.buffer, Space.HBM, held.base, 0),
            hbm(target),
            [(group.units, UNIT_STRIDE, run), (rows.physical, x.pitch, pitch)],
            run,
        )
        at = iter(strides)
        dims = [
            d if d.is_row else _feature(n, next(at))
            for d, n in zip(
                x.dims, [d.size * group.units if i == dim else d.size for i, d in enumerate(x.dims)], strict=True
            )
        ]
        return Tensor(target, Space.HBM, x.dtype, tuple(dims), rows, 0, pitch)

    def _gather_rows(self, x: Tensor, dim: int) -> Tensor:
        """Tokens of a sequence: every unit holds a part of each one."""
        group, em = self.group, self.em
        rows = x.rows
        assert rows is not None
        part = rows.length
        whole = RowSpace.make(rows.batch, part * group.units, em.slices)
        held = self._image(x)
        self._exchange_with_all(held.buffer)
        dims = [_row_dim(d, whole) for d in x.dims]
        image = em.alloc(whole.physical * x.pitch, space="hbm")
        self._fill(place_of(held), image, whole, x)
        loops = [
            (rows.batch, rows.batch_stride * x.pitch, whole.batch_stride * x.pitch),
            (group.units, UNIT_STRIDE, part * x.pitch),
            (part, x.pitch, x.pitch),
        ]
        em.dma(peer(held.buffer, Space.HBM, held.base, 0), hbm(image), loops, _row_bytes(x))
        gathered = Tensor(image, Space.HBM, x.dtype, tuple(dims), whole, 0, x.pitch)
        return self._where_it_fits(gathered)

    def _where_it_fits(self, t: Tensor) -> Tensor:
        """In DM, or in HBM if it is large."""
        rows = t.rows
        assert rows is not None
        return t if rows.local * t.pitch > self.spill else load_rows(self.em, t, rows.local)

    def reduce_scatter(self, x: Tensor, dim: int) -> Tensor:
        """The own part of the sum over all units, tokens of dimension `dim`."""
        group, em = self.group, self.em
        rows = x.rows
        assert rows is not None
        if group.units == 1:
            return x
        if not x.dims[dim].is_row:
            raise UnsupportedError(
                "a reduce-scatter of features", "only tokens are scattered", "turn sequence parallelism off"
            )
        part = rows.length // group.units
        mine = RowSpace.make(rows.batch, part, em.slices)
        held = self._image(x)
        self._exchange_with_all(held.buffer)
        own = group.register(part=part * x.pitch)
        nbytes = part * x.pitch
        copies = em.alloc(group.units * rows.batch * nbytes, space="hbm")
        loops = [
            (group.units, UNIT_STRIDE, rows.batch * nbytes),
            (rows.batch, rows.batch_stride * x.pitch, nbytes),
            (part, x.pitch, x.pitch),
        ]
        em.dma(peer(held.buffer, Space.HBM, held.base, own), hbm(copies), loops, _row_bytes(x))
        sums = em.alloc(mine.physical * x.pitch, space="hbm")
        packed = sums if mine.batch_stride == part else em.alloc(rows.batch * nbytes, space="hbm")
        self._add_in_pieces(hbm(copies), group.units, rows.batch * nbytes, rows.batch * part, x, packed)
        self._fill(hbm(packed), sums, mine, x)
        if packed is not sums:
            loops = [(rows.batch, nbytes, mine.batch_stride * x.pitch), (part, x.pitch, x.pitch)]
            em.dma(hbm(packed), hbm(sums), loops, _row_bytes(x))
        dims = [_row_dim(d, mine) for d in x.dims]
        return self._where_it_fits(Tensor(sums, Space.HBM, x.dtype, tuple(dims), mine, 0, x.pitch))

    def local_slice(self, x: Tensor, dim: int, size: int) -> Tensor:
        """The own part of the tokens of dimension `dim`: a copy inside the own memory, from a unit's own place."""
        group, em = self.group, self.em
        rows = x.rows
        assert rows is not None
        if not x.dims[dim].is_row or size * group.units != rows.length:
            raise UnsupportedError(
                f"the own part of dimension {dim} of {x.shape}",
                "only tokens are cut, and into equal parts",
                "choose a bucket whose length is a multiple of the units",
            )
        image = x
        if x.space == Space.DM:
            buffer = em.alloc(rows.physical * x.pitch, space="hbm")
            image = replace(x, buffer=buffer, space=Space.HBM, base=0)
            store_rows(em, x, image, rows.local)
        mine = RowSpace.make(rows.batch, size, em.slices)
        target = em.alloc(mine.physical * x.pitch, space="hbm")
        self._fill(place_of(image), target, mine, x)
        own = group.register(part=UNIT_STRIDE + size * x.pitch)
        loops = [(rows.batch, rows.batch_stride * x.pitch, mine.batch_stride * x.pitch), (size, x.pitch, x.pitch)]
        em.dma(peer(image.buffer, Space.HBM, image.base, own), hbm(target), loops, _row_bytes(x))
        dims = [_row_dim(d, mine) for d in x.dims]
        return self._where_it_fits(Tensor(target, Space.HBM, x.dtype, tuple(dims), mine, 0, x.pitch))

    def _fill(self, first: Place, target: SSAValue, rows: RowSpace, like: Tensor) -> None:
        """Passes over whole slices read rows that hold no token: they get the row at `first`."""
        used = rows.batch * rows.length
        if rows.physical == used:
            return
        start = used if rows.batch_stride == rows.length else 0
        loops = [(rows.physical - start, 0, like.pitch)]
        self.em.dma(first, hbm(target, start * like.pitch), loops, _row_bytes(like))


def _feature(size: int, stride: int) -> Dim:
    return Dim("feature", size, stride) if size > 1 else Dim("one", 1)


def _row_dim(d: Dim, rows: RowSpace) -> Dim:
    match d.kind:
        case "batch":
            return Dim("batch", rows.batch)
        case "length":
            return Dim("length", rows.length)
        case "tokens":
            return Dim("tokens", rows.batch * rows.length)
        case _:
            return d


def _features(x: Tensor) -> int:
    total = 1
    for d in x.features:
        total *= d.size
    return total


def _row_bytes(x: Tensor) -> int:
    return round_up(_features(x) * x.dtype.bytes, 8)


def dense(x: Tensor) -> bool:
    """Whether the features of a row are contiguous, in some order."""
    return x.row_bytes == _features(x) * x.dtype.bytes


def _piece(features: int, units: int, slices: int) -> int | None:
    """The smallest multiple of 4 features that cuts them into at most `slices` pieces, as many for every unit."""
    for size in range(4, features + 1, 4):
        if features % (size * units) == 0 and features // size <= slices:
            return size
    return None
