"""split-stages: contiguous, balanced, and nothing but activations crosses a cut."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from xdsl.dialects.builtin import IntegerAttr, ModuleOp
from xdsl.dialects.func import CallOp

from ir.errors import UserError
from ir.text import parse_module, print_module
from passes.notes import notes
from passes.opt import run_pipeline
from passes.outline import Outline
from passes.pipeline import shard_stage
from passes.split_stages import STAGE, SplitStages, balance
from tests.passes.transformer_modules import Shape, module


def stages(model: ModuleOp) -> list[int]:
    found = [op.attributes.get(STAGE) for op in model.walk() if isinstance(op, CallOp)]
    return [s.value.data for s in found if isinstance(s, IntegerAttr)]


@given(costs=st.lists(st.integers(0, 50), min_size=1, max_size=8), data=st.data())
def test_balance_is_optimal(costs: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(costs)))
    got = balance(costs, count)
    assert len(got) == count and sum(got) == len(costs) and min(got) > 0

    def largest(cuts: tuple[int, ...]) -> int:
        edges = [0, *cuts, len(costs)]
        return max(sum(costs[a:b]) for a, b in itertools.pairwise(edges))

    best = min(largest(c) for c in itertools.combinations(range(1, len(costs)), count - 1))
    assert largest(tuple(itertools.accumulate(got))[:-1]) == best


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("units", [1, 4])
@pytest.mark.parametrize("outlined", [False, True])
def test_every_number_of_stages(count: int, units: int, outlined: bool) -> None:
    model = module(Shape(layers=6, tied=True))
    run_pipeline(model, [*shard_stage(units), *([Outline()] if outlined else []), SplitStages(stages=count)])
    found = stages(model)
    assert found == sorted(found)
    assert len(found) == 6 and set(found) == set(range(count))
    tied = ["embed.weight is in the first and in the last pipeline stage (tied weights)"]
    assert notes(model) == (tied if count > 1 else [])
    assert print_module(parse_module(print_module(model))) == print_module(model)


def test_a_large_head_counts_for_the_last_stage() -> None:
    small, large = module(Shape(layers=8)), module(Shape(layers=8, vocab=600))
    for model in (small, large):
        run_pipeline(model, [SplitStages(stages=2)])
    assert stages(small).count(0) == 4
    assert stages(large).count(0) == 6


def test_too_many_stages() -> None:
    with pytest.raises(UserError, match="3 pipeline stages: the model has 2 layers that can be apart; use -pp 1 to 2"):
        run_pipeline(module(Shape(layers=2)), [SplitStages(stages=3)])


BLOCK = """builtin.module {
  func.func private @block_0(%x: tensor<2x4xf32>, %w: tensor<4x4xf32>, %c: tensor<2x4xf32>)
      -> (tensor<2x4xf32>, tensor<2x4xf32>) attributes {arg_names = ["x", "w", "c"], result_names = ["y", "z"]} {
    %0 = tc.contract "b i, o i -> b o" (%x, %w) : tensor<2x4xf32>
    %1 = tc.map "add(a, b)" over "b i, b i -> b i" (%0, %c) : tensor<2x4xf32>
    func.return %1, %0 : tensor<2x4xf32>, tensor<2x4xf32>
  }
  func.func @main(%x: tensor<2x4xf32>, %k: tensor<2x4xf32>) -> tensor<2x4xf32>
      attributes {arg_names = ["x", "cache.k.0"], result_names = ["y"]} {
    %w = tc.weight "w" : tensor<4x4xf32>
    %v = tc.weight "v" : tensor<4x4xf32>
    %u = tc.map "neg(a)" over "b i -> b i" (%x) : tensor<2x4xf32>
    %a, %b = func.call @block_0(FIRST) {path = "layers.0"} : KIND
    %c, %d = func.call @block_0(SECOND) {path = "layers.1"} : KIND
    func.return %c : tensor<2x4xf32>
  }
}"""
KIND = "(tensor<2x4xf32>, tensor<4x4xf32>, tensor<2x4xf32>) -> (tensor<2x4xf32>, tensor<2x4xf32>)"


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ("%x, %w, %u", "%a, %w, %u", "weight w: layers of stages 0, 1 use it"),
        ("%x, %w, %k", "%a, %v, %k", "cache cache.k.0: layers of stages 0, 1 use it"),
        ("%x, %w, %u", "%a, %v, %b", "layers.0: stage 1 reads a result of stage 0 that is not handed"),
    ],
)
def test_only_activations_cross(first: str, second: str, message: str) -> None:
    text = BLOCK.replace("FIRST", first).replace("SECOND", second).replace("KIND", KIND)
    with pytest.raises(UserError, match=message):
        run_pipeline(parse_module(text), [SplitStages(stages=2)])
    run_pipeline(parse_module(text), [SplitStages(stages=1)])


def test_what_every_stage_can_compute_may_be_read_anywhere() -> None:
    text = BLOCK.replace("FIRST", "%x, %w, %u").replace("SECOND", "%a, %v, %u").replace("KIND", KIND)
    model = parse_module(text)
    run_pipeline(model, [SplitStages(stages=2)])
    assert stages(model) == [0, 1]
