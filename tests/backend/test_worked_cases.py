"""The formulas of hardware.md 5.1 at other parameters than the worked cases of 5.2 (test_formulas.py), documented mode.

Expected numbers are written out or follow from the text of the rule, never from the function under test.
"""

from __future__ import annotations

import pytest

from backend_rngd.isa.descriptors import (
    REDUCE,
    Alu,
    Commit,
    Context,
    Contract,
    Dma,
    Dtype,
    Endpoint,
    Exec,
    Fetch,
    LaneMode,
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
from backend_rngd.machine import formulas as f
from backend_rngd.machine import load_machine

BOOK = load_machine("rngd", "documented")


@pytest.mark.parametrize(
    ("dtype", "elements", "packet", "sub", "cycles"),
    [
        pytest.param(Dtype.I8, 3072, 32, False, 96, id="i8-32B"),
        pytest.param(Dtype.I8, 3072, 96, False, 96, id="i8-96B-three-reads"),
        pytest.param(Dtype.I8, 3072, 32, True, 384, id="i8-sub"),
        pytest.param(Dtype.BF16, 1024, 16, False, 64, id="bf16-32B"),
        pytest.param(Dtype.BF16, 1024, 4, True, 256, id="bf16-sub-8B"),
        pytest.param(Dtype.F32, 256, 8, False, 32, id="f32-32B"),
    ],
)
def test_contiguous_fetch(dtype: Dtype, elements: int, packet: int, sub: bool, cycles: int) -> None:
    fetch = Fetch(0, ((elements, dtype.bytes),), dtype, packet)
    assert f.fetch_time(fetch, Context.SUB if sub else Context.MAIN, BOOK) == cycles


@pytest.mark.parametrize(("rows", "row", "stride", "cycles"), [(15, 8, 16, 15), (7, 16, 48, 7), (5, 96, 128, 15)])
def test_fetch_of_separate_rows(rows: int, row: int, stride: int, cycles: int) -> None:
    """A packet is a row; an access never leaves it, nor is it larger than the alignment of the rows."""
    assert f.fetch_time(Fetch(0, ((rows, stride), (row, 1)), Dtype.I8, row), Context.MAIN, BOOK) == cycles


@pytest.mark.parametrize(
    ("kind", "slice1", "slice0", "time0", "packets", "packet", "dtype", "cycles"),
    [
        pytest.param(SwitchKind.BROADCAST01, 4, 4, 1, 16, 32, Dtype.I8, 256, id="broadcast01-1-flit"),
        pytest.param(SwitchKind.BROADCAST01, 2, 64, 1, 3, 32, Dtype.BF16, 768, id="broadcast01-bf16"),
        pytest.param(SwitchKind.BROADCAST1, 8, 4, 1, 128, 32, Dtype.I8, 4096, id="broadcast1"),
        pytest.param(SwitchKind.BROADCAST1, 2, 8, 1, 10, 40, Dtype.I8, 320, id="40-bytes-are-2-flits"),
        pytest.param(SwitchKind.TRANSPOSE, 4, 8, 1, 8, 64, Dtype.I8, 512, id="transpose"),
        pytest.param(SwitchKind.INTER_TRANSPOSE, 4, 16, 4, 16, 32, Dtype.I8, 1024, id="inter-transpose"),
        pytest.param(SwitchKind.TRANSPOSED_BROADCAST1, 4, 16, 1, 5, 32, Dtype.F32, 1280, id="transposed-broadcast"),
    ],
)
def test_switch(
    kind: SwitchKind, slice1: int, slice0: int, time0: int, packets: int, packet: int, dtype: Dtype, cycles: int
) -> None:
    """ring x Time x flits a packet."""
    desc = Exec(
        256,
        Fetch(0, ((packets * packet, dtype.bytes),), dtype, packet),
        Commit(0, ((8, dtype.bytes),), dtype, 8),
        Switch(kind, slice1, slice0, time0),
    )
    assert f.exec_cycles(desc, Context.MAIN, BOOK).stages["switch"] == cycles


@pytest.mark.parametrize(
    ("rows", "cols", "out_rows", "n", "valid", "cycles"),
    [
        pytest.param(8, 16, 16, 1, 8, 32, id="one-tile"),
        pytest.param(8, 16, 16, 8, 8, 144, id="eight-tiles"),
        pytest.param(8, 8, 8, 4, 8, 40, id="square"),
        pytest.param(4, 8, 2, 8, 8, 34, id="reading-is-slower"),
        pytest.param(8, 32, 32, 4, 8, 256, id="32-columns-single-buffer"),
        pytest.param(16, 16, 16, 2, 16, 48, id="i4"),
        pytest.param(16, 32, 32, 2, 16, 128, id="i4-32-columns"),
        pytest.param(2, 16, 16, 3, 8, 52, id="f32-16-columns"),
    ],
)
def test_transpose(rows: int, cols: int, out_rows: int, n: int, valid: int, cycles: int) -> None:
    assert f.transpose_cycles(rows, cols, out_rows, n, valid) == cycles


@pytest.mark.parametrize(("time", "packet", "flits"), [(8, 32, 8), (8, 64, 16), (8, 33, 16), (48, 8, 48), (4, 96, 12)])
def test_collect(time: int, packet: int, flits: int) -> None:
    assert f.collect_flits(time, packet) == flits


@pytest.mark.parametrize(
    ("packets", "pack", "broadcast", "cycles"),
    [(100, 2, 1, 200), (100, 2, 2, 200), (100, 2, 64, 6400), (100, 1, 1, 100)],
)
def test_contraction(packets: int, pack: int, broadcast: int, cycles: int) -> None:
    assert f.contraction_cycles(packets, pack, broadcast) == cycles


@pytest.mark.parametrize(("elements", "depth"), [(128, 7), (64, 6), (32, 5), (16, 4), (2, 1), (1, 0)])
def test_depth_of_the_tree(elements: int, depth: int) -> None:
    """Case 26 (i4, i8 and f8, bf16), and narrower ones."""
    assert f.packet_reducer_latency(elements) == depth


@pytest.mark.parametrize(
    ("mode", "kept", "columns", "lanes", "flits"),
    [
        pytest.param(LaneMode.INTERLEAVED, 64, 4, 8, 256, id="interleaved"),
        pytest.param(LaneMode.INTERLEAVED, 64, 4, 2, 256, id="interleaved-2-lanes"),
        pytest.param(LaneMode.SEQUENTIAL, 64, 4, 2, 128, id="sequential"),
        pytest.param(LaneMode.SEQUENTIAL, 10, 32, 8, 320, id="sequential-32-columns"),
        pytest.param(LaneMode.SEQUENTIAL, 10, 9, 1, 20, id="sequential-9-columns"),
    ],
)
def test_lane_folder(mode: LaneMode, kept: int, columns: int, lanes: int, flits: int) -> None:
    assert f.lane_folder_flits(mode, kept, columns, lanes) == flits


@pytest.mark.parametrize(
    ("lanes", "pack", "live", "packet", "broadcast", "slices", "share"),
    [
        pytest.param(8, 2, 32, 32, 2, 256, 1.0, id="full"),
        pytest.param(4, 2, 32, 32, 2, 256, 0.5, id="half-the-lanes"),
        pytest.param(8, 1, 16, 16, 1, 256, 0.5, id="one-flit"),
        pytest.param(8, 2, 32, 32, 1, 256, 0.5, id="supply"),
        pytest.param(8, 2, 1, 64, 2, 256, 1 / 64, id="contraction-axis-in-time-i8"),
        pytest.param(8, 2, 32, 32, 2, 64, 0.25, id="one-PE-of-a-cluster"),
    ],
)
def test_mac_utilisation(
    lanes: int, pack: int, live: int, packet: int, broadcast: int, slices: int, share: float
) -> None:
    assert f.mac_utilisation(lanes, pack, live, packet, broadcast, slices, 256) == share


def test_full_sum_over_a_cluster_exactly() -> None:
    """Case 27: 8 steps through a tree of depth 5 are the 40 cycles in a slice, then 256 slices (older book)."""
    assert f.inter_slice_reduce_cycles(8 * f.packet_reducer_latency(32), 256) == 296
    assert f.inter_slice_reduce_cycles(4 * f.packet_reducer_latency(64), 64) == 4 * 6 + 64


def _chain(*ops: VectorOp, elements: int = 512) -> f.PassTime:
    desc = Exec(
        64, Fetch(0, ((elements, 4),), Dtype.F32, 8), Commit(0, ((elements, 4),), Dtype.F32, 8), vector=tuple(ops)
    )
    return f.exec_cycles(desc, Context.MAIN, BOOK)


def _op(alu: Alu, op: Op) -> VectorOp:
    return VectorOp(alu, op, Mode.STREAM_OPERAND, Operand(Source.CONST, 2.0))


def test_vector_chain_adds_a_cycle_for_every_alu() -> None:
    """64 flits: 64 cycles 8 wide, 128 once any stage is 4 wide; the fill is the number of ALUs."""
    wide = _chain(_op(Alu.CLIP_MAX, Op.MAX))
    narrow = _chain(_op(Alu.FP_MUL0, Op.MUL), _op(Alu.CLIP_MAX, Op.MAX))
    assert (wide.stages["vector"], wide.fill, wide.total) == (64, 1, 65)
    assert (narrow.stages["vector"], narrow.fill, narrow.total) == (128, 2, 130)


def test_memset_writes_8_bytes_a_cycle() -> None:
    assert f.memset_cycles(Memset(64, 0, 4096, 0), BOOK).total == 512


@pytest.mark.parametrize(
    ("valid", "dtype", "sub", "cycles"),
    [(8, Dtype.F32, False, 10), (8, Dtype.F32, True, 40), (8, Dtype.BF16, True, 20), (8, Dtype.I8, True, 10)],
)
def test_commit(valid: int, dtype: Dtype, sub: bool, cycles: int) -> None:
    """Ten flits: one a cycle (main), Time x valid bytes / 8 (sub)."""
    assert f.commit_cycles(10, valid * dtype.bytes, sub) == cycles


def test_pass_takes_as_long_as_its_slowest_stage() -> None:
    """64 tokens of 1,024 bf16 features against 8 lanes: 32 packets of two flits a token."""
    loops = ((64, 0, 0), (32, 64, REDUCE), (1, 2048, 2))
    desc = Exec(
        64,
        Fetch(0, ((64 * 1024, 2),), Dtype.BF16, 32),
        Commit(0, ((64 * 8, 4),), Dtype.F32, 8),
        contract=Contract(8, 2, 0, loops, 32, 5, LaneMode.INTERLEAVED),
    )
    time = f.exec_cycles(desc, Context.MAIN, BOOK)
    assert time.stages == {
        "fetch": 4096, "collect": 4096, "contraction": 4096, "lane folder": 64, "commit": 64
    }  # fmt: skip
    assert time.total == 4096 + 5  # the depth of the tree


def _dma(source: Space, destination: Space, loops: tuple[tuple[int, int, int], ...], packet: int) -> Dma:
    return Dma(Endpoint(source, 0), Endpoint(destination, 0), loops, packet)


@pytest.mark.parametrize(
    ("source", "destination", "loops", "packet", "engines", "cycles"),
    [
        pytest.param(Space.HBM, Space.HBM, ((4, 1024, 256), (4, 256, 1024)), 256, 1, 532, id="20-4x4"),
        pytest.param(Space.HBM, Space.HBM, ((16, 4096, 256), (16, 256, 4096)), 256, 1, 1012, id="20-16x16"),
        pytest.param(Space.HBM, Space.DM, ((2048, 4096, 4096),), 4096, 1, 33_268, id="packets-of-4096"),
        pytest.param(Space.HBM, Space.DM, ((300, 512, 512),), 300, 1, 1100, id="300-bytes-are-2-requests"),
        pytest.param(Space.DM, Space.HBM, ((1000, 256, 256),), 256, 1, 1500, id="store"),
        pytest.param(Space.HBM, Space.DM, ((65536, 256, 256),), 256, 4, 16_884, id="four-engines"),
        # 8 engines ask for 2,048 B a cycle; the channels give 1,536: 2,048 lines each at 16/3 cycles
        pytest.param(Space.HBM, Space.DM, ((65536, 256, 256),), 256, 8, 500 + 2048 * 256 / 48, id="channels-bind"),
        pytest.param(Space.DM, Space.DM, ((128, 256, 256),), 256, 1, 756, id="small-dm-to-dm"),
    ],
)
def test_dma(
    source: Space, destination: Space, loops: tuple[tuple[int, int, int], ...], packet: int, engines: int, cycles: float
) -> None:
    """500 + requests, read and write one after the other where both sides share a memory's port."""
    assert f.dma_time(_dma(source, destination, loops, packet), BOOK, engines) == pytest.approx(cycles, abs=1e-9)


@pytest.mark.parametrize(
    ("planes", "rows", "switches"),
    [pytest.param(128, 2048, 32_768, id="23-twice-the-planes"),
     pytest.param(64, 4096, 32_768, id="23-twice-the-rows"), pytest.param(64, 1024, 8_192, id="23-half")],
)  # fmt: skip
def test_row_conflicts(planes: int, rows: int, switches: int) -> None:
    """i8 [planes, rows, 1024] read along its first axis: every request of a channel, a 32nd of all, switches its DRAM
    row, 40 cycles each."""
    plane = max(rows, 2048) * 1024  # planes of 1,024 rows lie 2 MB apart, too
    desc = _dma(Space.HBM, Space.DM, ((rows, 1024, 1024), (planes, plane, plane)), 1024)
    assert f.dma_time(desc, BOOK, engines=8) == 500 + 40 * switches
