"""The `rngd` dialect: how one unit computes a routine, as a block of instructions in program order.

Values are *buffers* in a memory; instructions wrap the descriptors of `backend_rngd.isa`, whose bases are relative to the
operand buffers until emission adds the addresses.

```mlir
builtin.module {
  rngd.global @x : !rngd.buffer<hbm, 4096> kind "input"
  rngd.routine @main() {
    %x = rngd.get_global @x : !rngd.buffer<hbm, 4096>
    %a = rngd.alloc "a" align 64 : !rngd.buffer<dm, 64>
    rngd.dma dma "dma(source=(space=hbm base=0) destination=(space=dm base=0) loops=[64:64:4194304] packet=64)" (%x -> %a)
    rngd.call @block_0(%x)
  }
}
```
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import ClassVar, cast

from xdsl.dialects.builtin import IntAttr, IntegerAttr, StringAttr, SymbolRefAttr, i64
from xdsl.ir import Attribute, Block, Data, Dialect, Operation, ParametrizedAttribute, Region, SSAValue, TypeAttribute
from xdsl.irdl import (
    AttrSizedOperandSegments,
    IRDLOperation,
    irdl_attr_definition,
    irdl_op_definition,
    operand_def,
    opt_operand_def,
    opt_prop_def,
    prop_def,
    region_def,
    result_def,
    traits_def,
    var_operand_def,
)
from xdsl.parser import AttrParser, Parser
from xdsl.printer import Printer
from xdsl.traits import IsolatedFromAbove, NoTerminator, SymbolOpInterface, SymbolTable
from xdsl.utils.exceptions import VerifyException

from backend_rngd.isa.descriptors import After, Descriptor, Dma, Exec, LoadTrf, LoadVrf, Memset, Source, Space
from backend_rngd.isa.footprint import footprint
from backend_rngd.isa.text import (
    TextError,
    format_after,
    format_descriptor,
    parse_after,
    parse_descriptor,
)

SPACES = ("hbm", "dm", "trf", "vrf")
KINDS = ("weight", "cache", "input", "output", "activation", "scratch", "constant")
CONTEXTS = ("main", "sub", "dma")


# Attributes ----------------------------------------------------------------------------------------------------------
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
        return (_string(space), IntAttr(nbytes))

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
    return BufferType(_string(space), IntAttr(nbytes))


@lru_cache(maxsize=16384)
def _string(text: str) -> StringAttr:
    return StringAttr(text)


@lru_cache(maxsize=4096)
def _integer(value: int) -> IntegerAttr:
    return IntegerAttr(value, i64)


@irdl_attr_definition
class DescriptorAttr(Data[Descriptor]):
    """An instruction descriptor, printed as its assembly text: `#rngd.descriptor<"memset(slices=64 base=0 bytes=8)">`."""

    name = "rngd.descriptor"

    @classmethod
    def parse_parameter(cls, parser: AttrParser) -> Descriptor:
        """`<"text">`."""
        with parser.in_angle_brackets():
            return _parse_text(parser)

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
            return _parse_after_text(parser)

    def print_parameter(self, printer: Printer) -> None:
        """`<"text">`."""
        with printer.in_angle_brackets():
            printer.print_string_literal(format_after(self.data))


def _parse_text(parser: AttrParser) -> Descriptor:
    text = parser.parse_str_literal("instruction text")
    try:
        return parse_descriptor(text)
    except TextError as e:
        parser.raise_error(str(e))


def _parse_after_text(parser: AttrParser) -> After:
    text = parser.parse_str_literal("dependencies")
    try:
        return parse_after(text)
    except TextError as e:
        parser.raise_error(str(e))


# Buffers -------------------------------------------------------------------------------------------------------------
def space_of(value: SSAValue) -> str:
    """Memory of a buffer value."""
    return cast(BufferType, value.type).space.data


def bytes_of(value: SSAValue) -> int:
    """Size of a buffer value (a slice's bytes except in HBM)."""
    return cast(BufferType, value.type).nbytes.data


@irdl_op_definition
class GlobalOp(IRDLOperation):
    """A buffer that lives as long as the program. Exists because weights, caches, inputs and outputs have one address for
    every routine and for the host.

    `row_bytes` (caches): bytes of one batch row; the buffer is then addressed through a row register, so that a program of
    batch 1 can serve any row.

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
            "kind": _string(kind),
            "row_bytes": _integer(row_bytes) if row_bytes else None,
            "address": None if address is None else _integer(address),
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
            "buffer_name": _string(name),
            "align": _integer(align),
            "address": None if address is None else _integer(address),
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


def _operand(parser: Parser) -> SSAValue:
    """A buffer that was defined before (routines are straight-line, so its type is known)."""
    operand = parser.parse_unresolved_operand("buffer expected")
    values = parser.ssa_values.get(operand.operand_name)
    if values is None or operand.index >= len(values):
        parser.raise_error(f"%{operand.operand_name} is not defined before its use", operand.span)
    return values[operand.index]


# Instructions --------------------------------------------------------------------------------------------------------
class InstructionOp(IRDLOperation):
    """What the instruction operations share: a descriptor, a context, dependencies and a source location.

    Printed as `rngd.exec main "exec(...)" (%source, trf %t -> %target) after "after(main=1)" at "model.layers.0"`.
    """

    KIND: ClassVar[type]
    ROLES: ClassVar[tuple[str, ...]]

    desc = prop_def(DescriptorAttr)
    context = prop_def(StringAttr)
    where = prop_def(StringAttr, prop_name="location")  # Operation.location is the IR location
    after = opt_prop_def(AfterAttr)

    @property
    def descriptor(self) -> Descriptor:
        """The wrapped descriptor, bases relative to the operand buffers."""
        return cast(DescriptorAttr, self.properties["desc"]).data

    def roles(self) -> list[tuple[str, SSAValue]]:
        """(role, buffer) of every operand in the order of the definition."""
        out: list[tuple[str, SSAValue]] = []
        for role in self.ROLES:
            value = getattr(self, role)
            if value is None:
                continue
            out += [(role, v) for v in value] if isinstance(value, (list, tuple)) else [(role, value)]
        return out

    def verify_(self) -> None:
        """Descriptor of the right class and legal; operands in the memories that the descriptor uses."""
        from backend_rngd.isa.legality import check
        from backend_rngd.machine import load_machine

        if not isinstance(self.descriptor, self.KIND):
            raise VerifyException(f"{self.name} holds a descriptor of class {type(self.descriptor).__name__}")
        if cast(StringAttr, self.properties["context"]).data not in CONTEXTS:
            raise VerifyException(f"unknown context {self.properties['context']}: {', '.join(CONTEXTS)}")
        for role, space in self.expected_spaces().items():
            for found, value in self.roles():
                if found == role and space_of(value) != space:
                    raise VerifyException(f"operand {role} must lie in {space}, not in {space_of(value)}")
        problems = check(self.descriptor, load_machine(), context=cast(StringAttr, self.properties["context"]).data)
        if problems:
            raise VerifyException("; ".join(str(p) for p in problems))
        for (role, value), access in zip(self.touched(), footprint(self.descriptor), strict=False):
            if access.space == "trf":
                continue  # bases are relative to a lane, buffers are not
            if access.low < 0 or access.high > bytes_of(value):
                raise VerifyException(
                    f"operand {role} has {bytes_of(value)} B, the instruction touches [{access.low}, {access.high})"
                )

    def touched(self) -> list[tuple[str, SSAValue]]:
        """Operands in the order of the accesses of `isa.footprint`."""
        return self.roles()

    def expected_spaces(self) -> dict[str, str]:
        """Memory of each operand role."""
        return {"source": "dm", "second": "dm", "target": "dm", "trf": "trf", "vrf": "vrf"}

    def print(self, printer: Printer) -> None:
        """One line: context, text, operands by role, dependencies, location."""
        printer.print_string(" " + cast(StringAttr, self.properties["context"]).data + " ")
        printer.print_string_literal(format_descriptor(self.descriptor))
        printer.print_string(" (")
        for i, (role, value) in enumerate(self.roles()):
            if i:
                printer.print_string(" -> " if role in ("target", "destination") else ", ")
            if role not in ("source", "target", "destination"):
                printer.print_string(role + " ")
            printer.print_ssa_value(value)
        printer.print_string(")")
        if "after" in self.properties and (text := format_after(cast(AfterAttr, self.properties["after"]).data)):
            printer.print_string(" ")
            printer.print_string_literal(text)
        if location := cast(StringAttr, self.properties["location"]).data:
            printer.print_string(" at ")
            printer.print_string_literal(location)

    @classmethod
    def parse(cls, parser: Parser) -> InstructionOp:
        """Inverse of `print`."""
        context = parser.parse_identifier("context")
        desc = _parse_text(parser)
        operands: dict[str, list[SSAValue]] = {role: [] for role in cls.ROLES}
        last = "destination" if "destination" in cls.ROLES else "target"
        parser.parse_punctuation("(")
        if cls.ROLES[0] == last:
            operands[last].append(_operand(parser))
        else:
            operands["source"].append(_operand(parser))
            while parser.parse_optional_punctuation(","):
                role = parser.parse_identifier("operand role")
                if role not in cls.ROLES:
                    parser.raise_error(f"{cls.name} has no operand {role!r}: {', '.join(cls.ROLES)}")
                operands[role].append(_operand(parser))
            parser.parse_punctuation("->")
            operands[last].append(_operand(parser))
        parser.parse_punctuation(")")
        text = parser.parse_optional_str_literal()
        location = parser.parse_str_literal() if parser.parse_optional_keyword("at") else ""
        op = cls.build(
            operands=[operands[role] for role in cls.ROLES]
            if len(cls.ROLES) > 2
            else [operands[r][0] for r in cls.ROLES],
            properties=_properties(desc, context, location),
        )
        if text is not None:
            try:
                op.properties["after"] = AfterAttr(parse_after(text))
            except TextError as e:
                parser.raise_error(str(e))
        return op


def _properties(desc: Descriptor, context: str, location: str) -> dict[str, Attribute]:
    return {"desc": DescriptorAttr(desc), "context": _string(context), "location": _string(location)}


@irdl_op_definition
class ExecOp(InstructionOp):
    """A Tensor Unit pass from `source` (and `second` in pair mode) to `target`, with the register-file buffers it reads.

    `vrf` holds one buffer for each vector operation with a VRF operand, in the order of the operations.
    """

    name = "rngd.exec"
    KIND: ClassVar[type] = Exec
    ROLES: ClassVar[tuple[str, ...]] = ("source", "second", "trf", "vrf", "target")
    source = operand_def(BufferType)
    second = opt_operand_def(BufferType)
    trf = opt_operand_def(BufferType)
    vrf = var_operand_def(BufferType)
    target = operand_def(BufferType)
    irdl_options = (AttrSizedOperandSegments(as_property=True),)

    def __init__(
        self,
        desc: Exec,
        source: SSAValue,
        target: SSAValue,
        second: SSAValue | None = None,
        trf: SSAValue | None = None,
        vrf: Sequence[SSAValue] = (),
        context: str = "main",
        location: str = "",
    ):
        super().__init__(operands=[source, second, trf, vrf, target], properties=_properties(desc, context, location))

    def verify_(self) -> None:
        """Register-file operands are there exactly when the descriptor uses them."""
        if not isinstance(self.descriptor, Exec):
            raise VerifyException(f"{self.name} holds a descriptor of class {type(self.descriptor).__name__}")
        desc = self.descriptor
        if (self.second is None) != (desc.fetch.second is None):
            raise VerifyException("operand second belongs to a fetch with a second tensor")
        if (self.trf is None) != (desc.contract is None):
            raise VerifyException("operand trf belongs to a contraction")
        used = sum(op.operand.source == Source.VRF for op in desc.vector)
        if used != len(self.vrf):
            raise VerifyException(f"{used} vector operations read VRF, {len(self.vrf)} buffers given")
        super().verify_()


@irdl_op_definition
class LoadTrfOp(InstructionOp):
    """Load TRF from a DM buffer (StoTRF)."""

    name = "rngd.load_trf"
    KIND: ClassVar[type] = LoadTrf
    ROLES: ClassVar[tuple[str, ...]] = ("source", "target")
    source = operand_def(BufferType)
    target = operand_def(BufferType)

    def __init__(self, desc: LoadTrf, source: SSAValue, target: SSAValue, context: str = "sub", location: str = ""):
        super().__init__(operands=[source, target], properties=_properties(desc, context, location))

    def expected_spaces(self) -> dict[str, str]:
        """DM to TRF."""
        return {"source": "dm", "target": "trf"}


@irdl_op_definition
class LoadVrfOp(InstructionOp):
    """Load VRF from a DM buffer (StoVRF)."""

    name = "rngd.load_vrf"
    KIND: ClassVar[type] = LoadVrf
    ROLES: ClassVar[tuple[str, ...]] = ("source", "target")
    source = operand_def(BufferType)
    target = operand_def(BufferType)

    def __init__(self, desc: LoadVrf, source: SSAValue, target: SSAValue, context: str = "sub", location: str = ""):
        super().__init__(operands=[source, target], properties=_properties(desc, context, location))

    def expected_spaces(self) -> dict[str, str]:
        """DM to VRF."""
        return {"source": "dm", "target": "vrf"}


@irdl_op_definition
class MemsetOp(InstructionOp):
    """Fill a DM buffer with a pattern (ITOS)."""

    name = "rngd.memset"
    KIND: ClassVar[type] = Memset
    ROLES: ClassVar[tuple[str, ...]] = ("target",)
    target = operand_def(BufferType)

    def __init__(self, desc: Memset, target: SSAValue, context: str = "sub", location: str = ""):
        super().__init__(operands=[target], properties=_properties(desc, context, location))


@irdl_op_definition
class DmaOp(InstructionOp):
    """A tensor DMA between HBM and DM buffers; `index` is the HBM buffer of byte offsets of a gather or scatter."""

    name = "rngd.dma"
    KIND: ClassVar[type] = Dma
    ROLES: ClassVar[tuple[str, ...]] = ("source", "index", "destination")
    source = operand_def(BufferType)
    index = opt_operand_def(BufferType)
    destination = operand_def(BufferType)
    irdl_options = (AttrSizedOperandSegments(as_property=True),)

    def __init__(
        self,
        desc: Dma,
        source: SSAValue,
        destination: SSAValue,
        index: SSAValue | None = None,
        context: str = "dma",
        location: str = "",
    ):
        super().__init__(operands=[source, index, destination], properties=_properties(desc, context, location))

    def expected_spaces(self) -> dict[str, str]:
        """As the endpoints say."""
        desc = cast(Dma, self.descriptor)
        names = {Space.HBM: "hbm", Space.DM: "dm"}
        return {"source": names[desc.source.space], "destination": names[desc.destination.space], "index": "hbm"}

    def touched(self) -> list[tuple[str, SSAValue]]:
        """Source, destination, index."""
        return sorted(self.roles(), key=lambda r: ("source", "destination", "index").index(r[0]))

    def verify_(self) -> None:
        """The index buffer is there exactly when the descriptor gathers or scatters."""
        if isinstance(self.descriptor, Dma) and (self.index is None) != (self.descriptor.index is None):
            raise VerifyException("operand index belongs to a gather or scatter")
        super().verify_()


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
    """Run a routine with HBM buffers. A barrier: what follows waits for the whole call.

    ```mlir
    rngd.call @block_0(%w, %k) : !rngd.buffer<hbm, 64>, !rngd.buffer<hbm, 64>
    ```
    """

    name = "rngd.call"
    callee = prop_def(SymbolRefAttr)
    where = prop_def(StringAttr, prop_name="location")  # Operation.location is the IR location
    arguments = var_operand_def(BufferType)

    def __init__(self, name: str, args: Sequence[SSAValue], location: str = ""):
        super().__init__(
            operands=[list(args)], properties={"callee": SymbolRefAttr(name), "location": _string(location)}
        )

    def verify_(self) -> None:
        """The callee exists and takes these buffers."""
        routine = SymbolTable.lookup_symbol(self, self.callee)
        if not isinstance(routine, RoutineOp):
            raise VerifyException(f"no routine {self.callee.string_value()}")
        wanted = [a.type for a in routine.block.args]
        found = [a.type for a in self.arguments]
        if wanted != found:
            raise VerifyException(f"{self.callee.string_value()} takes other buffers than it is called with")

    def print(self, printer: Printer) -> None:
        """`@callee(%a, ...) [at "location"]`."""
        printer.print_string(" ")
        printer.print_symbol_name(self.callee.string_value())
        with printer.in_parens():
            printer.print_list(self.arguments, printer.print_ssa_value)
        if self.where.data:
            printer.print_string(" at ")
            printer.print_string_literal(self.where.data)

    @classmethod
    def parse(cls, parser: Parser) -> CallOp:
        """Inverse of `print`."""
        name = parser.parse_symbol_name()
        args = parser.parse_comma_separated_list(parser.Delimiter.PAREN, lambda: _operand(parser))
        location = parser.parse_str_literal() if parser.parse_optional_keyword("at") else ""
        return cls(name.data, args, location)


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
        super().__init__(operands=[buffer], properties={"value": _string(value), "layout": StringAttr(layout)})


RNGD = Dialect(
    "rngd",
    [GlobalOp, GetGlobalOp, AllocOp, ExecOp, LoadTrfOp, LoadVrfOp, MemsetOp, DmaOp, RoutineOp, CallOp, ProbeOp],
    [BufferType, DescriptorAttr, AfterAttr],
)
