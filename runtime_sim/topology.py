"""Where the units of a program sit: cards, clusters and PEs, and what a unit's peers are.

Physical order of PEs: data-parallel replicas outermost, then pipeline stages, then the units of a tensor-parallel
group, which are neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from backend_rngd.machine import Machine
from runtime_sim.errors import SimulationError


class Distance(IntEnum):
    """How far one unit is from another."""

    OWN = 0
    CLUSTER = 1
    CHIP = 2
    CARD = 3


@dataclass(frozen=True)
class Place:
    """One unit. pe: its first PE on the card. rank: its number in the group of its stage and replica."""

    card: int
    pe: int
    replica: int
    stage: int
    rank: int


@dataclass(frozen=True)
class Topology:
    """Units of `replicas` copies of `pipeline` stages of groups of `tensor` units."""

    tensor: int
    pipeline: int
    replicas: int
    pes_per_cluster: int
    places: tuple[Place, ...]

    @staticmethod
    def of(
        machine: Machine, tensor: int = 1, pipeline: int = 1, replicas: int = 1, pes: int | Sequence[int] = 1
    ) -> Topology:
        """Neighbouring PEs in order, as many cards as that takes. pes: PEs fused in a unit, one number or one a unit.

        Raises SimulationError if a unit would straddle clusters.
        """
        count = tensor * pipeline * replicas
        widths = [pes] * count if isinstance(pes, int) else list(pes)
        places: list[Place] = []
        position = 0
        for number, width in enumerate(widths):
            position += -position % width  # fused PEs start at a multiple of their number
            card, pe = divmod(position, machine.pes_per_chip)
            if pe // machine.pes_per_cluster != (pe + width - 1) // machine.pes_per_cluster:
                raise SimulationError(SimulationError.ILLEGAL, f"a unit of {width} PEs does not fit one cluster")
            group, rank = divmod(number, tensor)
            replica, stage = divmod(group, pipeline)
            places.append(Place(card, pe, replica, stage, rank))
            position += width
        return Topology(tensor, pipeline, replicas, machine.pes_per_cluster, tuple(places))

    @staticmethod
    def at(machine: Machine, tensor: int, pipeline: int, replicas: int, starts: Sequence[tuple[int, int]]) -> Topology:
        """Units at chosen places: (card, first PE) of each, replica after replica, stage after stage."""
        places: list[Place] = []
        for number, (card, pe) in enumerate(starts):
            group, rank = divmod(number, tensor)
            replica, stage = divmod(group, pipeline)
            places.append(Place(card, pe, replica, stage, rank))
        return Topology(tensor, pipeline, replicas, machine.pes_per_cluster, tuple(places))

    @staticmethod
    def on_one_card(machine: Machine, pes: Sequence[int]) -> Topology:
        """Units of one group side by side on a card that is large enough, with `pes` fused PEs each."""
        starts = [sum(pes[:i]) for i in range(len(pes))]
        places = tuple(Place(0, pe, 0, 0, rank) for rank, pe in enumerate(starts))
        return Topology(len(pes), 1, 1, machine.pes_per_cluster, places)

    def __len__(self) -> int:
        return len(self.places)

    @property
    def cards(self) -> int:
        """Cards in use."""
        return len({p.card for p in self.places})

    def distance(self, a: int, b: int) -> Distance:
        """How far unit `b` is from unit `a`."""
        if a == b:
            return Distance.OWN
        x, y = self.places[a], self.places[b]
        if x.card != y.card:
            return Distance.CARD
        same = x.pe // self.pes_per_cluster == y.pe // self.pes_per_cluster
        return Distance.CLUSTER if same else Distance.CHIP

    def resolve(self, unit: int, logical: int) -> int:
        """The unit that `unit` calls `logical`: 0 .. N-1 its group, N .. 2N-1 the next stage, 2N .. 3N-1 the previous.

        Raises SimulationError for a unit that does not exist.
        """
        group, rank = divmod(logical, self.tensor)
        place = self.places[unit]
        stage = place.stage + {0: 0, 1: 1, 2: -1}.get(group, self.pipeline)
        if logical < 0 or not 0 <= stage < self.pipeline:
            what = (
                f"unit {unit} (stage {place.stage} of {self.pipeline}) names unit {logical} of groups of {self.tensor}"
            )
            raise SimulationError(SimulationError.ILLEGAL, what, "a first stage has no previous and a last no next one")
        return (place.replica * self.pipeline + stage) * self.tensor + rank

    def describe(self, unit: int) -> str:
        """Name of a unit for people."""
        p = self.places[unit]
        return f"card {p.card} PE {p.pe}" + (f" (stage {p.stage})" if self.pipeline > 1 else "")
