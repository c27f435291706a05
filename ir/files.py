"""Digests of large files, and processes that own unfinished ones. Standard library only."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path

SETTLED_NS = 2_000_000_000
"""Age from which a file's time says whether it has changed: a younger one may change again within a tick."""


def alive(pid: int) -> bool:
    """Whether there is a process of this number on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def remembered(directory: Path, file: Path, digest: Callable[[Path], str]) -> str:
    """`digest(file)`, computed again only if the file's place, size or time has changed.

    `directory` keeps what is known, and may be removed at any time; one that cannot be written does no harm. Raises
    what `digest` raises, and OSError if there is no file.
    """
    stat = file.stat()
    state = f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ino} {stat.st_dev}"
    known = directory / hashlib.sha256(str(file.absolute()).encode()).hexdigest()[:40]
    with contextlib.suppress(OSError, UnicodeDecodeError):
        before, _, rest = known.read_text("ascii").partition("\n")
        value, _, check = rest.partition("\n")
        if before == state and check == _check(state, value):
            return value
    value = digest(file)
    if time.time_ns() - stat.st_mtime_ns > SETTLED_NS:
        temporary = known.with_name(f".{known.name}.{os.getpid()}")
        with contextlib.suppress(OSError):
            directory.mkdir(parents=True, exist_ok=True)
            temporary.write_text(f"{state}\n{value}\n{_check(state, value)}", "ascii")
            os.replace(temporary, known)
    return value


def _check(state: str, value: str) -> str:
    return hashlib.sha256(f"{state}\n{value}".encode()).hexdigest()
