"""Closed forms of DMA time (hardware.md 3.3): own memories, memories of other units of a card, and other cards.

All times are cycles of the 1 GHz tensor clock. `formulas` re-exports everything here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from backend_rngd.isa.descriptors import DM_SLICE_STRIDE, Dma, Endpoint, Space
from backend_rngd.isa.peers import split_unit_stride
from backend_rngd.machine.address_map import HbmUse, hbm_use
from backend_rngd.machine.description import Machine


class Reach(NamedTuple):
    """Shares (sum 1) of a transfer's bytes by where its peer side lies, seen from the unit that executes it.

    own: its own memory. cluster: another unit of its cluster. chip: the card's other cluster. card: another card.
    """

    own: float = 1.0
    cluster: float = 0.0
    chip: float = 0.0
    card: float = 0.0


OWN = Reach()


@dataclass(frozen=True)
class DmaWork:
    """What a transfer asks of the engine and the memories.

    read_requests, write_requests: of at most 256 B, one a cycle. read, write: what its sides ask of HBM (None: not in
    HBM). read_networks, write_networks: cycles that the data-memory networks of its sides need at least (0: not in data
    memory, or the mode has no such limit). serial: reads and writes share one memory port. descriptors: one for each
    unit named by a peer side (hardware.md 3.1, homogeneous aggregate).
    """

    read_requests: int
    write_requests: int
    hbm_read_bytes: int
    hbm_write_bytes: int
    read: HbmUse | None
    write: HbmUse | None
    read_networks: float
    write_networks: float
    serial: bool
    descriptors: int = 1

    @property
    def read_lines(self) -> int:
        """Line transfers of the reading side."""
        return self.read.lines if self.read else 0

    @property
    def write_lines(self) -> int:
        """Line transfers of the writing side."""
        return self.write.lines if self.write else 0

    @property
    def hbm_lines(self) -> int:
        """Lines read and written."""
        return self.read_lines + self.write_lines

    @property
    def busiest_lines(self) -> float:
        """Line transfers of the busiest HBM channel (of both sides, as if it were the same one)."""
        return (self.read.busiest if self.read else 0.0) + (self.write.busiest if self.write else 0.0)

    @property
    def row_cycles(self) -> float:
        """Cycles that the busiest bank opens rows, if its channel waits for them."""
        return max(side.row_cycles if side else 0.0 for side in (self.read, self.write))


def dma_requests(packets: int, packet_bytes: int, request_bytes: int = 256) -> int:
    """Requests of `packets` runs of `packet_bytes` bytes."""
    return packets * -(-packet_bytes // request_bytes)


def _is_hbm(side: Endpoint) -> bool:
    return side.space in (Space.HBM, Space.PEER_HBM)


def _inside(side: Endpoint, strides: list[int]) -> list[int]:
    """Strides inside a memory: without the units of a peer side."""
    return [split_unit_stride(s)[1] for s in strides] if side.space.is_peer else strides


def _descriptors(desc: Dma) -> int:
    """Units that the loops of a peer side run over."""
    count = 1
    for side, column in ((desc.source, 1), (desc.destination, 2)):
        if side.space.is_peer:
            count *= math.prod(loop[0] for loop in desc.loops if split_unit_stride(loop[column])[0])
    return count


def dma_work(desc: Dma, machine: Machine) -> DmaWork:
    """Requests, lines and bytes of a transfer (register values are taken as multiples of what the map repeats with)."""
    packets = math.prod(n for n, _, _ in desc.loops)
    requests = dma_requests(packets, desc.packet, machine.dma_request_bytes)
    hbm: list[HbmUse | None] = [None, None]
    networks = [0.0, 0.0]
    for side, endpoint in enumerate((desc.source, desc.destination)):
        inside = _inside(endpoint, [loop[1 + side] for loop in desc.loops])
        if _is_hbm(endpoint):
            if desc.index is not None and bool(side) == desc.index.scatter:
                inside = [machine.hbm_line_bytes] * len(inside)  # rows named by the index: taken as whole lines
            loops = tuple((n, s) for (n, _, _), s in zip(desc.loops, inside, strict=True))
            hbm[side] = hbm_use(endpoint.base, loops, desc.packet, bool(side), machine)
        elif endpoint.space in (Space.DM, Space.PEER_DM):
            loops = tuple((n, s) for (n, _, _), s in zip(desc.loops, inside, strict=True))
            networks[side] = network_cycles(loops, desc.packet, machine)
    moved = packets * desc.packet
    return DmaWork(
        requests,
        requests,
        moved if hbm[0] else 0,
        moved if hbm[1] else 0,
        hbm[0],
        hbm[1],
        networks[0],
        networks[1],
        _is_hbm(desc.source) == _is_hbm(desc.destination),
        _descriptors(desc),
    )


def slices_at_once(loops: tuple[tuple[int, int], ...], packet: int, machine: Machine) -> float:
    """Slices of a unit that a transfer's bytes reach side by side: runs that fit the two requests a slice queues reach
    all of a network, of longer ones as many as are on the way at once. 0 if the mode says nothing of it."""
    if not machine.dmn_window_bytes:
        return 0.0
    run = packet
    for n, stride in reversed(loops):
        if abs(stride) >= machine.dm_slice_stride // 2:
            break
        run *= n
    queued = 2 * machine.dma_request_bytes
    return float(machine.slices_per_dmn) if run <= queued else max(1.0, machine.dmn_window_bytes / run)


def network_cycles(loops: tuple[tuple[int, int], ...], packet: int, machine: Machine) -> float:
    """Cycles that one engine needs for the data-memory side of a transfer.

    32 slices share a network of 128 B a cycle. An engine issues in the order of the loops and has
    `dmn_window_bytes` on the way: while a burst to one network is longer than that, the other network of the pair
    idles. 0 if the mode has no window, and for memory that no slice stride names.
    """
    if not machine.dmn_window_bytes:
        return 0.0
    return _network_cycles(
        tuple((n, s) for n, s in loops if n > 1), packet, machine.dm_slice_stride, machine.slices_per_dmn,
        machine.dmn_bytes_per_cycle, machine.dmn_window_bytes,
    )  # fmt: skip


@lru_cache(maxsize=1 << 14)
def _network_cycles(
    loops: tuple[tuple[int, int], ...], packet: int, stride: int, slices: int, rate: int, window: float
) -> float:
    steps = [(n, (s + stride // 2) // stride) for n, s in loops]
    network = np.zeros(1, np.int64)
    repeats = packets = 1
    for n, step in reversed(steps):  # innermost first
        packets *= n
        # A loop inside one slice repeats what is inside it; two rounds show every change of network.
        shown = n if step else min(n, 2)
        if len(network) * shown > 1 << 16:
            repeats *= n
            continue
        repeats *= n // shown if not step else 1
        network = (np.arange(shown)[:, None] * step + network[None, :]).reshape(-1)
    network //= slices
    moved = packets * -(-packet // rate) * rate  # a port moves whole beats
    pair = network & 1
    fullest = max(int(pair.sum()), len(pair) - int(pair.sum())) / len(pair) * moved
    bursts = 1 + int((np.diff(network) != 0).sum())
    burst = moved / (bursts * repeats)
    overlapped = min(burst, window) / burst if bursts > 1 else 0.0
    engine = moved / (2 * rate)
    return max(engine, fullest / rate if bursts > 1 else moved / rate, moved * (1.0 - overlapped) / rate)


def dma_startup(desc: Dma, machine: Machine, reach: Reach = OWN) -> float:
    """Cycles before the first byte moves: the command, a descriptor for every further unit, the way to another card."""
    cycles = machine.dma_startup_cycles + (_descriptors(desc) - 1) * machine.dma_descriptor_cycles
    return float(cycles + (machine.pcie_latency_cycles if reach.card else 0))


def dma_time(desc: Dma, machine: Machine, engines: int = 1, reach: Reach = OWN) -> float:
    """Cycles of a transfer that has the card for itself: the slowest of the engine, the data-memory networks, the
    busiest HBM channel and its rows.

    reach: where the peer side lies. A part in the other cluster's DM moves at `dm_cross_cluster_bytes_per_cycle` and
    one on another card at `pcie_peer_bytes_per_cycle`; neither shares a port with its other side, so that reads and
    writes overlap. Raises ValueError for DM on another card: cards reach each other's HBM only (hardware.md 7.3).
    """
    work = dma_work(desc, machine)
    if reach.card and Space.PEER_DM in (desc.source.space, desc.destination.space):
        raise ValueError("data memory of another card cannot be reached; go through its HBM")
    rate = engine_bytes_per_cycle(work, machine) * engines / machine.dma_request_bytes
    both = work.read_requests + work.write_requests
    requests = both if work.serial else max(work.read_requests, work.write_requests)
    networks = (work.read_networks + work.write_networks) / engines
    cycles = max(requests / rate, networks)
    if reach.chip or reach.card:
        cycles = _far(desc, work, machine, engines, reach, cycles)
    per_line = machine.hbm_line_bytes / machine.hbm_channel_bytes_per_cycle
    channel = work.busiest_lines * per_line / machine.hbm_efficiency
    return dma_startup(desc, machine, reach) + max(cycles, channel, work.row_cycles)


def engine_bytes_per_cycle(work: DmaWork, machine: Machine) -> float:
    """Bytes a cycle of one engine: less when requests wait for HBM."""
    from_hbm = machine.dma_hbm_bytes_per_cycle if work.read or work.write else machine.dma_engine_bytes_per_cycle
    return min(from_hbm, machine.dma_engine_bytes_per_cycle)


def _far(desc: Dma, work: DmaWork, machine: Machine, engines: int, reach: Reach, near: float) -> float:
    """Data cycles when part of a transfer leaves the cluster; `near` is what all of it would take inside."""
    request = work.read_requests * machine.dma_request_bytes / (engine_bytes_per_cycle(work, machine) * engines)
    moved = math.prod(n for n, _, _ in desc.loops) * desc.packet
    touches_dm = Space.PEER_DM in (desc.source.space, desc.destination.space)
    cross = max(request, moved / (machine.dm_cross_cluster_bytes_per_cycle * engines)) if touches_dm else near
    card = max(request, moved / machine.pcie_peer_bytes_per_cycle)
    return (reach.own + reach.cluster) * near + reach.chip * cross + reach.card * card


def slices_touched(desc: Dma) -> int:
    """Slices on the DM side of a transfer (0 if there is none): distinct multiples of 4 MB in its strides."""
    for endpoint, column in ((desc.destination, 2), (desc.source, 1)):
        if endpoint.space in (Space.DM, Space.PEER_DM):
            strides = _inside(endpoint, [loop[column] for loop in desc.loops])
            counts = [loop[0] for loop, s in zip(desc.loops, strides) if abs(s) >= DM_SLICE_STRIDE // 2]
            return math.prod(counts)
    return 0
