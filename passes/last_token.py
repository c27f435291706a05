"""last-token: compute logits for the one row that is sampled, not for every input token.

Before:
    func.func @main(%input_ids, %position_ids, ...) -> logits: BxSxV
    %n = tc.map "mul(a, b)" over "b s h, h -> b s h" (%h, %g) : tensor<?x?x576xbf16, #tc.axes<"B,S,_">>
    %y = tc.contract "b s i, v i -> b s v" (%n, %w) : tensor<?x?x49152xbf16, #tc.axes<"B,S,_">>
After:
    func.func @main(%input_ids, %position_ids, %last: B, ...) -> logits: Bx1xV
    %l = tc.gather "a b c, a -> a c" (%h, %last) : tensor<?x576xbf16, #tc.axes<"B,_">>
    %r = tc.reshape %l : tensor<?x1x576xbf16, #tc.axes<"B,_,_">>
    %n = tc.map "mul(a, b)" over "b s h, h -> b s h" (%r, %g) : tensor<?x1x576xbf16, #tc.axes<"B,_,_">>
    %y = tc.contract "b s i, v i -> b s v" (%n, %w) : tensor<?x1x49152xbf16, #tc.axes<"B,_,_">>

The row moves up through operations that treat tokens alone (maps, contractions, reductions, reshapes), to the result of
the last block. The rank stays, so rules stay. A module without a result named `logits` (an encoder) is left as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from typing_extensions import override
from xdsl.context import Context
from xdsl.dialects.builtin import ArrayAttr, FunctionType, ModuleOp, StringAttr, TensorType
from xdsl.dialects.func import FuncOp, ReturnOp
from xdsl.ir import Attribute, Operation, SSAValue
from xdsl.passes import ModulePass
from xdsl.traits import SymbolTable
from xdsl.transforms.dead_code_elimination import dce
from xdsl.utils.exceptions import PassFailedException

from ir.axes import Dim, Size, factors
from ir.dialects import tc
from ir.interpreter import names_of
from ir.types import dims_of, labelled_dims, tensor, tensor_type
from passes.provenance import inherit

LOGITS = "logits"
ARGUMENT = "last"
AFTER = "position_ids"
TOKENS, BATCH = "S", "B"


def token_dims(value: SSAValue) -> list[int]:
    """The dimensions whose size holds the number of tokens, such as S or B*S."""
    return [i for i, d in enumerate(dims_of(value)) if isinstance(d, str) and TOKENS in Size.of(d).symbols]


def one_token(value: SSAValue) -> TensorType[Attribute]:
    """The type of a value when there is one token a sequence: S becomes 1, B*S becomes B."""
    shape: list[Dim | tuple[str, int]] = [
        Size.of(d).substitute({TOKENS: 1}).dim if isinstance(d, str) else d for d in labelled_dims(value)
    ]
    return tensor_type(tensor(value).element_type, shape)


def operand_dims(op: Operation, dim: int) -> list[list[int]] | None:
    """For each operand the dimensions that run with result dimension `dim`; None if tokens are not treated alone."""
    if isinstance(op, tc.ReshapeOp):
        return _reshape_dims(op, dim)
    if isinstance(op, (tc.SliceOp, tc.ConcatOp)) and op.axis.value.data == dim:
        return None
    if not isinstance(op, (tc.ContractOp, tc.MapOp, tc.ReduceOp, tc.TransposeOp, tc.SliceOp, tc.ConcatOp)):
        return None
    rule = op.rule()
    return [[i for i, a in enumerate(side) if a == rule.output[dim]] for side in rule.inputs]


def _reshape_dims(op: tc.ReshapeOp, dim: int) -> list[list[int]] | None:
    """A reshape passes a row on if only dimensions with tokens or the batch are merged or split around it."""
    rule = op.rule()
    shared = set(factors(rule.output[dim])) - rule.unsharded
    sizes = rule.sizes([dims_of(op.x), dims_of(op.result)])
    tokens = {a for a in shared if TOKENS in Size.of(sizes.get(a, 1)).symbols}
    source = [i for i, d in enumerate(rule.inputs[0]) if tokens & set(factors(d))]
    return [source] if len(source) == 1 and tokens else None


@dataclass
class RowSelection:
    """Builds, next to a function's operations, the part of them that computes one row of a value."""

    function: FuncOp
    last: SSAValue
    known: dict[SSAValue, SSAValue] = field(default_factory=dict[SSAValue, SSAValue])

    def row(self, value: SSAValue) -> SSAValue:
        """The value for the last token only, computed from as far up as is legal."""
        if value in self.known:
            return self.known[value]
        dims = token_dims(value)
        if not dims:
            return value
        if len(dims) > 1:
            raise PassFailedException(f"last-token: {tensor(value)} has tokens in several dimensions")
        owner = value.owner
        places = operand_dims(owner, dims[0]) if isinstance(owner, Operation) else None
        if places is None or not isinstance(owner, Operation) or not self._passes(owner, places):
            self.known[value] = self._gather(value, dims[0])
        else:
            operands = [self.row(o) if p else o for o, p in zip(owner.operands, places, strict=True)]
            self.known[value] = self._rebuild(owner, operands)
        return self.known[value]

    def _passes(self, op: Operation, places: Sequence[Sequence[int]]) -> bool:
        """Whether every operand has tokens exactly where the result's token dimension says."""
        return all(token_dims(o) == list(p) for o, p in zip(op.operands, places, strict=True))

    def _rebuild(self, op: Operation, operands: Sequence[SSAValue]) -> SSAValue:
        # The function is in SSA order and rows are built behind their operands, so the end of the block is legal.
        new = op.clone()
        new.operands = operands
        new.results[0]._type = one_token(op.results[0])  # pyright: ignore[reportPrivateUsage]
        return self._insert(new, op)

    def _gather(self, value: SSAValue, dim: int) -> SSAValue:
        sizes = dims_of(value)
        if sizes[dim] != TOKENS or BATCH not in sizes:
            raise PassFailedException(f"last-token: no row can be selected from {tensor(value)}")
        axes = tc.own_axes(len(sizes))
        rest = [a for i, a in enumerate(axes) if i != dim]
        rule = f"{' '.join(axes)}, {axes[sizes.index(BATCH)]} -> {' '.join(rest)}"
        shape = labelled_dims(value)
        kind = tensor(value).element_type
        flat = tc.GatherOp(value, self.last, rule, tensor_type(kind, [*shape[:dim], *shape[dim + 1 :]]))
        self._insert(flat, value.owner)
        return self._insert(tc.ReshapeOp(flat, one_token(value)), value.owner)

    def _insert(self, op: Operation, origin: object) -> SSAValue:
        if isinstance(origin, Operation):
            inherit(op, origin)
        block = self.function.body.block
        assert block.last_op is not None
        block.insert_op_before(op, block.last_op)
        return op.results[0]


def set_names(function: FuncOp, key: str, names: Sequence[str]) -> None:
    """Write `arg_names` or `result_names`."""
    function.attributes[key] = ArrayAttr([StringAttr(n) for n in names])


@dataclass(frozen=True)
class LastToken(ModulePass):
    """Add argument `last` and compute logits for that row of every sequence."""

    name = "last-token"

    @override
    def apply(self, ctx: Context, op: ModuleOp) -> None:
        function = SymbolTable.lookup_symbol(op, "main")
        if not isinstance(function, FuncOp):
            raise PassFailedException("last-token: the module has no @main")
        block = function.body.block
        terminator = block.last_op
        assert isinstance(terminator, ReturnOp)
        results = names_of(function, "result_names", len(terminator.operands))
        arguments = names_of(function, "arg_names", len(block.args))
        if LOGITS not in results or ARGUMENT in arguments:
            return
        logits = terminator.operands[results.index(LOGITS)]
        if not token_dims(logits):
            raise PassFailedException(
                f"last-token: logits {tensor(logits)} have no symbolic S; run it before specialise"
            )
        at = arguments.index(AFTER) + 1 if AFTER in arguments else 1
        last = block.insert_arg(tensor_type("i32", [BATCH]), at)
        last.name_hint = ARGUMENT
        set_names(function, "arg_names", [*arguments[:at], ARGUMENT, *arguments[at:]])
        row = RowSelection(function, last).row(logits)
        terminator.operands[results.index(LOGITS)] = row
        function.function_type = FunctionType.from_lists(
            [a.type for a in block.args], [o.type for o in terminator.operands]
        )
        dce(op)
