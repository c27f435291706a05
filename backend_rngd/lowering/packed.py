"""4-bit weights: bytes of two numbers and scales a group in HBM, elements of bf16 in DM before the engine reads them.

The multipliers take no bf16 with 4-bit numbers (hardware.md 2.8: widths do not mix), so a pass expands each tile where
it lies: the fetch adapter's paired table gives f8 (exact for 4-bit numbers), its cast f32, the cast engine bf16
(hardware.md 2.5, 2.10). HBM carries 4 bits a weight.

Where weights stream, the contraction keeps groups apart and the vector engine behind it applies the scales to the sums
and adds them: nothing is rounded. Where tokens stream, 16 channels of a slice are more than the reducer's 8 slots
(hardware.md 2.9), so the scales are multiplied in while expanding, rounded once to bf16 as the library does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from xdsl.ir import SSAValue

from backend_rngd.isa.descriptors import Alu, Commit, Dtype, Lookup, Mode, Op, Operand, Source, VectorOp
from backend_rngd.lowering.emitter import Emitter, dm, hbm, operand_loops
from backend_rngd.lowering.tensor import round_up
from backend_rngd.lowering.values import Form, Weight
from ir.errors import UnsupportedError

N_MULTIPLE, K_MULTIPLE = 64, 32  # rows are padded like those of other weights; 32 numbers are 16 B of keys
PACKET = 8  # keys of the smallest packet: 16 numbers
VRF_BYTES = 4096  # scales of a pass, so that those of the next load meanwhile


@dataclass(frozen=True)
class Packed:
    """How a matrix of `k` columns lies in HBM: keys [n][k / 2] of a byte, scales [n][pitch] of f32, one a `group`."""

    keys: SSAValue
    scales: SSAValue
    k: int
    group: int

    @property
    def pitch(self) -> int:
        """Scales of a row, padded to 8 B."""
        return round_up(self.k // self.group, 2)

    def multiple(self, packet: int) -> int:
        """What parts of K are multiples of: their scales start on 8 B."""
        return packet if self.group == self.k else max(packet, 2 * self.group)

    def part(self, k0: int, k: int) -> tuple[int, int]:
        """First scale and number of scales of columns [k0, k0 + k)."""
        return (0, 1) if self.group == self.k else (k0 // self.group, k // self.group)


def packed_weight(words: Weight, scale: Weight, shape: tuple[int, int]) -> Weight:
    """The value of `tc.dequantize`: a weight that only contractions read."""

    def bind(_: Form) -> SSAValue:
        raise UnsupportedError(
            f"a 4-bit weight of shape {shape} outside of a contraction over its last dimension",
            "tiles are expanded on their way into the contraction engine only",
            "add its module to `ignore` of the checkpoint",
        )

    return replace(Weight.of(shape, Dtype.BF16, bind), packed=(words, scale))


def bind_packed(weight: Weight) -> Packed:
    """The HBM buffers of a 4-bit weight: rows as they are stored, scales as f32, rows padded with scales of 0."""
    assert weight.packed is not None
    words, scale = weight.packed
    n, k = weight.shape
    groups = scale.sizes[1]
    if words.sizes != words.shape or scale.sizes != scale.shape or k % K_MULTIPLE or k % groups:
        raise UnsupportedError(
            f"a 4-bit weight of shape {(n, k)} with {groups} groups",
            f"rows are multiples of {K_MULTIPLE} numbers and of a group",
            "add its module to `ignore` of the checkpoint",
        )
    keys = words.bind(Form((0, 1), (n, words.shape[1]), (N_MULTIPLE, 2)))
    return Packed(keys, scale.bind(Form((0, 1), (n, groups), (N_MULTIPLE, 2))), k, k // groups)


def scaled_rows(packed: Packed, k: int) -> int:
    """Rows of `k` columns whose scales fit VRF."""
    return VRF_BYTES // (round_up(packed.part(0, k)[1], 2) * 4)


def expand_numbers(em: Emitter, place: Staging, rows: int, k: int, target: SSAValue, slices: int) -> None:
    """The numbers -8 to 7 of a tile as bf16 [rows][k], without their scales: exact, and the vector engine is free."""
    keys = em.fetch(0, [(rows * k // 2, 1)], Dtype.I8, PACKET, Dtype.F32, lookup=Lookup.I4_F8E4M3)
    em.execute(keys, place.keys, Commit(0, ((rows * k, 2),), Dtype.BF16, 8), target, slices=slices)


def group_sums(
    em: Emitter, packed: Packed, place: Staging, rows: int, k0: int, k: int, lanes: int, slices: int
) -> tuple[VectorOp, ...]:
    """Behind a contraction that keeps groups apart, [row][group][lane]: times the scale of each, summed over groups."""
    _, count = packed.part(k0, k)
    pitch = round_up(count, 2) * 4
    base = em.vrf_space(round_up(rows * pitch, 32))
    packet = 8 if rows * pitch % 32 == 0 else 4 if rows * pitch % 16 == 0 else 2
    em.load_vrf(em.fetch(0, [(rows * pitch // 4, 4)], Dtype.F32, packet), place.scales, base, slices)
    loops = operand_loops([(rows, pitch), (count, 4), (lanes, 0)])
    scale = VectorOp(Alu.FP_MUL0, Op.MUL, Mode.STREAM_OPERAND, Operand(Source.VRF, base=base, loops=loops))
    return (scale, VectorOp(Alu.REDUCE, Op.ADD, Mode.UNARY, count=count, inner=lanes)) if count > 1 else (scale,)


@dataclass(frozen=True)
class Staging:
    """DM of a tile's keys and scales."""

    keys: SSAValue
    scales: SSAValue


def staging(em: Emitter, packed: Packed, rows: int, k: int) -> Staging:
    """Room for `rows` rows a slice of `k` columns at most."""
    return Staging(em.alloc(rows * k // 2, "keys"), em.alloc(rows * packed.pitch * 4, "scales"))


def clear(em: Emitter, place: Staging, packed: Packed, rows: int, k: int) -> None:
    """Zero keys and scales: slices without channels take part with zeros."""
    em.memset(place.keys, 0, rows * k // 2)
    em.memset(place.scales, 0, rows * packed.pitch * 4)


def load(
    em: Emitter, packed: Packed, place: Staging, first: int, steps: Sequence[tuple[int, int, int]], k0: int, k: int
) -> None:
    """Bring columns [k0, k0 + k) of a tile's rows to DM.

    steps: loops of (count, rows in HBM, slices in DM as a stride); the innermost counts the rows of a slice.
    """
    start, count = packed.part(k0, k)
    run = round_up(count, 2) * 4
    sides = (
        (packed.keys, place.keys, packed.k // 2, k0 // 2, k // 2),
        (packed.scales, place.scales, packed.pitch * 4, start * 4, run),
    )
    for source, target, pitch, offset, nbytes in sides:
        loops = [(n, rows * pitch, stride) for n, rows, stride in steps[:-1]]
        loops.append((steps[-1][0], pitch, nbytes))
        em.dma(hbm(source, first * pitch + offset), dm(target), loops, nbytes)


def expand(
    em: Emitter, packed: Packed, place: Staging, rows: int, k0: int, k: int, target: SSAValue, slices: int
) -> None:
    """The rows of a tile as bf16 [rows][k], scaled and rounded."""
    _, count = packed.part(k0, k)
    pitch = round_up(count, 2) * 4
    most = max(1, VRF_BYTES // pitch)
    for row in range(0, rows, most):
        held = min(most, rows - row)
        base = em.vrf_space(round_up(held * pitch, 32))
        packet = 8 if held * pitch % 32 == 0 else 4 if held * pitch % 16 == 0 else 2
        em.load_vrf(em.fetch(row * pitch, [(held * pitch // 4, 4)], Dtype.F32, packet), place.scales, base, slices)
        loops = operand_loops([(held, pitch), (count, 4), (k // count, 0)])
        keys = em.fetch(row * k // 2, [(held * k // 2, 1)], Dtype.I8, PACKET, Dtype.F32, lookup=Lookup.I4_F8E4M3)
        em.execute(
            keys,
            place.keys,
            Commit(row * k * 2, ((held * k, 2),), Dtype.BF16, 8),
            target,
            slices=slices,
            vector=[VectorOp(Alu.FP_MUL0, Op.MUL, Mode.STREAM_OPERAND, Operand(Source.VRF, base=base, loops=loops))],
        )
