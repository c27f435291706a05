"""Element-wise operations over tokens in HBM, chunk by chunk: numbers, what is moved, and the time beside transfers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from backend_rngd.isa.descriptors import Dma, Space
from tests.lowering.running import Array, Run, bf16, relative, tensor_text

ROUNDED = 6e-3
HIDDEN = 192
NORM = "mul(mul(a, rsqrt(add(mul(b, 0.005208333333333333), 1e-05))), c)"


def moved(run: Run, source: Space, target: Space) -> int:
    """Bytes of all transfers from one memory to another."""
    found = (i.what for r in run.stream.routines for i in r.instructions if isinstance(i.what, Dma))
    return sum(
        d.packet * math.prod(n for n, *_ in d.loops)
        for d in found
        if (d.source.space, d.destination.space) == (source, target)
    )


def residual_norm(b: int, s: int) -> str:
    """A sum that is returned, and its norm."""
    x, stat = tensor_text((b, s, HIDDEN), "bf16"), tensor_text((b, s), "f32")
    return f"""func.func @main(%x: {x}, %u: {x}, %w: {tensor_text((HIDDEN,), "bf16")}) -> ({x}, {x})
  attributes {{arg_names = ["x", "u", "w"], result_names = ["h", "y"]}} {{
  %h = tc.map "add(a, b)" over "b s h, b s h -> b s h" (%x, %u) : {x}
  %m = tc.reduce add "mul(a, a)" over "b s h -> b s" (%h) : {stat}
  %y = tc.map "{NORM}" over "b s h, b s, h -> b s h" (%h, %m, %w) : {x}
  func.return %h, %y : {x}, {x}
}}"""


@pytest.mark.parametrize(("b", "s"), [(1, 64), (1, 200), (3, 300), (40, 1), (200, 1)])
@pytest.mark.parametrize("spill", [96 * 1024, 256])
def test_residual_and_norm(b: int, s: int, spill: int) -> None:
    """Each input is read once, each result written once, whatever lies between."""
    run = Run(residual_norm(b, s), spill_bytes=spill)
    rng = np.random.default_rng(s)
    values = {n: bf16(rng.standard_normal((b, s, HIDDEN))) for n in ("x", "u")}
    values["w"] = bf16(rng.standard_normal(HIDDEN))
    got = run(values)
    h = bf16(values["x"] + values["u"])
    assert relative(got["h"], h) < ROUNDED
    assert relative(got["y"], h / np.sqrt((h**2).mean(-1, keepdims=True) + 1e-5) * values["w"]) < ROUNDED
    image = run.emitted.globals["y"].nbytes
    assert moved(run, Space.DM, Space.HBM) == 2 * image
    assert moved(run, Space.HBM, Space.DM) == 2 * image + 2 * HIDDEN
    assert moved(run, Space.HBM, Space.HBM) == 0


@pytest.mark.parametrize("spill", [96 * 1024, 256])
def test_views_of_one_buffer(spill: int) -> None:
    """Rotary embeddings read two halves and the whole: the rows of the buffer arrive once."""
    b, s, heads, d = 1, 300, 2, 64
    x, half, angle = (
        tensor_text(t, e) for t, e in (((b, s, heads, d), "bf16"), ((b, s, heads, d // 2), "bf16"), ((b, s, d), "f32"))
    )
    text = f"""func.func @main(%x: {x}, %c: {angle}, %z: {angle}) -> {x}
  attributes {{arg_names = ["x", "c", "z"], result_names = ["y"]}} {{
  %a = tc.slice %x axis 3 start 0 size {d // 2} : {half}
  %b = tc.slice %x axis 3 start {d // 2} size {d // 2} : {half}
  %n = tc.map "neg(a)" over "b s h d -> b s h d" (%b) : {half}
  %t = tc.concat (%n, %a) axis 3 : {x}
  %y = tc.map "add(mul(a, b), mul(c, d))"
    over "b s h d, b s d, b s h d, b s d -> b s h d" (%x, %c, %t, %z) : {x}
  func.return %y : {x}
}}"""
    run = Run(text, spill_bytes=spill)
    rng = np.random.default_rng(0)
    values: dict[str, Array] = {"x": bf16(rng.standard_normal((b, s, heads, d)))}
    values |= {n: rng.standard_normal((b, s, d)).astype(np.float32) for n in ("c", "z")}
    v = values["x"]
    turned = np.concatenate([-v[..., d // 2 :], v[..., : d // 2]], -1)
    want = v * values["c"][:, :, None] + turned * values["z"][:, :, None]
    assert relative(run(values)["y"], want) < ROUNDED
    rows = 64 * 5
    assert moved(run, Space.HBM, Space.DM) == rows * (heads * d * 2 + 2 * d * 4)
    assert moved(run, Space.DM, Space.HBM) == rows * heads * d * 2
