"""Element-wise maps, reductions, norms, rotary embeddings and gathers through the streams, in every row layout."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backend_rngd.isa.descriptors import Exec, Op
from ir import expr as ex
from ir.errors import UnsupportedError
from tests.lowering.running import Run, bf16, relative, tensor_text

ROWS = [(1, 1), (2, 3), (1, 100), (3, 40), (20, 1)]
Args = dict[str, tuple[tuple[int, ...], str]]


def function(signature: str, names: str, body: str, out: str) -> str:
    """`@main` around `body`."""
    attributes = f'{{arg_names = [{names}], result_names = ["y"]}}'
    return f"func.func @main({signature}) -> {out} attributes {attributes} {{\n{body}\n  func.return %r : {out}\n}}"


def check(
    args: Args, body: str, out: tuple[tuple[int, ...], str], want: Callable[..., Any], limit: float = 3e-3
) -> Run:
    """Run `body` (which defines %r) on random values and compare."""
    signature = ", ".join(f"%{n}: {tensor_text(*a)}" for n, a in args.items())
    names = ", ".join(f'"{n}"' for n in args)
    run = Run(function(signature, names, body, tensor_text(*out)))
    rng = np.random.default_rng(0)
    values = {n: rng.integers(0, 7, s) if e == "i32" else bf16(rng.standard_normal(s)) for n, (s, e) in args.items()}
    assert relative(run(values)["y"], want(**values)) < limit
    return run


def norm(x: Any, w: Any) -> Any:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * w


@pytest.mark.parametrize(("b", "s"), ROWS)
@pytest.mark.parametrize(
    "e", ["silu(a)", "gelu(a)", "gelu_tanh(a)", "relu(a)", "exp(neg(abs(a)))", "sqrt(square(a))", "sub(1.0, a)"]
)
def test_one_operand(b: int, s: int, e: str) -> None:
    x = ((b, s, 64), "bf16")
    check(
        {"x": x},
        f'  %r = tc.map "{e}" over "b s h -> b s h" (%x) : {tensor_text(*x)}',
        x,
        lambda x: ex.evaluate(ex.parse(e), [x]),
    )


@pytest.mark.parametrize(("b", "s"), ROWS)
def test_gate(b: int, s: int) -> None:
    x = ((b, s, 72), "bf16")
    body = f'  %r = tc.map "mul(silu(a), b)" over "b s h, b s h -> b s h" (%x, %x2) : {tensor_text(*x)}'
    check({"x": x, "x2": x}, body, x, lambda x, x2: x / (1 + np.exp(-x)) * x2)


def test_operands_that_do_not_fit_vrf_together() -> None:
    """64 rows of 16 features are 4 KB of VRF: one of them has room beside the stash, two have not."""
    value, e = ((1, 4096, 16), "bf16"), "mul(gelu_tanh(a), b)"
    body = f'  %r = tc.map "{e}" over "b s h, b s h -> b s h" (%a, %b) : {tensor_text(*value)}'
    check({"a": value, "b": value}, body, value, lambda a, b: ex.evaluate(ex.parse(e), [a, b]))


@pytest.mark.parametrize(("b", "s"), ROWS)
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_rms_norm(b: int, s: int, heads: int) -> None:
    shape = (b, s, heads, 64)
    stat = tensor_text((b, s, heads), "f32")
    body = f"""  %m = tc.reduce add "mul(a, a)" over "b s h d -> b s h" (%x) : {stat}
  %r = tc.map "mul(mul(a, rsqrt(add(mul(b, 0.015625), 1e-06))), c)"
    over "b s h d, b s h, d -> b s h d" (%x, %m, %w) : {tensor_text(shape, "bf16")}"""
    run = check({"x": (shape, "bf16"), "w": ((64,), "bf16")}, body, (shape, "bf16"), norm)
    roots = [
        i.what
        for i in run.stream.routines[0].instructions
        if isinstance(i.what, Exec) and any(op.op == Op.SQRT for op in i.what.vector)
    ]
    assert roots
    elements = [math.prod(n for n, _ in r.fetch.loops) for r in roots]
    assert max(elements) <= 8 * 8 * heads  # one root a row, not one an element of it


@pytest.mark.parametrize(("b", "s"), ROWS)
def test_layer_norm(b: int, s: int) -> None:
    x, stat = ((b, s, 64), "bf16"), tensor_text((b, s), "f32")
    body = f"""  %m = tc.reduce add "mul(a, 0.015625)" over "b s h -> b s" (%x) : {stat}
  %v = tc.reduce add "mul(square(sub(a, b)), 0.015625)" over "b s h, b s -> b s" (%x, %m) : {stat}
  %r = tc.map "add(mul(mul(sub(a, b), rsqrt(add(c, 1e-05))), d), e)"
    over "b s h, b s, b s, h, h -> b s h" (%x, %m, %v, %w, %w2) : {tensor_text(*x)}"""

    def want(x: Any, w: Any, w2: Any) -> Any:
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * w + w2

    check({"x": x, "w": ((64,), "bf16"), "w2": ((64,), "bf16")}, body, x, want, 4e-3)


@pytest.mark.parametrize("kind", ["add", "max", "min"])
def test_reduce_kinds(kind: str) -> None:
    for b, s in ROWS:
        body = f'  %r = tc.reduce {kind} "a" over "b s h -> b s" (%x) : {tensor_text((b, s), "f32")}'
        want = {"add": np.sum, "max": np.max, "min": np.min}[kind]
        check({"x": ((b, s, 64), "bf16")}, body, ((b, s), "f32"), lambda x, f=want: f(x, axis=-1), 1e-6)


@pytest.mark.parametrize(("b", "s"), ROWS)
def test_rotary(b: int, s: int) -> None:
    x, angle, half = ((b, s, 4, 64), "bf16"), ((b, s, 64), "f32"), tensor_text((b, s, 4, 32), "bf16")
    body = f"""  %a = tc.slice %x axis 3 start 0 size 32 : {half}
  %b = tc.slice %x axis 3 start 32 size 32 : {half}
  %n = tc.map "neg(a)" over "b s h d -> b s h d" (%b) : {half}
  %c = tc.concat (%n, %a) axis 3 : {tensor_text(*x)}
  %r = tc.map "add(mul(a, b), mul(c, d))"
    over "b s h d, b s d, b s h d, b s d -> b s h d" (%x, %x2, %c, %x3) : {tensor_text(*x)}"""

    def want(x: Any, x2: Any, x3: Any) -> Any:
        return x * x2[:, :, None] + np.concatenate([-x[..., 32:], x[..., :32]], -1) * x3[:, :, None]

    check({"x": x, "x2": angle, "x3": angle}, body, x, want)


@pytest.mark.parametrize(("b", "s"), ROWS)
def test_angles_and_embedding(b: int, s: int) -> None:
    body = f'  %r = tc.map "cos(mul(a, b))" over "b s, d -> b s d" (%pos, %w) : {tensor_text((b, s, 32), "f32")}'
    check(
        {"pos": ((b, s), "i32"), "w": ((32,), "f32")},
        body,
        ((b, s, 32), "f32"),
        lambda pos, w: np.cos(pos[..., None] * w),
        1e-5,
    )
    body = f'  %r = tc.gather "v h, b s -> b s h" (%w, %ids) : {tensor_text((b, s, 96), "bf16")}'
    check({"ids": ((b, s), "i32"), "w": ((50, 96), "bf16")}, body, ((b, s, 96), "bf16"), lambda ids, w: w[ids], 1e-9)


@pytest.mark.parametrize(("b", "s"), [(1, 1), (2, 4), (3, 5), (2, 40), (1, 100)])
def test_last_token(b: int, s: int) -> None:
    x, out = ((b, s, 64), "bf16"), ((b, 64), "bf16")
    body = f"""  %g = tc.gather "b s h, b -> b h" (%x, %last) : {tensor_text(*out)}
  %r = tc.map "mul(a, 2.0)" over "b h -> b h" (%g) : {tensor_text(*out)}"""
    signature = f"%last: {tensor_text((b,), 'i32')}, %x: {tensor_text(*x)}"
    run = Run(function(signature, '"last", "x"', body, tensor_text(*out)))
    rng = np.random.default_rng(1)
    values, last = bf16(rng.standard_normal(x[0])), rng.integers(0, s, (b,))
    np.testing.assert_array_equal(run({"x": values, "last": last})["y"], 2 * values[np.arange(b), last])


def test_arguments_are_told_apart_by_their_axes() -> None:
    """`B,_` are tokens without a length; a rank 3 operand that is only multiplied with is a parameter."""
    h, y = '3x64xbf16, #tc.axes<"B,_">', '3x2x32xbf16, #tc.axes<"B,_,_">'
    run = Run(
        f"""func.func @main(%h: tensor<{h}>, %p: tensor<2x32x64xbf16>) -> tensor<{y}>
    attributes {{arg_names = ["h", "p"], result_names = ["y"]}} {{
  %y = tc.contract "b i, h d i -> b h d" (%h, %p) : tensor<{y}>
  func.return %y : tensor<{y}>
}}"""
    )
    rng = np.random.default_rng(0)
    x, w = bf16(rng.standard_normal((3, 64))), bf16(rng.standard_normal((2, 32, 64)))
    assert relative(run({"h": x, "p": w})["y"], np.einsum("bi,hdi->bhd", x, w)) < 3e-3


def test_a_result_without_tokens_is_refused() -> None:
    w = tensor_text((64,), "bf16")
    with pytest.raises(UnsupportedError, match="token"):
        check({"w": ((64,), "bf16")}, f'  %r = tc.map "exp(a)" over "h -> h" (%w) : {w}', ((64,), "bf16"), np.exp)


def test_pieces_that_do_not_start_on_8_bytes_are_refused() -> None:
    x, half = ((1, 2, 12), "bf16"), tensor_text((1, 2, 6), "bf16")
    with pytest.raises(UnsupportedError, match="8 B"):
        check(
            {"x": x},
            f"  %a = tc.slice %x axis 2 start 0 size 6 : {half}\n  %b = tc.slice %x axis 2 start 6 size 6 : {half}\n"
            f"  %r = tc.concat (%b, %a) axis 2 : {tensor_text(*x)}",
            x,
            lambda x: x,
        )


LEAVES = st.sampled_from(["a", "b", "c", "0.5", "-1.25"])
UNARY = ["neg", "tanh", "sigmoid", "silu", "relu", "square", "exp"]
BINARY = ["add", "sub", "mul", "max", "min"]
EXPRESSIONS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.builds(lambda f, x: f"{f}({x})", st.sampled_from(UNARY), inner),
        st.builds(lambda f, x, y: f"{f}({x}, {y})", st.sampled_from(BINARY), inner, inner),
    ),
    max_leaves=7,
)


@settings(max_examples=25, deadline=None)
@given(EXPRESSIONS, st.sampled_from(ROWS))
def test_random_expressions(text: str, rows: tuple[int, int]) -> None:
    """Any expression of three operands of different rank is cut into legal passes that compute it."""
    e = ex.simplify(ex.parse(text))
    used = ex.inputs(e)
    if 0 not in used:
        return
    x = ((*rows, 48), "bf16")
    operands = {"a": ("x", x, "b s h"), "b": ("x2", x, "b s h"), "c": ("w", ((48,), "bf16"), "h")}
    chosen = [operands["abc"[i]] for i in used]
    e = ex.renumber(e, {i: k for k, i in enumerate(used)})
    rule = ", ".join(c[2] for c in chosen) + " -> b s h"
    body = f'  %r = tc.map "{e}" over "{rule}" ({", ".join("%" + c[0] for c in chosen)}) : {tensor_text(*x)}'

    def want(**values: Any) -> Any:
        with np.errstate(all="ignore"):
            return np.clip(ex.evaluate(e, [values[c[0]] for c in chosen]), -3e38, 3e38)

    check({c[0]: c[1] for c in chosen}, body, x, want, 6e-3)
