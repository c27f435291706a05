"""Contractions, look-ups, reductions and normalisations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from frontend.aten.table import Meta, axis, rule
from frontend.emit import Emitter, NoRuleError, Splat, Value, View, axis_names, full_view
from ir.dialects import tc
from ir.types import dims_of

aten = torch.ops.aten


def _with_bias(e: Emitter, m: Meta, product: Callable[[str], View], bias: Value | None) -> Value:
    """A product, or a product in f32 plus a bias: one rounding either way."""
    if bias is None:
        return product(m.elem)
    return e.map("add(a, b)", [product("f32"), bias], m.shape, m.elem)


@rule(aten.linear.default)
def _linear(e: Emitter, m: Meta, x: Value, weight: Value, bias: Value | None = None) -> Value:
    names = _distinct(axis_names(x.shape[:-1]), "io")
    return _with_bias(e, m, lambda elem: e.contract(x, [*names, "i"], weight, "oi", [*names, "o"], elem), bias)


def _distinct(names: Sequence[str], taken: str) -> list[str]:
    free = iter([c for c in "pqruvwxyz" if c not in names])
    return [next(free) if n in taken else n for n in names]


@rule(aten.addmm.default)
def _addmm(e: Emitter, m: Meta, bias: Value, x: Value, weight: Value, *, beta: float = 1, alpha: float = 1) -> Value:
    if beta != 1 or alpha != 1:
        raise NoRuleError("addmm with beta or alpha")
    return _merged(e, m, x, weight, bias)


@rule(aten.mm.default)
def _mm(e: Emitter, m: Meta, x: Value, weight: Value) -> Value:
    return _merged(e, m, x, weight, None)


def _merged(e: Emitter, m: Meta, x: Value, weight: Value, bias: Value | None) -> Value:
    """x (N, I) times weight (I, O). Where x merged leading axes just before, the product keeps them apart."""
    rows = e.tensor(x)
    if isinstance(rows.ssa.owner, tc.ReshapeOp):
        origin = rows.ssa.owner.operands[0]
        shape = tuple(dims_of(origin))
        if len(shape) > 2 and shape[-1] == rows.shape[-1]:
            rows = full_view(origin, shape, rows.elem)
    names = _distinct(axis_names(rows.shape[:-1]), "io")
    product = e.contract(rows, [*names, "i"], weight, "io", [*names, "o"], m.elem if bias is None else "f32")
    out: Value = product
    if bias is not None:
        out = e.map("add(a, b)", [product, bias], product.shape, m.elem)
    return e.reshape(out, m.shape)


@rule(aten.matmul.default, aten.bmm.default)
def _matmul(e: Emitter, m: Meta, x: Value, y: Value) -> Value:
    if len(x.shape) < 2 or len(y.shape) < 2:
        raise NoRuleError("matmul with a vector")
    if isinstance(x, Splat) or isinstance(y, Splat):
        raise NoRuleError("matmul with a constant")
    batch = _distinct(axis_names(m.shape[:-2]), "ijo")
    sides: list[View] = []
    axes: list[list[str]] = []
    for operand, last in ((x, "ij"), (y, "jo")):
        offset = len(batch) - (len(operand.shape) - 2)
        view = _lazy_batch(e, operand, m.shape[offset:-2])
        sides.append(view)
        axes.append([*batch[offset:], *last])
    real = {
        a
        for view, names in zip(sides, axes, strict=True)
        for a, d in zip(names, view.dims, strict=True)
        if d is not None
    }
    out = [*batch, "i", "o"]
    product = e.contract(sides[0], axes[0], sides[1], axes[1], [a for a in out if a in real], m.elem)
    # A batch axis that both operands only broadcast along stays lazy in the result.
    position = iter(range(len(out)))
    return View(product.ssa, tuple(next(position) if a in real else None for a in out), m.shape, m.elem)


def _lazy_batch(e: Emitter, view: View, batch: Sequence[int | str]) -> View:
    """The view with batch dimensions of size 1 that broadcast turned into lazy ones of the full size."""
    shape = (*batch, *view.shape[-2:])
    grown = [d for d, old, new in zip(view.dims, view.shape, shape, strict=True) if d is not None and old != new]
    dims = view.dims
    ssa = view.ssa
    if grown:
        ssa = e.squeeze(view, grown)
        dims = tuple(None if d is None or d in grown else d - sum(g < d for g in grown) for d in dims)
    if None in dims[-2:]:
        view = e.tensor(View(ssa, dims, shape, view.elem))
        return view
    return View(ssa, dims, shape, view.elem)


@rule(aten.embedding.default)
def _embedding(e: Emitter, m: Meta, weight: Value, indices: Value, *args: Any, **kwargs: Any) -> Value:
    if isinstance(indices, Splat):
        row = e.reshape(e.slice(weight, 0, int(indices.value), 1), m.shape[-1:])
        return View(row.ssa, (None,) * (len(m.shape) - 1) + (0,), m.shape, m.elem)
    names = _distinct(axis_names(indices.shape), "vh")
    return e.gather(weight, "vh", indices, names, [*names, "h"])


@rule(aten.gather.default)
def _gather(e: Emitter, m: Meta, x: Value, dim: int, indices: Value, **kwargs: Any) -> Value:
    if isinstance(x, Splat):
        return Splat(x.value, m.shape, x.elem)
    raise NoRuleError("gather along an axis of a tensor")


@rule(aten.index.Tensor)
def _index(e: Emitter, m: Meta, x: Value, indices: Sequence[Value | None]) -> Value:
    if isinstance(x, Splat):
        return Splat(x.value, m.shape, x.elem)
    first = indices[0] if indices else None
    if len(indices) != 1 or first is None or isinstance(first, Splat) or first.elem != "i32":
        raise NoRuleError("indexing other than rows by one integer tensor")
    rest = list("uvwxyz")[: len(x.shape) - 1]
    names = _distinct(axis_names(first.shape), "uvwxyzr")
    return e.gather(x, ["r", *rest], first, names, [*names, *rest])


def _over(dims: Any, rank: int) -> list[int]:
    if dims is None or dims == []:
        return list(range(rank))
    return sorted(axis(d, rank) for d in ([dims] if isinstance(dims, int) else dims))


def _count(x: Value, over: Sequence[int]) -> int:
    count = 1
    for i in over:
        size = x.shape[i]
        if isinstance(size, str):
            raise NoRuleError(f"a mean over the symbolic axis {size}")
        count *= size
    return count


@rule(aten.mean.dim)
def _mean(e: Emitter, m: Meta, x: Value, dims: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Value:
    over = _over(dims, len(x.shape))
    return e.reduce("add", f"div(a, {float(_count(x, over))!r})", [x], over, keepdim, m.elem)


@rule(aten.sum.dim_IntList)
def _sum(e: Emitter, m: Meta, x: Value, dims: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Value:
    return e.reduce("add", "a", [x], _over(dims, len(x.shape)), keepdim, m.elem)


@rule(aten.amax.default)
def _amax(e: Emitter, m: Meta, x: Value, dims: Any = None, keepdim: bool = False) -> Value:
    return e.reduce("max", "a", [x], _over(dims, len(x.shape)), keepdim, m.elem)


@rule(aten.amin.default)
def _amin(e: Emitter, m: Meta, x: Value, dims: Any = None, keepdim: bool = False) -> Value:
    return e.reduce("min", "a", [x], _over(dims, len(x.shape)), keepdim, m.elem)


@rule(aten.softmax.int, aten._softmax.default)
def _softmax(e: Emitter, m: Meta, x: Value, dim: int, *args: Any) -> Value:
    over = [axis(dim, len(x.shape))]
    top = e.reduce("max", "a", [x], over, True, x.elem)
    total = e.reduce("add", "exp(sub(a, b))", [x, top], over, True, "f32")
    return e.map("div(exp(sub(a, b)), c)", [x, top, total], m.shape, m.elem)


@rule(aten.layer_norm.default)
def _layer_norm(
    e: Emitter,
    m: Meta,
    x: Value,
    normalized: Sequence[int],
    weight: Value | None = None,
    bias: Value | None = None,
    eps: float = 1e-5,
    *args: Any,
) -> Value:
    rank = len(x.shape)
    over = list(range(rank - len(normalized), rank))
    count = float(_count(x, over))
    mean = e.reduce("add", f"div(a, {count!r})", [x], over, True, "f32")
    variance = e.reduce("add", f"div(square(sub(a, b)), {count!r})", [x, mean], over, True, "f32")
    expr = f"mul(sub(a, b), rsqrt(add(c, {float(eps)!r})))"
    operands: list[Value] = [x, mean, variance]
    for extra, function in ((weight, "mul"), (bias, "add")):
        if extra is not None:
            expr = f"{function}({expr}, {chr(ord('a') + len(operands))})"
            operands.append(extra)
    return e.map(expr, operands, m.shape, m.elem)


@rule(aten.rms_norm.default)
def _rms_norm(
    e: Emitter, m: Meta, x: Value, normalized: Sequence[int], weight: Value | None = None, eps: float | None = None
) -> Value:
    rank = len(x.shape)
    over = list(range(rank - len(normalized), rank))
    square = e.reduce("add", f"div(square(a), {float(_count(x, over))!r})", [x], over, True, "f32")
    epsilon = float(torch.finfo(m.value.dtype).eps if eps is None else eps)
    expr = f"mul(a, rsqrt(add(b, {epsilon!r})))"
    if weight is None:
        return e.map(expr, [x, square], m.shape, m.elem)
    return e.map(f"mul({expr}, c)", [x, square, weight], m.shape, m.elem)
