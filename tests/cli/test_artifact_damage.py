"""Artifacts that were changed after they were built, or that another version built."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from backend_rngd.artifact import ArtifactError, open_artifact
from backend_rngd.artifact.store import _digest
from tests.cli.conftest import Command
from tests.cli.test_build_problems import refused


@pytest.fixture
def copy(artifact: Path, tmp_path: Path) -> Path:
    """A copy of the artifact that may be damaged."""
    return Path(shutil.copytree(artifact, tmp_path / "copy"))


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(data)


def test_a_flipped_byte_in_any_file_is_found(copy: Path) -> None:
    names = sorted(p.relative_to(copy).as_posix() for p in copy.rglob("*") if p.is_file())
    assert {"artifact.json", "constants.bin", "config.json", "tokenizer.json", "ir/model.mlir"} < set(names)
    for name in names:
        path = copy / name
        before = path.read_bytes()
        if not before:
            continue
        flip(path, len(before) // 2)
        with pytest.raises(ArtifactError):
            open_artifact(copy)
        path.write_bytes(before)
    open_artifact(copy)


def test_every_damaged_file_is_named(rngdc: Command, copy: Path) -> None:
    flip(copy / "ir" / "model.mlir", 100)
    (copy / "tokenizer.json").unlink()
    for command in (["simulate"], ["inspect"], ["check"], ["disasm"], ["run", "--prompt", "w3"]):
        refused(rngdc(command[0], copy, *command[1:]), "ir/model.mlir is damaged", "tokenizer.json is missing")


def test_a_changed_weight_file_is_found(rngdc: Command, copy: Path, model: Path) -> None:
    path = model / "model.safetensors"
    flip(path, -1)
    try:
        refused(
            rngdc("run", copy, "--prompt", "w3 w4", "--max-tokens", "2"),
            "model.safetensors has changed",
            "--weights copy",
        )
        assert rngdc("simulate", copy).status == 0  # needs no weights
    finally:
        flip(path, -1)


@pytest.mark.parametrize(("major", "minor"), [(2, 0), (0, 9)])
def test_another_version(rngdc: Command, copy: Path, major: int, minor: int) -> None:
    path = copy / "artifact.json"
    data = json.loads(path.read_text("utf-8"))
    data["version"] = {"major": major, "minor": minor}
    data["new_field_of_another_version"] = True
    data["digest"] = _digest(data)
    path.write_text(json.dumps(data), "utf-8")
    refused(rngdc("inspect", copy), "another version", f"format {major} ", "build it with this version")


def test_another_machine_description(rngdc: Command, copy: Path) -> None:
    path = copy / "artifact.json"
    data = json.loads(path.read_text("utf-8"))
    data["machine"]["digest"] = "0" * 64
    data["digest"] = _digest(data)
    path.write_text(json.dumps(data), "utf-8")
    refused(rngdc("simulate", copy), "another description of machine rngd")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "rngdc-artifact"}', "\x00"])
def test_a_manifest_that_is_none(rngdc: Command, copy: Path, text: str) -> None:
    (copy / "artifact.json").write_text(text, "utf-8")
    refused(rngdc("inspect", copy), "artifact.json")


def test_no_artifact(rngdc: Command, tmp_path: Path) -> None:
    refused(rngdc("inspect", tmp_path), "has no artifact.json")
    refused(rngdc("run", tmp_path / "nowhere", "--prompt", "x"), "there is no such directory")
