"""Contractions through the streams: both mappings, every tiling edge, split K, epilogues, program outputs."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backend_rngd.isa.descriptors import Dma, Exec, Space
from backend_rngd.lowering.channel_groups import channel_groups
from backend_rngd.lowering.contract_base import split_k
from backend_rngd.lowering.stream_weights import column_tiles
from ir import expr as ex
from tests.lowering.running import MACHINE, Run, bf16, relative, tensor_text


def contraction(b: int, s: int, k: int, n: int, element: str = "bf16", after: str = "") -> str:
    x, w, y = tensor_text((b, s, k), "bf16"), tensor_text((n, k), "bf16"), tensor_text((b, s, n), element)
    tail = f'  %z = tc.map "{after}" over "b s o -> b s o" (%y) : {y}\n' if after else ""
    result = "%z" if after else "%y"
    return f"""func.func @main(%x: {x}, %w: {w}) -> {y} attributes {{arg_names = ["x", "w"], result_names = ["y"]}} {{
  %y = tc.contract "b s i, o i -> b s o" (%x, %w) : {y}
{tail}  func.return {result} : {y}
}}"""


def run(b: int, s: int, k: int, n: int, element: str = "bf16", after: str = "") -> tuple[Run, float]:
    rng = np.random.default_rng(b * 1000 + s + k + n)
    x, w = bf16(rng.standard_normal((b, s, k))), bf16(rng.standard_normal((n, k)) * 0.1)
    run = Run(contraction(b, s, k, n, element, after))
    got = run({"x": x, "w": w})["y"]
    want = x @ w.T
    if after:
        want = ex.evaluate(ex.parse(after), [want])
    return run, relative(got, want)


@pytest.mark.parametrize(
    ("b", "s", "k", "n"),
    [
        (1, 1, 576, 1536),  # one token, one tile
        (1, 4, 576, 576),  # output channels that fill 48 of 64 slices
        (3, 1, 1536, 192),  # three tokens in four lanes
        (4, 1, 9216, 128),  # K beyond one TRF: two chunks, f32 partial sums
        (8, 1, 128, 9000),  # several weight tiles, eight lanes
        (1, 128, 576, 576),  # tokens on slices, partial last tile
        (1, 100, 1536, 576),  # tokens that do not fill the slices, K in two chunks
        (2, 64, 576, 1600),  # two batch rows, more than 1,024 channels
        (3, 33, 2080, 320),  # nothing divides
        (16, 1, 576, 192),  # large decode batch
        (1, 20, 40, 100),  # K below a packet's multiple: zero padding
        (2, 1, 24, 52),
    ],
)
def test_contraction(b: int, s: int, k: int, n: int) -> None:
    assert run(b, s, k, n)[1] < 3e-3  # one rounding to bf16


@pytest.mark.parametrize(
    ("b", "s", "k", "n"), [(1, 2, 576, 320), (1, 70, 576, 320), (4, 1, 9216, 64), (1, 70, 2080, 64)]
)
def test_f32_result_is_not_rounded(b: int, s: int, k: int, n: int) -> None:
    assert run(b, s, k, n, "f32")[1] < 1e-6


@pytest.mark.parametrize("after", ["relu(a)", "silu(a)", "mul(tanh(div(a, 3.0)), 3.0)"])
@pytest.mark.parametrize(
    ("b", "s", "k", "n"), [(1, 2, 576, 320), (1, 70, 576, 320), (4, 1, 9216, 64), (1, 70, 2080, 64)]
)
def test_epilogue(b: int, s: int, k: int, n: int, after: str) -> None:
    assert run(b, s, k, n, "bf16", after)[1] < 3e-3


def test_epilogue_rides_in_the_contraction_pass() -> None:
    lowered, _ = run(1, 70, 576, 320, "bf16", "relu(a)")
    passes = [i.what for i in lowered.stream.routines[0].instructions if isinstance(i.what, Exec)]
    assert all(p.contract is None or p.vector for p in passes)
    assert not any(p.vector and p.contract is None for p in passes)


def test_both_stationarities_are_used() -> None:
    few, _ = run(1, 2, 576, 320)
    many, _ = run(1, 70, 576, 320)
    lanes = [
        {
            i.what.contract.lanes
            for i in r.stream.routines[0].instructions
            if isinstance(i.what, Exec) and i.what.contract
        }
        for r in (few, many)
    ]
    assert lanes == [{4}, {8}]  # tokens on lanes, output channels on lanes


def test_large_value_goes_through_hbm() -> None:
    rng = np.random.default_rng(0)
    x, w = bf16(rng.standard_normal((1, 128, 512))), bf16(rng.standard_normal((640, 512)) * 0.1)
    lowered = Run(contraction(1, 128, 512, 640, "bf16", "silu(a)"), spill_bytes=1024)
    want = x @ w.T
    assert relative(lowered({"x": x, "w": w})["y"], want / (1 + np.exp(-want))) < 3e-3


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from([(1, 1), (1, 3), (2, 2), (7, 1), (1, 9), (2, 17), (5, 13), (33, 1), (70, 1)]),
    st.integers(1, 40).map(lambda v: v * 4),
    st.integers(1, 60).map(lambda v: v * 4),
)
def test_any_shape(tokens: tuple[int, int], k: int, n: int) -> None:
    assert run(*tokens, k, n)[1] < 4e-3


@given(
    st.integers(1, 200).map(lambda v: v * 64),
    st.integers(1, 64).map(lambda v: v * 4),
    st.integers(1, 8),
    st.integers(1, 32),
    st.integers(1, 128).map(lambda v: v * 32),
)
def test_tiles_cover_every_channel_once(rows: int, per_slice: int, limit: int, local: int, k: int) -> None:
    groups = channel_groups(rows, 64, limit, local, k * 2, MACHINE)
    for tiles in (column_tiles(rows, per_slice, 64), groups):
        position = 0
        for tile in tiles:
            assert tile.start == position
            assert 1 <= tile.slices <= 64
            assert tile.per_slice % 4 == 0
            position += tile.slices * tile.per_slice
        assert position == rows
    assert all(g.passes <= limit and g.slices <= g.ring and 64 % g.ring == 0 for g in groups)


@given(st.integers(1, 1000).map(lambda v: v * 32), st.sampled_from([1024, 4096]))
def test_chunks_cover_k(k: int, limit: int) -> None:
    chunks = split_k(k, limit, 32)
    assert sum(n for _, n in chunks) == k
    assert all(0 < n <= limit and n % 32 == 0 for _, n in chunks)


@pytest.mark.parametrize("joint", ["mul(silu(a), b)", "mul(gelu_tanh(a), b)"])
@pytest.mark.parametrize(
    ("b", "s", "k", "n"),
    [
        (2, 7, 64, 96),  # one token a slice, slices without tokens
        (1, 128, 64, 768),  # 12 channels a slice
        (1, 100, 1088, 1792),  # 28 channels a slice: a whole pass and a narrow one; K in two chunks
        (2, 40, 64, 160),  # slices without channels
        (16, 1, 96, 2048),  # a decode batch
    ],
)
def test_gated_contractions(b: int, s: int, k: int, n: int, joint: str) -> None:
    """Two contractions and the map that joins them leave the slices of their channels once."""
    x, w, y = tensor_text((b, s, k), "bf16"), tensor_text((n, k), "bf16"), tensor_text((b, s, n), "bf16")
    text = f"""func.func @main(%x: {x}, %g: {w}, %u: {w}) -> {y}
    attributes {{arg_names = ["x", "g", "u"], result_names = ["y"]}} {{
  %a = tc.contract "b s i, o i -> b s o" (%x, %g) : {y}
  %b = tc.contract "b s i, o i -> b s o" (%x, %u) : {y}
  %z = tc.map "{joint}" over "b s o, b s o -> b s o" (%a, %b) : {y}
  func.return %z : {y}
}}"""
    rng = np.random.default_rng(n)
    values = {"x": bf16(rng.standard_normal((b, s, k)))}
    values |= {name: bf16(rng.standard_normal((n, k)) * 0.1) for name in "gu"}
    made = Run(text)
    gate, up = (bf16(values["x"] @ values[name].T) for name in "gu")
    assert relative(made(values)["y"], ex.evaluate(ex.parse(joint), [gate, up])) < 4e-3
    homes = [
        i for i in made.emitted.streams[0].routines[0].instructions
        if isinstance(i.what, Dma) and i.what.source.space == i.what.destination.space == Space.DM
    ]  # fmt: skip
    group = 1024 * (2 if b * s <= 64 else 1)  # channels
    assert len(homes) == -(-n // group)  # one for every group, not one for each contraction


@pytest.mark.parametrize("joint", ["mul(silu(a), b)", "mul(gelu_tanh(a), b)"])
@pytest.mark.parametrize(
    ("b", "s", "k", "n"),
    [
        (1, 256, 64, 512),  # exactly one pass; K whole
        (1, 250, 2080, 192),  # K in three chunks; only a small ring; tokens missing in the last slice
        (1, 512, 1088, 1792),  # K in two chunks; three passes and a ring of 32
        (2, 160, 96, 832),  # rings of 32 and 8 behind a pass, tokens of two sequences
        (1, 330, 5120, 576),  # K in five chunks, one partial sum after the other
    ],
)
def test_gated_mlp_in_blocks(b: int, s: int, k: int, n: int, joint: str) -> None:
    """Gate and up share their passes, their sums are joined, and the contraction behind reads blocks of channels."""
    x, w, y = tensor_text((b, s, k), "bf16"), tensor_text((n, k), "bf16"), tensor_text((b, s, n), "bf16")
    d, z = tensor_text((96, n), "bf16"), tensor_text((b, s, 96), "bf16")
    text = f"""func.func @main(%x: {x}, %g: {w}, %u: {w}, %d: {d}) -> {z}
    attributes {{arg_names = ["x", "g", "u", "d"], result_names = ["z"]}} {{
  %a = tc.contract "b s i, o i -> b s o" (%x, %g) : {y}
  %b = tc.contract "b s i, o i -> b s o" (%x, %u) : {y}
  %y = tc.map "{joint}" over "b s o, b s o -> b s o" (%a, %b) : {y}
  %z = tc.contract "b s i, o i -> b s o" (%y, %d) : {z}
  func.return %z : {z}
}}"""
    rng = np.random.default_rng(n)
    values = {"x": bf16(rng.standard_normal((b, s, k)))}
    values |= {name: bf16(rng.standard_normal((n, k)) / np.sqrt(k)) for name in "gu"}
    values["d"] = bf16(rng.standard_normal((96, n)) / np.sqrt(n))
    made = Run(text)
    gate, up = (values["x"] @ values[name].T for name in "gu")
    assert relative(made(values)["z"], bf16(ex.evaluate(ex.parse(joint), [gate, up])) @ values["d"].T) < 4e-3
    instructions = made.emitted.streams[0].routines[0].instructions
    blocks = [
        i for i in instructions if isinstance(i.what, Exec) and i.what.fetch.loops[-1][0] == 8 and i.what.contract
    ]
    assert blocks  # the contraction behind reads them


def projections(b: int, s: int, q: int, kv: int) -> Run:
    """Three contractions of the same tokens, with results that are right."""
    k = 96
    x, results = tensor_text((b, s, k), "bf16"), [tensor_text((b, s, n), "bf16") for n in (q, kv, kv)]
    arguments = ", ".join(f"%w{i}: {tensor_text((n, k), 'bf16')}" for i, n in enumerate((q, kv, kv)))
    lines = "\n".join(f'  %y{i} = tc.contract "b s i, o i -> b s o" (%x, %w{i}) : {y}' for i, y in enumerate(results))
    sums = f'  %t = tc.map "add(a, b)" over "b s o, b s o -> b s o" (%y1, %y2) : {results[1]}'
    text = f"""func.func @main(%x: {x}, {arguments}) -> ({results[0]}, {results[1]})
    attributes {{arg_names = ["x", "w0", "w1", "w2"], result_names = ["a", "b"]}} {{
{lines}
{sums}
  %u = tc.map "mul(a, a)" over "b s o -> b s o" (%y0) : {results[0]}
  func.return %u, %t : {results[0]}, {results[1]}
}}"""
    rng = np.random.default_rng(s)
    values = {"x": bf16(rng.standard_normal((b, s, k)))}
    values |= {f"w{i}": bf16(rng.standard_normal((n, k)) * 0.1) for i, n in enumerate((q, kv, kv))}
    made = Run(text)
    got = made(values)
    y0, y1, y2 = (bf16(values["x"] @ values[f"w{i}"].T) for i in range(3))
    assert relative(got["a"], y0 * y0) < 1e-2
    assert relative(got["b"], y1 + y2) < 5e-3
    return made


@pytest.mark.parametrize(("b", "s"), [(1, 128), (2, 40), (1, 100)])
@pytest.mark.parametrize("heads", [(8, 2), (36, 12), (3, 3)])
def test_stacked_contractions(b: int, s: int, heads: tuple[int, int]) -> None:
    """Projections of the same tokens share passes where that is worth it; each result is its own."""
    projections(b, s, heads[0] * 16, heads[1] * 16)


@pytest.mark.parametrize(("b", "s"), [(16, 1), (1, 64), (1, 33)])
def test_stacked_contractions_of_few_tokens(b: int, s: int) -> None:
    """Matrices that leave slices free come through both data-memory networks, and go home in one transfer of as many
    tokens as there are, four slices' channels at a time."""
    heights, k = (512, 128, 128), 2048
    x, results = tensor_text((b, s, k), "bf16"), [tensor_text((b, s, n), "bf16") for n in heights]
    names = ["x", *(f"{kind}{i}" for kind in "wr" for i in range(3))]
    types = [x, *(tensor_text((n, k), "bf16") for n in heights), *results]
    lines = [f'%y{i} = tc.contract "b s i, o i -> b s o" (%x, %w{i}) : {y}' for i, y in enumerate(results)]
    rule = "b s o, b s o -> b s o"
    lines += [f'%z{i} = tc.map "add(a, b)" over "{rule}" (%y{i}, %r{i}) : {y}' for i, y in enumerate(results)]
    arguments, joined = ", ".join(f"%{n}: {t}" for n, t in zip(names, types, strict=True)), ", ".join(results)
    text = f"""func.func @main({arguments}) -> ({joined})
    attributes {{arg_names = {json.dumps(names)}, result_names = ["z0", "z1", "z2"]}} {{
  {chr(10).join(lines)}
  func.return %z0, %z1, %z2 : {joined}
}}"""
    rng = np.random.default_rng(s)
    values = {"x": bf16(rng.standard_normal((b, s, k)))}
    values |= {f"w{i}": bf16(rng.standard_normal((n, k)) / np.sqrt(k)) for i, n in enumerate(heights)}
    values |= {f"r{i}": bf16(rng.standard_normal((b, s, n))) for i, n in enumerate(heights)}
    made = Run(text)
    got = made(values)
    for i in range(3):
        assert relative(got[f"z{i}"], bf16(values["x"] @ values[f"w{i}"].T) + values[f"r{i}"]) < 1e-2
    instructions = made.emitted.streams[0].routines[0].instructions
    transfers = [i.what for i in instructions if isinstance(i.what, Dma)]
    half = MACHINE.slices_per_dmn * MACHINE.dm_slice_stride
    sizes = {d.packet * math.prod(loop[0] for loop in d.loops): d for d in transfers if d.source.space == Space.HBM}
    for rows in (512, 128):
        assert any(n == 2 and step == half for n, _, step in sizes[rows * k * 2].loops)
    (home,) = [d for d in transfers if (d.source.space, d.destination.space) == (Space.DM, Space.DM)]
    assert home.packet * math.prod(loop[0] for loop in home.loops) == b * s * (512 + 2 * 128) * 2
    assert home.packet == 4 * 16 * 2


@pytest.mark.parametrize(("b", "s"), [(1, 1), (3, 1), (1, 4)])
def test_narrow_matrices_take_turns(b: int, s: int) -> None:
    """Two matrices that fill half of the slices each come through both data-memory networks, and share one pass."""
    made = projections(b, s, 256, 128)
    routine = made.emitted.streams[0].routines[0].instructions
    passes = [i.what for i in routine if isinstance(i.what, Exec) and i.what.contract is not None]
    assert [p.slices for p in passes] == [64, 64]
    half = MACHINE.slices_per_dmn * MACHINE.dm_slice_stride
    narrow = [
        i.what for i in routine
        if isinstance(i.what, Dma) and i.what.source.space == Space.HBM
        and i.what.packet * math.prod(loop[0] for loop in i.what.loops) == 128 * 96 * 2
    ]  # fmt: skip
    assert len(narrow) == 2
    assert all(any(n == 2 and step == half for n, _, step in what.loops) for what in narrow)


def test_a_short_last_tile() -> None:
    """Nothing is loaded behind the last weights, so that a long pass over them would be seen."""
    made, error = run(1, 1, 4096, 3072)
    assert error < 3e-3
    routine = made.emitted.streams[0].routines[0].instructions
    loads = [i.what for i in routine if isinstance(i.what, Dma) and i.what.source.space == Space.HBM]
    sizes = [d.packet * math.prod(loop[0] for loop in d.loops) for d in loads]
    assert sum(n for n in sizes if n > 1 << 20) == 4096 * 3072 * 2
    assert sizes[-1] == 64 * 4 * 4096 * 2


@pytest.mark.parametrize("spill", [None, 64])
@pytest.mark.parametrize(("s", "k", "n", "rows"), [(1024, 4096, 64, 8), (750, 4128, 192, 6)])
def test_tokens_in_blocks(s: int, k: int, n: int, rows: int, spill: int | None) -> None:
    """Tokens in HBM come in blocks of whole rows; the result goes to DM or, if it is large, to HBM too."""
    rng = np.random.default_rng(k)
    x, w = bf16(rng.standard_normal((1, s, k))), bf16(rng.standard_normal((n, k)) * 0.1)
    made = Run(contraction(1, s, k, n), **({} if spill is None else {"spill_bytes": spill}))
    loads = [
        i.what for i in made.emitted.streams[0].routines[0].instructions
        if isinstance(i.what, Dma) and (i.what.source.space, i.what.destination.space) == (Space.HBM, Space.DM)
    ]  # fmt: skip
    moved = [d.packet * math.prod(count for count, _, _ in d.loops) for d in loads]
    assert moved.count(64 * rows * k * 2) == 2
    assert relative(made({"x": x, "w": w})["y"], x @ w.T) < 3e-3
