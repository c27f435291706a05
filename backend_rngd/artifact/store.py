"""Writing an artifact atomically, and opening one with every check.

with ArtifactWriter(out) as writer:
    (writer.directory / "ir" / "model.mlir").write_text(...)
    writer.finish(manifest)
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, cast

from pydantic import ValidationError

from backend_rngd.artifact.errors import ArtifactError, ArtifactProblem
from backend_rngd.artifact.rebuild import rebuild_command
from backend_rngd.artifact.schema import FORMAT, VERSION, Bucket, LinkedFile, Manifest
from backend_rngd.artifact.weights import Array, read_weight
from backend_rngd.isa.descriptors import Stream
from backend_rngd.isa.tables import TableError, load_npz

MANIFEST = "artifact.json"
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # <fcntl.h> and <linux/fs.h>
REBUILD = "build it again"


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def link(path: Path, checksum: Callable[[Path], str] = sha256) -> LinkedFile:
    """A reference to a file outside of the artifact, with size and checksum (which somebody may know already)."""
    return LinkedFile(path=str(path), bytes=path.stat().st_size, sha256=checksum(path))


class ArtifactWriter:
    """A directory beside `target` that becomes `target` when `finish` was called, and vanishes otherwise."""

    def __init__(self, target: Path, overwrite: bool = False) -> None:
        """Raises ArtifactError if the target exists (and is no artifact that may be overwritten)."""
        self.target = target.resolve() if target.is_symlink() and overwrite else target
        self.overwrite = overwrite
        self._work: Path | None = None
        self._parents: list[Path] = []
        if target.exists() or target.is_symlink():
            if not overwrite:
                fix = "choose another directory, or pass --overwrite"
                raise ArtifactError([ArtifactProblem(f"{target} exists", "a build does not replace files", fix)])
            if not (target / MANIFEST).is_file():
                why = "it holds no artifact.json, so --overwrite leaves it alone"
                raise ArtifactError([ArtifactProblem(f"{target} exists", why, "choose another directory")])
        self._finished = False

    @property
    def directory(self) -> Path:
        """Where the files go until the artifact is finished."""
        assert self._work is not None, "the writer was not entered"
        return self._work

    def __enter__(self) -> ArtifactWriter:
        parent = self.target.absolute().parent
        self._parents = [p for p in (parent, *parent.parents) if not p.exists()]
        prefix = f".{self.target.name}.{os.getpid()}."
        try:
            parent.mkdir(parents=True, exist_ok=True)
            _remove_stale(parent, self.target.name)
            self._work = Path(tempfile.mkdtemp(prefix=prefix, suffix=".partial", dir=parent))
            for name in ("streams", "ir", "debug"):
                (self.directory / name).mkdir()
        except OSError as error:
            self._clean()
            what = f"{self.target} cannot be written"
            raise ArtifactError([ArtifactProblem(what, str(error), "choose another directory")]) from error
        except BaseException:
            self._clean()
            raise
        return self

    def _clean(self) -> None:
        """Remove what was made, with the directories above it that were made for it and hold nothing else."""
        if self._work is not None:
            shutil.rmtree(self._work, ignore_errors=True)
        for path in self._parents:
            with contextlib.suppress(OSError):
                path.rmdir()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if not self._finished:
            self._clean()

    def finish(self, manifest: Manifest) -> Manifest:
        """Checksum every file, write the manifest, and move the directory to its place. Returns the final manifest."""
        names = sorted(p.relative_to(self.directory).as_posix() for p in self.directory.rglob("*") if p.is_file())
        files = {name: sha256(self.directory / name) for name in names}
        manifest = manifest.model_copy(update={"files": files, "digest": ""})
        manifest = manifest.model_copy(update={"digest": _digest(json.loads(manifest.model_dump_json()))})
        path = self.directory / MANIFEST
        path.write_text(manifest.model_dump_json(indent=1) + "\n", "utf-8")
        for name in (*names, MANIFEST):
            _sync(self.directory / name)
        os.chmod(self.directory, 0o777 & ~_umask())
        self._publish()
        self._finished = True
        return manifest

    def _publish(self) -> None:
        """Move the directory to its place in one step, so that whoever looks sees the old artifact or the new one.

        Raises ArtifactError if another build has put something there that this one may not replace.
        """
        if self.overwrite and exchange(self.directory, self.target):
            shutil.rmtree(self.directory, ignore_errors=True)  # it holds the old artifact now
            return
        try:
            os.rename(self.directory, self.target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            why = "another build has made it meanwhile"
            fix = "use that one, choose another directory, or pass --overwrite"
            raise ArtifactError([ArtifactProblem(f"{self.target} exists", why, fix)]) from error


def exchange(one: Path, other: Path) -> bool:
    """Swap two directories in one step; False, with nothing changed, if the second is not there. Raises OSError.

    Where the system cannot (renameat2 is Linux, and not of every file system), there is a moment without the second.
    """
    library = ctypes.CDLL(None, use_errno=True)
    swap = getattr(library, "renameat2", None)
    if swap is not None and swap(AT_FDCWD, bytes(one), AT_FDCWD, bytes(other), RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno() if swap is not None else errno.ENOSYS
    if number == errno.ENOENT:
        return False
    if number not in (errno.ENOSYS, errno.EINVAL):
        raise OSError(number, os.strerror(number), str(other))
    aside = other.parent / f".{other.name}.{os.getpid()}.old.partial"
    try:
        os.rename(other, aside)
    except FileNotFoundError:
        return False
    os.rename(one, other)
    os.rename(aside, one)
    return True


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_stale(parent: Path, name: str) -> None:
    """Remove what builds of the same target left that were killed without a chance to clean up."""
    for path in parent.glob(f".{name}.*.partial"):
        owner = path.name.removeprefix(f".{name}.").split(".")[0]
        if owner.isdecimal() and not _alive(int(owner)):
            shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _digest(data: dict[str, Any]) -> str:
    rest = {k: v for k, v in data.items() if k != "digest"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


class Artifact:
    """An artifact that was opened and checked."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.directory = directory
        self.manifest = manifest
        self._weights = {w.name: w for w in manifest.weights}
        self._streams: dict[str, Stream] = {}

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """The programs, in the order of the build."""
        return self.manifest.buckets

    def select(self, buckets: Sequence[Bucket]) -> Artifact:
        """The same artifact with some of its programs only; streams that are decoded are shared."""
        chosen = Artifact(self.directory, self.manifest.model_copy(update={"buckets": tuple(buckets)}))
        chosen._streams = self._streams
        return chosen

    def rebuild(self, **changes: Any) -> str:
        """The command that builds the artifact again in its place, with `changes` of its options."""
        return rebuild_command(self.manifest, self.directory, **changes)

    def bucket(self, name: str) -> Bucket:
        """A bucket by name; raises ArtifactError listing those there are."""
        for bucket in self.buckets:
            if bucket.name == name:
                return bucket
        known = ", ".join(b.name for b in self.buckets)
        raise ArtifactError([ArtifactProblem(f"bucket {name!r}", "the artifact does not have it", f"it has {known}")])

    def stream(self, bucket: Bucket) -> Stream:
        """The instruction stream of a bucket (of its only unit), decoded once."""
        if bucket.name not in self._streams:
            try:
                self._streams[bucket.name] = load_npz(self.directory / bucket.stream)
            except (TableError, OSError, ValueError) as error:
                raise ArtifactError([ArtifactProblem(bucket.stream, str(error), REBUILD)]) from error
        return self._streams[bucket.name]

    def text(self, name: str) -> str:
        """A text file of the artifact, such as `bucket.ir`."""
        return (self.directory / name).read_text("utf-8")

    def constant_bytes(self) -> bytes:
        """Contents of constants.bin."""
        path = self.directory / "constants.bin"
        return path.read_bytes() if path.is_file() else b""

    def weight(self, name: str) -> Array:
        """A weight by name, in its stored type. Raises ArtifactError if it has no values."""
        source = self._weights.get(name)
        if source is None:
            raise ArtifactError([ArtifactProblem(f"weight {name}", "the artifact does not name it", REBUILD)])
        return read_weight(source, self.directory)

    def check_linked(self) -> None:
        """Compare the files that the artifact links to with their checksums. Raises ArtifactError with all problems."""
        problems: list[ArtifactProblem] = []
        for file in self.manifest.linked:
            path = Path(file.path)
            fix = "restore it, or build again (--weights copy makes an artifact that needs no other files)"
            if not path.is_file():
                problems.append(ArtifactProblem(f"{path} is missing", "the artifact links to its weights", fix))
            elif path.stat().st_size != file.bytes or sha256(path) != file.sha256:
                problems.append(ArtifactProblem(f"{path} has changed", "its checksum is another one", fix))
        if problems:
            raise ArtifactError(problems)


def open_artifact(directory: Path | str, verify: bool = True) -> Artifact:
    """Open an artifact; `verify` compares every file with its checksum. Raises ArtifactError with all problems."""
    directory = Path(directory)
    path = directory / MANIFEST
    if not path.is_file():
        why = "it has no artifact.json" if directory.is_dir() else "there is no such directory"
        raise ArtifactError([ArtifactProblem(f"{directory} is no artifact", why, "give the OUT of a build")])
    try:
        data: Any = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError([ArtifactProblem(f"{path} is damaged", str(error), REBUILD)]) from error
    _check_version(path, data)
    if data.get("digest") != _digest(data):
        raise ArtifactError([ArtifactProblem(f"{path} is damaged", "its checksum does not match", REBUILD)])
    again = f"{REBUILD}: {rebuild_command(data, directory)}"
    try:
        manifest = Manifest.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        why = f"{'.'.join(str(x) for x in first['loc'])}: {first['msg']}"
        raise ArtifactError([ArtifactProblem(f"{path} cannot be understood", why, again)]) from error
    if verify and (problems := _damaged(directory, manifest, again)):
        raise ArtifactError(problems)
    return Artifact(directory, manifest)


def _check_version(path: Path, data: Any) -> None:
    if not isinstance(data, dict) or cast("dict[str, Any]", data).get("format") != FORMAT:
        raise ArtifactError(
            [ArtifactProblem(f"{path} is no artifact", f"its format is not {FORMAT}", "check the path")]
        )
    fields = cast("dict[str, Any]", data)
    version = fields.get("version")
    major = cast("dict[str, Any]", version).get("major") if isinstance(version, dict) else None
    if major != VERSION.major:
        compiler = fields.get("compiler")
        by = cast("dict[str, Any]", compiler).get("version") if isinstance(compiler, dict) else None
        why = f"it has format {major} (rngdc {by or 'unknown'}), this version reads format {VERSION.major}"
        fix = f"build it with this version: {rebuild_command(fields, path.parent)}"
        raise ArtifactError([ArtifactProblem(f"{path} is of another version", why, fix)])


def _damaged(directory: Path, manifest: Manifest, again: str) -> list[ArtifactProblem]:
    problems: list[ArtifactProblem] = []
    for name, wanted in manifest.files.items():
        path = directory / name
        if not path.is_file():
            problems.append(ArtifactProblem(f"{name} is missing", f"{MANIFEST} lists it", again))
            continue
        try:
            same = sha256(path) == wanted
        except OSError as error:
            problems.append(ArtifactProblem(f"{name} cannot be read", str(error), "check its permissions"))
            continue
        if not same:
            problems.append(ArtifactProblem(f"{name} is damaged", "its checksum does not match", again))
    return problems
