"""Contractions of activations with weights: two mappings (hardware.md 2.8, design "Two mappings worth knowing").

* Few tokens (rows in every slice): activations stay in TRF, one token a lane; weights stream from DM, output channels
  spread over slices. A pass yields `[channel][lane]` in each slice; a ring broadcast brings it back to every slice.
* Many tokens (rows spread over slices): weights stay in TRF, 16 output channels a slice (8 lanes x TimeBroadcast 2);
  every slice's tokens reach all slices through the switch ring. 64 ring positions x 2 are the 128 accumulator slots of
  the time reducer, so K accumulates inside the engine. A pass yields `[token][16 channels]` in each slice; a transfer
  brings tokens back to their slices.

Weights are `[N][K]` in HBM, K contiguous, N padded to 64 and K to a packet with zeros by the loader.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from xdsl.ir import SSAValue

from backend_rngd.isa.descriptors import (
    BROADCAST,
    DM_SLICE_STRIDE,
    REDUCE,
    Alu,
    Commit,
    Contract,
    Dtype,
    LaneMode,
    Mode,
    Op,
    Operand,
    Source,
    Space,
    Switch,
    SwitchKind,
    VectorOp,
)
from backend_rngd.lowering.emitter import Emitter, dm, hbm
from backend_rngd.lowering.expression import ChainOp, DoesNotFitError, Scheduler
from backend_rngd.lowering.move import ring_broadcast, ring_packet
from backend_rngd.lowering.tensor import Dim, Tensor, feature_dims, round_up
from ir import expr as ex

N_MULTIPLE = 64  # output channels are padded so that every tile fills whole slices
TILE_BYTES = 96 * 1024  # one weight tile a slice; two are in flight, activations need the rest of 512 KB
TRF_CHANNELS = 16  # 8 lanes x TimeBroadcast 2: each 64 B packet serves two cycles (hardware.md 2.8 supply limit)
TRF_K = 1024  # half a TRF: 2 channels x 1024 bf16 a lane, the other half loads meanwhile


def k_multiple(k: int) -> int:
    """Padding of K: a full 64 B packet (32 bf16) where K allows it, else one flit (16)."""
    return 32 if k % 32 == 0 else 16


@dataclass(frozen=True)
class Matrix:
    """A weight in HBM: `rows` x `k` (padded) bf16."""

    buffer: SSAValue
    rows: int
    k: int

    @property
    def pitch(self) -> int:
        """Bytes of a row."""
        return self.k * 2


@dataclass(frozen=True)
class Tile:
    """Output channels [start, start + slices * per_slice): `per_slice` in each of `slices` slices."""

    start: int
    per_slice: int
    slices: int


def epilogue_ops(e: ex.Expr | None) -> list[ChainOp] | None:
    """The chain of an expression of the contraction's result and numbers, if it fits one pass after it."""
    if e is None:
        return []
    try:
        steps = Scheduler(e, lambda _: False, lambda _a, _b: True).run()
    except DoesNotFitError:
        return None
    if len(steps) != 1 or steps[0].second is not None or steps[0].stash_input or steps[0].rounded:
        return None
    return steps[0].ops


def _vector(ops: Sequence[ChainOp]) -> tuple[VectorOp, ...]:
    out: list[VectorOp] = []
    for op in ops:
        operand = Operand(Source.CONST, op.arg.value) if op.arg.kind == "const" else Operand()
        out.append(VectorOp(op.alu, op.op, op.mode, operand))
    return tuple(out)


class ContractLowering:
    """Lowers `x[rows, K] . w[N, K] -> y[rows, N]`."""

    def __init__(self, em: Emitter, spill: int) -> None:
        self.em = em
        self.spill = spill
        self.half = 0

    # Entry ------------------------------------------------------------
    def run(
        self,
        x: Tensor,
        w: Matrix,
        dims: Sequence[Dim],
        dtype: Dtype,
        epilogue: Sequence[ChainOp] = (),
        output: SSAValue | None = None,
    ) -> Tensor:
        """`x` has K contiguous features; `dims` are the result's (feature dims row-major over N).

        output: an HBM buffer that receives the result as a program output, channel-major for few tokens.
        """
        assert x.rows is not None
        if x.rows.replicated:
            return self._stream_weights(x, w, dims, dtype, _vector(epilogue), output)
        return self._stream_tokens(x, w, dims, dtype, _vector(epilogue), output)

    def _next_half(self, lane_bytes: int, used: int) -> int:
        """TRF base inside a lane: alternating halves when the operand fits half a lane."""
        if used > lane_bytes // 2:
            return 0
        self.half ^= 1
        return self.half * (lane_bytes // 2)

    def _result(self, dims: Sequence[Dim], dtype: Dtype, x: Tensor, width: int) -> Tensor:
        """A compact result with rows of at least `width` channels, in DM or, if large, in HBM."""
        assert x.rows is not None
        strides, pitch = feature_dims([d.size for d in dims if d.kind == "feature"], dtype.bytes)
        pitch = max(pitch, round_up(width, 32) * dtype.bytes)
        out: list[Dim] = []
        position = 0
        for d in dims:
            if d.kind == "feature":
                out.append(Dim("feature", d.size, strides[position]))
                position += 1
            else:
                out.append(d)
        if x.rows.local * pitch > self.spill:
            return Tensor(
                self.em.alloc(x.rows.physical * pitch, space="hbm"), Space.HBM, dtype, tuple(out), x.rows, 0, pitch
            )
        return Tensor(self.em.alloc(x.rows.local * pitch), Space.DM, dtype, tuple(out), x.rows, 0, pitch)

    def _load_weights(self, w: Matrix, tile: Tile, k0: int, k: int, buffer: SSAValue) -> None:
        self.em.dma(
            hbm(w.buffer, tile.start * w.pitch + k0 * 2),
            dm(buffer),
            [(tile.slices, tile.per_slice * w.pitch, DM_SLICE_STRIDE), (tile.per_slice, w.pitch, k * 2)],
            k * 2,
        )

    def _accumulate(
        self, acc: SSAValue, part: SSAValue, target: SSAValue, count: int, dtype: Dtype, vector: tuple[VectorOp, ...]
    ) -> None:
        """target = acc + part over `count` f32 elements a slice."""
        packet = 8 if count % 8 == 0 else 4
        add = VectorOp(Alu.FP_FMA, Op.ADD, Mode.ZIP01)
        shifted = tuple(op for op in vector)
        if any(op.alu == Alu.FP_FMA for op in shifted):
            raise AssertionError("an epilogue over a split K is applied by a pass of its own")
        self.em.execute(
            self.em.fetch(0, [(count, 4)], Dtype.F32, packet, None, (0, [4])),
            acc,
            Commit(0, ((count, dtype.bytes),), dtype, packet),
            target,
            second=part,
            vector=(add, *shifted),
        )

    # Few tokens ------------------------------------------------------------
    def _stream_weights(
        self,
        x: Tensor,
        w: Matrix,
        dims: Sequence[Dim],
        dtype: Dtype,
        vector: tuple[VectorOp, ...],
        output: SSAValue | None,
    ) -> Tensor:
        em = self.em
        assert x.rows is not None
        local = x.rows.local
        lanes = max(4, local)
        lane_bytes = em.machine.trf_bytes_per_slice // lanes
        packet = k_multiple(w.k)
        chunks = split_k(w.k, lane_bytes // 2, packet)
        widest = max(k for _, k in chunks)
        tiles = column_tiles(w.rows, max(4, TILE_BYTES // (widest * 2) // 4 * 4), em.slices)
        largest = max(t.per_slice for t in tiles)
        buffers = [em.alloc(largest * widest * 2, "weights") for _ in range(min(2, len(tiles) * len(chunks)))]
        split = len(chunks) > 1
        own_epilogue = split and any(op.alu == Alu.FP_FMA for op in vector)
        result_ops = () if own_epilogue else vector
        parts = [[em.alloc(t.per_slice * lanes * 4, "partial") for t in tiles] for _ in range(2)] if split else []
        finals = [em.alloc(t.per_slice * lanes * (4 if own_epilogue else dtype.bytes), "channels") for t in tiles]
        for i, t in enumerate(tiles):
            if t.slices < em.slices:  # the ring and the sums read every slice, also those without channels
                for buffer, width in ((finals[i], 4 if own_epilogue else dtype.bytes), *((p[i], 4) for p in parts)):
                    em.memset(buffer, 0, t.per_slice * lanes * width)
        jobs = [(c, t) for c in range(len(chunks)) for t in range(len(tiles))]
        self._load_weights(w, tiles[0], *chunks[0], buffers[0])
        base = 0
        for i, (c, t) in enumerate(jobs):
            if i + 1 < len(jobs):
                nc, nt = jobs[i + 1]
                self._load_weights(w, tiles[nt], *chunks[nc], buffers[(i + 1) % 2])
            k0, k = chunks[c]
            if t == 0:
                base = self._next_half(lane_bytes, k * 2)
                self._tokens_to_trf(x, k0, k, lanes, base)
            tile, last = tiles[t], c == len(chunks) - 1
            where = finals[t] if not split else parts[0 if c == 0 else 1][t]
            self._weights_pass(
                buffers[i % 2],
                tile,
                k,
                packet,
                lanes,
                base,
                where,
                dtype if not split else Dtype.F32,
                vector if not split else (),
            )
            count = tile.per_slice * lanes
            if split and c > 0:
                self._accumulate(
                    parts[0][t],
                    parts[1][t],
                    finals[t] if last else parts[0][t],
                    count,
                    (Dtype.F32 if own_epilogue else dtype) if last else Dtype.F32,
                    result_ops if last else (),
                )
        if own_epilogue:
            finals = [self._apply(f, t.per_slice * lanes, dtype, vector) for f, t in zip(finals, tiles, strict=True)]
        if output is not None:
            for tile, final in zip(tiles, finals, strict=True):
                run = tile.per_slice * lanes * dtype.bytes
                em.dma(
                    dm(final), hbm(output, tile.start * lanes * dtype.bytes), [(tile.slices, DM_SLICE_STRIDE, run)], run
                )
            return Tensor(output, Space.HBM, dtype, _channel_major(dims, lanes * dtype.bytes), x.rows, 0, dtype.bytes)
        width = max(t.start + em.slices * t.per_slice for t in tiles)
        result = self._result(dims, dtype, x, width)
        for tile, final in zip(tiles, finals, strict=True):
            self._spread(final, tile, lanes, local, dtype, result)
        return result

    def _apply(self, source: SSAValue, count: int, dtype: Dtype, vector: tuple[VectorOp, ...]) -> SSAValue:
        target = self.em.alloc(count * dtype.bytes, "channels")
        packet = 8 if count % 8 == 0 else 4
        self.em.execute(
            self.em.fetch(0, [(count, 4)], Dtype.F32, packet),
            source,
            Commit(0, ((count, dtype.bytes),), dtype, packet),
            target,
            vector=vector,
        )
        return target

    def _tokens_to_trf(self, x: Tensor, k0: int, k: int, lanes: int, base: int) -> None:
        """TRF lane l holds token l (tokens repeat when there are fewer than lanes)."""
        assert x.rows is not None
        source, offset, pitch = x.buffer, x.base + k0 * 2, x.pitch
        if x.space == Space.HBM:
            source = self.em.alloc(x.rows.local * k * 2, "tokens")
            self.em.dma(
                hbm(x.buffer, offset),
                dm(source),
                [(self.em.slices, 0, DM_SLICE_STRIDE), (x.rows.local, x.pitch, k * 2)],
                k * 2,
            )
            offset, pitch = 0, k * 2
        loops = [(lanes // x.rows.local, 0), (x.rows.local, pitch), (k, 2)]
        self.em.load_trf(self.em.fetch(offset, loops, Dtype.BF16, 16), source, lanes, base, context="main")

    def _weights_pass(
        self,
        weights: SSAValue,
        tile: Tile,
        k: int,
        packet: int,
        lanes: int,
        base: int,
        target: SSAValue,
        dtype: Dtype,
        vector: tuple[VectorOp, ...],
    ) -> None:
        self.em.execute(
            self.em.fetch(0, [(tile.per_slice, k * 2), (k, 2)], Dtype.BF16, packet),
            weights,
            Commit(0, ((tile.per_slice, lanes * dtype.bytes), (lanes, dtype.bytes)), dtype, lanes),
            target,
            slices=tile.slices,
            contract=Contract(
                lanes,
                packet // 16,
                base,
                ((tile.per_slice, 0, 0), (k // packet, packet * 2, REDUCE)),
                packet,
                packet.bit_length() - 1,
                LaneMode.INTERLEAVED,
            ),
            vector=vector,
        )

    def _spread(self, channels: SSAValue, tile: Tile, lanes: int, local: int, dtype: Dtype, result: Tensor) -> None:
        """`[channel][lane]` of every slice to rows of all channels in every slice."""
        em, width = self.em, dtype.bytes
        target, base, pitch = result.buffer, result.base + tile.start * width, result.pitch
        spilled = result.space == Space.HBM
        if spilled:
            pitch = em.slices * tile.per_slice * width
            target, base = em.alloc(local * pitch, "rows"), 0
        flit = 32 // width
        packet = ring_packet(tile.per_slice, flit)
        ring_broadcast(
            em,
            channels,
            [(local, width), (tile.per_slice, lanes * width)],
            dtype,
            packet,
            0,
            em.slices,
            target,
            base,
            [(local, pitch), (tile.per_slice // packet, packet * width)],
            tile.per_slice * width,
            [(packet, width)],
            min(packet, flit),
        )
        if spilled:
            run = tile.slices * tile.per_slice * width
            em.dma(
                dm(target), hbm(result.buffer, result.base + tile.start * width), [(local, pitch, result.pitch)], run
            )

    # Many tokens ------------------------------------------------------------
    def _stream_tokens(
        self,
        x: Tensor,
        w: Matrix,
        dims: Sequence[Dim],
        dtype: Dtype,
        vector: tuple[VectorOp, ...],
        output: SSAValue | None,
    ) -> Tensor:
        em = self.em
        assert x.rows is not None
        packet = k_multiple(w.k)
        chunks = split_k(w.k, TRF_K, packet)
        widest = max(k for _, k in chunks)
        tiles = trf_tiles(w.rows, em.slices)
        rows = x.rows.physical
        if output is not None:
            strides, pitch = feature_dims([d.size for d in dims if d.kind == "feature"], dtype.bytes)
            out_dims = list(dims)
            for i, s in zip([i for i, d in enumerate(dims) if d.kind == "feature"], strides, strict=True):
                out_dims[i] = Dim("feature", dims[i].size, s)
            result = Tensor(output, Space.HBM, dtype, tuple(out_dims), x.rows, 0, max(pitch, w.rows * dtype.bytes))
        else:
            result = self._result(dims, dtype, x, w.rows)
        buffers = [em.alloc(TRF_CHANNELS * widest * 2, "weights") for _ in range(2)]
        split = len(chunks) > 1
        own_epilogue = split and any(op.alu == Alu.FP_FMA for op in vector)
        out_bytes = TRF_CHANNELS * rows * dtype.bytes
        finals = [em.alloc(out_bytes, "channels") for _ in range(min(2, len(tiles)))]
        # Tokens in HBM are brought in one K chunk at a time for all tiles; otherwise a tile finishes before the next.
        resident = x.space == Space.DM
        jobs = (
            [(c, t) for t in range(len(tiles)) for c in range(len(chunks))]
            if resident
            else [(c, t) for c in range(len(chunks)) for t in range(len(tiles))]
        )
        live = 1 if resident else len(tiles)
        acc = [em.alloc(TRF_CHANNELS * rows * 4, "partial") for _ in range(live)] if split else []
        part = em.alloc(TRF_CHANNELS * rows * 4, "partial") if split else None
        if tiles[-1].slices < em.slices:  # slices without channels take part in the ring with zero weights
            for buffer in buffers:
                em.memset(buffer, 0, TRF_CHANNELS * widest * 2)
        self._load_weights(w, tiles[jobs[0][1]], *chunks[jobs[0][0]], buffers[0])
        tokens, loaded = x, -1
        for i, (c, t) in enumerate(jobs):
            if i + 1 < len(jobs):
                nc, nt = jobs[i + 1]
                self._load_weights(w, tiles[nt], *chunks[nc], buffers[(i + 1) % 2])
            (k0, k), tile, last = chunks[c], tiles[t], c == len(chunks) - 1
            if not resident and loaded != c:
                tokens, loaded = self._tokens_chunk(x, k0, k), c
            base = self._next_half(em.machine.trf_bytes_per_slice // 8, 2 * k * 2)
            em.load_trf(em.fetch(0, [(8, k * 2), (2, 8 * k * 2), (k, 2)], Dtype.BF16, 16), buffers[i % 2], 8, base)
            final = finals[t % len(finals)]
            mine = acc[0 if resident else t] if split else None
            where = final if not split else (mine if c == 0 else part)
            assert where is not None
            self._tokens_pass(
                tokens,
                0 if not resident else k0,
                k,
                packet,
                base,
                where,
                dtype if not split else Dtype.F32,
                vector if not split else (),
            )
            if split and c > 0:
                assert mine is not None
                assert part is not None
                done = last and not own_epilogue
                self._accumulate(
                    mine,
                    part,
                    final if done else mine,
                    rows * TRF_CHANNELS,
                    dtype if done else Dtype.F32,
                    vector if done else (),
                )
                if last and own_epilogue:
                    final = self._apply(mine, rows * TRF_CHANNELS, dtype, vector)
            if last:
                self._rows_home(final, tile, result)
        return result

    def _tokens_chunk(self, x: Tensor, k0: int, k: int) -> Tensor:
        assert x.rows is not None
        buffer = self.em.alloc(x.rows.local * k * 2, "tokens")
        self.em.dma(
            hbm(x.buffer, x.base + k0 * 2),
            dm(buffer),
            [(self.em.slices, x.rows.local * x.pitch, DM_SLICE_STRIDE), (x.rows.local, x.pitch, k * 2)],
            k * 2,
        )
        return Tensor(buffer, Space.DM, x.dtype, (), x.rows, 0, k * 2)

    def _tokens_pass(
        self,
        x: Tensor,
        k0: int,
        k: int,
        packet: int,
        base: int,
        target: SSAValue,
        dtype: Dtype,
        vector: tuple[VectorOp, ...],
    ) -> None:
        em = self.em
        assert x.rows is not None
        local, ring, width = x.rows.local, em.slices, dtype.bytes
        row = TRF_CHANNELS * width
        em.execute(
            em.fetch(x.base + k0 * 2, [(local, x.pitch), (k, 2)], Dtype.BF16, packet),
            x.buffer,
            Commit(0, ((local, ring * row), (ring, row), (TRF_CHANNELS, width)), dtype, 8),
            target,
            switch=Switch(SwitchKind.BROADCAST01, 1, ring, local * (k // packet)),
            contract=Contract(
                8,
                packet // 16,
                base,
                ((local, 0, 0), (k // packet, packet * 2, REDUCE), (ring, 0, 0), (2, k * 2, BROADCAST)),
                packet,
                packet.bit_length() - 1,
                LaneMode.INTERLEAVED,
            ),
            vector=vector,
        )

    def _rows_home(self, channels: SSAValue, tile: Tile, result: Tensor) -> None:
        """`[local row][slice][16]` of every slice to rows on their own slices (and on to HBM for a spilled result)."""
        em = self.em
        assert result.rows is not None
        width, local = result.dtype.bytes, result.rows.local
        run = TRF_CHANNELS * width
        target, base, pitch = result.buffer, result.base + tile.start * width, result.pitch
        spilled = result.space == Space.HBM
        if spilled:
            pitch = tile.slices * run
            target, base = em.alloc(local * pitch, "rows"), 0
        em.dma(
            dm(channels),
            dm(target, base),
            [(tile.slices, DM_SLICE_STRIDE, run), (em.slices, run, DM_SLICE_STRIDE), (local, em.slices * run, pitch)],
            run,
        )
        if spilled:
            em.dma(
                dm(target),
                hbm(result.buffer, result.base + tile.start * width),
                [(em.slices, DM_SLICE_STRIDE, local * result.pitch), (local, pitch, result.pitch)],
                tile.slices * run,
            )


def _channel_major(dims: Sequence[Dim], element: int) -> tuple[Dim, ...]:
    """Feature strides of a `[channel][lane]` image."""
    out: list[Dim] = []
    stride = element
    for d in reversed(dims):
        if d.kind == "feature":
            out.append(Dim("feature", d.size, stride))
            stride *= d.size
        else:
            out.append(d)
    return tuple(reversed(out))


def split_k(k: int, limit: int, multiple: int) -> list[tuple[int, int]]:
    """Equal chunks (start, size) of K, each at most `limit` and a multiple of `multiple`."""
    count = -(-k // limit)
    size = round_up(-(-k // count), multiple)
    return [(start, min(size, k - start)) for start in range(0, k, size)]


def column_tiles(rows: int, per_slice: int, slices: int) -> list[Tile]:
    """Tiles of `slices * per_slice` channels and a last one whose channels fill whole slices.

    rows is a multiple of 64; per_slice a multiple of 4.
    """
    tiles: list[Tile] = []
    start, width = 0, slices * per_slice
    while rows - start >= width:
        tiles.append(Tile(start, per_slice, slices))
        start += width
    rest = rows - start
    if rest:
        size = next(d for d in range(-(-rest // slices), rest + 1) if d % 4 == 0 and rest % d == 0)
        tiles.append(Tile(start, size, rest // size))
    return tiles


def trf_tiles(rows: int, slices: int) -> list[Tile]:
    """Tiles of 16 channels a slice."""
    width = slices * TRF_CHANNELS
    return [Tile(start, TRF_CHANNELS, min(slices, (rows - start) // TRF_CHANNELS)) for start in range(0, rows, width)]
