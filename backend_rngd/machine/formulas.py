"""Closed forms of engine time (hardware.md 5.1), each once. All times are cycles of the 1 GHz tensor clock.

The compiler's cost model and the timing simulator use the same functions. `documented` mode reproduces the worked
cases of the public book; `silicon` mode adds the measured issue and fill costs that the machine description holds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from backend_rngd.isa.descriptors import (
    DM_SLICE_STRIDE,
    Alu,
    Context,
    Dma,
    Exec,
    Fetch,
    LaneMode,
    LoadTrf,
    LoadVrf,
    Memset,
    Space,
)
from backend_rngd.isa.shape import (
    access_bytes,
    after_op,
    columns,
    contracted,
    fetched,
    kept_steps,
    multiplier_elements,
    switched,
    time_broadcast,
)
from backend_rngd.machine.description import Machine


# Engines -------------------------------------------------------------------------------------------------------------
def fetch_cycles(time: int, packet_bytes: int, read_bytes: int) -> float:
    """`time` packets read in accesses of `read_bytes` (main up to 32 B, sub 8 B)."""
    return time * packet_bytes / read_bytes


def switch_cycles(ring: int, time: int, flits_per_packet: int) -> int:
    """Packets of `time` input steps going round a ring of `ring` slices; all rings work in parallel."""
    return ring * time * flits_per_packet


def collect_flits(time: int, packet_bytes: int, flit_bytes: int = 32) -> int:
    """Flits of `time` packets, each padded to whole flits."""
    return time * -(-packet_bytes // flit_bytes)


def packet_reducer_latency(packet_elements: int) -> int:
    """Levels of the adder tree of a full multiplier packet: 7 for i4, 6 for i8 and f8, 5 for bf16."""
    return max(packet_elements - 1, 0).bit_length()


def contraction_cycles(packets: int, pack: int, time_broadcast: int) -> int:
    """`packets` multiplier packets of `pack` flits, each used `time_broadcast` times: the stream delivers a flit a
    cycle."""
    return packets * max(pack, time_broadcast)


def lane_folder_flits(mode: LaneMode, kept: int, columns: int, lanes: int) -> int:
    """Output flits, one a cycle: a column of all lanes (interleaved) or 8 columns of a lane (sequential)."""
    return kept * columns if mode == LaneMode.INTERLEAVED else kept * lanes * -(-columns // 8)


def vector_cycles(flits: int, narrow: bool) -> int:
    """8-wide stages take a flit a cycle; the float stages are 4-wide and split a full flit in two."""
    return flits * 2 if narrow else flits


def transpose_cycles(in_rows: int, in_cols: int, out_rows: int, n: int, valid: int = 8) -> int:
    """`n` tiles through the transpose engine; `valid` elements of a flit are used (8; 16 for 4-bit elements)."""
    in_flits = in_rows * in_cols // valid
    if in_cols > 16:
        return n * (in_flits + out_rows)
    return in_flits + (n - 1) * max(in_flits, out_rows) + out_rows


def commit_cycles(flits: int, valid_bytes: int, sub: bool, sub_bytes: int = 8) -> float:
    """One flit a cycle in the main context, 8 B a cycle in the sub context."""
    return flits * valid_bytes / sub_bytes if sub else float(flits)


def inter_slice_reduce_cycles(flits: int, ring: int) -> int:
    """Reduction over the slices of a ring: about one traversal behind the input stream."""
    return flits + ring


def mac_utilisation(
    lanes: int, pack: int, live_elements: int, packet_elements: int, time_broadcast: int, live_slices: int, slices: int
) -> float:
    """Share of the multipliers that do useful work: idle lanes, half packets, padding, supply and idle slices."""
    supply = min(1.0, time_broadcast / pack)
    return lanes / 8 * (pack / 2) * (live_elements / packet_elements) * supply * live_slices / slices


# Passes --------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class PassTime:
    """Cycles of every stage of a pass, the pipeline's fill and the pass as a whole: issue + fill + slowest stage."""

    stages: dict[str, float]
    fill: float
    total: float

    @property
    def bottleneck(self) -> str:
        """The slowest stage."""
        return max(self.stages, key=lambda name: self.stages[name])


NARROW = frozenset({Alu.FP_FMA, Alu.FP_FPU, Alu.FP_EXP, Alu.FP_MUL0, Alu.FP_MUL1, Alu.REDUCE, Alu.FP_DIV})


def fetch_time(fetch: Fetch, context: Context, machine: Machine) -> float:
    """Cycles of a fetch: its access size follows from the layout (hardware.md 2.3)."""
    limit = machine.fetch_sub_bytes if context == Context.SUB else machine.fetch_main_bytes
    shape = fetched(fetch)
    return fetch_cycles(shape.packets, fetch.packet * fetch.dtype.bytes, access_bytes(fetch, limit))


def exec_cycles(desc: Exec, context: Context, machine: Machine) -> PassTime:
    """Time of a Tensor Unit pass that has its engines for itself."""
    sub = context == Context.SUB
    stages: dict[str, float] = {"fetch": fetch_time(desc.fetch, context, machine)}
    fill = 0.0
    shape = fetched(desc.fetch)
    if desc.switch is not None:
        ring = desc.switch.slice1 * desc.switch.slice0
        stages["switch"] = switch_cycles(ring, shape.packets, shape.flits_per_packet)
        fill += ring * machine.switch_fill_cycles_per_hop
        shape = switched(shape, desc.switch)
    stages["collect"] = shape.flits
    if desc.contract is not None:
        contract, dtype = desc.contract, shape.dtype
        packets = shape.flits // contract.pack
        stages["contraction"] = contraction_cycles(packets, contract.pack, time_broadcast(contract))
        fill += packet_reducer_latency(multiplier_elements(contract, dtype)) + machine.contraction_fill_cycles
        shape_out = contracted(shape, contract)
        stages["lane folder"] = lane_folder_flits(
            contract.mode, kept_steps(contract), columns(contract, dtype), contract.lanes
        )
        shape = shape_out
    if desc.vector:
        narrow = shape.packet > machine.vector_narrow and any(op.alu in NARROW for op in desc.vector)
        stages["vector"] = vector_cycles(shape.flits, narrow)
        fill += len(desc.vector) * machine.vector_alu_cycles
        for op in desc.vector:
            if op.alu == Alu.REDUCE:
                fill += op.count * op.inner / max(shape.flit_elements, 1)
            shape = after_op(shape, op)
    if shape.dtype != desc.commit.dtype:
        stages["cast"] = shape.flits
    valid_bytes = desc.commit.valid * desc.commit.dtype.bytes
    stages["commit"] = commit_cycles(shape.flits, valid_bytes, sub, machine.commit_sub_bytes)
    return PassTime(stages, fill, machine.pass_issue_cycles + fill + max(stages.values()))


def load_trf_cycles(desc: LoadTrf, context: Context, machine: Machine) -> PassTime:
    """StoTRF: the fetch feeds TRF at the rate of its context."""
    return _load(desc.fetch, context, machine)


def load_vrf_cycles(desc: LoadVrf, context: Context, machine: Machine) -> PassTime:
    """StoVRF: the fetch feeds VRF at the rate of its context."""
    return _load(desc.fetch, context, machine)


def _load(fetch: Fetch, context: Context, machine: Machine) -> PassTime:
    stages = {"fetch": fetch_time(fetch, context, machine), "collect": float(fetched(fetch).flits)}
    return PassTime(stages, 0.0, machine.pass_issue_cycles + max(stages.values()))


def memset_cycles(desc: Memset, machine: Machine) -> PassTime:
    """ITOS: the sub context writes 8 B a cycle to every slice."""
    stages = {"commit": desc.bytes / machine.commit_sub_bytes}
    return PassTime(stages, 0.0, machine.pass_issue_cycles + stages["commit"])


def unit_cycles(desc: Exec | LoadTrf | LoadVrf | Memset, context: Context, machine: Machine) -> PassTime:
    """Time of any instruction of the main and sub contexts."""
    if isinstance(desc, Exec):
        return exec_cycles(desc, context, machine)
    if isinstance(desc, LoadTrf):
        return load_trf_cycles(desc, context, machine)
    if isinstance(desc, LoadVrf):
        return load_vrf_cycles(desc, context, machine)
    return memset_cycles(desc, machine)


def macs(desc: Exec) -> int:
    """Multiply-accumulates of a pass in all its slices (padding included)."""
    if desc.contract is None:
        return 0
    shape = switched(fetched(desc.fetch), desc.switch)
    packets = shape.flits // desc.contract.pack * time_broadcast(desc.contract)
    return packets * multiplier_elements(desc.contract, shape.dtype) * desc.contract.lanes * desc.slices


# DMA -----------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class DmaWork:
    """What a transfer asks of the engine and the memories.

    read_requests, write_requests: of at most 256 B, one a cycle. hbm_lines: 256 B lines moved in HBM in all.
    partial_writes: HBM write requests that cover part of a granule (read-modify-write). misaligned: a slice's piece
    starts off a 256 B boundary of HBM.
    """

    read_requests: int
    write_requests: int
    hbm_read_bytes: int
    hbm_write_bytes: int
    hbm_lines: int
    partial_writes: int
    misaligned: bool
    serial: bool  # reads and writes share one memory port


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


def dma_work(desc: Dma, machine: Machine) -> DmaWork:
    """Requests and bytes of a transfer (register values are taken as multiples of a line)."""
    packets = math.prod(n for n, _, _ in desc.loops)
    requests = dma_requests(packets, desc.packet, machine.dma_request_bytes)
    line = machine.hbm_line_bytes
    read_hbm = desc.source.space == Space.HBM
    write_hbm = desc.destination.space == Space.HBM
    lines = partial = 0
    misaligned = False
    if read_hbm:
        strides = [a for _, a, _ in desc.loops] if desc.index is None or desc.index.scatter else [line]
        lines += _lines(desc.source.base, strides, packets, desc.packet, line)
        misaligned = desc.source.base % line != 0 or any(s % line for s in strides)
    if write_hbm:
        strides = [b for _, _, b in desc.loops]
        lines += _lines(desc.destination.base, strides, packets, desc.packet, line)
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
        lines,
        partial,
        misaligned,
        read_hbm == write_hbm,
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


def dma_time(desc: Dma, machine: Machine, engines: int = 1) -> float:
    """Cycles of a transfer that has HBM for itself: the engine's rate, the channels' rate and partial writes."""
    work = dma_work(desc, machine)
    channel = work.hbm_lines / machine.hbm_channels / machine.hbm_efficiency
    cycles = dma_cycles(
        work.read_requests, work.write_requests, work.serial, machine, engines, channel_requests=math.ceil(channel)
    )
    if work.misaligned and desc.packet < machine.hbm_line_bytes:
        cycles = machine.dma_startup_cycles + (cycles - machine.dma_startup_cycles) * machine.dma_unaligned_piece_factor
    # A read-modify-write holds its channel; the channels work side by side.
    per_line = machine.hbm_line_bytes / machine.hbm_channel_bytes_per_cycle
    rmw = work.partial_writes * per_line * machine.hbm_unaligned_write_factor / machine.hbm_channels
    return max(cycles, machine.dma_startup_cycles + rmw)


def slices_touched(desc: Dma) -> int:
    """Slices on the DM side of a transfer (0 if there is none): distinct multiples of 4 MB in its strides."""
    for endpoint, column in ((desc.destination, 2), (desc.source, 1)):
        if endpoint.space == Space.DM:
            counts = [loop[0] for loop in desc.loops if abs(loop[column]) >= DM_SLICE_STRIDE // 2]
            return math.prod(counts)
    return 0
