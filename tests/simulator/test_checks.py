"""What the functional simulator refuses, and that it says where."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import drawing as draw_
import numpy as np
import pytest

from backend_rngd.isa.descriptors import (
    DM_SLICE_STRIDE,
    Alu,
    Commit,
    Contract,
    Dma,
    Dtype,
    Endpoint,
    Exec,
    Fetch,
    Index,
    LaneMode,
    LoadTrf,
    LoadVrf,
    Memset,
    Mode,
    Op,
    Operand,
    Source,
    Space,
    Switch,
    SwitchKind,
    VectorOp,
)
from runtime_sim.errors import SimulationError
from runtime_sim.functional import Card, Unit

FETCH = Fetch(0, ((8, 32), (8, 4)), Dtype.F32, 8)
COMMIT = Commit(4096, ((64, 4),), Dtype.F32, 8)
COPY = Exec(4, FETCH, COMMIT)
LOAD = Dma(Endpoint(Space.HBM, 0), Endpoint(Space.DM, 0), ((4, 256, DM_SLICE_STRIDE),), 256)


def unit(written: bool = True) -> Unit:
    card = Card(draw_.MACHINE, 1 << 16)
    if written:
        card.clear(0, 1 << 16)
    return Unit(card, 4)


def refused(kind: str, message: str, *ops, memory: Unit | None = None) -> None:
    with pytest.raises(SimulationError, match=message) as caught:
        (memory or unit()).run(draw_.stream_of(*ops))
    assert caught.value.kind == kind
    assert caught.value.site is not None
    assert caught.value.site.index == len(ops) - 1
    assert "test.layer|op" in str(caught.value)
    assert "routine main" in str(caught.value)


def test_reading_what_nobody_wrote():
    refused(SimulationError.UNINITIALISED, r"fetch reads DM slice 0 byte 0", COPY)
    three = replace(LOAD, loops=((3, 256, DM_SLICE_STRIDE),))
    refused(SimulationError.UNINITIALISED, r"fetch reads DM slice 3 byte 0", three, COPY)
    refused(SimulationError.UNINITIALISED, r"fetch reads DM slice 0 byte 248", replace(LOAD, packet=248), COPY)
    vector = VectorOp(Alu.FP_MUL0, Op.MUL, Mode.STREAM_OPERAND, Operand(Source.VRF, 0.0, 64, ((64, 4),)))
    refused(SimulationError.UNINITIALISED, r"VRF slice 0 byte 64", LOAD, replace(COPY, vector=(vector,)))
    contract = Contract(8, 1, 128, ((8, 0, 0),), 16, 4, LaneMode.INTERLEAVED)
    matmul = Exec(4, Fetch(0, ((8, 32), (16, 2)), Dtype.BF16, 16), COMMIT, None, contract)
    refused(SimulationError.UNINITIALISED, r"TRF slice 0 byte 128", LOAD, matmul)
    store = Dma(Endpoint(Space.DM, 2 * DM_SLICE_STRIDE + 512), Endpoint(Space.HBM, 0), ((1, 8, 8),), 8)
    refused(SimulationError.UNINITIALISED, r"DM slice 2 byte 512", store)
    empty = unit(written=False)
    empty.window.write(0, bytes(512))
    refused(SimulationError.UNINITIALISED, r"HBM byte 512", LOAD, memory=empty)
    gather = Dma(Endpoint(Space.HBM, 0), Endpoint(Space.DM, 0), ((2, 0, 8),), 8, Index(0, 1024, (4,), False))
    refused(SimulationError.UNINITIALISED, r"HBM index table at 1024", gather, memory=empty)
    empty.window.write(1024, np.array([0, 600], np.uint32))
    refused(SimulationError.UNINITIALISED, r"HBM row of an indexed transfer", gather, memory=empty)


def test_unwritten_memory_is_noticed_after_a_reset_only():
    memory = unit()
    memory.run(draw_.stream_of(LOAD, COPY))
    only = draw_.stream_of(COPY)
    memory.run(only)
    memory.reset()
    with pytest.raises(SimulationError, match="nothing has written"):
        memory.run(only)


def test_checks_can_be_turned_off():
    memory = unit(written=False)
    memory.checks = False
    memory.run(draw_.stream_of(LOAD, COPY))


def test_out_of_bounds():
    end = draw_.MACHINE.dm_slice_bytes
    refused(SimulationError.BOUNDS, r"fetch touches DM bytes", replace(COPY, fetch=replace(FETCH, base=end - 248)))
    refused(SimulationError.BOUNDS, r"fetch touches DM bytes \[-8", replace(COPY, fetch=replace(FETCH, base=-8)))
    refused(
        SimulationError.BOUNDS, r"commit touches DM bytes", LOAD, replace(COPY, commit=replace(COMMIT, base=end - 248))
    )
    refused(SimulationError.BOUNDS, r"DMA write touches slices", replace(LOAD, loops=((5, 256, DM_SLICE_STRIDE),)))
    refused(
        SimulationError.BOUNDS, r"DMA write touches DM bytes", replace(LOAD, destination=Endpoint(Space.DM, end - 8))
    )
    refused(SimulationError.BOUNDS, r"HBM bytes", replace(LOAD, source=Endpoint(Space.HBM, (1 << 16) - 8)))
    refused(SimulationError.BOUNDS, r"HBM bytes", replace(LOAD, source=Endpoint(Space.HBM, -8)))
    bf16 = Fetch(0, ((16, 32), (16, 2)), Dtype.BF16, 16)
    refused(SimulationError.BOUNDS, r"TRF load", LOAD, LoadTrf(4, bf16, 8, 8192 - 32))
    refused(SimulationError.BOUNDS, r"VRF load", LOAD, LoadVrf(4, FETCH, 8192 - 248))
    refused(SimulationError.BOUNDS, r"memset", Memset(4, end - 4, 8))
    contract = Contract(8, 1, 8192, ((8, 0, 0),), 16, 4, LaneMode.INTERLEAVED)
    matmul = Exec(4, Fetch(0, ((8, 32), (16, 2)), Dtype.BF16, 16), COMMIT, None, contract)
    refused(SimulationError.BOUNDS, r"TRF bytes \[8192", LOAD, matmul)
    table = unit()
    table.window.write(1024, np.array([0, 65532], np.uint32))
    gather = Dma(Endpoint(Space.HBM, 0), Endpoint(Space.DM, 0), ((2, 0, 8),), 8, Index(0, 1024, (4,), False))
    refused(SimulationError.BOUNDS, r"HBM bytes", gather, memory=table)


def chained(*vector: VectorOp, fetch: Fetch = FETCH) -> Exec:
    return Exec(4, fetch, COMMIT, None, None, vector)


def product(digits: int, fetch: Fetch) -> Exec:
    contract = Contract(8, 1, 0, ((digits, 0, 0),), 16, 4, LaneMode.INTERLEAVED)
    return Exec(4, fetch, COMMIT, None, contract)


def times(operand: Operand) -> VectorOp:
    return VectorOp(Alu.FP_MUL0, Op.MUL, Mode.STREAM_OPERAND, operand)


EXP = VectorOp(Alu.FP_EXP, Op.EXP, Mode.UNARY)
CONVERT = VectorOp(Alu.FXP_TO_FP, Op.CONVERT, Mode.UNARY)
BF16 = Fetch(0, ((64, 2),), Dtype.BF16, 16)
SHORT = Fetch(0, ((64, 2),), Dtype.BF16, 4)
ILLEGAL = [
    ("does not divide into packets", replace(COPY, fetch=replace(FETCH, packet=7))),
    ("not a multiple of 8", replace(COPY, fetch=Fetch(0, ((64, 4),), Dtype.F32, 1))),
    ("does not cast", replace(COPY, fetch=Fetch(0, ((64, 4),), Dtype.F32, 8, Dtype.BF16))),
    ("commit loops enumerate 60", replace(COPY, commit=Commit(4096, ((60, 4),), Dtype.F32, 8))),
    ("keeps 20 bytes", replace(COPY, commit=Commit(4096, ((40, 4),), Dtype.F32, 5))),
    ("does not convert F32 to I16", replace(COPY, commit=Commit(4096, ((64, 2),), Dtype.I16, 8))),
    ("ring of 3", replace(COPY, switch=Switch(SwitchKind.BROADCAST01, 3, 1))),
    ("time0 = 3", replace(COPY, switch=Switch(SwitchKind.BROADCAST01, 2, 1, 3))),
    ("used twice", chained(EXP, EXP)),
    ("after a use of stage", chained(EXP, CONVERT)),
    ("does not do EXP", chained(VectorOp(Alu.FP_MUL0, Op.EXP, Mode.UNARY))),
    ("zip in FP_MUL0", chained(VectorOp(Alu.FP_MUL0, Op.MUL, Mode.ZIP01))),
    ("on group 1 of a stream", chained(VectorOp(Alu.FP_EXP, Op.EXP, Mode.UNARY, group=2))),
    ("never written", chained(times(Operand(Source.STASH)))),
    ("enumerates 63 elements", chained(times(Operand(Source.VRF, 0.0, 0, ((63, 4),))))),
    ("vector engine on a BF16", chained(EXP, fetch=BF16)),
    ("reduce of 64 elements", chained(VectorOp(Alu.REDUCE, Op.ADD, count=3, inner=1))),
    ("contraction of a F32", product(8, FETCH)),
    ("enumerate 7 packets", product(7, Fetch(0, ((8, 32), (16, 2)), Dtype.BF16, 16))),
    ("packets of 8 bytes", LoadTrf(4, SHORT, 8, 0)),
    ("into 8 lanes", LoadTrf(4, BF16, 8, 0)),
    ("memset of 6 bytes", Memset(4, 0, 6)),
    ("DMA packet of 8192", replace(LOAD, packet=8192)),
]


@pytest.mark.parametrize(("message", "op"), ILLEGAL)
def test_illegal_instructions(message, op):
    refused(SimulationError.ILLEGAL, message, LOAD, op)


def test_unsupported_switch_kinds_say_so():
    op = replace(COPY, switch=Switch(SwitchKind.INTER_TRANSPOSE, 2, 2))
    refused(SimulationError.UNSUPPORTED, "timed but not executed", LOAD, op)


def test_streams_of_other_units_are_refused():
    with pytest.raises(SimulationError, match="stream for 8 slices on a unit of 4"):
        unit().run(draw_.stream_of(LOAD, slices=8))


def test_simulator_needs_no_compiler():
    """A stream runs with torch, xdsl, the IR, the passes and the front end blocked."""
    script = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "xdsl", "ir", "passes", "frontend", "transformers", "ml_dtypes", "rngdc"}:
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Blocked())
import numpy as np
from backend_rngd.isa.descriptors import *
from backend_rngd.machine import load_machine
from runtime_sim.functional import Card, Unit
from runtime_sim.timing import simulate
machine = load_machine()
card = Card(machine, 1 << 16)
card.write(0, np.arange(256, dtype=np.float32))
unit = Unit(card, 4)
load = Dma(Endpoint(Space.HBM, 0), Endpoint(Space.DM, 0), ((4, 256, DM_SLICE_STRIDE),), 256)
double = Exec(4, Fetch(0, ((8, 32), (8, 4)), Dtype.F32, 8), Commit(4096, ((64, 4),), Dtype.F32, 8), None, None,
              (VectorOp(Alu.FP_MUL0, Op.MUL, Mode.STREAM_OPERAND, Operand(Source.CONST, 2.0)),))
store = Dma(Endpoint(Space.DM, 4096), Endpoint(Space.HBM, 8192), ((4, DM_SLICE_STRIDE, 256),), 256)
stream = Stream(0, 4, (Routine("main", (
    Instruction(Context.DMA, After(), load), Instruction(Context.MAIN, After(dma=1), double),
    Instruction(Context.DMA, After(main=1), store))),), ("x",))
unit.run(stream)
assert (card.read(8192, 1024).view(np.float32) == 2 * np.arange(256)).all()
assert simulate(stream, machine).cycles > 0
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
