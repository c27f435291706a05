"""Element-wise operators, casts, constants, and operators that do nothing to values."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from frontend.aten.table import TABLE, Meta, elementwise, round_to, rule
from frontend.emit import Emitter, NoRuleError, Splat, Value

aten = torch.ops.aten

_UNARY = {
    "neg": "neg(a)",
    "abs": "abs(a)",
    "exp": "exp(a)",
    "log": "log(a)",
    "sqrt": "sqrt(a)",
    "rsqrt": "rsqrt(a)",
    "reciprocal": "recip(a)",
    "sin": "sin(a)",
    "cos": "cos(a)",
    "tanh": "tanh(a)",
    "sigmoid": "sigmoid(a)",
    "erf": "erf(a)",
    "relu": "relu(a)",
    "silu": "silu(a)",
    "floor": "floor(a)",
    "square": "square(a)",
    "logical_not": "eq(a, 0.0)",
}
_BINARY = {
    "mul": "mul(a, b)",
    "div": "div(a, b)",
    "maximum": "max(a, b)",
    "minimum": "min(a, b)",
    "lt": "lt(a, b)",
    "le": "le(a, b)",
    "gt": "gt(a, b)",
    "ge": "ge(a, b)",
    "eq": "eq(a, b)",
    "ne": "sub(1.0, eq(a, b))",
    "logical_and": "mul(a, b)",
    "logical_or": "max(a, b)",
}


def _register(name: str, expr: str) -> None:
    def apply(e: Emitter, m: Meta, *operands: Any) -> Value:
        return elementwise(e, m, expr, *operands)

    packet = getattr(aten, name)
    for overload in packet.overloads():
        if overload in ("default", "Tensor", "Scalar"):
            TABLE[getattr(packet, overload)] = apply


for _name, _expr in (_UNARY | _BINARY).items():
    _register(_name, _expr)


@rule(aten.add.Tensor, aten.add.Scalar)
def _add(e: Emitter, m: Meta, x: Any, y: Any, *, alpha: float = 1) -> Value:
    return elementwise(e, m, "add(a, b)" if alpha == 1 else f"add(a, mul(b, {float(alpha)!r}))", x, y)


@rule(aten.sub.Tensor, aten.sub.Scalar)
def _sub(e: Emitter, m: Meta, x: Any, y: Any, *, alpha: float = 1) -> Value:
    return elementwise(e, m, "sub(a, b)" if alpha == 1 else f"sub(a, mul(b, {float(alpha)!r}))", x, y)


@rule(aten.rsub.Tensor, aten.rsub.Scalar)
def _rsub(e: Emitter, m: Meta, x: Any, y: Any, alpha: float = 1) -> Value:
    return _sub(e, m, y, x, alpha=alpha)


def _booleans(m: Meta) -> None:
    if m.elem != "i1":
        raise NoRuleError("a bitwise operation on integers")


@rule(aten.bitwise_not.default)
def _bitwise_not(e: Emitter, m: Meta, x: Value) -> Value:
    _booleans(m)
    return elementwise(e, m, "eq(a, 0.0)", x)


@rule(aten.bitwise_and.Tensor, aten.__and__.Tensor)
def _bitwise_and(e: Emitter, m: Meta, x: Value, y: Value) -> Value:
    _booleans(m)
    return elementwise(e, m, "mul(a, b)", x, y)


@rule(aten.bitwise_or.Tensor, aten.__or__.Tensor)
def _bitwise_or(e: Emitter, m: Meta, x: Value, y: Value) -> Value:
    _booleans(m)
    return elementwise(e, m, "max(a, b)", x, y)


@rule(aten.pow.Tensor_Scalar)
def _pow(e: Emitter, m: Meta, x: Value, exponent: float) -> Value:
    known = {1: "a", 2: "square(a)", 0.5: "sqrt(a)", -0.5: "rsqrt(a)", -1: "recip(a)"}
    if exponent == 3:
        return elementwise(e, m, "mul(square(a), a)", x)
    return elementwise(e, m, known.get(exponent, f"pow(a, {float(exponent)!r})"), x)


@rule(aten.pow.Tensor_Tensor)
def _pow_tensor(e: Emitter, m: Meta, x: Value, exponent: Value) -> Value:
    return elementwise(e, m, "pow(a, b)", x, exponent)


@rule(aten.gelu.default)
def _gelu(e: Emitter, m: Meta, x: Value, *, approximate: str = "none") -> Value:
    return elementwise(e, m, "gelu_tanh(a)" if approximate == "tanh" else "gelu(a)", x)


@rule(aten.clamp.default, aten.clamp_min.default)
def _clamp(e: Emitter, m: Meta, x: Value, min: float | None = None, max: float | None = None) -> Value:
    expr = "a"
    if min is not None:
        expr = f"max({expr}, {float(min)!r})"
    if max is not None:
        expr = f"min({expr}, {float(max)!r})"
    return elementwise(e, m, expr, x)


@rule(aten.clamp_max.default)
def _clamp_max(e: Emitter, m: Meta, x: Value, limit: float) -> Value:
    return _clamp(e, m, x, None, limit)


@rule(aten.where.self, aten.where.ScalarSelf, aten.where.ScalarOther, aten.where.Scalar)
def _where(e: Emitter, m: Meta, condition: Value, x: Any, y: Any) -> Value:
    return elementwise(e, m, "select(a, b, c)", condition, x, y)


@rule(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def _masked_fill(e: Emitter, m: Meta, x: Value, mask: Value, value: Any) -> Value:
    return elementwise(e, m, "select(a, b, c)", mask, value, x)


def _cast(e: Emitter, m: Meta, x: Value) -> Value:
    return x if x.elem == m.elem else elementwise(e, m, "a", x)


@rule(aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten._to_copy.default, aten.type_as.default)
def _to(e: Emitter, m: Meta, x: Value, *args: Any, **kwargs: Any) -> Value:
    if isinstance(x, Splat):
        return Splat(float(int(x.value)) if m.elem == "i32" else round_to(x.value, m.elem), m.shape, m.elem)
    if x.elem in ("bf16", "f32") and m.elem in ("i32", "i1"):
        raise NoRuleError(f"a cast from {x.elem} to {m.elem}, whose truncation no expression has")
    return _cast(e, m, x)


@rule(
    aten.alias.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.detach_.default,
    aten.lift_fresh_copy.default,
    aten.lift_fresh.default,
)
def _same(e: Emitter, m: Meta, x: Value, *args: Any, **kwargs: Any) -> Value:
    return x


@rule(aten.dropout.default, aten.native_dropout.default)
def _dropout(e: Emitter, m: Meta, x: Value, p: float, train: bool | None) -> Value:
    if train and p:
        raise NoRuleError("dropout in training mode")
    return x


@rule(aten.zeros_like.default, aten.zeros.default)
def _zeros(e: Emitter, m: Meta, *args: Any, **kwargs: Any) -> Value:
    return Splat(0.0, m.shape, m.elem)


@rule(aten.ones_like.default, aten.ones.default)
def _ones(e: Emitter, m: Meta, *args: Any, **kwargs: Any) -> Value:
    return Splat(1.0, m.shape, m.elem)


@rule(aten.full.default, aten.full_like.default)
def _full(e: Emitter, m: Meta, like: Any, value: float, *args: Any, **kwargs: Any) -> Value:
    return Splat(round_to(value, m.elem), m.shape, m.elem)


@rule(aten.scalar_tensor.default)
def _scalar_tensor(e: Emitter, m: Meta, value: float, **kwargs: Any) -> Value:
    return Splat(round_to(value, m.elem), m.shape, m.elem)


@rule(aten.arange.default, aten.arange.start, aten.arange.start_step)
def _arange(e: Emitter, m: Meta, *args: Any, **kwargs: Any) -> Value:
    if any(isinstance(s, str) for s in m.shape) or not all(isinstance(a, (int, float)) for a in args):
        raise NoRuleError("a range of symbolic length (positions must come from position_ids)")
    dtype = np.int32 if m.elem == "i32" else np.float32
    return e.constant(np.arange(*args, dtype=dtype), m.elem)
