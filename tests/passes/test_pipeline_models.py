"""The whole `tc` pipeline on captured models of every architecture: it computes what capture gave it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from xdsl.dialects.builtin import ModuleOp

from frontend.capture import Captured, capture
from frontend.resolve import resolve_model
from ir.compare import BF16, Tolerance, accumulated, compare_modules, metrics
from ir.dialects import tc
from ir.interpreter import find_function, names_of, run
from ir.types import dims_of, elem_of, numpy_dtype, shape_of
from passes.opt import run_pipeline
from passes.pipeline import simplify_stage, specialise_stage
from tests.frontend.tiny import CONFIGS, make_config, save_model

DECODERS = [case for case in CONFIGS if make_config(case).model_type != "bert"]
BATCH, SEQ, KV = 3, 5, 16
EXACT = Tolerance(relative=1e-4, floor=1e-4, rms=1e-5)


def arguments(module: ModuleOp, sizes: Mapping[str, int], seed: int = 2) -> dict[str, np.ndarray]:
    """Inputs of a bucket with ragged rows: every row continues behind a cache of its own length."""
    rng = np.random.default_rng(seed)
    function = find_function(module, "main")
    past = np.array([0, 3, 9])[: sizes["B"], None]
    found: dict[str, np.ndarray] = {"last": np.array([4, 0, 2], np.int32)[: sizes["B"]] % sizes["S"]}
    for name, value in zip(names_of(function, "arg_names", 0), function.body.block.args, strict=True):
        shape = [d if isinstance(d, int) else sizes[d] for d in dims_of(value)]
        if name == "input_ids":
            found[name] = rng.integers(3, 97, shape).astype(np.int32)
        elif name == "position_ids":
            found[name] = (past + np.arange(shape[1])).astype(np.int32)
        elif name == "lengths":
            found[name] = np.array([5, 1, 3], np.int32)
        elif name.startswith("cache."):
            found[name] = rng.standard_normal(shape).astype(np.float32).astype(numpy_dtype(value))
    return found


def captured(case: str, directory: Path, dtype: str) -> Captured:
    save_model(case, directory)
    return capture(resolve_model(directory, compute_dtype=dtype))


@pytest.mark.parametrize("case", list(CONFIGS))
def test_passes_keep_a_model_in_f32(case: str, tmp_path: Path) -> None:
    """Without roundings every pass is exact, so the tolerance is that of the order of sums."""
    model = captured(case, tmp_path, "f32")
    args = arguments(model.module, {"B": BATCH, "S": SEQ, "KV": KV})
    after = model.module.clone()
    run_pipeline(after, "simplify,last-token,fuse-elementwise,simplify")
    result = compare_modules(model.module, after, args, model.weights.load, tolerance=EXACT)
    assert result.agrees, result.first
    assert result.first is None
    assert not result.skipped
    assert result.compared > result.unmatched
    symbolic = run(after, {n: a for n, a in args.items() if n in arg_names(after)}, model.weights.load)
    run_pipeline(after, specialise_stage(BATCH, SEQ, KV if case in DECODERS else None))
    bucket = run(after, {n: a for n, a in args.items() if n in arg_names(after)}, model.weights.load)
    for name, array in symbolic.items():
        assert metrics(bucket[name], array, EXACT).close, name


@pytest.mark.parametrize("case", list(CONFIGS))
def test_the_stages_keep_a_model_in_bf16(case: str, tmp_path: Path) -> None:
    """Fusion drops roundings: the result is as close to f32 as the model was, on average over several inputs."""
    model = captured(case, tmp_path, "bf16")
    exact = capture(resolve_model(tmp_path, compute_dtype="f32"))
    fused, staged = model.module.clone(), model.module.clone()
    run_pipeline(fused, "simplify,fuse-elementwise,simplify")
    run_pipeline(staged, simplify_stage(auto_bfloat16_cast=True))
    run_pipeline(staged, specialise_stage(BATCH, SEQ, KV if case in DECODERS else None))
    name = "logits" if case in DECODERS else "last_hidden_state"
    weights = [op for op in model.module.walk() if isinstance(op, tc.WeightOp)]
    narrow = {op.fqn.data for op in weights if elem_of(op.result) == "bf16"}

    def rounded(weight: str) -> np.ndarray:
        # The weights of the bf16 model, so that only its arithmetic is judged.
        array = exact.weights.load(weight)
        return array.astype(ml_dtypes.bfloat16).astype(np.float32) if weight in narrow else array

    ratios: list[float] = []
    for seed in range(4):
        args = arguments(model.module, {"B": BATCH, "S": SEQ, "KV": KV}, seed)
        wide = {n: a.astype(np.float32) if a.dtype == ml_dtypes.bfloat16 else a for n, a in args.items()}
        truth = run(exact.module, drop(wide, exact.module), rounded)[name]
        before = run(model.module, drop(args, model.module), model.weights.load)[name]
        after = run(fused, drop(args, fused), model.weights.load)[name]
        ratios.append(metrics(after, truth).rms_rel / metrics(before, truth).rms_rel)
        last = run(staged, drop(args, staged), model.weights.load)[name]
        row = after[np.arange(BATCH), args["last"]][:, None] if name == "logits" else after
        assert metrics(last, row, accumulated(4)).close
    assert np.mean(ratios) <= 1.15, ratios


@pytest.mark.parametrize("case", ["llama", "gpt2", "bert"])
def test_the_dtype_rule_makes_an_f32_model_fit_the_engine(case: str, tmp_path: Path) -> None:
    model = captured(case, tmp_path, "f32")
    args = arguments(model.module, {"B": BATCH, "S": SEQ, "KV": KV})
    after = model.module.clone()
    run_pipeline(after, "simplify,cast-bf16{allow=true},simplify")
    engine = [op for op in after.walk() if isinstance(op, (tc.ContractOp, tc.AttentionOp))]
    assert engine
    for op in engine:
        assert {elem_of(o) for o in op.operands[: 2 if isinstance(op, tc.ContractOp) else 3]} == {"bf16"}
    result = compare_modules(model.module, after, args, model.weights.load, tolerance=accumulated(4, BF16))
    assert result.agrees, result.results


def test_logits_are_one_row_a_sequence(tmp_path: Path) -> None:
    model = captured("llama", tmp_path, "bf16")
    run_pipeline(model.module, simplify_stage())
    function = find_function(model.module, "main")
    assert names_of(function, "arg_names", 0)[:3] == ["input_ids", "position_ids", "last"]
    end = function.body.block.last_op
    assert end is not None
    assert shape_of(end.operands[0]) == [-1, 1, 97]
    head = end.operands[0].owner
    # Nothing between the last block and the head sees all tokens, except the gather.
    wide = [op for op in function.body.block.ops if isinstance(op, tc.TcOp) and "S" in dims_of(op.results[0])]
    assert head not in wide
    assert not any(isinstance(op, tc.ReduceOp) for op in wide)


def arg_names(module: ModuleOp) -> list[str]:
    return names_of(find_function(module, "main"), "arg_names", 0)


def drop(args: Mapping[str, np.ndarray], module: ModuleOp) -> dict[str, np.ndarray]:
    """The arguments that a module takes."""
    return {n: a for n, a in args.items() if n in arg_names(module)}
