"""Contractions of stored numbers: streams against the reference, and what their arithmetic costs in precision.

The yardstick is the scheme in exact arithmetic (f64, one rounding of the result to bf16): both are compared with the
product of the dequantized weights and the activations that were not quantized.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from backend_rngd.isa.descriptors import Alu, Dtype, Exec, LoadTrf, Lookup
from backend_rngd.lowering.tensor import RowSpace
from ir.errors import UnsupportedError, UserError
from ir.interpreter import run
from ir.kernels import round_to
from tests.lowering.running import Run, relative

Array = NDArray[Any]
BF16, F8 = np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn)
ELEMENT = {"int8": "i8", "fp8": "f8E4M3FN"}
NUMBER = {"int8": np.dtype(np.int8), "fp8": F8}
LARGEST = {"int8": 127.5, "fp8": 448.0}
DTYPE = {"int8": Dtype.I8, "fp8": Dtype.F8E4M3}

# (batch, tokens, channels, k): few tokens and many, K in one piece and split, rings of different sizes, K of one flit
SHAPES = [
    (1, 1, 128, 64), (4, 1, 192, 256), (2, 1, 96, 96), (1, 1, 128, 32768), (8, 1, 256, 8192), (1, 8, 256, 8192),
    (1, 64, 128, 256), (2, 100, 192, 4096), (1, 200, 96, 96), (1, 700, 64, 128),
]  # fmt: skip


def wide(x: Array) -> Array:
    """As f64."""
    return x.astype(np.float32).astype(np.float64)


def module(kind: str, shape: tuple[int, int, int, int], weights: str = "channel", inputs: str = "dynamic") -> str:
    """What bind-quantized makes of a linear layer."""
    b, s, n, k = shape
    el = ELEMENT[kind]
    if inputs == "dynamic":
        scale = f"""
  %m = tc.reduce max "abs(a)" over "b s i -> b s" (%x) : tensor<{b}x{s}xf32>
  %s = tc.map "max(mul(a, {1 / LARGEST[kind]!r}), 1e-12)" over "b s -> b s" (%m) : tensor<{b}x{s}xf32>"""
        rows = "b s"
    else:
        scale, rows = '\n  %s = tc.weight "s" : tensor<f32>', ""
    channel, kept = (f"{n}x", "o") if weights == "channel" else ("", "")
    return f"""func.func @main(%x: tensor<{b}x{s}x{k}xbf16>) -> tensor<{b}x{s}x{n}xbf16> {{
  %w = tc.weight "w" : tensor<{n}x{k}x{el}>
  %c = tc.weight "c" : tensor<{channel}f32>{scale}
  %q = tc.map "div(a, b)" over "b s i, {rows} -> b s i" (%x, %s) : tensor<{b}x{s}x{k}x{el}>
  %a = tc.contract "b s i, o i -> b s o" (%q, %w) : tensor<{b}x{s}x{n}xf32>
  %y = tc.map "mul(mul(a, b), c)" over "b s o, {rows}, {kept} -> b s o" (%a, %s, %c) : tensor<{b}x{s}x{n}xbf16>
  func.return %y : tensor<{b}x{s}x{n}xbf16>
}}"""


def numbers(kind: str, shape: tuple[int, int, int, int], weights: str) -> tuple[Array, dict[str, Array]]:
    """Activations, and weights with their scales."""
    b, s, n, k = shape
    rng = np.random.default_rng(n + k)
    x = rng.standard_normal((b, s, k)).astype(BF16)
    x[:, -1] = (x[:, -1].astype(np.float32) * 30).astype(BF16)  # tokens of different magnitude
    values = rng.standard_normal((n, k)) * LARGEST[kind] / 5
    c = np.asarray(rng.uniform(0.5, 1.5, (n,) if weights == "channel" else ()) / LARGEST[kind], np.float32)
    held = {"w": round_to(values.astype(np.float32), NUMBER[kind]), "c": c}
    return x, held | {"s": np.asarray(30 * 4 / LARGEST[kind], np.float32)}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_dynamic_and_channel_scales(kind: str, shape: tuple[int, int, int, int]) -> None:
    x, held = numbers(kind, shape, "channel")
    compiled = Run(module(kind, shape))
    found = next(iter(compiled({"arg0": x}, lambda name: held[name]).values()))
    want = next(iter(run(compiled.module, {"arg0": x}, lambda name: held[name]).values()))
    assert relative(found, want.astype(np.float32)) < 1e-3  # where the order of f32 sums tips a rounding
    scale = np.maximum(np.abs(wide(x)).max(axis=2, keepdims=True) / LARGEST[kind], 1e-12)
    q = wide(round_to((wide(x) / scale).astype(np.float32), NUMBER[kind]))
    exact = (q * scale) @ (wide(held["w"]) * wide(held["c"])[:, None]).T
    reference = wide(x) @ (wide(held["w"]) * wide(held["c"])[:, None]).T
    assert relative(found, reference) <= 1.1 * relative(wide(exact.astype(BF16)), reference)
    assert relative(found, reference) < {"int8": 0.02, "fp8": 0.05}[kind]


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("weights", ["channel", "tensor"])
@pytest.mark.parametrize("inputs", ["dynamic", "static"])
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_other_scales(kind: str, inputs: str, weights: str, tokens: int) -> None:
    shape = (2, tokens, 192, 128)
    x, held = numbers(kind, shape, weights)
    compiled = Run(module(kind, shape, weights, inputs))
    found = next(iter(compiled({"arg0": x}, lambda name: held[name]).values()))
    want = next(iter(run(compiled.module, {"arg0": x}, lambda name: held[name]).values()))
    assert relative(found, want.astype(np.float32)) < 1e-3


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("tokens", [1, 64])
def test_the_engine_multiplies_the_stored_numbers(kind: str, tokens: int) -> None:
    """Full packets of 64 stored numbers on both sides, scales in the same pass, nothing widened before."""
    compiled = Run(module(kind, (1, tokens, 128, 256)))
    body = [i.what for i in compiled.stream.routines[0].instructions]
    products = [x for x in body if isinstance(x, Exec) and x.contract is not None]
    loads = [x for x in body if isinstance(x, LoadTrf)]
    assert products and loads
    for one in products:
        assert one.fetch.dtype == DTYPE[kind] and one.fetch.packet == 64 and one.contract is not None
        assert one.contract.depth == 6
        alus = [op.alu for op in one.vector]
        assert alus == [*([Alu.FXP_TO_FP] if kind == "int8" else []), Alu.FP_MUL0, Alu.FP_MUL1]
        assert one.commit.dtype == Dtype.BF16
    assert all(x.fetch.dtype == DTYPE[kind] for x in loads)
    assert all(p.dtype == DTYPE[kind].name.lower() for p in compiled.lowered.placements.values() if p.weight == "w")


# 4 bits --------------------------------------------------------------------------------------------------------------
def packed_module(shape: tuple[int, int, int, int], group: int) -> str:
    b, s, n, k = shape
    return f"""func.func @main(%x: tensor<{b}x{s}x{k}xbf16>) -> tensor<{b}x{s}x{n}xbf16> {{
  %p = tc.weight "p" : tensor<{n}x{k // 8}xi32>
  %c = tc.weight "c" : tensor<{n}x{k // group}xf32>
  %w = tc.dequantize (%p, %c) : tensor<{n}x{k}xbf16>
  %y = tc.contract "b s i, o i -> b s o" (%x, %w) : tensor<{b}x{s}x{n}xbf16>
  func.return %y : tensor<{b}x{s}x{n}xbf16>
}}"""


def packed_numbers(shape: tuple[int, int, int, int], group: int) -> tuple[Array, dict[str, Array], Array]:
    """Activations, packed weights with scales, and the numbers -8 to 7 by themselves."""
    b, s, n, k = shape
    rng = np.random.default_rng(n + k)
    q = rng.integers(-8, 8, (n, k))
    words = ((q.reshape(n, -1, 8) + 8).astype(np.uint32) << np.arange(0, 32, 4, dtype=np.uint32)).sum(
        2, dtype=np.uint32
    )
    c = rng.uniform(0.5, 1.5, (n, k // group)).astype(BF16).astype(np.float32)
    return rng.standard_normal((b, s, k)).astype(BF16), {"p": words.view(np.int32), "c": c}, q


@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[3] % 128 == 0], ids=str)
def test_four_bits(shape: tuple[int, int, int, int], group: int) -> None:
    x, held, q = packed_numbers(shape, group)
    compiled = Run(packed_module(shape, group))
    found = next(iter(compiled({"arg0": x}, lambda name: held[name]).values()))
    weight = q * np.repeat(held["c"].astype(np.float64), group, axis=1)
    reference = wide(x) @ weight.T
    if RowSpace.make(shape[0], shape[1], 64).replicated:  # exact but for the results, which are bf16
        assert relative(found, reference) <= 1.1 * relative(wide(reference.astype(BF16)), reference)
        return
    want = next(iter(run(compiled.module, {"arg0": x}, lambda name: held[name]).values()))
    assert relative(found, want.astype(np.float32)) < 1e-3
    # Weights are rounded to bf16 as the library does when it loads them.
    as_library = wide(x) @ wide(weight.astype(np.float32).astype(BF16)).T
    assert relative(found, reference) <= 1.1 * relative(wide(as_library.astype(BF16)), reference)
    assert relative(found, reference) < 2.0**-8


@pytest.mark.parametrize("shape", [(2, 1, 96, 96), (1, 200, 96, 96)], ids=str)
@pytest.mark.parametrize("group", [32, 96])
def test_odd_numbers_of_groups(shape: tuple[int, int, int, int], group: int) -> None:
    x, held, q = packed_numbers(shape, group)
    compiled = Run(packed_module(shape, group))
    found = next(iter(compiled({"arg0": x}, lambda name: held[name]).values()))
    reference = wide(x) @ (q * np.repeat(held["c"].astype(np.float64), group, axis=1)).T
    assert relative(found, reference) < 2.0**-8


@pytest.mark.parametrize("shape", [(4, 1, 192, 256), (2, 1, 64, 32768), (1, 40, 64, 256)], ids=str)
@pytest.mark.parametrize("function", ["mul(tanh(mul(a, 0.01)), 2.0)", "add(a, 3.0)"])
def test_four_bits_with_an_expression_behind(shape: tuple[int, int, int, int], function: str) -> None:
    """The sum over groups leaves no float stage free: the expression has a pass of its own."""
    b, s, n, _ = shape
    kind = f"tensor<{b}x{s}x{n}xbf16>"
    text = packed_module(shape, 64).replace(
        f"func.return %y : {kind}",
        f"""%z = tc.map "{function}" over "b s o -> b s o" (%y) : {kind}
  func.return %z : {kind}""",
    )
    x, held, _ = packed_numbers(shape, 64)
    compiled = Run(text)
    found = next(iter(compiled({"arg0": x}, lambda name: held[name]).values()))
    want = next(iter(run(compiled.module, {"arg0": x}, lambda name: held[name]).values()))
    assert relative(found, want.astype(np.float32)) < 2.0**-7


@pytest.mark.parametrize("tokens", [1, 64])
def test_weights_cross_hbm_in_four_bits(tokens: int) -> None:
    compiled = Run(packed_module((1, tokens, 128, 256), 64))
    images = {p.weight: p for p in compiled.lowered.placements.values()}
    assert images["p"].bytes == 128 * 256 // 2
    body = [i.what for i in compiled.stream.routines[0].instructions]
    lookups = [x for x in body if isinstance(x, Exec) and x.fetch.lookup is not None]
    assert lookups
    assert all(x.fetch.lookup == Lookup.I4_F8E4M3 and x.fetch.cast == Dtype.F32 for x in lookups)
    assert all(x.contract is None and x.commit.dtype == Dtype.BF16 for x in lookups)


def test_rows_that_cannot_be_cut_are_refused() -> None:
    with pytest.raises((UserError, UnsupportedError), match="rows are multiples of 32"):
        Run(packed_module((1, 1, 128, 48), 48))
    text = packed_module((1, 1, 128, 64), 32).replace(
        '%y = tc.contract "b s i, o i -> b s o" (%x, %w) : tensor<1x1x128xbf16>',
        '%v = tc.map "mul(a, 2.0)" over "o i -> o i" (%w) : tensor<128x64xbf16>\n'
        '%y = tc.contract "b s i, o i -> b s o" (%x, %v) : tensor<1x1x128xbf16>',
    )
    with pytest.raises((UserError, UnsupportedError), match="4-bit weight"):
        Run(text)
