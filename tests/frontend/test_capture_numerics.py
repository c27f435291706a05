"""Every supported architecture: the captured module computes what the unmodified model computes.

Rows have different lengths, the buckets have spare room, and the caches start as garbage, so that a wrong mask, slot or
position shows. The reference runs each row alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from frontend.architectures import SUPPORTED
from frontend.capture import Captured, capture
from frontend.resolve import resolve_model
from ir.interpreter import run
from tests.frontend.running import Decoder, reference_logits
from tests.frontend.tiny import CONFIGS, make_config, save_model

DECODERS = [case for case in CONFIGS if make_config(case).model_type != "bert"]


def captured_case(case: str, directory: Path, dtype: str = "f32") -> tuple[Captured, Any]:
    model = save_model(case, directory)
    return capture(resolve_model(directory, compute_dtype=dtype)), model


def test_every_supported_architecture_has_a_case() -> None:
    assert {make_config(case).model_type for case in CONFIGS} == set(SUPPORTED)


@pytest.mark.parametrize("case", DECODERS)
def test_prefill_chunk_and_decode_match_the_unmodified_model(case: str, tmp_path: Path) -> None:
    captured, model = captured_case(case, tmp_path)
    generator = np.random.default_rng(7)
    texts = [generator.integers(3, 97, size=14).tolist() for _ in range(3)]
    lengths = [9, 4, 6]
    bucket, kv = 11, 23
    decoder = Decoder(captured, batch=3, kv=kv)
    tokens = np.zeros((3, bucket), np.int64)
    for row, (text, length) in enumerate(zip(texts, lengths, strict=True)):
        tokens[row, :length] = text[:length]
    logits = decoder.step(tokens, np.tile(np.arange(bucket), (3, 1)))
    wanted = [reference_logits(model, text) for text in texts]
    spread = max(float(np.abs(w).max()) for w in wanted)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(logits[row, :length], wanted[row][:length], atol=2e-5 * spread)
    # A chunk of two tokens a row, then single tokens, each row at its own position.
    for width in (2, 1, 1):
        positions = np.array(lengths)[:, None] + np.arange(width)
        tokens = np.array([text[n : n + width] for text, n in zip(texts, lengths, strict=True)])
        logits = decoder.step(tokens, positions)
        for row, length in enumerate(lengths):
            np.testing.assert_allclose(logits[row], wanted[row][length : length + width], atol=2e-5 * spread)
        lengths = [n + width for n in lengths]


def test_encoder_matches_the_unmodified_model(tmp_path: Path) -> None:
    captured, model = captured_case("bert", tmp_path)
    generator = np.random.default_rng(3)
    lengths = np.array([7, 3, 10], np.int32)
    tokens = generator.integers(3, 97, size=(3, 12)).astype(np.int32)
    positions = np.tile(np.arange(12, dtype=np.int32), (3, 1))
    arguments = {"input_ids": tokens, "position_ids": positions, "lengths": lengths}
    hidden = run(captured.module, arguments, captured.weights.load)["last_hidden_state"]
    for row, length in enumerate(lengths):
        with torch.no_grad():
            wanted = model(input_ids=torch.tensor(tokens[row : row + 1, :length])).last_hidden_state[0].numpy()
        np.testing.assert_allclose(hidden[row, :length], wanted, atol=2e-5)


@pytest.mark.parametrize("case", ["llama", "gemma2", "gpt2"])
def test_bf16_graph_is_as_close_as_the_model_in_bf16(case: str, tmp_path: Path) -> None:
    """The error against f32 is that of transformers computing in bf16: casts and roundings are the model's own."""
    captured, model = captured_case(case, tmp_path, "bf16")
    text = np.random.default_rng(5).integers(3, 97, size=12)
    logits = Decoder(captured, 1, 16).step(text[None], np.arange(12)[None])[0]
    wanted = reference_logits(model, text.tolist())
    theirs = np.abs(reference_logits(model.to(torch.bfloat16), text.tolist()) - wanted).mean()
    ours = np.abs(logits - wanted).mean()
    assert 0 < ours <= 1.5 * theirs, (ours, theirs)
