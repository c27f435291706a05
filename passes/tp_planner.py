"""The walk of plan-tp: cuts start at projections whose purpose is known, and spread from there.

A weight gets its cut at its first use. What is made of weights only (casts, reshaped biases) waits for its first user
and hands the cut back to the weights. Caches lie as the keys and values that are written into them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from xdsl.dialects.builtin import ArrayAttr, ModuleOp, StringAttr, SymbolRefAttr
from xdsl.dialects.func import CallOp, FuncOp, ReturnOp
from xdsl.ir import Operation, SSAValue
from xdsl.utils.exceptions import PassFailedException

from ir.dialects import tc
from ir.errors import UnsupportedError
from ir.interpreter import find_function
from ir.placement import Factor, Factors, Shard
from ir.quantization import PER_WORD
from ir.types import shape_of
from passes.arguments import is_cache, is_vocabulary
from passes.sharding import Placed, Sharding
from passes.static_values import static_values
from passes.tp_roles import LOGITS, End, Follower
from passes.tp_styles import COLUMN, EMBEDDING, REPLICATE, ROW, Styles


def _block(weight: SSAValue) -> int:
    """Neighbouring inputs of a weight that must stay together: those of a scale, and of a word, of 4-bit numbers."""
    if not isinstance(weight.owner, tc.DequantizeOp):
        return 1
    group = weight.owner.group
    return PER_WORD if group == shape_of(weight)[1] else math.lcm(PER_WORD, group)


@dataclass(frozen=True)
class Variant:
    """A block as some of its calls use it: the styles of its weights, and where its results lie."""

    function: FuncOp
    styles: tuple[str, ...]
    results: list[Shard]


@dataclass
class Planner:
    """Walks @main, and every block at its first call, and decides placements of weights and caches on the way."""

    module: ModuleOp
    sharding: Sharding
    styles: Styles
    placed: dict[SSAValue, Shard] = field(default_factory=dict[SSAValue, Shard])
    variants: dict[str, list[Variant]] = field(default_factory=dict[str, "list[Variant]"])
    names: dict[SSAValue, str] = field(default_factory=dict[SSAValue, str])
    """The weight that a value is made of: a `tc.weight`, a cast of one, or a block's argument that stands for one."""

    def run(self) -> None:
        """Decide everything and write it to the module."""
        main = find_function(self.module, "main")
        self.static = static_values(self.module)
        for op in main.body.block.ops:
            if isinstance(op, tc.WeightOp):
                self.names[op.result] = op.fqn.data
        self.styles.check(self.module, self.sharding.mesh)
        for value, name in self.names.items():
            style = self.styles.of(name)
            if style == REPLICATE:
                self.placed[value] = self.sharding.whole(value)
            elif isinstance(style, Shard):
                self.placed[value] = self.sharding.shard(style.dims)
        self._walk(main)
        self._write_arguments(main)
        for op in main.body.block.ops:
            if isinstance(op, tc.WeightOp):
                shard = self.placed.get(op.result)
                if shard is not None and shard.axes:
                    op.shard = StringAttr(str(shard))

    def _write_arguments(self, function: FuncOp) -> None:
        shards = [self.placed.get(a) for a in function.body.block.args]
        texts = [str(s) if s is not None and s.axes else "" for s in shards]
        if any(texts):
            function.attributes[tc.ARG_SHARDS] = ArrayAttr([StringAttr(t) for t in texts])

    def _walk(self, function: FuncOp) -> list[Shard]:
        """Place everything in one function; returns the placements of its results."""
        follower = Follower(function)
        for op in function.body.block.ops:
            if isinstance(op, ReturnOp):
                return [self.placed.get(o) or self.sharding.whole(o) for o in op.operands]
            if isinstance(op, CallOp):
                self._call(op)
            elif not isinstance(op, tc.WeightOp):
                self._compute(op, follower)
        raise PassFailedException(f"plan-tp: @{function.sym_name.data} does not return")

    def _compute(self, op: Operation, follower: Follower) -> None:
        have: list[Placed] = [self.placed.get(o) for o in op.operands]
        if op.operands and all(o in self.static for o in op.operands):
            # Made of weights only: it lies as its first user needs it, and so do the weights.
            if isinstance(op, tc.DequantizeOp) or (len(op.operands) == 1 and op.operands[0] in self.names):
                self.names[op.results[0]] = self.names[op.operands[0]]
            if all(h is None for h in have):
                return
        if isinstance(op, (tc.ContractOp, tc.GatherOp)):
            for index, operand in enumerate(op.operands):
                if operand in self.names and have[index] is None:
                    shard = self._weight(op, index, have, follower)
                    if shard is not None:
                        self._decide(operand, shard)
                        have[index] = self.placed.get(operand)
        have = [
            h if h is not None or o in self.static or is_cache(o) else self.sharding.whole(o)
            for h, o in zip(have, op.operands, strict=True)
        ]
        step = self.sharding.step(op, have, [o in self.static for o in op.operands])
        for operand, want in zip(op.operands, step.wanted, strict=True):
            if self.placed.get(operand) is None:
                self._decide(operand, want)
        self.placed[op.results[0]] = self.sharding.retired(op, step)

    def _decide(self, value: SSAValue, shard: Shard) -> None:
        """Place a free value, and the weight that it is made of."""
        self.placed[value] = shard
        owner = value.owner
        if not isinstance(owner, Operation):
            return
        if isinstance(owner, tc.ReshapeOp):
            source = self.sharding.reshaped(shard, shape_of(owner.x))
            if source is not None and self.placed.get(owner.x) is None:
                self._decide(owner.x, source)
        elif isinstance(owner, tc.DequantizeOp):
            self._decide_packed(owner, shard)
        elif isinstance(owner, (tc.MapOp, tc.TransposeOp)):
            rule = owner.rule()
            axes = dict(zip(rule.output, shard.dims, strict=True))
            for operand, side in zip(owner.operands, rule.inputs, strict=True):
                if self.placed.get(operand) is None:
                    self._decide(operand, self.sharding.shard([axes[a] for a in side]))

    def _decide_packed(self, op: tc.DequantizeOp, shard: Shard) -> None:
        """Place packed numbers and their scales. Raises UnsupportedError if units would share a group."""
        parts = self.sharding.quantized(op, shard)
        if parts is None:
            name = self.names.get(op.packed, "a 4-bit weight")
            raise UnsupportedError(
                f"{name} on {self.sharding.mesh.size} units",
                f"its inputs are cut as [{shard}], and a scale belongs to {op.group} neighbours",
                "use fewer units (-tp), or name it `replicate` in a plan (--tensor-parallel-plan)",
            )
        for operand, part in zip(op.operands, parts, strict=True):
            if self.placed.get(operand) is None:
                self._decide(operand, part)

    def _weight(
        self, op: tc.ContractOp | tc.GatherOp, index: int, have: Sequence[Placed], follower: Follower
    ) -> Shard | None:
        """The placement of a weight by its style, or by what its output is for; None: as the other operand asks."""
        operand = op.operands[index]
        name = self.names[operand]
        style = self.styles.of(name)
        rule = op.rule()
        side = rule.inputs[index]
        sizes = dict(zip(side, shape_of(operand), strict=True))
        if isinstance(op, tc.GatherOp):
            if index != 0 or not (style == EMBEDDING or is_vocabulary(op)):
                return self.sharding.whole(operand)
            return self._cut(side, sizes, op.indexed_axis(), self.sharding.cut(sizes[op.indexed_axis()]))
        other = have[1 - index]
        summed = [a for a in side if a in rule.reduced and a in rule.inputs[1 - index]]
        outputs = [a for a in side if a in rule.output and a not in rule.inputs[1 - index]]
        if other is not None:
            dims = dict(zip(rule.inputs[1 - index], other.dims, strict=True))
            if style != COLUMN and any(self.sharding.parts(dims[a]) for a in summed):
                return None
        if style == ROW:
            if not summed:
                return None
            return self._cut(side, sizes, summed[0], self.sharding.cut(sizes[summed[0]], _block(operand)))
        if len(outputs) != 1:
            return None
        (axis,) = outputs
        factors = self._purpose(follower.ends(op.result, rule.output.index(axis)), sizes[axis])
        if factors is None and style == COLUMN and not is_single_head(op, sizes[axis]):
            factors = self.sharding.cut(sizes[axis])
        return None if factors is None else self._cut(side, sizes, axis, factors)

    def _cut(self, side: Sequence[str], sizes: dict[str, int], axis: str, factors: Factors) -> Shard:
        return self.sharding.shard([factors if a == axis else (Factor(sizes[a]),) for a in side])

    def _purpose(self, ends: Sequence[End], size: int) -> Factors | None:
        """How an output axis is cut for where it goes; None if it must be whole."""
        parts: dict[tuple[int, int], list[End]] = {}
        for end in ends:
            parts.setdefault(end.part, []).append(end)
        cuts = [self._part(found, part[1]) for part, found in parts.items()]
        spans = sorted(parts)
        tiled = [s for s, _ in spans] == [i * spans[0][1] for i in range(len(spans))] if spans else False
        if not cuts or cuts[0] is None or any(c != cuts[0] for c in cuts):
            return None
        if not tiled or len(spans) * spans[0][1] != size:
            return None
        return (Factor(len(spans)), *cuts[0]) if len(spans) > 1 else cuts[0]

    def _part(self, ends: Sequence[End], size: int) -> Factors | None:
        kinds = {e.kind for e in ends}
        if kinds == {"contract"} or kinds == {LOGITS}:
            blocks = [_block(o) for e in ends if isinstance(e.op, tc.ContractOp) for o in e.op.operands]
            return self.sharding.cut(size, math.lcm(*blocks) if blocks else 1)
        attentions = [e.op for e in ends if isinstance(e.op, tc.AttentionOp)]
        if kinds not in ({"heads"}, {"kv"}):
            return None
        kv, group = shape_of(attentions[0].k)[1], attentions[0].group
        heads = kv * group if kinds == {"heads"} else kv
        if size % heads:
            return None
        inner = [Factor(group, "r")] if kinds == {"heads"} else []
        return self.sharding.normal((Factor(kv, "kv"), *inner, Factor(size // heads)))

    def _call(self, op: CallOp) -> None:
        """Place a block's arguments at its first call; calls that lie differently get a copy of the block."""
        callee = op.callee.string_value()
        have = [
            self.placed.get(o) or (None if o in self.static or is_cache(o) else self.sharding.whole(o))
            for o in op.operands
        ]
        weights = [self.names.get(o) for o in op.operands]
        styles = tuple(str(self.styles.of(w)) if w is not None else "" for w in weights)
        variants = self.variants.setdefault(callee, [])
        variant = next((v for v in variants if v.styles == styles and self._fits(v.function, have)), None)
        if variant is None:
            function = self._copy(callee, len(variants)) if variants else find_function(self.module, callee)
            for argument, shard, weight in zip(function.body.block.args, have, weights, strict=True):
                if shard is not None:
                    self.placed[argument] = shard
                if weight is not None:
                    self.names[argument] = weight
            variant = Variant(function, styles, self._walk(function))
            variants.append(variant)
            self._write_arguments(function)
        op.properties["callee"] = SymbolRefAttr(variant.function.sym_name)
        for operand, argument in zip(op.operands, variant.function.body.block.args, strict=True):
            if self.placed.get(operand) is None:
                self._decide(operand, self.placed.get(argument) or self.sharding.whole(argument))
        for result, shard in zip(op.results, variant.results, strict=True):
            self.placed[result] = shard

    def _fits(self, function: FuncOp, have: Sequence[Placed]) -> bool:
        """Whether a block that is planned already takes operands that lie like this."""
        arguments = function.body.block.args
        return all(
            h is None or h == (self.placed.get(a) or self.sharding.whole(a))
            for h, a in zip(have, arguments, strict=True)
        )

    def _copy(self, callee: str, number: int) -> FuncOp:
        """A copy of a block with values of its own."""
        function = find_function(self.module, callee)
        copy = function.clone()
        copy.sym_name = StringAttr(f"{callee}_{number}")
        copy.attributes.pop(tc.ARG_SHARDS, None)
        parent = function.parent_block()
        assert parent is not None
        parent.insert_op_after(copy, function)
        values = [(function.body.block.args, copy.body.block.args)]
        values += [(o.results, n.results) for o, n in zip(function.body.block.ops, copy.body.block.ops, strict=True)]
        self.static |= {n for old, new in values for o, n in zip(old, new, strict=True) if o in self.static}
        return copy


def is_single_head(op: Operation, size: int) -> bool:
    """Whether an output of `size` is the one head of an attention in the same function: there is no head axis to cut,
    and the values of a head stay together, so every unit computes it."""
    block = op.parent
    assert block is not None
    found = [a for a in block.ops if isinstance(a, tc.AttentionOp)]
    return any(shape_of(v)[1] == 1 and shape_of(v)[3] == size for a in found for v in (a.q, a.k, a.v))
