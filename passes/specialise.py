"""specialise: one bucket of a symbolic module, by putting numbers for B, S and KV in every type.

Before:
    %y = tc.contract "b s i, o i -> b s o" (%x, %w) : tensor<?x?x576xbf16, #tc.axes<"B,S,_">>
After (batch=1 seq=512):
    %y = tc.contract "b s i, o i -> b s o" (%x, %w) : tensor<1x512x576xbf16, #tc.axes<"B,S,_">>

Rules name axes, not sizes, so nothing but types changes. The names stay as labels. A symbol without a number stays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from typing_extensions import override
from xdsl.context import Context
from xdsl.dialects.builtin import FunctionType, ModuleOp, TensorType
from xdsl.dialects.func import FuncOp
from xdsl.ir import Attribute
from xdsl.passes import ModulePass
from xdsl.rewriter import Rewriter
from xdsl.utils.exceptions import PassFailedException

from ir.types import specialised


@dataclass(frozen=True)
class Specialise(ModulePass):
    """Substitute the sizes of a bucket: `batch` for B, `seq` for S, `kv` for KV."""

    name = "specialise"
    batch: int | None = None
    seq: int | None = None
    kv: int | None = None

    @override
    def apply(self, ctx: Context, op: ModuleOp) -> None:
        given = {"B": self.batch, "S": self.seq, "KV": self.kv}
        sizes = {symbol: size for symbol, size in given.items() if size is not None}
        if bad := {s: n for s, n in sizes.items() if n < 1}:
            raise PassFailedException(f"specialise: sizes must be positive, not {bad}")
        substitute_sizes(op, sizes)


def substitute_sizes(module: ModuleOp, sizes: dict[str, int]) -> None:
    """Replace symbols in the type of every value and function of a module, in place."""
    known: dict[Attribute, Attribute] = {}

    def change(kind: Attribute) -> Attribute:
        if kind not in known:
            known[kind] = (
                specialised(cast("TensorType[Attribute]", kind), sizes) if isinstance(kind, TensorType) else kind
            )
        return known[kind]

    for op in module.walk():
        for result in op.results:
            if (new := change(result.type)) != result.type:
                Rewriter.replace_value_with_new_type(result, new)
        for region in op.regions:
            for block in region.blocks:
                for arg in block.args:
                    if (new := change(arg.type)) != arg.type:
                        Rewriter.replace_value_with_new_type(arg, new)
        if isinstance(op, FuncOp):
            kind = op.function_type
            op.function_type = FunctionType.from_lists(
                [change(t) for t in kind.inputs], [change(t) for t in kind.outputs]
            )
