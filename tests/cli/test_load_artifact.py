"""`LLM.load_artifact`: what may be chosen at load, what may not, and that the tokens do not depend on the choice."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from backend_rngd.artifact import Artifact, ArtifactError, open_artifact
from backend_rngd.artifact.json_schema import FILE
from backend_rngd.machine import load_machine
from ir.errors import UserError
from rngdc import LLM
from rngdc.cli import main
from rngdc.hub import artifact_directory
from runtime_sim.devices import Pe, parse_devices
from runtime_sim.load import LoadRequest, plan_load
from runtime_sim.runtime import Device
from tests.cli.conftest import Command
from tests.cli.small_models import write_model
from tests.cli.test_build_problems import refused
from tests.cli.test_commands import reference_tokens
from tests.frontend.loopback_hub import run_script, serving

ROOT = Path(__file__).parents[2]
PROMPTS = [[86, 51, 103], [4, 101, 28, 72, 120, 113, 73, 32, 54], [6], [114, 114]]
"""Of several lengths, in none of whose continuations two tokens are so close that rounding decides."""
LAYERS = 4


def built(folder: Path, name: str, *arguments: str) -> Path:
    model = folder / "model"
    if not model.exists():
        write_model(model, num_hidden_layers=LAYERS)
    try:
        main(["build", str(model), str(folder / name), *arguments])
    except SystemExit as stop:
        assert not stop.code
    return folder / name


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("load")


@pytest.fixture(scope="module")
def pair(folder: Path) -> Path:
    """On two processing elements a layer, two stages preferred."""
    buckets = ("-pb", "1,8", "-pb", "1,16", "-db", "1,32", "-db", "4,16", "-db", "4,32")
    return built(folder, "pair", "-tp", "2", "-pp", "2", *buckets)


@pytest.fixture(scope="module")
def chunked(folder: Path) -> Path:
    return built(
        folder, "chunked", "-tp", "1", "-db", "1,24", "--prefill-chunk-size", "8", "--max-seq-len-to-capture", "24"
    )


@pytest.fixture(scope="module")
def expected(pair: Path) -> list[list[int]]:
    return LLM.load_artifact(pair).generate_tokens(PROMPTS, 4, ignore_eos=True).token_ids


def problems(path: Path, **choice: Any) -> list[str]:
    with pytest.raises(ArtifactError) as caught:
        LLM.load_artifact(path, **choice)
    return [str(p) for p in caught.value.problems]


# What may be chosen ---------------------------------------------------------------------------------------------------
def test_tokens_are_those_of_the_model(chunked: Path, expected: list[list[int]]) -> None:
    for prompt, tokens in zip(PROMPTS, expected, strict=True):
        assert tokens == reference_tokens(chunked, prompt, 4)  # of the same model


@pytest.mark.parametrize(
    ("choice", "spread"),
    [
        ({"pipeline_parallel_size": 1}, (1, 1)),
        ({"pipeline_parallel_size": 4}, (4, 1)),
        ({"num_blocks_per_pp_stage": [3, 1]}, (2, 1)),
        ({"data_parallel_size": 2}, (2, 2)),
        ({"devices": "npu:0", "pipeline_parallel_size": 1}, (1, 4)),
        ({"devices": ["npu:3:4-7", "npu:1:0-3"]}, (2, 2)),
        ({"prefill_buckets": [(1, 16)], "decode_buckets": [(4, 32)]}, (2, 1)),
        ({"decode_buckets": [(1, 32)]}, (2, 1)),
        ({"max_batch_size": 1}, (2, 1)),
    ],
    ids=str,
)
def test_tokens_do_not_depend_on_what_is_chosen(
    pair: Path, expected: list[list[int]], choice: dict[str, Any], spread: tuple[int, int]
) -> None:
    llm = LLM.load_artifact(pair, **choice)
    assert (llm.device.stages, llm.device.replicas) == spread
    assert llm.generate_tokens(PROMPTS, 4, ignore_eos=True).token_ids == expected


def test_stages_have_the_listed_blocks(pair: Path) -> None:
    llm = LLM.load_artifact(pair, num_blocks_per_pp_stage=[3, 1])
    assert llm.device.residence.cuts.spans == ((0, 3), (3, 4))
    assert LLM.load_artifact(pair, num_blocks_per_pp_stage=[4]).device.stages == 1


def test_units_sit_on_the_chosen_devices(pair: Path) -> None:
    llm = LLM.load_artifact(pair, devices="npu:3:6-7, npu:1:0-1", data_parallel_size=1)
    assert [(u.place.card, u.place.pe, u.place.stage) for u in llm.device.units] == [
        (3, 6, 0), (3, 7, 0), (1, 0, 1), (1, 1, 1),
    ]  # fmt: skip
    near = LLM.load_artifact(pair, devices="npu:0:0-3")
    bucket = near.artifact.bucket("decode_b1_kv32")
    assert near.device.time(bucket).seconds < llm.device.time(bucket).seconds, "the second stage is on another card"


def test_a_layer_over_several_cards_takes_whole_cards(pair: Path) -> None:
    """The rule alone: what is loaded here was not built for sixteen."""
    opened = open_artifact(pair)
    parallel = opened.manifest.parallel.model_copy(update={"units": 16, "tensor": 16, "pipeline": 1})
    wide = Artifact(opened.directory, opened.manifest.model_copy(update={"parallel": parallel}))
    plan = plan_load(wide, LoadRequest("npu:4,npu:2"), load_machine())
    assert [p.card for p in plan.topology.places] == [4] * 8 + [2] * 8
    with pytest.raises(
        ArtifactError, match="neighbours on a card, from a multiple of 8 on; give for example npu:0:0-7"
    ):
        plan_load(wide, LoadRequest("npu:0:4-7,npu:1,npu:2:0-3"), load_machine())


def test_what_is_loaded_is_valid(pair: Path, chunked: Path) -> None:
    for path in (pair, chunked):
        jsonschema.validate(
            json.loads((path / "artifact.json").read_text("utf-8")), json.loads(FILE.read_text("utf-8"))
        )


def test_replicas_follow_from_the_devices(pair: Path) -> None:
    machine = load_machine()
    artifact = open_artifact(pair)
    for devices, stages, replicas in (("npu:0", 2, 2), ("npu:0,npu:1", 1, 8), ("npu:0:0-3,npu:0:4-5", 1, 3)):
        plan = plan_load(artifact, LoadRequest(devices, pipeline_parallel_size=stages), machine)
        assert plan.topology.replicas == replicas
    assert plan_load(artifact, LoadRequest(), machine).topology.replicas == 1


def test_only_the_chosen_programs_run(pair: Path) -> None:
    llm = LLM.load_artifact(pair, prefill_buckets=[(1, 16)], decode_buckets=[(1, 32)])
    assert [b.name for b in llm.artifact.buckets] == ["prefill_b1_s16_kv16", "decode_b1_kv32"]
    report = llm.generate_tokens(PROMPTS[:2], 3, ignore_eos=True)
    assert {p.bucket: p.runs for p in report.programs} == {"prefill_b1_s16_kv16": 2, "decode_b1_kv32": 4}


# Rules ----------------------------------------------------------------------------------------------------------------
RULES: list[tuple[str, dict[str, Any], list[str]]] = [
    ("missing bucket", {"decode_buckets": [(8, 64), (1, 32)]},
     ["decode buckets (8, 64) are not in the artifact", "it has (1, 32), (4, 16), (4, 32)", "-db 8,64"]),
    ("missing prefill", {"prefill_buckets": [(1, 9)]}, ["prefill buckets (1, 9)", "it has (1, 8), (1, 16)", "-pb 1,9"]),
    ("no pair", {"prefill_buckets": [(1, 2, 3)]}, ["(1, 2, 3)", "two positive integers"]),
    ("no positive pair", {"decode_buckets": [(0, 32)]}, ["(0, 32)", "two positive integers"]),
    ("prefill alone", {"decode_buckets": []}, ["no decode bucket was chosen", "leave out both"]),
    ("decode alone", {"prefill_buckets": []}, ["no prefill bucket was chosen", "leave out both"]),
    ("decode too short", {"decode_buckets": [(4, 16)], "prefill_buckets": [(1, 16)], "max_model_len": 32},
     ["max_model_len 32", "is 16"]),
    ("both sizes", {"pipeline_parallel_size": 2, "num_blocks_per_pp_stage": [2, 2]}, ["give one of them"]),
    ("uneven stages", {"pipeline_parallel_size": 3}, ["4 blocks do not divide", "num_blocks_per_pp_stage 1,2,1"]),
    ("more stages than blocks", {"pipeline_parallel_size": 5}, ["5 pipeline stages", "has 4 blocks"]),
    ("no stage", {"pipeline_parallel_size": 0}, ["pipeline parallel size 0"]),
    ("wrong sum", {"num_blocks_per_pp_stage": [2, 1]}, ["they are 3 blocks, the programs have 4", "sum to 4"]),
    ("empty stage", {"num_blocks_per_pp_stage": [4, 0]}, ["every stage has at least one block"]),
    ("few devices", {"devices": "npu:0:0-3", "pipeline_parallel_size": 4},
     ["not enough devices: 8 PEs are required, 4 are given"]),
    ("few for replicas", {"devices": "npu:0", "data_parallel_size": 3},
     ["12 PEs are required, 8 are given", "tensor 2 x pipeline 2 x data 3"]),
    ("no replica", {"data_parallel_size": 0}, ["data parallel size 0"]),
    ("a layer on two cards", {"devices": "npu:0:7,npu:1:7,npu:0:0-1"}, ["npu:0:7, npu:1:7", "multiple of 2"]),
    ("a layer on no neighbours", {"devices": "npu:0:1,npu:0:2,npu:0:4-5"}, ["npu:0:1, npu:0:2", "give for example"]),
    ("no device", {"devices": []}, ["no device"]),
    ("no device text", {"devices": "gpu:0"}, ["'gpu:0'", "npu:CARD"]),
    ("unaligned", {"devices": "npu:0:2-5"}, ["begin at a multiple of 4", "npu:0:0-3"]),
    ("three fused", {"devices": "npu:0:0-2"}, ["3 processing elements cannot be fused", "1, 2, 4, 8"]),
    ("off the card", {"devices": "npu:0:7-8"}, ["processing elements 0 to 7"]),
    ("twice", {"devices": "npu:0,npu:0:3"}, ["both hold npu:0:3"]),
    ("tensor", {"tensor_parallel_size": 4}, ["tensor parallel size 4", "the artifact has 2", "rngdc build", "-tp 4"]),
    ("chunk", {"prefill_chunk_size": 8}, ["prefill chunk size 8", "has none", "--prefill-chunk-size 8"]),
    ("dtype", {"dtype": "float16"}, ["dtype float16", "bfloat16"]),
    ("longer prompts", {"max_prompt_len": 17}, ["max_prompt_len 17", "the largest prompt is 16", "-pb 1,17"]),
    ("longer sequences", {"max_model_len": 33}, ["max_model_len 33", "the largest sequence is 32", "-db 1,33"]),
    ("prompt over sequence", {"max_prompt_len": 12, "max_model_len": 8}, ["max_prompt_len 12 with max_model_len 8"]),
    ("more rows", {"max_batch_size": 5}, ["max_batch_size 5", "the largest batch is 4"]),
    ("no rows", {"max_batch_size": 0}, ["max_batch_size 0"]),
    ("mode", {"mode": "fast"}, ["mode fast"]),
]  # fmt: skip


@pytest.mark.parametrize(("choice", "texts"), [r[1:] for r in RULES], ids=[r[0] for r in RULES])
def test_every_rule_is_checked_before_anything_is_loaded(
    pair: Path, choice: dict[str, Any], texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Device, "load", lambda *_: pytest.fail("weights were loaded"))
    found = problems(pair, **choice)
    assert len(found) == 1, found
    for text in texts:
        assert text in found[0]


def test_all_violations_are_reported_at_once(pair: Path) -> None:
    found = problems(
        pair,
        tensor_parallel_size=8, prefill_buckets=[(1, 9)], decode_buckets=[(9, 9)], num_blocks_per_pp_stage=[5],
        devices="npu:0:1-2", data_parallel_size=0, max_batch_size=9, mode="fast", dtype="f32",
    )  # fmt: skip
    wanted = (
        "tensor parallel",
        "(1, 9)",
        "(9, 9)",
        "[5]",
        "npu:0:1-2",
        "data parallel",
        "max_batch_size",
        "fast",
        "f32",
    )
    for text in wanted:
        assert sum(text in f.split(":")[0] or f" {text}" in f for f in found) >= 1, (text, found)
    assert len(found) == len(wanted)


def test_what_equals_the_build_is_no_violation(pair: Path, chunked: Path) -> None:
    llm = LLM.load_artifact(
        pair, tensor_parallel_size=2, dtype="bfloat16", max_prompt_len=16, max_model_len=32, max_batch_size=4
    )
    assert llm.device.stages == 2
    assert LLM.load_artifact(chunked, prefill_chunk_size=8).notes == []


def test_a_longer_prefill_than_every_chosen_decode_bucket(folder: Path) -> None:
    out = built(folder, "long", "-tp", "1", "-pb", "1,8", "-pb", "1,16", "-db", "1,12", "-db", "1,16")
    found = problems(out, decode_buckets=[(1, 12)])
    assert len(found) == 1
    assert "prefill bucket (1, 16) is longer than every decode bucket" in found[0]
    llm = LLM.load_artifact(out, decode_buckets=[(1, 12)], prefill_buckets=[(1, 8)])
    assert len(llm.generate_tokens([[5, 6]], None, ignore_eos=True).token_ids[0]) == 12 + 1 - 2


def test_a_part_of_the_chunks_reads_the_same(chunked: Path) -> None:
    prompt = [[86, 51, 103] * 4 + [6]]
    whole = LLM.load_artifact(chunked).generate_tokens(prompt, 3, ignore_eos=True)
    for pairs in ([(1, 8), (1, 24)], [(1, 24)], [(1, 8), (1, 16)]):
        part = LLM.load_artifact(chunked, prefill_buckets=pairs)
        assert part.generate_tokens(prompt, 3, ignore_eos=True).token_ids == whole.token_ids
        assert {p.bucket for p in part.generate_tokens(prompt, 1).programs} <= {b.name for b in part.artifact.buckets}
    with pytest.raises(ArtifactError, match="the prompt has 17 tokens: the largest prefill bucket holds 16"):
        part.generate_tokens([[5] * 17], 1)


def test_weights_that_are_not_there(pair: Path, folder: Path, tmp_path: Path) -> None:
    none = built(folder, "none", "-tp", "1", "-pb", "1,8", "-db", "1,16", "--weights", "none")
    found = problems(none, pipeline_parallel_size=3)
    assert len(found) == 2
    assert "has no weights" in found[0] and "rngdc build" in found[0]
    other = Path(shutil.copytree(pair, tmp_path / "other"))
    weights = folder / "model" / "model.safetensors"
    weights.rename(tmp_path / "away")
    try:
        found = problems(other, data_parallel_size=0)
        assert len(found) == 2 and "model.safetensors is missing" in found[0]
    finally:
        (tmp_path / "away").rename(weights)


# Requests -------------------------------------------------------------------------------------------------------------
def test_limits_hold_for_every_call(pair: Path) -> None:
    llm = LLM.load_artifact(pair, max_prompt_len=10, max_model_len=14)
    for prompts, count, texts in (
        ([[5] * 11], 1, ["the prompt has 11 tokens: prompts have at most 10 (max_prompt_len)", "max_prompt_len=11"]),
        (
            [[5] * 8],
            7,
            ["the prompt has 8 tokens and 7 are asked for: a sequence has at most 14", "not 15", "at most 6"],
        ),
        ([[5], [500]], 1, ["prompt 2 holds token ids [500]"]),
        ([[5], []], 1, ["prompt 2 is empty"]),
        ([[5]], 0, ["0 tokens"]),
    ):
        with pytest.raises(ArtifactError) as caught:
            llm.generate_tokens(prompts, count)
        for text in texts:
            assert text in str(caught.value)
    assert not llm.device.runs
    assert len(llm.generate_tokens([[5] * 8], 6, ignore_eos=True).token_ids[0]) == 6
    rows = llm.generate_tokens([[5] * 8, [6] * 10], None, ignore_eos=True).token_ids
    assert [len(row) for row in rows] == [6, 4]
    with pytest.raises(ArtifactError, match="it is no encoder"):
        llm.embed("w5")


def test_programs_that_no_sequence_needs_are_noted(pair: Path) -> None:
    (note,) = LLM.load_artifact(pair, max_model_len=16, max_prompt_len=8).notes
    assert "decode_b4_kv32 is not needed" in note


def test_more_prompts_than_rows_wait(pair: Path, expected: list[list[int]]) -> None:
    llm = LLM.load_artifact(pair, pipeline_parallel_size=1)
    many = llm.generate_tokens(PROMPTS * 2, 4, ignore_eos=True)
    assert many.token_ids == expected * 2
    first, second = many.rows[:4], many.rows[4:]
    assert {row.wait for row in first} == {0.0}
    assert {row.wait for row in second} == {max(row.end for row in first)}
    assert many.seconds == max(row.end for row in second)
    assert second[0].ttft_us == pytest.approx(first[0].ttft_us + second[0].wait * 1e6)


def test_the_report_adds_up(pair: Path, expected: list[list[int]]) -> None:
    llm = LLM.load_artifact(pair, pipeline_parallel_size=1, mode="silicon")
    report = llm.generate(["w86 w51 w103"], 4, ignore_eos=True)
    (row,) = report.rows
    assert report.token_ids == expected[:1]
    assert report.texts == [" ".join(f"w{t}" for t in expected[0] if t > 2)]
    times = {b.name: llm.device.time(b).seconds for b in llm.artifact.buckets}
    assert {p.bucket: p.runs for p in report.programs} == {"prefill_b1_s8_kv8": 1, "decode_b1_kv32": 3}
    assert report.seconds == pytest.approx(times["prefill_b1_s8_kv8"] + 3 * times["decode_b1_kv32"])
    assert report.seconds == row.end and report.tokens_per_second == pytest.approx(4 / report.seconds)
    data = report.to_json()
    assert json.loads(json.dumps(data)) == data
    assert data["mode"] == "silicon" and data["rows"][0]["token_ids"] == expected[0]


# Devices --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "pes"),
    [
        ("npu:0", [(0, i) for i in range(8)]),
        ("npu:2:*", [(2, i) for i in range(8)]),
        ("npu:1:5", [(1, 5)]),
        ("npu:1:4-7", [(1, i) for i in range(4, 8)]),
        (" npu:1:2-3 , npu:0:0 ", [(1, 2), (1, 3), (0, 0)]),
        (["npu:1:0-1", "npu:0:4-5,npu:0:0"], [(1, 0), (1, 1), (0, 4), (0, 5), (0, 0)]),
    ],
)
def test_device_texts(text: Any, pes: list[tuple[int, int]]) -> None:
    assert parse_devices(text, 8) == tuple(Pe(*pe) for pe in pes)


def test_every_wrong_device_is_named() -> None:
    with pytest.raises(ArtifactError) as caught:
        parse_devices("npu:0:1-2,npu,npu:0:0-2,npu:0:5-4,npu:0:0-15,,npu:0:-1,npu:1,npu:1:0", 8)
    assert len(caught.value.problems) == 8


# The command ----------------------------------------------------------------------------------------------------------
def test_run_and_simulate_take_the_same_choices(rngdc: Command, pair: Path, expected: list[list[int]]) -> None:
    prompt = ("--prompt-ids", "86,51,103", "--max-tokens", "4", "--ignore-eos", "--json", "-")
    for arguments in (
        ("--devices", "npu:1:4-7"), ("--devices", "npu:0:0-1", "--devices", "npu:2:2-3"),
        ("-pb", "1,16", "-db", "1,32"),
        ("--num-blocks-per-pp-stage", "1,3", "-dp", "2"),
    ):  # fmt: skip
        ran = rngdc("run", pair, *prompt, *arguments)
        assert ran.status == 0, ran.err
        assert ran.json["token_ids"] == expected[0], arguments
    report = rngdc("simulate", pair, "--devices", "npu:1:4-7,npu:5:0-3", "--json", "-").json
    assert (report["pipeline"], report["replicas"], report["cards"]) == (2, 2, 2)
    assert [(u["card"], u["pe"]) for u in report["buckets"][0]["units"]] == [
        (card, pe) for card, first in ((1, 4), (5, 0)) for pe in range(first, first + 4)
    ]
    for command in (("run", pair, *prompt), ("simulate", pair)):
        refused(rngdc(*command, "-pp", "3", "-tp", "4"), "num_blocks_per_pp_stage 1,2,1", "rngdc build", "-tp 4")
        refused(rngdc(*command, "--devices", "npu:0:0"), "4 PEs are required, 1 are given")
        refused(rngdc(*command, "--num-blocks-per-pp-stage", "2,x"), "'2,x'")
    refused(rngdc("run", pair, *prompt, "-pb", "1"), "-pb")


# The hub --------------------------------------------------------------------------------------------------------------
SCRIPT = """
import sys
from backend_rngd.artifact import ArtifactError
from ir.errors import UserError
from rngdc import LLM
try:
    llm = LLM.load_artifact(sys.argv[1], revision=sys.argv[2] or None)
except (UserError, ArtifactError) as error:
    print("ERROR", error)
else:
    print("OK", *llm.generate_tokens([[86, 51, 103]], 2, ignore_eos=True).token_ids[0])
"""


def load_in_process(name: str, home: Path, **env: str) -> str:
    """Load a hub id in a fresh process."""
    return run_script(SCRIPT, name, "", home=home, **env)


@pytest.fixture
def hub(folder: Path, tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """A loopback hub with acme/built, an artifact with its weights, and acme/model; yields its address and what it
    served."""
    directory = folder / "copied"
    if not directory.exists():
        built(folder, "copied", "-tp", "1", "-pb", "1,8", "-db", "1,16", "--weights", "copy")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    repositories = {"acme/built": directory, "acme/model": tmp_path / "model"}
    extra = directory / "training_state.bin"  # in the repository, not of the artifact
    extra.write_bytes(b"x")
    with serving(repositories) as found:
        yield found
    extra.unlink()


def test_an_artifact_on_the_hub(hub: tuple[str, list[str]], folder: Path, tmp_path: Path) -> None:
    """It is fetched with exactly its own files, found again without network, and what is none is told apart."""
    address, served = hub
    tokens = " ".join(map(str, reference_tokens(folder / "copied", [86, 51, 103], 2)))
    assert load_in_process("acme/built", tmp_path / "home", HF_ENDPOINT=address) == f"OK {tokens}"
    names = set(open_artifact(folder / "copied").manifest.files) | {"artifact.json"}
    assert set(served) == names and len(served) == len(names)
    assert load_in_process("acme/built", tmp_path / "home", HF_HUB_OFFLINE="1") == f"OK {tokens}"
    assert len(served) == len(names)
    text = load_in_process("acme/built", tmp_path / "empty", HF_HUB_OFFLINE="1")
    assert text.startswith("ERROR artifact acme/built cannot be fetched") and "local cache" in text
    text = load_in_process("acme/model", tmp_path / "home", HF_ENDPOINT=address)
    assert text.startswith("ERROR acme/model is no artifact") and "rngdc build acme/model" in text
    text = load_in_process("acme/other", tmp_path / "home", HF_ENDPOINT=address)
    assert text.startswith("ERROR acme/other was not found") and "HF_TOKEN" in text


def test_a_path_is_no_hub_id(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(pair.parent.parent)
    relative = f"{pair.parent.name}/{pair.name}"
    assert artifact_directory(relative) == Path(relative)
    with pytest.raises(UserError, match="only hub ids have revisions"):
        LLM.load_artifact(relative, revision="main")
    with pytest.raises(ArtifactError, match="there is no such directory"):
        LLM.load_artifact("./no/where")
