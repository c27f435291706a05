"""What `rngdc check` compares: a wrong rewrite is found and named, a different rounding is not."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from ir.text import parse_module
from rngdc.compare_passes import compare_passes

BEFORE = """
func.func @main(%x: tensor<2x4x16xbf16>) -> tensor<2x4x16xbf16> attributes {arg_names = ["x"], result_names = ["y"]} {
  %w = tc.weight "w" : tensor<16x16xbf16>
  %0 = tc.contract "b s i, o i -> b s o" (%x, %w) {path = "proj"} : tensor<2x4x16xbf16>
  %1 = tc.map "mul(a, 0.5)" over "b s h -> b s h" (%0) {path = "act"} : tensor<2x4x16xbf16>
  %2 = tc.map "tanh(a)" over "b s h -> b s h" (%1) {path = "act"} : tensor<2x4x16xbf16>
  %3 = tc.contract "b s i, o i -> b s o" (%2, %w) {path = "out"} : tensor<2x4x16xbf16>
  func.return %3 : tensor<2x4x16xbf16>
}
"""
FUSED = """
func.func @main(%x: tensor<2x4x16xbf16>) -> tensor<2x4x16xbf16> attributes {arg_names = ["x"], result_names = ["y"]} {
  %w = tc.weight "w" : tensor<16x16xbf16>
  %0 = tc.contract "b s i, o i -> b s o" (%x, %w) {path = "proj"} : tensor<2x4x16xbf16>
  %2 = tc.map "tanh(mul(a, 0.5))" over "b s h -> b s h" (%0) {path = "act"} : tensor<2x4x16xbf16>
  %3 = tc.contract "b s i, o i -> b s o" (%2, %w) {path = "out"} : tensor<2x4x16xbf16>
  func.return %3 : tensor<2x4x16xbf16>
}
"""


def inputs(*shape: int, seed: int = 0) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(seed).standard_normal(shape or (2, 4, 16)).astype(ml_dtypes.bfloat16)}


def weights(name: str) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((16, 16)).astype(ml_dtypes.bfloat16)


def test_another_rounding_agrees() -> None:
    found = compare_passes(parse_module(BEFORE), parse_module(FUSED), inputs(), weights)
    assert found.agrees
    assert found.first is None
    assert found.results["y"].rms_error > 0


def test_an_unlucky_rounding_is_judged_over_more_inputs() -> None:
    """A token has few roundings: after a correct rewrite now and then one is far larger than its partner."""

    def token(scaled: str, product: str) -> str:
        return f"""
func.func @main(%x: tensor<1x16xbf16>) -> tensor<1x16xbf16> attributes {{arg_names = ["x"], result_names = ["y"]}} {{
  %w = tc.weight "w" : tensor<16x16xbf16>
  {scaled}
  {product}
  %2 = tc.map "exp(a)" over "b h -> b h" (%1) : tensor<1x16xbf16>
  func.return %2 : tensor<1x16xbf16>
}}
"""

    scale = '= tc.map "mul(a, 3.0)" over "b h -> b h"'
    product = '= tc.contract "b i, o i -> b o"'
    kind = ": tensor<1x16xbf16>"
    before = parse_module(token(f"%0 {product} (%x, %w) {kind}", f"%1 {scale} (%0) {kind}"))
    text = token(f"%0 {scale} (%x) {kind}", f"%1 {product} (%0, %w) {kind}")
    after, wrong = parse_module(text), parse_module(text.replace("3.0", "3.05"))
    unlucky = 0
    for seed in range(0, 320, 8):
        first, *others = (inputs(1, 16, seed=seed + i) for i in range(8))
        alone, together = (compare_passes(before, after, first, weights, more) for more in ((), iter(others)))
        assert together.agrees and together.inputs == (1 if alone.agrees else 8)
        unlucky += not alone.agrees
        assert not compare_passes(before, wrong, first, weights, iter(others)).agrees
    assert 0 < unlucky < 10


def test_a_wrong_rewrite_is_named() -> None:
    for wrong in ("tanh(mul(a, 0.53))", "sigmoid(mul(a, 0.5))", "tanh(a)"):
        module = parse_module(FUSED.replace("tanh(mul(a, 0.5))", wrong))
        found = compare_passes(parse_module(BEFORE), module, inputs(), weights)
        assert not found.agrees
        assert found.first is not None
        assert found.first.path == "act"
        assert wrong in found.first.op


def test_one_wrong_element_is_enough() -> None:
    """A rewrite that loses one row of eight is not hidden by the others."""
    lost = FUSED.replace(
        '  %3 = tc.contract "b s i, o i -> b s o" (%2, %w)',
        "  %c = tc.constant dense<[1.0, 1.0, 1.0, 0.0]> : tensor<4xbf16>\n"
        '  %4 = tc.map "mul(a, b)" over "b s h, s -> b s h" (%2, %c) : tensor<2x4x16xbf16>\n'
        '  %3 = tc.contract "b s i, o i -> b s o" (%4, %w)',
    )
    found = compare_passes(parse_module(BEFORE), parse_module(lost), inputs(), weights)
    assert not found.agrees
    assert found.first is not None
    assert found.first.path == "out"
