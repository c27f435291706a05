"""The packages of this project are flat and have short names: say so if another project's `ir` shadows ours."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

PACKAGES = ("frontend", "ir", "passes", "backend_rngd", "runtime_sim", "rngdc")


def package_directories(names: tuple[str, ...] = PACKAGES) -> dict[str, Path | None]:
    """The directory that holds each package, None for one that cannot be found. Imports nothing."""
    found: dict[str, Path | None] = {}
    for name in names:
        spec = find_spec(name)
        places = list(spec.submodule_search_locations or []) if spec is not None else []
        found[name] = Path(places[0]).resolve().parent if places else None
    return found


def foreign_packages(home: Path | None = None) -> list[str]:
    """One sentence for each package that does not lie beside `rngdc`; empty if all is well."""
    home = home or Path(__file__).resolve().parent.parent
    problems: list[str] = []
    for name, where in package_directories().items():
        if where is None:
            problems.append(f"package `{name}` of rngdc is missing from {home}: install rngdc again")
        elif where != home:
            problems.append(
                f"package `{name}` in {where} hides the one of rngdc in {home}: "
                "another project uses the same name; install rngdc into a fresh virtual environment"
            )
    return problems
