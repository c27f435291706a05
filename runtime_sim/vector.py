"""The vector engine: a chain of array operations on 32-bit elements (hardware.md 2.9).

A chain is decoded once into a list of steps on a `State`; operands in VRF are strided views, so a stride-0 loop (a
value used for many elements) is never expanded.

What the public text leaves open is chosen as follows: FMA rounds twice (product, then sum); functions are those of
numpy in f32, within 2 ULP; f32 sums of REDUCE follow numpy's order; integer sums of REDUCE and CLIP_ADD saturate, those
of the fixed-point stage wrap; a NaN wins in MAX and MIN; f32 to i32 rounds to nearest even and saturates, NaN gives 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backend_rngd.isa.descriptors import OPS_OF_ALU, Alu, Dtype, Mode, Op, Operand, VectorOp
from backend_rngd.isa.descriptors import Source as From
from runtime_sim.functions import BINARY, UNARY, saturating_add, to_fixed
from runtime_sim.memory import RowMemory
from runtime_sim.nest import ALL, Lead, illegal
from runtime_sim.views import Footprint, count, extent, nd, sizes_of, split, strides_of

Array = NDArray[Any]
Binary = Callable[..., Array]


@dataclass
class State:
    """The running pass: one group of elements [A, B, C, n], or two before the zip; the stash; the part of axis A."""

    groups: list[Array]
    rows: slice
    stash: list[Array] = field(default_factory=list[Array])

    def owned(self, current: Array) -> bool:
        """Whether a result may overwrite `current` (it is not stashed)."""
        return not any(current is kept for kept in self.stash)


Step = Callable[[State], None]
Getter = Callable[[State, int], Array]


FLOAT_ALUS = frozenset({Alu.FP_FMA, Alu.FP_FPU, Alu.FP_EXP, Alu.FP_MUL0, Alu.FP_MUL1, Alu.FP_DIV, Alu.FP_TO_FXP})
TYPED_ALUS = frozenset({Alu.REDUCE, Alu.CLIP_ADD, Alu.CLIP_MAX, Alu.CLIP_MIN})  # act on what the stream holds


class Chain:
    """A decoded vector chain. After construction `elements`, `packet` and `dtype` describe its output."""

    def __init__(
        self,
        ops: tuple[VectorOp, ...],
        stash_input: bool,
        slices: Lead,
        vrf: RowMemory,
        elements: int,
        packet: int,
        dtype: Dtype,
        pair: bool,
    ) -> None:
        if dtype not in (Dtype.F32, Dtype.I32):
            raise illegal(f"vector engine on a {dtype.name} stream", "widen it in the fetch adapter")
        self.slices, self.vrf = slices, vrf
        self.elements, self.packet, self.dtype, self.pair = elements, packet, dtype, pair
        self.footprints: list[Footprint] = []
        self.stash_input = stash_input
        self._stashed = stash_input
        self.steps: list[Step] = []
        used: set[Alu] = set()
        stage = 0
        for op in ops:
            if op.alu in used:
                raise illegal(f"ALU {op.alu.name} used twice in one pass", "split the pass")
            if op.alu.stage < stage:
                raise illegal(f"{op.alu.name} (stage {op.alu.stage}) after a use of stage {stage}", "reorder or split")
            if op.op not in OPS_OF_ALU[op.alu]:
                raise illegal(f"ALU {op.alu.name} does not do {op.op.name}")
            used.add(op.alu)
            stage = op.alu.stage
            self._add(op)

    def run(self, groups: list[Array], rows: slice = ALL) -> list[Array]:
        """Run the chain on owned arrays [A, B, C, elements] (one, or two in pair mode); 32-bit results.

        rows: the part of slice axis A that the arrays hold.
        """
        state = State(groups, rows)
        if self.stash_input:
            state.stash = list(groups)
        for step in self.steps:
            step(state)
        kind = np.float32 if self.dtype is Dtype.F32 else np.int32
        return [group.view(kind) for group in state.groups]

    # Decoding --------------------------------------------------------------------------------------------------------
    def _members(self, op: VectorOp) -> tuple[int, ...]:
        if op.group == 0:
            return (0, 1) if self.pair else (0,)
        if not self.pair:
            raise illegal(f"{op.alu.name} on group {op.group - 1} of a stream that is not a pair")
        return (op.group - 1,)

    def _add(self, op: VectorOp) -> None:
        kind = self._kind(op.alu)
        if op.alu is Alu.REDUCE:
            self._add_reduce(op, kind)
        elif op.op is Op.CONVERT:
            self._add_convert(op)
        elif op.mode in (Mode.ZIP01, Mode.ZIP10):
            self._add_zip(op, kind)
        elif op.op in UNARY:
            function = UNARY[op.op]
            self._each(op, lambda state, i: function(state.groups[i].view(kind)))
        else:
            self._add_binary(op, kind)
        if op.alu in FLOAT_ALUS and op.op is not Op.CONVERT:
            self.dtype = Dtype.F32
        elif Alu.FXP_ADD <= op.alu < Alu.FXP_TO_FP:
            self.dtype = Dtype.I32

    def _kind(self, alu: Alu) -> type[np.generic]:
        if alu.stage == Alu.LOGIC_AND.stage:
            return np.uint32
        if alu in FLOAT_ALUS:
            return np.float32
        if alu in TYPED_ALUS:
            return np.float32 if self.dtype is Dtype.F32 else np.int32
        return np.int32

    def _each(self, op: VectorOp, function: Callable[[State, int], Array]) -> None:
        members = self._members(op)
        stash = op.stash
        if stash:
            self._stashed = True

        def step(state: State) -> None:
            for i in members:
                state.groups[i] = function(state, i)
            if stash:
                state.stash = [state.groups[i] for i in members]

        self.steps.append(step)

    def _add_binary(self, op: VectorOp, kind: type[np.generic]) -> None:
        function = self._function(op, kind)
        if op.mode is Mode.STREAM_STREAM:
            self._each(op, lambda state, i: self._apply(state, function, i, kind, None, False))
            return
        if op.mode is Mode.UNARY:
            raise illegal(f"{op.op.name} needs an operand")
        swap = op.mode is Mode.OPERAND_STREAM
        operand = self._operand(op, kind)
        self._each(op, lambda state, i: self._apply(state, function, i, kind, operand(state, i), swap))

    @staticmethod
    def _apply(
        state: State,
        function: Binary,
        i: int,
        kind: type[np.generic],
        operand: Array | None,
        swap: bool,
    ) -> Array:
        current = state.groups[i]
        owned = state.owned(current)
        value = current.view(kind)
        if operand is None:
            return function(value, value)
        flat = value.shape
        if operand.ndim > 4:
            value = value.reshape(*flat[:3], *operand.shape[3:])
        result_shape = np.broadcast_shapes(value.shape, operand.shape)
        target = value if owned and result_shape == value.shape else None
        left, right = (operand, value) if swap else (value, operand)
        result = function(left, right, out=target)
        return result.reshape(*result.shape[:3], flat[3])

    def _function(self, op: VectorOp, kind: type[np.generic]) -> Binary:
        if op.op is Op.FMA:
            addend = np.float32(op.operand2)

            def fma(a: Array, b: Array, out: Array | None = None) -> Array:
                product = np.multiply(a, b, out=out)
                return np.add(product, addend, out=product)

            return fma
        if op.op is Op.ADD and op.alu is Alu.CLIP_ADD and kind is np.int32:
            return saturating_add
        function = BINARY[op.op]
        if op.op is Op.LSHR and kind is np.int32:

            def logical(a: Array, b: Array, out: Array | None = None) -> Array:
                result = np.right_shift(a.view(np.uint32), np.asarray(b).view(np.uint32)).view(np.int32)
                if out is None:
                    return result
                out[...] = result
                return out

            return logical
        if op.op is Op.ASHR and kind is np.uint32:

            def arithmetic(a: Array, b: Array, out: Array | None = None) -> Array:
                result = np.right_shift(a.view(np.int32), np.asarray(b).view(np.int32)).view(np.uint32)
                if out is None:
                    return result
                out[...] = result
                return out

            return arithmetic
        return function

    def _operand(self, op: VectorOp, kind: type[np.generic]) -> Getter:
        operand = op.operand
        if operand.source is From.CONST:
            constant = _constant(operand.value, kind)
            return lambda state, i: constant
        if operand.source is From.STASH:
            if not self._stashed:
                raise illegal(f"{op.alu.name} reads a stash that was never written")
            self._stashed = False
            pair = self.pair  # it is none any more when the chain runs, if a zip follows

            def stashed(state: State, i: int) -> Array:
                if len(state.stash) == 2 and not pair:
                    raise illegal("a stash of a pair read after the zip")
                value = state.stash[i if len(state.stash) == 2 else 0]
                if value.shape[3] != state.groups[i].shape[3]:
                    raise illegal(f"stash of {value.shape[3]} elements read by {state.groups[i].shape[3]}")
                return value.view(kind)

            return stashed
        if operand.source is From.VRF:
            return self._vrf_operand(op, kind)
        raise illegal(f"{op.op.name} needs an operand")

    def _vrf_operand(self, op: VectorOp, kind: type[np.generic]) -> Getter:
        loops = _operand_loops(op.operand)
        low, high = extent(op.operand.base, loops, 4)
        self.vrf.check(low, high, f"operand of {op.alu.name}")
        self.footprints.append(Footprint.of(op.operand.base, loops, 4))
        both = self.pair and op.group == 0
        expected = self.elements * (2 if both else 1)
        if count(loops) != expected:
            raise illegal(f"VRF operand of {op.alu.name} enumerates {count(loops)} elements, the stream has {expected}")
        pitch = self.vrf.pitch
        rows = (self.slices[1] * self.slices[2] * pitch, self.slices[2] * pitch, pitch)
        if not both:
            view = nd(
                self.vrf.bytes,
                np.dtype(kind),
                op.operand.base,
                (*self.slices, *sizes_of(loops)),
                (*rows, *strides_of(loops)),
            )
            return lambda state, i: view[state.rows]
        parts = split(loops, (self.elements // self.packet, 2, self.packet))
        if parts is None or len(parts[1]) != 1:
            raise illegal(f"VRF loops {loops} do not split into packets of {self.packet} of two groups")
        step = parts[1][0][1]
        rest = (*parts[0], *parts[2])
        views = [
            nd(
                self.vrf.bytes,
                np.dtype(kind),
                op.operand.base + step * i,
                (*self.slices, *sizes_of(rest)),
                (*rows, *strides_of(rest)),
            )
            for i in (0, 1)
        ]
        return lambda state, i: views[i][state.rows]

    def _add_zip(self, op: VectorOp, kind: type[np.generic]) -> None:
        if not self.pair:
            raise illegal(f"zip in {op.alu.name} without a pair")
        function = self._function(op, kind)
        first, second = (0, 1) if op.mode is Mode.ZIP01 else (1, 0)
        stash = op.stash
        if stash:
            self._stashed = True

        def step(state: State) -> None:
            a, b = state.groups[first].view(kind), state.groups[second].view(kind)
            state.groups = [function(a, b)]
            if stash:
                state.stash = list(state.groups)

        self.steps.append(step)
        self.pair = False

    def _add_convert(self, op: VectorOp) -> None:
        if op.alu is Alu.FXP_TO_FP:
            self._each(op, lambda state, i: state.groups[i].view(np.int32).astype(np.float32))
            self.dtype = Dtype.F32
        else:
            self._each(op, lambda state, i: to_fixed(state.groups[i].view(np.float32)))
            self.dtype = Dtype.I32

    def _add_reduce(self, op: VectorOp, kind: type[np.generic]) -> None:
        size, inner = op.count, op.inner
        if size < 1 or not 1 <= inner <= 8 or self.elements % (size * inner):
            raise illegal(f"reduce of {self.elements} elements as (outer, {size}, {inner})", "inner is at most 8")
        outer = self.elements // (size * inner)
        integer = kind is np.int32

        def reduced(state: State, i: int) -> Array:
            current = state.groups[i].view(kind)
            viewed = current.reshape(*current.shape[:3], outer, size, inner)
            if op.op is Op.ADD and integer:
                total = viewed.sum(axis=4, dtype=np.int64)
                result = np.clip(total, -(2**31), 2**31 - 1).astype(np.int32)
            elif op.op is Op.ADD:
                result = viewed.sum(axis=4, dtype=np.float32)
            else:
                result = (np.max if op.op is Op.MAX else np.min)(viewed, axis=4)
            return result.reshape(*current.shape[:3], outer * inner)

        self._each(op, reduced)
        self.elements, self.packet = outer * inner, inner


def _operand_loops(operand: Operand) -> tuple[tuple[int, int], ...]:
    return tuple(loop for loop in operand.loops if loop[0] != 1) or ((1, 4),)


def _constant(value: float, kind: type[np.generic]) -> Array:
    if kind is np.float32:
        return np.asarray(np.float32(value))
    bits = int(value) & 0xFFFFFFFF
    return np.asarray(np.uint32(bits)).view(np.dtype(kind))
