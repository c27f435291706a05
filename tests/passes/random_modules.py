"""Random small `tc` modules: every pass must keep what they compute."""

from __future__ import annotations

from dataclasses import dataclass, field

import ml_dtypes
import numpy as np
from hypothesis import strategies as st
from xdsl.dialects.builtin import ArrayAttr, FunctionType, ModuleOp, StringAttr
from xdsl.dialects.func import CallOp, FuncOp, ReturnOp
from xdsl.ir import Block, SSAValue

from ir import expr as ex
from ir.dialects import tc
from ir.interpreter import run
from ir.types import dims_of, elem_of, tensor_type
from tests.ir.strategies import expressions

AXES = {"B": "b", "S": "s", "B*S": "n", 8: "h", 2: "i", 4: "j"}
"""Every dimension of a tensor has another size, so that sizes tell axes."""

SIZES = {"B": 3, "S": 5, "KV": 7}

BOUNDED_UNARY = ["tanh", "sigmoid", "neg", "abs", "sin", "cos", "erf"]


def axes(value: SSAValue) -> list[str]:
    return [AXES[d] for d in dims_of(value)]


def smooth_expressions(operands: int) -> st.SearchStrategy[ex.Expr]:
    """Continuous and bounded, so that a rounding error stays one."""
    leaves = st.integers(0, operands - 1).map(ex.Input)
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.builds(lambda f, x: ex.Call(f, (x,)), st.sampled_from(BOUNDED_UNARY), inner),
            st.builds(lambda f, x, y: ex.Call(f, (x, y)), st.sampled_from(["add", "max", "min"]), inner, inner),
            st.builds(lambda x: ex.Call("mul", (x, ex.Const(0.5))), inner),
        ),
        max_leaves=4,
    )


@dataclass
class Draft:
    """A function under construction."""

    block: Block
    weights: dict[str, np.ndarray] = field(default_factory=dict)

    def values(self) -> list[SSAValue]:
        computed = [r for op in self.block.ops if not isinstance(op, tc.WeightOp) for r in op.results]
        return [*self.block.args, *computed]

    def add(self, op: tc.TcOp) -> SSAValue:
        op.verify()
        self.block.add_op(op)
        return op.results[0]

    def weight(self, shape: list[int]) -> SSAValue:
        name = f"w{len(self.weights)}"
        self.weights[name] = np.random.default_rng(len(self.weights)).standard_normal(shape).astype(ml_dtypes.bfloat16)
        return self.add(tc.WeightOp(name, tensor_type("bf16", shape)))


def add_map(draw: st.DrawFn, draft: Draft, exact: bool, elems: list[str]) -> None:
    target = draw(st.sampled_from(draft.values()))
    fitting = [v for v in draft.values() if set(dims_of(v)) <= set(dims_of(target))]
    operands = [target, *draw(st.lists(st.sampled_from(fitting), max_size=2))]
    expr = draw(expressions(len(operands)) if exact else smooth_expressions(len(operands)))
    for index in range(len(operands)):
        if index not in ex.inputs(expr):
            expr = ex.Call("add", (expr, ex.Input(index)))
    out = draw(st.permutations(dims_of(target)))
    rule = f"{', '.join(' '.join(axes(v)) for v in operands)} -> {' '.join(AXES[d] for d in out)}"
    draft.add(tc.MapOp(operands, str(expr), rule, tensor_type(draw(st.sampled_from(elems)), out)))


def add_cast(draw: st.DrawFn, draft: Draft, exact: bool, elems: list[str]) -> None:
    x = draw(st.sampled_from(draft.values()))
    rule = f"{' '.join(axes(x))} -> {' '.join(axes(x))}"
    draft.add(tc.MapOp([x], "a", rule, tensor_type(draw(st.sampled_from(elems)), dims_of(x))))


def add_transpose(draw: st.DrawFn, draft: Draft, exact: bool, elems: list[str]) -> None:
    x = draw(st.sampled_from(draft.values()))
    perm = draw(st.permutations(range(len(dims_of(x)))))
    draft.add(tc.TransposeOp(x, perm, tensor_type(elem_of(x), [dims_of(x)[p] for p in perm])))


def add_reshape(draw: st.DrawFn, draft: Draft, exact: bool, elems: list[str]) -> None:
    x = draw(st.sampled_from(draft.values()))
    dims = dims_of(x)
    for parts, whole in (([2, 4], 8), (["B", "S"], "B*S")):
        joined = [i for i in range(len(dims) - 1) if dims[i : i + 2] == parts]
        if whole in dims:
            at = dims.index(whole)
            draft.add(tc.ReshapeOp(x, tensor_type(elem_of(x), [*dims[:at], *parts, *dims[at + 1 :]])))
            return
        if joined:
            at = joined[0]
            draft.add(tc.ReshapeOp(x, tensor_type(elem_of(x), [*dims[:at], whole, *dims[at + 2 :]])))
            return


def add_halves(draw: st.DrawFn, draft: Draft, exact: bool, elems: list[str]) -> None:
    wide = [v for v in draft.values() if 8 in dims_of(v) and 4 not in dims_of(v)]
    if not wide:
        return
    x = draw(st.sampled_from(wide))
    at = dims_of(x).index(8)
    half = tensor_type(elem_of(x), [4 if d == 8 else d for d in dims_of(x)])
    low, high = (draft.add(tc.SliceOp(x, at, start, 4, half)) for start in (0, 4))
    draft.add(tc.ConcatOp([high, low], at, tensor_type(elem_of(x), dims_of(x))))


def add_constant(draw: st.DrawFn, draft: Draft, exact: bool, elems: list[str]) -> None:
    array = np.full(8, 1.5) if draw(st.booleans()) else np.arange(8.0)
    draft.add(tc.ConstantOp(array, tensor_type(draw(st.sampled_from(elems)), [8])))


def add_contract(draw: st.DrawFn, draft: Draft, exact: bool, elems: list[str]) -> None:
    wide = [v for v in draft.values() if 8 in dims_of(v)]
    x = draw(st.sampled_from(wide))
    out = draw(st.permutations(dims_of(x)))
    names = ["o" if d == 8 else AXES[d] for d in out]
    rule = f"{' '.join(axes(x))}, o h -> {' '.join(names)}"
    kind = tensor_type(draw(st.sampled_from(elems)), out)
    y = draft.add(tc.ContractOp(x, draft.weight([8, 8]), rule, kind))
    # Bounded again, so that depth does not amplify.
    rule = f"{' '.join(axes(y))} -> {' '.join(axes(y))}"
    draft.add(tc.MapOp([y], "tanh(mul(a, 0.25))", rule, kind))


def add_reduce(draw: st.DrawFn, draft: Draft, exact: bool, elems: list[str]) -> None:
    x = draw(st.sampled_from([v for v in draft.values() if len(dims_of(v)) > 1]))
    dims = dims_of(x)
    over = draw(st.integers(0, len(dims) - 1))
    out = [d for i, d in enumerate(dims) if i != over]
    rule = f"{' '.join(axes(x))} -> {' '.join(AXES[d] for d in out)}"
    kind = draw(st.sampled_from(["add", "max", "min"]))
    draft.add(tc.ReduceOp([x], kind, "mul(a, 0.125)", rule, tensor_type("f32", out)))


ELEMENTWISE = [add_map, add_map, add_cast, add_transpose, add_reshape, add_halves, add_constant]
ARITHMETIC = [*ELEMENTWISE, add_contract, add_reduce]
ARGUMENTS = [["B", "S", 8], ["S", 8], ["B", "S"], [8]]


@dataclass
class Case:
    module: ModuleOp
    weights: dict[str, np.ndarray]
    args: dict[str, np.ndarray]

    def run(self, module: ModuleOp | None = None) -> dict[str, np.ndarray]:
        return run(module or self.module, self.args, self.weights.__getitem__)


@st.composite
def modules(draw: st.DrawFn, exact: bool) -> Case:
    """A module whose `@main` calls `@block` twice, and its inputs.

    exact: any functions and roundings, but nothing whose result depends on the order of a sum. Otherwise: contractions
    and reductions too, in f32 and of bounded functions.
    """
    elems = ["f32", "bf16"] if exact else ["f32"]
    kinds = [tensor_type(draw(st.sampled_from(elems)), shape) for shape in ARGUMENTS]
    draft = Draft(Block(arg_types=kinds))
    for _ in range(draw(st.integers(1, 7))):
        draw(st.sampled_from(ELEMENTWISE if exact else ARITHMETIC))(draw, draft, exact, elems)
    weights = draft.weights
    others = draw(st.lists(st.sampled_from(draft.values()), max_size=2))
    same = [v for v in draft.values() if v.type == kinds[0]]
    first = same[-1]
    draft.block.add_op(ReturnOp(first, *others))
    results = [first.type, *(o.type for o in others)]
    block = FuncOp("block", FunctionType.from_lists(kinds, results), visibility="private")
    block.body.detach_block(0)
    block.body.add_block(draft.block)
    main = FuncOp("main", FunctionType.from_lists(kinds, [*results, *results]))
    entry = main.body.block
    one = CallOp("block", list(entry.args), results)
    two = CallOp("block", [one.results[0], *entry.args[1:]], results)
    entry.add_ops([one, two, ReturnOp(*one.results, *two.results)])
    names = [f"arg{i}" for i in range(len(kinds))]
    main.attributes["arg_names"] = ArrayAttr([StringAttr(n) for n in names])
    module = ModuleOp([block, main])
    module.verify()
    rng = np.random.default_rng(11)
    dtypes = {"f32": np.float32, "bf16": ml_dtypes.bfloat16}
    args = {
        name: rng.standard_normal([d if isinstance(d, int) else SIZES[d] for d in dims_of(kind)]).astype(
            dtypes[elem_of(kind)]
        )
        for name, kind in zip(names, kinds, strict=True)
    }
    return Case(module, weights, args)
