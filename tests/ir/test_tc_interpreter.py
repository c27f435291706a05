from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from ir.errors import UserError
from ir.interpreter import run
from ir.kernels import KernelError
from ir.text import parse_module

BF16 = ml_dtypes.bfloat16

TWO_LAYERS = """
func.func private @block_0(%x: tensor<?x?x4xf32, #tc.axes<"B,S,_">>, %w: tensor<4x4xbf16>)
    -> tensor<?x?x4xf32, #tc.axes<"B,S,_">> {
  %y = tc.contract "b s i, o i -> b s o" (%x, %w) : tensor<?x?x4xf32, #tc.axes<"B,S,_">>
  func.return %y : tensor<?x?x4xf32, #tc.axes<"B,S,_">>
}
func.func @main(%ids: tensor<?x?xi32, #tc.axes<"B,S">>) -> tensor<?x4xf32, #tc.axes<"B*S,_">>
    attributes {arg_names = ["input_ids"], result_names = ["hidden"]} {
  %t = tc.weight "embed" : tensor<8x4xf32>
  %a = tc.weight "layers.0" : tensor<4x4xbf16>
  %b = tc.weight "layers.1" : tensor<4x4xbf16>
  %x = tc.gather "v h, b s -> b s h" (%t, %ids) : tensor<?x?x4xf32, #tc.axes<"B,S,_">>
  %y = func.call @block_0(%x, %a) : (tensor<?x?x4xf32, #tc.axes<"B,S,_">>, tensor<4x4xbf16>) -> tensor<?x?x4xf32, #tc.axes<"B,S,_">>
  %z = func.call @block_0(%y, %b) : (tensor<?x?x4xf32, #tc.axes<"B,S,_">>, tensor<4x4xbf16>) -> tensor<?x?x4xf32, #tc.axes<"B,S,_">>
  %o = tc.reshape %z : tensor<?x4xf32, #tc.axes<"B*S,_">>
  func.return %o : tensor<?x4xf32, #tc.axes<"B*S,_">>
}
"""  # noqa: E501
rng = np.random.default_rng(3)
WEIGHTS: dict[str, Any] = {
    "embed": rng.standard_normal((8, 4)).astype(np.float32),
    "layers.0": rng.standard_normal((4, 4)).astype(BF16),
    "layers.1": rng.standard_normal((4, 4)).astype(np.float32),  # stored in f32, cast to the type in the IR
}
IDS = np.array([[1, 2, 3], [4, 5, 0]])


def test_symbolic_modules_run_and_calls_are_observed() -> None:
    seen: list[tuple[str, tuple[str, ...]]] = []
    result = run(
        parse_module(TWO_LAYERS),
        {"input_ids": IDS},
        WEIGHTS.__getitem__,
        observe=lambda op, arrays, path: seen.append((op.name, path)),
    )
    x = WEIGHTS["embed"][IDS]
    for name in ("layers.0", "layers.1"):
        x = x @ WEIGHTS[name].astype(BF16).astype(np.float32).T
    assert list(result) == ["hidden"]
    np.testing.assert_allclose(result["hidden"], x.reshape(6, 4), rtol=1e-5)
    assert [s for s in seen if s[0] == "tc.contract"] == [
        ("tc.contract", ("main", "block_0[0]")),
        ("tc.contract", ("main", "block_0[1]")),
    ]
    assert seen[-1] == ("tc.reshape", ("main",))


def test_arguments_in_order_or_by_name() -> None:
    module = parse_module(TWO_LAYERS)
    a = run(module, [IDS], WEIGHTS.__getitem__)
    b = run(module, {"input_ids": IDS.astype(np.int32)}, WEIGHTS.__getitem__)
    assert np.array_equal(a["hidden"], b["hidden"])


def test_every_wrong_argument_is_reported() -> None:
    module = parse_module(TWO_LAYERS)
    with pytest.raises(UserError) as caught:
        run(module, {"ids": IDS, "extra": IDS}, WEIGHTS.__getitem__)
    assert [p.what for p in caught.value.problems] == ["argument input_ids", "argument ids", "argument extra"]
    with pytest.raises(UserError, match="it is float64, not i32"):
        run(module, {"input_ids": IDS * 1.0}, WEIGHTS.__getitem__)
    with pytest.raises(UserError, match="it is int64, not i32"):
        run(module, {"input_ids": IDS + 2**40}, WEIGHTS.__getitem__)
    with pytest.raises(UserError, match=r"shape \[6\], the function takes \[B, S\]"):
        run(module, {"input_ids": IDS.reshape(6)}, WEIGHTS.__getitem__)
    with pytest.raises(UserError, match="choose one of block_0, main"):
        run(module, [], function="nothing")


def test_sizes_of_one_symbol_must_agree() -> None:
    module = parse_module(
        """func.func @main(%x: tensor<?x2xf32, #tc.axes<"B,_">>, %y: tensor<?xf32, #tc.axes<"B*2">>) {
             func.return
           }"""
    )
    run(module, [np.zeros((3, 2), np.float32), np.zeros(6, np.float32)])
    with pytest.raises(UserError, match=r"arg1: it has shape \[5\], the function takes \[B\*2\] with B = 3"):
        run(module, [np.zeros((3, 2), np.float32), np.zeros(5, np.float32)])


def test_failures_name_their_operation() -> None:
    module = parse_module(TWO_LAYERS)
    with pytest.raises(KernelError, match="index 0 to 9 outside 0 to 7") as caught:
        run(module, {"input_ids": IDS * 0 + np.array([0, 1, 9])}, WEIGHTS.__getitem__)
    assert "Error while interpreting op" in "".join(caught.value.__notes__)
    with pytest.raises(KernelError, match=r"layers.0 has shape \[4, 5\], not \[4, 4\]"):
        run(module, [IDS], lambda n: np.zeros((4, 5)) if n == "layers.0" else WEIGHTS[n])
    with pytest.raises(UserError, match="no weights"):
        run(module, [IDS])


def test_broadcasts_take_sizes_from_the_symbols() -> None:
    module = parse_module(
        """func.func @main(%x: tensor<?xf32, #tc.axes<"B">>) -> tensor<?x3xf32, #tc.axes<"B,_">> {
             %c = tc.constant dense<[1.0, 2.0, 3.0]> : tensor<3xf32>
             %y = tc.map "a" over "h -> b h" (%c) : tensor<?x3xf32, #tc.axes<"B,_">>
             func.return %y : tensor<?x3xf32, #tc.axes<"B,_">>
           }"""
    )
    assert run(module, [np.zeros(2, np.float32)])["result0"].tolist() == [[1, 2, 3]] * 2
