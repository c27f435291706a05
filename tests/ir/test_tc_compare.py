from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from xdsl.dialects.builtin import FileLineColLoc, IntAttr, StringAttr

from ir.compare import BF16, compare_modules, metrics
from ir.dialects import tc
from ir.text import parse_module

rng = np.random.default_rng(7)


def test_metrics_of_equal_arrays() -> None:
    x = rng.standard_normal((4, 5)).astype(np.float32)
    found = metrics(x, x)
    assert found.close
    assert (found.max_abs, found.max_rel, found.rms_rel, found.wrong) == (0, 0, 0, 0)
    assert found.cosine == pytest.approx(1)


def test_bf16_rounding_is_close_but_a_wrong_element_is_not() -> None:
    x = rng.standard_normal(4096).astype(np.float32)
    rounded = x.astype(ml_dtypes.bfloat16)
    assert metrics(rounded, x).close
    assert not metrics(rounded.astype(np.float32), x).close  # two f32 arrays are held to f32
    wrong = rounded.copy()
    wrong[17] += 1
    found = metrics(wrong, x)
    assert not found.close
    assert (found.wrong, found.worst) == (1, (17,))
    assert found.cosine > 0.999  # which is why correlation does not decide


def test_a_small_scale_error_everywhere_is_found() -> None:
    x = rng.standard_normal(4096).astype(np.float32)
    assert not metrics(x * 1.03, x, BF16).close


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_wrong(bad: float) -> None:
    x = np.ones(8, np.float32)
    y = x.copy()
    y[3] = bad
    assert not metrics(y, x).close
    assert not metrics(x, y).close
    assert metrics(y, y).close
    assert metrics(y, x).max_abs == np.inf


def test_zeros_and_integers() -> None:
    zero = np.zeros(4, np.float32)
    assert metrics(zero, zero).close
    assert not metrics(zero + 1e-3, zero).close
    assert metrics(np.array([1, 2]), np.array([1, 2])).close
    assert not metrics(np.array([1, 2]), np.array([1, 3])).close
    with pytest.raises(ValueError, match="cannot be compared"):
        metrics(zero, np.zeros(5, np.float32))


MODULE = """
func.func private @block(%x: tensor<?x8xbf16, #tc.axes<"B,_">>, %w: tensor<8x8xbf16>) -> tensor<?x8xbf16, #tc.axes<"B,_">> {
  %a = tc.contract "b i, o i -> b o" (%x, %w) {path = "proj"} : tensor<?x8xbf16, #tc.axes<"B,_">>
  %b = tc.map "tanh(a)" over "b h -> b h" (%a) {path = "act"} : tensor<?x8xbf16, #tc.axes<"B,_">>
  func.return %b : tensor<?x8xbf16, #tc.axes<"B,_">>
}
func.func @main(%x: tensor<?x8xbf16, #tc.axes<"B,_">>) -> tensor<?x8xbf16, #tc.axes<"B,_">> attributes {arg_names = ["x"], result_names = ["y"]} {
  %w = tc.weight "w" : tensor<8x8xbf16>
  %a = func.call @block(%x, %w) {path = "layers.0"} : (tensor<?x8xbf16, #tc.axes<"B,_">>, tensor<8x8xbf16>) -> tensor<?x8xbf16, #tc.axes<"B,_">>
  %b = func.call @block(%a, %w) {path = "layers.1"} : (tensor<?x8xbf16, #tc.axes<"B,_">>, tensor<8x8xbf16>) -> tensor<?x8xbf16, #tc.axes<"B,_">>
  func.return %b : tensor<?x8xbf16, #tc.axes<"B,_">>
}
"""  # noqa: E501
WEIGHT = rng.standard_normal((8, 8)).astype(ml_dtypes.bfloat16)
X = {"x": rng.standard_normal((3, 8)).astype(np.float32)}


def test_equal_modules_agree() -> None:
    result = compare_modules(parse_module(MODULE), parse_module(MODULE), X, lambda n: WEIGHT)
    assert result.agrees
    assert result.first is None
    assert (result.compared, result.unmatched, result.skipped) == (6, 0, [])


def test_the_first_wrong_operation_is_named() -> None:
    wrong = parse_module(MODULE.replace("tanh(a)", "sigmoid(a)"))
    op = next(o for o in wrong.walk() if isinstance(o, tc.MapOp))
    op.location = FileLineColLoc(StringAttr("model.py"), IntAttr(12), IntAttr(0))
    result = compare_modules(parse_module(MODULE), wrong, X, lambda n: WEIGHT)
    assert not result.agrees
    assert result.first is not None
    assert result.first.op.startswith("tc.map")
    assert result.first.calls == ("main", "block[0]")
    assert result.first.path == "act"
    assert result.first.location == "model.py:12"
    assert result.to_json()["first_disagreement"]["metrics"]["close"] is False


def test_results_that_only_one_module_has_are_listed() -> None:
    renamed = parse_module(MODULE.replace('result_names = ["y"]', 'result_names = ["z"]'))
    result = compare_modules(parse_module(MODULE), renamed, X, lambda n: WEIGHT)
    assert result.skipped == ["y", "z"]
    assert not result.agrees  # nothing was compared


def test_logits_of_the_last_row_are_compared_with_all_rows() -> None:
    text = """func.func @main(%x: tensor<?x?x4xf32, #tc.axes<"B,S,_">>) -> tensor<?x?x4xf32, #tc.axes<"B,S,_">>
                  attributes {arg_names = ["x"], result_names = ["logits"]} {
                %y = tc.map "mul(a, 2.0)" over "b s h -> b s h" (%x) : tensor<?x?x4xf32, #tc.axes<"B,S,_">>
                func.return %y : tensor<?x?x4xf32, #tc.axes<"B,S,_">>
              }"""
    from passes.opt import run_pipeline

    before, after = parse_module(text), parse_module(text)
    run_pipeline(after, "last-token")
    args = {"x": rng.standard_normal((2, 3, 4)).astype(np.float32), "last": np.array([0, 2], np.int32)}
    assert compare_modules(before, after, args).results["logits"].close
    args["last"] = np.array([1, 1], np.int32)
    assert compare_modules(before, after, args).agrees
