"""The text form of `tc` operations, from one line per operation.

A `SYNTAX` string lists what an operation prints, in order, between its name and `: type`:
`operands` is `(%a, %b)` followed by optional operands as `name(%x)`; `x` is the only operand; `name:kind` is a property
(text kinds stand alone, numbers follow their name, `option` is a text and `count` an integer behind its name, or
absent); any other word is printed as it is. Operand types are not printed: values are defined above their use.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self, cast

from typing_extensions import override
from xdsl.dialects.builtin import (
    AnyDenseElement,
    BoolAttr,
    DenseArrayBase,
    DenseIntOrFPElementsAttr,
    FloatAttr,
    IntegerAttr,
    IntegerType,
    StringAttr,
    i64,
)
from xdsl.ir import Attribute, SSAValue
from xdsl.irdl import IRDLOperation, OptOperandDef, VarOperandDef
from xdsl.parser import Parser
from xdsl.printer import Printer

Literal = DenseIntOrFPElementsAttr[AnyDenseElement]
Numbers = DenseArrayBase[IntegerType]


def literal(value: Attribute) -> Literal:
    """A property that is known to be a dense literal."""
    assert isinstance(value, DenseIntOrFPElementsAttr)
    return cast(Literal, value)


def numbers(value: Attribute) -> list[int]:
    """The values of a property that is known to be an array of integers."""
    assert isinstance(value, DenseArrayBase)
    return [int(v) for v in cast(Numbers, value).get_values()]


class TcSyntax(IRDLOperation):
    """Parses and prints an operation by its `SYNTAX`."""

    SYNTAX: ClassVar[str] = ""

    @classmethod
    @override
    def parse(cls, parser: Parser) -> Self:
        operands: list[SSAValue | list[SSAValue] | None] = []
        properties: dict[str, Attribute] = {}
        result: Attribute | None = None
        for word in cls.SYNTAX.split():
            name, _, kind = word.partition(":")
            if word == "operands":
                operands = _parse_operands(cls, parser)
            elif word == "x":
                operands = [_value(parser)]
            elif not kind:
                parser.parse_keyword(name)
            elif kind == "option":
                if parser.parse_optional_keyword(name) is not None:
                    properties[name] = StringAttr(parser.parse_str_literal())
            elif kind == "count":
                if parser.parse_optional_keyword(name) is not None:
                    properties[name] = IntegerAttr(parser.parse_integer(), i64)
            else:
                properties[name] = _parse_property(parser, name, kind)
                if kind == "typed":
                    result = literal(properties[name]).type
        attributes = parser.parse_optional_attr_dict()
        if result is None:
            parser.parse_punctuation(":")
            result = parser.parse_type()
        return cls.build(operands=operands, properties=properties, attributes=attributes, result_types=[result])

    @override
    def print(self, printer: Printer) -> None:
        typed: Attribute | None = None
        for word in self.SYNTAX.split():
            name, _, kind = word.partition(":")
            if kind in ("option", "count") and name not in self.properties:
                continue
            printer.print_string(" ")
            if word == "operands":
                self._print_operands(printer)
            elif word == "x":
                printer.print_operand(self.operands[0])
            elif not kind:
                printer.print_string(name)
            elif kind == "typed":
                # The literal carries the result type; attributes follow it.
                typed = literal(self.properties[name])
                printer.print_attribute(typed)
            else:
                _print_property(printer, name, kind, self.properties[name])
        printer.print_op_attributes(self.attributes)
        if typed is None:
            printer.print_string(" : ")
            printer.print_attribute(self.results[0].type)

    def _print_operands(self, printer: Printer) -> None:
        required: list[SSAValue] = []
        optional: list[tuple[str, SSAValue]] = []
        for name, definition in self.get_irdl_definition().operands:
            value: Any = getattr(self, name)
            if isinstance(definition, OptOperandDef):
                optional += [] if value is None else [(name, value)]
            elif isinstance(definition, VarOperandDef):
                required += list(value)
            else:
                required.append(value)
        printer.print_operands(required)
        for name, value in optional:
            printer.print_string(f" {name}(")
            printer.print_operand(value)
            printer.print_string(")")


def _value(parser: Parser) -> SSAValue:
    """A value that is defined above; its type is known from there."""
    unresolved = parser.parse_unresolved_operand()
    values = parser.ssa_values.get(unresolved.operand_name)
    if values is None or unresolved.index >= len(values):
        parser.raise_error(f"%{unresolved.operand_name} is not defined above its use", unresolved.span)
    return values[unresolved.index]


def _parse_operands(cls: type[IRDLOperation], parser: Parser) -> list[SSAValue | list[SSAValue] | None]:
    given = parser.parse_comma_separated_list(parser.Delimiter.PAREN, lambda: _value(parser))
    result: list[SSAValue | list[SSAValue] | None] = []
    position = 0
    definitions = cls.get_irdl_definition().operands
    required = [d for _, d in definitions if not isinstance(d, (OptOperandDef, VarOperandDef))]
    if len(given) < len(required) or (len(given) > len(required) and not _variadic(cls)):
        parser.raise_error(f"{cls.name} takes {len(required)} operands, not {len(given)}")
    for name, definition in definitions:
        if isinstance(definition, OptOperandDef):
            value = None
            if parser.parse_optional_keyword(name) is not None:
                with parser.in_parens():
                    value = _value(parser)
            result.append(value)
        elif isinstance(definition, VarOperandDef):
            result.append(given[position:])
        else:
            result.append(given[position])
            position += 1
    return result


def _variadic(cls: type[IRDLOperation]) -> bool:
    return any(type(d) is VarOperandDef for _, d in cls.get_irdl_definition().operands)


def _parse_property(parser: Parser, name: str, kind: str) -> Attribute:
    match kind:
        case "str":
            return StringAttr(parser.parse_str_literal())
        case "word":
            return StringAttr(parser.parse_identifier())
        case "ints":
            values = parser.parse_comma_separated_list(parser.Delimiter.SQUARE, parser.parse_integer)
            return DenseArrayBase.from_list(i64, values)
        case "typed":
            return parser.parse_attribute()
        case "int":
            parser.parse_keyword(name)
            return IntegerAttr(parser.parse_integer(), i64)
        case "bool":
            parser.parse_keyword(name)
            return BoolAttr.from_bool(parser.parse_boolean())
        case "number":
            parser.parse_keyword(name)
            return FloatAttr(float(parser.parse_number()), 64)
        case _:
            raise AssertionError(kind)


def _print_property(printer: Printer, name: str, kind: str, value: Attribute) -> None:
    match value:
        case StringAttr() if kind == "str":
            printer.print_string_literal(value.data)
        case StringAttr() if kind == "option":
            printer.print_string(f"{name} ")
            printer.print_string_literal(value.data)
        case StringAttr():
            printer.print_string(value.data)
        case DenseArrayBase():
            printer.print_string(f"[{', '.join(str(v) for v in numbers(value))}]")
        case FloatAttr():
            printer.print_string(f"{name} {_decimal(value.value.data)}")
        case IntegerAttr() if kind == "bool":
            printer.print_string(f"{name} {'true' if value.value.data else 'false'}")
        case IntegerAttr():
            printer.print_string(f"{name} {value.value.data}")
        case _:
            raise AssertionError(f"{name}: {value}")


def _decimal(value: float) -> str:
    """A number with every digit, and a point, as the lexer wants it."""
    text = repr(value)
    if "e" in text and "." not in text:
        text = text.replace("e", ".0e")
    return text
