from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from ir.errors import UserError
from ir.interpreter import run
from ir.kernels import KernelError
from ir.spmd import join_results, run_spmd
from ir.text import parse_module


def program(mesh: str, body: str, arg: str, result: str, shard: str = "") -> str:
    return (
        f'builtin.module attributes {{tc.mesh = "{mesh}"}} {{\n'
        f'func.func @main(%x: {arg}) -> {result} attributes {{arg_names = ["x"], arg_shards = ["{shard}"], '
        f'result_names = ["y"]}} {{\n{body}\nfunc.return %y : {result}\n}}\n}}'
    )


def outputs(mesh: str, body: str, arg: str, result: str, x: np.ndarray, shard: str = "") -> list[list[float]]:
    module = parse_module(program(mesh, body, arg, result, shard))
    return [y.astype(np.float32).tolist() for y in run_spmd(module, [x], {}.__getitem__)["y"]]


X = np.arange(8, dtype=np.float32)


@pytest.mark.parametrize(
    ("axis", "want"),
    [
        ("tp", [[12.0, 16.0]] * 4),
        # Units 0 and 2 differ on kv only, as do 1 and 3.
        ("kv", [[4.0, 6.0], [8.0, 10.0]] * 2),
        ("r", [[2.0, 4.0]] * 2 + [[10.0, 12.0]] * 2),
    ],
)
def test_all_reduce_on_an_axis(axis: str, want: list[list[float]]) -> None:
    body = f'%y = tc.all_reduce %x kind add axis {axis} why "t" : tensor<2xf32>'
    assert outputs("kv=2,r=2", body, "tensor<2xf32>", "tensor<2xf32>", X, "4@tp 2") == want


def test_all_reduce_rounds_once() -> None:
    big = np.array([256.0, 1.0, 1.0, 1.0]).astype(ml_dtypes.bfloat16)
    body = '%y = tc.all_reduce %x kind add axis tp why "t" : tensor<1xbf16>'
    got = outputs("kv=4", body, "tensor<1xbf16>", "tensor<1xbf16>", big, "4@tp")
    # 259 lies between 258 and 260; sums of pairs in bf16 would stay at 256 or give 258.
    assert got == [[260.0]] * 4


def test_maximum() -> None:
    body = '%y = tc.all_reduce %x kind max axis tp why "t" : tensor<2xf32>'
    assert outputs("kv=4", body, "tensor<2xf32>", "tensor<2xf32>", X, "4@tp 2") == [[6.0, 7.0]] * 4


def test_all_gather_in_the_order_of_coordinates() -> None:
    body = '%y = tc.all_gather %x dim 0 axis kv why "t" : tensor<4xf32>'
    got = outputs("kv=2,r=2", body, "tensor<2xf32>", "tensor<4xf32>", X, "4@tp 2")
    assert got == [[0, 1, 4, 5], [2, 3, 6, 7]] * 2


def test_reduce_scatter() -> None:
    body = '%y = tc.reduce_scatter %x kind add dim 0 axis tp why "t" : tensor<2xf32>'
    got = outputs("kv=2", body, "tensor<4xf32>", "tensor<2xf32>", X, "2@tp 4")
    assert got == [[4, 6], [8, 10]]


def test_local_slice_ends_in_zeros() -> None:
    body = '%y = tc.local_slice %x dim 0 axis tp why "t" : tensor<3xf32>'
    assert outputs("kv=3", body, "tensor<8xf32>", "tensor<3xf32>", X) == [[0, 1, 2], [3, 4, 5], [6, 7, 0]]


def test_axis_index() -> None:
    body = '%i = tc.axis_index axis r scale 5 : tensor<i32>\n%y = tc.map "add(a, b)" over "n, -> n" (%x, %i)'
    got = outputs("kv=2,r=2", f"{body} : tensor<1xf32>", "tensor<1xf32>", "tensor<1xf32>", np.ones(1, np.float32))
    assert got == [[1.0], [6.0]] * 2


def test_weights_and_arguments_are_cut_and_results_joined() -> None:
    text = """builtin.module attributes {tc.mesh = "kv=2"} {
      func.func @main(%c: tensor<2xf32>, %x: tensor<4xf32>) -> (tensor<2xf32>, tensor<4xf32>)
          attributes {arg_names = ["cache.k.0", "x"], arg_shards = ["3@tp", ""], result_names = ["cache.k.0", "y"]} {
        %w = tc.weight "w" shard "3@kv" : tensor<2xf32>
        %v = tc.map "add(a, b)" over "n, n -> n" (%c, %w) : tensor<2xf32>
        func.return %v, %x : tensor<2xf32>, tensor<4xf32>
      }
    }"""
    module = parse_module(text)
    weights = {"w": np.array([10, 20, 30], np.float32)}
    args = {"cache.k.0": np.array([1, 2, 3], np.float32), "x": X[:4]}
    results = run_spmd(module, args, weights.__getitem__)
    assert [p.tolist() for p in results["cache.k.0"]] == [[11, 22], [33, 0]]
    assert join_results(module, results)["cache.k.0"].tolist() == [11, 22, 33]
    with pytest.raises(UserError, match=r"argument cache.k.0: it has shape \[2\], not \[3\]"):
        run_spmd(module, {**args, "cache.k.0": X[:2]}, weights.__getitem__)


def test_observer_sees_all_units() -> None:
    body = '%a = tc.all_reduce %x kind add axis tp why "t" : tensor<2xf32>\n%y = tc.map "neg(a)" over "n -> n" (%a)'
    module = parse_module(program("kv=4", f"{body} : tensor<2xf32>", "tensor<2xf32>", "tensor<2xf32>", "4@tp 2"))
    seen: list[tuple[str, int]] = []
    run_spmd(module, [X], {}.__getitem__, observe=lambda op, values, path: seen.append((op.name, len(values[0]))))
    assert seen == [("tc.all_reduce", 4), ("tc.map", 4)]


def test_a_program_for_one_unit_is_refused() -> None:
    text = 'func.func @main(%x: tensor<2xf32>) -> tensor<2xf32> attributes {arg_names = ["x"]} {\nREST}'
    body = '%y = tc.all_reduce %x kind add axis tp why "t" : tensor<2xf32>\nfunc.return %y : tensor<2xf32>'
    module = parse_module(text.replace("REST", body))
    with pytest.raises(UserError, match="no mesh"):
        run_spmd(module, [X[:2]], {}.__getitem__)
    with pytest.raises(KernelError, match="needs all units"):
        run(module, [X[:2]])
