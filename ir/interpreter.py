"""Runs any `tc` module on numpy arrays, symbolic ones too: sizes come from the arguments.

This is the definition of what a module means; passes and the backend are compared with it (`ir.compare`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override
from xdsl.dialects import func
from xdsl.dialects.builtin import ArrayAttr, ModuleOp, StringAttr
from xdsl.interpreter import (
    Interpreter,
    InterpreterFunctions,
    PythonValues,
    ReturnedValues,
    TerminatorValue,
    impl,
    impl_callable,
    impl_terminator,
    register_impls,
)
from xdsl.ir import Attribute, Operation, SSAValue
from xdsl.traits import SymbolTable

from ir import kernels
from ir.axes import Dim, Size
from ir.dialects import tc
from ir.errors import Problem, UserError
from ir.types import dims_of, elem_of, numpy_dtype

Array = NDArray[Any]
Observer = Callable[[Operation, list[Array], tuple[str, ...]], None]
"""Called after every operation with its results and the chain of calls, such as `("main", "block_0[3]")`."""


@register_impls
class TcFunctions(InterpreterFunctions):
    """The kernels of `tc` and of function calls. Holds the weights, the bound symbols and the call path of one run."""

    def __init__(self, weights: Callable[[str], Array], observe: Observer | None) -> None:
        self.weights = weights
        self.observe = observe
        self.symbols: dict[str, int] = {}
        self.path: list[str] = []
        self.calls: Counter[tuple[tuple[str, ...], str]] = Counter()

    def shape(self, value: SSAValue) -> list[int]:
        """The shape of a value with the bound symbols."""
        sizes = [Size.of(d).substitute(self.symbols) for d in dims_of(value)]
        if unbound := [s for size in sizes for s in size.symbols]:
            raise kernels.KernelError(f"no argument gives the size of {unbound[0]}")
        return [size.factor for size in sizes]

    def between_units(self, op: tc.CollectiveOp) -> PythonValues:
        """One unit alone has no result here; `ir.spmd` computes these operations for all units together."""
        raise kernels.KernelError(f"{op.name} needs all units; run the module with ir.spmd.run_spmd")

    @impl(tc.WeightOp)
    def _weight(self, interpreter: Interpreter, op: tc.WeightOp, args: PythonValues) -> PythonValues:
        value = self.weights(op.fqn.data)
        if list(value.shape) != self.shape(op.result):
            raise kernels.KernelError(f"{op.fqn.data} has shape {list(value.shape)}, not {self.shape(op.result)}")
        return (value.astype(numpy_dtype(op.result), copy=False),)

    @impl(tc.ConstantOp)
    def _constant(self, interpreter: Interpreter, op: tc.ConstantOp, args: PythonValues) -> PythonValues:
        return (op.array(),)

    @impl(tc.ContractOp)
    def _contract(self, interpreter: Interpreter, op: tc.ContractOp, args: PythonValues) -> PythonValues:
        return (kernels.contract(op.rule(), args[0], args[1], numpy_dtype(op.result)),)

    @impl(tc.DequantizeOp)
    def _dequantize(self, interpreter: Interpreter, op: tc.DequantizeOp, args: PythonValues) -> PythonValues:
        return (kernels.dequantize(args[0], args[1], numpy_dtype(op.result)),)

    @impl(tc.MapOp)
    def _map(self, interpreter: Interpreter, op: tc.MapOp, args: PythonValues) -> PythonValues:
        return (kernels.map_(op.rule(), op.expression(), args, self.shape(op.result), numpy_dtype(op.result)),)

    @impl(tc.ReduceOp)
    def _reduce(self, interpreter: Interpreter, op: tc.ReduceOp, args: PythonValues) -> PythonValues:
        return (kernels.reduce(op.rule(), op.kind.data, op.expression(), args, numpy_dtype(op.result)),)

    @impl(tc.GatherOp)
    def _gather(self, interpreter: Interpreter, op: tc.GatherOp, args: PythonValues) -> PythonValues:
        return (kernels.gather(op.rule(), args[0], args[1]),)

    @impl(tc.AttentionOp)
    def _attention(self, interpreter: Interpreter, op: tc.AttentionOp, args: PythonValues) -> PythonValues:
        optional = iter(args[4:])
        lengths, bias, sinks = (None if o is None else next(optional) for o in (op.lengths, op.bias, op.sinks))
        q, k, v, positions = args[:4]
        if op.keys is not None:
            k, v, bias = kernels.first_keys(op.key_count, k, v, positions, bias)
        result = kernels.attention(
            q,
            k,
            v,
            positions,
            lengths,
            bias,
            sinks,
            scale=op.scale.value.data,
            causal=bool(op.causal.value.data),
            window=op.window.value.data,
            softcap=op.softcap.value.data,
            dtype=numpy_dtype(op.result),
        )
        return (result,)

    @impl(tc.KvUpdateOp)
    def _kv_update(self, interpreter: Interpreter, op: tc.KvUpdateOp, args: PythonValues) -> PythonValues:
        return (kernels.kv_update(*args),)

    @impl(tc.ReshapeOp)
    def _reshape(self, interpreter: Interpreter, op: tc.ReshapeOp, args: PythonValues) -> PythonValues:
        return (args[0].reshape(self.shape(op.result)),)

    @impl(tc.TransposeOp)
    def _transpose(self, interpreter: Interpreter, op: tc.TransposeOp, args: PythonValues) -> PythonValues:
        return (args[0].transpose(op.permutation),)

    @impl(tc.SliceOp)
    def _slice(self, interpreter: Interpreter, op: tc.SliceOp, args: PythonValues) -> PythonValues:
        axis, start, size = op.bounds()
        return (args[0].take(range(start, start + size), axis=axis),)

    @impl(tc.ConcatOp)
    def _concat(self, interpreter: Interpreter, op: tc.ConcatOp, args: PythonValues) -> PythonValues:
        return (np.concatenate(args, axis=op.axis.value.data),)

    @impl(tc.AllReduceOp)
    def _all_reduce(self, interpreter: Interpreter, op: tc.AllReduceOp, args: PythonValues) -> PythonValues:
        return self.between_units(op)

    @impl(tc.AllGatherOp)
    def _all_gather(self, interpreter: Interpreter, op: tc.AllGatherOp, args: PythonValues) -> PythonValues:
        return self.between_units(op)

    @impl(tc.ReduceScatterOp)
    def _reduce_scatter(self, interpreter: Interpreter, op: tc.ReduceScatterOp, args: PythonValues) -> PythonValues:
        return self.between_units(op)

    @impl(tc.LocalSliceOp)
    def _local_slice(self, interpreter: Interpreter, op: tc.LocalSliceOp, args: PythonValues) -> PythonValues:
        return self.between_units(op)

    @impl(tc.AxisIndexOp)
    def _axis_index(self, interpreter: Interpreter, op: tc.AxisIndexOp, args: PythonValues) -> PythonValues:
        return self.between_units(op)

    @impl_terminator(func.ReturnOp)
    def _return(
        self, interpreter: Interpreter, op: func.ReturnOp, args: PythonValues
    ) -> tuple[TerminatorValue, PythonValues]:
        return ReturnedValues(args), ()

    @impl(func.CallOp)
    def _call(self, interpreter: Interpreter, op: func.CallOp, args: PythonValues) -> PythonValues:
        callee = op.callee.string_value()
        key = (tuple(self.path), callee)
        self.path.append(f"{callee}[{self.calls[key]}]")
        self.calls[key] += 1
        results = interpreter.call_op(callee, args)
        self.path.pop()
        return results

    @impl_callable(func.FuncOp)
    def _function(self, interpreter: Interpreter, op: func.FuncOp, args: PythonValues) -> PythonValues:
        outer = self.symbols
        self.symbols = bind_symbols([dims_of(a) for a in op.body.block.args], [list(a.shape) for a in args])
        results = interpreter.run_ssacfg_region(op.body, args, op.sym_name.data)
        self.symbols = outer
        return results


class _Observing(Interpreter.Listener):
    def __init__(self, functions: TcFunctions, observe: Observer) -> None:
        self.functions = functions
        self.observe = observe

    @override
    def did_interpret_op(self, op: Operation, results: PythonValues) -> None:
        if op.results:
            self.observe(op, list(results), tuple(self.functions.path))


def bind_symbols(
    dims: Sequence[Sequence[Dim]], shapes: Sequence[Sequence[int]], names: Sequence[str] | None = None
) -> dict[str, int]:
    """The numbers that symbols of types `dims` stand for when the arrays have `shapes`.

    Raises UserError with every argument that does not fit.
    """
    names = names or [f"argument {i}" for i in range(len(dims))]
    symbols: dict[str, int] = {}
    problems: list[Problem] = []
    for want, have in zip(dims, shapes, strict=True):
        for dim, size in zip(want, have, strict=False):
            if isinstance(dim, str) and Size.of(dim).symbols == (dim,):
                symbols.setdefault(dim, size)
    for name, want, have in zip(names, dims, shapes, strict=True):
        sizes = [Size.of(d).substitute(symbols) for d in want]
        fits = len(want) == len(have) and all(s.symbols or s.factor == h for s, h in zip(sizes, have, strict=True))
        if not fits:
            expected = ", ".join(str(d) for d in want)
            bound = ", ".join(f"{k} = {v}" for k, v in symbols.items())
            why = f"it has shape {list(have)}, the function takes [{expected}]{f' with {bound}' if bound else ''}"
            problems.append(Problem(name, why, "give arrays of one bucket"))
    if problems:
        raise UserError(problems)
    return symbols


def names_of(function: func.FuncOp, key: str, count: int) -> list[str]:
    """The names in attribute `arg_names` or `result_names`, or `arg0`, `arg1`, ... if there is none."""
    names = function.attributes.get(key)
    if isinstance(names, ArrayAttr):
        return [n.data for n in cast("ArrayAttr[Attribute]", names).data if isinstance(n, StringAttr)]
    return [f"{key.split('_')[0]}{i}" for i in range(count)]


def find_function(module: ModuleOp, name: str) -> func.FuncOp:
    """A function of a module by name; raises UserError if there is none."""
    function = SymbolTable.lookup_symbol(module, name)
    if not isinstance(function, func.FuncOp):
        known = ", ".join(op.sym_name.data for op in module.ops if isinstance(op, func.FuncOp))
        raise UserError([Problem(f"function @{name}", "the module does not have it", f"choose one of {known}")])
    return function


def arrange_arguments(function: func.FuncOp, args: Mapping[str, Array] | Sequence[Array]) -> list[Array]:
    """Arguments in order and in the dtype of their types.

    Raises UserError with every missing, unknown or misfitting one. Integers may be wider if their values fit.
    """
    values = function.body.block.args
    names = names_of(function, "arg_names", len(values))
    problems: list[Problem] = []
    if isinstance(args, Mapping):
        missing, unknown = [n for n in names if n not in args], [n for n in args if n not in names]
        problems += [Problem(f"argument {n}", "it is missing", "give it") for n in missing]
        problems += [Problem(f"argument {n}", "the function has no such argument", "leave it out") for n in unknown]
        given = [args[n] for n in names if n in args]
    else:
        given = list(args)
        if len(given) != len(names):
            problems.append(
                Problem(f"{len(given)} arguments", f"@{function.sym_name.data} has {len(names)}", str(names))
            )
    if problems:
        raise UserError(problems)
    arranged: list[Array] = []
    for name, value, array in zip(names, values, given, strict=True):
        dtype, array = numpy_dtype(value), np.asarray(array)
        integers = array.dtype.kind in "iub" and dtype.kind in "ib"
        cast = array.astype(dtype, copy=False)
        if array.dtype != dtype and not (integers and np.array_equal(cast, array)):
            problems.append(Problem(f"argument {name}", f"it is {array.dtype}, not {elem_of(value)}", "convert it"))
        arranged.append(cast)
    if problems:
        raise UserError(problems)
    bind_symbols([dims_of(v) for v in values], [list(a.shape) for a in arranged], names)
    return arranged


def run(
    module: ModuleOp,
    args: Mapping[str, Array] | Sequence[Array],
    weights: Callable[[str], Array] | None = None,
    function: str = "main",
    observe: Observer | None = None,
) -> dict[str, Array]:
    """Run a function and return its results by name.

    `args` by name or in order; bf16 arrays have dtype `ml_dtypes.bfloat16`. `weights` returns a weight by name.
    Raises UserError for arguments that do not fit.
    """
    target = find_function(module, function)
    arranged = arrange_arguments(target, args)
    functions = TcFunctions(weights or _no_weights, observe)
    functions.path.append(function)
    listeners = (_Observing(functions, observe),) if observe is not None else ()
    interpreter = Interpreter(module, listeners=listeners)
    interpreter.register_implementations(functions)
    results = interpreter.call_op(function, tuple(arranged))
    return dict(zip(names_of(target, "result_names", len(results)), results, strict=True))


def _no_weights(name: str) -> Array:
    raise UserError([Problem(f"weight {name}", "the run was given no weights", "pass a weight table's load")])
