"""Closed forms of DMA time (hardware.md 3.3): own memories, memories of other units of a card, and other cards.

All times are cycles of the 1 GHz tensor clock. `formulas` re-exports everything here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from backend_rngd.isa.descriptors import DM_SLICE_STRIDE, Dma, Endpoint, Space
from backend_rngd.isa.peers import split_unit_stride
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

    read_requests, write_requests: of at most 256 B, one a cycle. hbm_lines: 256 B lines moved in HBM in all, of which
    read_lines and write_lines. partial_writes: HBM write requests that cover part of a granule (read-modify-write).
    misaligned: a slice's piece starts off a 256 B boundary of HBM. serial: reads and writes share one memory port.
    descriptors: one for each unit named by a peer side (hardware.md 3.1, homogeneous aggregate).
    """

    read_requests: int
    write_requests: int
    hbm_read_bytes: int
    hbm_write_bytes: int
    read_lines: int
    write_lines: int
    partial_writes: int
    misaligned: bool
    serial: bool
    descriptors: int = 1

    @property
    def hbm_lines(self) -> int:
        """Lines read and written."""
        return self.read_lines + self.write_lines


def dma_requests(packets: int, packet_bytes: int, request_bytes: int = 256) -> int:
    """Requests of `packets` runs of `packet_bytes` bytes."""
    return packets * -(-packet_bytes // request_bytes)


def _lines(base: int, strides: list[int], packets: int, packet: int, line: int) -> int:
    """256 B lines touched by the runs of one side in HBM; exact when every run starts at the same offset in a line."""
    if all(s % line == 0 for s in strides):
        return packets * -(-(base % line + packet) // line)
    step = math.gcd(line, base, *strides)
    offsets = range(base % step, line, step)
    crossings = sum(-(-(o + packet) // line) for o in offsets)
    return round(packets * crossings / len(offsets))


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
    """Requests and bytes of a transfer (register values are taken as multiples of a line)."""
    packets = math.prod(n for n, _, _ in desc.loops)
    requests = dma_requests(packets, desc.packet, machine.dma_request_bytes)
    line = machine.hbm_line_bytes
    read_hbm, write_hbm = _is_hbm(desc.source), _is_hbm(desc.destination)
    read_lines = write_lines = partial = 0
    misaligned = False
    if read_hbm:
        inside = _inside(desc.source, [a for _, a, _ in desc.loops])
        strides = inside if desc.index is None or desc.index.scatter else [line]
        read_lines = _lines(desc.source.base, strides, packets, desc.packet, line)
        misaligned = desc.source.base % line != 0 or any(s % line for s in strides)
    if write_hbm:
        strides = _inside(desc.destination, [b for _, _, b in desc.loops])
        write_lines = _lines(desc.destination.base, strides, packets, desc.packet, line)
        misaligned = misaligned or desc.destination.base % line != 0 or any(s % line for s in strides)
        granule = machine.hbm_write_granule_bytes
        if any(x % granule for x in (desc.destination.base, desc.packet, *strides)):
            partial = requests
    moved = packets * desc.packet
    return DmaWork(
        requests,
        requests,
        moved if read_hbm else 0,
        moved if write_hbm else 0,
        read_lines,
        write_lines,
        partial,
        misaligned,
        read_hbm == write_hbm,
        _descriptors(desc),
    )


def dma_cycles(
    read_requests: int,
    write_requests: int,
    serial: bool,
    machine: Machine,
    engines: int = 1,
    channel_requests: int = 0,
    row_conflicts: bool = False,
) -> float:
    """Start-up + requests at one a cycle an engine; HBM to HBM and DM to DM pay reads and writes one after the other.

    channel_requests: requests of the busiest HBM channel, which takes 5.33 cycles for each (a row switch if
    `row_conflicts`).
    """
    rate = machine.dma_engine_bytes_per_cycle / machine.dma_request_bytes
    requests = read_requests + write_requests if serial else max(read_requests, write_requests)
    per_line = machine.hbm_line_bytes / machine.hbm_channel_bytes_per_cycle
    channel = channel_requests * (machine.hbm_row_switch_cycles if row_conflicts else per_line)
    return machine.dma_startup_cycles + max(requests / (rate * engines), channel)


def dma_startup(desc: Dma, machine: Machine, reach: Reach = OWN) -> float:
    """Cycles before the first byte moves: the command, a descriptor for every further unit, the way to another card."""
    cycles = machine.dma_startup_cycles + (_descriptors(desc) - 1) * machine.dma_descriptor_cycles
    return float(cycles + (machine.pcie_latency_cycles if reach.card else 0))


def dma_time(desc: Dma, machine: Machine, engines: int = 1, reach: Reach = OWN) -> float:
    """Cycles of a transfer that has the card for itself: the engine's rate, the channels' rate and partial writes.

    reach: where the peer side lies. A part in the other cluster's DM moves at `dm_cross_cluster_bytes_per_cycle` and
    one on another card at `pcie_peer_bytes_per_cycle`; neither shares a port with its other side, so that reads and
    writes overlap. Raises ValueError for DM on another card: cards reach each other's HBM only (hardware.md 7.3).
    """
    work = dma_work(desc, machine)
    if reach.card and Space.PEER_DM in (desc.source.space, desc.destination.space):
        raise ValueError("data memory of another card cannot be reached; go through its HBM")
    startup = machine.dma_startup_cycles
    channel = work.hbm_lines / machine.hbm_channels / machine.hbm_efficiency
    cycles = dma_cycles(
        work.read_requests, work.write_requests, work.serial, machine, engines, channel_requests=math.ceil(channel)
    )
    if reach.chip or reach.card:
        cycles = startup + _far(desc, work, machine, engines, reach, cycles - startup)
    if work.misaligned and desc.packet < machine.hbm_line_bytes:
        cycles = startup + (cycles - startup) * machine.dma_unaligned_piece_factor
    # A read-modify-write holds its channel; the channels work side by side.
    per_line = machine.hbm_line_bytes / machine.hbm_channel_bytes_per_cycle
    rmw = work.partial_writes * per_line * machine.hbm_unaligned_write_factor / machine.hbm_channels
    return max(cycles, startup + rmw) + (dma_startup(desc, machine, reach) - startup)


def _far(desc: Dma, work: DmaWork, machine: Machine, engines: int, reach: Reach, near: float) -> float:
    """Data cycles when part of a transfer leaves the cluster; `near` is what all of it would take inside."""
    request = work.read_requests * machine.dma_request_bytes / (machine.dma_engine_bytes_per_cycle * engines)
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
