"""Models on several processing elements and stages: the streams' results are those of one unit, but for rounding.

Every run is fed the same tokens. The error against f32 of N units may be 1.5 times that of one unit (partial sums are
rounded to bf16 before they are added); stages change nothing, bit by bit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from backend_rngd.artifact import open_artifact
from rngdc.buckets import BucketRequest
from rngdc.build import BuildOptions, build
from rngdc.collectives import collectives_report
from rngdc.options import ParallelOptions
from rngdc.text import TextModel
from runtime_sim.generate import embed
from tests.cli.small_models import write_model
from tests.frontend.real_models import minilm, smollm2
from tests.frontend.tiny import save_model
from tests.models.parallel import built, exact_logits, judge, loaded, rms, run_script, script
from tests.models.test_architectures import CASES

REQUEST = BucketRequest([(1, 16)], [(2, 32)])
STEPS = 3

# (key-value heads, query heads, head size): one key head for all, odd counts, as many as query heads, up to 40 heads.
SHAPES = [
    (1, 4, 16), (1, 40, 8), (2, 4, 16), (2, 14, 8), (3, 9, 16), (3, 3, 32), (5, 5, 16), (5, 40, 8), (6, 12, 8),
    (8, 8, 8), (8, 32, 8),
]  # fmt: skip
FAST = [((2, 14, 8), 4, (1, 3)), ((3, 9, 16), 2, (1, 2)), ((8, 32, 8), 16, (1,)), ((4, 16, 16), 4, (1, 2))]
"""The hidden sizes of the last two give every slice a piece."""


def llama(directory: Path, shape: tuple[int, int, int], **changes: Any) -> Path:
    """A random llama of three layers, with a vocabulary and an MLP that few numbers divide."""
    kv, heads, width = shape
    sizes = {"num_key_value_heads": kv, "num_attention_heads": heads, "head_dim": width}
    hidden = heads * width
    return write_model(
        directory, **sizes, hidden_size=hidden, num_hidden_layers=3, intermediate_size=104, vocab_size=131, **changes
    )


def check_shape(tmp_path: Path, shape: tuple[int, int, int], sizes: list[int], stages: tuple[int, ...]) -> None:
    """The model on one unit, then on `sizes` units, each with so many stages."""
    model = llama(tmp_path / "model", shape)
    text = script(131, 2, STEPS, seed=sum(shape))
    alone_artifact = built(model, tmp_path / "tp1", 1, REQUEST)
    exact = exact_logits(alone_artifact, text)
    alone = run_script(loaded(alone_artifact), text)
    assert rms(alone - exact) < 0.1 * rms(exact)
    for size in sizes:
        artifact = alone_artifact if size == 1 else built(model, tmp_path / f"tp{size}", size, REQUEST)
        first = None
        for count in stages:
            found = run_script(loaded(artifact, count, checks=count == stages[-1]), text)
            if first is None:
                first = found
                assert not (problem := judge(found, alone, exact)), f"tp {size}: {problem}"
            assert np.array_equal(found, first), f"tp {size}, {count} stages"
        if size > 1:
            for report in collectives_report(artifact, artifact.buckets):
                assert report["per_layer"] == {"all_reduce": 2}, f"tp {size}"
                assert report["elsewhere"] == {"all_reduce": 1, "all_gather": 1}, f"tp {size}"


@pytest.mark.parametrize(("shape", "size", "stages"), FAST, ids=str)
def test_random_models(tmp_path: Path, shape: tuple[int, int, int], size: int, stages: tuple[int, ...]) -> None:
    check_shape(tmp_path, shape, [size], stages)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_random_models_everywhere(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    check_shape(tmp_path, shape, [1, 2, 4, 8, 16], (1, 2, 3))


ARCHITECTURES = ["gpt2", "gemma2", "qwen2-window"]


def check_architecture(tmp_path: Path, case: str, sizes: list[int]) -> None:
    save_model(case, tmp_path / "model", torch.bfloat16, **CASES[case])
    text = script(128, 2, STEPS)
    first = built(tmp_path / "model", tmp_path / "tp1", 1, REQUEST)
    exact, alone = exact_logits(first, text), run_script(loaded(first), text)
    for size in sizes:
        found = run_script(loaded(built(tmp_path / "model", tmp_path / f"tp{size}", size, REQUEST), checks=True), text)
        assert not (problem := judge(found, alone, exact)), f"tp {size}: {problem}"


@pytest.mark.parametrize("case", ARCHITECTURES)
def test_architectures(tmp_path: Path, case: str) -> None:
    check_architecture(tmp_path, case, [4])


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_architecture(tmp_path: Path, case: str) -> None:
    check_architecture(tmp_path, case, [2, 4, 8])


def test_sequence_parallel(tmp_path: Path) -> None:
    """Norms and residuals on a part of the tokens each: other collectives, the same results."""
    model = llama(tmp_path / "model", (2, 4, 16))
    text = script(131, 2, STEPS)
    first = built(model, tmp_path / "tp1", 1, REQUEST)
    exact, alone = exact_logits(first, text), run_script(loaded(first), text)
    out = tmp_path / "tp4"
    build(BuildOptions(str(model), out, REQUEST, ParallelOptions(4, sequence=True)), lambda _: None)
    artifact = open_artifact(out)
    assert not judge(run_script(loaded(artifact, checks=True), text), alone, exact)
    prefill, decode = collectives_report(artifact, artifact.buckets)
    assert prefill["per_layer"] == {"reduce_scatter": 2, "all_gather": 2}
    assert decode["per_layer"] == {"all_reduce": 2}  # one token cannot be divided


# Real models ---------------------------------------------------------------------------------------------------------
def smollm2_logits(tmp_path: Path, sizes: dict[int, tuple[int, ...]], steps: int) -> None:
    """SmolLM2: 9 query heads, 3 key heads; `sizes`: stages by number of units."""
    request = BucketRequest([(1, 32)], [(4, 64)])
    first = built(smollm2(), tmp_path / "tp1", 1, request)
    ids = TextModel(tmp_path / "tp1").chat("What is the capital of France?")[-30:]
    # The error of one token varies threefold with the order of additions, that of several rows together does not.
    text = script(49152, 4, steps, length=30)
    text.prompts[0] = ids
    exact, alone = exact_logits(first, text), run_script(loaded(first), text)
    for size, stages in sizes.items():
        artifact = first if size == 1 else built(smollm2(), tmp_path / f"tp{size}", size, request)
        kept = None
        for count in stages:
            found = run_script(loaded(artifact, count), text)
            kept = found if kept is None else kept
            assert np.array_equal(found, kept)
        assert kept is not None
        assert not (problem := judge(kept, alone, exact)), f"tp {size}: {problem}"
        assert np.array_equal(kept.argmax(-1)[0, 0], exact.argmax(-1)[0, 0])


def test_smollm2(tmp_path: Path) -> None:
    smollm2_logits(tmp_path, {4: (2,)}, 3)


@pytest.mark.slow
def test_smollm2_everywhere(tmp_path: Path) -> None:
    smollm2_logits(tmp_path, {1: (1, 3), 2: (1, 2, 3), 4: (1,), 8: (1, 3), 16: (1, 2)}, 6)


@pytest.mark.parametrize("size", [4])
def test_minilm(tmp_path: Path, size: int) -> None:
    request = BucketRequest([(1, 16)], [])
    vectors: list[np.ndarray] = []
    for units in (1, size):
        artifact = built(minilm(), tmp_path / f"tp{units}", units, request, auto_bfloat16_cast=True)
        device = loaded(artifact, checks=True)
        ids = TextModel(artifact.directory).encode("A man is eating food.")
        vectors.append(np.asarray(embed(device, ids).vector))
    from transformers import AutoModel

    load: Any = AutoModel.from_pretrained
    model = load(minilm(), dtype=torch.float32).eval()
    with torch.no_grad():
        hidden = model(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(0).numpy()
    exact = hidden / np.linalg.norm(hidden)
    assert all(float(v @ exact) >= 0.9995 for v in vectors)
    assert rms(vectors[1] - exact) <= 1.5 * rms(vectors[0] - exact) + 2.0**-9 * rms(exact)
