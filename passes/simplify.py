"""simplify: bring a module into normal form without changing any rounding.

Before:
    %0 = tc.transpose %x [1, 0] : tensor<8x4xbf16>
    %1 = tc.contract "a i, o i -> a o" (%0, %w) : tensor<8x16xbf16>
    %2 = tc.map "mul(a, 1.0)" over "a o -> a o" (%1) : tensor<8x16xbf16>
After:
    %0 = tc.contract "i a, o i -> a o" (%x, %w) : tensor<8x16xbf16>

Identities go, reshapes, transposes and slices compose, transposes move into the rules of their neighbours,
contractions over axes of size 1 become maps, expressions and constants are folded, equal operations merge, unused ones
go. Provenance (location, path) does not keep operations apart.
"""

from __future__ import annotations

from dataclasses import dataclass

from typing_extensions import override
from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp
from xdsl.dialects.func import CallOp, FuncOp
from xdsl.ir import Block, Operation
from xdsl.passes import ModulePass
from xdsl.rewriter import Rewriter

from ir.dialects.tc import TcOp
from passes.canonical import PATTERNS
from passes.provenance import inherit, walker


def merge_equal(block: Block) -> None:
    """Common subexpression elimination over one block; attributes that are not properties do not count."""
    known: dict[object, Operation] = {}
    for op in list(block.ops):
        if not isinstance(op, TcOp):
            continue
        key = (op.name, tuple(op.operands), tuple(sorted(op.properties.items())), tuple(op.result_types))
        first = known.setdefault(key, op)
        if first is not op:
            inherit(first, op)
            op.results[0].replace_all_uses_with(first.results[0])
            Rewriter.erase_op(op)


def erase_uncalled(module: ModuleOp) -> None:
    """Remove private functions that nothing calls."""
    called = {op.callee.string_value() for op in module.walk() if isinstance(op, CallOp)}
    for op in list(module.ops):
        if not isinstance(op, FuncOp) or op.sym_visibility is None or op.sym_visibility.data != "private":
            continue
        if op.sym_name.data not in called:
            Rewriter.erase_op(op)


@dataclass(frozen=True)
class Simplify(ModulePass):
    """Canonicalise, fold constants, merge equal operations, remove unused ones."""

    name = "simplify"

    @override
    def apply(self, ctx: Context, op: ModuleOp) -> None:
        patterns = [pattern() for pattern in PATTERNS]
        walker(patterns).rewrite_module(op)
        for function in op.ops:
            if isinstance(function, FuncOp) and function.body.blocks:
                merge_equal(function.body.block)
        # Merging leaves single uses behind, which open further rewrites.
        walker(patterns).rewrite_module(op)
        erase_uncalled(op)
