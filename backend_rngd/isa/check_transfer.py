"""Legality of register-file loads, memset, DMA and calls."""

from __future__ import annotations

import math

from backend_rngd.isa.check_pass import MULTIPLIED, check_fetch
from backend_rngd.isa.descriptors import (
    DM_SLICE_STRIDE,
    FLIT_BYTES,
    Call,
    Context,
    Dma,
    Endpoint,
    LoadTrf,
    LoadVrf,
    Memset,
    Space,
)
from backend_rngd.isa.footprint import intervals, slice_range, split_stride, within_unit
from backend_rngd.isa.peers import split_address
from backend_rngd.isa.rules import Report, check_loops, extent, writes_twice
from backend_rngd.isa.shape import widest_packet

ARGUMENT_ALIGNMENT = 8
MAX_UNITS = 1 << 16  # of a group and its neighbours; more is a mistake in an address


def check_load_trf(report: Report, desc: LoadTrf, context: Context | None) -> None:
    """StoTRF: main or sub, whole flits, equal lanes."""
    if context is not None and context not in (Context.MAIN, Context.SUB):
        report.add("context", f"a TRF load in context {context.name}")
    if not check_fetch(report, desc.fetch, desc.slices, context):
        return
    fetch = desc.fetch
    width = fetch.dtype.bytes
    elements = math.prod(n for n, _ in fetch.loops)
    if fetch.lookup is not None:
        report.add("lookup", "a TRF load through a table")
    plain = fetch.cast is None and fetch.second is None and fetch.dtype in MULTIPLIED
    if not plain or fetch.packet * width != FLIT_BYTES:
        report.add("trf-load", f"packets of {fetch.packet * width} B of {fetch.dtype.name}, cast or second tensor")
    if desc.lanes not in (1, 2, 4, 8):
        report.add("lanes", f"{desc.lanes} lanes")
        return
    if elements // fetch.packet % desc.lanes or desc.base % FLIT_BYTES:
        report.add("trf-load", f"{elements // fetch.packet} flits into {desc.lanes} lanes at {desc.base}")
    lane = report.machine.trf_bytes_per_slice // desc.lanes
    end = desc.base + elements * width // desc.lanes
    if desc.base < 0 or end > lane:
        report.add("bounds", f"TRF load of bytes [{desc.base}, {end}) of {lane} in a lane")


def check_load_vrf(report: Report, desc: LoadVrf, context: Context | None, absolute: bool) -> None:
    """StoVRF: sub context only (a main pass that writes VRF hangs, KK), 32-bit elements.

    absolute: the packet, which changes nothing else, is as wide as a flit allows (emission sees to it).
    """
    if context is not None and context != Context.SUB:
        report.add("context", f"a VRF load in context {context.name}")
    if not check_fetch(report, desc.fetch, desc.slices, context):
        return
    fetch = desc.fetch
    if fetch.lookup is not None:
        report.add("lookup", "a VRF load through a table")
    width = (fetch.cast or fetch.dtype).bytes
    if width != 4 or fetch.second is not None:
        report.add("vrf-load", f"elements of {width} B, or a second tensor")
        return
    if desc.base % 8:
        report.add("vrf-load", f"VRF load at {desc.base}")
    if fetch.packet * width > FLIT_BYTES or (absolute and fetch.packet != widest_packet(fetch)):
        report.add("flit-packet", f"packets of {fetch.packet} x {width} B, {widest_packet(fetch)} fit")
    end = desc.base + math.prod(n for n, _ in fetch.loops) * width
    if desc.base < 0 or end > report.machine.vrf_bytes:
        report.add("bounds", f"VRF load of bytes [{desc.base}, {end})")


def check_memset(report: Report, desc: Memset, context: Context | None) -> None:
    """ITOS: sub context (generate mode of the commit engine)."""
    if context is not None and context != Context.SUB:
        report.add("context", f"a memset in context {context.name}")
    if not 1 <= desc.slices <= report.machine.slices_per_cluster:
        report.add("slices", f"{desc.slices} slices")
    if desc.base % 8 or desc.bytes % 8 or desc.bytes < 8 or not 0 <= desc.value < 1 << 32:
        report.add("memset", f"{desc.bytes} B at {desc.base} with pattern {desc.value}")
    if desc.base < 0 or desc.base + desc.bytes > report.machine.dm_slice_bytes:
        report.add("bounds", f"memset of DM bytes [{desc.base}, {desc.base + desc.bytes})")


def _check_dm(report: Report, what: str, endpoint: Endpoint, loops: list[tuple[int, int]], packet: int) -> None:
    low, high = extent(endpoint.base % DM_SLICE_STRIDE, [(n, split_stride(s)[1]) for n, s in loops], packet)
    first, last = slice_range(endpoint, loops)
    if low < 0 or high > report.machine.dm_slice_bytes or first < 0 or last > report.machine.slices_per_cluster:
        report.add("bounds", f"DMA {what} of DM bytes [{low}, {high}) of slices [{first}, {last})")


def _check_index(report: Report, desc: Dma) -> bool:
    index = desc.index
    if index is None:
        return True
    if len(index.strides) != len(desc.loops):
        report.add("gather", f"{len(index.strides)} index strides for {len(desc.loops)} loops")
        return False
    spaces = (desc.source.space, desc.destination.space)
    wanted = (Space.DM, Space.HBM) if index.scatter else (Space.HBM, Space.DM)
    if spaces != wanted:
        kind = "scatter" if index.scatter else "gather"
        report.add("gather", f"{kind} from {spaces[0].name} to {spaces[1].name}")
    if index.base < 0 or index.base % 4 or any(s % 4 for s in index.strides):
        report.add("gather", f"indices at {index.base} with strides {index.strides}")
    if not 0 <= index.register < report.machine.registers:
        report.add("dma-register", f"index register {index.register}")
    return True


def check_dma(report: Report, desc: Dma, context: Context | None, absolute: bool) -> None:
    """Tensor DMA limits."""
    machine = report.machine
    if context is not None and context != Context.DMA:
        report.add("context", f"a DMA in context {context.name}")
    if not _check_index(report, desc):
        return
    steps = desc.index.strides if desc.index is not None else (0,) * len(desc.loops)
    columns = [(*loop, step) for loop, step in zip(desc.loops, steps, strict=True)]
    sides = (
        ("read", desc.source, *within_unit(desc.source, [(n, a) for n, a, _ in desc.loops])),
        ("write", desc.destination, *within_unit(desc.destination, [(n, b) for n, _, b in desc.loops])),
    )
    inside = zip(sides[0][3], sides[1][3], steps, strict=True)
    check_loops(report, "DMA", columns, [(a, b, step) for (_, a), (_, b), step in inside])
    packet = desc.packet
    if not 1 <= packet <= machine.dma_packet_max_bytes:
        report.add("dma-packet", f"packet of {packet} B")
        return
    if columns and columns[-1][1:] == (packet, packet, 0):
        run = packet * columns[-1][0]
        if run <= machine.dma_packet_max_bytes:
            report.add("dma-run", f"packets of {packet} B in a run of {run} B")
    mixed = sides[0][2].space != sides[1][2].space
    for what, endpoint, within, loops in sides:
        if endpoint.space.is_peer:
            _check_peer(report, what, endpoint)
        if within.space == Space.DM:
            _check_dm(report, what, within, loops, packet)
        elif within.register == 0 and extent(within.base, loops, packet)[0] < 0:
            report.add("bounds", f"DMA {what} of HBM below 0")
        if endpoint.space == Space.DM and endpoint.register:
            report.add("dma-register", f"register {endpoint.register} of a DM address")
        elif not 0 <= endpoint.register < machine.registers:
            report.add("dma-register", f"register {endpoint.register}")
        aligned = mixed or (within.space == Space.DM and what == "write")
        unit = machine.dma_alignment_bytes
        if aligned and (within.base % unit or packet % unit or any(s % unit for _, s in loops)):
            report.add("dma-alignment", f"{what} of {packet} B at {endpoint.base} with loops {loops}")
    scatter = desc.index is not None and desc.index.scatter
    writes = [(n, b) for n, _, b in desc.loops]
    if not scatter and writes_twice(writes, packet):
        report.add("write-twice", f"DMA loops {desc.loops}")
    peers = desc.source.space.is_peer or desc.destination.space.is_peer
    if absolute and not mixed and not peers and desc.index is None:
        _check_dma_overlap(report, desc, [(n, a) for n, a, _ in desc.loops], writes)


def _check_peer(report: Report, what: str, endpoint: Endpoint) -> None:
    """The unit number of a peer side whose register is 0; the registers' values are looked at in streams."""
    unit, _ = split_address(endpoint.base)
    if endpoint.base < 0 or unit >= MAX_UNITS:
        report.add("peer", f"DMA {what} of unit {unit}")


def _check_dma_overlap(report: Report, desc: Dma, read: list[tuple[int, int]], write: list[tuple[int, int]]) -> None:
    source, target = desc.source, desc.destination
    if source.space == Space.HBM:
        if source.register != target.register:
            return
        a, b = intervals(source.base, read, desc.packet), intervals(target.base, write, desc.packet)
    else:
        x, y = slice_range(source, read), slice_range(target, write)
        if x[1] <= y[0] or y[1] <= x[0]:
            return
        a = intervals(source.base % DM_SLICE_STRIDE, [(n, split_stride(s)[1]) for n, s in read], desc.packet)
        b = intervals(target.base % DM_SLICE_STRIDE, [(n, split_stride(s)[1]) for n, s in write], desc.packet)
    if any(p[0] < q[1] and q[0] < p[1] for p in a for q in b):
        report.add("overlap", f"the transfer writes bytes it reads at {source.base}")


def check_call(report: Report, desc: Call, context: Context | None) -> None:
    """Control flow: every destination register once, register 0 stays 0."""
    if context is not None and context != Context.CONTROL:
        report.add("context", f"a call in context {context.name}")
    targets = [d for d, _, _ in desc.moves]
    if len(set(targets)) != len(targets):
        report.add("call", "a register is set twice")
    for target, source, immediate in desc.moves:
        if not 0 < target < report.machine.registers or not 0 <= source < report.machine.registers:
            report.add("call", f"move from register {source} to {target}")
        if immediate % ARGUMENT_ALIGNMENT:
            report.add("dma-alignment", f"register {target} is set to an address that is not a multiple of 8")
