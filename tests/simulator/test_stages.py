"""Cutting a program into pipeline stages."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backend_rngd.artifact import ArtifactError, Cache, HbmMap, Placement
from backend_rngd.artifact.stages import Cuts, balance, block_costs, blocks_of, needs, passes_of, stage_stream, touched
from backend_rngd.isa.descriptors import After, Call, Context, Dma, Endpoint, Instruction, Routine, Space, Stream

NAMES = ("main", "prepare", "embed", "block", "head", "receive", "send")


def load(address: int, nbytes: int, register: int = 0) -> Instruction:
    dma = Dma(Endpoint(Space.HBM, address, register), Endpoint(Space.DM, 0), ((1, 0, 0),), nbytes)
    return Instruction(Context.DMA, After(), dma)


def program(blocks: int = 4) -> Stream:
    """Block b reads 256 bytes at 4096 * b and, relative to register 9, its cache at 65536 + 4096 * b."""

    def call(routine: int, number: int, *moves: tuple[int, int, int]) -> Instruction:
        return Instruction(Context.CONTROL, After(), Call(routine, moves), number)

    entry = [call(1, 0), call(2, 1)]
    entry += [call(3, 2 + b, (8, 0, 4096 * b), (9, 1, 65536 + 4096 * b)) for b in range(blocks)]
    entry.append(call(4, len(entry)))
    bodies: dict[str, tuple[Instruction, ...]] = {
        "prepare": (),
        "embed": (load(40960, 64),),
        "head": (load(45056, 512),),
    }
    bodies["block"] = (load(0, 256, 8), load(64, 64, 9))
    routines = [Routine(n, tuple(entry) if n == "main" else bodies.get(n, ())) for n in NAMES]
    return Stream(0, 64, tuple(routines), ("x",) * 16)


def calls(stream: Stream) -> list[Call]:
    found = [i.what for i in stream.routines[0].instructions if isinstance(i.what, Call)]
    assert len(found) == len(stream.routines[0].instructions)
    return found


def names(stream: Stream) -> list[str]:
    return [stream.routines[call.routine].name for call in calls(stream)]


def test_entries_of_stages():
    stream = program()
    cuts = Cuts(((0, 1), (1, 3), (3, 4)))
    found = [stage_stream(stream, cuts, s) for s in range(3)]
    assert names(found[0]) == ["prepare", "embed", "block", "send"]
    assert names(found[1]) == ["prepare", "receive", "block", "block", "send"]
    assert names(found[2]) == ["prepare", "receive", "block", "head"]
    for stage in found:  # calls wait for nothing, as in the whole program: the instructions of the routines do
        assert {i.after for i in stage.routines[0].instructions} == {After()}
    moves = [call.moves for stage in found for call in calls(stage) if call.routine == 3]
    assert moves == [call.moves for call in calls(stream) if call.routine == 3]
    assert stage_stream(stream, Cuts(((0, 4),)), 0) is stream


def test_stages_of_chunks():
    """Every stage runs its blocks chunk by chunk; the shorter last chunk is handed over by routines of its own."""
    names_ = (
        "main",
        "cut_0",
        "cut_1",
        "prepare",
        "embed",
        "block",
        "pick_first",
        "pick_tail",
        "head",
        "receive",
        "send",
    )
    names_ += ("prepare_tail", "embed_tail", "block_tail", "receive_tail", "send_tail")
    order = ["cut_0", "prepare", "embed", "block", "block", "pick_first"]
    order += ["cut_1", "prepare_tail", "embed_tail", "block_tail", "block_tail", "pick_tail", "head"]
    entry = [Instruction(Context.CONTROL, After(), Call(names_.index(n), ())) for n in order]
    stream = Stream(0, 64, tuple(Routine(n, tuple(entry) if n == "main" else ()) for n in names_), ("x",))
    assert [len(part) for part in passes_of(stream)] == [6, 7]
    assert len(blocks_of(stream)) == 2
    cuts = Cuts(((0, 1), (1, 2)))
    first, second = (stage_stream(stream, cuts, s) for s in range(2))
    assert names(first) == [
        *["cut_0", "prepare", "embed", "block", "send"],
        *["cut_1", "prepare_tail", "embed_tail", "block_tail", "send_tail"],
    ]
    assert names(second) == [
        *["cut_0", "prepare", "receive", "block", "pick_first"],
        *["cut_1", "prepare_tail", "receive_tail", "block_tail", "pick_tail", "head"],
    ]
    for stage in (first, second):
        assert {i.after for i in stage.routines[0].instructions} == {After()}


def test_what_a_stage_holds():
    stream = program()
    assert touched(stream)[:2] == ((0, 256), (4096, 4352))
    placements = [
        Placement(name=f"w{b}", address=4096 * b, bytes=512, weight="w", permute=(0,), reshape=(1, 1), pad=(1, 1),
                  dtype="bf16")
        for b in range(4)
    ]  # fmt: skip
    placements.append(placements[0].model_copy(update={"name": "table", "address": 40960, "bytes": 4096}))
    placements.append(placements[0].model_copy(update={"name": "head", "address": 45056, "bytes": 4096}))
    caches = [
        Cache(name=f"c{b}", address=65536 + 4096 * b, bytes=4096, row_bytes=64, batch=1, heads=1, capacity=1, width=1)
        for b in range(4)
    ]
    hbm = HbmMap(weights=49152, constants=4096, caches=16384, shared=81920, total=90000)
    stages = [stage_stream(stream, Cuts(((0, 2), (2, 4))), s) for s in range(2)]
    first, second = (needs([s], placements, caches, hbm, 4096) for s in stages)
    assert [p.name for p in first.placements] == ["w0", "w1", "table"]
    assert [p.name for p in second.placements] == ["w2", "w3", "head"]
    assert [c.name for c in second.caches] == ["c2", "c3"]
    assert first.shared_bytes == 3 * 4096 + 4096
    assert first.own_bytes == 2 * 4096 + 8192


def test_the_head_makes_its_stage_dear():
    """A block touches 256 bytes of weights and 64 of its cache, the embedding 64, the head 512."""
    costs = block_costs(program())
    assert costs == [384.0, 320.0, 320.0, 832.0]
    assert balance(costs, 2).spans == ((0, 3), (3, 4))


def test_programs_that_cannot_be_cut():
    stream = program()
    with pytest.raises(ArtifactError, match="5 pipeline stages"):
        balance(block_costs(stream), 5)
    loose = Stream(0, 64, (Routine("main", (load(0, 8), *stream.routines[0].instructions)), *stream.routines[1:]), ())
    assert blocks_of(loose) == ()
    with pytest.raises(ArtifactError, match="not made of calls"):
        stage_stream(loose, Cuts(((0, 2), (2, 4))), 0)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.integers(1, 8))
def test_balance_is_optimal(costs, stages):
    if stages > len(costs):
        return
    cuts = balance(costs, stages)
    assert cuts.stages == stages
    assert [i for a, b in cuts.spans for i in range(a, b)] == list(range(len(costs)))
    assert all(a < b for a, b in cuts.spans)
    worst = max(sum(costs[a:b]) for a, b in cuts.spans)
    every = (
        max(sum(costs[a:b]) for a, b in itertools.pairwise((0, *ends, len(costs))))
        for ends in itertools.combinations(range(1, len(costs)), stages - 1)
    )
    assert worst == min(every)
    assert np.isfinite(worst)
