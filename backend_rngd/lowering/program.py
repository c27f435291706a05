"""What a lowering is asked for and what it yields beside the `rngd` module."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from xdsl.dialects.builtin import ModuleOp

SPILL_BYTES = 96 * 1024  # a value larger than this a slice lives in HBM and is walked in chunks
IN_FLIGHT = 4  # one tile is multiplied, the others are on the way or wait while the tokens are not known yet
LEAST_IN_FLIGHT = 2  # if that takes more data memory than there is
INPUT_PITCH = 8  # bytes between the i32 values of a program input: the smallest aligned DM write


@dataclass(frozen=True)
class LoweringOptions:
    """slices: slices of a unit. cache_capacity, cache_batch: geometry of the KV cache shared by all buckets.

    in_flight: tiles of a weight in DM at a time. search: contractions are mapped by predicted time, not by fixed rules.
    opt_level: 0 to 3, how much time the build may spend on the program; see `rngdc.effort`.
    """

    slices: int = 64
    cache_capacity: int = 0
    cache_batch: int = 1
    probes: bool = True
    spill_bytes: int = SPILL_BYTES
    in_flight: int = IN_FLIGHT
    search: bool = False
    opt_level: int = 2


@dataclass(frozen=True)
class Placement:
    """A weight's image in the HBM global `name`: the unit's part by `shard` (empty: all of it), permute, reshape to
    (rows, columns), pad both with zeros."""

    name: str
    weight: str
    permute: tuple[int, ...]
    reshape: tuple[int, int]
    pad: tuple[int, int]
    dtype: str
    bytes: int
    shard: str = ""


@dataclass(frozen=True)
class Port:
    """A program input, output or cache in HBM: global name, logical name, dtype, shape and byte strides."""

    name: str
    buffer: str
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0
    shard: str = ""  # how a cache's dimensions are cut between units


@dataclass
class Lowered:
    """An `rngd` module with what the host must know to run it. unit_constants: a row of values for each unit."""

    module: ModuleOp
    placements: dict[str, Placement] = field(default_factory=dict[str, Placement])
    constants: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict[str, np.ndarray[Any, Any]])
    unit_constants: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict[str, np.ndarray[Any, Any]])
    inputs: list[Port] = field(default_factory=list[Port])
    outputs: list[Port] = field(default_factory=list[Port])
    caches: list[Port] = field(default_factory=list[Port])
