"""Operations that order the units of a program: notify, wait, and the registers in which units differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, cast

from xdsl.dialects.builtin import ArrayAttr, IntegerAttr, i64
from xdsl.ir import SSAValue
from xdsl.irdl import (
    AttrSizedOperandSegments,
    IRDLOperation,
    irdl_op_definition,
    prop_def,
    var_operand_def,
)
from xdsl.parser import Parser
from xdsl.printer import Printer
from xdsl.utils.exceptions import VerifyException

from backend_rngd.attributes import (
    BufferType,
    bytes_of,
    parse_buffer,
    parse_descriptor_text,
    shared_integer,
    space_of,
)
from backend_rngd.instructions import InstructionOp, descriptor_properties, parse_tail
from backend_rngd.isa.descriptors import Descriptor, Notify, Wait
from backend_rngd.machine import load_machine

RANGE_BYTES = 8  # published and released buffers are whole pieces of this many bytes


class SyncOp(InstructionOp):
    """What notify and wait share: buffers whose DM bytes become ranges of the descriptor at emission.

    Printed as `rngd.wait dma "wait(semaphore=1 count=3)" (%released, arrived %b)`. HBM buffers may be listed too; their
    order follows from the DMA context alone.
    """

    def verify_(self) -> None:
        """Legal; buffers in DM or HBM; the descriptor has no ranges of its own."""
        desc = self.descriptor
        if isinstance(desc, (Notify, Wait)) and (desc.ranges or (isinstance(desc, Wait) and desc.arrived)):
            raise VerifyException("ranges are given as buffers")
        for role, value in self.roles():
            if space_of(value) not in ("dm", "hbm"):
                raise VerifyException(f"operand {role} must lie in dm or hbm, not in {space_of(value)}")
            if bytes_of(value) % RANGE_BYTES:
                raise VerifyException(f"operand {role} has {bytes_of(value)} B, not a multiple of {RANGE_BYTES}")
        super().verify_()

    def expected_spaces(self) -> dict[str, str]:
        """Several are possible, see `verify_`."""
        return {}

    def print(self, printer: Printer) -> None:
        """Context, text, buffers (those of the first role without a name), dependencies, location."""
        self.print_head(printer)
        for i, (role, value) in enumerate(self.roles()):
            printer.print_string(", " if i else "")
            if role != self.ROLES[0]:
                printer.print_string(role + " ")
            printer.print_ssa_value(value)
        self.print_tail(printer)

    @classmethod
    def parse(cls, parser: Parser) -> SyncOp:
        """Inverse of `print`."""
        context = parser.parse_identifier("context")
        desc = parse_descriptor_text(parser)
        operands: dict[str, list[SSAValue]] = {role: [] for role in cls.ROLES}

        def operand() -> None:
            role = parser.parse_optional_identifier() or cls.ROLES[0]
            if role not in operands:
                parser.raise_error(f"{cls.name} has no operand {role!r}: {', '.join(cls.ROLES)}")
            operands[role].append(parse_buffer(parser))

        parser.parse_comma_separated_list(parser.Delimiter.PAREN, operand)
        after, location = parse_tail(parser)
        op = cls.build(
            operands=[operands[role] for role in cls.ROLES], properties=descriptor_properties(desc, context, location)
        )
        if after is not None:
            op.properties["after"] = after
        return op


@irdl_op_definition
class NotifyOp(SyncOp):
    """Raise a semaphore of other units once all transfers before it are complete and `published` buffers are written.

    ```mlir
    rngd.notify dma "notify(register=0 base=0 units=[4:1] semaphore=1)" (%partial)
    ```
    """

    name = "rngd.notify"
    KIND: ClassVar[type] = Notify
    ROLES: ClassVar[tuple[str, ...]] = ("published",)
    published = var_operand_def(BufferType)

    def __init__(self, desc: Notify, published: Sequence[SSAValue] = (), context: str = "dma", location: str = ""):
        super().__init__(operands=[list(published)], properties=descriptor_properties(desc, context, location))


@irdl_op_definition
class WaitOp(SyncOp):
    """Block the DMA context until other units have notified.

    `released`: buffers that these units have finished reading, so that they may be written again. `arrived`: buffers
    that these units have written.

    ```mlir
    rngd.wait dma "wait(semaphore=1 count=3)" (%partial)
    ```
    """

    name = "rngd.wait"
    KIND: ClassVar[type] = Wait
    ROLES: ClassVar[tuple[str, ...]] = ("released", "arrived")
    released = var_operand_def(BufferType)
    arrived = var_operand_def(BufferType)
    irdl_options = (AttrSizedOperandSegments(as_property=True),)

    def __init__(
        self,
        desc: Wait,
        released: Sequence[SSAValue] = (),
        arrived: Sequence[SSAValue] = (),
        context: str = "dma",
        location: str = "",
    ):
        super().__init__(
            operands=[list(released), list(arrived)], properties=descriptor_properties(desc, context, location)
        )


def merged_ranges(ranges: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """(offset, bytes) sorted, with ranges that overlap or touch joined."""
    out: list[tuple[int, int]] = []
    for offset, nbytes in sorted(ranges):
        if out and offset <= out[-1][0] + out[-1][1]:
            first, size = out[-1]
            out[-1] = (first, max(size, offset + nbytes - first))
        else:
            out.append((offset, nbytes))
    return tuple(out)


@irdl_op_definition
class LaunchOp(IRDLOperation):
    """A register that the host sets before the program starts, to one value in each unit of the group.

    Exists because all units run the same stream: whatever differs from unit to unit is an address in such a register,
    counted down from the last one. Only peer sides of transfers and notifies read it.

    ```mlir
    rngd.launch register 63 values [0, 1099511627776]
    ```
    """

    name = "rngd.launch"
    register = prop_def(IntegerAttr)
    values = prop_def(ArrayAttr[IntegerAttr])

    def __init__(self, register: int, values: Sequence[int]):
        super().__init__(
            properties={
                "register": shared_integer(register),
                "values": ArrayAttr([IntegerAttr(value, i64) for value in values]),
            }
        )

    @property
    def number(self) -> int:
        """The register."""
        return self.register.value.data

    @property
    def value_list(self) -> tuple[int, ...]:
        """Value by unit."""
        return tuple(value.value.data for value in self.values)

    def verify_(self) -> None:
        """A register that exists and is not zero; a value for every unit."""
        if not 0 < self.number < load_machine().registers:
            raise VerifyException(f"no register {self.number}: 1 to {load_machine().registers - 1}")
        if not self.value_list or min(self.value_list) < 0:
            raise VerifyException("a launch register has one value of at least 0 for every unit")

    def print(self, printer: Printer) -> None:
        """`register n values [a, b, ...]`."""
        values = ", ".join(map(str, self.value_list))
        printer.print_string(f" register {self.number} values [{values}]")

    @classmethod
    def parse(cls, parser: Parser) -> LaunchOp:
        """Inverse of `print`."""
        parser.parse_keyword("register")
        register = parser.parse_integer()
        parser.parse_keyword("values")
        return cls(register, parser.parse_comma_separated_list(parser.Delimiter.SQUARE, parser.parse_integer))


def descriptor_with_ranges(op: SyncOp, ranges: dict[str, list[tuple[int, int]]]) -> Descriptor:
    """The descriptor of a notify or wait with the DM ranges of its operands by role."""
    found = {role: merged_ranges(given) for role, given in ranges.items()}
    desc = op.descriptor
    if isinstance(op, NotifyOp):
        notify = cast(Notify, desc)
        return Notify(notify.register, notify.base, notify.units, notify.semaphore, found["published"])
    wait = cast(Wait, desc)
    return Wait(wait.semaphore, wait.count, found["released"], found["arrived"])
