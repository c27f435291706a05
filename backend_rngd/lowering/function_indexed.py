"""Operations of a `tc` function that look things up: gathers, cache updates, attention."""

from __future__ import annotations

from dataclasses import replace

from xdsl.ir import SSAValue

from backend_rngd.isa.descriptors import Dtype, Space
from backend_rngd.lowering.attention import AttentionLowering
from backend_rngd.lowering.attention_types import AttentionParams, Cache
from backend_rngd.lowering.contract_base import N_MULTIPLE, k_multiple
from backend_rngd.lowering.function_base import FunctionBase
from backend_rngd.lowering.indexed import as_keys, embedding, offsets, one_token, token_lengths, write_cache
from backend_rngd.lowering.move import load_rows
from backend_rngd.lowering.tensor import Dim, RowSpace, Tensor, round_up
from backend_rngd.lowering.values import Stored, Weight, product
from ir import expr as ex
from ir.dialects import tc
from ir.errors import UnsupportedError
from ir.types import shape_of


class Indexed(FunctionBase):
    """Lowers gathers, cache updates and attention."""

    def _offsets(self, value: SSAValue, scale: int) -> SSAValue:
        key = (value, scale)
        if key not in self.offset_images:
            index = self.tensor(value)
            made = self.parent.input_offsets(self.em, index, scale) if self.group.repeated else None
            self.offset_images[key] = made or offsets(self.em, self.vector, self.in_dm(value), scale)
        return self.offset_images[key]

    def op_tc_gather(self, op: tc.GatherOp) -> None:
        """Embedding rows, or one token a batch row."""
        rule = op.rule()
        table, index = self.env[op.operands[0]], self.tensor(op.operands[1])
        gathered = next(a for a in rule.inputs[0] if a not in rule.output)
        shape = shape_of(op.results[0])
        by_index = {a: d for a, d in zip(rule.inputs[1], index.dims, strict=True)}
        dims = [
            by_index[a] if a in by_index else (Dim("feature", n) if n > 1 else Dim("one", 1))
            for a, n in zip(rule.output, shape, strict=True)
        ]
        assert index.rows is not None
        if isinstance(table, Weight):
            side = list(rule.inputs[0])
            columns = [side.index(a) for a in rule.output if a in side]
            multiple = k_multiple(product(table.sizes[c] for c in columns))
            buffer, _, width = table.matrix([side.index(gathered)], columns, (N_MULTIPLE, multiple))
            row = round_up(width, multiple) * table.dtype.bytes
            at = self._offsets(op.operands[1], row)
            self.env[op.results[0]] = embedding(self.em, buffer, row, at, index.rows, dims, table.dtype, self.spill)
            return
        x = self.tensor(op.operands[0])
        if x.dims[list(rule.inputs[0]).index(gathered)].kind not in ("length", "one"):
            raise UnsupportedError(
                f"gather `{rule}` of activations", "only one token a batch row is gathered", "see docs/status.md"
            )
        if x.rows is not None and x.rows.length == 1:
            kept = [x.dims[rule.inputs[0].index(a)] for a in rule.output]
            self.env[op.results[0]] = Tensor(x.buffer, x.space, x.dtype, tuple(kept), index.rows, x.base, x.pitch)
            return
        self.env[op.results[0]] = one_token(self.em, self.vector, x, self.in_dm(op.operands[1]), dims)

    def op_tc_kv_update(self, op: tc.KvUpdateOp) -> None:
        """A scatter into the cache, in place."""
        cache = self.env[op.operands[0]]
        if not isinstance(cache, Stored):
            raise UnsupportedError(
                "kv_update of an activation", "caches are inputs of the program", "pass it as an argument"
            )
        if any(u.operation is not op and u.operation.parent is op.parent for u in op.operands[0].uses):
            raise UnsupportedError(
                "a cache that is read after it was updated", "updates are in place", "read the result"
            )
        new = self.tensor(op.operands[1])
        if new.dims[3].kind == "feature" and new.dims[3].stride != new.dtype.bytes:
            new = self.copy(new)
        view = self._cache(cache)
        at = self._offsets(op.operands[2], view.width * 2)
        if new.space == Space.DM:
            write_cache(self.em, new, view, at)
        else:
            for head in range(new.dims[1].size):  # a scatter reads DM
                part = new.slice(1, head, 1)
                assert part is not None
                assert new.rows is not None
                write_cache(self.em, load_rows(self.em, part, new.rows.local), view, at, head)
        self.env[op.results[0]] = Stored(cache.buffer, cache.shape)

    def _cache(self, c: Stored) -> Cache:
        _, heads, keys, width = c.shape
        head = self.parent.options.cache_capacity * width * 2
        return Cache(c.buffer, heads * head, head, keys, width)

    def op_tc_attention(self, op: tc.AttentionOp) -> None:
        """Scores, softmax and weighted sum, see `attention.py`."""
        q = self.tensor(op.q)
        k, v = self.env[op.k], self.env[op.v]
        assert q.rows is not None
        for name, extra in (("bias", op.bias), ("sinks", op.sinks)):
            if extra is not None:
                raise UnsupportedError(f"attention with {name}", "it is not lowered yet", "see docs/status.md")
        causal = bool(op.causal.value.data)
        keys = self._cache(k) if isinstance(k, Stored) else as_keys(self.em, self._keys(op.k))
        values = self._cache(v) if isinstance(v, Stored) else as_keys(self.em, self._keys(op.v))
        if op.keys is not None:
            keys, values = replace(keys, keys=op.key_count), replace(values, keys=op.key_count)
        heads = shape_of(op.q)[1]
        kv_heads = shape_of(op.k)[1]
        params = AttentionParams(
            float(op.scale.value.data),
            causal,
            int(op.window.value.data),
            float(op.softcap.value.data),
            heads // kv_heads,
            kv_heads,
        )
        limit = self._limit(op, q.rows, causal)
        attention = AttentionLowering(self.em, self.parent, self.spill, self.parent.units)
        if q.dims[3].kind == "feature" and q.dims[3].stride != 2:
            q = self.copy(q)
        self.env[op.results[0]] = attention.run(q, keys, values, limit, params)

    def _keys(self, value: SSAValue) -> Tensor:
        t = self.tensor(value)
        return self.copy(t) if t.dims[3].stride != t.dtype.bytes else t

    def _limit(self, op: tc.AttentionOp, rows: RowSpace, causal: bool) -> Tensor:
        """f32 per token: the last visible key (its position if causal, else length - 1)."""
        if causal and op.lengths is not None:
            raise UnsupportedError("causal attention with lengths", "one bound a token is lowered", "drop the lengths")
        source = op.positions if causal else op.lengths
        if source is None:
            raise UnsupportedError("full attention without lengths", "padding would be seen", "pass lengths")
        key = (source, causal, rows)
        if key not in self.limits:
            before = self.parent.input_limits(self.em, self.tensor(source)) if causal and self.group.repeated else None
            if before is not None:
                self.limits[key] = before
                return before
            if causal:
                t, e = self.in_dm(source), ex.Input(0)
            else:
                t, e = token_lengths(self.em, self.tensor(source), rows), ex.Call("add", (ex.Input(0), ex.Const(-1.0)))
            names = [f"d{i}" for i in range(len(t.dims))]
            self.limits[key] = self.vector.map(e, [t], [names], names, Dtype.F32)
        return self.limits[key]
