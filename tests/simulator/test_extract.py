"""Tensors read back through probe layouts."""

import json

import drawing as draw_
import numpy as np
import pytest

from runtime_sim.errors import SimulationError
from runtime_sim.extract import extract
from runtime_sim.functional import Card, Unit


@pytest.fixture
def unit() -> Unit:
    return Unit(Card(draw_.MACHINE, 1 << 16), 4)


def test_rows_over_slices_with_an_unfilled_last_slice(unit):
    """Seven rows, two a slice, bf16, 16 B apart, features transposed in the logical shape."""
    rows = np.arange(7 * 3, dtype=np.float32).reshape(7, 3)
    for r in range(7):
        bits = (rows[r].view(np.uint32) >> 16).astype(np.uint16)
        unit.dm.grid[r // 2, 128 + r % 2 * 16 :][:6] = bits.view(np.uint8)
    layout = {
        "dtype": "bf16",
        "shape": [3, 7],
        "base": 28,
        "space": "dm",
        "digits": [[1, 4, 1, 0], [1, 2, 0, 16], [0, 3, 0, 2]],
    }
    np.testing.assert_array_equal(extract(unit, json.dumps(layout), address=100), rows.T)


def test_hbm_at_a_register(unit):
    values = np.arange(12, dtype=np.int32)
    unit.window.write(4096, values)
    layout = {"dtype": "i32", "shape": [3, 4], "base": 96, "space": "hbm", "digits": [[0, 3, 0, 16], [1, 4, 0, 4]]}
    registers = [0] * 64
    registers[2] = 4000
    np.testing.assert_array_equal(extract(unit, layout, registers=registers, register=2), values.reshape(3, 4))


def test_out_of_bounds_and_missing_digits(unit):
    layout = {"dtype": "f32", "shape": [8], "base": 0, "space": "dm", "digits": [[0, 8, 1, 0]]}
    with pytest.raises(SimulationError, match="slices"):
        extract(unit, layout)
    with pytest.raises(SimulationError, match="5 positions"):
        extract(unit, {**layout, "digits": [[0, 5, 0, 4]]})
