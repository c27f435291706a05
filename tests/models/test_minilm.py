"""all-MiniLM-L6-v2 (fp32, sentence-transformers layout), end to end: embeddings of the streams against f32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from backend_rngd.artifact import ArtifactError, open_artifact
from rngdc import LLM
from rngdc.cli import main
from tests.frontend.real_models import minilm

TEXTS = [
    "A man is eating food.",
    "The stock market fell sharply today because of the news.",
    "Hi",
    "In a hole in the ground there lived a hobbit, and it was not a nasty, dirty, wet hole filled with worms.",
]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("minilm") / "artifact"
    try:
        main(["build", str(minilm()), str(out), "-pb", "1,16", "-pb", "1,48", "-tp", "1", "--auto-bfloat16-cast"])
    except SystemExit as stop:
        assert not stop.code
    return out


def test_pooling_is_read_from_the_directory(built: Path) -> None:
    pooling = open_artifact(built).manifest.model.pooling
    assert pooling is not None
    assert (pooling.mode, pooling.normalise) == ("mean", True)


def test_embeddings(built: Path) -> None:
    llm = LLM.load_artifact(built)
    tokenizer: Any = AutoTokenizer.from_pretrained(minilm())
    model: Any = AutoModel.from_pretrained(minilm(), dtype=torch.float32).eval()
    for text in TEXTS:
        found = llm.embed(text)
        ids = found.prompt_ids
        assert ids == tokenizer(text)["input_ids"]
        with torch.no_grad():
            hidden = model(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(0).numpy()
        wanted = hidden / np.linalg.norm(hidden)
        assert np.linalg.norm(found.vector) == pytest.approx(1, abs=1e-5)
        assert float(found.vector @ wanted) >= 0.9995


def test_a_part_of_the_buckets(built: Path) -> None:
    llm = LLM.load_artifact(built, prefill_buckets=[(1, 16)], devices="npu:2:5", max_prompt_len=12)
    whole = LLM.load_artifact(built).embed(TEXTS[0])
    part = llm.embed(TEXTS[0])
    assert np.array_equal(part.vector, whole.vector) and part.seconds == whole.seconds
    with pytest.raises(ArtifactError, match="prompts have at most 12"):
        llm.embed(TEXTS[3])
    with pytest.raises(ArtifactError, match="it is no decoder"):
        llm.generate(TEXTS[0])
    with pytest.raises(ArtifactError, match="an encoder has prefill buckets only"):
        LLM.load_artifact(built, decode_buckets=[(1, 16)])
    with pytest.raises(ArtifactError, match="no bucket was chosen"):
        LLM.load_artifact(built, prefill_buckets=[])


def test_run_command(built: Path, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    main_status(["run", str(built), "--prompt", TEXTS[0], "--json", "-"])
    report = json.loads(capfd.readouterr().out)
    assert len(report["embedding"]) == 384
    assert report["time_us"] > 0


def main_status(arguments: list[str]) -> None:
    """Run the command; it must succeed."""
    try:
        main(arguments)
    except SystemExit as stop:
        assert not stop.code
