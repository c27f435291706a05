"""What a second build does not do again: captures of every kind of model, tokenizers, checksums of large files."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from frontend import capture as capturing
from frontend import gguf_convert
from ir.files import SETTLED_NS, remembered
from rngdc import cache, model_files
from tests.cli.conftest import Command
from tests.cli.small_models import write_model
from tests.cli.test_specification import write_exaone
from tests.cli.test_workers import files

SIZES = ("-pb", "1,8", "-db", "1,16", "-tp", "1")


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often a model was captured, and a tokenizer converted."""
    found = {"captures": 0, "tokenizers": 0}
    capture, convert = capturing.capture, model_files._convert

    def counted(*arguments: Any, **named: Any) -> Any:
        found["captures"] += 1
        return capture(*arguments, **named)

    def converted(*arguments: Any) -> Any:
        found["tokenizers"] += 1
        return convert(*arguments)

    monkeypatch.setattr(capturing, "capture", counted)
    monkeypatch.setattr(model_files, "_convert", converted)
    return found


def age(path: Path) -> None:
    """Make a file so old that its time tells whether it has changed."""
    past = time.time() - 3600
    os.utime(path, (past, past))


def test_models_with_code_of_their_own(rngdc: Command, tmp_path: Path, counts: dict[str, int]) -> None:
    model = write_exaone(tmp_path / "exaone", num_hidden_layers=1)
    flags = (*SIZES, "--weights", "none", "--auto-bfloat16-cast", "--trust-remote-code", "--cache-dir", tmp_path / "c")
    for name in ("a", "b"):
        ran = rngdc("build", model, tmp_path / name, *flags)
        assert ran.status == 0, ran.err
        assert counts == {"captures": 1, "tokenizers": 1}
    assert files(tmp_path / "a") == files(tmp_path / "b")
    # Other code is another model. (Its bytes count, whatever it means.)
    code = model / "modeling_exaone.py"
    code.write_text(code.read_text("utf-8") + "\n# changed\n", "utf-8")
    assert rngdc("build", model, tmp_path / "d", *flags).status == 0
    assert counts == {"captures": 2, "tokenizers": 2}


def test_gguf_files(rngdc: Command, tmp_path: Path, counts: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The conversion itself is tested with real files; here it is a copy."""
    hashed: list[Path] = []
    key = gguf_convert._key

    def convert(file: Path, target: Path) -> None:
        target.rmdir()
        write_model(target)

    def counted(file: Path) -> str:
        hashed.append(file)
        return key(file)

    monkeypatch.setattr(gguf_convert, "cache_directory", lambda: tmp_path / "gguf")
    monkeypatch.setattr(gguf_convert, "_convert", convert)
    monkeypatch.setattr(gguf_convert, "_key", counted)
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF and more")
    age(file)
    left = tmp_path / "gguf" / ".convert-999999999-x"  # of a conversion that was killed
    left.mkdir(parents=True)
    for name in ("a", "b"):
        ran = rngdc("build", file, tmp_path / name, *SIZES, "--cache-dir", tmp_path / "c")
        assert ran.status == 0, ran.err
    assert counts == {"captures": 1, "tokenizers": 1} and hashed == [file]
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert not left.exists()
    file.write_bytes(b"GGUF and something else")
    assert rngdc("build", file, tmp_path / "d", *SIZES, "--cache-dir", tmp_path / "c").status == 0
    assert len(hashed) == 2


def test_linked_weights_are_read_once(rngdc: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_model(tmp_path / "m")
    weights, read = model / "model.safetensors", list[Path]()
    real = cache.sha256

    def counted(path: Path) -> str:
        read.append(path)
        return real(path)

    monkeypatch.setattr(cache, "sha256", counted)
    age(weights)
    flags = (*SIZES, "--cache-dir", tmp_path / "c")
    for name in ("a", "b"):
        ran = rngdc("build", model, tmp_path / name, *flags)
        assert ran.status == 0, ran.err
    assert read == [weights]
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)  # the same size
    assert rngdc("build", model, tmp_path / "d", *flags).status == 0
    assert read == [weights, weights]
    assert rngdc("run", tmp_path / "d", "--prompt-ids", "3,4", "--max-tokens", "1").status == 0
    assert rngdc("run", tmp_path / "a", "--prompt-ids", "3,4", "--max-tokens", "1").status == 2  # it has changed


def test_digests_are_remembered_until_a_file_changes(tmp_path: Path) -> None:
    file, known, calls = tmp_path / "f", tmp_path / "known", list[str]()

    def digest(path: Path) -> str:
        calls.append(path.read_text("utf-8"))
        return f"digest of {calls[-1]}"

    file.write_text("one", "utf-8")
    for _ in range(2):  # so young that it may change without a trace
        assert remembered(known, file, digest) == "digest of one"
    assert len(calls) == 2 and SETTLED_NS > 10**9
    age(file)
    for _ in range(3):
        assert remembered(known, file, digest) == "digest of one"
    assert len(calls) == 3
    for damage in (b"", b"\xff", b"9 9 9 9\nwrong\n", next(known.iterdir()).read_bytes().replace(b"one", b"two")):
        next(known.iterdir()).write_bytes(damage)
        assert remembered(known, file, digest) == "digest of one"
    assert len(calls) == 7
    file.write_text("two", "utf-8")
    age(file)
    os.utime(file, ns=(0, 1))
    assert remembered(known, file, digest) == "digest of two"
    file.unlink()
    with pytest.raises(FileNotFoundError):
        remembered(known, file, digest)


def test_a_tokenizer_that_cannot_be_converted_stops_the_build_before_the_backend(
    rngdc: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_model(tmp_path / "m")
    (model / "tokenizer.json").write_text('{"model": {"type": "Nonesuch"}}', "utf-8")

    def never(*_: Any) -> Any:
        raise AssertionError("the backend was begun")

    monkeypatch.setattr("rngdc.build.make_programs", never)
    ran = rngdc("build", model, tmp_path / "out", *SIZES)
    assert ran.status == 2 and "no usable tokenizer" in ran.err, ran.err
    assert not (tmp_path / "out").exists()
