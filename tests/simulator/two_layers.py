"""A program of two layers for two units: a matrix product, an exchange, an element-wise step."""

from __future__ import annotations

import streams

from backend_rngd.isa.descriptors import (
    After,
    Call,
    Commit,
    Context,
    Contract,
    Dtype,
    Exec,
    Fetch,
    Instruction,
    LaneMode,
    LoadTrf,
    Routine,
    Stream,
)

SLICES, UNITS = 4, 2
LOCATIONS = (
    "model.layers.0|func.call", "model.layers.1|func.call", "self_attn.q_proj|tc.contract", "mlp|tc.all_reduce",
    "mlp.down_proj|tc.map",
)  # fmt: skip
PRODUCT, EXCHANGE, MAP = 2, 3, 4
BF16 = Fetch(0, ((16, 32), (16, 2)), Dtype.BF16, 16)  # one flit a packet
CONTRACT = Contract(8, 1, 0, ((16, 0, 0),), 16, 4, LaneMode.INTERLEAVED)
RESULT = Commit(4096, ((128, 4),), Dtype.F32, 8)


def block() -> list[Instruction]:
    """Load, matrix product with operands from TRF, exchange between two units, element-wise step."""
    return [
        Instruction(Context.DMA, After(), streams.load(0), PRODUCT),
        Instruction(Context.DMA, After(), streams.load(256), PRODUCT),
        Instruction(Context.SUB, After(dma=2), LoadTrf(SLICES, BF16, 8, 0), PRODUCT),
        Instruction(Context.MAIN, After(sub=1, dma=2), Exec(SLICES, BF16, RESULT, None, CONTRACT), PRODUCT),
        Instruction(Context.DMA, After(main=1), streams.notify(UNITS, 0, (4096, 256)), EXCHANGE),
        Instruction(Context.DMA, After(), streams.wait(UNITS, 0), EXCHANGE),
        Instruction(Context.DMA, After(), streams.pull(UNITS, 4096, 8192), EXCHANGE),
        Instruction(Context.DMA, After(), streams.notify(UNITS, 1), EXCHANGE),
        Instruction(Context.DMA, After(), streams.wait(UNITS, 1, (4096, 256)), EXCHANGE),
        Instruction(Context.MAIN, After(main=1, dma=5), streams.scale(8192, 16384, 2.0), MAP),
        Instruction(Context.DMA, After(main=2), streams.store(16384), MAP),
    ]


def program(body: list[Instruction]) -> Stream:
    """The block for two layers."""
    calls = tuple(Instruction(Context.CONTROL, After(call=n), Call(1, ()), n) for n in range(2))
    return Stream(0, SLICES, (Routine("main", calls), Routine("block_0", tuple(body))), LOCATIONS)
