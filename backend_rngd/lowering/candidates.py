"""Predicted time of ways to map a contraction with weights, from the closed forms of the machine (`formulas.py`).

A mapping is a sequence of steps: a transfer of weights, a load into TRF, a pass, sometimes a transfer of results. The
prediction plays these steps on the in-order queues of one unit that gets an equal part of the card's HBM. What overlaps
with operations before and after is not in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from backend_rngd.isa.descriptors import FLIT_BYTES
from backend_rngd.lowering.choices import Piece, Streamed
from backend_rngd.lowering.contract_base import k_multiple, split_k
from backend_rngd.lowering.mapping import CHANNELS, LANES, LONG_TILE_BYTES, TILE_BYTES, TRF_K_BYTES
from backend_rngd.lowering.program import IN_FLIGHT
from backend_rngd.lowering.stream_tokens import channel_groups
from backend_rngd.lowering.stream_weights import column_tiles
from backend_rngd.lowering.tensor import REPLICATED_BATCH, REPLICATED_ROWS, power_of_two
from backend_rngd.machine import Machine
from backend_rngd.machine.formulas import contraction_cycles, dma_requests, fetch_cycles, switch_cycles

RESULT_BYTES = 2  # of an element


@dataclass(frozen=True)
class Candidate:
    """A way to map a contraction. cycles: predicted, None if no closed form covers it. built: whether the lowering can
    emit it for these tokens."""

    name: str
    cycles: float | None
    built: bool = True
    chosen: bool = False


@dataclass(frozen=True)
class Step:
    """Cycles of a weight transfer, of the load into TRF beside passes, of the pass, and of moving results away."""

    transfer: float
    load: float
    work: float
    away: float = 0.0


def played(steps: Sequence[Step], slots: int) -> float:
    """Cycles until the last result: `slots` weight buffers, transfers in order, a load and a pass when their data are
    there."""
    dma = sub = main = 0.0
    loaded: list[float] = []
    freed: list[float] = []

    def transfer(i: int) -> None:
        nonlocal dma
        dma = max(dma, freed[i - slots] if i >= slots else 0.0) + steps[i].transfer
        loaded.append(dma)

    for i in range(min(max(slots - 1, 1), len(steps))):
        transfer(i)
    for i, step in enumerate(steps):
        sub = max(sub, loaded[i]) + step.load
        main = max(main, sub) + step.work
        freed.append(sub if step.load else main)
        if len(loaded) < len(steps):
            transfer(len(loaded))
        if step.away:
            dma = max(dma, main) + step.away
    return max(dma, main)


def hbm_rate(machine: Machine, units: int) -> float:
    """Bytes a cycle from HBM of one of `units` units of a card that all read."""
    engine = min(machine.dma_hbm_bytes_per_cycle, machine.dma_engine_bytes_per_cycle)
    return min(engine, machine.hbm_bytes_per_cycle * machine.hbm_efficiency / units)


def predicted(s: Streamed, machine: Machine, units: int) -> float | None:
    """Cycles of a mapping on one of `units` units of a card; None for packed weights."""
    if s.packed:
        return None
    rate = hbm_rate(machine, units)
    if s.streams == "weights":
        return played(list(_weight_steps(s, machine, rate)), s.slots) + _spread(s, machine)
    return played(list(_token_steps(s, machine, rate, units)), s.slots)


def _weight_steps(s: Streamed, machine: Machine, rate: float) -> Iterator[Step]:
    lanes = max(4, min(s.local, LANES))
    sweeps = -(-s.local // lanes)
    packet = k_multiple(s.k, s.element) * s.element
    for c, k in enumerate(s.chunks):
        for t, piece in enumerate(s.pieces):
            nbytes = piece.per_slice * k * s.element
            packets = nbytes // packet
            fetch = fetch_cycles(packets, packet, machine.fetch_main_bytes)
            each = max(fetch, contraction_cycles(packets, packet // FLIT_BYTES, 1))
            work = machine.pass_issue_cycles + machine.contraction_fill_cycles + each
            if t == 0 or sweeps > 1:  # the tokens of the chunk into TRF, in the main context
                work += machine.pass_issue_cycles + lanes * k * s.element / machine.fetch_main_bytes
            if c > 0:
                work += _sum(piece.per_slice * lanes, machine)
            transfer = machine.dma_startup_cycles + nbytes * piece.slices / rate
            yield Step(transfer, 0.0, work * sweeps)


def _spread(s: Streamed, machine: Machine) -> float:
    """Results to all slices: a pass round the ring for every tile."""
    total = 0.0
    for piece in s.pieces:
        flits = s.local * -(-piece.per_slice * RESULT_BYTES // FLIT_BYTES)
        fill = s.slices * machine.switch_fill_cycles_per_hop
        total += machine.pass_issue_cycles + fill + switch_cycles(s.slices, flits, 1)
    return total


def _token_steps(s: Streamed, machine: Machine, rate: float, units: int) -> Iterator[Step]:
    packet = k_multiple(s.k, s.element) * s.element
    flits = packet // FLIT_BYTES
    for piece in (p for p in s.pieces for _ in range(s.matrices)):
        passes = -(-piece.per_slice // CHANNELS)
        for t in range(passes):
            width = min(CHANNELS, piece.per_slice - t * CHANNELS)
            for c, k in enumerate(s.chunks):
                run = k * s.element
                copies = s.slices // piece.ring
                transfer = machine.dma_startup_cycles + piece.slices * copies * width * run / rate
                if not s.resident and t == 0:
                    transfer += machine.dma_startup_cycles + s.slices * s.local * run / rate
                packets = s.local * run // packet
                slowest = max(
                    switch_cycles(piece.ring, packets, flits),
                    contraction_cycles(packets * piece.ring, flits, CHANNELS // LANES),
                    fetch_cycles(packets, packet, machine.fetch_main_bytes),
                )
                work = machine.pass_issue_cycles + machine.contraction_fill_cycles + slowest
                work += piece.ring * machine.switch_fill_cycles_per_hop
                if c > 0:
                    work += _sum(s.local * piece.ring * CHANNELS, machine)
                load = machine.pass_issue_cycles + CHANNELS * run / machine.fetch_sub_bytes
                last = t == passes - 1 and c == len(s.chunks) - 1
                yield Step(transfer, load, work, _home(s, piece, machine, units) if last else 0.0)


def _home(s: Streamed, piece: Piece, machine: Machine, units: int) -> float:
    """Channels of a group from the slices that computed them to those of the tokens."""
    row = piece.per_slice * RESULT_BYTES
    if not s.scattered:
        return _inside(s.slices // piece.ring * piece.slices * piece.ring * s.local, row, machine)
    share = s.slices // units
    pulled = _inside(units * piece.slices * s.local, share * row, machine)
    return pulled + (units - 1) * machine.dma_descriptor_cycles + _inside(piece.slices * s.local * share, row, machine)


def _inside(runs: int, nbytes: int, machine: Machine) -> float:
    """A transfer of runs of `nbytes` bytes inside data memory."""
    requests = dma_requests(runs, nbytes, machine.dma_request_bytes)
    return machine.dma_startup_cycles + 2 * requests * machine.dma_request_bytes / machine.dma_engine_bytes_per_cycle


def _sum(elements: int, machine: Machine) -> float:
    """A pass that adds the partial sums of a chunk, in f32."""
    return machine.pass_issue_cycles + elements / machine.vector_narrow


# Alternatives ----------------------------------------------------------------------------------------------------
def candidates(s: Streamed, machine: Machine, units: int) -> list[Candidate]:
    """The mapping that the lowering took, and other ones, fastest first."""
    ways = {describe(s): Candidate(describe(s), predicted(s, machine, units), True, True)}
    if not s.packed:
        for other, built in _others(s, machine):
            ways.setdefault(describe(other), Candidate(describe(other), predicted(other, machine, units), built))
    return sorted(ways.values(), key=lambda c: c.cycles or 0.0)


def tokens_of(s: Streamed) -> int:
    """Tokens of a contraction, padding included."""
    return s.local if s.streams == "weights" else s.local * s.slices


def _others(s: Streamed, machine: Machine) -> Iterator[tuple[Streamed, bool]]:
    tokens = tokens_of(s)
    packet = k_multiple(s.k, s.element)
    lanes = max(4, min(tokens, LANES))
    chunks = tuple(k for _, k in split_k(s.k, machine.trf_bytes_per_slice // lanes // s.element, packet))
    for nbytes in (TILE_BYTES // 4, TILE_BYTES // 2, TILE_BYTES, LONG_TILE_BYTES):
        most = max(4, nbytes // (max(chunks) * s.element) // 4 * 4)
        pieces = tuple(Piece(t.per_slice, t.slices, s.slices) for t in column_tiles(s.rows, most, s.slices))
        slots = min(2 if nbytes > TILE_BYTES else IN_FLIGHT, len(pieces) * len(chunks))
        other = replace(
            s, streams="weights", local=power_of_two(tokens), chunks=chunks, pieces=pieces * s.matrices, slots=slots,
            matrices=1, limit=1,
        )  # fmt: skip
        yield other, tokens <= REPLICATED_ROWS
    local = -(-tokens // s.slices)
    chunks = tuple(k for _, k in split_k(s.k, TRF_K_BYTES // s.element, packet))
    for limit in (1, 2, 4, 8):
        for whole in (False, True):
            groups = channel_groups(s.rows, s.slices, limit, local, s.k * s.element, machine, whole=whole)
            pieces = tuple(Piece(g.per_slice, g.slices, g.ring) for g in groups)
            other = replace(
                s, streams="tokens", local=local, chunks=chunks, pieces=pieces, slots=IN_FLIGHT, limit=limit
            )
            yield other, tokens > REPLICATED_ROWS


def describe(s: Streamed) -> str:
    """A mapping in words."""
    chunks = f"K in {len(s.chunks)} chunks" if len(s.chunks) > 1 else "K whole"
    if s.streams == "weights":
        lanes = max(4, min(s.local, LANES))
        sweeps = -(-s.local // lanes)
        largest = max(p.per_slice for p in s.pieces)
        tiles = f"{len(s.pieces)} tile{'s' if len(s.pieces) > 1 else ''} of {largest} channels a slice"
        again = f", each used {sweeps} times for {lanes} tokens" if sweeps > 1 else ""
        copies = f", {s.slots} on the way" if s.slots > 1 else ""
        return f"tokens in TRF, weights stream: {tiles}{copies}{again}; {chunks}"
    found: dict[tuple[int, int, int], int] = {}
    for p in s.pieces:
        key = (-(-p.per_slice // CHANNELS), p.slices, p.ring)
        found[key] = found.get(key, 0) + 1
    parts = " + ".join(
        f"{n} x {passes} pass{'es' if passes > 1 else ''} on {slices} slices in rings of {ring}"
        for (passes, slices, ring), n in found.items()
    )
    return f"weights in TRF, tokens go round: {parts}; {chunks}"


def reason(s: Streamed, found: Sequence[Candidate]) -> str:
    """Why the lowering took this mapping: it follows rules, whose outcome stands beside what the formulas say."""
    tokens = tokens_of(s)
    if s.streams == "weights":
        rule = f"fixed: {tokens} token{'s fit' if tokens > 1 else ' fits'} the {REPLICATED_ROWS} lanes of TRF"
        rule += ", so that every weight is read once and HBM need not pause"
    else:
        rule = (
            f"fixed: more than {REPLICATED_BATCH} rows to decode, or {REPLICATED_ROWS} tokens of prompts, lie on slices"
        )
        rule += ", each of which multiplies all of them"
    mine = next(c for c in found if c.chosen)
    best = next((c for c in found if c.built and c.cycles is not None), None)
    if mine.cycles is None:
        return f"{rule}; packed weights have no closed form"
    if best is None or best.cycles is None or best is mine:
        return f"{rule}; the formulas know no faster one that is built"
    return f"{rule}; by the formulas `{best.name}` would take {mine.cycles - best.cycles:,.0f} cycles less"
