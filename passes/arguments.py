"""The names of function arguments, and what they tell: caches, token numbers."""

from __future__ import annotations

from xdsl.dialects.func import FuncOp
from xdsl.ir import Operation, SSAValue

from ir.dialects import tc
from ir.interpreter import names_of

INPUT_IDS = "input_ids"
"""The argument of @main with token numbers."""


def argument_name(value: SSAValue) -> str:
    """The name of a function's argument in `arg_names`; empty for other values."""
    block = value.owner
    if isinstance(block, Operation):
        return ""
    function = block.parent_op()
    if not isinstance(function, FuncOp):
        return ""
    return names_of(function, "arg_names", len(block.args))[next(i for i, a in enumerate(block.args) if a is value)]


def is_cache(value: SSAValue) -> bool:
    """Whether a value is an argument with cached keys or values."""
    return argument_name(value).startswith("cache.")


def is_vocabulary(op: tc.GatherOp) -> bool:
    """Whether a gather looks up tokens: its indices are the input ids. Position tables stay whole."""
    return argument_name(op.indices) == INPUT_IDS
