"""`rngdc opt` with everything the backend adds, and lowering as a pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp
from xdsl.passes import ModulePass

from backend_rngd.machine import load_machine
from backend_rngd.registry import get_rngd_dialects, get_rngd_passes
from ir.errors import Problem, UserError
from ir.text import print_module
from passes.opt import opt_main as run_opt
from passes.registry import PassFactory


@dataclass(frozen=True)
class RngdLower(ModulePass):
    """A specialised `tc` module becomes an `rngd` module; `capacity` and `batch` are the geometry of the KV cache,
    `opt` is the level of optimisation."""

    name = "rngd-lower"
    machine: str = "rngd"
    capacity: int = 0
    batch: int = 1
    opt: int = 2

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        """Replace the functions by routines."""
        from backend_rngd.lowering import LoweringOptions, lower

        machine = load_machine(self.machine)
        options = LoweringOptions(machine.slices_per_pe, self.capacity, self.batch, opt_level=self.opt)
        _replace(op, lower(op, machine, options).module)


def _replace(module: ModuleOp, by: ModuleOp) -> None:
    """Give a module the contents of another."""
    for old in list(module.body.block.ops):
        module.body.block.erase_op(old, safe_erase=False)
    for new in list(by.body.block.ops):
        new.detach()
        module.body.block.add_op(new)


@dataclass(frozen=True)
class RngdHoist(ModulePass):
    """Weights are fetched while earlier passes compute, see `backend_rngd.hoist`."""

    name = "rngd-hoist"
    machine: str = "rngd"

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        """Move the transfers."""
        from backend_rngd.hoist import hoist

        hoist(op, load_machine(self.machine))


@dataclass(frozen=True)
class RngdEmit(ModulePass):
    """Streams of a scheduled module, and every static check of them; the module stays as it is."""

    name = "rngd-emit"
    machine: str = "rngd"

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        """Emit and verify."""
        from backend_rngd.emit import emit
        from rngdc.compile import verified

        machine = load_machine(self.machine)
        verified("module", emit(op, machine, machine.slices_per_pe), machine)


@dataclass(frozen=True)
class RngdCompile(ModulePass):
    """All that a build does with a bucket behind the passes of `tc`: lowering to the verified stream, with the map of
    HBM and the options that `task` (a JSON file, written when a build failed) holds. The scheduled module is left."""

    name = "rngd-compile"
    task: str

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        """Do it, and replace the module by what was emitted."""
        from rngdc.compile import scheduled
        from rngdc.reproduce import load_task

        task = load_task(Path(self.task), print_module(op))
        done = task.run(lambda _: None)
        if done.problems:
            raise UserError([Problem(*p) for p in done.problems])
        assert done.variant is not None
        _replace(op, scheduled(task, done.variant))


def opt_main(argv: Sequence[str]) -> int:
    """Run the tool; returns the exit status."""
    own: dict[str, PassFactory] = {
        "rngd-lower": lambda: RngdLower,
        "rngd-hoist": lambda: RngdHoist,
        "rngd-emit": lambda: RngdEmit,
        "rngd-compile": lambda: RngdCompile,
    }
    return run_opt(argv, get_rngd_dialects(), own | get_rngd_passes())
