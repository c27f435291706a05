"""cast-bf16: the dtype rule. What the matrix engine reads is bf16; a checkpoint in fp16 or fp32 is cast, if allowed.

Before:
    %w = tc.weight "w" : tensor<8x4xf32>
    %y = tc.contract "b i, o i -> b o" (%x, %w) : tensor<?x8xf32, #tc.axes<"B,_">>
After (allow=true):
    %w = tc.weight "w" : tensor<8x4xbf16>
    %0 = tc.map "a" over "a b -> a b" (%x) : tensor<?x4xbf16, #tc.axes<"B,_">>
    %y = tc.contract "b i, o i -> b o" (%0, %w) : tensor<?x8xf32, #tc.axes<"B,_">>

fp16 becomes bf16 everywhere. Of fp32, what contractions, attention, embeddings and cache updates read becomes bf16:
weights and KV caches at their source, through every block, activations by a cast; everything else stays fp32. Weights
are cast when they are loaded. Without `allow`, a module that needs a cast is an error that lists the weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from typing_extensions import override
from xdsl.context import Context
from xdsl.dialects.builtin import FunctionType, ModuleOp
from xdsl.dialects.func import CallOp, FuncOp, ReturnOp
from xdsl.ir import Block, Operation, OpResult, SSAValue
from xdsl.passes import ModulePass
from xdsl.rewriter import Rewriter

from ir.dialects import tc
from ir.errors import Problem, UserError
from ir.types import elem_of, shape_of, with_elem
from passes.provenance import inherit

SHAPE_OPS = (tc.ReshapeOp, tc.TransposeOp, tc.SliceOp, tc.ConcatOp)


def engine_operands(op: Operation) -> list[int]:
    """Operand numbers that the matrix engine, a table or a cache holds in bf16."""
    match op:
        case tc.ContractOp() | tc.KvUpdateOp():
            return [0, 1]
        case tc.AttentionOp():
            return [0, 1, 2]
        case tc.GatherOp():
            return [0]
        case _:
            return []


class Storage:
    """Values that are one piece of memory: linked through calls, returns, shape operations and cache updates."""

    def __init__(self, module: ModuleOp) -> None:
        self.parent: dict[SSAValue, SSAValue] = {}
        functions = {f.sym_name.data: f for f in module.ops if isinstance(f, FuncOp)}
        for op in module.walk():
            if isinstance(op, CallOp):
                callee = functions[op.callee.string_value()].body.block
                self.link(op.arguments, callee.args)
                assert callee.last_op is not None
                self.link(op.results, callee.last_op.operands)
            elif isinstance(op, SHAPE_OPS):
                self.link(op.operands, [op.results[0]] * len(op.operands))
            elif isinstance(op, tc.KvUpdateOp):
                self.link([op.cache], [op.result])

    def link(self, left: Iterable[SSAValue], right: Iterable[SSAValue]) -> None:
        """Say that pairs of values are one."""
        for a, b in zip(left, right, strict=True):
            self.parent[self.find(a)] = self.find(b)

    def find(self, value: SSAValue) -> SSAValue:
        """The value that stands for all that are linked with this one."""
        while (above := self.parent.get(value, value)) is not value:
            value = above
        return value


def values_of(op: Operation) -> list[SSAValue]:
    """Results and block arguments of an operation."""
    return [*op.results, *(a for r in op.regions for b in r.blocks for a in b.args)]


def is_computed(value: SSAValue) -> bool:
    """Whether a value is calculated here, in contrast to a weight, an argument, or one of them in another shape."""
    stored = (tc.WeightOp, tc.ConstantOp, tc.KvUpdateOp, CallOp, *SHAPE_OPS)
    return isinstance(value, OpResult) and not isinstance(value.owner, stored)


@dataclass(frozen=True)
class CastBf16(ModulePass):
    """Apply the dtype rule; `allow` is the user's consent to a cast (`--auto-bfloat16-cast`)."""

    name = "cast-bf16"
    allow: bool = False

    @override
    def apply(self, ctx: Context, op: ModuleOp) -> None:
        storage = Storage(op)
        narrow = {
            storage.find(o.operands[i])
            for o in op.walk()
            for i in engine_operands(o)
            if elem_of(o.operands[i]) in ("f32", "f16")
        }
        halves = [v for o in op.walk() if not isinstance(o, ModuleOp) for v in values_of(o) if elem_of(v) == "f16"]
        if not narrow and not halves:
            return
        if not self.allow:
            raise UserError([refusal(op, storage, narrow)])
        for value in halves:
            retype(value)
        computed = {storage.find(v) for o in op.walk() for v in o.results if is_computed(v)}
        members = [v for o in op.walk() for v in values_of(o) if isinstance(o, (tc.TcOp, CallOp, FuncOp))]
        # Decide before any type changes: changing one replaces the value.
        for value in [v for v in members if (root := storage.find(v)) in narrow and root not in computed]:
            if elem_of(value) == "f32":
                retype(value)
        cast_operands(op)
        update_signatures(op)


def refusal(module: ModuleOp, storage: Storage, narrow: set[SSAValue]) -> Problem:
    """What to tell a user who has not allowed the cast."""
    names = [
        o.fqn.data
        for o in module.walk()
        if isinstance(o, tc.WeightOp) and (elem_of(o.result) == "f16" or storage.find(o.result) in narrow)
    ]
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    what = f"{len(names)} weights are fp16 or fp32 ({shown})" if names else "activations are fp16 or fp32"
    return Problem(what, "the matrix engine computes in bf16", "pass --auto-bfloat16-cast (allow=true)")


def retype(value: SSAValue) -> None:
    """Make a value bf16 where it is defined."""
    if isinstance(owner := value.owner, tc.ConstantOp):
        new = tc.ConstantOp(owner.array(), with_elem(value, "bf16"))
        inherit(new, owner)
        Rewriter.replace_op(owner, new)
    else:
        Rewriter.replace_value_with_new_type(value, with_elem(value, "bf16"))


def cast_operands(module: ModuleOp) -> None:
    """Round what is still f32 before the engine reads it; rows of a bf16 table go on in f32."""
    casts: dict[SSAValue, SSAValue] = {}
    for op in list(module.walk()):
        for index in engine_operands(op):
            value = op.operands[index]
            if elem_of(value) == "f32":
                casts[value] = casts.get(value) or cast_behind(value, "bf16")
                op.operands[index] = casts[value]
        if isinstance(op, tc.GatherOp) and elem_of(op.table) != elem_of(op.result):
            row = Rewriter.replace_value_with_new_type(op.result, with_elem(op.result, "bf16"))
            wide = cast_behind(row, "f32")
            row.replace_uses_with_if(wide, lambda use, own=wide.owner: use.operation is not own)
        if isinstance(op, tc.KvUpdateOp) and elem_of(op.cache) != elem_of(op.result):
            Rewriter.replace_value_with_new_type(op.result, with_elem(op.result, "bf16"))


def cast_behind(value: SSAValue, elem: str) -> SSAValue:
    """A map right behind the definition of a value that gives it another element type."""
    axes = " ".join(tc.own_axes(len(shape_of(value))))
    new = tc.MapOp([value], "a", f"{axes} -> {axes}", with_elem(value, elem))
    owner = value.owner
    if isinstance(owner, Block):
        assert owner.first_op is not None
        owner.insert_op_before(new, owner.first_op)
    else:
        inherit(new, owner)
        assert owner.parent is not None
        owner.parent.insert_op_after(new, owner)
    return new.result


def update_signatures(module: ModuleOp) -> None:
    """Make function types agree with the values in the functions."""
    for function in module.ops:
        if isinstance(function, FuncOp) and isinstance(end := function.body.block.last_op, ReturnOp):
            inputs = [a.type for a in function.body.block.args]
            function.function_type = FunctionType.from_lists(inputs, [o.type for o in end.operands])
