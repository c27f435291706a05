"""What a `tc` value can be during lowering: a placed tensor, a parameter that is not laid out yet, or a KV cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from xdsl.ir import SSAValue

from backend_rngd.isa.descriptors import Dtype, Space
from backend_rngd.lowering.emitter import Emitter
from backend_rngd.lowering.pieces import Pieces
from backend_rngd.lowering.program import INPUT_PITCH
from backend_rngd.lowering.tensor import Dim, Tensor, feature_dims
from ir.errors import UnsupportedError
from ir.types import elem_of

DTYPES = {"bf16": Dtype.BF16, "f32": Dtype.F32, "i32": Dtype.I32, "i8": Dtype.I8, "f8e4m3": Dtype.F8E4M3}
NUMPY: dict[Dtype, np.dtype[Any]] = {
    Dtype.BF16: np.dtype(ml_dtypes.bfloat16),
    Dtype.F32: np.dtype(np.float32),
    Dtype.I32: np.dtype(np.int32),
    Dtype.I8: np.dtype(np.int8),
    Dtype.F8E4M3: np.dtype(ml_dtypes.float8_e4m3fn),
}


class Form(NamedTuple):
    """How a parameter is laid out in HBM: axes permuted, flattened to (rows, columns), both padded with zeros."""

    permute: tuple[int, ...]
    reshape: tuple[int, int]
    pad: tuple[int, int]


Bind = Callable[[Form], SSAValue]


@dataclass(frozen=True)
class Weight:
    """A parameter, or a view of one: `sizes` and element `strides` into the row-major parameter of `shape`.

    bind(form) gives its HBM buffer laid out as the form says. literal: the values of a constant. packed: words of 4-bit
    numbers and their scales; such a weight [n, k] has no buffer of its own (`packed.py`).
    """

    shape: tuple[int, ...]
    dtype: Dtype
    bind: Bind
    literal: np.ndarray[Any, Any] | None = None
    sizes: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    packed: tuple[Weight, Weight] | None = None

    @staticmethod
    def of(shape: tuple[int, ...], dtype: Dtype, bind: Bind, literal: np.ndarray[Any, Any] | None = None) -> Weight:
        """The whole parameter."""
        return Weight(shape, dtype, bind, literal, shape, _row_major(shape))

    def transpose(self, perm: Sequence[int]) -> Weight:
        """View with permuted axes."""
        return self._view([self.sizes[p] for p in perm], [self.strides[p] for p in perm])

    def reshape(self, shape: Sequence[int]) -> Weight | None:
        """View with split axes; None if axes that are not neighbours in memory would merge."""
        strides: list[int] = []
        pending = [(n, s) for n, s in zip(self.sizes, self.strides, strict=True) if n != 1]
        for size in reversed(shape):
            if size == 1:
                strides.append(0)
                continue
            if not pending:
                return None
            n, s = pending.pop()
            while n < size and pending and pending[-1][1] == n * s:
                n *= pending.pop()[0]
            if n % size:
                return None
            strides.append(s)
            if n > size:
                pending.append((n // size, s * size))
        return None if pending else self._view(list(shape), strides[::-1])

    def _view(self, sizes: Sequence[int], strides: Sequence[int]) -> Weight:
        return Weight(self.shape, self.dtype, self.bind, self.literal, tuple(sizes), tuple(strides))

    def matrix(self, rows: Sequence[int], columns: Sequence[int], pad: tuple[int, int]) -> tuple[SSAValue, int, int]:
        """Bind with view axes `rows` then `columns` flattened; returns (buffer, rows, columns) before padding."""
        order = [a for a in (*rows, *columns) if self.sizes[a] > 1]
        by_stride = {s: i for i, (n, s) in enumerate(zip(self.shape, _row_major(self.shape), strict=True)) if n > 1}
        permute: list[int] = []
        position = 0
        while position < len(order):
            last = position
            n, s = self.sizes[order[position]], self.strides[order[position]]
            while not (s in by_stride and self.shape[by_stride[s]] == n):
                last += 1
                if last >= len(order) or s != self.strides[order[last]] * self.sizes[order[last]]:
                    raise UnsupportedError(
                        f"a parameter of shape {self.shape} seen as {self.sizes}",
                        "the loader permutes whole axes only",
                        "store the parameter in the order in which it is used",
                    )
                n, s = n * self.sizes[order[last]], self.strides[order[last]]
            permute.append(by_stride[s])
            position = last + 1
        permute += [i for i, n in enumerate(self.shape) if n == 1]
        shape = (product(self.sizes[a] for a in rows), product(self.sizes[a] for a in columns))
        return self.bind(Form(tuple(permute), shape, pad)), *shape

    def vector(self) -> SSAValue:
        """Bind as one row in the parameter's own order."""
        return self.bind(Form(tuple(range(len(self.shape))), (1, product(self.shape)), (1, 32)))


def uniform(w: Weight) -> float | None:
    """The number that all elements of a literal are, None for other parameters."""
    same = w.literal is not None and w.literal.size and np.all(w.literal == w.literal.flat[0])
    return float(w.literal.flat[0]) if same and w.literal is not None else None


@dataclass
class Stored:
    """A KV cache: HBM buffer, `b k t d` shape of the bucket."""

    buffer: SSAValue
    shape: tuple[int, ...]


Value = Tensor | Pieces | Weight | Stored


@dataclass
class Slot:
    """Where an activation argument of a block lives: a global of its own or (direct) one of the program's inputs."""

    name: str
    like: Tensor
    direct: str | None = field(default=None)


def product(values: Iterable[int]) -> int:
    """Product of integers."""
    out = 1
    for v in values:
        out *= int(v)
    return out


def _row_major(shape: Sequence[int]) -> tuple[int, ...]:
    strides: list[int] = []
    extent = 1
    for n in reversed(shape):
        strides.append(extent)
        extent *= n
    return tuple(reversed(strides))


def dtype_of(value: SSAValue) -> Dtype:
    """Stream type of a tensor's elements."""
    element = elem_of(value)
    if element not in DTYPES:
        raise UnsupportedError(
            f"element type {element}", "the lowering knows bf16, f32, i32, i8 and f8e4m3", "cast the model to bf16"
        )
    return DTYPES[element]


def in_global(like: Tensor, name: str, em: Emitter) -> Tensor:
    """A compact tensor like `like` in the global `name`, seen from the routine that `em` writes."""
    order = sorted((i for i, d in enumerate(like.dims) if d.kind == "feature"), key=lambda i: -like.dims[i].stride)
    spacing = min((like.dims[i].stride for i in order), default=like.dtype.bytes)
    strides, pitch = feature_dims([like.dims[i].size for i in order], like.dtype.bytes, spacing)
    if not order:
        pitch = INPUT_PITCH
    dims = list(like.dims)
    for i, s in zip(order, strides, strict=True):
        dims[i] = Dim("feature", like.dims[i].size, s)
    count = 1 if like.rows is None else (like.rows.physical if like.space == Space.HBM else like.rows.local)
    nbytes = max(em.declared_bytes(name), count * pitch)
    buffer = em.global_buffer(name, "hbm" if like.space == Space.HBM else "dm", nbytes, "activation")
    return Tensor(buffer, like.space, like.dtype, tuple(dims), like.rows, 0, pitch)


def probe_layout(t: Tensor) -> dict[str, Any]:
    """Where each element of a tensor with rows lies, for `rngdc check`."""
    rows = t.rows
    assert rows is not None
    hbm = t.space == Space.HBM
    digits: list[list[int]] = []

    def row_digits(dim: int, size: int, step: int) -> None:
        if rows.replicated or hbm:
            digits.append([dim, size, 0, step * t.pitch])
        elif step % rows.local == 0:
            digits.append([dim, size, step // rows.local, 0])
        else:
            inner = min(rows.local, size)
            digits.append([dim, -(-size // inner), 1, 0])
            digits.append([dim, inner, 0, t.pitch])

    for i, d in enumerate(t.dims):
        if d.kind == "batch":
            row_digits(i, d.size, 1 if rows.length == 1 else rows.batch_stride)
        elif d.kind == "length":
            row_digits(i, d.size, 1)
        elif d.kind == "tokens":
            row_digits(i, rows.batch, rows.batch_stride)
            row_digits(i, rows.length, 1)
        elif d.kind == "feature" and t.block:
            digits += [[i, d.size // t.block, 0, t.block_stride], [i, t.block, 0, d.stride]]
        elif d.kind == "feature":
            digits.append([i, d.size, 0, d.stride])
    return _probed(t, digits)


def probe_pieces(p: Pieces) -> dict[str, Any]:
    """`probe_layout` of a value whose features lie in pieces on the slices."""
    t, rows = p.held, p.rows
    steps = {"batch": rows.length if rows.length > 1 else 1, "length": 1, "tokens": 1}
    digits: list[list[int]] = []
    for i, (d, whole) in enumerate(zip(t.dims, p.dims, strict=True)):
        if d.is_row:
            digits.append([i, d.size, 0, steps[d.kind] * t.pitch])
        elif d.kind == "feature":
            digits += [[i, whole.size // d.size, 1, 0], [i, d.size, 0, d.stride]]
    return _probed(replace(t, dims=p.dims), digits)


def _probed(t: Tensor, digits: list[list[int]]) -> dict[str, Any]:
    space = "hbm" if t.space == Space.HBM else "dm"
    return {"dtype": t.dtype.name.lower(), "shape": list(t.shape), "base": t.base, "space": space, "digits": digits}


def port_strides(t: Tensor) -> tuple[int, ...]:
    """Byte strides of an HBM tensor's logical dimensions."""
    rows = t.rows
    assert rows is not None
    by_kind = {"batch": rows.batch_stride * t.pitch, "length": t.pitch, "tokens": t.pitch, "one": 0}
    return tuple(d.stride if d.kind == "feature" else by_kind[d.kind] for d in t.dims)
