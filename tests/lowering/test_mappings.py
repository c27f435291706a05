"""Every mapping over a grid of shapes, against numpy: tokens, widths and vocabularies that divide nothing.

The quick grid has small shapes; `pytest -m slow` draws larger ones, and many more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ir import expr as ex
from ir.errors import UnsupportedError
from tests.lowering.running import Array, GroupRun, Run, bf16, relative, tensor_text
from tests.lowering.test_attention import check_decoder

ROUNDED = 6e-3  # one or two roundings to bf16; an element in a wrong place is far beyond it
HEALTH = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
Case = TypeVar("Case")
Tokens = tuple[int, int]


@dataclass(frozen=True)
class Grid:
    """Limits of what is drawn. length: of a prompt, tokens: of a batch of prompts."""

    examples: int
    length: int
    tokens: int
    width: int
    vocabulary: int
    keys: int


QUICK = Grid(30, 150, 300, 50, 1500, 120)
LARGE = Grid(50, 400, 600, 300, 20000, 600)
GRIDS = pytest.mark.parametrize(
    "grid", [pytest.param(QUICK, id="quick"), pytest.param(LARGE, id="large", marks=pytest.mark.slow)]
)


def each(grid: Grid, cases: st.SearchStrategy[Case], check: Callable[[Case], None], share: float = 1.0) -> None:
    """Check drawn cases."""
    settings(max_examples=max(2, round(grid.examples * share)), deadline=None, suppress_health_check=HEALTH)(
        given(cases)(check)
    )()


def tokens(grid: Grid) -> st.SearchStrategy[Tokens]:
    """(batch, length): decode batches of 1 to 256 rows, prompts, batches of prompts."""
    pairs = st.tuples(st.integers(2, 6), st.integers(2, grid.length // 2)).filter(lambda t: t[0] * t[1] <= grid.tokens)
    few = st.sampled_from([(b, s) for b in range(1, 9) for s in range(1, 9) if b * s <= 8])
    return st.one_of(
        few, st.tuples(st.integers(9, 256), st.just(1)), st.tuples(st.just(1), st.integers(9, grid.length)), pairs
    )


def widths(grid: Grid, multiple: int = 4) -> st.SearchStrategy[int]:
    """Multiples of 4 (a packet of bf16): most are no multiple of 64."""
    return st.integers(1, grid.width).map(lambda n: n * multiple)


def numbers(rng: np.random.Generator, *shape: int, over: int = 1) -> Array:
    """Normal numbers in bf16, divided by the root of `over`."""
    return bf16(rng.standard_normal(shape) / np.sqrt(over))


def main(arguments: dict[str, str], body: str, out: str) -> str:
    """`@main` around a body that defines %y."""
    signature = ", ".join(f"%{n}: {t}" for n, t in arguments.items())
    names = ", ".join(f'"{n}"' for n in arguments)
    return (
        f"func.func @main({signature}) -> {out} "
        f'attributes {{arg_names = [{names}], result_names = ["y"]}} {{\n{body}\n  func.return %y : {out}\n}}'
    )


# Contractions --------------------------------------------------------------------------------------------------------
@GRIDS
def test_contractions_and_epilogues(grid: Grid) -> None:
    def check(case: tuple[Tokens, int, int, str, str]) -> None:
        (b, s), k, n, element, after = case
        x, y = tensor_text((b, s, k), "bf16"), tensor_text((b, s, n), element)
        body = f'  %p = tc.contract "b s i, o i -> b s o" (%x, %w) : {y}\n'
        body += f'  %y = tc.map "{after}" over "b s o -> b s o" (%p) : {y}'
        rng = np.random.default_rng(k + n)
        values = {"x": numbers(rng, b, s, k), "w": numbers(rng, n, k, over=k)}
        got = Run(main({"x": x, "w": tensor_text((n, k), "bf16")}, body, y))(values)["y"]
        assert relative(got, ex.evaluate(ex.parse(after), [values["x"] @ values["w"].T])) < ROUNDED

    # Around 4, 8, ... channels in each of 64 slices, where groups, tiles and narrow passes begin and end.
    edges = st.builds(lambda n, more: 256 * n + more, st.integers(1, 16), st.sampled_from([-2, 0, 2]))
    anything = st.one_of(st.integers(1, grid.width * 8), edges)
    after = st.sampled_from(["mul(a, 2.0)", "silu(a)", "mul(tanh(div(a, 3.0)), 3.0)"])
    element = st.sampled_from(["bf16", "f32"])
    each(grid, st.tuples(tokens(grid), widths(grid), anything, element, after), check, 2.0)


@pytest.mark.parametrize("channels", [28, 44, 76])
@pytest.mark.parametrize("b", [1, 9])
def test_a_narrow_pass_behind_whole_ones(b: int, channels: int) -> None:
    """Whatever stands behind its 12 channels must have been written."""
    x, w, y = (tensor_text(t, "bf16") for t in ((b, 1, 16), (64 * channels, 16), (b, 1, 64 * channels)))
    rng = np.random.default_rng(0)
    values = {"x": numbers(rng, b, 1, 16), "w": numbers(rng, 64 * channels, 16)}
    got = Run(main({"x": x, "w": w}, f'  %y = tc.contract "b s i, o i -> b s o" (%x, %w) : {y}', y))(values)["y"]
    assert relative(got, values["x"] @ values["w"].T) < ROUNDED


@GRIDS
def test_projections_of_the_same_tokens(grid: Grid) -> None:
    """As q, k and v: they may share passes."""

    def check(case: tuple[Tokens, int, list[int]]) -> None:
        (b, s), k, sizes = case
        x = tensor_text((b, s, k), "bf16")
        arguments, body = {"x": x}, ""
        rng = np.random.default_rng(k)
        values = {"x": numbers(rng, b, s, k)}
        for i, n in enumerate(sizes):
            arguments[f"w{i}"] = tensor_text((n, k), "bf16")
            values[f"w{i}"] = numbers(rng, n, k, over=k)
            body += f'  %p{i} = tc.contract "b s i, o i -> b s o" (%x, %w{i}) : {tensor_text((b, s, n), "bf16")}\n'
        out = tensor_text((b, s, sum(sizes)), "bf16")
        body += f"  %y = tc.concat ({', '.join(f'%p{i}' for i in range(len(sizes)))}) axis 2 : {out}"
        want = np.concatenate([values["x"] @ values[f"w{i}"].T for i in range(len(sizes))], axis=2)
        assert relative(Run(main(arguments, body, out))(values)["y"], want) < ROUNDED

    sizes = st.lists(st.integers(1, grid.width).map(lambda n: n * 8), min_size=2, max_size=3)
    each(grid, st.tuples(tokens(grid), widths(grid), sizes), check)


@GRIDS
@pytest.mark.parametrize("spill", [96 * 1024, 400])
def test_blocks(grid: Grid, spill: int) -> None:
    """Norm, gated MLP and residual: reductions, joined contractions, values in data memory or in HBM between them."""

    def check(case: tuple[Tokens, int, int]) -> None:
        (b, s), h, i = case
        x, mid, up, down = (tensor_text(t, "bf16") for t in ((b, s, h), (b, s, i), (i, h), (h, i)))
        body = f"""  %m = tc.reduce add "mul(a, a)" over "b s h -> b s" (%x) : {tensor_text((b, s), "f32")}
  %z = tc.map "mul(mul(a, rsqrt(add(mul(b, {1 / h}), 1e-05))), c)" over "b s h, b s, h -> b s h" (%x, %m, %n) : {x}
  %a = tc.contract "b s i, o i -> b s o" (%z, %g) : {mid}
  %b = tc.contract "b s i, o i -> b s o" (%z, %u) : {mid}
  %j = tc.map "mul(silu(a), b)" over "b s o, b s o -> b s o" (%a, %b) : {mid}
  %p = tc.contract "b s i, o i -> b s o" (%j, %d) : {x}
  %y = tc.map "add(a, b)" over "b s o, b s o -> b s o" (%p, %x) : {x}"""
        rng = np.random.default_rng(h + i)
        v = {"x": numbers(rng, b, s, h), "n": numbers(rng, h), "g": numbers(rng, i, h, over=h)}
        v |= {"u": numbers(rng, i, h, over=h), "d": numbers(rng, h, i, over=i)}
        arguments = {"x": x, "n": tensor_text((h,), "bf16"), "g": up, "u": up, "d": down}
        try:
            run = Run(main(arguments, body, x), spill_bytes=spill)
        except UnsupportedError as error:  # values in HBM have no room for zeros behind them
            assert spill == 400
            assert "a contraction over" in str(error)
            return
        z = bf16(v["x"] / np.sqrt((v["x"] ** 2).mean(-1, keepdims=True) + 1e-5) * v["n"])
        gate, up_ = bf16(z @ v["g"].T), bf16(z @ v["u"].T)
        want = bf16(bf16(gate / (1 + np.exp(-gate)) * up_) @ v["d"].T) + v["x"]
        assert relative(run(v)["y"], want) < 2 * ROUNDED

    sizes = widths(grid) if spill > 400 else widths(grid, 16)
    each(grid, st.tuples(tokens(grid), sizes, sizes), check, 1.0 if spill > 400 else 0.5)


# Vocabularies --------------------------------------------------------------------------------------------------------
@GRIDS
def test_embeddings_and_heads(grid: Grid) -> None:
    """Rows of a table, the last token of every sequence, and its logits, which are stored as the program's output."""

    def check(case: tuple[Tokens, int, int]) -> None:
        (b, s), h, vocabulary = case
        x, one, logits = (
            tensor_text(t, e) for t, e in (((b, s, h), "bf16"), ((b, h), "bf16"), ((b, vocabulary), "f32"))
        )
        body = f"""  %x = tc.gather "v h, b s -> b s h" (%w, %ids) : {x}
  %z = tc.map "mul(a, 0.5)" over "b s h -> b s h" (%x) : {x}
  %g = tc.gather "b s h, b -> b h" (%z, %last) : {one}
  %y = tc.contract "b i, o i -> b o" (%g, %w) : {logits}"""
        rng = np.random.default_rng(vocabulary)
        w = numbers(rng, vocabulary, h, over=h)
        ids, last = rng.integers(0, vocabulary, (b, s)), rng.integers(0, s, (b,))
        arguments = {"ids": tensor_text((b, s), "i32"), "last": tensor_text((b,), "i32")}
        run = Run(main(arguments | {"w": tensor_text((vocabulary, h), "bf16")}, body, logits))
        got = run({"ids": ids.astype(np.int32), "last": last.astype(np.int32), "w": w})["y"]
        assert relative(got, w[ids[np.arange(b), last]] / 2 @ w.T) < ROUNDED

    each(grid, st.tuples(tokens(grid), widths(grid), st.integers(2, grid.vocabulary)), check)


# Attention -----------------------------------------------------------------------------------------------------------
@GRIDS
def test_attention(grid: Grid) -> None:
    def check(case: tuple[Tokens, int, int, int, int, int]) -> None:
        (b, s), more, kv, group, d, start = case
        check_decoder(b, s, s + more, kv * group, kv, d * 8, [(start + 7 * i) % (more + 1) for i in range(b)])

    # A slice holds the keys of few rows: more rows and prompts with less head.
    cases = st.tuples(
        tokens(grid).filter(lambda t: t[0] <= 64 and t[0] * t[1] <= grid.length), st.integers(0, grid.keys),
        st.integers(1, 3), st.integers(1, 4), st.integers(1, 8), st.integers(0, 100),
    )  # fmt: skip
    each(grid, cases, check, 0.7)


# Several units -------------------------------------------------------------------------------------------------------
def parallel(units: int, b: int, s: int, hidden: int, inner: int, scatter: bool) -> str:
    """A column-parallel and a row-parallel contraction and the sum, whole or as a part of the tokens each."""
    part = inner // units

    def of(rows: int, width: int) -> str:
        return f'tensor<{b}x{rows}x{width}xbf16, #tc.axes<"B,S,_">>'

    x = of(s, hidden)
    sums = f'%y = tc.all_reduce %p kind add axis tp why "test" : {x}'
    if scatter:
        own = of(s // units, hidden)
        sums = f"""%r = tc.reduce_scatter %p kind add dim 1 axis tp why "test" : {own}
    %m = tc.map "mul(a, 1.0)" over "b s h -> b s h" (%r) : {own}
    %y = tc.all_gather %m dim 1 axis tp why "test" : {x}"""
    return f"""
builtin.module attributes {{tc.mesh = "kv={units}"}} {{
  func.func @main(%x: {x}) -> {x} attributes {{arg_names = ["x"], result_names = ["y"]}} {{
    %a = tc.weight "a" shard "{inner}@tp, {hidden}" : tensor<{part}x{hidden}xbf16>
    %b = tc.weight "b" shard "{hidden}, {inner}@tp" : tensor<{hidden}x{part}xbf16>
    %h = tc.contract "b s i, o i -> b s o" (%x, %a) : {of(s, part)}
    %p = tc.contract "b s i, o i -> b s o" (%h, %b) : {x}
    {sums}
    func.return %y : {x}
  }}
}}
"""


@GRIDS
@pytest.mark.parametrize("scatter", [False, True])
def test_sums_over_units(grid: Grid, scatter: bool) -> None:
    def check(case: tuple[int, Tokens, int, int]) -> None:
        units, (b, s), h, i = case
        hidden, inner = h * 4 * units, i * 4 * units
        length = -(-s // (16 * units)) * 16 * units if scatter else s
        run = GroupRun(parallel(units, b, length, hidden, inner, scatter))
        rng = np.random.default_rng(hidden)
        x, up, down = (
            numbers(rng, b, length, hidden), numbers(rng, inner, hidden, over=hidden),
            numbers(rng, hidden, inner, over=inner),
        )  # fmt: skip
        got = run({"x": x}, {"a": up, "b": down}.__getitem__)["y"]
        assert relative(got, bf16(x @ up.T) @ down.T) < 2 * ROUNDED

    shapes = tokens(grid).filter(lambda t: not scatter or (t[0] in (1, 2, 4) and t[1] > 8))
    width = st.integers(1, max(4, grid.width // 8))
    each(grid, st.tuples(st.sampled_from([2, 4, 8]), shapes, width, width), check, 0.4)
