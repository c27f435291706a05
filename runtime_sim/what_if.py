"""What another machine would bring: changed parameters and ideal parts, for streams that stay as they are.

    what_if = parse(["hbm_channel_bytes_per_cycle=2x"], ["collectives"], load_machine())
    simulate(stream, what_if.machine, free_collectives=what_if.free_collectives)

Only numbers that cost time may change. Sizes and limits (memories, lanes, loops) are built into the streams: for those
a model has to be built again for another machine description.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from backend_rngd.machine import Machine

# What the closed forms and the event loop read and a stream does not depend on.
CHANGEABLE = frozenset(
    {
        "cluster_sync_cycles", "commit_sub_bytes", "contraction_fill_cycles", "dm_cross_cluster_bytes_per_cycle",
        "dma_descriptor_cycles", "dma_engine_bytes_per_cycle", "dma_hbm_bytes_per_cycle", "dma_startup_cycles",
        "dmn_bytes_per_cycle", "dmn_window_bytes", "hbm_channel_bytes_per_cycle", "hbm_efficiency",
        "hbm_row_switch_cycles", "hbm_unaligned_write_factor",
        "launch_skew_cycles", "lookup_keys_per_cycle", "lookup_load_cycles", "notify_cluster_cycles",
        "notify_issue_cycles", "pass_issue_cycles", "pcie_latency_cycles", "pcie_peer_bytes_per_cycle",
        "power_card_watts", "power_idle_watts", "power_pe_watts",
        "switch_configuration_cycles", "switch_fill_cycles_per_hop", "vector_alu_cycles",
    }
)  # fmt: skip
ALIASES = {
    "hbm.bandwidth": "hbm_channel_bytes_per_cycle",
    "dma.bandwidth": "dma_engine_bytes_per_cycle",
    "dm.bandwidth": "dmn_bytes_per_cycle",
    "card.bandwidth": "pcie_peer_bytes_per_cycle",
    "card.latency": "pcie_latency_cycles",
    "cluster.bandwidth": "dm_cross_cluster_bytes_per_cycle",
}
CLOCK = ("clock", "clock_scale", "clock.scale", "clock-scale")
# What an engine gets out of HBM is in proportion to what HBM gives.
LINKED = {"hbm.bandwidth": "dma_hbm_bytes_per_cycle"}
ENOUGH = 1e6  # times a bandwidth: what it limits then takes no time worth naming
_SYNC = ("notify_issue_cycles", "notify_cluster_cycles", "cluster_sync_cycles", "pcie_latency_cycles")
IDEALS: dict[str, dict[str, float]] = {  # factors by parameter
    "collectives": dict.fromkeys(_SYNC, 0.0),  # and `free_collectives`
    "hbm": {
        "hbm_channel_bytes_per_cycle": ENOUGH,
        "dma_hbm_bytes_per_cycle": ENOUGH,
        "hbm_row_switch_cycles": 0.0,
        "hbm_unaligned_write_factor": 0.0,
    },
    "sync": dict.fromkeys(_SYNC, 0.0),
    "dma": {
        "dma_engine_bytes_per_cycle": ENOUGH,
        "dma_hbm_bytes_per_cycle": ENOUGH,
        "dma_startup_cycles": 0.0,
        "dma_descriptor_cycles": 0.0,
    },
    "issue": dict.fromkeys(
        ("pass_issue_cycles", "switch_configuration_cycles", "contraction_fill_cycles", "switch_fill_cycles_per_hop"),
        0.0,
    ),
    "links": {
        "pcie_peer_bytes_per_cycle": ENOUGH,
        "pcie_latency_cycles": 0.0,
        "dm_cross_cluster_bytes_per_cycle": ENOUGH,
    },
}


class WhatIfError(ValueError):
    """A change that cannot be made: what, why, fix."""

    def __init__(self, what: str, why: str, fix: str) -> None:
        super().__init__(f"{what}: {why}; {fix}")
        self.what, self.why, self.fix = what, why, fix


@dataclass(frozen=True)
class Change:
    """One changed parameter."""

    name: str
    unit: str
    before: float
    after: float


@dataclass(frozen=True)
class WhatIf:
    """A changed machine. free_collectives: transfers between units, notifies and waits take no time themselves."""

    machine: Machine
    changes: tuple[Change, ...] = ()
    ideal: tuple[str, ...] = ()

    @property
    def asked(self) -> bool:
        """Whether anything is different."""
        return bool(self.changes or self.ideal)

    @property
    def free_collectives(self) -> bool:
        """Whether exchanges between units are free."""
        return "collectives" in self.ideal

    def to_json(self) -> dict[str, Any]:
        """`changes` with name, unit, before and after, and the names of the ideal parts."""
        return {"changes": [asdict(c) for c in self.changes], "ideal": list(self.ideal)}

    def describe(self) -> str:
        """One line for people; empty if nothing is different."""
        parts = [f"{c.name} {c.before:g} -> {c.after:g} {c.unit}" for c in self.changes]
        return "; ".join([*(f"ideal {name}" for name in self.ideal), *parts])


def parse(settings: Sequence[str], ideals: Sequence[str], machine: Machine) -> WhatIf:
    """Apply `NAME=NUMBER` and `NAME=FACTORx` settings and ideal parts to a machine; factors are of its own mode.

    Names are parameters of the machine description (`.` and `-` count as `_`) or ALIASES; `clock` leaves the speed of
    memories and links in seconds alone (`Machine.at_clock`). Raises WhatIfError.
    """
    clocks = [text for text in settings if text.partition("=")[0].strip() in CLOCK]
    if clocks:
        if len(clocks) > 1:
            raise WhatIfError(f"--set {clocks[1]}", "the clock is changed already", "give every parameter one value")
        number = clocks[0].partition("=")[2].strip()
        scale = _value(clocks[0], number, machine.clock_scale, "clock_scale")
        rest = parse([text for text in settings if text not in clocks], ideals, machine.at_clock(scale))
        clock = Change("clock_scale", machine.parameters["clock_scale"].unit, machine.clock_scale, scale)
        return WhatIf(rest.machine, (clock, *rest.changes), rest.ideal)
    values: dict[str, float] = {}
    for ideal in dict.fromkeys(ideals):
        if ideal not in IDEALS:
            raise WhatIfError(f"--ideal {ideal}", "there is no such part", f"use {', '.join(IDEALS)}")
        for name, factor in IDEALS[ideal].items():
            values[name] = float(getattr(machine, name)) * factor
    named: set[str] = set()
    for text in settings:
        given, equals, number = text.partition("=")
        name = _name(given.strip(), machine)
        if not equals:
            raise WhatIfError(f"--set {text}", "a change has a value", f"write {given}=2x or {given}=NUMBER")
        if name in named or name in values:
            raise WhatIfError(f"--set {text}", f"{name} is changed already", "give every parameter one value")
        named.add(name)
        before = float(getattr(machine, name))
        values[name] = _value(text, number.strip(), before, name)
        linked = LINKED.get(given.strip())
        if linked is not None and linked not in values:
            values[linked] = float(getattr(machine, linked)) * values[name] / before
    changes = tuple(
        Change(name, machine.parameters[name].unit, float(getattr(machine, name)), value)
        for name, value in values.items()
        if name in named or value != getattr(machine, name)
    )
    parameters = dict(machine.parameters)
    for c in changes:  # the digest must tell the machines apart
        parameters[c.name] = parameters[c.name].model_copy(update={"value": c.after, "silicon": None})
    # Without validation: a fraction of an integer (1.5x) is a number as good as any for a rate or a delay.
    changed = machine.model_copy(update={**values, "parameters": parameters}) if changes else machine
    return WhatIf(changed, changes, tuple(dict.fromkeys(ideals)))


def _name(given: str, machine: Machine) -> str:
    name = ALIASES.get(given, given.replace(".", "_").replace("-", "_"))
    if name in CHANGEABLE:
        return name
    if name in machine.parameters:
        raise WhatIfError(
            f"--set {given}",
            "timing does not depend on it, or the streams were made for its value",
            f"change one of {', '.join(sorted(CHANGEABLE))}",
        )
    near = difflib.get_close_matches(name, sorted(CHANGEABLE), 3, 0.5)
    aliases = difflib.get_close_matches(given, sorted(ALIASES), 2, 0.5)
    fix = f"did you mean {', '.join([*aliases, *near])}?" if near or aliases else f"use {', '.join(sorted(CHANGEABLE))}"
    raise WhatIfError(f"--set {given}", f"machine {machine.name} has no such parameter", fix)


def _value(text: str, number: str, before: float, name: str) -> float:
    factor = number.endswith(("x", "X"))
    try:
        value = float(number[:-1] if factor else number)
    except ValueError:
        fix = f"write {name}=2x or {name}={before:g}"
        raise WhatIfError(f"--set {text}", f"{number!r} is no number", fix) from None
    value = value * before if factor else value
    delay = name.endswith(("_cycles", "_cycles_per_hop", "_watts"))
    if not math.isfinite(value) or value < 0 or (value == 0 and not delay):
        raise WhatIfError(f"--set {text}", f"{value:g} is impossible", "use a positive number")
    return value
