"""The `tc` operation on weights of fewer bits than the matrix engine multiplies."""

from __future__ import annotations

from typing import ClassVar

from typing_extensions import override
from xdsl.dialects.builtin import TensorType
from xdsl.ir import Operation, SSAValue
from xdsl.irdl import irdl_op_definition, operand_def, result_def, traits_def
from xdsl.traits import Pure
from xdsl.utils.exceptions import VerifyException

from ir.axes import Rule
from ir.dialects.tc_base import TcOp, TensorResult
from ir.errors import RuleError
from ir.quantization import PER_WORD
from ir.types import elem_of, is_float, shape_of


@irdl_op_definition
class DequantizeOp(TcOp):
    """4-bit weights as numbers: w[n, k] = (nibble(packed[n], k) - 8) * scale[n, k // group], rounded at most once.

    A word of 32 bits holds 8 neighbours along k, the first in the lowest bits. The backend expands one tile at a time,
    as the engine reads it; nothing else may read the result than the weight side of contractions.

    ```mlir
    %w = tc.dequantize (%packed, %scale) : tensor<1536x576xbf16>
    ```
    """

    name = "tc.dequantize"
    packed = operand_def(TensorType)
    scale = operand_def(TensorType)
    result = result_def(TensorType)
    traits = traits_def(Pure())
    SYNTAX: ClassVar[str] = "operands"

    def __init__(self, packed: SSAValue | Operation, scale: SSAValue | Operation, type: TensorResult) -> None:
        super().__init__(operands=[packed, scale], result_types=[type])

    @property
    def group(self) -> int:
        """Neighbours along k that share a scale."""
        return shape_of(self.result)[1] // shape_of(self.scale)[1]

    @override
    def rule(self) -> Rule:
        if len(shape_of(self.packed)) != 2 or len(shape_of(self.scale)) != 2:
            raise RuleError("packed weights and their scales have two dimensions")
        words, groups = shape_of(self.packed)[1], shape_of(self.scale)[1]
        if groups < 1 or words % groups:
            raise RuleError(f"{words} words of {PER_WORD} numbers are no multiple of {groups} groups")
        return Rule.parse("n (g u), n g -> n (g u [e])")

    @override
    def verify_op(self, rule: Rule) -> None:
        if elem_of(self.packed) != "i32" or elem_of(self.scale) != "f32" or not is_float(self.result):
            raise VerifyException("packed weights are i32, their scales f32, and the result is floating-point")
        if shape_of(self.result)[1] != shape_of(self.packed)[1] * PER_WORD:
            raise VerifyException(f"a word holds {PER_WORD} numbers")
