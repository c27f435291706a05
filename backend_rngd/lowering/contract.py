"""Contractions of activations with weights: two mappings (hardware.md 2.8).

* Few tokens (rows in every slice): `stream_weights.py`, activations in TRF.
* Many tokens (rows spread over slices): `stream_tokens.py`, weights in TRF.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from xdsl.ir import SSAValue

from backend_rngd.isa.descriptors import Dtype, Space
from backend_rngd.lowering.contract_base import Matrix, Stack, vector_ops
from backend_rngd.lowering.emitter import Emitter
from backend_rngd.lowering.exchange import Exchange, row_dim
from backend_rngd.lowering.expression import ChainOp
from backend_rngd.lowering.gated import Gated, GatedBlocks, Join
from backend_rngd.lowering.mapping import (
    BLOCK_BYTES,
    LONG_TILE_BYTES,
    Mapping,
    block_rows,
    fixed_tokens,
    fixed_weights,
    gated_passes,
    passes_home,
)
from backend_rngd.lowering.program import IN_FLIGHT
from backend_rngd.lowering.scales import Scales
from backend_rngd.lowering.scatter import TokenScatter
from backend_rngd.lowering.stream_tokens import StackHome, TokensStream, best_stack
from backend_rngd.lowering.stream_weights import WeightsStream
from backend_rngd.lowering.summed import SumHome
from backend_rngd.lowering.tensor import Dim, RowSpace, Tensor


class ContractLowering:
    """Lowers `x[rows, K] . w[N, K] -> y[rows, N]`."""

    def __init__(self, em: Emitter, spill: int, in_flight: int = IN_FLIGHT) -> None:
        self.few = WeightsStream(em, spill)
        self.many = TokensStream(em, spill)
        self.in_flight = in_flight  # tiles of weights in DM at a time

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
        assert x.rows is not None
        engine = self.few if x.rows.replicated else self.many
        engine.target, engine.scales = target, scales or Scales()
        result = engine.run(x, w, dims, dtype, vector_ops(epilogue), output, self._fixed(x, w, dtype, ends))
        engine.target, engine.scales = None, Scales()
        return result

    def _fixed(self, x: Tensor, w: Matrix, dtype: Dtype, ends: bool) -> Mapping:
        """The mapping of a contraction whose results go home."""
        rows, machine = x.rows, self.few.em.machine
        assert rows is not None
        if rows.replicated:
            return fixed_weights(rows.local, w.rows, w.pitch, self.few.em.slices, self.in_flight, machine, ends)
        whole = x.space == Space.DM or self.many.scales.tokens is not None
        local = rows.local if whole else block_rows(rows.local, w.pitch, BLOCK_BYTES)
        return self._passes(passes_home(local * rows.slices, dtype.bytes), local)

    def _passes(self, passes: int, local: int) -> Mapping:
        """The mapping of many tokens, `local` of them a slice, with groups of so many passes."""
        return fixed_tokens(passes, self.in_flight, local)

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
    ) -> Tensor:
        """The own tokens `mine` of the sum of the results over all units, for many tokens in DM (`scatter.py`)."""
        assert x.rows is not None
        own = [row_dim(d, mine) for d in dims]
        sink = TokenScatter(exchange, x.rows, self.many.result(own, dtype, mine, w.rows))
        self.many.scales = scales or Scales()
        self.many.stream(x, [Stack((w,))], dtype, vector_ops(epilogue), sink, self._passes(sink.limit, x.rows.local))
        self.many.scales = Scales()
        sink.finish()
        return sink.result

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
    ) -> Tensor:
        """The sum of the results over all units of the card, for many tokens in DM (`summed.py`)."""
        assert x.rows is not None
        sink = SumHome(exchange, self.many.result(dims, dtype, x.rows, w.rows), share)
        passes = passes_home(x.rows.physical, dtype.bytes)
        self.many.scales = scales or Scales()
        self.many.stream(x, [Stack((w,))], dtype, vector_ops(epilogue), sink, self._passes(passes, x.rows.local))
        self.many.scales = Scales()
        return sink.result

    def gated(
        self, x: Tensor, matrices: Sequence[Matrix], dims: Sequence[Dim], join: Join, result: Dtype, blocks: bool
    ) -> Tensor:
        """`join` of the results [rows, N] of contractions of `x` with matrices of one shape (`gated.py`). blocks: the
        result may have blocks of features."""
        assert x.rows is not None
        em, height = self.many.em, matrices[0].rows
        if blocks and len(matrices) == 2 and GatedBlocks.suits(x.rows, height, result, self.many.spill, em):
            out = GatedBlocks.result_of(em, tuple(dims), result, x.rows, height)
            joined = GatedBlocks(em, out, join)
            mapping = self._passes(joined.limit, x.rows.local)
            self.many.stream(x, [Stack(tuple(matrices), True)], Dtype.F32, (), joined, mapping)
            return out
        out = self.many.result(dims, result, x.rows, height)
        dtype = Dtype.BF16
        sink = Gated(em, len(matrices), dtype, out, join)
        mapping = self._passes(gated_passes(x.rows.local), x.rows.local)
        self.many.stream(x, [Stack((m,)) for m in matrices], dtype, (), sink, mapping)
        return out

    def best_stack(self, x: Tensor, matrices: Sequence[Matrix]) -> tuple[int, ...]:
        """Which contractions of `x` should share their passes."""
        assert x.rows is not None
        if x.rows.replicated:
            alike = [i for i, m in enumerate(matrices) if m.rows == matrices[0].rows][:2]
            return tuple(alike) if len(alike) == 2 and self.few.alternates(x, [matrices[i] for i in alike]) else ()
        return best_stack(matrices, self.many.em.slices, x.rows.local, self.many.em.machine)

    def stacked(
        self, x: Tensor, matrices: Sequence[Matrix], dims: Sequence[Sequence[Dim]], dtype: Dtype
    ) -> list[Tensor]:
        """The results [rows, N] of contractions of `x` with several matrices; `dims` of each."""
        assert x.rows is not None
        if x.rows.replicated:
            return self.few.stacked(x, matrices, dims, dtype)
        results = self.many.results(dims, dtype, x.rows, [m.rows for m in matrices])
        stack = Stack(tuple(matrices))
        sink = StackHome(self.many.em, stack, results)
        mapping = fixed_tokens(sink.limit, self.in_flight, x.rows.local, LONG_TILE_BYTES)  # a transfer a matrix
        self.many.stream(x, [stack], dtype, (), sink, mapping)
        return results
