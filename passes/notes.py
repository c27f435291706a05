"""Remarks of passes for the user, kept in the module: what was asked for and could not be done, and what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from xdsl.dialects.builtin import ArrayAttr, ModuleOp, StringAttr
from xdsl.ir import Attribute

NOTES = "tc.notes"
"""Module attribute with the remarks."""


def notes(module: ModuleOp) -> list[str]:
    """The remarks of all passes so far."""
    found = module.attributes.get(NOTES)
    if not isinstance(found, ArrayAttr):
        return []
    return [n.data for n in cast("ArrayAttr[Attribute]", found).data if isinstance(n, StringAttr)]


def add_notes(module: ModuleOp, texts: Sequence[str]) -> None:
    """Add remarks that are not there yet."""
    have = notes(module)
    new = [t for t in texts if t not in have]
    if new:
        module.attributes[NOTES] = ArrayAttr([StringAttr(t) for t in [*have, *new]])
