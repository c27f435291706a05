"""Every documented rule is needed: with it switched off, something illegal is accepted or some time is wrong.

`RULES_MET_IN_PRACTICE` has a row for each row of hardware.md 2.11. A row names the rules of ours that stand for it, or
says why no instruction of ours can break it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
from test_legality import BROKEN, STREAMS

from backend_rngd.isa import check_stream as stream_checks
from backend_rngd.isa.descriptors import (
    DM_SLICE_STRIDE,
    Alu,
    Commit,
    Context,
    Descriptor,
    Dma,
    Dtype,
    Endpoint,
    Exec,
    Fetch,
    LoadTrf,
    Mode,
    Op,
    Operand,
    Source,
    Space,
    Stream,
    Switch,
    SwitchKind,
    VectorOp,
)
from backend_rngd.isa.legality import check, check_stream
from backend_rngd.isa.rules import RULES, Report
from backend_rngd.machine import Machine, load_machine
from backend_rngd.machine import formulas as f

BOOK = load_machine()
SILICON = load_machine(mode="silicon")

# Rows of hardware.md 2.11 in order: the rules that enforce each, or why nothing of ours can break it.
RULES_MET_IN_PRACTICE: list[tuple[str, tuple[str, ...] | str]] = [
    ("a DM allocation spans the whole device of 64, 128 or 256 slices", ("header", "slices", "dm-bounds")),
    ("elements of a slice are a multiple of 8 B", ("packet", "commit-alignment", "dma-alignment", "memset")),
    ("a tile offset is a multiple of the window", "addresses are bytes: there are no views with windows"),
    ("a contraction packet has at most 2 flits", ("pack",)),
    ("reduced slice digits are the innermost, unpadded", "no instruction uses the reducer between slices"),
    ("a reduction inside a slice has its packet for itself", ("reduce",)),
    ("one narrow and widen, fixed order of stages, every ALU once", ("stage-order", "alu-once", "alu-op")),
    ("no main pass writes VRF, no broadcast writes TRF", ("context",)),
    ("lookups do not go to TRF; sub has neither lookup nor contraction", ("lookup", "contract-context", "context")),
    ("a 16-bit transpose has at most 4 rows", "no instruction uses the transpose engine"),
    ("Broadcast01 and CustomBroadcast gave no binary", "a fault of one vendor compiler; Broadcast01 is documented"),
    ("a hung kernel poisons its process", "a simulated unit that hangs is an error and leaves nothing behind"),
    ("f8 weights take two exact halves of an activation", "a trick of programs, not a rule"),
]
IN_STREAMS = {rule for rule, _, _ in STREAMS}


def switch_off(monkeypatch: pytest.MonkeyPatch, rule: str) -> None:
    """Nothing reports a rule any more."""
    place = stream_checks._Place  # pyright: ignore[reportPrivateUsage]
    for owner in (Report, place):
        add = owner.add

        def quiet(self: object, name: str, message: str, add: Callable[..., None] = add) -> None:
            if name != rule:
                add(self, name, message)

        monkeypatch.setattr(owner, "add", quiet)


@pytest.mark.parametrize(("row", "rules"), RULES_MET_IN_PRACTICE, ids=[row for row, _ in RULES_MET_IN_PRACTICE])
def test_every_row_has_rules_with_examples(row: str, rules: tuple[str, ...] | str) -> None:
    if isinstance(rules, tuple):
        examples = {rule for rule, _, _ in BROKEN} | IN_STREAMS | {"dm-bounds"}
        assert set(rules) <= set(RULES) and set(rules) <= examples


def test_what_cannot_be_expressed_is_not_there() -> None:
    """The rows without rules stay without: no fields for a transpose, a reduction between slices, a TRF broadcast."""
    for kind in (Exec, LoadTrf):
        fields = set(kind.__dataclass_fields__)
        assert not fields & {"transpose", "inter_slice", "window"}
    assert "switch" not in LoadTrf.__dataclass_fields__


@pytest.mark.parametrize(
    ("rule", "context", "desc"), BROKEN, ids=[f"{rule}-{i}" for i, (rule, _, _) in enumerate(BROKEN)]
)
def test_without_its_rule_a_descriptor_is_accepted(
    rule: str, context: str | None, desc: Descriptor, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert check(desc, BOOK, context, absolute=True)
    switch_off(monkeypatch, rule)
    left = {v.rule for v in check(desc, BOOK, context, absolute=True)}
    assert left <= {"valid"} if rule == "reduce" else not left  # a wrong reduction may not fit the commit either


@pytest.mark.parametrize(
    ("rule", "s", "regions"), STREAMS, ids=[f"{rule}-{i}" for i, (rule, _, _) in enumerate(STREAMS)]
)
def test_without_its_rule_a_stream_is_accepted(
    rule: str, s: Stream, regions: list[tuple[int, int]] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert check_stream(s, BOOK, regions)
    switch_off(monkeypatch, rule)
    if rule in ("header", "call"):  # nothing else can make sense of such a stream
        with contextlib.suppress(IndexError, RecursionError):
            assert check_stream(s, BOOK, regions) == []
    else:
        assert check_stream(s, BOOK, regions) == []


# Times ---------------------------------------------------------------------------------------------------------------
def transfer(loops: tuple[tuple[int, int, int], ...], packet: int, base: int = 0, store: bool = False) -> Dma:
    """HBM to DM, or back."""
    sides = Endpoint(Space.HBM, base), Endpoint(Space.DM, 0)
    if store:
        return Dma(sides[1], sides[0], tuple((n, b, a) for n, a, b in loops), packet)
    return Dma(*sides, loops, packet)


def dma(desc: Dma) -> Callable[[Machine], float]:
    """Time of a transfer."""
    return lambda machine: f.dma_time(desc, machine)


def run(desc: Exec, context: Context = Context.MAIN) -> Callable[[Machine], float]:
    """Time of a pass."""
    return lambda machine: f.exec_cycles(desc, context, machine).total


COPY = Exec(64, Fetch(0, ((4096, 4),), Dtype.F32, 8), Commit(1 << 17, ((4096, 4),), Dtype.F32, 8))
TWICE = VectorOp(Alu.FP_MUL0, Op.MUL, Mode.STREAM_OPERAND, Operand(Source.CONST, 2.0))
NARROW = Exec(64, COPY.fetch, COPY.commit, None, None, (TWICE,))
RING = Exec(64, COPY.fetch, Commit(0, ((1 << 18, 4),), Dtype.F32, 8), Switch(SwitchKind.BROADCAST01, 1, 64, 512))
WHOLE = transfer(((64, 1 << 14, DM_SLICE_STRIDE), (4, 4096, 4096)), 4096)
SHORT = transfer(((64, 1 << 14, 256), (64, 256, DM_SLICE_STRIDE)), 256)
BESIDE = Dma(Endpoint(Space.DM, 0), Endpoint(Space.DM, 1 << 18), ((64, DM_SLICE_STRIDE, DM_SLICE_STRIDE),), 4096)
# rule, time that depends on it, parameters without it
TIMES: list[tuple[str, Callable[[Machine], float], Machine, dict[str, float]]] = [
    ("an engine moves a request a cycle", dma(BESIDE), BOOK, {"dma_engine_bytes_per_cycle": 1e9}),
    ("an engine gets so much out of HBM", dma(SHORT), SILICON, {"dma_hbm_bytes_per_cycle": 1e9}),
    ("a transfer starts up", dma(WHOLE), BOOK, {"dma_startup_cycles": 0}),
    ("a request across a line is two", dma(transfer(((64, 264, DM_SLICE_STRIDE), (99, 64 * 264, 256)), 256, 8)),
     SILICON, {"hbm_line_bytes": 1 << 20}),
    ("a channel takes 48 B a cycle", dma(transfer(((64, 1 << 17, DM_SLICE_STRIDE),), 256)), BOOK,
     {"hbm_channel_bytes_per_cycle": 1e9}),
    ("a bank opens rows", dma(transfer(((2048, 1024, 1024), (64, 1 << 21, DM_SLICE_STRIDE)), 1024)), BOOK,
     {"hbm_row_switch_cycles": 0}),
    ("a part of a line is read, modified, written", dma(transfer(((64, 120, DM_SLICE_STRIDE),), 120, 0, True)), BOOK,
     {"hbm_unaligned_write_factor": 1}),
    ("a network serves 32 slices", dma(transfer(((64, 1 << 15, DM_SLICE_STRIDE), (8, 4096, 4096)), 4096)), SILICON,
     {"dmn_window_bytes": 0}),
    ("main reads 32 B a cycle", run(COPY), BOOK, {"fetch_main_bytes": 8}),
    ("sub reads 8 B a cycle", run(COPY, Context.SUB), BOOK, {"fetch_sub_bytes": 32, "commit_sub_bytes": 32}),
    ("float stages are four wide", run(NARROW), BOOK, {"vector_narrow": 8}),
    ("an ALU takes a cycle", run(NARROW), BOOK, {"vector_alu_cycles": 0}),
    ("a ring fills", run(RING), SILICON, {"switch_fill_cycles_per_hop": 0}),
    ("a pass is issued", run(COPY), SILICON, {"pass_issue_cycles": 0}),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "time", "machine", "off"), TIMES, ids=[rule for rule, *_ in TIMES])
def test_without_its_rule_a_time_changes(
    rule: str, time: Callable[[Machine], float], machine: Machine, off: dict[str, float]
) -> None:
    assert time(machine.model_copy(update=off)) != pytest.approx(time(machine), rel=1e-9)
