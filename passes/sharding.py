"""How placements pass through operations: arithmetic on axis rules, shared by plan-tp and partition.

A value's placement is a `Shard`; None means that it is free (a weight or cache that is not decided yet). `step` says
for one operation how every operand must lie, how the result then lies, and over which mesh axes it is a partial sum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from xdsl.ir import Operation, SSAValue

from ir.axes import Rule
from ir.dialects import tc
from ir.errors import UnsupportedError
from ir.placement import Factor, Factors, Mesh, Shard
from ir.quantization import PER_WORD
from ir.types import axis_names, shape_of

Placed = Shard | None


@dataclass(frozen=True)
class Step:
    """What one operation asks for: placements of operands, placement of the result, mesh axes of partial sums.

    `begins` marks what starts the residual stream: under sequence parallelism it is cut even if it is no sum.
    """

    wanted: list[Shard]
    result: Shard
    partial: tuple[str, ...] = ()
    begins: bool = False


@dataclass(frozen=True)
class Sharding:
    """The mesh, and the number of tokens whose axis S is cut if sequence parallelism is on."""

    mesh: Mesh
    sequence: int | None = None

    def normal(self, dim: Factors) -> Factors:
        """A dimension without cuts that divide nothing, and with neighbouring whole factors merged.

        A single element on several units is held by all of them: copies need no exchange, padding would.
        """
        result: list[Factor] = []
        for factor in dim:
            axis = factor.axis if factor.axis and self.mesh[factor.axis] > 1 and factor.size > 1 else None
            if axis is None and result and result[-1].axis is None:
                result[-1] = Factor(result[-1].size * factor.size)
            elif axis is not None or factor.size != 1:
                result.append(Factor(factor.size, axis))
        return tuple(result)

    def shard(self, dims: Sequence[Factors]) -> Shard:
        """A placement in normal form."""
        return Shard(tuple(self.normal(d) for d in dims))

    def whole(self, value: SSAValue) -> Shard:
        """The placement of a value that every unit holds all of."""
        return self.shard([(Factor(n),) for n in shape_of(value)])

    def parts(self, dim: Factors) -> set[str]:
        """The mesh axes that cut a dimension."""
        return {a for f in dim if f.axis for a in self.mesh.parts(f.axis)}

    def padded(self, dim: Factors) -> bool:
        """Whether some unit holds padding in a dimension."""
        return any(f.padded(self.mesh) != f.size for f in dim)

    def axis_name(self, parts: set[str]) -> tuple[str, ...]:
        """The names of a set of mesh axes: `tp` for all, else each."""
        everything = self.mesh.parts("tp")
        return ("tp",) if parts == set(everything) else tuple(a for a in everything if a in parts)

    def cut(self, size: int, block: int = 1) -> Factors:
        """A dimension cut over all units, in blocks if it consists of such.

        Local sizes are multiples of 8 where that costs at most 1/16 of padding.
        """
        units = self.mesh.size
        eights = -(-size // (8 * units)) * 8 * units
        if block == 1 and size % 8 == 0 and size % (8 * units) and size >= eights * 15 / 16:
            block = 8
        return (Factor(size // block, "tp"), Factor(block)) if size % block == 0 else (Factor(size, "tp"),)

    def step(self, op: Operation, have: Sequence[Placed], static: Sequence[bool]) -> Step:
        """What an operation asks for. `static` tells the operands that are made of weights only."""
        match op:
            case tc.ReshapeOp():
                return self._reshape(op, have)
            case tc.SliceOp():
                return self._slice(op, have)
            case tc.AttentionOp():
                return self._attention(op, have)
            case tc.ConcatOp():
                return self._by_rule(op, have, static, op.rule().unsharded)
            case tc.GatherOp():
                fixed = frozenset[str]() if static[0] else frozenset({op.indexed_axis()})
                return replace(self._by_rule(op, have, static, fixed), begins=static[0])
            case tc.ReduceOp():
                # Every unit reduces its own elements, unless some of them are padding.
                shards = [h or self.whole(o) for h, o in zip(have, op.operands, strict=True)]
                sides = zip(op.rule().inputs, shards, strict=True)
                fixed = {n for side, s in sides for n, d in zip(side, s.dims, strict=True) if self.padded(d)}
                return self._by_rule(op, have, static, frozenset(op.rule().reduced) & fixed)
            case tc.DequantizeOp():
                return self._dequantize(op, have)
            case tc.ContractOp():
                # Contractions see all tokens, so that one exchange serves all that read the same value.
                tokens = [(side, self.token_dim(o)) for side, o in zip(op.rule().inputs, op.operands, strict=True)]
                fixed = frozenset(side[dim] for side, dim in tokens if dim is not None)
                return self._by_rule(op, have, static, fixed)
            case tc.MapOp() | tc.KvUpdateOp() | tc.TransposeOp():
                return self._by_rule(op, have, static, op.rule().unsharded)
            case tc.WeightOp() | tc.ConstantOp():
                return Step([], self.whole(op.results[0]))
            case _:
                raise UnsupportedError(
                    f"{op.name} in a tensor-parallel model", "it has no placement rule", "build with -tp 1"
                )

    def _by_rule(self, op: Operation, have: Sequence[Placed], static: Sequence[bool], fixed: frozenset[str]) -> Step:
        """Operations whose dimensions are single axes: every axis lies alike in all operands and in the result."""
        assert isinstance(op, tc.TcOp)
        rule = op.rule()
        axes: dict[str, Factors] = {}
        used: set[str] = set()
        # A contraction goes where its weight lies. Elsewhere weights follow the other operands.
        weights_first = isinstance(op, (tc.ContractOp, tc.GatherOp))
        moving = {a for side, s in zip(rule.inputs, static, strict=True) if not s for a in side}
        for index in sorted(range(len(have)), key=lambda i: static[i] != weights_first):
            placed = have[index]
            if placed is None:
                continue
            for name, dim in zip(rule.inputs[index], placed.dims, strict=True):
                parts = self.parts(dim)
                follows = static[index] and not weights_first and name in moving
                if not parts or parts & used or name in axes or name in fixed or follows:
                    continue
                if isinstance(op, tc.ContractOp) and name in rule.reduced and not any(static) and self.padded(dim):
                    continue  # only weights are known to be zero in the padding
                axes[name] = dim
                used |= parts
        wanted = [self._along(o, side, axes) for o, side in zip(op.operands, rule.inputs, strict=True)]
        result = self._along(op.results[0], rule.output, axes)
        partial = {p for a in rule.reduced for p in self.parts(axes.get(a, ()))}
        return Step(wanted, result, self.axis_name(partial) if partial else ())

    def _along(self, value: SSAValue, names: Sequence[str], axes: dict[str, Factors]) -> Shard:
        dims = [axes.get(n, (Factor(s),)) for n, s in zip(names, shape_of(value), strict=True)]
        return self.shard(dims)

    def _reshape(self, op: tc.ReshapeOp, have: Sequence[Placed]) -> Step:
        source = have[0] or self.whole(op.x)
        target = self.reshaped(source, shape_of(op.result))
        if target is None:
            return Step([self.whole(op.x)], self.whole(op.result))
        return Step([source], target)

    def reshaped(self, source: Shard, shape: Sequence[int]) -> Shard | None:
        """The placement behind a row-major reshape, None if a cut would fall inside of another dimension."""
        factors = [f for dim in source.dims for f in self.normal(dim)]
        dims: list[Factors] = []
        for size in shape:
            taken = self._take(factors, size)
            if taken is None:
                return None
            dims.append(taken)
        return self.shard(dims)

    def _take(self, factors: list[Factor], size: int) -> Factors | None:
        """Remove factors of product `size` from the front; whole ones may be split, cut ones on a unit's boundary."""
        taken: list[Factor] = []
        while size > 1:
            factor = factors.pop(0)
            if size % factor.size == 0:
                taken.append(factor)
                size //= factor.size
                continue
            rest, remainder = divmod(factor.size, size)
            units = self.mesh[factor.axis] if factor.axis else 1
            if remainder or size % units:
                return None
            taken.append(Factor(size, factor.axis))
            factors.insert(0, Factor(rest))
            size = 1
        return tuple(taken)

    def _slice(self, op: tc.SliceOp, have: Sequence[Placed]) -> Step:
        axis, start, size = op.bounds()
        source = have[0] or self.whole(op.x)
        dim = self.normal(source.dims[axis])
        result: Factors = (Factor(size),)
        if self.parts(dim):
            inner = math.prod(f.size for f in dim[1:])
            if dim[0].axis is None and start % inner == 0 and size % inner == 0:
                result = (Factor(size // inner), *dim[1:])
            else:
                dim = (Factor(shape_of(op.x)[axis]),)
        before, after = source.dims[:axis], source.dims[axis + 1 :]
        return Step([self.shard([*before, dim, *after])], self.shard([*before, result, *after]))

    def slice_start(self, op: tc.SliceOp, source: Shard) -> int:
        """Where the slice begins in one unit's part."""
        axis, start, _ = op.bounds()
        inner = [f for f in self.normal(source.dims[axis])[1:]]
        return start // math.prod(f.size for f in inner) * math.prod(f.local(self.mesh) for f in inner)

    def _dequantize(self, op: tc.DequantizeOp, have: Sequence[Placed]) -> Step:
        packed = have[0] or self.whole(op.packed)
        result = self.shard([packed.dims[0], (*packed.dims[1], Factor(PER_WORD))])
        parts = self.quantized(op, result)
        if parts is None:
            result = self.whole(op.result)
            parts = [self.whole(op.packed), self.whole(op.scale)]
        return Step(parts, result)

    def quantized(self, op: tc.DequantizeOp, result: Shard) -> list[Shard] | None:
        """The placements of packed numbers and scales for that of the weight; None if a cut divides a group."""
        rows, columns = result.dims
        groups = shape_of(op.scale)[1]
        words = self.reshaped(Shard((columns,)), [shape_of(op.packed)[1], PER_WORD])
        scales = self.reshaped(Shard((columns,)), [groups, op.group]) if groups > 1 else None
        if words is None or self.parts(words.dims[1]):
            return None
        if groups == 1:
            # A packed zero stands for -8 scales: only a scale of zero makes it one.
            return None if self.padded(columns) else [self.shard([rows, words.dims[0]]), self.shard([rows, ()])]
        if scales is None or self.parts(scales.dims[1]):
            return None
        return [self.shard([rows, words.dims[0]]), self.shard([rows, scales.dims[0]])]

    def _attention(self, op: tc.AttentionOp, have: Sequence[Placed]) -> Step:
        """Heads lie as (key-value heads, group); keys and values as the first of the two."""
        values: list[SSAValue] = list(op.operands)
        heads = have[0].dims[1] if have[0] is not None else ()
        rows = have[0].dims[2] if have[0] is not None else ()
        outer = list(heads)
        kv = self._take(outer, shape_of(op.k)[1]) if heads else None
        if kv is None:
            heads, kv = (Factor(shape_of(op.q)[1]),), (Factor(shape_of(op.k)[1]),)
        rule: Rule = op.rule()
        axes = {rule.inputs[0][1]: heads, "k": kv} if rule.inputs[0][1] != "k" else {"k": heads}
        if rows and not self.parts(rows) & self.parts(heads):
            axes["s"] = rows
        wanted = [self._along(v, side, axes) for v, side in zip(values, rule.inputs, strict=True)]
        return Step(wanted, self._along(op.result, rule.output, axes))

    def retired(self, op: Operation, step: Step) -> Shard:
        """The placement of a result behind its partial sums: cut along S under sequence parallelism."""
        if isinstance(op, tc.ReduceOp):
            return step.result
        rows = self.token_dim(op.results[0]) if step.partial == ("tp",) or step.begins else None
        if rows is None or step.result.axes:
            return step.result
        size = step.result.shape[rows]
        assert self.sequence is not None
        dims = list(step.result.dims)
        dims[rows] = (Factor(size // self.sequence), Factor(self.sequence, "tp"))
        return self.shard(dims)

    def token_dim(self, value: SSAValue) -> int | None:
        """The dimension of a value that is cut under sequence parallelism: S, or B*S."""
        if self.sequence is None:
            return None
        dims = [i for i, n in enumerate(axis_names(value)) if n.split("*")[-1] == "S"]
        return dims[0] if len(dims) == 1 and shape_of(value)[dims[0]] % self.sequence == 0 else None
