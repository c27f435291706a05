"""The `tc` operations that name or move values: weights, constants, reshape, transpose, slice, concat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, cast

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override
from xdsl.dialects.builtin import (
    AnyFloat,
    DenseArrayBase,
    DenseIntOrFPElementsAttr,
    IntegerAttr,
    IntegerType,
    StringAttr,
    TensorType,
    i64,
)
from xdsl.ir import Operation, SSAValue
from xdsl.irdl import (
    irdl_op_definition,
    operand_def,
    opt_prop_def,
    prop_def,
    result_def,
    traits_def,
    var_operand_def,
)
from xdsl.traits import Pure
from xdsl.utils.exceptions import VerifyException

from ir.axes import Dim, Rule, reshape_rule
from ir.dialects.tc_base import TcOp, TensorResult, own_axes
from ir.dialects.tc_mesh import PLAN, mesh_of
from ir.dialects.tc_syntax import literal, numbers
from ir.errors import RuleError
from ir.placement import PlacementError, Shard
from ir.types import NUMPY_DTYPES, dims_of, elem_of, is_float, shape_of

MAX_CONSTANT = 4096
"""Largest number of elements of a literal; bigger data are weights."""


@irdl_op_definition
class WeightOp(TcOp):
    """A parameter or buffer by name. Its bytes live outside the IR, so that text and memory do not grow with the model.

    `shard` says which part of it a unit holds (`ir.placement.Shard`); without it every unit holds all of it. In a
    partitioned module the type is that of the part.

    ```mlir
    %w = tc.weight "model.layers.0.mlp.up_proj.weight" shard "1536@tp, 576" : tensor<1536x576xbf16>
    ```
    """

    name = "tc.weight"
    fqn = prop_def(StringAttr)
    shard = opt_prop_def(StringAttr)
    result = result_def(TensorType)
    traits = traits_def(Pure())
    SYNTAX: ClassVar[str] = "fqn:str shard:option"

    def __init__(self, name: str, type: TensorResult, shard: str = "") -> None:
        properties = {"fqn": StringAttr(name)} | ({"shard": StringAttr(shard)} if shard else {})
        super().__init__(properties=properties, result_types=[type])

    def placement(self) -> Shard | None:
        """The parsed `shard`, None for a whole weight. Raises PlacementError."""
        return Shard.parse(self.shard.data) if self.shard is not None else None

    @override
    def rule(self) -> Rule:
        return Rule((), tuple(own_axes(len(shape_of(self.result)))))

    @override
    def verify_op(self, rule: Rule) -> None:
        if not self.fqn.data:
            raise VerifyException("a weight needs a name")
        if -1 in shape_of(self.result):
            raise VerifyException("a weight has static sizes")
        try:
            self._verify_shard()
        except PlacementError as error:
            raise VerifyException(str(error)) from None

    def _verify_shard(self) -> None:
        """Whether the type is that of the part (in a partitioned module) or of the whole (in a planned one)."""
        placement = self.placement()
        if placement is None:
            return
        mesh = mesh_of(self)
        plan = mesh or mesh_of(self, PLAN)
        if plan is not None:
            placement.check(plan)
        want = placement.shape if mesh is None else placement.local_shape(mesh)
        if shape_of(self.result) != want:
            raise VerifyException(f"placement '{placement}' gives shape {want}, not {shape_of(self.result)}")


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

    def __init__(self, value: NDArray[Any], type: TensorResult) -> None:
        if elem_of(type) in ("i32", "i1"):
            integers = [int(v) for v in value.ravel().tolist()]
            held = DenseIntOrFPElementsAttr.from_list(cast("TensorType[IntegerType]", type), integers)
        else:
            floats = [float(v) for v in value.astype(np.float64).ravel().tolist()]
            held = DenseIntOrFPElementsAttr.from_list(cast("TensorType[AnyFloat]", type), floats)
        super().__init__(properties={"value": held}, result_types=[type])

    @override
    def rule(self) -> Rule:
        return Rule((), tuple(own_axes(len(shape_of(self.result)))))

    def array(self) -> NDArray[Any]:
        """The literal as a numpy array."""
        values = literal(self.value).get_values()
        flat = np.array(values, dtype=np.float64 if is_float(self.result) else np.int64)
        flat = flat.astype(NUMPY_DTYPES[elem_of(self.result)])
        shape = shape_of(self.result)
        return np.full(shape, flat[0]) if flat.size == 1 else flat.reshape(shape)

    @override
    def verify_op(self, rule: Rule) -> None:
        shape = shape_of(self.result)
        if -1 in shape:
            raise VerifyException("a constant has static sizes")
        if (size := int(np.prod(shape))) > MAX_CONSTANT:
            raise VerifyException(f"a constant of {size} elements; more than {MAX_CONSTANT} belong into a weight")
        if literal(self.value).type != self.result_type:
            raise VerifyException(f"the literal has type {literal(self.value).type}, the result {self.result_type}")


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

    @override
    def rule(self) -> Rule:
        return reshape_rule(dims_of(self.x), dims_of(self.result))

    @override
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
        return numbers(self.perm)

    @override
    def rule(self) -> Rule:
        perm, rank = self.permutation, len(shape_of(self.x))
        if sorted(perm) != list(range(rank)):
            raise RuleError(f"{perm} is no permutation of {rank} dimensions")
        axes = own_axes(rank)
        return Rule((tuple(axes),), tuple(axes[p] for p in perm))

    @override
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

    @override
    def rule(self) -> Rule:
        axis, rank = self.axis.value.data, len(shape_of(self.x))
        if not 0 <= axis < rank:
            raise RuleError(f"axis {axis} of a tensor with {rank} dimensions")
        source, result = own_axes(rank), own_axes(rank)
        result[axis] = own_axes(1, rank)[0]
        return Rule((tuple(source),), tuple(result), frozenset({source[axis], result[axis]}))

    @override
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

    @override
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

    @override
    def verify_op(self, rule: Rule) -> None:
        axis = self.axis.value.data
        parts: list[Dim] = [dims_of(x)[axis] for x in self.inputs]
        if any(isinstance(p, str) for p in parts):
            raise VerifyException(f"axis {axis} is symbolic; only static axes are concatenated")
        if (total := sum(int(p) for p in parts)) != shape_of(self.result)[axis]:
            raise VerifyException(f"the result has {shape_of(self.result)[axis]} elements on axis {axis}, not {total}")
        self.same_element(*self.inputs)
