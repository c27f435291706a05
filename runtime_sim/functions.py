"""The operations of the vector ALUs on arrays."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backend_rngd.isa.descriptors import Op
from runtime_sim.numeric import BLOCK

Array = NDArray[Any]
Binary = Callable[..., Array]


@cache
def _erf_series() -> np.polynomial.Chebyshev:
    """erf(x) / x as a series in x**2 on [0, 16]; beyond 4, erf is 1 in f32."""

    def ratio(t: Array) -> Array:
        x = np.sqrt(t)
        return np.array([math.erf(v) / v if v > 1e-8 else 2 / math.sqrt(math.pi) for v in x])

    return np.polynomial.Chebyshev.interpolate(ratio, 30, domain=[0, 16])


def erf(x: Array) -> Array:
    """Error function, within 1 ULP of f32."""
    wide = np.clip(x.astype(np.float64), -4, 4)
    flat = wide.reshape(-1)
    for start in range(0, flat.size, BLOCK):
        part = flat[start : start + BLOCK]
        part *= _erf_series()(part * part)
    return wide.astype(np.float32)


def _sigmoid(x: Array) -> Array:
    out = np.negative(x)
    np.exp(out, out=out)
    out += np.float32(1)
    return np.divide(np.float32(1), out, out=out)


UNARY: dict[Op, Callable[[Array], Array]] = {
    Op.EXP: np.exp,
    Op.NEG_EXP: lambda x: np.exp(-x),
    Op.SQRT: np.sqrt,
    Op.TANH: np.tanh,
    Op.SIGMOID: _sigmoid,
    Op.ERF: erf,
    Op.LOG: np.log,
    Op.SIN: np.sin,
    Op.COS: np.cos,
}
BINARY: dict[Op, Binary] = {
    Op.ADD: np.add,
    Op.SUB: np.subtract,
    Op.MUL: np.multiply,
    Op.DIV: np.divide,
    Op.MAX: np.maximum,
    Op.MIN: np.minimum,
    Op.AND: np.bitwise_and,
    Op.OR: np.bitwise_or,
    Op.XOR: np.bitwise_xor,
    Op.SHL: np.left_shift,
    Op.LSHR: np.right_shift,
    Op.ASHR: np.right_shift,
}


def saturating_add(a: Array, b: Array, out: Array | None = None) -> Array:
    """i32 addition that saturates."""
    total = np.add(a, b, dtype=np.int64)
    result = np.clip(total, -(2**31), 2**31 - 1).astype(np.int32)
    if out is not None:
        out[...] = result
        return out
    return result


def to_fixed(values: Array) -> Array:
    """f32 to i32: nearest even, saturating, NaN to 0."""
    wide = np.rint(values.astype(np.float64))
    np.nan_to_num(wide, copy=False, nan=0.0, posinf=2.0**31, neginf=-(2.0**31))
    return np.clip(wide, -(2.0**31), 2.0**31 - 1).astype(np.int32)
