"""Random expressions and einsum rules for property tests."""

from __future__ import annotations

from hypothesis import strategies as st

from ir import expr as ex
from ir.axes import Rule

SMOOTH_UNARY = ["neg", "abs", "tanh", "sigmoid", "erf", "relu", "silu", "gelu", "gelu_tanh", "square", "sin", "cos"]
BINARY = ["add", "sub", "mul", "max", "min", "lt", "ge", "eq"]
constants = st.sampled_from([0.0, 1.0, -1.0, 0.5, 2.0, 1e-06, -3.25, 0.1]).map(ex.Const)


def expressions(operands: int, depth: int = 4) -> st.SearchStrategy[ex.Expr]:
    """Expressions over `operands` letters, of functions that are finite everywhere."""
    leaves = st.one_of(st.integers(0, operands - 1).map(ex.Input), constants)

    def extend(inner: st.SearchStrategy[ex.Expr]) -> st.SearchStrategy[ex.Expr]:
        return st.one_of(
            st.builds(lambda f, x: ex.Call(f, (x,)), st.sampled_from(SMOOTH_UNARY), inner),
            st.builds(lambda f, x, y: ex.Call(f, (x, y)), st.sampled_from(BINARY), inner, inner),
            st.builds(lambda c, x, y: ex.Call("select", (c, x, y)), inner, inner, inner),
        )

    return st.recursive(leaves, extend, max_leaves=2 * depth)


@st.composite
def contractions(draw: st.DrawFn) -> tuple[Rule, dict[str, int]]:
    """A rule of two operands with batch, row, column and inner axes in any order, and sizes."""
    axes = list("abcdefg")[: draw(st.integers(1, 7))]
    sizes = {a: draw(st.integers(1, 5)) for a in axes}
    left: list[str] = []
    right: list[str] = []
    output: list[str] = []
    for axis in axes:
        sides, kept = draw(st.sampled_from([("l", 1), ("r", 1), ("lr", 1), ("lr", 0), ("l", 0), ("r", 0)]))
        left += [axis] * ("l" in sides)
        right += [axis] * ("r" in sides)
        output += [axis] * kept
    left, right, output = (draw(st.permutations(side)) for side in (left, right, output))
    return Rule((tuple(left), tuple(right)), tuple(output)), sizes
