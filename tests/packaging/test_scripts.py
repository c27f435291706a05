"""The scripts that the README names are there, are valid shell, and take the paths they are documented with."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = ["demo.sh", "test.sh", ".ci/run"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_is_executable_and_valid(name: str) -> None:
    path = ROOT / name
    assert os.access(path, os.X_OK)
    subprocess.run(["bash", "-n", str(path)], check=True, timeout=30)


def test_readme_names_them() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    assert "./demo.sh" in text
    assert "./test.sh" in text


def test_links_of_the_documents_lead_somewhere() -> None:
    import re

    for document in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", document.read_text("utf-8")):
            if "://" not in target:
                assert (document.parent / target).exists(), f"{document.name}: {target}"
