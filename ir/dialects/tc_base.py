"""What all `tc` operations share: one result, an axis rule, and checks that sizes agree with it."""

from __future__ import annotations

from abc import abstractmethod

from typing_extensions import override
from xdsl.dialects.builtin import TensorType
from xdsl.ir import Attribute, SSAValue
from xdsl.utils.exceptions import VerifyException

from ir import expr as ex
from ir.axes import Rule
from ir.dialects.tc_syntax import TcSyntax
from ir.errors import RuleError
from ir.types import dims_of, elem_of, tensor, verify_tensor

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

    @override
    def verify_(self) -> None:
        for value in (*self.operands, *self.results):
            verify_tensor(value)
        try:
            rule = self.rule()
            rule.sizes([*(dims_of(o) for o in self.operands), dims_of(self.results[0])])
            self.verify_op(rule)
        except (RuleError, ex.ExprError) as error:
            raise VerifyException(str(error)) from None

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
