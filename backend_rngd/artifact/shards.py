"""Shards of arrays: which part of a weight or a cache a processing element of a tensor-parallel group holds.

A mesh such as `kv=4,r=2` names the axes of the group; units are numbered row-major (the first axis is the outermost),
and `tp` stands for all axes in order. A shard text such as `8@kv 4@r 128, 4096` lists dimensions separated by commas;
a dimension is a product of factors, outer to inner, each a size and optionally the mesh axis that cuts it. A unit with
coordinate c on the axis holds elements [c * local, (c + 1) * local) of the factor with local = ceil(size / axis size);
what lies beyond the size is zero. An empty text is a whole copy on every unit. Numpy only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
ALL_AXES = "tp"
MAX_SIZE = 1 << 48


class ShardError(ValueError):
    """A mesh or shard text that cannot be read, or does not fit an array."""


@dataclass(frozen=True)
class MeshAxes:
    """Axes of a group of units, outermost first: (name, size)."""

    axes: tuple[tuple[str, int], ...]

    @property
    def size(self) -> int:
        """Units of the group."""
        return math.prod(n for _, n in self.axes)

    def extent(self, axis: str) -> int:
        """Units along an axis. Raises ShardError."""
        if axis == ALL_AXES:
            return self.size
        for name, n in self.axes:
            if name == axis:
                return n
        raise ShardError(f"axis {axis} is not one of the mesh ({', '.join(name for name, _ in self.axes) or 'none'})")

    def coordinate(self, unit: int, axis: str) -> int:
        """Position of a unit along an axis; raises ShardError."""
        if not 0 <= unit < self.size:
            raise ShardError(f"unit {unit} of a mesh of {self.size}")
        if axis == ALL_AXES:
            return unit
        self.extent(axis)
        inner = 1
        for name, n in reversed(self.axes):
            if name == axis:
                return unit // inner % n
            inner *= n
        raise AssertionError(axis)


@lru_cache(maxsize=256)
def parse_mesh(text: str) -> MeshAxes:
    """`kv=4,r=2`; an empty text is a single unit. Raises ShardError."""
    axes: list[tuple[str, int]] = []
    for part in text.split(",") if text.strip() else ():
        name, equals, size = part.strip().partition("=")
        if not equals or not name.isidentifier() or not size.isdecimal() or not 0 < int(size) < MAX_SIZE:
            raise ShardError(f"mesh {text!r}: {part.strip()!r} is not name=size")
        if name in (ALL_AXES, *(known for known, _ in axes)) and not (name == ALL_AXES and text.count("=") == 1):
            raise ShardError(f"mesh {text!r}: the name {name} is taken")
        axes.append((name, int(size)))
    return MeshAxes(tuple(axes))


@dataclass(frozen=True)
class ShardDims:
    """A parsed shard text: for every dimension its factors (size, axis or None), outer to inner."""

    dims: tuple[tuple[tuple[int, str | None], ...], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The whole array's shape."""
        return tuple(math.prod(n for n, _ in dim) for dim in self.dims)

    def local_shape(self, mesh: MeshAxes) -> tuple[int, ...]:
        """Shape of a unit's part, with padding."""
        return tuple(math.prod(_local(n, axis, mesh) for n, axis in dim) for dim in self.dims)


@lru_cache(maxsize=65536)
def parse_shard(text: str) -> ShardDims:
    """`8@kv 4@r 128, 4096`. Raises ShardError if it is malformed or cuts two factors by the same axis."""
    dims: list[tuple[tuple[int, str | None], ...]] = []
    axes: list[str] = []
    for part in text.split(","):
        factors: list[tuple[int, str | None]] = []
        for word in part.split():
            size, at, axis = word.partition("@")
            if not size.isdecimal() or not 0 < int(size) < MAX_SIZE or (at and not axis.isidentifier()):
                raise ShardError(f"shard {text!r}: {word!r} is not a size or size@axis")
            if at:
                axes.append(axis)
            factors.append((int(size), axis if at else None))
        if not factors:
            raise ShardError(f"shard {text!r} has an empty dimension")
        dims.append(tuple(factors))
    if len(set(axes)) != len(axes) or (ALL_AXES in axes and len(axes) > 1):
        raise ShardError(f"shard {text!r} cuts two factors by the same axis")
    return ShardDims(tuple(dims))


def _local(size: int, axis: str | None, mesh: MeshAxes) -> int:
    return size if axis is None else -(-size // mesh.extent(axis))


def local_shape(shape: Sequence[int], shard: str, mesh: str) -> tuple[int, ...]:
    """Shape of every unit's part of an array of `shape`. Raises ShardError if the text is of another shape."""
    return tuple(shape) if not shard else _checked(shard, shape).local_shape(parse_mesh(mesh))


def _checked(shard: str, shape: Sequence[int]) -> ShardDims:
    dims = parse_shard(shard)
    if dims.shape != tuple(shape):
        raise ShardError(f"shard {shard!r} is of an array {list(dims.shape)}, not {list(shape)}")
    return dims


def _windows(dims: ShardDims, mesh: MeshAxes, unit: int) -> tuple[list[slice], list[slice], list[int]]:
    """Per factor: what the unit holds of the whole array, where that lies in its part, and the part's sizes."""
    whole: list[slice] = []
    part: list[slice] = []
    sizes: list[int] = []
    for size, axis in (factor for dim in dims.dims for factor in dim):
        local = _local(size, axis, mesh)
        first = 0 if axis is None else min(size, mesh.coordinate(unit, axis) * local)
        last = min(size, first + local)
        whole.append(slice(first, last))
        part.append(slice(0, last - first))
        sizes.append(local)
    return whole, part, sizes


def cut(array: Array, shard: str, mesh: str, unit: int) -> Array:
    """The part of `array` that a unit holds; a view where nothing is padded. Raises ShardError."""
    if not shard:
        return array
    dims, axes = _checked(shard, array.shape), parse_mesh(mesh)
    whole, part, sizes = _windows(dims, axes, unit)
    found = array.reshape([n for dim in dims.dims for n, _ in dim])[tuple(whole)]
    if any(s.stop != n for s, n in zip(part, sizes, strict=True)):
        padded = np.zeros(sizes, array.dtype)
        padded[tuple(part)] = found
        found = padded
    return found.reshape(dims.local_shape(axes))


def join(parts: Sequence[Array], shard: str, mesh: str) -> Array:
    """The whole array from the parts of all units, without padding; of replicas the first one counts."""
    if not shard:
        return parts[0]
    dims, axes = parse_shard(shard), parse_mesh(mesh)
    out = np.zeros([n for dim in dims.dims for n, _ in dim], parts[0].dtype)
    if len(parts) != axes.size:
        raise ShardError(f"{len(parts)} parts of a mesh of {axes.size} units")
    for unit in reversed(range(axes.size)):
        whole, part, sizes = _windows(dims, axes, unit)
        if parts[unit].shape != dims.local_shape(axes):
            raise ShardError(f"part {unit} has shape {list(parts[unit].shape)}, {list(dims.local_shape(axes))} is due")
        out[tuple(whole)] = parts[unit].reshape(sizes)[tuple(part)]
    return out.reshape(dims.shape)


def replicas(shard: str, mesh: str, unit: int) -> tuple[int, ...]:
    """Units that hold the same part as `unit`, itself included."""
    axes = parse_mesh(mesh)
    named = [axis for dim in parse_shard(shard).dims for _, axis in dim if axis is not None] if shard else []
    mine = [axes.coordinate(unit, axis) for axis in named]
    return tuple(u for u in range(axes.size) if [axes.coordinate(u, axis) for axis in named] == mine)


def waste(shard: str, mesh: str) -> float:
    """Share of a unit's part that is padding, over all units: 0 if everything divides."""
    if not shard:
        return 0.0
    dims, axes = parse_shard(shard), parse_mesh(mesh)
    held = useful = 1.0
    for size, axis in (factor for dim in dims.dims for factor in dim):
        if axis is not None:
            held *= _local(size, axis, axes) * axes.extent(axis)
            useful *= size
    return 1.0 - useful / held
