"""The `tc` operations between units: what partitioning inserts. One program for all units (SPMD), tensors are local.

`axis` is an axis of the module's mesh (attribute `tc.mesh`, such as `kv=4,r=2`) or `tp`, all of them. A collective runs
among the units that differ only on that axis. `why` names the place and the operand that asked for it.
"""

from __future__ import annotations

from typing import ClassVar

from typing_extensions import override
from xdsl.dialects.builtin import IntegerAttr, StringAttr, TensorType, i64
from xdsl.ir import Operation, SSAValue
from xdsl.irdl import irdl_op_definition, operand_def, prop_def, result_def, traits_def
from xdsl.traits import Pure
from xdsl.utils.exceptions import VerifyException

from ir.axes import Rule
from ir.dialects.tc_base import TcOp, TensorResult, own_axes
from ir.dialects.tc_mesh import mesh_of
from ir.errors import RuleError
from ir.placement import PlacementError
from ir.types import dims_of, elem_of, is_float, shape_of

COLLECTIVE_KINDS = ("add", "max")


class CollectiveOp(TcOp):
    """What all operations between units share: the axis, and the reason they exist."""

    axis = prop_def(StringAttr)
    traits = traits_def(Pure())

    def parts(self) -> int | None:
        """The number of units that take part; None if the module has no mesh. Raises VerifyException."""
        try:
            mesh = mesh_of(self)
            return None if mesh is None else mesh[self.axis.data]
        except PlacementError as error:
            raise VerifyException(str(error)) from None


class ExchangeOp(CollectiveOp):
    """A collective with an operand."""

    x = operand_def(TensorType)
    why = prop_def(StringAttr)
    result = result_def(TensorType)

    def verify_kind(self, kind: StringAttr) -> None:
        """Check the reduction of a collective."""
        if kind.data not in COLLECTIVE_KINDS:
            raise VerifyException(f"collective reduction '{kind.data}' is none of {', '.join(COLLECTIVE_KINDS)}")
        if not is_float(self.x):
            raise VerifyException(f"a reduction between units of {elem_of(self.x)}")

    def dim_rule(self, dim: int) -> Rule:
        """All dimensions stay but `dim`, which gets another size."""
        rank = len(shape_of(self.x))
        if not 0 <= dim < rank:
            raise RuleError(f"dimension {dim} of a tensor with {rank} dimensions")
        source, result = own_axes(rank), own_axes(rank)
        result[dim] = own_axes(1, rank)[0]
        return Rule((tuple(source),), tuple(result), frozenset({source[dim], result[dim]}))

    def verify_sizes(self, dim: int, grows: bool, padded: bool = False) -> None:
        """Check that dimension `dim` is `parts` times as large on one side; `padded` allows a shorter last part."""
        self.same_element(self.x)
        parts = self.parts()
        sizes = [dims_of(v)[dim] for v in (self.x, self.result)]
        if any(isinstance(s, str) for s in sizes):
            raise VerifyException(f"dimension {dim} is symbolic; modules are partitioned after specialise")
        small, large = (int(s) for s in (sizes if grows else reversed(sizes)))
        if parts is not None and small != (-(-large // parts) if padded else large / parts):
            raise VerifyException(f"{parts} parts of dimension {dim}: {small} and {large} elements do not fit")


@irdl_op_definition
class AllReduceOp(ExchangeOp):
    """The sum (or maximum) of what the units hold, in f32, rounded once; every unit gets all of it.

    ```mlir
    %y = tc.all_reduce %x kind add axis tp why "o_proj: partial sums" : tensor<?x?x576xbf16, #tc.axes<"B,S,_">>
    ```
    """

    name = "tc.all_reduce"
    kind = prop_def(StringAttr)
    SYNTAX: ClassVar[str] = "x kind kind:word axis axis:word why why:str"

    def __init__(self, x: SSAValue | Operation, axis: str, why: str, type: TensorResult, kind: str = "add") -> None:
        properties = {"kind": StringAttr(kind), "axis": StringAttr(axis), "why": StringAttr(why)}
        super().__init__(operands=[x], properties=properties, result_types=[type])

    @override
    def rule(self) -> Rule:
        axes = tuple(own_axes(len(shape_of(self.x))))
        return Rule((axes,), axes)

    @override
    def verify_op(self, rule: Rule) -> None:
        self.same_element(self.x)
        self.verify_kind(self.kind)
        self.parts()


@irdl_op_definition
class AllGatherOp(ExchangeOp):
    """The parts of all units along a dimension, in the order of their coordinates; every unit gets the whole.

    ```mlir
    %y = tc.all_gather %h dim 1 axis tp why "logits" : tensor<?x9x?x64xbf16, #tc.axes<"B,_,S,_">>
    ```
    """

    name = "tc.all_gather"
    dim = prop_def(IntegerAttr)
    SYNTAX: ClassVar[str] = "x dim:int axis axis:word why why:str"

    def __init__(self, x: SSAValue | Operation, dim: int, axis: str, why: str, type: TensorResult) -> None:
        properties = {"dim": IntegerAttr(dim, i64), "axis": StringAttr(axis), "why": StringAttr(why)}
        super().__init__(operands=[x], properties=properties, result_types=[type])

    @override
    def rule(self) -> Rule:
        return self.dim_rule(self.dim.value.data)

    @override
    def verify_op(self, rule: Rule) -> None:
        self.verify_sizes(self.dim.value.data, grows=True)


@irdl_op_definition
class ReduceScatterOp(ExchangeOp):
    """The sum of what the units hold; every unit gets its own part along a dimension.

    ```mlir
    %y = tc.reduce_scatter %h kind add dim 1 axis tp why "o_proj" : tensor<?x9x?x64xbf16, #tc.axes<"B,_,S,_">>
    ```
    """

    name = "tc.reduce_scatter"
    kind = prop_def(StringAttr)
    dim = prop_def(IntegerAttr)
    SYNTAX: ClassVar[str] = "x kind kind:word dim:int axis axis:word why why:str"

    def __init__(
        self, x: SSAValue | Operation, dim: int, axis: str, why: str, type: TensorResult, kind: str = "add"
    ) -> None:
        properties = {
            "kind": StringAttr(kind),
            "dim": IntegerAttr(dim, i64),
            "axis": StringAttr(axis),
            "why": StringAttr(why),
        }
        super().__init__(operands=[x], properties=properties, result_types=[type])

    @override
    def rule(self) -> Rule:
        return self.dim_rule(self.dim.value.data)

    @override
    def verify_op(self, rule: Rule) -> None:
        self.verify_kind(self.kind)
        self.verify_sizes(self.dim.value.data, grows=False)


@irdl_op_definition
class LocalSliceOp(ExchangeOp):
    """A unit's own part of a value that all units hold: no exchange. Beyond the end of the value it is zero.

    ```mlir
    %y = tc.local_slice %h dim 1 axis tp why "up_proj: rows" : tensor<?x9x?x64xbf16, #tc.axes<"B,_,S,_">>
    ```
    """

    name = "tc.local_slice"
    dim = prop_def(IntegerAttr)
    SYNTAX: ClassVar[str] = "x dim:int axis axis:word why why:str"

    def __init__(self, x: SSAValue | Operation, dim: int, axis: str, why: str, type: TensorResult) -> None:
        properties = {"dim": IntegerAttr(dim, i64), "axis": StringAttr(axis), "why": StringAttr(why)}
        super().__init__(operands=[x], properties=properties, result_types=[type])

    @override
    def rule(self) -> Rule:
        return self.dim_rule(self.dim.value.data)

    @override
    def verify_op(self, rule: Rule) -> None:
        self.verify_sizes(self.dim.value.data, grows=False, padded=True)


@irdl_op_definition
class AxisIndexOp(CollectiveOp):
    """The unit's coordinate on an axis times a number: where the unit's part begins. A scalar that differs by unit.

    ```mlir
    %first = tc.axis_index axis tp scale 16032 : tensor<i32>
    ```
    """

    name = "tc.axis_index"
    scale = prop_def(IntegerAttr)
    result = result_def(TensorType)
    SYNTAX: ClassVar[str] = "axis axis:word scale:int"

    def __init__(self, axis: str, scale: int, type: TensorResult) -> None:
        properties = {"axis": StringAttr(axis), "scale": IntegerAttr(scale, i64)}
        super().__init__(properties=properties, result_types=[type])

    @override
    def rule(self) -> Rule:
        return Rule((), ())

    @override
    def verify_op(self, rule: Rule) -> None:
        if elem_of(self.result) != "i32" or shape_of(self.result):
            raise VerifyException("an axis index is tensor<i32>")
        self.parts()
