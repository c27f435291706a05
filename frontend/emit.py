"""Emitting tc operations: values with lazy broadcasts, and the few builders every ATen rule is written with.

A traced tensor becomes a `View`: an SSA value plus which of its dimensions stands at each logical dimension (None for
a broadcast one). Unsqueeze and expand only change the view; a map or contraction then omits the axis in its rule, so
no broadcast is ever materialised for them. Tensors filled with one number, 0-dimensional constants included, are
`Splat`s and end up as literals in expressions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from xdsl.dialects.builtin import FileLineColLoc, IntAttr, StringAttr
from xdsl.ir import Block, Operation, SSAValue

from ir.axes import Dim
from ir.dialects import tc
from ir.types import dims_of, tensor_type


class NoRuleError(Exception):
    """A node that has no rule, or one whose rule does not cover this use. Collected, then reported all together."""


@dataclass(frozen=True)
class View:
    """`shape[i]` is the size of logical dimension i, `dims[i]` the dimension of `ssa` that holds it or None."""

    ssa: SSAValue
    dims: tuple[int | None, ...]
    shape: tuple[Dim, ...]
    elem: str


@dataclass(frozen=True)
class Splat:
    """A tensor of any shape (0-dimensional for a scalar) whose elements are all `value`."""

    value: float
    shape: tuple[Dim, ...]
    elem: str


Value = View | Splat


def full_view(ssa: SSAValue, shape: Sequence[Dim], elem: str) -> View:
    """The view that shows an SSA value as it is."""
    return View(ssa, tuple(range(len(shape))), tuple(shape), elem)


def literal(value: float) -> str:
    """A number as the expression language spells it; f32 is the precision of every expression."""
    if math.isinf(value):
        value = math.copysign(float(np.finfo(np.float32).max), value)
    if math.isnan(value):
        raise NoRuleError("a NaN constant")
    return repr(float(value))


class Emitter:
    """Appends tc operations to one block, with the provenance of the node being converted.

    `path` is the module path inside the function (`self_attn.q_proj`), `line` the model's source line.
    """

    def __init__(self, block: Block) -> None:
        self.block = block
        self.path = ""
        self.line: tuple[str, int] | None = None
        self._weights: dict[str, View] = {}

    def insert(self, op: Operation, shape: Sequence[Dim], elem: str) -> View:
        """Append an operation with one result and view it."""
        if self.path:
            op.attributes["path"] = StringAttr(self.path)
        if self.line is not None:
            op.location = FileLineColLoc(StringAttr(self.line[0]), IntAttr(self.line[1]), IntAttr(0))
        self.block.add_op(op)
        return full_view(op.results[0], shape, elem)

    def weight(self, name: str, shape: Sequence[Dim], elem: str) -> View:
        """A reference to a parameter or buffer; one operation a name."""
        if name not in self._weights:
            op = tc.WeightOp(name, tensor_type(elem, shape))
            # Weights go first, so that a function can be cut anywhere after them.
            first = self.block.first_op
            if first is None:
                self.block.add_op(op)
            else:
                anchor = self._last_weight
                if anchor is None:
                    self.block.insert_op_before(op, first)
                else:
                    self.block.insert_op_after(op, anchor)
            self._last_weight = op
            self._weights[name] = full_view(op.results[0], shape, elem)
        return self._weights[name]

    _last_weight: Operation | None = None

    def constant(self, value: np.ndarray[Any, Any], elem: str) -> View:
        """A small literal tensor."""
        if value.size > 4096:
            raise NoRuleError(f"a constant of {value.size} elements")
        return self.insert(tc.ConstantOp(value, tensor_type(elem, value.shape)), value.shape, elem)

    # element-wise

    def map(self, expr: str, operands: Sequence[Value], shape: Sequence[Dim], elem: str) -> View:
        """An element-wise expression over operands that broadcast to `shape`; letters a, b, ... are the operands."""
        names = axis_names(shape)
        inputs: list[SSAValue] = []
        axes: list[str] = []
        replaced: dict[str, str] = {}
        for index, operand in enumerate(operands):
            letter = chr(ord("a") + index)
            if isinstance(operand, Splat):
                replaced[letter] = literal(operand.value)
                continue
            ssa, used = self.broadcast_operand(operand, shape, names)
            if ssa in inputs and axes[inputs.index(ssa)] == used:
                replaced[letter] = chr(ord("a") + inputs.index(ssa))
                continue
            replaced[letter] = chr(ord("a") + len(inputs))
            inputs.append(ssa)
            axes.append(used)
        if not inputs:
            raise NoRuleError("an element-wise operation on constants only")
        # A dimension of size 1 that no operand really has stays a lazy one.
        present = {a for used in axes for a in used.split()}
        kept = [i for i, size in enumerate(shape) if size != 1 or names[i] in present]
        rule = f"{', '.join(axes)} -> {' '.join(names[i] for i in kept)}"
        small = [shape[i] for i in kept]
        expr = substitute_letters(expr, replaced)
        result = self.insert(tc.MapOp(inputs, expr, rule, tensor_type(elem, small)), small, elem)
        dims = tuple(kept.index(i) if i in kept else None for i in range(len(shape)))
        return View(result.ssa, dims, tuple(shape), elem)

    def broadcast_operand(self, view: View, shape: Sequence[Dim], names: Sequence[str]) -> tuple[SSAValue, str]:
        """The SSA value and its axis names for an operand that broadcasts to `shape` from the right."""
        offset = len(shape) - len(view.shape)
        used: list[str] = []
        squeeze: list[int] = []
        for logical, dim in enumerate(view.dims):
            if dim is None:
                continue
            if view.shape[logical] == 1 and shape[offset + logical] != 1:
                squeeze.append(dim)
            else:
                used.append(names[offset + logical])
        return (self.squeeze(view, squeeze) if squeeze else view.ssa), " ".join(used)

    def squeeze(self, view: View, dims: Sequence[int]) -> SSAValue:
        """The SSA value of a view without some of its dimensions of size 1."""
        physical = [s for s, d in zip(view.shape, view.dims, strict=True) if d is not None]
        kept = [s for i, s in enumerate(physical) if i not in dims]
        return self.reshape(full_view(view.ssa, physical, view.elem), kept).ssa

    def tensor(self, value: Value) -> View:
        """A value as a tensor of exactly its logical shape: lazy broadcasts become operations."""
        if isinstance(value, Splat):
            if any(isinstance(s, str) for s in value.shape):
                raise NoRuleError("a constant tensor of symbolic shape where a tensor is needed")
            array = np.full([int(s) for s in value.shape], value.value, dtype=np.float32)
            return self.constant(array, value.elem)
        if all(d is not None for d in value.dims):
            return value
        if all(d is not None or s == 1 for s, d in zip(value.shape, value.dims, strict=True)):
            physical = [s for s, d in zip(value.shape, value.dims, strict=True) if d is not None]
            return self.reshape(full_view(value.ssa, physical, value.elem), value.shape)
        return self.tensor(self.map("a", [value], value.shape, value.elem))

    # shapes

    def reshape(self, value: Value, shape: Sequence[Dim]) -> View:
        """A row-major reshape; a reshape of a reshape is one, and one that changes nothing is none."""
        view = self.tensor(value)
        ssa, origin = view.ssa, view.shape
        while isinstance(ssa.owner, tc.ReshapeOp):
            ssa = ssa.owner.operands[0]
            origin = tuple(dims_of(ssa))
        if tuple(origin) == tuple(shape):
            return full_view(ssa, shape, view.elem)
        return self.insert(tc.ReshapeOp(ssa, tensor_type(view.elem, shape)), shape, view.elem)

    def transpose(self, value: Value, perm: Sequence[int]) -> View:
        """A permutation of the dimensions."""
        view = self.tensor(value)
        shape = [view.shape[p] for p in perm]
        if list(perm) == list(range(len(perm))):
            return view
        return self.insert(tc.TransposeOp(view.ssa, list(perm), tensor_type(view.elem, shape)), shape, view.elem)

    def slice(self, value: Value, axis: int, start: int, size: int) -> View:
        """A contiguous part of one static axis."""
        view = self.tensor(value)
        whole = view.shape[axis]
        if isinstance(whole, str):
            raise NoRuleError(f"a slice of the symbolic axis {whole}")
        if (start, size) == (0, whole):
            return view
        shape = [*view.shape[:axis], size, *view.shape[axis + 1 :]]
        return self.insert(tc.SliceOp(view.ssa, axis, start, size, tensor_type(view.elem, shape)), shape, view.elem)

    def concat(self, values: Sequence[Value], axis: int, shape: Sequence[Dim], elem: str) -> View:
        """Tensors one after the other along one axis."""
        if any(isinstance(v.shape[axis], str) for v in values):
            raise NoRuleError("a concatenation along a symbolic axis")
        operands = [self.tensor(v).ssa for v in values]
        return self.insert(tc.ConcatOp(operands, axis, tensor_type(elem, shape)), shape, elem)

    # contractions and reductions

    def contract(
        self, lhs: Value, lhs_axes: Sequence[str], rhs: Value, rhs_axes: Sequence[str], out: Sequence[str], elem: str
    ) -> View:
        """Sum of products over the axes that `out` does not name; transposes of the operands go into the rule."""
        left, left_axes = self._operand(lhs, lhs_axes)
        right, right_axes = self._operand(rhs, rhs_axes)
        sizes = dict(zip([*lhs_axes, *rhs_axes], [*lhs.shape, *rhs.shape], strict=True))
        shape = [sizes[a] for a in out]
        rule = f"{' '.join(left_axes)}, {' '.join(right_axes)} -> {' '.join(out)}"
        return self.insert(tc.ContractOp(left, right, rule, tensor_type(elem, shape)), shape, elem)

    def _operand(self, value: Value, axes: Sequence[str]) -> tuple[SSAValue, list[str]]:
        view = self.tensor(value) if isinstance(value, Splat) else value
        names = [a for a, d in zip(axes, view.dims, strict=True) if d is not None]
        ssa = view.ssa
        if isinstance(ssa.owner, tc.TransposeOp):
            perm = ssa.owner.permutation
            names = [names[perm.index(i)] for i in range(len(perm))]
            ssa = ssa.owner.operands[0]
        return ssa, names

    def reduce(
        self, kind: str, expr: str, operands: Sequence[Value], over: Sequence[int], keepdim: bool, elem: str
    ) -> View:
        """Reduce an expression over some axes of the first operand's shape (to which the others broadcast)."""
        shape = operands[0].shape
        names = axis_names(shape)
        inputs: list[SSAValue] = []
        axes: list[str] = []
        for operand in operands:
            if isinstance(operand, Splat):
                raise NoRuleError("a reduction of a constant")
            ssa, used = self.broadcast_operand(operand, shape, names)
            inputs.append(ssa)
            axes.append(used)
        kept = [i for i in range(len(shape)) if i not in over]
        rule = f"{', '.join(axes)} -> {' '.join(names[i] for i in kept)}"
        small = [shape[i] for i in kept]
        result = self.insert(tc.ReduceOp(inputs, kind, expr, rule, tensor_type(elem, small)), small, elem)
        if not keepdim:
            return result
        dims = tuple(None if i in over else kept.index(i) for i in range(len(shape)))
        return View(result.ssa, dims, tuple(1 if i in over else s for i, s in enumerate(shape)), elem)

    def gather(
        self, table: Value, table_axes: Sequence[str], indices: Value, index_axes: Sequence[str], out: Sequence[str]
    ) -> View:
        """Rows of a table by index: the axis of the table that `out` does not name is indexed."""
        rows, positions = self.tensor(table), self.tensor(indices)
        sizes = dict(zip([*table_axes, *index_axes], [*rows.shape, *positions.shape], strict=True))
        shape = [sizes[a] for a in out]
        rule = f"{' '.join(table_axes)}, {' '.join(index_axes)} -> {' '.join(out)}"
        return self.insert(tc.GatherOp(rows.ssa, positions.ssa, rule, tensor_type(rows.elem, shape)), shape, rows.elem)


_SYMBOL_AXES = {"B": "b", "S": "s", "KV": "t", "B*S": "n"}
_STATIC_AXES = "hijklmopqruvwxyz"


def axis_names(shape: Sequence[Dim]) -> list[str]:
    """A name for each dimension of a shape for use in one rule: b, s, t for the symbols, h, i, j... for the others."""
    names: list[str] = []
    free = iter(_STATIC_AXES)
    for size in shape:
        name = _SYMBOL_AXES.get(size) if isinstance(size, str) else None
        names.append(name if name is not None and name not in names else next(free))
    return names


def substitute_letters(expr: str, letters: dict[str, str]) -> str:
    """Replace operand letters in an expression text; function names have more than one letter, so they are safe."""
    out: list[str] = []
    word = ""
    for char in expr + " ":
        if char.isalnum() or char in "_.":
            word += char
            continue
        out.append(letters.get(word, word))
        word = ""
        out.append(char)
    return "".join(out).strip()


def erase_unused(block: Block) -> None:
    """Remove operations whose results nobody reads; every tc operation is pure."""
    for op in reversed(list(block.ops)):
        if op.results and not any(r.uses for r in op.results):
            op.detach()
            op.erase()
