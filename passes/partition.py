"""partition: carry out a plan. Types become those of one unit's part, and collectives appear where values must meet.

Before:
    %w = tc.weight "up_proj.weight" shard "80@tp, 48" : tensor<80x48xbf16>
    %v = tc.weight "down_proj.weight" shard "48, 80@tp" : tensor<48x80xbf16>
    %h = tc.contract "b s i, o i -> b s o" (%x, %w) : tensor<1x16x80xbf16, #tc.axes<"B,S,_">>
    %y = tc.contract "b s i, o i -> b s o" (%h, %v) : tensor<1x16x48xbf16, #tc.axes<"B,S,_">>
After:
    %w = tc.weight "up_proj.weight" shard "80@tp, 48" : tensor<40x48xbf16>
    %v = tc.weight "down_proj.weight" shard "48, 80@tp" : tensor<48x40xbf16>
    %h = tc.contract "b s i, o i -> b s o" (%x, %w) : tensor<1x16x40xbf16, #tc.axes<"B,S,_">>
    %p = tc.contract "b s i, o i -> b s o" (%h, %v) : tensor<1x16x48xbf16, #tc.axes<"B,S,_">>
    %y = tc.all_reduce %p kind add axis tp why "..." : tensor<1x16x48xbf16, #tc.axes<"B,S,_">>

One walk over every function in SSA order. Partial sums end directly behind the operation that made them. The result is
one program for all units, so its size does not depend on their number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from typing_extensions import override
from xdsl.context import Context
from xdsl.dialects.builtin import ArrayAttr, FunctionType, IntegerAttr, ModuleOp, StringAttr, i64
from xdsl.dialects.func import CallOp, FuncOp, ReturnOp
from xdsl.ir import Block, Operation, SSAValue
from xdsl.passes import ModulePass
from xdsl.utils.exceptions import PassFailedException

from ir.dialects import tc
from ir.interpreter import find_function, names_of
from ir.placement import Shard
from ir.spmd import argument_shards
from ir.types import labelled_dims, shape_of, tensor, tensor_type
from passes.provenance import PATH, inherit
from passes.reshard import Reshard, local_type, name_of
from passes.sharding import Sharding
from passes.static_values import static_values

SEQUENCE = "tc.sequence"
"""Module attribute with the number of tokens that sequence parallelism cuts."""


@dataclass(frozen=True)
class Partition(ModulePass):
    """Replace whole types by local ones and insert collectives, as the placements of the plan ask."""

    name = "partition"

    @override
    def apply(self, ctx: Context, op: ModuleOp) -> None:
        if tc.mesh_of(op) is not None:
            raise PassFailedException("partition: the module is partitioned already")
        mesh = tc.mesh_of(op, tc.PLAN)
        if mesh is None:
            raise PassFailedException("partition: the module has no plan; run plan-tp first")
        sharding = sharding_of(op, tc.PLAN)
        static = static_values(op)
        done: dict[str, list[Shard]] = {}
        functions = [f for f in op.ops if isinstance(f, FuncOp)]
        for function in sorted(functions, key=lambda f: any(isinstance(o, CallOp) for o in f.body.block.ops)):
            # Functions without calls first: their results' placements are known at the calls.
            done[function.sym_name.data] = _Function(op, function, sharding, static, done).run()
        del op.attributes[tc.PLAN]
        op.attributes[tc.MESH] = StringAttr(str(mesh))


def sharding_of(module: ModuleOp, attribute: str = tc.MESH) -> Sharding:
    """The mesh and the sequence parallelism that a module's attributes say."""
    mesh = tc.mesh_of(module, attribute)
    assert mesh is not None
    rows = module.attributes.get(SEQUENCE)
    return Sharding(mesh, rows.value.data if isinstance(rows, IntegerAttr) else None)


@dataclass
class _Function:
    """Rewrites one function. `env` has the local value and the placement of every old value."""

    module: ModuleOp
    old: FuncOp
    sharding: Sharding
    static: set[SSAValue]
    done: dict[str, list[Shard]]
    env: dict[SSAValue, tuple[SSAValue, Shard]] = field(default_factory=dict[SSAValue, tuple[SSAValue, Shard]])
    moved: dict[tuple[SSAValue, Shard], SSAValue] = field(default_factory=dict[tuple[SSAValue, Shard], SSAValue])

    def run(self) -> list[Shard]:
        """Replace the body; returns the placements of the results."""
        source = self.old.body.block
        shards = [s or self.sharding.whole(a) for s, a in zip(argument_shards(self.old), source.args, strict=True)]
        shards = [self.sharding.shard(s.dims) for s in shards]
        if tc.ARG_SHARDS in self.old.attributes:
            texts = [StringAttr(str(s) if s.axes else "") for s in shards]
            self.old.attributes[tc.ARG_SHARDS] = ArrayAttr(texts)
        types = [local_type(a, s, self.sharding) for a, s in zip(source.args, shards, strict=True)]
        self.block = Block(arg_types=types)
        for old, new, shard in zip(source.args, self.block.args, shards, strict=True):
            new.name_hint = old.name_hint
            self.env[old] = (new, shard)
        results: list[Shard] = []
        for op in source.ops:
            self.origin = op
            self.reshard = Reshard(self.sharding, self._insert)
            if isinstance(op, ReturnOp):
                results = self._return(op)
            elif isinstance(op, CallOp):
                self._call(op)
            elif isinstance(op, tc.WeightOp):
                self._weight(op)
            else:
                self._compute(op)
        region = self.old.body
        for op in reversed(list(source.ops)):
            op.detach()
            op.drop_all_references()
        region.detach_block(source)
        region.add_block(self.block)
        end = self.block.last_op
        assert end is not None
        self.old.function_type = FunctionType.from_lists(types, [o.type for o in end.operands])
        return results

    def _insert(self, op: Operation) -> SSAValue:
        inherit(op, self.origin)
        self.block.add_op(op)
        return op.results[0]

    def _where(self, op: Operation) -> str:
        path = op.attributes.get(PATH)
        return path.data if isinstance(path, StringAttr) else f"@{self.old.sym_name.data}: {op.name}"

    def _wanted(self, op: Operation, index: int, want: Shard, reason: str = "") -> SSAValue:
        """An operand as a local value in a placement; the same movement is made once."""
        value, have = self.env[op.operands[index]]
        if have == want:
            return value
        key = (op.operands[index], want)
        if key not in self.moved:
            reason = reason or f"{name_of(op.operands[index], op)} is needed as [{want}]"
            self.moved[key] = self.reshard.move(value, have, want, f"{self._where(op)}: {reason}, it lies as [{have}]")
        return self.moved[key]

    def _weight(self, op: tc.WeightOp) -> None:
        shard = op.placement()
        shard = self.sharding.whole(op.result) if shard is None else self.sharding.shard(shard.dims)
        new = tc.WeightOp(op.fqn.data, local_type(op.result, shard, self.sharding), str(shard) if shard.axes else "")
        self._take_over(op, new, [shard])

    def _take_over(self, op: Operation, new: Operation, shards: Sequence[Shard]) -> None:
        new.attributes |= {k: v for k, v in op.attributes.items() if k not in new.attributes}
        inherit(new, op)
        self.block.add_op(new)
        for old, result, shard in zip(op.results, new.results, shards, strict=True):
            result.name_hint = old.name_hint
            self.env[old] = (result, shard)

    def _compute(self, op: Operation) -> None:
        have = [self.env[o][1] for o in op.operands]
        step = self.sharding.step(op, have, [o in self.static for o in op.operands])
        if isinstance(op, tc.GatherOp) and step.partial:
            self._lookup(op, step.wanted[0], step.partial[0])
        else:
            operands = [self._wanted(op, i, want) for i, want in enumerate(step.wanted)]
            kind = local_type(op.results[0], step.result, self.sharding)
            new = op.create(
                operands=operands, result_types=[kind], properties=dict(op.properties), attributes=dict(op.attributes)
            )
            if isinstance(op, tc.SliceOp):
                axis, start = op.axis.value.data, self.sharding.slice_start(op, step.wanted[0])
                new.properties["start"] = IntegerAttr(start, i64)
                new.properties["size"] = IntegerAttr(shape_of(kind)[axis], i64)
            self._take_over(op, new, [step.result])
        final = self.sharding.retired(op, step)
        if isinstance(op, tc.ReduceOp):
            self._combine(op, step.partial, final)
        elif step.partial:
            value = self.env[op.results[0]][0]
            weight = next((name_of(o, op) for o in op.operands if o in self.static), "an operand")
            why = f"{self._where(op)}: sum over an axis along which {weight} is cut"
            value = self.reshard.retire(value, step.result, final, step.partial, why)
            self.env[op.results[0]] = (value, final)
        elif final != step.result:
            value = self.env[op.results[0]][0]
            why = f"{self._where(op)}: the rows of this unit (sequence parallelism)"
            self.env[op.results[0]] = (self.reshard.move(value, step.result, final, why), final)

    def _combine(self, op: tc.ReduceOp, axes: Sequence[str], shard: Shard) -> None:
        """Reduce the results of all units: they are gathered as a further dimension, which is small."""
        value = self.env[op.result][0]
        names = tc.own_axes(len(shape_of(value)) + 1)
        rule = f"{' '.join(names)} -> {' '.join(names[:-1])}"
        for axis in axes:
            kind, shape = tensor(value).element_type, labelled_dims(value)
            why = f"{self._where(op)}: {op.kind.data} over an axis that is cut on {axis}"
            one = self._insert(tc.ReshapeOp(value, tensor_type(kind, [*shape, 1])))
            full = tensor_type(kind, [*shape, self.sharding.mesh[axis]])
            every = self._insert(tc.AllGatherOp(one, len(shape), axis, why, full))
            value = self._insert(tc.ReduceOp([every], op.kind.data, "a", rule, tensor(value)))
        self.env[op.result] = (value, shard)

    def _lookup(self, op: tc.GatherOp, table_shard: Shard, axis: str) -> None:
        """Rows of a table that is cut along the indexed axis: own rows, and zero for those of other units."""
        table = self._wanted(op, 0, table_shard)
        indices = self._wanted(op, 1, self.sharding.whole(op.indices))
        rule = op.rule()
        rows = shape_of(table)[rule.inputs[0].index(op.indexed_axis())]
        first = self._insert(tc.AxisIndexOp(axis, rows, tensor_type("i32", [])))
        own, output = " ".join(rule.inputs[1]), " ".join(rule.output)
        kind = tensor_type("i32", labelled_dims(indices))
        place = self._insert(tc.MapOp([indices, first], "sub(a, b)", f"{own}, -> {own}", kind))
        inside = self._insert(tc.MapOp([place], f"min(max(a, 0.0), {rows - 1}.0)", f"{own} -> {own}", kind))
        result = local_type(op.result, self.sharding.whole(op.result), self.sharding)
        found = self._insert(tc.GatherOp(table, inside, str(rule), result))
        # 1 for places 0 to rows - 1, else 0: places are whole numbers.
        mask = f"mul(min(max(add(b, 1.0), 0.0), 1.0), min(max(sub({rows}.0, b), 0.0), 1.0))"
        masked = tc.MapOp([found, place], f"mul(a, {mask})", f"{output}, {own} -> {output}", result)
        self._take_over(op, masked, [self.sharding.whole(op.result)])

    def _call(self, op: CallOp) -> None:
        name = op.callee.string_value()
        callee = find_function(self.module, name)
        wanted = [
            self.sharding.shard(s.dims) if s is not None else self.sharding.whole(o)
            for s, o in zip(argument_shards(callee), op.operands, strict=True)
        ]
        arguments = names_of(callee, "arg_names", len(wanted))
        operands = [self._wanted(op, i, want, f"argument {arguments[i]} of @{name}") for i, want in enumerate(wanted)]
        end = callee.body.block.last_op
        assert end is not None
        new = CallOp(name, operands, [o.type for o in end.operands])
        self._take_over(op, new, self.done[name])

    def _return(self, op: ReturnOp) -> list[Shard]:
        """Results of @main are whole, except caches, which stay cut; blocks return what they have."""
        main = self.old.sym_visibility is None
        names = names_of(self.old, "result_names", len(op.operands))
        shards: list[Shard] = []
        values: list[SSAValue] = []
        for index, (name, operand) in enumerate(zip(names, op.operands, strict=True)):
            have = self.env[operand][1]
            want = self.sharding.whole(operand) if main and not name.startswith("cache.") else have
            shards.append(want)
            values.append(self._wanted(op, index, want, f"result {name} is whole in every unit"))
        self.block.add_op(ReturnOp(*values))
        return shards
