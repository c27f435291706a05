"""What `-O0` to `-O3` mean: how much time a build spends to make programs faster. All levels compute the same.

The level is part of the artifact, of the keys in the cache, and of the options that lowering gets.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

DEFAULT = 2


@dataclass(frozen=True)
class Variant:
    """A way to compile a program. `spill`: share of the size from which on values lie in HBM. `prefetch`: share of DM
    that weights fetched early may fill, 0 for no early transfers."""

    spill: float = 1.0
    prefetch: float = 0.9


@dataclass(frozen=True)
class Effort:
    """What a level does. `fuse`: element-wise operations, norms and what follows contractions become one operation.
    `variants`: those that are tried; of several the one is kept that the simulator finds fastest. Of programs with more
    than `largest` instructions only the first is made."""

    fuse: bool
    variants: tuple[Variant, ...]
    help: str
    search: bool = False
    largest: int = sys.maxsize


EFFORTS = (
    Effort(False, (Variant(prefetch=0.0),), "only what the hardware needs, for the shortest build"),
    Effort(True, (Variant(prefetch=0.0),), "operations are fused"),
    Effort(
        True,
        (Variant(), Variant(prefetch=0.0)),
        "and weights are fetched while earlier operations compute, where the simulator finds that faster",
        search=True,
        largest=1000,
    ),
    Effort(
        True,
        (Variant(), Variant(prefetch=0.97), Variant(prefetch=0.6), Variant(0.5), Variant(0.25), Variant(prefetch=0.0)),
        "and more ways to use data memory are tried (six in all)",
        search=True,
    ),
)
"""By level."""
