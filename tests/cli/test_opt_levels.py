"""-O0 to -O3: the same numbers, better times, different keys; and cards that a build is checked against."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from backend_rngd.artifact import open_artifact
from backend_rngd.machine import load_machine
from rngdc import ArtifactBuilder
from rngdc.cards import room_of, stages_of
from rngdc.effort import EFFORTS, Variant
from rngdc.estimate import Memory, memory_problems
from rngdc.options import ParallelOptions
from tests.cli.conftest import Command
from tests.cli.small_models import write_model
from tests.cli.test_workers import files

SIZES = ("-pb", "1,32", "-db", "2,48")
LEVELS = ("0", "1", "2", "3")
PROMPTS = ("5,17,99,3,42,8", "7", "64,32,16,8")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose weights take longer to fetch than to wait for."""
    directory = tmp_path_factory.mktemp("wide") / "llama"
    return write_model(directory, hidden_size=256, intermediate_size=2048, num_attention_heads=8)


def test_levels_compute_the_same_and_are_never_slower(rngdc: Command, wide: Path, tmp_path: Path) -> None:
    cycles: dict[str, list[float]] = {}
    tokens: dict[str, list[list[int]]] = {}
    for level in LEVELS:
        out = tmp_path / level
        ran = rngdc("build", wide, out, *SIZES, "-tp", "2", f"-O{level}", "--cache-dir", tmp_path / "cache")
        assert ran.status == 0, ran.err
        options = open_artifact(out).manifest.options
        assert options is not None and options.opt_level == int(level)
        assert (f"-O {level}" in options.command("out")) == (level != "2")
        cycles[level] = [
            b["cycles"] for b in rngdc("simulate", out, "--mode", "silicon", "--json", "-").json["buckets"]
        ]
        runs = [rngdc("run", out, "--prompt-ids", p, "--max-tokens", "3", "--json", "-") for p in PROMPTS]
        tokens[level] = [ran.json["token_ids"] for ran in runs]
    assert tokens["1"] == tokens["2"] == tokens["3"]
    # Unfused operations round more often, which a close pair of candidates of a random model may show.
    assert sum(a[0] == b[0] for a, b in zip(tokens["0"], tokens["2"], strict=True)) >= len(PROMPTS) - 1
    for better, worse in (("1", "0"), ("2", "1"), ("3", "2")):
        assert all(a <= b for a, b in zip(cycles[better], cycles[worse], strict=True)), (better, cycles)
    assert sum(cycles["2"]) < sum(cycles["1"]) < sum(cycles["0"]), cycles


@pytest.mark.parametrize("level", ["0", "3"])
def test_levels_agree_with_every_reference(rngdc: Command, model: Path, tmp_path: Path, level: str) -> None:
    out = tmp_path / "out"
    assert rngdc("build", model, out, "-pb", "1,16", "-db", "1,32", "-tp", "2", "-O", level).status == 0
    ran = rngdc("check", out, "--json", "-")
    assert ran.status == 0 and ran.json["agrees"], ran.out


def test_levels_do_not_share_programs(rngdc: Command, model: Path, tmp_path: Path) -> None:
    """What one level left in the cache is no program of another."""
    cache = ("--cache-dir", tmp_path / "cache", *SIZES, "-tp", "1")
    for level in ("0", "2"):
        assert rngdc("build", model, tmp_path / level, *cache, f"-O{level}").status == 0
    assert rngdc("build", model, tmp_path / "alone", *cache[2:], "--no-cache").status == 0
    assert files(tmp_path / "2") == files(tmp_path / "alone") != files(tmp_path / "0")


def test_what_the_levels_do_is_printed(rngdc: Command) -> None:
    texts = [rngdc("build", "--print-pipeline", f"-O{level}").out for level in LEVELS]
    assert len(set(texts)) == 4
    assert "fuse-elementwise" not in texts[0] and "fuse-elementwise" in texts[1]
    assert "rngd-hoist" not in texts[1] and "rngd-hoist" in texts[2]
    assert "6 variants" in texts[3]
    text = " ".join(rngdc("build", "--help").out.split())
    assert all(effort.help in text for effort in EFFORTS)
    # A level tries what the level below does.
    for lower, higher in pairwise(EFFORTS[1:]):
        assert set(lower.variants) <= set(higher.variants)
    assert len(set(EFFORTS[3].variants)) == len(EFFORTS[3].variants) and Variant() in EFFORTS[2].variants


# Cards ---------------------------------------------------------------------------------------------------------------
MACHINE = load_machine("rngd")


@pytest.mark.parametrize(
    ("text", "tensor", "stages"),
    [
        ("1", 8, [1]), ("2", 4, [2, 2]), ("4", 16, [1, 1]), ("4", 32, [1]), ("3", 16, [1]), ("npu:3:*", 2, [4]),
        ("npu:0:0-3,npu:1:0-3", 4, [1, 1]), ("npu:0:0-3,npu:1:0-3", 8, [0, 0]), ("npu:0,npu:1:0-3", 16, []),
    ],
)  # fmt: skip
def test_stages_that_devices_have_room_for(text: str, tensor: int, stages: list[int]) -> None:
    room = room_of(text, MACHINE, [])
    assert room is not None
    assert stages_of(room, tensor, MACHINE) == stages


def test_devices_are_kept(rngdc: Command, model: Path, tmp_path: Path) -> None:
    out, timing = tmp_path / "out", ("--weights", "none")
    ran = rngdc("build", model, out, *SIZES, *timing, "-tp", "4", "-pp", "2", "--devices", "npu:0:0-3,npu:1:4-7")
    assert ran.status == 0, ran.err
    options = open_artifact(out).manifest.options
    assert options is not None and options.device == "npu:0:0-3,npu:1:4-7"


def test_memory_is_that_of_the_cards_that_were_named() -> None:
    """Two stages of four units, 10 GB a unit each: one card does not hold both, half a card each does."""
    memory = Memory(("a", "b"), (10**10, 10**10), (0, 0))
    parallel = ParallelOptions(4, 2)
    for device, fits in ((None, False), ("1", False), ("2", False), ("npu:0:0-3,npu:1:0-3", True)):
        assert (memory_problems(memory, parallel, MACHINE, device) == []) is fits, device


# Options by the vendor's names ---------------------------------------------------------------------------------------
def test_settings_by_the_vendors_names(rngdc: Command, model: Path, tmp_path: Path) -> None:
    """Those that mean something do it, from the command, a file and Python; the artifacts are the same."""
    settings = {"num_hidden_layers": 1, "seed": 3, "use_blockwise_compile": True, "num_blocks_per_supertask": 1}
    flags = [f for k, v in settings.items() for f in ("--additional-model-config", f"{k}={str(v).lower()}")]
    common = (*SIZES, "-tp", "1", "-O1", "--device", "1", "--no-bundle-binaries")
    assert rngdc("build", model, tmp_path / "flags", *common, *flags).status == 0
    file = tmp_path / "build.yaml"
    file.write_text(f"additional-model-config: {settings}\nopt-level: 1\ndevice: 1\n".replace("'", ""), "utf-8")
    assert rngdc("build", model, tmp_path / "file", *SIZES, "-tp", "1", "--config", file).status == 0
    builder = ArtifactBuilder(
        model, tensor_parallel_size=1, prefill_buckets=[(1, 32)], decode_buckets=[(2, 48)], opt_level=1, device=1,
        additional_model_config=settings,
    )  # fmt: skip
    manifest = builder.build(tmp_path / "python").manifest
    assert (manifest.model.num_layers, manifest.weights_mode) == (1, "random:3")
    assert files(tmp_path / "flags") == files(tmp_path / "file") == files(tmp_path / "python")
