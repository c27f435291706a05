"""Predictions of silicon mode beside published measurements: writes docs/accuracy.md.

    python benchmarks/accuracy.py [--output FILE]

Instruction-level rows are simulated from single descriptors; layers are one-layer programs; whole models are built from
tests/configs/llama-3.1-8b without weights, as `rngdc build` does it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

from accuracy_rows import Row, report, summary
from scaling import ROOT, all_reduce_seconds
from xdsl.dialects.builtin import ModuleOp

from backend_rngd.isa.descriptors import (
    DM_SLICE_STRIDE,
    After,
    Alu,
    Commit,
    Context,
    Dma,
    Dtype,
    Endpoint,
    Exec,
    Fetch,
    Instruction,
    Mode,
    Op,
    Operand,
    Routine,
    Source,
    Space,
    Stream,
    Switch,
    SwitchKind,
    VectorOp,
)
from backend_rngd.machine import Machine, load_machine
from backend_rngd.machine.formulas import dma_time, exec_cycles, sync_time
from frontend.capture import capture
from frontend.resolve import resolve_model
from ir.text import parse_module
from passes.opt import run_pipeline
from passes.pipeline import shard_stage, simplify_stage, specialise_stage
from rngdc.buckets import BucketSpec
from rngdc.build import compile_modules
from runtime_sim.timing import TimingResult, simulate
from runtime_sim.topology import Topology

LAYERS, HIDDEN, INNER, KV, VOCABULARY = 32, 4096, 14336, 1024, 128256  # Llama-3.1-8B
LAYER_WEIGHTS = HIDDEN * (2 * HIDDEN + 2 * KV + 3 * INNER)
HOST_US = 1070.0  # of a step (reference-product.md 9.4)


# Instructions --------------------------------------------------------------------------------------------------------
def load(runs: int, run: int, commands: int, units: int, machine: Machine) -> float:
    """us until `units` PEs have each loaded `runs` runs of `run` bytes into every slice, with `commands` commands."""
    packet = next(p for p in range(min(run, 4096), 0, -8) if run % p == 0)
    inner = ((run // packet, packet, packet),) if run > packet else ()
    loops = ((runs, 64 * run, run), (64, run, DM_SLICE_STRIDE), *inner)
    size = 64 * runs * run
    body = tuple(
        Instruction(
            Context.DMA, After(), Dma(Endpoint(Space.HBM, n * size), Endpoint(Space.DM, n * runs * run), loops, packet)
        )
        for n in range(commands)
    )
    return on_pes(Stream(0, 64, (Routine("load", body),), ("load",)), units, machine).seconds * 1e6


def on_pes(stream: Stream, units: int, machine: Machine) -> TimingResult:
    """The same stream on `units` PEs of a card."""
    return simulate(stream, machine, topology=Topology.of(machine, units))


def instructions(machine: Machine) -> list[Row]:
    """Rows of hardware.md 5.3, 5.4, 7.4 and the fixed costs of section 8."""
    rows: list[Row] = []
    streams = [
        ("o_weight, 15.7 MB, 120 runs of 256 B a slice", 120, 256, 1, 24_142, "5.4 ED"),
        ("k and v, 15.7 MB, a run of 15,360 B each", 1, 15_360, 2, 32_432, "5.4 ED"),
        ("down, 29.5 MB, 30 runs of 1,920 B", 30, 1_920, 1, 65_700, "5.4 ED"),
        ("down, 29.5 MB, 15 runs of 3,840 B", 15, 3_840, 1, 54_000, "5.4 ED"),
        ("block scales, 3.7 MB, a run of 7,200 B", 1, 7_200, 1, 10_093, "5.4 ED"),
        ("15.7 MB, runs of 128 B", 240, 128, 1, 15_728_640 / 319, "5.4 KK"),
        ("15.7 MB, runs of 256 B", 120, 256, 1, 15_728_640 / 618, "5.4 KK"),
        ("15.7 MB, runs of 2,048 B", 15, 2_048, 1, 15_728_640 / 547, "5.4 KK"),
        ("15.7 MB, a run of 30,720 B", 1, 30_720, 1, 15_728_640 / 465, "5.4 KK"),
    ]
    for name, runs, run, commands, ticks, source in streams:
        bound = 512 * runs * run * commands / 1536 / 1e3
        rows.append(
            Row(f"load to 8 PEs: {name}", "fitted", source, load(runs, run, commands, 8, machine), us(ticks, machine),
                bound=bound, binds="HBM", note="model: run length is not in it" if run > 256 else "")
        )  # fmt: skip
    one_cluster = load(240, 256, 1, 4, machine)
    cap = "model: no cap of a cluster's reads"
    rows += [
        Row("load to one cluster: 15.7 MB (262-332 B a tick)", "fitted", "3.3 KK", one_cluster,
            us(15_728_640 / 297, machine), bound=15_728_640 / 1024 / 1e3, binds="DM", note=cap),
        Row("load to one PE: 117 MB", "fitted", "1.4 HP", load(7168, 256, 1, 1, machine), 7168 * 64 * 256 / 219e3,
            bound=7168 * 64 * 256 / 256e3, binds="DM"),
    ]  # fmt: skip
    small = Exec(64, Fetch(0, ((8, 4),), Dtype.F32, 8), Commit(4096, ((8, 4),), Dtype.F32, 8))
    empty = Dma(Endpoint(Space.HBM, 0), Endpoint(Space.DM, 0), ((1, 256, 256),), 256)
    cycle = machine.seconds_per_cycle * 1e6
    rows += [
        Row("a pass over one flit (550-600 ticks)", "fitted", "4.5 KK",
            exec_cycles(small, Context.MAIN, machine).total * cycle, us(575, machine)),
        Row("a DMA command of 256 B (1,900-2,700 ticks)", "fitted", "3.3 ED", dma_time(empty, machine) * cycle,
            us(2300, machine)),
        Row("a further DMA descriptor", "fitted", "3.3 KK", machine.dma_descriptor_cycles * cycle, us(21, machine)),
        Row("sync of two clusters, later ones (0.4 k ticks)", "fitted", "4.5 KK, ED",
            machine.cluster_sync_cycles * cycle, us(400, machine), note="model: kept at the static 600 cycles"),
    ]  # fmt: skip
    measured = {2: (3.67, 1.98), 8: (49.97, 65.11)}
    for units, both in measured.items():
        for width, name, seen in ((14336, "down_proj", both[0]), (4096, "o_proj", both[1])):
            note = "" if units == 2 else "mapping: theirs crosses through HBM, ours reads the peers' data memory"
            rows.append(
                Row(f"8 KB all-reduce, {units} PEs, after {name}", "fitted", "7.4 HP",
                    all_reduce_seconds(units, width, machine) * 1e6, seen, note=note)
            )  # fmt: skip
    return rows + static(machine, one_cluster)


def static(machine: Machine, one_cluster: float) -> list[Row]:
    """Rows of hardware.md 5.3 that our instructions can express."""
    cycle = machine.seconds_per_cycle * 1e6

    def vector(elements: int) -> float:
        ops = (VectorOp(Alu.FP_MUL0, Op.MUL, Mode.STREAM_OPERAND, Operand(Source.CONST, 2.0)),)
        fetch, commit = Fetch(0, ((elements, 4),), Dtype.F32, 8), Commit(0, ((elements, 4),), Dtype.F32, 8)
        return exec_cycles(Exec(64, fetch, commit, vector=ops), Context.MAIN, machine).total * cycle

    ring = Exec(
        256, Fetch(0, ((3840, 2),), Dtype.BF16, 16), Commit(0, ((8, 2),), Dtype.BF16, 8),
        Switch(SwitchKind.BROADCAST01, 1, 256, 1),
    )  # fmt: skip
    store = Dma(Endpoint(Space.DM, 0), Endpoint(Space.HBM, 0), ((64, DM_SLICE_STRIDE, 120),), 120)
    return [
        Row("broadcast of 240 flits round 256 slices", "static", "5.3 KK",
            exec_cycles(ring, Context.MAIN, machine).total * cycle, 62.215),
        Row("load to one cluster: 15.7 MB", "static", "5.3 KK", one_cluster, 26.475,
            bound=15_728_640 / 1024 / 1e3, binds="DM", note="model: no cap of a cluster's reads"),
        Row("load to 8 PEs: 15.7 MB", "static", "5.3 KK", load(120, 256, 1, 8, machine), 13.5,
            bound=15_728_640 / 1536 / 1e3, binds="HBM"),
        Row("f32 vector chain, 64 K elements a slice (3.9 a cycle)", "static", "5.3 KK", vector(65_536),
            65.536 / 3.9),
        Row("store of 64 x 120 B (2,510 or 2,040)", "static", "5.3 KK, SS", dma_time(store, machine) * cycle, 2.275),
        Row("lookup-table load", "static", "5.3 KK", machine.lookup_load_cycles * cycle, 0.838),
        Row("sync of two clusters", "static", "5.3 KK", sync_time(8, 1, machine) * cycle, 0.6),
    ]  # fmt: skip


def us(ticks: float, machine: Machine) -> float:
    """us of profiler ticks."""
    return ticks / machine.tick_hz * 1e6


# Layers --------------------------------------------------------------------------------------------------------------
def tensor(tokens: int, *rest: int) -> str:
    """A bf16 value with token axes."""
    axes = ",".join(["B", "S", *["_"] * len(rest)])
    return f'tensor<{"x".join(map(str, (1, tokens, *rest)))}xbf16, #tc.axes<"{axes}">>'


def function(arguments: dict[str, str], body: str, out: str) -> str:
    """`@main` around a body that defines %y."""
    names = ", ".join(f'"{n}"' for n in arguments)
    signature = ", ".join(f"%{n}: {t}" for n, t in arguments.items())
    return (
        f"builtin.module {{\nfunc.func @main({signature}) -> {out} "
        f'attributes {{arg_names = [{names}], result_names = ["y"]}} {{\n{body}\nfunc.return %y : {out}\n}}\n}}'
    )


def linear(tokens: int, k: int, n: int) -> str:
    """A projection."""
    x, y = tensor(tokens, k), tensor(tokens, n)
    return function(
        {"x": x},
        f'%w = tc.weight "w" : tensor<{n}x{k}xbf16>\n%y = tc.contract "b s i, o i -> b s o" (%x, %w) : {y}',
        y,
    )


def norm(tokens: int) -> str:
    """RMSNorm."""
    x = tensor(tokens, HIDDEN)
    square = f'tensor<1x{tokens}xf32, #tc.axes<"B,S">>'
    expression = f"mul(mul(a, rsqrt(add(mul(b, {1 / HIDDEN}), 1e-05))), c)"
    body = f"""%w = tc.weight "w" : tensor<{HIDDEN}xbf16>
%m = tc.reduce add "mul(a, a)" over "b s h -> b s" (%x) : {square}
%y = tc.map "{expression}" over "b s h, b s, h -> b s h" (%x, %m, %w) : {x}"""
    return function({"x": x}, body, x)


def gate(tokens: int) -> str:
    """SiLU times up."""
    x = tensor(tokens, INNER)
    return function({"x": x, "u": x}, f'%y = tc.map "mul(silu(a), b)" over "b s h, b s h -> b s h" (%x, %u) : {x}', x)


def bound(macs: float, hbm: float, pes: int) -> tuple[float, str]:
    """us and what binds, at documented peaks."""
    limits = {"compute": macs / (16_384 * pes), "HBM": hbm / 1536, "DM": hbm / (256 * pes)}
    binds = max(limits, key=lambda k: limits[k])
    return limits[binds] / 1e3, binds


def busy(result: TimingResult) -> str:
    """How much of the makespan the slowest unit's contexts have work."""
    shares = result.stalls[result.slowest]
    return ", ".join(f"{c} busy {shares[c]['busy'] / result.cycles:.0%}" for c in ("main", "dma"))


def layer(
    name: str, text: str, tokens: int, measured: float, macs: float, hbm: float, machine: Machine, pes: int = 1
) -> Row:
    """A one-layer program; on several PEs each runs the same shard. macs, hbm: the least for one PE."""
    bucket = BucketSpec("prefill", 1, tokens, tokens)
    emitted = compile_modules({bucket: parse_module(text)}, machine, lambda _: None).programs[0].emitted
    assert emitted is not None
    result = simulate(emitted.streams[0], machine, topology=Topology.of(machine, pes), launch=emitted.launch)
    moved = result.hbm_read_bytes + result.hbm_write_bytes
    least, binds = bound(macs * pes, hbm * pes, pes)
    label = f"{name}, {tokens:,} token{'s' if tokens > 1 else ''}"
    judges = bool(macs) and tokens in (1, 2048)
    return Row(
        label, "predicted", "5.6 HP" if pes == 1 else "set C HP", result.seconds * 1e6, measured, judges, least, binds,
        moved / (hbm * pes), busy=busy(result),
    )  # fmt: skip


def layers(machine: Machine) -> list[Row]:
    """One-PE layers (5.6) and the shards of set C."""
    steps = (1, 64, 128, 256, 512, 1024, 2048)
    qkv = (259.8, 255.6, 298.0, 536.6, 905.5, 1857, 3793)
    gate_up = (1198, 1231, 1217, 2907, 4959, 8095, 17276)
    norms = (3.4, 9.0, 16.2, 33.4, 63.7, 86.1, 172.8)
    silu = (2.5, 34.8, 68.4, 105.4, 184.3, 369, 739)
    rows: list[Row] = []

    def product(name: str, tokens: int, n: int, seen: float, pes: int = 1) -> None:
        moved = 2.0 * (HIDDEN * n + tokens * (HIDDEN + n))
        macs = float(tokens * HIDDEN * n)
        rows.append(layer(name, linear(tokens, HIDDEN, n), tokens, seen, macs, moved, machine, pes))

    for tokens, seen in zip(steps, qkv):
        product("qkv on one PE", tokens, 6144, seen)
    for tokens, seen in zip(steps, gate_up):
        product("gate_up on one PE", tokens, 2 * INNER, seen)
    product("gate_up shard on 8 PEs", 1, 2 * INNER // 8, 154, 8)
    product("gate_up shard on 8 PEs", 2048, 2 * INNER // 8, 2171, 8)
    product("lm_head shard on 8 PEs", 1, VOCABULARY // 8, 682, 8)
    for tokens, seen in zip(steps, norms):
        rows.append(layer("RMSNorm on one PE", norm(tokens), tokens, seen, 0, 4.0 * tokens * HIDDEN, machine))
    for tokens, seen in zip((2, *steps[1:]), silu):
        rows.append(layer("SiLU x up on one PE", gate(tokens), tokens, seen, 0, 6.0 * tokens * INNER, machine))
    return rows


# Whole models --------------------------------------------------------------------------------------------------------
def whole(machine: Machine) -> list[Row]:
    """Layers and steps of Llama-3.1-8B at TP 8."""
    config = ROOT / "tests" / "configs" / "llama-3.1-8b"
    captured = capture(resolve_model(str(config), need_weights=False), weights="none")
    run_pipeline(captured.module, simplify_stage())
    cache = 2 * 2 * KV  # bytes of a cached token in a layer
    rows: list[Row] = []

    def build(batch: int, tokens: int, attention: int, pes: int = 8) -> TimingResult:
        return timed(captured.module, BucketSpec("decode" if tokens == 1 else "prefill", batch, tokens, attention), pes)

    def timed(model: ModuleOp, bucket: BucketSpec, pes: int) -> TimingResult:
        module = model.clone()
        stage = specialise_stage(bucket.batch, bucket.input_length, bucket.attention_size)
        run_pipeline(module, [*stage, *shard_stage(pes)])
        emitted = compile_modules({bucket: module}, machine, lambda _: None).programs[0].emitted
        assert emitted is not None
        return simulate(emitted.streams[0], machine, topology=Topology.of(machine, pes), launch=emitted.launch)

    def add(
        name: str, source: str, took: float, seen: float, limit: tuple[float, str], judges: bool, note: str
    ) -> None:
        rows.append(Row(name, "predicted", source, took, seen, judges, *limit, note=note))

    def step(batch: int, tokens: int, attention: int) -> tuple[float, str]:
        macs = batch * (LAYERS * LAYER_WEIGHTS * tokens + VOCABULARY * HIDDEN)
        return bound(macs, 2 * (LAYERS * LAYER_WEIGHTS + VOCABULARY * HIDDEN) + LAYERS * batch * attention * cache, 8)

    def a_layer(batch: int, tokens: int, attention: int) -> tuple[float, str]:
        return bound(batch * tokens * LAYER_WEIGHTS, 2 * LAYER_WEIGHTS + batch * attention * cache, 8)

    def layer_us(result: TimingResult) -> float:
        blocks = [x.advance for x in result.layers_of() if x.name.startswith("model.layers.")]
        return blocks[len(blocks) // 2] * machine.seconds_per_cycle * 1e6

    sums = "mapping: the measured layer holds 115 us of all-reduces (7.4), ours 8"
    tp8 = "on 8 PEs"
    one = build(1, 1, 1024)
    add(f"layer {tp8}, decode, batch 1, 1,024 cached", "set C HP", layer_us(one), 388.9 + 48.3, a_layer(1, 1, 1024),
        True, sums)  # fmt: skip
    add(f"step {tp8}, decode, batch 1, 1,024 cached", "5.7 LENS", one.seconds * 1e6 + HOST_US, 15_190, step(1, 1, 1024),
        True, sums + "; host added")  # fmt: skip
    add(
        f"step {tp8}, decode, batch 1, device alone",
        "set C HP",
        one.seconds * 1e6,
        14_640,
        step(1, 1, 1024),
        True,
        sums,
    )
    short = build(1, 1, 256)
    add(f"step {tp8}, decode, batch 1, 256 cached", "5.7 LENS", short.seconds * 1e6 + HOST_US, 14_570, step(1, 1, 256),
        True, sums + "; host added")  # fmt: skip
    two = build(2, 1, 1024)
    add(f"layer {tp8}, decode, batch 2, 1,024 cached", "set C HP", layer_us(two), 482.4 + 54.8, a_layer(2, 1, 1024),
        False, sums)  # fmt: skip
    long = "host added; bucket of 2,048 cached tokens assumed"
    for batch, seen, source in ((1, 15_710, "HP"), (4, 19_480, "HP"), (8, 8e6 / 335, "SP"), (16, 26_050, "HP")):
        result = build(batch, 1, 2048)
        why = sums if batch <= 4 else f"mapping ({busy(result)})"
        add(f"step {tp8}, decode, batch {batch}, 2,048 cached", f"set B {source}", result.seconds * 1e6 + HOST_US, seen,
            step(batch, 1, 2048), False, f"{why}; {long}")  # fmt: skip
    many = build(1, 1024, 1024)
    why = f"mapping ({busy(many)})"
    add(f"layer {tp8}, prefill of 1,024", "set C HP", layer_us(many), 2734 + 135, a_layer(1, 1024, 1024), False,
        why)  # fmt: skip
    add(f"layers {tp8}, prefill of 1,024", "5.7 HP", layer_us(many) * LAYERS, 86_000,
        bound(1024 * LAYERS * LAYER_WEIGHTS, 2 * LAYERS * LAYER_WEIGHTS, 8), False, why)  # fmt: skip
    alone = build(1, 1, 1024, 1)
    limit = bound(LAYERS * LAYER_WEIGHTS, 2 * (LAYERS * LAYER_WEIGHTS + VOCABULARY * HIDDEN), 1)
    print(f"TP 1 decode: {alone.seconds * 1e3:.1f} ms, bound {limit[0] / 1e3:.1f} ms; no measurement is public")
    return rows


def main() -> None:
    """Predict, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "accuracy.md")
    arguments = parser.parse_args()
    machine = load_machine(mode="silicon")
    begun = time.perf_counter()
    rows: list[Row] = []
    groups: tuple[Callable[[Machine], list[Row]], ...] = (instructions, layers, whole)
    for group in groups:
        for row in group(machine):
            rows.append(row)
            print(f"{row.error:+7.1%}  {row.kind:9}  {row.name}: {row.prediction:.4g} us, measured {row.measured:.4g}")
    print("\n".join(summary(rows)))
    arguments.output.write_text(report(rows, time.perf_counter() - begun), "utf-8")


if __name__ == "__main__":
    main()
