"""Reading weights and laying them out for HBM. Numpy only."""

from __future__ import annotations

import base64
import math
import zlib
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from backend_rngd.artifact.errors import ArtifactError, ArtifactProblem
from backend_rngd.artifact.schema import Placement, WeightSource
from backend_rngd.artifact.shards import ShardError, cut

Array = NDArray[Any]

DTYPES: dict[str, np.dtype[Any]] = {
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "f16": np.dtype(np.float16),
    "f32": np.dtype(np.float32),
    "f64": np.dtype(np.float64),
    "i64": np.dtype(np.int64),
    "i32": np.dtype(np.int32),
    "i16": np.dtype(np.int16),
    "i8": np.dtype(np.int8),
    "f8e4m3": np.dtype(ml_dtypes.float8_e4m3fn),
    "u8": np.dtype(np.uint8),
    "i1": np.dtype(np.bool_),
}
"""Element types by name, with the numpy dtype that carries them."""

RANDOM_SCALE = 0.02
RANDOM_NUMBERS = {"i8": 127.0, "f8e4m3": 256.0, "i32": 2.0e9}
"""Largest random numbers that stand for quantized weights."""
RANDOM_STEP, RANDOM_INPUT = 0.0006, 0.03
"""Scales of such weights and of their static activations."""


def read_weight(source: WeightSource, directory: Path) -> Array:
    """A weight in its stored type; file ranges are mapped, not read. Raises ArtifactError."""
    dtype = DTYPES.get(source.dtype)
    if dtype is None:
        raise _error(source, f"element type {source.dtype} is not known", "build it again")
    if source.inline is not None:
        return np.frombuffer(base64.b64decode(source.inline), dtype).reshape(source.shape)
    if source.seed is not None:
        return _random(source, dtype)
    if source.file is None:
        raise _error(source, "the artifact was built without weights", "build with --weights link, copy or random")
    path = directory / source.file  # an absolute name stays as it is
    nbytes = math.prod(source.shape) * dtype.itemsize
    try:
        raw = np.memmap(path, np.uint8, "r", source.offset, (nbytes,))
    except (OSError, ValueError) as error:
        raise _error(source, f"{path} cannot be read ({error})", "restore the file, or build again") from error
    return np.asarray(raw).view(dtype).reshape(source.shape)


def _error(source: WeightSource, why: str, fix: str) -> ArtifactError:
    return ArtifactError([ArtifactProblem(f"weight {source.name}", why, fix)])


def _random(source: WeightSource, dtype: np.dtype[Any]) -> Array:
    """Normal numbers, scale 0.02, determined by seed and name; gains of norms lie around 1.

    The same numbers as `ir.weights.random_weight`, so that levels can be compared (tested).
    """
    generator = np.random.default_rng([source.seed or 0, zlib.crc32(source.name.encode())])
    values = generator.standard_normal(source.shape, dtype=np.float32) * np.float32(RANDOM_SCALE)
    if source.name.endswith("_scale"):
        step = RANDOM_INPUT if source.name.endswith("input_scale") else RANDOM_STEP
        return np.full(source.shape, step, dtype)
    if source.dtype in RANDOM_NUMBERS:
        largest = RANDOM_NUMBERS[source.dtype]
        values = np.clip(values * np.float32(largest / 4 / RANDOM_SCALE), -largest, largest)
    last = source.name.rsplit(".", 2)[-2:]
    if len(source.shape) == 1 and last[-1] == "weight" and any(m in last[0].lower() for m in ("norm", "ln")):
        values += np.float32(1)
    return values.astype(dtype)


def placed(array: Array, placement: Placement, mesh: str = "", unit: int = 0) -> Array:
    """The image of a weight as it lies in the HBM of a unit: a contiguous array of exactly `placement.bytes` bytes.

    Raises ArtifactError if the shard or the size does not fit the weight.
    """
    try:
        part = cut(array, placement.shard, mesh, unit)
    except ShardError as error:
        raise ArtifactError([ArtifactProblem(f"weight {placement.weight}", str(error), "build it again")]) from error
    rows, columns = placement.reshape
    matrix = part.transpose(placement.permute).reshape(rows, columns)
    padded = [-(-n // multiple) * multiple for n, multiple in zip(placement.reshape, placement.pad, strict=True)]
    image = np.zeros(padded, DTYPES[placement.dtype])
    image[:rows, :columns] = matrix
    if image.nbytes != placement.bytes:
        why = f"its image has {image.nbytes} bytes, {placement.bytes} are reserved"
        raise ArtifactError([ArtifactProblem(f"weight {placement.weight}", why, "build it again")])
    return image
