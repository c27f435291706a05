"""Whether files can be written where they are to be: asked before any work, and explained when it fails later."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from ir.errors import Problem, UserError


def check_directory(flag: str, path: Path, problems: list[Problem]) -> None:
    """Append a problem if a directory cannot be made or used at a place."""
    try:
        nearest = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
        if not nearest.is_dir():
            problems.append(Problem(f"{flag} {path}", f"{nearest} is no directory", "choose another place"))
        elif not os.access(nearest, os.W_OK | os.X_OK):
            fix = "choose a place where you may write"
            problems.append(Problem(f"{flag} {path}", f"{nearest} cannot be written", fix))
    except OSError as error:
        problems.append(Problem(f"{flag} {path}", str(error.strerror), "choose another place"))


def check_file(flag: str, path: Path, problems: list[Problem]) -> None:
    """Append a problem if a file cannot be written at a place; its directory must exist."""
    parent = path.absolute().parent
    if path.is_dir():
        problems.append(Problem(f"{flag} {path}", "it is a directory", "name a file"))
    elif not parent.is_dir():
        problems.append(Problem(f"{flag} {path}", f"there is no directory {parent}", "make it, or name another file"))
    elif not os.access(path if path.exists() else parent, os.W_OK):
        problems.append(Problem(f"{flag} {path}", "it cannot be written", "choose a place where you may write"))


def check_space(flag: str, path: Path, nbytes: int, problems: list[Problem]) -> None:
    """Append a problem if the file system of a new directory has not so many bytes left."""
    try:
        nearest = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
        free = shutil.disk_usage(nearest).free
    except OSError:
        return  # `check_directory` tells
    if free < nbytes:
        why = f"it takes {nbytes / 1e9:,.2f} GB, and {free / 1e9:,.2f} GB are free"
        problems.append(Problem(f"{flag} {path}", why, "free space, or choose another place"))


FIXES = {
    errno.ENOSPC: "free space on the disk, or choose another place",
    errno.EDQUOT: "free space in your quota, or choose another place",
    errno.EFBIG: "choose a file system, or a limit (ulimit -f), that allows larger files",
    errno.EACCES: "choose a place where you may write",
    errno.EPERM: "choose a place where you may write",
    errno.EROFS: "choose a place where you may write",
    errno.ENOTDIR: "choose a place in a directory",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EMFILE: "allow more open files (ulimit -n)",
}
"""What helps, by the number of an operating system's error."""


def problem_of(error: OSError, what: str = "") -> Problem:
    """What a failed operation on a file means for a user. `what`: what was to be done, else the file's name."""
    name = f" {error.filename}" if error.filename else ""
    why = f"{error.strerror or error}{f' ({error.filename})' if what and error.filename else ''}"
    fix = FIXES.get(error.errno or 0, "check the path and try again")
    return Problem(what or (f"cannot use{name}" if name else "a file cannot be used"), why, fix)


@contextmanager
def explained(what: str) -> Generator[None]:
    """Turn an error of the operating system in the block into one that says what to do. Raises UserError."""
    try:
        yield
    except OSError as error:
        raise UserError([problem_of(error, what)]) from error
