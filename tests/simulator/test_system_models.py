"""Built models on several units: tensor parallel groups, pipeline stages and replicas against one unit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from backend_rngd.artifact import Artifact, ArtifactError, Bucket, open_artifact
from backend_rngd.isa.descriptors import After, Notify, Stream, Wait
from rngdc.cli import main
from runtime_sim.errors import SimulationError
from runtime_sim.functional import Unit
from runtime_sim.generate import generate
from runtime_sim.group import Launch
from runtime_sim.ports import Array, read_port, write_port
from runtime_sim.runtime import Device, Invocation
from tests.cli.small_models import write_model
from tests.simulator.streams import positions, without

PROMPTS = [[3, 4, 5], [6, 7, 8, 9], [10, 11], [12]]
LAYERS = 3
SLOW = pytest.param(16, 2, marks=pytest.mark.slow)  # four cards
Builder = Callable[[int], Artifact]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Builder:
    """A random llama of three layers (4 query heads, 2 key heads) for so many units."""
    folder = tmp_path_factory.mktemp("parallel")
    model = write_model(folder / "model", num_hidden_layers=LAYERS)

    @cache
    def build(units: int) -> Artifact:
        out = folder / f"tp{units}"
        try:
            main(["build", str(model), str(out), "-tp", str(units), "-pb", "1,16", "-db", "1,32", "-db", "4,32"])
        except SystemExit as stop:
            assert not stop.code
        return open_artifact(out)

    return build


def device(artifact: Artifact, stages: int = 1, replicas: int = 1, checks: bool = True) -> Device:
    made = Device(artifact, "documented", checks, stages, replicas)
    made.load()
    return made


def decode_inputs(bucket: Bucket) -> dict[str, Array]:
    ids = np.arange(3, 3 + bucket.batch, dtype=np.int32)[:, None]
    return {"input_ids": ids, "position_ids": np.full_like(ids, 2), "last": np.zeros(bucket.batch, np.int32)}


@pytest.mark.parametrize("units", [1, 2, 4])
def test_tokens_are_the_same_for_every_number_of_units_stages_and_replicas(built, units):
    expected = [row.token_ids for row in generate(device(built(1)), PROMPTS, 3)]
    for stages, replicas in ((1, 1), (3, 1), (2, 3)):
        rows = generate(device(built(units), stages, replicas), PROMPTS, 3)
        assert [row.token_ids for row in rows] == expected, (stages, replicas)
        assert all(row.first > 0 and len(row.steps) == 2 for row in rows)


@pytest.mark.parametrize("units", [2, 4])
def test_logits_and_caches_differ_by_rounding_only(built, units):
    """Caches of all heads are joined from the units; a reference run on one unit starts from the same ones."""
    alone, group = device(built(1)), device(built(units), 2)
    rng = np.random.default_rng(0)
    caches = {c.name: c for c in alone.artifact.manifest.caches}
    kept: dict[str, Array] = {}
    for name, place in caches.items():
        heads, other = place.heads, next(c for c in group.artifact.manifest.caches if c.name == name)
        values = rng.standard_normal((4, heads, 2, place.width)).astype(alone.read_cache(place, 1, 1).dtype)
        alone.write_cache(place, values)
        group.write_cache(other, values)
        assert np.array_equal(group.read_cache(other, 4, 2), values)
        kept[name] = values
    bucket = alone.artifact.bucket("decode_b4_kv32")
    inputs = decode_inputs(bucket)
    one = alone.run(bucket, inputs)["logits"].astype(np.float32)
    many = group.run(group.artifact.bucket(bucket.name), inputs)["logits"].astype(np.float32)
    error = np.sqrt(np.mean((one - many) ** 2)) / np.sqrt(np.mean(one**2))
    assert 0 <= error < 0.02
    for name, place in caches.items():
        other = next(c for c in group.artifact.manifest.caches if c.name == name)
        mine = alone.read_cache(place, 4, 3).astype(np.float32)
        theirs = group.read_cache(other, 4, 3).astype(np.float32)
        assert np.array_equal(theirs[:, :, :2], kept[name].astype(np.float32))
        assert np.abs(mine[:, :, 2]).max() > 0
        assert np.sqrt(np.mean((theirs - mine) ** 2)) < 0.02 * np.sqrt(np.mean(mine**2))


def run_streams(made: Device, bucket: Bucket, streams: Mapping[Unit, Stream], seed: int | None, runs: int = 2) -> Array:
    """Two decode steps in flight with other streams than those of the artifact."""
    inputs = decode_inputs(bucket)
    work: dict[Unit, list[Launch]] = {}
    for unit in made.units:
        unit.reset()
        for port in bucket.inputs:
            write_port(unit.window, port, inputs[port.name])
        registers = made._registers(unit, Invocation(bucket, inputs))
        work[unit] = [Launch(streams[unit], registers)] * runs
    made.system.run(work, seed=seed)
    last = made.system.unit(0, made.stages - 1)
    return read_port(last.window, bucket.outputs[0])


Change = Callable[[Stream], Stream]


def broken_streams(made: Device, bucket: Bucket, change: Change, only: int | None) -> dict[Unit, Stream]:
    """The artifact's streams, changed on all units or only on those of one rank."""
    changed = {s: change(made.residence.stream(bucket, s)) for s in range(made.stages)}
    return {
        u: changed[u.place.stage] if only in (None, u.place.rank) else made.residence.stream(bucket, u.place.stage)
        for u in made.units
    }


def must_fail(made: Device, bucket: Bucket, change: Change, only: int | None, what: object) -> None:
    for unit in made.units:
        unit.checks = False  # only what several units bring is looked for
    with pytest.raises(SimulationError) as caught:
        run_streams(made, bucket, broken_streams(made, bucket, change, only), None)
    assert caught.value.kind in (SimulationError.DEADLOCK, SimulationError.UNIT_RACE), (what, str(caught.value))


@pytest.mark.parametrize(("units", "stages"), [(2, 1), (4, 1), (1, 2), (2, 2), SLOW])
def test_removing_any_notify_or_wait_is_caught(built, units, stages):
    artifact = built(units)
    bucket = artifact.bucket("decode_b1_kv32")
    made = device(artifact, stages, checks=False)
    streams = {u: made.residence.stream(bucket, u.place.stage) for u in made.units}
    expected = run_streams(made, bucket, streams, None)
    for seed in range(3):
        assert np.array_equal(run_streams(made, bucket, streams, seed), expected)
    stream = artifact.stream(bucket)
    unused = {"receive", "send"} if stages == 1 else set[str]()
    found = [p for p in positions(stream, Notify, Wait) if stream.routines[p[0]].name not in unused]
    assert len(found) >= (8 if units > 1 else 0) + (4 if stages > 1 else 0)
    for position in found:
        for only in (None, units - 1):
            must_fail(made, bucket, lambda s, p=position: without(s, *p), only, position)


@pytest.mark.parametrize("units", [2, 4])
def test_a_notify_that_does_not_wait_for_what_it_publishes_is_caught(built, units):
    artifact = built(units)
    bucket = artifact.bucket("decode_b1_kv32")
    made = device(artifact, checks=False)
    stream = artifact.stream(bucket)
    tried = 0
    for number, index in positions(stream, Notify):
        item = stream.routines[number].instructions[index]
        if not (item.after.main or item.after.sub):
            continue
        body = list(stream.routines[number].instructions)
        body[index] = replace(item, after=After())
        routines = list(stream.routines)
        routines[number] = replace(routines[number], instructions=tuple(body))
        hasty = replace(stream, routines=tuple(routines))
        must_fail(made, bucket, lambda _, s=hasty: s, None, (number, index))
        tried += 1
    assert tried >= 3  # embedding, attention, multi-layer perceptron


def test_stages_hold_their_layers_only(built):
    artifact = built(2)
    whole, made = device(artifact), device(artifact, LAYERS)
    names = [{p.name.split(".layers.")[-1].split(".")[0] for p in held.placements} for held in made.residence.needs]
    for stage in range(LAYERS):
        assert str(stage) in names[stage]
        assert not {str(i) for i in range(LAYERS) if i != stage} & names[stage]
    placements = {p.name for held in made.residence.needs for p in held.placements}
    assert placements == {p.name for p in artifact.manifest.placements}
    caches = [c.name for held in made.residence.needs for c in held.caches]
    assert sorted(caches) == sorted(c.name for c in artifact.manifest.caches)
    largest = max(held.shared_bytes + held.own_bytes for held in made.residence.needs)
    assert largest < whole.residence.needs[0].shared_bytes + whole.residence.needs[0].own_bytes


def test_replicas_on_a_card_share_weights(built):
    one, two = device(built(2), 1, 1), device(built(2), 1, 2)
    held = one.residence.needs[0]
    assert one.residence.card_bytes(one.system.topology) == {0: 2 * (held.shared_bytes + held.own_bytes)}
    assert two.residence.card_bytes(two.system.topology) == {0: 2 * held.shared_bytes + 4 * held.own_bytes}
    assert two.units[2].window.shared is two.units[0].window


def test_sizes_that_cannot_be(built, monkeypatch):
    with pytest.raises(ArtifactError, match="4 pipeline stages: the program has 3 blocks to share out"):
        Device(built(1), pipeline_parallel_size=4)
    with pytest.raises(ArtifactError, match="data parallel size 0"):
        Device(built(1), data_parallel_size=0)
    small = Device(built(1)).machine.model_copy(update={"hbm_usable_bytes": 1 << 18})
    monkeypatch.setattr("runtime_sim.runtime.machine_of", lambda artifact, mode: small)
    with pytest.raises(ArtifactError, match=r"card 0 of .* needs .* GB of HBM") as caught:
        Device(built(2), data_parallel_size=8)
    assert len(caught.value.problems) == 2  # both cards


def test_micro_batches_are_faster_than_one_after_the_other(built):
    """Two stages work at the same time on different rows."""
    made = device(built(1), 2)
    bucket = made.artifact.bucket("decode_b1_kv32")
    one, four = made.time(bucket).seconds, made.time(bucket, 4).seconds
    assert four < 3.5 * one


def test_outputs_of_all_units_are_the_same(built):
    """Everything is gathered or reduced at the end, on every unit of the last stage."""
    made = device(built(4))
    bucket = made.artifact.bucket("decode_b4_kv32")
    made.run(bucket, decode_inputs(bucket))
    found = [read_port(unit.window, bucket.outputs[0]) for unit in made.units]
    assert all(np.array_equal(f, found[0]) for f in found)
