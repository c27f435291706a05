"""How decoding and prefill scale with tensor and pipeline parallelism: writes docs/scaling.md.

    python benchmarks/scaling.py [--models 8b 70b] [--tp 1 2 4 8 16 32] [--pp 1 2 4] [--mode silicon]
                                 [--output FILE] [--json FILE]

Llama-3.1-8B and 70B from their configs alone (no weights): every program is compiled and verified as `rngdc build` does
it, its units are placed on PEs and cards, and their streams are timed with synchronisation and contention. Times are
predictions of the simulator.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from scaling_report import MEASURED, Failure, Point, report
from xdsl.dialects.builtin import ModuleOp

from backend_rngd.artifact.stages import balance, block_costs, needs, stage_stream
from backend_rngd.isa.descriptors import Stream
from backend_rngd.machine import Machine, Mode, load_machine
from backend_rngd.machine.formulas import collective_algorithms, collective_time
from frontend.capture import capture
from frontend.resolve import resolve_model
from ir.errors import UserError
from ir.text import parse_module
from passes.opt import run_pipeline
from passes.pipeline import outline_stage, simplify_stage, specialise_stage
from rngdc.buckets import BucketSpec
from rngdc.build import compile_modules
from rngdc.options import ParallelOptions, shard_passes
from rngdc.program import Programs
from runtime_sim.timing import TimingResult, simulate
from runtime_sim.topology import Topology

ROOT = Path(__file__).parents[1]
MODELS = {"8b": ("llama-3.1-8b", "Llama-3.1-8B"), "70b": ("llama-3.1-70b", "Llama-3.1-70B")}
DECODE = BucketSpec("decode", 1, 1, 1024)
PREFILL = BucketSpec("prefill", 1, 1024, 1024)
PAGE = 4096


def compile_both(model: ModuleOp, tensor: int, machine: Machine) -> dict[BucketSpec, Programs]:
    """Both programs of a model; the decode and prefill buckets are compiled apart, each with its own HBM map."""
    # Pipeline stages share the weights out after the build: what fits is judged for every arrangement below.
    roomy = machine.model_copy(update={"hbm_usable_bytes": 1 << 39})
    out: dict[BucketSpec, Programs] = {}
    for bucket in (DECODE, PREFILL):
        module = model.clone()
        sizes = specialise_stage(bucket.batch, bucket.input_length, bucket.attention_size)
        run_pipeline(module, [*sizes, *shard_passes(ParallelOptions(tensor=tensor), machine), *outline_stage()])
        out[bucket] = compile_modules({bucket: module}, roomy, lambda _: None)
    return out


def only_stream(programs: Programs) -> Stream:
    """The stream that all units run."""
    emitted = programs.programs[0].emitted
    assert emitted is not None
    return emitted.streams[0]


def fullest_card(programs: Programs, streams: Sequence[Stream], topology: Topology) -> int:
    """Bytes of HBM that the fullest card needs."""
    unit: list[int] = []
    for stream in streams:
        held = needs([stream], programs.placements, programs.caches, programs.hbm, PAGE)
        unit.append(held.shared_bytes + held.own_bytes)
    on_card: dict[int, int] = {}
    for place in topology.places:
        on_card[place.card] = on_card.get(place.card, 0) + unit[place.stage]
    return max(on_card.values())


def measure(
    name: str,
    bucket: BucketSpec,
    programs: Programs,
    machine: Machine,
    tensor: int,
    pipeline: int,
    costs: Sequence[float],
) -> Point:
    """Time one arrangement. costs: of the program's blocks, for balanced stages."""
    emitted = programs.programs[0].emitted
    assert emitted is not None
    cuts = balance(costs, pipeline)
    streams = [stage_stream(emitted.streams[0], cuts, stage) for stage in range(pipeline)]
    topology = Topology.of(machine, tensor, pipeline)

    def run(repeats: int) -> TimingResult:
        return simulate(streams, machine, topology=topology, launch=emitted.launch, repeats=repeats)

    once = run(1)
    step = once.seconds
    if pipeline > 1:
        step = (run(3 * pipeline).seconds - run(pipeline).seconds) / (2 * pipeline)
    busiest = max(once.per_unit, key=lambda row: row["hbm_read_bytes"] + row["hbm_write_bytes"])
    card_bytes = fullest_card(programs, streams, topology)
    return Point(
        name, bucket.phase, tensor, pipeline, topology.cards, once.seconds, step, once.collective_share,
        once.hbm_utilisation, (busiest["hbm_read_bytes"] + busiest["hbm_write_bytes"]) / once.seconds,
        max(row["dm_utilisation"] for row in once.per_unit), programs.peak.get("dm", 0), card_bytes,
        card_bytes <= machine.hbm_usable_bytes,
        {"cycles": once.cycles, "instructions": once.instructions, "stalls": once.stalls[once.slowest]},
    )  # fmt: skip


# The all-reduce alone ------------------------------------------------------------------------------------------------
def reduced(units: int, inner: int, hidden: int, reduce: bool) -> str:
    """A row-parallel contraction of one token over `inner` features in all, with or without its all-reduce."""
    part = inner // units
    x = f'tensor<1x1x{part}xbf16, #tc.axes<"B,S,_">>'
    y = f'tensor<1x1x{hidden}xbf16, #tc.axes<"B,S,_">>'
    collective = f'%r = tc.all_reduce %p kind add axis tp why "benchmark" : {y}' if reduce else ""
    return f"""
builtin.module attributes {{tc.mesh = "kv={units}"}} {{
  func.func @main(%x: {x}, %s: {y}) -> {y} attributes {{arg_names = ["x", "s"], result_names = ["y"]}} {{
    %w = tc.weight "w" shard "{hidden}, {inner}@tp" : tensor<{hidden}x{part}xbf16>
    %p = tc.contract "b s i, o i -> b s o" (%x, %w) : {y}
    {collective}
    %y = tc.map "add(a, b)" over "b s o, b s o -> b s o" ({"%r" if reduce else "%p"}, %s) : {y}
    func.return %y : {y}
  }}
}}
"""


def all_reduce_seconds(units: int, inner: int, machine: Machine, hidden: int = 4096) -> float:
    """A layer's contraction, sum and residual addition on `units` PEs, less the same without the sum."""
    seconds: list[float] = []
    for reduce in (True, False):
        bucket = BucketSpec("decode", 1, 1, 1024)
        programs = compile_modules(
            {bucket: parse_module(reduced(units, inner, hidden, reduce))}, machine, lambda _: None
        )
        emitted = programs.programs[0].emitted
        assert emitted is not None
        topology = Topology.of(machine, units)
        seconds.append(simulate(emitted.streams[0], machine, topology=topology, launch=emitted.launch).seconds)
    return seconds[0] - seconds[1]


def all_reduces(machine: Machine) -> list[dict[str, Any]]:
    """8 KB on 2, 4, 8 PEs and over cards: predicted in a program, the closed form, measured."""
    rows: list[dict[str, Any]] = []
    for units in (2, 4, 8, 16, 32):
        cards = -(-units // machine.pes_per_chip)
        names = collective_algorithms("all_reduce", units, cards)
        rows.append(
            {
                "units": units,
                "down_proj": all_reduce_seconds(units, 14336, machine),
                "o_proj": all_reduce_seconds(units, 4096, machine),
                "closed_form": min(
                    collective_time("all_reduce", a, 8192, units, cards, machine) for a in names
                ) * machine.seconds_per_cycle,
                "measured_us": MEASURED.get(units),
            }
        )  # fmt: skip
    return rows


def main() -> None:
    """Build, time, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--tp", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--pp", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--mode", choices=["silicon", "documented"], default="silicon")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "scaling.md")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    mode: Mode = arguments.mode
    machine = load_machine(mode=mode)
    points: list[Point] = []
    failures: list[Failure] = []
    for short in arguments.models:
        directory, name = MODELS[short]
        captured = capture(
            resolve_model(str(ROOT / "tests" / "configs" / directory), need_weights=False), weights="none"
        )
        run_pipeline(captured.module, simplify_stage())
        for tensor in arguments.tp:
            begun = time.perf_counter()
            try:
                both = compile_both(captured.module, tensor, machine)
            except UserError as error:
                what = error.problems[0].what
                failures += [Failure(name, bucket.phase, tensor, what) for bucket in (DECODE, PREFILL)]
                continue
            for bucket, programs in both.items():
                costs = block_costs(only_stream(programs))
                points += [measure(name, bucket, programs, machine, tensor, p, costs) for p in arguments.pp]
            print(f"{name} TP {tensor}: {time.perf_counter() - begun:.1f} s", file=sys.stderr)
    text = report(points, failures, all_reduces(machine), mode)
    arguments.output.write_text(text, "utf-8")
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(p) for p in points], indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
