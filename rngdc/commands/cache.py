"""`rngdc cache`: what earlier builds have left for later ones."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Annotated

import typer

from rngdc.commands.app import Json, app, refuse

cache = typer.Typer(help="Results of earlier builds: list them, or remove some.", no_args_is_help=True)
app.add_typer(cache, name="cache")

Directory = Annotated[
    Path | None,
    typer.Option("--cache-dir", metavar="DIR", help="The cache.", show_default="the user's cache directory"),
]
UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
SIZES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


@cache.command("ls")
def list_entries(cache_dir: Directory = None, json: Json = None) -> None:
    """Size, age and origin of every entry, the least recently used last."""
    from rich.table import Table

    from rngdc.cache import Cache, default_directory
    from rngdc.console import out, write_json

    directory = cache_dir or default_directory()
    entries = sorted(Cache(directory).entries(), key=lambda e: -e.used)
    now = time.time()
    total = sum(e.nbytes for e in entries)
    if json is not None:
        rows = [
            {"key": e.key, "kind": e.kind, "bytes": e.nbytes, "unused_seconds": round(now - e.used, 1), **e.meta}
            for e in entries
        ]
        write_json({"directory": str(directory), "bytes": total, "entries": rows}, json)
        if json == "-":
            return
    table = Table(box=None)
    for name in ("stage", "bucket", "model"):
        table.add_column(name)
    for name in ("size", "unused for"):
        table.add_column(name, justify="right")
    table.add_column("key")
    for e in entries:
        meta = {k: str(e.meta.get(k, "?")) for k in ("bucket", "model")}
        table.add_row(e.kind, meta["bucket"], meta["model"], _size(e.nbytes), _age(now - e.used), e.key[:12])
    if entries:
        out.print(table)
    out.print(f"{len(entries)} entries, {_size(total)} in {directory}", markup=False)


@cache.command("prune")
def prune(
    cache_dir: Directory = None,
    older_than: Annotated[
        str | None, typer.Option(metavar="AGE", help="What was not used for so long: 30d, 12h, 45m.")
    ] = None,
    max_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="The least recently used until so much is left: 500M, 2G.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Remove every entry.")] = False,
) -> None:
    """Remove entries. Builds that need them do their work again."""
    from rngdc.cache import Cache, default_directory
    from rngdc.console import out

    if not everything and older_than is None and max_size is None:
        refuse("nothing to prune was named", "a limit is missing", "use --older-than 30d, --max-size 2G or --all")
    if everything and (older_than is not None or max_size is not None):
        refuse("--all with a limit", "--all removes every entry", "leave one of them out")
    age = None if older_than is None else _read("--older-than", older_than, UNITS, "30d, 12h or 45m")
    size = (
        None if max_size is None else int(_read("--max-size", max_size.upper().removesuffix("B"), SIZES, "500M or 2G"))
    )
    directory = cache_dir or default_directory()
    removed = Cache(directory).prune(age, size)
    out.print(f"{len(removed)} entries, {_size(sum(e.nbytes for e in removed))} removed from {directory}", markup=False)


def _read(flag: str, text: str, units: dict[str, float] | dict[str, int], example: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]?)", text.strip())
    if match is None or match[2] not in units:
        refuse(f"{flag} {text!r} cannot be understood", "it is a number with a unit", f"write it as {example}")
    return float(match[1]) * units[match[2]]


def _size(nbytes: int) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= factor:
            return f"{nbytes / factor:.1f} {unit}"
    return f"{nbytes} B"


def _age(seconds: float) -> str:
    for unit, factor in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= factor:
            return f"{seconds / factor:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
