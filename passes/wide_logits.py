"""wide-logits: logits keep the accumulator's precision, because the host compares them right away.

Before:
    %y = tc.contract "b s i, v i -> b s v" (%x, %w) : tensor<?x1x49152xbf16, #tc.axes<"B,_,_">>
    func.return %y {result_names = ["logits"]}
After:
    %y = tc.contract "b s i, v i -> b s v" (%x, %w) : tensor<?x1x49152xf32, #tc.axes<"B,_,_">>
    func.return %y {result_names = ["logits"]}

In bf16 the two best of 49,152 tokens often tie (steps are 1/8 at 25) and the wrong one is taken; the sum is f32 anyway.
Applies to a result named `logits` of `@main` that contractions, maps and reshapes compute which nothing else reads.
"""

from __future__ import annotations

from dataclasses import dataclass

from xdsl.context import Context
from xdsl.dialects.builtin import FunctionType, ModuleOp
from xdsl.dialects.func import FuncOp, ReturnOp
from xdsl.ir import Operation, SSAValue
from xdsl.passes import ModulePass
from xdsl.rewriter import Rewriter
from xdsl.traits import SymbolTable

from ir.dialects import tc
from ir.interpreter import names_of
from ir.types import elem_of, with_elem

LOGITS = "logits"


def chain(value: SSAValue) -> list[SSAValue]:
    """The values from the logits up to the contraction or map that computes them; empty if it cannot be widened."""
    found: list[SSAValue] = []
    while elem_of(value) == "bf16" and value.has_one_use():
        owner = value.owner
        if not isinstance(owner, Operation):
            return []
        found.append(value)
        if isinstance(owner, (tc.ContractOp, tc.MapOp)):
            # A map of a contraction (softcap) is one pass with it: the sum is not rounded in between either.
            inner = owner.operands[0] if isinstance(owner, tc.MapOp) and len(owner.operands) == 1 else None
            fusable = inner is not None and isinstance(inner.owner, (tc.ContractOp, tc.ReshapeOp))
            return [*found, *chain(inner)] if inner is not None and fusable else found
        if not isinstance(owner, tc.ReshapeOp):
            return []
        value = owner.operands[0]
    return []


@dataclass(frozen=True)
class WideLogits(ModulePass):
    """Return `logits` in f32."""

    name = "wide-logits"

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        """Change the types of the values that lead to the logits."""
        function = SymbolTable.lookup_symbol(op, "main")
        terminator = function.body.block.last_op if isinstance(function, FuncOp) else None
        if not isinstance(function, FuncOp) or not isinstance(terminator, ReturnOp):
            return
        names = names_of(function, "result_names", len(terminator.operands))
        if LOGITS not in names:
            return
        for value in chain(terminator.operands[names.index(LOGITS)]):
            Rewriter.replace_value_with_new_type(value, with_elem(value, "f32"))
        inputs = [a.type for a in function.body.block.args]
        function.function_type = FunctionType.from_lists(inputs, [o.type for o in terminator.operands])
