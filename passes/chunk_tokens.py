"""chunk-tokens: walk many tokens in chunks: all layers for the first chunk, then all layers for the second.

It runs after `outline`. Before:
    func.func @main(%ids: tensor<1x1024xi32, #tc.axes<"B,S">>, %pos, %last, %k) {
      %c = call @prepare(%pos)
      %x = call @embed(%ids)
      %y, %k1 = call @block_0(%x, %c, %pos, %k)
      %l = call @head(%y, %last)                       // gathers row `last` first
      return %l, %k1
    }
After (tokens=512):
    func.func private @cut_0(%ids, %pos, %last) -> (%ids, %pos, %at)     // tokens 0 to 511, and `last` - 0
    func.func private @pick_first(%y, %at) -> %row                       // row `at` if it is in the chunk, else zeros
    func.func private @pick(%y, %at, %row) -> %row                       // the same, added to what was found before
    func.func @main(...) {
      %i0, %p0, %a0 = call @cut_0(%ids, %pos, %last) {chunk = 0}
      %c0 = call @prepare(%p0) {chunk = 0}
      %x0 = call @embed(%i0) {chunk = 0}
      %y0, %k0 = call @block_0(%x0, %c0, %p0, %k) {chunk = 0}
      %r0 = call @pick_first(%y0, %a0) {chunk = 0}
      %i1, %p1, %a1 = call @cut_1(%ids, %pos, %last) {chunk = 1}
      ...
      %y1, %k1 = call @block_0(%x1, %c1, %p1, %k0) {chunk = 1}
      %r1 = call @pick(%y1, %a1, %r0) {chunk = 1}
      %l = call @head(%r1)
      return %l, %k1
    }

Values between operations are then as small as a chunk, however long the prompt. The functions are those of before with
fewer tokens, each once; if the chunks cannot be equal, the last one is shorter and has its own (`block_0_tail`). Chunks
before the last ones have layers that read fewer keys (`block_0_keys512`), at most four variants in all.
A program is cut only where that changes no result (`passes.token_flow`); others stay whole, with a note.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from typing_extensions import override
from xdsl.context import Context
from xdsl.dialects.builtin import ArrayAttr, FunctionType, IntegerAttr, ModuleOp, StringAttr, TensorType, UnitAttr, i64
from xdsl.dialects.func import CallOp, FuncOp, ReturnOp
from xdsl.ir import Attribute, Block, Operation, Region, SSAValue
from xdsl.passes import ModulePass
from xdsl.rewriter import Rewriter
from xdsl.utils.exceptions import PassFailedException

from ir.dialects import tc
from ir.types import labelled_dims, shape_of, tensor, tensor_type
from passes.chunk_sizes import chunk_size, key_limits, token_sizes
from passes.notes import add_notes
from passes.outline import OUTLINED, argument_names, set_type
from passes.provenance import PATH
from passes.token_flow import PLAIN, STATE, Flow, MixedTokensError, Program, check_parts, has_tokens, program_flow

CHUNK = "chunk"
"""Attribute of a call of `@main`: the number of its chunk."""

CUT, PICK, PICK_FIRST, TAIL = "cut_", "pick", "pick_first", "_tail"


@dataclass(frozen=True)
class ChunkTokens(ModulePass):
    """Cut the tokens of `@main`; `tokens`: the most that a chunk holds, of all rows (default: see `chunk_size`)."""

    name = "chunk-tokens"
    tokens: int | None = None

    @override
    def apply(self, ctx: Context, op: ModuleOp) -> None:
        if self.tokens is not None and self.tokens < 1:
            raise PassFailedException(f"chunk-tokens: a chunk has tokens, not {self.tokens}")
        functions = {f.sym_name.data: f for f in op.ops if isinstance(f, FuncOp)}
        main = functions.pop("main", None)
        if main is None or not any(OUTLINED in f.attributes for f in functions.values()):
            return
        sizes = token_sizes(main)
        if sizes is None:
            return
        batch, length, token_bytes = sizes
        size = chunk_size(batch, length, token_bytes, self.tokens)
        if size >= length:
            return
        try:
            program = program_flow(main, functions, length)
            check_parts(program, size)
        except MixedTokensError as error:
            add_notes(op, [f"{batch} x {length} tokens are not computed in chunks: {error}"])
            return
        keys = [shape_of(v)[2] for v, role in program.roles.items() if role == STATE]
        _Chunker(op, main, functions, program, size, max(keys, default=0)).run()


@dataclass
class _Chunker:
    """Rewrites `@main` and the functions it calls."""

    module: ModuleOp
    main: FuncOp
    functions: dict[str, FuncOp]
    program: Program
    size: int
    keys: int
    made: dict[str, FuncOp] = field(default_factory=dict[str, FuncOp])
    carried: dict[SSAValue, SSAValue] = field(default_factory=dict[SSAValue, SSAValue])
    """Caches as the chunk before left them, by the argument of `@main`; in the end also the results of `@main`."""

    def run(self) -> None:
        """Write the calls of all chunks before the old ones, then remove those."""
        block, roles, row = self.main.body.block, self.program.roles, self.program.row
        old = [op for op in block.ops if isinstance(op, CallOp)]
        returned = block.last_op
        assert isinstance(returned, ReturnOp)
        limits = key_limits(self.keys, self.program.length, self.size)
        cut: list[SSAValue] = [a for a in block.args if has_tokens(roles[a]) and a.first_use is not None]
        picked: SSAValue | None = None
        for number, start in enumerate(range(0, self.program.length, self.size)):
            count = min(self.size, self.program.length - start)
            tail = TAIL if count < self.size else ""
            index = [] if row is None else [row.call.operands[row.index]]
            pieces = self._call(self._cut(number, start, count, cut, index), [*cut, *index], number, "cut")
            now = dict(zip(cut, pieces, strict=False))
            for call in old:
                if row is None or call is not row.call:
                    self._layer(call, now, number, count, tail, limits[number])
            if row is not None:
                operands = [now[row.call.operands[row.tokens]], pieces[-1], *([picked] if picked is not None else [])]
                picked = self._call(self._pick(operands, tail), operands, number, PICK)[0]
        if row is not None:
            assert picked is not None
            self._head(picked)
        for i, value in enumerate(returned.operands):
            returned.operands[i] = self.carried.get(value, value)
        for op in reversed(old):
            op.detach()
            op.erase()
        for name in {call.callee.string_value() for call in old}:
            self.functions[name].detach()
        for function in self.made.values():
            self.module.body.block.insert_op_before(function, self.main)

    # Calls ------------------------------------------------------------
    def _call(self, function: FuncOp, operands: Sequence[SSAValue], chunk: int | None, path: str) -> list[SSAValue]:
        kinds = function.function_type.outputs.data
        call = CallOp(function.sym_name.data, list(operands), kinds)
        call.attributes[PATH] = StringAttr(path)
        if chunk is not None:
            call.attributes[CHUNK] = IntegerAttr(chunk, i64)
        last = self.main.body.block.last_op
        assert last is not None
        self.main.body.block.insert_op_before(call, last)
        return list(call.results)

    def _layer(self, call: CallOp, now: dict[SSAValue, SSAValue], chunk: int, count: int, tail: str, keys: int) -> None:
        """A call of before for one chunk; `now`: the values of this chunk by those of before."""
        name = call.callee.string_value()
        flow = self.program.flows[name]
        operands = [
            self.carried.get(v, v) if role == STATE else now.get(v, v)
            for v, role in zip(call.operands, flow.arguments, strict=True)
        ]
        path = call.attributes.get(PATH)
        results = self._call(
            self._resized(name, flow, count, tail, keys),
            operands,
            chunk,
            path.data if isinstance(path, StringAttr) else "",
        )
        for i, (before, after) in enumerate(zip(call.results, results, strict=True)):
            now[before] = after
            if i in flow.caches:
                self.carried[call.operands[flow.caches[i]]] = self.carried[before] = after
            elif flow.results[i] == PLAIN:
                self.carried[before] = after

    def _head(self, picked: SSAValue) -> None:
        """The head of before, which is given the row."""
        row = self.program.row
        assert row is not None
        function = row.function.clone()
        block = function.body.block
        number = list(row.function.body.block.ops).index(row.gather)
        gather = list(block.ops)[number]
        assert isinstance(gather, tc.GatherOp)
        argument = block.insert_arg(gather.result.type, row.tokens)
        gather.result.replace_all_uses_with(argument)
        table = gather.table.owner
        Rewriter.erase_op(gather)
        if isinstance(table, tc.AllGatherOp):
            Rewriter.erase_op(table)
        operands, names = list(row.call.operands), argument_names(row.function)
        operands[row.tokens] = picked
        block.erase_arg(block.args[row.tokens + 1])
        if block.args[row.index].first_use is None:
            block.erase_arg(block.args[row.index])
            del operands[row.index], names[row.index]
        set_type(function, names)
        self.made[function.sym_name.data] = function
        path = row.call.attributes.get(PATH)
        results = self._call(function, operands, None, path.data if isinstance(path, StringAttr) else "")
        self.carried |= dict(zip(row.call.results, results, strict=True))

    # Functions ------------------------------------------------------------
    def _part(self, value: SSAValue, dim: int, count: int) -> TensorType[Attribute]:
        """The type of a value with `count` tokens along a dimension, whose name it keeps."""
        dims = labelled_dims(value)
        old, size = dims[dim], shape_of(value)[dim] * count // self.program.length
        dims[dim] = (old[0], size) if isinstance(old, tuple) else size
        return tensor_type(tensor(value).element_type, dims)

    def _resized(self, name: str, flow: Flow, count: int, tail: str, keys: int) -> FuncOp:
        """The function with `count` tokens that see the first `keys` keys."""
        old = self.functions[name]
        full = keys == self.keys or not flow.caches
        given = name + ("" if full else f"_keys{keys}") + tail
        if given in self.made:
            return self.made[given]
        new = old.clone()
        new.properties["sym_name"] = StringAttr(given)
        pairs: list[tuple[SSAValue, SSAValue]] = list(zip(old.body.block.args, new.body.block.args, strict=True))
        for before, after in zip(old.body.block.ops, new.body.block.ops, strict=True):
            pairs += zip(before.results, after.results, strict=True)
        for before, after in pairs:
            if has_tokens(role := flow.roles[before]):
                Rewriter.replace_value_with_new_type(after, self._part(before, role, count))
        for op in new.body.block.ops:
            if isinstance(op, tc.AttentionOp) and shape_of(op.k)[2] == self.keys != keys:
                op.keys = IntegerAttr(keys, i64)
        set_type(new, argument_names(new))
        self.made[given] = new
        return new

    def _cut(
        self, number: int, start: int, count: int, values: Sequence[SSAValue], index: Sequence[SSAValue]
    ) -> FuncOp:
        """`count` tokens of the values from `start` on; and indices of tokens, counted from `start`."""
        function = self._function(f"{CUT}{number}", [*values, *index])
        arguments = list(function.body.block.args)
        ops: list[Operation] = []
        for value, argument in zip(values, arguments[: len(values)], strict=True):
            dim = self.program.roles[value]
            ops.append(tc.SliceOp(argument, dim, start, count, self._part(value, dim, count)))
        for value, argument in zip(index, arguments[len(values) :], strict=True):
            axes = " ".join(tc.own_axes(len(shape_of(value))))
            ops.append(tc.MapOp([argument], f"sub(a, {float(start)})", f"{axes} -> {axes}", tensor(value)))
        return self._finish(function, ops, [op.results[0] for op in ops])

    def _pick(self, operands: Sequence[SSAValue], tail: str) -> FuncOp:
        """Row `at` of tokens `x` if they have it, else zeros; with a third operand its sum with that."""
        name = (PICK_FIRST if len(operands) == 2 else PICK) + tail
        if name in self.made:
            return self.made[name]
        row = self.program.row
        assert row is not None
        function = self._function(name, operands)
        arguments = list(function.body.block.args)
        rule = row.gather.rule()
        role = self.program.roles[row.call.operands[row.tokens]]
        at, count = operands[1], shape_of(operands[0])[role]
        table: SSAValue = arguments[0]
        ops: list[Operation] = []
        if row.whole is not None:
            count = count * shape_of(row.whole.result)[role] // shape_of(row.whole.x)[role]
            kind = self._part(row.whole.result, role, count)
            ops.append(tc.AllGatherOp(table, role, row.whole.axis.data, row.whole.why.data, kind))
            table = ops[0].results[0]
        output, index = " ".join(rule.output), " ".join(rule.inputs[1])
        near = tc.MapOp([arguments[1]], f"min(max(a, 0.0), {count - 1}.0)", f"{index} -> {index}", tensor(at))
        found = tc.GatherOp(table, near, row.gather.rule_text.data, tensor(row.gather.result))
        inside = f"mul(min(max(add(b, 1.0), 0.0), 1.0), min(max(sub({count}.0, b), 0.0), 1.0))"
        # A factor of 1 or 0, and a sum in which all terms but one are zeros: no bit of the row changes.
        masked = f"mul(a, {inside})" if len(operands) == 2 else f"add(c, mul(a, {inside}))"
        sides = [output, index, *([output] if len(operands) == 3 else [])]
        inputs = [found.result, *arguments[1:]]
        kept = tc.MapOp(inputs, masked, f"{', '.join(sides)} -> {output}", tensor(row.gather.result))
        return self._finish(function, [*ops, near, found, kept], [kept.result])

    def _function(self, name: str, values: Sequence[SSAValue]) -> FuncOp:
        """A function without operations that takes such values."""
        block = Block(arg_types=[v.type for v in values])
        names = [v.name_hint or f"arg{i}" for i, v in enumerate(values)]
        for argument, value in zip(block.args, values, strict=True):
            argument.name_hint = value.name_hint
        function = FuncOp(name, FunctionType.from_lists([], []), Region(block), "private")
        function.attributes[OUTLINED] = UnitAttr()
        function.attributes["arg_names"] = ArrayAttr([StringAttr(n) for n in names])
        return function

    def _finish(self, function: FuncOp, ops: Sequence[Operation], results: Sequence[SSAValue]) -> FuncOp:
        for op in ops:
            op.attributes[PATH] = StringAttr(function.sym_name.data.removesuffix(TAIL))
        function.body.block.add_ops([*ops, ReturnOp(*results)])
        set_type(function, argument_names(function))
        self.made[function.sym_name.data] = function
        return function
