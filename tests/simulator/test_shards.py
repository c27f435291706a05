"""Shard texts: cutting and joining arrays, replicas, padding."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backend_rngd.artifact import Placement, placed
from backend_rngd.artifact.shards import ShardError, cut, join, local_shape, parse_mesh, replicas, waste


def test_units_are_numbered_row_major():
    mesh = parse_mesh("kv=4,r=2")
    assert mesh.size == 8
    assert [mesh.coordinate(u, "kv") for u in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [mesh.coordinate(u, "r") for u in range(8)] == [0, 1] * 4
    assert [mesh.coordinate(u, "tp") for u in range(8)] == list(range(8))
    assert parse_mesh("").size == 1


def test_query_and_key_heads():
    """32 query heads in 8 groups on 4 x 2 units: a unit has 2 groups and half of their query heads."""
    whole = np.arange(32 * 128 * 16).reshape(32 * 128, 16)
    part = cut(whole, "8@kv 4@r 128, 16", "kv=4,r=2", 3)
    heads = whole.reshape(8, 4, 128, 16)
    assert np.array_equal(part, heads[2:4, 2:4].reshape(-1, 16))
    keys = np.arange(8 * 128 * 16).reshape(8 * 128, 16)
    assert np.array_equal(cut(keys, "8@kv 128, 16", "kv=4,r=2", 3), keys[256:512])
    assert replicas("8@kv 128, 16", "kv=4,r=2", 3) == (2, 3)
    assert replicas("", "kv=4,r=2", 3) == tuple(range(8))


def test_padding_is_zero_and_counted():
    whole = np.arange(1, 10)
    parts = [cut(whole, "9@tp", "tp=4", u).tolist() for u in range(4)]
    assert parts == [[1, 2, 3], [4, 5, 6], [7, 8, 9], [0, 0, 0]]
    assert waste("9@tp", "tp=4") == pytest.approx(0.25)
    assert waste("8@tp", "tp=4") == 0
    assert local_shape((9,), "9@tp", "tp=4") == (3,)


@st.composite
def cases(draw):
    axes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    names = [f"a{i}" for i in range(len(axes))]
    free: list[str | None] = [*names, None, None, None]
    if draw(st.booleans()):
        free = ["tp", None, None, None]
    dims = []
    for _ in range(draw(st.integers(1, 3))):
        factors = []
        for _ in range(draw(st.integers(1, 3))):
            axis = draw(st.sampled_from(free))
            if axis is not None:
                free.remove(axis)
            size = draw(st.integers(1, 7))
            factors.append(f"{size}@{axis}" if axis else f"{size}")
        dims.append(" ".join(factors))
    return ", ".join(dims), ",".join(f"{n}={s}" for n, s in zip(names, axes, strict=True))


@settings(max_examples=200, deadline=None)
@given(cases())
def test_elements_one_by_one(case):
    """Every element of a part is the one that the definition names, or zero; parts join to the whole."""
    text, mesh_text = case
    mesh = parse_mesh(mesh_text)
    dims = [[w.partition("@") for w in d.split()] for d in text.split(",")]
    shape = [math.prod(int(w[0]) for w in d) for d in dims]
    whole = np.arange(1, math.prod(shape) + 1).reshape(shape)
    parts = [cut(whole, text, mesh_text, u) for u in range(mesh.size)]
    for unit, part in enumerate(parts):
        assert part.shape == local_shape(shape, text, mesh_text)
        for index in np.ndindex(part.shape):
            at: list[int] | None = []
            for i, d in zip(index, dims, strict=True):
                total, inner, local_inner = 0, 1, 1
                for size_text, _, axis in reversed(d):
                    size = int(size_text)
                    local = -(-size // mesh.extent(axis)) if axis else size
                    digit = i // local_inner % local + (mesh.coordinate(unit, axis) * local if axis else 0)
                    if digit >= size:
                        at = None
                        break
                    total += digit * inner
                    inner, local_inner = inner * size, local_inner * local
                if at is None:
                    break
                at.append(total)
            assert part[index] == (0 if at is None else whole[tuple(at)])
    assert np.array_equal(join(parts, text, mesh_text), whole)
    assert waste(text, mesh_text) == pytest.approx(
        1 - sum(np.count_nonzero(parts[u]) for u in range(mesh.size)) / sum(p.size for p in parts)
    )


@pytest.mark.parametrize(
    ("text", "mesh", "message"),
    [
        ("8@kv", "r=2", "axis kv is not one of the mesh"),
        ("8@kv 4@kv", "kv=2", "same axis"),
        ("4@tp, 4@r", "r=2", "same axis"),
        ("8@", "kv=2", "size@axis"),
        ("8, ", "kv=2", "empty dimension"),
        ("9", "kv=2", "is of an array"),
        ("8@kv", "kv", "name=size"),
        ("8@kv", "kv=2,kv=2", "taken"),
    ],
)
def test_bad_texts(text, mesh, message):
    with pytest.raises(ShardError, match=message):
        cut(np.zeros(8), text, mesh, 0)


def test_images_are_cut_before_they_are_laid_out():
    whole = np.arange(6 * 4, dtype=np.float32).reshape(6, 4)
    placement = Placement(
        name="w", address=0, bytes=4 * 4 * 4, weight="w", permute=(1, 0), reshape=(4, 3), pad=(4, 4), dtype="f32",
        shard="6@tp, 4",
    )  # fmt: skip
    image = placed(whole, placement, "tp=2", 1)
    assert np.array_equal(image[:, :3], whole[3:].T)
    assert not image[:, 3:].any()
