"""`rngdc opt` with the dialect and the passes of the backend: `rngd-lower`, `rngd-place`, `rngd-schedule`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import Dialect
from xdsl.passes import ModulePass

from backend_rngd.dialect import RNGD
from backend_rngd.lowering import LoweringOptions, lower
from backend_rngd.machine import load_machine
from backend_rngd.place import place
from backend_rngd.schedule import schedule
from passes.opt import opt_main as run_opt
from passes.registry import PassFactory


@dataclass(frozen=True)
class Lower(ModulePass):
    """A specialised `tc` module becomes an `rngd` module; `capacity` and `batch` are the geometry of the KV cache."""

    name = "rngd-lower"
    machine: str = "rngd"
    capacity: int = 0
    batch: int = 1

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        """Replace the functions by routines."""
        machine = load_machine(self.machine)
        options = LoweringOptions(machine.slices_per_pe, self.capacity, self.batch)
        lowered = lower(op, machine, options).module
        for old in list(op.body.block.ops):
            op.body.block.erase_op(old, safe_erase=False)
        for new in list(lowered.body.block.ops):
            new.detach()
            op.body.block.add_op(new)


@dataclass(frozen=True)
class Place(ModulePass):
    """Give every buffer an address."""

    name = "rngd-place"
    machine: str = "rngd"

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        """Set the addresses."""
        place(op, load_machine(self.machine))


@dataclass(frozen=True)
class Schedule(ModulePass):
    """Set the dependencies of every instruction."""

    name = "rngd-schedule"

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        """Set `after`."""
        schedule(op)


PASSES: dict[str, PassFactory] = {
    "rngd-lower": lambda: Lower,
    "rngd-place": lambda: Place,
    "rngd-schedule": lambda: Schedule,
}


def _dialect() -> Dialect:
    return RNGD


def opt_main(argv: Sequence[str]) -> int:
    """Run the tool; returns the exit status."""
    return run_opt(argv, {"rngd": _dialect}, PASSES)
