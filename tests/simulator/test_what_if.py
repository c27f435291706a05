"""What-if runs: hand-computed changes of a transfer, free exchanges, refusals."""

from __future__ import annotations

import itertools

import pytest
import streams

from backend_rngd.machine import load_machine
from runtime_sim.accounting import CAUSES, layer_path, operation_rows, path_causes, path_segments
from runtime_sim.timing import TimingResult, simulate
from runtime_sim.topology import Topology
from runtime_sim.what_if import CHANGEABLE, IDEALS, WhatIfError, parse

BOOK, SILICON = load_machine(), load_machine(mode="silicon")


def times(*settings: str, ideal: tuple[str, ...] = (), units: int = 4, mode: str = "silicon") -> TimingResult:
    """A reduction of `units` units on a changed machine."""
    machine = SILICON if mode == "silicon" else BOOK
    what_if = parse(settings, ideal, machine)
    topology = Topology.of(machine, units)
    return simulate(
        [streams.all_reduce(units, 2)], what_if.machine, topology=topology, free_collectives=what_if.free_collectives
    )


def test_a_start_up_less_is_that_much_less() -> None:
    """Without start-up a unit alone saves exactly that of each of its transfers on the critical path."""
    stream = streams.stream_of(streams.routine("main", (streams.load(0), 0, 0), (streams.store(0), 0, 0)))
    base = simulate(stream, BOOK)
    free = simulate(stream, parse(["dma_startup_cycles=0"], [], BOOK).machine)
    assert base.cycles - free.cycles == pytest.approx(2 * 500)
    doubled = simulate(stream, parse(["dma.startup-cycles=2x"], [], BOOK).machine)
    assert doubled.cycles - base.cycles == pytest.approx(2 * 500)


@pytest.mark.parametrize("mode", ["documented", "silicon"])
def test_factors_are_of_the_mode_and_reported(mode: str) -> None:
    machine = SILICON if mode == "silicon" else BOOK
    what_if = parse(["dma_startup_cycles=0.5x", "hbm.bandwidth=1.5x"], ["sync"], machine)
    changes = {c.name: (c.before, c.after) for c in what_if.changes}
    assert changes["dma_startup_cycles"] == ((1100, 550) if mode == "silicon" else (500, 250))
    assert changes["hbm_channel_bytes_per_cycle"] == (48, 72)
    assert changes["cluster_sync_cycles"] == ((200 if mode == "silicon" else 600), 0)
    assert changes["dma_hbm_bytes_per_cycle"] == ((177, 265.5) if mode == "silicon" else (256, 384))
    assert what_if.machine.hbm_bytes_per_cycle == 32 * 72
    assert what_if.machine.mode == mode
    assert what_if.machine.digest() != machine.digest()
    assert machine.hbm_channel_bytes_per_cycle == 48  # the original stays
    assert what_if.to_json()["ideal"] == ["sync"]
    assert not parse([], [], machine).asked
    assert parse([], [], machine).machine is machine


@pytest.mark.parametrize("part", sorted(IDEALS))
def test_an_ideal_part_costs_nothing_and_never_hurts(part: str) -> None:
    """Every part makes this reduction over two clusters faster, but for links and HBM, which it does not use up."""
    base, ideal = times(units=8), times(ideal=(part,), units=8)
    assert ideal.cycles < base.cycles or part in ("links", "hbm")
    assert ideal.cycles <= base.cycles * (1 + 1e-9)
    assert ideal.macs == base.macs and ideal.hbm_read_bytes == base.hbm_read_bytes
    if part == "issue":
        passes = ideal.flat.context < 2
        assert ideal.column("overhead")[passes].sum() < 0.5 * base.column("overhead")[passes].sum()
    if part == "dma":
        moving = (ideal.flat.context == 2) & (ideal.column("moved_bytes") > 0)
        assert ideal.column("overhead")[moving].max() == 0


def test_ideal_collectives_leave_what_units_do_alone() -> None:
    base, sync, free = times(), times(ideal=("sync",)), times(ideal=("collectives",))
    assert free.cycles < sync.cycles < base.cycles
    path = free.critical_path
    serving = free.column("collective").astype(bool)
    assert sum(c for i, c in zip(path, free.path_cycles, strict=True) if serving[i]) == 0
    assert free.hbm_read_bytes == base.hbm_read_bytes


def test_every_changeable_parameter_is_one_and_keeps_time_finite() -> None:
    assert not CHANGEABLE - set(BOOK.parameters)
    base = times().cycles
    for name in sorted(CHANGEABLE):
        slower = "0.5x" if getattr(SILICON, name) and ("bytes" in name or name == "hbm_efficiency") else "2x"
        assert times(f"{name}={slower}").cycles >= base * (1 - 1e-9) or name == "lookup_keys_per_cycle", name


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("hbm_chanel_bytes_per_cycle=2x", ("no such parameter", "hbm_channel_bytes_per_cycle")),
        ("hbm.bandwith=2x", ("no such parameter", "hbm.bandwidth")),
        ("max_loops=2x", ("streams were made for", "dma_startup_cycles")),
        ("dma_startup_cycles", ("has a value",)),
        ("dma_startup_cycles=fast", ("'fast' is no number",)),
        ("dma_startup_cycles=-1", ("impossible",)),
        ("hbm_efficiency=0", ("impossible",)),
        ("hbm_efficiency=nan", ("impossible",)),
    ],
)
def test_refusals(setting: str, words: tuple[str, ...]) -> None:
    with pytest.raises(WhatIfError) as caught:
        parse([setting], [], BOOK)
    assert all(word in str(caught.value) for word in words)


def test_refused_combinations() -> None:
    with pytest.raises(WhatIfError, match="changed already"):
        parse(["dma_startup_cycles=1", "dma.startup.cycles=2"], [], BOOK)
    with pytest.raises(WhatIfError, match="changed already"):
        parse(["notify_issue_cycles=1"], ["sync"], BOOK)
    with pytest.raises(WhatIfError, match="use collectives, hbm, sync, dma, issue, links"):
        parse([], ["everything"], BOOK)


@pytest.mark.parametrize("units", [1, 2, 8])
def test_accounts_of_the_path_sum_to_the_makespan(units: int) -> None:
    result = times(units=units) if units > 1 else simulate(streams.all_reduce(1), SILICON)
    causes = path_causes(result)
    assert causes.min() >= -1e-6
    assert causes.sum(axis=1).tolist() == pytest.approx(result.path_cycles)
    rows = operation_rows(result)
    assert sum(r["path_cycles"] for r in rows) == pytest.approx(result.cycles)
    assert {c for r in rows for c in r["causes"]} <= set(CAUSES)
    assert sum(layer_path(result).values()) == pytest.approx(result.cycles)
    segments = path_segments(result)
    assert segments[0]["begin"] == 0
    assert segments[-1]["end"] == result.cycles
    assert all(a["end"] == b["begin"] for a, b in itertools.pairwise(segments))
    assert sum(s["instructions"] for s in segments) == len(result.critical_path)


def test_the_clock_leaves_memory_alone() -> None:
    """At 0.8 of the clock a cycle is longer, HBM moves more bytes in it, and a further change is of that machine."""
    what_if = parse(["clock=0.8", "hbm.bandwidth=2x"], [], SILICON)
    assert [c.name for c in what_if.changes][:1] == ["clock_scale"]
    assert what_if.machine.hbm_bytes_per_cycle == pytest.approx(2 * 1536 / 0.8)
    alone = parse(["clock.scale=0.8"], [], SILICON).machine
    assert alone.seconds_per_cycle == pytest.approx(1.25e-9)
    assert alone.hbm_bytes_per_cycle / alone.seconds_per_cycle == pytest.approx(1536e9)
    with pytest.raises(WhatIfError, match="already"):
        parse(["clock=0.8", "clock_scale=1"], [], SILICON)
    with pytest.raises(WhatIfError, match="impossible"):
        parse(["clock=0"], [], SILICON)
