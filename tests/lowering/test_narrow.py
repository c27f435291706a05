"""Last axes of 1 to 12 elements, which fill no whole packets: maps, reductions, broadcasts, behind a product."""

from __future__ import annotations

import numpy as np
import pytest

from ir import expr as ex
from ir.errors import UnsupportedError
from tests.lowering.running import Run, bf16, relative, tensor_text

ROUNDED = 6e-3
TOKENS = [(1, 1), (9, 1), (2, 40)]


@pytest.mark.parametrize(("b", "s"), TOKENS)
@pytest.mark.parametrize("element", ["bf16", "f32"])
@pytest.mark.parametrize("n", range(1, 13))
def test_narrow(n: int, element: str, b: int, s: int) -> None:
    """One program: a product and what follows it, a map of two operands, a maximum, a sum of it, and a broadcast."""
    x, t, stat = tensor_text((b, s, 4), "bf16"), tensor_text((b, s, n), element), tensor_text((b, s), element)
    after, joint, summed = "mul(tanh(div(a, 3.0)), 3.0)", "mul(silu(a), b)", "mul(a, sigmoid(a))"
    text = f"""func.func @main(%x: {x}, %w: {tensor_text((n, 4), "bf16")}, %z: {t}) -> ({t}, {t}, {stat}, {stat}, {t})
  attributes {{arg_names = ["x", "w", "z"], result_names = ["p", "j", "m", "a", "d"]}} {{
  %c = tc.contract "b s i, o i -> b s o" (%x, %w) : {t}
  %p = tc.map "{after}" over "b s o -> b s o" (%c) : {t}
  %j = tc.map "{joint}" over "b s o, b s o -> b s o" (%p, %z) : {t}
  %m = tc.reduce max "abs(a)" over "b s o -> b s" (%z) : {stat}
  %a = tc.reduce add "{summed}" over "b s o -> b s" (%z) : {stat}
  %d = tc.map "div(a, add(b, 3.0))" over "b s o, b s -> b s o" (%z, %m) : {t}
  func.return %p, %j, %m, %a, %d : {t}, {t}, {stat}, {stat}, {t}
}}"""
    rng = np.random.default_rng(n)
    values = {k: bf16(rng.standard_normal(shape)) for k, shape in (("x", (b, s, 4)), ("w", (n, 4)), ("z", (b, s, n)))}
    z = values["z"]
    p = ex.evaluate(ex.parse(after), [values["x"] @ values["w"].T])
    m = np.abs(z).max(-1)
    want = {
        "p": p,
        "j": ex.evaluate(ex.parse(joint), [p, z]),
        "m": m,
        "a": ex.evaluate(ex.parse(summed), [z]).sum(-1),
        "d": z / (m[..., None] + 3.0),
    }
    got = Run(text)(values)
    for name, expected in want.items():
        assert relative(got[name], expected) < (2 * ROUNDED if name == "j" else ROUNDED), name


def test_constants_of_single_tokens_are_refused() -> None:
    """A slice would apply the first token's part to all of its tokens."""
    t = tensor_text((9, 2, 8), "bf16")
    text = f"""func.func @main(%x: {t}, %c: {tensor_text((9, 2), "bf16")}) -> {t}
  attributes {{arg_names = ["x", "c"], result_names = ["y"]}} {{
  %y = tc.map "mul(a, b)" over "b s o, b s -> b s o" (%x, %c) : {t}
  func.return %y : {t}
}}"""
    with pytest.raises(UnsupportedError, match="its own part of a constant"):
        Run(text)
