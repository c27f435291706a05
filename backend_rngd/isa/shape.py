"""How many packets of how many elements move between the engines of a pass: shared by legality and timing."""

from __future__ import annotations

import math
from dataclasses import dataclass

from backend_rngd.isa.descriptors import (
    BROADCAST,
    FLIT_BYTES,
    REDUCE,
    Alu,
    Contract,
    Dtype,
    Fetch,
    LaneMode,
    Mode,
    Switch,
    SwitchKind,
    VectorOp,
)


@dataclass(frozen=True)
class Shape:
    """A stream of one slice: `packets` packets (both tensors of a pair together) of `packet` elements."""

    packets: int
    packet: int
    dtype: Dtype
    pair: bool = False

    @property
    def flits_per_packet(self) -> int:
        """Flits of a packet after the collect engine pads it to 32 B."""
        return -(-self.packet * self.dtype.bytes // FLIT_BYTES)

    @property
    def flits(self) -> int:
        """Flits of the whole stream."""
        return self.packets * self.flits_per_packet

    @property
    def elements(self) -> int:
        """Elements of one group (the stream, or one tensor of a pair)."""
        return self.packets * self.packet // (2 if self.pair else 1)

    @property
    def flit_elements(self) -> int:
        """Elements of the fullest flit."""
        return min(self.packet, FLIT_BYTES // self.dtype.bytes)

    @property
    def last_flit_elements(self) -> int:
        """Elements in the last flit of a packet."""
        full = FLIT_BYTES // self.dtype.bytes
        return self.packet - (self.flits_per_packet - 1) * full


def fetched(fetch: Fetch) -> Shape:
    """What leaves the fetch adapter. The packet must divide the elements (checked by legality)."""
    elements = math.prod(n for n, _ in fetch.loops)
    pair = fetch.second is not None
    packets = elements // fetch.packet if fetch.packet > 0 else 0
    return Shape(packets * (2 if pair else 1), fetch.packet * fetch.results, fetch.cast or fetch.raw, pair)


def switched(shape: Shape, switch: Switch | None) -> Shape:
    """What leaves the switch: broadcasts deliver the packets of several slices one after the other."""
    if switch is None:
        return shape
    copies = {
        SwitchKind.BROADCAST01: switch.slice1 * switch.slice0,
        SwitchKind.BROADCAST1: switch.slice1,
        SwitchKind.TRANSPOSED_BROADCAST1: switch.slice1,
    }.get(switch.kind, 1)
    return Shape(shape.packets * copies, shape.packet, shape.dtype, shape.pair)


def multiplier_elements(contract: Contract, dtype: Dtype) -> int:
    """Elements of a multiplier packet (P)."""
    return contract.pack * FLIT_BYTES // dtype.bytes


def columns(contract: Contract, dtype: Dtype) -> int:
    """Results of the packet reducer."""
    return multiplier_elements(contract, dtype) >> contract.depth


def time_broadcast(contract: Contract) -> int:
    """Uses of every stream packet."""
    return math.prod(n for n, _, flags in contract.loops if flags & BROADCAST)


def kept_steps(contract: Contract) -> int:
    """Product of the time digits that survive the time reducer."""
    return math.prod(n for n, _, flags in contract.loops if not flags & REDUCE)


def accumulator_slots(contract: Contract) -> int:
    """Surviving time digits inside the outermost reduced one: partial sums live at once, per lane and column."""
    reduced = [i for i, (_, _, flags) in enumerate(contract.loops) if flags & REDUCE]
    if not reduced:
        return 1
    return math.prod(n for n, _, flags in contract.loops[reduced[0] :] if not flags & REDUCE)


def contracted(shape: Shape, contract: Contract) -> Shape:
    """What leaves the lane folder."""
    wide = columns(contract, shape.dtype)
    kept = kept_steps(contract)
    result = Dtype.I32 if shape.dtype in (Dtype.I8, Dtype.I16) else Dtype.F32
    if contract.mode == LaneMode.INTERLEAVED:
        return Shape(kept * wide, contract.lanes, result)
    return Shape(kept * contract.lanes * -(-wide // 8), min(8, wide), result)


ZIPS = frozenset({Mode.ZIP01, Mode.ZIP10})


def after_op(shape: Shape, op: VectorOp) -> Shape:
    """The stream behind one vector operation."""
    if op.alu == Alu.REDUCE:
        outer = shape.elements // max(op.count * op.inner, 1)
        return Shape(outer * (2 if shape.pair else 1), op.inner, shape.dtype, shape.pair)
    packets, pair = (shape.packets // 2, False) if op.mode in ZIPS else (shape.packets, shape.pair)
    dtype = shape.dtype
    if op.alu == Alu.FXP_TO_FP:
        dtype = Dtype.F32
    elif op.alu == Alu.FP_TO_FXP:
        dtype = Dtype.I32
    return Shape(packets, shape.packet, dtype, pair)


def contiguous_run(fetch: Fetch) -> int:
    """Bytes that lie next to each other in the order of the fetch (of both tensors in a pair)."""
    width = fetch.dtype.bytes
    strides = [s for _, s in fetch.loops]

    def run(steps: list[int]) -> int:
        extent = width
        for (size, _), stride in zip(reversed(fetch.loops), reversed(steps), strict=True):
            if stride != extent:
                break
            extent *= size
        return extent

    out = run(strides)
    return out if fetch.second is None else math.gcd(out, run(list(fetch.second[1])))


def access_bytes(fetch: Fetch, limit: int) -> int:
    """Bytes of one access: gcd(contiguous run, packet) among powers of two up to `limit` whose result after the cast
    fits one flit (hardware.md 2.3, 2.5)."""
    width = fetch.dtype.bytes
    widening = max(1, (fetch.cast or fetch.raw).bytes * fetch.results // width)
    size = math.gcd(contiguous_run(fetch), fetch.packet * width)
    size &= -size
    return max(1, min(size, limit, FLIT_BYTES // widening))


def widest_packet(fetch: Fetch) -> int:
    """Elements of the longest packet of at most a flit that divides the fetch (where the packet means nothing else)."""
    width = fetch.dtype.bytes
    elements = math.prod(n for n, _ in fetch.loops)
    packet = FLIT_BYTES // max(width, fetch.cast.bytes if fetch.cast is not None else width)
    while packet > 1 and (elements % packet or packet * width % 8):
        packet //= 2
    return packet
