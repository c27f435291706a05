"""A second, slow executor of instructions, written from the descriptor text alone: Python loops over slices, time
steps, lanes and elements, bytes in bytearrays. It shares no code with `runtime_sim` and exists to disagree with it.
"""

from __future__ import annotations

import itertools
import math
import struct

import numpy as np

from backend_rngd.isa.descriptors import (
    BROADCAST,
    DM_SLICE_STRIDE,
    REDUCE,
    Alu,
    Call,
    Dma,
    Dtype,
    Exec,
    LaneMode,
    LoadTrf,
    LoadVrf,
    Lookup,
    Memset,
    Mode,
    Op,
    Source,
    Space,
    SwitchKind,
)

DM_BYTES, TRF_BYTES, VRF_BYTES = 512 * 1024, 65536, 8192


def steps(loops):
    """All index tuples of a nest, outer to inner."""
    return itertools.product(*(range(loop[0]) for loop in loops))


def decode(raw: bytes, dtype: Dtype):
    """Number in a stored element."""
    if dtype is Dtype.BF16:
        return struct.unpack("<f", b"\0\0" + raw)[0]
    if dtype is Dtype.F32:
        return struct.unpack("<f", raw)[0]
    if dtype in (Dtype.F8E4M3, Dtype.F8E5M2):
        return decode_f8(raw[0], dtype)
    return int.from_bytes(raw, "little", signed=True)


def decode_f8(byte: int, dtype: Dtype) -> float:
    mantissa_bits, bias = (3, 7) if dtype is Dtype.F8E4M3 else (2, 15)
    sign = -1.0 if byte & 0x80 else 1.0
    exponent = (byte & 0x7F) >> mantissa_bits
    mantissa = byte & ((1 << mantissa_bits) - 1)
    if dtype is Dtype.F8E4M3 and byte & 0x7F == 0x7F:
        return math.nan
    if dtype is Dtype.F8E5M2 and exponent == 31:
        return sign * (math.inf if mantissa == 0 else math.nan)
    if exponent == 0:
        return sign * mantissa * 2.0 ** (1 - bias - mantissa_bits)
    return sign * (1 + mantissa / (1 << mantissa_bits)) * 2.0 ** (exponent - bias)


def decode_f4(nibble: int) -> float:
    """f4e2m1: bias 1, subnormals, no infinities."""
    sign = -1.0 if nibble & 8 else 1.0
    exponent, mantissa = nibble >> 1 & 3, nibble & 1
    return sign * (mantissa * 0.5 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1))


def all_f8(dtype: Dtype) -> list[tuple[float, int]]:
    """(value, code) of every finite non-negative f8 number in ascending order."""
    return sorted((decode_f8(c, dtype), c) for c in range(128) if math.isfinite(decode_f8(c, dtype)))


def encode(value, dtype: Dtype) -> bytes:
    """Cast engine: round a number to a stored element."""
    if dtype is Dtype.F32:
        return struct.pack("<f", value)
    if dtype is Dtype.I32:
        return struct.pack("<i", value)
    if dtype is Dtype.I16:
        return struct.pack("<H", value & 0xFFFF)
    if dtype is Dtype.I8:
        return struct.pack("<B", value & 0xFF)
    if dtype is Dtype.BF16:
        if math.isnan(value):
            return b"\xc0\x7f"
        (bits,) = struct.unpack("<I", struct.pack("<f", value))
        low, high = bits & 0xFFFF, bits >> 16
        if low > 0x8000 or (low == 0x8000 and high & 1):
            high += 1
        if high & 0x7F80 == 0:
            high &= 0x8000
        return struct.pack("<H", high)
    sign = 0x80 if math.copysign(1.0, value) < 0 else 0
    if math.isnan(value):
        return bytes([0x7F if dtype is Dtype.F8E4M3 else 0x7E])
    table = all_f8(dtype)
    magnitude = abs(value)
    if dtype is Dtype.F8E4M3:
        if magnitude >= 448:
            return bytes([0x7E | sign])
        best = min(table, key=lambda e: (abs(e[0] - magnitude), e[1] & 1))
        return bytes([best[1] | sign])
    top = table[-1][0]
    if magnitude >= top + (top - table[-2][0]) / 2:
        return bytes([0x7C | sign])
    best = min(table, key=lambda e: (abs(e[0] - magnitude), -e[1]))
    return bytes([best[1] | sign])


class LiteralUnit:
    """Memories of one unit and an interpreter of single instructions."""

    def __init__(self, slices: int, hbm: bytes) -> None:
        self.slices = slices
        self.dm = [bytearray(DM_BYTES) for _ in range(slices)]
        self.trf = [bytearray(TRF_BYTES) for _ in range(slices)]
        self.vrf = [bytearray(VRF_BYTES) for _ in range(slices)]
        self.hbm = bytearray(hbm)
        self.registers = [0] * 64

    def run(self, stream, routine: int = 0) -> None:
        """Execute a routine in program order."""
        for instruction in stream.routines[routine].instructions:
            what = instruction.what
            if isinstance(what, Call):
                saved = self.registers
                self.registers = list(saved)
                for target, source, immediate in what.moves:
                    self.registers[target] = saved[source] + immediate
                self.run(stream, what.routine)
                self.registers = saved
            else:
                self.execute(what)

    def execute(self, what) -> None:
        """One instruction."""
        {Exec: self.exec, LoadTrf: self.load_trf, LoadVrf: self.load_vrf, Memset: self.memset, Dma: self.dma}[
            type(what)
        ](what)

    # Fetch and switch ------------------------------------------------------------------------------------------------
    def fetch(self, fetch, s: int):
        """Packets of slice s; a packet is a list of raw elements (bytes), widened to 4 bytes after a cast."""
        streams = []
        tensors = [(fetch.base, [stride for _, stride in fetch.loops])]
        if fetch.second is not None:
            tensors.append((fetch.second[0], list(fetch.second[1])))
        for base, strides in tensors:
            elements = []
            for index in steps(fetch.loops):
                at = base + sum(i * stride for i, stride in zip(index, strides, strict=True))
                raw = bytes(self.dm[s][at : at + fetch.dtype.bytes])
                found = [raw]
                if fetch.lookup is not None:  # two 4-bit numbers a key, the first in the low bits
                    nibbles = [raw[0] >> shift & 15 for shift in (0, 4)]
                    numbers = [float(n - 8) if fetch.lookup is Lookup.I4_F8E4M3 else decode_f4(n) for n in nibbles]
                    found = [encode(x, Dtype.F8E4M3) for x in numbers]
                if fetch.cast is not None:
                    found = [encode(decode(x, fetch.raw), fetch.cast) for x in found]
                elements += found
            packet = fetch.packet * fetch.results
            streams.append([elements[i : i + packet] for i in range(0, len(elements), packet)])
        if len(streams) == 1:
            return streams[0]
        return [packet for both in zip(*streams, strict=True) for packet in both]

    @staticmethod
    def switch(switch, streams):
        """Packets of every slice after the switch."""
        ring = switch.slice1 * switch.slice0
        out: list[list] = [[] for _ in streams]
        for s in range(len(streams)):
            s2, a, b = s // ring, s // switch.slice0 % switch.slice1, s % switch.slice0
            if switch.kind is SwitchKind.TRANSPOSE:
                out[s2 * ring + b * switch.slice1 + a] = streams[s]
                continue
            time = len(streams[s])
            packets = []
            if switch.kind is SwitchKind.BROADCAST01:
                for t1 in range(time // switch.time0):
                    for x in range(switch.slice1):
                        for t0 in range(switch.time0):
                            for y in range(switch.slice0):
                                packets.append(streams[s2 * ring + x * switch.slice0 + y][t1 * switch.time0 + t0])
            else:
                for t in range(time):
                    for x in range(switch.slice1):
                        packets.append(streams[s2 * ring + x * switch.slice0 + b][t])
            out[s] = packets
        return out

    # Contraction -----------------------------------------------------------------------------------------------------
    def contract(self, contract, packets, dtype: Dtype, s: int):
        """f32 (or i32) packets of one slice."""
        width = dtype.bytes
        flits = []
        for packet in packets:
            raw = b"".join(packet)
            raw += bytes(-len(raw) % 32)
            flits += [raw[i : i + 32] for i in range(0, len(raw), 32)]
        joined = [b"".join(flits[i : i + contract.pack]) for i in range(0, len(flits), contract.pack)]
        size = contract.pack * 32 // width
        columns = size >> contract.depth
        lane_bytes = TRF_BYTES // contract.lanes
        sums: dict[tuple, list] = {}
        for index in steps(contract.loops):
            position = 0
            for i, (n, _, flags) in zip(index, contract.loops, strict=True):
                if not flags & BROADCAST:
                    position = position * n + i
            at = contract.trf_base + sum(i * stride for i, (_, stride, _) in zip(index, contract.loops, strict=True))
            key = tuple(i for i, (_, _, flags) in zip(index, contract.loops, strict=True) if not flags & REDUCE)
            row = joined[position]
            for lane in range(contract.lanes):
                accumulators = sums.setdefault((key, lane), [0] * columns)
                for e in range(size):
                    x = decode(row[e * width : (e + 1) * width], dtype)
                    where = lane * lane_bytes + at + e % contract.trf_read * width
                    y = decode(bytes(self.trf[s][where : where + width]), dtype)
                    accumulators[e >> contract.depth] += x * y
        out = []
        result = Dtype.I32 if dtype in (Dtype.I8, Dtype.I16) else Dtype.F32
        kept = [loop for loop in contract.loops if not loop[2] & REDUCE]
        for key in steps(kept):
            if contract.mode is LaneMode.INTERLEAVED:
                for column in range(columns):
                    out.append([encode(sums[key, lane][column], result) for lane in range(contract.lanes)])
            else:
                for lane in range(contract.lanes):
                    values = [encode(v, result) for v in sums[key, lane]]
                    out += [values[i : i + 8] for i in range(0, columns, 8)]
        return out, result

    # Vector engine ---------------------------------------------------------------------------------------------------
    def vector(self, ops, stash_input: bool, packets, dtype: Dtype, pair: bool, s: int):
        """Chain on one slice. Groups are lists of raw elements; pairs are merged back packet by packet."""
        packet = len(packets[0])
        groups = [packets[0::2], packets[1::2]] if pair else [packets]
        groups = [[e for p in g for e in p] for g in groups]
        stash = [list(g) for g in groups] if stash_input else []
        for op in ops:
            members = list(range(len(groups))) if op.group == 0 else [op.group - 1]
            view = self.view_of(op.alu, dtype)
            if op.alu is Alu.REDUCE:
                for g in members:
                    groups[g] = self.reduce(op, groups[g], view)
                packet = op.inner
            elif op.mode in (Mode.ZIP01, Mode.ZIP10):
                a, b = groups if op.mode is Mode.ZIP01 else groups[::-1]
                groups = [[self.alu(op, x, y, view) for x, y in zip(a, b, strict=True)]]
                members = [0]
            else:
                both = len(groups) == 2 and op.group == 0
                for g in members:
                    new = []
                    for i, element in enumerate(groups[g]):
                        place = (i // packet * 2 + g) * packet + i % packet if both else i
                        stashed = stash[g if len(stash) == 2 else 0][i] if op.operand.source is Source.STASH else None
                        new.append(self.alu(op, element, self.operand(op, view, place, s, stashed), view))
                    groups[g] = new
            if op.alu is Alu.FXP_TO_FP or 30 <= op.alu < 40 or op.alu is Alu.FP_DIV:
                dtype = Dtype.F32
            elif op.alu is Alu.FP_TO_FXP or 10 <= op.alu < 20:
                dtype = Dtype.I32
            if op.stash:
                stash = [list(groups[g]) for g in members]
        cut = [[g[i : i + packet] for i in range(0, len(g), packet)] for g in groups]
        return [p for both in zip(*cut, strict=True) for p in both], dtype

    @staticmethod
    def view_of(alu: Alu, dtype: Dtype) -> str:
        """struct code of what an ALU sees in 32 bits."""
        if alu < 10:
            return "I"
        if alu < 30:
            return "i"
        if alu is Alu.REDUCE or alu >= 70:
            return "f" if dtype is Dtype.F32 else "i"
        return "f"

    def operand(self, op, view: str, place: int, s: int, stashed: bytes | None) -> bytes | None:
        """Raw operand of one element, None for unary and stream-stream ops."""
        if op.mode in (Mode.UNARY, Mode.STREAM_STREAM):
            return None
        if op.operand.source is Source.CONST:
            if view == "f":
                return struct.pack("<f", op.operand.value)
            return struct.pack("<I", int(op.operand.value) & 0xFFFFFFFF)
        if op.operand.source is Source.STASH:
            return stashed
        at = op.operand.base
        for n, stride in reversed(op.operand.loops):
            at += place % n * stride
            place //= n
        return bytes(self.vrf[s][at : at + 4])

    def alu(self, op, element: bytes, operand: bytes | None, view: str) -> bytes:
        """One element through one ALU."""
        kind = {"f": np.float32, "i": np.int32, "I": np.uint32}[view]
        x = kind(struct.unpack("<" + view, element)[0])
        y = x if operand is None else kind(struct.unpack("<" + view, operand)[0])
        if op.mode is Mode.OPERAND_STREAM and op.op is not Op.FMA:
            x, y = y, x
        with np.errstate(all="ignore"):
            return self.compute(op, x, y, view)

    @staticmethod
    def compute(op, x, y, view: str) -> bytes:
        one = np.float32(1)
        if op.op is Op.CONVERT:
            if op.alu is Alu.FXP_TO_FP:
                return struct.pack("<f", np.float32(x))
            if math.isnan(x):
                return struct.pack("<i", 0)
            return struct.pack(
                "<i",
                int(min(max(round(float(x)), -(2**31)), 2**31 - 1))
                if math.isfinite(x)
                else (2**31 - 1 if x > 0 else -(2**31)),
            )
        if view == "f":
            result = {
                Op.ADD: lambda: x + y,
                Op.SUB: lambda: x - y,
                Op.MUL: lambda: x * y,
                Op.DIV: lambda: x / y,
                Op.FMA: lambda: np.float32(x * y) + np.float32(op.operand2),
                Op.MAX: lambda: np.float32(math.nan) if x != x or y != y else max(x, y),
                Op.MIN: lambda: np.float32(math.nan) if x != x or y != y else min(x, y),
                Op.EXP: lambda: np.exp(x),
                Op.NEG_EXP: lambda: np.exp(-x),
                Op.SQRT: lambda: np.sqrt(x),
                Op.TANH: lambda: np.tanh(x),
                Op.SIGMOID: lambda: one / (one + np.exp(-x)),
                Op.ERF: lambda: np.float32(math.erf(x)),
                Op.LOG: lambda: np.log(x),
                Op.SIN: lambda: np.sin(x),
                Op.COS: lambda: np.cos(x),
            }[op.op]()
            return struct.pack("<f", result)
        a, b = int(x), int(y)
        if op.op is Op.ADD and op.alu is Alu.CLIP_ADD:
            return struct.pack("<i", min(max(a + b, -(2**31)), 2**31 - 1))
        signed = a - 2**32 if a >= 2**31 else a
        result = {
            Op.ADD: lambda: a + b,
            Op.SUB: lambda: a - b,
            Op.MUL: lambda: a * b,
            Op.MAX: lambda: max(a, b),
            Op.MIN: lambda: min(a, b),
            Op.AND: lambda: a & b,
            Op.OR: lambda: a | b,
            Op.XOR: lambda: a ^ b,
            Op.SHL: lambda: a << b,
            Op.LSHR: lambda: (a & 0xFFFFFFFF) >> b,
            Op.ASHR: lambda: signed >> b,
        }[op.op]()
        return struct.pack("<I", result & 0xFFFFFFFF)

    @staticmethod
    def reduce(op, elements, view: str):
        values = [struct.unpack("<" + view, e)[0] for e in elements]
        out = []
        block = op.count * op.inner
        for start in range(0, len(values), block):
            for slot in range(op.inner):
                column = values[start + slot : start + block : op.inner]
                total = sum(column) if op.op is Op.ADD else (max if op.op is Op.MAX else min)(column)
                if view == "i":
                    total = min(max(total, -(2**31)), 2**31 - 1)
                out.append(struct.pack("<" + view, total))
        return out

    # Passes ----------------------------------------------------------------------------------------------------------
    def exec(self, op: Exec) -> None:
        """A Tensor Unit pass, slice by slice."""
        streams = [self.fetch(op.fetch, s) for s in range(op.slices)]
        if op.switch is not None:
            streams = self.switch(op.switch, streams)
        writes = []
        for s, packets in enumerate(streams):
            dtype = op.fetch.cast or op.fetch.raw
            pair = op.fetch.second is not None
            if op.contract is not None:
                packets, dtype = self.contract(op.contract, packets, dtype, s)
                pair = False
            if op.vector or op.stash_input:
                packets, dtype = self.vector(op.vector, op.stash_input, packets, dtype, pair, s)
            flit = 32 // dtype.bytes
            kept = []
            for packet in packets:
                for i in range(0, len(packet), flit):
                    padded = packet[i : i + flit] + [bytes(dtype.bytes)] * flit
                    kept += padded[: op.commit.valid]
            if op.commit.dtype.bytes != dtype.bytes:
                kept = [encode(decode(e, dtype), op.commit.dtype) for e in kept]
            for index, element in zip(steps(op.commit.loops), kept, strict=True):
                at = op.commit.base + sum(i * stride for i, (_, stride) in zip(index, op.commit.loops, strict=True))
                writes.append((s, at, element))
        for s, at, element in writes:
            self.dm[s][at : at + len(element)] = element

    def load_trf(self, op: LoadTrf) -> None:
        """Lane-major copy to TRF."""
        for s in range(op.slices):
            packets = self.fetch(op.fetch, s)
            share = len(packets) // op.lanes
            for lane in range(op.lanes):
                raw = b"".join(b"".join(p) for p in packets[lane * share : (lane + 1) * share])
                at = lane * (TRF_BYTES // op.lanes) + op.base
                self.trf[s][at : at + len(raw)] = raw

    def load_vrf(self, op: LoadVrf) -> None:
        """Linear copy to VRF."""
        for s in range(op.slices):
            raw = b"".join(b"".join(p) for p in self.fetch(op.fetch, s))
            self.vrf[s][op.base : op.base + len(raw)] = raw

    def memset(self, op: Memset) -> None:
        """Fill."""
        for s in range(op.slices):
            self.dm[s][op.base : op.base + op.bytes] = struct.pack("<I", op.value) * (op.bytes // 4)

    # DMA -------------------------------------------------------------------------------------------------------------
    def memory(self, endpoint, at: int):
        """(bytearray, offset) of an address."""
        if endpoint.space is Space.HBM:
            return self.hbm, at
        return self.dm[at // DM_SLICE_STRIDE], at % DM_SLICE_STRIDE

    def dma(self, op: Dma) -> None:
        """All reads, then all writes (source and destination may overlap)."""
        copied = []
        for index in steps(op.loops):
            source = op.source.base + self.registers[op.source.register]
            target = op.destination.base + self.registers[op.destination.register]
            source += sum(i * a for i, (_, a, _) in zip(index, op.loops, strict=True))
            target += sum(i * b for i, (_, _, b) in zip(index, op.loops, strict=True))
            if op.index is not None:
                at = op.index.base + self.registers[op.index.register]
                at += sum(i * stride for i, stride in zip(index, op.index.strides, strict=True))
                (offset,) = struct.unpack("<I", self.hbm[at : at + 4])
                source, target = (source, target + offset) if op.index.scatter else (source + offset, target)
            memory, at = self.memory(op.source, source)
            copied.append((target, bytes(memory[at : at + op.packet])))
        for target, raw in copied:
            memory, at = self.memory(op.destination, target)
            memory[at : at + op.packet] = raw
