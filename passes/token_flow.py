"""Which values of an outlined program run along its tokens, and whether tokens could be computed one after the other.

A value is *plain* (the same for all tokens), has *tokens* along one dimension, of each row of the batch in turn if that
was merged into it, or is a *cache*. Tokens are independent
if every operation on them is one of:
* an operation whose rule carries the token axis from its operands to its result: maps, reductions and contractions over
  other axes, reshapes and transposes that keep it, embeddings;
* a collective that gathers tokens or gives every unit its part of them: the parts are those of the chunk then;
* `kv_update` at slots that are an argument, and causal attention to caches that were updated at its own positions:
  positions grow along the tokens, so a token sees only what it and those before it have written.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from xdsl.dialects.func import CallOp, FuncOp, ReturnOp
from xdsl.ir import BlockArgument, Operation, SSAValue

from ir.axes import factors
from ir.dialects import tc
from ir.interpreter import names_of
from ir.types import axis_names, shape_of
from passes.outline import CACHE, HEAD

PLAIN, STATE = -1, -2
"""Roles of values; any other role is the dimension of the tokens, or of a unit's part of them."""
REGROUPING = (tc.AllGatherOp, tc.ReduceScatterOp, tc.LocalSliceOp)


class MixedTokensError(Exception):
    """An operation needs other tokens than its own."""


@dataclass
class Flow:
    """Roles of the values of a function; `caches`: for every result that is a cache, the argument it is an update of;
    `slots`: the arguments that say where caches are updated."""

    length: int
    arguments: tuple[int, ...]
    roles: dict[SSAValue, int]
    results: list[int] = field(default_factory=list[int])
    caches: dict[int, int] = field(default_factory=dict[int, int])
    slots: set[int] = field(default_factory=set[int])


@dataclass
class Row:
    """The row that a head reads: operand `tokens` of its call holds the tokens, operand `index` the row's number.
    `whole`: collects the tokens of all units before that."""

    call: CallOp
    function: FuncOp
    gather: tc.GatherOp
    tokens: int
    index: int
    whole: tc.AllGatherOp | None = None


@dataclass
class Program:
    """`@main` with `length` tokens a sequence: the roles of its values, the flow of every function called, and the row
    that the head reads."""

    length: int
    roles: dict[SSAValue, int]
    flows: dict[str, Flow]
    row: Row | None = None


def has_tokens(role: int) -> bool:
    """Whether a role is a dimension."""
    return role >= 0


def program_flow(main: FuncOp, functions: dict[str, FuncOp], length: int) -> Program:
    """Roles of all values of an outlined program. Raises MixedTokensError if its tokens are not independent."""
    block = main.body.block
    names = names_of(main, "arg_names", len(block.args))
    out = Program(length, {a: _argument_role(n, a) for n, a in zip(names, block.args, strict=True)}, {})
    for op in block.ops:
        if isinstance(op, CallOp):
            _call(op, functions[op.callee.string_value()], out)
        elif isinstance(op, ReturnOp):
            if any(has_tokens(out.roles[v]) for v in op.operands):
                raise MixedTokensError("the program returns a value of every token")
        elif isinstance(op, (tc.WeightOp, tc.ConstantOp)):
            out.roles[op.results[0]] = PLAIN
        else:
            raise MixedTokensError(f"{op.name} stands outside of the program's functions")
    for value, role in out.roles.items():
        updated = role == STATE and not isinstance(value, BlockArgument)
        if updated and any(not isinstance(u.operation, ReturnOp) for u in value.uses):
            raise MixedTokensError("two layers update one cache")
    return out


def _argument_role(name: str, value: SSAValue) -> int:
    axes = axis_names(value)
    if name.startswith(CACHE):
        return STATE
    return axes.index("S") if "S" in axes else PLAIN


def _call(call: CallOp, function: FuncOp, out: Program) -> None:
    name = function.sym_name.data
    roles = tuple(out.roles[v] for v in call.operands)
    if out.row is not None:
        raise MixedTokensError(f"@{name} is called after @{HEAD}")
    if name == HEAD and any(map(has_tokens, roles)):
        out.row = _picked_row(call, function, roles, out.length)
        results = [PLAIN] * len(call.results)
    else:
        known = out.flows.get(name)
        if known is None:
            known = out.flows[name] = function_flow(function, roles, out.length)
        if known.arguments != roles:
            raise MixedTokensError(f"@{name} is called with tokens in different arguments")
        if any(not isinstance(call.operands[i], BlockArgument) for i in known.slots):
            raise MixedTokensError(f"@{name}: the slots of a cache are computed")
        results = known.results
    out.roles |= dict(zip(call.results, results, strict=True))


def function_flow(function: FuncOp, arguments: Sequence[int], length: int) -> Flow:
    """Roles of the values of a function whose arguments have the given ones. Raises MixedTokensError."""
    block = function.body.block
    flow = Flow(length, tuple(arguments), dict(zip(block.args, arguments, strict=True)))
    for op in block.ops:
        try:
            if isinstance(op, ReturnOp):
                _returned(op, flow)
            else:
                role = _result_role(op, flow)
                flow.roles |= dict.fromkeys(op.results, role)
        except MixedTokensError as error:
            raise MixedTokensError(f"@{function.sym_name.data}: {error}") from None
    return flow


def _returned(op: ReturnOp, flow: Flow) -> None:
    for i, value in enumerate(op.operands):
        role = flow.roles[value]
        flow.results.append(role)
        if role == STATE:
            cache = value.owner.cache if isinstance(value.owner, tc.KvUpdateOp) else value
            if not isinstance(cache, BlockArgument):
                raise MixedTokensError("a cache is updated twice")
            flow.caches[i] = cache.index


def _result_role(op: Operation, flow: Flow) -> int:
    roles = flow.roles
    if not isinstance(op, tc.TcOp):
        raise MixedTokensError(f"{op.name} is not understood")
    if isinstance(op, tc.KvUpdateOp):
        _check_update(op, flow)
        assert isinstance(op.slots, BlockArgument)
        flow.slots.add(op.slots.index)
        return STATE
    own = [roles[o] for o in op.operands]
    if isinstance(op, tc.AttentionOp):
        _check_attention(op, roles)
        own[1] = own[2] = PLAIN  # every token sees the keys of all tokens before it, whoever wrote them
    if STATE in own:
        raise MixedTokensError(f"{op.name} reads a cache")
    if not any(map(has_tokens, own)):
        return PLAIN
    if isinstance(op, tc.ReshapeOp):
        return _reshaped(op, own[0], flow.length)
    if isinstance(op, REGROUPING) and has_tokens(own[0]):
        return own[0]  # which unit has which tokens changes nothing for a token
    rule = op.rule()
    axes = {side[role] for side, role in zip(rule.inputs, own, strict=True) if has_tokens(role)}
    axis = axes.pop()
    if axes or axis in rule.unsharded or axis not in rule.output or factors(axis) != (axis,):
        raise MixedTokensError(f"{op.name} `{rule}` mixes tokens")
    for side, role in zip(rule.inputs, own, strict=True):
        if any(axis in factors(a) for i, a in enumerate(side) if i != role):
            raise MixedTokensError(f"{op.name} `{rule}` meets a value as long as the tokens")
    return rule.output.index(axis)


def _reshaped(op: tc.ReshapeOp, role: int, length: int) -> int:
    """The dimension of the result in which a step of one token is as long as before."""
    source, target = shape_of(op.x), shape_of(op.result)
    inner = math.prod(source[role + 1 :])
    tokens = length if source[role] % length == 0 else source[role]
    for i, size in enumerate(target):
        if size % tokens == 0 and math.prod(target[i + 1 :]) == inner:
            return i
    raise MixedTokensError(f"tc.reshape {source} -> {target} mixes tokens")


def _check_update(op: tc.KvUpdateOp, flow: Flow) -> None:
    roles = flow.roles
    if not isinstance(op.cache, BlockArgument) or roles[op.cache] != STATE or len(list(op.cache.uses)) > 1:
        raise MixedTokensError("a cache is read beside its update")
    placed = (roles[op.new], roles[op.slots]) == (2, 1) and shape_of(op.slots)[1] == flow.length
    if not placed or not isinstance(op.slots, BlockArgument):
        raise MixedTokensError("a cache is updated with something else than tokens")


def _check_attention(op: tc.AttentionOp, roles: dict[SSAValue, int]) -> None:
    if not op.causal.value.data:
        raise MixedTokensError("attention sees later tokens")
    for value in (op.k, op.v):
        owner = value.owner
        if not isinstance(owner, tc.KvUpdateOp) or owner.slots is not op.positions:
            raise MixedTokensError("attention to something else than a cache updated at the same positions")


def _picked_row(call: CallOp, function: FuncOp, roles: Sequence[int], length: int) -> Row:
    """The gather with which a head begins. Raises MixedTokensError if it reads more than one row."""
    arguments = function.body.block.args
    [tokens, *others] = [i for i, role in enumerate(roles) if has_tokens(role)]
    uses = list(arguments[tokens].uses)
    gather = uses[0].operation if len(uses) == 1 and not others else None
    table: SSAValue = arguments[tokens]
    whole = gather if isinstance(gather, tc.AllGatherOp) else None
    if whole is not None and int(whole.dim.value.data) == roles[tokens] and len(list(whole.result.uses)) == 1:
        table, gather = whole.result, next(iter(whole.result.uses)).operation
    if not isinstance(gather, tc.GatherOp) or gather.table is not table:
        raise MixedTokensError(f"@{function.sym_name.data} reads more than one token of a sequence")
    rule, index = gather.rule(), gather.indices
    indexed = rule.inputs[0].index(gather.indexed_axis()) == roles[tokens]
    if not indexed or shape_of(gather.table)[roles[tokens]] != length or set(rule.inputs[1]) - set(rule.inputs[0]):
        raise MixedTokensError(f"@{function.sym_name.data} reads more than one token of a sequence")
    if not isinstance(index, BlockArgument) or roles[index.index] != PLAIN:
        raise MixedTokensError(f"@{function.sym_name.data} computes which token it reads")
    return Row(call, function, gather, tokens, index.index, whole)


def check_parts(program: Program, size: int) -> None:
    """Raises MixedTokensError if units cannot have equal parts of every chunk."""
    counts = {size, program.length % size} - {0}
    for flow in program.flows.values():
        for value, role in flow.roles.items():
            if has_tokens(role) and any(shape_of(value)[role] * n % program.length for n in counts):
                raise MixedTokensError(f"chunks of {size} tokens have no equal part for every unit")
