"""Every rule has an instruction or stream that breaks it and nothing else, so a rule that is switched off fails
here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace as put

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from isa_builders import (
    SLICES,
    chain,
    constant,
    copy_pass,
    descriptors,
    instruction,
    load,
    matmul,
    reduce_pass,
    ring,
    store,
    stream,
    trf,
    vrf,
)
from mutants import another, leaves, replaced
from spmd import UNIT_RULES

from backend_rngd.isa.descriptors import (
    BROADCAST,
    DM_SLICE_STRIDE,
    REDUCE,
    UNIT_STRIDE,
    After,
    Alu,
    Call,
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
    Lookup,
    Memset,
    Mode,
    Notify,
    Op,
    Operand,
    Routine,
    Source,
    Space,
    Stream,
    SwitchKind,
    VectorOp,
    Wait,
)
from backend_rngd.isa.legality import RULES, BufferSpan, check, check_stream, errors
from backend_rngd.machine import load_machine

MACHINE = load_machine()
BIG = 1 << 40


def fetch_of(desc: Exec, **changes: object) -> Exec:
    return put(desc, fetch=put(desc.fetch, **changes))


def commit_of(desc: Exec, **changes: object) -> Exec:
    return put(desc, commit=put(desc.commit, **changes))


def gather(**changes: object) -> Dma:
    desc = Dma(
        Endpoint(Space.HBM, 0),
        Endpoint(Space.DM, 0),
        ((SLICES, 0, DM_SLICE_STRIDE), (4, 0, 256)),
        256,
        Index(0, 1 << 20, (32, 8), False),
    )
    return put(desc, **changes)


def _index() -> Index:
    found = gather().index
    assert found is not None
    return found


def _gemm() -> Contract:
    found = matmul().contract
    assert found is not None
    return found


INDEX, GEMM = _index(), _gemm()
STASH = Operand(Source.STASH)
VRF = Operand(Source.VRF, base=0, loops=((64, 4),))
ADD = constant(Alu.FP_FMA, Op.ADD)
MUL = constant(Alu.FP_MUL0, Op.MUL)
ZIP = VectorOp(Alu.FP_FMA, Op.ADD, Mode.ZIP01)
INTEGER = Exec(SLICES, Fetch(0, ((64, 4),), Dtype.I32, 8), Commit(8192, ((64, 4),), Dtype.I32, 8))
STASHING = VectorOp(Alu.FP_MUL0, Op.MUL, Mode.STREAM_OPERAND, STASH)

KEYS = put(
    commit_of(copy_pass(), dtype=Dtype.BF16, loops=((128, 2),)),
    fetch=Fetch(0, ((64, 1),), Dtype.I8, 8, Dtype.F32, None, Lookup.I4_F8E4M3),
)

LEGAL: dict[str, Descriptor] = {
    "table": KEYS,
    "table without a cast": put(
        commit_of(copy_pass(), dtype=Dtype.F8E4M3, loops=((128, 1),), valid=32),
        fetch=put(KEYS.fetch, packet=16, cast=None),
    ),
    "copy": copy_pass(),
    "in place": copy_pass(0, 0),
    "matmul": matmul(),
    "digits that are all kept": put(
        matmul(loops=((16, 64, 0), (2, 1024, BROADCAST))), commit=Commit(32768, ((256, 4),), Dtype.F32, 8)
    ),
    "sequential": put(
        matmul(depth=0, mode=LaneMode.SEQUENTIAL, trf_read=1, loops=((4, 64, REDUCE), (4, 2, 0))),
        commit=Commit(32768, ((4 * 8 * 32, 4),), Dtype.F32, 8),
    ),
    "chain": chain(ADD, VectorOp(Alu.FP_EXP, Op.EXP, Mode.UNARY), constant(Alu.CLIP_MIN, Op.MIN)),
    "vrf operand": chain(VectorOp(Alu.FP_MUL0, Op.MUL, Mode.STREAM_OPERAND, VRF)),
    "pair": chain(constant(Alu.FP_MUL1, Op.MUL, group=2), put(ZIP, alu=Alu.FP_FPU, op=Op.DIV), second=True),
    "pair with one operand for both": chain(
        VectorOp(Alu.FP_MUL0, Op.MUL, Mode.STREAM_OPERAND, put(VRF, loops=((8, 32), (2, 1024), (8, 4)))),
        ZIP,
        second=True,
    ),
    "stash": chain(VectorOp(Alu.FP_FPU, Op.SIGMOID, Mode.UNARY), put(STASHING, alu=Alu.FP_MUL1), stash_input=True),
    "reduce": reduce_pass(),
    "reduce keeping a packet": reduce_pass(count=4, inner=8),
    "narrow": commit_of(copy_pass(), dtype=Dtype.BF16, loops=((64, 2),)),
    "convert": put(INTEGER, vector=(VectorOp(Alu.FXP_TO_FP, Op.CONVERT, Mode.UNARY),), commit=copy_pass().commit),
    "ring": ring(),
    "ring in two levels": ring(slice1=4, slices=16, time0=2),
    "transpose": ring(kind=SwitchKind.TRANSPOSE, slice1=8, slices=8, time0=1),
    "trf": trf(),
    "vrf": vrf(),
    "memset": Memset(SLICES, 0, 64),
    "load": load(),
    "store": store(),
    "gather": gather(),
    "scatter": Dma(Endpoint(Space.DM, 0), Endpoint(Space.HBM, 0, 8), ((4, 128, 0),), 128, Index(0, 4096, (8,), True)),
    "dm to dm": Dma(
        Endpoint(Space.DM, 0), Endpoint(Space.DM, 4096), ((SLICES, DM_SLICE_STRIDE, 64), (8, 64, 8192)), 64
    ),
    "call": Call(1, ((8, 0, 64), (9, 1, 0))),
    "gather of units": Dma(
        Endpoint(Space.PEER_DM, 4096, 63),
        Endpoint(Space.DM, 8192),
        ((4, UNIT_STRIDE, 256), (SLICES, DM_SLICE_STRIDE, DM_SLICE_STRIDE)),
        256,
    ),
    "rows of units": Dma(
        Endpoint(Space.PEER_HBM, UNIT_STRIDE + 4096),
        Endpoint(Space.DM, 0),
        ((4, 2 * UNIT_STRIDE - 512, 128), (SLICES, 128, DM_SLICE_STRIDE)),
        128,
    ),
    "broadcast to units": Dma(
        Endpoint(Space.DM, 0),
        Endpoint(Space.PEER_HBM, 64, 62),
        ((4, 0, UNIT_STRIDE), (SLICES, DM_SLICE_STRIDE, 128)),
        128,
    ),
    "notify": Notify(63, UNIT_STRIDE, ((4, 8), (2, 1)), 5, ((64, 128), (256, 8))),
    "notify one": Notify(0, 3 * UNIT_STRIDE, (), 0),
    "wait": Wait(5, 7, ((64, 128),), ((0, 8),)),
}
PEERS, ROWS = LEGAL["gather of units"], LEGAL["rows of units"]
assert isinstance(PEERS, Dma)
assert isinstance(ROWS, Dma)
NOTIFY = Notify(63, UNIT_STRIDE, ((4, 8), (2, 1)), 5, ((64, 128), (256, 8)))
WAIT = Wait(5, 7, ((64, 128),), ((0, 8),))


@pytest.mark.parametrize("name", LEGAL)
def test_legal(name: str) -> None:
    desc = LEGAL[name]
    context = instruction(desc).context
    assert check(desc, MACHINE, context, absolute=True) == []


NINE_DIGITS = (*[(2, 0, i % 2) for i in range(6)], (2, 2048, 2), (2, 64, 3), (2, 4096, 2))

# (rule, context or None, descriptor): breaks exactly this rule
BROKEN: list[tuple[str, str | None, Descriptor]] = [
    ("loop-count", None, put(load(), loops=tuple((2, 16 * 7**i, 8 * 3 ** (8 - i)) for i in range(9)), packet=8)),
    ("loop-count", None, matmul(16, loops=NINE_DIGITS)),
    ("loop-size", None, Dma(Endpoint(Space.HBM, 0), Endpoint(Space.HBM, 1 << 21), ((65537, 16, 16),), 8)),
    ("loop-size", None, matmul(loops=((4, 0, 0), (4, 64, REDUCE), (0, 256, BROADCAST)))),
    ("loop-one", None, put(load(), loops=((1, 0, 0), *load().loops))),
    ("loop-one", None, matmul(loops=((4, 0, 0), (4, 64, REDUCE), (1, 64, 0), (2, 256, BROADCAST)))),
    ("loop-merge", None, fetch_of(copy_pass(), loops=((8, 32), (8, 4)))),
    ("loop-merge", None, commit_of(copy_pass(), loops=((8, 32), (8, 4)))),
    ("loop-merge", None, matmul(loops=((2, 0, 0), (2, 0, 0), (4, 64, REDUCE), (2, 256, BROADCAST)))),
    ("stride-range", None, put(load(), loops=((SLICES, 1 << 31, DM_SLICE_STRIDE),))),
    ("element-alignment", None, fetch_of(copy_pass(), base=2)),
    ("element-alignment", None, fetch_of(copy_pass(), loops=((8, 34), (8, 4)))),
    ("element-alignment", None, chain(put(MUL, operand=put(VRF, base=2)))),
    ("bounds", None, fetch_of(copy_pass(), base=524288 - 128)),
    ("bounds", None, commit_of(copy_pass(), base=524288 - 128)),
    ("bounds", None, fetch_of(copy_pass(), loops=((8, -4096), (8, 4)))),
    ("bounds", None, chain(put(MUL, operand=put(VRF, base=8192 - 128)))),
    ("bounds", None, matmul(trf_base=8192 - 64)),
    ("bounds", None, trf(base=8192 - 256)),
    ("bounds", None, vrf(base=8192 - 128)),
    ("bounds", None, Memset(SLICES, 524288 - 8, 16)),
    ("bounds", None, load(target=524288 - 512)),
    ("bounds", None, load(target=256 * DM_SLICE_STRIDE - 64 * DM_SLICE_STRIDE + DM_SLICE_STRIDE)),
    ("bounds", None, put(load(), source=Endpoint(Space.HBM, -64))),
    ("slices", None, put(copy_pass(), slices=257)),
    ("slices", None, put(copy_pass(), slices=0)),
    ("slices", None, Memset(0, 0, 8)),
    ("packet", None, fetch_of(copy_pass(), packet=7)),
    ("packet", None, fetch_of(copy_pass(), packet=1)),
    ("packet", None, fetch_of(copy_pass(), packet=0)),
    ("flit-packet", None, fetch_of(copy_pass(), packet=16)),
    ("flit-packet", None, put(vrf(), fetch=put(vrf().fetch, packet=16))),
    ("flit-packet", None, put(vrf(), fetch=put(vrf().fetch, packet=4))),
    ("fetch-cast", None, fetch_of(copy_pass(), cast=Dtype.F32)),
    ("lookup", "sub", LEGAL["table without a cast"]),
    ("lookup", None, put(KEYS, fetch=put(KEYS.fetch, dtype=Dtype.F8E5M2))),
    ("lookup", None, put(trf(), fetch=put(trf().fetch, dtype=Dtype.I8, packet=32, lookup=Lookup.I4_F8E4M3))),
    ("fetch-cast", None, commit_of(fetch_of(KEYS, cast=Dtype.I32), dtype=Dtype.I32, loops=((128, 4),))),
    ("sub-access", "sub", fetch_of(copy_pass(), loops=((32, 4), (2, 0)))),
    ("sub-access", "sub", put(vrf(), fetch=put(vrf().fetch, loops=((32, 4), (2, 0))))),
    ("second", None, fetch_of(chain(ZIP, second=True), second=(0, (4, 4)))),
    ("ring", None, ring(slices=32, slice1=3)),
    ("ring", None, ring(slices=1)),
    ("ring", None, put(ring(slices=64), slices=32)),
    ("ring", None, ring(kind=SwitchKind.TRANSPOSE, slice1=1, slices=8, time0=1)),
    ("ring", None, ring(kind=SwitchKind.TRANSPOSE, slice1=8, slices=1, time0=1)),
    ("ring-time", None, ring(packets=4, time0=3)),
    ("ring-time", None, ring(packets=4, time0=2)),
    ("ring-time", None, ring(kind=SwitchKind.TRANSPOSE, slice1=8, slices=8, time0=2)),
    ("ring-silicon", None, ring(kind=SwitchKind.BROADCAST1, slice1=8, slices=8, time0=1)),
    ("contract-context", "sub", matmul()),
    ("contract-stream", None, fetch_of(matmul(), cast=Dtype.F32)),
    ("contract-stream", None, fetch_of(matmul(), second=(65536, (2,)))),
    ("contract-stream", None, fetch_of(matmul(), dtype=Dtype.F32, loops=((512, 4),), packet=16)),
    ("lanes", None, matmul(lanes=3)),
    ("lanes", None, trf(lanes=16)),
    ("pack", None, matmul(pack=1)),
    ("pack", None, fetch_of(matmul(), packet=16)),
    ("digits", None, matmul(loops=((4, 0, 0), (8, 64, REDUCE), (2, 256, BROADCAST)))),
    ("digits", None, matmul(loops=((4, 0, 0), (2, 512, BROADCAST), (4, 64, REDUCE)))),
    ("digits", None, matmul(loops=((4, 0, 4), (4, 64, REDUCE), (2, 256, BROADCAST)))),
    ("trf-read", None, matmul(trf_read=24)),
    ("trf-read", None, matmul(trf_read=64)),
    ("trf-read", None, matmul(trf_base=32)),
    ("trf-read", None, matmul(loops=((4, 0, 0), (4, 32, REDUCE), (2, 256, BROADCAST)))),
    ("depth", None, matmul(depth=6)),
    ("depth", None, put(fetch_of(matmul(k=256, depth=0), dtype=Dtype.I8, packet=64, loops=((2048, 1),)))),
    ("accumulators", None, put(
        matmul(channels=8 * 129), commit=Commit(32768, ((4 * 8 * 129, 4),), Dtype.F32, 8),
        contract=put(GEMM, loops=((4, 0, 0), (4, 0, REDUCE), (129, 0, BROADCAST))),
    )),
    ("accumulators", None, put(
        matmul(), commit=Commit(32768, ((4 * 5 * 8 * 32, 4),), Dtype.F32, 8),
        contract=put(
            GEMM, depth=0, mode=LaneMode.SEQUENTIAL, trf_read=1,
            loops=((4, 0, 0), (4, 64, REDUCE), (5, 256, BROADCAST)),
        ),
    )),
    ("lane-mode", None, put(
        matmul(lanes=1, mode=LaneMode.SEQUENTIAL), commit=Commit(32768, ((16, 4),), Dtype.F32, 2)
    )),
    ("vector-type", None, put(copy_pass(), fetch=Fetch(0, ((64, 2),), Dtype.BF16, 8),
                              commit=Commit(4096, ((64, 2),), Dtype.BF16, 8), vector=(MUL,))),
    ("vector-type", None, put(INTEGER, vector=(MUL,))),
    ("vector-type", None, chain(constant(Alu.FXP_ADD, Op.ADD))),
    ("vector-type", None, chain(constant(Alu.LOGIC_LSHIFT, Op.SHL))),
    ("stage-order", None, chain(constant(Alu.CLIP_MAX, Op.MAX), MUL)),
    ("alu-once", None, chain(MUL, MUL)),
    ("alu-op", None, chain(constant(Alu.FP_MUL0, Op.ADD))),
    ("mode", None, chain(put(MUL, mode=Mode.STREAM_STREAM))),
    ("mode", None, chain(put(MUL, operand=Operand()))),
    ("mode", None, chain(put(MUL, mode=Mode.OPERAND_STREAM))),
    ("mode", None, chain(constant(Alu.FP_EXP, Op.EXP))),
    ("mode", None, chain(VectorOp(Alu.FP_MUL0, Op.MUL, Mode.UNARY))),
    ("mode", None, chain(put(ZIP, mode=Mode.ZIP10), second=True)),
    ("unused-field", None, chain(put(MUL, operand2=1.0))),
    ("unused-field", None, chain(put(MUL, count=4))),
    ("unused-field", None, chain(VectorOp(Alu.FP_EXP, Op.EXP, Mode.UNARY, Operand(value=1.0)))),
    ("unused-field", None, chain(put(MUL, operand=put(MUL.operand, base=4)))),
    ("constant", None, put(INTEGER, vector=(constant(Alu.FXP_ADD, Op.ADD, 1.5),))),
    ("constant", None, put(INTEGER, vector=(constant(Alu.FXP_ADD, Op.ADD, 2.0**33),))),
    ("vrf-count", None, chain(put(MUL, operand=put(VRF, loops=((32, 4),))))),
    ("group", None, chain(put(MUL, group=1))),
    ("group", None, chain(ZIP)),
    ("group", None, chain(ZIP, put(MUL, alu=Alu.FP_MUL1, group=1), second=True)),
    ("stash", None, chain(STASHING)),
    ("stash", None, chain(MUL, stash_input=True)),
    ("stash", None, chain(put(MUL, stash=True))),
    ("stash", None, chain(STASHING, put(STASHING, alu=Alu.FP_MUL1), stash_input=True)),
    ("stash", None, chain(put(MUL, stash=True), put(STASHING, alu=Alu.FP_MUL1), stash_input=True)),
    ("stash", None, chain(ZIP, STASHING, stash_input=True, second=True)),
    ("reduce", None, reduce_pass(count=1, outer=8)),
    ("reduce", None, reduce_pass(count=4, inner=16)),
    ("reduce", None, reduce_pass(count=4)),
    ("reduce", None, reduce_pass(count=4, inner=2)),
    ("commit-cast", None, commit_of(copy_pass(), dtype=Dtype.I32)),
    ("commit-cast", None, commit_of(INTEGER, dtype=Dtype.BF16, loops=((64, 2),))),
    ("valid", None, commit_of(copy_pass(), valid=1)),
    ("valid", None, commit_of(copy_pass(), valid=16)),
    ("valid", None, commit_of(put(copy_pass(), fetch=put(copy_pass().fetch, packet=4)), valid=8, loops=((128, 4),))),
    ("commit-count", None, commit_of(copy_pass(), loops=((128, 4),))),
    ("commit-run", None, commit_of(copy_pass(), loops=((16, 32), (4, 4)))),
    ("commit-run", None, commit_of(copy_pass(), loops=((64, 8),))),
    ("commit-alignment", None, commit_of(copy_pass(), base=4100)),
    ("commit-alignment", None, commit_of(copy_pass(), loops=((8, 36), (8, 4)))),
    ("write-twice", None, commit_of(copy_pass(), loops=((8, 0), (8, 4)))),
    ("write-twice", None, commit_of(copy_pass(), loops=((8, 24), (8, 4)))),
    ("write-twice", None, put(load(), loops=((SLICES, 1024, 0),))),
    ("overlap", None, copy_pass(0, 32)),
    ("overlap", None, put(store(), destination=Endpoint(Space.DM, 8), loops=((2, 8192, 4096),), packet=64)),
    ("overlap", None, Dma(Endpoint(Space.HBM, 0, 8), Endpoint(Space.HBM, 64, 8), ((4, 256, 512),), 128)),
    ("context", "dma", copy_pass()),
    ("context", "dma", trf()),
    ("context", "main", vrf()),
    ("context", "main", Memset(SLICES, 0, 8)),
    ("context", "sub", load()),
    ("context", "main", Call(1, ())),
    ("trf-load", None, put(trf(), fetch=put(trf().fetch, packet=32))),
    ("trf-load", None, put(trf(), fetch=put(trf().fetch, packet=8))),
    ("trf-load", None, put(trf(), fetch=put(trf().fetch, dtype=Dtype.I16))),
    ("trf-load", None, put(trf(elements=64), lanes=8)),
    ("trf-load", None, put(trf(), base=16)),
    ("vrf-load", None, put(vrf(), fetch=Fetch(0, ((64, 2),), Dtype.BF16, 8))),
    ("vrf-load", None, put(vrf(), base=4)),
    ("memset", None, Memset(SLICES, 4, 8)),
    ("memset", None, Memset(SLICES, 0, 12)),
    ("memset", None, Memset(SLICES, 0, 0)),
    ("memset", None, Memset(SLICES, 0, 8, 1 << 32)),
    ("dma-packet", None, put(load(), packet=8192, loops=((SLICES, 8192, DM_SLICE_STRIDE),))),
    ("dma-packet", None, put(load(), packet=0)),
    ("dma-run", None, put(load(), loops=((SLICES, 1024, DM_SLICE_STRIDE), (2, 512, 512)), packet=512)),
    ("dma-alignment", None, load(source=4)),
    ("dma-alignment", None, load(target=4)),
    ("dma-alignment", None, put(load(), packet=1020)),
    ("dma-alignment", None, put(load(), loops=((SLICES, 1028, DM_SLICE_STRIDE),))),
    ("dma-alignment", None, Call(1, ((8, 0, 4),))),
    ("dma-register", None, put(load(), destination=Endpoint(Space.DM, 0, 8))),
    ("dma-register", None, put(load(), source=Endpoint(Space.HBM, 0, 64))),
    ("dma-register", None, gather(index=put(INDEX, register=64))),
    ("gather", None, gather(destination=Endpoint(Space.HBM, 1 << 21), loops=((SLICES, 0, 4096), (4, 0, 256)))),
    ("gather", None, gather(index=put(INDEX, strides=(8,)))),
    ("gather", None, gather(index=put(INDEX, strides=(8, 2)))),
    ("gather", None, gather(index=put(INDEX, scatter=True))),
    ("stride-range", None, put(ROWS, loops=((4, UNIT_STRIDE + (1 << 31), 128), *ROWS.loops[1:]))),
    ("bounds", None, put(PEERS, source=Endpoint(Space.PEER_DM, 524288, 63))),
    ("bounds", None, put(PEERS, source=Endpoint(Space.PEER_DM, 193 * DM_SLICE_STRIDE, 63))),
    ("dma-register", None, put(PEERS, source=Endpoint(Space.PEER_DM, 4096, 64))),
    ("dma-register", None, put(NOTIFY, register=-1)),
    ("dma-alignment", None, put(PEERS, destination=Endpoint(Space.PEER_DM, 8196, 63))),
    ("write-twice", None, put(PEERS, loops=((4, UNIT_STRIDE, 128), *PEERS.loops[1:]))),
    ("peer", None, put(PEERS, source=Endpoint(Space.PEER_DM, UNIT_STRIDE << 16))),
    ("gather", None, put(gather(), source=Endpoint(Space.PEER_HBM, 0))),
    ("context", "main", NOTIFY),
    ("context", "sub", WAIT),
    ("semaphore", None, put(NOTIFY, semaphore=-1)),
    ("semaphore", None, put(WAIT, semaphore=MACHINE.semaphores)),
    ("notify-units", None, put(NOTIFY, base=64)),
    ("notify-units", None, put(NOTIFY, base=-UNIT_STRIDE)),
    ("notify-units", None, put(NOTIFY, units=((1, 8),))),
    ("notify-units", None, put(NOTIFY, units=((4, 1), (2, 1)))),
    ("notify-units", None, put(NOTIFY, units=((1 << 40, 1),))),
    ("loop-count", None, put(NOTIFY, units=tuple((2, 3**i) for i in range(9)))),
    ("loop-merge", None, put(NOTIFY, units=((4, 2), (2, 1)))),
    ("wait-count", None, put(WAIT, count=0)),
    ("sync-range", None, put(NOTIFY, ranges=((4, 8),))),
    ("sync-range", None, put(NOTIFY, ranges=((64, 0),))),
    ("sync-range", None, put(WAIT, ranges=((64, 8), (72, 8)))),
    ("sync-range", None, put(WAIT, arrived=((64, 8), (0, 8)))),
    ("bounds", None, put(WAIT, ranges=((524288, 8),))),
    ("call", None, Call(1, ((0, 0, 8),))),
    ("call", None, Call(1, ((8, 64, 8),))),
    ("call", None, Call(1, ((8, 0, 8), (8, 0, 16)))),
]  # fmt: skip


@pytest.mark.parametrize(
    ("rule", "context", "desc"), BROKEN, ids=[f"{rule}-{i}" for i, (rule, _, _) in enumerate(BROKEN)]
)
def test_broken_descriptor(rule: str, context: str | None, desc: Descriptor) -> None:
    found = check(desc, MACHINE, context, absolute=True)
    assert {v.rule for v in found} == {rule}, [str(v) for v in found]
    assert all(rule in str(v) and RULES[rule] in str(v) for v in found)


# Streams -------------------------------------------------------------------------------------------------------------
LOAD = instruction(load())
USE = instruction(copy_pass(), After(dma=1))
PLAIN = stream([LOAD, USE])
CALLEE = instruction(load(target=65536, source=1 << 16))
CALL = instruction(Call(1, ()))


def test_legal_streams() -> None:
    assert check_stream(PLAIN, MACHINE, [(4096, 65536)]) == []
    back = instruction(load(source=1 << 17), After(main=1))
    assert check_stream(stream([LOAD, USE, back]), MACHINE) == []
    called = stream([LOAD, instruction(Call(1, ())), put(USE, after=After(call=1))], [CALLEE])
    assert check_stream(called, MACHINE) == []
    by_register = instruction(put(load(), source=Endpoint(Space.HBM, 64, 8)))
    moved = stream([instruction(Call(1, ((8, 0, 4096),)))], [by_register])
    assert check_stream(moved, MACHINE, [(4096, 64 + 65536)]) == []


def early_layer(last: Instruction | None) -> Stream:
    """A routine, called twice, whose first transfer does not wait for the call before; `last`: a later transfer."""
    ahead = put(LOAD, after=After(enter=False))
    tail = [] if last is None else [last]
    return stream([CALL, CALL], [ahead, USE, *tail])


def test_a_transfer_may_start_before_what_was_issued_before_its_routine() -> None:
    """If the DMA queue of the call before has waited for the last reader of the bytes that it overwrites."""
    assert check_stream(early_layer(instruction(load(source=1 << 17), After(main=1))), MACHINE) == []


def _starving() -> Stream:
    rows = put(copy_pass(), fetch=Fetch(0, ((64, 128), (2, 4)), Dtype.F32, 2))
    return stream([instruction(put(rows, commit=Commit(65536, ((128, 4),), Dtype.F32, 2)))])


def _stashing() -> Stream:
    near_end = instruction(vrf(base=7168))
    sigmoid = VectorOp(Alu.FP_FPU, Op.SIGMOID, Mode.UNARY)
    return stream([near_end, instruction(chain(sigmoid, put(STASHING, alu=Alu.FP_MUL1), stash_input=True))])


LATE = put(USE, after=After(call=1))
HBM = [(4096, 65536), (1 << 16, 65536)]
STREAMS: list[tuple[str, Stream, list[tuple[int, int]] | None]] = [
    ("header", stream([LOAD], slices=96), None),
    ("header", stream(), None),
    ("header", Stream(0, 64, (Routine("a", ()), Routine("a", ())), ()), None),
    ("header", stream([put(LOAD, location=1)]), None),
    ("slices", stream([instruction(put(copy_pass(), slices=128))]), None),
    ("slices", stream([instruction(load(target=DM_SLICE_STRIDE))]), None),
    ("stash-space", _stashing(), None),
    ("call", stream([instruction(Call(2, ()))], [CALLEE]), None),
    ("call", stream([CALL], []), None),
    ("call", stream([CALL], [instruction(Call(0, ()))]), None),
    ("register", stream([instruction(put(load(), source=Endpoint(Space.HBM, 0, 8)))]), None),
    ("register", stream([instruction(Call(1, ((8, 9, 0),)))], [CALLEE]), None),
    ("hbm-bounds", PLAIN, [(4096, 65535)]),
    ("hbm-bounds", PLAIN, [(4104, 1 << 20)]),
    ("hbm-bounds", PLAIN, [(4096, 32768), (4096 + 32768, 32768)]),
    ("hbm-bounds", stream([instruction(load(source=48 << 30))]), None),
    (
        "hbm-bounds",
        stream([instruction(Call(1, ((8, 0, 4096),)))], [instruction(put(load(), source=Endpoint(Space.HBM, 64, 8)))]),
        [(4096, 65536)],
    ),
    ("future", stream([put(LOAD, after=After(main=1)), USE]), None),
    ("future", stream([LOAD, put(USE, after=After(dma=1, call=1))]), None),
    ("future", stream([LOAD, put(LOAD, after=After(dma=1))]), None),
    ("future", stream([put(LOAD, after=After(sub=-1))]), None),
    ("race", stream([LOAD, put(USE, after=After())]), None),
    ("race", stream([LOAD, CALL, put(LATE, after=After())], [CALLEE]), None),
    ("race", stream([LOAD, USE, CALL], [put(LOAD, after=After(enter=False))]), None),
    ("race", early_layer(None), None),
    ("race", early_layer(instruction(load(source=1 << 17, target=131072))), None),
    ("race", stream([CALL], [LOAD, put(USE, after=After(dma=1, enter=False))]), None),
    ("race", stream([LOAD, USE, instruction(load(target=4096))]), None),
    ("race", stream([LOAD, USE, instruction(load(target=0))]), None),
    ("race", stream([instruction(trf(source=65536)), instruction(matmul())]), None),
    ("race", stream([instruction(vrf(source=65536)), instruction(chain(put(MUL, operand=VRF)))]), None),
    ("useless-wait", stream([LOAD, put(LOAD, what=load(target=8192)), put(USE, after=After(dma=2))]), None),
    ("useless-wait", stream([LOAD, USE, put(USE, after=After(dma=1))]), None),
    ("useless-wait", stream([LOAD, CALL, LATE, put(USE, after=After(call=1))], [CALLEE]), None),
    ("useless-wait", stream([LOAD, USE, put(CALL, after=After(main=1))], [CALLEE]), None),
    (
        "type",
        stream([instruction(copy_pass(0, 4096)), instruction(put(INTEGER, fetch=put(INTEGER.fetch, base=4096)))]),
        None,
    ),
    (
        "type",
        stream(
            [
                instruction(put(vrf(), fetch=put(vrf().fetch, dtype=Dtype.I32))),
                instruction(chain(VectorOp(Alu.FP_MUL0, Op.MUL, Mode.STREAM_OPERAND, VRF)), After(sub=1)),
            ]
        ),
        None,
    ),
    (
        "type",
        stream(
            [instruction(put(trf(), fetch=Fetch(0, ((4096, 1),), Dtype.I8, 32))), instruction(matmul(), After(sub=1))]
        ),
        None,
    ),
    ("bank-starvation", _starving(), None),
]


@pytest.mark.parametrize(
    ("rule", "s", "regions"), STREAMS, ids=[f"{rule}-{i}" for i, (rule, _, _) in enumerate(STREAMS)]
)
def test_broken_stream(rule: str, s: Stream, regions: list[tuple[int, int]] | None) -> None:
    found = check_stream(s, MACHINE, regions)
    assert {v.rule for v in found} == {rule}, [str(v) for v in found]


SPANS = [BufferSpan(0, 0, 1, 0, 1024, "a"), BufferSpan(-1, 0, 0, 4096, 256, "b")]


def test_buffers() -> None:
    assert check_stream(PLAIN, MACHINE, buffers=SPANS) == []
    late, short, other = put(SPANS[0], first=1), put(SPANS[1], nbytes=255), put(SPANS[0], routine=1)
    assert [(v.rule, v.index) for v in check_stream(PLAIN, MACHINE, buffers=[late, SPANS[1]])] == [("dm-bounds", 0)]
    assert [(v.rule, v.index) for v in check_stream(PLAIN, MACHINE, buffers=[SPANS[0], short])] == [("dm-bounds", 1)]
    assert [v.index for v in check_stream(PLAIN, MACHINE, buffers=[other, SPANS[1]])] == [0, 1]


def test_every_rule_is_covered() -> None:
    covered = {rule for rule, _, _ in BROKEN} | {rule for rule, _, _ in STREAMS} | {"dm-bounds"} | UNIT_RULES
    assert covered == set(RULES)


def test_a_violation_says_where() -> None:
    (found,) = check_stream(stream([LOAD, put(USE, after=After())]), MACHINE)
    assert (found.routine, found.index, found.location, found.severity) == ("r0", 1, "here", "error")
    assert str(found).startswith("r0[1] here: does not wait for dma 1")


def test_warnings_are_not_errors() -> None:
    found = check_stream(_starving(), MACHINE)
    assert found and errors(found) == []


def test_a_transitive_wait_is_enough_and_a_second_one_is_too_much() -> None:
    """dma 1 -> sub (waits dma 1) -> main (waits sub 1): main need not wait for dma 1 as well."""
    sub = instruction(trf(), After(dma=1))
    main = fetch_of(matmul(), base=0)
    direct = instruction(main, After(sub=1))
    assert check_stream(stream([LOAD, sub, direct]), MACHINE) == []
    both = check_stream(stream([LOAD, sub, put(direct, after=After(sub=1, dma=1))]), MACHINE)
    assert [v.rule for v in both] == ["useless-wait"]


def rules_of(s: Stream) -> Sequence[str]:
    return [v.rule for v in check_stream(s, MACHINE)]


@pytest.mark.parametrize("flag", [BROADCAST, BROADCAST | REDUCE])
def test_broadcast_digits_may_be_summed(flag: int) -> None:
    desc = matmul(loops=((4, 0, 0), (4, 64, REDUCE), (2, 256, flag)))
    if flag & REDUCE:
        desc = put(desc, commit=Commit(32768, ((4 * 8, 4),), Dtype.F32, 8))
    assert check(desc, MACHINE, Context.MAIN) == []


@given(descriptors(), st.sampled_from(list(Context)))
@settings(max_examples=400, deadline=None)
def test_any_descriptor_gets_an_answer(desc: Descriptor, context: Context) -> None:
    """Nonsense is reported, it never makes the check fail."""
    for v in check(desc, MACHINE, context, absolute=True):
        assert v.rule in RULES


@given(st.data(), st.sampled_from(list(LEGAL)))
@settings(max_examples=400, deadline=None)
def test_any_change_of_a_legal_descriptor_gets_an_answer(data: st.DataObject, name: str) -> None:
    rng = data.draw(st.randoms(use_true_random=False))
    desc = LEGAL[name]
    for _ in range(3):
        path, old = rng.choice(list(leaves(desc)))
        desc = replaced(desc, path, another(old, rng))
    check_stream(stream([instruction(desc)]), MACHINE)
