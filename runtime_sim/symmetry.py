"""Units that do the same at the same time are simulated once.

Units and resources are coloured and the colouring is refined until it is *equitable*: units of a colour run the same
stream and take the same amounts, site by site, of resources of the same colours; resources of a colour are used alike
by units of each colour; and notifies arrive alike. From equal starts, max-min fair rates and arrivals are then equal
inside a colour at all times (by induction over events: every step of progressive filling compares sums that are equal),
so that one unit of each colour stands for all of them and the result is exact, not an approximation.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

Name = tuple[int, int]  # of a resource: its kind, and the card or unit it belongs to
Incidence = Sequence[tuple[Hashable, Name, float]]  # (what, resource, amount)


@dataclass(frozen=True)
class Classes:
    """of_unit: class of every unit. members: units of every class; the first one represents it."""

    of_unit: tuple[int, ...]
    members: tuple[tuple[int, ...], ...]
    of_resource: Mapping[Name, int]

    @property
    def representatives(self) -> tuple[int, ...]:
        """One unit of each class."""
        return tuple(m[0] for m in self.members)


def singletons(units: int, resources: Sequence[Name]) -> Classes:
    """Every unit for itself."""
    return Classes(
        tuple(range(units)), tuple((u,) for u in range(units)), {r: number for number, r in enumerate(resources)}
    )


def refine(initial: Sequence[Hashable], incidence: Sequence[Incidence], resources: Mapping[Name, int]) -> Classes:
    """Coarsest equitable colouring.

    initial: what a unit runs. incidence: for every unit what it takes of which resource. resources: the unit that
    owns each resource, or -1.
    """
    units = len(initial)
    colour = _numbers(list(initial))
    names = list(resources)
    used_by: dict[Name, list[tuple[int, Hashable, float]]] = defaultdict(list)
    owned: list[list[Name]] = [[] for _ in range(units)]
    for unit, entries in enumerate(incidence):
        for what, resource, amount in entries:
            used_by[resource].append((unit, what, _rounded(amount)))
    for name, owner in resources.items():
        if owner >= 0:
            owned[owner].append(name)
    while True:
        signatures: list[Hashable] = []
        for name in names:
            owner = resources[name]
            users = sorted((colour[u], repr(what), amount) for u, what, amount in used_by[name])
            signatures.append((name[0], colour[owner] if owner >= 0 else -1, tuple(users)))
        resource_colour = dict(zip(names, _numbers(signatures), strict=True))
        unit_signatures: list[Hashable] = [
            (
                colour[u],
                tuple(sorted((repr(what), resource_colour[r], _rounded(x)) for what, r, x in incidence[u])),
                tuple(sorted((r[0], resource_colour[r]) for r in owned[u])),
            )
            for u in range(units)
        ]
        refined = _numbers(unit_signatures)
        if len(set(refined)) == len(set(colour)):
            break
        colour = refined
    members: list[list[int]] = [[] for _ in range(max(colour) + 1)]
    for unit, c in enumerate(colour):
        members[c].append(unit)
    return Classes(tuple(colour), tuple(tuple(m) for m in members), resource_colour)


def _numbers(values: Sequence[Hashable]) -> list[int]:
    """Equal values get equal numbers, in the order of their first appearance."""
    known: dict[Hashable, int] = {}
    return [known.setdefault(v, len(known)) for v in values]


def _rounded(amount: float) -> float:
    """Sums of the same numbers in another order count as equal."""
    return float(f"{amount:.12g}")
