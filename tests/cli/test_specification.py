"""The specification's code blocks, each run with `rngdc build` in place of `furiosa-llm build`, and from Python.

The models are stand-ins without weights: a llama with grouped heads and long positions, and EXAONE, a model with code
of its own stored in f16. `pytest -m slow` builds the commands at the sizes of Llama-3.1-8B and EXAONE-3.5. What every
sentence means here, and which test shows it, stands in docs/specification.md, which is checked as well.
"""

from __future__ import annotations

import ast
import json
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from backend_rngd.artifact import Artifact, open_artifact
from ir.errors import UserError
from rngdc import ArtifactBuilder
from tests.cli.conftest import Command
from tests.cli.small_models import write_model
from tests.cli.test_build_problems import refused

ROOT = Path(__file__).parents[2]
TEXT = Path(__file__).parent / "data" / "specification.rst"
SHAPE: dict[str, Any] = {
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 8,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "max_position_embeddings": 131072,
}
EXAONE_SHAPE: dict[str, Any] = {
    "vocab_size": 102400, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 14336, "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
}  # fmt: skip
LLAMA, EXAONE = "meta-llama/Llama-3.1-8B-Instruct", "LGAI-EXAONE/EXAONE-3.5-7.8B-Instruct"
OUT = "/path_to/artifact"
TIMING = ("--weights", "none")


def code_blocks(text: str) -> list[tuple[str, str]]:
    """(heading, command) of every code block of a reStructuredText page; lines that end in a backslash are joined."""
    lines = text.splitlines()
    found: list[tuple[str, str]] = []
    heading = ""
    for i, line in enumerate(lines):
        if i and line and set(line) <= {"-", "="} and lines[i - 1].strip():
            heading = lines[i - 1].strip()
        if line.startswith(".. code-block::"):
            block = [x for x in lines[i + 1 :] if x.strip()]
            count = next((n for n, x in enumerate(block) if not x.startswith(" ")), len(block))
            found.append((heading, "\n".join(x.strip() for x in block[:count]).replace("\\\n", "")))
    return found


BLOCKS = code_blocks(TEXT.read_text("utf-8"))
SYNTAX, COMMANDS = BLOCKS[0], BLOCKS[1:]


@dataclass
class Says:
    """What the text says that a command makes: options that differ from the defaults, and programs."""

    programs: list[str]
    options: dict[str, Any] = field(default_factory=dict[str, Any])


WHOLE = ["prefill_b1_s2048_kv2048", "decode_b1_kv2048"]
CAST = {"auto_bfloat16_cast": True, "trust_remote_code": True}
DEFAULTS: dict[str, Any] = {
    "tensor_parallel_size": 4, "pipeline_parallel_size": 1, "prefill_buckets": (), "decode_buckets": (),
    "max_seq_len_to_capture": None, "prefill_chunk_size": None, "auto_bfloat16_cast": False, "trust_remote_code": False,
}  # fmt: skip


def chunked(chunk: int, prompt: int) -> list[str]:
    """The programs that read a prompt in chunks: all but the last also without logits."""
    names = [f"prefill_b1_s{chunk}_kv{chunk}"]
    names += [f"chunk_b1_s{chunk}_kv{keys}" for keys in range(2 * chunk, prompt + 1, chunk)]
    return [n + suffix for n in names for suffix in ("", "_nologits")][:-1]


EXPECTED = [
    Says(WHOLE),
    Says(["prefill_b1_s4096_kv4096", "decode_b1_kv4096"], {"max_seq_len_to_capture": 4096}),
    Says(
        ["prefill_b1_s512_kv512", "prefill_b1_s1024_kv1024", "decode_b4_kv1024", "decode_b4_kv2048"],
        {"prefill_buckets": ((1, 512), (1, 1024)), "decode_buckets": ((4, 1024), (4, 2048))},
    ),
    Says(WHOLE, {"tensor_parallel_size": 8}),
    Says(WHOLE, {"tensor_parallel_size": 8, "pipeline_parallel_size": 4}),
    Says(WHOLE, CAST),
    Says(
        [*chunked(8192, 32768), "decode_b4_kv32768"],
        {
            "tensor_parallel_size": 8, "max_seq_len_to_capture": 32768, "prefill_chunk_size": 8192,
            "decode_buckets": ((4, 32768),), **CAST,
        },
    ),
    Says(WHOLE),
]  # fmt: skip
BASIC, LENGTH, BUCKETS, TENSOR, PIPELINE, REMOTE, CHUNKS, WORKERS = range(len(EXPECTED))
QUICK = [i for i in range(len(EXPECTED)) if i != CHUNKS]


def names(numbers: list[int]) -> list[str]:
    return ["-".join([*re.findall("[A-Za-z]+", COMMANDS[i][0]), str(i)]) for i in numbers]


def write_exaone(directory: Path, **shape: Any) -> Path:
    """A model that brings its own code, in f16, without weights."""
    model = write_model(directory, weights=False, **shape)
    config = json.loads((model / "config.json").read_text("utf-8"))
    config |= {"model_type": "exaone", "architectures": ["ExaoneForCausalLM"], "dtype": "float16"}
    classes = {"AutoConfig": "ExaoneConfig", "AutoModelForCausalLM": "ExaoneForCausalLM"}
    config["auto_map"] = {kind: f"modeling_exaone.{name}" for kind, name in classes.items()}
    (model / "config.json").write_text(json.dumps(config), "utf-8")
    code = (
        "from transformers import LlamaConfig, LlamaForCausalLM\n\n\n"
        "class ExaoneConfig(LlamaConfig):\n    model_type = 'exaone'\n\n\n"
        "class ExaoneForCausalLM(LlamaForCausalLM):\n    config_class = ExaoneConfig\n"
    )
    (model / "modeling_exaone.py").write_text(code, "utf-8")
    return model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("specification")
    shape = SHAPE | {"num_hidden_layers": 2}
    return {LLAMA: write_model(base / "llama", weights=False, **SHAPE), EXAONE: write_exaone(base / "exaone", **shape)}


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """At their real sizes, EXAONE with two layers: those of a model with its own code are all exported."""
    shape = EXAONE_SHAPE | {"num_hidden_layers": 2}
    exaone = write_exaone(tmp_path_factory.mktemp("real") / "exaone", **shape)
    return {LLAMA: ROOT / "tests" / "configs" / "llama-3.1-8b", EXAONE: exaone}


def arguments(command: str, models: dict[str, Path], out: Path) -> list[str]:
    """The command's arguments, with what exists here in place of the names."""
    words = shlex.split(command)
    assert words[:2] == ["furiosa-llm", "build"]
    known = {**{name: str(path) for name, path in models.items()}, OUT: str(out)}
    assert OUT in words and any(name in words for name in models)
    return ["build", *[known.get(word, word) for word in words[2:]]]


def judge(artifact: Artifact, says: Says, model: Path) -> None:
    """An artifact against what the text says: its options, what they make, and programs that are there."""
    options = artifact.manifest.options
    assert options is not None
    recorded = options.model_dump()
    assert {name: recorded[name] for name in DEFAULTS} == DEFAULTS | says.options
    assert options.model == str(model.absolute())
    parallel = artifact.manifest.parallel
    assert (parallel.tensor, parallel.pipeline) == (options.tensor_parallel_size, options.pipeline_parallel_size)
    assert [b.name for b in artifact.buckets] == says.programs
    assert all(b.instructions > 0 for b in artifact.buckets)
    assert max(b.attention_size for b in artifact.buckets) == (options.max_seq_len_to_capture or 2048)


def build_block(rngdc: Command, number: int, models: dict[str, Path], out: Path) -> dict[str, Any]:
    """Run a command, judge what it made; returns its report."""
    command = COMMANDS[number][1]
    ran = rngdc(*arguments(command, models, out), *TIMING, "--json", "-")
    assert ran.status == 0, ran.err
    judge(open_artifact(out), EXPECTED[number], models[EXAONE if EXAONE in command else LLAMA])
    return ran.json


def test_every_block_of_the_text_is_here() -> None:
    assert len(COMMANDS) == len(EXPECTED) == 8
    assert all(command.startswith("furiosa-llm build ") for _, command in BLOCKS)


def test_the_syntax(rngdc: Command) -> None:
    assert SYNTAX[1] == "furiosa-llm build <MODEL_ID_OR_PATH> <OUTPUT_PATH> [OPTIONS]"
    assert "rngdc build [OPTIONS] [MODEL] [OUT]" in rngdc("build", "--help").out


@pytest.mark.parametrize("number", QUICK, ids=names(QUICK))
def test_the_command(rngdc: Command, models: dict[str, Path], tmp_path: Path, number: int) -> None:
    report = build_block(rngdc, number, models, tmp_path / "artifact")
    assert report["artifact"] == str(tmp_path / "artifact")


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(EXPECTED)), ids=names(list(range(len(EXPECTED)))))
def test_the_command_at_the_real_size(rngdc: Command, real: dict[str, Path], tmp_path: Path, number: int) -> None:
    build_block(rngdc, number, real, tmp_path / "artifact")


def test_workers_are_processes(rngdc: Command, models: dict[str, Path], tmp_path: Path) -> None:
    words = arguments(COMMANDS[WORKERS][1], models, tmp_path / "out")
    ran = rngdc(*words, *TIMING, "--no-cache", "-pb", "1,8", "-db", "1,16", "--json", "-")
    assert ran.status == 0, ran.err
    assert ran.json["worker_memory_bytes"] > 0


def test_chunked_prefill(rngdc: Command, models: dict[str, Path], tmp_path: Path) -> None:
    """The sizes of the example are checked and estimated, an eighth of them is built here."""
    command, says = COMMANDS[CHUNKS][1], EXPECTED[CHUNKS]
    ran = rngdc(*arguments(command, models, tmp_path / "out"), *TIMING, "--dry-run", "--json", "-")
    assert ran.status == 0, ran.err
    assert ran.json["tensor_parallel_size"] == 8
    assert [b["name"] for b in ran.json["buckets"]] == says.programs
    assert len(says.programs) == 8
    small = command.replace("32768", "4096").replace("8192", "1024")
    ran = rngdc(*arguments(small, models, tmp_path / "out"), *TIMING)
    assert ran.status == 0, ran.err
    sizes = {"max_seq_len_to_capture": 4096, "prefill_chunk_size": 1024, "decode_buckets": ((4, 4096),)}
    eighth = Says([*chunked(1024, 4096), "decode_b4_kv4096"], says.options | sizes)
    judge(open_artifact(tmp_path / "out"), eighth, models[EXAONE])


BUILDERS: dict[int, dict[str, Any]] = {
    BASIC: {},
    LENGTH: {"max_seq_len_to_capture": 4096},
    BUCKETS: {"prefill_buckets": [(1, 512), (1, 1024)], "decode_buckets": [(4, 1024), (4, 2048)]},
    PIPELINE: {"pipeline_parallel_size": 4, "tensor_parallel_size": 8},
    REMOTE: {"auto_bfloat16_cast": True, "trust_remote_code": True},
}


@pytest.mark.parametrize("number", BUILDERS, ids=names(list(BUILDERS)))
def test_the_builder_makes_the_same(models: dict[str, Path], tmp_path: Path, number: int, rngdc: Command) -> None:
    command = COMMANDS[number][1]
    model = models[EXAONE if EXAONE in command else LLAMA]
    report = ArtifactBuilder(model, **BUILDERS[number]).build(tmp_path / "python", weights="none")
    made = open_artifact(tmp_path / "python")
    judge(made, EXPECTED[number], model)
    assert report.manifest == made.manifest
    assert rngdc(*arguments(command, models, tmp_path / "command"), *TIMING).status == 0
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


# The page that maps sentences to tests -------------------------------------------------------------------------------
PAGE = ROOT / "docs" / "specification.md"


def functions_of(path: Path) -> dict[str, str]:
    """Test functions of a file with their source."""
    text = path.read_text("utf-8")
    functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef)]
    return {n.name: text for n in functions if n.name.startswith("test_")}


def named_tests(text: str) -> list[tuple[Path, str]]:
    """(file, test or nothing) of every test id in the third column of the page's table."""
    found: list[tuple[Path, str]] = []
    for line in text.splitlines():
        cells = [c.strip() for c in line.split("|")]
        if len(cells) != 5 or set(cells[1]) <= {"-"} or cells[1] == "the specification says":
            continue
        ids = re.findall(r"`([^`]+)`", cells[3])
        assert ids, f"no test shows: {cells[1]}"
        for name in ids:
            path, _, test = name.partition("::")
            found.append((ROOT / (path if path.startswith("tests/") else f"tests/cli/{path}"), test))
    return found


def test_every_test_that_the_page_names_exists() -> None:
    found = named_tests(PAGE.read_text("utf-8"))
    assert len(found) >= 30
    for path, test in found:
        assert path.is_file(), path
        known = functions_of(path)
        name, _, case = test.partition("[")
        assert name in known, f"{path.name}::{test}"
        if case and path == Path(__file__):
            every = names(list(range(len(EXPECTED))))
            assert case.rstrip("]") in every, case


def test_every_command_of_the_text_is_on_the_page() -> None:
    text = PAGE.read_text("utf-8")
    flags = {word for _, command in COMMANDS for word in shlex.split(command) if word.startswith("-")}
    assert flags == {f for f in flags if f"`{f}" in text or f" {f}" in text}
