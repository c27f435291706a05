"""Every supported architecture, small and random: two ragged prompts through the streams against transformers.

Judged on the sequences that the streams generate: our logits may be 1.25 times as far from f32 as transformers in bf16.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from backend_rngd.artifact import open_artifact
from frontend.architectures import SUPPORTED
from rngdc.buckets import BucketRequest
from rngdc.build import BuildOptions, build
from rngdc.check import check
from rngdc.options import ParallelOptions
from runtime_sim.generate import embed, generate
from runtime_sim.runtime import Device
from tests.frontend.tiny import make_config, make_model, save_model

# Sizes that the backend's lowering takes: heads of a multiple of eight.
_SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 128}
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
CASES: dict[str, dict[str, Any]] = {
    **{name: _SIZES | _HEADS for name in ("llama", "llama-tied", "llama-rope3", "mistral", "qwen3", "gemma2")},
    **{name: {k: v for k, v in (_SIZES | _HEADS).items() if k != "head_dim"} for name in ("qwen2", "qwen2-window")},
    "gpt2": {"n_embd": 64, "vocab_size": 128},
    "gpt2-scaled": {"n_embd": 64, "vocab_size": 128},
}
PROMPTS = [[5, 17, 40, 3, 99, 12, 61, 8, 33, 70, 21], [7, 90, 4, 55, 18, 2]]
TOKENS = 6
MARGIN = 1.25


def build_case(case: str, directory: Path, **changes: Any) -> tuple[Device, Any]:
    """A loaded device with the case on it, and the bf16-rounded model in f32."""
    model = save_model(case, directory / "model", torch.bfloat16, **changes)
    encoder = case == "bert"
    request = BucketRequest([(1, 16)], [] if encoder else [(2, 32)])
    build(BuildOptions(str(directory / "model"), directory / "out", request, ParallelOptions(1)), lambda _: None)
    device = Device(open_artifact(directory / "out"), checks=True)
    device.load()
    return device, model


def test_every_supported_architecture_has_a_case() -> None:
    types = {make_config(case).model_type for case in [*CASES, "bert"]}
    assert types == set(SUPPORTED)


@pytest.mark.parametrize("case", CASES)
def test_decoder(case: str, tmp_path: Path) -> None:
    device, rounded = build_case(case, tmp_path, **CASES[case])
    found: dict[int, list[np.ndarray]] = {0: [], 1: []}
    rows = generate(device, PROMPTS, TOKENS, listener=lambda row, _token, logits: found[row].append(logits))
    f32 = make_model(make_config(case, **CASES[case])).float()
    f32.load_state_dict(rounded.state_dict())
    f32, bf16 = f32.float(), rounded.to(torch.bfloat16)
    ours: list[float] = []
    theirs: list[float] = []
    for i, row in enumerate(rows):
        assert row.token_ids == [int(np.argmax(x)) for x in found[i]]
        tokens = torch.tensor([row.prompt_ids + row.token_ids[:-1]])
        with torch.no_grad():
            exact, rough = (
                m(input_ids=tokens).logits[0, len(row.prompt_ids) - 1 :].float().numpy() for m in (f32, bf16)
            )
        ours += [float(np.abs(a - b).mean()) for a, b in zip(found[i], exact, strict=True)]
        theirs += [float(np.abs(a - b).mean()) for a, b in zip(rough, exact, strict=True)]
    assert np.mean(ours) <= MARGIN * np.mean(theirs)
    report = check(device, device.artifact.buckets)
    assert report.agrees, report.to_json()


def test_encoder(tmp_path: Path) -> None:
    device, rounded = build_case("bert", tmp_path, hidden_size=64, intermediate_size=96, vocab_size=128)
    f32 = rounded.float()
    for prompt in PROMPTS:
        with torch.no_grad():
            wanted = f32(input_ids=torch.tensor([prompt])).last_hidden_state[0].mean(0).numpy()
        vector = embed(device, prompt).vector
        assert float(vector @ wanted / np.linalg.norm(vector) / np.linalg.norm(wanted)) >= 0.9995
    assert check(device, device.artifact.buckets).agrees
