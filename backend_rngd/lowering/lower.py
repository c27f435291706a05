"""Entry of the lowering: a specialised `tc` module becomes an `rngd` module and what the host must know to run it."""

from __future__ import annotations

from xdsl.dialects.builtin import ModuleOp

from backend_rngd.lowering.context import Program
from backend_rngd.lowering.entry import EntryLowering
from backend_rngd.lowering.program import Lowered, LoweringOptions
from backend_rngd.machine import Machine


def lower(module: ModuleOp, machine: Machine, options: LoweringOptions | None = None) -> Lowered:
    """Lower a specialised `tc` module (all sizes static) with entry `@main`, or its only function.

    Raises UnsupportedError for what has no mapping yet.
    """
    program = Program(module, machine, options or LoweringOptions())
    main = program.functions.get("main") or next(iter(program.functions.values()))
    EntryLowering(program, main, program.main).run()
    return program.out
