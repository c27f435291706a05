"""Where the bytes of every weight are, and how to read them. Numpy only; nothing is held in memory.

A weight is a range of a safetensors file, a small inline array (buffers such as rotary frequencies), or a seed for
deterministic random numbers. Reading maps the file, so that processes share its pages.
"""

from __future__ import annotations

import base64
import json
import math
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ir.errors import Problem, UserError

Array = NDArray[Any]

STORED_DTYPES: dict[str, np.dtype[Any]] = {
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "f16": np.dtype(np.float16),
    "f32": np.dtype(np.float32),
    "f64": np.dtype(np.float64),
    "i64": np.dtype(np.int64),
    "i32": np.dtype(np.int32),
    "i8": np.dtype(np.int8),
    "f8e4m3": np.dtype(ml_dtypes.float8_e4m3fn),
    "u8": np.dtype(np.uint8),
    "i1": np.dtype(np.bool_),
}
"""Element types as stored, with the numpy dtype that carries them."""

SAFETENSORS_DTYPES = {
    "BF16": "bf16",
    "F16": "f16",
    "F32": "f32",
    "F64": "f64",
    "I64": "i64",
    "I32": "i32",
    "I8": "i8",
    "F8_E4M3": "f8e4m3",
    "U8": "u8",
    "BOOL": "i1",
}
"""Element types by the name that a safetensors header uses."""

RANDOM_SCALE = 0.02
RANDOM_NUMBERS = {"i8": 127.0, "f8e4m3": 256.0, "i32": 2.0e9}
"""Largest random numbers that stand for quantized weights."""
RANDOM_STEP, RANDOM_INPUT = 0.0006, 0.03
"""Scales of such weights and of their static activations."""
INLINE_LIMIT = 64 * 1024
"""Bytes up to which an inline array goes into the JSON text; larger ones into a file beside it."""


@dataclass(frozen=True)
class WeightRef:
    """One weight: `shape` and `dtype` as stored, and exactly one source.

    file + offset + nbytes: a byte range of a file. file + tensor: a tensor of a safetensors file, range found at
    reading. inline: the array itself. seed: random numbers, determined by seed and name.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: str | None = None
    tensor: str | None = None
    offset: int | None = None
    nbytes: int | None = None
    inline: Array | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.dtype not in STORED_DTYPES:
            raise UserError([Problem(f"weight {self.name}", f"element type {self.dtype} is not read", "convert it")])

    @property
    def stored_bytes(self) -> int:
        """Size of the weight in bytes."""
        return math.prod(self.shape) * STORED_DTYPES[self.dtype].itemsize


class WeightTable(Mapping[str, WeightRef]):
    """All weights of a model by name. Calling `load` reads one; the result may be a read-only map of the file."""

    def __init__(self, refs: Mapping[str, WeightRef] | None = None, base: Path | None = None) -> None:
        """`base` is the directory that relative file names refer to."""
        self._refs = dict(refs or {})
        self.base = base

    def __getitem__(self, name: str) -> WeightRef:
        return self._refs[name]

    def __setitem__(self, name: str, ref: WeightRef) -> None:
        self._refs[name] = ref

    def __iter__(self) -> Iterator[str]:
        return iter(self._refs)

    def __len__(self) -> int:
        return len(self._refs)

    def add(self, ref: WeightRef) -> None:
        """Add or replace one weight."""
        self._refs[ref.name] = ref

    def path(self, ref: WeightRef) -> Path:
        """The file of a weight."""
        assert ref.file is not None
        file = Path(ref.file)
        return file if file.is_absolute() or self.base is None else self.base / file

    def load(self, name: str) -> Array:
        """The array of a weight, in its stored type. Raises UserError if it is unknown or unreadable."""
        ref = self._refs.get(name)
        if ref is None:
            raise UserError([Problem(f"weight {name}", "the table does not have it", "capture the model again")])
        if ref.inline is not None:
            return ref.inline
        if ref.seed is not None:
            return random_weight(ref)
        if ref.file is None:
            raise UserError([Problem(f"weight {name}", "it was built without values", "build with --weights link")])
        path, offset, nbytes = self.place(ref)
        if nbytes != ref.stored_bytes:
            why = f"{nbytes} bytes are stored, {list(ref.shape)} {ref.dtype} needs {ref.stored_bytes}"
            raise UserError([Problem(f"weight {name}", why, "use the checkpoint that was captured")])
        dtype = STORED_DTYPES[ref.dtype]
        try:
            raw = np.memmap(path, dtype=np.uint8, mode="r", offset=offset, shape=(nbytes,))
        except (OSError, ValueError) as error:
            raise UserError([Problem(f"weight {name}", str(error), f"restore {path}")]) from error
        return np.asarray(raw).view(dtype).reshape(ref.shape)

    def place(self, ref: WeightRef) -> tuple[Path, int, int]:
        """(file, first byte, bytes) of a weight that is in a file. Raises UserError if the file does not have it."""
        path = self.path(ref)
        if ref.offset is not None:
            return path, ref.offset, ref.nbytes if ref.nbytes is not None else ref.stored_bytes
        stored = {r.tensor: r for r in safetensors_refs(path)}.get(ref.tensor or ref.name)
        if stored is None or stored.offset is None or stored.nbytes is None:
            raise UserError([Problem(f"weight {ref.name}", f"{path} has no {ref.tensor}", "check the checkpoint")])
        return path, stored.offset, stored.nbytes

    def to_json(self, directory: Path | None = None) -> dict[str, Any]:
        """A JSON-able form. Inline arrays over 64 KB go to `inline.safetensors` in `directory`."""
        large = {n: r.inline for n, r in self._refs.items() if r.inline is not None and r.inline.nbytes > INLINE_LIMIT}
        if large and directory is None:
            raise ValueError(f"inline weights over {INLINE_LIMIT} bytes need a directory: {', '.join(large)}")
        if large and directory is not None:
            write_safetensors(directory / "inline.safetensors", large)
        rows: list[dict[str, Any]] = []
        for name, ref in self._refs.items():
            if name in large:
                ref = replace(ref, inline=None, file="inline.safetensors", tensor=name)
            row: dict[str, Any] = {"name": ref.name, "shape": list(ref.shape), "dtype": ref.dtype}
            row |= {
                key: value
                for key in ("file", "tensor", "offset", "nbytes", "seed")
                if (value := getattr(ref, key)) is not None
            }
            if ref.inline is not None:
                row["inline"] = base64.b64encode(np.ascontiguousarray(ref.inline).tobytes()).decode("ascii")
            rows.append(row)
        return {"weights": rows}

    @staticmethod
    def from_json(data: Mapping[str, Any], base: Path | None = None) -> WeightTable:
        """The table written by `to_json`; relative files lie in `base`."""
        table = WeightTable(base=base)
        for row in data["weights"]:
            fields = dict(row)
            shape = tuple(int(s) for s in fields.pop("shape"))
            inline = fields.pop("inline", None)
            if inline is not None:
                flat = np.frombuffer(base64.b64decode(inline), dtype=STORED_DTYPES[fields["dtype"]])
                inline = flat.reshape(shape)
            table.add(WeightRef(shape=shape, inline=inline, **fields))
        return table


def random_weight(ref: WeightRef) -> Array:
    """Numbers for timing and for tests without a checkpoint: normal, scale 0.02, gains of norms around 1.

    Determined by seed and name, on every machine.
    """
    generator = np.random.default_rng([ref.seed or 0, zlib.crc32(ref.name.encode())])
    values = generator.standard_normal(ref.shape, dtype=np.float32) * np.float32(RANDOM_SCALE)
    if ref.name.endswith("_scale"):
        step = RANDOM_INPUT if ref.name.endswith("input_scale") else RANDOM_STEP
        return np.full(ref.shape, step, STORED_DTYPES[ref.dtype])
    if ref.dtype in RANDOM_NUMBERS:
        largest = RANDOM_NUMBERS[ref.dtype]
        values = np.clip(values * np.float32(largest / 4 / RANDOM_SCALE), -largest, largest)
    last = ref.name.rsplit(".", 2)[-2:]
    if len(ref.shape) == 1 and last[-1] == "weight" and any(m in last[0].lower() for m in ("norm", "ln")):
        values += np.float32(1)
    return values.astype(STORED_DTYPES[ref.dtype])


@lru_cache(maxsize=256)
def _header(path: str, size: int, modified: int) -> tuple[int, dict[str, Any]]:
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > size - 8:
            raise ValueError("the header is longer than the file")
        return 8 + length, json.loads(file.read(length))


def safetensors_refs(path: Path | str) -> list[WeightRef]:
    """All tensors of a safetensors file, with their byte ranges. Raises UserError if it is no such file."""
    path = Path(path)
    try:
        stat = path.stat()
        start, header = _header(str(path), stat.st_size, stat.st_mtime_ns)
    except (OSError, ValueError, struct.error) as error:
        raise UserError([Problem(f"{path} cannot be read", str(error), "download or convert it again")]) from error
    refs: list[WeightRef] = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype: str = SAFETENSORS_DTYPES.get(entry["dtype"], str(entry["dtype"]))
        begin, end = entry["data_offsets"]
        if start + end > stat.st_size:
            raise UserError([Problem(f"{path} is cut off", f"{name} ends behind the file", "download it again")])
        shape = tuple(int(s) for s in entry["shape"])
        refs.append(WeightRef(name, shape, dtype, str(path), name, start + begin, end - begin))
    return refs


def safetensors_header(tensors: Sequence[tuple[str, str, tuple[int, ...]]]) -> tuple[bytes, list[int]]:
    """Header of a file of tensors (name, element type, shape), and where each begins behind it; padded to 8 bytes."""
    names = {short: long for long, short in SAFETENSORS_DTYPES.items()}
    header: dict[str, Any] = {}
    position, offsets = 0, list[int]()
    for name, dtype, shape in tensors:
        offsets.append(position)
        position += math.prod(shape) * STORED_DTYPES[dtype].itemsize
        header[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [offsets[-1], position]}
    text = json.dumps(header).encode("utf-8")
    return text + b" " * (-len(text) % 8), offsets


def write_safetensors(path: Path | str, arrays: Mapping[str, Array]) -> None:
    """Write arrays as a safetensors file; data start at a multiple of 8 bytes."""
    short = {np.dtype(dtype): name for name, dtype in STORED_DTYPES.items()}
    text, _ = safetensors_header([(name, short[array.dtype], array.shape) for name, array in arrays.items()])
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for array in arrays.values():
            file.write(np.ascontiguousarray(array).tobytes())
