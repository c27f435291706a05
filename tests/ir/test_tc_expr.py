from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ir import expr as ex
from tests.ir.strategies import expressions

rng = np.random.default_rng(0)
SAMPLES = [rng.standard_normal(64).astype(np.float32) * s for s in (0.3, 1.0, 3.0)]


@given(expressions(3))
def test_text_form_is_exact(expr: ex.Expr) -> None:
    assert ex.parse(str(expr)) == expr


@given(expressions(3))
def test_simplify_keeps_every_bit(expr: ex.Expr) -> None:
    before = np.broadcast_to(ex.evaluate(expr, SAMPLES), 64)
    after = np.broadcast_to(ex.evaluate(ex.simplify(expr), SAMPLES), 64)
    # Equal as numbers: the sign of a zero may change.
    assert np.array_equal(before, after, equal_nan=True)


@given(expressions(2), expressions(3), st.integers(0, 1))
def test_substitution_is_composition(outer: ex.Expr, inner: ex.Expr, at: int) -> None:
    value = np.broadcast_to(ex.evaluate(inner, SAMPLES), 64)
    arguments = [value if i == at else SAMPLES[i] for i in range(2)]
    together = ex.substitute(outer, {at: inner})
    expected = np.broadcast_to(ex.evaluate(outer, arguments), 64)
    assert np.array_equal(np.broadcast_to(ex.evaluate(together, SAMPLES), 64), expected, equal_nan=True)


def reference(name: str, *xs: float) -> float:
    match name:
        case "rsqrt":
            return 1 / math.sqrt(xs[0])
        case "recip":
            return 1 / xs[0]
        case "sigmoid":
            return 1 / (1 + math.exp(-xs[0]))
        case "silu":
            return xs[0] / (1 + math.exp(-xs[0]))
        case "relu":
            return max(xs[0], 0.0)
        case "gelu":
            return xs[0] * 0.5 * (1 + math.erf(xs[0] / math.sqrt(2)))
        case "gelu_tanh":
            return xs[0] * 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * (xs[0] + 0.044715 * xs[0] ** 3)))
        case "square":
            return xs[0] ** 2
        case "select":
            return xs[1] if xs[0] else xs[2]
        case "round_bf16":
            return float(ml_dtypes.bfloat16(xs[0]))
        case "add" | "sub" | "mul" | "truediv" | "lt" | "le" | "gt" | "ge" | "eq" | "neg":
            import operator

            return float(getattr(operator, name)(*xs))
        case "div":
            return xs[0] / xs[1]
        case "max" | "min" | "abs":
            return float(__builtins__[name](*xs))  # type: ignore[index]
        case _:
            return float(getattr(math, name)(*xs))


@pytest.mark.parametrize("name", sorted(ex.FUNCTIONS))
def test_every_function_against_double_precision(name: str) -> None:
    count = ex.FUNCTIONS[name][0]
    call = ex.Call(name, tuple(ex.Input(i) for i in range(count)))
    arrays = [np.abs(rng.standard_normal(200)).astype(np.float32) + np.float32(0.01) for _ in range(count)]
    if name in ("erf", "gelu", "gelu_tanh", "tanh", "sigmoid", "silu", "relu", "neg", "abs", "floor", "select", "sin"):
        arrays[0] = rng.standard_normal(200).astype(np.float32) * 3
        arrays[0][:20] = 0
    if name == "eq":
        arrays[0][:50] = arrays[1][:50]
    got = ex.evaluate(call, arrays)
    want = [reference(name, *(float(x) for x in xs)) for xs in zip(*arrays, strict=True)]
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-7)


def test_erf_over_its_whole_range() -> None:
    x = np.linspace(-8, 8, 20001).astype(np.float32)
    want = np.array([math.erf(float(v)) for v in x])
    assert np.abs(ex.erf(x) - want).max() < 4e-8


def test_integers_stay_exact() -> None:
    big = np.array([2**24 + 1, -(2**30)], np.int32)
    expr = ex.parse("add(a, 3.0)")
    assert ex.evaluate(expr, [big], integer=True).tolist() == [2**24 + 4, -(2**30) + 3]
    assert ex.evaluate(ex.parse("lt(a, 0.0)"), [big], integer=True).tolist() == [0, 1]


def test_domain_errors_are_values_not_warnings() -> None:
    with np.errstate(all="raise"):
        result = ex.evaluate(ex.parse("log(a)"), [np.array([0.0, -1.0], np.float32)])
    assert result[0] == -np.inf
    assert np.isnan(result[1])


def test_tools_on_expressions() -> None:
    expr = ex.parse("mul(c, rsqrt(add(a, c)))")
    assert ex.inputs(expr) == (2, 0)
    assert ex.functions(expr) == ("mul", "rsqrt", "add")
    assert str(ex.renumber(expr, {2: 0, 0: 1})) == "mul(a, rsqrt(add(b, a)))"


@pytest.mark.parametrize(
    ("text", "simple"),
    [
        ("mul(a, 1.0)", "a"),
        ("add(mul(2.0, 3.0), a)", "add(6.0, a)"),
        ("sub(a, 0.0)", "a"),
        ("div(neg(neg(a)), 1.0)", "a"),
        ("mul(a, 0.0)", "mul(a, 0.0)"),
        ("mul(-1.0, a)", "neg(a)"),
        ("select(lt(1.0, 2.0), a, b)", "a"),
        ("pow(a, 2.0)", "square(a)"),
        ("round_bf16(round_bf16(a))", "round_bf16(a)"),
    ],
)
def test_simplify(text: str, simple: str) -> None:
    assert str(ex.simplify(ex.parse(text))) == simple


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a letter, number or function is expected"),
        ("mul(a, b", "',?\\)' is expected|'\\)' is expected"),
        ("mul(a, b) c", "unexpected 'c'"),
        ("foo", "neither an operand letter nor called"),
        ("foo(a)", "unknown function 'foo'"),
        ("neg(a, b)", "takes 1 arguments, not 2"),
        ("a + b", "unexpected '\\+'"),
    ],
)
def test_malformed_text(text: str, message: str) -> None:
    with pytest.raises(ex.ExprError, match=message):
        ex.parse(text)
