"""Errors of the simulator: every one names the instruction, the source operation and the layer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Site:
    """Where in a stream something happened. layer: the call of the entry routine that led there, if one did; routines
    of blocks are the same for all their layers."""

    routine: str
    index: int
    location: str
    layer: str = ""

    def __str__(self) -> str:
        where = f"routine {self.routine}, instruction {self.index}, {self.location or 'no location'}"
        return f"{where}, in {self.layer}" if self.layer else where


def layer_name(location: str) -> str:
    """Layer of a call's location, such as `model.layers.3|func.call`."""
    return location.split("|")[0]


class SimulationError(Exception):
    """An instruction cannot be executed. `kind` is one of the class constants below."""

    ILLEGAL = "illegal instruction"
    UNSUPPORTED = "unsupported instruction"
    BOUNDS = "out of bounds"
    UNINITIALISED = "uninitialised read"
    RACE = "race between contexts"
    UNIT_RACE = "race between units"
    DEADLOCK = "deadlock"

    def __init__(self, kind: str, what: str, fix: str = "", site: Site | None = None) -> None:
        self.kind = kind
        self.what = what
        self.fix = fix
        self.site = site
        super().__init__(kind, what, fix, site)

    def __str__(self) -> str:
        where = f" at {self.site}" if self.site else ""
        fix = f"; {self.fix}" if self.fix else ""
        return f"{self.kind}{where}: {self.what}{fix}"

    def at(self, site: Site) -> SimulationError:
        """The same error with its place, unless it already has one."""
        return self if self.site else SimulationError(self.kind, self.what, self.fix, site)
