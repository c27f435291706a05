"""Contractions of activations with weights: two mappings (hardware.md 2.8).

* Few tokens (rows in every slice): `stream_weights.py`, activations in TRF.
* Many tokens (rows spread over slices): `stream_tokens.py`, weights in TRF.

How each is done in detail is a `Mapping`, which the search finds (`search.py`): it lowers candidates with `lower`
functions, which do the same for a trial as for the program.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from xdsl.ir import SSAValue

from backend_rngd.isa.descriptors import Dtype, Space, VectorOp
from backend_rngd.lowering.contract_base import Matrix, Stack, vector_ops
from backend_rngd.lowering.emitter import Emitter
from backend_rngd.lowering.exchange import Exchange, row_dim
from backend_rngd.lowering.expression import ChainOp
from backend_rngd.lowering.gated import Gated, GatedBlocks, Join
from backend_rngd.lowering.group import Group
from backend_rngd.lowering.mapping import (
    BLOCK_BYTES,
    CHANNELS,
    HBM_KNOBS,
    LONG_TILE_BYTES,
    TOKENS_KNOBS,
    WEIGHTS_KNOBS,
    Mapping,
    block_rows,
    fixed_tokens,
    fixed_weights,
    gated_passes,
    most_rows,
    passes_home,
)
from backend_rngd.lowering.program import IN_FLIGHT
from backend_rngd.lowering.rows_home import StackHome, best_stack
from backend_rngd.lowering.scales import Scales
from backend_rngd.lowering.scatter import TokenScatter
from backend_rngd.lowering.search import Alone, Search, Shape, StandIns
from backend_rngd.lowering.stream_tokens import Sink, TokensStream
from backend_rngd.lowering.stream_weights import WeightsStream
from backend_rngd.lowering.summed import SumHome
from backend_rngd.lowering.tensor import Dim, RowSpace, Tensor

R = TypeVar("R")


class ContractLowering:
    """Lowers `x[rows, K] . w[N, K] -> y[rows, N]`."""

    def __init__(self, em: Emitter, spill: int, in_flight: int = IN_FLIGHT, search: Search | None = None) -> None:
        """in_flight: tiles of weights in DM at a time, at most. search: chooses mappings; without it they are fixed."""
        self.few = WeightsStream(em, spill)
        self.many = TokensStream(em, spill)
        self.em = em
        self.spill = spill
        self.in_flight = in_flight
        self.search = search
        self.arriving: set[SSAValue] = set()  # operands that other units send in parts of K, while passes begin

    def run(
        self,
        x: Tensor,
        w: Matrix,
        dims: Sequence[Dim],
        dtype: Dtype,
        epilogue: Sequence[ChainOp] = (),
        output: SSAValue | None = None,
        target: Callable[[Space, int], SSAValue] | None = None,
        scales: Scales | None = None,
        ends: bool = False,
    ) -> Tensor:
        """`x` has K contiguous features; `dims` are the result's (feature dims row-major over N).

        output: an HBM buffer that receives the result as a program output, channel-major for few tokens.
        target: gives the buffer of the result (memory, bytes) instead of a local one. scales: factors of the result.
        ends: no contraction follows in the routine.
        """
        rows, vector, factors = x.rows, vector_ops(epilogue), scales or Scales()
        assert rows is not None
        local, knobs = rows.local, WEIGHTS_KNOBS if rows.replicated else TOKENS_KNOBS
        if not rows.replicated and x.space == Space.HBM and factors.tokens is None:
            local = block_rows(rows.local, w.pitch, BLOCK_BYTES)
        if rows.replicated:
            fixed = fixed_weights(local, w.rows, w.pitch, self.em.slices, self.in_flight, self.em.machine, ends)
        else:
            passes = passes_home(local * rows.slices, dtype.bytes)
            fixed = fixed_tokens(passes, self.in_flight, local, w.pitch, self.em.machine)

        def lower(to: ContractLowering, x: Tensor, ws: Sequence[Matrix], factors: Scales, m: Mapping) -> Tensor:
            engine = to.few if m.streams == "weights" else to.many
            engine.target, engine.scales = target if to is self else None, factors
            out = output if to is self or output is None else StandIns(to.em)(output, "output")
            result = engine.run(x, ws[0], fewer(dims, ws), dtype, vector, out, m)
            engine.target, engine.scales = None, Scales()
            return result

        spilled = self.few.spills(rows, w.rows * dtype.bytes)
        kind = f"{dtype.name} {'HBM' if spilled else 'DM'} {output is not None} {vector}"
        blocks = rows.local // local
        knobs = (*knobs, *(HBM_KNOBS if blocks > 1 else ()))
        return self._mapped(x, [w], factors, kind, fixed, knobs, lower, -1 if spilled else 1 << 30, blocks)

    def _mapped(
        self,
        x: Tensor,
        matrices: Sequence[Matrix],
        scales: Scales,
        result: str,
        fixed: Mapping,
        knobs: tuple[str, ...],
        lower: Callable[[ContractLowering, Tensor, Sequence[Matrix], Scales, Mapping], R],
        spill: int,
        blocks: int = 1,
    ) -> R:
        """Lower as the search says.

        result: what becomes of the result, as far as its time depends on it. fixed: the mapping without a search.
        spill: bytes of a value from which on it lies in HBM, for trials. blocks: in which the tokens are multiplied; of
        several matrices only stacks are tried with all channels.
        """
        rows, em, w = x.rows, self.em, matrices[0]
        assert rows is not None
        if self.search is None:  # of a trial
            return lower(self, x, matrices, scales, fixed)
        idle: set[str] = set()  # knobs that change nothing
        if x.buffer in self.arriving or (rows.replicated and 2 * w.pitch <= fixed.k_bytes):
            idle.add("k_bytes")
        if all(m.rows % (em.slices * CHANNELS) == 0 for m in matrices):
            idle.add("small_rings")
        knobs = tuple(k for k in knobs if k not in idle)
        alike = all(m.rows == w.rows for m in matrices)
        short = most_rows(w.rows, w.pitch, blocks * len(matrices), fixed, em.slices) if alike else w.rows
        tokens = rows.local if rows.replicated else rows.physical
        heights = " + ".join(str(m.rows) for m in matrices)
        shape = Shape(
            f"[{tokens} x {w.k}] . [{heights if len(matrices) == 1 else f'({heights})'} x {w.k}]",
            f"{x.space.name} {x.dtype.name} {rows} {x.base % em.machine.dma_request_bytes} {x.pitch} {x.block}",
            f"{result} {scales.kinds}",
            f"{heights} {w.k} {w.dtype.name} {w.packed is not None}",
            em.early_bytes,
            fixed,
            knobs,
            w.rows / short,
        )

        def attempt(trial: Emitter, m: Mapping) -> SSAValue:
            stand_in = StandIns(trial)
            mine, parts = stand_in(x), [stand_in(part, "weight") for part in matrices]
            if alike:
                parts = [replace(part, rows=short) for part in parts]
            lower(ContractLowering(trial, spill), mine, parts, stand_in(scales, "weight"), m)
            return mine.buffer

        m = self.search.best(shape, sum(m.rows * m.pitch for m in matrices), em.location, attempt)
        return lower(self, x, matrices, scales, m)

    def _stream(
        self,
        x: Tensor,
        matrices: Sequence[Matrix],
        dtype: Dtype,
        vector: Sequence[VectorOp],
        factors: Scales,
        sink: Sink,
        m: Mapping,
    ) -> None:
        """Hand the results of contractions of many tokens, scaled, to a sink."""
        self.many.scales = factors
        self.many.stream(x, [Stack(tuple(matrices))], dtype, vector, sink, m)
        self.many.scales = Scales()

    def _exchange(self, like: Exchange) -> Exchange:
        """`like`, or in a trial one with nobody behind it."""
        if like.em is self.em:
            return like
        units = Alone(self.em.machine, like.group.units)
        return Exchange(Group(units, self.em, "trial", False), self.em, like.spill)

    def scatter(
        self,
        x: Tensor,
        w: Matrix,
        dims: Sequence[Dim],
        dtype: Dtype,
        epilogue: Sequence[ChainOp],
        scales: Scales | None,
        exchange: Exchange,
        mine: RowSpace,
        where: str,
    ) -> Tensor:
        """The own tokens `mine` of the sum of the results over all units, for many tokens in DM (`scatter.py`)."""
        assert x.rows is not None
        vector = vector_ops(epilogue)

        def lower(to: ContractLowering, x: Tensor, ws: Sequence[Matrix], factors: Scales, m: Mapping) -> Tensor:
            assert x.rows is not None
            own = [row_dim(d, mine) for d in fewer(dims, ws)]
            sink = TokenScatter(to._exchange(exchange), x.rows, to.many.result(own, dtype, mine, ws[0].rows), where)
            to._stream(x, ws, dtype, vector, factors, sink, m)
            sink.finish()
            return sink.result

        kind = f"{dtype.name} scattered over {exchange.group.units} {vector}"
        fixed = fixed_tokens(TokenScatter.limit, self.in_flight, x.rows.local, w.pitch, self.em.machine)
        return self._mapped(x, [w], scales or Scales(), kind, fixed, TOKENS_KNOBS, lower, 1 << 30)

    def summed(
        self,
        x: Tensor,
        w: Matrix,
        dims: Sequence[Dim],
        dtype: Dtype,
        epilogue: Sequence[ChainOp],
        scales: Scales | None,
        exchange: Exchange,
        share: int,
        where: str,
    ) -> Tensor:
        """The sum of the results over all units of the card, for many tokens in DM (`summed.py`)."""
        assert x.rows is not None
        vector = vector_ops(epilogue)

        def lower(to: ContractLowering, x: Tensor, ws: Sequence[Matrix], factors: Scales, m: Mapping) -> Tensor:
            assert x.rows is not None
            result = to.many.result(fewer(dims, ws), dtype, x.rows, ws[0].rows)
            sink = SumHome(to._exchange(exchange), result, share, where)
            to._stream(x, ws, dtype, vector, factors, sink, m)
            return sink.result

        kind = f"{dtype.name} summed over {exchange.group.units} {share} {vector}"
        passes = passes_home(x.rows.physical, dtype.bytes)
        fixed = fixed_tokens(passes, self.in_flight, x.rows.local, w.pitch, self.em.machine)
        return self._mapped(x, [w], scales or Scales(), kind, fixed, TOKENS_KNOBS, lower, 1 << 30)

    def gated(
        self,
        x: Tensor,
        matrices: Sequence[Matrix],
        dims: Sequence[Dim],
        join: Join,
        result: Dtype,
        blocks: bool,
        expression: str,
    ) -> Tensor:
        """`join` of the results [rows, N] of contractions of `x` with matrices of one shape (`gated.py`). blocks: the
        result may have blocks of features. expression: what `join` computes."""
        assert x.rows is not None
        height = matrices[0].rows
        blocks = blocks and len(matrices) == 2 and GatedBlocks.suits(x.rows, height, result, self.spill, self.em)

        def lower(to: ContractLowering, x: Tensor, ws: Sequence[Matrix], _: Scales, m: Mapping) -> Tensor:
            assert x.rows is not None
            if blocks:
                out = GatedBlocks.result_of(to.em, fewer(dims, ws), result, x.rows, ws[0].rows)
                to.many.stream(x, [Stack(tuple(ws), True)], Dtype.F32, (), GatedBlocks(to.em, out, join), m)
                return out
            out = to.many.result(fewer(dims, ws), result, x.rows, ws[0].rows)
            sink = Gated(to.em, len(ws), Dtype.BF16, out, join)
            to.many.stream(x, [Stack((w,)) for w in ws], Dtype.BF16, (), sink, m)
            return out

        kind = f"{result.name} of {expression}, {'in blocks' if blocks else 'in rows'}"
        passes = GatedBlocks.limit if blocks else gated_passes(x.rows.local)
        fixed = fixed_tokens(passes, self.in_flight, x.rows.local, matrices[0].pitch, self.em.machine)
        spill = -1 if self.many.spills(x.rows, height * result.bytes) else 1 << 30
        return self._mapped(x, matrices, Scales(), kind, fixed, TOKENS_KNOBS, lower, spill)

    def best_stack(self, x: Tensor, matrices: Sequence[Matrix]) -> tuple[int, ...]:
        """Which contractions of `x` should share their passes."""
        assert x.rows is not None
        if x.rows.replicated:
            alike = [i for i, m in enumerate(matrices) if m.rows == matrices[0].rows][:2]
            return tuple(alike) if len(alike) == 2 and self.few.alternates(x, [matrices[i] for i in alike]) else ()
        return best_stack(matrices, self.em.slices, x.rows.local, self.em.machine)

    def stacked(
        self, x: Tensor, matrices: Sequence[Matrix], dims: Sequence[Sequence[Dim]], dtype: Dtype
    ) -> list[Tensor]:
        """The results [rows, N] of contractions of `x` with several matrices; `dims` of each."""
        assert x.rows is not None
        local, kind = x.rows.local, f"{dtype.name} stacked {self.spill}"
        if x.rows.replicated:  # in one pass: there is nothing to choose
            fixed = fixed_weights(local, matrices[0].rows, matrices[0].pitch, self.em.slices, 1, self.em.machine)

            def few(to: ContractLowering, x: Tensor, ws: Sequence[Matrix], _: Scales, m: Mapping) -> list[Tensor]:
                return to.few.stacked(x, ws, dims, dtype)

            return self._mapped(x, matrices, Scales(), kind, fixed, (), few, self.spill)

        def lower(to: ContractLowering, x: Tensor, ws: Sequence[Matrix], _: Scales, m: Mapping) -> list[Tensor]:
            assert x.rows is not None
            placed = [fewer(d, [w]) for d, w in zip(dims, ws, strict=True)]
            results = to.many.results(placed, dtype, x.rows, [w.rows for w in ws])
            stack = Stack(tuple(ws))
            to.many.stream(x, [stack], dtype, (), StackHome(to.em, stack, results), m)
            return results

        knobs = tuple(k for k in TOKENS_KNOBS if k != "passes")
        pitch = matrices[0].pitch  # a transfer a matrix: the longer
        fixed = fixed_tokens(StackHome.limit, self.in_flight, local, pitch, self.em.machine, LONG_TILE_BYTES)
        return self._mapped(x, matrices, Scales(), kind, fixed, knobs, lower, self.spill)


def fewer(dims: Sequence[Dim], matrices: Sequence[Matrix]) -> tuple[Dim, ...]:
    """Dimensions of a result whose matrix was shortened for a trial; those of the program stay as they are."""
    width = 1
    for d in dims:
        width *= d.size if d.kind == "feature" else 1
    if width <= matrices[0].rows:
        return tuple(dims)
    return (*(d for d in dims if d.kind != "feature"), Dim("feature", matrices[0].rows))
