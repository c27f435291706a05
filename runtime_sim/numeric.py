"""Element types as numpy sees them, and the conversions of the fetch adapter and the cast engine.

numpy has no bf16 or f8: they are carried as uint16 and uint8 bit patterns. Conversions round to nearest even, flush
subnormal results to a zero of the same sign and make every NaN the canonical one (hardware.md 2.8 and 2.10).
"""

from __future__ import annotations

import math
import threading
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backend_rngd.isa.descriptors import Dtype, Lookup
from runtime_sim.errors import SimulationError

Array = NDArray[Any]

STORAGE: dict[Dtype, np.dtype[Any]] = {
    Dtype.BF16: np.dtype(np.uint16),
    Dtype.F32: np.dtype(np.float32),
    Dtype.I32: np.dtype(np.int32),
    Dtype.I16: np.dtype(np.int16),
    Dtype.I8: np.dtype(np.int8),
    Dtype.F8E4M3: np.dtype(np.uint8),
    Dtype.F8E5M2: np.dtype(np.uint8),
}
FLOATS = frozenset({Dtype.BF16, Dtype.F32, Dtype.F8E4M3, Dtype.F8E5M2})
BLOCK = 1 << 16  # elements converted at a time: the intermediate results of a conversion stay in the L2 cache


class Scratch(threading.local):
    """Buffers reused from instruction to instruction: fresh memory costs more in page faults than a conversion does.

    A buffer is valid until the same thread asks for the same slot again.
    """

    def __init__(self) -> None:
        self._slots: dict[str, Array] = {}

    def take(self, slot: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """An uninitialised C-contiguous array."""
        nbytes = math.prod(shape) * dtype.itemsize
        memory = self._slots.get(slot)
        if memory is None or memory.size < nbytes:
            memory = self._slots[slot] = np.empty(max(nbytes, 1 << 16), np.uint8)
        return np.ndarray(shape, dtype, memory)


SCRATCH = Scratch()


def widened(dtype: Dtype) -> Dtype:
    """The 32-bit type an element becomes in the vector engine."""
    return Dtype.F32 if dtype in FLOATS else Dtype.I32


@cache
def _f8_table(dtype: Dtype) -> Array:
    """Value of every f8 pattern; E4M3 has no infinities and one NaN a sign, E5M2 follows IEEE 754."""
    bits = np.arange(256)
    mantissa_bits, bias = (3, 7) if dtype is Dtype.F8E4M3 else (2, 15)
    sign = np.where(bits >> 7, -1.0, 1.0)
    exponent = (bits >> mantissa_bits) & (0xF if dtype is Dtype.F8E4M3 else 0x1F)
    mantissa = bits & ((1 << mantissa_bits) - 1)
    scale = 1 << mantissa_bits
    value = np.where(
        exponent == 0,
        mantissa / scale * 2.0 ** (1 - bias),
        (1 + mantissa / scale) * 2.0 ** (exponent.astype(np.float64) - bias),
    )
    if dtype is Dtype.F8E4M3:
        value[(exponent == 15) & (mantissa == 7)] = np.nan
    else:
        value[exponent == 31] = np.where(mantissa[exponent == 31] == 0, np.inf, np.nan)
    return (sign * value).astype(np.float32)


@cache
def lookup_table(lookup: Lookup) -> Array:
    """Results [256, results] of every key, as stored: 4-bit numbers are exact in f8e4m3."""
    keys = np.arange(256)
    nibbles = np.stack([keys & 15, keys >> 4], axis=1)
    if lookup is Lookup.I4_F8E4M3:
        return _to_e4m3((nibbles - 8).astype(np.float32))
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)[nibbles & 7]
    return _to_e4m3(np.where(nibbles & 8, -values, values))


def widen(source: Array, dtype: Dtype, out: Array) -> None:
    """Convert elements of `dtype` (as stored) to f32 or i32; `out` is C-contiguous and has the shape of `source`."""
    if dtype is Dtype.BF16:
        bits = out.view(np.uint32)
        bits[...] = source
        np.left_shift(bits, 16, out=bits)
    elif dtype in (Dtype.F8E4M3, Dtype.F8E5M2):
        np.take(_f8_table(dtype), source, out=out, mode="clip")
    else:
        out[...] = source


def narrow(source: Array, target: Dtype) -> Array:
    """Cast engine: f32 to bf16 or f8, i32 to i16 or i8 (wraps); returns the stored form, C-contiguous.

    The result may lie in a scratch buffer that the next cast reuses.
    """
    if target is Dtype.BF16:
        return _to_bf16(np.ascontiguousarray(source, np.float32))
    if target is Dtype.F8E4M3:
        return _to_e4m3(source)
    if target is Dtype.F8E5M2:
        return _to_e5m2(source)
    if target in (Dtype.I16, Dtype.I8):
        return source.astype(STORAGE[target])
    raise SimulationError(SimulationError.ILLEGAL, f"no cast to {target.name}")


def _to_bf16(source: Array) -> Array:
    out = SCRATCH.take("cast", source.shape, np.dtype(np.uint16))
    flat_in, flat_out = source.reshape(-1), out.reshape(-1)
    for start in range(0, flat_in.size, BLOCK):
        values = flat_in[start : start + BLOCK]
        bits = values.view(np.uint32)
        work = bits >> 16
        work &= 1
        work += 0x7FFF
        work += bits
        work >>= 16
        result = work.astype(np.uint16)
        nan = values != values
        if nan.any():
            result[nan] = 0x7FC0
        magnitude = result & 0x7FFF
        magnitude -= 1
        subnormal = magnitude < 0x7F
        if subnormal.any():
            result[subnormal] &= 0x8000
        flat_out[start : start + BLOCK] = result
    return out


def _to_e4m3(source: Array) -> Array:
    """Nearest even; overflow and infinity saturate to 448, NaN is 0x7f (the vendor's host model, hardware.md 2.10)."""
    magnitude = np.abs(source.astype(np.float32))
    sign = (np.signbit(source).astype(np.uint8)) << 7
    clipped = np.minimum(np.where(np.isnan(magnitude), 0, magnitude), np.float32(448))
    exponent = np.clip(np.frexp(clipped)[1] - 1, -6, 8)
    step = np.ldexp(np.float32(1), exponent - 3).astype(np.float32)
    units = np.rint(clipped / step).astype(np.int32)  # 8..16 for normal numbers, 0..8 below 2**-6
    code = np.where(units < 8, units, units - 8 + ((exponent + 7) << 3))
    code = np.minimum(code, 0x7E)
    return np.where(np.isnan(magnitude), np.uint8(0x7F), code.astype(np.uint8) | sign).astype(np.uint8)


def _to_e5m2(source: Array) -> Array:
    """Halves round up in magnitude, overflow to infinity, NaN is 0x7e (the vendor's host model, hardware.md 2.10)."""
    magnitude = np.abs(source.astype(np.float32)).astype(np.float64)
    sign = (np.signbit(source).astype(np.uint8)) << 7
    finite = np.where(np.isfinite(magnitude), magnitude, 0)
    exponent = np.clip(np.frexp(finite)[1] - 1, -14, 16)
    step = np.ldexp(1.0, exponent - 2)
    units = np.floor(finite / step + 0.5).astype(np.int32)  # 4..8 for normal numbers, 0..4 below 2**-14
    code = np.where(units < 4, units, units - 4 + ((exponent + 15) << 2))
    code = np.where(np.isinf(magnitude) | (code > 0x7B), 0x7C, code)
    return np.where(np.isnan(magnitude), np.uint8(0x7E), code.astype(np.uint8) | sign).astype(np.uint8)
