"""Which part of an array every unit of a mesh holds: named mesh axes, and dimensions made of factors.

Numpy only. A mesh is written `kv=4,r=2`; units are numbered row-major, first axis outermost. A placement is written
`8@kv 4@r 128, 4096`: two dimensions, the first one made of three factors, outer to inner, of which the axes `kv` and
`r` each cut one. Axis `tp` stands for all axes of the mesh in order. A factor of size n on an axis of size m gives
every unit ceil(n / m) elements; those beyond n are zero. An axis that no factor names holds copies.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

TP = "tp"
"""The name of all mesh axes taken together."""

_AXIS = re.compile(r"\s*([a-z][a-z0-9_]*)\s*=\s*(\d+)\s*")
_FACTOR = re.compile(r"(\d+)(?:@([a-z][a-z0-9_]*))?")


class PlacementError(ValueError):
    """A mesh or placement is malformed, or does not fit an array."""


@dataclass(frozen=True)
class Mesh:
    """Named axes and their sizes, outermost first."""

    axes: tuple[tuple[str, int], ...]

    def __post_init__(self) -> None:
        names = [n for n, _ in self.axes]
        if len(set(names)) != len(names) or TP in names:
            raise PlacementError(f"mesh '{self}': every axis needs its own name, and none is '{TP}'")
        if any(size < 1 for _, size in self.axes):
            raise PlacementError(f"mesh '{self}': sizes must be positive")

    @staticmethod
    def parse(text: str) -> Mesh:
        """Read `kv=4,r=2`. Raises PlacementError."""
        axes: list[tuple[str, int]] = []
        for part in text.split(",") if text.strip() else []:
            match = _AXIS.fullmatch(part)
            if match is None:
                raise PlacementError(f"mesh '{text}': '{part.strip()}' is not like kv=4")
            axes.append((match[1], int(match[2])))
        return Mesh(tuple(axes))

    def __str__(self) -> str:
        return ",".join(f"{name}={size}" for name, size in self.axes)

    @property
    def size(self) -> int:
        """The number of units."""
        return math.prod(size for _, size in self.axes)

    def __getitem__(self, axis: str) -> int:
        """The size of an axis; of `tp`, the number of units."""
        if axis == TP:
            return self.size
        for name, size in self.axes:
            if name == axis:
                return size
        raise PlacementError(f"mesh '{self}' has no axis '{axis}'")

    def parts(self, axis: str) -> tuple[str, ...]:
        """The mesh axes that a name stands for, without those of size 1."""
        names = [n for n, size in self.axes if size > 1]
        return tuple(names) if axis == TP else tuple(n for n in names if n == axis)

    def coordinate(self, unit: int, axis: str) -> int:
        """The place of a unit on an axis; on `tp`, the unit's number."""
        if axis == TP:
            return unit
        rest = unit
        for name, size in reversed(self.axes):
            if name == axis:
                return rest % size
            rest //= size
        raise PlacementError(f"mesh '{self}' has no axis '{axis}'")

    def group(self, unit: int, axis: str) -> list[int]:
        """The units that differ from `unit` only on an axis, in the order of their coordinates."""
        if axis == TP:
            return list(range(self.size))
        stride = self.stride(axis)
        first = unit - self.coordinate(unit, axis) * stride
        return [first + i * stride for i in range(self[axis])]

    def stride(self, axis: str) -> int:
        """The difference of the numbers of two units that are neighbours on an axis."""
        if axis == TP:
            return 1
        names = [n for n, _ in self.axes]
        if axis not in names:
            raise PlacementError(f"mesh '{self}' has no axis '{axis}'")
        return math.prod(size for _, size in self.axes[names.index(axis) + 1 :])


@dataclass(frozen=True)
class Factor:
    """A part of a dimension: `size` elements, cut over mesh axis `axis` if there is one."""

    size: int
    axis: str | None = None

    def __str__(self) -> str:
        return f"{self.size}@{self.axis}" if self.axis else str(self.size)

    def local(self, mesh: Mesh) -> int:
        """Elements that one unit holds."""
        return -(-self.size // mesh[self.axis]) if self.axis else self.size

    def padded(self, mesh: Mesh) -> int:
        """Elements that all units along the axis hold together, padding included."""
        return self.local(mesh) * (mesh[self.axis] if self.axis else 1)


Factors = tuple[Factor, ...]
"""One dimension, outer factor first. A dimension without factors has size 1."""


@dataclass(frozen=True)
class Shard:
    """The placement of an array: for every dimension its factors."""

    dims: tuple[Factors, ...]

    @staticmethod
    def parse(text: str) -> Shard:
        """Read `8@kv 4@r 128, 4096`. Raises PlacementError."""
        return _parse(text)

    @staticmethod
    def whole(shape: Iterable[int]) -> Shard:
        """Every unit holds all of an array."""
        return Shard(tuple((Factor(n),) for n in shape))

    def __str__(self) -> str:
        return ", ".join(" ".join(str(f) for f in dim) or "1" for dim in self.dims)

    @property
    def shape(self) -> list[int]:
        """The shape of the whole array."""
        return [math.prod(f.size for f in dim) for dim in self.dims]

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes that are named, in order of appearance."""
        return tuple(f.axis for dim in self.dims for f in dim if f.axis)

    def check(self, mesh: Mesh) -> None:
        """Raises PlacementError if an axis is unknown or cuts twice."""
        used: set[str] = set()
        for axis in self.axes:
            mesh[axis]
            parts = set(mesh.parts(axis))
            if parts & used:
                raise PlacementError(f"placement '{self}' uses mesh axis '{axis}' twice")
            used |= parts

    def local_shape(self, mesh: Mesh) -> list[int]:
        """The shape of one unit's part; the same for all units."""
        return [math.prod(f.local(mesh) for f in dim) for dim in self.dims]

    def waste(self, mesh: Mesh) -> float:
        """The share of what the units hold that is padding, 0 to 1. Copies are no padding."""
        factors = [f for dim in self.dims for f in dim]
        return 1.0 - math.prod(f.size / f.padded(mesh) for f in factors if f.size)

    def cut(self, array: Array, mesh: Mesh, unit: int) -> Array:
        """The part of `array` that a unit holds; a view where nothing is padded. Raises PlacementError."""
        if list(array.shape) != self.shape:
            raise PlacementError(f"placement '{self}' is for shape {self.shape}, not {list(array.shape)}")
        factors = [f for dim in self.dims for f in dim]
        part = array.reshape([f.size for f in factors])
        for place, factor in enumerate(factors):
            if factor.axis is not None:
                part = own_part(part, place, mesh[factor.axis], mesh.coordinate(unit, factor.axis))
        return part.reshape(self.local_shape(mesh))

    def join(self, parts: Sequence[Array], mesh: Mesh) -> Array:
        """The whole array from the parts of all units, padding dropped; of copies the first unit's is taken."""
        factors = [f for dim in self.dims for f in dim]
        local = [f.local(mesh) for f in factors]
        result = np.zeros([f.padded(mesh) for f in factors], parts[0].dtype)
        for unit in reversed(range(mesh.size)):
            starts = [mesh.coordinate(unit, f.axis) * n if f.axis else 0 for f, n in zip(factors, local, strict=True)]
            where = tuple(slice(s, s + n) for s, n in zip(starts, local, strict=True))
            result[where] = parts[unit].reshape(local)
        return result[tuple(slice(f.size) for f in factors)].reshape(self.shape)


def own_part(array: Array, dim: int, parts: int, coordinate: int) -> Array:
    """Part `coordinate` of `parts` equal parts along a dimension; what lies beyond the array is zero."""
    size = array.shape[dim]
    local = -(-size // parts)
    start, stop = min(coordinate * local, size), min((coordinate + 1) * local, size)
    part = array[(slice(None),) * dim + (slice(start, stop),)]
    if stop - start == local:
        return part
    padding = np.zeros((*array.shape[:dim], local - (stop - start), *array.shape[dim + 1 :]), array.dtype)
    return np.concatenate([part, padding], axis=dim)


@lru_cache(maxsize=4096)
def _parse(text: str) -> Shard:
    dims: list[Factors] = []
    for dim in text.split(",") if text.strip() else []:
        factors: list[Factor] = []
        for word in dim.split():
            match = _FACTOR.fullmatch(word)
            if match is None or int(match[1]) < 1:
                raise PlacementError(f"placement '{text}': '{word}' is not like 128 or 8@kv")
            factors.append(Factor(int(match[1]), match[2]))
        if not factors:
            raise PlacementError(f"placement '{text}' has a dimension without a size")
        dims.append(tuple(factors))
    return Shard(tuple(dims))
