"""Which bytes an instruction touches: the base of dependencies, bounds checks and memory planning.

DM footprints are byte offsets inside a slice and stand for every slice (an instruction that leaves out some slices is
treated as if it touched them; that can only add a wait). TRF bytes are numbered lane after lane: lane l of an
instruction that uses L lanes owns bytes [l * 65536 / L, (l + 1) * 65536 / L).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from backend_rngd.isa.descriptors import (
    DM_SLICE_STRIDE,
    Alu,
    Call,
    Contract,
    Descriptor,
    Dma,
    Dtype,
    Endpoint,
    Exec,
    Fetch,
    LoadTrf,
    LoadVrf,
    Memset,
    Notify,
    Source,
    Space,
    Wait,
)
from backend_rngd.isa.peers import split_address, split_unit_stride

TRF_BYTES = 65536
FLOAT_ALUS = frozenset({Alu.FP_FMA, Alu.FP_FPU, Alu.FP_EXP, Alu.FP_MUL0, Alu.FP_MUL1, Alu.FP_DIV})
INTEGER_ALUS = frozenset({Alu.FXP_ADD, Alu.FXP_LSHIFT, Alu.FXP_MUL, Alu.FXP_RSHIFT})
MAX_PIECES = 32  # intervals kept of one access; beyond it the smallest gaps are counted as touched

Interval = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Access:
    """Bytes read or written by one instruction: disjoint half-open intervals in a memory.

    space: "hbm", "dm", "trf", "vrf" or "peer_hbm" (the HBM windows of units; registers are already added).
    register: HBM only, the address register that is added. dtype: type of the elements, if the instruction knows it
    and the intervals hold nothing else.
    """

    space: str
    intervals: tuple[Interval, ...]
    write: bool
    register: int = 0
    dtype: Dtype | None = None

    @property
    def low(self) -> int:
        """First byte."""
        return self.intervals[0][0]

    @property
    def high(self) -> int:
        """Byte after the last."""
        return self.intervals[-1][1]


def intervals(base: int, loops: Iterable[tuple[int, int]], unit: int, limit: int = MAX_PIECES) -> tuple[Interval, ...]:
    """Bytes that a sequencer touches: `loops` are (size, stride), `unit` bytes at each step; sorted, disjoint.

    At most `limit` intervals: gaps of the inner loops are filled in when there are more.
    """
    extent = unit
    outer: list[tuple[int, int]] = []
    for size, stride in sorted(((n, abs(s)) for n, s in loops if n > 1 and s), key=lambda loop: loop[1]):
        if stride <= extent and not outer:
            extent += (size - 1) * stride
        else:
            outer.append((size, stride))
    low = base + sum((n - 1) * s for n, s in loops if s < 0)
    pieces = 1
    for size, _ in outer:
        pieces *= size
    while pieces > limit:
        size, stride = outer.pop(0)
        pieces //= size
        extent += (size - 1) * stride
    if not outer:
        return ((low, low + extent),)
    starts = [low]
    for size, stride in outer:
        starts = [start + i * stride for start in starts for i in range(size)]
    starts.sort()
    out: list[Interval] = []
    for start in starts:
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], start + extent))
        else:
            out.append((start, start + extent))
    return tuple(out)


def is_exact(loops: Iterable[tuple[int, int]], unit: int, limit: int = MAX_PIECES) -> bool:
    """Whether `intervals` filled no gaps."""
    extent, pieces = unit, 1
    for size, stride in sorted(((n, abs(s)) for n, s in loops if n > 1 and s), key=lambda loop: loop[1]):
        if stride <= extent and pieces == 1:
            extent += (size - 1) * stride
        else:
            pieces *= size
    return pieces <= limit


def _typed(base: int, loops: Sequence[tuple[int, int]], dtype: Dtype, space: str, write: bool) -> Access:
    """Elements of one type at the steps of a sequencer."""
    known = dtype if is_exact(loops, dtype.bytes) else None
    return Access(space, intervals(base, loops, dtype.bytes), write, 0, known)


def split_stride(stride: int) -> tuple[int, int]:
    """A DMA stride in DM as (slices, bytes inside a slice); the byte part may be negative."""
    slices = (stride + DM_SLICE_STRIDE // 2) // DM_SLICE_STRIDE
    return slices, stride - slices * DM_SLICE_STRIDE


def slice_range(endpoint: Endpoint, loops: Iterable[tuple[int, int]]) -> Interval:
    """First and one past the last slice that the DM side of a DMA touches; `loops` are (size, stride)."""
    low = high = endpoint.base // DM_SLICE_STRIDE
    for size, stride in loops:
        step = split_stride(stride)[0] * (size - 1)
        low, high = (low + step, high) if step < 0 else (low, high + step)
    return low, high + 1


Launch = Mapping[int, Sequence[int]]
"""Launch registers: register -> its value in every unit of the group."""
NO_LAUNCH: Launch = MappingProxyType({})


def within_unit(
    endpoint: Endpoint, loops: Iterable[tuple[int, int]], value: int = 0
) -> tuple[Endpoint, list[tuple[int, int]]]:
    """A peer side of a DMA as seen inside one unit: the endpoint in its HBM or DM and the strides without units.

    value: contents of the side's register. Other sides are returned as they are.
    """
    if not endpoint.space.is_peer:
        return endpoint, list(loops)
    space = Space.HBM if endpoint.space == Space.PEER_HBM else Space.DM
    inside = Endpoint(space, split_address(endpoint.base + value)[1])
    return inside, [(size, split_unit_stride(stride)[1]) for size, stride in loops]


def _peer_endpoint(
    endpoint: Endpoint, loops: Sequence[tuple[int, int]], packet: int, write: bool, launch: Launch
) -> Access:
    """Bytes inside the units' memories, for any unit that executes the transfer.

    The own unit may be among the peers: its DM counts as touched. Its HBM is only touched in the order of the DMA
    context, so nothing waits for it.
    """
    values = {split_address(value)[1] for value in launch.get(endpoint.register, (0,))}
    pieces: list[Interval] = []
    for value in values:
        inside, steps = within_unit(endpoint, loops, value)
        pieces += _endpoint(inside, steps, packet, write, NO_LAUNCH).intervals
    if endpoint.space == Space.PEER_DM:
        return Access("dm", _joined(pieces), write)
    return Access("peer_hbm", _joined(pieces), write)


def _joined(pieces: Iterable[Interval]) -> tuple[Interval, ...]:
    """The same bytes as sorted, disjoint intervals."""
    out: list[Interval] = []
    for low, high in sorted(pieces):
        if out and low <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], high))
        else:
            out.append((low, high))
    return tuple(out)


def _endpoint(endpoint: Endpoint, loops: Sequence[tuple[int, int]], packet: int, write: bool, launch: Launch) -> Access:
    if endpoint.space.is_peer:
        return _peer_endpoint(endpoint, loops, packet, write, launch)
    if endpoint.space == Space.HBM:
        return Access("hbm", intervals(endpoint.base, loops, packet), write, endpoint.register)
    inside = [(size, split_stride(stride)[1]) for size, stride in loops]
    return Access("dm", intervals(endpoint.base % DM_SLICE_STRIDE, inside, packet), write)


def fetch_accesses(fetch: Fetch) -> list[Access]:
    """DM bytes read by a fetch (both tensors in pair mode)."""
    out = [_typed(fetch.base, fetch.loops, fetch.dtype, "dm", False)]
    if fetch.second is not None:
        base, strides = fetch.second
        loops = [(n, s) for (n, _), s in zip(fetch.loops, strides, strict=True)]
        out.append(_typed(base, loops, fetch.dtype, "dm", False))
    return out


def _lanes(inside: Iterable[Interval], lanes: int, write: bool, dtype: Dtype | None) -> Access:
    lane_bytes = TRF_BYTES // lanes
    pieces = [(lane * lane_bytes + a, lane * lane_bytes + b) for lane in range(lanes) for a, b in inside]
    return Access("trf", _joined(pieces), write, 0, dtype)


def contract_access(contract: Contract, dtype: Dtype) -> Access:
    """TRF bytes read by a contraction whose stream has elements of `dtype`."""
    loops = [(size, stride) for size, stride, _ in contract.loops]
    unit = contract.trf_read * dtype.bytes
    known = dtype if is_exact(loops, unit) else None
    return _lanes(intervals(contract.trf_base, loops, unit), contract.lanes, False, known)


def _ranges(ranges: Iterable[Interval], write: bool) -> tuple[Access, ...]:
    """One access for each (offset, bytes): what other units read counts as read, what they wrote as written, at the
    place of the notify or wait that says so."""
    return tuple(Access("dm", ((offset, offset + nbytes),), write) for offset, nbytes in ranges)


def stream_elements(fetch: Fetch) -> int:
    """Elements of one tensor of a fetch, a slice."""
    total = 1
    for size, _ in fetch.loops:
        total *= size
    return total


def footprint(desc: Descriptor, launch: Launch = NO_LAUNCH) -> tuple[Access, ...]:
    """Every access of an instruction, for any unit that executes it.

    launch: values of the launch registers (peer sides of transfers; a register without values counts as 0). Bytes of a
    gather's or scatter's indirect side are not known here: that side counts as the whole memory from its base on (HBM)
    and its direct bytes otherwise. A call touches nothing itself.
    """
    if isinstance(desc, Exec):
        out = fetch_accesses(desc.fetch)
        if desc.contract is not None:
            out.append(contract_access(desc.contract, desc.fetch.raw))
        for op in desc.vector:
            if op.operand.source == Source.VRF:
                dtype = Dtype.I32 if op.alu in INTEGER_ALUS else Dtype.F32 if op.alu in FLOAT_ALUS else None
                access = _typed(op.operand.base, op.operand.loops, dtype or Dtype.F32, "vrf", False)
                out.append(access if dtype is not None else replace(access, dtype=None))
        commit = desc.commit
        out.append(_typed(commit.base, commit.loops, commit.dtype, "dm", True))
        return tuple(out)
    if isinstance(desc, Dma):
        source = [(n, a) for n, a, _ in desc.loops]
        destination = [(n, b) for n, _, b in desc.loops]
        out = [
            _endpoint(desc.source, source, desc.packet, False, launch),
            _endpoint(desc.destination, destination, desc.packet, True, launch),
        ]
        if desc.index is not None:
            steps = [(n, i) for (n, _, _), i in zip(desc.loops, desc.index.strides, strict=True)]
            out.append(Access("hbm", intervals(desc.index.base, steps, 4), False, desc.index.register))
        return tuple(out)
    if isinstance(desc, LoadTrf):
        lane_bytes = stream_elements(desc.fetch) * desc.fetch.dtype.bytes // desc.lanes
        target = _lanes([(desc.base, desc.base + lane_bytes)], desc.lanes, True, desc.fetch.dtype)
        return (*fetch_accesses(desc.fetch), target)
    if isinstance(desc, LoadVrf):
        dtype = desc.fetch.cast or desc.fetch.dtype
        nbytes = stream_elements(desc.fetch) * dtype.bytes
        return (*fetch_accesses(desc.fetch), Access("vrf", ((desc.base, desc.base + nbytes),), True, 0, dtype))
    if isinstance(desc, Memset):
        return (Access("dm", ((desc.base, desc.base + desc.bytes),), True),)
    if isinstance(desc, Notify):
        return _ranges(desc.ranges, False)
    if isinstance(desc, Wait):
        return (*_ranges(desc.ranges, False), *_ranges(desc.arrived, True))
    assert isinstance(desc, Call)
    return ()
