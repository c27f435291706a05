"""Programs cut into pipeline stages: hand-overs between stages are proved together with everything inside them."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
from group_program import GroupProgram
from spmd import MACHINE, changed, rules
from test_units import without

from backend_rngd.artifact.stages import Cuts, stage_stream
from backend_rngd.emit import Emitted
from backend_rngd.isa.descriptors import Dma, Endpoint, Notify, Space, Wait
from backend_rngd.isa.legality import errors

CUTS = Cuts(((0, 1), (1, 2)))
SYNC = {"deadlock", "semaphore-balance", "unit-race", "wait-order", "race"}


@cache
def program(units: int) -> GroupProgram:
    if units == 4:
        return GroupProgram("tiny_llama_prefill.mlir", 4, list(range(3, 19)))
    return GroupProgram("tiny_llama_decode.mlir", units, [20])


def check(out: Emitted, runs: int = 2) -> set[str]:
    streams = [stage_stream(out.streams[0], CUTS, stage) for stage in range(CUTS.stages)]
    return rules(errors(out.check_stages(streams, MACHINE, runs)))


@pytest.mark.parametrize("units", [1, 2, 4])
def test_two_stages_pass(units: int) -> None:
    p = program(units)
    for runs in (1, 2, 3):
        assert check(p.emitted, runs) == set()


@pytest.mark.parametrize("units", [1, 2, 4])
def test_any_notify_or_wait_that_is_removed_is_missed(units: int) -> None:
    """In collectives and in the hand-over."""
    out = program(units).emitted
    tried = 0
    for r, routine in enumerate(out.streams[0].routines):
        for index, instruction in enumerate(routine.instructions):
            if isinstance(instruction.what, (Notify, Wait)):
                tried += 1
                found = check(without(out, r, index))
                assert found, (routine.name, index)
                assert found <= SYNC, (routine.name, index, found)
    assert tried >= 4 + 8 * (units > 1)


def test_a_stage_needs_its_neighbour() -> None:
    """The last stage sends to nobody."""
    out = program(1).emitted
    first = stage_stream(out.streams[0], CUTS, 0)
    assert rules(errors(out.check_stages([first, first], MACHINE))) >= {"peer", "deadlock"}


def test_a_mailbox_is_not_overwritten() -> None:
    """Without the permission of the receiver a second batch comes too early; one alone is fine."""
    out = program(1).emitted
    names = [r.name for r in out.streams[0].routines]
    receive, send = names.index("receive"), names.index("send")
    careless = without(without(out, receive, 0), send, 0)
    streams = [stage_stream(careless.streams[0], CUTS, stage) for stage in range(2)]
    # Alone, a stage cannot know that the semaphore is gone: only the hand-over is left.
    assert rules(errors(careless.check_stages(streams, MACHINE, runs=1))) == set()
    found = errors(careless.check_stages(streams, MACHINE, runs=2))
    assert rules(found) == {"unit-race"}
    assert "unit 0 of stage 1 reads HBM bytes" in str(found[0])
    assert "which unit 0 of stage 0 writes in dma send[" in str(found[0])


def test_other_stages_are_reached_through_hbm() -> None:
    out = program(2).emitted
    send = next(i for i, r in enumerate(out.streams[0].routines) if r.name == "send")
    body = list(out.streams[0].routines[send].instructions)
    index = next(i for i, one in enumerate(body) if isinstance(one.what, Dma))
    what = body[index].what
    assert isinstance(what, Dma)
    side = what.destination
    body[index] = replace(
        body[index], what=replace(what, destination=Endpoint(Space.PEER_DM, side.base, side.register))
    )
    assert "peer" in check(changed(out, send, body))
