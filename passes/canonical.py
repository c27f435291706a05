"""The patterns of `simplify`: one normal form for shapes, transposes, maps and constants."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from typing_extensions import override
from xdsl.dialects.builtin import ModuleOp, TensorType
from xdsl.interpreter import Interpreter
from xdsl.ir import Attribute, Operation, SSAValue
from xdsl.pattern_rewriter import PatternRewriter, RewritePattern, op_type_rewrite_pattern

from ir import expr as ex
from ir.axes import Rule
from ir.dialects import tc
from ir.interpreter import TcFunctions
from ir.types import dims_of, elem_of, labelled_dims, shape_of, tensor, tensor_type
from passes.provenance import replace

RuleOp = tc.ContractOp | tc.MapOp | tc.ReduceOp | tc.GatherOp
"""Operations whose rule names every dimension freely, so that transposes disappear in it."""


def with_rule(op: RuleOp, operands: Sequence[SSAValue], rule: Rule, type: TensorType[Attribute]) -> RuleOp:
    """The same computation with other operands, axes and result type."""
    match op:
        case tc.ContractOp():
            return tc.ContractOp(operands[0], operands[1], str(rule), type)
        case tc.MapOp():
            return tc.MapOp(operands, op.expr.data, str(rule), type)
        case tc.ReduceOp():
            return tc.ReduceOp(operands, op.kind.data, op.expr.data, str(rule), type)
        case tc.GatherOp():
            return tc.GatherOp(operands[0], operands[1], str(rule), type)


class DropIdentity(RewritePattern):
    """A reshape, transpose, slice, concat or map that changes nothing is its operand."""

    @override
    def match_and_rewrite(self, op: Operation, rewriter: PatternRewriter) -> None:
        if not isinstance(op, (tc.ReshapeOp, tc.TransposeOp, tc.SliceOp, tc.ConcatOp, tc.MapOp)):
            return
        if len(op.operands) != 1 or op.operands[0].type != op.result.type:
            return
        if isinstance(op, tc.TransposeOp) and op.permutation != sorted(op.permutation):
            return
        if isinstance(op, tc.MapOp) and (op.expression() != ex.Input(0) or op.rule().inputs[0] != op.rule().output):
            return
        rewriter.replace(op, [], [op.operands[0]])


class ComposeReshapes(RewritePattern):
    """A reshape of a reshape is one reshape."""

    @op_type_rewrite_pattern
    @override
    def match_and_rewrite(self, op: tc.ReshapeOp, rewriter: PatternRewriter) -> None:
        if isinstance(inner := op.x.owner, tc.ReshapeOp):
            replace(rewriter, op, tc.ReshapeOp(inner.x, op.result_type), also=[inner])


class ComposeTransposes(RewritePattern):
    """A transpose of a transpose is one transpose."""

    @op_type_rewrite_pattern
    @override
    def match_and_rewrite(self, op: tc.TransposeOp, rewriter: PatternRewriter) -> None:
        if isinstance(inner := op.x.owner, tc.TransposeOp):
            perm = [inner.permutation[p] for p in op.permutation]
            replace(rewriter, op, tc.TransposeOp(inner.x, perm, op.result_type), also=[inner])


class ComposeSlices(RewritePattern):
    """A slice of a slice of the same axis is one slice; a slice that is one part of a concat is that part."""

    @op_type_rewrite_pattern
    @override
    def match_and_rewrite(self, op: tc.SliceOp, rewriter: PatternRewriter) -> None:
        axis, start, size = op.bounds()
        inner = op.x.owner
        if isinstance(inner, tc.SliceOp) and inner.bounds()[0] == axis:
            new = tc.SliceOp(inner.x, axis, inner.bounds()[1] + start, size, op.result_type)
            replace(rewriter, op, new, also=[inner])
        elif isinstance(inner, tc.ConcatOp) and inner.axis.value.data == axis:
            begin = 0
            for part in inner.inputs:
                length = shape_of(part)[axis]
                if (begin, length) == (start, size) and part.type == op.result.type:
                    rewriter.replace(op, [], [part])
                    return
                begin += length


class TransposeIntoRule(RewritePattern):
    """An operand that is a transpose becomes its operand with permuted axes: `b h s` of x^T is `b s h` of x."""

    @override
    def match_and_rewrite(self, op: Operation, rewriter: PatternRewriter) -> None:
        if not isinstance(op, RuleOp):
            return
        rule, operands = op.rule(), list(op.operands)
        inputs = list(rule.inputs)
        absorbed: list[Operation] = []
        for index, value in enumerate(operands):
            if isinstance(inner := value.owner, tc.TransposeOp):
                perm = inner.permutation
                inputs[index] = tuple(inputs[index][perm.index(i)] for i in range(len(perm)))
                operands[index] = inner.x
                absorbed.append(inner)
        if absorbed:
            new = Rule(tuple(inputs), rule.output, rule.unsharded)
            replace(rewriter, op, with_rule(op, operands, new, op.result_type), also=absorbed)


class TransposeOutOfRule(RewritePattern):
    """The transpose of a value that nobody else reads is computed in that order at once."""

    @op_type_rewrite_pattern
    @override
    def match_and_rewrite(self, op: tc.TransposeOp, rewriter: PatternRewriter) -> None:
        inner = op.x.owner
        if not isinstance(inner, RuleOp) or not op.x.has_one_use():
            return
        rule = inner.rule()
        output = tuple(rule.output[p] for p in op.permutation)
        new = with_rule(inner, inner.operands, Rule(rule.inputs, output, rule.unsharded), op.result_type)
        replace(rewriter, op, new, also=[inner])


class SimplifyMap(RewritePattern):
    """Fold the expression, turn splat constants into numbers, merge equal operands and drop unused ones."""

    @override
    def match_and_rewrite(self, op: Operation, rewriter: PatternRewriter) -> None:
        if not isinstance(op, (tc.MapOp, tc.ReduceOp)):
            return
        integer = isinstance(op, tc.MapOp) and op.integer
        literals = {i: c for i, v in enumerate(op.inputs) if (c := splat(v, integer)) is not None}
        if len(literals) == len(op.inputs) and isinstance(op, tc.ReduceOp):
            return
        expr = ex.simplify(ex.substitute(op.expression(), literals), integer)
        values, axes, expr = merge_operands(expr, list(op.inputs), list(op.rule().inputs))
        kept = {a for names in axes for a in names}
        if isinstance(op, tc.ReduceOp) and not kept.issuperset(op.rule().axes):
            return
        if isinstance(op, tc.MapOp) and integer != _integer(values, op.result):
            return
        rule = Rule(tuple(axes), op.rule().output, op.rule().unsharded & kept)
        if str(expr) == op.expr.data and values == list(op.inputs) and tuple(axes) == op.rule().inputs:
            return
        match op:
            case tc.MapOp():
                new: Operation = tc.MapOp(values, str(expr), str(rule), op.result_type)
            case tc.ReduceOp():
                new = tc.ReduceOp(values, op.kind.data, str(expr), str(rule), op.result_type)
        replace(rewriter, op, new)


def _integer(values: Sequence[SSAValue], result: SSAValue) -> bool:
    return all(elem_of(v) in ("i32", "i1") for v in (*values, result))


def splat(value: SSAValue, integer: bool) -> ex.Const | None:
    """The number that every element of a constant has."""
    if not isinstance(value.owner, tc.ConstantOp):
        return None
    array = value.owner.array()
    if array.size == 0 or (array != array.flat[0]).any():
        return None
    number = float(array.flat[0])
    # i32 numbers beyond 2**24 have no f32 literal; they stay operands unless the map is an integer one.
    return ex.Const(number) if integer or float(np.float32(number)) == number else None


def merge_operands(
    expr: ex.Expr, values: list[SSAValue], axes: list[tuple[str, ...]]
) -> tuple[list[SSAValue], list[tuple[str, ...]], ex.Expr]:
    """Operands without repetition, in the order the expression first uses them; unused ones are dropped."""
    order: dict[int, int] = {}
    kept: list[tuple[SSAValue, tuple[str, ...]]] = []
    for index in ex.inputs(expr):
        operand = (values[index], axes[index])
        if operand not in kept:
            kept.append(operand)
        order[index] = kept.index(operand)
    return [v for v, _ in kept], [a for _, a in kept], ex.renumber(expr, order)


class MapToTranspose(RewritePattern):
    """A map that only permutes is a transpose, which later folds into a neighbour's rule."""

    @op_type_rewrite_pattern
    @override
    def match_and_rewrite(self, op: tc.MapOp, rewriter: PatternRewriter) -> None:
        if len(op.inputs) != 1 or op.expression() != ex.Input(0) or elem_of(op.inputs[0]) != elem_of(op.result):
            return
        source, output = op.rule().inputs[0], op.rule().output
        if source == output or sorted(source) != sorted(output):
            return
        perm = [source.index(a) for a in output]
        replace(rewriter, op, tc.TransposeOp(op.inputs[0], perm, op.result_type))


class ContractToMap(RewritePattern):
    """A contraction over axes of size 1, such as positions times frequencies, is a product of elements.

    The matrix engine takes bf16 operands, so an f32 outer product must not stay a contraction.
    """

    @op_type_rewrite_pattern
    @override
    def match_and_rewrite(self, op: tc.ContractOp, rewriter: PatternRewriter) -> None:
        rule = op.rule()
        sizes = rule.sizes([dims_of(v) for v in op.operands])
        if any(sizes[a] != 1 for a in rule.reduced):
            return
        new: list[Operation] = []
        operands: list[SSAValue] = []
        inputs: list[tuple[str, ...]] = []
        for value, axes in zip(op.operands, rule.inputs, strict=True):
            kept = [i for i, a in enumerate(axes) if a not in rule.reduced]
            if len(kept) < len(axes):
                labels = labelled_dims(value)
                new.append(tc.ReshapeOp(value, tensor_type(tensor(value).element_type, [labels[i] for i in kept])))
                value = new[-1].results[0]
            operands.append(value)
            inputs.append(tuple(axes[i] for i in kept))
        out = Rule(tuple(inputs), rule.output, rule.unsharded & set(rule.output))
        same = operands[0] is operands[1] and inputs[0] == inputs[1]
        if same:
            out = Rule(out.inputs[:1], out.output, out.unsharded)
        new.append(
            tc.MapOp(operands[: 1 if same else 2], "square(a)" if same else "mul(a, b)", str(out), op.result_type)
        )
        replace(rewriter, op, new)


class GatherOnlyRow(RewritePattern):
    """Rows selected from an axis of size 1 are that row, as in a decode bucket, where every token is the last one."""

    @op_type_rewrite_pattern
    @override
    def match_and_rewrite(self, op: tc.GatherOp, rewriter: PatternRewriter) -> None:
        rule = op.rule()
        row = op.indexed_axis()
        rest = tuple(a for a in rule.inputs[0] if a != row)
        if dims_of(op.table)[rule.inputs[0].index(row)] == 1 and rest == rule.output:
            replace(rewriter, op, tc.ReshapeOp(op.table, op.result_type))


class FoldConstants(RewritePattern):
    """An operation on constants is a constant, if it stays small."""

    @override
    def match_and_rewrite(self, op: Operation, rewriter: PatternRewriter) -> None:
        if not isinstance(op, tc.TcOp) or isinstance(op, (tc.ConstantOp, tc.WeightOp)) or not op.operands:
            return
        if not all(isinstance(v.owner, tc.ConstantOp) for v in op.operands):
            return
        shape = shape_of(op.results[0])
        if -1 in shape or int(np.prod(shape)) > tc.MAX_CONSTANT:
            return
        arrays = [v.owner.array() for v in op.operands if isinstance(v.owner, tc.ConstantOp)]
        interpreter = Interpreter(ModuleOp([]))
        interpreter.register_implementations(TcFunctions(lambda name: np.empty(0), None))
        replace(rewriter, op, tc.ConstantOp(interpreter.run_op(op, tuple(arrays))[0], op.result_type))


PATTERNS: tuple[type[RewritePattern], ...] = (
    DropIdentity,
    FoldConstants,
    ComposeReshapes,
    ComposeTransposes,
    ComposeSlices,
    ContractToMap,
    GatherOnlyRow,
    TransposeIntoRule,
    TransposeOutOfRule,
    MapToTranspose,
    SimplifyMap,
)
"""All patterns, the ones that remove operations first."""
