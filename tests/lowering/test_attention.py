"""Attention and cache writes through the streams: grouped heads, windows, softcap, ragged batches, odd sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backend_rngd.dialect import DmaOp, InstructionOp
from backend_rngd.isa.descriptors import Call
from backend_rngd.lowering import LoweringOptions, attention_few, attention_head, attention_many, lower
from ir.errors import UnsupportedError
from ir.interpreter import run as interpret
from ir.text import parse_module
from tests.lowering.running import MACHINE, Run, relative, tensor_text


def random(rng: np.random.Generator, *shape: int) -> Any:
    """Normal numbers in bf16."""
    return rng.standard_normal(shape).astype(ml_dtypes.bfloat16)


def signature(arguments: dict[str, str], results: list[tuple[str, str]]) -> str:
    """Head of `@main`: MLIR types by argument name, and (name, type) of the results."""
    args = ", ".join(f"%{n.replace('.', '_')}: {t}" for n, t in arguments.items())
    given = ", ".join(f'"{n}"' for n in arguments)
    names = ", ".join(f'"{n}"' for n, _ in results)
    types = ", ".join(t for _, t in results)
    return f"func.func @main({args}) -> ({types}) attributes {{arg_names = [{given}], result_names = [{names}]}}"


def decoder(b: int, s: int, t: int, heads: int, kv: int, d: int, window: int, softcap: float) -> str:
    q, new = tensor_text((b, s, heads, d), "bf16"), tensor_text((b, s, kv, d), "bf16")
    cache, positions = tensor_text((b, kv, t, d), "bf16"), tensor_text((b, s), "i32")
    arguments = {"position_ids": positions, "x": q, "x2": new, "x3": new, "cache.k.0": cache, "cache.v.0": cache}
    return f"""{signature(arguments, [("y", q), ("cache.k.0", cache), ("cache.v.0", cache)])} {{
  %q = tc.transpose %x [0, 2, 1, 3] : {tensor_text((b, heads, s, d), "bf16")}
  %k = tc.transpose %x2 [0, 2, 1, 3] : {tensor_text((b, kv, s, d), "bf16")}
  %v = tc.transpose %x3 [0, 2, 1, 3] : {tensor_text((b, kv, s, d), "bf16")}
  %k1 = tc.kv_update (%cache_k_0, %k, %position_ids) : {cache}
  %v1 = tc.kv_update (%cache_v_0, %v, %position_ids) : {cache}
  %r = tc.attention (%q, %k1, %v1, %position_ids) scale 0.125 causal true window {window} softcap {softcap} : {q}
  func.return %r, %k1, %v1 : {q}, {cache}, {cache}
}}"""


def check_decoder(
    b: int, s: int, t: int, heads: int, kv: int, d: int, starts: Sequence[int], window: int = 0, softcap: float = 0.0
) -> Run:
    """Run attention on random numbers and compare with the interpreter; the caches must hold the new tokens exactly."""
    starts = [min(start, t - s) for start in starts]
    text = decoder(b, s, t, heads, kv, d, window, softcap)
    run = Run(text, cache_capacity=t + 16, cache_batch=b)
    rng = np.random.default_rng(0)
    values = {
        "position_ids": (np.array(starts)[:, None] + np.arange(s)).astype(np.int32),
        "x": random(rng, b, s, heads, d),
        "x2": random(rng, b, s, kv, d),
        "x3": random(rng, b, s, kv, d),
        "cache.k.0": random(rng, b, kv, t, d),
        "cache.v.0": random(rng, b, kv, t, d),
    }
    got = run(values)
    want = interpret(parse_module(text), values, lambda name: values[name])
    assert relative(got["y"], np.asarray(want["y"]).astype(np.float32)) < 6e-3
    for port in run.lowered.caches:
        np.testing.assert_array_equal(run.read(port), np.asarray(want[port.name]).astype(np.float32))
    return run


@pytest.mark.parametrize(
    ("b", "s", "t", "heads", "kv", "d", "starts", "window", "softcap"),
    [
        (1, 1, 64, 9, 3, 64, [40], 0, 0.0),  # decode
        (4, 1, 256, 8, 2, 64, [3, 7, 100, 255], 0, 0.0),  # decode, ragged
        (1, 1, 1024, 32, 8, 128, [900], 0, 0.0),  # several K and V tiles
        (2, 3, 64, 4, 4, 32, [10, 20], 0, 0.0),  # a few new tokens each
        (1, 1, 1024, 4, 1, 128, [900], 0, 0.0),  # one pair: keys split into many parts, most of them visible
        (1, 1, 2048, 5, 1, 64, [3], 0, 0.0),  # only the first part has visible keys
        (3, 1, 512, 4, 2, 64, [0, 200, 511], 100, 20.0),  # parts with window and softcap, ragged
        (2, 4, 256, 6, 2, 32, [17, 250], 0, 0.0),  # several tokens over split keys
        (1, 1, 8192, 4, 1, 32, [5000], 0, 0.0),  # all slices work for one pair
        (1, 1, 512, 6, 3, 20, [300], 0, 0.0),  # three KV heads, heads padded to a flit
        (1, 128, 128, 9, 3, 64, [0], 0, 0.0),  # prefill
        (1, 100, 128, 9, 3, 64, [0], 0, 0.0),  # tokens that do not fill the slices
        (1, 64, 256, 8, 2, 128, [64], 50, 30.0),  # a chunk behind others, window and softcap
        (3, 40, 64, 4, 2, 64, [0, 5, 20], 0, 0.0),  # three batch rows on four groups of slices
        (16, 1, 128, 4, 2, 64, list(range(16)), 0, 0.0),  # more batch rows than lanes
        (70, 1, 32, 4, 2, 16, list(range(0, 70, 3))[:24] + [1] * 46, 0, 0.0),  # more batch rows than slices
        (1, 1, 64, 4, 2, 12, [40], 0, 0.0),  # heads padded to a flit
        (3, 16, 40, 4, 2, 20, [0, 3, 7], 4, 0.0),
        (1, 30, 30, 4, 2, 20, [0], 0, 0.0),  # keys padded to a flit
    ],
)
def test_decoder_attention(
    b: int, s: int, t: int, heads: int, kv: int, d: int, starts: Sequence[int], window: int, softcap: float
) -> None:
    check_decoder(b, s, t, heads, kv, d, starts, window, softcap)


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, Any]:
    """Attention of few or many tokens over up to 400 keys."""
    kv = draw(st.sampled_from([1, 2, 3]))
    b = draw(st.sampled_from([1, 2, 3, 5, 12]))
    s = draw(st.sampled_from([1, 1, 3, 9, 30, 70])) if b < 5 else 1
    t = draw(st.sampled_from([96, 128, 256, 300, 384])) + s
    t = t // 16 * 16 if draw(st.booleans()) else t
    return {
        "b": b, "s": s, "t": t, "heads": kv * draw(st.sampled_from([1, 3, 4])), "kv": kv,
        "d": draw(st.sampled_from([16, 20, 32, 64])),
        "starts": draw(st.lists(st.integers(0, t - s), min_size=b, max_size=b)),
        "window": draw(st.sampled_from([0, 0, 7, 100])), "softcap": draw(st.sampled_from([0.0, 0.0, 15.0])),
    }  # fmt: skip


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shapes(), st.booleans(), st.integers(1, 4))
def test_tiles_of_keys(monkeypatch: pytest.MonkeyPatch, shape: dict[str, Any], calls: bool, size: int) -> None:
    """Keys that do not fit at once: tiles of 64 keys or less, inline and by calls of a routine."""
    with monkeypatch.context() as patch:
        patch.setattr(attention_head, "MASK_ELEMENTS", 64)
        patch.setattr(attention_few, "TILE_BYTES", size * 2500)
        patch.setattr(attention_many, "TILE_BYTES", size * 10_000)
        patch.setattr(attention_many, "INLINE_INSTRUCTIONS", 0 if calls else 1 << 30)
        patch.setattr(attention_many, "CALL_INSTRUCTIONS", size * 30)
        check_decoder(**shape)


def test_long_contexts_are_calls_of_one_routine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The program does not grow with the keys; what the last call leaves is done inline."""
    short, long = (instructions(4, 1, 128, 512, keys) for keys in (16_384, 131_072))
    assert long < 1.2 * short < 3000
    monkeypatch.setattr(attention_head, "MASK_ELEMENTS", 64)
    monkeypatch.setattr(attention_many, "TILE_BYTES", 4096)
    monkeypatch.setattr(attention_many, "INLINE_INSTRUCTIONS", 0)
    monkeypatch.setattr(attention_many, "CALL_INSTRUCTIONS", 200)
    run = check_decoder(1, 130, 17 * 64, 4, 2, 32, [900], window=500)
    assert {r.name for r in run.stream.routines} == {"main", "tiles_0"}
    calls = [i.what for i in run.stream.routines[0].instructions if isinstance(i.what, Call)]
    assert len({call.moves for call in calls}) > 2


def instructions(heads: int, kv: int, d: int, tokens: int, keys: int) -> int:
    """Instructions of the program of one attention."""
    lowered = lower(
        parse_module(decoder(1, tokens, keys, heads, kv, d, 0, 0.0)), MACHINE, LoweringOptions(cache_capacity=keys)
    )
    return sum(isinstance(op, InstructionOp) for op in lowered.module.walk())


@pytest.mark.parametrize(("b", "keys"), [(1, 131_072), (8, 32_768), (64, 4_096), (256, 2_048)])
def test_decode_programs_are_small(b: int, keys: int) -> None:
    """Every row of a decode batch has slices of its own, whatever the batch; few transfers bring its keys."""
    text = decoder(b, 1, keys, 4, 1, 128, 0, 0.0)
    lowered = lower(parse_module(text), MACHINE, LoweringOptions(cache_capacity=keys, cache_batch=b))
    ops = [op for op in lowered.module.walk() if isinstance(op, DmaOp)]
    nbytes = 2 * b * keys * 256
    assert len(ops) < 12 + nbytes / (2 << 20)


def test_too_many_rows_for_a_slice_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="scores of 16 keys"):
        instructions(8 * 700, 1, 64, 8, 1024)


@pytest.mark.parametrize(("b", "s"), [(1, 5), (2, 24), (3, 40), (1, 130)])
def test_encoder_attention(b: int, s: int) -> None:
    q = tensor_text((b, s, 4, 32), "bf16")
    head = tensor_text((b, 4, s, 32), "bf16")
    lengths, positions = tensor_text((b,), "i32"), tensor_text((b, s), "i32")
    text = f"""{signature({"lengths": lengths, "position_ids": positions, "x": q, "x2": q, "x3": q}, [("y", q)])} {{
  %q = tc.transpose %x [0, 2, 1, 3] : {head}
  %k = tc.transpose %x2 [0, 2, 1, 3] : {head}
  %v = tc.transpose %x3 [0, 2, 1, 3] : {head}
  %r = tc.attention (%q, %k, %v, %position_ids) lengths(%lengths) scale 0.125 causal false window 0 softcap 0.0 : {q}
  func.return %r : {q}
}}"""
    rng = np.random.default_rng(0)
    values = {n: random(rng, b, s, 4, 32) for n in ("x", "x2", "x3")}
    values["lengths"] = rng.integers(1, s + 1, (b,)).astype(np.int32)
    values["position_ids"] = np.tile(np.arange(s, dtype=np.int32), (b, 1))
    got = Run(text)(values)["y"]
    want = np.asarray(interpret(parse_module(text), values, lambda name: values[name])["y"]).astype(np.float32)
    assert relative(got, want) < 6e-3
