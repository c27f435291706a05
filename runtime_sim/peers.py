"""Transfers that read or write the memories of other units: one plain transfer for each unit they name."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from backend_rngd.isa.descriptors import Dma, Endpoint, Space
from backend_rngd.isa.peers import split_address, split_unit_stride
from runtime_sim.dma import DmaPlan
from runtime_sim.errors import SimulationError
from runtime_sim.nest import illegal

if TYPE_CHECKING:
    from runtime_sim.functional import Unit

Array = NDArray[Any]
LOCAL = {Space.PEER_HBM: Space.HBM, Space.PEER_DM: Space.DM}


def peer(unit: Unit, number: int, space: Space) -> Unit:
    """The unit that a peer address names. Raises SimulationError if there is none, or its DM cannot be reached."""
    found = unit.peers.get(number)
    if found is None:
        raise illegal(f"transfer with unit {number}, the program's units are {sorted(unit.peers)}")
    if space is Space.PEER_DM and found.place.card != unit.place.card:
        raise SimulationError(
            SimulationError.ILLEGAL,
            f"transfer between a unit of card {unit.place.card} and the DM of a unit of card {found.place.card}",
            "other cards are reached through HBM, over PCIe",
        )
    return found


class PeerDmaPlan:
    """A transfer with one or two peer sides, taken apart again for every new value of their registers."""

    def __init__(self, op: Dma, unit: Unit) -> None:
        if op.index is not None:
            raise illegal("gather or scatter in the memory of other units")
        self.op = op
        self._parts: dict[tuple[int, int], tuple[DmaPlan, ...]] = {}

    def parts(self, unit: Unit) -> tuple[DmaPlan, ...]:
        """The transfers with the current registers, in the order of the loops."""
        registers = unit.registers
        key = (registers[self.op.source.register], registers[self.op.destination.register])
        found = self._parts.get(key)
        if found is None:
            found = self._parts[key] = tuple(self._split(unit))
        return found

    def _split(self, unit: Unit) -> list[DmaPlan]:
        op = self.op
        outer: list[int] = []  # loops that move to another unit
        for i, (_, source, destination) in enumerate(op.loops):
            if any(
                side.space.is_peer and split_unit_stride(stride)[0]
                for side, stride in ((op.source, source), (op.destination, destination))
            ):
                outer.append(i)
        inner = tuple(loop for i, loop in enumerate(op.loops) if i not in outer)
        plans: list[DmaPlan] = []
        for steps in itertools.product(*[range(op.loops[i][0]) for i in outer]):
            at = [sum(n * op.loops[i][side] for n, i in zip(steps, outer, strict=True)) for side in (1, 2)]
            source, reads = self._side(op.source, at[0], unit)
            target, writes = self._side(op.destination, at[1], unit)
            loops = inner or ((1, 0, 0),)
            plans.append(DmaPlan(replace(op, source=source, destination=target, loops=loops), unit, reads, writes))
        return plans

    @staticmethod
    def _side(endpoint: Endpoint, shift: int, unit: Unit) -> tuple[Endpoint, Unit]:
        if not endpoint.space.is_peer:
            return replace(endpoint, base=endpoint.base + shift), unit
        number, address = split_address(unit.registers[endpoint.register] + endpoint.base + shift)
        return Endpoint(LOCAL[endpoint.space], address), peer(unit, number, endpoint.space)

    def check(self, unit: Unit) -> None:
        """Bounds and uninitialised bytes."""
        for plan in self.parts(unit):
            plan.check(unit)

    def run(self, unit: Unit) -> None:
        """Copy."""
        for plan in self.parts(unit):
            plan.run(unit)

    def written(self, unit: Unit) -> Array:
        """Bytes at the destinations, one after the other."""
        return np.concatenate([np.ascontiguousarray(p.written(unit)).reshape(-1) for p in self.parts(unit)])
