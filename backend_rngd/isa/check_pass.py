"""Legality of Tensor Unit passes: fetch, switch, contraction, vector chain, commit."""

from __future__ import annotations

import math

from backend_rngd.isa.descriptors import (
    BROADCAST,
    FLIT_BYTES,
    OPS_OF_ALU,
    REDUCE,
    Alu,
    Commit,
    Context,
    Contract,
    Dtype,
    Exec,
    Fetch,
    LaneMode,
    Mode,
    Op,
    Source,
    Switch,
    SwitchKind,
    VectorOp,
)
from backend_rngd.isa.footprint import intervals
from backend_rngd.isa.rules import Report, check_loops, extent, writes_twice
from backend_rngd.isa.shape import (
    ZIPS,
    Shape,
    access_bytes,
    accumulator_slots,
    after_op,
    columns,
    contracted,
    fetched,
    multiplier_elements,
    switched,
)

WIDENED = {
    Dtype.BF16: Dtype.F32,
    Dtype.F8E4M3: Dtype.F32,
    Dtype.F8E5M2: Dtype.F32,
    Dtype.I8: Dtype.I32,
    Dtype.I16: Dtype.I32,
}
NARROWED = {Dtype.F32: (Dtype.BF16, Dtype.F8E4M3, Dtype.F8E5M2), Dtype.I32: (Dtype.I16, Dtype.I8)}
MULTIPLIED = (Dtype.BF16, Dtype.F8E4M3, Dtype.F8E5M2, Dtype.I8)
COMMUTING = frozenset({Op.ADD, Op.MUL, Op.FMA, Op.MAX, Op.MIN, Op.AND, Op.OR, Op.XOR})
UNARY = frozenset({Op.EXP, Op.NEG_EXP, Op.SQRT, Op.TANH, Op.SIGMOID, Op.ERF, Op.LOG, Op.SIN, Op.COS, Op.CONVERT})
SHIFTS = frozenset({Op.SHL, Op.LSHR, Op.ASHR})
FLOAT_ALUS = frozenset({Alu.FP_FMA, Alu.FP_FPU, Alu.FP_EXP, Alu.FP_MUL0, Alu.FP_MUL1, Alu.FP_DIV, Alu.FP_TO_FXP})
FIXED_ALUS = frozenset({Alu.FXP_ADD, Alu.FXP_LSHIFT, Alu.FXP_MUL, Alu.FXP_RSHIFT, Alu.FXP_TO_FP})


def check_fetch(report: Report, fetch: Fetch, slices: int, context: Context | None) -> bool:
    """Fetch limits; False if the element counts behind it make no sense."""
    machine = report.machine
    width = fetch.dtype.bytes
    if not 1 <= slices <= machine.slices_per_cluster:
        report.add("slices", f"{slices} slices")
    loops: list[tuple[int, ...]] = list(fetch.loops)
    starts = [(fetch.base, 1)]
    if fetch.second is not None:
        base, strides = fetch.second
        if len(strides) != len(fetch.loops):
            report.add("second", f"{len(strides)} strides of the second tensor for {len(fetch.loops)} loops")
            return False
        loops = [(n, s, t) for (n, s), t in zip(fetch.loops, strides, strict=True)]
        starts.append((base, 2))
    check_loops(report, "fetch", loops)
    for base, column in starts:
        if base % width or any(entry[column] % width for entry in loops):
            report.add("element-alignment", f"fetch of {width}-byte elements at {base}")
        low, high = extent(base, loops, width, column)
        if low < 0 or high > machine.dm_slice_bytes:
            report.add("bounds", f"fetch reads DM bytes [{low}, {high})")
    if fetch.cast is not None and WIDENED.get(fetch.raw) != fetch.cast:
        report.add("fetch-cast", f"cast of {fetch.raw.name} to {fetch.cast.name}")
    if fetch.lookup is not None and (context == Context.SUB or fetch.dtype != Dtype.I8 or fetch.second is not None):
        report.add("lookup", f"{fetch.lookup.name} of {fetch.dtype.name} keys, sub context or two tensors")
    elements = math.prod(n for n, _ in fetch.loops)
    if fetch.packet < 1 or elements % fetch.packet or fetch.packet * width % machine.packet_multiple_bytes:
        report.add("packet", f"packets of {fetch.packet} x {width} B out of {elements} elements")
        return False
    if context == Context.SUB and access_bytes(fetch, machine.fetch_sub_bytes) != machine.fetch_sub_bytes:
        report.add("sub-access", f"contiguous runs allow accesses of {access_bytes(fetch, 8)} B")
    return True


def _check_switch(report: Report, switch: Switch, shape: Shape, slices: int) -> None:
    ring = switch.slice1 * switch.slice0
    if (
        min(switch.slice1, switch.slice0) < 1
        or ring & (ring - 1)
        or ring > report.machine.slices_per_cluster
        or slices % ring
        or ring < 2
    ):
        report.add("ring", f"ring of {switch.slice1} x {switch.slice0} slices out of {slices}")
        return
    kind = switch.kind
    if kind != SwitchKind.BROADCAST01 and switch.slice1 == 1:
        report.add("ring", f"{kind.name} with slice1 = 1 moves nothing")
    if kind in (SwitchKind.TRANSPOSE, SwitchKind.INTER_TRANSPOSE) and switch.slice0 == 1:
        report.add("ring", f"{kind.name} with slice0 = 1 moves nothing")
    if kind == SwitchKind.BROADCAST01:
        if switch.time0 < 1 or shape.packets % switch.time0:
            report.add("ring-time", f"time0 of {switch.time0} out of {shape.packets} packets")
        elif switch.slice1 == 1 and switch.time0 != shape.packets:
            report.add("ring-time", f"time0 of {switch.time0} means nothing without slice1: write {shape.packets}")
    elif kind == SwitchKind.INTER_TRANSPOSE:
        if switch.time0 < 1 or shape.packets % switch.time0:
            report.add("ring-time", f"time0 of {switch.time0} out of {shape.packets} packets")
    elif switch.time0 != 1:
        report.add("ring-time", f"{kind.name} has no time0")
    if kind == SwitchKind.BROADCAST1 and shape.packets > 1:
        report.add("ring-silicon", f"Broadcast1 of {shape.packets} packets")


def _check_contract(report: Report, contract: Contract, shape: Shape, fetch: Fetch) -> bool:
    machine = report.machine
    if fetch.cast is not None or fetch.second is not None or fetch.raw not in MULTIPLIED:
        report.add("contract-stream", f"contraction of a {(fetch.cast or fetch.raw).name} stream")
        return False
    ok = True
    if contract.lanes not in (1, 2, 4, 8):
        report.add("lanes", f"{contract.lanes} lanes")
        ok = False
    packet_bytes = fetch.packet * fetch.results * fetch.raw.bytes
    if contract.pack not in (1, 2) or packet_bytes != contract.pack * FLIT_BYTES:
        report.add("pack", f"{contract.pack} flits a packet, fetch packets of {packet_bytes} B")
        return False
    loops = contract.loops
    if len(loops) > machine.max_loops:
        report.add("loop-count", f"contraction has {len(loops)} digits")
    before: tuple[int, int, int] | None = None
    streamed = 1
    broadcast_seen = False
    width = shape.dtype.bytes
    for size, stride, flags in loops:
        if size == 1:
            report.add("loop-one", "contraction has a digit of size 1")
        elif not 1 < size <= machine.max_loop_size:
            report.add("loop-size", f"contraction has a digit of size {size}")
            return False
        if flags & ~(REDUCE | BROADCAST):
            report.add("digits", f"flags {flags}")
        if flags & BROADCAST:
            broadcast_seen = True
        else:
            streamed *= size
            if broadcast_seen:
                report.add("digits", "a digit that reads the stream inside a broadcast digit")
        merges = before is not None and before[2] == flags and before[1] == size * stride
        if merges and before is not None and before[0] * size <= machine.max_loop_size:
            report.add("loop-merge", f"digits of {before[0]} and {size} steps are one")
        before = (size, stride, flags)
    if streamed != shape.packets:
        report.add("digits", f"digits enumerate {streamed} packets, the stream has {shape.packets}")
    packet = multiplier_elements(contract, shape.dtype)
    read = contract.trf_read
    read_bytes = read * width
    if read < 1 or read & (read - 1) or read > packet or read_bytes > machine.contraction_packet_bytes:
        report.add("trf-read", f"TRF reads of {read} elements in a packet of {packet}")
        ok = False
    elif contract.trf_base % read_bytes or any(stride % read_bytes for _, stride, _ in loops):
        report.add("trf-read", f"TRF reads of {read_bytes} B at {contract.trf_base} are not aligned")
    if ok:
        low, high = extent(contract.trf_base, [(n, s) for n, s, _ in loops], read_bytes)
        lane = machine.trf_bytes_per_slice // contract.lanes
        if low < 0 or high > lane:
            report.add("bounds", f"contraction reads TRF bytes [{low}, {high}) of {lane} in a lane")
    if contract.depth < 0 or packet >> contract.depth < 1 or packet >> contract.depth > machine.max_columns:
        report.add("depth", f"depth {contract.depth} of a packet of {packet}")
        return False
    if ok:
        wide = columns(contract, shape.dtype)
        interleaved = contract.mode == LaneMode.INTERLEAVED
        slots = machine.interleaved_slots // wide if interleaved else machine.sequential_slots // contract.lanes
        if accumulator_slots(contract) > slots:
            report.add("accumulators", f"{accumulator_slots(contract)} partial sums in {slots} slots")
        if not interleaved and contract.lanes == 1 and wide == 1:
            report.add("lane-mode", "sequential output of one lane and one column")
    return ok


def _check_mode(report: Report, op: VectorOp) -> None:
    name = f"{op.alu.name} {op.op.name}"
    operand = op.operand
    takes = op.mode in (Mode.STREAM_OPERAND, Mode.OPERAND_STREAM)
    if (op.op in UNARY or op.alu == Alu.REDUCE) != (op.mode == Mode.UNARY):
        report.add("mode", f"{name} in mode {op.mode.name}")
    elif takes != (operand.source != Source.NONE):
        report.add("mode", f"{name} in mode {op.mode.name} with operand {operand.source.name}")
    elif op.op in COMMUTING and op.mode in (Mode.OPERAND_STREAM, Mode.ZIP10):
        report.add("mode", f"{name} commutes: write the stream (or group 0) first")
    if operand.source != Source.CONST and operand.value != 0:
        report.add("unused-field", f"{name}: a value beside operand {operand.source.name}")
    if operand.source != Source.VRF and (operand.base or operand.loops):
        report.add("unused-field", f"{name}: an address beside operand {operand.source.name}")
    if op.op != Op.FMA and op.operand2 != 0:
        report.add("unused-field", f"{name}: a second operand")
    if op.alu != Alu.REDUCE and (op.count or op.inner):
        report.add("unused-field", f"{name}: count and inner of a reduction")


def _check_operand(report: Report, op: VectorOp, shape: Shape, integer: bool) -> None:
    operand = op.operand
    if operand.source == Source.CONST and integer:
        value = operand.value
        if value != int(value) or not -(1 << 31) <= value < 1 << 32:
            report.add("constant", f"{op.alu.name}: constant {value}")
    if operand.source == Source.VRF:
        check_loops(report, "VRF operand", operand.loops)
        if operand.base % 4 or any(s % 4 for _, s in operand.loops):
            report.add("element-alignment", f"VRF operand at {operand.base}")
        low, high = extent(operand.base, operand.loops, 4)
        if low < 0 or high > report.machine.vrf_bytes:
            report.add("bounds", f"VRF operand reads bytes [{low}, {high})")
        wanted = shape.packets * shape.packet if shape.pair and op.group == 0 else shape.elements
        found = math.prod(n for n, _ in operand.loops)
        if found != wanted:
            report.add("vrf-count", f"VRF operand of {found} elements for {wanted} of the stream")


def _check_type(report: Report, op: VectorOp, shape: Shape) -> bool:
    """Whether the ALU's operation is an integer one."""
    dtype = shape.dtype
    if op.alu in FLOAT_ALUS and dtype != Dtype.F32:
        report.add("vector-type", f"{op.alu.name} on {dtype.name}")
    if op.alu in FIXED_ALUS and dtype != Dtype.I32:
        report.add("vector-type", f"{op.alu.name} on {dtype.name}")
    if op.op in SHIFTS and dtype != Dtype.I32:
        report.add("vector-type", f"{op.alu.name} on {dtype.name}")
    return dtype == Dtype.I32 or op.alu.stage == Alu.LOGIC_AND.stage


def _check_reduce(report: Report, op: VectorOp, shape: Shape) -> None:
    width = shape.flit_elements
    whole = (
        op.count >= 2
        and 1 <= op.inner <= report.machine.reduce_slots
        and shape.elements % (op.count * op.inner) == 0
        and (op.count % width == 0 if op.inner == 1 else op.inner % width == 0)
    )
    if not whole:
        report.add("reduce", f"{shape.elements} elements in packets of {width} as (outer, {op.count}, {op.inner})")


def _check_vector(report: Report, desc: Exec, shape: Shape) -> Shape | None:
    if shape.dtype not in (Dtype.F32, Dtype.I32):
        report.add("vector-type", f"vector engine on {shape.dtype.name}")
        return None
    used: set[Alu] = set()
    stage = 0
    stashed: Shape | None = shape if desc.stash_input else None
    writers = int(desc.stash_input)
    readers = 0
    for op in desc.vector:
        if op.alu in used:
            report.add("alu-once", f"{op.alu.name} twice")
        used.add(op.alu)
        if op.alu.stage < stage:
            report.add("stage-order", f"{op.alu.name} behind stage {stage}")
        stage = max(stage, op.alu.stage)
        if op.op not in OPS_OF_ALU[op.alu]:
            report.add("alu-op", f"{op.alu.name} does not do {op.op.name}")
        integer = _check_type(report, op, shape)
        _check_mode(report, op)
        _check_operand(report, op, shape, integer)
        if op.group not in (0, 1, 2) or (op.group and not shape.pair) or (op.group and op.mode in ZIPS):
            report.add("group", f"{op.alu.name} on group {op.group}")
        if op.mode in ZIPS and not shape.pair:
            report.add("group", f"{op.alu.name} zips a stream that is not a pair")
            return None
        if op.operand.source == Source.STASH:
            readers += 1
            if stashed is None or (stashed.packets, stashed.packet, stashed.pair) != (
                shape.packets,
                shape.packet,
                shape.pair,
            ):
                report.add("stash", f"{op.alu.name} reads a stash of another shape or none")
        if op.alu == Alu.REDUCE:
            _check_reduce(report, op, shape)
            if report.violations:
                return None
        shape = after_op(shape, op)
        if op.stash:
            writers += 1
            stashed = shape
    if writers > 1 or readers != writers:
        report.add("stash", f"stash written {writers} and read {readers} times")
    return shape


def _check_commit(report: Report, commit: Commit, shape: Shape) -> None:
    machine = report.machine
    width = commit.dtype.bytes
    if commit.dtype != shape.dtype and commit.dtype not in NARROWED.get(shape.dtype, ()):
        report.add("commit-cast", f"{shape.dtype.name} stream committed as {commit.dtype.name}")
        return
    valid = commit.valid
    needed = max(shape.last_flit_elements, 8 // width)
    if valid * width not in (8, 16, 24, 32) or valid > min(needed, FLIT_BYTES // shape.dtype.bytes):
        report.add("valid", f"{valid} elements of {width} B kept of flits that hold {shape.last_flit_elements}")
        return
    check_loops(report, "commit", commit.loops)
    kept = shape.flits * valid
    found = math.prod(n for n, _ in commit.loops)
    if found != kept:
        report.add("commit-count", f"commit of {found} elements, the stream keeps {kept}")
    if not commit.loops or commit.loops[-1][1] != width or commit.loops[-1][0] % valid:
        report.add("commit-run", f"flits of {valid} elements in loops {commit.loops}")
    if commit.base % machine.commit_stride_bytes or any(s % machine.commit_stride_bytes for _, s in commit.loops[:-1]):
        report.add("commit-alignment", f"commit at {commit.base} with loops {commit.loops}")
    if writes_twice(commit.loops, width):
        report.add("write-twice", f"commit loops {commit.loops}")
    low, high = extent(commit.base, commit.loops, width)
    if low < 0 or high > machine.dm_slice_bytes:
        report.add("bounds", f"commit writes DM bytes [{low}, {high})")


def _overlap(a: tuple[tuple[int, int], ...], b: tuple[tuple[int, int], ...]) -> bool:
    return any(x[0] < y[1] and y[0] < x[1] for x in a for y in b)


def _single(
    base: int, sizes: tuple[tuple[int, int], ...], strides: tuple[int, ...]
) -> tuple[int, list[tuple[int, int]]]:
    """Canonical address sequence of one tensor."""
    out: list[tuple[int, int]] = []
    for (n, _), s in zip(sizes, strides, strict=True):
        if out and out[-1][1] == n * s:
            out[-1] = (out[-1][0] * n, s)
        else:
            out.append((n, s))
    return base, out


def _check_overlap(report: Report, desc: Exec) -> None:
    fetch, commit = desc.fetch, desc.commit
    written = intervals(commit.base, commit.loops, commit.dtype.bytes)
    tensors = [(fetch.base, tuple(s for _, s in fetch.loops))]
    if fetch.second is not None:
        tensors.append(fetch.second)
    plain = desc.switch is None and desc.contract is None and all(op.alu != Alu.REDUCE for op in desc.vector)
    target = _single(commit.base, commit.loops, tuple(s for _, s in commit.loops))
    for base, strides in tensors:
        loops = [(n, s) for (n, _), s in zip(fetch.loops, strides, strict=True)]
        low, high = extent(base, loops, fetch.dtype.bytes)
        if high <= written[0][0] or written[-1][1] <= low:
            continue
        same = plain and fetch.dtype.bytes == commit.dtype.bytes and _single(base, fetch.loops, strides) == target
        if not same and _overlap(intervals(base, loops, fetch.dtype.bytes), written):
            report.add("overlap", f"the pass writes DM bytes it reads at {base}")


def check_exec(report: Report, desc: Exec, context: Context | None, absolute: bool) -> None:
    """All limits of a pass. absolute: bases are final addresses, so overlap of source and target can be judged."""
    if context is not None and context not in (Context.MAIN, Context.SUB):
        report.add("context", f"a pass in context {context.name}")
    if not check_fetch(report, desc.fetch, desc.slices, context):
        return
    shape = fetched(desc.fetch)
    if desc.switch is not None:
        _check_switch(report, desc.switch, shape, desc.slices)
        if report.violations:
            return
        shape = switched(shape, desc.switch)
    if desc.contract is not None:
        if context == Context.SUB:
            report.add("contract-context", "a contraction in the sub context")
        if not _check_contract(report, desc.contract, shape, desc.fetch):
            return
        shape = contracted(shape, desc.contract)
    # The smallest packet of keys, 8 B, is already more than a flit of 32-bit results.
    smallest = desc.fetch.lookup is not None and desc.fetch.packet == report.machine.packet_multiple_bytes
    if desc.switch is None and desc.contract is None and shape.flits_per_packet > 1 and not smallest:
        report.add("flit-packet", f"packets of {shape.packet} x {shape.dtype.bytes} B")
    final = _check_vector(report, desc, shape) if desc.vector or desc.stash_input else shape
    if final is not None:
        _check_commit(report, desc.commit, final)
    if absolute and report.clean:
        _check_overlap(report, desc)
