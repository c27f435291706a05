"""Prompts whose programs walk the tokens in chunks: tokens and logits of the whole, on any number of stages."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from xdsl.passes import ModulePass

import passes.pipeline
from backend_rngd.artifact import Artifact
from backend_rngd.artifact.stages import passes_of
from passes import chunk_sizes
from passes.chunk_tokens import ChunkTokens
from passes.outline import Outline
from rngdc.buckets import BucketRequest
from rngdc.check import check
from runtime_sim.generate import generate
from tests.frontend.tiny import save_model
from tests.models.parallel import built, loaded

PROMPTS = [[int(t) for t in np.random.default_rng(n).integers(3, 90, n)] for n in (37, 12, 47)]
CASES = [
    ("gemma2", 1, BucketRequest([], [(3, 64)], chunk=32), 16, 2),  # windows; programs without logits
    ("gpt2", 2, BucketRequest([(3, 47)], [(3, 64)]), 36, 4),  # rows, a shorter last chunk, no tables to prepare
]
"""Model, units, buckets, tokens of a chunk, chunks of the largest program."""


def tokens_of(artifact: Artifact, stages: int) -> list[tuple[list[int], np.ndarray]]:
    logits: list[list[np.ndarray]] = [[] for _ in PROMPTS]
    device = loaded(artifact, stages, checks=True)
    rows = generate(device, PROMPTS, 2, listener=lambda row, _, values: logits[row].append(values))
    return [(row.token_ids, np.array(seen)) for row, seen in zip(rows, logits, strict=True)]


@pytest.mark.parametrize(("case", "tensor", "request_", "size", "chunks"), CASES)
def test_tokens_do_not_depend_on_chunks(
    case: str,
    tensor: int,
    request_: BucketRequest,
    size: int,
    chunks: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save_model(case, tmp_path / "model", torch.bfloat16, **({} if case == "gpt2" else {"hidden_size": 64}))

    def build(name: str, tokens: int | None) -> Artifact:
        def stage() -> list[ModulePass]:
            return [Outline(), ChunkTokens(tokens)]

        monkeypatch.setattr(passes.pipeline, "outline_stage", stage)
        return built(tmp_path / "model", tmp_path / name, tensor, request_, opt_level=1)

    monkeypatch.setattr(chunk_sizes, "KEY_MULTIPLE", 16)
    whole, cut = build("whole", None), build("cut", size)
    parts = {len(passes_of(cut.stream(b))) for b in cut.buckets}
    assert max(parts) == chunks
    assert min(parts) == 1  # decoding
    names = {routine.name for b in cut.buckets for routine in cut.stream(b).routines}
    assert any(name.startswith("block_0_keys") for name in names)
    want = tokens_of(whole, 1)
    for stages in (1, 3):
        for (tokens, logits), (expected, exact) in zip(tokens_of(cut, stages), want, strict=True):
            assert tokens == expected, stages
            np.testing.assert_array_equal(logits, exact)
    prefill = [b for b in cut.buckets if b.phase != "decode"]
    report = check(loaded(cut, 2), prefill[-1:])
    assert all(bucket.agrees for bucket in report.buckets), report
