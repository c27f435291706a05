"""Where an operation comes from: model source location and module path survive every rewrite through these helpers.

xDSL gives new operations `loc(unknown)`; without this, provenance would end at the first pass.
"""

from __future__ import annotations

from collections.abc import Sequence

from xdsl.dialects.builtin import ArrayAttr, FusedLoc, LocationAttr, NoneAttr, UnknownLoc
from xdsl.ir import Operation, OpResult, SSAValue
from xdsl.pattern_rewriter import (
    GreedyRewritePatternApplier,
    PatternRewriter,
    PatternRewriterListener,
    PatternRewriteWalker,
    RewritePattern,
)

PATH = "path"
"""Attribute with the model's module path, such as `model.layers.0.mlp`."""

MAX_FUSED = 8
"""Most source locations one fused operation remembers."""


def inherit(new: Operation, *old: Operation) -> None:
    """Give a new operation the locations of those it stands for, and the path of the first, whose value it has.

    An operation outside of every submodule has no path; it must not get one from what is fused into it.
    """
    if isinstance(new.location, UnknownLoc):
        new.location = fused_location([o.location for o in old])
    if PATH not in new.attributes and PATH in old[0].attributes:
        new.attributes[PATH] = old[0].attributes[PATH]


def fused_location(locations: Sequence[LocationAttr]) -> LocationAttr:
    """One location for several: known ones without repetition."""
    known: list[LocationAttr] = []
    for location in locations:
        parts = location.locations.data if isinstance(location, FusedLoc) else [location]  # pyright: ignore
        known += [p for p in parts if not isinstance(p, UnknownLoc) and p not in known]  # pyright: ignore
    if not known:
        return UnknownLoc()
    return known[0] if len(known) == 1 else FusedLoc(ArrayAttr(known[:MAX_FUSED]), NoneAttr())


def replace(
    rewriter: PatternRewriter,
    op: Operation,
    new: Operation | Sequence[Operation],
    results: Sequence[SSAValue] | None = None,
    also: Sequence[Operation] = (),
) -> None:
    """Replace an operation; every new one inherits its provenance and that of the operations in `also`."""
    ops = [new] if isinstance(new, Operation) else list(new)
    for created in ops:
        inherit(created, op, *also)
    rewriter.replace(op, ops, results)


def _on_replacement(op: Operation, results: Sequence[SSAValue | None]) -> None:
    for value in results:
        if isinstance(value, OpResult):
            inherit(value.owner, op)


def listener() -> PatternRewriterListener:
    """A listener that passes provenance on even where a pattern forgets to."""
    return PatternRewriterListener(operation_replacement_handler=[_on_replacement])


def walker(patterns: Sequence[RewritePattern]) -> PatternRewriteWalker:
    """A walker that applies patterns until nothing changes, removes dead operations, and keeps provenance."""
    return PatternRewriteWalker(GreedyRewritePatternApplier(list(patterns)), listener=listener())
