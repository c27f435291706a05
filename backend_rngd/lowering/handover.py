"""Routines `send` and `receive`: activations between pipeline stages."""

from __future__ import annotations

from collections.abc import Mapping

from backend_rngd.lowering.context import Program
from backend_rngd.lowering.tensor import Tensor


def add_handover(program: Program, values: Mapping[str, Tensor]) -> None:
    """Add both routines for the buffers that go from one layer to the next."""
