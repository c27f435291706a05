"""Legal descriptors to vary, streams of them, and hypothesis strategies for arbitrary ones."""

from __future__ import annotations

import dataclasses
import types
from enum import IntEnum
from typing import Any, Union, get_args, get_origin, get_type_hints

from hypothesis import strategies as st

from backend_rngd.isa.descriptors import (
    BROADCAST,
    DM_SLICE_STRIDE,
    REDUCE,
    After,
    Alu,
    Commit,
    Context,
    Contract,
    Descriptor,
    Dma,
    Dtype,
    Endpoint,
    Exec,
    Fetch,
    Index,
    Instruction,
    LaneMode,
    LoadTrf,
    LoadVrf,
    Memset,
    Mode,
    Notify,
    Op,
    Operand,
    Routine,
    Source,
    Space,
    Stream,
    Switch,
    SwitchKind,
    VectorOp,
    Wait,
)

SLICES = 64


def copy_pass(source: int = 0, target: int = 4096, elements: int = 64) -> Exec:
    """f32 elements from one place of DM to another."""
    return Exec(SLICES, Fetch(source, ((elements, 4),), Dtype.F32, 8), Commit(target, ((elements, 4),), Dtype.F32, 8))


def chain(*ops: VectorOp, elements: int = 64, stash_input: bool = False, second: bool = False) -> Exec:
    """A vector pass over f32 elements, in pair mode if `second`."""
    fetch = Fetch(0, ((elements, 4),), Dtype.F32, 8, None, (16384, (4,)) if second else None)
    return Exec(SLICES, fetch, Commit(8192, ((elements, 4),), Dtype.F32, 8), vector=ops, stash_input=stash_input)


def constant(alu: Alu, op: Op, value: float = 2.0, mode: Mode = Mode.STREAM_OPERAND, **more: Any) -> VectorOp:
    """An ALU with a constant operand."""
    return VectorOp(alu, op, mode, Operand(Source.CONST, value), **more)


def reduce_pass(count: int = 64, inner: int = 1, outer: int = 4) -> Exec:
    """Sums of `count` f32 elements."""
    elements = outer * count * inner
    kept = ((outer * 2, 4),) if inner == 1 else ((outer * inner, 4),)
    return Exec(
        SLICES,
        Fetch(0, ((elements, 4),), Dtype.F32, 8),
        Commit(65536, kept, Dtype.F32, 2 if inner == 1 else inner),
        vector=(VectorOp(Alu.REDUCE, Op.ADD, Mode.UNARY, count=count, inner=inner),),
    )


def matmul(tokens: int = 4, k: int = 128, channels: int = 16, **changes: Any) -> Exec:
    """Tokens stream against 8 lanes x `channels` / 8 channels in TRF; fields of Contract in `changes`."""
    loops = ((tokens, 0, 0), (k // 32, 64, REDUCE), (channels // 8, k * 2, BROADCAST))
    contract = Contract(8, 2, 0, loops, 32, 5, LaneMode.INTERLEAVED)
    return Exec(
        SLICES,
        Fetch(0, ((tokens * k, 2),), Dtype.BF16, 32),
        Commit(32768, ((tokens * channels, 4),), Dtype.F32, 8),
        contract=dataclasses.replace(contract, **changes),
    )


def ring(packets: int = 4, slices: int = 64, **changes: Any) -> Exec:
    """Every slice receives 32 B packets of all slices of a ring."""
    switch = dataclasses.replace(Switch(SwitchKind.BROADCAST01, 1, slices, packets), **changes)
    copies = switch.slice1 * switch.slice0 if switch.kind == SwitchKind.BROADCAST01 else switch.slice1
    if switch.kind in (SwitchKind.TRANSPOSE, SwitchKind.INTER_TRANSPOSE):
        copies = 1
    return Exec(
        SLICES,
        Fetch(0, ((packets * 16, 2),), Dtype.BF16, 16),
        Commit(8192, ((packets * copies * 16, 2),), Dtype.BF16, 16),
        switch,
    )


def load(nbytes: int = 1024, source: int = 4096, target: int = 0) -> Dma:
    """Consecutive pieces of HBM to consecutive slices."""
    loops = ((SLICES, nbytes, DM_SLICE_STRIDE),)
    return Dma(Endpoint(Space.HBM, source), Endpoint(Space.DM, target), loops, nbytes)


def store(nbytes: int = 1024, source: int = 0, target: int = 1 << 20) -> Dma:
    """The inverse of `load`."""
    loops = ((SLICES, DM_SLICE_STRIDE, nbytes),)
    return Dma(Endpoint(Space.DM, source), Endpoint(Space.HBM, target), loops, nbytes)


def gather_of(rows: int = 4) -> Dma:
    """Rows of an HBM table at byte offsets from HBM."""
    loops = ((SLICES, 0, DM_SLICE_STRIDE), (rows, 0, 256))
    return Dma(Endpoint(Space.HBM, 0), Endpoint(Space.DM, 0), loops, 256, Index(0, 1 << 20, (8 * rows, 8), False))


def trf(elements: int = 2048, source: int = 0, base: int = 0, lanes: int = 8) -> LoadTrf:
    """bf16 into TRF."""
    return LoadTrf(SLICES, Fetch(source, ((elements, 2),), Dtype.BF16, 16), lanes, base)


def vrf(elements: int = 64, source: int = 0, base: int = 0) -> LoadVrf:
    """f32 into VRF."""
    return LoadVrf(SLICES, Fetch(source, ((elements, 4),), Dtype.F32, 8), base)


CONTEXT_OF: dict[type, Context] = {
    Exec: Context.MAIN,
    LoadTrf: Context.SUB,
    LoadVrf: Context.SUB,
    Memset: Context.SUB,
    Dma: Context.DMA,
    Notify: Context.DMA,
    Wait: Context.DMA,
}


def instruction(what: Descriptor, after: After | None = None, context: Context | None = None) -> Instruction:
    """In its usual context."""
    return Instruction(context or CONTEXT_OF.get(type(what), Context.CONTROL), after or After(), what, 0)


def stream(*routines: list[Instruction], slices: int = SLICES) -> Stream:
    """Routines r0 (the entry), r1, ..."""
    return Stream(0, slices, tuple(Routine(f"r{i}", tuple(body)) for i, body in enumerate(routines)), ("here",))


# Hypothesis ----------------------------------------------------------------------------------------------------------
def values(kind: Any) -> st.SearchStrategy[Any]:
    """Any value of a field type of the descriptors, legal or not."""
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        return st.one_of(*[st.none() if a is type(None) else values(a) for a in get_args(kind)])
    if origin is tuple:
        arguments = get_args(kind)
        if arguments[-1] is Ellipsis:
            return st.lists(values(arguments[0]), max_size=3).map(tuple)
        return st.tuples(*[values(a) for a in arguments])
    if kind is bool:
        return st.booleans()
    if kind is int:
        return st.integers(-(1 << 62), 1 << 62)
    if kind is float:
        return st.floats(allow_nan=False)
    if kind is str:
        return st.text(max_size=12)
    if isinstance(kind, type) and issubclass(kind, IntEnum):
        return st.sampled_from(list(kind))
    hints = get_type_hints(kind)
    return st.builds(kind, **{f.name: values(hints[f.name]) for f in dataclasses.fields(kind)})


def descriptors() -> st.SearchStrategy[Descriptor]:
    """Any descriptor."""
    return values(Descriptor)


def counts() -> st.SearchStrategy[After]:
    """Any dependencies (32-bit counts)."""
    small = st.integers(0, (1 << 31) - 1)
    return st.builds(After, small, small, small, small, st.booleans())


def streams() -> st.SearchStrategy[Stream]:
    """Any stream, legal or not."""
    instructions = st.builds(
        Instruction, st.sampled_from(list(Context)), counts(), descriptors(), st.integers(0, 1 << 20)
    )
    routines = st.builds(Routine, st.text(max_size=8), st.lists(instructions, max_size=4).map(tuple))
    return st.builds(
        Stream,
        st.integers(0, 7),
        st.integers(1, 256),
        st.lists(routines, max_size=3).map(tuple),
        st.lists(st.text(max_size=20), max_size=3).map(tuple),
    )
