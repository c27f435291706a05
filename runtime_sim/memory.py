"""Memories: HBM (sparse, byte addressed) and a unit's DM, TRF and VRF (one row of bytes a slice)."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backend_rngd.machine import Machine
from runtime_sim.errors import SimulationError
from runtime_sim.views import GRANULE, Footprint

# Slices are kept this many bytes further apart than they are big: a power-of-two distance would map the same offset of
# all slices to the same sets of the host's caches.
SLICE_SKEW = 64 * 33


def _sparse(nbytes: int) -> NDArray[np.uint8]:
    """Zeroed bytes that take host memory only where they are touched."""
    no_reserve = 0x4000  # MAP_NORESERVE of Linux, which Python 3.11 does not name
    try:
        block = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    except (OSError, ValueError):
        return np.zeros(nbytes, np.uint8)
    return np.frombuffer(block, np.uint8)


class Hbm:
    """Bytes of HBM addressed from 0, as a unit sees them (hardware.md 1.1: every unit has an address translation).

    With `shared`, addresses below `split` are those of another window: replicas on a card read the same weights.
    """

    def __init__(self, machine: Machine, nbytes: int, shared: Hbm | None = None, split: int = 0) -> None:
        self.machine = machine
        self.hbm_bytes = nbytes
        self.shared = shared
        self.split = split if shared is not None else 0
        rounded = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self.hbm = _sparse(rounded)
        self.hbm_written = _sparse(rounded // GRANULE).view(np.bool_)

    def check_range(self, address: int, nbytes: int) -> None:
        """Raise if [address, address + nbytes) is not HBM."""
        if address < 0 or address + nbytes > self.hbm_bytes:
            raise SimulationError(
                SimulationError.BOUNDS,
                f"HBM bytes [{address}, {address + nbytes}) of {self.hbm_bytes}",
                "check the register values and the size of the HBM map",
            )

    def part(self, address: int, nbytes: int) -> Hbm:
        """The window that holds a range: this one or the one whose weights it shares. Raises SimulationError."""
        self.check_range(address, nbytes)
        if address >= self.split or self.shared is None:
            return self
        if address + nbytes > self.split:
            what = f"HBM bytes [{address}, {address + nbytes}) begin in the shared weights and end behind them"
            raise SimulationError(SimulationError.BOUNDS, what)
        return self.shared

    def write(self, address: int, data: bytes | bytearray | memoryview | NDArray[Any]) -> None:
        """Host write: copy `data` (bytes or any contiguous array) to HBM."""
        raw = (
            np.ascontiguousarray(data).reshape(-1).view(np.uint8)
            if isinstance(data, np.ndarray)
            else np.frombuffer(data, np.uint8)
        )
        home = self.part(address, raw.size)
        home.hbm[address : address + raw.size] = raw
        home.mark(address, raw.size)

    def read(self, address: int, nbytes: int) -> NDArray[np.uint8]:
        """Host read: a copy of `nbytes` bytes of HBM."""
        return self.part(address, nbytes).hbm[address : address + nbytes].copy()

    def clear(self, address: int, nbytes: int) -> None:
        """Host write of zeros."""
        home = self.part(address, nbytes)
        home.hbm[address : address + nbytes] = 0
        home.mark(address, nbytes)

    def mark(self, address: int, nbytes: int) -> None:
        """Remember that a range holds data."""
        if nbytes:
            self.hbm_written[address // GRANULE : -(-(address + nbytes) // GRANULE)] = True


class Card(Hbm):
    """The HBM of a card whose only unit addresses all of it.

    `hbm_bytes` may be smaller than the machine's 48 GB to catch stray addresses earlier.
    """

    def __init__(self, machine: Machine, hbm_bytes: int | None = None) -> None:
        super().__init__(machine, int(hbm_bytes if hbm_bytes is not None else machine.hbm_bytes))


class RowMemory:
    """A memory of every slice: `rows` rows of `row_bytes` bytes, with a map of the 8-byte granules written so far."""

    def __init__(self, name: str, rows: int, row_bytes: int) -> None:
        self.name = name
        self.rows = rows
        self.row_bytes = row_bytes
        self.pitch = row_bytes + SLICE_SKEW
        self.bytes = _sparse(rows * self.pitch)
        self.written = _sparse(rows * (row_bytes // GRANULE)).view(np.bool_).reshape(rows, -1)
        self.touched = False
        self.version = 0

    @property
    def grid(self) -> NDArray[np.uint8]:
        """Bytes as [rows, row_bytes]."""
        return self.bytes.reshape(self.rows, self.pitch)[:, : self.row_bytes]

    def check(self, low: int, high: int, what: str) -> None:
        """Raise if bytes [low, high) of a row do not exist."""
        if low < 0 or high > self.row_bytes:
            raise SimulationError(
                SimulationError.BOUNDS, f"{what} touches {self.name} bytes [{low}, {high}) of {self.row_bytes} a slice"
            )

    def first_unwritten(self, footprint: Footprint, rows: slice) -> tuple[int, int] | None:
        """(slice, byte offset) of the first granule of `footprint` never written, or None."""
        views = footprint.bits(self.written[rows])
        if all(bool(view.all()) for view in views):
            return None
        touched = np.zeros((1, self.written.shape[1]), np.bool_)
        for view in footprint.bits(touched):
            view[...] = True
        missing = touched & ~self.written[rows]
        row, granule = (int(x[0]) for x in np.nonzero(missing))
        return (rows.start or 0) + row * (rows.step or 1), granule * GRANULE

    def mark(self, footprint: Footprint, rows: slice) -> None:
        """Remember that the bytes of `footprint` hold data in `rows`."""
        self.touched = True
        for view in footprint.bits(self.written[rows]):
            view[...] = True

    def forget(self) -> None:
        """Treat all contents as uninitialised again."""
        if self.touched:  # else the map takes no memory yet
            self.written[...] = False
            self.touched = False
