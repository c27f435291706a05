"""Closed forms of engine time (hardware.md 5.1), each once. All times are cycles of the 1 GHz tensor clock.

The compiler's cost model and the timing simulator use the same functions. `documented` mode reproduces the worked
cases of the public book; `silicon` mode adds the measured issue and fill costs that the machine description holds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from backend_rngd.isa.descriptors import (
    Alu,
    Context,
    Exec,
    Fetch,
    LaneMode,
    LoadTrf,
    LoadVrf,
    Memset,
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
from backend_rngd.machine.transfers import (
    OWN,
    DmaWork,
    Reach,
    dma_requests,
    dma_startup,
    dma_time,
    dma_work,
    slices_at_once,
    slices_touched,
)

__all__ = [
    "NARROW",
    "OWN",
    "DmaWork",
    "PassTime",
    "Reach",
    "best_collective",
    "collect_flits",
    "collective_algorithms",
    "collective_time",
    "commit_cycles",
    "contraction_cycles",
    "dma_requests",
    "dma_startup",
    "dma_time",
    "dma_work",
    "exec_cycles",
    "fetch_cycles",
    "fetch_time",
    "inter_slice_reduce_cycles",
    "lane_folder_flits",
    "load_trf_cycles",
    "load_vrf_cycles",
    "lookup_cycles",
    "mac_utilisation",
    "macs",
    "memset_cycles",
    "packet_reducer_latency",
    "slice_bytes",
    "slices_at_once",
    "slices_touched",
    "switch_cycles",
    "sync_time",
    "transpose_cycles",
    "unit_cycles",
    "vector_cycles",
]


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
    read = fetch_cycles(shape.packets, fetch.packet * fetch.dtype.bytes, access_bytes(fetch, limit))
    return read if fetch.lookup is None else max(read, lookup_cycles(shape.packets * fetch.packet, machine))


def lookup_cycles(keys: int, machine: Machine) -> float:
    """Keys of a slice through the table of the fetch adapter."""
    return keys / machine.lookup_keys_per_cycle


def exec_cycles(desc: Exec, context: Context, machine: Machine) -> PassTime:
    """Time of a Tensor Unit pass that has its engines for itself."""
    sub = context == Context.SUB
    stages: dict[str, float] = {"fetch": fetch_time(desc.fetch, context, machine)}
    fill = 0.0 if desc.fetch.lookup is None else float(machine.lookup_load_cycles)
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


def slice_bytes(desc: Exec | LoadTrf | LoadVrf | Memset) -> int:
    """Bytes that a pass reads and writes in the data memory of every slice."""
    if isinstance(desc, Memset):
        return desc.bytes
    fetch = desc.fetch
    moved = math.prod(n for n, _ in fetch.loops) * fetch.dtype.bytes * (2 if fetch.second is not None else 1)
    if isinstance(desc, Exec):
        moved += math.prod(n for n, _ in desc.commit.loops) * desc.commit.dtype.bytes
    return moved


def macs(desc: Exec) -> int:
    """Multiply-accumulates of a pass in all its slices (padding included)."""
    if desc.contract is None:
        return 0
    shape = switched(fetched(desc.fetch), desc.switch)
    packets = shape.flits // desc.contract.pack * time_broadcast(desc.contract)
    return packets * multiplier_elements(desc.contract, shape.dtype) * desc.contract.lanes * desc.slices


# Collectives ---------------------------------------------------------------------------------------------------------
CollectiveKind = Literal["all_reduce", "all_gather", "reduce_scatter"]
Algorithm = Literal["one_shot", "two_phase", "hierarchical"]


def collective_algorithms(kind: CollectiveKind, units: int, cards: int) -> tuple[Algorithm, ...]:
    """Algorithms that exist for a group. Other cards are reached through HBM only, so several cards need a hierarchy.

    one_shot: every unit reads what it needs of all others and adds it itself. two_phase: an all-reduce as
    reduce-scatter and all-gather. hierarchical: inside every card, then between units of equal rank, then inside again.
    """
    if units % cards:
        raise ValueError(f"{units} units on {cards} cards: every card needs the same number")
    if cards > 1:
        return ("hierarchical",)
    return ("one_shot", "two_phase") if kind == "all_reduce" and units > 1 else ("one_shot",)


def sync_time(units: int, cards: int, machine: Machine) -> float:
    """Cycles from the first notify of `units` units on `cards` cards that are equally far to the last one's arrival."""
    local = units // cards
    latency = machine.notify_cluster_cycles
    if local > machine.pes_per_cluster:
        latency = machine.cluster_sync_cycles
    if cards > 1:
        latency = machine.pcie_latency_cycles
    return (units - 1) * machine.notify_issue_cycles + latency


def collective_time(
    kind: CollectiveKind,
    algorithm: Algorithm,
    nbytes: int,
    units: int,
    cards: int,
    machine: Machine,
    element_bytes: int = 2,
    replicate: bool = True,
    rows: int = 1,
) -> float:
    """Cycles of a collective of a group whose units reach it at the same time and that has the card for itself.

    nbytes: the whole value: an all-reduce's operand, an all-gather's result, a reduce-scatter's operand. units are
    those of the whole group, cards the cards they are spread over evenly. replicate: whether the result must reach
    every slice (tokens of a decode step), by a pass round the ring of slices. rows: of the value as it lies in memory,
    each of which is cut into the slices' pieces, so that units read runs of a row's piece. Raises ValueError for an
    algorithm that does not exist for the group (`collective_algorithms`).
    """
    if algorithm not in collective_algorithms(kind, units, cards):
        raise ValueError(f"no {algorithm} {kind} over {units} units on {cards} cards")
    if units == 1:
        return 0.0
    last = _ring(nbytes, machine) if replicate and kind != "reduce_scatter" else 0.0
    local = units // cards
    run = nbytes / machine.slices_per_pe  # one slice's piece of one copy
    piece = run / rows  # of a row, as it is published
    sync = sync_time(local, 1, machine) if local > 1 else 0.0
    if algorithm == "one_shot":
        if kind == "all_gather":
            return sync + _pull(nbytes, piece, local, machine) + last
        copies = nbytes * units if kind == "all_reduce" else nbytes
        return sync + _pull(copies, piece, local, machine) + _add(copies, element_bytes, machine) + last
    # A unit's part of a value that every slice holds lies in 1/local of its slices, which add all of it.
    wide = local if replicate else 1
    if algorithm == "two_phase":
        scatter = _pull(nbytes, piece, local, machine) + _add(nbytes * wide, element_bytes, machine)
        return 2 * sync + scatter + _pull(nbytes, run, local, machine) + last
    # Through the cards' links: a unit exchanges its 1/local part with the units of equal rank on the other cards.
    part = nbytes / local
    between = sync_time(cards, cards, machine)
    gather = sync + _pull(nbytes, run, local, machine) if local > 1 else 0.0
    if kind == "all_gather":
        return between + _exchange(nbytes * (cards - 1) / cards, local, machine) + gather + last
    inside = 0.0
    if local > 1:
        inside = sync + _pull(nbytes, piece, local, machine) + _add(nbytes * wide, element_bytes, machine)
    exchanged = nbytes * (cards - 1) if kind == "all_reduce" else nbytes * (cards - 1) / cards
    summed = part * cards * wide if kind == "all_reduce" else part * wide
    middle = between + _exchange(exchanged, local, machine) + _add(summed, element_bytes, machine)
    return inside + middle + (gather + last if kind == "all_reduce" else 0.0)


def best_collective(
    kind: CollectiveKind, nbytes: int, units: int, cards: int, machine: Machine, replicate: bool = True
) -> tuple[Algorithm, float]:
    """The fastest algorithm and its cycles."""
    times: dict[Algorithm, float] = {
        a: collective_time(kind, a, nbytes, units, cards, machine, replicate=replicate)
        for a in collective_algorithms(kind, units, cards)
    }
    return min(times.items(), key=lambda item: item[1])


def _pull(nbytes: float, run: float, units: int, machine: Machine) -> float:
    """One command that reads `nbytes` in runs of `run` bytes, spread evenly over the DM of `units` units of a card."""
    near = min(units, machine.pes_per_cluster) / units
    requests = nbytes / run * math.ceil(run / machine.dma_request_bytes)
    engine = requests * machine.dma_request_bytes / machine.dma_engine_bytes_per_cycle
    cycles = 2 * near * engine + (1 - near) * max(engine, nbytes / machine.dm_cross_cluster_bytes_per_cycle)
    return machine.dma_startup_cycles + (units - 1) * machine.dma_descriptor_cycles + cycles


def _exchange(nbytes: float, local: int, machine: Machine) -> float:
    """A store of a unit's part to its HBM and a load from other cards; `nbytes` enter every card for its `local` units
    together."""
    store = machine.dma_startup_cycles + nbytes / local / machine.dma_engine_bytes_per_cycle
    link = machine.pcie_latency_cycles + nbytes / machine.pcie_peer_bytes_per_cycle
    return store + machine.dma_startup_cycles + link


def _add(nbytes: float, element_bytes: int, machine: Machine) -> float:
    """One pass over `nbytes`, spread over the slices, on the float path of the vector engine."""
    elements = math.ceil(nbytes / element_bytes / machine.slices_per_pe)
    return machine.pass_issue_cycles + math.ceil(elements / machine.vector_narrow)


def _ring(nbytes: float, machine: Machine) -> float:
    """One pass that takes a value spread over the slices of a unit to all of them."""
    slices = machine.slices_per_pe
    flits = math.ceil(nbytes / slices / machine.flit_bytes)
    return machine.pass_issue_cycles + slices * machine.switch_fill_cycles_per_hop + switch_cycles(slices, flits, 1)
