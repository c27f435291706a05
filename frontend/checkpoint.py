"""Reading safetensors headers: where each tensor of a checkpoint lies, without touching the bytes. Pure stdlib."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
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
    ranges = sorted((t.offset, t.offset + t.nbytes, t.tensor) for t in tensors.values() if t.nbytes)
    for (_, end, first), (begin, _, second) in pairwise(ranges):
        if begin < end:
            raise HeaderError(f"stores {first} and {second} in the same bytes")
    return tensors


INDEX = "model.safetensors.index.json"
BUFFERS = ("inv_freq", "masked_bias", "attn.bias", "position_ids")
"""Ends of names of tensors that old checkpoints hold beside the weights, listed or not: constructors compute them."""


@dataclass(frozen=True)
class WeightFiles:
    """The safetensors files of a model directory; `listed`: file by tensor as the index says, if there is one."""

    files: tuple[Path, ...] = ()
    listed: Mapping[str, str] | None = None


def find_weight_files(directory: Path) -> tuple[WeightFiles, list[Problem]]:
    """The shards of the index if there is one, else `model.safetensors`, else all files."""
    index = directory / INDEX
    if not index.is_file():
        single = directory / "model.safetensors"
        return WeightFiles((single,) if single.is_file() else tuple(sorted(directory.glob("*.safetensors")))), []
    again = "download the model again"
    try:
        listed = json.loads(index.read_text("utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = "it has no weight_map" if isinstance(error, (KeyError, TypeError)) else str(error)
        return WeightFiles(), [Problem(f"{index} cannot be read", why, again)]
    files: dict[str, Any] = cast("dict[str, Any]", listed) if isinstance(listed, dict) else {"": None}
    if wrong := [f for f in files.values() if not isinstance(f, str) or Path(f).name != f]:
        why = f"its weight_map gives {wrong[0]!r} as a file of this directory"
        return WeightFiles(), [Problem(f"{index} cannot be used", why, again)]
    shards = sorted(set(files.values()))
    if missing := [s for s in shards if not (directory / s).is_file()]:
        what = f"{len(missing)} of {len(shards)} weight files are missing: {', '.join(missing[:5])}"
        return WeightFiles(), [Problem(what, f"{index.name} lists them", again)]
    return WeightFiles(tuple(directory / s for s in shards), files), []


def read_tensors(found: WeightFiles) -> tuple[dict[str, TensorRange], list[Problem]]:
    """All tensors of several safetensors files, and every problem met on the way."""
    tensors: dict[str, TensorRange] = {}
    problems: list[Problem] = []
    for file in found.files:
        try:
            header = read_header(file)
        except HeaderError as error:
            problems.append(Problem(f"{file} {error}", "the weights cannot be read", "download or convert it again"))
            continue
        if twice := sorted(tensors.keys() & header.keys()):
            why = f"{tensors[twice[0]].file.name} and {file.name} hold it, and one of them would be ignored"
            problems.append(
                Problem(f"weight {twice[0]} is there twice", why, "remove the file that is not the model's")
            )
        tensors |= header
    if found.listed is not None and not problems:
        problems += _disagreements(found.listed, tensors)
    return tensors, problems


def _disagreements(listed: Mapping[str, str], tensors: Mapping[str, TensorRange]) -> list[Problem]:
    """Where an index and its shards say different things."""
    problems: list[Problem] = []
    lost = sorted(n for n, file in listed.items() if n not in tensors or tensors[n].file.name != file)
    if lost:
        what = f"{len(lost)} weights are not where {INDEX} says: {', '.join(lost[:5])}"
        problems.append(Problem(what, f"{listed[lost[0]]} does not hold {lost[0]}", "download the model again"))
    unlisted = sorted(n for n in tensors.keys() - listed.keys() if not n.endswith(BUFFERS))
    if unlisted:
        what = f"{INDEX} does not list {len(unlisted)} weights: {', '.join(unlisted[:5])}"
        why = f"{tensors[unlisted[0]].file.name} holds {unlisted[0]}, so one of them is of another version"
        problems.append(Problem(what, why, "download the model again, or remove the index if the shards are right"))
    return problems
