"""Element-wise expressions: what one `tc.map` computes for each element, as text and as a tree.

`mul(a, rsqrt(add(b, 1e-06)))` calls functions on operand letters (a is operand 0) and on numbers. Pure Python and
numpy, no xDSL. Evaluation is in f32, or in i32 when every operand and the result are integers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
MAX_INPUTS = 26


class ExprError(ValueError):
    """An expression is malformed."""


@dataclass(frozen=True)
class Input:
    """Operand number `index`, written as a letter."""

    index: int

    def __str__(self) -> str:
        return chr(ord("a") + self.index)


@dataclass(frozen=True)
class Const:
    """A number; it takes part as f32."""

    value: float

    def __str__(self) -> str:
        return repr(float(self.value))


@dataclass(frozen=True)
class Call:
    """A function of sub-expressions."""

    fn: str
    args: tuple[Expr, ...]

    def __str__(self) -> str:
        return f"{self.fn}({', '.join(str(a) for a in self.args)})"


Expr = Input | Const | Call


@lru_cache(maxsize=1)
def _erf_coefficients() -> Array:
    # erf(x)/x is an entire even function, so a Chebyshev series in x*x converges to f32 precision quickly.
    nodes = np.polynomial.chebyshev.chebpts1(29)
    x = np.sqrt((nodes + 1) * (_ERF_LIMIT**2 / 2))
    values = np.array([math.erf(v) / v for v in x.tolist()])
    return np.asarray(np.polynomial.chebyshev.chebfit(nodes, values, 28))


_ERF_LIMIT = 4.0  # 1 - erf(4) is 1.5e-8, less than half an f32 step below 1


def erf(x: Array) -> Array:
    """The error function, with an absolute error below 2e-8; same float type as x."""
    clipped = np.clip(np.asarray(x, np.float64), -_ERF_LIMIT, _ERF_LIMIT)
    scaled = clipped * clipped * (2 / _ERF_LIMIT**2) - 1
    return np.asarray(clipped * np.polynomial.chebyshev.chebval(scaled, _erf_coefficients()), x.dtype)


_HALF, _ONE_F32 = np.float32(0.5), np.float32(1)


def _recip(x: Array) -> Array:
    return _ONE_F32 / x


def _rsqrt(x: Array) -> Array:
    return _ONE_F32 / np.sqrt(x)


def _sigmoid(x: Array) -> Array:
    return _ONE_F32 / (_ONE_F32 + np.exp(-x))


def _relu(x: Array) -> Array:
    return np.maximum(x, x.dtype.type(0))


def _silu(x: Array) -> Array:
    return x * _sigmoid(x)


def _gelu(x: Array) -> Array:
    return x * _HALF * (_ONE_F32 + erf(x * np.float32(math.sqrt(0.5))))


def _gelu_tanh(x: Array) -> Array:
    inner = np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x * x * x)
    return x * _HALF * (_ONE_F32 + np.tanh(inner))


def _square(x: Array) -> Array:
    return x * x


def _floor(x: Array) -> Array:
    return np.floor(x).astype(x.dtype)


def _select(condition: Array, x: Array, y: Array) -> Array:
    return np.where(condition != 0, x, y)


def _round_bf16(x: Array) -> Array:
    return x.astype(ml_dtypes.bfloat16).astype(np.float32)


def _compare(op: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    def compare(a: Array, b: Array) -> Array:
        return op(a, b).astype(np.result_type(a, b))

    return compare


FUNCTIONS: dict[str, tuple[int, Callable[..., Array]]] = {
    "add": (2, np.add),
    "sub": (2, np.subtract),
    "mul": (2, np.multiply),
    "div": (2, np.divide),
    "max": (2, np.maximum),
    "min": (2, np.minimum),
    "pow": (2, np.power),
    "neg": (1, np.negative),
    "abs": (1, np.abs),
    "exp": (1, np.exp),
    "log": (1, np.log),
    "sqrt": (1, np.sqrt),
    "rsqrt": (1, _rsqrt),
    "recip": (1, _recip),
    "sin": (1, np.sin),
    "cos": (1, np.cos),
    "tanh": (1, np.tanh),
    "sigmoid": (1, _sigmoid),
    "erf": (1, erf),
    "relu": (1, _relu),
    "silu": (1, _silu),
    "gelu": (1, _gelu),
    "gelu_tanh": (1, _gelu_tanh),
    "square": (1, _square),
    "floor": (1, _floor),
    "lt": (2, _compare(np.less)),
    "le": (2, _compare(np.less_equal)),
    "gt": (2, _compare(np.greater)),
    "ge": (2, _compare(np.greater_equal)),
    "eq": (2, _compare(np.equal)),
    "select": (3, _select),
    "round_bf16": (1, _round_bf16),
}
"""Arguments and numpy implementation of every function. `gelu` is the exact one, `gelu_tanh` its tanh form."""

INTEGER_FUNCTIONS = frozenset(
    {"add", "sub", "mul", "max", "min", "neg", "abs", "relu", "square", "floor", "lt", "le", "gt", "ge", "eq", "select"}
)
"""Functions that have an exact integer form."""

_LEXER = re.compile(r"\s*(?:(-?(?:\d+\.?\d*(?:[eE][+-]?\d+)?|inf|nan)\b\.?)|([a-z][a-z0-9_]*)|([(),]))")


@lru_cache(maxsize=4096)
def parse(text: str) -> Expr:
    """Read an expression. Raises ExprError naming what is wrong."""
    tokens: list[tuple[str, str]] = []
    position = 0
    while text[position:].strip():
        match = _LEXER.match(text, position)
        if match is None:
            raise ExprError(f"expression '{text}': unexpected '{text[position:].strip()[0]}'")
        kind = "number" if match[1] else "name" if match[2] else "mark"
        tokens.append((kind, match[1] or match[2] or match[3]))
        position = match.end()
    tokens.append(("end", "the end"))
    expr, after = _parse(tokens, 0, text)
    if tokens[after][0] != "end":
        raise ExprError(f"expression '{text}': unexpected '{tokens[after][1]}'")
    return expr


def _parse(tokens: list[tuple[str, str]], at: int, text: str) -> tuple[Expr, int]:
    kind, token = tokens[at]
    if kind == "number":
        return Const(float(token)), at + 1
    if kind != "name":
        raise ExprError(f"expression '{text}': a letter, number or function is expected, not '{token}'")
    if tokens[at + 1][1] != "(":
        if len(token) != 1:
            raise ExprError(f"expression '{text}': '{token}' is neither an operand letter nor called")
        return Input(ord(token) - ord("a")), at + 1
    if token not in FUNCTIONS:
        raise ExprError(f"expression '{text}': unknown function '{token}'")
    args: list[Expr] = []
    at += 1
    while tokens[at][1] in ("(", ","):
        arg, at = _parse(tokens, at + 1, text)
        args.append(arg)
    if tokens[at][1] != ")":
        raise ExprError(f"expression '{text}': ')' is expected, not '{tokens[at][1]}'")
    if len(args) != FUNCTIONS[token][0]:
        raise ExprError(f"expression '{text}': '{token}' takes {FUNCTIONS[token][0]} arguments, not {len(args)}")
    return Call(token, tuple(args)), at + 1


def evaluate(expr: Expr, arrays: Sequence[Array], integer: bool = False) -> Array:
    """The value for numpy operands that broadcast with each other: f32, or i32 if `integer`.

    Domain errors give infinities and NaN as the hardware does, without warnings.
    """
    dtype = np.int32 if integer else np.float32
    values = [np.asarray(a).astype(dtype, copy=False) for a in arrays]
    with np.errstate(all="ignore"):
        return _evaluate(expr, values, dtype, {})


def _evaluate(expr: Expr, values: Sequence[Array], dtype: Any, known: dict[Expr, Array]) -> Array:
    if isinstance(expr, Input):
        return values[expr.index]
    if isinstance(expr, Const):
        return np.asarray(expr.value).astype(dtype)
    if expr not in known:
        args = [_evaluate(a, values, dtype, known) for a in expr.args]
        known[expr] = np.asarray(FUNCTIONS[expr.fn][1](*args)).astype(dtype, copy=False)
    return known[expr]


def substitute(expr: Expr, replacement: Mapping[int, Expr]) -> Expr:
    """The expression with some operands replaced."""
    if isinstance(expr, Input):
        return replacement.get(expr.index, expr)
    if isinstance(expr, Const):
        return expr
    return Call(expr.fn, tuple(substitute(a, replacement) for a in expr.args))


def inputs(expr: Expr) -> tuple[int, ...]:
    """The operand numbers an expression uses, in order of first use."""
    if isinstance(expr, Input):
        return (expr.index,)
    if isinstance(expr, Const):
        return ()
    return tuple(dict.fromkeys(i for a in expr.args for i in inputs(a)))


def functions(expr: Expr) -> tuple[str, ...]:
    """The functions an expression calls, once for each call."""
    if not isinstance(expr, Call):
        return ()
    return (expr.fn, *(f for a in expr.args for f in functions(a)))


def renumber(expr: Expr, order: Mapping[int, int]) -> Expr:
    """The expression with other operand numbers."""
    return substitute(expr, {old: Input(new) for old, new in order.items()})


_ZERO, _ONE = Const(0.0), Const(1.0)


def simplify(expr: Expr, integer: bool = False) -> Expr:
    """An expression of equal value: constants folded in f32 (or i32), neutral elements and double negations dropped.

    Nothing is reassociated, so every remaining operation rounds as before. `x * 0` stays, because of NaN.
    """
    if not isinstance(expr, Call):
        return expr
    args = tuple(simplify(a, integer) for a in expr.args)
    expr = Call(expr.fn, args)
    if all(isinstance(a, Const) for a in args):
        return Const(float(evaluate(expr, [], integer)))
    match expr.fn, args:
        case ("mul", (x, Const(1.0))) | ("mul", (Const(1.0), x)) | ("div", (x, Const(1.0))) | ("pow", (x, Const(1.0))):
            return x
        case ("add", (x, Const(0.0))) | ("add", (Const(0.0), x)) | ("sub", (x, Const(0.0))):
            return x
        case ("sub", (Const(0.0), x)) if integer:
            return Call("neg", (x,))
        case ("mul", (x, Const(-1.0))) | ("mul", (Const(-1.0), x)):
            return Call("neg", (x,))
        case ("neg", (Call("neg", (x,)),)):
            return x
        case ("pow", (x, Const(2.0))):
            return Call("square", (x,))
        case ("select", (Const(c), x, y)):
            return x if c != 0 else y
        case ("select", (_, x, y)) if x == y:
            return x
        case ("floor", (x,)) if integer:
            return x
        case ("round_bf16", (Call("round_bf16", _) as x,)):
            return x
        case _:
            return expr
