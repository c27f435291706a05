"""outline: leave nothing but calls in `@main`, so that a pipeline stage is a list of calls.

Before:
    func.func @main(%ids, %pos, %last, %k, %v) {
      %w = tc.weight "embed" ...
      %x = tc.gather "v h, b s -> b s h" (%w, %ids)
      %c = tc.map "cos(mul(a, b))" ... (%pos, %f)
      %y, %k1, %v1 = func.call @block_0(%x, %c, %pos, ..., %k, %v)
      %l = tc.contract "b s i, v i -> b s v" (%y, %w)
      return %l, %k1, %v1
    }
After:
    func.func private @prepare(%pos, %f) -> %c        // what every stage needs, computed from the inputs
    func.func private @embed(%w, %ids) -> %x          // what the first layer reads
    func.func private @head(%y, %w) -> %l             // what follows the last layer
    func.func @main(...) { %c = call @prepare; %x = call @embed; %y, ... = call @block_0; %l = call @head; return }

Weights and literals stay in `@main` and are passed on. A module whose `@main` calls nothing is left as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from typing_extensions import override
from xdsl.context import Context
from xdsl.dialects.builtin import ArrayAttr, FunctionType, ModuleOp, StringAttr, UnitAttr
from xdsl.dialects.func import CallOp, FuncOp, ReturnOp
from xdsl.ir import Block, Operation, Region, SSAValue
from xdsl.passes import ModulePass

from ir.dialects import tc
from ir.interpreter import names_of

PREPARE, EMBED, HEAD = "prepare", "embed", "head"
CACHE = "cache."
OUTLINED = "tc.outlined"
"""Attribute of the functions that this pass makes."""


@dataclass(frozen=True)
class Outline(ModulePass):
    """Move everything outside of layers into functions."""

    name = "outline"

    @override
    def apply(self, ctx: Context, op: ModuleOp) -> None:
        outline(op)


def outline(module: ModuleOp) -> None:
    """Outline `@main` in place; nothing happens if it calls no function or has been outlined already."""
    main = next((f for f in module.ops if isinstance(f, FuncOp) and f.sym_name.data == "main"), None)
    if main is None:
        return
    calls = [op for op in main.body.block.ops if isinstance(op, CallOp)]
    loose = [op for op in main.body.block.ops if not isinstance(op, (CallOp, tc.WeightOp, tc.ConstantOp, ReturnOp))]
    returned = main.body.block.last_op
    assert isinstance(returned, ReturnOp)
    results: set[SSAValue] = {v for call in calls for v in call.results}
    if not calls or any(OUTLINED in f.attributes for f in module.ops):
        return
    behind = _behind(loose, results)
    before = [op for op in loose if op not in behind]
    first = _first_layer_only(before, calls)
    shared = [op for op in before if op not in first]
    _outline(module, main, PREPARE, shared, calls[0])
    _outline(module, main, EMBED, [op for op in before if op in first], calls[0])
    names = names_of(main, "result_names", len(returned.operands))
    passed = [v for v, n in zip(returned.operands, names, strict=True) if v in results and not n.startswith(CACHE)]
    _outline(module, main, HEAD, [op for op in loose if op in behind], returned, passed)


def _behind(loose: Sequence[Operation], results: set[SSAValue]) -> set[Operation]:
    """Operations that need the result of a layer."""
    reached = set(results)
    out: set[Operation] = set()
    for op in loose:
        if any(v in reached for v in op.operands):
            out.add(op)
            reached.update(op.results)
    return out


def _first_layer_only(before: Sequence[Operation], calls: Sequence[CallOp]) -> set[Operation]:
    """Operations that only the first layer's activations need: operands that later layers take from a layer."""
    made = {v for call in calls for v in call.results}
    own = {
        operand
        for i, operand in enumerate(calls[0].operands)
        if len(calls) == 1 or any(i < len(c.operands) and c.operands[i] in made for c in calls[1:])
    }
    if len(calls) == 1:  # one layer: its first operand is the activation
        own = {calls[0].operands[0]}
    out: set[Operation] = set()
    for op in reversed(before):
        users = {use.operation for result in op.results for use in result.uses}
        direct = any(result in own for result in op.results)
        if users and all(user in out or (user is calls[0] and direct) for user in users):
            out.add(op)
    return out


def _outline(
    module: ModuleOp,
    main: FuncOp,
    name: str,
    ops: Sequence[Operation],
    before: Operation,
    passed: Sequence[SSAValue] = (),
) -> None:
    """Move `ops` into the function `name`, called right before `before`; `passed` values go through it unchanged."""
    if not ops and not passed:
        return
    inside = set(ops)
    inputs = list(dict.fromkeys(v for op in ops for v in op.operands if v.owner not in inside))
    inputs += [v for v in passed if v not in inputs]
    outputs = [v for op in ops for v in op.results if any(use.operation not in inside for use in v.uses)]
    block = Block(arg_types=[v.type for v in inputs])
    for value, arg in zip(inputs, block.args, strict=True):
        arg.name_hint = value.name_hint
    results = [*outputs, *passed]
    call = CallOp(name, list(inputs), [v.type for v in results])
    call.attributes["path"] = StringAttr(name)
    main.body.block.insert_op_before(call, before)
    for op in ops:
        op.detach()
        block.add_op(op)
        for i, operand in enumerate(op.operands):
            if operand in inputs:
                op.operands[i] = block.args[inputs.index(operand)]
    for value, result in zip(results, call.results, strict=True):
        for use in list(value.uses):
            # A passed value is replaced only where it is returned; an inner one everywhere outside.
            if use.operation is before if value in passed else use.operation.parent is main.body.block:
                use.operation.operands[use.index] = result
    through = [block.args[inputs.index(v)] for v in passed]
    block.add_op(ReturnOp(*outputs, *through))
    kind = FunctionType.from_lists([v.type for v in inputs], [v.type for v in (*outputs, *passed)])
    function = FuncOp(name, kind, Region(block), "private")
    function.attributes[OUTLINED] = UnitAttr()
    function.attributes["arg_names"] = ArrayAttr([StringAttr(_name(v, i)) for i, v in enumerate(inputs)])
    module.body.block.insert_op_before(function, main)


def _name(value: SSAValue, index: int) -> str:
    owner = value.owner
    if isinstance(owner, tc.WeightOp):
        return f"w:{owner.fqn.data}"
    return value.name_hint or f"arg{index}"


def argument_names(function: FuncOp) -> list[str]:
    """Names of a function's arguments."""
    return names_of(function, "arg_names", len(function.body.block.args))


def set_type(function: FuncOp, names: Sequence[str]) -> None:
    """Make the function's type that of its block, and name its arguments."""
    block = function.body.block
    last = block.last_op
    assert last is not None
    function.function_type = FunctionType.from_lists([a.type for a in block.args], [o.type for o in last.operands])
    function.attributes["arg_names"] = ArrayAttr([StringAttr(n) for n in names])
