"""fuse-elementwise: an element-wise operation moves into the one that reads it.

Before:
    %0 = tc.map "a" over "b s h -> b s h" (%x) : tensor<?x?x576xf32, #tc.axes<"B,S,_">>
    %1 = tc.reduce add "square(a)" over "b s h -> b s" (%0) : tensor<?x?xf32, #tc.axes<"B,S">>
    %2 = tc.map "rsqrt(a)" over "b s -> b s" (%1) : tensor<?x?xf32, #tc.axes<"B,S">>
    %3 = tc.map "mul(a, b)" over "b s h, b s -> b s h" (%0, %2) : tensor<?x?x576xbf16, #tc.axes<"B,S,_">>
After:
    %0 = tc.reduce add "square(a)" over "b s h -> b s" (%x) : tensor<?x?xf32, #tc.axes<"B,S">>
    %1 = tc.map "mul(a, rsqrt(b))" over "b s h, b s -> b s h" (%x, %0) : tensor<?x?x576xbf16, #tc.axes<"B,S,_">>

A value with one reader is always fused. One with more readers is fused into all of them if it is cheap to compute
again from something no larger than itself, such as a widening cast. Intermediate roundings to bf16 are dropped: one
rounding per fused operation, which is more exact than the model. `keep-rounding=true` keeps them as `round_bf16`.
"""

from __future__ import annotations

from dataclasses import dataclass

from typing_extensions import override
from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import Operation, SSAValue
from xdsl.passes import ModulePass
from xdsl.pattern_rewriter import PatternRewriter, RewritePattern

from ir import expr as ex
from ir.axes import Rule
from ir.dialects import tc
from ir.dialects.tc_compute import QUANTIZED
from ir.types import ELEMENT_BYTES, elem_of, is_float
from passes.canonical import merge_operands
from passes.provenance import replace, walker

CHEAP = frozenset({"neg", "abs", "add", "sub", "mul", "max", "min", "relu", "select", "lt", "le", "gt", "ge", "eq"})
"""Functions of one vector-engine step."""

COMPARISONS = frozenset({"lt", "le", "gt", "ge", "eq"})


def is_boolean(expr: ex.Expr, operands: list[SSAValue]) -> bool:
    """Whether the value is 0 or 1, so that rounding it to i1 changes nothing."""
    match expr:
        case ex.Input(index):
            return elem_of(operands[index]) == "i1"
        case ex.Const(value):
            return value in (0.0, 1.0)
        case ex.Call(fn, args) if fn in ("mul", "max", "min"):
            return all(is_boolean(a, operands) for a in args)
        case ex.Call("select", (_, x, y)):
            return is_boolean(x, operands) and is_boolean(y, operands)
        case ex.Call("sub", (ex.Const(1.0), x)):
            return is_boolean(x, operands)
        case ex.Call(fn, _):
            return fn in COMPARISONS


def _is_quantized_sum(value: SSAValue) -> bool:
    return isinstance(owner := value.owner, tc.ContractOp) and elem_of(owner.lhs) in QUANTIZED


def is_cheap(producer: tc.MapOp) -> bool:
    """Whether computing a map again costs no more than reading its result."""
    if len(producer.inputs) != 1:
        return False
    calls = ex.functions(producer.expression())
    smaller = ELEMENT_BYTES[elem_of(producer.inputs[0])] <= ELEMENT_BYTES[elem_of(producer.result)]
    return smaller and len(calls) <= 1 and CHEAP.issuperset(calls)


def fused(
    consumer: tc.MapOp | tc.ReduceOp, index: int, producer: tc.MapOp, keep_rounding: bool, max_inputs: int
) -> tc.MapOp | tc.ReduceOp | None:
    """The consumer with operand `index` computed inside; None if that would change a value or has no rule."""
    rounded, source = elem_of(producer.result), producer.expression()
    if rounded in ("f16", *QUANTIZED) or any(_is_quantized_sum(v) for v in producer.inputs):
        return None  # the scales of a quantized contraction ride in its own pass
    if rounded == "i1" and not is_boolean(source, list(producer.inputs)):
        return None
    if rounded == "i32" and not producer.integer:
        return None
    if rounded == "bf16" and keep_rounding:
        exact = isinstance(source, ex.Input) and elem_of(producer.inputs[source.index]) == "bf16"
        source = source if exact else ex.Call("round_bf16", (source,))
    rule, inner = consumer.rule(), producer.rule()
    renamed = inner.rename(dict(zip(inner.output, rule.inputs[index], strict=True)))
    offset = len(consumer.inputs)
    values = [*consumer.inputs, *producer.inputs]
    axes = [*rule.inputs, *renamed.inputs]
    shifted = ex.renumber(source, {i: i + offset for i in range(len(producer.inputs))})
    expr = ex.substitute(consumer.expression(), {index: shifted})
    values, axes, expr = merge_operands(expr, values, axes)
    if len(values) > max(max_inputs, offset):
        return None
    if isinstance(consumer, tc.ReduceOp):
        known = {a for names in axes for a in names}
        # Integers are exact in f32 only up to 2**24, and an axis that only the producer broadcasts has no size here.
        if producer.integer or not known.issuperset(rule.axes):
            return None
        new = Rule(tuple(axes), rule.output, rule.unsharded)
        return tc.ReduceOp(values, consumer.kind.data, str(ex.simplify(expr)), str(new), consumer.result_type)
    integer = not any(is_float(v) for v in (*values, consumer.result))
    if integer != consumer.integer or (producer.integer and not integer):
        return None
    new = Rule(tuple(axes), rule.output, rule.unsharded)
    return tc.MapOp(values, str(ex.simplify(expr, integer)), str(new), consumer.result_type)


@dataclass(frozen=True)
class FuseProducers(RewritePattern):
    """Fuse the first operand that may be fused; the walker comes back for the others."""

    keep_rounding: bool
    max_inputs: int

    @override
    def match_and_rewrite(self, op: Operation, rewriter: PatternRewriter) -> None:
        if not isinstance(op, (tc.MapOp, tc.ReduceOp)):
            return
        for index, value in enumerate(op.inputs):
            producer = value.owner
            if not isinstance(producer, tc.MapOp) or not self.worthwhile(producer, op, index):
                continue
            new = fused(op, index, producer, self.keep_rounding, self.max_inputs)
            if new is not None:
                replace(rewriter, op, new, also=[producer])
                return

    def worthwhile(self, producer: tc.MapOp, consumer: tc.MapOp | tc.ReduceOp, index: int) -> bool:
        """Whether fusing saves a value: it has one reader, or is cheap and every reader can take it."""
        readers = [use.operation for use in producer.result.uses]
        if all(reader is consumer for reader in readers):
            return True
        if not is_cheap(producer):
            return False
        for use in producer.result.uses:
            reader = use.operation
            if not isinstance(reader, (tc.MapOp, tc.ReduceOp)):
                return False
            if (trial := fused(reader, use.index, producer, self.keep_rounding, self.max_inputs)) is None:
                return False
            trial.erase()
        return True


@dataclass(frozen=True)
class FuseElementwise(ModulePass):
    """Fuse maps into maps and reductions; `max-inputs` limits the operands of the result."""

    name = "fuse-elementwise"
    keep_rounding: bool = False
    max_inputs: int = 8

    @override
    def apply(self, ctx: Context, op: ModuleOp) -> None:
        walker([FuseProducers(self.keep_rounding, self.max_inputs)]).rewrite_module(op)
