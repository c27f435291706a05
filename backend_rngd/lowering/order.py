"""The order of a transfer's loops: any order moves the same bytes, but not at the same speed.

32 slices share a data-memory network, and an engine that has too much on the way to one of them leaves the other idle;
and lines that are on the way at the same time should lie in different HBM channels (hardware.md 3.4, 5.4, 5.8).
"""

from __future__ import annotations

from collections.abc import Iterable

from backend_rngd.isa.descriptors import Dma, Endpoint, Space
from backend_rngd.machine import Machine, load_machine
from backend_rngd.machine.crowd import crowded, judge, share_of_hbm

MAX_LOOP = load_machine().max_loop_size  # of the instruction set: alike on every machine
WORTH = 1.01  # times less that shorter packets must take
Entries = tuple[tuple[int, ...], ...]
Side = tuple[Space, int, int]


def canonical(loops: Iterable[tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
    """Drop loops of size 1 and merge neighbours: outer stride = inner size * inner stride in every column."""
    out: list[tuple[int, ...]] = []
    for entry in loops:
        if entry[0] == 1:
            continue
        if (
            out
            and out[-1][0] * entry[0] <= MAX_LOOP
            and all(o == entry[0] * i for o, i in zip(out[-1][1:], entry[1:], strict=True))
        ):
            out[-1] = (out[-1][0] * entry[0], *entry[1:])
        else:
            out.append(tuple(entry))
    return tuple(out)


def best_order(entries: Entries, packet: int, source: Side, target: Side, machine: Machine) -> tuple[Entries, int]:
    """The entries (size, stride of the source, of the target, ...) with the step from one data-memory network to the
    other where the transfer takes least time, and the packet, cut to requests if that is worth it; as they are for
    transfers between units and small ones."""
    moved = packet
    for n, *_ in entries:
        moved *= n
    if source[0].is_peer or target[0].is_peer or moved * 2 <= machine.dma_packet_max_bytes * machine.slices_per_dmn:
        return entries, packet
    turns = _alternating(entries, machine)
    if not turns:
        return entries, packet
    places = (Endpoint(source[0], 0), Endpoint(target[0], 0))

    def cycles(order: Entries, packet: int) -> float:
        desc = Dma(*places, tuple((n, a, b) for n, a, b, *_ in order), packet)
        return crowded(desc, machine.name, machine.pes_per_chip)

    found = min((*reversed(turns), entries), key=lambda order: cycles(order, packet))
    request, least = machine.dma_request_bytes, cycles(found, packet)
    if packet % request or packet == request or least <= WORTH * _bound(moved, machine.name):
        return found, packet
    parts = (*entries, (packet // request, request, request, *(0 for _ in entries[0][3:])))
    cut = min(reversed(_alternating(parts, machine)), key=lambda order: cycles(order, request), default=found)
    return (cut, request) if cycles(cut, request) * WORTH < least else (found, packet)


def _alternating(entries: Entries, machine: Machine) -> list[Entries]:
    """Orders in which the halves of a loop over slices (or rings of them) that lie in different networks take turns, at
    every place behind that loop; innermost last, then with all slices before anything else moves on."""
    for k in range(len(entries) - 1, -1, -1):
        n, *steps = entries[k]
        slices = max(abs(s) // machine.dm_slice_stride for s in steps[:2])
        if n % 2 or n * slices <= machine.slices_per_dmn:
            continue
        moved = [s * (n // 2) for s in steps]
        rest = [(n // 2, *steps)] if n > 2 else []
        if len(entries) + len(rest) > machine.max_loops or not all(-(2**31) <= s < 2**31 for s in moved):
            continue
        behind = entries[k + 1 :]
        orders = [[*entries[:k], *rest, *behind[:at], (2, *moved), *behind[at:]] for at in range(len(behind) + 1)]
        if rest and behind:
            orders.append([*entries[:k], *behind, *rest, (2, *moved)])
        return [canonical(order) for order in orders]
    return []


def _bound(moved: int, name: str) -> float:
    """Cycles of a transfer of so many bytes that spreads evenly, if all engines are busy with such transfers."""
    machine = judge(name)
    return machine.dma_startup_cycles + moved / share_of_hbm(machine, machine.pes_per_chip)
