"""Results of earlier builds by the hash of everything they depend on: IR text, stage, options, compiler, machine.

An entry is one file `<kind>/<key>.rngdc`: a line with a checksum of the rest, then a zip archive of the result in the
artifact's own formats (npz, json, mlir). Entries appear atomically and are never changed, so that builds can share a
cache. A damaged entry is as good as none.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from backend_rngd.artifact.store import sha256
from ir.files import alive, remembered
from rngdc import __version__

FORMAT = 1
MAGIC = b"rngdc-cache"
SUFFIX = ".rngdc"
META = "meta.json"
CHECKSUMS = "checksums"
"""Directory of checksums of weight files."""
UNFINISHED = "unfinished"
"""Directory of files that are being written, named by the process that does."""
DIRECTORY_VARIABLE = "RNGDC_CACHE_DIR"
STALE_SECONDS = 3600.0
"""Age from which an unfinished file belongs to nobody."""
COMPILER_PACKAGES = ("ir", "passes", "backend_rngd")
COMPILER_FILES = (
    "buckets.py",
    "compile.py",
    "effort.py",
    "estimate.py",
    "tasks.py",
    "cache.py",
    "results.py",
    "searches.py",
)
"""Files of this package that results depend on."""
LIBRARIES = ("xdsl", "numpy", "ml-dtypes")

Files = dict[str, bytes]


def default_directory() -> Path:
    """`RNGDC_CACHE_DIR`, or the user's cache directory."""
    if given := os.environ.get(DIRECTORY_VARIABLE):
        return Path(given)
    from platformdirs import user_cache_path

    return user_cache_path("rngdc", appauthor=False)


@lru_cache(maxsize=1)
def compiler_digest() -> str:
    """Hash of the compiler's version, its source, and the versions of the libraries it is built on."""
    root = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256(__version__.encode())
    files = [p for package in COMPILER_PACKAGES for p in (root / package).rglob("*") if p.is_file()]
    files += [root / "rngdc" / name for name in COMPILER_FILES]
    for path in sorted(p for p in files if p.suffix not in (".pyc", ".md")):
        digest.update(f"\0{path.relative_to(root).as_posix()}\0".encode())
        digest.update(path.read_bytes())
    for name in LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            digest.update(f"\0{name} {version(name)}".encode())
    return digest.hexdigest()


@lru_cache
def source_digest(package: str) -> str:
    """Hash of the source of one package of this project."""
    root = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for path in sorted((root / package).rglob("*.py")):
        digest.update(f"\0{path.relative_to(root).as_posix()}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def key_of(inputs: Mapping[str, Any]) -> str:
    """The name of the result of these inputs, which must be JSON."""
    whole = {"format": FORMAT, "compiler": compiler_digest(), "inputs": inputs}
    text = json.dumps(whole, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Entry:
    """What is known about an entry without reading its result. `used`: seconds since the epoch, of the last use."""

    path: Path
    key: str
    kind: str
    nbytes: int
    used: float
    meta: dict[str, Any]


class Cache:
    """Entries in a directory, which is created when something is put there."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.hits = 0
        self.misses = 0
        self._looked = False
        self.notes: list[str] = []
        """What was wrong with the cache; a build goes on without it."""

    def path(self, kind: str, key: str) -> Path:
        """Where the result `key` of a kind of work lies."""
        return self.directory / kind.replace(" ", "-") / key[:2] / (key + SUFFIX)

    def get(self, kind: str, key: str) -> Files | None:
        """The files of a result, or None. A damaged entry is removed."""
        path = self.path(kind, key)
        try:
            files = _unpack(path.read_bytes())
        except FileNotFoundError:
            self.misses += 1
            return None
        except OSError as error:
            self._note(f"the cache {self.directory} cannot be read: {error.strerror}")
            self.misses += 1
            return None
        if files is None:
            self._note(f"{path} in the cache was damaged; its program is built again")
            with contextlib.suppress(OSError):
                path.unlink()
            self.misses += 1
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # the age that `prune` goes by
        self.hits += 1
        return files

    def put(self, kind: str, key: str, files: Mapping[str, bytes], meta: Mapping[str, Any]) -> None:
        """Store a result. A cache that cannot be written is noted and does no harm."""
        path = self.path(kind, key)
        data = _pack({META: json.dumps({**meta, "created": time.time()}).encode(), **files})
        unfinished = self.directory / UNFINISHED
        temporary: Path | None = None
        try:
            unfinished.mkdir(parents=True, exist_ok=True)
            self._remove_stale()
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(prefix=f"{os.getpid()}.", dir=unfinished)
            temporary = Path(name)
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
            os.replace(temporary, path)
            temporary = None
        except OSError as error:
            self._note(f"the cache {self.directory} cannot be written: {error.strerror}")
        finally:
            if temporary is not None:
                with contextlib.suppress(OSError):
                    temporary.unlink(missing_ok=True)

    def _remove_stale(self) -> None:
        """Once: remove what builds left that were killed while they wrote."""
        if self._looked:
            return
        self._looked = True
        now = time.time()
        for path in (self.directory / UNFINISHED).iterdir():
            owner = path.name.split(".")[0]
            with contextlib.suppress(OSError):
                if (owner.isdecimal() and not alive(int(owner))) or now - path.stat().st_mtime > STALE_SECONDS:
                    path.unlink()

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def entries(self) -> Iterator[Entry]:
        """All entries, in no order. Those that vanish meanwhile are left out."""
        for path in self.directory.glob(f"*/??/*{SUFFIX}"):
            with contextlib.suppress(OSError):
                stat = path.stat()
                yield Entry(path, path.stem, path.parts[-3], stat.st_size, stat.st_mtime, _meta(path))

    def checksum(self, file: Path) -> str:
        """Hex SHA-256 of a file, remembered for as long as its size and time stay the same. Raises OSError."""
        return remembered(self.directory / CHECKSUMS, file, sha256)

    def prune(self, older_than: float | None = None, max_bytes: int | None = None) -> list[Entry]:
        """Remove entries unused for `older_than` seconds, then the longest unused until `max_bytes` are left.

        Without limits everything goes. Returns what was removed. Raises OSError if a file cannot be removed.
        """
        now = time.time()
        found = sorted(self.entries(), key=lambda e: e.used)
        total = sum(e.nbytes for e in found)
        removed: list[Entry] = []
        for entry in found:
            old = older_than is not None and now - entry.used >= older_than
            if old or (max_bytes is not None and total > max_bytes) or (older_than is None and max_bytes is None):
                entry.path.unlink(missing_ok=True)
                removed.append(entry)
                total -= entry.nbytes
        with contextlib.suppress(OSError):
            self._remove_stale()
        if older_than is None and max_bytes is None:
            shutil.rmtree(self.directory / CHECKSUMS, ignore_errors=True)
        return removed


def _pack(files: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            kind = zipfile.ZIP_STORED if name.endswith(".npz") else zipfile.ZIP_DEFLATED
            archive.writestr(zipfile.ZipInfo(name), data, kind, 1)
    body = buffer.getvalue()
    return b"%s %d %s\n" % (MAGIC, FORMAT, hashlib.sha256(body).hexdigest().encode()) + body


def _unpack(data: bytes) -> Files | None:
    head, _, body = data.partition(b"\n")
    fields = head.split(b" ")
    if len(fields) != 3 or fields[0] != MAGIC or fields[2] != hashlib.sha256(body).hexdigest().encode():
        return None
    with zipfile.ZipFile(io.BytesIO(body)) as archive:
        return {name: archive.read(name) for name in archive.namelist() if name != META}


def _meta(path: Path) -> dict[str, Any]:
    """What an entry says about itself; empty if it is damaged."""
    try:
        with path.open("rb") as file:
            file.readline(200)
            body = io.BytesIO(file.read())
        with zipfile.ZipFile(body) as archive:
            return json.loads(archive.read(META))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return {}
