"""Tensor parallelism on captured models of every architecture: all units together compute what the model computes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from xdsl.dialects.builtin import DictionaryAttr

from ir.compare import accumulated, metrics
from ir.dialects import tc
from ir.interpreter import run
from ir.spmd import join_results, run_spmd
from ir.text import parse_module, print_module
from passes.opt import run_pipeline
from passes.parallel_report import collectives_report
from passes.pipeline import shard_stage, simplify_stage, specialise_stage
from tests.frontend.tiny import CONFIGS
from tests.passes.test_pipeline_models import DECODERS, arguments, captured, drop
from tests.passes.test_tensor_parallel import check

BATCH, SEQ, KV = 3, 8, 24


@pytest.mark.parametrize("case", list(CONFIGS))
def test_units_compute_what_the_model_computes(case: str, tmp_path: Path) -> None:
    model = captured(case, tmp_path, "f32")
    run_pipeline(model.module, "simplify,last-token,fuse-elementwise,simplify")
    for seq in (SEQ, 1):
        bucket = model.module.clone()
        run_pipeline(bucket, specialise_stage(BATCH, seq, KV if case in DECODERS else None))
        args = drop(arguments(model.module, {"B": BATCH, "S": seq, "KV": KV}), bucket)
        if "lengths" in args:
            args["lengths"] = np.minimum(args["lengths"], seq)
        for units, rows in ((2, False), (4, True), (8, False), (8, True)):
            part = check(bucket, args, model.weights.load, units, rows)
            layer = {"reduce_scatter": 2, "all_gather": 2} if rows and seq > 1 else {"all_reduce": 2}
            records = collectives_report(part)
            for name in {c.function for c in records} - {"main"}:
                assert Counter(c.kind for c in records if c.function == name) == layer, (case, units, rows)


@pytest.mark.parametrize("case", ["llama", "gpt2", "bert"])
def test_in_bf16_the_difference_is_that_of_sums(case: str, tmp_path: Path) -> None:
    model = captured(case, tmp_path, "bf16")
    run_pipeline(model.module, simplify_stage(auto_bfloat16_cast=True))
    run_pipeline(model.module, specialise_stage(BATCH, SEQ, KV if case in DECODERS else None))
    args = drop(arguments(model.module, {"B": BATCH, "S": SEQ, "KV": KV}), model.module)
    want = run(model.module, args, model.weights.load)
    part = model.module.clone()
    run_pipeline(part, shard_stage(4))
    got = join_results(part, run_spmd(part, args, model.weights.load))
    for name, array in want.items():
        assert metrics(got[name], array, accumulated(4)).close, name


def test_the_models_own_plan_is_kept_and_used(tmp_path: Path) -> None:
    model = captured("llama", tmp_path, "f32")
    plan = model.module.attributes["tc.tp_plan"]
    assert isinstance(plan, DictionaryAttr)
    assert '"colwise"' in str(plan.data["model.layers.*.mlp.up_proj"])
    run_pipeline(model.module, "simplify,last-token,fuse-elementwise,simplify")
    run_pipeline(model.module, specialise_stage(1, 4, 8))
    # What the model's author says wins over what would be derived.
    text = print_module(model.module)
    styled = parse_module(
        text.replace('"model.layers.*.mlp.down_proj" = "rowwise"', '"model.layers.*.mlp.down_proj" = "colwise"')
    )
    shards: list[str] = []
    for module in (model.module, styled):
        part = module.clone()
        run_pipeline(part, shard_stage(2))
        weights = {op.fqn.data: op for op in part.walk() if isinstance(op, tc.WeightOp)}
        shard = weights["model.layers.0.mlp.down_proj.weight"].shard
        shards.append(shard.data if shard is not None else "")
        assert "tc.tp_plan" not in part.attributes
    assert shards == ["48, 80@tp", "48@tp, 80"]
