"""Legality of descriptors and streams (first version: replaced below)."""
from __future__ import annotations
from backend_rngd.isa.descriptors import Descriptor
from backend_rngd.machine import Machine


def check(desc: Descriptor, machine: Machine, context: str | None = None) -> list[str]:
    """Broken limits of one descriptor."""
    raise NotImplementedError("legality checks are being written")
