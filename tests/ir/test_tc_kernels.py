"""Reference kernels against slower, independent formulations."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ir import expr as ex
from ir import kernels
from ir.axes import Rule
from tests.ir.strategies import contractions

F32 = np.dtype(np.float32)
BF16 = np.dtype(ml_dtypes.bfloat16)
rng = np.random.default_rng(1)


def random(*shape: int, dtype: np.dtype = F32) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32).astype(dtype)


def einsum(rule: Rule, *arrays: np.ndarray) -> np.ndarray:
    text = ",".join("".join(side) for side in rule.inputs) + "->" + "".join(rule.output)
    return np.einsum(text, *(a.astype(np.float64) for a in arrays))


@given(contractions())
@settings(max_examples=150, deadline=None)
def test_contract_is_einsum(case: tuple[Rule, dict[str, int]]) -> None:
    rule, sizes = case
    arrays = [random(*(sizes[a] for a in side)) for side in rule.inputs]
    got = kernels.contract(rule, arrays[0], arrays[1], F32)
    want = einsum(rule, *arrays)
    assert got.shape == want.shape
    assert np.allclose(got, want, rtol=1e-5, atol=1e-4)


def test_contract_rounds_once() -> None:
    rule = Rule.parse("b i, o i -> b o")
    x, w = random(3, 512, dtype=BF16), random(4, 512, dtype=BF16)
    exact = einsum(rule, x, w)
    got = kernels.contract(rule, x, w, BF16)
    assert got.dtype == BF16
    assert np.array_equal(got, exact.astype(np.float32).astype(BF16))


@pytest.mark.parametrize(
    ("text", "shapes", "out"),
    [
        ("b s h, h -> b s h", [(2, 3, 4), (4,)], (2, 3, 4)),
        ("s h, b s -> b h s", [(3, 4), (2, 3)], (2, 4, 3)),
        ("h -> b s h", [(4,)], (2, 3, 4)),
        (", b -> b", [(), (3,)], (3,)),
    ],
)
def test_map_broadcasts_and_permutes(text: str, shapes: list[tuple[int, ...]], out: tuple[int, ...]) -> None:
    rule = Rule.parse(text)
    arrays = [random(*s) for s in shapes]
    expr = ex.parse("mul(a, b)" if len(arrays) == 2 else "neg(a)")
    got = kernels.map_(rule, expr, arrays, out, BF16)
    sizes = dict(zip(rule.output, out, strict=True))
    operands = [*arrays, np.ones((), np.float32)][:2]
    axes = [*rule.inputs, ()][:2]
    missing = [a for a in rule.output if a not in {n for side in axes for n in side}]
    ones = np.ones([sizes[a] for a in missing])
    text3 = f"{''.join(axes[0])},{''.join(axes[1])},{''.join(missing)}->{''.join(rule.output)}"
    want = np.einsum(text3, *(o.astype(np.float64) for o in operands), ones) * (1 if len(arrays) == 2 else -1)
    assert got.shape == out
    assert got.dtype == BF16
    assert np.allclose(got.astype(np.float64), want, rtol=1e-2)


def test_map_of_integers_is_exact_and_casts_truncate() -> None:
    big = np.array([2**24 + 1, 7], np.int32)
    rule = Rule.parse("b -> b")
    assert kernels.map_(rule, ex.parse("add(a, 1.0)"), [big], (2,), np.dtype(np.int32)).tolist() == [2**24 + 2, 8]
    cast = kernels.map_(rule, ex.parse("a"), [np.array([-1.7, 2.9], np.float32)], (2,), np.dtype(np.int32))
    assert cast.tolist() == [-1, 2]
    truth = kernels.map_(rule, ex.parse("a"), [np.array([0.0, -0.5], np.float32)], (2,), np.dtype(np.bool_))
    assert truth.tolist() == [False, True]


@pytest.mark.parametrize("kind", ["add", "max", "min"])
def test_reduce(kind: str) -> None:
    x, m = random(2, 3, 4), random(2, 3)
    got = kernels.reduce(Rule.parse("b s h, b s -> h b"), kind, ex.parse("sub(a, b)"), [x, m], F32)
    function = {"add": np.sum, "max": np.max, "min": np.min}[kind]
    want = function(x - m[:, :, None], axis=1).T
    assert np.allclose(got, want, atol=1e-6)


@pytest.mark.parametrize(
    ("text", "table", "indices"),
    [
        ("v h, b s -> b s h", (7, 4), (2, 3)),
        ("v h, b s -> h s b", (7, 4), (2, 3)),
        ("b s h, b -> b h", (2, 5, 4), (2,)),
        ("b t h, b s -> s b h", (2, 5, 4), (2, 3)),
        ("v, b -> b", (7,), (3,)),
        ("b v, s b -> s b", (2, 7), (3, 2)),
    ],
)
def test_gather(text: str, table: tuple[int, ...], indices: tuple[int, ...]) -> None:
    rule = Rule.parse(text)
    axis = next(a for a in rule.inputs[0] if a not in rule.output)
    rows = table[rule.inputs[0].index(axis)]
    t, i = random(*table), rng.integers(0, rows, indices).astype(np.int32)
    one_hot = np.eye(rows)[i]
    text3 = f"{''.join(rule.inputs[0])},{''.join(rule.inputs[1])}{axis}->{''.join(rule.output)}"
    assert np.allclose(kernels.gather(rule, t, i), np.einsum(text3, t.astype(np.float64), one_hot))


def test_indices_outside_are_refused() -> None:
    rule = Rule.parse("v h, b -> b h")
    for bad in (-1, 4):
        with pytest.raises(kernels.KernelError, match="outside 0 to 3"):
            kernels.gather(rule, random(4, 2), np.array([bad], np.int32))
    with pytest.raises(kernels.KernelError, match="slot"):
        kernels.kv_update(random(1, 1, 4, 2), random(1, 1, 1, 2), np.array([[4]], np.int32))


def test_kv_update() -> None:
    cache, new = random(2, 3, 5, 4), random(2, 3, 2, 4)
    slots = np.array([[3, 1], [0, 4]], np.int32)
    got = kernels.kv_update(cache, new, slots)
    want = cache.copy()
    for b in range(2):
        for s in range(2):
            want[b, :, slots[b, s], :] = new[b, :, s, :]
    assert np.array_equal(got, want)
    assert not np.array_equal(got, cache)


def attention_loops(q, k, v, positions, lengths, bias, sinks, *, scale, causal, window, softcap):
    batch, heads, queries, _ = q.shape
    group = heads // k.shape[1]
    out = np.zeros((batch, queries, heads, v.shape[3]))
    for b in range(batch):
        for h in range(heads):
            for s in range(queries):
                scores, rows = [], []
                for t in range(k.shape[2]):
                    distance = int(positions[b, s]) - t
                    if causal and distance < 0:
                        continue
                    if window and (distance if causal else abs(distance)) >= window:
                        continue
                    if lengths is not None and t >= lengths[b]:
                        continue
                    x = float(np.dot(q[b, h, s].astype(np.float64), k[b, h // group, t].astype(np.float64))) * scale
                    if softcap:
                        x = np.tanh(x / softcap) * softcap
                    if bias is not None:
                        x += float(np.broadcast_to(bias, (batch, heads, queries, k.shape[2]))[b, h, s, t])
                    scores.append(x)
                    rows.append(v[b, h // group, t].astype(np.float64))
                if not scores:
                    continue
                top = max(scores + ([float(sinks[h])] if sinks is not None else []))
                weights = np.exp(np.array(scores) - top)
                total = weights.sum() + (np.exp(float(sinks[h]) - top) if sinks is not None else 0)
                out[b, s, h] = (weights[:, None] * np.array(rows)).sum(0) / total
    return out


@given(
    heads=st.sampled_from([(2, 2), (4, 2), (6, 3), (3, 1)]),
    causal=st.booleans(),
    window=st.sampled_from([0, 1, 3]),
    softcap=st.sampled_from([0.0, 5.0]),
    with_lengths=st.booleans(),
    bias_shape=st.sampled_from([None, (1, 1, 1, 7), (2, 1, 3, 7), (1, "h", 1, 7)]),
    with_sinks=st.booleans(),
    block=st.sampled_from([1, 20, 1 << 24]),
)
@settings(max_examples=60, deadline=None)
def test_attention(heads, causal, window, softcap, with_lengths, bias_shape, with_sinks, block) -> None:
    h, kv = heads
    q, k, v = random(2, h, 3, 4), random(2, kv, 7, 4), random(2, kv, 7, 5)
    positions = np.array([[2, 3, 4], [0, 5, 6]], np.int32)
    lengths = np.array([0, 5], np.int32) if with_lengths else None
    bias = None if bias_shape is None else random(*(h if n == "h" else n for n in bias_shape))
    sinks = random(h) if with_sinks else None
    options: dict[str, Any] = {"scale": 0.5, "causal": causal, "window": window, "softcap": softcap}
    want = attention_loops(q, k, v, positions, lengths, bias, sinks, **options)
    before, kernels.SCORE_BLOCK = kernels.SCORE_BLOCK, block
    try:
        got = kernels.attention(q, k, v, positions, lengths, bias, sinks, **options, dtype=F32)
    finally:
        kernels.SCORE_BLOCK = before
    assert got.shape == want.shape
    assert np.allclose(got, want, atol=2e-5)
