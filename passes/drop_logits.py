"""drop-logits: a program that only fills the caches, for a part of a prompt that is not its end.

Before:
    func.func @main(%ids, %k) {
      %x, %k1 = func.call @block_0(%e, %k)
      %l = tc.contract "b s i, v i -> b s v" (%x, %w)
      func.return %l, %k1
    }
After:
    func.func @main(%ids, %k) {
      %x, %k1 = func.call @block_0(%e, %k)
      func.return %k1
    }

What only the logits needed goes, with the arguments that nothing reads any more. Calls stay: they update caches.
"""

from __future__ import annotations

from dataclasses import dataclass

from typing_extensions import override
from xdsl.context import Context
from xdsl.dialects.builtin import ArrayAttr, FunctionType, ModuleOp, StringAttr
from xdsl.dialects.func import CallOp, FuncOp, ReturnOp
from xdsl.passes import ModulePass

from ir.interpreter import find_function, names_of

LOGITS = "logits"


@dataclass(frozen=True)
class DropLogits(ModulePass):
    """Return only caches from `@main`."""

    name = "drop-logits"

    @override
    def apply(self, ctx: Context, op: ModuleOp) -> None:
        main = find_function(op, "main")
        block = main.body.block
        last = block.last_op
        assert isinstance(last, ReturnOp)
        names = names_of(main, "result_names", len(last.operands))
        kept = [i for i, name in enumerate(names) if name != LOGITS]
        if len(kept) == len(names):
            return
        block.add_op(ReturnOp(*[last.operands[i] for i in kept]))
        last.detach()
        last.erase()
        main.attributes["result_names"] = ArrayAttr([StringAttr(names[i]) for i in kept])
        for inner in reversed(list(block.ops)):
            if not isinstance(inner, (CallOp, ReturnOp)) and not any(r.first_use for r in inner.results):
                inner.detach()
                inner.erase()
        _drop_arguments(main)


def _drop_arguments(main: FuncOp) -> None:
    """Remove arguments without a use."""
    block = main.body.block
    names = names_of(main, "arg_names", len(block.args))
    for argument in reversed(block.args):
        if argument.first_use is None:
            del names[argument.index]
            block.erase_arg(argument)
    main.attributes["arg_names"] = ArrayAttr([StringAttr(n) for n in names])
    last = block.last_op
    assert last is not None
    main.function_type = FunctionType.from_lists([a.type for a in block.args], [o.type for o in last.operands])
