"""Collectives that move parts: tokens (sequence parallelism) from slices to slices or through HBM, columns of logits
through HBM."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from xdsl.ir import SSAValue

from backend_rngd.isa.descriptors import DM_SLICE_STRIDE, UNIT_STRIDE, Space
from backend_rngd.lowering.contract_base import split_k
from backend_rngd.lowering.emitter import dm, hbm
from backend_rngd.lowering.exchange import Exchange, feature, feature_count, peer, row_bytes, row_dim
from backend_rngd.lowering.mapping import TRF_K_BYTES
from backend_rngd.lowering.move import place_of, store_rows
from backend_rngd.lowering.shares import own_rows, own_tokens
from backend_rngd.lowering.tensor import Dim, RowSpace, Tensor, feature_dims
from ir.errors import UnsupportedError


class Gather(Exchange):
    """All-gather, reduce-scatter, and the own part of a value."""

    def all_gather(self, x: Tensor, dim: int, output: Callable[[int], SSAValue], returned: bool = False) -> Tensor:
        """The parts of all units along dimension `dim`; `output` gives an HBM buffer for gathered features, of which
        nobody reads rows without a token if they are `returned`."""
        if self.group.units == 1:
            return x
        if x.dims[dim].is_row:
            return self._gather_rows(x, dim)
        return self._gather_features(x, dim, output, returned)

    def _gather_features(self, x: Tensor, dim: int, output: Callable[[int], SSAValue], returned: bool) -> Tensor:
        """Features: the image of every unit is a part of the result in all rows."""
        group, em = self.group, self.em
        rows = x.rows
        assert rows is not None
        features = [d for d in x.dims if d.kind == "feature"]
        held = self.image(x)
        self.exchange_with_all(held.buffer)
        outermost = bool(features) and x.dims[dim].stride == max(d.stride for d in features) and x.dims[dim].size > 1
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
        run = feature_count(x) * x.dtype.bytes
        # Whole packets and the rest: equal pieces of a run would begin inside what HBM writes at once.
        whole = run // em.machine.dma_packet_max_bytes * em.machine.dma_packet_max_bytes
        for first, size in ((0, whole), (whole, run - whole)):
            if size:
                count = rows.used if returned else rows.physical
                loops = [(group.units, UNIT_STRIDE, run), (count, x.pitch, pitch)]
                em.dma(peer(held.buffer, Space.HBM, held.base + first, 0), hbm(target, first), loops, size)
        at = iter(strides)
        dims = [
            d if d.is_row else feature(n, next(at))
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
        if x.space == Space.DM and whole.local * x.pitch <= self.spill and own_rows(whole, group) == rows:
            return self._gather_in_dm(x, whole)
        held = self.image(x)
        self.exchange_with_all(held.buffer)
        dims = [row_dim(d, whole) for d in x.dims]
        image = em.alloc(whole.physical * x.pitch, space="hbm")
        self.fill(place_of(held), image, whole, x)
        loops = [
            (rows.batch, rows.batch_stride * x.pitch, whole.batch_stride * x.pitch),
            (group.units, UNIT_STRIDE, part * x.pitch),
            (part, x.pitch, x.pitch),
        ]
        em.dma(peer(held.buffer, Space.HBM, held.base, 0), hbm(image), loops, row_bytes(x))
        gathered = Tensor(image, Space.HBM, x.dtype, tuple(dims), whole, 0, x.pitch)
        return self.where_it_fits(gathered)

    def _gather_in_dm(self, x: Tensor, whole: RowSpace) -> Tensor:
        """Slices to slices, features in parts as a contraction reads them, so that its first pass starts early."""
        group, em = self.group, self.em
        rows = x.rows
        assert rows is not None
        scope = group.card_scope
        held = self.published(x, False)
        group.exchange(scope, held.buffer)
        share = rows.physical // whole.local  # slices of the whole that hold one unit's tokens
        out = replace(
            x,
            buffer=em.alloc(whole.local * x.pitch),
            dims=tuple(row_dim(d, whole) for d in x.dims),
            rows=whole,
            base=0,
        )
        loops = [
            (group.units, UNIT_STRIDE, share * DM_SLICE_STRIDE),
            *(
                (
                    t.size,
                    t.own_slice * DM_SLICE_STRIDE + t.own_row * x.pitch,
                    t.whole_slice * DM_SLICE_STRIDE + t.whole_row * x.pitch,
                )
                for t in own_tokens(whole, rows)
            ),
        ]
        run = row_bytes(x)
        for start, size in split_k(run, TRF_K_BYTES, 8):
            source = peer(held.buffer, Space.DM, held.base + start, scope.register)
            em.dma(source, dm(out.buffer, start), loops, size)
        return out

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
        held = self.image(x)
        self.exchange_with_all(held.buffer)
        own = group.register(part=part * x.pitch)
        nbytes = part * x.pitch
        copies = em.alloc(group.units * rows.batch * nbytes, space="hbm")
        loops = [
            (group.units, UNIT_STRIDE, rows.batch * nbytes),
            (rows.batch, rows.batch_stride * x.pitch, nbytes),
            (part, x.pitch, x.pitch),
        ]
        em.dma(peer(held.buffer, Space.HBM, held.base, own), hbm(copies), loops, row_bytes(x))
        sums = em.alloc(mine.physical * x.pitch, space="hbm")
        packed = sums if mine.batch_stride == part else em.alloc(rows.batch * nbytes, space="hbm")
        self.add_in_pieces(hbm(copies), group.units, rows.batch * nbytes, rows.batch * part, x, packed)
        self.fill(hbm(packed), sums, mine, x)
        if packed is not sums:
            loops = [(rows.batch, nbytes, mine.batch_stride * x.pitch), (part, x.pitch, x.pitch)]
            em.dma(hbm(packed), hbm(sums), loops, row_bytes(x))
        dims = [row_dim(d, mine) for d in x.dims]
        return self.where_it_fits(Tensor(sums, Space.HBM, x.dtype, tuple(dims), mine, 0, x.pitch))

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
        self.fill(place_of(image), target, mine, x)
        own = group.register(part=UNIT_STRIDE + size * x.pitch)
        loops = [(rows.batch, rows.batch_stride * x.pitch, mine.batch_stride * x.pitch), (size, x.pitch, x.pitch)]
        em.dma(peer(image.buffer, Space.HBM, image.base, own), hbm(target), loops, row_bytes(x))
        dims = [row_dim(d, mine) for d in x.dims]
        return self.where_it_fits(Tensor(target, Space.HBM, x.dtype, tuple(dims), mine, 0, x.pitch))
