"""Types and attributes of the `rngd` dialect: buffers, descriptors, dependencies."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import cast

from xdsl.dialects.builtin import IntAttr, IntegerAttr, StringAttr, i64
from xdsl.ir import Attribute, Data, ParametrizedAttribute, SSAValue, TypeAttribute
from xdsl.irdl import irdl_attr_definition
from xdsl.parser import AttrParser, Parser
from xdsl.printer import Printer
from xdsl.utils.exceptions import VerifyException

from backend_rngd.isa.descriptors import After, Descriptor
from backend_rngd.isa.text import TextError, format_after, format_descriptor, parse_after, parse_descriptor

SPACES = ("hbm", "dm", "trf", "vrf")


@irdl_attr_definition
class BufferType(ParametrizedAttribute, TypeAttribute):
    """A piece of a memory: `!rngd.buffer<dm, 4096>`. Bytes in all for hbm, bytes of every slice for dm, trf and vrf."""

    name = "rngd.buffer"
    space: StringAttr
    nbytes: IntAttr

    @classmethod
    def parse_parameters(cls, parser: AttrParser) -> Sequence[Attribute]:
        """`<space, bytes>`."""
        with parser.in_angle_brackets():
            space = parser.parse_identifier("memory space")
            parser.parse_punctuation(",")
            nbytes = parser.parse_integer(allow_boolean=False, allow_negative=False)
        return (shared_string(space), IntAttr(nbytes))

    def print_parameters(self, printer: Printer) -> None:
        """`<space, bytes>`."""
        printer.print_string(f"<{self.space.data}, {self.nbytes.data}>")

    def verify(self) -> None:
        """Space known, size positive."""
        if self.space.data not in SPACES:
            raise VerifyException(f"unknown memory {self.space.data!r}: {', '.join(SPACES)}")
        if self.nbytes.data <= 0:
            raise VerifyException("a buffer has at least one byte")


@lru_cache(maxsize=4096)
def buffer_type(space: str, nbytes: int) -> BufferType:
    """The (shared) type of a buffer."""
    return BufferType(shared_string(space), IntAttr(nbytes))


@lru_cache(maxsize=16384)
def shared_string(text: str) -> StringAttr:
    """One attribute object for equal texts: thousands of operations repeat a few."""
    return StringAttr(text)


@lru_cache(maxsize=4096)
def shared_integer(value: int) -> IntegerAttr:
    """One attribute object for equal integers."""
    return IntegerAttr(value, i64)


@irdl_attr_definition
class DescriptorAttr(Data[Descriptor]):
    """An instruction descriptor as assembly text: `#rngd.descriptor<"memset(slices=64 base=0 bytes=8)">`."""

    name = "rngd.descriptor"

    @classmethod
    def parse_parameter(cls, parser: AttrParser) -> Descriptor:
        """`<"text">`."""
        with parser.in_angle_brackets():
            return parse_descriptor_text(parser)

    def print_parameter(self, printer: Printer) -> None:
        """`<"text">`."""
        with printer.in_angle_brackets():
            printer.print_string_literal(format_descriptor(self.data))


@irdl_attr_definition
class AfterAttr(Data[After]):
    """Dependencies of an instruction, set by `schedule`: `#rngd.after<"after(main=3)">`."""

    name = "rngd.after"

    @classmethod
    def parse_parameter(cls, parser: AttrParser) -> After:
        """`<"text">`."""
        with parser.in_angle_brackets():
            return parse_after_text(parser)

    def print_parameter(self, printer: Printer) -> None:
        """`<"text">`."""
        with printer.in_angle_brackets():
            printer.print_string_literal(format_after(self.data))


def parse_descriptor_text(parser: AttrParser) -> Descriptor:
    """A quoted descriptor; errors point at the text."""
    text = parser.parse_str_literal("instruction text")
    try:
        return parse_descriptor(text)
    except TextError as e:
        parser.raise_error(str(e))


def parse_after_text(parser: AttrParser) -> After:
    """Quoted dependencies; errors point at the text."""
    text = parser.parse_str_literal("dependencies")
    try:
        return parse_after(text)
    except TextError as e:
        parser.raise_error(str(e))


def space_of(value: SSAValue) -> str:
    """Memory of a buffer value."""
    return cast(BufferType, value.type).space.data


def bytes_of(value: SSAValue) -> int:
    """Size of a buffer value (a slice's bytes except in HBM)."""
    return cast(BufferType, value.type).nbytes.data


def parse_buffer(parser: Parser) -> SSAValue:
    """A buffer that was defined before (routines are straight-line, so its type is known)."""
    operand = parser.parse_unresolved_operand("buffer expected")
    values = parser.ssa_values.get(operand.operand_name)
    if values is None or operand.index >= len(values):
        parser.raise_error(f"%{operand.operand_name} is not defined before its use", operand.span)
    return values[operand.index]
