from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ir.axes import Rule, Size, factors, product, reshape_rule
from ir.errors import RuleError


def test_a_rule_names_every_dimension() -> None:
    rule = Rule.parse("b s i, o i -> b s o")
    assert rule.inputs == (("b", "s", "i"), ("o", "i"))
    assert rule.output == ("b", "s", "o")
    assert rule.reduced == ("i",)
    assert rule.sizes([["B", "S", 4], [8, 4]]) == {"b": "B", "s": "S", "i": 4, "o": 8}
    assert rule.shape(rule.sizes([[2, 3, 4], [8, 4]])) == [2, 3, 8]


def test_products_and_brackets() -> None:
    rule = Rule.parse("b (k g) s [d] -> b s (k g)")
    assert rule.unsharded == {"d"}
    assert factors(rule.inputs[0][1]) == ("k", "g")
    assert str(rule) == "b (k g) s [d] -> b s (k g)"
    assert Rule.parse("b (k g), k -> b g").sizes([[1, 6], [2]])["g"] == 3


@pytest.mark.parametrize("text", ["b s i, o i -> b s o", "-> a b", ", b s -> b s", "b () -> b", "a (b [c]) -> a"])
def test_rules_print_as_they_are_read(text: str) -> None:
    assert str(Rule.parse(text)) == text
    assert Rule.parse(str(Rule.parse(text))) == Rule.parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("b s", "needs one '->'"),
        ("b -> b -> b", "needs one '->'"),
        ("B -> b", "unexpected 'B'"),
        ("(b -> b", "a bracket is not closed"),
        ("[b -> b", "a bracket is not closed"),
        ("((b) -> b", "unexpected '('"),
        ("b b -> b", "names an axis twice"),
        ("b | c -> b", "unexpected '|'"),
    ],
)
def test_malformed_rules_say_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(RuleError, match=message.replace("(", r"\(").replace("|", r"\|")):
        Rule.parse(text)


def test_sizes_that_disagree_name_axis_and_both_sizes() -> None:
    with pytest.raises(RuleError, match=r"axis 'i' of rule .* has sizes 4 and 5"):
        Rule.parse("b i, o i -> b o").sizes([[1, 4], [2, 5]])
    with pytest.raises(RuleError, match=r"'b' .* has sizes B and 2"):
        Rule.parse("b, b -> b").sizes([["B"], [2]])
    with pytest.raises(RuleError, match="operand 1 1 dimensions, but it has 2"):
        Rule.parse("b, b -> b").sizes([[2], [2, 2]])
    with pytest.raises(RuleError, match="has 2 operands, but 1 shapes"):
        Rule.parse("b, b -> b").sizes([[2]])
    with pytest.raises(RuleError, match="7 is no multiple of 2"):
        Rule.parse("(a b), a -> b").sizes([[7], [2]])


def test_symbolic_sizes_are_normal() -> None:
    assert Size.of("S*B*4*2").dim == "B*S*8"
    assert (Size.of("B") * Size.of("4*KV")).dim == "B*KV*4"
    assert Size.of("B*S*8").divided_by(Size.of("S*2")) == Size.of("B*4")
    assert Size.of("B").divided_by(Size.of("S")) is None
    assert Size.of("B*S").substitute({"B": 3}).dim == "S*3"
    with pytest.raises(RuleError, match="no product of symbols"):
        Size.of("B+1")


@pytest.mark.parametrize(
    ("source", "target", "rule"),
    [
        (["B", "S", 12], ["B", "S", 3, 4], "a b (c d) -> a b c d"),
        (["B", "S", 4], ["B*S", 4], "a b c -> (a b) c"),
        (["B*S", 12], ["B", "S", 3, 4], "(a b) (c d) -> a b c d"),
        ([2, 1, 12], [24], "a () b -> (a b)"),
        ([24], [1, 24, 1], "a -> () a ()"),
        ([6, 4], [4, 6], "[a] [b] -> [c] [d]"),
        ([5, 6, 4], [5, 4, 6], "a [b] [c] -> a [d] [e]"),
        (["B", 6], [6, "B"], "[a] [b] -> [c] [d]"),
        ([6, 10, 7], [15, 4, 7], "[a] [b] e -> [c] [d] e"),
    ],
)
def test_reshape_rules(source: list[int | str], target: list[int | str], rule: str) -> None:
    assert str(reshape_rule(source, target)) == rule


shapes = st.lists(st.integers(1, 6), min_size=0, max_size=4)


@given(shapes, shapes, st.randoms(use_true_random=False))
def test_reshape_rules_cover_every_size(a: list[int], b: list[int], random: np.random.Generator) -> None:
    """Split and merge the same numbers in two ways: shared axes have one size, and each side multiplies up."""
    flat = a + b
    cut = random.randint(0, len(flat)) if flat else 0  # type: ignore[attr-defined]
    source = [int(np.prod(flat[:cut])), *flat[cut:]]
    target = [*flat[:cut], int(np.prod(flat[cut:]))]
    rule = reshape_rule(list(source), list(target))
    sizes = rule.sizes([list(source), list(target)])
    assert all(d == 1 or factors(n) for n, d in zip(rule.inputs[0], source, strict=True))
    assert product([sizes[x] for x in {f for n in rule.output for f in factors(n)}]) == product(list(target))


def test_reshape_rule_refuses_other_numbers_of_elements() -> None:
    with pytest.raises(RuleError, match="changes the number of elements"):
        reshape_rule(["B", 6], ["S", 6])
