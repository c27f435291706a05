"""Contractions of a `tc` function: operands as matrices, epilogues, where the result goes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from typing_extensions import override
from xdsl.ir import SSAValue

from backend_rngd.isa.descriptors import Dtype, Space
from backend_rngd.lowering.contract_base import N_MULTIPLE, Matrix, epilogue_ops, k_multiple
from backend_rngd.lowering.emitter import Emitter
from backend_rngd.lowering.expression import ChainOp
from backend_rngd.lowering.function_base import FunctionBase, location_of
from backend_rngd.lowering.mapping import CHANNELS
from backend_rngd.lowering.packed import bind_packed, packed_weight
from backend_rngd.lowering.pieces import Pieces
from backend_rngd.lowering.scales import Scales, scales_of, scaling
from backend_rngd.lowering.shares import own_rows
from backend_rngd.lowering.summed import token_share
from backend_rngd.lowering.tensor import Dim, RowSpace, Tensor, round_up
from backend_rngd.lowering.values import Weight, dtype_of, product
from backend_rngd.lowering.vector import VectorLowering, Wanted, output_tensor
from ir import expr as ex
from ir.dialects import tc
from ir.errors import UnsupportedError
from ir.types import elem_of, shape_of

MULTIPLIED = (Dtype.BF16, Dtype.I8, Dtype.F8E4M3)  # each with its own kind (hardware.md 2.8)


class Bound(NamedTuple):
    """A contraction `x[rows, K] . matrix[N, K]`; `dims` of the result, whose features have no place yet."""

    x: Tensor
    matrix: Matrix
    dims: list[Dim]


class Contractions(FunctionBase):
    """Lowers contractions with weights."""

    def op_tc_contract(self, op: tc.ContractOp) -> None:
        """Contraction engine, see `contract.py`. A result that the program returns goes straight to its output."""
        if op.result in self.env or self._stacked(op):
            return
        if self._joins(op):
            self.joined[op.result] = op
            return
        final = op.results[0]
        if self._epilogue(op)[1] is not None or self._scales(op) is not None:
            final = next(iter(final.uses)).operation.results[0]
        name = self.output_name(final)
        if name is not None:
            self._contract(op, lambda nbytes: self.em.global_buffer(name, "hbm", nbytes, "output"))
            return
        uses = list(final.uses)
        user = uses[0].operation if len(uses) == 1 else None
        if isinstance(user, tc.AllGatherOp) and self.output_name(user.result) is not None:
            self._contract(op, lambda nbytes: self.collectives.reserve(Space.HBM, nbytes, False))
        elif isinstance(user, tc.AllReduceOp) and user is op.next_op:
            # Nothing lies between the contraction and its all-reduce, so that the buffer is the next phase's.
            self._contract(op, None, lambda space, nbytes: self._reserve(op, space, nbytes))
        else:
            self._contract(op, None)

    def _reserve(self, op: tc.ContractOp, space: Space, nbytes: int) -> SSAValue:
        """The buffer of a contraction whose result the next operation adds over all units."""
        rows = self._rows_of(op)
        features = product(shape_of(op.result)) // (rows.batch * rows.length)
        pitch = nbytes // (rows.physical if space == Space.HBM else rows.local) // dtype_of(op.result).bytes
        padded = self.collectives.needs_padding(features, pitch, rows.replicated)
        return self.collectives.reserve(space, nbytes, not rows.replicated, padded)

    def _rows_of(self, op: tc.ContractOp) -> RowSpace:
        rows = [v.rows for o in op.operands if isinstance(v := self.env[o], (Tensor, Pieces)) and v.rows is not None]
        return rows[0]

    def op_tc_dequantize(self, op: tc.DequantizeOp) -> None:
        """A weight that contractions expand, see `packed.py`."""
        words, scale = self.env[op.packed], self.env[op.scale]
        assert isinstance(words, Weight) and isinstance(scale, Weight)
        n, k = shape_of(op.result)
        self.env[op.result] = packed_weight(words, scale, (n, k))

    @override
    def op_tc_map(self, op: tc.MapOp) -> None:
        """A map that joins contractions of the same tokens runs between them and the way home, see `gated.py`."""
        parts = [self.joined[o] for o in op.operands if o in self.joined]
        if not parts:
            super().op_tc_map(op)
            return
        bound = [self._operands(part) for part in parts]
        dtype = dtype_of(op.results[0])

        def join(em: Emitter, held: list[Tensor]) -> Tensor:
            names = [f"d{i}" for i in range(len(held[0].dims))]
            vector = self.vector if em is self.em else VectorLowering(em, self.spill)
            return vector.map(op.expression(), held, [names] * len(held), names, dtype)

        matrices, blocks = [b.matrix for b in bound], self._reads_blocks(op, bound[0])
        self.env[op.results[0]] = self.contracts.gated(
            bound[0].x, matrices, bound[0].dims, join, dtype, blocks, str(op.expression())
        )

    def _reads_blocks(self, op: tc.MapOp, bound: Bound) -> bool:
        """Whether the only reader of a map is a contraction with a weight over all its channels."""
        uses = list(op.results[0].uses)
        user = uses[0].operation if len(uses) == 1 else None
        if not isinstance(user, tc.ContractOp) or user.lhs is not op.results[0] or elem_of(op.results[0]) != "bf16":
            return False
        axes, weight, width = user.rule().inputs, self.env.get(user.rhs), op.rule().output
        channel = axes[0][-1]
        plain = isinstance(weight, Weight) and weight.packed is None and weight.dtype == Dtype.BF16
        whole = bound.dims[-1].kind == "feature" and bound.dims[-1].size == bound.matrix.rows
        over = [a for a in axes[0] if a in axes[1]] == [channel] and channel not in user.rule().output
        return plain and whole and over and len(width) == len(axes[0]) and bound.matrix.rows % k_multiple(1) == 0

    def _stacked(self, op: tc.ContractOp) -> bool:
        """Compute contractions of the tokens of `op` in common passes, if that is worth it; whether `op` is of them."""
        if not self._many_tokens(op) and not self._few_tokens(op):
            return False
        block = op.parent
        assert block is not None
        alike = [o for o in block.ops if isinstance(o, tc.ContractOp) and self._is_alone(o, op)]
        if len(alike) < 2 or op not in alike:
            return False
        bound = [self._operands(o) for o in alike]
        stack = self.contracts.best_stack(bound[0].x, [b.matrix for b in bound])
        if stack:
            matrices, dims = [bound[i].matrix for i in stack], [bound[i].dims for i in stack]
            results = self.contracts.stacked(bound[0].x, matrices, dims, dtype_of(op.result))
            self.env |= {alike[i].result: r for i, r in zip(stack, results, strict=True)}
        return op.result in self.env

    def _is_alone(self, other: tc.ContractOp, op: tc.ContractOp) -> bool:
        """Whether a contraction reads the tokens of `op` as it does, and nothing rides in its passes or takes its
        results elsewhere."""
        weight = self.env.get(other.rhs)
        plain = isinstance(weight, Weight) and weight.packed is None and weight.dtype == Dtype.BF16
        if not plain or other.lhs is not op.lhs or other.rule() != op.rule() or elem_of(other.result) != "bf16":
            return False
        users = [use.operation for use in other.result.uses]
        elsewhere = any(isinstance(u, (tc.AllReduceOp, tc.AllGatherOp, tc.ReduceScatterOp)) for u in users)
        rides = self._epilogue(other)[1] is not None or self._scales(other) is not None or self._joins(other)
        return not elsewhere and not rides and self.output_name(other.result) is None and other.result not in self.env

    def _joins(self, op: tc.ContractOp) -> bool:
        """Whether a map of nothing but contractions like `op`, which read the same tokens, is its only reader."""
        uses = list(op.result.uses)
        user = uses[0].operation if len(uses) == 1 else None
        if not isinstance(user, tc.MapOp) or len(user.operands) < 2:
            return False
        rule = user.rule()
        for i, value in enumerate(user.operands):
            other = value.owner
            if not isinstance(other, tc.ContractOp) or len(list(value.uses)) != 1 or value.type != op.result.type:
                return False
            weight = self.env.get(other.rhs)
            if other.lhs is not op.lhs or other.rule() != op.rule() or rule.inputs[i] != rule.output:
                return False
            if not isinstance(weight, Weight) or weight.packed is not None or weight.dtype != Dtype.BF16:
                return False
        return self._many_tokens(op) and elem_of(op.result) == "bf16"

    def _many_tokens(self, op: tc.ContractOp) -> bool:
        """Whether the left operand has many tokens in DM, as contractions read them, and the right one the channels."""
        x = self.env[op.lhs]
        if not isinstance(x, Tensor) or x.rows is None or x.rows.replicated or x.space != Space.DM:
            return False
        if x.rows.physical * CHANNELS * Dtype.BF16.bytes > self.spill:
            return False  # a slice holds its channels of all tokens: too many for the map's result to stay in DM
        return self._ready(op, x)

    def _ready(self, op: tc.ContractOp, x: Tensor) -> bool:
        """Whether the features of `x` lie as contractions read them, and the right operand has the channels."""
        (width, stride), *more = [(d.size, d.stride) for d in x.features] or [(0, 0)]
        ready = not more and stride == x.dtype.bytes and width % k_multiple(width) == 0
        return ready and op.rule().output[-1] in op.rule().inputs[1]

    def _few_tokens(self, op: tc.ContractOp) -> bool:
        """Whether the left operand has few tokens, as contractions read them, and the right one the channels."""
        x = self.env[op.lhs]
        x = self.tensor(op.lhs) if isinstance(x, Pieces) else x
        if not isinstance(x, Tensor) or x.rows is None or not x.rows.replicated or x.space != Space.DM:
            return False
        return self._ready(op, x)

    def _contract(
        self,
        op: tc.ContractOp,
        output: Callable[[int], SSAValue] | None,
        target: Callable[[Space, int], SSAValue] | None = None,
    ) -> Tensor:
        x, matrix, dims = self._operands(op)
        dtype = dtype_of(op.results[0])
        ops, final = self._epilogue(op)
        sums, scales = 0, None
        if (scaled := self._scales(op)) is not None:
            final, sums, scales = scaled
        if final is not None:
            dtype = dtype_of(final.results[0])
        produced = (final or op).results[0]
        sink = output(self._output_bytes(x, matrix, dtype)) if output is not None else None
        where = target if self.parent.units > 1 else None
        mine, share = self._scattered_rows(produced, x, matrix, dtype), self._summed_share(produced, x, matrix, dtype)
        reader = location_of(next((use.operation for use in produced.uses), op))
        if share is not None:
            result = self.contracts.summed(x, matrix, dims, dtype, ops, scales, self.collectives, share, reader)
        elif mine is None:
            result = self.contracts.run(x, matrix, dims, dtype, ops, sink, where, scales, not _followed(op))
        else:
            result = self.contracts.scatter(x, matrix, dims, dtype, ops, scales, self.collectives, mine, reader)
        if final is not None:
            final_rule = final.rule()
            result = result.transpose([final_rule.inputs[sums].index(a) for a in final_rule.output])
            self.fused.add(final)
        (self.env if mine is None and share is None else self.scattered)[produced] = result
        if produced is not op.results[0]:
            self.env.pop(op.results[0], None)
        return result

    def _operands(self, op: tc.ContractOp) -> Bound:
        """The operands of a contraction as tokens and a matrix, and the result's dimensions."""
        rule = op.rule()
        left, right = (self.env[o] for o in op.operands)
        sides = list(rule.inputs)
        operands = list(op.operands)
        if isinstance(left, Weight) and not isinstance(right, Weight):
            left, right, sides, operands = right, left, sides[::-1], operands[::-1]
        if not isinstance(right, Weight) or isinstance(left, Weight):
            raise UnsupportedError(
                f"contraction `{rule}` of two activations",
                "only weights can be laid out for the contraction engine",
                "use attention",
            )
        x = self.tensor(operands[0])
        if x.rows is None or x.dtype != right.dtype or x.dtype not in MULTIPLIED:
            raise UnsupportedError(
                f"contraction `{rule}` of {x.dtype.name} and {right.dtype.name}",
                "the contraction engine multiplies two operands of bf16, i8 or f8e4m3",
                "cast the model to bf16",
            )
        k_axes = [a for a in sides[0] if a in sides[1] and a not in rule.output]
        n_axes = [a for a in rule.output if a in sides[1]]
        if any(a in sides[0] for a in n_axes):
            raise UnsupportedError(f"batched contraction `{rule}` with a weight", "no mapping is written", "split it")
        sizes = {
            a: n
            for side, shape in ((sides[0], x.shape), (sides[1], right.sizes))
            for a, n in zip(side, shape, strict=True)
        }
        multiple = k_multiple(product(sizes[a] for a in k_axes), x.dtype.bytes)
        rows, columns = ([sides[1].index(a) for a in axes] for axes in (n_axes, k_axes))
        if right.packed is not None and (rows, columns) == ([0], [1]):
            packed = bind_packed(right)
            matrix = Matrix(packed.keys, round_up(right.shape[0], N_MULTIPLE), packed.k, right.dtype, packed)
        else:
            buffer, n, k = right.matrix(rows, columns, (N_MULTIPLE, multiple))
            matrix = Matrix(buffer, round_up(n, N_MULTIPLE), round_up(k, multiple), right.dtype)
        x = self._contiguous(x, [sides[0].index(a) for a in k_axes], matrix.k)
        by_axis = {a: d for a, d in zip(sides[0], x.dims, strict=True)}
        dims = [
            Dim("feature", sizes[a]) if a in n_axes and sizes[a] > 1 else by_axis.get(a, Dim("one", 1))
            for a in rule.output
        ]
        return Bound(x, matrix, dims)

    def _scattered_rows(self, produced: SSAValue, x: Tensor, w: Matrix, dtype: Dtype) -> RowSpace | None:
        """The own tokens of the reduce-scatter that is the only reader of a contraction's result, if it can run beside
        it."""
        uses = list(produced.uses)
        user = uses[0].operation if len(uses) == 1 else None
        if not isinstance(user, tc.ReduceScatterOp) or x.space != Space.DM or x.rows is None:
            return None
        mine = own_rows(x.rows, self.group)
        return mine if mine is not None and mine.local * w.rows * dtype.bytes <= self.spill else None

    def _summed_share(self, produced: SSAValue, x: Tensor, w: Matrix, dtype: Dtype) -> int | None:
        """The slices whose tokens a unit adds, if the only reader of a contraction's result is an all-reduce that can
        take it where the passes leave it."""
        uses = list(produced.uses)
        user = uses[0].operation if len(uses) == 1 else None
        if not isinstance(user, tc.AllReduceOp) or x.space != Space.DM or x.rows is None or self.group.cards > 1:
            return None
        fits = x.rows.local * w.rows * dtype.bytes <= self.spill
        return token_share(x.rows, self.group.units) if fits and self.group.units > 1 else None

    def _output_bytes(self, x: Tensor, w: Matrix, dtype: Dtype) -> int:
        assert x.rows is not None
        return w.rows * max(4, x.rows.physical) * dtype.bytes

    def _epilogue(self, op: tc.ContractOp) -> tuple[list[ChainOp], tc.MapOp | None]:
        """A single map of the result and numbers rides in the contraction's own pass."""
        uses = list(op.results[0].uses)
        if len(uses) != 1 or not isinstance(uses[0].operation, tc.MapOp) or len(uses[0].operation.operands) != 1:
            return [], None
        user = uses[0].operation
        ops = epilogue_ops(user.expression())
        return (ops, user) if ops is not None else ([], None)

    def _scales(self, op: tc.ContractOp) -> tuple[tc.MapOp, int, Scales] | None:
        """The map of a quantized contraction's scales if it rides behind it, and which of its operands the sums are."""
        scaled = scaling(op)
        if scaled is None:
            return None
        weight = next((i for i, o in enumerate(op.operands) if isinstance(self.env[o], Weight)), None)
        channels = op.rule().inputs[weight] if weight is not None else ()
        channel = next((i for i, a in enumerate(op.rule().output) if a in channels), 0)
        scales = scales_of(*scaled, channel, self._rows_of(op), self.em.slices, self.env, self.tensor)
        return None if scales is None else (*scaled, scales)

    def _contiguous(self, x: Tensor, axes: Sequence[int], padded: int) -> Tensor:
        """x with the K axes contiguous in the given order, zero-padded to `padded` elements."""
        k = product(x.dims[a].size for a in axes)
        stride = x.dtype.bytes
        good = padded == k and x.base % 8 == 0
        for a in reversed(axes):
            d = x.dims[a]
            if d.size > 1:
                good = good and d.stride == stride
                stride *= d.size
        if good:
            return x
        assert x.rows is not None
        names = [f"d{i}" for i in range(len(x.dims))]
        order = [a for a in axes if x.dims[a].kind == "feature"]
        target = output_tensor(self.em, Wanted(x.dims, x.dtype, x.rows, order), self.spill)
        if padded != k:
            if target.space == Space.HBM:
                raise UnsupportedError(
                    f"a contraction over {k} elements", "padding of spilled values is not built", "use a multiple of 16"
                )
            pitch = padded * x.dtype.bytes
            buffer = self.em.alloc(x.rows.local * pitch)
            self.em.memset(buffer, 0, x.rows.local * pitch)
            target = Tensor(buffer, Space.DM, x.dtype, target.dims, x.rows, 0, pitch)
        return self.vector.map(ex.Input(0), [x], [names], names, x.dtype, target=target)


def _followed(op: tc.ContractOp) -> bool:
    """Whether another contraction stands behind this one in its function."""
    following = op.next_op
    while following is not None and not isinstance(following, tc.ContractOp):
        following = following.next_op
    return following is not None
