"""What lies in which unit's HBM: pipeline stages of an artifact, and whether it fits the cards."""

from __future__ import annotations

from collections import defaultdict

from backend_rngd.artifact import Artifact, ArtifactError, ArtifactProblem, Bucket
from backend_rngd.artifact.stages import Cuts, Needs, balance, block_costs, blocks_of, needs, stage_stream
from backend_rngd.isa.descriptors import Stream
from backend_rngd.machine import Machine
from runtime_sim.topology import Topology


def cuts_of(artifact: Artifact, stages: int) -> Cuts:
    """The blocks of so many stages, balanced by cost: all programs are cut at the same blocks.

    Raises ArtifactError if the artifact's programs cannot be cut into so many stages.
    """
    return Cuts(((0, 0),)) if stages == 1 else balance(block_costs_of(artifact, stages), stages)


def block_costs_of(artifact: Artifact, stages: int) -> list[float]:
    """Cost of every block. Raises ArtifactError if the programs have none, so that there are no `stages`."""
    # The programs that run most often decide.
    first = min(artifact.buckets, key=lambda b: (b.phase != "decode", b.batch, b.attention_size))
    stream = artifact.stream(first)
    if not blocks_of(stream):
        why = "its programs are not made of layers, or it was built by an older version"
        raise ArtifactError(
            [ArtifactProblem(f"{stages} pipeline stages of {artifact.directory}", why, "use one stage")]
        )
    return block_costs(stream)


class Residence:
    """The stages of an artifact. `cuts` say which blocks each of them runs, `needs` what each of its units holds."""

    def __init__(self, artifact: Artifact, cuts: Cuts, machine: Machine) -> None:
        """`cuts`: see `cuts_of`. Raises ArtifactError if a program cannot be cut like that."""
        self.artifact, self.cuts = artifact, cuts
        manifest = artifact.manifest
        self._streams: dict[tuple[str, int], Stream] = {}
        if cuts.stages == 1:
            self.needs = (_everything(artifact),)
            return
        self.needs = tuple(
            needs(
                [self.stream(bucket, s) for bucket in artifact.buckets],
                manifest.placements,
                manifest.caches,
                manifest.hbm,
                machine.hbm_map_alignment,
            )  # fmt: skip
            for s in range(cuts.stages)
        )

    @property
    def stages(self) -> int:
        """How many stages there are."""
        return self.cuts.stages

    def stream(self, bucket: Bucket, stage: int) -> Stream:
        """What the units of a stage execute for a bucket."""
        key = (bucket.name, stage)
        if key not in self._streams:
            self._streams[key] = stage_stream(self.artifact.stream(bucket), self.cuts, stage)
        return self._streams[key]

    def stage_of(self, cache: str) -> int:
        """The stage that holds a cache."""
        return next(s for s, held in enumerate(self.needs) if any(c.name == cache for c in held.caches))

    def card_bytes(self, topology: Topology) -> dict[int, int]:
        """Bytes that lie on every card. Replicas on a card have one copy of weights and constants."""
        total: dict[int, int] = defaultdict(int)
        seen: set[tuple[int, int, int]] = set()
        for place in topology.places:
            held = self.needs[place.stage]
            total[place.card] += held.own_bytes
            if (place.card, place.stage, place.rank) not in seen:
                seen.add((place.card, place.stage, place.rank))
                total[place.card] += held.shared_bytes
        return dict(total)

    def problems(self, topology: Topology, machine: Machine) -> list[ArtifactProblem]:
        """A problem for every card that is too small."""
        limit = machine.hbm_usable_bytes
        sizes = f"tensor {topology.tensor}, pipeline {topology.pipeline}, data {topology.replicas}"
        return [
            ArtifactProblem(
                f"card {card} of {sizes} parallel units needs {need / 1e9:,.2f} GB of HBM",
                f"it has {limit / 1e9:,.2f} GB",
                "use more pipeline stages, fewer replicas, or build with a larger -tp",
            )
            for card, need in sorted(self.card_bytes(topology).items())
            if need > limit
        ]


def _everything(artifact: Artifact) -> Needs:
    m = artifact.manifest
    shared = m.hbm.weights + m.hbm.constants
    return Needs(m.placements, m.caches, shared, m.hbm.total - shared)
