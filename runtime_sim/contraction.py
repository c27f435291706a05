"""The contraction engine as one (batched) matrix product.

The time digits, the columns of the packet reducer, the lanes and the slices are sorted into batch, row (only the stream
varies), column (only TRF varies) and summed axes. Slices whose stream is the same (after a full broadcast) become
columns; slices whose TRF is the same become rows: 64 small products turn into one big one. Products are exact in f32
(bf16 and f8 operands), sums are f32 in the order of the BLAS library (hardware.md 2.8: hardware sums in a tree).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backend_rngd.isa.descriptors import BROADCAST, FLIT_BYTES, REDUCE, Contract, Dtype, LaneMode
from runtime_sim.errors import SimulationError
from runtime_sim.memory import RowMemory
from runtime_sim.nest import Nest, Source, illegal
from runtime_sim.numeric import SCRATCH, STORAGE, widen
from runtime_sim.views import Footprint, Loops, extent, nd, sizes_of, split, strides_of
from runtime_sim.workers import cpus, parallel, run_all

Array = NDArray[Any]
PARALLEL_ELEMENTS = 1 << 19  # stream elements from which blocks go to threads
PARALLEL_FLOPS = 1e8
BLOCK_ELEMENTS = 1 << 17  # stream elements widened at a time, so that they are still in cache for the product


@dataclass(frozen=True)
class _Axis:
    """One logical axis: loops over the stream, loops over TRF (empty: does not vary), size."""

    size: int
    stream: Loops | None
    trf: Loops | None
    summed: bool = False


class Contraction:
    """Executes one contraction; `output` is the packet width of the result, `packets` their number."""

    def __init__(self, contract: Contract, source: Source, trf: RowMemory) -> None:
        if source.pair:
            raise illegal("contraction of an interleaved stream", "fetch the two tensors in two passes")
        if source.cast is not None or source.dtype in (Dtype.F32, Dtype.I32):
            raise illegal(f"contraction of a {source.dtype.name} stream", "operands are bf16, f8 or i8")
        if contract.lanes not in (1, 2, 4, 8) or contract.pack not in (1, 2):
            raise illegal(f"{contract.lanes} lanes (1, 2, 4 or 8), packets of {contract.pack} flits (1 or 2)")
        self.dtype = source.dtype
        self.integer = source.dtype in (Dtype.I8, Dtype.I16)
        self.result = Dtype.I32 if self.integer else Dtype.F32
        self.slices = source.slices
        self.trf = trf
        width = self.dtype.bytes
        packet = contract.pack * FLIT_BYTES // width
        keep = 1 << contract.depth
        read = contract.trf_read
        if keep > packet or read < 1 or packet % read or read & (read - 1):
            raise illegal(f"packet of {packet}: depth {contract.depth}, TRF read {read}")
        self.columns = packet // keep
        self.nest, fill = _padded(source)
        self._fills = [f for f in (source.fill, fill) if f is not None]
        stream_digits = [n for n, _, flags in contract.loops if not flags & BROADCAST]
        if math.prod(stream_digits) * packet != self.nest.elements:
            raise illegal(
                f"digits {stream_digits} enumerate {math.prod(stream_digits)} packets of {packet} elements, the stream "
                f"has {self.nest.elements} elements"
            )
        lane_bytes = trf.row_bytes // contract.lanes
        inner = [(packet // read, read // keep, keep), (read // keep, keep)] if read >= keep else None
        trf_loops = [(n, s) for n, s, _ in contract.loops]
        low, high = extent(contract.trf_base, trf_loops, read * width)
        if low < 0 or high > lane_bytes:
            what = f"contraction reads TRF bytes [{low}, {high}) of {lane_bytes} in a lane of {contract.lanes}"
            raise SimulationError(SimulationError.BOUNDS, what)
        self.trf_footprints = tuple(
            Footprint.of(contract.trf_base + lane * lane_bytes, trf_loops, read * width)
            for lane in range(contract.lanes)
        )
        self.trf_base = contract.trf_base
        self._axes(contract, packet, keep, read, stream_digits, width, lane_bytes, inner is not None)
        kept = math.prod(n for n, _, flags in contract.loops if not flags & REDUCE)
        if contract.mode is LaneMode.INTERLEAVED:
            self.packet, self.packets = contract.lanes, kept * self.columns
        else:
            self.packet = min(8, self.columns)
            self.packets = kept * contract.lanes * self.columns // self.packet
        self._variants: dict[tuple[bool, bool], Callable[[], Array]] = {}
        self._uniform: tuple[int, bool] = (-1, False)

    def _axes(
        self,
        contract: Contract,
        packet: int,
        keep: int,
        read: int,
        digits: list[int],
        width: int,
        lane_bytes: int,
        wide: bool,
    ) -> None:
        """Fill `output` (kept axes in output order) and `summed`."""
        inner = [packet // read, read // keep, keep] if wide else [packet // keep, keep // read, read]
        groups = split(self.nest.loops, [*digits, *inner])
        if groups is None:
            self.nest, fill = self.nest.linear()
            self._fills.append(fill)
            groups = split(self.nest.loops, [*digits, *inner])
            assert groups is not None
        streams = iter(groups[: len(digits)])
        output: list[_Axis] = []
        summed: list[_Axis] = []
        for n, stride, flags in contract.loops:
            stream = None if flags & BROADCAST else next(streams)
            axis = _Axis(n, stream, ((n, stride),) if stride else None, bool(flags & REDUCE))
            (summed if axis.summed else output).append(axis)
        a, b, c = groups[len(digits) :]
        lane = _Axis(contract.lanes, None, ((contract.lanes, lane_bytes),))
        if wide:
            columns = [_Axis(inner[0], a, None), _Axis(inner[1], b, ((inner[1], keep * width),))]
            summed += [_Axis(inner[2], c, ((inner[2], width),), True)]
        else:
            columns = [_Axis(inner[0], a, None)]
            summed += [_Axis(inner[1], b, None, True), _Axis(inner[2], c, ((inner[2], width),), True)]
        order = [*columns, lane] if contract.mode is LaneMode.INTERLEAVED else [lane, *columns]
        self.output = [x for x in (*output, *order) if x.size > 1]
        self.summed = [x for x in summed if x.size > 1]

    def run(self) -> Array:
        """Result [A, B, C, elements] in output order; a slice axis has size 1 where all slices agree."""
        for fill in self._fills:
            fill()
        trf_uniform = self._trf_uniform()
        key = (trf_uniform, not trf_uniform and self._stream_uniform())
        variant = self._variants.get(key)
        if variant is None:
            variant = self._variants[key] = self._build(*key)
        return variant()

    def _stream_uniform(self) -> bool:
        """Whether all slices see the same stream although each has its own."""
        if math.prod(self.nest.lead) == 1:
            return False
        view = self.nest.view()
        first = view[:1, :1, :1]
        return bool((view[-1:, -1:, -1:] == first).all()) and bool((view == first).all())

    def _trf_uniform(self) -> bool:
        if self._uniform[0] != self.trf.version:
            grid = self.trf.grid[: math.prod(self.slices)]
            same = True
            for footprint in self.trf_footprints:
                low, high = extent(footprint.base, footprint.loops, footprint.run)
                part = grid[:, low:high]
                same = same and bool((part[-1] == part[0]).all()) and bool((part[1:] == part[0]).all())
            self._uniform = (self.trf.version, same)
        return self._uniform[1]

    def _build(self, trf_uniform: bool, stream_uniform: bool) -> Callable[[], Array]:
        nest, trf = self.nest, self.trf
        slice_strides = (self.slices[1] * self.slices[2] * trf.pitch, self.slices[2] * trf.pitch, trf.pitch)
        lead: list[_Axis] = []
        for size, stride, have, row in zip(self.slices, nest.lead_strides, nest.lead, slice_strides, strict=True):
            in_stream = have > 1 and not stream_uniform
            in_trf = size > 1 and not trf_uniform
            lead.append(
                _Axis(
                    size if in_stream or in_trf else 1,
                    ((size, stride),) if in_stream else None,
                    ((size, row),) if in_trf else None,
                )
            )
        axes = [*lead, *self.output]
        batch = [i for i, x in enumerate(axes) if x.stream is not None and x.trf is not None]
        rows = [i for i, x in enumerate(axes) if x.stream is not None and x.trf is None]
        columns = [i for i, x in enumerate(axes) if x.stream is None and (x.trf is not None or x.size > 1)]
        neither = [i for i, x in enumerate(axes) if x.stream is None and x.trf is None and x.size == 1]

        def stream_loops(index: list[int]) -> list[tuple[int, int]]:
            return [entry for i in index for entry in (axes[i].stream or ())]

        def trf_loops(index: list[int]) -> list[tuple[int, int]]:
            return [entry for i in index for entry in (axes[i].trf or ((axes[i].size, 0),))]

        stream_sum = [entry for x in self.summed for entry in (x.stream if x.stream is not None else ((x.size, 0),))]
        trf_sum = [entry for x in self.summed for entry in (x.trf or ((x.size, 0),))]
        storage = STORAGE[self.dtype]
        x_loops = (*stream_loops(batch), *stream_loops(rows), *stream_sum)
        w_loops = (*trf_loops(batch), *trf_loops(columns), *trf_sum)
        x_view = nd(nest.memory, storage, nest.base, sizes_of(x_loops), strides_of(x_loops))
        w_view = nd(trf.bytes, storage, self.trf_base, sizes_of(w_loops), strides_of(w_loops))
        size = {
            "b": math.prod(axes[i].size for i in batch),
            "m": math.prod(axes[i].size for i in rows),
            "n": math.prod(axes[i].size for i in columns),
            "k": math.prod(x.size for x in self.summed),
        }
        placed = [*batch, *rows, *columns, *neither]
        shape = [axes[i].size for i in placed]
        back = np.argsort(placed).tolist()
        leading = tuple(x.size for x in lead)

        product = _Product(x_view, w_view, self.dtype, self.integer, size["b"], size["m"], size["n"], size["k"])

        def run() -> Array:
            logical = product.run().reshape(shape).transpose(back)
            if logical.flags.c_contiguous:
                return logical.reshape(*leading, -1)
            ordered = SCRATCH.take("ordered", logical.shape, logical.dtype)
            ordered[...] = logical
            return ordered.reshape(*leading, -1)

        return run


class _Product:
    """x [b, m, k] times the transpose of w [b, n, k], both strided views of stored elements."""

    def __init__(
        self, x: Array, w: Array, dtype: Dtype, integer: bool, batch: int, rows: int, columns: int, depth: int
    ) -> None:
        self.x, self.w, self.dtype, self.integer = x, w, dtype, integer
        self.batch, self.rows, self.columns, self.depth = batch, rows, columns, depth
        self.kind = np.dtype(np.float64 if integer else np.float32)  # i8 sums stay exact in f64
        # Blocks are cut from the outermost axis of x, which is a batch axis if there is one and a row axis otherwise.
        self.first = x.shape[0] if x.ndim and (batch > 1 or rows > 1) else 1
        self.big = x.size >= PARALLEL_ELEMENTS or 2 * batch * rows * columns * depth >= PARALLEL_FLOPS
        blocks = max(-(-x.size // BLOCK_ELEMENTS), 2 * cpus() if self.big else 1)
        self.step = max(1, self.first // blocks)

    def run(self) -> Array:
        """f32 [b, m, n], or i32 that wraps."""
        w = self._widened("w", self.w).reshape(self.batch, self.columns, self.depth)
        repeated = self.columns > 1 and self.batch == 1 and self.columns <= 8 and bool((w[0, 1:] == w[0, :1]).all())
        if repeated:
            w = w[:, :1]
        out = SCRATCH.take("product", (self.batch, self.rows, w.shape[1]), self.kind)
        parts = range(0, self.first, self.step)
        if self.big and len(parts) > 1 and parallel():
            run_all(lambda start: self._block(start, w, out), parts)
        else:
            for start in parts:
                self._block(start, w, out)
        if repeated:
            out = np.repeat(out, self.columns, axis=2)
        return out.astype(np.int64).astype(np.int32) if self.integer else out

    def _block(self, start: int, w: Array, out: Array) -> None:
        """Widen and multiply part of the outermost axis of x."""
        part = self.x[start : start + self.step] if self.first > 1 else self.x
        x = self._widened("x", part)
        if self.batch > 1:
            share = self.batch // self.first
            lines = slice(start * share, (start + self.step) * share)
            self._multiply(x.reshape(-1, self.rows, self.depth), w[lines], out[lines])
        else:
            share = self.rows // self.first
            lines = slice(start * share, (start + self.step) * share)
            self._multiply(x.reshape(1, -1, self.depth), w, out[:, lines])

    @staticmethod
    def _multiply(x: Array, w: Array, out: Array) -> None:
        if len(x) == 1:
            np.matmul(x[0], w[0].T, out=out[0])
        else:
            np.matmul(x, w.swapaxes(1, 2), out=out)

    def _widened(self, slot: str, view: Array) -> Array:
        out = SCRATCH.take(slot, view.shape, self.kind)
        if self.integer:
            out[...] = view
        else:
            widen(view, self.dtype, out)
        return out


def _padded(source: Source) -> tuple[Nest, Callable[[], None] | None]:
    """The stream in whole flits: short packets are padded with zeros in a scratch copy (hardware.md 2.7)."""
    nest = source.nests[0]
    flit = FLIT_BYTES // source.dtype.bytes
    if source.packet % flit == 0:
        return nest, None
    flits = -(-source.packet // flit) * flit
    scratch = np.zeros((*nest.lead, source.packets, flits), STORAGE[source.dtype])
    view, target = nest.view(), scratch[..., : source.packet]

    def fill() -> None:
        target[...] = view.reshape(target.shape)

    loops = ((source.packets * flits, source.dtype.bytes),)
    a, b, c = scratch.strides[:3]
    return Nest(scratch.reshape(-1).view(np.uint8), source.dtype, 0, nest.lead, (a, b, c), loops), fill
