"""What the wheel holds, that it works from another directory, and that a foreign package is noticed."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {"frontend", "ir", "passes", "backend_rngd", "runtime_sim", "rngdc"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built without an isolated environment (hatchling is a development requirement)."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("*.whl")
    return path


def test_wheel_holds_exactly_the_packages(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {n.split("/")[0] for n in names if ".dist-info/" not in n} == PACKAGES
    sources = {
        p.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for p in (ROOT / package).rglob("*")
        if p.suffix in (".py", ".toml", ".html", ".js", ".css") and "__pycache__" not in p.parts
    }
    assert {n for n in names if ".dist-info/" not in n} >= sources
    assert any(n.endswith("licenses/LICENSE") for n in names)
    assert "backend_rngd/machine/rngd.toml" in names
    assert "backend_rngd/artifact/artifact.schema.json" in names


def run_installed(site: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`rngdc` from the unpacked wheel, in another directory."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONPATH": str(site)}
    code = "import sys; from rngdc.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=120, check=False)


def test_runs_from_another_directory(wheel: Path, tmp_path: Path) -> None:
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    done = run_installed(site, elsewhere, "--help")
    assert done.returncode == 0, done.stderr
    assert "simulate" in done.stdout
    (elsewhere / "op.mlir").write_text(
        'func.func @main(%x: tensor<1x8x64xbf16>) -> tensor<1x8x64xbf16> attributes {arg_names = ["x"]} {\n'
        '  %y = tc.map "exp(a)" over "b s h -> b s h" (%x) : tensor<1x8x64xbf16>\n'
        "  func.return %y : tensor<1x8x64xbf16>\n}\n",
        "utf-8",
    )
    done = run_installed(site, elsewhere, "check", "op.mlir")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_foreign_package_is_named(wheel: Path, tmp_path: Path) -> None:
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    (elsewhere / "ir").mkdir(parents=True)
    (elsewhere / "ir" / "__init__.py").write_text("", "utf-8")
    done = run_installed(site, elsewhere, "--help")  # the current directory comes first on the path
    assert done.returncode == 2
    assert f"package `ir` in {elsewhere} hides the one of rngdc" in done.stderr
    assert "fresh virtual environment" in done.stderr


def test_metadata() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from importlib.metadata import entry_points as e; print(*e(group='console_scripts'))"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "rngdc.cli:main" in done.stdout
