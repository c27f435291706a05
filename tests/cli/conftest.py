"""Running the command in this process, and artifacts that several tests share."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rngdc.cli import main
from tests.cli.small_models import write_model


@dataclass
class Ran:
    """What a command did."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Its standard output as JSON."""
        return json.loads(self.out)


Command = Callable[..., Ran]


@pytest.fixture
def rngdc(capfd: pytest.CaptureFixture[str]) -> Command:
    """`rngdc("build", model, out)` runs the command in this process."""

    def run(*arguments: object) -> Ran:
        capfd.readouterr()
        try:
            main([str(a) for a in arguments])
            status: Any = 0
        except SystemExit as stop:
            status = stop.code or 0
        out, err = capfd.readouterr()
        return Ran(int(status), out, err)

    return run


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random llama in bf16."""
    return write_model(tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="session")
def artifact(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small llama, built with two buckets and linked weights. Tests must not change it."""
    out = tmp_path_factory.mktemp("artifact") / "llama"
    try:
        main(["build", str(model), str(out), "-pb", "1,16", "-db", "2,32", "-tp", "1"])
    except SystemExit as stop:
        assert not stop.code
    return out
