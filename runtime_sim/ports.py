"""Program inputs, outputs and caches in a unit's window of HBM."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from backend_rngd.artifact import Cache, Port
from backend_rngd.artifact.shards import cut, join
from backend_rngd.artifact.weights import DTYPES
from runtime_sim.memory import Hbm

Array = NDArray[Any]


def write_port(window: Hbm, port: Port, values: Array) -> None:
    """Write an input: zeros everywhere, then every element at its place. Raises ValueError for another shape."""
    dtype = DTYPES[port.dtype]
    if tuple(values.shape) != port.shape:
        raise ValueError(f"input {port.name} has shape {list(values.shape)}, the program takes {list(port.shape)}")
    raw = np.zeros(port.bytes, np.uint8)
    _elements(raw, port)[...] = (
        np.ascontiguousarray(values.astype(dtype)).view(np.uint8).reshape(*port.shape, dtype.itemsize)
    )
    window.write(port.address, raw)


def read_port(window: Hbm, port: Port) -> Array:
    """Read an output as a dense array of its element type."""
    dtype = DTYPES[port.dtype]
    span = sum((n - 1) * s for n, s in zip(port.shape, port.strides, strict=True)) + dtype.itemsize
    raw = window.read(port.address, span)
    return np.ascontiguousarray(_elements(raw, port)).view(dtype).reshape(port.shape)


def _elements(raw: NDArray[np.uint8], port: Port) -> NDArray[np.uint8]:
    """The bytes of every element of a port: shape + (element size,)."""
    size = DTYPES[port.dtype].itemsize
    return as_strided(raw, (*port.shape, size), (*port.strides, 1))


def read_cache(window: Hbm, cache: Cache, rows: int, length: int) -> Array:
    """A unit's keys or values [rows, heads of the unit, length, width] of the first rows and positions of a cache."""
    shape = (cache.batch, cache.heads, cache.capacity, cache.width)
    whole = window.read(cache.address, cache.bytes).view(DTYPES["bf16"])[: math.prod(shape)].reshape(shape)
    return whole[:rows, :, :length]


def write_cache(window: Hbm, cache: Cache, values: Array) -> None:
    """Write a unit's keys or values [rows, heads, length, width] to the start of a cache; the rest becomes zero."""
    shape = (cache.batch, cache.heads, cache.capacity, cache.width)
    whole = np.zeros(shape, DTYPES["bf16"])
    whole[: values.shape[0], :, : values.shape[2]] = values
    window.write(cache.address, whole)


def _heads(cache: Cache, shape: Sequence[int]) -> str:
    """The shard text of [rows, heads, length, width], of which only the heads are cut."""
    return f"{shape[0]}, {cache.shard.split(',')[1]}, {shape[2]}, {shape[3]}"


def split_cache(cache: Cache, values: Array, mesh: str, rank: int) -> Array:
    """The part of all heads' keys or values [rows, heads, length, width] that a unit holds."""
    return cut(values, _heads(cache, values.shape), mesh, rank) if cache.shard and values.size else values


def join_cache(cache: Cache, parts: Sequence[Array], mesh: str) -> Array:
    """All heads' keys or values from those of the units of a group, in the order of their ranks."""
    return join(parts, _heads(cache, parts[0].shape), mesh) if cache.shard and parts[0].size else parts[0]
