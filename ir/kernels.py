"""Reference kernels of the `tc` operations on numpy arrays: what every later level is compared with.

bf16 arrays have dtype `ml_dtypes.bfloat16`. Kernels compute in f32 (integer maps in i32) and round once, to nearest
even, to the result dtype. They are written for speed on a CPU: contractions become batched matrix products, attention
runs over blocks of query rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ir import expr as ex
from ir.axes import Rule

Array = NDArray[Any]
F32 = np.dtype(np.float32)
F8 = np.dtype(ml_dtypes.float8_e4m3fn)
F8_MAX = 448.0
SCORE_BLOCK = 1 << 24
"""Elements of a block of attention scores: 64 MB."""


class KernelError(ValueError):
    """Operand values that the operation is not defined for, such as an index outside its table."""


def round_to(x: Array, dtype: np.dtype[Any]) -> Array:
    """Round f32 (or i32) values once to the result dtype. To i1: not equal to zero; to i32: towards zero.

    Quantized types saturate: i8 at -128 and 127, to nearest even; f8e4m3 at 448 (the cast engine, hardware.md 2.10).
    """
    if x.dtype == dtype:
        return x
    if dtype == np.bool_:
        return x != 0
    if dtype == np.int32:
        return np.trunc(x).astype(np.int32)
    if dtype == np.int8:
        return np.clip(np.rint(x), -128, 127).astype(np.int8)
    if dtype == F8:
        return np.clip(x, -F8_MAX, F8_MAX).astype(F8)
    with np.errstate(over="ignore"):
        return x.astype(dtype)


def to_f32(x: Array) -> Array:
    """Operands as f32; exact for bf16 and f16."""
    return x.astype(np.float32, copy=False)


def contract(rule: Rule, lhs: Array, rhs: Array, dtype: np.dtype[Any]) -> Array:
    """Sum of products over `rule.reduced`, as one batched matrix product in f32; exact for integers, then rounded."""
    left_axes, right_axes = rule.inputs
    if lhs.dtype.kind == "i":
        lhs, rhs = lhs.astype(np.float64), rhs.astype(np.float64)
    left, left_axes = _sum_private(_wide(lhs), left_axes, {*right_axes, *rule.output})
    right, right_axes = _sum_private(_wide(rhs), right_axes, {*left_axes, *rule.output})
    batch = [a for a in rule.output if a in left_axes and a in right_axes]
    rows = [a for a in rule.output if a in left_axes and a not in right_axes]
    columns = [a for a in rule.output if a in right_axes and a not in left_axes]
    inner = [a for a in left_axes if a in right_axes and a not in rule.output]
    size = dict(zip((*left_axes, *right_axes), (*left.shape, *right.shape), strict=True))
    matrices: list[Array] = []
    for array, axes, order in ((left, left_axes, (batch, rows, inner)), (right, right_axes, (batch, inner, columns))):
        moved = array.transpose([axes.index(a) for group in order for a in group])
        # One dimension per group; the batch dimension is dropped where there is none, so that BLAS sees 2-D operands.
        shape = [math.prod(size[a] for a in group) for group in order]
        matrices.append(moved.reshape(shape if batch else shape[1:]))
    product = np.matmul(matrices[0], matrices[1])
    have = [*batch, *rows, *columns]
    product = product.reshape([size[a] for a in have]).transpose([have.index(a) for a in rule.output])
    return round_to(product, dtype)


def _wide(x: Array) -> Array:
    return x if x.dtype == np.float64 else to_f32(x)


def _sum_private(x: Array, axes: Sequence[str], needed: set[str]) -> tuple[Array, tuple[str, ...]]:
    """Sum over axes that no other operand and no result has."""
    private = tuple(i for i, a in enumerate(axes) if a not in needed)
    return (x.sum(axis=private) if private else x), tuple(a for a in axes if a in needed)


def dequantize(packed: Array, scale: Array, dtype: np.dtype[Any]) -> Array:
    """4-bit numbers (words i32 [n, k/8], the first in the lowest bits, 8 added) times scales [n, groups] -> [n, k]."""
    shifts = np.arange(0, 32, 4, dtype=np.uint32)
    nibbles = (packed.view(np.uint32)[:, :, None] >> shifts & 15).astype(np.float32) - np.float32(8)
    grouped = nibbles.reshape(*scale.shape, -1) * to_f32(scale)[:, :, None]
    return round_to(grouped.reshape(packed.shape[0], -1), dtype)


def align(x: Array, axes: Sequence[str], order: Sequence[str]) -> Array:
    """A view of x with one dimension per axis of `order`; size 1 where x has no such axis."""
    moved = x.transpose([axes.index(a) for a in order if a in axes])
    return moved[tuple(slice(None) if a in axes else None for a in order)]


def map_(rule: Rule, expr: ex.Expr, inputs: Sequence[Array], shape: Sequence[int], dtype: np.dtype[Any]) -> Array:
    """An element-wise expression; `shape` is the result's, which broadcasts may exceed the operands'."""
    operands = [align(x, axes, rule.output) for x, axes in zip(inputs, rule.inputs, strict=True)]
    integer = dtype.kind in "ib" and all(x.dtype.kind in "ib" for x in inputs)
    value = round_to(ex.evaluate(expr, operands, integer), dtype)
    return value if value.shape == tuple(shape) else np.broadcast_to(value, tuple(shape)).copy()


def reduce(rule: Rule, kind: str, expr: ex.Expr, inputs: Sequence[Array], dtype: np.dtype[Any]) -> Array:
    """Reduce an expression with add, max or min in f32 over the axes absent from the output."""
    axes = [*rule.output, *rule.reduced]
    size = {a: n for x, names in zip(inputs, rule.inputs, strict=True) for a, n in zip(names, x.shape, strict=True)}
    operands = [align(x, names, axes) for x, names in zip(inputs, rule.inputs, strict=True)]
    value = np.broadcast_to(ex.evaluate(expr, operands), [size[a] for a in axes])
    over = tuple(range(len(rule.output), len(axes)))
    function = {"add": np.sum, "max": np.max, "min": np.min}[kind]
    return round_to(np.asarray(function(value, axis=over), np.float32), dtype)


def gather(rule: Rule, table: Array, indices: Array) -> Array:
    """Rows of `table`; raises KernelError if an index is outside."""
    table_axes, index_axes = rule.inputs
    indexed = next(a for a in table_axes if a not in rule.output)
    _check_index(indices, table.shape[table_axes.index(indexed)], "index")
    batch = [a for a in table_axes if a in index_axes]
    rest = [a for a in table_axes if a not in batch and a != indexed]
    own = [a for a in index_axes if a not in batch]
    moved = table.transpose([table_axes.index(a) for a in (*batch, indexed, *rest)])
    places = indices.transpose([index_axes.index(a) for a in (*batch, *own)])
    grid: tuple[Array, ...] = np.ix_(*(np.arange(n) for n in places.shape[: len(batch)])) if batch else ()
    rows = moved[(*(g.reshape(*g.shape, *[1] * len(own)) for g in grid), places)]
    have = [*batch, *own, *rest]
    return rows.transpose([have.index(a) for a in rule.output])


def _check_index(indices: Array, size: int, what: str) -> None:
    if indices.size and (int(indices.min()) < 0 or int(indices.max()) >= size):
        raise KernelError(f"{what} {int(indices.min())} to {int(indices.max())} outside 0 to {size - 1}")


def kv_update(cache: Array, new: Array, slots: Array) -> Array:
    """A copy of `cache` (b k t d) with `new` (b k s d) at `slots` (b s); later rows win."""
    _check_index(slots, cache.shape[2], "slot")
    result = cache.copy()
    batch = np.array(range(cache.shape[0])).reshape(-1, 1)
    # Advanced indices around a slice put their dimensions first: b s k d.
    result[batch, :, slots] = new.transpose(0, 2, 1, 3)
    return result


def attention(
    q: Array,
    k: Array,
    v: Array,
    positions: Array,
    lengths: Array | None,
    bias: Array | None,
    sinks: Array | None,
    *,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
    dtype: np.dtype[Any],
) -> Array:
    """Grouped-query attention as `tc.attention` defines it; q `b h s d`, k `b k t d`, v `b k t e` -> `b s h e`."""
    batch, heads, queries, width = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    group = heads // kv_heads
    keys_t = to_f32(k).swapaxes(2, 3)
    values = to_f32(v)
    result = np.zeros((batch, queries, heads, v.shape[3]), dtype)
    block = max(1, SCORE_BLOCK // max(1, batch * heads * keys))
    for start in range(0, queries, block):
        rows = slice(start, min(start + block, queries))
        count = rows.stop - start
        block_q = to_f32(q[:, :, rows]).reshape(batch, kv_heads, group * count, width)
        scores = np.matmul(block_q, keys_t).reshape(batch, heads, count, keys)
        scores *= np.float32(scale)
        if softcap > 0:
            scores = np.tanh(scores / np.float32(softcap)) * np.float32(softcap)
        if bias is not None:
            scores += to_f32(bias[:, :, rows] if bias.shape[2] != 1 else bias)
        visible = visibility(positions[:, rows], keys, lengths, causal, window)
        scores = np.where(visible[:, None], scores, np.float32(-np.inf))
        weights = _softmax(scores, None if sinks is None else to_f32(sinks).reshape(-1, 1, 1))
        mixed = np.matmul(weights.reshape(batch, kv_heads, group * count, keys), values)
        result[:, rows] = round_to(mixed.reshape(batch, heads, count, -1).swapaxes(1, 2), dtype)
    return result


def first_keys(
    count: int, k: Array, v: Array, positions: Array, bias: Array | None
) -> tuple[Array, Array, Array | None]:
    """The keys, values and bias of the first `count` keys. Raises KernelError if a position is not below them."""
    _check_index(positions, count, "position")
    if bias is not None and bias.shape[3] != 1:
        bias = bias[..., :count]
    return k[:, :, :count], v[:, :, :count], bias


def visibility(positions: Array, keys: int, lengths: Array | None, causal: bool, window: int) -> Array:
    """Which key each query sees: bool `b s t`."""
    t = np.arange(keys, dtype=np.int32)
    distance = positions[:, :, None] - t
    visible = distance >= 0 if causal else np.ones(distance.shape, np.bool_)
    if window > 0:
        visible &= (distance if causal else np.abs(distance)) < window
    if lengths is not None:
        visible &= (t < lengths[:, None])[:, None]
    return visible


def _softmax(scores: Array, sinks: Array | None) -> Array:
    """Softmax over the last axis, with `sinks` in the denominator; rows of -inf give 0. Overwrites its operand."""
    top = scores.max(axis=-1, keepdims=True) if scores.shape[-1] else np.full((*scores.shape[:-1], 1), -np.inf, F32)
    if sinks is not None:
        top = np.maximum(top, sinks)
    top = np.where(np.isfinite(top), top, np.float32(0))
    np.exp(np.subtract(scores, top, out=scores), out=scores)
    total = scores.sum(axis=-1, keepdims=True)
    if sinks is not None:
        total += np.exp(sinks - top)
    return np.divide(scores, np.where(total == 0, np.float32(1), total), out=scores)


def all_reduce(parts: Sequence[Array], kind: str) -> Array:
    """The sum or maximum of the arrays of a group of units, in f32, rounded once to their dtype."""
    wide = np.stack([to_f32(p) for p in parts])
    return round_to(wide.max(axis=0) if kind == "max" else wide.sum(axis=0), parts[0].dtype)
