"""Llama-3.1 at full width from its config alone: everything is legal, fits, and does not grow with depth."""

from __future__ import annotations

from pathlib import Path

import pytest

from backend_rngd.emit import Emitted, emit
from backend_rngd.isa.legality import check_stream
from backend_rngd.lowering import LoweringOptions, lower
from backend_rngd.lowering.program import IN_FLIGHT, LEAST_IN_FLIGHT
from backend_rngd.machine import load_machine
from backend_rngd.place import place
from backend_rngd.schedule import schedule
from frontend.capture import capture
from frontend.resolve import resolve_model
from passes.opt import run_pipeline
from passes.outline import outline
from passes.pipeline import simplify_stage, specialise_stage

CONFIGS = Path(__file__).parents[1] / "configs"
MACHINE = load_machine()


def build(bucket: tuple[int, int, int], layers: int | None = None) -> Emitted:
    captured = capture(
        resolve_model(str(CONFIGS / "llama-3.1-8b"), need_weights=False), num_hidden_layers=layers, weights="none"
    )
    batch, seq, kv = bucket
    run_pipeline(captured.module, [*simplify_stage(), *specialise_stage(batch, seq, kv)])
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


def test_streams_do_not_grow_with_depth() -> None:
    shallow, deep = (build((1, 1, 256), layers).streams[0].routines for layers in (2, 32))
    assert [len(r.instructions) for r in shallow[1:]] == [len(r.instructions) for r in deep[1:]]
    assert len(deep[0].instructions) - len(shallow[0].instructions) == 30  # the calls, nothing else
