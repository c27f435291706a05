"""What collectives cost once lowered: against the closed form that chooses the algorithm, and against silicon."""

from __future__ import annotations

import pytest

from backend_rngd.isa.descriptors import Context
from backend_rngd.machine import load_machine
from backend_rngd.machine.formulas import best_collective
from ir.text import parse_module
from rngdc.buckets import BucketSpec
from rngdc.build import compile_modules
from runtime_sim.timing import TimingResult, simulate
from runtime_sim.topology import Topology

MACHINE = load_machine(mode="silicon")
HIDDEN = 4096


def run(units: int, tokens: int) -> TimingResult:
    """A row-parallel contraction, its sum over the units, and a contraction that needs whole rows."""
    part = HIDDEN // units
    x = f'tensor<1x{tokens}x{part}xbf16, #tc.axes<"B,S,_">>'
    y = f'tensor<1x{tokens}x{HIDDEN}xbf16, #tc.axes<"B,S,_">>'
    z = f'tensor<1x{tokens}x64xbf16, #tc.axes<"B,S,_">>'
    text = f"""
builtin.module attributes {{tc.mesh = "kv={units}"}} {{
  func.func @main(%x: {x}) -> {z} attributes {{arg_names = ["x"], result_names = ["y"]}} {{
    %w = tc.weight "w" shard "{HIDDEN}, {HIDDEN}@tp" : tensor<{HIDDEN}x{part}xbf16>
    %p = tc.contract "b s i, o i -> b s o" (%x, %w) : {y}
    %r = tc.all_reduce %p kind add axis tp why "test" : {y}
    %v = tc.weight "v" : tensor<64x{HIDDEN}xbf16>
    %y = tc.contract "b s i, o i -> b s o" (%r, %v) : {z}
    func.return %y : {z}
  }}
}}
"""
    bucket = BucketSpec("decode", 1, tokens, 1024)
    programs = compile_modules({bucket: parse_module(text)}, MACHINE, lambda _: None)
    emitted = programs.programs[0].emitted
    assert emitted is not None
    return simulate(emitted.streams[0], MACHINE, topology=Topology.of(MACHINE, units), launch=emitted.launch)


def spent(result: TimingResult) -> tuple[float, float]:
    """Cycles from the notify of a sum over units to its last addition or transfer, and from there to the end of the
    pass that takes the sum to all slices."""
    rows = [i for i in range(len(result.flat)) if result.flat.unit[i] == 0]
    mine = [i for i in rows if result.locations[i].endswith("tc.all_reduce")]
    passes = [i for i in rows if i > mine[-1] and result.flat.context[i] == int(Context.MAIN)]
    end = max(result.finish[i] for i in mine)
    return end - min(result.start[i] for i in mine), result.finish[passes[0]] - end


@pytest.mark.parametrize("units", [2, 4, 8, 16, 32])
def test_the_closed_form_is_what_a_program_pays(units: int) -> None:
    result = run(units, 1)
    cost, ring = spent(result)
    cards = -(-units // MACHINE.pes_per_chip)
    _, expected = best_collective("all_reduce", HIDDEN * 2, units, cards, MACHINE)
    assert cost + ring == pytest.approx(expected, rel=0.03)
    assert len(result.flat.streams) == 1  # all units alike
    # What the sum adds is called collective; waiting for the others is only the way of the notify.
    assert result.collective_share * result.cycles == pytest.approx(cost, rel=0.15)
    for row in result.stalls[0].values():
        assert sum(row.values()) == pytest.approx(result.cycles)


def test_two_pes_of_a_cluster_take_as_long_as_measured() -> None:
    """8 KB of bf16 on two PEs took 3.67 and 1.98 us on cards (hardware.md 7.4, HP)."""
    seconds = sum(spent(run(2, 1))) * MACHINE.seconds_per_cycle
    assert 1.98e-6 < seconds < 3.67e-6
