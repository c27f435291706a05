"""Runs a partitioned `tc` module for all units of its mesh in lock step: what the units together must compute.

Weights, and arguments with a placement, are cut for every unit. A value that is the same object for all units (nothing
that differs went into it) is computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from xdsl.dialects import func
from xdsl.dialects.builtin import ArrayAttr, ModuleOp, StringAttr
from xdsl.interpreter import Interpreter
from xdsl.ir import Attribute, Operation, SSAValue

from ir import kernels
from ir.dialects import tc
from ir.errors import Problem, UserError
from ir.interpreter import TcFunctions, find_function, names_of
from ir.placement import Mesh, Shard, own_part
from ir.types import numpy_dtype, shape_of

Array = NDArray[Any]
PerUnit = list[Array]
"""A value: one array a unit."""

Observer = Callable[[Operation, list[PerUnit], tuple[str, ...]], None]
"""Called after every operation with its results for all units, and the chain of calls."""


def argument_shards(function: func.FuncOp) -> list[Shard | None]:
    """The placement of every argument from attribute `arg_shards`; None for a whole one."""
    texts = function.attributes.get(tc.ARG_SHARDS)
    count = len(function.body.block.args)
    if not isinstance(texts, ArrayAttr):
        return [None] * count
    found = [t.data for t in cast("ArrayAttr[Attribute]", texts).data if isinstance(t, StringAttr)]
    return [Shard.parse(t) if t else None for t in found]


def run_spmd(
    module: ModuleOp,
    args: Mapping[str, Array] | Sequence[Array],
    weights: Callable[[str], Array],
    function: str = "main",
    observe: Observer | None = None,
) -> dict[str, PerUnit]:
    """Run a function of a partitioned module on whole arguments; returns every unit's results by name.

    Arguments and weights are given whole and are cut here. Raises UserError for a module without a mesh and for
    arguments that do not fit.
    """
    mesh = tc.mesh_of(module)
    if mesh is None:
        raise UserError([Problem("the module has no mesh", "it is not partitioned", "run plan-tp and partition first")])
    target = find_function(module, function)
    names = names_of(target, "arg_names", len(target.body.block.args))
    given = [args[n] for n in names] if isinstance(args, Mapping) else list(args)
    values: list[PerUnit] = []
    problems: list[Problem] = []
    for name, array, value, shard in zip(names, given, target.body.block.args, argument_shards(target), strict=True):
        array = np.asarray(array).astype(numpy_dtype(value), copy=False)
        want = shard.shape if shard is not None else shape_of(value)
        if list(array.shape) != want:
            problems.append(Problem(f"argument {name}", f"it has shape {list(array.shape)}, not {want}", "give it"))
            continue
        values.append(_cut(array, shard, mesh))
    if problems:
        raise UserError(problems)
    runner = _Runner(module, mesh, weights, observe)
    results = runner.call(target, values, (function,))
    return dict(zip(names_of(target, "result_names", len(results)), results, strict=True))


def join_results(module: ModuleOp, results: Mapping[str, PerUnit], function: str = "main") -> dict[str, Array]:
    """Whole results: what has a placement as an argument of the same name (a cache) is joined, of copies unit 0's."""
    mesh = tc.mesh_of(module)
    assert mesh is not None
    target = find_function(module, function)
    names = names_of(target, "arg_names", len(target.body.block.args))
    shards = dict(zip(names, argument_shards(target), strict=True))
    whole: dict[str, Array] = {}
    for name, parts in results.items():
        shard = shards.get(name)
        whole[name] = parts[0] if shard is None else shard.join(parts, mesh)
    return whole


def _cut(array: Array, shard: Shard | None, mesh: Mesh) -> PerUnit:
    if shard is None:
        return [array] * mesh.size
    return [shard.cut(array, mesh, unit) for unit in range(mesh.size)]


class _Runner:
    """One run: the environment of each call maps a value to one array a unit."""

    def __init__(self, module: ModuleOp, mesh: Mesh, weights: Callable[[str], Array], observe: Observer | None) -> None:
        self.module, self.mesh, self.weights, self.observe = module, mesh, weights, observe
        self.functions = TcFunctions(weights, None)
        self.interpreter = Interpreter(module)
        self.interpreter.register_implementations(self.functions)
        self.calls: dict[str, int] = {}

    def call(self, function: func.FuncOp, args: Sequence[PerUnit], path: tuple[str, ...]) -> list[PerUnit]:
        """Run a function for all units."""
        env: dict[SSAValue, PerUnit] = dict(zip(function.body.block.args, args, strict=True))
        for op in function.body.block.ops:
            operands = [env[o] for o in op.operands]
            if isinstance(op, func.ReturnOp):
                return operands
            if isinstance(op, func.CallOp):
                name = op.callee.string_value()
                number = self.calls.get(name, 0)
                self.calls[name] = number + 1
                results = self.call(find_function(self.module, name), operands, (*path, f"{name}[{number}]"))
            else:
                results = [self.value(op, operands)]
            for result, value in zip(op.results, results, strict=True):
                env[result] = value
            if self.observe is not None:
                self.observe(op, results, path)
        raise AssertionError(f"@{function.sym_name.data} does not return")

    def value(self, op: Operation, operands: Sequence[PerUnit]) -> PerUnit:
        """The result of an operation for all units."""
        if isinstance(op, tc.CollectiveOp):
            return exchange(op, operands, self.mesh)
        if isinstance(op, tc.WeightOp):
            array = self.weights(op.fqn.data).astype(numpy_dtype(op.result), copy=False)
            return _cut(array, op.placement(), self.mesh)
        if all(part is value[0] for value in operands for part in value):
            return [self.one(op, [value[0] for value in operands])] * self.mesh.size
        return [self.one(op, [value[unit] for value in operands]) for unit in range(self.mesh.size)]

    def one(self, op: Operation, operands: Sequence[Array]) -> Array:
        """The result of an operation for one unit; raises KernelError if its shape is not the type's."""
        result = self.interpreter.run_op(op, tuple(operands))[0]
        if list(result.shape) != shape_of(op.results[0]):
            raise kernels.KernelError(f"{op.name} gives shape {list(result.shape)}, not {shape_of(op.results[0])}")
        return result


def exchange(op: tc.CollectiveOp, operands: Sequence[PerUnit], mesh: Mesh) -> PerUnit:
    """The result of an operation between units, for all units."""
    axis, units = op.axis.data, range(mesh.size)
    place = [mesh.coordinate(unit, axis) for unit in units]
    if isinstance(op, tc.AxisIndexOp):
        return [np.array(place[unit] * op.scale.value.data, np.int32) for unit in units]
    (x,) = operands
    group = [mesh.group(unit, axis) for unit in units]
    if isinstance(op, tc.LocalSliceOp):
        return [own_part(x[unit], op.dim.value.data, mesh[axis], place[unit]) for unit in units]
    if isinstance(op, tc.AllGatherOp):
        whole = {tuple(g): np.concatenate([x[u] for u in g], axis=op.dim.value.data) for g in group}
        return [whole[tuple(g)] for g in group]
    if isinstance(op, (tc.AllReduceOp, tc.ReduceScatterOp)):
        total = {tuple(g): kernels.all_reduce([x[u] for u in g], op.kind.data) for g in group}
        if isinstance(op, tc.AllReduceOp):
            return [total[tuple(g)] for g in group]
        dim = op.dim.value.data
        return [own_part(total[tuple(group[unit])], dim, mesh[axis], place[unit]) for unit in units]
    raise kernels.KernelError(f"{op.name} has no kernel between units")
