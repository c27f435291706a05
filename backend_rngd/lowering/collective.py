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

from dataclasses import replace

from xdsl.ir import SSAValue

from backend_rngd.isa.descriptors import DM_SLICE_STRIDE, UNIT_STRIDE, Dtype, Space
from backend_rngd.lowering.choices import choose
from backend_rngd.lowering.contract_base import compact
from backend_rngd.lowering.emitter import Place, dm, hbm
from backend_rngd.lowering.exchange import Exchange, feature, feature_count, peer, piece_size, row_bytes
from backend_rngd.lowering.gather import Gather
from backend_rngd.lowering.group import Scope
from backend_rngd.lowering.move import ring_broadcast, ring_packet
from backend_rngd.lowering.pieces import Pieces, can_cut, in_pieces
from backend_rngd.lowering.tensor import Tensor, round_up
from backend_rngd.machine.formulas import collective_time
from ir.errors import UnsupportedError

LEAST_PART = 256  # bytes of a row in HBM that a unit adds at least: a line


class AllReduce(Exchange):
    """Sums over all units."""

    def all_reduce(self, x: Tensor) -> Tensor | Pieces:
        """The sum over all units, laid out like `x`, whose features are contiguous (`dense`), or in pieces."""
        rows = x.rows
        assert rows is not None
        if self.group.units == 1:
            return x
        if x.space == Space.HBM:
            return self._sum_in_hbm(x)
        if rows.replicated:
            return self._sum_of_few(x)
        return self._sum_of_many(x)

    def needs_padding(self, features: int, pitch: int, replicated: bool) -> bool:
        """Whether an all-reduce of rows of `pitch` elements exchanges the padding behind the features too."""
        return self._width(features, pitch, replicated) != features

    def _width(self, features: int, pitch: int, replicated: bool) -> int:
        """Elements of a row that are exchanged: the features, or with their padding where only that divides."""
        group = self.group

        def fits(width: int) -> bool:
            if not replicated:
                return width % (4 * group.local) == 0
            return piece_size(width, group.local, self.em.slices) is not None

        if fits(features):
            return features
        if fits(pitch):
            return pitch
        raise UnsupportedError(
            f"an all-reduce of {features} features over {group.units} units",
            f"neither {features} nor {pitch} elements are a multiple of 4 for each of {group.local} units of a card",
            "use fewer units (-tp), or a hidden size that is a multiple of 4 times their number",
        )

    def _sum_of_few(self, x: Tensor) -> Tensor | Pieces:
        """Rows in every slice; the sum stays in pieces if all slices have one."""
        group, em = self.group, self.em
        width = x.dtype.bytes
        rows = x.rows
        assert rows is not None
        count = rows.local
        features = self._width(feature_count(x), x.pitch // width, True)
        whole = count * features * width
        one_shot = piece_size(features, 1, em.slices)
        two_phase = piece_size(features, group.local, em.slices)
        times = self._times(whole, count, one_shot is not None, two_phase is not None)
        scope = group.card_scope
        held = self.published(x, features != feature_count(x))
        group.exchange(scope, held.buffer)
        if choose(em.location, "collective", f"all_reduce of {whole:,} B", times) == "one_shot":
            assert one_shot is not None
            size, parts = one_shot, features // one_shot
            slots = self._pull_pieces(held, scope.register, parts, size)
            total = self._spread_buffer(count * size * width, parts)
            self.add(slots, group.local, compact(count * size, x.dtype), total, parts)
            if parts == em.slices and can_cut(x, parts):
                return in_pieces(x, total, parts)
            return self._to_all_slices(x, total, count, size)
        assert two_phase is not None
        size = two_phase
        parts = features // (size * group.local)
        slots = self._pull_pieces(held, group.register(on_card=parts * size * width, card=1), parts, size)
        nbytes = count * size * width
        mine = self._between_cards(slots, count * size, x.dtype, parts, False)
        group.exchange(scope, mine)
        total = self._spread_buffer(nbytes, parts * group.local)
        loops = [(group.local, UNIT_STRIDE, parts * DM_SLICE_STRIDE), (parts, DM_SLICE_STRIDE, DM_SLICE_STRIDE)]
        em.dma(peer(mine, Space.DM, 0, scope.register), dm(total), loops, nbytes)
        if parts * group.local == em.slices and can_cut(x, em.slices):
            return in_pieces(x, total, em.slices)
        return self._to_all_slices(x, total, count, size)

    def _pull_pieces(self, held: Tensor, register: int, parts: int, size: int) -> SSAValue:
        """`[unit][row][size]`: slice s of `parts` slices reads piece s of the features, from where `register` says, of
        all units of the card."""
        em, local, rows = self.em, self.group.local, held.rows
        assert rows is not None
        count, piece = rows.local, size * held.dtype.bytes
        slots = em.alloc(local * count * piece, "copies")
        loops = [
            (parts, DM_SLICE_STRIDE + piece, DM_SLICE_STRIDE),
            (local, UNIT_STRIDE, count * piece),
            (count, held.pitch, piece),
        ]
        em.dma(peer(held.buffer, held.space, held.base, register), dm(slots), loops, piece)
        return slots

    def _times(self, nbytes: int, rows: int, one_shot: bool, two_phase: bool) -> dict[str, float]:
        """Cycles of the algorithms that are possible."""
        group, machine = self.group, self.em.machine
        out: dict[str, float] = {}
        if one_shot and group.cards == 1:
            out["one_shot"] = collective_time("all_reduce", "one_shot", nbytes, group.units, 1, machine, rows=rows)
        if two_phase:
            name = "two_phase" if group.cards == 1 else "hierarchical"
            out[name] = collective_time("all_reduce", name, nbytes, group.units, group.cards, machine, rows=rows)
        return out

    def _between_cards(self, slots: SSAValue, count: int, dtype: Dtype, slices: int, shared: bool) -> SSAValue:
        """Sum of the card's copies, then of the cards' sums, in a published buffer: `count` elements of `slices`."""
        group, em = self.group, self.em
        nbytes = count * dtype.bytes
        if group.cards == 1:
            total = group.publish(group.card_scope, "dm", nbytes, shared)
            self.add(slots, group.local, compact(count, dtype), total, slices)
            return total
        mine = em.alloc(nbytes, "card sum") if group.local > 1 else slots
        if group.local > 1:
            self.add(slots, group.local, compact(count, dtype), mine, slices)
        scope = group.rank_scope
        image = group.publish(scope, "hbm", slices * nbytes, False)
        em.dma(dm(mine), hbm(image), [(slices, DM_SLICE_STRIDE, nbytes)], nbytes)
        group.exchange(scope, image, in_dm=False)
        copies = em.alloc(group.cards * nbytes, "card sums")
        loops = [(slices, nbytes, DM_SLICE_STRIDE), (group.cards, group.local * UNIT_STRIDE, nbytes)]
        em.dma(peer(image, Space.HBM, 0, scope.register), dm(copies), loops, nbytes)
        total = group.publish(group.card_scope, "dm", nbytes, shared)
        self.add(copies, group.cards, compact(count, dtype), total, slices)
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
        features = self._width(feature_count(x), x.pitch // width, False)
        scope = group.card_scope
        held = self.published(x, features != feature_count(x))
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
        """Rows in HBM, the longer ones in parts: the unit with number u on its card owns an equal share of them."""
        group, em = self.group, self.em
        rows = x.rows
        assert rows is not None
        held = self.published(x, False)
        count, x = self._cut_rows(held, rows.physical)
        if count % group.local:
            raise UnsupportedError(
                f"an all-reduce of {count} rows of {x.pitch} B over {group.units} units",
                "every unit adds an equal share of the rows",
                "use a bucket whose length is a multiple of 64",
            )
        scope = group.card_scope
        group.exchange(scope, held.buffer, in_dm=False)
        share = count // group.local
        own = group.register(on_card=share * x.pitch, card=1)
        rank = group.rank_scope
        then = rank if group.cards > 1 else scope
        sums = self._add_rows(peer(held.buffer, Space.HBM, held.base, own), group.local, 1, share, x, then)
        if group.cards > 1 and self._worth_two_phases(share * x.pitch) and share % group.cards == 0:
            sums = self._cards_in_two_phases(sums, share, x)
        elif group.cards > 1:
            group.exchange(rank, sums, in_dm=False)
            source = peer(sums, Space.HBM, 0, rank.register)
            sums = self._add_rows(source, group.cards, group.local, share, x, scope)
        group.exchange(scope, sums, in_dm=False)
        loops = [(group.local, UNIT_STRIDE, share * x.pitch), (share, x.pitch, x.pitch)]
        em.dma(peer(sums, Space.HBM, 0, scope.register), hbm(held.buffer, held.base), loops, row_bytes(x))
        return held

    def _cut_rows(self, x: Tensor, count: int) -> tuple[int, Tensor]:
        """The same bytes as more and shorter rows, until there is one for every slice of the units of a card."""
        cuts, width = 1, x.dtype.bytes
        if x.pitch == feature_count(x) * width:
            while count * cuts < self.group.local * self.em.slices and x.pitch % (2 * cuts * LEAST_PART) == 0:
                cuts *= 2
        part = x.pitch // cuts
        return count * cuts, replace(x, dims=(feature(part // width, width),), pitch=part) if cuts > 1 else x

    def _worth_two_phases(self, nbytes: int) -> bool:
        """Whether the cards should add a part each: fewer bytes over the links, one more exchange."""
        group, machine = self.group, self.em.machine
        cards = group.cards
        saved = (cards - 1) * (1 - 2 / cards) * nbytes * group.local / machine.pcie_peer_bytes_per_cycle
        return saved > machine.pcie_latency_cycles + 2 * machine.dma_startup_cycles

    def _cards_in_two_phases(self, sums: SSAValue, share: int, x: Tensor) -> SSAValue:
        """Between units of equal rank: card number c adds part c of the rows, then all read the others' parts."""
        group, em = self.group, self.em
        rank = group.rank_scope
        part = share // group.cards
        group.exchange(rank, sums, in_dm=False)
        own = group.register(rank=1, by_card=part * x.pitch)
        mine = self._add_rows(peer(sums, Space.HBM, 0, own), group.cards, group.local, part, x, rank)
        group.exchange(rank, mine, in_dm=False)
        whole = group.publish(group.card_scope, "hbm", share * x.pitch, False)
        loops = [(group.cards, group.local * UNIT_STRIDE, part * x.pitch), (part, x.pitch, x.pitch)]
        em.dma(peer(mine, Space.HBM, 0, rank.register), hbm(whole), loops, row_bytes(x))
        return whole

    def _add_rows(self, source: Place, copies: int, step: int, share: int, x: Tensor, scope: Scope) -> SSAValue:
        """Sum of `copies` images of `share` rows, `step` units apart, in a buffer that `scope` will publish."""
        sums = self.group.publish(scope, "hbm", share * x.pitch, False)
        self.add_in_pieces(source, copies, step * UNIT_STRIDE, share, x, sums)
        return sums


class CollectiveLowering(AllReduce, Gather):
    """Lowers the collectives of one routine."""
