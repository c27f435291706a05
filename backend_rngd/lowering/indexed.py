"""Indirect transfers: embedding rows, one token per batch row, KV-cache writes. Offsets are computed on the device.

A gather or scatter adds a 32-bit byte offset from HBM to an address (hardware.md 3.2); the offset is index * row bytes,
one integer pass of the vector engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from xdsl.ir import SSAValue

from backend_rngd.isa.descriptors import DM_SLICE_STRIDE, Dtype, Space
from backend_rngd.lowering.attention_types import Cache
from backend_rngd.lowering.emitter import Emitter, Offsets, dm, hbm
from backend_rngd.lowering.move import compact_like, feature_loops, load_rows, place_of, store_rows
from backend_rngd.lowering.tensor import Dim, RowSpace, Tensor, round_up
from backend_rngd.lowering.vector import VectorLowering, Wanted, output_tensor
from backend_rngd.machine import Machine
from ir import expr as ex

OFFSET_BYTES = 8  # an offset and its padding: a commit writes at least 8 B


def offset_pitch(rows: RowSpace, machine: Machine) -> int:
    """Bytes between offsets in HBM: those of a slice lie side by side, and a single one gets as many as HBM writes
    without merging them with what lies there, which takes long."""
    return machine.hbm_write_granule_bytes if rows.local == 1 and not rows.replicated else OFFSET_BYTES


def offsets(
    em: Emitter, vector: VectorLowering, index: Tensor, row_bytes: int, image: SSAValue | None = None
) -> SSAValue:
    """HBM image `[physical row]` (see `offset_pitch`) of index * row_bytes for an i32 tensor with rows."""
    rows = index.rows
    assert rows is not None
    if index.space == Space.HBM:
        index = load_rows(em, index, rows.local)
    names = [f"d{i}" for i in range(len(index.dims))]
    # As far apart as in HBM, so that those of a slice leave as one packet.
    pitch = offset_pitch(rows, em.machine)
    scaled = replace(index, buffer=em.alloc(rows.local * pitch), base=0, pitch=pitch)
    if pitch > OFFSET_BYTES:
        em.memset(scaled.buffer, 0, pitch)
    e = ex.Call("mul", (ex.Input(0), ex.Const(float(row_bytes))))
    vector.map(e, [index], [names], names, Dtype.I32, target=scaled)
    image = image or em.alloc(rows.physical * pitch, "offsets", "hbm")
    target = Tensor(image, Space.HBM, Dtype.I32, scaled.dims, rows, 0, pitch)
    each = rows.local * pitch
    if pitch > OFFSET_BYTES:
        em.dma(dm(scaled.buffer), hbm(image), [(em.slices, DM_SLICE_STRIDE, each)], each)
    elif not rows.replicated and each % em.machine.hbm_write_granule_bytes:
        # All of them leave from one slice in whole granules.
        flat = em.alloc(rows.physical * pitch, "offsets")
        em.dma(dm(scaled.buffer), dm(flat), [(em.slices, DM_SLICE_STRIDE, each)], each)
        em.dma(dm(flat), hbm(image), [(em.slices, each, each)], each)
    else:
        store_rows(em, scaled, target, rows.local)
    return image


def embedding(
    em: Emitter,
    table: SSAValue,
    row_bytes: int,
    at: SSAValue,
    rows: RowSpace,
    dims: Sequence[Dim],
    dtype: Dtype,
    spill: int,
) -> Tensor:
    """Rows of an HBM table for every physical row of `rows`; `at` are byte offsets."""
    order = [i for i, d in enumerate(dims) if d.kind == "feature"]
    out = output_tensor(em, Wanted(dims, dtype, rows, order), spill)
    run = 1
    for i in order:
        run *= dims[i].size
    run = round_up(run * dtype.bytes, 8)
    pitch = offset_pitch(rows, em.machine)
    across = 0 if rows.replicated else rows.local * pitch
    chunk = rows.local if out.space == Space.DM else max(1, spill // out.pitch)  # a gather writes DM
    for first in range(0, rows.local, chunk):
        count = min(chunk, rows.local - first)
        here = out if out.space == Space.DM else compact_like(em, out, count)
        em.dma(
            hbm(table),
            dm(here.buffer),
            [(em.slices, 0, DM_SLICE_STRIDE), (count, 0, here.pitch)],
            run,
            Offsets(at, first * pitch, [across, pitch]),
        )
        if out.space == Space.HBM:
            store_rows(em, here, replace(out, base=out.base + first * out.pitch), count)
    return out


def one_token(em: Emitter, vector: VectorLowering, x: Tensor, index: Tensor, dims: Sequence[Dim]) -> Tensor:
    """x[b, index[b], features] for every batch row; the result has one token per batch row and lies in DM."""
    tokens, rows = x.rows, index.rows
    assert tokens is not None
    assert rows is not None
    if x.space == Space.DM:
        image = em.alloc(tokens.physical * x.pitch, "tokens", "hbm")
        held = Tensor(image, Space.HBM, x.dtype, x.dims, tokens, 0, x.pitch)
        store_rows(em, x, held, tokens.local)
        x = held
    at = offsets(em, vector, index, x.pitch)
    order = [i for i, d in enumerate(dims) if d.kind == "feature"]
    out = output_tensor(em, Wanted(dims, x.dtype, rows, order), em.machine.dm_slice_bytes)
    run = round_up(x.row_bytes, 8)
    # Physical rows beyond the batch get row 0, so that every row is initialised.
    em.dma(hbm(x.buffer, x.base), dm(out.buffer), [(em.slices, 0, DM_SLICE_STRIDE), (rows.local, 0, out.pitch)], run)
    step = tokens.batch_stride * x.pitch
    if rows.replicated:
        em.dma(
            hbm(x.buffer, x.base),
            dm(out.buffer),
            [(em.slices, 0, DM_SLICE_STRIDE), (rows.batch, step, out.pitch)],
            run,
            Offsets(at, 0, [0, OFFSET_BYTES]),
        )
        return out
    pitch = offset_pitch(rows, em.machine)
    for nest in rows.valid_nests():
        loops = [(n, b * step, s * DM_SLICE_STRIDE + local * out.pitch) for n, s, local, b, _ in nest.loops]
        strides = [(s * rows.local + local) * pitch for _, s, local, _, _ in nest.loops]
        em.dma(
            hbm(x.buffer, x.base + nest.token * step),
            dm(out.buffer, nest.slice * DM_SLICE_STRIDE),
            loops,
            run,
            Offsets(at, nest.slice * rows.local * pitch, strides),
        )
    return out


def token_range(em: Emitter, x: Tensor, start: int, size: int) -> Tensor:
    """Tokens `start` to `start + size` of every batch row, in DM, spread over the slices as so many tokens are."""
    tokens = x.rows
    assert tokens is not None
    if x.space == Space.DM:
        image = replace(x, buffer=em.alloc(tokens.physical * x.pitch, "tokens", "hbm"), space=Space.HBM, base=0)
        store_rows(em, x, image, tokens.local)
        x = image
    rows = RowSpace.make(tokens.batch, size, em.slices)
    dims = [replace(d, size=size) if d.kind == "length" else d for d in x.dims]
    out = compact_like(em, replace(x, dims=tuple(dims), rows=rows), rows.local)
    loops, packet = feature_loops(x, out)
    if rows.replicated or rows.batch * size < rows.physical:
        # Rows that no token uses get others, so that every row is initialised.
        fill = [(em.slices, 0, DM_SLICE_STRIDE), (rows.local, x.pitch, out.pitch)]
        em.dma(hbm(x.buffer, x.base), dm(out.buffer), [*fill, *loops], packet)
    step = tokens.batch_stride * x.pitch
    for nest in rows.valid_nests():
        nested = [(n, b * step + t * x.pitch, s * DM_SLICE_STRIDE + r * out.pitch) for n, s, r, b, t in nest.loops]
        first = nest.token * (step if size == 1 else x.pitch) + start * x.pitch
        em.dma(
            hbm(x.buffer, x.base + first), dm(out.buffer, nest.slice * DM_SLICE_STRIDE), [*nested, *loops], packet
        )  # fmt: skip
    return out


def write_cache(em: Emitter, new: Tensor, cache: Cache, at: SSAValue, head: int = 0) -> None:
    """cache[b, head + k, slot, :] = new[b, k, s, :] for every token; new `b k s d`, `at` offsets of its slot."""
    rows, heads, width = new.rows, new.dims[1], new.dims[3]
    assert rows is not None
    pitch = offset_pitch(rows, em.machine)
    for nest in rows.valid_nests():
        loops = [
            (n, s * DM_SLICE_STRIDE + local * new.pitch, b * cache.batch_stride) for n, s, local, b, _ in nest.loops
        ]
        strides = [(s * rows.local + local) * pitch for _, s, local, _, _ in nest.loops]
        first = head * cache.head_stride + (nest.token * cache.batch_stride if rows.length == 1 else 0)
        em.dma(
            dm(new.buffer, new.base + nest.slice * DM_SLICE_STRIDE),
            hbm(cache.buffer, first),
            [*loops, (heads.size, heads.stride, cache.head_stride)],
            width.size * new.dtype.bytes,
            Offsets(at, nest.slice * rows.local * pitch, [*strides, 0], scatter=True),
        )


def as_keys(em: Emitter, x: Tensor) -> Cache:
    """Write `b k s d` activations to HBM as `[batch][head][token][value]` (encoders: keys are this step's tokens)."""
    rows, heads, width = x.rows, x.dims[1], x.dims[3]
    assert rows is not None
    value = width.size * x.dtype.bytes
    head = rows.length * value
    image = em.alloc(rows.batch * heads.size * head, "keys", "hbm")
    across = DM_SLICE_STRIDE if x.space == Space.DM else rows.local * x.pitch
    for nest in rows.valid_nests():
        loops = [
            (n, s * across + local * x.pitch, b * heads.size * head + t * value) for n, s, local, b, t in nest.loops
        ]
        first = nest.token * (heads.size * head if rows.length == 1 else value)
        em.dma(
            place_of(x, nest.slice * across),
            hbm(image, first),
            [*loops, (heads.size, heads.stride, head)],
            value,
        )
    return Cache(image, heads.size * head, head, rows.length, width.size)


def token_lengths(em: Emitter, lengths: Tensor, rows: RowSpace) -> Tensor:
    """lengths[b] for every token of `rows`: i32 in DM, 8 B a row (slices without tokens get lengths[0])."""
    out = Tensor(
        em.alloc(rows.local * 8),
        Space.DM,
        Dtype.I32,
        (Dim("batch", rows.batch), Dim("length", rows.length)),
        rows,
        0,
        8,
    )
    em.dma(hbm(lengths.buffer, lengths.base), dm(out.buffer), [(em.slices, 0, DM_SLICE_STRIDE), (rows.local, 0, 8)], 8)
    if rows.replicated:
        em.dma(
            hbm(lengths.buffer, lengths.base),
            dm(out.buffer),
            [(em.slices, 0, DM_SLICE_STRIDE), (rows.batch, 8, rows.length * 8), (rows.length, 0, 8)],
            8,
        )
    else:
        per = rows.slices_per_batch
        em.dma(
            hbm(lengths.buffer, lengths.base),
            dm(out.buffer),
            [(rows.batch, 8, per * DM_SLICE_STRIDE), (per, 0, DM_SLICE_STRIDE), (rows.local, 0, 8)],
            8,
        )
    return out
