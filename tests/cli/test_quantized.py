"""Quantized model directories through the command: build, check, run, on one processing element and on several."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from backend_rngd.artifact import open_artifact
from ir.interpreter import run
from ir.text import parse_module
from rngdc.check import sample_inputs
from rngdc.compare_passes import arguments, widened
from runtime_sim.runtime import Device
from tests.cli.conftest import Command
from tests.cli.quantized_models import Array, write_quantized
from tests.cli.small_models import write_model


def rms(x: Array) -> float:
    """Root mean square."""
    return float(np.sqrt(np.mean(np.square(x.astype(np.float64)))))


@pytest.mark.parametrize(
    ("scheme", "units"),
    [("int8", 1), ("fp8-channel", 1), ("fp8-tensor", 2), ("int4-32", 1), ("int8", 4), ("int4-32", 2)],
)
def test_builds_and_agrees(rngdc: Command, tmp_path: Path, scheme: str, units: int) -> None:
    write_quantized(tmp_path / "m", scheme)
    out = tmp_path / "a"
    ran = rngdc("build", tmp_path / "m", out, "-pb", "1,16", "-db", "2,32", "-tp", units)
    assert ran.status == 0, ran.err
    ran = rngdc("check", out, "--json", "-")
    assert ran.status == 0, ran.err
    assert ran.json["agrees"] and len(ran.json["buckets"]) == 2
    manifest = open_artifact(out).manifest
    kinds = {p.dtype for p in manifest.placements if "_proj" in p.weight and not p.weight.endswith("_scale")}
    assert kinds == {{"int8": "i8", "fp8": "f8e4m3", "int4": "i32"}[scheme.split("-")[0]]}


@pytest.mark.parametrize("scheme", ["int8", "fp8-channel", "fp8-tensor", "int4-32"])
def test_error_is_that_of_the_scheme(rngdc: Command, tmp_path: Path, scheme: str) -> None:
    """Logits of the streams against the dequantized model in f32, compared with the scheme's own arithmetic between
    results in bf16: sums and scales exact, every operation rounded once."""
    values = write_quantized(tmp_path / "m", scheme)
    write_model(tmp_path / "plain")
    assert rngdc("build", tmp_path / "m", tmp_path / "a", "-pb", "1,16", "-db", "1,32", "-tp", 1).status == 0
    assert rngdc("build", tmp_path / "plain", tmp_path / "p", "-pb", "1,16", "-db", "1,32", "-tp", 1).status == 0
    artifact = open_artifact(tmp_path / "a")
    device = Device(artifact)
    device.load()
    bucket = artifact.buckets[0]
    assert bucket.phase == "prefill"
    stored = open_artifact(tmp_path / "p").weight

    def dequantized(name: str) -> Array:
        return values[name] if name in values else stored(name)

    plain = widened(parse_module(open_artifact(tmp_path / "p").text("ir/model.mlir")))
    bound = parse_module(artifact.text("ir/model.mlir"))
    ours, theirs, size = [], [], []
    for seed in range(12):
        inputs = sample_inputs(artifact, bucket, parse_module(artifact.text(bucket.ir)), seed)
        device.clear_caches()
        found = device.run(bucket, inputs)["logits"][:, 0]
        rows = np.arange(len(inputs["last"])), inputs["last"]
        reference = run(plain, arguments(plain, inputs), dequantized)["logits"][rows]
        scheme_alone = run(bound, arguments(bound, inputs), artifact.weight)["logits"][rows].astype(np.float32)
        ours.append(rms(found - reference))
        theirs.append(rms(scheme_alone - reference))
        size.append(rms(reference))
    assert np.mean(ours) <= 1.1 * np.mean(theirs)
    assert np.mean(ours) < 0.3 * np.mean(size)


def test_other_methods_are_refused_before_any_work(rngdc: Command, tmp_path: Path) -> None:
    for method in ("gptq", "awq", "bitsandbytes", "fp8"):
        directory = tmp_path / method
        write_quantized(directory, "int8")
        config = json.loads((directory / "config.json").read_text("utf-8"))
        config["quantization_config"] = {"quant_method": method, "bits": 4}
        (directory / "config.json").write_text(json.dumps(config), "utf-8")
        ran = rngdc("build", directory, tmp_path / "out", "-tp", 1)
        assert ran.status == 2
        assert f"quantised ({method})" in ran.err and "fix:" in ran.err
        assert not (tmp_path / "out").exists()


def test_timing_needs_no_weights(rngdc: Command, tmp_path: Path) -> None:
    write_quantized(tmp_path / "m", "int4-32")
    (tmp_path / "m" / "model.safetensors").unlink()
    ran = rngdc("build", tmp_path / "m", tmp_path / "a", "-pb", "1,16", "-db", "1,32", "-tp", 1, "--weights", "none")
    assert ran.status == 0, ran.err
    assert rngdc("simulate", tmp_path / "a").status == 0
