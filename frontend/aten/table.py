"""The table itself: how rules are registered and called, and the helpers that most of them share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.fx import Node

from frontend.emit import Emitter, NoRuleError, Splat, Value, View
from ir import expr as ex
from ir.axes import Dim

ELEMENTS: dict[torch.dtype, str] = {
    torch.bfloat16: "bf16",
    torch.float32: "f32",
    torch.int64: "i32",
    torch.int32: "i32",
    torch.bool: "i1",
}
"""Element types; capture narrows int64 to i32, which positions and token ids never exceed."""

Rule = Callable[..., Any]
TABLE: dict[Any, Rule] = {}
NO_RULE = "no rule for it in the ATen table"


class Meta:
    """Shape and element type of a node's result, with symbolic sizes by name."""

    def __init__(self, node: Node, symbols: dict[Any, str]) -> None:
        value = node.meta["val"]
        self.symbols = symbols
        self.value = value
        if isinstance(value, torch.Tensor):
            if value.dtype not in ELEMENTS:
                raise NoRuleError(f"element type {value.dtype}")
            self.elem = ELEMENTS[value.dtype]
            self.shape = self.dims(value.shape)

    def dims(self, shape: Sequence[Any]) -> tuple[Dim, ...]:
        """A traced shape with its symbolic sizes by name."""
        return tuple(dim_name(s, self.symbols) for s in shape)


def dim_name(size: Any, symbols: dict[Any, str]) -> Dim:
    """An int, or a product of known symbols such as `B*S`."""
    if isinstance(size, int):
        return size
    expr = size.node.expr
    if expr.is_Integer:
        return int(expr)
    factors = expr.args if expr.is_Mul else (expr,)
    numbers = math.prod(int(f) for f in factors if f.is_Integer)
    names = [symbols[f] for f in factors if f in symbols]
    if len(names) + sum(1 for f in factors if f.is_Integer) != len(factors):
        raise NoRuleError(f"a dimension of size {expr}, which is no product of B, S and KV")
    order = {"B": 0, "S": 1, "KV": 2}
    text = "*".join(sorted(names, key=lambda n: order[n]))
    return f"{text}*{numbers}" if numbers != 1 else text


def rule(*targets: Any) -> Callable[[Rule], Rule]:
    """Register a rule for some operators."""

    def register(function: Rule) -> Rule:
        for target in targets:
            TABLE[target] = function
        return function

    return register


def convert(emitter: Emitter, node: Node, args: Sequence[Any], kwargs: dict[str, Any], symbols: dict[Any, str]) -> Any:
    """The value of one call_function node. Raises NoRuleError if there is no rule for it."""
    function = TABLE.get(node.target)
    if function is None:
        raise NoRuleError(NO_RULE)
    return function(emitter, Meta(node, symbols), *args, **kwargs)


def number(value: Any) -> Value:
    """An operand that may be a Python number."""
    return value if isinstance(value, (View, Splat)) else Splat(float(value), (), "f32")


def axis(index: int, rank: int) -> int:
    """A possibly negative axis as a non-negative one."""
    return index + rank if index < 0 else index


def elementwise(emitter: Emitter, meta: Meta, expr: str, *operands: Any) -> Value:
    """A map with the node's result type; constants stay constants."""
    values = [number(v) for v in operands]
    if all(isinstance(v, Splat) for v in values):
        folded = ex.evaluate(ex.parse(expr), [np.asarray(v.value) for v in values if isinstance(v, Splat)])
        return Splat(round_to(float(folded), meta.elem), meta.shape, meta.elem)
    covered = all(
        any(
            len(meta.shape) - i <= len(v.shape) and v.shape[i - len(meta.shape)] == s
            for v in values
            if isinstance(v, View)
        )
        for i, s in enumerate(meta.shape)
    )
    if not covered:
        raise NoRuleError("a broadcast to the shape of a constant")
    return emitter.map(expr, values, meta.shape, meta.elem)


def round_to(value: float, elem: str) -> float:
    """A Python number as the element type stores it."""
    dtype = next(d for d, e in ELEMENTS.items() if e == elem)
    return float(torch.tensor(value, dtype=dtype))
