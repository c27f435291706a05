"""Attention and cache writes through the streams: grouped heads, windows, softcap, ragged batches, odd sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from ir.interpreter import run as interpret
from ir.text import parse_module
from tests.lowering.running import Run, relative, tensor_text


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
