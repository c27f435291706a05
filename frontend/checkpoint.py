"""Reading safetensors headers: where each tensor of a checkpoint lies, without touching the bytes. Pure stdlib."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ir.errors import Problem

DTYPE_NAMES = {
    "BF16": ("bf16", 2),
    "F16": ("f16", 2),
    "F32": ("f32", 4),
    "F64": ("f64", 8),
    "I64": ("i64", 8),
    "I32": ("i32", 4),
    "I16": ("i16", 2),
    "I8": ("i8", 1),
    "U8": ("u8", 1),
    "BOOL": ("i1", 1),
    "F8_E4M3": ("f8e4m3", 1),
    "F8_E5M2": ("f8e5m2", 1),
}
"""safetensors dtype -> (element type as the IR spells it, bytes)."""


@dataclass(frozen=True)
class TensorRange:
    """Where one tensor lies: bytes `[offset, offset + nbytes)` of `file`, row-major, little-endian."""

    file: Path
    tensor: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class HeaderError(ValueError):
    """A safetensors file whose header cannot be read or does not agree with the file's size."""


def read_header(file: Path) -> dict[str, TensorRange]:
    """The tensors of one safetensors file. Raises HeaderError saying what is wrong with the file."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            if len(prefix) < 8:
                raise HeaderError(f"is {size} bytes long, too short for a safetensors header")
            (length,) = struct.unpack("<Q", prefix)
            if length > size - 8:
                raise HeaderError(
                    f"declares a header of {length} bytes in a file of {size}; it is truncated or not one"
                )
            header = json.loads(stream.read(length))
    except OSError as error:
        raise HeaderError(f"cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        if isinstance(error, HeaderError):
            raise
        raise HeaderError("has a header that is not JSON") from error
    if not isinstance(header, dict):
        raise HeaderError("has a header that is not a JSON object")
    tensors: dict[str, TensorRange] = {}
    for name, entry in cast("dict[str, Any]", header).items():
        if name == "__metadata__":
            continue
        try:
            dtype, itemsize = DTYPE_NAMES[entry["dtype"]]
            shape = tuple(int(n) for n in entry["shape"])
            begin, end = (int(n) for n in entry["data_offsets"])
        except (KeyError, TypeError, ValueError) as error:
            raise HeaderError(f"has an entry for {name} that cannot be understood") from error
        count = itemsize
        for n in shape:
            count *= n
        if begin < 0 or end - begin != count:
            raise HeaderError(f"stores {end - begin} bytes for {name}, its shape {list(shape)} needs {count}")
        if 8 + length + end > size:
            raise HeaderError(f"is truncated: {name} ends at byte {8 + length + end}, the file has {size}")
        tensors[name] = TensorRange(file, name, dtype, shape, 8 + length + begin, end - begin)
    return tensors


def find_weight_files(directory: Path) -> tuple[list[Path], list[Problem]]:
    """The safetensors files of a model directory: the shards of the index if there is one, else all files."""
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        single = directory / "model.safetensors"
        return ([single] if single.is_file() else sorted(directory.glob("*.safetensors"))), []
    try:
        shards = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        return [], [Problem(f"{index} cannot be read", str(error), "download the model again")]
    missing = [s for s in shards if not (directory / s).is_file()]
    if missing:
        what = f"{len(missing)} of {len(shards)} weight files are missing: {', '.join(missing[:5])}"
        return [], [Problem(what, f"{index.name} lists them", "download the model again")]
    return [directory / s for s in shards], []


def read_tensors(files: list[Path]) -> tuple[dict[str, TensorRange], list[Problem]]:
    """All tensors of several safetensors files, and every problem met on the way."""
    tensors: dict[str, TensorRange] = {}
    problems: list[Problem] = []
    for file in files:
        try:
            tensors.update(read_header(file))
        except HeaderError as error:
            problems.append(Problem(f"{file} {error}", "the weights cannot be read", "download or convert it again"))
    return tensors, problems
