"""`rngdc explain`: candidates, what was taken and why, predicted and simulated times."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from backend_rngd.lowering.candidates import Step, candidates, played, predicted
from backend_rngd.lowering.choices import Choice, Piece, Streamed, choose, recording
from backend_rngd.machine import load_machine
from tests.cli.conftest import Command
from tests.cli.test_build_problems import refused
from tests.lowering.running import tensor_text

PROJECTIONS = {f"self_attn.{n}_proj" for n in "qkvo"} | {f"mlp.{n}_proj" for n in ("gate", "up", "down")} | {"lm_head"}


def rows(program: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [o for o in program["operations"] if o["kind"] == kind]


def test_every_contraction_of_an_artifact(rngdc: Command, artifact: Path) -> None:
    ran = rngdc("explain", artifact, "--json", "-")
    assert ran.status == 0, ran.err
    assert [p["bucket"] for p in ran.json["programs"]] == ["prefill_b1_s16_kv16", "decode_b2_kv32"]
    for program in ran.json["programs"]:
        places: dict[str, str] = {}
        for row in rows(program, "contraction"):
            (taken,) = [c for c in row["candidates"] if c["chosen"]]
            times = [c["cycles"] for c in row["candidates"]]
            assert times == sorted(times)
            assert row["predicted"] == taken["cycles"] > 0
            assert taken["built"]
            assert row["why"].startswith("fixed: ")
            assert (row["why"].find("cycles less") > 0) == any(
                c["built"] and c["cycles"] < taken["cycles"] for c in row["candidates"]
            )
            for s in row["simulated"]:
                assert s["cycles"] > 0
                places[s["where"].split("|")[0]] = taken["name"].split(",")[0]
                assert s["executions"] == (1 if s["where"].startswith("lm_head") else 2)  # layers
        if program["bucket"].startswith("decode"):
            assert places.keys() == PROJECTIONS
            assert set(places.values()) == {"tokens in TRF"}
        else:  # gate and up are multiplied together with the map that joins them
            assert places.keys() <= PROJECTIONS | {"mlp"}
            assert places["self_attn.q_proj"] == "weights in TRF"
        assert not program["notes"]


def test_one_operation_as_a_table(rngdc: Command, artifact: Path) -> None:
    ran = rngdc("explain", artifact, "--bucket", "decode_b2_kv32", "--op", "down_proj", "--mode", "silicon")
    assert ran.status == 0, ran.err
    assert "decode_b2_kv32, silicon mode" in ran.out
    assert "mlp.down_proj tc.contract: simulated" in ran.out
    assert "q_proj" not in ran.out
    refused(rngdc("explain", artifact, "--op", "nowhere"), "--op nowhere", "leave it out")
    refused(rngdc("explain", artifact, "-db", "1,32"), "it was built already", "leave out")


def test_collectives_of_a_model(rngdc: Command, model: Path) -> None:
    ran = rngdc("explain", model, "-tp", "4", "-db", "1,32", "--json", "-")
    assert ran.status == 0, ran.err
    (program,) = ran.json["programs"]
    found = {row["what"].split(" ")[0]: row for row in rows(program, "collective")}
    reduce = found["all_reduce"]
    assert {c["name"] for c in reduce["candidates"]} == {"one_shot", "two_phase"}
    assert reduce["why"].startswith("the fastest of what the lowering compared: one_shot ")
    (taken,) = [c for c in reduce["candidates"] if c["chosen"]]
    assert taken["cycles"] == min(c["cycles"] for c in reduce["candidates"])  # its stream has that algorithm
    assert found["all_gather"]["why"] == "fixed: one_shot is the only way"


@pytest.mark.parametrize("mode", ["documented", "silicon"])
@pytest.mark.parametrize("tokens", [1, 512])
def test_predictions_are_near_the_simulator(rngdc: Command, tmp_path: Path, tokens: int, mode: str) -> None:
    """The formulas leave out what overlaps and details of transfers, not a factor."""
    x, w, y = (tensor_text(s, "bf16") for s in ((1, tokens, 2048), (2048, 2048), (1, tokens, 2048)))
    path = tmp_path / "linear.mlir"
    path.write_text(
        f"""func.func @main(%x: {x}) -> {y} attributes {{arg_names = ["x"], result_names = ["y"]}} {{
  %w = tc.weight "w" : {w}
  %y = tc.contract "b s i, o i -> b s o" (%x, %w) : {y}
  func.return %y : {y}
}}"""
    )
    ran = rngdc("explain", path, "--mode", mode, "--json", "-")
    assert ran.status == 0, ran.err
    (row,) = ran.json["programs"][0]["operations"]
    assert row["predicted"] == pytest.approx(row["simulated"][0]["cycles"], rel=0.3)


def test_steps_overlap() -> None:
    steps = [Step(100.0, 0.0, 10.0)] * 4
    assert played(steps, 2) == 410.0  # transfers follow each other, the last pass stands behind
    assert played(steps, 1) == 440.0  # with one buffer a transfer waits for the pass before it
    assert played([Step(10.0, 5.0, 100.0)] * 4, 2) == 415.0  # loads hide behind passes
    assert played([Step(10.0, 0.0, 100.0, 7.0)], 2) == 117.0


def test_choices_are_heard_only_while_recorded() -> None:
    assert choose("p", "before", {"a": 1.0, "b": 2.0}) == "a"
    with recording() as heard:
        assert choose("p", "inside", {"a": 3.0, "b": 2.0, "c": 2.0}) == "b"
    choose("p", "after", {"a": 1.0})
    assert heard == [Choice("p", "inside", {"a": 3.0, "b": 2.0, "c": 2.0}, "b")]


def test_less_hbm_for_a_unit_takes_longer() -> None:
    machine = load_machine()
    s = Streamed("p", "weights", 4, 4096, 1024, 1, 2, (1024,), (Piece(32, 64, 64),) * 2, 2, 64)
    alone, shared = predicted(s, machine, 1), predicted(s, machine, 8)
    assert alone is not None
    assert shared is not None
    assert shared >= alone >= 4096 * 1024 * 2 / machine.hbm_bytes_per_cycle
    assert sum(c.chosen for c in candidates(s, machine, 8)) == 1
