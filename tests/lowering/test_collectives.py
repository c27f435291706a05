"""Collectives: every algorithm on several units gives what one unit computes, on the simulator with all checks."""

from __future__ import annotations

import math

import numpy as np
import pytest

from backend_rngd.isa.descriptors import Alu, Exec
from backend_rngd.lowering.program import SPILL_BYTES
from backend_rngd.machine import Machine, load_machine
from tests.lowering.running import Array, GroupRun, bf16, relative

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
@pytest.mark.parametrize(("batch", "seq"), [(1, 1), (3, 1), (2, 2), (1, 8), (1, 24), (2, 40), (20, 1)])
def test_all_reduce(units: int, batch: int, seq: int) -> None:
    run = GroupRun(mlp(units, batch, seq, 64, 160))
    check_mlp(run, batch, seq, 64, 160)


@pytest.mark.parametrize(("batch", "seq"), [(1, 1), (1, 24)])
def test_all_reduce_of_wide_sums(batch: int, seq: int) -> None:
    check_mlp(GroupRun(mlp(4, batch, seq, 64, 96, "f32")), batch, seq, 64, 96)


@pytest.mark.parametrize("units", [2, 8])
@pytest.mark.parametrize(("batch", "seq"), [(1, 1), (3, 1), (1, 4)])
def test_norm_of_a_sum_in_pieces(units: int, batch: int, seq: int) -> None:
    """Every slice computes its piece of residual and norm; only the norm goes round the ring to all slices."""
    hidden, part = 512, 64 // units
    x, stat = f'tensor<{batch}x{seq}x{hidden}xbf16, #tc.axes<"B,S,_">>', f'tensor<{batch}x{seq}xf32, #tc.axes<"B,S">>'
    h = f'tensor<{batch}x{seq}x{part}xbf16, #tc.axes<"B,S,_">>'
    text = f"""
builtin.module attributes {{tc.mesh = "kv={units}"}} {{
  func.func @main(%x: {x}) -> ({x}, {stat}) attributes {{arg_names = ["x"], result_names = ["y", "top"]}} {{
    %a = tc.weight "a" shard "64@tp, {hidden}" : tensor<{part}x{hidden}xbf16>
    %b = tc.weight "b" shard "{hidden}, 64@tp" : tensor<{hidden}x{part}xbf16>
    %w = tc.weight "w" : tensor<{hidden}xbf16>
    %h = tc.contract "b s i, o i -> b s o" (%x, %a) : {h}
    %p = tc.contract "b s i, o i -> b s o" (%h, %b) : {x}
    %s = tc.all_reduce %p kind add axis tp why "test" : {x}
    %r = tc.map "add(a, b)" over "b s h, b s h -> b s h" (%x, %s) : {x}
    %m = tc.reduce add "mul(a, a)" over "b s h -> b s" (%r) : {stat}
    %top = tc.reduce max "abs(a)" over "b s h -> b s" (%r) : {stat}
    %n = tc.map "mul(mul(a, rsqrt(add(mul(b, 0.001953125), 1e-05))), c)" over "b s h, b s, h -> b s h" (%r, %m, %w)
      : {x}
    %g = tc.contract "b s i, o i -> b s o" (%n, %a) : {h}
    %q = tc.contract "b s i, o i -> b s o" (%g, %b) : {x}
    %y = tc.all_reduce %q kind add axis tp why "test" : {x}
    func.return %y, %top : {x}, {stat}
  }}
}}
"""
    run = GroupRun(text)
    elements = [math.prod(n for n, _ in e.fetch.loops) for e in passes(run, Alu.FP_DIV, Alu.FP_MUL0)]
    assert elements
    assert max(elements) <= max(4, batch * seq) * hidden // 64 * 2
    rng = np.random.default_rng(0)
    x_, a, b, w = (
        bf16(rng.standard_normal(shape).astype(np.float32) / scale)
        for shape, scale in (((batch, seq, hidden), 1), ((64, hidden), 22), ((hidden, 64), 8), ((hidden,), 1))
    )
    got = run({"x": x_}, {"a": a, "b": b, "w": w}.__getitem__)
    r = bf16(x_ + bf16(bf16(x_ @ a.T) @ b.T))
    n = bf16(r / np.sqrt((r**2).mean(-1, keepdims=True) + 1e-5) * w)
    assert relative(got["y"], bf16(n @ a.T) @ b.T) < 0.02
    assert relative(got["top"], np.abs(r).max(-1)) < 0.01


def passes(run: GroupRun, *alus: Alu) -> list[Exec]:
    """Passes with one of these ALUs."""
    found = [i.what for r in run.stream.routines for i in r.instructions if isinstance(i.what, Exec)]
    return [e for e in found if any(op.alu in alus for op in e.vector)]


@pytest.mark.parametrize("units", [2, 4])
def test_all_reduce_in_hbm(units: int) -> None:
    check_mlp(GroupRun(mlp(units, 1, 130, 96, 64), spill_bytes=256), 1, 130, 96, 64)


@pytest.mark.parametrize("machine", [MACHINE, SMALL_CARDS])
@pytest.mark.parametrize("batch", [1, 4])
def test_all_reduce_of_few_wide_rows_in_hbm(batch: int, machine: Machine) -> None:
    """Fewer rows than units: they share the features."""
    run = GroupRun(mlp(8, batch, 1, 1024, 64), machine, spill_bytes=256)
    check_mlp(run, batch, 1, 1024, 64)


@pytest.mark.parametrize("units", [4, 8])
@pytest.mark.parametrize(("batch", "seq"), [(1, 1), (2, 1), (1, 24)])
def test_all_reduce_over_cards(units: int, batch: int, seq: int) -> None:
    run = GroupRun(mlp(units, batch, seq, 64, 96), SMALL_CARDS)
    check_mlp(run, batch, seq, 64, 96)


@pytest.mark.parametrize(("units", "latency"), [(4, None), (8, None), (8, 0)])
def test_all_reduce_over_cards_in_hbm(units: int, latency: int | None) -> None:
    """Without latency and start-up the cards add a part each."""
    changes = {} if latency is None else {"pcie_latency_cycles": latency, "dma_startup_cycles": 0}
    machine = SMALL_CARDS.model_copy(update=changes)
    check_mlp(GroupRun(mlp(units, 1, 130, 96, 64), machine, spill_bytes=256), 1, 130, 96, 64)


@pytest.mark.parametrize("machine", [MACHINE, SMALL_CARDS])
@pytest.mark.parametrize(("batch", "units"), [(1, 2), (3, 4), (20, 4)])
def test_gathered_logits(batch: int, units: int, machine: Machine) -> None:
    vocab, hidden = 101, 64
    part = -(-vocab // units)
    text = f"""
builtin.module attributes {{tc.mesh = "kv={units}"}} {{
  func.func @main(%x: tensor<{batch}x1x{hidden}xbf16, #tc.axes<"B,S,_">>)
      -> tensor<{batch}x1x{vocab}xf32, #tc.axes<"B,_,_">> attributes {{arg_names = ["x"], result_names = ["logits"]}} {{
    %w = tc.weight "w" shard "{vocab}@tp, {hidden}" : tensor<{part}x{hidden}xbf16>
    %p = tc.contract "b s i, o i -> b s o" (%x, %w) : tensor<{batch}x1x{part}xf32, #tc.axes<"B,_,_">>
    %g = tc.all_gather %p dim 2 axis tp why "test" : tensor<{batch}x1x{part * units}xf32, #tc.axes<"B,_,_">>
    %y = tc.slice %g axis 2 start 0 size {vocab} : tensor<{batch}x1x{vocab}xf32, #tc.axes<"B,_,_">>
    func.return %y : tensor<{batch}x1x{vocab}xf32, #tc.axes<"B,_,_">>
  }}
}}
"""
    rng = np.random.default_rng(1)
    x, w = (bf16(rng.standard_normal(s).astype(np.float32)) for s in ((batch, 1, hidden), (vocab, hidden)))
    got = GroupRun(text, machine)({"x": x}, {"w": w}.__getitem__)["logits"]
    assert relative(got, x @ w.T) < 0.01


@pytest.mark.parametrize(("batch", "seq", "units"), [(1, 64, 2), (1, 128, 4), (2, 64, 4), (1, 16, 2), (1, 1024, 8)])
@pytest.mark.parametrize("spill", [96 * 1024, 512])
def test_sequence_parallel(batch: int, seq: int, units: int, spill: int) -> None:
    check_sequence_parallel(batch, seq, units, spill, 64, 96)


def test_sequence_parallel_sums_in_hbm() -> None:
    """What is multiplied fits data memory, the own tokens of the sums do not."""
    check_sequence_parallel(1, 1024, 2, 4096, 512, 128)


def own_tokens_of_sums(
    batch: int, seq: int, units: int, hidden: int, inner: int, tail: str, spill: int = SPILL_BYTES
) -> tuple[Array, Array, Array]:
    """The result %y that the lines `tail` make of the own tokens %r of a two-layer network's sums (and of its input
    %x), the input, and the sums. `tail` may name the types {whole} and {local}, and the sizes."""
    part, tokens = inner // units, seq // units
    whole = f'tensor<{batch}x{seq}x{hidden}xbf16, #tc.axes<"B,S,_">>'
    local = f'tensor<{batch}x{tokens}x{hidden}xbf16, #tc.axes<"B,S,_">>'
    h = f'tensor<{batch}x{seq}x{part}xbf16, #tc.axes<"B,S,_">>'
    text = f"""
builtin.module attributes {{tc.mesh = "kv={units}"}} {{
  func.func @main(%x: {whole}) -> {whole} attributes {{arg_names = ["x"], result_names = ["y"]}} {{
    %a = tc.weight "a" shard "{inner}@tp, {hidden}" : tensor<{part}x{hidden}xbf16>
    %b = tc.weight "b" shard "{hidden}, {inner}@tp" : tensor<{hidden}x{part}xbf16>
    %h = tc.contract "b s i, o i -> b s o" (%x, %a) : {h}
    %p = tc.contract "b s i, o i -> b s o" (%h, %b) : {whole}
    %r = tc.reduce_scatter %p kind add dim 1 axis tp why "test" : {local}
    {tail.format(whole=whole, local=local, batch=batch, seq=seq, tokens=tokens)}
    func.return %y : {whole}
  }}
}}
"""
    rng = np.random.default_rng(2)
    x = bf16(rng.standard_normal((batch, seq, hidden)).astype(np.float32))
    a = bf16(rng.standard_normal((inner, hidden)).astype(np.float32) / 8)
    b = bf16(rng.standard_normal((hidden, inner)).astype(np.float32) / 8)
    got = GroupRun(text, spill_bytes=spill)({"x": x}, {"a": a, "b": b}.__getitem__)["y"]
    return got, x, bf16(x @ a.T) @ b.T


def check_sequence_parallel(batch: int, seq: int, units: int, spill: int, hidden: int, inner: int) -> None:
    tail = """%n = tc.map "mul(a, 2.0)" over "b s h -> b s h" (%r) : {local}
    %y = tc.all_gather %n dim 1 axis tp why "test" : {whole}"""
    got, _, sums = own_tokens_of_sums(batch, seq, units, hidden, inner, tail, spill)
    assert relative(got, 2 * sums) < 0.01


@pytest.mark.parametrize(("batch", "seq", "units"), [(1, 64, 2), (2, 64, 4), (1, 1024, 8)])
def test_gathered_numbers_of_tokens(batch: int, seq: int, units: int) -> None:
    """One number a token, as a quantized model has for the scale of its activations."""
    tail = """%m = tc.reduce max "abs(a)" over "b s h -> b s" (%r) : tensor<{batch}x{tokens}xf32, #tc.axes<"B,S">>
    %g = tc.all_gather %m dim 1 axis tp why "test" : tensor<{batch}x{seq}xf32, #tc.axes<"B,S">>
    %y = tc.map "mul(a, b)" over "b s h, b s -> b s h" (%x, %g) : {whole}"""
    got, x, sums = own_tokens_of_sums(batch, seq, units, 64, 96, tail)
    assert relative(got, x * np.abs(sums).max(axis=-1, keepdims=True)) < 0.01


def test_axis_index() -> None:
    """A number that differs between units, as the vocabulary-parallel embedding uses it."""
    text = """
builtin.module attributes {tc.mesh = "kv=2"} {
  func.func @main(%ids: tensor<1x12xi32, #tc.axes<"B,S">>) -> tensor<1x12x32xbf16, #tc.axes<"B,S,_">>
      attributes {arg_names = ["ids"], result_names = ["y"]} {
    %w = tc.weight "w" shard "17@tp, 32" : tensor<9x32xbf16>
    %first = tc.axis_index axis tp scale 9 : tensor<i32>
    %t = tc.map "sub(a, b)" over "b s, -> b s" (%ids, %first) : tensor<1x12xi32, #tc.axes<"B,S">>
    %i = tc.map "min(max(a, 0), 8)" over "b s -> b s" (%t) : tensor<1x12xi32, #tc.axes<"B,S">>
    %x = tc.gather "v h, b s -> b s h" (%w, %i) : tensor<1x12x32xbf16, #tc.axes<"B,S,_">>
    %m = tc.map "mul(min(max(add(a, 1.0), 0.0), 1.0), min(max(sub(9.0, a), 0.0), 1.0))" over "b s -> b s" (%t)
        : tensor<1x12xf32, #tc.axes<"B,S">>
    %p = tc.map "mul(a, b)" over "b s h, b s -> b s h" (%x, %m) : tensor<1x12x32xbf16, #tc.axes<"B,S,_">>
    %y = tc.all_reduce %p kind add axis tp why "test" : tensor<1x12x32xbf16, #tc.axes<"B,S,_">>
    func.return %y : tensor<1x12x32xbf16, #tc.axes<"B,S,_">>
  }
}
"""
    rng = np.random.default_rng(3)
    w = bf16(rng.standard_normal((17, 32)).astype(np.float32))
    ids = rng.integers(0, 17, (1, 12), np.int32)
    got = GroupRun(text)({"ids": ids}, {"w": w}.__getitem__)["y"]
    np.testing.assert_array_equal(got, w[ids])
