"""The `rngd` dialect: how one unit computes a routine, as a block of instructions in program order.

Values are *buffers* in a memory; instructions wrap the descriptors of `backend_rngd.isa`, whose bases are relative to
the operand buffers until emission adds the addresses.

```mlir
builtin.module {
  rngd.global @x : !rngd.buffer<hbm, 4096> kind "input"
  rngd.routine @main() {
    %x = rngd.get_global @x : !rngd.buffer<hbm, 4096>
    %a = rngd.alloc "a" align 64 : !rngd.buffer<dm, 64>
    rngd.dma dma "dma(source=(space=hbm base=0) destination=(space=dm base=0) loops=[64:64:4194304] packet=64)"
        (%x -> %a)
    rngd.call @block_0(%x)
  }
}
```
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from xdsl.dialects.builtin import ArrayAttr, IntAttr, IntegerAttr, StringAttr, SymbolRefAttr
from xdsl.ir import Attribute, Block, Dialect, Region, SSAValue
from xdsl.irdl import (
    IRDLOperation,
    irdl_op_definition,
    operand_def,
    opt_prop_def,
    prop_def,
    region_def,
    result_def,
    traits_def,
    var_operand_def,
)
from xdsl.parser import Parser
from xdsl.printer import Printer
from xdsl.traits import IsolatedFromAbove, NoTerminator, SymbolOpInterface, SymbolTable
from xdsl.utils.exceptions import VerifyException

from backend_rngd.attributes import (
    SPACES,
    AfterAttr,
    BufferType,
    DescriptorAttr,
    buffer_type,
    bytes_of,
    parse_buffer,
    shared_integer,
    shared_string,
    space_of,
)
from backend_rngd.instructions import CONTEXTS, DmaOp, ExecOp, InstructionOp, LoadTrfOp, LoadVrfOp, MemsetOp
from backend_rngd.sync_ops import LaunchOp, NotifyOp, WaitOp

__all__ = [
    "CONTEXTS",
    "EARLY",
    "KINDS",
    "RNGD",
    "SPACES",
    "AfterAttr",
    "AllocOp",
    "BufferType",
    "CallOp",
    "DescriptorAttr",
    "DmaOp",
    "ExecOp",
    "GetGlobalOp",
    "GlobalOp",
    "InstructionOp",
    "LaunchOp",
    "LoadTrfOp",
    "LoadVrfOp",
    "MemsetOp",
    "NotifyOp",
    "ProbeOp",
    "RoutineOp",
    "WaitOp",
    "buffer_type",
    "bytes_of",
    "space_of",
]

EARLY = "early"
KINDS = ("weight", "cache", "input", "output", "activation", "scratch", "constant", EARLY)
"""Of globals. Early: DM that a routine fills without waiting for the routines before it (`isa.early`)."""


# Buffers -------------------------------------------------------------------------------------------------------------
@irdl_op_definition
class GlobalOp(IRDLOperation):
    """A buffer that lives as long as the program. Exists because weights, caches, inputs and outputs have one address
    for every routine and for the host.

    `row_bytes` (caches): bytes of one batch row; the buffer is then addressed through a row register, so that a
    program of batch 1 can serve any row.

    ```mlir
    rngd.global @k_0 : !rngd.buffer<hbm, 65536> kind "cache" row_bytes 16384
    ```
    """

    name = "rngd.global"
    sym_name = prop_def(StringAttr)
    buffer_type = prop_def(BufferType)
    kind = prop_def(StringAttr)
    address = opt_prop_def(IntegerAttr)
    row_bytes = opt_prop_def(IntegerAttr)
    traits = traits_def(SymbolOpInterface())

    def __init__(self, name: str, space: str, nbytes: int, kind: str, row_bytes: int = 0, address: int | None = None):
        properties: dict[str, Attribute | None] = {
            "sym_name": StringAttr(name),
            "buffer_type": buffer_type(space, nbytes),
            "kind": shared_string(kind),
            "row_bytes": shared_integer(row_bytes) if row_bytes else None,
            "address": None if address is None else shared_integer(address),
        }
        super().__init__(properties=properties)

    def verify_(self) -> None:
        """Kind known; only HBM has batch rows; rows divide the buffer."""
        if self.kind.data not in KINDS:
            raise VerifyException(f"unknown kind {self.kind.data!r}: {', '.join(KINDS)}")
        if self.row_bytes is not None:
            row = self.row_bytes.value.data
            if self.buffer_type.space.data != "hbm" or row <= 0 or self.buffer_type.nbytes.data % row:
                raise VerifyException("row_bytes needs an HBM buffer of whole rows")

    def print(self, printer: Printer) -> None:
        """`@name : type kind "k" [row_bytes n] [address n]`."""
        printer.print_string(" ")
        printer.print_symbol_name(self.sym_name.data)
        printer.print_string(" : ")
        printer.print_attribute(self.buffer_type)
        printer.print_string(" kind ")
        printer.print_string_literal(self.kind.data)
        if self.row_bytes is not None:
            printer.print_string(f" row_bytes {self.row_bytes.value.data}")
        if self.address is not None:
            printer.print_string(f" address {self.address.value.data}")

    @classmethod
    def parse(cls, parser: Parser) -> GlobalOp:
        """Inverse of `print`."""
        name = parser.parse_symbol_name()
        parser.parse_punctuation(":")
        kind_of_buffer = cast(BufferType, parser.parse_type())
        parser.parse_keyword("kind")
        kind = parser.parse_str_literal()
        row = parser.parse_integer() if parser.parse_optional_keyword("row_bytes") else 0
        address = parser.parse_integer() if parser.parse_optional_keyword("address") else None
        return cls(name.data, kind_of_buffer.space.data, kind_of_buffer.nbytes.data, kind, row, address)


@irdl_op_definition
class GetGlobalOp(IRDLOperation):
    """A global as a value of a routine.

    ```mlir
    %w = rngd.get_global @w : !rngd.buffer<hbm, 4096>
    ```
    """

    name = "rngd.get_global"
    symbol = prop_def(SymbolRefAttr)
    result = result_def(BufferType)
    assembly_format = "$symbol `:` type($result) attr-dict"

    def __init__(self, name: str, kind: BufferType):
        super().__init__(properties={"symbol": SymbolRefAttr(name)}, result_types=[kind])


@irdl_op_definition
class AllocOp(IRDLOperation):
    """A buffer of the routine, live from its first to its last use. `address` is set by `place`.

    ```mlir
    %a = rngd.alloc "scores" align 64 : !rngd.buffer<dm, 2048>
    ```
    """

    name = "rngd.alloc"
    buffer_name = prop_def(StringAttr)
    align = prop_def(IntegerAttr)
    address = opt_prop_def(IntegerAttr)
    result = result_def(BufferType)

    def __init__(self, space: str, nbytes: int, name: str = "", align: int = 64, address: int | None = None):
        properties: dict[str, Attribute | None] = {
            "buffer_name": shared_string(name),
            "align": shared_integer(align),
            "address": None if address is None else shared_integer(address),
        }
        super().__init__(properties=properties, result_types=[buffer_type(space, nbytes)])

    def verify_(self) -> None:
        """Alignment is a power of two and kept by the address."""
        align = self.align.value.data
        if align <= 0 or align & (align - 1):
            raise VerifyException(f"alignment {align} is not a power of two")
        if self.address is not None and self.address.value.data % align:
            raise VerifyException(f"address {self.address.value.data} is not aligned to {align}")

    def print(self, printer: Printer) -> None:
        """`"name" align n [address n] : type`."""
        printer.print_string(" ")
        printer.print_string_literal(self.buffer_name.data)
        printer.print_string(f" align {self.align.value.data}")
        if self.address is not None:
            printer.print_string(f" address {self.address.value.data}")
        printer.print_string(" : ")
        printer.print_attribute(self.result.type)

    @classmethod
    def parse(cls, parser: Parser) -> AllocOp:
        """Inverse of `print`."""
        name = parser.parse_str_literal()
        parser.parse_keyword("align")
        align = parser.parse_integer()
        address = parser.parse_integer() if parser.parse_optional_keyword("address") else None
        parser.parse_punctuation(":")
        kind = cast(BufferType, parser.parse_type())
        return cls(kind.space.data, kind.nbytes.data, name, align, address)


# Control -------------------------------------------------------------------------------------------------------------
@irdl_op_definition
class RoutineOp(IRDLOperation):
    """A straight-line list of instructions. `@main` is the entry; others are blocks called with HBM buffers.

    Exists because identical layers are compiled once and called with each layer's weights and caches.
    """

    name = "rngd.routine"
    sym_name = prop_def(StringAttr)
    body = region_def("single_block")
    traits = traits_def(SymbolOpInterface(), IsolatedFromAbove(), NoTerminator())

    def __init__(self, name: str, arg_types: Sequence[Attribute] = (), region: Region | None = None):
        body = region if region is not None else Region(Block(arg_types=arg_types))
        super().__init__(properties={"sym_name": StringAttr(name)}, regions=[body])

    @property
    def block(self) -> Block:
        """The only block."""
        return self.body.blocks[0]

    def verify_(self) -> None:
        """Only HBM buffers are passed."""
        for argument in self.block.args:
            if not isinstance(argument.type, BufferType) or argument.type.space.data != "hbm":
                raise VerifyException("arguments of a routine are HBM buffers")

    def print(self, printer: Printer) -> None:
        """`@name(%a : type, ...) { ... }`."""
        printer.print_string(" ")
        printer.print_symbol_name(self.sym_name.data)
        with printer.in_parens():
            printer.print_list(self.block.args, printer.print_block_argument)
        printer.print_string(" ")
        printer.print_region(self.body, print_entry_block_args=False, print_empty_block=False)

    @classmethod
    def parse(cls, parser: Parser) -> RoutineOp:
        """Inverse of `print`."""
        name = parser.parse_symbol_name()
        args = parser.parse_comma_separated_list(parser.Delimiter.PAREN, parser.parse_argument)
        region = parser.parse_region(args)
        if not region.blocks:
            region.add_block(Block(arg_types=[a.type for a in args]))
        return cls(name.data, region=region)


@irdl_op_definition
class CallOp(IRDLOperation):
    """Run a routine with HBM buffers, from byte `offsets` of each. A barrier: what follows waits for the whole call.

    ```mlir
    rngd.call @block_0(%w, %k)
    rngd.call @keys(%k, %v) offsets [4096, 4096]
    ```
    """

    name = "rngd.call"
    callee = prop_def(SymbolRefAttr)
    where = prop_def(StringAttr, prop_name="location")  # Operation.location is the IR location
    offsets = opt_prop_def(ArrayAttr[IntAttr])
    arguments = var_operand_def(BufferType)

    def __init__(self, name: str, args: Sequence[SSAValue], location: str = "", offsets: Sequence[int] = ()):
        properties: dict[str, Attribute] = {"callee": SymbolRefAttr(name), "location": shared_string(location)}
        if any(offsets):
            properties["offsets"] = ArrayAttr([IntAttr(n) for n in offsets])
        super().__init__(operands=[list(args)], properties=properties)

    @property
    def offset_list(self) -> list[int]:
        """Bytes from the start of every buffer."""
        return [0] * len(self.arguments) if self.offsets is None else [n.data for n in self.offsets]

    def verify_(self) -> None:
        """The callee exists and takes these buffers."""
        routine = SymbolTable.lookup_symbol(self, self.callee)
        if not isinstance(routine, RoutineOp):
            raise VerifyException(f"no routine {self.callee.string_value()}")
        wanted = [a.type for a in routine.block.args]
        found = [a.type for a in self.arguments]
        if wanted != found:
            raise VerifyException(f"{self.callee.string_value()} takes other buffers than it is called with")
        if len(self.offset_list) != len(found):
            raise VerifyException("an offset for every buffer, or none")

    def print(self, printer: Printer) -> None:
        """`@callee(%a, ...) [offsets [...]] [at "location"]`."""
        printer.print_string(" ")
        printer.print_symbol_name(self.callee.string_value())
        with printer.in_parens():
            printer.print_list(self.arguments, printer.print_ssa_value)
        if self.offsets is not None:
            printer.print_string(f" offsets {self.offset_list}")
        if self.where.data:
            printer.print_string(" at ")
            printer.print_string_literal(self.where.data)

    @classmethod
    def parse(cls, parser: Parser) -> CallOp:
        """Inverse of `print`."""
        name = parser.parse_symbol_name()
        args = parser.parse_comma_separated_list(parser.Delimiter.PAREN, lambda: parse_buffer(parser))
        offsets: list[int] = []
        if parser.parse_optional_keyword("offsets"):
            offsets = parser.parse_comma_separated_list(parser.Delimiter.SQUARE, parser.parse_integer)
        location = parser.parse_str_literal() if parser.parse_optional_keyword("at") else ""
        return cls(name.data, args, location, offsets)


@irdl_op_definition
class ProbeOp(IRDLOperation):
    """Says that a `tc` value is complete in a buffer from here on; no effect. Exists for `rngdc check`.

    `layout` is JSON: dtype, shape, base, space and digits [dimension, size, slice stride, byte stride], digits of a
    dimension outer to inner; the address of an element is the sum over digits.
    """

    name = "rngd.probe"
    buffer = operand_def(BufferType)
    value = prop_def(StringAttr)
    layout = prop_def(StringAttr)
    assembly_format = "$buffer $value `layout` $layout attr-dict `:` type($buffer)"

    def __init__(self, buffer: SSAValue, value: str, layout: str):
        super().__init__(operands=[buffer], properties={"value": shared_string(value), "layout": StringAttr(layout)})


RNGD = Dialect(
    "rngd",
    [
        GlobalOp,
        GetGlobalOp,
        LaunchOp,
        AllocOp,
        ExecOp,
        LoadTrfOp,
        LoadVrfOp,
        MemsetOp,
        DmaOp,
        NotifyOp,
        WaitOp,
        RoutineOp,
        CallOp,
        ProbeOp,
    ],
    [BufferType, DescriptorAttr, AfterAttr],
)
