"""Instructions decoded once: `plan_of` turns a descriptor into an object whose `run` is a few array operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from backend_rngd.isa.descriptors import Commit, Dma, Dtype, Exec, LoadTrf, LoadVrf, Memset, Notify, Wait
from runtime_sim.contraction import Contraction
from runtime_sim.dma import DmaPlan
from runtime_sim.errors import SimulationError
from runtime_sim.memory import RowMemory
from runtime_sim.nest import ALL, Source, by_flits, flit_width, illegal, source_of
from runtime_sim.numeric import BLOCK, STORAGE, narrow
from runtime_sim.peers import PeerDmaPlan
from runtime_sim.vector import Chain
from runtime_sim.views import Footprint, count, extent, merged, nd, sizes_of, split, strides_of
from runtime_sim.workers import parallel, run_all

if TYPE_CHECKING:
    from runtime_sim.functional import Unit

Array = NDArray[Any]
PARALLEL_ELEMENTS = 1 << 19  # below, handing blocks to threads costs more than it saves


class Plan(Protocol):
    """A decoded instruction."""

    def check(self, unit: Unit) -> None:
        """Raise if the instruction reads bytes nobody has written."""

    def run(self, unit: Unit) -> None:
        """Execute it."""

    def written(self, unit: Unit) -> Array:
        """View of what the last `run` wrote (a copy for indexed transfers)."""
        raise NotImplementedError


class StaticPlan:
    """Reads and writes at fixed addresses: checked at the first run only, because written bytes stay written."""

    def __init__(self) -> None:
        self.reads: list[tuple[RowMemory, Footprint, slice, str]] = []
        self.writes: list[tuple[RowMemory, Footprint, slice]] = []
        self.generation = -1

    def check(self, unit: Unit) -> None:
        """Check reads and remember writes, once per generation of the unit's contents."""
        if self.generation == unit.generation:
            return
        for memory, footprint, rows, what in self.reads:
            missing = memory.first_unwritten(footprint, rows)
            if missing is not None:
                raise SimulationError(
                    SimulationError.UNINITIALISED,
                    f"{what} reads {memory.name} slice {missing[0]} byte {missing[1]}, which nothing has written",
                    "write it first (DMA, commit or memset)",
                )
        for memory, footprint, rows in self.writes:
            memory.mark(footprint, rows)
        self.generation = unit.generation


class ExecPlan(StaticPlan):
    """A Tensor Unit pass."""

    def __init__(self, op: Exec, unit: Unit) -> None:
        super().__init__()
        source = source_of(op.fetch, op.switch, op.slices, unit.dm)
        rows = slice(0, op.slices)
        _fetch_reads(self, op.fetch, unit.dm, rows)
        self.contraction: Contraction | None = None
        self.chain: Chain | None = None
        dtype, packet, packets, pair = source.dtype, source.packet, source.packets, source.pair
        if op.contract is not None:
            self.contraction = engine = Contraction(op.contract, source, unit.trf)
            dtype, packet, packets, pair = engine.result, engine.packet, engine.packets, False
            self.reads += [(unit.trf, footprint, rows, "contraction") for footprint in engine.trf_footprints]
        if op.vector or op.stash_input:
            chain = Chain(op.vector, op.stash_input, source.slices, unit.vrf, packets * packet, packet, dtype, pair)
            self.chain = chain
            self.reads += [(unit.vrf, footprint, rows, "vector operand") for footprint in chain.footprints]
            dtype, pair, packets, packet = chain.dtype, chain.pair, chain.elements // chain.packet, chain.packet
        self.source, self.pair = source, pair
        self.packet, self.packets = packet, packets * (2 if pair else 1)
        self.commit = _Committer(op.commit, source, dtype, self.packet, self.packets, unit.dm)
        self.writes.append((unit.dm, self.commit.footprint, rows))
        _, b, c = source.slices if op.contract is not None else source.nests[0].lead
        self.work = b * c * max(self.packets * self.packet, source.nests[0].elements if op.contract is None else 0)

    def run(self, unit: Unit) -> None:
        """Fetch, contract, vector chain, commit."""
        if self.source.fill is not None and self.contraction is None:
            self.source.fill()
        values = self.contraction.run() if self.contraction is not None else None
        count = self.source.nests[0].lead[0] if values is None else values.shape[0]
        if count == 1 or self.work * count <= BLOCK:
            self._part(values, ALL)
            return
        step = max(1, BLOCK // self.work)
        parts = [slice(first, first + step) for first in range(0, count, step)]
        if self.work * count >= PARALLEL_ELEMENTS and parallel():
            run_all(lambda rows: self._part(values, rows), parts)
        else:
            for rows in parts:
                self._part(values, rows)

    def _part(self, values: Array | None, rows: slice) -> None:
        """Vector chain and commit of part of the first slice axis, from the contraction's result or from DM."""
        if values is not None:
            groups = [values[rows]]
        else:
            cast = self.source.cast
            groups = [nest.load(cast, f"fetch {i}", rows) for i, nest in enumerate(self.source.nests)]
        if self.chain is not None:
            groups = self.chain.run(groups, rows)
        self.commit.store(groups[0] if len(groups) == 1 else _interleaved(groups, self.packet), rows)

    def written(self, unit: Unit) -> Array:
        """The committed elements."""
        return self.commit.view


class _Committer:
    """Cast, trim and commit of a stream [A, B, C, elements]."""

    def __init__(self, commit: Commit, source: Source, dtype: Dtype, packet: int, packets: int, dm: RowMemory) -> None:
        self.dtype = dtype
        self.target = commit.dtype
        self.cast = commit.dtype.bytes != dtype.bytes
        legal = {Dtype.F32: (Dtype.BF16, Dtype.F8E4M3, Dtype.F8E5M2), Dtype.I32: (Dtype.I16, Dtype.I8)}
        if self.cast and commit.dtype not in legal.get(dtype, ()):
            raise illegal(f"the cast engine does not convert {dtype.name} to {commit.dtype.name}")
        if commit.valid * commit.dtype.bytes not in (8, 16, 24, 32):
            raise illegal(
                f"commit keeps {commit.valid * commit.dtype.bytes} bytes of a flit", "8, 16, 24 or 32 are legal"
            )
        self.packet, self.flit, self.valid = packet, flit_width(dtype), commit.valid
        probe = by_flits(np.zeros((1, 1, 1, packet), np.uint8), packet, self.flit, commit.valid)
        kept = probe.size * packets
        loops = merged(commit.loops) or ((1, commit.dtype.bytes),)
        if count(loops) != kept:
            raise illegal(f"commit loops enumerate {count(loops)} elements, the stream has {kept}")
        self.footprint = Footprint.of(commit.base, loops, commit.dtype.bytes)
        dm.check(*extent(commit.base, loops, commit.dtype.bytes), "commit")
        a, b, c = source.slices
        storage = STORAGE[commit.dtype]
        # The commit order of slices is the order in which the switch delivers: (slice2, ring position).
        pitch = dm.pitch
        self.view = nd(
            dm.bytes,
            storage,
            commit.base,
            (a, b, c, *sizes_of(loops)),
            (b * c * pitch, c * pitch, pitch, *strides_of(loops)),
        )
        self.shape = sizes_of(loops)

    def store(self, values: Array, rows: slice) -> None:
        """Write a 32-bit (or, uncast, any) stream to DM, for part of the first slice axis."""
        kept = by_flits(values, self.packet, self.flit, self.valid)
        if self.cast:
            kept = narrow(kept.view(STORAGE[self.dtype]), self.target)
        else:
            kept = np.ascontiguousarray(kept).view(STORAGE[self.target])
        self.view[rows] = kept.reshape(*kept.shape[:3], *self.shape)


def _interleaved(groups: Sequence[Array], packet: int) -> Array:
    """Two groups as one stream of alternating packets."""
    shape = groups[0].shape
    parts = [g.reshape(*shape[:3], -1, 1, packet) for g in groups]
    return np.concatenate(parts, axis=4).reshape(*shape[:3], -1)


def _fetch_reads(plan: StaticPlan, fetch: Any, dm: RowMemory, rows: slice) -> None:
    width = fetch.dtype.bytes
    tensors = [(fetch.base, fetch.loops)]
    if fetch.second is not None:
        tensors.append((fetch.second[0], tuple(zip(sizes_of(fetch.loops), fetch.second[1], strict=True))))
    for base, loops in tensors:
        dm.check(*extent(base, loops, width), "fetch")
        plan.reads.append((dm, Footprint.of(base, loops, width), rows, "fetch"))


class LoadTrfPlan(StaticPlan):
    """StoTRF: the stream, cut in `lanes` equal parts, as contiguous bytes of each lane."""

    def __init__(self, op: LoadTrf, unit: Unit) -> None:
        super().__init__()
        rows = slice(0, op.slices)
        if op.fetch.cast is not None or op.fetch.second is not None or op.fetch.lookup is not None:
            raise illegal("TRF load with a cast, a table or a second tensor")
        if op.lanes not in (1, 2, 4, 8):
            raise illegal(f"TRF load of {op.lanes} lanes")
        if op.fetch.packet * op.fetch.dtype.bytes % 32:
            raise illegal(f"TRF load in packets of {op.fetch.packet * op.fetch.dtype.bytes} bytes", "use whole flits")
        _fetch_reads(self, op.fetch, unit.dm, rows)
        nest = source_of(op.fetch, None, op.slices, unit.dm).nests[0]
        packets = nest.elements // op.fetch.packet
        if packets % op.lanes:
            raise illegal(f"TRF load of {packets} packets into {op.lanes} lanes")
        trf, width = unit.trf, op.fetch.dtype.bytes
        per_lane = nest.elements // op.lanes
        lane_bytes = trf.row_bytes // op.lanes
        if op.base < 0 or op.base + per_lane * width > lane_bytes:
            raise SimulationError(
                SimulationError.BOUNDS,
                f"TRF load of bytes [{op.base}, {op.base + per_lane * width}) of {lane_bytes} in a lane",
            )
        for lane in range(op.lanes):
            self.writes.append((trf, Footprint(op.base + lane * lane_bytes, per_lane * width, ()), rows))
        storage = STORAGE[op.fetch.dtype]
        groups = split(nest.loops, (op.lanes, per_lane))
        self.trf = trf
        if groups is None:
            self.source, shape = nest.view(), (per_lane,)
            self.regroup: tuple[int, ...] | None = (op.slices, op.lanes, per_lane)
        else:
            self.source = nest.view((*(groups[0] if op.lanes > 1 else ()), *groups[1])).reshape(
                op.slices, *sizes_of(groups[0]), *sizes_of(groups[1])
            )
            shape = sizes_of(groups[1])
            self.regroup = None
            if len(groups[0]) > 1:
                self.source, shape, self.regroup = nest.view(), (per_lane,), (op.slices, op.lanes, per_lane)
        strides = tuple(np.zeros(shape, storage).strides)
        target = nd(trf.bytes, storage, op.base, (op.slices, op.lanes, *shape), (trf.pitch, lane_bytes, *strides))
        self.target = target if self.regroup is not None or op.lanes > 1 else target[:, 0]

    def run(self, unit: Unit) -> None:
        """Copy DM to TRF."""
        self.target[...] = self.source if self.regroup is None else self.source.reshape(self.regroup)
        self.trf.version += 1

    def written(self, unit: Unit) -> Array:
        """The loaded elements."""
        return self.target


class LoadVrfPlan(StaticPlan):
    """StoVRF: the stream, widened to 32 bit if asked, as contiguous bytes."""

    def __init__(self, op: LoadVrf, unit: Unit) -> None:
        super().__init__()
        rows = slice(0, op.slices)
        _fetch_reads(self, op.fetch, unit.dm, rows)
        source = source_of(op.fetch, None, op.slices, unit.dm)
        if source.pair or op.fetch.lookup is not None:
            raise illegal("VRF load of two interleaved tensors or through a table")
        self.nest, self.cast = source.nests[0], source.cast
        storage = STORAGE[source.dtype]
        nbytes = self.nest.elements * source.dtype.bytes
        unit.vrf.check(op.base, op.base + nbytes, "VRF load")
        self.writes.append((unit.vrf, Footprint(op.base, nbytes, ()), rows))
        self.target = nd(
            unit.vrf.bytes, storage, op.base, (op.slices, self.nest.elements), (unit.vrf.pitch, source.dtype.bytes)
        )

    def run(self, unit: Unit) -> None:
        """Copy DM to VRF."""
        self.target[...] = self.nest.load(self.cast).reshape(self.target.shape)
        unit.vrf.version += 1

    def written(self, unit: Unit) -> Array:
        """The loaded elements."""
        return self.target


class MemsetPlan(StaticPlan):
    """ITOS: a 32-bit pattern."""

    def __init__(self, op: Memset, unit: Unit) -> None:
        super().__init__()
        if op.base % 4 or op.bytes % 4 or not 1 <= op.slices <= unit.slices:
            raise illegal(f"memset of {op.bytes} bytes at {op.base} of {op.slices} slices", "32-bit units")
        unit.dm.check(op.base, op.base + op.bytes, "memset")
        self.writes.append((unit.dm, Footprint(op.base, op.bytes, ()), slice(0, op.slices)))
        self.view = nd(unit.dm.bytes, np.dtype(np.uint32), op.base, (op.slices, op.bytes // 4), (unit.dm.pitch, 4))
        self.value = np.uint32(op.value & 0xFFFFFFFF)

    def run(self, unit: Unit) -> None:
        """Fill."""
        self.view[...] = self.value

    def written(self, unit: Unit) -> Array:
        """The filled words."""
        return self.view


def _dma_plan(op: Dma, unit: Unit) -> Plan:
    return PeerDmaPlan(op, unit) if op.source.space.is_peer or op.destination.space.is_peer else DmaPlan(op, unit)


def plan_of(op: Exec | LoadTrf | LoadVrf | Memset | Dma | Notify | Wait, unit: Unit) -> Plan:
    """Decode a descriptor for a unit. Notify and wait need other units: `system.py` executes them."""
    makers: dict[type, Callable[[Any, Unit], Plan]] = {
        Exec: ExecPlan,
        LoadTrf: LoadTrfPlan,
        LoadVrf: LoadVrfPlan,
        Memset: MemsetPlan,
        Dma: _dma_plan,
    }
    if isinstance(op, (Notify, Wait)):
        raise illegal(f"{type(op).__name__.lower()} in a program that runs on one unit", "run it with a group of units")
    return makers[type(op)](op, unit)
