"""Operators that move or select elements: reshape, transpose, slice, split, expand, concatenate."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch

from frontend.aten.table import Meta, axis, rule
from frontend.emit import Emitter, NoRuleError, Splat, Value, View

aten = torch.ops.aten


@rule(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints)
@rule(aten.unflatten.int)
def _reshape(e: Emitter, m: Meta, x: Value, *args: Any) -> Value:
    return Splat(x.value, m.shape, x.elem) if isinstance(x, Splat) else e.reshape(x, m.shape)


@rule(aten.transpose.int)
def _transpose(e: Emitter, m: Meta, x: Value, first: int, second: int) -> Value:
    perm = list(range(len(m.shape)))
    i, j = axis(first, len(perm)), axis(second, len(perm))
    perm[i], perm[j] = perm[j], perm[i]
    return _permute(e, m, x, perm)


@rule(aten.permute.default)
def _permute(e: Emitter, m: Meta, x: Value, perm: Sequence[int]) -> Value:
    if isinstance(x, Splat):
        return Splat(x.value, m.shape, x.elem)
    return e.transpose(x, [axis(p, len(m.shape)) for p in perm])


@rule(aten.t.default, aten.numpy_T.default)
def _t(e: Emitter, m: Meta, x: Value) -> Value:
    return _permute(e, m, x, list(reversed(range(len(m.shape)))))


@rule(aten.unsqueeze.default)
def _unsqueeze(e: Emitter, m: Meta, x: Value, dim: int) -> Value:
    if isinstance(x, Splat):
        return Splat(x.value, m.shape, x.elem)
    at = axis(dim, len(m.shape))
    return View(x.ssa, (*x.dims[:at], None, *x.dims[at:]), m.shape, x.elem)


@rule(aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default)
def _squeeze(e: Emitter, m: Meta, x: Value, *args: Any) -> Value:
    return _reshape(e, m, x)


@rule(aten.expand.default, aten.expand_as.default)
def _expand(e: Emitter, m: Meta, x: Value, *args: Any, **kwargs: Any) -> Value:
    if isinstance(x, Splat):
        return Splat(x.value, m.shape, x.elem)
    added = len(m.shape) - len(x.shape)
    grown = [d for d, old, new in zip(x.dims, x.shape, m.shape[added:], strict=True) if d is not None and old != new]
    if grown:
        # A physical dimension of size 1 becomes a broadcast one.
        ssa = e.squeeze(x, [d for d in grown])
        dims = tuple(None if d is None or d in grown else d - sum(g < d for g in grown) for d in x.dims)
        return View(ssa, ((None,) * added) + dims, m.shape, x.elem)
    return View(x.ssa, ((None,) * added) + x.dims, m.shape, x.elem)


@rule(aten.slice.Tensor)
def _slice(e: Emitter, m: Meta, x: Value, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Value:
    if isinstance(x, Splat):
        return Splat(x.value, m.shape, x.elem)
    at = axis(dim, len(x.shape))
    if x.shape == m.shape:
        return x
    whole, size = x.shape[at], m.shape[at]
    if isinstance(whole, str) or isinstance(size, str) or not isinstance(start or 0, int):
        raise NoRuleError("a slice of a symbolic axis")
    begin = _start(start or 0, whole)
    if step == 1:
        return e.slice(x, at, begin, size)
    if whole % step or begin >= step or size != whole // step:
        raise NoRuleError("a slice with a step that does not divide the axis")
    # Every step-th element from `begin`: one column of the axis seen as rows of `step`.
    rows = e.reshape(x, (*x.shape[:at], size, step, *x.shape[at + 1 :]))
    return e.reshape(e.slice(rows, at + 1, begin, 1), m.shape)


@rule(aten.repeat_interleave.self_int)
def _repeat_interleave(e: Emitter, m: Meta, x: Value, repeats: Any, dim: int | None = None, **kwargs: Any) -> Value:
    if isinstance(x, Splat):
        return Splat(x.value, m.shape, x.elem)
    if dim is None or not isinstance(repeats, int):
        raise NoRuleError("repeating a flattened tensor, or a symbolic number of times")
    at = axis(dim, len(x.shape)) + 1
    shape = (*x.shape[:at], repeats, *x.shape[at:])
    return e.reshape(View(x.ssa, (*x.dims[:at], None, *x.dims[at:]), shape, x.elem), m.shape)


def _start(start: int, whole: int) -> int:
    return min(max(start + whole if start < 0 else start, 0), whole)


@rule(aten.slice_scatter.default)
def _slice_scatter(
    e: Emitter, m: Meta, x: Value, part: Value, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Value:
    """Functional form of writing into a slice: what is before, the part, what is behind."""
    at = axis(dim, len(x.shape))
    whole, size = x.shape[at], part.shape[at]
    if part.shape == x.shape:
        return part
    if step != 1 or isinstance(whole, str) or isinstance(size, str) or not isinstance(start or 0, int):
        raise NoRuleError("a write with a step, or into a symbolic axis")
    begin = _start(start or 0, whole)
    pieces = [e.slice(x, at, 0, begin)] if begin else []
    pieces.append(e.tensor(part))
    if begin + size < whole:
        pieces.append(e.slice(x, at, begin + size, whole - begin - size))
    return e.concat(pieces, at, m.shape, m.elem)


@rule(aten.select_scatter.default)
def _select_scatter(e: Emitter, m: Meta, x: Value, part: Value, dim: int, index: int) -> Value:
    at = axis(dim, len(x.shape))
    whole = x.shape[at]
    if isinstance(whole, str):
        raise NoRuleError(f"a write into the symbolic axis {whole}")
    one = (*x.shape[:at], 1, *x.shape[at + 1 :])
    return _slice_scatter(e, m, x, e.reshape(part, one), at, _start(index, whole))


@rule(aten.narrow.default)
def _narrow(e: Emitter, m: Meta, x: Value, dim: int, start: int, length: int) -> Value:
    return _slice(e, m, x, dim, start, start + length)


@rule(aten.select.int)
def _select(e: Emitter, m: Meta, x: Value, dim: int, index: int) -> Value:
    if isinstance(x, Splat):
        return Splat(x.value, m.shape, x.elem)
    at = axis(dim, len(x.shape))
    whole = x.shape[at]
    if isinstance(whole, str):
        raise NoRuleError(f"one element of the symbolic axis {whole}")
    return e.reshape(e.slice(x, at, _start(index, whole), 1), m.shape)


@rule(aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.split.sizes)
def _split(e: Emitter, m: Meta, x: Value, how: Any, dim: int = 0) -> list[Value]:
    parts: list[Value] = []
    start = 0
    for fake in m.value:
        shape = m.dims(fake.shape)
        at = axis(dim, len(shape))
        size = shape[at]
        if isinstance(size, str):
            raise NoRuleError(f"a split of the symbolic axis {size}")
        parts.append(Splat(x.value, shape, x.elem) if isinstance(x, Splat) else e.slice(x, at, start, size))
        start += size
    return parts


@rule(aten.unbind.int)
def _unbind(e: Emitter, m: Meta, x: Value, dim: int = 0) -> list[Value]:
    at = axis(dim, len(x.shape))
    return [e.reshape(e.slice(x, at, i, 1), m.dims(f.shape)) for i, f in enumerate(m.value)]


@rule(operator.getitem)
def _getitem(e: Emitter, m: Meta, values: Sequence[Value], index: int) -> Value:
    return values[index]


@rule(aten.cat.default)
def _cat(e: Emitter, m: Meta, values: Sequence[Value], dim: int = 0) -> Value:
    return e.concat(values, axis(dim, len(m.shape)), m.shape, m.elem)


@rule(aten.stack.default)
def _stack(e: Emitter, m: Meta, values: Sequence[Value], dim: int = 0) -> Value:
    at = axis(dim, len(m.shape))
    one = (*m.shape[:at], 1, *m.shape[at + 1 :])
    return e.concat([e.reshape(v, one) for v in values], at, m.shape, m.elem)
