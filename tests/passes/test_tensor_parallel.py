"""plan-tp and partition: all units together compute what one unit computes, with the collectives that are needed."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from xdsl.dialects.builtin import ModuleOp
from xdsl.utils.exceptions import PassFailedException

from ir.dialects import tc
from ir.errors import UserError
from ir.interpreter import find_function, names_of, run
from ir.placement import Mesh
from ir.quantization import Scheme, note_schemes
from ir.spmd import argument_shards, join_results, run_spmd
from ir.text import parse_module, print_module
from ir.types import shape_of
from passes.notes import notes
from passes.opt import run_pipeline
from passes.parallel_report import collectives_report, memory_report, waste_report
from passes.partition import Partition
from passes.pipeline import shard_stage
from passes.plan_tp import PlanTp, choose_mesh
from tests.passes.transformer_modules import Shape, inputs_of, module, weights_of


def same(want: Mapping[str, np.ndarray], got: Mapping[str, np.ndarray], tolerance: float = 1e-4) -> None:
    assert list(want) == list(got)
    for name, expected in want.items():
        assert got[name].shape == expected.shape, name
        # Weights keep activations near 1, so what is far below may be what is left of a cancellation.
        scale = max(float(np.abs(expected).max()), 0.1)
        assert float(np.abs(got[name] - expected).max()) <= tolerance * scale, name


def check(
    model: ModuleOp,
    args: Mapping[str, np.ndarray],
    weights: Callable[[str], np.ndarray],
    units: int,
    sequence: bool = False,
    plan: Path | None = None,
) -> ModuleOp:
    """The partitioned module, after comparing what it computes with the whole one."""
    want = run(model, args, weights)
    part = model.clone()
    run_pipeline(part, shard_stage(units, sequence, str(plan) if plan else None))
    assert print_module(parse_module(print_module(part))) == print_module(part)
    results = run_spmd(part, args, weights)
    for name, parts in results.items():
        if not name.startswith("cache."):
            # Every unit has the same whole result: the host may read any.
            assert all(np.array_equal(parts[0], p) for p in parts[1:]), name
    same(want, join_results(part, results))
    return part


def check_shape(shape: Shape, units: int, sequence: bool = False, plan: Path | None = None) -> ModuleOp:
    model = module(shape)
    return check(model, inputs_of(model, shape), weights_of(model).__getitem__, units, sequence, plan)


def kinds(model: ModuleOp, function: str) -> Counter[str]:
    return Counter(c.kind for c in collectives_report(model) if c.function == function)


@pytest.mark.parametrize("units", [2, 4, 8, 16])
@pytest.mark.parametrize("kv", [1, 2, 3, 5, 6, 8])
def test_any_number_of_heads(kv: int, units: int) -> None:
    for group in sorted({1, 3, 40 // kv}):
        check_shape(Shape(kv=kv, group=group, layers=1, seq=4, slots=8), units)


VARIANTS = {
    "packed": Shape(kv=4, group=1, packed=True, bias=True, gated=False, tied=True, flat=True),
    "packed padded": Shape(kv=3, group=1, packed=True, bias=True, gated=False, tied=True),
    "biases": Shape(bias=True),
    "head norms": Shape(head_norm=True),
    "tied with cap": Shape(tied=True, cap=True, vocab=51),
    "encoder": Shape(encoder=True, kv=6, group=1, bias=True, gated=False),
    "few of everything": Shape(kv=1, group=3, inner=7, vocab=3),
}


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("units", [2, 4, 8])
@pytest.mark.parametrize("name", list(VARIANTS))
def test_variants(name: str, units: int, sequence: bool) -> None:
    part = check_shape(VARIANTS[name], units, sequence)
    assert not notes(part)
    layer = {"reduce_scatter": 2, "all_gather": 2} if sequence else {"all_reduce": 2}
    assert kinds(part, "block_0") == layer


@pytest.mark.parametrize("sequence", [False, True])
def test_what_cannot_be_cut_is_copied(sequence: bool) -> None:
    part = check_shape(Shape(kv=1, group=1, inner=1, vocab=1, layers=1), 4, sequence)
    assert not any(op.shard for op in part.walk() if isinstance(op, tc.WeightOp))
    assert not kinds(part, "block_0")["all_reduce"]


@st.composite
def cases(draw: st.DrawFn) -> tuple[Shape, int, bool]:
    kv = draw(st.sampled_from([1, 2, 3, 5, 6, 8]))
    packed = draw(st.booleans())
    group = 1 if packed else draw(st.integers(1, max(1, 40 // kv)))
    seq = draw(st.sampled_from([1, 2, 4, 6, 8]))
    shape = Shape(
        batch=draw(st.integers(1, 3)),
        seq=seq,
        slots=seq + draw(st.integers(0, 4)),
        layers=draw(st.integers(1, 2)),
        kv=kv,
        group=group,
        head=draw(st.sampled_from([2, 4, 6])),
        hidden=draw(st.integers(4, 20)),
        inner=draw(st.integers(1, 100)),
        vocab=draw(st.integers(1, 100)),
        packed=packed,
        gated=draw(st.booleans()),
        bias=draw(st.booleans()),
        head_norm=draw(st.booleans()),
        tied=draw(st.booleans()),
        cap=draw(st.booleans()),
        encoder=draw(st.booleans()),
        flat=draw(st.booleans()),
    )
    return shape, draw(st.sampled_from([2, 3, 4, 6, 8, 16])), draw(st.booleans())


@given(case=cases())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_random_shapes_and_meshes(case: tuple[Shape, int, bool]) -> None:
    shape, units, sequence = case
    part = check_shape(shape, units, sequence)
    scattered = sequence and shape.seq % units == 0
    if shape.kv * shape.group > 1 and shape.inner > 1:
        # A single head or channel is copied to all units and needs no sum.
        layer = {"reduce_scatter": 2, "all_gather": 2} if scattered else {"all_reduce": 2}
        assert kinds(part, "block_0") == layer
    assert bool(notes(part)) == (sequence and not scattered)


@given(case=cases(), mesh=st.sampled_from(["kv=2,r=2", "kv=1,r=4", "kv=4,r=1", "kv=2,r=3", "r=2,kv=4"]))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_mesh_is_right(case: tuple[Shape, int, bool], mesh: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A mesh that the planner would not choose costs more, but computes the same."""
    plan = tmp_path_factory.mktemp("plan") / "plan.yaml"
    plan.write_text(f"mesh: {mesh}\n", "utf-8")
    check_shape(replace(case[0], packed=False), Mesh.parse(mesh).size, case[2], plan)


def test_collectives_of_a_model() -> None:
    """Two a layer, and one at each end; under sequence parallelism the last row is gathered before the head."""
    part = check_shape(Shape(layers=3), 4)
    assert kinds(part, "main") == {"all_reduce": 1, "all_gather": 1}
    assert {c.calls for c in collectives_report(part) if c.function == "block_0"} == {3}
    rows = check_shape(Shape(layers=3), 4, sequence=True)
    assert kinds(rows, "main") == {"reduce_scatter": 1, "all_gather": 2}
    for record in collectives_report(part) + collectives_report(rows):
        assert ": " in record.why
        assert record.nbytes > 0
    last = collectives_report(part)[-1]
    assert (last.kind, last.dims, last.elem, last.axis) == ("all_gather", (2, 13), "f32", "tp")
    assert last.nbytes == 2 * 52 * 4


def test_partial_sums_end_behind_their_contraction() -> None:
    part = check_shape(Shape(bias=True), 4)
    for op in part.walk():
        if isinstance(op, tc.AllReduceOp) and op.parent_op() is find_function(part, "block_0"):
            assert isinstance(op.x.owner, tc.ContractOp)
            assert op.prev_op is op.x.owner


def test_the_program_does_not_grow_with_the_units() -> None:
    sizes = {n: sum(1 for _ in check_shape(Shape(kv=16, group=2, inner=64, vocab=64), n).walk()) for n in (2, 4, 8, 16)}
    assert len(set(sizes.values())) == 1


def test_thirty_two_layers_are_planned_in_a_moment() -> None:
    model = module(Shape(layers=32, seq=4, kv=8, group=4))
    start = time.process_time()
    run_pipeline(model, shard_stage(8))
    assert time.process_time() - start < 2.0
    blocks = [n for n in ("block_0", "block_0_1") if f"@{n}(" in print_module(model)]
    assert blocks == ["block_0"]


@pytest.mark.parametrize(
    ("kv", "group", "units", "mesh"),
    [
        (8, 4, 8, "kv=8,r=1"),
        (8, 4, 4, "kv=4,r=1"),
        (8, 4, 32, "kv=8,r=4"),
        (2, 4, 8, "kv=2,r=4"),
        (1, 8, 8, "kv=1,r=8"),
        (3, 3, 2, "kv=2,r=1"),
        (3, 3, 8, "kv=4,r=2"),
        (6, 4, 8, "kv=2,r=4"),
        (12, 1, 8, "kv=8,r=1"),
        (5, 8, 8, "kv=1,r=8"),
    ],
)
def test_mesh(kv: int, group: int, units: int, mesh: str) -> None:
    assert str(choose_mesh(module(Shape(kv=kv, group=group, layers=1)), units)) == mesh


def test_weights_and_caches_lie_as_planned() -> None:
    part = check_shape(Shape(kv=2, group=2, inner=80, vocab=96, bias=True), 8)
    shards = {op.fqn.data: str(op.shard.data) if op.shard else "" for op in part.walk() if isinstance(op, tc.WeightOp)}
    assert shards["embed.weight"] == shards["lm_head.weight"] == "96@tp, 12"
    assert shards["positions.weight"] == shards["layers.0.norm1.weight"] == ""
    assert shards["layers.1.attn.q.weight"] == "2@kv 2@r 4, 12"
    assert shards["layers.1.attn.q.bias"] == "2@kv 2@r 4"
    assert shards["layers.1.attn.v.weight"] == "2@kv 4, 12"
    assert shards["layers.1.attn.o.weight"] == "12, 2@kv 2@r 4"
    assert shards["layers.1.attn.o.bias"] == ""
    assert shards["layers.1.mlp.up.weight"] == "80@tp, 12"
    assert shards["layers.1.mlp.down.weight"] == "12, 80@tp"
    main = find_function(part, "main")
    placed = dict(zip(names_of(main, "arg_names", 0), argument_shards(main), strict=True))
    assert str(placed["cache.k.1"]) == "2, 2@kv, 24, 4"
    assert placed["input_ids"] is None
    assert shape_of(main.body.block.args[3]) == [2, 1, 24, 4]


def test_local_sizes_are_multiples_of_8_where_that_is_cheap() -> None:
    part = check_shape(Shape(kv=8, group=1, inner=4 * 124, vocab=100), 4)
    shards = {op.fqn.data: op.shard.data for op in part.walk() if isinstance(op, tc.WeightOp) and op.shard}
    assert shards["layers.0.mlp.up.weight"] == "62@tp 8, 12"
    assert shards["embed.weight"] == "100@tp, 12"
    records = {w.what: w for w in waste_report(part)}
    assert (records["intermediate"].size, records["intermediate"].padded) == (496, 512)
    assert records["intermediate"].share == pytest.approx(1 / 32)


def test_waste_is_reported() -> None:
    part = check_shape(Shape(kv=3, group=3, inner=42, vocab=51, layers=1), 8)
    found = {w.what: (w.size, w.padded) for w in waste_report(part)}
    assert found == {
        "key-value heads": (3, 4),
        "query heads of a group": (3, 4),
        "vocabulary": (51, 56),
        "intermediate": (42, 48),
    }
    memory = memory_report(part)
    assert memory.caches_per_unit * 3 == memory.caches
    assert memory.weights < memory.weights_per_unit * 8


def test_sequence_parallelism_needs_rows_to_divide() -> None:
    part = check_shape(Shape(seq=6), 4, sequence=True)
    assert notes(part) == ["no sequence parallelism in this bucket: 6 tokens are no multiple of 4 units"]
    assert kinds(part, "block_0") == {"all_reduce": 2}


def test_layers_may_lie_differently(tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text(
        "layers.*.mlp.gate: replicate\nlayers.1.mlp.down: colwise\nembed: replicate\nlm_head.weight: 50, 12\n"
        'layers.0.attn.k.weight: "8, 12"\nlayers.2.mlp.up: replicate\nlayers.2.mlp.down: rowwise\n',
        "utf-8",
    )
    shape = Shape(layers=4)
    for units, sequence in ((2, False), (4, False), (4, True)):
        part = check_shape(shape, units, sequence, plan)
        shards = {op.fqn.data: op.shard.data for op in part.walk() if isinstance(op, tc.WeightOp) and op.shard}
        assert "layers.0.mlp.gate.weight" not in shards
        assert "embed.weight" not in shards
        assert shards["layers.1.mlp.down.weight"] == "12@tp, 40"
        if not sequence:
            assert shards["layers.0.mlp.down.weight"] == shards["layers.2.mlp.down.weight"] == "12, 40@tp"
        assert {c.function for c in collectives_report(part)} >= {"block_0", "block_0_1"}


def test_a_placement_in_the_plan_is_taken(tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text("mesh: kv=2,r=2\nlayers.*.mlp.up.weight: 5@kv 8, 12\nlayers.*.mlp.gate.weight: 5@kv 8, 12\n")
    part = check_shape(Shape(), 4, plan=plan)
    shards = {op.fqn.data: op.shard.data for op in part.walk() if isinstance(op, tc.WeightOp) and op.shard}
    assert shards["layers.1.mlp.up.weight"] == "5@kv 8, 12"
    assert shards["layers.1.mlp.down.weight"] == "12, 5@kv 8"
    assert {c.axis for c in collectives_report(part)} == {"tp", "kv"}


def test_the_models_own_plan_is_used() -> None:
    model = module(Shape())
    styled = parse_module(
        print_module(model).replace(
            "builtin.module {", 'builtin.module attributes {tc.tp_plan = {"layers.*.attn.norm" = "x"}} {', 1
        )
    )
    run_pipeline(styled, [PlanTp(size=2)])
    assert "tc.tp_plan" not in styled.attributes


def test_all_problems_of_a_plan_are_reported(tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text(
        "layers.*.attn.query: colwise\nlayers.*.norm1: rowwise\nlayers.*.mlp.up.weight: 41@tp, 12\n"
        "layers.*.mlp.gate.weight: 5@kv 8@tp, 12\n",
        "utf-8",
    )
    with pytest.raises(UserError) as error:
        run_pipeline(module(Shape()), shard_stage(4, plan=str(plan)))
    text = [str(p) for p in error.value.problems]
    assert len(text) == 4
    assert "no weight has such a name" in text[0]
    assert "one dimension" in text[1]
    assert "shape [41, 12]" in text[2]
    assert "twice" in text[3]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("layers.*.mlp.up: columnwise\nembed: whole\n", "'columnwise' is no style.*\n.*'whole' is no style"),
        ("mesh: kv:2\n", "not like kv=4"),
        ("mesh: kv=3\n", "it has 3 units, not 4"),
        ("- colwise\n", "no list of"),
        ("a: [\n", "cannot be read"),
        ("layers.*.mlp.up.weight: 4@@tp, 12\n", "not like 128 or 8@kv"),
    ],
)
def test_a_wrong_plan_is_refused(content: str, message: str, tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text(content, "utf-8")
    with pytest.raises(UserError, match=message):
        run_pipeline(module(Shape()), shard_stage(4, plan=str(plan)))
    with pytest.raises(UserError, match="cannot be read"):
        run_pipeline(module(Shape()), shard_stage(4, plan=str(tmp_path / "missing.yaml")))


def test_one_unit_stays_as_it_is() -> None:
    model = module(Shape())
    before = print_module(model)
    run_pipeline(model, [PlanTp(size=1)])
    assert print_module(model) == before
    assert shard_stage(1) == []


def test_order_of_passes_is_checked() -> None:
    with pytest.raises(PassFailedException, match="run plan-tp first"):
        run_pipeline(module(Shape()), [Partition()])
    part = module(Shape())
    run_pipeline(part, shard_stage(2))
    with pytest.raises(PassFailedException, match="partitioned already"):
        run_pipeline(part, [Partition()])
    with pytest.raises(PassFailedException, match="a plan already"):
        run_pipeline(part, [PlanTp(size=2)])


def test_provenance_survives() -> None:
    model = module(Shape())
    part = model.clone()
    run_pipeline(part, shard_stage(2))
    for before, after in ((model, part),):
        paths = {op.attributes["path"] for op in before.walk() if "path" in op.attributes}
        assert paths == {op.attributes["path"] for op in after.walk() if "path" in op.attributes}


def quantized(shape: Shape, scheme: str) -> ModuleOp:
    """A model whose projections are quantized."""
    model = module(shape)
    names = [
        op.fqn.data
        for op in model.walk()
        if isinstance(op, tc.WeightOp)
        and len(shape_of(op.result)) == 2
        and (".attn." in op.fqn.data or ".mlp." in op.fqn.data)
    ]
    note_schemes(model, {n: Scheme.parse(scheme) for n in names})
    run_pipeline(model, "bind-quantized,simplify")
    return model


@pytest.mark.parametrize("units", [2, 4, 8])
@pytest.mark.parametrize("scheme", ["int8 channel dynamic", "fp8 tensor static", "int4 group 8", "int4 group 0"])
def test_quantized_models(scheme: str, units: int) -> None:
    shape = Shape(kv=2, group=4, head=8, hidden=16, inner=64)
    model = quantized(shape, scheme)
    args, weights = inputs_of(model, shape), weights_of(model)
    want = run(model, args, weights.__getitem__)
    part = model.clone()
    run_pipeline(part, shard_stage(units))
    results = run_spmd(part, args, weights.__getitem__)
    # Numbers of 8 bits may round to a neighbour where sums are added in another order.
    same(want, join_results(part, results), 1e-4 if "int4" in scheme else 3e-2)
    sums = Counter(c.kind for c in collectives_report(part) if c.function == "block_0")
    # A dynamic scale needs the largest number of a whole token: two small exchanges a layer.
    assert sums == ({"all_reduce": 2, "all_gather": 2} if "dynamic" in scheme else {"all_reduce": 2})
    assert all(c.nbytes < 2048 for c in collectives_report(part) if c.function == "block_0" and c.kind == "all_gather")


def test_quantized_models_with_padded_heads() -> None:
    """Padding must not enter the largest number of a token, nor be what a packed zero stands for."""
    shape = Shape(kv=3, group=1, head=8, hidden=16, inner=24, gated=False)
    model = quantized(shape, "int8 channel dynamic")
    args, weights = inputs_of(model, shape), weights_of(model)
    part = model.clone()
    run_pipeline(part, shard_stage(2))
    got = join_results(part, run_spmd(part, args, weights.__getitem__))
    same(run(model, args, weights.__getitem__), got, 3e-2)
    with pytest.raises(UserError, match=r"attn.o.weight_packed on 2 units: .* a scale belongs to 24"):
        run_pipeline(quantized(shape, "int4 group 0"), shard_stage(2))


def test_groups_of_4_bit_weights_stay_together() -> None:
    shape = Shape(kv=2, group=2, head=8, hidden=16, inner=48)
    part = quantized(shape, "int4 group 16")
    run_pipeline(part, shard_stage(2))
    shards = {op.fqn.data: op.shard.data for op in part.walk() if isinstance(op, tc.WeightOp) and op.shard}
    assert shards["layers.0.mlp.up.weight_packed"] == "3@tp 16, 2"
    assert shards["layers.0.mlp.down.weight_packed"] == "16, 3@tp 2"
    assert shards["layers.0.mlp.down.weight_scale"] == "16, 3@tp"
    with pytest.raises(UserError, match=r"attn.o.weight_packed on 4 units: its inputs are cut as .* belongs to 16"):
        run_pipeline(quantized(shape, "int4 group 16"), shard_stage(4))
