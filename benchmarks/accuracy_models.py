"""Predicted rows of docs/accuracy.md: layers in their model and whole steps (hardware.md 5.7; sets A, B, C)."""

from __future__ import annotations

from pathlib import Path

from accuracy_bases import HOST_US, HP_TRACE, NOMINAL, SILICON, Base
from accuracy_layers import attention_us
from accuracy_rows import Row, busy
from xdsl.dialects.builtin import ModuleOp

from frontend.capture import capture
from frontend.resolve import resolve_model
from passes.opt import run_pipeline
from passes.pipeline import outline_stage, simplify_stage, specialise_stage
from rngdc.buckets import BucketSpec
from rngdc.build import compile_modules
from rngdc.options import ParallelOptions, shard_passes
from runtime_sim.timing import TimingResult, simulate
from runtime_sim.topology import Topology

CONFIGS = Path(__file__).parents[1] / "tests" / "configs"
SUMS = "mapping: the measured layer holds 115 us of all-reduces (7.4), ours 8"


class Model:
    """A decoder built from its configuration, without weights."""

    def __init__(
        self, config: str, layers: int, inner: int, vocabulary: int, weight_bytes: int, hidden: int = 4096
    ) -> None:
        source = resolve_model(str(CONFIGS / config), need_weights=False)
        self.module: ModuleOp = capture(source, weights="none").module
        run_pipeline(self.module, simplify_stage())
        self.layers, self.weight_bytes = layers, weight_bytes
        self.layer_weights = hidden * (2 * hidden + 2 * 1024 + 3 * inner)
        self.head = vocabulary * hidden

    def build(self, base: Base, batch: int, tokens: int, cached: int, pes: int = 8) -> TimingResult:
        """Time one bucket on `pes` PEs."""
        bucket = BucketSpec("decode" if tokens == 1 else "prefill", batch, tokens, cached)
        module = self.module.clone()
        shard = shard_passes(ParallelOptions(tensor=pes), SILICON)
        run_pipeline(module, [*specialise_stage(batch, tokens, cached), *shard, *outline_stage()])
        emitted = compile_modules({bucket: module}, SILICON, lambda _: None).programs[0].emitted
        assert emitted is not None
        topology = Topology.of(base.machine, pes)
        return simulate(emitted.streams[0], base.machine, topology=topology, launch=emitted.launch)

    def layer_us(self, result: TimingResult, base: Base) -> float:
        """What a layer adds to the program, on average; it may be several calls."""
        return sum(x.advance for x in result.layers_of() if x.name.startswith("model.layers.")) / self.layers * base.us

    def bound(self, base: Base, batch: int, tokens: int, cached: int, layers: int) -> tuple[float, str]:
        """Of `layers` layers, with the last projection if they are all."""
        head = self.head if layers == self.layers else 0
        macs = batch * (layers * self.layer_weights * tokens + head)
        cache = layers * batch * cached * 4 * 1024
        return base.bound(macs, self.weight_bytes * layers * self.layer_weights + 2 * head + cache, 8)


def whole() -> list[Row]:
    """Llama-3.1-8B in bf16 on the eight PEs of a card."""
    rows: list[Row] = []
    llama = Model("llama-3.1-8b", 32, 14336, 128256, 2)

    def add(
        name: str, source: str, took: float, seen: float, limit: tuple[float, str], judges: bool = False, note: str = ""
    ) -> None:
        rows.append(Row(name, "predicted", source, took, seen, judges, *limit, note=note))

    def dense(tokens: int, result: TimingResult, attention: float, seen: float, cached: int) -> None:
        took = llama.layer_us(result, HP_TRACE) - attention
        limit = llama.bound(HP_TRACE, 1, tokens, 0, 1)
        name = f"layer on 8 PEs without attention, {tokens:,} token{'s' if tokens > 1 else ''}"
        note = f"{SUMS}; whole layer at {cached:,} cached less attention alone"
        add(name, "set C HP", took, seen, limit, tokens == 1, note if tokens < 64 else f"mapping ({busy(result)})")

    one = llama.build(HP_TRACE, 1, 1, 1024)
    limit = llama.bound(HP_TRACE, 1, 1, 1024, 1)
    add("layer on 8 PEs, decode, batch 1, 1,024 cached", "set C HP", llama.layer_us(one, HP_TRACE), 388.9 + 48.3,
        limit, True, SUMS)  # fmt: skip
    dense(1, one, attention_us(1, 1, 1024, 4, 1, HP_TRACE, 8), 388.9, 1024)
    whole_step = llama.bound(HP_TRACE, 1, 1, 1024, 32)
    add("step on 8 PEs, decode, batch 1, device alone", "set C HP", HP_TRACE.of(one), 14_640, whole_step, True, SUMS)
    for cached, seen in ((1024, 15_190), (256, 14_570)):
        took = NOMINAL.of(llama.build(NOMINAL, 1, 1, cached)) + HOST_US
        limit = llama.bound(NOMINAL, 1, 1, cached, 32)
        add(f"step on 8 PEs, decode, batch 1, {cached:,} cached", "5.7 LENS", took, seen, limit, True,
            f"{SUMS}; host added; clock of the card not published")  # fmt: skip
    two = llama.build(HP_TRACE, 2, 1, 1024)
    add("layer on 8 PEs, decode, batch 2, 1,024 cached", "set C HP", llama.layer_us(two, HP_TRACE), 482.4 + 54.8,
        llama.bound(HP_TRACE, 2, 1, 1024, 1), note=SUMS)  # fmt: skip
    dense(2, two, attention_us(2, 1, 1024, 4, 1, HP_TRACE, 8), 482.4, 1024)
    few = llama.build(HP_TRACE, 1, 64, 64)
    dense(64, few, attention_us(1, 64, 64, 4, 1, HP_TRACE, 8), 510.4, 64)
    for batch, seen, source in ((1, 15_710, "HP"), (4, 19_480, "HP"), (8, 8e6 / 335, "SP"), (16, 26_050, "HP")):
        base = HP_TRACE if source == "HP" else NOMINAL
        result = llama.build(base, batch, 1, 2048)
        why = SUMS if batch <= 4 else f"mapping ({busy(result)})"
        add(
            f"step on 8 PEs, decode, batch {batch}, 2,048 cached",
            f"set B {source}",
            base.of(result) + HOST_US,
            seen,
            llama.bound(base, batch, 1, 2048, 32),
            note=f"{why}; host added; bucket of 2,048 cached tokens assumed",
        )
    many = llama.build(HP_TRACE, 1, 1024, 1024)
    why = f"mapping ({busy(many)})"
    took = llama.layer_us(many, HP_TRACE)
    limit = llama.bound(HP_TRACE, 1, 1024, 1024, 1)
    add("layer on 8 PEs, prefill of 1,024", "set C HP", took, 2734 + 135, limit, note=why)
    dense(1024, many, attention_us(1, 1024, 1024, 4, 1, HP_TRACE, 8), 2734, 1024)
    add("layers on 8 PEs, prefill of 1,024", "5.7 HP", took * 32, 86_000, (limit[0] * 32, limit[1]), note=why)
    return rows


def qwen() -> list[Row]:
    """Set A: Qwen3-8B-FP8 on one card; scales are per channel here, per block in the measured checkpoint."""
    rows: list[Row] = []
    model = Model("qwen3-8b-fp8", 36, 12288, 151936, 1)
    where = "host added; scales a channel, theirs a block; clock of the card not published"
    for batch, seen in ((1, 12_350), (8, 16_180), (32, 32_700)):
        result = model.build(NOMINAL, batch, 1, 1024)
        limit = model.bound(NOMINAL, batch, 1, 1024, 36)
        why = SUMS.replace("115", "some 115") if batch == 1 else f"mapping ({busy(result)})"
        rows.append(
            Row(f"Qwen3-8B-FP8 step on 8 PEs, decode, batch {batch}, 1,024 cached", "predicted", "set A WS",
                NOMINAL.of(result) + HOST_US, seen, False, *limit, note=f"{why}; {where}")
        )  # fmt: skip
    result = model.build(NOMINAL, 1, 1024, 1024)
    rows.append(
        Row("Qwen3-8B-FP8 prefill of 1,024 on 8 PEs", "predicted", "set A WS", NOMINAL.of(result) + HOST_US, 77_580,
            False, *model.bound(NOMINAL, 1, 1024, 1024, 36), note=f"mapping ({busy(result)}); {where}")
    )  # fmt: skip
    return rows
