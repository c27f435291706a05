"""`tc` (tensor contraction): what a model computes, with named axes.

Few operations. Each has an axis rule (`rule()`) that serves sharding, tiling and cost alike, a reference kernel in
`ir.kernels`, and prints one type. All are pure. Operands must be defined above their use (functions have one block),
so operand types need not be printed. This module is the whole dialect: `from ir.dialects import tc`.
"""

from __future__ import annotations

from xdsl.ir import Dialect

from ir.dialects.tc_base import TcOp, TensorResult, element_rule, own_axes, verify_expression
from ir.dialects.tc_compute import (
    REDUCE_KINDS,
    AttentionOp,
    ContractOp,
    GatherOp,
    KvUpdateOp,
    MapOp,
    ReduceOp,
)
from ir.dialects.tc_values import (
    MAX_CONSTANT,
    ConcatOp,
    ConstantOp,
    ReshapeOp,
    SliceOp,
    TransposeOp,
    WeightOp,
)
from ir.types import AxesAttr

__all__ = [
    "MAX_CONSTANT",
    "REDUCE_KINDS",
    "AttentionOp",
    "AxesAttr",
    "ConcatOp",
    "ConstantOp",
    "ContractOp",
    "GatherOp",
    "KvUpdateOp",
    "MapOp",
    "ReduceOp",
    "ReshapeOp",
    "SliceOp",
    "Tc",
    "TcOp",
    "TensorResult",
    "TransposeOp",
    "WeightOp",
    "element_rule",
    "own_axes",
    "verify_expression",
]

Tc = Dialect(
    "tc",
    [
        WeightOp,
        ConstantOp,
        ContractOp,
        MapOp,
        ReduceOp,
        GatherOp,
        AttentionOp,
        KvUpdateOp,
        ReshapeOp,
        TransposeOp,
        SliceOp,
        ConcatOp,
    ],
    [AxesAttr],
)
