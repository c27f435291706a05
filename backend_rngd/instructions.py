"""Operations of the `rngd` dialect that wrap an instruction descriptor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, cast

from xdsl.dialects.builtin import StringAttr
from xdsl.ir import Attribute, SSAValue
from xdsl.irdl import (
    AttrSizedOperandSegments,
    IRDLOperation,
    irdl_op_definition,
    operand_def,
    opt_operand_def,
    opt_prop_def,
    prop_def,
    var_operand_def,
)
from xdsl.parser import Parser
from xdsl.printer import Printer
from xdsl.utils.exceptions import VerifyException

from backend_rngd.attributes import (
    AfterAttr,
    BufferType,
    DescriptorAttr,
    bytes_of,
    parse_buffer,
    parse_descriptor_text,
    shared_string,
    space_of,
)
from backend_rngd.isa.descriptors import Context, Descriptor, Dma, Exec, LoadTrf, LoadVrf, Memset, Source, Space
from backend_rngd.isa.footprint import footprint
from backend_rngd.isa.legality import check
from backend_rngd.isa.text import TextError, format_after, format_descriptor, parse_after
from backend_rngd.machine import load_machine

CONTEXTS = {"main": Context.MAIN, "sub": Context.SUB, "dma": Context.DMA}


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
            value: SSAValue | Sequence[SSAValue] | None = getattr(self, role)
            if value is not None:
                out += [(role, v) for v in ([value] if isinstance(value, SSAValue) else value)]
        return out

    def verify_(self) -> None:
        """Descriptor of the right class and legal; operands in the memories that the descriptor uses."""
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

    def print_head(self, printer: Printer) -> None:
        """Context and text, up to the operands."""
        printer.print_string(" " + cast(StringAttr, self.properties["context"]).data + " ")
        printer.print_string_literal(format_descriptor(self.descriptor))
        printer.print_string(" (")

    def print_tail(self, printer: Printer) -> None:
        """Dependencies and location, from the end of the operands."""
        printer.print_string(")")
        if "after" in self.properties and (text := format_after(cast(AfterAttr, self.properties["after"]).data)):
            printer.print_string(" ")
            printer.print_string_literal(text)
        if location := cast(StringAttr, self.properties["location"]).data:
            printer.print_string(" at ")
            printer.print_string_literal(location)

    def print(self, printer: Printer) -> None:
        """One line: context, text, operands by role, dependencies, location."""
        self.print_head(printer)
        for i, (role, value) in enumerate(self.roles()):
            if i:
                printer.print_string(" -> " if role in ("target", "destination") else ", ")
            if role not in ("source", "target", "destination"):
                printer.print_string(role + " ")
            printer.print_ssa_value(value)
        self.print_tail(printer)

    @classmethod
    def parse(cls, parser: Parser) -> InstructionOp:
        """Inverse of `print`."""
        context = parser.parse_identifier("context")
        desc = parse_descriptor_text(parser)
        operands: dict[str, list[SSAValue]] = {role: [] for role in cls.ROLES}
        last = "destination" if "destination" in cls.ROLES else "target"
        parser.parse_punctuation("(")
        if cls.ROLES[0] == last:
            operands[last].append(parse_buffer(parser))
        else:
            operands["source"].append(parse_buffer(parser))
            while parser.parse_optional_punctuation(","):
                role = parser.parse_identifier("operand role")
                if role not in cls.ROLES:
                    parser.raise_error(f"{cls.name} has no operand {role!r}: {', '.join(cls.ROLES)}")
                operands[role].append(parse_buffer(parser))
            parser.parse_punctuation("->")
            operands[last].append(parse_buffer(parser))
        parser.parse_punctuation(")")
        after, location = parse_tail(parser)
        op = cls.build(
            operands=[operands[role] for role in cls.ROLES]
            if len(cls.ROLES) > 2
            else [operands[r][0] for r in cls.ROLES],
            properties=descriptor_properties(desc, context, location),
        )
        if after is not None:
            op.properties["after"] = after
        return op


def parse_tail(parser: Parser) -> tuple[AfterAttr | None, str]:
    """Dependencies and location behind the operands."""
    text = parser.parse_optional_str_literal()
    location = parser.parse_str_literal() if parser.parse_optional_keyword("at") else ""
    if text is None:
        return None, location
    try:
        return AfterAttr(parse_after(text)), location
    except TextError as e:
        parser.raise_error(str(e))


def descriptor_properties(desc: Descriptor, context: str, location: str) -> dict[str, Attribute]:
    """Properties that every instruction operation has."""
    return {"desc": DescriptorAttr(desc), "context": shared_string(context), "location": shared_string(location)}


@irdl_op_definition
class ExecOp(InstructionOp):
    """A Tensor Unit pass from `source` (and `second` in pair mode) to `target`, with the register-file buffers it
    reads.

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
        super().__init__(
            operands=[source, second, trf, vrf, target], properties=descriptor_properties(desc, context, location)
        )

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
        super().__init__(operands=[source, target], properties=descriptor_properties(desc, context, location))

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
        super().__init__(operands=[source, target], properties=descriptor_properties(desc, context, location))

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
        super().__init__(operands=[target], properties=descriptor_properties(desc, context, location))


@irdl_op_definition
class DmaOp(InstructionOp):
    """A tensor DMA between HBM and DM buffers; `index` is the HBM buffer of byte offsets of a gather or scatter.

    The buffer of a peer side stands for the buffer at the same address in other units: a global.
    """

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
        super().__init__(
            operands=[source, index, destination], properties=descriptor_properties(desc, context, location)
        )

    def expected_spaces(self) -> dict[str, str]:
        """As the endpoints say."""
        desc = cast(Dma, self.descriptor)
        names = {Space.HBM: "hbm", Space.DM: "dm", Space.PEER_HBM: "hbm", Space.PEER_DM: "dm"}
        return {"source": names[desc.source.space], "destination": names[desc.destination.space], "index": "hbm"}

    def touched(self) -> list[tuple[str, SSAValue]]:
        """Source, destination, index."""
        return sorted(self.roles(), key=lambda r: ("source", "destination", "index").index(r[0]))

    def verify_(self) -> None:
        """The index buffer is there exactly when the descriptor gathers or scatters."""
        if isinstance(self.descriptor, Dma) and (self.index is None) != (self.descriptor.index is None):
            raise VerifyException("operand index belongs to a gather or scatter")
        super().verify_()
