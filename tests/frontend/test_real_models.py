"""SmolLM2 (from GGUF) and MiniLM: real weights, real tokenizers, compared with transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from frontend.capture import Captured, capture
from frontend.resolve import ModelSource, resolve_model
from frontend.tokenizer import Tokenizer
from ir.errors import UserError
from ir.interpreter import run
from tests.frontend.real_models import minilm, smollm2
from tests.frontend.running import Decoder


@pytest.fixture(scope="module")
def smollm2_source() -> ModelSource:
    return resolve_model(smollm2())


@pytest.fixture(scope="module")
def smollm2_captured(smollm2_source: ModelSource) -> Captured:
    return capture(smollm2_source)


@pytest.mark.slow
def test_gguf_is_converted_once(smollm2_source: ModelSource) -> None:
    assert smollm2_source.gguf_file is not None
    assert smollm2_source.gguf_file.suffix == ".gguf"
    assert smollm2_source.declared_dtype == "bf16"
    weights = smollm2_source.directory / "model.safetensors"
    before = weights.stat().st_mtime_ns
    again = resolve_model(smollm2_source.gguf_file)
    assert again.directory == smollm2_source.directory
    assert weights.stat().st_mtime_ns == before
    assert any(f.name == "tokenizer.json" for f in again.tokenizer_files)


@pytest.mark.slow
def test_smollm2_logits_and_tokens(smollm2_source: ModelSource, smollm2_captured: Captured) -> None:
    tokenizer = Tokenizer(smollm2_source.directory)
    prompt = tokenizer.chat([{"role": "user", "content": "What is the capital of France?"}])
    decoder = Decoder(smollm2_captured, 1, len(prompt) + 8)
    model: Any = AutoModelForCausalLM.from_pretrained(smollm2_source.directory, dtype=torch.float32)
    with torch.no_grad():
        wanted = model(input_ids=torch.tensor([prompt])).logits[0].numpy()
        theirs = model.to(torch.bfloat16)(input_ids=torch.tensor([prompt])).logits[0].float().numpy()
    logits = decoder.step(np.array([prompt]), np.arange(len(prompt))[None])[0]
    ours = np.abs(logits - wanted).mean()
    assert ours <= 1.25 * np.abs(theirs - wanted).mean()
    generated: list[int] = []
    for step in range(4):
        token = int(np.argmax(logits[-1]))
        generated.append(token)
        logits = decoder.step(np.array([[token]]), np.array([[len(prompt) + step]]))[0]
    with torch.no_grad():
        model = model.float()
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=4, do_sample=False)[0, len(prompt) :].tolist()
    assert generated == expected
    assert tokenizer.decode(generated).startswith("The capital of France")


def test_minilm_embeddings() -> None:
    source = resolve_model(minilm(), auto_bfloat16_cast=True)
    captured = capture(source)
    tokenizer = Tokenizer(source.directory)
    texts = ["A man is eating food.", "The stock market fell sharply today because of the news."]
    rows = [tokenizer.encode(t) for t in texts]
    size = max(map(len, rows)) + 3
    tokens = np.zeros((2, size), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    arguments = {
        "input_ids": tokens,
        "position_ids": np.tile(np.arange(size, dtype=np.int32), (2, 1)),
        "lengths": np.array([len(r) for r in rows], np.int32),
    }
    hidden = run(captured.module, arguments, captured.weights.load)["last_hidden_state"].astype(np.float32)
    model: Any = AutoModel.from_pretrained(source.directory, dtype=torch.float32).eval()
    for i, row in enumerate(rows):
        with torch.no_grad():
            wanted = model(input_ids=torch.tensor([row])).last_hidden_state[0].numpy().mean(0)
        ours = hidden[i, : len(row)].mean(0)
        cosine = float(ours @ wanted / np.linalg.norm(ours) / np.linalg.norm(wanted))
        assert cosine >= 0.9995


@pytest.mark.slow
def test_tokenizer_from_gguf(smollm2_source: ModelSource) -> None:
    tokenizer = Tokenizer(smollm2_source.directory)
    assert tokenizer.decode(tokenizer.encode("Hello, world!")) == "Hello, world!"
    assert tokenizer.has_chat_template
    assert tokenizer.eos_ids


def test_tokenizer(tmp_path: Path) -> None:
    tokenizer = Tokenizer(minilm())
    assert tokenizer.decode(tokenizer.encode("hello, world!")) == "hello, world!"
    assert tokenizer.encode("a")[0] != tokenizer.encode("a", add_special_tokens=False)[0]
    with pytest.raises(UserError, match="no chat template"):
        tokenizer.chat([{"role": "user", "content": "hello"}])
    with pytest.raises(UserError, match="no usable tokenizer"):
        Tokenizer(tmp_path)
