"""Live bytes over time, and rates, on programs whose answer is plain."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import streams
from hypothesis import given
from hypothesis import strategies as st

from backend_rngd.isa.descriptors import Stream
from backend_rngd.machine import load_machine
from runtime_sim.analysis import Analysis, Resident
from runtime_sim.memory_timeline import BEFORE
from runtime_sim.rates import spread
from runtime_sim.timing import simulate
from runtime_sim.topology import Topology

MACHINE = load_machine()
BYTES = streams.SLICES * streams.ROW


def analysed(*items: tuple, resident: Resident | None = None) -> Analysis:
    stream: Stream = streams.stream_of(streams.routine("main", *items))
    return Analysis(simulate(stream, MACHINE), [resident] if resident else [])


def test_a_value_lives_from_its_write_to_its_last_read() -> None:
    a = analysed(
        (streams.load(0), 0, 0),  # layer.0 writes 0
        (streams.scale(0, 4096, 2.0), 0, 1),  # layer.1 reads 0, writes 4096
        (streams.scale(4096, 0, 2.0), 1, 1),  # layer.2 reads 4096, writes 0 again
        (streams.store(0), 2, 1),  # layer.3 reads 0
    )
    line = a.data_memory(0)
    start, finish = a.result.start, a.result.finish
    found = {
        line.names[w]: (b, e, n) for w, b, e, n in zip(line.writer, line.begin, line.end, line.nbytes, strict=True)
    }
    dma = [i for i in range(4) if a.result.flat.context[i] == 2]
    main = [i for i in range(4) if a.result.flat.context[i] == 0]
    assert found == {
        "layer.0 op": (start[dma[0]], finish[main[0]], BYTES),
        "layer.1 op": (start[main[0]], finish[main[1]], BYTES),
        "layer.2 op": (start[main[1]], finish[dma[1]], BYTES),
    }
    assert line.peak[1] == 2 * BYTES
    moments, live = line.sampled(50)
    assert live.sum(axis=0).max() == 2 * BYTES
    assert np.array_equal(live, line.at(moments))
    assert line.at(np.array([finish[dma[1]]])).sum() == 0


def test_hbm_area_and_what_was_there_before() -> None:
    """The program reads its input and writes its output, which the host reads at the end."""
    resident = Resident(1000, 10, 0, (0, 1 << 16), ((streams.OUTPUT, BYTES),))
    a = analysed((streams.load(0), 0, 0), (streams.store(0), 0, 1), resident=resident)
    line = a.hbm(0)
    assert line is not None
    found = {
        line.names[w]: (b, e, n) for w, b, e, n in zip(line.writer, line.begin, line.end, line.nbytes, strict=True)
    }
    result = a.result
    assert found == {
        BEFORE: (0.0, result.finish[0], BYTES),
        "layer.1 op": (result.start[1], result.cycles, BYTES),
    }
    rows = a.memory(0)
    assert rows[1]["resident"] == {"weights": 1000, "constants": 10, "caches": 0}
    assert rows[1]["peak_bytes"] == BYTES
    assert rows[0]["capacity"] == streams.SLICES * MACHINE.dm_slice_bytes


QUARTERS = st.integers(0, 400)


@given(st.lists(st.tuples(QUARTERS, QUARTERS, st.integers(0, 1000)), max_size=20), st.integers(1, 30))
def test_amounts_are_spread_evenly(flows: list[tuple[int, int, int]], bins: int) -> None:
    begin = np.array([min(a, b) / 4 for a, b, _ in flows])
    end = np.array([max(a, b) / 4 for a, b, _ in flows])
    amount = np.array([float(n) for _, _, n in flows])
    out = spread(begin, end, amount, 100.0, bins)
    assert out.sum() == pytest.approx(amount.sum(), abs=1e-6)
    edges = np.linspace(0, 100, bins + 1)
    for k, (low, high) in enumerate(itertools.pairwise(edges)):
        expected = sum(
            n * max(0.0, min(e, high) - max(b, low)) / (e - b)
            if e > b
            else n * (min(int(e / 100 * bins), bins - 1) == k)
            for b, e, n in zip(begin, end, amount, strict=True)
        )
        assert out[k] == pytest.approx(expected, abs=1e-6 * (1 + amount.sum()))


def test_traffic_of_operations_sums_to_the_run() -> None:
    """Bytes by memory and network of the operations are those of the run; points are below their roofs."""
    machine = load_machine(mode="silicon")
    a = Analysis(simulate([streams.all_reduce(8, 2)], machine, topology=Topology.of(machine, 8)))
    result = a.result
    assert sum(o["hbm_bytes"] for o in a.operations) == result.hbm_read_bytes + result.hbm_write_bytes
    moved = sum(row["cluster_bytes"] + row["chip_bytes"] for row in result.per_unit)
    assert moved > 0
    assert sum(o["noc_bytes"] for o in a.operations) == pytest.approx(moved)
    assert sum(o["pcie_bytes"] for o in a.operations) == 0
    stalled = sum(o["stalled"] for o in a.operations)
    named = sum(
        c
        for o in a.operations
        for w, c in o["waits"].items()
        if not w.startswith("contention")  # which is not idleness
    )
    blocked = float((result.gaps[:, 2] * result.column("wait") * result.copies).sum())
    assert named == pytest.approx(stalled + blocked)
