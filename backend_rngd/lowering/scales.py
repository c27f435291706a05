"""Scales of a quantized contraction, applied in the vector engine behind it (hardware.md 2.9: two float multipliers).

The sums of stored numbers are multiplied by a number per output channel, per token or for all. The numbers come through
VRF: they are f32 in HBM (per channel) or DM (per token, for all), and the sub context loads them while the pass before
runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from xdsl.ir import SSAValue

from backend_rngd.isa.descriptors import (
    DM_SLICE_STRIDE,
    Alu,
    Commit,
    Dtype,
    Mode,
    Op,
    Operand,
    Source,
    Space,
    Switch,
    SwitchKind,
    VectorOp,
)
from backend_rngd.lowering.emitter import Emitter, dm, hbm, operand_loops
from backend_rngd.lowering.tensor import RowSpace, Tensor, round_up
from backend_rngd.lowering.values import Form, Value, Weight
from ir import expr as ex
from ir.dialects import tc
from ir.dialects.tc_compute import QUANTIZED
from ir.types import elem_of

MULTIPLIERS = (Alu.FP_MUL0, Alu.FP_MUL1)
TO_FLOAT = VectorOp(Alu.FXP_TO_FP, Op.CONVERT, Mode.UNARY)
SPACING = 8  # bytes between numbers of a tensor without features: the value and its padding
CHANNEL_MULTIPLE = 64  # numbers in HBM are padded like the channels
VRF_BYTES = 4096  # of one operand, so that the next pass's operands load meanwhile


@dataclass(frozen=True)
class Scales:
    """Factors of a contraction's result: per channel (f32 in HBM, padded), per token, for all (tensors in DM)."""

    channels: SSAValue | None = None
    tokens: Tensor | None = None
    all: tuple[Tensor, ...] = ()

    @property
    def kinds(self) -> tuple[bool, bool, int]:
        """Whether there are some per channel and per token, and how many for all."""
        return self.channels is not None, self.tokens is not None, len(self.all)

    @property
    def count(self) -> int:
        """Multipliers that they take."""
        return (self.channels is not None) + (self.tokens is not None) + len(self.all)


def factors(e: ex.Expr) -> list[int] | None:
    """The operand numbers that an expression multiplies, None if it does anything else."""
    match e:
        case ex.Input(index):
            return [index]
        case ex.Call("mul", (left, right)):
            a, b = factors(left), factors(right)
            return None if a is None or b is None else [*a, *b]
        case _:
            return None


def scaling(op: tc.ContractOp) -> tuple[tc.MapOp, int] | None:
    """The only reader of a quantized contraction's sums, if it multiplies them, and the operand that they are."""
    uses = list(op.result.uses)
    if elem_of(op.lhs) not in QUANTIZED or len(uses) != 1 or not isinstance(user := uses[0].operation, tc.MapOp):
        return None
    found = factors(user.expression())
    if found is None or sorted(found) != list(range(len(user.inputs))) or len(found) > 1 + len(MULTIPLIERS):
        return None
    rule = user.rule()
    return (user, uses[0].index) if rule.inputs[uses[0].index] == rule.output else None


def scales_of(
    user: tc.MapOp,
    sums: int,
    channel: int,
    rows: RowSpace,
    ring: int,
    env: Mapping[SSAValue, Value],
    tensor: Callable[[SSAValue], Tensor],
) -> Scales | None:
    """The scales of a map that multiplies sums (its operand `sums`), None if they cannot ride behind the contraction.

    channel: dimension of the sums that is the output channel. ring: slices that exchange tokens.
    """
    rule = user.rule()
    channels: SSAValue | None = None
    tokens: Tensor | None = None
    everywhere: list[Tensor] = []
    for i, value in enumerate(user.inputs):
        held = env.get(value)
        if i == sums:
            continue
        if isinstance(held, Weight) and held.dtype == Dtype.F32 and math.prod(held.sizes) == 1:
            everywhere.append(tensor(value))
        elif isinstance(held, Weight) and held.dtype == Dtype.F32 and rule.inputs[i] == (rule.output[channel],):
            channels = held.bind(Form((0,), (1, held.sizes[0]), (1, CHANNEL_MULTIPLE)))
        elif isinstance(held, Tensor) and held.dtype == Dtype.F32 and held.rows == rows and not held.features:
            fits = rows.replicated or rows.local * ring * SPACING <= VRF_BYTES
            if tokens is not None or held.space != Space.DM or not fits:
                return None
            tokens = held
        else:
            return None
    return Scales(channels, tokens, tuple(everywhere))


class ScaleOps:
    """Emits the loads of scales and gives the operations that apply them."""

    def __init__(self, em: Emitter, scales: Scales) -> None:
        self.em = em
        self.scales = scales
        self.channels: SSAValue | None = None
        self.tokens: SSAValue | None = None
        self.ring = 0

    def load_channels(self, start: int, per_slice: int, slices: int, ring: int) -> None:
        """Bring the numbers of channels [start, start + slices * per_slice) to their slices, in every ring."""
        if self.scales.channels is None:
            return
        em, nbytes = self.em, per_slice * 4
        self.channels = em.alloc(nbytes, "scales")
        if slices < ring:  # VRF loads read every slice
            em.memset(self.channels, 0, nbytes)
        loops = [(em.slices // ring, 0, ring * DM_SLICE_STRIDE), (slices, nbytes, DM_SLICE_STRIDE)]
        em.dma(hbm(self.scales.channels, start * 4), dm(self.channels), loops, nbytes)

    def broadcast_tokens(self, ring: int) -> None:
        """Bring the numbers of a ring's tokens to its slices, in the order in which the switch delivers tokens."""
        t = self.scales.tokens
        if t is None or t.rows is None or ring == self.ring:
            return
        em, local = self.em, t.rows.local
        self.ring, self.tokens = ring, em.alloc(local * ring * SPACING, "scales")
        em.execute(
            em.fetch(t.base, [(local, t.pitch), (2, 4)], Dtype.F32, 2),
            t.buffer,
            Commit(0, ((local * ring, SPACING), (2, 4)), Dtype.F32, 2),
            self.tokens,
            switch=Switch(SwitchKind.BROADCAST01, 1, ring, local),
        )

    def few(self, per_slice: int, lanes: int, slices: int) -> list[VectorOp]:
        """Factors of a stream `[channel][lane]` whose lanes hold tokens, repeated if there are fewer."""
        found: list[Operand] = []
        if self.channels is not None:
            base = self._load(self.channels, 0, [(per_slice, 4)], slices)
            found.append(_operand(base, [(per_slice, 4), (lanes, 0)]))
        t = self.scales.tokens
        if t is not None and t.rows is not None:
            local = t.rows.local
            base = self._load(t.buffer, t.base, [(local, t.pitch), (2, 4)], slices)
            found.append(_operand(base, [(per_slice, 0), (lanes // local, 0), (local, SPACING)]))
        return self._ops(found, per_slice * lanes, slices)

    def many(self, count: int, channels: int, first: int) -> list[VectorOp]:
        """Factors of a stream `[token][channel]` of `count` tokens; `first`: of those that were loaded."""
        found: list[Operand] = []
        if self.channels is not None:
            base = self._load(self.channels, first * 4, [(channels, 4)], self.em.slices)
            found.append(_operand(base, [(count, 0), (channels, 4)]))
        if self.tokens is not None:
            base = self._load(self.tokens, 0, [(count, SPACING), (2, 4)], self.em.slices)
            found.append(_operand(base, [(count, SPACING), (channels, 0)]))
        return self._ops(found, count * channels, self.em.slices)

    def _ops(self, found: list[Operand], elements: int, slices: int) -> list[VectorOp]:
        for t in self.scales.all:
            base = self._load(t.buffer, t.base, [(2, 4)], slices)
            found.append(_operand(base, [(elements, 0)]))
        pairs = zip(MULTIPLIERS, found, strict=False)
        return [VectorOp(alu, Op.MUL, Mode.STREAM_OPERAND, operand) for alu, operand in pairs]

    def _load(self, source: SSAValue, base: int, loops: Sequence[tuple[int, int]], slices: int) -> int:
        elements = 1
        for n, _ in loops:
            elements *= n
        at = self.em.vrf_space(round_up(elements * 4, 32))
        packet = 8 if elements % 8 == 0 else 4 if elements % 4 == 0 else 2
        self.em.load_vrf(self.em.fetch(base, loops, Dtype.F32, packet), source, at, slices)
        return at


def _operand(base: int, loops: Sequence[tuple[int, int]]) -> Operand:
    return Operand(Source.VRF, base=base, loops=operand_loops(loops))
