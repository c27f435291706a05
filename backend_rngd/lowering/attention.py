"""Attention over K and V in HBM: scores, mask, softmax and the weighted sum, all inside a slice.

Rows of a slice are (token, query head of one KV head). Few tokens a batch row: every (batch row, KV head) pair has
slices of its own (`attention_few.py`). Many tokens: they stay on their slices and the KV heads are walked one after the
other (`attention_many.py`). What happens inside a slice is in `attention_head.py`.
"""

from __future__ import annotations

from dataclasses import replace

from xdsl.ir import Operation

from backend_rngd.isa.descriptors import Commit, Dtype, Space
from backend_rngd.lowering.attention_few import FewTokens
from backend_rngd.lowering.attention_many import ManyTokens
from backend_rngd.lowering.attention_types import AttentionParams, Cache, Host
from backend_rngd.lowering.emitter import Emitter
from backend_rngd.lowering.move import load_rows
from backend_rngd.lowering.search import tell_attention
from backend_rngd.lowering.tensor import Dim, Tensor, feature_dims
from ir.errors import UnsupportedError


class AttentionLowering:
    """Lowers one attention op."""

    def __init__(self, em: Emitter, host: Host, spill: int, units: int) -> None:
        """spill: bytes a slice from which on a value lies in HBM. units: that do the same."""
        self.units = units
        self.em = em
        self.host = host
        self.spill = spill

    def run(self, q: Tensor, k: Cache, v: Cache, limit: Tensor, p: AttentionParams) -> Tensor:
        """q `b h s d`; limit: f32 per token (8 B apart); result `b s h e` with heads and values contiguous."""
        if k.width % 4 or v.width % 4:
            raise UnsupportedError(
                f"attention heads of {k.width} and {v.width} values",
                "a DMA writes multiples of 8 B (4 bf16)",
                "use a model whose head size is a multiple of 4",
            )
        if q.dims[3].kind == "feature" and q.dims[3].stride != 2:
            raise UnsupportedError(
                "queries whose head values are not contiguous", "packets read 32 of them", "copy them first"
            )
        rows = q.rows
        assert rows is not None
        few, before = rows.replicated or rows.length == 1, self.em.block.last_op
        if k.padded != k.width and (q.space == Space.DM or few):
            q = self._pad_heads(q if q.space == Space.DM else load_rows(self.em, q, rows.local), rows.local, k.padded)
        if few:
            mapped = FewTokens(self.em, p, self.host, self.spill)
            result = mapped.run(q, k, v, limit, lambda: self._output(q, v, p))
            self._tell(before, q, k, p, mapped.way, "fixed: few tokens a batch row find room beside each other")
            return result

        def queries(head: int, first: int, count: int) -> Tensor:
            at = q.base + first * q.pitch
            if q.space == Space.DM:
                return q.with_dims(q.dims, at + head * p.group * q.dims[1].stride)
            part = q.slice(1, head * p.group, p.group)
            assert part is not None
            loaded = load_rows(self.em, replace(part, base=part.base + first * q.pitch), count)
            return loaded if k.padded == k.width else self._pad_heads(loaded, count, k.padded)

        many = ManyTokens(self.em, p, self.host)
        result = many.run(queries, k, v, limit, self._output(q, v, p), not p.causal)
        self._tell(before, q, k, p, many.way, "fixed: so many tokens lie on slices, and K and V are the smaller part")
        return result

    def _tell(self, before: Operation | None, q: Tensor, k: Cache, p: AttentionParams, way: str, why: str) -> None:
        rows = q.rows
        assert rows is not None
        what = f"{rows.batch} x {rows.length} tokens, {p.kv_heads} x {p.group} heads, {k.keys} keys"
        tell_attention(self.em, before, self.units, what, way, why)

    def _pad_heads(self, q: Tensor, rows: int, padded: int) -> Tensor:
        """`rows` rows of q with zeros behind every head, so that contraction packets are whole flits."""
        em = self.em
        heads, width = q.dims[1].size, q.dims[3].size
        pitch = heads * padded * 2
        buffer = em.alloc(rows * pitch, "queries")
        em.memset(buffer, 0, rows * pitch)
        em.execute(
            em.fetch(q.base, [(rows, q.pitch), (heads, q.dims[1].stride), (width, 2)], Dtype.BF16, 4),
            q.buffer,
            Commit(0, ((rows, pitch), (heads, padded * 2), (width, 2)), Dtype.BF16, 4),
            buffer,
        )
        dims = (q.dims[0], Dim("feature", heads, padded * 2), q.dims[2], Dim("feature", padded, 2))
        return Tensor(buffer, Space.DM, q.dtype, dims, q.rows, 0, pitch)

    def _output(self, q: Tensor, v: Cache, p: AttentionParams) -> Tensor:
        rows = q.rows
        assert rows is not None
        heads = p.kv_heads * p.group
        strides, pitch = feature_dims([heads, v.width], 2)
        dims = (
            q.dims[0],
            q.dims[2],
            Dim("feature", heads, strides[0]) if heads > 1 else Dim("one", 1),
            Dim("feature", v.width, strides[1]),
        )
        if rows.local * pitch > self.spill:
            buffer = self.em.alloc(rows.physical * pitch, "attention", "hbm")
            return Tensor(buffer, Space.HBM, Dtype.BF16, dims, rows, 0, pitch)
        return Tensor(self.em.alloc(rows.local * pitch), Space.DM, Dtype.BF16, dims, rows, 0, pitch)
