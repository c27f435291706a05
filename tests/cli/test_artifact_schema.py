"""The manifest and its JSON Schema: one says what the other says, newer minor versions load, other majors do not."""

from __future__ import annotations

import copy
import json
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from safetensors.numpy import load_file

from backend_rngd.artifact import ArtifactError, Manifest, Options, open_artifact
from backend_rngd.artifact.json_schema import FILE, schema_text
from backend_rngd.artifact.rebuild import rebuild_command
from backend_rngd.artifact.store import _digest
from ir.errors import UserError
from rngdc.options import recorded
from tests.cli.conftest import Command
from tests.cli.small_models import tensors, write_model
from tests.cli.test_build_problems import refused

SCHEMA: dict[str, Any] = json.loads(FILE.read_text("utf-8"))


def manifest_of(artifact: Path) -> dict[str, Any]:
    return json.loads((artifact / "artifact.json").read_text("utf-8"))


def rewrite(artifact: Path, data: dict[str, Any]) -> None:
    data["digest"] = _digest(data)
    (artifact / "artifact.json").write_text(json.dumps(data), "utf-8")


def objects(node: Any) -> Iterator[dict[str, Any]]:
    """All JSON objects of a value."""
    if isinstance(node, dict):
        yield node
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from objects(child)


def test_the_shipped_schema_is_current() -> None:
    assert FILE.read_text("utf-8") == schema_text(), "run: python -m backend_rngd.artifact.json_schema"
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


def test_every_field_is_described() -> None:
    records = {"Manifest": SCHEMA} | SCHEMA["$defs"]
    assert len(records) > 15
    missing = [
        f"{name}.{field}"
        for name, record in records.items()
        for field, about in record["properties"].items()
        if not about.get("description")
    ]
    assert missing == []


def test_a_built_artifact_is_valid_and_a_damaged_one_is_not(artifact: Path) -> None:
    data = manifest_of(artifact)
    validator = jsonschema.Draft202012Validator(SCHEMA)
    validator.validate(data)
    for field in ("version", "machine", "model", "parallel", "weights", "placements", "hbm", "caches", "buckets"):
        broken = copy.deepcopy(data)
        del broken[field]
        assert not validator.is_valid(broken), field
    broken = copy.deepcopy(data)
    broken["buckets"][0]["phase"] = "warmup"
    assert not validator.is_valid(broken)
    broken = copy.deepcopy(data)
    broken["placements"][0]["reshape"] = [1, 2, 3]
    assert not validator.is_valid(broken)
    broken["version"]["major"] = 2
    assert "version/major" in {"/".join(map(str, e.absolute_path)) for e in validator.iter_errors(broken)}


def test_a_newer_minor_version_loads(rngdc: Command, artifact: Path, tmp_path: Path) -> None:
    """Unknown fields anywhere are ignored, and the programs still compute the same."""
    newer = Path(shutil.copytree(artifact, tmp_path / "newer"))
    data = manifest_of(newer)
    places = [x for x in objects(data) if x is not data["files"]]
    for place in places:
        if not all(key.isdecimal() for key in place):  # maps from registers have no fields
            place["of_a_newer_version"] = {"some": [1]}
    data["version"]["minor"] = 99
    jsonschema.Draft202012Validator(SCHEMA).validate(data)
    rewrite(newer, data)
    assert open_artifact(newer).manifest.version.minor == 99
    arguments = ("--prompt-ids", "5,17,40", "--max-tokens", "3", "--json", "-")
    expected = rngdc("run", artifact, *arguments).json["token_ids"]
    assert rngdc("run", newer, *arguments).json["token_ids"] == expected


def test_another_major_version_is_refused_with_the_command_that_builds_it(
    rngdc: Command, model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out of date"
    arguments = ("-pb", "1,16", "-db", "2,32", "-tp", "1", "--name", "mine + yours", "--num-hidden-layers", "1")
    assert rngdc("build", model, out, *arguments, "--weights", "random:7").status == 0
    before = manifest_of(out)
    old = before | {"version": {"major": 2, "minor": 0}, "weights": "in another form"}
    rewrite(out, old)
    ran = rngdc("inspect", out)
    refused(ran, "another version", "format 2 ", f"rngdc build {model} '{out}'")
    command = ran.err.split("build it with this version: ")[1].strip()
    words = shlex.split(command)
    assert words[:2] == ["rngdc", "build"]
    again = rngdc(*words[1:])
    assert again.status == 0, again.err
    assert manifest_of(out)["digest"] == before["digest"]


def test_the_command_of_an_older_manifest_is_read_off_its_programs(artifact: Path) -> None:
    data = manifest_of(artifact)
    wanted = rebuild_command(data, "out")
    del data["options"]
    assert rebuild_command(data, "out") == wanted
    assert rebuild_command(Manifest.model_validate(data), "out", tensor_parallel_size=4) == wanted.replace(
        "-tp 1", "-tp 4"
    )
    assert rebuild_command(data, "hub/snapshots/0123") == wanted.replace(" out ", " OUT ").removesuffix(" --overwrite")
    chunked = [
        {"phase": "prefill", "batch": 1, "input_length": 8, "attention_size": 8},
        {"phase": "chunk", "batch": 1, "input_length": 8, "attention_size": 16},
        {"phase": "chunk", "batch": 1, "input_length": 4, "attention_size": 20},
        {"phase": "decode", "batch": 2, "input_length": 1, "attention_size": 20},
    ]
    text = rebuild_command({"model": {"id": "a/b"}, "buckets": chunked, "parallel": None}, "x")
    assert text == (
        "rngdc build a/b x -pb 1,8 -db 2,20 --max-seq-len-to-capture 20 --prefill-chunk-size 8 -tp 1 --overwrite"
    )


@pytest.mark.parametrize("model", ["acme/some-model", "/models/with space"])
@pytest.mark.parametrize("level", [0, 2])
def test_the_command_asks_for_every_option_again(
    rngdc: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, level: int
) -> None:
    """Every field of the record is set, goes through the command line, and comes back."""
    wanted = Options(
        model=model, revision="v1", prefill_buckets=((1, 16), (2, 32)), decode_buckets=((4, 64),),
        max_seq_len_to_capture=64, prefill_chunk_size=8, tensor_parallel_size=8, pipeline_parallel_size=2,
        tensor_parallel_plan=str(tmp_path / "plan.yaml"), sequence_parallel=True, weights="random:3",
        auto_bfloat16_cast=True, trust_remote_code=True, num_hidden_layers=3, name="mine + yours", opt_level=level,
        device="npu:0,npu:1",
    )  # fmt: skip
    assert {name for name in Options.model_fields if getattr(wanted, name) == getattr(Options(model="x"), name)} <= {
        "opt_level"
    }
    found: list[Any] = []

    def capture(options: Any, *_: Any) -> None:
        found.append((recorded(options), options.output, options.overwrite))
        raise UserError([])

    monkeypatch.setattr("rngdc.build.build", capture)
    words = shlex.split(rebuild_command({"options": wanted.model_dump(mode="json")}, tmp_path / "out"))
    assert rngdc(*words[1:]).status == 2
    assert found == [(wanted, tmp_path / "out", True)]


def test_a_machine_that_changed_names_the_command(rngdc: Command, artifact: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(artifact, tmp_path / "other"))
    data = manifest_of(other)
    data["machine"]["digest"] = "0" * 64
    rewrite(other, data)
    refused(rngdc("simulate", other), "another description of machine rngd", "rngdc build ", "--overwrite")


def test_weights_are_copied_in_files_of_bounded_size(
    rngdc: Command, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rngdc.copy_weights.SHARD_BYTES", 20_000)
    source = write_model(tmp_path / "m")
    out = tmp_path / "out"
    assert rngdc("build", source, out, "-pb", "1,16", "-db", "2,32", "-tp", "1", "--weights", "copy").status == 0
    files = sorted((out / "weights").glob("*.safetensors"))
    assert len(files) > 5
    index = json.loads((out / "weights" / "model.safetensors.index.json").read_text("utf-8"))["weight_map"]
    found = {name: array for file in files for name, array in load_file(file).items()}
    assert set(index) == set(found)
    wanted = tensors(json.loads((source / "config.json").read_text("utf-8")))
    for name, array in wanted.items():
        assert np.array_equal(found[name].view(np.uint16), array.view(np.uint16)), name
        assert name in load_file(out / "weights" / index[name])
    shutil.rmtree(source)
    arguments = ("--prompt-ids", "5,17", "--max-tokens", "3", "--json", "-")
    assert rngdc("run", out, *arguments).json["token_ids"] == rngdc("run", artifact, *arguments).json["token_ids"]


def test_streams_are_never_pickled(artifact: Path, tmp_path: Path) -> None:
    """A stream file with an object in it is refused, not unpickled."""
    other = Path(shutil.copytree(artifact, tmp_path / "other"))
    opened = open_artifact(other)
    path = other / opened.buckets[0].stream
    with np.load(path) as stored:
        arrays = dict(stored)
    arrays[next(iter(arrays))] = np.array([print], dtype=object)
    np.savez(path, **arrays)
    with pytest.raises(ArtifactError, match=r"prefill.*npz"):
        open_artifact(other, verify=False).stream(opened.buckets[0])
