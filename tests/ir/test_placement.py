from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backend_rngd.artifact import shards
from ir.placement import Factor, Mesh, PlacementError, Shard, own_part

MESHES = st.lists(st.integers(1, 4), min_size=1, max_size=3).map(
    lambda sizes: Mesh(tuple(zip(("kv", "r", "z"), sizes, strict=False)))
)


@st.composite
def placements(draw: st.DrawFn) -> tuple[Mesh, Shard]:
    """A mesh, and a placement that uses each of its axes at most once, or `tp` alone."""
    mesh = draw(MESHES)
    whole = draw(st.booleans())
    free = ["tp"] if whole else [n for n, _ in mesh.axes]
    dims: list[tuple[Factor, ...]] = []
    for _ in range(draw(st.integers(1, 3))):
        factors: list[Factor] = []
        for _ in range(draw(st.integers(1, 3))):
            axis = draw(st.sampled_from([None, *free]))
            if axis is not None:
                free.remove(axis)
            factors.append(Factor(draw(st.integers(1, 6)), axis))
        dims.append(tuple(factors))
    return mesh, Shard(tuple(dims))


@given(case=placements())
def test_parts_join_to_the_whole(case: tuple[Mesh, Shard]) -> None:
    mesh, shard = case
    shard.check(mesh)
    array = np.arange(1, math.prod(shard.shape) + 1, dtype=np.int32).reshape(shard.shape)
    parts = [shard.cut(array, mesh, unit) for unit in range(mesh.size)]
    assert all(list(p.shape) == shard.local_shape(mesh) for p in parts)
    assert np.array_equal(shard.join(parts, mesh), array)
    # What is no copy is somewhere exactly once; the rest is zero.
    copies = mesh.size // math.prod(mesh[a] for a in shard.axes)
    held = np.concatenate([p.ravel() for p in parts])
    assert sorted(held[held != 0].tolist()) == sorted(array.ravel().tolist() * copies)
    assert shard.waste(mesh) == pytest.approx(1 - np.count_nonzero(held) / held.size)


@given(case=placements())
def test_the_runtime_cuts_alike(case: tuple[Mesh, Shard]) -> None:
    """The runtime, which does not know the IR, reads the same text with its own function."""
    mesh, shard = case
    array = np.arange(1, math.prod(shard.shape) + 1, dtype=np.int32).reshape(shard.shape)
    parts = [shards.cut(array, str(shard), str(mesh), unit) for unit in range(mesh.size)]
    for unit, part in enumerate(parts):
        assert np.array_equal(part, shard.cut(array, mesh, unit))
    assert np.array_equal(shards.join(parts, str(shard), str(mesh)), array)
    assert shards.waste(str(shard), str(mesh)) == pytest.approx(shard.waste(mesh))


@given(case=placements())
def test_text_is_the_placement(case: tuple[Mesh, Shard]) -> None:
    mesh, shard = case
    assert Shard.parse(str(shard)) == shard
    assert Mesh.parse(str(mesh)) == mesh


@given(mesh=MESHES)
def test_groups_differ_in_one_coordinate(mesh: Mesh) -> None:
    for unit in range(mesh.size):
        for axis, size in mesh.axes:
            group = mesh.group(unit, axis)
            assert [mesh.coordinate(u, axis) for u in group] == list(range(size))
            assert group[mesh.coordinate(unit, axis)] == unit
            others = [n for n, _ in mesh.axes if n != axis]
            assert {tuple(mesh.coordinate(u, o) for o in others) for u in group} == {
                tuple(mesh.coordinate(unit, o) for o in others)
            }
        assert mesh.group(unit, "tp") == list(range(mesh.size))
        assert mesh.coordinate(unit, "tp") == unit


def test_units_are_row_major() -> None:
    mesh = Mesh.parse("kv=4, r=2")
    assert [(mesh.coordinate(u, "kv"), mesh.coordinate(u, "r")) for u in (0, 1, 2, 7)] == [
        (0, 0),
        (0, 1),
        (1, 0),
        (3, 1),
    ]
    assert (mesh.size, mesh["kv"], mesh["tp"], mesh.stride("kv"), mesh.stride("tp")) == (8, 4, 8, 2, 1)


def test_heads_are_cut_with_padding() -> None:
    mesh, shard = Mesh.parse("kv=2,r=2"), Shard.parse("3@kv 3@r 2, 1")
    array = np.arange(1, 19)[:, None]
    assert shard.local_shape(mesh) == [8, 1]
    assert shard.cut(array, mesh, 0)[:, 0].tolist() == [1, 2, 3, 4, 7, 8, 9, 10]
    assert shard.cut(array, mesh, 1)[:, 0].tolist() == [5, 6, 0, 0, 11, 12, 0, 0]
    assert shard.cut(array, mesh, 3)[:, 0].tolist() == [17, 18, 0, 0, 0, 0, 0, 0]
    assert shard.waste(mesh) == pytest.approx(1 - 18 / 32)


def test_more_units_than_elements() -> None:
    mesh, shard = Mesh.parse("kv=4"), Shard.parse("5@tp")
    assert [shard.cut(np.arange(1, 6), mesh, u).tolist() for u in range(4)] == [[1, 2], [3, 4], [5, 0], [0, 0]]
    assert own_part(np.arange(3), 0, 2, 1).tolist() == [2, 0]


def test_a_whole_part_is_a_view() -> None:
    array = np.zeros((8, 4))
    part = Shard.parse("8@tp, 4").cut(array, Mesh.parse("kv=2"), 1)
    assert np.shares_memory(part, array)


@pytest.mark.parametrize(
    ("text", "message"),
    [("8@", "is not like"), ("a", "is not like"), ("8,,4", "without a size"), ("0@tp", "is not like"), ("8@KV", "is")],
)
def test_wrong_placements(text: str, message: str) -> None:
    with pytest.raises(PlacementError, match=message):
        Shard.parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [("kv", "not like kv=4"), ("kv=0", "positive"), ("kv=2,kv=2", "own name"), ("tp=4", "own name")],
)
def test_wrong_meshes(text: str, message: str) -> None:
    with pytest.raises(PlacementError, match=message):
        Mesh.parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [("8@kv 4@kv", "twice"), ("8@kv, 4@tp", "twice"), ("8@x", "no axis 'x'")],
)
def test_placements_that_do_not_fit_a_mesh(text: str, message: str) -> None:
    with pytest.raises(PlacementError, match=message):
        Shard.parse(text).check(Mesh.parse("kv=2,r=2"))


def test_an_array_of_another_shape_is_refused() -> None:
    with pytest.raises(PlacementError, match=r"for shape \[8, 4\], not \[4, 8\]"):
        Shard.parse("8@tp, 4").cut(np.zeros((4, 8)), Mesh.parse("kv=2"), 0)
