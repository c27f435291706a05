"""What collectives cost once lowered: against the closed form that chooses the algorithm, and against silicon."""

from __future__ import annotations

import pytest

from backend_rngd.machine import load_machine
from backend_rngd.machine.formulas import best_collective
from ir.text import parse_module
from rngdc.buckets import BucketSpec
from rngdc.build import compile_modules
from runtime_sim.timing import TimingResult, simulate
from runtime_sim.topology import Topology

MACHINE = load_machine(mode="silicon")
HIDDEN = 4096


def run(units: int, tokens: int, reduce: bool) -> TimingResult:
    """A row-parallel contraction, its sum over the units or not, and a residual addition."""
    part = HIDDEN // units
    x = f'tensor<1x{tokens}x{part}xbf16, #tc.axes<"B,S,_">>'
    y = f'tensor<1x{tokens}x{HIDDEN}xbf16, #tc.axes<"B,S,_">>'
    text = f"""
builtin.module attributes {{tc.mesh = "kv={units}"}} {{
  func.func @main(%x: {x}, %s: {y}) -> {y} attributes {{arg_names = ["x", "s"], result_names = ["y"]}} {{
    %w = tc.weight "w" shard "{HIDDEN}, {HIDDEN}@tp" : tensor<{HIDDEN}x{part}xbf16>
    %p = tc.contract "b s i, o i -> b s o" (%x, %w) : {y}
    {f'%r = tc.all_reduce %p kind add axis tp why "test" : {y}' if reduce else ""}
    %y = tc.map "add(a, b)" over "b s o, b s o -> b s o" ({"%r" if reduce else "%p"}, %s) : {y}
    func.return %y : {y}
  }}
}}
"""
    bucket = BucketSpec("decode", 1, tokens, 1024)
    programs = compile_modules({bucket: parse_module(text)}, MACHINE, lambda _: None)
    emitted = programs.programs[0].emitted
    assert emitted is not None
    return simulate(emitted.streams[0], MACHINE, topology=Topology.of(MACHINE, units), launch=emitted.launch)


@pytest.mark.parametrize("units", [2, 4, 8, 16, 32])
def test_the_closed_form_is_what_a_program_pays(units: int) -> None:
    with_sum, without = run(units, 1, True), run(units, 1, False)
    cost = with_sum.cycles - without.cycles
    cards = -(-units // MACHINE.pes_per_chip)
    _, expected = best_collective("all_reduce", HIDDEN * 2, units, cards, MACHINE)
    assert cost == pytest.approx(expected, rel=0.03)
    assert len(with_sum.flat.streams) == 1  # all units alike
    # What the sum adds is called collective; waiting for the others is only the way of the notify.
    assert with_sum.collective_share * with_sum.cycles == pytest.approx(cost, rel=0.15)
    for row in with_sum.stalls[0].values():
        assert sum(row.values()) == pytest.approx(with_sum.cycles)


def test_two_pes_of_a_cluster_take_as_long_as_measured() -> None:
    """8 KB of bf16 on two PEs took 3.67 and 1.98 us on cards (hardware.md 7.4, HP)."""
    seconds = run(2, 1, True).seconds - run(2, 1, False).seconds
    assert 1.98e-6 < seconds < 3.67e-6
