"""Hypothesis strategies for small legal instructions, and the harness that runs them on both executors."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import strategies as st
from literal_executor import LiteralUnit

from backend_rngd.isa.descriptors import (
    BROADCAST,
    DM_SLICE_STRIDE,
    REDUCE,
    After,
    Alu,
    Commit,
    Context,
    Contract,
    Dma,
    Dtype,
    Endpoint,
    Exec,
    Fetch,
    Index,
    Instruction,
    LaneMode,
    LoadTrf,
    LoadVrf,
    Mode,
    Op,
    Operand,
    Routine,
    Source,
    Space,
    Stream,
    Switch,
    SwitchKind,
    VectorOp,
)
from backend_rngd.machine import load_machine
from runtime_sim.functional import Card, Unit

MACHINE = load_machine()
SOURCE_BYTES = 1 << 15  # sources lie in the first 32 KB of DM
TARGET = 1 << 16
TARGET_BYTES = 1 << 16
HBM_BYTES = 1 << 15
INTEGERS = {Dtype.I8, Dtype.I16, Dtype.I32}


def stream_of(*ops, context: Context = Context.MAIN, slices: int = 4) -> Stream:
    """A stream with one routine of independent instructions."""
    instructions = tuple(Instruction(context, After(), op, 0) for op in ops)
    return Stream(0, slices, (Routine("main", instructions),), ("test.layer|op",))


def values(rng: np.random.Generator, dtype: Dtype, nbytes: int, small: bool) -> np.ndarray:
    """`nbytes` bytes of elements: small whole numbers (sums are exact in any order) or wide random ones."""
    n = nbytes // dtype.bytes
    whole = rng.integers(-6, 7, n)
    if dtype in INTEGERS:
        kind = {1: np.int8, 2: np.int16, 4: np.int32}[dtype.bytes]
        info = np.iinfo(kind)
        data = whole.astype(kind) if small else rng.integers(info.min, info.max, n, kind, endpoint=True)
    elif dtype is Dtype.F32 or dtype is Dtype.BF16:
        wide = (rng.standard_normal(n) * np.exp2(rng.integers(-6, 7, n))).astype(np.float32)
        data = whole.astype(np.float32) if small else wide
        if dtype is Dtype.BF16:
            data = (data.view(np.uint32) >> 16).astype(np.uint16)
    else:
        table = {0: 0x00, 1: 0x38, 2: 0x40} if dtype is Dtype.F8E4M3 else {0: 0x00, 1: 0x3C, 2: 0x40}
        codes = np.array([table[abs(int(v)) % 3] | (0x80 if v < 0 else 0) for v in whole], np.uint8)
        data = codes if small else (rng.integers(0, 256, n).astype(np.uint8) & 0xBF)
    return np.ascontiguousarray(data).view(np.uint8)


def both(slices: int, seed: int, fill: Dtype, small: bool = True) -> tuple[Unit, LiteralUnit]:
    """The two executors with the same random memories."""
    rng = np.random.default_rng(seed)
    card = Card(MACHINE, HBM_BYTES)
    card.write(0, values(rng, Dtype.I8, HBM_BYTES, False))
    unit = Unit(card, slices)
    literal = LiteralUnit(slices, bytes(card.read(0, HBM_BYTES)))
    for s in range(slices):
        unit.dm.grid[s, :SOURCE_BYTES] = values(rng, fill, SOURCE_BYTES, small)
        unit.trf.grid[s] = values(rng, fill if fill.bytes < 4 else Dtype.BF16, 65536, small)
        unit.vrf.grid[s] = values(rng, Dtype.I32 if fill in INTEGERS else Dtype.F32, 8192, small)
        literal.dm[s][:SOURCE_BYTES] = unit.dm.grid[s, :SOURCE_BYTES].tobytes()
        literal.trf[s][:] = unit.trf.grid[s].tobytes()
        literal.vrf[s][:] = unit.vrf.grid[s].tobytes()
    unit.dm.written[:, : SOURCE_BYTES // 8] = True
    unit.trf.written[...] = True
    unit.vrf.written[...] = True
    return unit, literal


def agree(unit: Unit, literal: LiteralUnit, tolerance: float = 0.0, dtype: Dtype = Dtype.F32) -> None:
    """Assert equal memories; with a tolerance, compare the target area as f32."""
    span = TARGET + TARGET_BYTES
    for s in range(unit.slices):
        fast = unit.dm.grid[s, :span]
        slow = np.frombuffer(bytes(literal.dm[s][:span]), np.uint8)
        if tolerance and dtype is Dtype.F32:
            np.testing.assert_allclose(
                np.ascontiguousarray(fast[TARGET:]).view(np.float32), slow[TARGET:].view(np.float32), rtol=tolerance
            )
        else:
            np.testing.assert_array_equal(fast, slow)
        np.testing.assert_array_equal(unit.trf.grid[s], np.frombuffer(bytes(literal.trf[s]), np.uint8))
        np.testing.assert_array_equal(unit.vrf.grid[s], np.frombuffer(bytes(literal.vrf[s]), np.uint8))
    np.testing.assert_array_equal(unit.window.read(0, HBM_BYTES), np.frombuffer(bytes(literal.hbm), np.uint8))


@st.composite
def layout(draw, sizes: list[int], width: int, limit: int, align: int = 8, repeat: bool = False) -> list[int]:
    """Byte strides that store `sizes` (the last is contiguous) in a random order with random gaps.

    With `repeat` some strides are 0. The layout takes at most `limit` bytes (padding is dropped if needed).
    """
    order = draw(st.permutations(range(len(sizes) - 1)))
    padded = draw(st.booleans())
    strides = [0] * len(sizes)
    strides[-1] = width
    reach = -(-sizes[-1] * width // align) * align
    for axis in order:
        if repeat and draw(st.integers(0, 4)) == 0:
            continue
        if padded and reach * sizes[axis] * 2 < limit and draw(st.booleans()):
            reach += align
        strides[axis] = reach
        reach *= sizes[axis]
    return strides


@st.composite
def factors(draw, total: int) -> list[int]:
    """A random ordered factorisation."""
    out = []
    while total > 1 and len(out) < 3:
        divisors = [d for d in range(2, total + 1) if total % d == 0]
        out.append(draw(st.sampled_from(divisors)))
        total //= out[-1]
    return [*out, total] if total > 1 else out


@st.composite
def fetches(draw, dtypes=tuple(Dtype), casts: bool = True, packet_bytes=(8, 16, 24, 32, 40, 64), steps: int = 12):
    """A fetch of at most `steps` packets from the source area."""
    dtype = draw(st.sampled_from(dtypes))
    choices = [b // dtype.bytes for b in packet_bytes if b % dtype.bytes == 0]
    packet = draw(st.sampled_from(choices))
    time = draw(st.integers(1, steps))
    digits = draw(factors(time))
    contiguous = draw(st.booleans())
    sizes = [*digits, packet]
    strides = draw(layout(sizes, dtype.bytes, SOURCE_BYTES // 2, 8 if contiguous else dtype.bytes, repeat=True))
    cast = None
    if casts and dtype.bytes < 4 and draw(st.booleans()):
        cast = Dtype.I32 if dtype in INTEGERS else Dtype.F32
    base = draw(st.integers(0, 64)) * 8
    return Fetch(base, tuple(zip(sizes, strides, strict=True)), dtype, packet, cast)


@st.composite
def commits(draw, dtype: Dtype, packet: int, packets: int, cast: Dtype | None = None):
    """A commit of a stream of `packets` packets of `packet` elements of `dtype`."""
    target = cast or dtype
    flit = 32 // dtype.bytes
    flits = -(-packet // flit)
    legal = [v for v in range(1, flit + 1) if v * target.bytes in (8, 16, 24, 32)]
    valid = draw(st.sampled_from(legal))
    sizes = [*draw(factors(packets * flits)), valid]
    strides = draw(layout(sizes, target.bytes, TARGET_BYTES))
    return Commit(TARGET, tuple(zip(sizes, strides, strict=True)), target, valid)


@st.composite
def switches(draw, slices: int, packets: int) -> tuple[Switch | None, int]:
    """A switch configuration and the number of packets behind it."""
    kind = draw(st.sampled_from([None, SwitchKind.BROADCAST01, SwitchKind.BROADCAST1, SwitchKind.TRANSPOSE]))
    if kind is None:
        return None, packets
    slice1 = draw(st.sampled_from([d for d in (1, 2, 4, 8) if slices % d == 0]))
    slice0 = draw(st.sampled_from([d for d in (1, 2, 4, 8) if (slices // slice1) % d == 0]))
    if kind is SwitchKind.TRANSPOSE:
        return Switch(kind, slice1, slice0), packets
    if kind is SwitchKind.BROADCAST1:
        return Switch(kind, slice1, slice0), packets * slice1
    time0 = draw(st.sampled_from([d for d in range(1, packets + 1) if packets % d == 0]))
    return Switch(kind, slice1, slice0, time0), packets * slice1 * slice0


EXACT_FLOAT = {
    Alu.FP_FMA: [Op.ADD, Op.SUB, Op.MUL, Op.FMA],
    Alu.FP_FPU: [Op.SQRT, Op.DIV],
    Alu.FP_MUL0: [Op.MUL],
    Alu.FP_MUL1: [Op.MUL],
    Alu.FP_DIV: [Op.DIV],
    Alu.CLIP_ADD: [Op.ADD],
    Alu.CLIP_MAX: [Op.MAX],
    Alu.CLIP_MIN: [Op.MIN],
}
FUNCTIONS = {
    Alu.FP_FPU: [Op.TANH, Op.SIGMOID, Op.ERF, Op.LOG, Op.SIN, Op.COS],
    Alu.FP_EXP: [Op.EXP, Op.NEG_EXP],
    Alu.FP_MUL0: [Op.MUL],
}
INTEGER = {
    Alu.LOGIC_AND: [Op.AND],
    Alu.LOGIC_OR: [Op.OR],
    Alu.LOGIC_XOR: [Op.XOR],
    Alu.LOGIC_LSHIFT: [Op.SHL],
    Alu.LOGIC_RSHIFT: [Op.LSHR, Op.ASHR],
    Alu.FXP_ADD: [Op.ADD, Op.SUB],
    Alu.FXP_LSHIFT: [Op.SHL],
    Alu.FXP_MUL: [Op.MUL],
    Alu.FXP_RSHIFT: [Op.LSHR, Op.ASHR],
    Alu.CLIP_ADD: [Op.ADD],
    Alu.CLIP_MAX: [Op.MAX],
    Alu.CLIP_MIN: [Op.MIN],
}
UNARY = {Op.EXP, Op.NEG_EXP, Op.SQRT, Op.TANH, Op.SIGMOID, Op.ERF, Op.LOG, Op.SIN, Op.COS}
SHIFTS = {Op.SHL, Op.LSHR, Op.ASHR}


@st.composite
def operands(draw, op: Op, elements: int, packet: int, integer: bool, stash: bool, pair: bool) -> Operand:
    """Where the second argument comes from."""
    if op in SHIFTS:
        return Operand(Source.CONST, float(draw(st.integers(0, 31))))
    kinds = [Source.CONST, Source.VRF, *([Source.STASH] if stash else [])]
    kind = draw(st.sampled_from(kinds))
    if kind is Source.CONST:
        value = float(draw(st.integers(-9, 9))) if integer else draw(st.floats(-4, 4, width=32))
        return Operand(kind, value)
    if kind is Source.STASH:
        return Operand(kind)
    digits = [*draw(factors(elements // packet)), *([2] if pair else []), packet]
    strides = draw(layout(digits, 4, 4096, 4, repeat=True))
    if draw(st.booleans()):
        strides[-1] = 0
    return Operand(kind, 0.0, draw(st.integers(0, 16)) * 4, tuple(zip(digits, strides, strict=True)))


@st.composite
def chains(draw, table: dict[Alu, list[Op]], elements: int, packet: int, pair: bool, integer: bool):
    """A legal vector chain; returns (ops, stash_input, elements, packet, still a pair)."""
    ops: list[VectorOp] = []
    stash_input = draw(st.booleans()) and not pair
    stash = stash_input
    zip_at = draw(st.sampled_from([a for a in table if table[a] != [] and a is not Alu.LOGIC_RSHIFT])) if pair else None
    for alu in sorted(table):
        if alu is not zip_at and draw(st.integers(0, 2)):
            continue
        op = draw(st.sampled_from(table[alu]))
        if alu is zip_at and op not in UNARY and op is not Op.FMA and op not in SHIFTS:
            ops.append(VectorOp(alu, op, draw(st.sampled_from([Mode.ZIP01, Mode.ZIP10]))))
            pair = False
            continue
        group = draw(st.integers(0, 2)) if pair else 0
        if op in UNARY:
            ops.append(VectorOp(alu, op, Mode.UNARY, group=group))
            continue
        modes = (
            [Mode.STREAM_OPERAND] if op in SHIFTS else [Mode.STREAM_OPERAND, Mode.OPERAND_STREAM, Mode.STREAM_STREAM]
        )
        mode = draw(st.sampled_from(modes))
        operand = Operand()
        if mode is not Mode.STREAM_STREAM:
            operand = draw(operands(op, elements, packet, integer, stash and not pair, pair and group == 0))
            if operand.source is Source.STASH:
                stash = False
        keep = not pair and draw(st.integers(0, 3)) == 0
        stash = stash or keep
        addend = draw(st.floats(-4, 4, width=32)) if op is Op.FMA else 0.0
        ops.append(VectorOp(alu, op, mode, operand, addend, group, stash=keep))
    return tuple(ops), stash_input, pair


@st.composite
def contractions(draw, slices: int):
    """(Exec, fill dtype): a contraction with random digits, lanes, columns and TRF addressing."""
    dtype = draw(st.sampled_from([Dtype.BF16, Dtype.BF16, Dtype.I8, Dtype.F8E4M3]))
    pack = draw(st.sampled_from([1, 2]))
    lanes = draw(st.sampled_from([1, 2, 4, 8]))
    packet = pack * 32 // dtype.bytes
    depth = draw(st.integers(1, packet.bit_length() - 1))
    read = 1 << draw(st.integers(2, packet.bit_length() - 1))
    digits: list[tuple[int, int]] = []
    for _ in range(draw(st.integers(1, 3))):
        digits.append((draw(st.integers(1, 3)), draw(st.sampled_from([0, REDUCE]))))
    broadcast = [(draw(st.integers(1, 3)), BROADCAST)] if draw(st.booleans()) else []
    limit = 65536 // lanes - read * dtype.bytes
    loops = []
    for n, flags in [*digits, *broadcast]:
        unit = 32 if read * dtype.bytes >= 32 else 8
        stride = draw(st.sampled_from([0, unit, 2 * unit, 5 * unit]))
        loops.append((n, stride, flags))
    base = draw(st.integers(0, 4)) * 64
    assert base + sum((n - 1) * s for n, s, _ in loops) < limit
    packets = math.prod(n for n, _ in digits)
    short = pack == 1 and draw(st.integers(0, 3)) == 0
    fetch_packet = draw(st.sampled_from([packet, packet // pack])) if not short else packet // 2
    kind, ring = None, 1
    if draw(st.booleans()) and packets % 2 == 0 and packets * packet % (2 * fetch_packet) == 0:
        kind, ring = (
            Switch(SwitchKind.BROADCAST01, 2, 1)
            if draw(st.booleans())
            else Switch(SwitchKind.BROADCAST1, 2, draw(st.sampled_from([1, slices // 2]))),
            2,
        )
    total = packets * pack // ring if short else packets * packet // fetch_packet // ring
    if total == 0 or (short and packets * pack % ring):
        kind, ring, total = None, 1, packets * pack if short else packets * packet // fetch_packet
    sizes = [*draw(factors(total)), fetch_packet]
    strides = draw(layout(sizes, dtype.bytes, SOURCE_BYTES // 2, 32))
    fetch = Fetch(draw(st.integers(0, 8)) * 32, tuple(zip(sizes, strides, strict=True)), dtype, fetch_packet)
    mode = draw(st.sampled_from(list(LaneMode)))
    contract = Contract(lanes, pack, base, tuple(loops), read, depth, mode)
    columns = packet >> depth
    kept = math.prod(n for n, _, flags in loops if not flags & REDUCE)
    if mode is LaneMode.INTERLEAVED:
        width, count = lanes, kept * columns
    else:
        width = min(8, columns)
        count = kept * lanes * columns // width
    result = Dtype.I32 if dtype is Dtype.I8 else Dtype.F32
    cast = draw(st.sampled_from([None, Dtype.BF16])) if result is Dtype.F32 else None
    commit = draw(commits(result, width, count, cast))
    return Exec(slices, fetch, commit, kind, contract), dtype


@st.composite
def dmas(draw, slices: int) -> Dma:
    """A plain or indexed transfer between HBM and DM."""
    packet = draw(st.sampled_from([2, 4, 6, 8, 16, 24, 40]))
    sizes = [draw(st.integers(1, 4)) for _ in range(draw(st.integers(1, 3)))]
    spaces = draw(st.sampled_from([(Space.HBM, Space.DM), (Space.DM, Space.HBM), (Space.DM, Space.DM)]))
    sides = []
    for which, space in enumerate(spaces):
        order = draw(st.permutations(range(len(sizes))))
        across = draw(st.integers(0, len(sizes) - 1)) if space is Space.DM and draw(st.booleans()) else None
        strides = [0] * len(sizes)
        reach = packet + draw(st.sampled_from([0, 0, 2, 8]))
        for axis in order:
            if axis == across and sizes[axis] <= slices:
                strides[axis] = DM_SLICE_STRIDE + draw(st.sampled_from([0, 8, -8]))
                continue
            if which == 0 and draw(st.integers(0, 4)) == 0:
                continue
            strides[axis] = reach
            reach *= sizes[axis]
        high = slices - sizes[across] if across is not None and strides[across] >= DM_SLICE_STRIDE // 2 else slices - 1
        start = 64 + (TARGET if which and space is Space.DM else 0) + (8192 * which if space is Space.HBM else 0)
        base = start + (draw(st.integers(0, high)) * DM_SLICE_STRIDE if space is Space.DM else 0)
        sides.append((Endpoint(space, base), strides))
    loops = tuple(zip(sizes, sides[0][1], sides[1][1], strict=True))
    return Dma(sides[0][0], sides[1][0], loops, packet)


@st.composite
def indexed(draw, slices: int) -> tuple[Dma, np.ndarray]:
    """A gather or scatter and its index table (at HBM address 24,576)."""
    packet = draw(st.sampled_from([8, 16, 32]))
    rows = draw(st.integers(1, 6))
    parts = draw(st.integers(1, 3))
    scatter = draw(st.booleans())
    table = np.array(draw(st.permutations(range(8)))[:rows], np.uint32) * (parts * packet)
    if not scatter and draw(st.booleans()):
        table[:] = table[0]
    across = draw(st.booleans()) and rows <= slices
    dm_strides = [DM_SLICE_STRIDE if across else parts * packet, packet]
    hbm_strides = [0, packet]
    dm = Endpoint(Space.DM, TARGET if not scatter else 128)
    hbm = Endpoint(Space.HBM, 1024 if not scatter else 8192)
    sizes = (rows, parts)
    if scatter:
        loops = tuple(zip(sizes, dm_strides, hbm_strides, strict=True))
        return Dma(dm, hbm, loops, packet, Index(0, 24576, (4, 0), True)), table
    loops = tuple(zip(sizes, hbm_strides, dm_strides, strict=True))
    return Dma(hbm, dm, loops, packet, Index(0, 24576, (4, 0), False)), table


@st.composite
def trf_loads(draw, slices: int) -> LoadTrf:
    """A TRF load."""
    lanes = draw(st.sampled_from([1, 2, 4, 8]))
    fetch_packet = draw(st.sampled_from([16, 32]))
    sizes = [*draw(factors(lanes * draw(st.integers(1, 4)))), fetch_packet]
    strides = draw(layout(sizes, 2, SOURCE_BYTES, repeat=True))
    fetch = Fetch(draw(st.integers(0, 9)) * 8, tuple(zip(sizes, strides, strict=True)), Dtype.BF16, fetch_packet)
    return LoadTrf(slices, fetch, lanes, draw(st.integers(0, 8)) * 32)


@st.composite
def vrf_loads(draw, slices: int) -> LoadVrf:
    """A VRF load."""
    fetch = draw(fetches((Dtype.F32, Dtype.BF16, Dtype.I32, Dtype.I8), packet_bytes=(8, 32)))
    if fetch.dtype.bytes < 4:
        fetch = Fetch(
            fetch.base, fetch.loops, fetch.dtype, fetch.packet, Dtype.F32 if fetch.dtype is Dtype.BF16 else Dtype.I32
        )
    return LoadVrf(slices, fetch, draw(st.integers(0, 16)) * 8)
