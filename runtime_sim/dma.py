"""The tensor DMA: strided copies between HBM and DM, with gather and scatter by byte offsets from HBM.

Transfers that name other units (`peers.py`) consist of transfers of this module, one for each unit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from backend_rngd.isa.descriptors import DM_SLICE_STRIDE, Dma, Endpoint, Space
from runtime_sim.errors import SimulationError
from runtime_sim.memory import Hbm, RowMemory
from runtime_sim.nest import illegal
from runtime_sim.views import GRANULE, Footprint, count, nd, offsets

if TYPE_CHECKING:
    from runtime_sim.functional import Unit

Array = NDArray[Any]
Entry = tuple[int, int]


def slice_and_offset(address: int) -> tuple[int, int]:
    """A DM address or stride of a DMA as (slices, bytes); the byte part lies in [-2 MB, 2 MB)."""
    half = DM_SLICE_STRIDE // 2
    slices = (address + half) // DM_SLICE_STRIDE
    return slices, address - slices * DM_SLICE_STRIDE


@dataclass(frozen=True)
class _Side:
    """One endpoint: the unit whose memory it is, and where its bytes are in the backing array."""

    unit: Unit
    endpoint: Endpoint
    base: int
    strides: tuple[int, ...]
    start: tuple[int, int] = (0, 0)  # DM only: slice and byte offset of the base
    steps: tuple[tuple[int, int], ...] = ()  # DM only: slices and bytes of every stride

    @property
    def in_dm(self) -> bool:
        """Whether the endpoint is DM."""
        return self.endpoint.space is Space.DM

    @property
    def dm(self) -> RowMemory:
        """DM of the side's unit."""
        return self.unit.dm

    @property
    def window(self) -> Hbm:
        """HBM of the side's unit."""
        return self.unit.window

    def address(self, unit: Unit) -> int:
        """Offset of the first byte in the backing array, with the registers of the unit that executes the transfer."""
        return self.base if self.in_dm else self.base + unit.registers[self.endpoint.register]

    def memory(self, address: int) -> NDArray[np.uint8]:
        """The backing array of an address."""
        return self.dm.bytes if self.in_dm else self.window.part(address, 1).hbm


class DmaPlan:
    """A transfer. Views into DM are fixed; views into HBM are cached per register value.

    source, target: units whose memories the two sides are in, the executing unit by default.
    """

    def __init__(self, op: Dma, unit: Unit, source: Unit | None = None, target: Unit | None = None) -> None:
        if not 1 <= op.packet <= 4096:
            raise illegal(f"DMA packet of {op.packet} bytes", "1 to 4096")
        self.op = op
        self.sizes = [n for n, _, _ in op.loops]
        self.source = self._side(op.source, [s for _, s, _ in op.loops], source or unit, "DMA read")
        self.target = self._side(op.destination, [d for _, _, d in op.loops], target or unit, "DMA write")
        self._cache: dict[tuple[int, int], tuple[Array, Array]] = {}
        self._rows: dict[int, list[tuple[slice, Footprint]]] = {}
        self._checked: set[tuple[int, int, int, int]] = set()
        if op.index is not None and len(op.index.strides) != len(op.loops):
            raise illegal(f"index has {len(op.index.strides)} strides for {len(op.loops)} loops")

    def _side(self, endpoint: Endpoint, strides: list[int], unit: Unit, what: str) -> _Side:
        if endpoint.space is Space.HBM:
            return _Side(unit, endpoint, endpoint.base, tuple(strides))
        if endpoint.register:
            raise illegal(f"{what}: a DM endpoint takes no register")
        dm = unit.dm
        first, offset = endpoint.base // DM_SLICE_STRIDE, endpoint.base % DM_SLICE_STRIDE
        low_slice = high_slice = first
        low = high = offset
        steps: list[tuple[int, int]] = []
        for n, stride in zip(self.sizes, strides, strict=True):
            slices, rest = slice_and_offset(stride)
            low_slice, high_slice = low_slice + min(0, (n - 1) * slices), high_slice + max(0, (n - 1) * slices)
            low, high = low + min(0, (n - 1) * rest), high + max(0, (n - 1) * rest)
            steps.append((slices, rest))
        if self.op.index is None or self.op.index.scatter == (what == "DMA read"):
            if low_slice < 0 or high_slice >= dm.rows:
                raise SimulationError(
                    SimulationError.BOUNDS, f"{what} touches slices [{low_slice}, {high_slice}] of {dm.rows}"
                )
            dm.check(low, high + self.op.packet, what)
        strides_in_memory = tuple(slices * dm.pitch + rest for slices, rest in steps)
        return _Side(unit, endpoint, first * dm.pitch + offset, strides_in_memory, (first, offset), tuple(steps))

    # Checks ----------------------------------------------------------------------------------------------------------
    def check(self, unit: Unit) -> None:
        """Bounds and uninitialised bytes, once per register value and generation of the unit's contents."""
        source, target = self.source.address(unit), self.target.address(unit)
        if self.op.index is not None:
            return  # addresses depend on data: checked while running
        key = (self.source.unit.generation, self.target.unit.generation, source, target)
        if key in self._checked:
            return
        self._check_read(self.source, source)
        self._mark_write(self.target, target)
        self._checked.add(key)

    def footprint(self, side: _Side, address: int) -> Footprint:
        return Footprint.of(address, list(zip(self.sizes, side.strides, strict=True)), self.op.packet)

    def _check_read(self, side: _Side, address: int) -> None:
        if side.in_dm:
            for rows, footprint in self.rows(side):
                missing = side.dm.first_unwritten(footprint, rows)
                if missing is not None:
                    raise _uninitialised(f"DM slice {missing[0]} byte {missing[1]}")
            return
        footprint = self.footprint(side, address)
        low, high = _span(footprint)
        home = side.window.part(low, high - low)
        for view in footprint.bits(home.hbm_written[None, :]):
            if not view.all():
                where = np.argwhere(~view)[0]
                at = (
                    footprint.base
                    + sum(int(i) * s for i, (_, s) in zip(where[1:], footprint.loops, strict=False))
                    + int(where[-1]) * GRANULE
                )
                raise _uninitialised(f"HBM byte {at}")

    def _mark_write(self, side: _Side, address: int) -> None:
        if side.in_dm:
            for rows, footprint in self.rows(side):
                side.dm.mark(footprint, rows)
            return
        footprint = self.footprint(side, address)
        low, high = _span(footprint)
        home = side.window.part(low, high - low)
        for view in footprint.bits(home.hbm_written[None, :]):
            view[...] = True

    def rows(self, side: _Side) -> list[tuple[slice, Footprint]]:
        """Slices touched by a DM side, grouped by the footprint they share."""
        known = self._rows.get(id(side))
        if known is None:
            known = self._rows[id(side)] = self._grouped(side)
        return known

    def _grouped(self, side: _Side) -> list[tuple[slice, Footprint]]:
        inside = [(n, rest) for n, (slices, rest) in zip(self.sizes, side.steps, strict=True) if not slices]
        starts = [side.start]
        for n, (slices, rest) in zip(self.sizes, side.steps, strict=True):
            if slices:
                starts = [(s + i * slices, o + i * rest) for s, o in starts for i in range(n)]
        by_offset: dict[int, set[int]] = {}
        for s, o in starts:
            by_offset.setdefault(o, set()).add(s)
        out: list[tuple[slice, Footprint]] = []
        for o, members in by_offset.items():
            footprint = Footprint.of(o, inside, self.op.packet)
            rows = sorted(members)
            step = rows[1] - rows[0] if len(rows) > 1 else 1
            if rows == list(range(rows[0], rows[-1] + 1, step)):
                out.append((slice(rows[0], rows[-1] + 1, step), footprint))
            else:
                out += [(slice(row, row + 1), footprint) for row in rows]
        return out

    # Execution -------------------------------------------------------------------------------------------------------
    def run(self, unit: Unit) -> None:
        """Copy."""
        source, target = self.source.address(unit), self.target.address(unit)
        if self.op.index is not None:
            self._run_indexed(unit, source, target)
            return
        views = self._cache.get((source, target))
        if views is None:
            views = self._views(source, target)
            if len(self._cache) < 64:
                self._cache[(source, target)] = views
        views[1][...] = views[0]

    def written(self, unit: Unit) -> Array:
        """Bytes at the destination with the current registers."""
        source, target = self.source.address(unit), self.target.address(unit)
        if self.op.index is None:
            return self._views(source, target)[1]
        windows = np.lib.stride_tricks.sliding_window_view(self.target.memory(target), self.op.packet)
        return windows[self._indexed_addresses(unit, source, target)[1]]

    def _views(self, source: int, target: int) -> tuple[Array, Array]:
        packet = self.op.packet
        entries = list(zip(self.sizes, self.source.strides, self.target.strides, strict=True))
        kept: list[tuple[int, int, int]] = []
        for n, s, d in entries:
            if n == 1:
                continue
            if d == 0:  # the last write stays
                source += (n - 1) * s
                continue
            if kept and kept[-1][1] == n * s and kept[-1][2] == n * d:
                kept[-1] = (kept[-1][0] * n, s, d)
            else:
                kept.append((n, s, d))
        numbers = [packet, source, target, *(s for _, s, _ in kept), *(d for _, _, d in kept)]
        width = next(w for w in (8, 4, 2, 1) if all(x % w == 0 for x in numbers))
        dtype = np.dtype(f"u{width}")
        kept.append((packet // width, width, width))
        if len(kept) > 1 and kept[-2][1:] == (packet, packet):
            kept[-2:] = [(kept[-2][0] * kept[-1][0], width, width)]
        shape = [n for n, _, _ in kept]
        return (
            nd(self.source.memory(source), dtype, source, shape, [s for _, s, _ in kept]),
            nd(self.target.memory(target), dtype, target, shape, [d for _, _, d in kept]),
        )

    def _run_indexed(self, unit: Unit, source: int, target: int) -> None:
        packet = self.op.packet
        read, write = self._indexed_addresses(unit, source, target)
        self._check_indexed(unit, self.source, read, True)
        self._check_indexed(unit, self.target, write, False)
        from_window = np.lib.stride_tricks.sliding_window_view(self.source.memory(source), packet)
        memory = self.target.memory(target)
        to_window = np.lib.stride_tricks.as_strided(memory, (memory.size - packet + 1, packet), (1, 1))
        to_window[write] = from_window[read]

    def _indexed_addresses(self, unit: Unit, source: int, target: int) -> tuple[Array, Array]:
        """Source and destination of every packet, with the offsets read from the index table."""
        index = self.op.index
        assert index is not None
        first = index.base + unit.registers[index.register]
        at = offsets(first, list(zip(self.sizes, index.strides, strict=True)))
        home = unit.window.part(int(at.min()), int(at.max() - at.min()) + 4)
        written = home.hbm_written
        if unit.checks and not (written[at // GRANULE].all() and written[(at + 3) // GRANULE].all()):
            raise _uninitialised(f"HBM index table at {first}")
        raw = home.hbm[at[..., None] + np.arange(4)]
        values = np.ascontiguousarray(raw).view("<u4")[..., 0].astype(np.int64)
        read = offsets(source, list(zip(self.sizes, self.source.strides, strict=True)))
        write = offsets(target, list(zip(self.sizes, self.target.strides, strict=True)))
        if index.scatter:
            return read, write + self._resolved(self.target, values, unit)
        return read + self._resolved(self.source, values, unit), write

    def _resolved(self, side: _Side, values: Array, unit: Unit) -> Array:
        if not side.in_dm:
            return values
        return values // DM_SLICE_STRIDE * unit.dm.pitch + values % DM_SLICE_STRIDE

    def _check_indexed(self, unit: Unit, side: _Side, addresses: Array, reading: bool) -> None:
        packet = self.op.packet
        if side.in_dm:
            rows, offset = addresses // unit.dm.pitch, addresses % unit.dm.pitch
            if rows.min() < 0 or rows.max() >= unit.dm.rows:
                raise SimulationError(SimulationError.BOUNDS, f"DMA touches slices up to {int(rows.max())}")
            unit.dm.check(int(offset.min()), int(offset.max()) + packet, "DMA")
            grid, first = unit.dm.written, offset
            steps = np.arange(-(-packet // GRANULE) + 1)
            granules = np.minimum(first[..., None] // GRANULE + steps, (first[..., None] + packet - 1) // GRANULE)
            where: Any = (rows[..., None], granules)
        else:
            grid = side.window.part(int(addresses.min()), int(addresses.max() - addresses.min()) + packet).hbm_written
            steps = np.arange(-(-packet // GRANULE) + 1)
            first = addresses[..., None]
            where = np.minimum(first // GRANULE + steps, (first + packet - 1) // GRANULE)
        if not unit.checks:
            return
        if not reading:
            grid[where] = True
        elif not grid[where].all():
            raise _uninitialised(f"{'DM' if side.in_dm else 'HBM'} row of an indexed transfer")


def _span(footprint: Footprint) -> tuple[int, int]:
    high = footprint.base + sum((n - 1) * s for n, s in footprint.loops) + footprint.run
    return footprint.base, high


def _uninitialised(where: str) -> SimulationError:
    return SimulationError(
        SimulationError.UNINITIALISED, f"DMA reads {where}, which nothing has written", "write it first"
    )


def transfer_bytes(op: Dma) -> int:
    """Bytes a transfer moves."""
    return count(op.loops) * op.packet
