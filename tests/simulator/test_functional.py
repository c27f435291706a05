"""The array executor against the literal one, on small instructions of every kind."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import patch

import drawing as draw_
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backend_rngd.isa.descriptors import (
    After,
    Alu,
    Call,
    Context,
    Dma,
    Dtype,
    Endpoint,
    Exec,
    Fetch,
    Instruction,
    Lookup,
    Memset,
    Op,
    Routine,
    Space,
    Stream,
    VectorOp,
)

EXAMPLES = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
SEED = st.integers(0, 2**16)


def run_both(op, slices: int, seed: int, fill: Dtype, small: bool = True, tolerance: float = 0.0) -> None:
    unit, literal = draw_.both(slices, seed, fill, small)
    stream = draw_.stream_of(op, slices=slices)
    unit.run(stream)
    literal.run(stream)
    dtype = op.commit.dtype if isinstance(op, Exec) else Dtype.F32
    draw_.agree(unit, literal, tolerance, dtype)


@EXAMPLES
@given(st.data(), SEED)
def test_copies_and_casts(data, seed):
    slices = data.draw(st.sampled_from([1, 4, 8]))
    fetch = data.draw(draw_.fetches())
    packets = int(np.prod([n for n, _ in fetch.loops])) // fetch.packet
    switch, after = data.draw(draw_.switches(slices, packets))
    dtype = fetch.cast or fetch.dtype
    casts = {Dtype.F32: [None, Dtype.BF16, Dtype.F8E4M3, Dtype.F8E5M2], Dtype.I32: [None, Dtype.I16, Dtype.I8]}
    commit = data.draw(draw_.commits(dtype, fetch.packet, after, data.draw(st.sampled_from(casts.get(dtype, [None])))))
    run_both(Exec(slices, fetch, commit, switch), slices, seed, fetch.dtype, small=False)


@EXAMPLES
@given(st.data(), SEED, st.booleans())
def test_table_lookups(data, seed, widen):
    keys = data.draw(draw_.fetches((Dtype.I8,), casts=False, packet_bytes=(8, 16)))
    fetch = replace(keys, cast=Dtype.F32 if widen else None, lookup=data.draw(st.sampled_from(list(Lookup))))
    dtype, packets = fetch.cast or fetch.raw, int(np.prod([n for n, _ in fetch.loops])) // fetch.packet
    cast = data.draw(st.sampled_from([None, Dtype.BF16])) if widen else None
    commit = data.draw(draw_.commits(dtype, fetch.packet * 2, packets, cast))
    run_both(Exec(2, fetch, commit), 2, seed, Dtype.I8, small=False)


@EXAMPLES
@given(st.data(), SEED)
def test_interleaved_tensors(data, seed):
    fetch = data.draw(draw_.fetches((Dtype.F32, Dtype.BF16)))
    other = data.draw(draw_.layout([n for n, _ in fetch.loops], fetch.dtype.bytes, 8192))
    fetch = Fetch(fetch.base, fetch.loops, fetch.dtype, fetch.packet, fetch.cast, (16384, tuple(other)))
    packets = int(np.prod([n for n, _ in fetch.loops])) // fetch.packet
    commit = data.draw(draw_.commits(fetch.cast or fetch.dtype, fetch.packet, packets * 2))
    run_both(Exec(2, fetch, commit), 2, seed, fetch.dtype)


def chain_case(data, table, dtype: Dtype, pair: bool) -> Exec:
    fetch = data.draw(draw_.fetches((dtype,), casts=False, packet_bytes=(8, 16, 32, 40, 64)))
    packets = int(np.prod([n for n, _ in fetch.loops])) // fetch.packet
    switch = None
    if pair:
        other = data.draw(draw_.layout([n for n, _ in fetch.loops], fetch.dtype.bytes, 8192))
        fetch = Fetch(fetch.base, fetch.loops, fetch.dtype, fetch.packet, fetch.cast, (16384, tuple(other)))
    else:
        switch, packets = data.draw(draw_.switches(4, packets))
    ops, stash, still = data.draw(draw_.chains(table, packets * fetch.packet, fetch.packet, pair, dtype is Dtype.I32))
    commit = data.draw(draw_.commits(Dtype.F32, fetch.packet, packets * (2 if still else 1)))
    return Exec(4, fetch, commit, switch, None, ops, stash)


@EXAMPLES
@given(st.data(), SEED, st.booleans())
def test_float_chains(data, seed, pair):
    op = chain_case(data, draw_.EXACT_FLOAT, Dtype.F32, pair)
    run_both(op, 4, seed, Dtype.F32, small=False, tolerance=1e-6)


@EXAMPLES
@given(st.data(), SEED)
def test_functions(data, seed):
    op = chain_case(data, draw_.FUNCTIONS, Dtype.F32, False)
    run_both(op, 4, seed, Dtype.F32, small=True, tolerance=4e-6)


@EXAMPLES
@given(st.data(), SEED, st.booleans())
def test_integer_chains(data, seed, pair):
    op = chain_case(data, draw_.INTEGER, Dtype.I32, pair)
    run_both(op, 4, seed, Dtype.I32, small=False)


@EXAMPLES
@given(st.data(), SEED, st.sampled_from([Op.ADD, Op.MAX, Op.MIN]), st.sampled_from([Dtype.F32, Dtype.I32]))
def test_reduce(data, seed, kind, dtype):
    inner = data.draw(st.sampled_from([1, 2, 4, 8]))
    count, outer = data.draw(st.integers(1, 6)), data.draw(st.sampled_from([2, 4, 6]))
    packet = 2
    total = outer * count * inner
    fetch = Fetch(64, ((total // packet, 16), (packet, 4)), dtype, packet)
    commit = data.draw(draw_.commits(dtype, inner, outer))
    run_both(
        Exec(2, fetch, commit, None, None, (VectorOp(Alu.REDUCE, kind, count=count, inner=inner),)), 2, seed, dtype
    )


@EXAMPLES
@given(SEED, st.booleans())
def test_conversions(seed, to_float):
    alu, dtype = (Alu.FXP_TO_FP, Dtype.I32) if to_float else (Alu.FP_TO_FXP, Dtype.F32)
    fetch = Fetch(0, ((64, 32), (8, 4)), dtype, 8)
    commit = draw_.Commit(draw_.TARGET, ((512, 4),), Dtype.F32, 8)
    run_both(Exec(2, fetch, commit, None, None, (VectorOp(alu, Op.CONVERT),)), 2, seed, dtype, small=False)


@settings(EXAMPLES, max_examples=150)
@given(st.data(), SEED)
def test_contractions(data, seed):
    op, fill = data.draw(draw_.contractions(4))
    run_both(op, 4, seed, fill)


@pytest.mark.parametrize("same", ["trf", "stream", "both"])
@settings(EXAMPLES, max_examples=40)
@given(st.data(), SEED)
def test_contractions_with_equal_slices(same, data, seed):
    """Slices that hold the same TRF or the same stream are merged into one product."""
    op, fill = data.draw(draw_.contractions(4))
    unit, literal = draw_.both(4, seed, fill)
    if same in ("trf", "both"):
        unit.trf.grid[1:] = unit.trf.grid[0]
        literal.trf = [bytearray(unit.trf.grid[0].tobytes()) for _ in range(4)]
    if same in ("stream", "both"):
        unit.dm.grid[1:] = unit.dm.grid[0]
        literal.dm = [bytearray(unit.dm.grid[0].tobytes()) for _ in range(4)]
    stream = draw_.stream_of(op)
    unit.run(stream)
    literal.run(stream)
    draw_.agree(unit, literal)


@contextmanager
def tiny_blocks():
    """Every instruction is cut in blocks, and blocks go to threads."""
    with (
        patch.multiple("runtime_sim.plans", BLOCK=8, PARALLEL_ELEMENTS=1),
        patch.multiple("runtime_sim.contraction", BLOCK_ELEMENTS=64, PARALLEL_ELEMENTS=1),
        patch("runtime_sim.numeric.BLOCK", 16),
        patch("runtime_sim.workers.cpus", lambda: 2),
    ):
        yield


@EXAMPLES
@given(st.data(), SEED)
def test_blocks_and_threads(data, seed):
    """The same results when instructions are executed in blocks on several threads."""
    with tiny_blocks():
        op, fill = data.draw(draw_.contractions(4))
        run_both(op, 4, seed, fill)
        run_both(chain_case(data, draw_.EXACT_FLOAT, Dtype.F32, False), 4, seed, Dtype.F32, tolerance=1e-6)
        run_both(chain_case(data, draw_.INTEGER, Dtype.I32, True), 4, seed, Dtype.I32, small=False)


def test_merging_follows_trf_contents():
    """A cached plan notices that TRF has become different between slices."""
    fetch = Fetch(0, ((8, 64), (32, 2)), Dtype.BF16, 32)
    contract = draw_.Contract(8, 2, 0, ((8, 0, 0),), 32, 5, draw_.LaneMode.INTERLEAVED)
    op = Exec(4, fetch, draw_.Commit(draw_.TARGET, ((64, 4),), Dtype.F32, 8), None, contract)
    load = draw_.LoadTrf(4, Fetch(2048, ((8, 64), (32, 2)), Dtype.BF16, 32), 8, 0)
    unit, literal = draw_.both(4, 3, Dtype.BF16)
    unit.trf.grid[...] = unit.trf.grid[0]
    literal.trf = [bytearray(unit.trf.grid[0].tobytes()) for _ in range(4)]
    one, two = draw_.stream_of(op), draw_.stream_of(load, op)
    for stream in (one, two, two):
        unit.run(stream)
        literal.run(stream)
        draw_.agree(unit, literal)


@EXAMPLES
@given(st.data(), SEED)
def test_register_file_loads(data, seed):
    op = data.draw(st.one_of(draw_.trf_loads(4), draw_.vrf_loads(4)))
    run_both(op, 4, seed, op.fetch.dtype)


@settings(EXAMPLES, max_examples=150)
@given(st.data(), SEED)
def test_transfers(data, seed):
    run_both(data.draw(draw_.dmas(4)), 4, seed, Dtype.I8)


@EXAMPLES
@given(st.data(), SEED)
def test_gather_and_scatter(data, seed):
    op, table = data.draw(draw_.indexed(4))
    unit, literal = draw_.both(4, seed, Dtype.I8)
    unit.window.write(24576, table)
    literal.hbm[24576 : 24576 + table.nbytes] = table.tobytes()
    stream = draw_.stream_of(op)
    unit.run(stream)
    literal.run(stream)
    draw_.agree(unit, literal)


@EXAMPLES
@given(SEED, st.integers(0, 2**32 - 1), st.integers(1, 4))
def test_memset(seed, value, slices):
    run_both(Memset(slices, draw_.TARGET + 8, 64, value), 4, seed, Dtype.I8)


def test_calls_move_registers():
    """A routine called twice reads at the caller's registers plus an immediate; the caller's registers survive."""
    move = Dma(Endpoint(Space.HBM, 8, 3), Endpoint(Space.DM, draw_.TARGET), ((1, 8, 8),), 8)
    other = Dma(Endpoint(Space.HBM, 8, 3), Endpoint(Space.DM, draw_.TARGET + 64), ((1, 8, 8),), 8)

    def at(op, context=Context.DMA):
        return Instruction(context, After(), op, 0)

    main = Routine(
        "main",
        (
            at(Call(1, ((3, 1, 64), (4, 3, 0))), Context.CONTROL),
            at(other),
            at(Call(2, ((3, 0, 512),)), Context.CONTROL),
        ),
    )
    first = Routine("first", (at(move), at(Call(2, ((3, 4, 0),)), Context.CONTROL)))
    second = Routine(
        "second", (at(Dma(Endpoint(Space.HBM, 0, 3), Endpoint(Space.DM, draw_.TARGET + 128), ((1, 8, 8),), 8)),)
    )
    stream = Stream(0, 4, (main, first, second), ("here",))
    unit, literal = draw_.both(4, 1, Dtype.I8)
    literal.registers[1], literal.registers[3] = 96, 256
    unit.run(stream, {1: 96, 3: 256})
    literal.run(stream)
    draw_.agree(unit, literal)
    assert unit.registers[3] == 256
