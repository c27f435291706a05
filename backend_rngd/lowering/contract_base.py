"""What both contraction mappings share: weights as matrices, K chunks, epilogues, TRF halves, results.

Weights are `[N][K]` in HBM, K contiguous, N padded to 64 and K to a packet with zeros by the loader.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from xdsl.ir import SSAValue

from backend_rngd.isa.descriptors import Alu, Commit, Dtype, Mode, Op, Operand, Source, Space, VectorOp
from backend_rngd.lowering.emitter import Emitter
from backend_rngd.lowering.expression import ChainOp, DoesNotFitError, Scheduler
from backend_rngd.lowering.packed import Packed
from backend_rngd.lowering.scales import TO_FLOAT, Scales
from backend_rngd.lowering.tensor import Dim, RowSpace, Tensor, feature_dims, round_up
from ir import expr as ex

N_MULTIPLE = 64  # output channels are padded so that every tile fills whole slices


def k_multiple(k: int, width: int = 2) -> int:
    """Padding of K, elements of `width` bytes: a full 64 B packet (32 bf16) where K allows it, else one flit (16)."""
    packet = 64 // width
    return packet if k % packet == 0 else packet // 2


@dataclass(frozen=True)
class Matrix:
    """A weight in HBM: `rows` x `k` (padded) elements that the engine multiplies. `packed`: it is stored in 4 bits, and
    a tile becomes such elements in DM."""

    buffer: SSAValue
    rows: int
    k: int
    dtype: Dtype = Dtype.BF16
    packed: Packed | None = None

    @property
    def pitch(self) -> int:
        """Bytes of a row."""
        return self.k * self.dtype.bytes

    @property
    def raised(self) -> tuple[VectorOp, ...]:
        """What makes the engine's sums f32: those of integers are i32."""
        return (TO_FLOAT,) if self.dtype == Dtype.I8 else ()


@dataclass(frozen=True)
class Stack:
    """Matrices of equal K one below the other: contractions of the same tokens in the same passes.

    interleaved: matrices of one shape; a slice has as many channels of each in a pass, and they are the same ones.
    """

    parts: tuple[Matrix, ...]
    interleaved: bool = False

    @property
    def rows(self) -> int:
        """Rows of all parts."""
        return sum(m.rows for m in self.parts)

    @property
    def like(self) -> Matrix:
        """What all parts have in common but their rows."""
        return self.parts[0]

    def cut(self, start: int, count: int) -> list[tuple[int, int, int, int]]:
        """Rows [start, start + count) by part: (part, first row in it, rows, rows of the range before them)."""
        out: list[tuple[int, int, int, int]] = []
        top = 0
        for i, m in enumerate(self.parts):
            low, high = max(start, top), min(start + count, top + m.rows)
            if low < high:
                out.append((i, low - top, high - low, low - start))
            top += m.rows
        return out


def epilogue_ops(e: ex.Expr | None) -> list[ChainOp] | None:
    """The chain of an expression of the contraction's result and numbers, if it fits one pass after it."""
    if e is None:
        return []
    try:
        steps = Scheduler(e, lambda _: False, lambda _: Dtype.F32).run()
    except DoesNotFitError:
        return None
    if len(steps) != 1 or steps[0].second is not None or steps[0].stash_input or steps[0].rounded:
        return None
    return steps[0].ops


def vector_ops(ops: Sequence[ChainOp]) -> tuple[VectorOp, ...]:
    """Instructions of an epilogue; its operands are numbers."""
    out: list[VectorOp] = []
    for op in ops:
        operand = Operand(Source.CONST, op.arg.value) if op.arg.kind == "const" else Operand()
        out.append(VectorOp(op.alu, op.op, op.mode, operand))
    return tuple(out)


def split_k(k: int, limit: int, multiple: int) -> list[tuple[int, int]]:
    """Chunks (start, size) of K, each at most `limit` and a multiple of `multiple`: as many full ones as there are if
    the last is at least half of one, because pieces of round sizes spread best over HBM channels, else equal ones."""
    count = -(-k // limit)
    full = limit % multiple == 0 and 2 * (k - (count - 1) * limit) >= limit
    size = min(k, limit) if full else round_up(-(-k // count), multiple)
    return [(start, min(size, k - start)) for start in range(0, k, size)]


class ContractionMapping:
    """Common part of the two mappings. `half`: the TRF half used last, shared so that loads alternate."""

    def __init__(self, em: Emitter, spill: int) -> None:
        self.em = em
        self.spill = spill
        self.half = 0
        self.target: Callable[[Space, int], SSAValue] | None = None  # where the next result goes instead of a local
        self.scales = Scales()  # of the next result

    def _next_half(self, lane_bytes: int, used: int) -> int:
        """TRF base inside a lane: alternating halves when the operand fits half a lane."""
        if used > lane_bytes // 2:
            return 0
        self.half ^= 1
        return self.half * (lane_bytes // 2)

    def spills(self, rows: RowSpace, pitch: int) -> bool:
        """Whether a value with rows of `pitch` bytes lies in HBM."""
        return rows.local * pitch > self.spill

    def result(self, dims: Sequence[Dim], dtype: Dtype, rows: RowSpace, width: int) -> Tensor:
        """A compact result with rows of at least `width` channels, in DM or, if large, in HBM."""
        out, pitch = placed(dims, dtype)
        pitch = max(pitch, round_up(width, 32) * dtype.bytes)
        space = Space.HBM if rows.local * pitch > self.spill else Space.DM
        nbytes = (rows.physical if space == Space.HBM else rows.local) * pitch
        if self.target is not None:
            buffer = self.target(space, nbytes)
        else:
            buffer = self.em.alloc(nbytes, space=space.name.lower())
        return Tensor(buffer, space, dtype, out, rows, 0, pitch)

    def results(
        self, dims: Sequence[Sequence[Dim]], dtype: Dtype, rows: RowSpace, widths: Sequence[int]
    ) -> list[Tensor]:
        """As `result` for several of as many channels as `widths`: side by side in the same rows if these fit DM."""
        each = [feature_dims([d.size for d in own if d.kind == "feature"], dtype.bytes) for own in dims]
        if rows.local * sum(widths) * dtype.bytes > self.spill or any(
            pitch > width * dtype.bytes for (_, pitch), width in zip(each, widths, strict=True)
        ):
            return [self.result(own, dtype, rows, width) for own, width in zip(dims, widths, strict=True)]
        joint = self.result([Dim("feature", sum(widths))], dtype, rows, sum(widths))
        out: list[Tensor] = []
        for own, (strides, _), start in zip(dims, each, accumulate(widths, initial=0), strict=False):
            left = iter(strides)
            placed = [Dim("feature", d.size, next(left)) if d.kind == "feature" else d for d in own]
            out.append(joint.with_dims(placed, start * dtype.bytes))
        return out

    def _add(
        self,
        acc: SSAValue,
        part: SSAValue,
        count: int,
        commit: Commit,
        target: SSAValue,
        vector: Sequence[VectorOp],
        context: str = "main",
    ) -> None:
        """target = acc + part over `count` f32 elements a slice, then `vector` (which must leave FP_FMA free)."""
        packet = 8 if count % 8 == 0 else 4
        self.em.execute(
            self.em.fetch(0, [(count, 4)], Dtype.F32, packet, None, (0, [4])),
            acc,
            commit,
            target,
            second=part,
            vector=(VectorOp(Alu.FP_FMA, Op.ADD, Mode.ZIP01), *vector),
            context=context,
        )

    def _apply(
        self, source: SSAValue, count: int, commit: Commit, target: SSAValue, vector: Sequence[VectorOp]
    ) -> None:
        """target = vector(source) over `count` f32 elements a slice."""
        packet = 8 if count % 8 == 0 else 4
        self.em.execute(self.em.fetch(0, [(count, 4)], Dtype.F32, packet), source, commit, target, vector=vector)


def placed(dims: Sequence[Dim], dtype: Dtype) -> tuple[tuple[Dim, ...], int]:
    """Dimensions whose features lie row-major, and the bytes of a row."""
    strides, pitch = feature_dims([d.size for d in dims if d.kind == "feature"], dtype.bytes)
    steps = iter(strides)
    return tuple(Dim("feature", d.size, next(steps)) if d.kind == "feature" else d for d in dims), pitch


def compact(count: int, dtype: Dtype, base: int = 0) -> Commit:
    """Commit of `count` consecutive elements a slice."""
    return Commit(base, ((count, dtype.bytes),), dtype, 8 if count % 8 == 0 else 4)


def needs_own_pass(vector: Sequence[VectorOp]) -> bool:
    """Whether an epilogue uses the adder that sums the chunks of a split K."""
    return any(op.alu == Alu.FP_FMA for op in vector)
