"""Collectives: every algorithm on several units gives what one unit computes, on the simulator with all checks."""

from __future__ import annotations

import numpy as np
import pytest

from backend_rngd.machine import load_machine
from tests.lowering.running import GroupRun, bf16, relative

MACHINE = load_machine()
SMALL_CARDS = MACHINE.model_copy(update={"pes_per_chip": 2, "pes_per_cluster": 1})
"""Cards of two PEs, so that four units need two of them."""


def mlp(units: int, batch: int, seq: int, hidden: int, inner: int, element: str = "bf16") -> str:
    """Column-parallel, then row-parallel contraction, and their all-reduce."""
    part = -(-inner // units)
    x = f'tensor<{batch}x{seq}x{hidden}xbf16, #tc.axes<"B,S,_">>'
    h = f'tensor<{batch}x{seq}x{part}xbf16, #tc.axes<"B,S,_">>'
    y = f'tensor<{batch}x{seq}x{hidden}x{element}, #tc.axes<"B,S,_">>'
    return f"""
builtin.module attributes {{tc.mesh = "kv={units}"}} {{
  func.func @main(%x: {x}) -> {y} attributes {{arg_names = ["x"], result_names = ["y"]}} {{
    %a = tc.weight "a" shard "{inner}@tp, {hidden}" : tensor<{part}x{hidden}xbf16>
    %b = tc.weight "b" shard "{hidden}, {inner}@tp" : tensor<{hidden}x{part}xbf16>
    %h = tc.contract "b s i, o i -> b s o" (%x, %a) : {h}
    %p = tc.contract "b s i, o i -> b s o" (%h, %b) : {y}
    %y = tc.all_reduce %p kind add axis tp why "test" : {y}
    func.return %y : {y}
  }}
}}
"""


def check_mlp(run: GroupRun, batch: int, seq: int, hidden: int, inner: int) -> None:
    rng = np.random.default_rng(0)
    x = bf16(rng.standard_normal((batch, seq, hidden)).astype(np.float32))
    a = bf16(rng.standard_normal((inner, hidden)).astype(np.float32) / np.sqrt(hidden))
    b = bf16(rng.standard_normal((hidden, inner)).astype(np.float32) / np.sqrt(inner))
    got = run({"x": x}, {"a": a, "b": b}.__getitem__)["y"]
    want = bf16(x @ a.T) @ b.T
    assert relative(got, want) < 0.01


@pytest.mark.parametrize("units", [2, 4, 8])
@pytest.mark.parametrize(("batch", "seq"), [(1, 1), (3, 1), (1, 8), (1, 24), (2, 40), (20, 1)])
def test_all_reduce(units: int, batch: int, seq: int) -> None:
    run = GroupRun(mlp(units, batch, seq, 64, 160))
    check_mlp(run, batch, seq, 64, 160)


@pytest.mark.parametrize(("batch", "seq"), [(1, 1), (1, 24)])
def test_all_reduce_of_wide_sums(batch: int, seq: int) -> None:
    check_mlp(GroupRun(mlp(4, batch, seq, 64, 96, "f32")), batch, seq, 64, 96)


@pytest.mark.parametrize("units", [2, 4])
def test_all_reduce_in_hbm(units: int) -> None:
    check_mlp(GroupRun(mlp(units, 1, 130, 96, 64), spill_bytes=256), 1, 130, 96, 64)


@pytest.mark.parametrize("units", [4, 8])
@pytest.mark.parametrize(("batch", "seq"), [(1, 1), (2, 1), (1, 24)])
def test_all_reduce_over_cards(units: int, batch: int, seq: int) -> None:
    run = GroupRun(mlp(units, batch, seq, 64, 96), SMALL_CARDS)
    check_mlp(run, batch, seq, 64, 96)


def test_all_reduce_over_cards_in_hbm() -> None:
    check_mlp(GroupRun(mlp(4, 1, 130, 96, 64), SMALL_CARDS, spill_bytes=256), 1, 130, 96, 64)
