"""Read a tensor back from DM or HBM by the layout a probe carries.

A layout is {"dtype", "shape", "base", "space", "digits": [[dimension, size, slice stride, byte stride], ...]}; the
digits of a dimension go from outer to inner, and the address of an element is the sum over all digits. Digits may
enumerate more elements than the dimension has (the last slice is not full): the rest is dropped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backend_rngd.isa.descriptors import Dtype
from runtime_sim.errors import SimulationError
from runtime_sim.functional import Unit
from runtime_sim.numeric import FLOATS, STORAGE, widen


def extract(
    unit: Unit, layout: Mapping[str, Any] | str, address: int = 0, registers: list[int] | None = None, register: int = 0
) -> NDArray[Any]:
    """The tensor as float32 or int32 numpy in its logical shape.

    address: where the probed buffer lies (DM: byte offset in every slice; HBM: added to `register`). registers: the
    registers at the time of the probe, the unit's own by default. Raises SimulationError for elements out of bounds.
    """
    described = json.loads(layout) if isinstance(layout, str) else layout
    dtype = Dtype[str(described["dtype"]).upper()]
    shape = [int(n) for n in described["shape"]]
    slices, offsets = _addresses(shape, described["digits"])
    base = address + int(described.get("base", 0))
    width = dtype.bytes
    if described["space"] == "hbm":
        base += (registers or unit.registers)[register]
        where = offsets + base
        low, high = _bounds(where)
        unit.window.check_range(low, high - low + width)
        raw = unit.window.hbm[where[..., None] + np.arange(width)]
    else:
        low, high = _bounds(slices)
        if low < 0 or high >= unit.slices:
            raise SimulationError(SimulationError.BOUNDS, f"probe of slices [{low}, {high}] of {unit.slices}")
        low, high = _bounds(offsets)
        unit.dm.check(low + base, high + base + width, "probe")
        where = slices * unit.dm.pitch + offsets + base
        raw = unit.dm.bytes[where[..., None] + np.arange(width)]
    stored = np.ascontiguousarray(raw).view(STORAGE[dtype])[..., 0]
    out = np.empty(shape, np.float32 if dtype in FLOATS else np.int32)
    if dtype is Dtype.F32:
        out[...] = stored
    else:
        widen(stored, dtype, out)
    return out


def _addresses(shape: list[int], digits: list[list[int]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(slice, byte offset) of every element."""
    slices = np.zeros(shape, np.int64)
    offsets = np.zeros(shape, np.int64)
    for dim, size in enumerate(shape):
        s = b = np.zeros(1, np.int64)
        for number, n, slice_stride, byte_stride in digits:
            if number != dim:
                continue
            steps = np.arange(n, dtype=np.int64)
            s = (s[:, None] + steps * slice_stride).reshape(-1)
            b = (b[:, None] + steps * byte_stride).reshape(-1)
        if len(s) < size:
            raise SimulationError(
                SimulationError.ILLEGAL, f"probe digits give {len(s)} positions for dimension {dim} of size {size}"
            )
        view = [1] * len(shape)
        view[dim] = size
        slices = slices + s[:size].reshape(view)
        offsets = offsets + b[:size].reshape(view)
    return slices, offsets


def _bounds(values: NDArray[np.int64]) -> tuple[int, int]:
    return (int(values.min()), int(values.max())) if values.size else (0, 0)
