"""`rngdc explain`: candidates, what was taken and why, predicted and simulated times."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from backend_rngd.lowering.choices import Choice, choose, recording
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
            assert "are not worth a search" in row["why"]  # of so small a model
            assert len(times) == 1
            for s in row["simulated"]:
                assert s["cycles"] > 0
                places[s["where"].split("|")[0]] = taken["name"].split(" (")[0]
                assert s["executions"] == (1 if s["where"].startswith("lm_head") else 2)  # layers
        (attention,) = rows(program, "attention")
        few = program["bucket"].startswith("decode")
        (way,) = attention["candidates"]
        assert way["name"].startswith("slices for every" if few else "tokens stay on their slices")
        # The prediction has the measured start-up times, the simulation of this mode has not.
        assert 1 < attention["predicted"] / attention["simulated"][0]["cycles"] < 4
        if few:
            assert PROJECTIONS - {"self_attn.v_proj", "mlp.up_proj"} <= places.keys() <= PROJECTIONS  # stacked, or not
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


@pytest.mark.parametrize("tokens", [1, 512])
def test_predictions_are_near_the_simulator(rngdc: Command, tmp_path: Path, tokens: int) -> None:
    """A prediction is what one more contraction adds to a program; the simulator plays one from its start."""
    x, w, y = (tensor_text(s, "bf16") for s in ((1, tokens, 2048), (2048, 2048), (1, tokens, 2048)))
    path = tmp_path / "linear.mlir"
    path.write_text(
        f"""func.func @main(%x: {x}) -> {y} attributes {{arg_names = ["x"], result_names = ["y"]}} {{
  %w = tc.weight "w" : {w}
  %y = tc.contract "b s i, o i -> b s o" (%x, %w) : {y}
  func.return %y : {y}
}}"""
    )
    ran = rngdc("explain", path, "--mode", "silicon", "--json", "-")
    assert ran.status == 0, ran.err
    (row,) = ran.json["programs"][0]["operations"]
    assert row["predicted"] == pytest.approx(row["simulated"][0]["cycles"], rel=0.3)
    times = [c["cycles"] for c in row["candidates"]]
    assert times == sorted(times)
    assert len(times) > 3
    assert row["predicted"] <= 1.02 * times[0]
    assert "the fixed mapping" in row["why"]


def test_choices_are_heard_only_while_recorded() -> None:
    assert choose("p", "collective", "before", {"a": 1.0, "b": 2.0}) == "a"
    with recording() as heard:
        assert choose("p", "collective", "inside", {"a": 3.0, "b": 2.0, "c": 2.0}) == "b"
    choose("p", "collective", "after", {"a": 1.0})
    (choice,) = heard
    assert isinstance(choice, Choice)
    assert (choice.what, choice.candidates, choice.chosen) == ("inside", {"a": 3.0, "b": 2.0, "c": 2.0}, "b")
