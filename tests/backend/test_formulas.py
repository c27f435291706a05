"""Worked cases of the public book (hardware.md 5.2), reproduced exactly in documented mode."""

from __future__ import annotations

import pytest

from backend_rngd.isa.descriptors import (
    REDUCE,
    Commit,
    Context,
    Contract,
    Dma,
    Dtype,
    Endpoint,
    Exec,
    Fetch,
    LaneMode,
    LoadTrf,
    Lookup,
    Space,
    Switch,
    SwitchKind,
)
from backend_rngd.machine import formulas as f
from backend_rngd.machine import load_machine

BOOK = load_machine("rngd", "documented")
SILICON = load_machine("rngd", "silicon")


@pytest.mark.parametrize(
    ("time", "packet", "read", "cycles"),
    [
        pytest.param(48, 8, 8, 48, id="1"),
        pytest.param(24, 16, 16, 24, id="2"),
        pytest.param(12, 32, 32, 12, id="3"),
        pytest.param(4, 96, 32, 12, id="4"),
        pytest.param(15, 8, 8, 15, id="5a"),
        pytest.param(3, 16, 16, 3, id="5b"),
        pytest.param(1, 32, 32, 1, id="5c"),
        # [2, 65] i8 with dummy elements at the row's end; the old book reads 24 B at once
        pytest.param(2 * (65 + 7) // 24, 24, 24, 6, id="6-dummy-7"),
        pytest.param(2 * (65 + 15) // 16, 16, 16, 10, id="6-dummy-15"),
        pytest.param(2 * (65 + 23) // 8, 8, 8, 22, id="6-dummy-23"),
        pytest.param(2 * (65 + 31) // 32, 32, 32, 6, id="6-dummy-31"),
        pytest.param(15, 8, 8, 15, id="7-separate"),
        pytest.param(3, 32, 32, 3, id="7-merged"),
    ],
)
def test_fetch(time: int, packet: int, read: int, cycles: int) -> None:
    assert f.fetch_cycles(time, packet, read) == cycles


@pytest.mark.parametrize(
    ("rows", "packet", "stride", "cycles"),
    [
        pytest.param(48, 8, 8, 48, id="1"),
        pytest.param(24, 16, 16, 24, id="2"),
        pytest.param(12, 32, 32, 12, id="3"),
        pytest.param(4, 96, 96, 12, id="4"),
        pytest.param(15, 8, 16, 15, id="5a"),
    ],
)
def test_fetch_of_a_descriptor(rows: int, packet: int, stride: int, cycles: int) -> None:
    """The same numbers from byte loops: the access size is derived from the layout."""
    loops = ((rows * packet, 1),) if stride == packet else ((rows, stride), (packet, 1))
    fetch = Fetch(0, loops, Dtype.I8, packet)
    assert f.fetch_time(fetch, Context.MAIN, BOOK) == cycles


def test_sub_context_reads_8_bytes_a_cycle() -> None:
    fetch = Fetch(0, ((512, 1),), Dtype.I8, 32)
    assert f.fetch_time(fetch, Context.MAIN, BOOK) == 16
    assert f.fetch_time(fetch, Context.SUB, BOOK) == 64


def test_widening_limits_the_access_to_one_flit_of_results() -> None:
    fetch = Fetch(0, ((64, 2),), Dtype.BF16, 16, Dtype.F32)
    assert f.fetch_time(fetch, Context.MAIN, BOOK) == 8  # 16 B of bf16 are 32 B of f32


def test_a_table_limits_the_fetch() -> None:
    """4 keys an access give 8 f32; the table takes 6.25 keys a cycle, and silicon loads it for every pass (KK)."""
    wide = Fetch(0, ((512, 1),), Dtype.I8, 8, Dtype.F32, None, Lookup.I4_F8E4M3)
    assert f.fetch_time(wide, Context.MAIN, BOOK) == 512 / 4
    narrow = Fetch(0, ((512, 1),), Dtype.I8, 16, None, None, Lookup.I4_F8E4M3)
    assert f.fetch_time(narrow, Context.MAIN, BOOK) == 512 / 6.25
    passes = [
        Exec(64, fetch, Commit(4096, ((1024, 4),), Dtype.F32, 8))
        for fetch in (wide, Fetch(0, ((1024, 1),), Dtype.I8, 8, Dtype.I32))
    ]
    silicon = [f.exec_cycles(p, Context.MAIN, SILICON).fill for p in passes]
    assert silicon[0] - silicon[1] == 838


@pytest.mark.parametrize(
    ("kind", "slice1", "slice0", "time0", "packets", "packet", "dtype", "cycles"),
    [
        pytest.param(SwitchKind.BROADCAST01, 2, 2, 1, 64, 64, Dtype.F32, 2048, id="8"),
        pytest.param(SwitchKind.BROADCAST1, 4, 8, 1, 64, 64, Dtype.I8, 4096, id="9"),
        pytest.param(SwitchKind.INTER_TRANSPOSE, 2, 16, 2, 8, 32, Dtype.I8, 256, id="11"),
        pytest.param(SwitchKind.TRANSPOSED_BROADCAST1, 8, 8, 1, 16, 32, Dtype.I8, 1024, id="12"),
        pytest.param(SwitchKind.BROADCAST01, 1, 256, 8, 8, 64, Dtype.F32, 16384, id="13"),
    ],
)
def test_switch(
    kind: SwitchKind, slice1: int, slice0: int, time0: int, packets: int, packet: int, dtype: Dtype, cycles: int
) -> None:
    ring = slice1 * slice0
    flits = -(-packet * dtype.bytes // 32)
    assert f.switch_cycles(ring, packets, flits) == cycles
    desc = Exec(
        256,
        Fetch(0, ((packets * packet, dtype.bytes),), dtype, packet),
        Commit(0, ((8, dtype.bytes),), dtype, 8),
        Switch(kind, slice1, slice0, time0),
    )
    assert f.exec_cycles(desc, Context.MAIN, BOOK).stages["switch"] == cycles


@pytest.mark.parametrize(
    ("rows", "cols", "out_rows", "n", "cycles"),
    [
        pytest.param(8, 16, 16, 2, 48, id="14"),
        pytest.param(4, 8, 2, 1, 6, id="15"),
        pytest.param(4, 8, 8, 8, 68, id="17"),
        pytest.param(2, 8, 8, 4, 34, id="19"),
    ],
)
def test_transpose(rows: int, cols: int, out_rows: int, n: int, cycles: int) -> None:
    assert f.transpose_cycles(rows, cols, out_rows, n) == cycles


def test_wide_transpose_is_not_double_buffered() -> None:
    assert f.transpose_cycles(8, 32, 32, 2) == 2 * (32 + 32)


def _dma(source: Space, destination: Space, loops: tuple[tuple[int, int, int], ...], packet: int) -> Dma:
    return Dma(Endpoint(source, 0), Endpoint(destination, 0), loops, packet)


def test_dma_hbm_to_hbm() -> None:
    """Case 20: i8 [8, 8, 256] permuted, 64 reads and 64 writes of 256 B share HBM."""
    desc = _dma(Space.HBM, Space.HBM, ((8, 2048, 256), (8, 256, 2048)), 256)
    assert f.dma_time(desc, BOOK) == 628


def test_dma_hbm_to_dm() -> None:
    """Case 21: i8 256^3 by one engine, 65,536 requests."""
    desc = _dma(Space.HBM, Space.DM, ((65536, 256, 256),), 256)
    work = f.dma_work(desc, BOOK)
    assert (work.read_requests, work.write_requests, work.serial) == (65536, 65536, False)
    assert f.dma_time(desc, BOOK) == 66036


def test_dma_dm_to_dm() -> None:
    """Case 22: reads and writes of one cluster take turns."""
    desc = _dma(Space.DM, Space.DM, ((65536, 256, 256),), 256)
    assert f.dma_time(desc, BOOK) == 131072 + 500


def test_dma_with_row_conflicts() -> None:
    """Case 23: i8 [64, 2048, 1024] read along its first axis by 8 engines. Its addresses say that every request of a
    channel switches the row."""
    desc = _dma(Space.HBM, Space.DM, ((2048, 1024, 1024), (64, 1 << 21, 1 << 21)), 1024)
    assert f.dma_work(desc, BOOK).read_lines == 16384 * BOOK.hbm_channels
    assert f.dma_time(desc, BOOK, engines=8) == 655_860


def test_one_live_element_of_a_packet() -> None:
    """Case 28: bf16 with the contraction axis in time."""
    assert f.mac_utilisation(8, 2, 1, 32, 2, 256, 256) == 1 / 32


def _matmul(broadcast: int) -> Exec:
    rows, k = 64, 1024
    loops = ((rows, 0, 0), (k // 32, 64, REDUCE), (broadcast, k * 2, 2))
    return Exec(
        64,
        Fetch(0, ((rows * k, 2),), Dtype.BF16, 32),
        Commit(0, ((rows * broadcast * 8, 4),), Dtype.F32, 8),
        contract=Contract(8, 2, 0, loops, 32, 5, LaneMode.INTERLEAVED),
    )


def test_a_packet_used_twice_keeps_the_multipliers_busy() -> None:
    """Design, "many tokens": a slice does 256 MAC a cycle when each 64 B packet serves two cycles."""
    desc = _matmul(2)
    time = f.exec_cycles(desc, Context.MAIN, BOOK)
    assert time.stages["fetch"] == time.stages["contraction"] == 64 * 32 * 2
    assert f.macs(desc) == 64 * 1024 * 16 * 64
    assert f.macs(desc) / 64 / time.stages["contraction"] == 256


def test_silicon_mode_adds_issue_and_fill() -> None:
    desc = _matmul(2)
    book, real = f.exec_cycles(desc, Context.MAIN, BOOK), f.exec_cycles(desc, Context.MAIN, SILICON)
    assert real.stages == book.stages
    assert real.total - book.total == 280 + 4


def test_sub_context_commits_8_bytes_a_cycle() -> None:
    desc = Exec(64, Fetch(0, ((512, 4),), Dtype.F32, 8), Commit(0, ((512, 4),), Dtype.F32, 8))
    assert f.exec_cycles(desc, Context.MAIN, BOOK).stages["commit"] == 64
    assert f.exec_cycles(desc, Context.SUB, BOOK).stages["commit"] == 256


def test_trf_load_hides_behind_64_tokens() -> None:
    """Design: 32 KB (half a TRF) take 4,096 cycles at 8 B a cycle a slice."""
    desc = LoadTrf(64, Fetch(0, ((16384, 2),), Dtype.BF16, 16), 8, 0)
    assert f.load_trf_cycles(desc, Context.SUB, BOOK).total == 4096


def test_every_parameter_says_where_it_comes_from() -> None:
    for name, p in BOOK.parameters.items():
        assert p.unit and p.source and p.why, name
        assert hasattr(BOOK, name)


def test_modes_differ_only_where_silicon_is_given() -> None:
    for name, p in BOOK.parameters.items():
        assert getattr(BOOK, name) == p.value
        assert getattr(SILICON, name) == (p.value if p.silicon is None else p.silicon)
    assert BOOK.digest() == SILICON.digest()
    assert BOOK.in_mode("silicon") == SILICON


def test_misspelled_parameter_is_refused(tmp_path: object) -> None:
    from importlib import resources
    from pathlib import Path

    text = (resources.files("backend_rngd.machine") / "rngd.toml").read_text()
    bad = Path(str(tmp_path)) / "bad.toml"
    bad.write_text(text.replace("[vrf_bytes]", "[vrf_byte]"))
    with pytest.raises(ValueError, match="vrf_byte"):
        load_machine(str(bad))
    with pytest.raises(FileNotFoundError, match="no machine"):
        load_machine("tpu")


@pytest.mark.parametrize("algorithm", ["one_shot", "two_phase"])
def test_rows_of_a_collective_are_read_in_runs_of_their_own(algorithm: f.Algorithm) -> None:
    def cycles(nbytes: int, rows: int) -> float:
        return f.collective_time("all_reduce", algorithm, nbytes, 8, 1, SILICON, rows=rows)

    line = SILICON.slices_per_pe * SILICON.dma_request_bytes
    assert cycles(4 * line, 4) == cycles(4 * line, 1)  # every run is whole requests
    assert cycles(line, 4) > cycles(line, 2) > cycles(line, 1)  # runs of a quarter of a request take one each
