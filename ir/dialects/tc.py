"""`tc` (tensor contraction): what a model computes, with named axes.

Few operations. Each has an axis rule (`rule()`) that serves sharding, tiling and cost alike, a reference kernel in
`ir.kernels`, and prints one type. All are pure. Operands must be defined above their use (functions have one block),
so operand types need not be printed.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from xdsl.dialects.builtin import (
    BoolAttr,
    DenseArrayBase,
    DenseIntOrFPElementsAttr,
    FloatAttr,
    IntegerAttr,
    StringAttr,
    TensorType,
    i64,
)
from xdsl.ir import Attribute, Dialect, Operation, SSAValue
from xdsl.irdl import (
    AttrSizedOperandSegments,
    irdl_op_definition,
    operand_def,
    opt_operand_def,
    prop_def,
    result_def,
    traits_def,
    var_operand_def,
)
from xdsl.traits import Pure
from xdsl.utils.exceptions import VerifyException

from ir import expr as ex
from ir.axes import Dim, Rule, reshape_rule
from ir.dialects.tc_syntax import TcSyntax
from ir.errors import RuleError
from ir.types import NUMPY_DTYPES, AxesAttr, dims_of, elem_of, is_float, shape_of, tensor, verify_tensor

MAX_CONSTANT = 4096
"""Largest number of elements of a literal; bigger data are weights."""

REDUCE_KINDS = ("add", "max", "min")

TensorResult = TensorType[Attribute]


class TcOp(TcSyntax):
    """Base of all operations: one result, an axis rule, and checks that sizes agree with it."""

    @abstractmethod
    def rule(self) -> Rule:
        """The axes of every operand and of the result."""

    @property
    def result_type(self) -> TensorResult:
        """The type of the only result."""
        return tensor(self.results[0])

    def verify_(self) -> None:
        for value in (*self.operands, *self.results):
            verify_tensor(value)
        try:
            rule = self.rule()
            rule.sizes([*(dims_of(o) for o in self.operands), dims_of(self.results[0])])
        except (RuleError, ex.ExprError) as error:
            raise VerifyException(str(error)) from None
        self.verify_op(rule)

    def verify_op(self, rule: Rule) -> None:
        """Checks beyond the rule. Raises VerifyException."""

    def same_element(self, *values: SSAValue) -> None:
        """Check that values and result have one element type."""
        kinds = {elem_of(v) for v in (*values, self.results[0])}
        if len(kinds) > 1:
            raise VerifyException(f"element types must be equal, not {', '.join(sorted(kinds))}")

    def integer_index(self, value: SSAValue, what: str) -> None:
        """Check that an operand holds i32."""
        if elem_of(value) != "i32":
            raise VerifyException(f"{what} must be i32, not {elem_of(value)}")


def own_axes(count: int, start: int = 0) -> list[str]:
    """Axis names `a, b, ...` for computed rules; never more than 26."""
    return [chr(ord("a") + start + i) for i in range(count)]


@irdl_op_definition
class WeightOp(TcOp):
    """A parameter or buffer by name. Its bytes live outside the IR, so that text and memory do not grow with the model.

    ```mlir
    %w = tc.weight "model.layers.0.mlp.up_proj.weight" : tensor<1536x576xbf16>
    ```
    """

    name = "tc.weight"
    fqn = prop_def(StringAttr)
    result = result_def(TensorType)
    traits = traits_def(Pure())
    SYNTAX: ClassVar[str] = "fqn:str"

    def __init__(self, name: str, type: TensorResult) -> None:
        super().__init__(properties={"fqn": StringAttr(name)}, result_types=[type])

    def rule(self) -> Rule:
        return Rule((), tuple(own_axes(len(shape_of(self.result)))))

    def verify_op(self, rule: Rule) -> None:
        if not self.fqn.data:
            raise VerifyException("a weight needs a name")
        if -1 in shape_of(self.result):
            raise VerifyException("a weight has static sizes")


@irdl_op_definition
class ConstantOp(TcOp):
    """A literal of at most 4,096 elements: tables and masks too small to be a weight file.

    ```mlir
    %c = tc.constant dense<[0, 1]> : tensor<2xi32>
    ```
    """

    name = "tc.constant"
    value = prop_def(DenseIntOrFPElementsAttr)
    result = result_def(TensorType)
    traits = traits_def(Pure())
    SYNTAX: ClassVar[str] = "value:typed"

    def __init__(self, value: NDArray[np.generic] | DenseIntOrFPElementsAttr, type: TensorResult) -> None:
        if not isinstance(value, DenseIntOrFPElementsAttr):
            if elem_of(type) in ("i32", "i1"):
                data = [int(v) for v in np.asarray(value).ravel().tolist()]
            else:
                data = np.asarray(value).astype(np.float64).ravel().tolist()
            value = DenseIntOrFPElementsAttr.from_list(type, data)
        super().__init__(properties={"value": value}, result_types=[type])

    def rule(self) -> Rule:
        return Rule((), tuple(own_axes(len(shape_of(self.result)))))

    def array(self) -> NDArray[np.generic]:
        """The literal as a numpy array."""
        values = self.value.get_values()
        flat = np.array(values, dtype=np.float64 if is_float(self.result) else np.int64)
        flat = flat.astype(NUMPY_DTYPES[elem_of(self.result)])
        shape = shape_of(self.result)
        return np.full(shape, flat[0]) if flat.size == 1 else flat.reshape(shape)

    def verify_op(self, rule: Rule) -> None:
        shape = shape_of(self.result)
        if -1 in shape:
            raise VerifyException("a constant has static sizes")
        if (size := int(np.prod(shape))) > MAX_CONSTANT:
            raise VerifyException(f"a constant of {size} elements; more than {MAX_CONSTANT} belong into a weight")
        if self.value.type != self.result_type:
            raise VerifyException(f"the literal has type {self.value.type}, the result {self.result_type}")


@irdl_op_definition
class ContractOp(TcOp):
    """Sum of products over the axes that the output does not name: every matrix product, with its axes kept.

    Operands in their element types, sums in f32, one rounding to the result type.

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

    def rule(self) -> Rule:
        return Rule.parse(self.rule_text.data)

    def verify_op(self, rule: Rule) -> None:
        if any(d.startswith("(") for side in (*rule.inputs, rule.output) for d in side):
            raise VerifyException("a contraction has one axis per dimension")
        known = {a for side in rule.inputs for a in side}
        if extra := [a for a in rule.output if a not in known]:
            raise VerifyException(f"output axis '{extra[0]}' is in no operand")
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

    def rule(self) -> Rule:
        return element_rule(self.rule_text.data, len(self.inputs))

    def expression(self) -> ex.Expr:
        """The parsed expression."""
        return ex.parse(self.expr.data)

    @property
    def integer(self) -> bool:
        """Whether the expression is computed in i32."""
        return not any(is_float(v) for v in (*self.inputs, self.result))

    def verify_op(self, rule: Rule) -> None:
        if any(d.startswith("(") for side in (*rule.inputs, rule.output) for d in side):
            raise VerifyException("a map has one axis per dimension; use tc.reshape to split or merge")
        if rule.reduced:
            raise VerifyException(f"axis '{rule.reduced[0]}' is not in the output; use tc.reduce")
        verify_expression(self.expression(), len(self.inputs), self.integer)


def element_rule(text: str, operands: int) -> Rule:
    """The rule of a map or reduction; ` -> b` with one operand means an operand without dimensions."""
    rule = Rule.parse(text)
    return Rule(((),), rule.output, rule.unsharded) if operands == 1 and not rule.inputs else rule


def verify_expression(expr: ex.Expr, operands: int, integer: bool) -> None:
    """Check operand letters, that all are used, and integer functions. Raises VerifyException."""
    used = set(ex.inputs(expr))
    if missing := [i for i in used if i >= operands]:
        raise VerifyException(f"expression '{expr}' uses '{ex.Input(missing[0])}' but there are {operands} operands")
    if len(used) < operands:
        unused = next(i for i in range(operands) if i not in used)
        raise VerifyException(f"expression '{expr}' does not use operand '{ex.Input(unused)}'")
    if integer and (bad := [f for f in ex.functions(expr) if f not in ex.INTEGER_FUNCTIONS]):
        raise VerifyException(f"'{bad[0]}' has no integer form; make an operand or the result floating-point")


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

    def rule(self) -> Rule:
        return element_rule(self.rule_text.data, len(self.inputs))

    def expression(self) -> ex.Expr:
        """The parsed expression."""
        return ex.parse(self.expr.data)

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

    def rule(self) -> Rule:
        return Rule.parse(self.rule_text.data)

    def indexed_axis(self) -> str:
        """The axis of the table that indices select from."""
        return next(a for a in self.rule().inputs[0] if a not in self.rule().output)

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
    result = result_def(TensorType)
    irdl_options = (AttrSizedOperandSegments(as_property=True),)
    traits = traits_def(Pure())
    SYNTAX: ClassVar[str] = "operands scale:number causal:bool window:int softcap:number"

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

    def verify_op(self, rule: Rule) -> None:
        self.integer_index(self.positions, "positions")
        if self.lengths is not None:
            self.integer_index(self.lengths, "lengths")
        if not is_float(self.result):
            raise VerifyException("attention gives floating-point numbers")
        if self.window.value.data < 0 or self.softcap.value.data < 0:
            raise VerifyException("window and softcap must not be negative (0 turns them off)")


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

    def rule(self) -> Rule:
        return Rule.parse("b k [t] d, b k [s] d, b [s] -> b k [t] d")

    def verify_op(self, rule: Rule) -> None:
        self.integer_index(self.slots, "slots")
        self.same_element(self.cache, self.new)


@irdl_op_definition
class ReshapeOp(TcOp):
    """Row-major reshape; the rule says which dimensions it splits and merges, so that shardings pass through.

    ```mlir
    %h = tc.reshape %x : tensor<?x?x9x64xbf16, #tc.axes<"B,S,_,_">>
    ```
    """

    name = "tc.reshape"
    x = operand_def(TensorType)
    result = result_def(TensorType)
    traits = traits_def(Pure())
    SYNTAX: ClassVar[str] = "x"

    def __init__(self, x: SSAValue | Operation, type: TensorResult) -> None:
        super().__init__(operands=[x], result_types=[type])

    def rule(self) -> Rule:
        return reshape_rule(dims_of(self.x), dims_of(self.result))

    def verify_op(self, rule: Rule) -> None:
        self.same_element(self.x)


@irdl_op_definition
class TransposeOp(TcOp):
    """A permutation: result dimension i is operand dimension perm[i]. Most of them end in the rule of a neighbour.

    ```mlir
    %t = tc.transpose %x [0, 2, 1, 3] : tensor<?x9x?x64xbf16, #tc.axes<"B,_,S,_">>
    ```
    """

    name = "tc.transpose"
    x = operand_def(TensorType)
    perm = prop_def(DenseArrayBase)
    result = result_def(TensorType)
    traits = traits_def(Pure())
    SYNTAX: ClassVar[str] = "x perm:ints"

    def __init__(self, x: SSAValue | Operation, perm: Sequence[int], type: TensorResult) -> None:
        super().__init__(
            operands=[x], properties={"perm": DenseArrayBase.from_list(i64, list(perm))}, result_types=[type]
        )

    @property
    def permutation(self) -> list[int]:
        """`perm` as a list."""
        return [int(p) for p in self.perm.get_values()]

    def rule(self) -> Rule:
        perm, rank = self.permutation, len(shape_of(self.x))
        if sorted(perm) != list(range(rank)):
            raise RuleError(f"{perm} is no permutation of {rank} dimensions")
        axes = own_axes(rank)
        return Rule((tuple(axes),), tuple(axes[p] for p in perm))

    def verify_op(self, rule: Rule) -> None:
        self.same_element(self.x)


@irdl_op_definition
class SliceOp(TcOp):
    """A contiguous part of one static axis: packed projections (qkv, gate and up) and rotary halves.

    ```mlir
    %q = tc.slice %x axis 2 start 0 size 64 : tensor<?x?x64xbf16, #tc.axes<"B,S,_">>
    ```
    """

    name = "tc.slice"
    x = operand_def(TensorType)
    axis = prop_def(IntegerAttr)
    start = prop_def(IntegerAttr)
    size = prop_def(IntegerAttr)
    result = result_def(TensorType)
    traits = traits_def(Pure())
    SYNTAX: ClassVar[str] = "x axis:int start:int size:int"

    def __init__(self, x: SSAValue | Operation, axis: int, start: int, size: int, type: TensorResult) -> None:
        properties = {k: IntegerAttr(v, i64) for k, v in (("axis", axis), ("start", start), ("size", size))}
        super().__init__(operands=[x], properties=properties, result_types=[type])

    def bounds(self) -> tuple[int, int, int]:
        """Axis, start and size as numbers."""
        return self.axis.value.data, self.start.value.data, self.size.value.data

    def rule(self) -> Rule:
        axis, rank = self.axis.value.data, len(shape_of(self.x))
        if not 0 <= axis < rank:
            raise RuleError(f"axis {axis} of a tensor with {rank} dimensions")
        source, result = own_axes(rank), own_axes(rank)
        result[axis] = own_axes(1, rank)[0]
        return Rule((tuple(source),), tuple(result), frozenset({source[axis], result[axis]}))

    def verify_op(self, rule: Rule) -> None:
        axis, start, size = self.bounds()
        whole = shape_of(self.x)[axis]
        if whole == -1:
            raise VerifyException(f"axis {axis} is symbolic; only static axes are sliced")
        if start < 0 or size < 1 or start + size > whole:
            raise VerifyException(f"elements {start} to {start + size} of an axis of {whole}")
        if shape_of(self.result)[axis] != size:
            raise VerifyException(f"the result has {shape_of(self.result)[axis]} elements on axis {axis}, not {size}")
        self.same_element(self.x)


@irdl_op_definition
class ConcatOp(TcOp):
    """Tensors one after the other along one static axis: rotary halves.

    ```mlir
    %r = tc.concat (%a, %b) axis 3 : tensor<?x9x?x64xbf16, #tc.axes<"B,_,S,_">>
    ```
    """

    name = "tc.concat"
    inputs = var_operand_def(TensorType)
    axis = prop_def(IntegerAttr)
    result = result_def(TensorType)
    traits = traits_def(Pure())
    SYNTAX: ClassVar[str] = "operands axis:int"

    def __init__(self, xs: Sequence[SSAValue | Operation], axis: int, type: TensorResult) -> None:
        super().__init__(operands=[xs], properties={"axis": IntegerAttr(axis, i64)}, result_types=[type])

    def rule(self) -> Rule:
        axis, rank = self.axis.value.data, len(shape_of(self.result))
        if not self.inputs or not 0 <= axis < rank:
            raise RuleError(f"axis {axis} of {len(self.inputs)} tensors with {rank} dimensions")
        sides: list[tuple[str, ...]] = []
        own = [f"{own_axes(1, axis)[0]}{i}" for i in range(len(self.inputs) + 1)]
        for name in own:
            axes = own_axes(rank)
            axes[axis] = name
            sides.append(tuple(axes))
        return Rule(tuple(sides[:-1]), sides[-1], frozenset(own))

    def verify_op(self, rule: Rule) -> None:
        axis = self.axis.value.data
        parts: list[Dim] = [dims_of(x)[axis] for x in self.inputs]
        if any(isinstance(p, str) for p in parts):
            raise VerifyException(f"axis {axis} is symbolic; only static axes are concatenated")
        if (total := sum(int(p) for p in parts)) != shape_of(self.result)[axis]:
            raise VerifyException(f"the result has {shape_of(self.result)[axis]} elements on axis {axis}, not {total}")
        self.same_element(*self.inputs)


Tc = Dialect(
    "tc",
    [
        WeightOp,
        ConstantOp,
        ContractOp,
        MapOp,
        ReduceOp,
        GatherOp,
        AttentionOp,
        KvUpdateOp,
        ReshapeOp,
        TransposeOp,
        SliceOp,
        ConcatOp,
    ],
    [AxesAttr],
)
