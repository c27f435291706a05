"""`tc` (tensor contraction): what a model computes, with named axes.

Few operations. Each has an axis rule (`rule()`) that serves sharding, tiling and cost alike, a reference kernel in
`ir.kernels`, and prints one type. All are pure. Operands must be defined above their use (functions have one block),
so operand types need not be printed. This module is the whole dialect: `from ir.dialects import tc`.
"""

from __future__ import annotations

from xdsl.ir import Dialect

from ir.dialects.tc_base import TcOp, TensorResult, element_rule, own_axes, verify_expression
from ir.dialects.tc_collectives import (
    COLLECTIVE_KINDS,
    AllGatherOp,
    AllReduceOp,
    AxisIndexOp,
    CollectiveOp,
    ExchangeOp,
    LocalSliceOp,
    ReduceScatterOp,
)
from ir.dialects.tc_compute import (
    REDUCE_KINDS,
    AttentionOp,
    ContractOp,
    GatherOp,
    KvUpdateOp,
    MapOp,
    ReduceOp,
)
from ir.dialects.tc_mesh import ARG_SHARDS, MESH, PLAN, mesh_of, module_of
from ir.dialects.tc_quantized import DequantizeOp
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
    "ARG_SHARDS",
    "COLLECTIVE_KINDS",
    "MAX_CONSTANT",
    "MESH",
    "PLAN",
    "REDUCE_KINDS",
    "AllGatherOp",
    "AllReduceOp",
    "AttentionOp",
    "AxesAttr",
    "AxisIndexOp",
    "CollectiveOp",
    "ConcatOp",
    "ConstantOp",
    "ContractOp",
    "DequantizeOp",
    "ExchangeOp",
    "GatherOp",
    "KvUpdateOp",
    "LocalSliceOp",
    "MapOp",
    "ReduceOp",
    "ReduceScatterOp",
    "ReshapeOp",
    "SliceOp",
    "Tc",
    "TcOp",
    "TensorResult",
    "TransposeOp",
    "WeightOp",
    "element_rule",
    "mesh_of",
    "module_of",
    "own_axes",
    "verify_expression",
]

Tc = Dialect(
    "tc",
    [
        WeightOp,
        ConstantOp,
        ContractOp,
        DequantizeOp,
        MapOp,
        ReduceOp,
        GatherOp,
        AttentionOp,
        KvUpdateOp,
        ReshapeOp,
        TransposeOp,
        SliceOp,
        ConcatOp,
        AllReduceOp,
        AllGatherOp,
        ReduceScatterOp,
        LocalSliceOp,
        AxisIndexOp,
    ],
    [AxesAttr],
)
