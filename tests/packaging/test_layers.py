"""The layer contracts hold, and the one for the simulator covers every module of the backend."""

from __future__ import annotations

import configparser
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
OPEN_TO_THE_SIMULATOR = {"artifact", "isa", "machine"}


def test_every_backend_module_is_open_or_forbidden() -> None:
    parser = configparser.ConfigParser()
    parser.read(ROOT / ".importlinter")
    forbidden = parser["importlinter:contract:simulator-is-alone"]["forbidden_modules"].split()
    modules = {
        p.stem
        for p in (ROOT / "backend_rngd").iterdir()
        if (p.suffix == ".py" or (p / "__init__.py").is_file()) and p.stem != "__init__"
    }
    named = {f.removeprefix("backend_rngd.") for f in forbidden if f.startswith("backend_rngd.")}
    assert modules - OPEN_TO_THE_SIMULATOR == named


def test_contracts_hold() -> None:
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache", "--no-logo"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout
