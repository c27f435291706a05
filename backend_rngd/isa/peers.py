"""Addresses in the memories of other units, and who is notified."""

from __future__ import annotations

from backend_rngd.isa.descriptors import UNIT_STRIDE, Notify


def split_address(address: int) -> tuple[int, int]:
    """A peer address (register value + base) as (unit, byte address in that unit's HBM window or DM)."""
    unit = address // UNIT_STRIDE
    return unit, address - unit * UNIT_STRIDE


def split_unit_stride(stride: int) -> tuple[int, int]:
    """A stride of a peer side as (units, bytes inside a unit's memory); the byte part may be negative."""
    units = (stride + UNIT_STRIDE // 2) // UNIT_STRIDE
    return units, stride - units * UNIT_STRIDE


def notified(desc: Notify, value: int, own: int | None = None) -> tuple[int, ...]:
    """Units whose semaphore a notify raises, in the order of its loops, one entry for each addition.

    value: contents of its register. own: number of the unit that executes it, which is left out (None: keep it).
    """
    units = [split_address(value + desc.base)[0]]
    for size, stride in desc.units:
        units = [unit + i * stride for unit in units for i in range(size)]
    return tuple(unit for unit in units if unit != own)
