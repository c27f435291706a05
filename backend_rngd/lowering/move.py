"""Transfers that change where a value lives, not what it is: HBM rows to DM and back, constants, ring broadcasts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from xdsl.ir import SSAValue

from backend_rngd.isa.descriptors import DM_SLICE_STRIDE, FLIT_BYTES, Commit, Dtype, Space, Switch, SwitchKind
from backend_rngd.lowering.emitter import Emitter, Place, dm, hbm
from backend_rngd.lowering.program import INPUT_PITCH
from backend_rngd.lowering.tensor import Dim, Tensor, feature_dims, round_up


def place_of(t: Tensor, offset: int = 0) -> Place:
    """The byte `offset` of a tensor, in the memory where it lives."""
    return Place(t.buffer, t.space, t.base + offset)


def feature_loops(source: Tensor, target: Tensor) -> tuple[list[tuple[int, int, int]], int]:
    """DMA loops over the features of two tensors of equal logical shape, outer to inner, and the contiguous packet."""
    pairs = [
        (s.size, s.stride, t.stride)
        for s, t in zip(source.dims, target.dims, strict=True)
        if s.kind == "feature" and s.size > 1
    ]
    pairs.sort(key=lambda p: -p[1])
    width = source.dtype.bytes
    if not pairs:
        return [], 8  # rows only: the value and its padding
    size, from_stride, to_stride = pairs[-1]
    if from_stride == width and to_stride == width:
        # Passes read the padding of odd rows, in packets of four: it must hold something.
        padded = round_up(size, 4) * width
        whole = len(pairs) == 1 and padded <= min(source.pitch, target.pitch)
        return pairs[:-1], padded if whole else round_up(size * width, 8)
    return pairs, width


def compact(t: Tensor) -> Tensor:
    """`t` as it lies in DM, without a buffer of its own: features row-major in the order of their strides."""
    order = sorted((i for i, d in enumerate(t.dims) if d.kind == "feature"), key=lambda i: -t.dims[i].stride)
    strides, pitch = feature_dims([t.dims[i].size for i in order], t.dtype.bytes)
    if not order:
        pitch = INPUT_PITCH  # as in HBM, so that a slice's rows arrive as one packet
    dims = list(t.dims)
    for i, stride in zip(order, strides, strict=True):
        dims[i] = Dim("feature", t.dims[i].size, stride)
    return replace(t, space=Space.DM, dims=tuple(dims), base=0, pitch=pitch)


def compact_like(em: Emitter, t: Tensor, rows: int) -> Tensor:
    """A DM buffer for `rows` local rows of `t`."""
    out = compact(t)
    return replace(out, buffer=em.alloc(rows * out.pitch))


def load_rows(em: Emitter, t: Tensor, rows: int) -> Tensor:
    """Bring `rows` local rows (from `t.base` on) of an HBM tensor, or a whole constant, into DM of every slice."""
    own = compact(t)
    loops, packet = feature_loops(t, own)
    across = t.rows is not None and not t.rows.replicated
    if not across and not loops and (rows == 1 or packet == t.pitch == own.pitch):
        buffer = load_everywhere(em, hbm(t.buffer, t.base), t.dtype, rows * packet, rows * own.pitch)
        if buffer is not None:
            return replace(own, buffer=buffer)
    out = compact_like(em, t, rows)
    slices, step = em.slices, 0
    if t.rows is not None:
        slices, step = t.rows.used_slices, 0 if t.rows.replicated else t.rows.local * t.pitch
        if slices < em.slices:  # the others take part in passes all the same
            em.memset(out.buffer, 0, rows * out.pitch)
    em.dma(
        hbm(t.buffer, t.base), dm(out.buffer),
        [(slices, step, DM_SLICE_STRIDE), (rows, t.pitch, out.pitch), *loops], packet,
    )  # fmt: skip
    return out


def load_everywhere(em: Emitter, source: Place, dtype: Dtype, nbytes: int, room: int = 0) -> SSAValue | None:
    """Bring the same bytes of HBM to all slices: a piece to each, or to some if they are few, then round the ring. None
    if they cannot be cut so. room: bytes of the buffer at least.

    As many copies as there are slices would all come from a few lines, which lie in a few channels of HBM.
    """
    width, flit = dtype.bytes, FLIT_BYTES
    piece = nbytes // em.slices if nbytes % (em.slices * flit) == 0 else min(nbytes, flit)
    if piece % 8 or nbytes % piece or nbytes // piece > em.slices:
        return None
    pieces, count, length = em.alloc(piece, "piece"), nbytes // piece, piece // width
    if count < em.slices:  # the ring reads every slice
        em.memset(pieces, 0, piece)
    em.dma(source, dm(pieces), [(count, piece, DM_SLICE_STRIDE)], piece)
    everywhere = em.alloc(max(em.slices * piece, room))
    packet = ring_packet(length, flit // width) if piece % flit == 0 else length
    ring_broadcast(
        em, pieces, [(length, width)], dtype, packet, 0, em.slices, everywhere, 0,
        [(length // packet, packet * width)], piece, [(packet, width)], min(packet, flit // width),
    )  # fmt: skip
    return everywhere


def store_rows(em: Emitter, source: Tensor, target: Tensor, rows: int) -> None:
    """Write `rows` local rows of a DM tensor to the HBM tensor `target` (from `target.base` on)."""
    assert target.rows is not None
    loops, packet = feature_loops(source, target)
    slices = 1 if target.rows.replicated else em.slices
    row_loops = [(slices, DM_SLICE_STRIDE, target.rows.local * target.pitch), (rows, source.pitch, target.pitch)]
    em.dma(dm(source.buffer, source.base), hbm(target.buffer, target.base), [*row_loops, *loops], packet)


def move_rows(em: Emitter, source: Tensor, target: Tensor) -> None:
    """Copy all rows between HBM and DM, or inside HBM; both sides have the same rows and logical shape."""
    rows = target.rows
    assert rows is not None
    if source.space == Space.DM:
        store_rows(em, source, target, rows.local)
        return
    loops, packet = feature_loops(source, target)
    if target.space == Space.HBM:
        em.dma(place_of(source), place_of(target), [(rows.physical, source.pitch, target.pitch), *loops], packet)
        return
    across = 0 if rows.replicated else rows.local * source.pitch
    row_loops = [(em.slices, across, DM_SLICE_STRIDE), (rows.local, source.pitch, target.pitch)]
    em.dma(place_of(source), place_of(target), [*row_loops, *loops], packet)


def ring_broadcast(
    em: Emitter,
    source: SSAValue,
    fetch_loops: Sequence[tuple[int, int]],
    dtype: Dtype,
    packet: int,
    source_base: int,
    ring: int,
    target: SSAValue,
    target_base: int,
    time_loops: Sequence[tuple[int, int]],
    ring_stride: int,
    packet_loops: Sequence[tuple[int, int]],
    valid: int,
    slices: int | None = None,
    around: Sequence[tuple[int, int]] = (),
) -> None:
    """Every slice of a ring of `ring` slices receives what each of them holds (switch BROADCAST01).

    `fetch_loops` enumerate a slice's own elements, `packet` elements a time step; the commit walks (time, ring, packet)
    with the given strides. `valid` elements are kept of every 32 B flit. around: loops over the ring's slices, if their
    pieces do not lie `ring_stride` apart.
    """
    em.execute(
        em.fetch(source_base, fetch_loops, dtype, packet),
        source,
        Commit(target_base, (*time_loops, *(around or ((ring, ring_stride),)), *packet_loops), dtype, valid),
        target,
        switch=Switch(SwitchKind.BROADCAST01, 1, ring, _time(fetch_loops, packet)),
        slices=slices,
    )


def ring_packet(elements: int, flit: int) -> int:
    """Packet of a ring broadcast of `elements` contiguous elements a slice: whole flits, up to 256 B.

    Long packets keep consecutive writes of the commit on different banks: with one flit a packet, 64 slices whose
    pieces lie 128 B apart would hit the same bank 64 times in a row, which can starve DMA (hardware.md 2.2).
    """
    whole = [p for p in range(flit, 8 * flit + 1, flit) if elements % p == 0]
    return max(whole) if whole else max(p for p in range(4, flit + 1, 4) if elements % p == 0)


def _time(loops: Sequence[tuple[int, int]], packet: int) -> int:
    total = 1
    for n, _ in loops:
        total *= n
    return total // packet
