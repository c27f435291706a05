"""The operators of `frontend.interfaces`: attention and KV cache update."""

from __future__ import annotations

import torch

import frontend.interfaces  # registers torch.ops.rngd  # noqa: F401  # pyright: ignore[reportUnusedImport]
from frontend.aten.table import Meta, rule
from frontend.emit import Emitter, Value
from ir.dialects import tc
from ir.types import tensor_type


@rule(torch.ops.rngd.kv_update.default)
def _kv_update(e: Emitter, m: Meta, cache: Value, new: Value, slots: Value) -> Value:
    operands = (e.tensor(cache).ssa, e.tensor(new).ssa, e.tensor(slots).ssa)
    return e.insert(tc.KvUpdateOp(*operands, tensor_type(m.elem, m.shape)), m.shape, m.elem)


@rule(torch.ops.rngd.attention.default)
def _attention(
    e: Emitter,
    m: Meta,
    query: Value,
    key: Value,
    value: Value,
    positions: Value,
    lengths: Value | None,
    bias: Value | None,
    sinks: Value | None,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
) -> Value:
    optional = [None if v is None else e.tensor(v).ssa for v in (lengths, bias, sinks)]
    op = tc.AttentionOp(
        *(e.tensor(v).ssa for v in (query, key, value, positions)),
        lengths=optional[0],
        bias=optional[1],
        sinks=optional[2],
        scale=float(scale),
        causal=causal,
        window=window,
        softcap=float(softcap),
        type=tensor_type(m.elem, m.shape),
    )
    return e.insert(op, m.shape, m.elem)
