"""Which values of a module are made of weights only, so that nothing of them depends on the inputs."""

from __future__ import annotations

from xdsl.dialects import func
from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import SSAValue

from ir.dialects import tc


def static_values(module: ModuleOp) -> set[SSAValue]:
    """The values that are made of weights and constants only; arguments if they are in every call."""
    found: set[SSAValue] = set()
    functions = {f.sym_name.data: f for f in module.ops if isinstance(f, func.FuncOp)}
    calls = [op for op in module.walk() if isinstance(op, func.CallOp)]
    main = [f for f in functions.values() if not any(c.callee.string_value() == f.sym_name.data for c in calls)]
    for function in main:
        _static(function, found)
    varying = {
        functions[c.callee.string_value()].body.block.args[i]
        for c in calls
        for i, o in enumerate(c.operands)
        if o not in found
    }
    for name in {c.callee.string_value() for c in calls}:
        function = functions[name]
        found |= set(function.body.block.args) - varying
        _static(function, found)
    return found


def _static(function: func.FuncOp, found: set[SSAValue]) -> None:
    for op in function.body.block.ops:
        if isinstance(op, tc.TcOp) and all(o in found for o in op.operands):
            found |= set(op.results)
