"""The `tc` operations that compute: contraction, element-wise map, reduction, gather, attention, cache update."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from typing_extensions import override
from xdsl.dialects.builtin import (
    BoolAttr,
    FloatAttr,
    IntegerAttr,
    StringAttr,
    TensorType,
    i64,
)
from xdsl.ir import Operation, SSAValue
from xdsl.irdl import (
    AttrSizedOperandSegments,
    irdl_op_definition,
    operand_def,
    opt_operand_def,
    opt_prop_def,
    prop_def,
    result_def,
    traits_def,
    var_operand_def,
)
from xdsl.traits import Pure
from xdsl.utils.exceptions import VerifyException

from ir import expr as ex
from ir.axes import Rule
from ir.dialects.tc_base import TcOp, TensorResult, element_rule, verify_expression
from ir.errors import RuleError
from ir.types import dims_of, elem_of, is_float, shape_of

REDUCE_KINDS = ("add", "max", "min")
QUANTIZED = ("i8", "f8e4m3")
"""Element types that only contractions multiply, each with its own kind."""


@irdl_op_definition
class ContractOp(TcOp):
    """Sum of products over the axes that the output does not name: every matrix product, with its axes kept.

    Operands in their element types, sums in f32, one rounding to the result type. Quantized operands are both i8 or
    both f8e4m3; sums of integers are exact and given in f32.

    ```mlir
    %y = tc.contract "b s i, o i -> b s o" (%x, %w) : tensor<?x?x576xbf16, #tc.axes<"B,S,_">>
    ```
    """

    name = "tc.contract"
    lhs = operand_def(TensorType)
    rhs = operand_def(TensorType)
    rule_text = prop_def(StringAttr, prop_name="rule")
    result = result_def(TensorType)
    traits = traits_def(Pure())
    SYNTAX: ClassVar[str] = "rule:str operands"

    def __init__(self, lhs: SSAValue | Operation, rhs: SSAValue | Operation, rule: str, type: TensorResult) -> None:
        super().__init__(operands=[lhs, rhs], properties={"rule": StringAttr(rule)}, result_types=[type])

    @override
    def rule(self) -> Rule:
        return Rule.parse(self.rule_text.data)

    @override
    def verify_op(self, rule: Rule) -> None:
        if any(d.startswith("(") for side in (*rule.inputs, rule.output) for d in side):
            raise VerifyException("a contraction has one axis per dimension")
        known = {a for side in rule.inputs for a in side}
        if extra := [a for a in rule.output if a not in known]:
            raise VerifyException(f"output axis '{extra[0]}' is in no operand")
        quantized = {elem_of(v) for v in (self.lhs, self.rhs)} & set(QUANTIZED)
        if quantized:
            if elem_of(self.lhs) != elem_of(self.rhs) or elem_of(self.result) != "f32":
                kinds = ", ".join(elem_of(v) for v in (self.lhs, self.rhs, self.result))
                raise VerifyException(
                    f"a contraction of quantized operands has two of one type and gives f32, not {kinds}"
                )
            return
        for value in (self.lhs, self.rhs, self.result):
            if not is_float(value):
                raise VerifyException(f"a contraction of {elem_of(value)}; cast it with a map first")


@irdl_op_definition
class MapOp(TcOp):
    """An element-wise expression over broadcast operands: one mechanism for arithmetic, casts, broadcasts and fusion.

    An axis missing from an operand is broadcast. Computed in f32 (i32 if operands and result are all integers),
    rounded once to the result type.

    ```mlir
    %y = tc.map "mul(a, b)" over "b s h, h -> b s h" (%x, %g) : tensor<?x?x576xbf16, #tc.axes<"B,S,_">>
    ```
    """

    name = "tc.map"
    inputs = var_operand_def(TensorType)
    expr = prop_def(StringAttr)
    rule_text = prop_def(StringAttr, prop_name="rule")
    result = result_def(TensorType)
    traits = traits_def(Pure())
    SYNTAX: ClassVar[str] = "expr:str over rule:str operands"

    def __init__(self, inputs: Sequence[SSAValue | Operation], expr: str, rule: str, type: TensorResult) -> None:
        properties = {"expr": StringAttr(expr), "rule": StringAttr(rule)}
        super().__init__(operands=[inputs], properties=properties, result_types=[type])

    @override
    def rule(self) -> Rule:
        return element_rule(self.rule_text.data, len(self.inputs))

    def expression(self) -> ex.Expr:
        """The parsed expression."""
        return ex.parse(self.expr.data)

    @property
    def integer(self) -> bool:
        """Whether the expression is computed in i32."""
        return not any(is_float(v) for v in (*self.inputs, self.result))

    @override
    def verify_op(self, rule: Rule) -> None:
        if any(d.startswith("(") for side in (*rule.inputs, rule.output) for d in side):
            raise VerifyException("a map has one axis per dimension; use tc.reshape to split or merge")
        if rule.reduced:
            raise VerifyException(f"axis '{rule.reduced[0]}' is not in the output; use tc.reduce")
        verify_expression(self.expression(), len(self.inputs), self.integer)


@irdl_op_definition
class ReduceOp(TcOp):
    """Sum, maximum or minimum of an expression over the axes that the output does not name, in f32.

    The expression makes a norm one reduction and one map.

    ```mlir
    %v = tc.reduce add "square(a)" over "b s h -> b s" (%x) : tensor<?x?xf32, #tc.axes<"B,S">>
    ```
    """

    name = "tc.reduce"
    inputs = var_operand_def(TensorType)
    kind = prop_def(StringAttr)
    expr = prop_def(StringAttr)
    rule_text = prop_def(StringAttr, prop_name="rule")
    result = result_def(TensorType)
    traits = traits_def(Pure())
    SYNTAX: ClassVar[str] = "kind:word expr:str over rule:str operands"

    def __init__(
        self, inputs: Sequence[SSAValue | Operation], kind: str, expr: str, rule: str, type: TensorResult
    ) -> None:
        properties = {"kind": StringAttr(kind), "expr": StringAttr(expr), "rule": StringAttr(rule)}
        super().__init__(operands=[inputs], properties=properties, result_types=[type])

    @override
    def rule(self) -> Rule:
        return element_rule(self.rule_text.data, len(self.inputs))

    def expression(self) -> ex.Expr:
        """The parsed expression."""
        return ex.parse(self.expr.data)

    @override
    def verify_op(self, rule: Rule) -> None:
        if self.kind.data not in REDUCE_KINDS:
            raise VerifyException(f"reduction '{self.kind.data}' is none of {', '.join(REDUCE_KINDS)}")
        if any(d.startswith("(") for side in (*rule.inputs, rule.output) for d in side):
            raise VerifyException("a reduction has one axis per dimension")
        known = {a for side in rule.inputs for a in side}
        if extra := [a for a in rule.output if a not in known]:
            raise VerifyException(f"output axis '{extra[0]}' is in no operand")
        if not rule.reduced:
            raise VerifyException("no axis is reduced; use tc.map")
        if not is_float(self.result):
            raise VerifyException("a reduction gives floating-point numbers")
        verify_expression(self.expression(), len(self.inputs), False)


@irdl_op_definition
class GatherOp(TcOp):
    """Rows of a table by index: embeddings, and the last token's row. Axes of both operands are batch axes.

    The axis of the table that the output does not name is the indexed one.

    ```mlir
    %x = tc.gather "v h, b s -> b s h" (%table, %ids) : tensor<?x?x576xbf16, #tc.axes<"B,S,_">>
    ```
    """

    name = "tc.gather"
    table = operand_def(TensorType)
    indices = operand_def(TensorType)
    rule_text = prop_def(StringAttr, prop_name="rule")
    result = result_def(TensorType)
    traits = traits_def(Pure())
    SYNTAX: ClassVar[str] = "rule:str operands"

    def __init__(
        self, table: SSAValue | Operation, indices: SSAValue | Operation, rule: str, type: TensorResult
    ) -> None:
        super().__init__(operands=[table, indices], properties={"rule": StringAttr(rule)}, result_types=[type])

    @override
    def rule(self) -> Rule:
        return Rule.parse(self.rule_text.data)

    def indexed_axis(self) -> str:
        """The axis of the table that indices select from."""
        return next(a for a in self.rule().inputs[0] if a not in self.rule().output)

    @override
    def verify_op(self, rule: Rule) -> None:
        if len([a for a in rule.inputs[0] if a not in rule.output]) != 1:
            raise VerifyException("exactly one axis of the table must be absent from the output")
        if missing := [a for a in rule.inputs[1] if a not in rule.output]:
            raise VerifyException(f"index axis '{missing[0]}' must be in the output")
        self.integer_index(self.indices, "indices")
        self.same_element(self.table)


@irdl_op_definition
class AttentionOp(TcOp):
    """Scaled dot-product attention over a cache: one operation, so that a backend can run it in blocks.

    q `b h s d`, k `b k t d`, v `b k t e`, positions `b s` -> `b s h e`; query head h reads kv head h // (h_count /
    k_count). Scores are q.k * scale; softcap c > 0 makes them tanh(x / c) * c; the bias `b h s t` (sizes 1 broadcast)
    is added. Key t is visible if not causal or t <= position; if window > 0, position - t < window (its absolute value
    if not causal); and t < lengths[b]. Sinks `h` add exp(sink) to the denominator. A row without visible key is 0.
    `keys` promises that all positions are below it, so that later keys need not be read.

    ```mlir
    %o = tc.attention (%q, %k, %v, %pos) lengths(%n) scale 0.125 causal false window 0 softcap 0.0
         : tensor<?x?x9x64xbf16, #tc.axes<"B,S,_,_">>
    ```
    """

    name = "tc.attention"
    q = operand_def(TensorType)
    k = operand_def(TensorType)
    v = operand_def(TensorType)
    positions = operand_def(TensorType)
    lengths = opt_operand_def(TensorType)
    bias = opt_operand_def(TensorType)
    sinks = opt_operand_def(TensorType)
    scale = prop_def(FloatAttr)
    causal = prop_def(BoolAttr)
    window = prop_def(IntegerAttr)
    softcap = prop_def(FloatAttr)
    keys = opt_prop_def(IntegerAttr)
    result = result_def(TensorType)
    irdl_options = (AttrSizedOperandSegments(as_property=True),)
    traits = traits_def(Pure())
    SYNTAX: ClassVar[str] = "operands scale:number causal:bool window:int softcap:number keys:count"

    def __init__(
        self,
        q: SSAValue | Operation,
        k: SSAValue | Operation,
        v: SSAValue | Operation,
        positions: SSAValue | Operation,
        *,
        lengths: SSAValue | Operation | None = None,
        bias: SSAValue | Operation | None = None,
        sinks: SSAValue | Operation | None = None,
        scale: float,
        causal: bool,
        window: int,
        softcap: float,
        type: TensorResult,
    ) -> None:
        super().__init__(
            operands=[q, k, v, positions, lengths, bias, sinks],
            properties={
                # f64, so that the text keeps every digit of a Python number such as 1/sqrt(96).
                "scale": FloatAttr(float(scale), 64),
                "causal": BoolAttr.from_bool(causal),
                "window": IntegerAttr(window, i64),
                "softcap": FloatAttr(float(softcap), 64),
            },
            result_types=[type],
        )

    @property
    def group(self) -> int:
        """Query heads per key-value head."""
        return shape_of(self.q)[1] // shape_of(self.k)[1]

    @property
    def key_count(self) -> int:
        """Keys that may be visible to a row; -1 if their number is symbolic."""
        return shape_of(self.k)[2] if self.keys is None else self.keys.value.data

    @override
    def rule(self) -> Rule:
        ranks = [len(shape_of(v)) for v in (self.q, self.k, self.v)]
        if ranks != [4, 4, 4] or shape_of(self.k)[1] < 1:
            raise RuleError(f"attention needs q, k, v of rank 4, not {ranks}")
        heads, kv = shape_of(self.q)[1], shape_of(self.k)[1]
        if heads % kv:
            raise RuleError(f"{heads} query heads are no multiple of {kv} key-value heads")
        # Without grouping the second factor has size 1 and is left out.
        h = "(k g)" if heads != kv else "k"
        operands = [f"b {h} s [d]", "b k [t] [d]", "b k [t] e", "b s"]
        if self.lengths is not None:
            operands.append("b")
        if self.bias is not None:
            operands.append(self._bias_axes(h))
        if self.sinks is not None:
            operands.append(h)
        return Rule.parse(f"{', '.join(operands)} -> b s {h} e")

    def _bias_axes(self, heads: str) -> str:
        assert self.bias is not None
        names = ["b", heads, "s", "[t]"]
        dims = dims_of(self.bias)
        if len(dims) != 4:
            raise RuleError(f"the attention bias needs rank 4, not {len(dims)}")
        full = [dims_of(self.q)[0], dims_of(self.q)[1], dims_of(self.q)[2], dims_of(self.k)[2]]
        return " ".join("()" if d == 1 and f != 1 else n for d, f, n in zip(dims, full, names, strict=True))

    @override
    def verify_op(self, rule: Rule) -> None:
        self.integer_index(self.positions, "positions")
        if self.lengths is not None:
            self.integer_index(self.lengths, "lengths")
        if not is_float(self.result):
            raise VerifyException("attention gives floating-point numbers")
        if self.window.value.data < 0 or self.softcap.value.data < 0:
            raise VerifyException("window and softcap must not be negative (0 turns them off)")
        if self.keys is not None and not (self.causal.value.data and 0 < self.key_count <= shape_of(self.k)[2]):
            why = "not causal" if not self.causal.value.data else f"{shape_of(self.k)[2]} keys"
            raise VerifyException(f"keys {self.key_count} of an attention that is {why}")


@irdl_op_definition
class KvUpdateOp(TcOp):
    """A cache with new rows at given slots. Functional here; the backend writes in place where nothing else reads.

    out[b, k, slots[b, s], :] = new[b, k, s, :]

    ```mlir
    %c = tc.kv_update (%cache, %new, %slots) : tensor<?x3x?x64xbf16, #tc.axes<"B,_,KV,_">>
    ```
    """

    name = "tc.kv_update"
    cache = operand_def(TensorType)
    new = operand_def(TensorType)
    slots = operand_def(TensorType)
    result = result_def(TensorType)
    traits = traits_def(Pure())
    SYNTAX: ClassVar[str] = "operands"

    def __init__(
        self, cache: SSAValue | Operation, new: SSAValue | Operation, slots: SSAValue | Operation, type: TensorResult
    ) -> None:
        super().__init__(operands=[cache, new, slots], result_types=[type])

    @override
    def rule(self) -> Rule:
        return Rule.parse("b k [t] d, b k [s] d, b [s] -> b k [t] d")

    @override
    def verify_op(self, rule: Rule) -> None:
        self.integer_index(self.slots, "slots")
        self.same_element(self.cache, self.new)
