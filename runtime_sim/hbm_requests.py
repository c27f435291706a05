"""HBM request by request, for a window of a timing run: an independent, slower model that keeps the fluid one honest.

    report = hbm_requests(result, 0.0, 50_000.0)
    print(report.difference, report.median)

The lines of every transfer that moves data in the window are sent, in the order of its loops, to 32 channels with
banks, open rows and queues of 64 requests that serve open rows first. An engine issues in order at its own rate, has at
most 256 requests on the way, and stops while more than its window waits for one data-memory network. Transfers start
when the fluid model says so, or later if their engine is still busy. How HBM is shared comes from the requests alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from backend_rngd.isa.descriptors import UNIT_STRIDE, Context, Dma, Endpoint, Space
from backend_rngd.machine import Machine
from backend_rngd.machine.address_map import BANKS, CHANNELS, IN_FLIGHT, QUEUE, banks, channels, rows
from runtime_sim.timing_result import TimingResult
from runtime_sim.traffic import Value, registers_of_call

MOST_LINES = 8_000_000
ROUND_TRIP = 45.0  # cycles: a first access


class WindowError(ValueError):
    """A window that cannot be expanded: what, why, fix."""

    def __init__(self, what: str, why: str, fix: str) -> None:
        super().__init__(f"{what}: {why}; {fix}")
        self.what, self.why, self.fix = what, why, fix


@dataclass(frozen=True)
class Comparison:
    """Both models in a window of one card. lines: HBM lines moved. fluid, requests: cycles from the first byte to the
    last. fluid_busy, requests_busy: cycles that the engines move data, summed. median: of the difference of one
    transfer's time, of those with at least 256 lines."""

    card: int
    transfers: int
    lines: int
    fluid: float
    requests: float
    fluid_busy: float
    requests_busy: float
    median: float

    @property
    def difference(self) -> float:
        """How much longer the requests take than the fluid model says."""
        return self.requests / self.fluid - 1.0

    @property
    def busy_difference(self) -> float:
        """The same of the engines' time alone: computing in between does not hide it."""
        return self.requests_busy / self.fluid_busy - 1.0

    def to_json(self, machine: Machine) -> dict[str, Any]:
        """All fields, both differences, and both rates in bytes a cycle."""
        moved = self.lines * machine.hbm_line_bytes
        rates = {f"{name}_rate": moved / cycles if cycles else 0.0 for name, cycles in
                 (("fluid", self.fluid), ("requests", self.requests))}  # fmt: skip
        differences = {"difference": self.difference, "busy_difference": self.busy_difference}
        return asdict(self) | differences | rates


@dataclass(frozen=True)
class _Lines:
    """Line requests of one transfer in order. partial: a write of part of a line. second: the rest of a request that
    crosses a line. network: of data memory, -1 for none."""

    address: NDArray[np.int64]
    partial: NDArray[np.bool_]
    second: NDArray[np.bool_]
    network: NDArray[np.int64]


def hbm_requests(result: TimingResult, start: float, end: float, card: int = 0) -> Comparison:
    """Expand the transfers of a card that move data in [start, end) cycles. Raises WindowError for an empty window and
    for one of more than 8 million lines."""
    flat, machine = result.flat, result.machine
    work = result.column("work")
    begin = result.start + result.column("fixed")
    chosen = (flat.context == int(Context.DMA)) & (work > 0) & (begin < end) & (result.finish > start)
    units = [u for u, place in enumerate(result.topology.places) if place.card == card]
    expanded: list[tuple[int, int, _Lines]] = []  # unit, row, lines
    total = 0
    for row in np.nonzero(chosen)[0].tolist():
        for unit in result.classes.members[int(flat.unit[row])]:
            if unit not in units:
                continue
            lines = _lines(result, row, unit, card)
            total += len(lines.address)
            if total > MOST_LINES:
                raise WindowError(
                    f"window {start:.0f}:{end:.0f}", f"it moves more than {MOST_LINES:,} lines", "choose a shorter one"
                )
            if len(lines.address):
                expanded.append((unit, row, lines))
    if not expanded:
        raise WindowError(
            f"window {start:.0f}:{end:.0f}", f"no transfer of card {card} touches HBM in it",
            f"the program takes {result.cycles:.0f} cycles",
        )  # fmt: skip
    expanded.sort(key=lambda entry: (entry[0], begin[entry[1]]))
    finish = _play(expanded, begin, units, machine)
    fluid_start = min(float(begin[row]) for _, row, _ in expanded)
    fluid_end = max(float(result.finish[row]) for _, row, _ in expanded)
    previous: dict[int, float] = {}
    errors: list[float] = []
    busy = np.zeros(2)
    for (unit, row, lines), done in zip(expanded, finish.tolist(), strict=True):
        begun = max(float(begin[row]), previous.get(unit, 0.0))
        previous[unit] = done
        busy += float(result.finish[row] - begin[row]), done - begun
        if len(lines.address) >= 8 * CHANNELS:
            errors.append((done - begun) / float(result.finish[row] - begin[row]) - 1.0)
    return Comparison(
        card, len(expanded), total, fluid_end - fluid_start, float(finish.max()) - fluid_start,
        float(busy[0]), float(busy[1]), float(np.median(errors)) if errors else 0.0,
    )  # fmt: skip


# Lines ---------------------------------------------------------------------------------------------------------------
def _lines(result: TimingResult, row: int, unit: int, card: int) -> _Lines:
    """Every line request of a transfer of one unit that goes to the card's HBM."""
    flat, machine = result.flat, result.machine
    stream = flat.streams[int(flat.unit[row])]
    what = stream.routines[int(flat.routine[row])].instructions[int(flat.index[row])].what
    assert isinstance(what, Dma)
    inside = registers_of_call(stream, flat.calls, int(flat.call[row]), {})
    rank = result.topology.places[unit].rank
    line = machine.hbm_line_bytes
    sides: list[tuple[NDArray[np.int64], NDArray[np.bool_]]] = []
    network = np.full(1, -1, np.int64)
    for side, endpoint in enumerate((what.source, what.destination)):
        strides = [loop[1 + side] for loop in what.loops]
        scattered = what.index is not None and bool(side) == what.index.scatter
        counts = [loop[0] for loop in what.loops]
        if endpoint.space in (Space.HBM, Space.PEER_HBM):
            value = inside.get(endpoint.register, Value(endpoint.register, 0)).on(result.launch, rank)
            if scattered:  # rows named by an index: lines all over the place, here one after the other
                strides = [line * int(np.prod(counts[k + 1 :], initial=1)) for k in range(len(counts))]
            runs = _physical(value + endpoint.base + _sums(counts, strides), endpoint, result, unit, card)
            sides.append(_requests(runs, what.packet, side == 1, machine))
        elif endpoint.space in (Space.DM, Space.PEER_DM):
            slices = _sums(counts, strides) % UNIT_STRIDE // machine.dm_slice_stride
            network = np.repeat(slices // machine.slices_per_dmn % 2, -(-what.packet // line) * 2)
    address = np.concatenate([a for a, _ in sides]) if sides else np.zeros(0, np.int64)
    partial = np.concatenate([p for _, p in sides]) if sides else np.zeros(0, np.bool_)
    second = np.arange(len(address)) % 2 == 1
    if len(sides) == 2:  # a line is read before it is written
        order = np.argsort(np.concatenate([np.arange(len(a)) for a, _ in sides]), kind="stable")
        address, partial, second = address[order], partial[order], second[order]
    of = network if len(network) == len(address) else np.full(len(address), -1, np.int64)
    present = address >= 0
    return _Lines(address[present], partial[present], second[present], of[present])


def _sums(counts: list[int], strides: list[int]) -> NDArray[np.int64]:
    out = np.zeros(1, np.int64)
    for n, stride in zip(counts, strides, strict=True):  # outermost first
        out = (out[:, None] + np.arange(n) * stride).reshape(-1)
    return out


def _physical(
    address: NDArray[np.int64], endpoint: Endpoint, result: TimingResult, unit: int, card: int
) -> NDArray[np.int64]:
    """Addresses on the card; -1 for those of other cards. Every unit has its part of the card's HBM."""
    window = result.machine.hbm_bytes // result.machine.pes_per_chip
    places = result.topology.places
    if endpoint.space is Space.HBM:
        return address % window + places[unit].pe * window
    logical = address // UNIT_STRIDE
    out = np.full(len(address), -1, np.int64)
    for number in np.unique(logical).tolist():
        place = places[result.topology.resolve(unit, int(number))]
        if place.card == card:
            mine = logical == number
            out[mine] = (address[mine] - number * UNIT_STRIDE) % window + place.pe * window
    return out


def _requests(
    runs: NDArray[np.int64], packet: int, write: bool, machine: Machine
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Line requests of runs of `packet` bytes: two places a request, -1 where it does not cross a line."""
    line, granule = machine.hbm_line_bytes, machine.hbm_write_granule_bytes
    begin = (runs[:, None] + np.arange(-(-packet // line)) * line).reshape(-1)
    until = np.minimum(begin + line, np.repeat(runs + packet, -(-packet // line)))
    edge = (begin // line + 1) * line
    first = np.stack([begin, edge], axis=1)
    last = np.stack([np.minimum(edge, until), until], axis=1)
    gone = (last <= first) | (np.repeat(runs, -(-packet // line)) < 0)[:, None]
    partial = (first % granule != 0) | (last % granule != 0)
    address = np.where(gone, -1, first // line * line)
    return address.reshape(-1), (partial & write).reshape(-1)


# Requests over time --------------------------------------------------------------------------------------------------
def _play(
    expanded: list[tuple[int, int, _Lines]], begin: NDArray[np.float64], units: list[int], machine: Machine
) -> NDArray[np.float64]:
    """When every transfer is done."""
    address = np.concatenate([lines.address for _, _, lines in expanded])
    channel = channels(address)
    sizes = np.array([len(lines.address) for _, _, lines in expanded])
    transfer = np.repeat(np.arange(len(expanded)), sizes)
    engine = np.array([units.index(unit) for unit, _, _ in expanded])[transfer]
    per_line = machine.hbm_line_bytes / machine.hbm_channel_bytes_per_cycle  # what is lost, is lost to conflicts
    partial = np.concatenate([lines.partial for _, _, lines in expanded])
    service = np.where(partial, per_line * machine.hbm_unaligned_write_factor, per_line)
    interval = machine.dma_request_bytes / min(machine.dma_hbm_bytes_per_cycle, machine.dma_engine_bytes_per_cycle)
    beat = machine.hbm_line_bytes / machine.dmn_bytes_per_cycle if machine.dmn_window_bytes else 0.0
    ahead = machine.dmn_window_bytes / machine.dmn_bytes_per_cycle
    first = np.searchsorted(engine, np.arange(len(units) + 1))
    finish = np.zeros(len(expanded))
    loop = compiled() or _run
    second = np.concatenate([lines.second for _, _, lines in expanded])
    network = np.concatenate([lines.network for _, _, lines in expanded])
    loop(
        first, second, channel, channel * BANKS + banks(address), rows(address), service, transfer, network,
        begin[[row for _, row, _ in expanded]], IN_FLIGHT, ROUND_TRIP, interval, beat, ahead,
        float(machine.hbm_row_switch_cycles), finish,
    )  # fmt: skip
    return finish


def _run(
    first: NDArray[np.int64],
    second: NDArray[np.bool_],
    channel: NDArray[np.int64],
    bank: NDArray[np.int64],
    row: NDArray[np.int64],
    service: NDArray[np.float64],
    transfer: NDArray[np.int64],
    network: NDArray[np.int64],
    release: NDArray[np.float64],
    in_flight: int,
    trip: float,
    interval: float,
    beat: float,
    ahead: float,
    row_switch: float,
    finish: NDArray[np.float64],
) -> None:
    """Play all requests; those of engine e are first[e]:first[e + 1]. Fills finish, an entry a transfer."""
    inf = 1e300
    engines = len(first) - 1
    following = first[:-1].copy()
    issue = np.zeros(engines)  # when an engine may issue its next request, as far as it depends on itself
    slots = np.zeros((engines, in_flight))  # when the requests on the way are done
    free = np.zeros(engines)  # the first of them
    port = np.zeros((engines, 2))  # until when a network is taken
    queue = np.zeros((CHANNELS, QUEUE), np.int64)
    slot_of = np.zeros((CHANNELS, QUEUE), np.int64)
    engine_of = np.zeros((CHANNELS, QUEUE), np.int64)
    length = np.zeros(CHANNELS, np.int64)
    bus = np.zeros(CHANNELS)
    decide = np.full(CHANNELS, inf)
    opened = np.full(CHANNELS * BANKS, -1)
    active = np.zeros(CHANNELS * BANKS)
    wanted = np.zeros(CHANNELS * BANKS, np.bool_)
    while True:
        best_engine, best = -1, inf
        for e in range(engines):
            i = following[e]
            if i < first[e + 1] and length[channel[i]] < QUEUE:
                t = max(issue[e], free[e], release[transfer[i]])
                if network[i] >= 0 and beat > 0.0 and not second[i]:
                    t = max(t, port[e, network[i]] - ahead)
                if t < best:
                    best, best_engine = t, e
        best_channel = -1
        for c in range(CHANNELS):
            if decide[c] < best:
                best, best_channel = decide[c], c
        if best >= inf:
            return
        if best_channel < 0:
            e = best_engine
            i = following[e]
            c = channel[i]
            slot = 0
            for s in range(in_flight):
                if slots[e, s] <= best:
                    slot = s
                    break
            slots[e, slot] = inf
            free[e] = slots[e].min()
            k = length[c]
            queue[c, k], slot_of[c, k], engine_of[c, k] = i, slot, e
            length[c] = k + 1
            decide[c] = min(decide[c], max(best, bus[c]))
            following[e] = i + 1
            # The next transfer of an engine starts when this one is complete.
            issue[e] = best if i + 1 < first[e + 1] and second[i + 1] else best + interval
            if network[i] >= 0 and beat > 0.0 and not second[i]:
                port[e, network[i]] = max(port[e, network[i]], best) + beat
            if i + 1 < first[e + 1] and transfer[i + 1] != transfer[i]:
                issue[e] = inf
            continue
        c = best_channel
        n = length[c]
        for k in range(n):
            i = queue[c, k]
            if opened[bank[i]] == row[i]:
                wanted[bank[i]] = True
        for k in range(n):
            i = queue[c, k]
            b = bank[i]
            if not wanted[b]:  # nobody wants the open row: the oldest request opens its own
                wanted[b] = True
                opened[b] = row[i]
                active[b] = max(best, active[b]) + row_switch
        chosen, soonest = 0, inf
        for k in range(n):
            i = queue[c, k]
            b = bank[i]
            wanted[b] = False
            if opened[b] == row[i] and max(best, active[b]) < soonest:
                chosen, soonest = k, max(best, active[b])
        i, e, slot = queue[c, chosen], engine_of[c, chosen], slot_of[c, chosen]
        for k in range(chosen, n - 1):
            queue[c, k], slot_of[c, k], engine_of[c, k] = queue[c, k + 1], slot_of[c, k + 1], engine_of[c, k + 1]
        length[c] = n - 1
        bus[c] = soonest + service[i]
        decide[c] = bus[c] if n > 1 else inf
        done = bus[c] + trip
        slots[e, slot] = done
        free[e] = slots[e].min()
        t = transfer[i]
        finish[t] = max(finish[t], done)
        if issue[e] >= inf:
            last = following[e] - 1
            if slots[e].max() < inf and transfer[last] == t:
                issue[e] = finish[t]


@cache
def compiled() -> Callable[..., None] | None:
    """`_run` compiled with numba and kept on disk; None if numba is not installed."""
    try:
        import numba
    except ImportError:
        return None
    jitted: Callable[..., None] = cast(Any, numba).njit(cache=True)(_run)
    return jitted
