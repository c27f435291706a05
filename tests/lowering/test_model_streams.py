"""Small random models of every architecture: capture, passes, streams; compared with the `tc` interpreter."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

from frontend.capture import capture
from frontend.resolve import resolve_model
from ir.interpreter import run as interpret
from passes.opt import run_pipeline
from passes.pipeline import simplify_stage, specialise_stage
from tests.frontend.tiny import CONFIGS, save_model
from tests.lowering.running import Array, Run, relative

# Four heads of 16: rotary halves of the smaller ones do not start on 8 B and are refused (test_elementwise).
SIZES = {case: {} if case.startswith("gpt2") else {"hidden_size": 64} for case in CONFIGS}


@pytest.mark.parametrize("spill", [None, 64])
@pytest.mark.parametrize("case", CONFIGS)
def test_architecture(case: str, spill: int | None, tmp_path: Path) -> None:
    """`spill` 64: nearly every value lives in HBM and is walked in chunks, as large buckets do."""
    options = {} if spill is None else {"spill_bytes": spill}
    save_model(case, tmp_path, torch.bfloat16, **SIZES[case])
    captured = capture(resolve_model(str(tmp_path)))
    run_pipeline(captured.module, simplify_stage())
    decoder = captured.info.kind == "decoder"
    for b, s, kv, starts in [(2, 7, 24, [0, 0]), (2, 1, 24, [7, 4]), (1, 32, 40, [3])]:
        if not decoder and s == 1:
            continue
        module = captured.module.clone()
        run_pipeline(module, specialise_stage(b, s, kv if decoder else None))
        run = Run(module, cache_capacity=kv + 8, cache_batch=b, **options)
        rng = np.random.default_rng(0)
        known: dict[str, Array] = {
            "input_ids": rng.integers(3, 96, (b, s)).astype(np.int32),
            "position_ids": (np.array(starts)[:, None] + np.arange(s)).astype(np.int32),
            "last": np.full(b, s - 1, np.int32),
            "lengths": np.array([s, s - 2][:b], np.int32),
        }
        values: dict[str, Array] = {p.name: known[p.name] for p in run.lowered.inputs}
        for port in run.lowered.caches:
            values[port.name] = rng.standard_normal(port.shape).astype(ml_dtypes.bfloat16)
        got = run(values, captured.weights.load)
        want = interpret(module, values, captured.weights.load)
        for name, array in got.items():
            assert relative(array, np.asarray(want[name]).astype(np.float32)) < 0.03, (name, b, s)
        for port in run.lowered.caches:
            assert relative(run.read(port), np.asarray(want[port.name]).astype(np.float32)) < 0.03
