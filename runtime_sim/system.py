"""A system: cards with units, in tensor-parallel groups, pipeline stages and data-parallel replicas.

system = System(load_machine(), tensor=4, pipeline=2)
system.unit(rank=3, stage=1).window.write(address, weights)
system.run({unit: [Launch(stream, registers)] for unit in system.units})
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from backend_rngd.machine import Machine
from runtime_sim.functional import Unit
from runtime_sim.group import Group, Launch
from runtime_sim.memory import Hbm
from runtime_sim.topology import Topology


class System:
    """Units of `replicas` copies of `pipeline` stages of `tensor` units, neighbours in this order on as many cards as
    that takes. Every unit has a window of `hbm_bytes`; what lies below `shared_bytes` (weights, constants) exists once
    for the units of a card that have the same stage and rank in different replicas."""

    def __init__(
        self,
        machine: Machine,
        tensor: int = 1,
        pipeline: int = 1,
        replicas: int = 1,
        slices: int | None = None,
        hbm_bytes: int | None = None,
        shared_bytes: int = 0,
        checks: bool = True,
        topology: Topology | None = None,
    ) -> None:
        """`topology`: places other than neighbouring PEs from card 0 on."""
        slices = slices or machine.slices_per_pe
        self.machine = machine
        fused = max(1, slices // machine.slices_per_pe)
        self.topology = topology or Topology.of(machine, tensor, pipeline, replicas, fused)
        self.units: list[Unit] = []
        first: dict[tuple[int, int, int], Hbm] = {}
        for place in self.topology.places:
            key = (place.card, place.stage, place.rank)
            window = Hbm(machine, hbm_bytes or machine.hbm_bytes, first.get(key), shared_bytes)
            first.setdefault(key, window)
            self.units.append(Unit(window, slices, checks, place, legal=True))
        for unit in self.units:
            unit.peers = self._peers(unit)
        self._groups = [Group(self.replica(r), self._names(r)) for r in range(replicas)]

    def _peers(self, unit: Unit) -> dict[int, Unit]:
        here, tensor = unit.place, self.topology.tensor
        out: dict[int, Unit] = {}
        for group, stage in enumerate((here.stage, here.stage + 1, here.stage - 1)):
            if 0 <= stage < self.topology.pipeline:
                out |= {group * tensor + rank: self.unit(rank, stage, here.replica) for rank in range(tensor)}
        return out

    def _names(self, replica: int) -> list[str]:
        first = replica * self.topology.pipeline * self.topology.tensor
        count = self.topology.pipeline * self.topology.tensor
        return [f"unit {i - first} ({self.topology.describe(i)})" for i in range(first, first + count)]

    def unit(self, rank: int = 0, stage: int = 0, replica: int = 0) -> Unit:
        """A unit by its place."""
        return self.units[(replica * self.topology.pipeline + stage) * self.topology.tensor + rank]

    def stage(self, stage: int = 0, replica: int = 0) -> list[Unit]:
        """The tensor-parallel group of a stage."""
        return [self.unit(rank, stage, replica) for rank in range(self.topology.tensor)]

    def replica(self, replica: int = 0) -> list[Unit]:
        """All units of a replica, stage after stage."""
        return [unit for stage in range(self.topology.pipeline) for unit in self.stage(stage, replica)]

    def run(
        self,
        work: Mapping[Unit, Sequence[Launch]],
        replica: int = 0,
        races: bool = True,
        seed: int | None = None,
    ) -> None:
        """Run launches on the units of a replica (see `Group.run`); units without any stand still."""
        self._groups[replica].run([work.get(unit, ()) for unit in self.replica(replica)], races, seed)
