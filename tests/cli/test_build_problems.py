"""Bad input: every problem at once, exit status 2, nothing left behind, no traceback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.cli.conftest import Command, Ran
from tests.cli.small_models import CONFIG, write_model


def refused(ran: Ran, *texts: str) -> None:
    """The command ended with status 2 and said all of `texts` without a traceback."""
    assert ran.status == 2, ran.err
    for text in texts:
        assert text in ran.err, ran.err
    assert "Traceback" not in ran.err
    assert "internal error" not in ran.err


def problems(ran: Ran) -> int:
    return ran.err.count("error:")


def test_everything_wrong_is_reported_at_once(rngdc: Command, tmp_path: Path) -> None:
    model = write_model(tmp_path / "m", dtype=np.float32, dtype_name="float32")
    out = tmp_path / "out"
    out.mkdir()
    ran = rngdc(
        "build", model, out, "-pb", "1", "-pb", "0,4", "-pb", "1,65", "-db", "a,b", "-tp", "3", "--weights", "some"
    )
    refused(
        ran, "'1' cannot be understood", "'0,4'", "'a,b'", "-tp 3", "--weights 'some'", f"{out} exists",
        "-pb 1,65 is too long", "--auto-bfloat16-cast", "without a decode bucket",
    )  # fmt: skip
    assert problems(ran) == 9
    assert list(out.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "texts"),
    [
        ({"model_type": "nonesuch"}, ["unknown architecture", "nonesuch", "llama"]),
        ({"model_type": "gptj"}, ["gptj is not supported", "AttentionInterface"]),
        ({"architectures": ["A", "B"]}, ["more than one architecture"]),
        ({"num_attention_heads": 3}, ["config.json", "is not valid", "multiple of the number of attention heads"]),
        ({"rms_norm_eps": "small"}, ["config.json", "is not valid", "rms_norm_eps"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["quantised (gptq)"]),
    ],
)
def test_models_that_cannot_be_built(rngdc: Command, tmp_path: Path, change: dict[str, Any], texts: list[str]) -> None:
    model = write_model(tmp_path / "m", **change)
    refused(rngdc("build", model, tmp_path / "out"), *texts)
    assert not (tmp_path / "out").exists()


def test_missing_config_and_missing_directory(rngdc: Command, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(rngdc("build", tmp_path / "empty", tmp_path / "out"), "has no config.json")
    refused(rngdc("build", tmp_path / "nowhere", tmp_path / "out"), "does not exist")


def test_config_that_is_no_json(rngdc: Command, tmp_path: Path) -> None:
    model = write_model(tmp_path / "m")
    (model / "config.json").write_text("{", "utf-8")
    refused(rngdc("build", model, tmp_path / "out"), "config.json cannot be read")


def test_unreadable_weights(rngdc: Command, tmp_path: Path) -> None:
    model = write_model(tmp_path / "m")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(rngdc("build", model, tmp_path / "out"), "is truncated")
    weights.unlink()
    refused(rngdc("build", model, tmp_path / "out"), "has no *.safetensors", "--weights none")


def test_missing_and_misshapen_weights_are_listed_together(rngdc: Command, tmp_path: Path) -> None:
    model = write_model(tmp_path / "m")
    config = json.loads((model / "config.json").read_text("utf-8")) | {"num_hidden_layers": 3, "vocab_size": 200}
    (model / "config.json").write_text(json.dumps(config), "utf-8")
    ran = rngdc("build", model, tmp_path / "out")
    refused(ran, "lm_head.weight has another shape", "model.layers.2.mlp.up_proj.weight is missing")
    assert problems(ran) == 9 + 2


def test_half_precision_needs_consent(rngdc: Command, tmp_path: Path) -> None:
    model = write_model(tmp_path / "m", dtype=np.float16)
    refused(rngdc("build", model, tmp_path / "out"), "f16", "--auto-bfloat16-cast")
    ran = rngdc("build", model, tmp_path / "out", "-pb", "1,8", "-db", "1,16", "--auto-bfloat16-cast")
    assert ran.status == 0, ran.err


def test_one_phase_without_the_other(rngdc: Command, model: Path, tmp_path: Path) -> None:
    refused(rngdc("build", model, tmp_path / "out", "-pb", "1,8"), "without a decode bucket", "-db 1,64")
    refused(rngdc("build", model, tmp_path / "out", "-db", "4,32"), "without a prefill bucket", "-pb 1,32")
    refused(rngdc("build", model, tmp_path / "out", "-pb", "1,32", "-db", "1,16"), "longer than every decode bucket")


def test_a_size_the_backend_cannot_do(rngdc: Command, tmp_path: Path) -> None:
    model = write_model(tmp_path / "m", head_dim=12)
    ran = rngdc("build", model, tmp_path / "out", "-pb", "1,8", "-db", "1,16")
    refused(ran, "prefill_b1_s8_kv8:", "decode_b1_kv16:", "multiples of 8")


def test_options_of_the_wrong_kind(rngdc: Command, model: Path, tmp_path: Path) -> None:
    for arguments in (["-tp", "x"], ["--nonsense"], ["--num-layers", "0"]):
        ran = rngdc("build", model, tmp_path / "out", *arguments)
        assert ran.status == 2
        assert "Traceback" not in ran.err
    assert rngdc("build").status == 2
    assert rngdc("frobnicate").status == 2


def test_existing_output_is_left_alone(rngdc: Command, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine", "utf-8")
    refused(rngdc("build", model, out), "exists", "--overwrite")
    refused(rngdc("build", model, out, "--overwrite"), "no artifact.json")
    assert (out / "thesis.txt").read_text("utf-8") == "mine"


def test_config_has_what_the_tests_assume() -> None:
    assert CONFIG["max_position_embeddings"] == 64
