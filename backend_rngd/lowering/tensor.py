"""Placed values: which logical dimension of a `tc` tensor lies on slices, rows and bytes. Plain maths, no IR.

Activations have *rows* (tokens: batch times length) and *features* (everything else). Rows lie on slices, features
inside a slice, so norms, rotary embeddings and softmax are local to a slice. Few rows are kept in every slice instead
(`replicated`), because then a matrix-vector product needs no exchange before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from xdsl.ir import SSAValue

from backend_rngd.isa.descriptors import Dtype, Space
from ir.errors import UnsupportedError

FEW_TOKENS = 4  # up to which every slice holds all of them: copies of more leave less room for weights on the way


def round_up(value: int, multiple: int) -> int:
    """Smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple


def power_of_two(value: int) -> int:
    """Smallest power of two that is at least `value` (>= 1)."""
    return 1 << (value - 1).bit_length() if value > 1 else 1


@dataclass(frozen=True)
class RowSpace:
    """How `batch * length` tokens lie on the slices of a unit.

    Physical row of token (b, s) is `b * batch_stride + s`; it lives in slice `row // local` at local row `row % local`
    (replicated: in every slice at local row `row`). Rows that no token uses are computed and never stored.
    """

    batch: int
    length: int
    slices: int
    local: int
    batch_stride: int
    replicated: bool

    @staticmethod
    def make(batch: int, length: int, slices: int) -> RowSpace:
        """Choose the layout of `batch` x `length` tokens on `slices` slices."""
        rows = batch * length
        if rows <= FEW_TOKENS:
            return RowSpace(batch, length, slices, power_of_two(rows), length, True)
        if length == 1:
            return RowSpace(batch, 1, slices, -(-batch // slices), 1, False)
        groups = power_of_two(batch)
        if groups > slices:
            raise UnsupportedError(
                f"a bucket of batch {batch} and input length {length}",
                f"a batch row needs at least one of the {slices} slices when it holds more than one token",
                f"use a batch of at most {slices} for prefill buckets",
            )
        per_row = slices // groups
        local = -(-length // per_row)
        return RowSpace(batch, length, slices, local, per_row * local, False)

    @property
    def physical(self) -> int:
        """Rows of the image in HBM: one slice's rows after the other's (replicated: the rows of one slice)."""
        return self.local if self.replicated else self.slices * self.local

    @property
    def slices_per_batch(self) -> int:
        """Slices that hold the tokens of one batch row (1 when several batch rows share a slice)."""
        return max(1, self.batch_stride // self.local)

    @property
    def used_slices(self) -> int:
        """Slices up to the last one that holds a token (replicated: all)."""
        last = (self.batch - 1) * self.batch_stride + self.length
        return self.slices if self.replicated else -(-last // self.local)

    @property
    def used(self) -> int:
        """Rows of the image in HBM up to the last slice that holds a token: what lies behind may not be written."""
        return self.local if self.replicated else self.used_slices * self.local

    def valid_nests(self) -> list[RowNest]:
        """Loop nests that visit every token exactly once; two when the tokens do not fill their last slice."""
        if self.replicated:
            return [RowNest(0, 0, ((self.batch, 0, self.length, 1, 0), (self.length, 0, 1, 0, 1)))]
        if self.length == 1:
            outer: tuple[tuple[int, int, int, int, int], ...] = ()
            count, batch_step, length_step = self.batch, 1, 0
        else:
            outer = ((self.batch, self.batch_stride // self.local, 0, 1, 0),)
            count, batch_step, length_step = self.length, 0, 1
        full, rest = divmod(count, self.local)
        inner = (0, 1, batch_step, length_step)
        nests: list[RowNest] = []
        if full:
            by_slice = (full, 1, 0, batch_step * self.local, length_step * self.local)
            nests.append(RowNest(0, 0, (*outer, by_slice, (self.local, *inner))))
        if rest:
            nests.append(RowNest(full, full * self.local, (*outer, (rest, *inner))))
        return nests


@dataclass(frozen=True)
class RowNest:
    """Loops over tokens: entries (count, slice step, local step, batch step, length step), from `slice` and `token`.

    `token` counts along the innermost counted dimension (length, or batch when the length is 1).
    """

    slice: int
    token: int
    loops: tuple[tuple[int, int, int, int, int], ...]


DimKind = Literal["batch", "length", "tokens", "feature", "one"]


@dataclass(frozen=True)
class Dim:
    """One logical dimension: `batch`, `length` or both (`tokens`) lie on rows; a `feature` has a byte stride."""

    kind: DimKind
    size: int
    stride: int = 0

    @property
    def is_row(self) -> bool:
        """Whether the dimension lies on rows."""
        return self.kind in ("batch", "length", "tokens")


@dataclass(frozen=True)
class Tensor:
    """A `tc` value in memory.

    DM: local row r at byte `base + r * pitch` of its slice. HBM: physical row r at byte `base + r * pitch`.
    Tensors without rows (`rows` None) are constants; in DM they are present in every slice.
    block: if not 0, features lie in blocks of so many, `block_stride` bytes apart (contractions read them so).
    """

    buffer: SSAValue
    space: Space
    dtype: Dtype
    dims: tuple[Dim, ...]
    rows: RowSpace | None
    base: int = 0
    pitch: int = 0
    block: int = 0
    block_stride: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape."""
        return tuple(d.size for d in self.dims)

    @property
    def features(self) -> tuple[Dim, ...]:
        """Feature dimensions in logical order."""
        return tuple(d for d in self.dims if d.kind == "feature")

    @property
    def row_bytes(self) -> int:
        """Bytes from the first to the last feature of a row, inclusive."""
        return sum((d.size - 1) * d.stride for d in self.features) + self.dtype.bytes

    def with_dims(self, dims: Sequence[Dim], base: int | None = None) -> Tensor:
        """The same bytes seen through other dimensions."""
        return replace(self, dims=tuple(dims), base=self.base if base is None else base)

    def transpose(self, perm: Sequence[int]) -> Tensor:
        """View with permuted dimensions."""
        return self.with_dims([self.dims[p] for p in perm])

    def slice(self, axis: int, start: int, size: int) -> Tensor | None:
        """View of a range of one dimension; None if the dimension lies on rows."""
        dim = self.dims[axis]
        if dim.is_row:
            return None if (start, size) != (0, dim.size) else self
        dims = list(self.dims)
        dims[axis] = Dim("feature", size, dim.stride) if size > 1 else Dim("one", 1)
        return self.with_dims(dims, self.base + start * dim.stride)

    def reshape(self, shape: Sequence[int]) -> Tensor | None:
        """View with another shape of the same elements in row-major order; None if it needs a copy."""
        out: list[Dim] = []
        source = [d for d in self.dims if d.size != 1]
        position = 0
        pending: list[Dim] = []
        for size in shape:
            if size == 1:
                out.append(Dim("one", 1))
                continue
            if not pending:
                if position >= len(source):
                    return None
                pending = [source[position]]
                position += 1
            while _count(pending) % size or _count(pending) < size:
                if position >= len(source):
                    return None
                pending.append(source[position])
                position += 1
            group = _split_first(pending, size)
            if group is None:
                return None
            taken, pending = group
            out.append(taken)
        return self.with_dims(out) if position == len(source) and not pending else None


def _count(dims: Sequence[Dim]) -> int:
    total = 1
    for d in dims:
        total *= d.size
    return total


def _merge(dims: Sequence[Dim]) -> Dim | None:
    """One dimension that enumerates `dims` in row-major order, or None."""
    if len(dims) == 1:
        return dims[0]
    if all(d.kind == "feature" for d in dims):
        for outer, inner in pairwise(dims):
            if outer.stride != inner.size * inner.stride:
                return None
        return Dim("feature", _count(dims), dims[-1].stride)
    if [d.kind for d in dims] == ["batch", "length"]:
        return Dim("tokens", _count(dims))
    return None


def _split_first(pending: Sequence[Dim], size: int) -> tuple[Dim, list[Dim]] | None:
    """Take the outermost `size` elements of the merged `pending` as one dimension; return it and what remains."""
    total = 1
    for i, d in enumerate(pending):
        total *= d.size
        if total == size:
            merged = _merge(pending[: i + 1])
            return None if merged is None else (merged, list(pending[i + 1 :]))
        if total > size:
            merged = _merge(pending[: i + 1])
            if merged is None:
                return None
            inner = total // size
            if merged.kind == "feature":
                outer_dim = Dim("feature", size, merged.stride * inner)
                rest = Dim("feature", inner, merged.stride)
            else:
                return None
            return outer_dim, [rest, *pending[i + 1 :]]
    return None


def split_tokens(tensor: Tensor, shape: Sequence[int]) -> Tensor | None:
    """Reshape that splits a `tokens` dimension back into batch and length."""
    rows = tensor.rows
    if rows is None:
        return None
    dims: list[Dim] = []
    for d in tensor.dims:
        if d.kind == "tokens":
            dims += [Dim("batch", rows.batch), Dim("length", rows.length)]
        else:
            dims.append(d)
    return tensor.with_dims(dims).reshape(shape)


def feature_dims(sizes: Sequence[int], element_bytes: int, spacing: int | None = None) -> tuple[list[int], int]:
    """Row-major byte strides of `sizes` and the pitch of a row; `spacing` bytes between innermost elements.

    Rows of 32 elements or more start on 64 bytes (a contraction packet), shorter ones on 8 (a fetch packet of four
    elements, hardware.md 2.4 and 2.8). Reductions use a spacing of 8: a commit writes at least 8 B.
    """
    spacing = spacing or element_bytes
    strides: list[int] = []
    extent = spacing
    for size in reversed(sizes):
        strides.append(extent)
        extent *= size
    strides.reverse()
    if spacing != element_bytes and sizes:
        extent += (round_up(sizes[-1], 4) - sizes[-1]) * spacing  # packets of four read that far
    elements = -(-extent // element_bytes)
    pitch = round_up(elements, 32) * element_bytes if elements >= 32 else round_up(elements, 4) * element_bytes
    return strides, max(round_up(pitch, 8), 8)
