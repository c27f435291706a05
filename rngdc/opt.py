"""`rngdc opt` with everything the backend adds, and lowering as a pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp
from xdsl.passes import ModulePass

from backend_rngd.machine import load_machine
from backend_rngd.registry import get_rngd_dialects, get_rngd_passes
from passes.opt import opt_main as run_opt
from passes.outline import Outline
from passes.registry import PassFactory


@dataclass(frozen=True)
class RngdLower(ModulePass):
    """A specialised `tc` module becomes an `rngd` module; `capacity` and `batch` are the geometry of the KV cache."""

    name = "rngd-lower"
    machine: str = "rngd"
    capacity: int = 0
    batch: int = 1

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        """Replace the functions by routines."""
        from backend_rngd.lowering import LoweringOptions, lower

        machine = load_machine(self.machine)
        options = LoweringOptions(machine.slices_per_pe, self.capacity, self.batch)
        lowered = lower(op, machine, options).module
        for old in list(op.body.block.ops):
            op.body.block.erase_op(old, safe_erase=False)
        for new in list(lowered.body.block.ops):
            new.detach()
            op.body.block.add_op(new)


@dataclass(frozen=True)
class RngdHoist(ModulePass):
    """Weights are fetched while earlier passes compute, see `backend_rngd.hoist`."""

    name = "rngd-hoist"
    machine: str = "rngd"

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        """Move the transfers."""
        from backend_rngd.hoist import hoist

        hoist(op, load_machine(self.machine))


def opt_main(argv: Sequence[str]) -> int:
    """Run the tool; returns the exit status."""
    own: dict[str, PassFactory] = {
        "outline": lambda: Outline,
        "rngd-lower": lambda: RngdLower,
        "rngd-hoist": lambda: RngdHoist,
    }
    return run_opt(argv, get_rngd_dialects(), own | get_rngd_passes())
