"""Tokens in chunks: the chunks cover all tokens, results are those of the whole, what cannot be cut stays as it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from xdsl.dialects.builtin import ModuleOp, StringAttr
from xdsl.dialects.func import CallOp, FuncOp

from frontend.capture import Captured, capture
from frontend.resolve import resolve_model
from ir import kernels
from ir.compare import observe
from ir.dialects import tc
from ir.interpreter import find_function, names_of, run
from ir.spmd import join_results, run_spmd
from ir.types import numpy_dtype, shape_of
from passes import chunk_sizes
from passes.chunk_sizes import KEY_LIMITS, VALUE_BYTES, chunk_size, key_limits
from passes.chunk_tokens import ChunkTokens
from passes.notes import notes
from passes.opt import run_pipeline
from passes.outline import Outline
from passes.pipeline import shard_stage, simplify_stage, specialise_stage
from rngdc.chunk_values import joined
from rngdc.compare_passes import compare_passes
from tests.frontend.tiny import save_model

BUCKETS = [(1, 24, 40, 8), (1, 23, 23, 8), (2, 12, 30, 7), (3, 10, 16, 3)]
"""Batch, tokens, cache slots, tokens of a chunk: equal chunks, a shorter last one, several rows, single tokens."""


@given(st.integers(1, 64), st.integers(1, 9000), st.integers(1, 40_000), st.one_of(st.none(), st.integers(1, 2048)))
def test_chunks_are_few_and_equal(batch: int, length: int, token_bytes: int, tokens: int | None) -> None:
    size = chunk_size(batch, length, token_bytes, tokens)
    assert 1 <= size <= length
    count = -(-length // size)
    assert count == 1 or size == -(-length // count)  # equal but for the last
    if tokens is not None and tokens >= batch:
        assert batch * size <= tokens or size == 1
        fewer = count - 1
        assert fewer == 0 or batch * -(-length // fewer) > tokens
    if tokens is None and size < length:
        assert batch * size * token_bytes <= VALUE_BYTES


@given(st.integers(1, 2000), st.integers(0, 2000), st.integers(1, 500))
def test_keys_reach_every_token(length: int, past: int, size: int) -> None:
    size = min(size, length)
    keys = length + past
    limits = key_limits(keys, length, size)
    assert len(limits) == -(-length // size)
    assert limits == sorted(limits)
    assert limits[-1] == keys
    assert len(set(limits)) <= KEY_LIMITS
    assert all(past + min(length, (c + 1) * size) <= limit <= keys for c, limit in enumerate(limits))


def test_default_sizes() -> None:
    assert chunk_size(1, 1024, 2 * 4096) == 512  # 8B
    assert chunk_size(1, 512, 2 * 4096) == 512
    assert chunk_size(1, 8192, 2 * 5120) == 512  # 32B
    assert chunk_size(1, 1024, 2 * 8192) == 256  # 70B
    assert chunk_size(4, 1024, 2 * 4096) == 128
    assert chunk_size(1, 2048, 2 * 576) == 2048  # 135M


def model(case: str, directory: Path) -> Captured:
    save_model(case, directory, torch.bfloat16)
    captured = capture(resolve_model(str(directory)))
    run_pipeline(captured.module, simplify_stage())
    return captured


def inputs(module: ModuleOp, past: int) -> dict[str, np.ndarray]:
    """Rows with different last tokens, behind `past` tokens in the caches."""
    rng = np.random.default_rng(1)
    main = find_function(module, "main")
    found: dict[str, np.ndarray] = {}
    for name, value in zip(names_of(main, "arg_names", 0), main.body.block.args, strict=True):
        shape = shape_of(value)
        if name == "input_ids":
            found[name] = rng.integers(3, 97, shape).astype(np.int32)
        elif name == "position_ids":
            found[name] = np.broadcast_to(past + np.arange(shape[1]), shape).astype(np.int32)
        elif name == "last":
            length = shape_of(main.body.block.args[0])[1]
            found[name] = np.array([length - 1, 0, length // 2], np.int32)[: shape[0]]
        else:
            found[name] = rng.standard_normal(shape).astype(np.float32).astype(numpy_dtype(value))
    return found


@pytest.mark.parametrize("case", ["llama", "gemma2", "gpt2"])
def test_results_are_those_of_the_whole(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, if sums do not depend on the order in which a matrix product of fewer rows adds."""

    def wide(x: np.ndarray) -> np.ndarray:
        return x.astype(np.float64)

    monkeypatch.setattr(kernels, "to_f32", wide)
    monkeypatch.setattr(chunk_sizes, "KEY_MULTIPLE", 4)
    captured = model(case, tmp_path)
    for batch, length, kv, tokens in BUCKETS:
        whole = captured.module.clone()
        run_pipeline(whole, [*specialise_stage(batch, length, kv), Outline()])
        cut = whole.clone()
        run_pipeline(cut, [ChunkTokens(tokens)])
        calls = [op.callee.string_value() for op in find_function(cut, "main").body.block.ops if isinstance(op, CallOp)]
        size = chunk_size(batch, length, 1, tokens)
        assert sum(name.startswith("cut_") for name in calls) == -(-length // size) > 1
        limits = set(key_limits(kv, length, size))
        assert {op.key_count for op in cut.walk() if isinstance(op, tc.AttentionOp)} == limits
        assert len(limits) > 1
        args = inputs(whole, kv - length)
        want, got = (run(m, args, captured.weights.load) for m in (whole, cut))
        for name, value in want.items():
            np.testing.assert_array_equal(got[name], value, f"{name} of {length} tokens")
        args["position_ids"][:, 0] = kv - 1  # a first token that stands where only a later chunk may be
        with pytest.raises(kernels.KernelError, match="position"):
            run(cut, args, captured.weights.load)


@pytest.mark.parametrize("case", ["llama", "gpt2"])
def test_faults_are_named_as_in_the_whole(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`rngdc check` joins the values of all chunks, and names the layer and the operation that a pass got wrong."""
    monkeypatch.setattr(chunk_sizes, "KEY_MULTIPLE", 4)
    captured = model(case, tmp_path)
    before = capture(resolve_model(str(tmp_path))).module
    whole = captured.module.clone()
    run_pipeline(whole, specialise_stage(2, 13, 13))
    cut = whole.clone()
    run_pipeline(cut, [Outline(), ChunkTokens(8)])
    args = inputs(whole, 0)
    assert compare_passes(before, cut, args, captured.weights.load).agrees
    seen = joined(cut, observe(cut, args, captured.weights.load)[1])
    layers = [o for o in seen if o.calls[1:] == ("block_0[1]",)]
    block = find_function(whole, "block_0").body.block
    assert [o.op.name for o in layers] == [op.name for op in block.ops if isinstance(op, tc.TcOp)]
    assert all([list(a.shape) for a in o.arrays] == [shape_of(op.results[0])] for o, op in zip(layers, block.ops))
    variant = next(f for f in cut.ops if isinstance(f, FuncOp) and f.sym_name.data.startswith("block_0_keys"))
    wrong = [op for op in variant.walk() if isinstance(op, tc.MapOp)][-1]
    wrong.expr = StringAttr(f"mul(1.5, {wrong.expr.data})")
    found = compare_passes(before, cut, args, captured.weights.load)
    assert found.first is not None
    assert found.first.calls == ("main", "block_0[0]")
    assert "mul(1.5" in found.first.op


def test_programs_that_stay_whole(tmp_path: Path) -> None:
    encoder = model("bert", tmp_path / "bert").module
    run_pipeline(encoder, [*specialise_stage(1, 24, None), Outline()])
    assert notes_after(encoder) == ["1 x 24 tokens are not computed in chunks: @block_0: attention sees later tokens"]
    captured = model("llama", tmp_path / "llama")
    parallel = captured.module.clone()
    run_pipeline(parallel, [*specialise_stage(1, 24, 24), *shard_stage(8, sequence_parallel=True), Outline()])
    [note] = [n for n in notes_after(parallel, 6) if "chunks" in n]
    assert note.endswith("chunks of 6 tokens have no equal part for every unit")
    decode = captured.module.clone()
    run_pipeline(decode, [*specialise_stage(8, 1, 24), Outline()])
    assert notes_after(decode) == []


@pytest.mark.parametrize("case", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("units", [2, 4])
def test_units_have_a_part_of_every_chunk(
    case: str, units: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sequence parallelism: other units hold other tokens than without chunks, and nothing else changes."""

    def wide(x: np.ndarray) -> np.ndarray:
        return x.astype(np.float64)

    monkeypatch.setattr(kernels, "to_f32", wide)
    monkeypatch.setattr(chunk_sizes, "KEY_MULTIPLE", 4)
    captured = model(case, tmp_path)
    whole = captured.module.clone()
    stages = [*specialise_stage(1, 24, 32), *shard_stage(units, sequence_parallel=True), Outline()]
    run_pipeline(whole, stages)
    cut = whole.clone()
    run_pipeline(cut, [ChunkTokens(8)])
    assert not [n for n in notes(cut) if "chunks" in n]
    bucket = captured.module.clone()
    run_pipeline(bucket, specialise_stage(1, 24, 32))
    args = inputs(bucket, 8)
    want, got = (join_results(m, run_spmd(m, args, captured.weights.load)) for m in (whole, cut))
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value, name)


def notes_after(module: ModuleOp, tokens: int = 8) -> list[str]:
    """The notes of a program that chunks of so many tokens were asked for, which must not change."""
    before = str(find_function(module, "main"))
    run_pipeline(module, [ChunkTokens(tokens)])
    assert str(find_function(module, "main")) == before
    return notes(module)
