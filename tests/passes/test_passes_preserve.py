"""Every pass keeps what a module computes: random modules, before and after."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from ir.text import parse_module, print_module
from passes.opt import run_pipeline
from tests.passes.random_modules import SIZES, Case, modules

SPECIALISE = f"specialise{{batch={SIZES['B']} seq={SIZES['S']} kv={SIZES['KV']}}}"
COMMON = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray], tolerance: float = 0.0) -> None:
    assert list(a) == list(b)
    for name, expected in a.items():
        got = b[name]
        assert got.dtype == expected.dtype
        assert got.shape == expected.shape
        if tolerance == 0.0:
            assert np.array_equal(got.astype(np.float32), expected.astype(np.float32), equal_nan=True), name
        else:
            scale = float(np.sqrt(np.mean(expected.astype(np.float64) ** 2))) + 1e-6
            assert np.allclose(got, expected, rtol=tolerance, atol=tolerance * scale), name


@pytest.mark.parametrize(
    "pipeline",
    [
        "simplify",
        "fuse-elementwise{keep-rounding=true}",
        f"simplify,fuse-elementwise{{keep-rounding=true}},simplify,{SPECIALISE},simplify",
    ],
)
@given(case=modules(exact=True))
@COMMON
def test_bit_for_bit(pipeline: str, case: Case) -> None:
    before = case.run()
    run_pipeline(case.module, pipeline)
    same(before, case.run())


@pytest.mark.parametrize(
    "pipeline", ["simplify", "fuse-elementwise", f"simplify,fuse-elementwise,simplify,{SPECIALISE},simplify"]
)
@given(case=modules(exact=False))
@COMMON
def test_up_to_the_order_of_sums(pipeline: str, case: Case) -> None:
    before = case.run()
    run_pipeline(case.module, pipeline)
    same(before, case.run(), 1e-4)


@given(case=modules(exact=False))
@COMMON
def test_specialised_runs_as_symbolic(case: Case) -> None:
    before = case.run()
    run_pipeline(case.module, SPECIALISE)
    assert "?" not in print_module(case.module)
    same(before, case.run())


@given(case=modules(exact=False))
@COMMON
def test_text_means_the_same(case: Case) -> None:
    text = print_module(case.module)
    again = parse_module(text)
    assert print_module(again) == text
    same(case.run(), case.run(again))


@given(case=modules(exact=False))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_passes_are_idempotent(case: Case) -> None:
    run_pipeline(case.module, "simplify,fuse-elementwise,simplify")
    text = print_module(case.module)
    run_pipeline(case.module, "simplify,fuse-elementwise,simplify")
    assert print_module(case.module) == text
