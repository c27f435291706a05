"""How good the generated code is: Llama-3.1-8B on one card beside the vendor's compiler and the bounds of the machine.

    python benchmarks/codegen.py [-O 0-3] [--output FILE] [--json FILE]

Programs are built from the config alone, without weights and without a cache of earlier results, by the same function
as `rngdc build`, at TP 8 with the default options. They are timed in both modes. Writes docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from accuracy_bases import HP_CLOCK
from accuracy_layers import HIDDEN, INNER, KV, VOCABULARY, attention, linear
from codegen_report import Cost, Loss, Row, report
from numpy.typing import NDArray

from backend_rngd.artifact import open_artifact
from backend_rngd.machine import Machine, load_machine
from ir.text import parse_module
from rngdc.buckets import BucketRequest, BucketSpec
from rngdc.build import BuildOptions, BuildReport, ParallelOptions, build, compile_modules
from rngdc.effort import DEFAULT as DEFAULT_LEVEL
from rngdc.work import WorkOptions
from runtime_sim.accounting import CAUSES, OUTSIDE, path_causes
from runtime_sim.analysis import Analysis
from runtime_sim.runtime import Device
from runtime_sim.timing import TimingResult, simulate
from runtime_sim.topology import Topology
from runtime_sim.what_if import WhatIf

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "tests" / "configs" / "llama-3.1-8b"
LAYERS, HEADS, HEAD, PES = 32, 32, 128, 8
LAYER_WEIGHTS = HIDDEN * (2 * HIDDEN + 2 * KV + 3 * INNER)
ATTENTION = ("tc.attention", "tc.kv_update")
CACHED = 1024


@dataclass(frozen=True)
class Least:
    """What a work needs at least, over all units: multiplications, and bytes of HBM."""

    macs: float
    hbm_bytes: float

    def limits(self, machine: Machine, pes: int) -> dict[str, float]:
        """Cycles by resource, at the peaks of the machine description."""
        return {
            "compute": self.macs / (pes * peak_macs(machine)),
            "HBM": self.hbm_bytes / machine.hbm_bytes_per_cycle,
            "DM": self.hbm_bytes / (pes * machine.dm_port_bytes_per_cycle),
        }


def peak_macs(machine: Machine) -> float:
    """bf16 multiplications a cycle of a PE."""
    return machine.slices_per_pe * machine.trf_lanes * machine.contraction_packet_bytes / 2


def sustained(machine: Machine, pes: int) -> float:
    """Share of HBM's peak that transfers of so many PEs get at most."""
    engines = pes * min(machine.dma_hbm_bytes_per_cycle, machine.dma_engine_bytes_per_cycle)
    return min(engines / machine.hbm_bytes_per_cycle, machine.hbm_efficiency)


def dense(tokens: int) -> Least:
    """A layer without attention; activations stay in data memory."""
    return Least(tokens * LAYER_WEIGHTS, 2 * LAYER_WEIGHTS)


def attend(batch: int, tokens: int, cached: int) -> Least:
    """Attention of a layer, of `tokens` new ones a sequence that are among the `cached` ones."""
    pairs = batch * tokens * (cached - (tokens - 1) / 2)
    return Least(2 * pairs * HEADS * HEAD, 2 * 2 * batch * cached * KV)


def step(batch: int, tokens: int, cached: int) -> Least:
    """All layers, and the last projection of one token a sequence."""
    part, seen = dense(batch * tokens), attend(batch, tokens, cached)
    head = VOCABULARY * HIDDEN
    return Least(LAYERS * (part.macs + seen.macs) + batch * head, LAYERS * (part.hbm_bytes + seen.hbm_bytes) + 2 * head)


class Shares:
    """The critical path of a run by layer and operation: cycles by cause, and what each operation costs."""

    def __init__(self, result: TimingResult) -> None:
        self.result = result
        analysis = Analysis(result)
        self.path: dict[tuple[str, str], NDArray[np.float64]] = defaultdict(lambda: np.zeros(len(CAUSES)))
        self.costs: dict[tuple[str, str], Cost] = {}
        names = list(zip(analysis.layers, result.locations, strict=True))
        for i, row in zip(result.critical_path, path_causes(result), strict=True):
            self.path[names[i]] += row
        keys = sorted(set(names))
        number = {key: n for n, key in enumerate(keys)}
        group = np.array([number[name] for name in names])
        copies = result.copies.astype(np.float64)

        def total(values: NDArray[Any]) -> list[float]:
            return np.bincount(group, values, len(keys)).tolist()

        context, first = result.flat.context, result.flat.unit == 0
        took = result.finish - result.start
        columns = [
            total(result.column("macs") * copies), total(analysis.sites.traffic[:, 0] * copies),
            total(first & (context < 2)), total(first & (context == 2)), total(first * result.column("moved_bytes")),
            total(first * (context < 2) * took), total(first * (context == 2) * took),
        ]  # fmt: skip
        for key, values in zip(keys, zip(*columns, strict=True), strict=True):
            self.costs[key] = Cost(*values)

    def layers(self) -> list[str]:
        """Layers in the middle of the model: the first and the last overlap with something else."""
        found = dict.fromkeys(layer for layer, _ in self.costs if layer.startswith("model.layers."))
        return sorted(found, key=lambda name: int(name.rsplit(".", 1)[1]))[1:-1]

    def within(self, layers: Sequence[str] | None, keep: Callable[[str], bool]) -> tuple[float, list[Loss]]:
        """Cycles of the critical path in operations that `keep`, and all of these with their causes; of `layers` the
        mean, without them of the whole program."""
        total: dict[str, Loss] = {}
        count = 1 if layers is None else len(layers)
        for (layer, location), cost in self.costs.items():
            if not keep(location) or (layers is not None and layer not in layers):
                continue
            path, kind = location.rsplit("|", 1) if "|" in location else ("", location)
            where = "" if layer == OUTSIDE or layer.startswith("model.layers.") else f"{layer}: "
            name = f"{where}{path or 'own'} {kind.removeprefix('tc.') or 'loads of inputs'}"
            causes = self.path[layer, location] / count
            one = Loss(name, dict(zip(CAUSES, causes.tolist(), strict=True)), cost.scaled(1 / count))
            total[name] = total[name].plus(one) if name in total else one
        return sum(loss.cycles for loss in total.values()), list(total.values())


def is_dense(location: str) -> bool:
    """Whether an operation is none of attention's."""
    return not location.endswith(ATTENTION)


def is_attention(location: str) -> bool:
    """The others."""
    return not is_dense(location)


@dataclass(frozen=True)
class Work:
    """A row of the table before it is timed. vendor, target: us, or None. keep, layers: what of the program counts."""

    name: str
    vendor: float | None
    target: float | None
    least: Least
    pes: int = PES
    part: Callable[[str], bool] | None = None

    def row(self, results: dict[str, TimingResult]) -> Row:
        """Times in us by mode; losses of the silicon mode. The mode "vendor's clock" is `silicon` on a slower card."""
        times: dict[str, float] = {}
        bounds: dict[str, tuple[float, str]] = {}
        losses: list[Loss] = []
        for mode, result in results.items():
            machine, us = result.machine, result.machine.seconds_per_cycle * 1e6
            limits = self.least.limits(machine, self.pes)
            binds = max(limits, key=lambda name: limits[name])
            shares = Shares(result)
            layers = shares.layers() if self.part is not None else None
            cycles, found = shares.within(layers, self.part or (lambda _: True))
            times[mode], bounds[mode] = cycles * us, (limits[binds] * us, binds)
            if mode == "silicon":
                rate = self.pes * peak_macs(machine) if binds == "compute" else machine.hbm_bytes_per_cycle
                losses = [x.against(binds, rate, us) for x in found]
                more = sum(x.ideal for x in losses) - bounds[mode][0]
                losses.append(Loss("more multiplications or bytes than the least", {}, Cost(), more, 0.0, us))
        losses.sort(key=lambda x: -x.lost)
        share = sustained(results["silicon"].machine, self.pes)
        return Row(self.name, self.vendor, self.target, times, bounds, losses, share)


def build_model(level: int, out: Path) -> BuildReport:
    """What `rngdc build` makes of the model, from scratch."""
    options = BuildOptions(
        str(MODEL), out, BucketRequest([(1, 64), (1, 1024)], [(1, CACHED), (16, CACHED)]), ParallelOptions(PES),
        weights="none", opt_level=level, work=WorkOptions(1, 1, "local", None, False),
    )  # fmt: skip
    return build(options, lambda _: None)


def machines() -> dict[str, Machine]:
    """The modes, and the silicon mode at the clock that the vendor's card ran at."""
    silicon = load_machine(mode="silicon")
    return {"silicon": silicon, "documented": load_machine(mode="documented"), "slow": silicon.at_clock(HP_CLOCK)}


def programs(out: Path) -> dict[str, dict[str, TimingResult]]:
    """Timing results of an artifact by program and machine."""
    opened, found = open_artifact(out), defaultdict[str, dict[str, TimingResult]](dict)
    device = Device(opened, "silicon")
    for mode, machine in machines().items():
        device.retime(WhatIf(machine))
        for bucket in opened.buckets:
            found[bucket.name][mode] = device.time(bucket)
    return found


def alone(text: str, bucket: BucketSpec, pes: int) -> dict[str, TimingResult]:
    """A program of one function, on PEs that all do the same, by machine."""
    programs = compile_modules({bucket: parse_module(text)}, load_machine(), lambda _: None)
    emitted = programs.programs[0].emitted
    assert emitted is not None
    return {
        mode: simulate(emitted.streams[0], machine, topology=Topology.of(machine, pes), launch=emitted.launch)
        for mode, machine in machines().items()
    }


def search(report: BuildReport) -> dict[str, float]:
    """Seconds of mapping, and of everything else behind the front end, over all programs."""
    mapping = sum(steps.get("lower", 0.0) for steps in report.steps.values())
    return {"mapping": mapping, "backend": report.seconds["backend"], "total": report.seconds["total"]}


def warm_seconds(level: int, base: Path) -> tuple[dict[str, float], dict[str, float]]:
    """`search` of a build that fills a cache, and of the same build from it."""
    found: list[dict[str, float]] = []
    for name in ("cold", "warm"):
        options = BuildOptions(
            str(MODEL), base / name, BucketRequest([(1, 512), (1, 1024)], [(4, 1024), (4, 2048)]),
            ParallelOptions(PES), weights="none", opt_level=level,
            work=WorkOptions(1, 1, "local", None, True, base / "cache"),
        )  # fmt: skip
        found.append(search(build(options, lambda _: None)))
    return found[0], found[1]


def rows(level: int, base: Path) -> list[Row]:
    """All rows of the table."""
    build_model(level, base / "model")
    found = programs(base / "model")
    decoding = {batch: found[f"decode_b{batch}_kv{CACHED}"] for batch in (1, 16)}
    few, many = (found[f"prefill_b1_s{n}_kv{n}"] for n in (64, 1024))
    out = [
        Work("dense part of a layer, 1 token", 389, 330, dense(1), part=is_dense).row(decoding[1]),
        Work("dense part of a layer, 64 tokens", 510, 380, dense(64), part=is_dense).row(few),
        Work("dense part of a layer, 1,024 tokens", 2686, 2050, dense(1024), part=is_dense).row(many),
    ]
    for batch, vendor, target in ((1, 48, 40), (16, 96, 70)):
        name = f"decode attention of a layer, batch {batch}, KV 1,024"
        work = Work(name, vendor, target, attend(batch, 1, CACHED))
        text = attention(batch, 1, CACHED, HEADS // PES, KV // HEAD // PES)
        results = alone(text, BucketSpec("decode", batch, 1, CACHED), PES)
        inside = replace(work, part=is_attention).row(decoding[batch]).times["silicon"]
        out.append(replace(work.row(results), inside=inside))
    out.append(Work("decode step, batch 1, KV 1,024", 14_640, 12_000, step(1, 1, CACHED)).row(decoding[1]))
    out.append(Work("prefill of 1,024 tokens", 86_000, 70_000, step(1, 1024, 1024)).row(many))
    macs, nbytes = 2048 * HIDDEN * 2 * INNER, 2 * (HIDDEN * 2 * INNER + 2048 * (HIDDEN + 2 * INNER))
    work = Work("one PE, GEMM 2,048 x 4,096 x 28,672", 17_276, 0.0, Least(macs, nbytes), 1)
    peak = work.least.limits(load_machine(mode="silicon"), 1)["compute"] * 1e-3
    work = replace(work, target=peak / 0.9)
    out.append(work.row(alone(linear(2048, HIDDEN, 2 * INNER), BucketSpec("prefill", 1, 2048, 2048), 1)))
    moved = {m: (r.hbm_read_bytes + r.hbm_write_bytes) / r.seconds for m, r in decoding[1].items()}
    out.append(Row.utilisation(moved, out[5]))
    return [*out, Work("decode step, batch 16, KV 1,024", None, None, step(16, 1, CACHED)).row(decoding[16])]


def main() -> None:
    """Build, time, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-O", "--opt-level", type=int, choices=range(4), default=DEFAULT_LEVEL)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "performance.md")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        base = Path(directory)
        cold, warm = warm_seconds(arguments.opt_level, base)  # first: a process remembers the mappings it has found
        found = rows(arguments.opt_level, base)
    text = report(found, cold, warm, arguments.opt_level)
    arguments.output.write_text(text, "utf-8")
    print(text)
    if arguments.json:
        data = {"rows": [asdict(row) for row in found], "search": {"cold": cold, "warm": warm}}
        arguments.json.write_text(json.dumps(data, indent=1) + "\n", "utf-8")
    print(f"{time.perf_counter() - begun:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
