"""The search for mappings: its predictions against the simulator, its bounds, and what it remembers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from xdsl.ir import SSAValue

from backend_rngd.emit import emit
from backend_rngd.hoist import hoist
from backend_rngd.lowering import LoweringOptions, lower
from backend_rngd.lowering import search as searching
from backend_rngd.lowering.choices import Choice, recording
from backend_rngd.lowering.mapping import Mapping, variants
from backend_rngd.lowering.search import TRIALS, WORTH, Attempt, Found, Search, Shape, remembering
from backend_rngd.machine import load_machine
from backend_rngd.place import place_in_order
from backend_rngd.schedule import schedule
from ir.text import parse_module
from passes.outline import outline
from runtime_sim.timing import simulate
from runtime_sim.topology import Topology
from tests.lowering.running import MACHINE, tensor_text

UNITS = 8  # that all do the same
SILICON = load_machine(mode="silicon")


def chain(tokens: int, size: int, count: int) -> str:
    """`count` contractions, each of the result of the one before it."""
    x, w = tensor_text((1, tokens, size), "bf16"), tensor_text((size, size), "bf16")
    lines = [f'  %w{i} = tc.weight "w{i}" : {w}' for i in range(count)]
    for i in range(count):
        lines.append(f'  %y{i} = tc.contract "b s i, o i -> b s o" (%{"x" if i == 0 else f"y{i - 1}"}, %w{i}) : {x}')
    arguments = 'attributes {arg_names = ["x"], result_names = ["y"]}'
    return (
        f"func.func @main(%x: {x}) -> {x} {arguments} {{\n"
        + "\n".join(lines)
        + f"\n  func.return %y{count - 1} : {x}\n}}"
    )


class Chains:
    """Programs of contractions of one shape on `UNITS` units, with any mapping."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tokens: int, size: int) -> None:
        self.tokens, self.size = tokens, size
        self.found: Found | None = None
        self.forced: Mapping | None = None
        original = Search.best
        chains = self

        def best(self: Search, shape: Shape, nbytes: int, where: str, attempt: Attempt) -> Mapping:
            self.units = UNITS
            if chains.found is None:
                original(self, shape, nbytes, where, attempt)
                key = next(k for k in searching._FOUND if k[0] == shape)  # pyright: ignore[reportPrivateUsage]
                if shape.operand.startswith("DM"):  # of one in the middle
                    chains.found = searching._FOUND[key]  # pyright: ignore[reportPrivateUsage]
            return chains.forced or shape.mapping

        monkeypatch.setattr(Search, "best", best)
        self._lowered(2)

    def _lowered(self, count: int) -> Any:
        module = parse_module(chain(self.tokens, self.size, count))
        outline(module)
        return lower(module, MACHINE, LoweringOptions(search=True)).module

    def cycles(self, mapping: Mapping) -> float:
        """What the simulator finds that one more contraction adds."""
        self.forced = mapping
        times: list[float] = []
        for count in (2, 4):
            module = self._lowered(count)
            place_in_order(module, MACHINE, 0)
            hoist(module, MACHINE)
            place_in_order(module, MACHINE, 0)
            schedule(module)
            emitted = emit(module, MACHINE)
            topology = Topology.of(SILICON, UNITS)
            times.append(simulate(emitted.streams[0], SILICON, topology=topology, launch=emitted.launch).cycles)
        return (times[1] - times[0]) / 2


def ranks(values: list[float]) -> np.ndarray:
    """The place of every value in order; equal ones share theirs."""
    rounded = np.round(np.array(values), -2)
    return np.array([(rounded < v).sum() + (rounded == v).sum() / 2 for v in rounded])


@pytest.mark.parametrize(("tokens", "size"), [(1, 2048), (4, 4096), (64, 2048), (128, 2048), (256, 2048)])
def test_predicted_order_is_the_simulated_one(monkeypatch: pytest.MonkeyPatch, tokens: int, size: int) -> None:
    chains = Chains(monkeypatch, tokens, size)
    found = chains.found
    assert found is not None
    order = sorted(range(len(found.cycles)), key=lambda i: found.cycles[i])
    some = {found.best, 0, order[0], order[-1], order[len(order) // 2], order[len(order) * 3 // 4]}
    predicted = [found.cycles[i] for i in sorted(some)]
    simulated = [chains.cycles(found.mappings[i]) for i in sorted(some)]
    best = simulated[sorted(some).index(found.best)]
    print(tokens, size, [round(p) for p in predicted], [round(s) for s in simulated])
    assert best <= (1 + WORTH) * simulated[0]  # the fixed mapping
    np.testing.assert_allclose(predicted, simulated, rtol=0.1)
    a, b = ranks(predicted), ranks(simulated)
    if a.std() and b.std():
        assert np.corrcoef(a, b)[0, 1] >= 0.8


def shape(mapping: Mapping, *knobs: str) -> Shape:
    return Shape("a contraction", "", "", "", 0, mapping, knobs)


def test_the_search_is_bounded_and_keeps_what_is_not_clearly_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Mapping] = []
    fixed = Mapping("tokens", 4, 2048, passes=8)
    knobs = ("k_bytes", "passes", "tile_bytes", "small_rings", "in_flight", "partial_bytes", "block_bytes")

    def times(fast: Mapping, by: float) -> None:
        def one(self: Search, attempt: Attempt, mapping: Mapping, early: int = 0) -> searching.Trial:
            tried.append(mapping)
            return searching.Trial(1000.0 * (1 - by) if mapping == fast else 1000.0, 2**16, False)

        monkeypatch.setattr(Search, "tried", one)

    def attempt(_em: object, _mapping: Mapping) -> SSAValue:
        raise AssertionError("not lowered")

    other = replace(fixed, in_flight=2)
    for by, chosen in ((WORTH / 2, fixed), (2 * WORTH, other)):
        searching._FOUND.clear()  # pyright: ignore[reportPrivateUsage]
        tried.clear()
        times(other, by)
        with recording() as heard:
            assert Search(MACHINE, 64, 1).best(shape(fixed, *knobs), 1 << 30, "here", attempt) == chosen
        assert len(tried) == len(set(tried)) <= TRIALS
        (choice,) = heard
        assert isinstance(choice, Choice)
        assert len(choice.candidates) == len(tried)
        assert (choice.candidates[choice.chosen] < 1000.0) == (chosen == other)
    searching._FOUND.clear()  # pyright: ignore[reportPrivateUsage]
    tried.clear()
    assert Search(MACHINE, 64, 1).best(shape(fixed, *knobs), 1000, "here", attempt) == fixed  # too small
    assert Search(MACHINE, 64, 1, False).best(shape(fixed, *knobs), 1 << 30, "here", attempt) == fixed
    assert not tried


def test_mappings_that_need_more_memory_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    fixed = Mapping("weights", 2, 16384)

    def one(self: Search, attempt: Attempt, mapping: Mapping, early: int = 0) -> searching.Trial:
        larger = mapping.tile_bytes * mapping.in_flight > fixed.tile_bytes * fixed.in_flight
        return searching.Trial(1000.0 / mapping.tile_bytes, 2 if larger else 1, False)

    monkeypatch.setattr(Search, "tried", one)
    searching._FOUND.clear()  # pyright: ignore[reportPrivateUsage]
    best = Search(MACHINE, 64, 1).best(shape(fixed, "tiles"), 1 << 30, "here", lambda _em, _m: None)  # type: ignore[arg-type]
    assert (best.tile_bytes, best.in_flight) == (128 * 1024, 1)
    searching._FOUND.clear()  # pyright: ignore[reportPrivateUsage]


class Notebook:
    """Results by key, as a cache keeps them."""

    def __init__(self) -> None:
        self.entries: dict[str, dict[str, Any]] = {}
        self.asked = 0

    def get(self, key: dict[str, Any]) -> dict[str, Any] | None:
        self.asked += 1
        return self.entries.get(str(key))

    def put(self, key: dict[str, Any], found: dict[str, Any]) -> None:
        self.entries[str(key)] = found


def test_what_was_found_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    count = 0
    original = Search.tried

    def tried(self: Search, attempt: Attempt, mapping: Mapping, early: int = 0) -> searching.Trial:
        nonlocal count
        count += 1
        return original(self, attempt, mapping, early)

    monkeypatch.setattr(Search, "tried", tried)
    book, texts = Notebook(), list[str]()
    first = 0
    for _ in range(3):
        module = parse_module(chain(1, 1024, 2))
        outline(module)
        with remembering(book):
            texts.append(str(lower(module, MACHINE, LoweringOptions(search=True)).module))
        if len(texts) == 1:
            first = count
            searching._FOUND.clear()  # pyright: ignore[reportPrivateUsage]
    assert first > 1
    assert count == first  # the second time from the book, the third from memory
    assert book.asked == 2 * len(book.entries)
    assert texts[0] == texts[1] == texts[2]


def test_variants_change_one_knob() -> None:
    start = Mapping("tokens", 4, 2048, passes=2)
    for knob in ("k_bytes", "passes", "tile_bytes", "small_rings", "in_flight", "partial_bytes", "block_bytes"):
        found = [m for m in variants(start, knob) if m != start]
        assert found
        assert all(replace(m, **{knob: getattr(start, knob)}) == start for m in found)
    with pytest.raises(ValueError, match="no knob 'colour'"):
        list(variants(start, "colour"))
