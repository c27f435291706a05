"""Every command of the specification, with `rngdc build` in place of `furiosa-llm build`, and the same from Python.

The models are stand-ins without weights that exist here: a llama with grouped heads and long positions, once stored in
bf16 and once in f16. docs/specification.md says which sentence is shown where.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from backend_rngd.artifact import Artifact, open_artifact
from ir.errors import UserError
from rngdc import ArtifactBuilder
from tests.cli.conftest import Command
from tests.cli.small_models import write_model
from tests.cli.test_build_problems import refused

SHAPE: dict[str, Any] = {
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 8,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "max_position_embeddings": 131072,
}
LLAMA, EXAONE = "meta-llama/Llama-3.1-8B-Instruct", "LGAI-EXAONE/EXAONE-3.5-7.8B-Instruct"
OUT = "/path_to/artifact"

# name, command, processing elements, stages, programs
EXAMPLES: list[tuple[str, str, int, int, list[str]]] = [
    ("basic", f"furiosa-llm build {LLAMA} {OUT}", 4, 1, ["prefill_b1_s2048_kv2048", "decode_b1_kv2048"]),
    (
        "context length", f"furiosa-llm build {LLAMA} {OUT} --max-seq-len-to-capture 4096", 4, 1,
        ["prefill_b1_s4096_kv4096", "decode_b1_kv4096"],
    ),
    (
        "buckets", f"furiosa-llm build {LLAMA} {OUT} -pb 1,512 -pb 1,1024 -db 4,1024 -db 4,2048", 4, 1,
        ["prefill_b1_s512_kv512", "prefill_b1_s1024_kv1024", "decode_b4_kv1024", "decode_b4_kv2048"],
    ),
    (
        "tensor parallelism", f"furiosa-llm build {LLAMA} {OUT} --tensor-parallel-size 8", 8, 1,
        ["prefill_b1_s2048_kv2048", "decode_b1_kv2048"],
    ),
    (
        "pipeline parallelism",
        f"furiosa-llm build {LLAMA} {OUT} --pipeline-parallel-size 4 --tensor-parallel-size 8", 8, 4,
        ["prefill_b1_s2048_kv2048", "decode_b1_kv2048"],
    ),
    (
        "remote code and cast", f"furiosa-llm build {EXAONE} {OUT} --auto-bfloat16-cast --trust-remote-code", 4, 1,
        ["prefill_b1_s2048_kv2048", "decode_b1_kv2048"],
    ),
    (
        "workers", f"furiosa-llm build {LLAMA} {OUT} --num-pipeline-builder-workers 4 --num-compile-workers 4", 4, 1,
        ["prefill_b1_s2048_kv2048", "decode_b1_kv2048"],
    ),
]  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("specification")
    made = {LLAMA: write_model(base / "llama", weights=False, **SHAPE)}
    made[EXAONE] = write_model(base / "exaone", weights=False, **SHAPE)
    config = made[EXAONE] / "config.json"
    config.write_text(config.read_text("utf-8").replace("bfloat16", "float16"), "utf-8")
    return made


def arguments(command: str, models: dict[str, Path], out: Path) -> list[str]:
    """The command's arguments, with what exists here in place of the names."""
    words = shlex.split(command)
    assert words[:2] == ["furiosa-llm", "build"]
    known = {**{name: str(path) for name, path in models.items()}, OUT: str(out)}
    return ["build", *[known.get(word, word) for word in words[2:]]]


def judge(artifact: Artifact, tensor: int, pipeline: int, programs: list[str]) -> None:
    parallel = artifact.manifest.parallel
    assert (parallel.tensor, parallel.pipeline) == (tensor, pipeline)
    assert [b.name for b in artifact.buckets] == programs
    assert all(b.instructions > 0 for b in artifact.buckets)


@pytest.mark.parametrize(("name", "command", "tensor", "pipeline", "programs"), EXAMPLES, ids=lambda x: str(x)[:20])
def test_the_command(
    rngdc: Command, models: dict[str, Path], tmp_path: Path, name: str, command: str, tensor: int, pipeline: int,
    programs: list[str],
) -> None:  # fmt: skip
    out = tmp_path / "artifact"
    ran = rngdc(*arguments(command, models, out), "--weights", "none")
    assert ran.status == 0, ran.err
    judge(open_artifact(out), tensor, pipeline, programs)


CHUNKED = (
    f"furiosa-llm build {EXAONE} {OUT} -tp 8 --max-seq-len-to-capture 32768 --prefill-chunk-size 8192 -db 4,32768 "
    "--auto-bfloat16-cast --trust-remote-code"
)


def test_chunked_prefill(rngdc: Command, models: dict[str, Path], tmp_path: Path) -> None:
    """The sizes of the example are checked and estimated; an eighth of them is built (docs/status.md: long keys)."""
    plan = rngdc(*arguments(CHUNKED, models, tmp_path / "out"), "--weights", "none", "--dry-run", "--json", "-").json
    assert plan["tensor_parallel_size"] == 8
    names = [
        f"{phase}_b1_s8192_kv{keys}{suffix}"
        for phase, keys in (("prefill", 8192), ("chunk", 16384), ("chunk", 24576), ("chunk", 32768))
        for suffix in ("", "_nologits")
    ]
    assert [b["name"] for b in plan["buckets"]] == [*names[:-1], "decode_b4_kv32768"]
    small = CHUNKED.replace("32768", "4096").replace("8192", "1024")
    ran = rngdc(*arguments(small, models, tmp_path / "out"), "--weights", "none")
    assert ran.status == 0, ran.err
    names = [n.replace("8192", "1024") for n in names]
    for long, short in (("16384", "2048"), ("24576", "3072"), ("32768", "4096")):
        names = [n.replace(long, short) for n in names]
    judge(open_artifact(tmp_path / "out"), 8, 1, [*names[:-1], "decode_b4_kv4096"])


BUILDERS: dict[str, dict[str, Any]] = {
    "basic": {},
    "context length": {"max_seq_len_to_capture": 4096},
    "buckets": {"prefill_buckets": [(1, 512), (1, 1024)], "decode_buckets": [(4, 1024), (4, 2048)]},
    "pipeline parallelism": {"pipeline_parallel_size": 4, "tensor_parallel_size": 8},
    "remote code and cast": {"auto_bfloat16_cast": True, "trust_remote_code": True},
}


@pytest.mark.parametrize("name", BUILDERS)
def test_the_builder_makes_the_same(models: dict[str, Path], tmp_path: Path, name: str, rngdc: Command) -> None:
    _, command, tensor, pipeline, programs = next(e for e in EXAMPLES if e[0] == name)
    model = models[EXAONE if EXAONE in command else LLAMA]
    report = ArtifactBuilder(model, **BUILDERS[name]).build(tmp_path / "python", weights="none")
    made = open_artifact(tmp_path / "python")
    judge(made, tensor, pipeline, programs)
    assert report.manifest == made.manifest
    assert rngdc(*arguments(command, models, tmp_path / "command"), "--weights", "none").status == 0
    assert open_artifact(tmp_path / "command").manifest.digest == made.manifest.digest


def test_the_builder_reports_all_problems_before_any_work(models: dict[str, Path], tmp_path: Path) -> None:
    wrong: Any = [(1, 2, 3)]
    builder = ArtifactBuilder(
        models[EXAONE],
        tensor_parallel_size=3,
        prefill_buckets=wrong,
        decode_buckets=[(0, 5)],
    )
    for attempt in (lambda: builder.build(tmp_path / "out", weights="none"), builder.dry_run):
        with pytest.raises(UserError) as refusal:
            attempt()
        found = " ".join(p.what for p in refusal.value.problems)
        for text in ("(1, 2, 3)", "(0, 5)", "-tp 3", "f16"):
            assert text in found
    assert list(tmp_path.iterdir()) == []


def test_the_builder_with_random_weights_and_a_name(models: dict[str, Path], tmp_path: Path) -> None:
    builder = ArtifactBuilder(
        models[LLAMA], "mine", seed_for_random_weight=3, num_hidden_layers=1, tensor_parallel_size=1,
        prefill_buckets=[(1, 8)], decode_buckets=[(1, 16)],
    )  # fmt: skip
    plan = builder.dry_run()
    assert plan.to_json()["num_layers"] == 1
    manifest = builder.build(tmp_path / "out").manifest
    assert (manifest.name, manifest.weights_mode, manifest.model.num_layers) == ("mine", "random:3", 1)


def test_without_the_cast_flag_a_float16_model_is_an_error(
    rngdc: Command, models: dict[str, Path], tmp_path: Path
) -> None:
    refused(rngdc("build", models[EXAONE], tmp_path / "out", "--weights", "none"), "f16", "--auto-bfloat16-cast")


def test_a_local_path_starts_with_a_dot_or_a_slash(
    rngdc: Command, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(models[LLAMA].parent)
    assert rngdc("build", "./llama", "--dry-run", "--weights", "none").status == 0
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert rngdc("build", "llama/x", "--dry-run", "--weights", "none").status == 2


@pytest.mark.parametrize("size", ["1", "2", "4", "8"])
def test_powers_of_two(rngdc: Command, models: dict[str, Path], size: str) -> None:
    ran = rngdc(
        "build",
        models[LLAMA],
        "--dry-run",
        "--weights",
        "none",
        "-tp",
        size,
        "-pb",
        "1,8",
        "-db",
        "1,16",
        "--json",
        "-",
    )
    assert ran.json["tensor_parallel_size"] == int(size)


def test_stages_can_be_overridden_when_loading_and_tensor_parallelism_cannot(
    rngdc: Command, models: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    built = rngdc("build", models[LLAMA], out, "--weights", "none", "-tp", "2", "-pp", "2", "-pb", "1,8", "-db", "1,16")
    assert built.status == 0, built.err
    assert rngdc("simulate", out, "--json", "-").json["pipeline"] == 2
    assert rngdc("simulate", out, "-pp", "4", "--json", "-").json["pipeline"] == 4
    assert rngdc("simulate", out, "-tp", "4").status == 2
