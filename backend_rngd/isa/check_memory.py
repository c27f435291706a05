"""Legality of a stream's registers and of its addresses in HBM and in other units, followed through every call."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence

from backend_rngd.isa.cells import Piece, peer_pieces, sides
from backend_rngd.isa.descriptors import UNIT_STRIDE, Call, Dma, Endpoint, Notify, Stream
from backend_rngd.isa.expand import Registers, moved
from backend_rngd.isa.footprint import Access, Interval
from backend_rngd.isa.peers import notified

Reporter = Callable[[int, int, str, str], None]
"""Reports (routine, index, rule, message)."""


class Ranges:
    """Buffers of a memory; accesses stay inside one."""

    def __init__(self, spans: Sequence[tuple[int, int]]) -> None:
        """spans: (address, bytes)."""
        self.starts = sorted(a for a, _ in spans)
        self.ends = {a: a + n for a, n in spans}

    def holds(self, low: int, high: int) -> bool:
        """Whether bytes [low, high) lie in one buffer."""
        i = bisect.bisect_right(self.starts, low) - 1
        return i >= 0 and high <= self.ends[self.starts[i]]

    def exactly(self, low: int, high: int) -> bool:
        """Whether [low, high) is one or several whole buffers, with nothing but padding between them."""
        inside = [a for a in self.starts if low <= a < high]
        return bool(inside) and inside[0] == low and self.ends[inside[-1]] == high


class MemoryCheck:
    """Follows every call from the entry with the values of its registers in all units."""

    def __init__(
        self,
        stream: Stream,
        footprints: Sequence[Sequence[Sequence[Access]]],
        units: int,
        hbm: Ranges,
        shared_dm: Ranges,
        host: frozenset[int],
        launch: frozenset[int],
        report: Reporter,
    ) -> None:
        """shared_dm: DM buffers that live everywhere, all that others may touch. host, launch: registers."""
        self.stream = stream
        self.units = units
        self.hbm = hbm
        self.shared_dm = shared_dm
        self.host = host
        self.launch = launch
        self.report = report
        # By routine: register -> (low, high, instruction) of local HBM accesses.
        self.spans: list[dict[int, list[tuple[int, int, int]]]] = []
        self.peers: list[list[int]] = []  # by routine: instructions that name other units
        self.seen: set[tuple[int, int, tuple[tuple[int, ...], ...]]] = set()
        for routine, touched in zip(stream.routines, footprints, strict=True):
            span: dict[int, list[tuple[int, int, int]]] = {}
            for index in range(len(routine.instructions)):
                for access in touched[index]:
                    if access.space == "hbm":
                        span.setdefault(access.register, []).append((access.low, access.high, index))
            self.spans.append(span)
            self.peers.append(
                [i for i, instruction in enumerate(routine.instructions) if _names_units(instruction.what)]
            )

    def enter(self, number: int, registers: Registers) -> None:
        """Check a routine called with these registers, and what it calls."""
        for register, found in self.spans[number].items():
            if register not in registers:
                self.report(number, found[0][2], "register", f"register {register} is read but never set")
            elif len(values := set(registers[register])) > 1:
                message = f"register {register} differs between units: use a peer address"
                self.report(number, found[0][2], "dma-register", message)
            else:
                self._own(number, register, values.pop(), found)
        for index in self.peers[number]:
            self._other_units(number, index, registers)
        for index, instruction in enumerate(self.stream.routines[number].instructions):
            what = instruction.what
            if not isinstance(what, Call):
                continue
            unknown = [source for _, source, _ in what.moves if source not in registers]
            for source in unknown:
                self.report(number, index, "register", f"register {source} is read but never set")
            known = tuple(move for move in what.moves if move[1] in registers)
            self.enter(what.routine, moved(Call(what.routine, known), registers))

    def _own(self, number: int, register: int, value: int, found: Sequence[tuple[int, int, int]]) -> None:
        one_buffer = register not in self.host and register != 0
        if one_buffer and self.hbm.holds(min(f[0] for f in found) + value, max(f[1] for f in found) + value):
            return
        for low, high, index in found:
            if not self.hbm.holds(low + value, high + value):
                message = f"HBM bytes [{low + value}, {high + value}) lie in no single buffer"
                self.report(number, index, "hbm-bounds", message)

    def _other_units(self, number: int, index: int, registers: Registers) -> None:
        """Unit numbers and addresses of a transfer with a peer side or of a notify."""
        what = self.stream.routines[number].instructions[index].what
        used = [what.register] if isinstance(what, Notify) else []
        if isinstance(what, Dma):
            used = [endpoint.register for endpoint, _, _ in sides(what) if endpoint.space.is_peer]
        for register in used:
            if register not in registers:
                self.report(number, index, "register", f"register {register} is read but never set")
                return
        key = (number, index, tuple(registers[register] for register in used))
        if key in self.seen:
            return
        self.seen.add(key)
        if isinstance(what, Notify):
            units = {unit for value in registers[what.register] for unit in notified(what, value)}
            if what.register and (what.register not in self.launch or any(v % UNIT_STRIDE for v in key[2][0])):
                message = f"register {what.register} is no launch register with whole units"
                self.report(number, index, "notify-units", message)
            elif message := self._no_group("notifies", units):
                self.report(number, index, "peer", message)
        elif isinstance(what, Dma):
            for endpoint, loops, write in sides(what):
                if endpoint.space.is_peer:
                    verb = "writes" if write else "reads"
                    message = self._side(verb, endpoint, loops, what.packet, registers[endpoint.register])
                    if message:
                        self.report(number, index, "peer", message)

    def _side(
        self, verb: str, endpoint: Endpoint, loops: Sequence[tuple[int, int]], packet: int, values: Sequence[int]
    ) -> str:
        """What is wrong with a peer side in some unit, or nothing."""
        found: list[list[tuple[int, Piece]]] = []
        for value in values:
            try:
                found.append(peer_pieces(endpoint, loops, packet, value, 3 * self.units))
            except ValueError as e:
                return str(e)
        for pieces in found:
            for unit, piece in pieces:
                if message := self._wrong(verb, unit, piece):
                    return message
        if message := self._no_group(verb, {unit for pieces in found for unit, _ in pieces}):
            return message
        if len({value % UNIT_STRIDE for value in values}) == 1 and all(
            {unit for unit, _ in pieces} == {own} for own, pieces in enumerate(found)
        ):
            return f"{verb} the memory of the own unit only: write {endpoint.space.name.removeprefix('PEER_').lower()}"
        return ""

    def _no_group(self, verb: str, units: set[int]) -> str:
        """Units of one group: the own one, that of the next stage or that of the previous one."""
        low, high = min(units), max(units)
        if low < 0 or high >= 3 * self.units or low // self.units != high // self.units:
            return f"{verb} units {low} to {high}; a group of {self.units} sees itself and two neighbours of its size"
        return ""

    def _wrong(self, verb: str, unit: int, piece: Piece) -> str:
        """What is wrong with a piece of another unit's memory, or nothing."""
        if unit >= self.units and not piece.hbm:
            return f"{verb} DM of unit {unit}: another stage may lie on another card, which is reached through HBM"
        memory = self.hbm if piece.hbm else self.shared_dm
        for low, high in piece.pieces:
            if not memory.holds(low, high):
                name = "HBM" if piece.hbm else "DM"
                return (
                    f"{verb} {name} bytes [{low}, {high}) of unit {unit}, which lie in no buffer with a fixed address"
                )
        if not piece.hbm and (piece.slices[0] < 0 or piece.slices[1] > self.stream.slices):
            return f"{verb} slices [{piece.slices[0]}, {piece.slices[1]}) of unit {unit}"
        return ""


def check_ranges(ranges: Sequence[Interval], shared_dm: Ranges) -> str:
    """What is wrong with (offset, bytes) of a notify or wait: they are whole buffers with a fixed address."""
    for offset, nbytes in ranges:
        if not shared_dm.exactly(offset, offset + nbytes):
            return f"{nbytes} B at {offset} are no whole buffer with a fixed address"
    return ""


def _names_units(what: object) -> bool:
    return isinstance(what, Notify) or (
        isinstance(what, Dma) and (what.source.space.is_peer or what.destination.space.is_peer)
    )
