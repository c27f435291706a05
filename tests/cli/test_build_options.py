"""Options of `rngdc build`: parallelism, a YAML file, dry runs, build reports, suggested buckets."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import typer

from backend_rngd.artifact import open_artifact
from rngdc import ArtifactBuilder
from rngdc.commands.app import app
from rngdc.suggest import GRANULE, read_lengths, suggest
from tests.cli.conftest import Command
from tests.cli.small_models import write_model
from tests.cli.test_build_problems import problems, refused

CONFIGS = Path(__file__).parents[1] / "configs"
TIMING = ("--weights", "none", "--dry-run")


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        (["-tp", "0"], ["-tp 0", "power of two", "1, 2, 4 or 8 on a card, or 16 or 32 over several"]),
        (["-tp", "6"], ["-tp 6", "power of two"]),
        (["--tensor-parallel-size", "64"], ["-tp 64", "at most 4 cards", "pipeline stages (-pp)"]),
        (["-pp", "0"], ["-pp 0", "at least one stage"]),
        (["--pipeline-parallel-size", "3"], ["-pp 3", "the model has 2 layers", "use 1 to 2"]),
        (["-pp", "2", "--num-hidden-layers", "1"], ["-pp 2", "the model has 1 layers"]),
        (["--num-hidden-layers", "3"], ["--num-hidden-layers 3", "the model has 2 layers"]),
        (["-tp", "2", "--tensor-parallel-plan", "nowhere.yaml"], ["nowhere.yaml", "no such file"]),
        (["--name", "a\nb"], ["--name"]),
    ],
)
def test_refused_values_say_what_is_possible(
    rngdc: Command, model: Path, tmp_path: Path, arguments: list[str], texts: list[str]
) -> None:
    ran = rngdc("build", model, tmp_path / "out", "-pb", "1,8", "-db", "1,16", *arguments)
    refused(ran, *texts)
    assert problems(ran) == 1
    assert not (tmp_path / "out").exists()


def test_defaults_of_the_specification(rngdc: Command) -> None:
    plan = rngdc("build", CONFIGS / "llama-3.1-8b", *TIMING, "--json", "-").json
    assert (plan["tensor_parallel_size"], plan["pipeline_parallel_size"]) == (4, 1)
    assert [b["name"] for b in plan["buckets"]] == ["prefill_b1_s2048_kv2048", "decode_b1_kv2048"]
    text = " ".join(rngdc("build", "--help").out.split())
    for option, default in (  # those that the specification, or the product, has
        ("-tp, --tensor-parallel-size N", "4"), ("-pp, --pipeline-parallel-size N", "1"),
        ("--max-model-len N", "2048"), ("-pb, --prefill-buckets B,S", "longest sequence"),
        ("--num-pipeline-builder-workers N", "1"), ("--num-compile-workers N", "1"), ("--weights MODE", "link"),
        ("--trust-remote-code", "off"), ("--auto-bfloat16-cast", "off"), ("--prefill-chunk-size N", "no chunks"),
    ):  # fmt: skip
        described = text[text.index(option) :]
        described = described[described.index("[default: ") : described.index("]", described.index("[default: "))]
        assert re.search(rf"\b{default}\b", described), (option, described)


def test_help_shows_every_default() -> None:
    """Of every option there is, and what it says is what happens without it."""
    command: Any = typer.main.get_command(app).commands["build"]  # type: ignore[attr-defined]
    context = click.Context(command)
    shown = 0
    for option in command.params:
        record = option.get_help_record(context)
        if record is None or not option.opts[0].startswith("-") or option.name == "help":
            continue
        described = " ".join(record[1].split())
        found = re.search(r"\[default: (.+)\]$", described)
        assert found, f"{option.opts[0]}: {described}"
        if isinstance(option.default, int) and not isinstance(option.default, bool):
            assert found[1] == str(option.default), option.name
        shown += 1
    assert shown >= 32
    defaults = inspect.signature(ArtifactBuilder.__init__).parameters
    for name in ("tensor_parallel_size", "pipeline_parallel_size", "opt_level"):
        assert defaults[name].default == next(p.default for p in command.params if p.name == name)


def test_a_model_that_fits_no_card(rngdc: Command) -> None:
    model = CONFIGS / "llama-3.1-70b"
    refused(rngdc("build", model, *TIMING, "-tp", "1"), "does not fit with -tp 1 -pp 1", "-tp 8 -pp 3", "-tp 32")


def test_dry_run(rngdc: Command, tmp_path: Path) -> None:
    ran = rngdc("build", CONFIGS / "llama-3.1-8b", "-tp", "1", "-pb", "1,512", "-db", "4,1024", *TIMING, "--json", "-")
    assert ran.status == 0, ran.err
    plan = ran.json
    weights = 8_030_261_312 * 2  # parameters in bf16; the rotary table is literal
    assert plan["hbm_bytes_per_pe"]["weights"] == pytest.approx(weights, rel=1e-4)
    assert plan["hbm_bytes_per_pe"]["caches"] == 32 * 2 * 4 * 8 * 1024 * 128 * 2
    prefill, decode = plan["buckets"]
    # A matrix product per parameter (the table of embeddings is none) and token; the head reads one token only.
    layers, head = 8_030_261_312 - 2 * 128256 * 4096, 128256 * 4096
    scores = 2 * 32 * 128 * 512 * 512 * 32
    assert prefill["macs_per_pe"] == pytest.approx(layers * 512 + head + scores, rel=1e-3)
    assert prefill["estimated_us"] == prefill["arithmetic_us"] > prefill["hbm_us"] > 0
    assert decode["estimated_us"] == decode["hbm_us"] > decode["arithmetic_us"] > 0
    assert decode["collectives"] == 0
    assert 1 < plan["estimated_build_seconds"] < 100
    text = rngdc("build", CONFIGS / "llama-3.1-8b", tmp_path / "out", "-tp", "1", *TIMING)
    assert "prefill_b1_s2048_kv2048" in text.out
    assert "of 51.00 GB" in text.out
    assert list(tmp_path.iterdir()) == []


def test_dry_run_finds_what_a_build_finds(rngdc: Command, tmp_path: Path) -> None:
    model = write_model(tmp_path / "m", dtype=np.float16)
    (tmp_path / "out").mkdir()
    ran = rngdc("build", model, tmp_path / "out", "--dry-run", "-tp", "5", "-pb", "1,x", "-db", "1,65")
    refused(ran, "-tp 5", "'1,x'", "-db 1,65 is too long", "--auto-bfloat16-cast", "out exists")


def test_the_name_is_kept(rngdc: Command, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert rngdc("build", model, out, "-pb", "1,8", "-db", "1,8", "--name", "my llama").status == 0
    assert open_artifact(out).manifest.name == "my llama"
    assert rngdc("inspect", out, "--json", "-").json["name"] == "my llama"
    assert "my llama" in rngdc("inspect", out).out


def test_build_report(rngdc: Command, model: Path, tmp_path: Path) -> None:
    for name in ("report.json", "report.md"):
        arguments = ("-pb", "1,8", "-db", "1,8", "--overwrite", "--no-cache", "--build-report", tmp_path / name)
        assert rngdc("build", model, tmp_path / "out", *arguments).status == 0
    report = json.loads((tmp_path / "report.json").read_text("utf-8"))
    assert set(report["steps"]) == set(report["streams"]) == {"prefill_b1_s8_kv8", "decode_b1_kv8"}
    for times in report["steps"].values():
        assert {"lower", "place", "schedule", "emit", "verify"} <= set(times)
    counted = sum(t for times in report["steps"].values() for t in times.values())
    assert counted <= report["seconds"]["backend"] + 0.1
    text = (tmp_path / "report.md").read_text("utf-8")
    assert "| decode_b1_kv8 |" in text
    assert "| backend |" in text


def test_options_from_a_file(rngdc: Command, tmp_path: Path) -> None:
    model = write_model(tmp_path / "m", weights=False)
    file = tmp_path / "build.yaml"
    file.write_text(
        f"model: {model}\nprefill-buckets: [[1, 8], '1,16']\ndecode_buckets: [2, 32]\nweights: none\n"
        "dry-run: true\npipeline-parallel-size: 2\n",
        "utf-8",
    )
    plan = rngdc("build", "--config", file, "--json", "-").json
    assert [b["name"] for b in plan["buckets"]] == ["prefill_b1_s8_kv8", "prefill_b1_s16_kv16", "decode_b2_kv32"]
    assert plan["pipeline_parallel_size"] == 2
    plan = rngdc("build", "-pp", "1", "--config", file, "-db", "1,24", "--json", "-").json
    assert [b["name"] for b in plan["buckets"]] == ["prefill_b1_s8_kv8", "prefill_b1_s16_kv16", "decode_b1_kv24"]
    assert plan["pipeline_parallel_size"] == 1


def test_files_that_are_wrong(rngdc: Command, tmp_path: Path) -> None:
    file = tmp_path / "build.yaml"
    file.write_text("tensor-paralel-size: 4\nweights: [a, b]\nfrob: 1\n", "utf-8")
    ran = rngdc("build", "--config", file)
    refused(ran, "tensor-paralel-size", "did you mean tensor-parallel-size?", "weights", "takes one value", "frob")
    assert problems(ran) == 3
    for text, found in (("- a\n", "no mapping"), ("a: [", "is no YAML")):
        file.write_text(text, "utf-8")
        refused(rngdc("build", "--config", file), found)
    refused(rngdc("build", "--config", tmp_path / "nowhere.yaml"), "cannot be read")
    file.write_text("tensor-parallel-size: four\n", "utf-8")
    ran = rngdc("build", "--config", file, "m", "o")
    assert ran.status == 2
    assert "--tensor-parallel-size" in ran.err
    assert "integer" in ran.err


def test_model_and_output_are_needed(rngdc: Command, model: Path) -> None:
    refused(rngdc("build"), "no model was given")
    refused(rngdc("build", model), "no output was given", "rngdc build")


# Suggested buckets ---------------------------------------------------------------------------------------------------
def test_suggested_buckets_can_be_built(rngdc: Command, tmp_path: Path) -> None:
    file = tmp_path / "lengths.csv"
    file.write_text("id,prompt_tokens,output_tokens\n" + "".join(f"{i},{30 + i},{10}\n" for i in range(20)), "utf-8")
    ran = rngdc("build", "--suggest-buckets", file)
    assert ran.status == 0, ran.err
    model = write_model(tmp_path / "m", weights=False, max_position_embeddings=128)
    plan = rngdc("build", model, *ran.out.splitlines()[0].split(), *TIMING, "--json", "-")
    assert plan.status == 0, plan.err
    assert [b["name"] for b in plan.json["buckets"]] == ["prefill_b1_s64_kv64", "decode_b1_kv64"]


def test_suggestions_are_cheapest() -> None:
    """Two clusters of prompts get their own bucket; the cost is that of the best single cut, found by trying all."""
    rng = np.random.default_rng(3)
    prompts = np.concatenate([rng.integers(10, 130, 50), rng.integers(900, 1000, 20)])
    found = suggest(np.stack([prompts, np.full(70, 5)], 1))
    sizes = sorted({-(-int(p) // GRANULE) * GRANULE for p in prompts})
    best = min(
        sum(min(b for b in (cut, sizes[-1]) if b >= p) for p in prompts) for cut in sizes
    )  # fmt: skip
    ours = sum(min(b for b in found.prefill.lengths if b >= p) for p in prompts)
    assert len(found.prefill.lengths) >= 2
    assert ours <= best
    assert found.prefill.overhead == pytest.approx(ours / prompts.sum())
    assert max(found.decode.lengths) >= max(prompts) + 5


def test_a_long_prompt_without_an_answer_still_fits() -> None:
    found = suggest(np.array([[1000, 0], [10, 3]]))
    assert max(found.decode.lengths) >= 1000
    assert max(found.prefill.lengths) >= 1000


def test_traces_that_are_wrong(rngdc: Command, tmp_path: Path) -> None:
    file = tmp_path / "lengths.csv"
    for text, found in (
        ("", "has no requests"),
        ("a,b\n1,2\n", "has no lengths"),
        ("5,x\n7\n", "lengths.csv has no lengths"),
        ("5,6\n7\n0,3\n", "lengths.csv:2"),
    ):
        file.write_text(text, "utf-8")
        refused(rngdc("build", "--suggest-buckets", file), found)
    refused(rngdc("build", "--suggest-buckets", tmp_path / "nowhere.csv"), "cannot be read")
    file.write_text("\n5,6\n8, 9\n", "utf-8")
    assert read_lengths(file).tolist() == [[5, 6], [8, 9]]
