"""Llama-3.1 at full width from its config alone: everything is legal, fits, and does not grow with depth."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from backend_rngd.emit import Emitted, emit
from backend_rngd.isa.descriptors import Dma, Space
from backend_rngd.isa.legality import check_stream
from backend_rngd.lowering import LoweringOptions, lower
from backend_rngd.lowering.program import IN_FLIGHT, LEAST_IN_FLIGHT
from backend_rngd.machine import load_machine
from backend_rngd.machine.formulas import dma_startup, dma_time
from backend_rngd.place import place
from backend_rngd.schedule import schedule
from frontend.capture import capture
from frontend.resolve import resolve_model
from passes.opt import run_pipeline
from passes.outline import outline
from passes.partition import Partition
from passes.pipeline import simplify_stage, specialise_stage
from passes.plan_tp import PlanTp

CONFIGS = Path(__file__).parents[1] / "configs"
MACHINE, SILICON = load_machine(), load_machine(mode="silicon")


def build(
    bucket: tuple[int, int, int], layers: int | None = None, units: int = 1, model: Path = CONFIGS / "llama-3.1-8b"
) -> Emitted:
    captured = capture(resolve_model(str(model), need_weights=False), num_hidden_layers=layers, weights="none")
    batch, seq, kv = bucket
    run_pipeline(captured.module, [*simplify_stage(), *specialise_stage(batch, seq, kv)])
    if units > 1:
        run_pipeline(captured.module, [PlanTp(size=units), Partition()])
    outline(captured.module)
    # As many tiles of weights on the way as fit beside the activations of all heads in one unit.
    in_flight = LEAST_IN_FLIGHT if seq > 256 else IN_FLIGHT
    options = LoweringOptions(cache_capacity=kv, cache_batch=batch, in_flight=in_flight)
    lowered = lower(captured.module, MACHINE, options)
    lowered.module.verify()
    place(lowered.module, MACHINE)
    schedule(lowered.module)
    return emit(lowered.module, MACHINE)


@pytest.mark.parametrize("bucket", [(1, 512, 512), (1, 1, 1024), (4, 1, 2048), (1, 1024, 1024)])
def test_full_width_is_legal(bucket: tuple[int, int, int]) -> None:
    stream = build(bucket).streams[0]
    assert not check_stream(stream, MACHINE, None)
    # The entry and one block for 32 layers.
    assert [r.name for r in stream.routines] == ["main", "prepare", "embed", "block_0", "head", "receive", "send"]


@pytest.mark.parametrize("bucket", [(1, 7, 7), (6, 1, 1024)])
def test_an_odd_width_fits(bucket: tuple[int, int, int], tmp_path: Path) -> None:
    """Slices without channels, whose weights are cleared: only those of the first contraction from the start on."""
    config = json.loads((CONFIGS / "llama-3.1-8b" / "config.json").read_text())
    config |= {"hidden_size": 2056, "intermediate_size": 5504, "head_dim": 256, "vocab_size": 32003}
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"num_attention_heads": 8, "num_key_value_heads": 4, "bos_token_id": 1, "eos_token_id": 2})
    )
    assert not [v for v in build(bucket, 2, 4, tmp_path).check(MACHINE) if v.severity == "error"]


def test_streams_do_not_grow_with_depth() -> None:
    shallow, deep = (build((1, 1, 256), layers).streams[0].routines for layers in (2, 32))
    assert [len(r.instructions) for r in shallow[1:]] == [len(r.instructions) for r in deep[1:]]
    assert len(deep[0].instructions) - len(shallow[0].instructions) == 30  # the calls, nothing else


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_weights_of_a_decode_step_come_as_fast_as_engines_go(batch: int) -> None:
    """On eight units, where keys and values are so narrow that one of them fills half of the slices."""
    emitted = build((batch, 1, 1024), 2, units=8)
    stream = emitted.streams[0]
    block = next(r for r in stream.routines if r.name == "block_0")
    sizes: list[int] = []
    for item in block.instructions:
        what = item.what
        if not isinstance(what, Dma) or what.source.space != Space.HBM:
            continue
        if not stream.locations[item.location].endswith("_proj|tc.contract"):
            continue
        moved = what.packet * math.prod(loop[0] for loop in what.loops)
        moving = dma_time(what, SILICON) - dma_startup(what, SILICON)
        assert moved / moving >= 0.99 * SILICON.dma_hbm_bytes_per_cycle
        sizes.append(moved)
    weights = 2 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14336 * 4096) // 8
    assert sum(sizes) == weights
    if batch == 1:  # few start-ups: q, k, v, o, two of gate and of up, three of down
        assert len(sizes) <= 11
