"""From placed and scheduled modules to streams: addresses, registers of calls and rows, locations, probes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from isa_builders import chain, copy_pass, gather_of, load, matmul, store, trf, vrf
from xdsl.dialects.builtin import ModuleOp

from backend_rngd.dialect import (
    AllocOp,
    CallOp,
    DmaOp,
    ExecOp,
    GetGlobalOp,
    GlobalOp,
    LoadTrfOp,
    LoadVrfOp,
    MemsetOp,
    ProbeOp,
    RoutineOp,
    buffer_type,
)
from backend_rngd.emit import Emitted, emit
from backend_rngd.isa.descriptors import (
    After,
    Alu,
    Call,
    Context,
    Dma,
    Endpoint,
    Exec,
    LoadTrf,
    LoadVrf,
    Memset,
    Mode,
    Op,
    Operand,
    Source,
    Space,
    VectorOp,
)
from backend_rngd.machine import load_machine
from backend_rngd.place import place
from backend_rngd.schedule import schedule
from ir.errors import UnsupportedError

MACHINE = load_machine()
HBM = buffer_type("hbm", 65536)


def block_module() -> ModuleOp:
    """main loads a table once and calls `block` for two layers; every buffer starts at 0 of its own."""
    block = RoutineOp("block", [HBM, HBM])
    weights, cache = block.block.args
    w, y = AllocOp("dm", 1024, "w"), AllocOp("dm", 1024, "y")
    block.block.add_ops([w, y])
    block.block.add_ops(
        [
            DmaOp(load(1024, 0), weights, w.results[0], location="layer|load"),
            ExecOp(copy_pass(0, 0, 256), w.results[0], y.results[0], location="layer|copy"),
            DmaOp(store(1024, 0, 0), y.results[0], cache, location="layer|store"),
            ProbeOp(y.results[0], "layer.y", '{"dtype": "f32"}'),
        ]
    )
    main = RoutineOp("main")
    gets = [GetGlobalOp(n, HBM) for n in ("w0", "w1", "k0", "k1")]
    table = AllocOp("dm", 2048, "table")
    main.block.add_ops([*gets, table, MemsetOp(Memset(64, 0, 2048), table.results[0], location="fill")])
    for i in range(2):
        main.block.add_op(CallOp("block", [gets[i].results[0], gets[2 + i].results[0]], f"layers.{i}"))
    main.block.add_op(ExecOp(copy_pass(0, 1024, 64), table.results[0], table.results[0]))
    rows = [GlobalOp(n, "hbm", 65536, "cache", row_bytes=16384) for n in ("k0", "k1")]
    globals_ = [GlobalOp("w0", "hbm", 65536, "weight"), GlobalOp("w1", "hbm", 65536, "weight"), *rows]
    return ModuleOp([*globals_, block, main])


def emit_of(module: ModuleOp) -> Emitted:
    """All steps behind the lowering."""
    module.verify()
    place(module, MACHINE)
    schedule(module)
    module.verify()
    return emit(module, MACHINE)


def test_calls_pass_addresses_in_registers() -> None:
    out = emit_of(block_module())
    (s,) = out.streams
    assert [r.name for r in s.routines] == ["main", "block"]
    calls = [i.what for i in s.routines[0].instructions if isinstance(i.what, Call)]
    assert calls == [Call(1, ((8, 0, 0), (9, 1, 131072))), Call(1, ((8, 0, 65536), (9, 1, 196608)))]
    loads = [i.what for i in s.routines[1].instructions if isinstance(i.what, Dma)]
    assert (loads[0].source, loads[1].destination) == (Endpoint(Space.HBM, 0, 8), Endpoint(Space.HBM, 0, 9))


def test_calls_pass_buffers_from_an_offset_on() -> None:
    module = block_module()
    call = next(op for op in module.walk() if isinstance(op, CallOp))
    moved = CallOp("block", list(call.arguments), "layers.0", [512, 1024])
    call.parent_block().insert_op_before(moved, call)  # type: ignore[union-attr]
    call.detach()
    (s,) = emit_of(module).streams
    first = next(i.what for i in s.routines[0].instructions if isinstance(i.what, Call))
    assert first == Call(1, ((8, 0, 512), (9, 1, 132096)))


def test_caches_are_addressed_through_row_registers() -> None:
    out = emit_of(block_module())
    assert out.row_registers == {16384: 1}
    assert (out.globals["k1"].row_register, out.globals["k1"].row_bytes, out.globals["k1"].address) == (
        1,
        16384,
        196608,
    )
    assert out.globals["w0"].row_register == 0


def test_the_stream_is_legal() -> None:
    out = emit_of(block_module())
    assert out.check(MACHINE) == []
    (s,) = out.streams
    table, first = s.routines[0].instructions[0], s.routines[1].instructions
    short = [replace(b, nbytes=1020) if b.name == "y" else b for b in out.buffers]
    assert {v.rule for v in replace(out, buffers=tuple(short)).check(MACHINE)} == {"dm-bounds"}
    moved = replace(first[0], what=replace(first[0].what, source=Endpoint(Space.HBM, 8, 8)))
    routines = (s.routines[0], replace(s.routines[1], instructions=(moved, *first[1:])))
    assert {v.rule for v in replace(out, streams=(replace(s, routines=routines),)).check(MACHINE)} == {"hbm-bounds"}
    assert isinstance(table.what, Memset)


def test_waits_and_barriers() -> None:
    out = emit_of(block_module())
    main, block = out.streams[0].routines
    assert [i.after for i in block.instructions] == [After(), After(dma=1), After(main=1)]
    assert [i.context for i in main.instructions] == [Context.SUB, Context.CONTROL, Context.CONTROL, Context.MAIN]
    assert main.instructions[-1].after == After(call=2)


def test_locations_and_probes() -> None:
    out = emit_of(block_module())
    (s,) = out.streams
    assert [s.locations[i.location] for i in s.routines[1].instructions] == ["layer|load", "layer|copy", "layer|store"]
    assert s.locations[s.routines[0].instructions[1].location] == "layers.0"
    (probe,) = out.probes
    assert (probe.routine, probe.instructions, probe.value, probe.space) == (1, 3, "layer.y", "dm")
    y = s.routines[1].instructions[1].what
    assert isinstance(y, Exec)
    assert probe.address == y.commit.base
    assert probe.layout == {"dtype": "f32"}


def test_every_base_is_shifted_by_its_buffer() -> None:
    """Buffers at known places; descriptors with small offsets of their own."""
    main = RoutineOp("main")

    def at(space: str, address: int, nbytes: int = 32768) -> AllocOp:
        op = AllocOp(space, nbytes, address=address)
        main.block.add_op(op)
        return op

    dm, second, target = at("dm", 65536), at("dm", 131072), at("dm", 196608)
    t, v, w = at("trf", 1024, 4096), at("vrf", 512, 1024), at("vrf", 4096, 1024)
    hbm, table = at("hbm", 1 << 22, 1 << 21), at("hbm", 1 << 23)
    operand = Operand(Source.VRF, base=64, loops=((64, 4),))
    ops = (
        VectorOp(Alu.FP_MUL0, Op.MUL, Mode.STREAM_OPERAND, operand, group=1),
        VectorOp(Alu.FP_MUL1, Op.MUL, Mode.STREAM_OPERAND, Operand(Source.CONST, 2.0), group=2),
        VectorOp(Alu.FP_FMA, Op.ADD, Mode.ZIP01),
        VectorOp(Alu.CLIP_MAX, Op.MAX, Mode.STREAM_OPERAND, operand),
    )
    pair = replace(chain(*ops, second=True), slices=64)
    pair = replace(pair, fetch=replace(pair.fetch, base=8, second=(16, (4,))))
    main.block.add_ops(
        [
            ExecOp(pair, dm.results[0], target.results[0], second=second.results[0], vrf=[v.results[0], w.results[0]]),
            ExecOp(matmul(trf_base=64), dm.results[0], target.results[0], trf=t.results[0]),
            LoadTrfOp(trf(base=32), dm.results[0], t.results[0]),
            LoadVrfOp(vrf(base=8), dm.results[0], v.results[0]),
            MemsetOp(Memset(64, 8, 8), target.results[0]),
            DmaOp(load(64, 128, 256), hbm.results[0], target.results[0]),
            DmaOp(gather_of(), hbm.results[0], target.results[0], index=table.results[0]),
        ]
    )
    module = ModuleOp([main])
    schedule(module)
    a, b, c, d, e, f, g = [i.what for i in emit(module, MACHINE).streams[0].routines[0].instructions]
    assert isinstance(a, Exec)
    assert isinstance(b, Exec)
    assert (a.fetch.base, a.fetch.second, a.commit.base) == (65544, (131088, (4,)), 196608 + 8192)
    assert [op.operand.base for op in a.vector] == [576, 0, 0, 4160]
    assert b.contract is not None
    assert b.contract.trf_base == 1088
    assert isinstance(c, LoadTrf)
    assert isinstance(d, LoadVrf)
    assert isinstance(e, Memset)
    assert isinstance(f, Dma)
    assert isinstance(g, Dma)
    assert (c.fetch.base, c.base, d.fetch.base, d.base, e.base) == (65536, 1056, 65536, 520, 196616)
    assert (f.source.base, f.destination.base) == ((1 << 22) + 128, 196864)
    assert g.index is not None
    assert (g.index.base, g.index.register) == ((1 << 23) + (1 << 20), 0)


def test_steps_out_of_order_are_refused() -> None:
    module = block_module()
    with pytest.raises(ValueError, match="run place first"):
        schedule(module)
    place(module, MACHINE)
    with pytest.raises(ValueError, match="run schedule first"):
        emit(module, MACHINE)


def test_limits_are_said() -> None:
    module = block_module()
    place(module, MACHINE)
    schedule(module)
    many = ModuleOp([RoutineOp("main", [HBM] * 57)])
    with pytest.raises(UnsupportedError, match="57 buffers"):
        emit(many, MACHINE)
    with pytest.raises(ValueError, match="no routine @main"):
        emit(ModuleOp([RoutineOp("block")]), MACHINE)
    rows = [GlobalOp(f"k{i}", "hbm", 64 * i, "cache", row_bytes=8 * i) for i in range(1, 9)]
    with pytest.raises(ValueError, match="8 distinct cache row sizes"):
        emit(ModuleOp([*rows, RoutineOp("main")]), MACHINE)
