"""The only place that makes collectives: a local value in one placement becomes a local value in another.

    partial sum  -> whole    all_reduce
    partial sum  -> cut      reduce_scatter
    cut          -> whole    all_gather, and a slice that drops padding
    whole        -> cut      local_slice (no exchange)

A dimension that is cut inside (`4 8@tp 128`) is reshaped to its factors first. Every collective says why it exists.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from xdsl.ir import Operation, SSAValue

from ir.axes import Dim
from ir.dialects import tc
from ir.placement import Factor, Factors, Shard
from ir.types import labelled_dims, shape_of, tensor, tensor_type
from passes.sharding import Sharding

Shape = list[Dim | tuple[str, int]]
Insert = Callable[[tc.TcOp], SSAValue]


@dataclass
class Reshard:
    """Changes placements of local values. `insert` puts a new operation at the current place."""

    sharding: Sharding
    insert: Insert

    def retire(self, value: SSAValue, have: Shard, want: Shard, axes: Sequence[str], why: str) -> SSAValue:
        """Add the partial sums of all units; `want` may cut one whole dimension of the result over the same axis."""
        scattered = [i for i, (h, w) in enumerate(zip(have.dims, want.dims, strict=True)) if h != w]
        if not scattered:
            for axis in axes:
                value = self.insert(tc.AllReduceOp(value, axis, why, tensor(value)))
            return value
        (dim,), (axis,) = scattered, axes
        factors = want.dims[dim]
        place = next(i for i, f in enumerate(factors) if f.axis)

        def scatter(x: SSAValue, at: int) -> SSAValue:
            kind = self.sized(x, at, factors[place].local(self.sharding.mesh))
            return self.insert(tc.ReduceScatterOp(x, at, axis, why, kind))

        return self._inside(value, dim, [f.size for f in factors], {place: scatter})

    def move(self, value: SSAValue, have: Shard, want: Shard, why: str) -> SSAValue:
        """A value in another placement: what must be whole is gathered first, then parts are taken."""
        for dim, (old, new) in enumerate(zip(have.dims, want.dims, strict=True)):
            if old != new and self.sharding.parts(old):
                value = self._gather(value, dim, old, why)
        for dim, (old, new) in enumerate(zip(have.dims, want.dims, strict=True)):
            if old != new and self.sharding.parts(new):
                value = self._take(value, dim, new, why)
        return value

    def _gather(self, value: SSAValue, dim: int, factors: Factors, why: str) -> SSAValue:
        mesh = self.sharding.mesh

        def gather(factor: Factor, inner: int) -> Callable[[SSAValue, int], SSAValue]:
            assert factor.axis is not None
            axis = factor.axis

            def apply(x: SSAValue, at: int) -> SSAValue:
                full = self.sized(x, at, factor.padded(mesh) * inner)
                x = self.insert(tc.AllGatherOp(x, at, axis, why, full))
                size = factor.size * inner
                if size == shape_of(x)[at]:
                    return x
                return self.insert(tc.SliceOp(x, at, 0, size, self.sized(x, at, size)))

            return apply

        if factors[0].axis and not any(f.axis for f in factors[1:]):
            # Cut on the outside: parts follow each other.
            return gather(factors[0], math.prod(f.size for f in factors[1:]))(value, dim)
        actions = {i: gather(f, 1) for i, f in enumerate(factors) if f.axis}
        return self._inside(value, dim, [f.local(mesh) for f in factors], actions)

    def _take(self, value: SSAValue, dim: int, factors: Factors, why: str) -> SSAValue:
        mesh = self.sharding.mesh

        def take(factor: Factor, inner: int) -> Callable[[SSAValue, int], SSAValue]:
            assert factor.axis is not None
            axis = factor.axis

            def apply(x: SSAValue, at: int) -> SSAValue:
                kind = self.sized(x, at, factor.local(mesh) * inner)
                return self.insert(tc.LocalSliceOp(x, at, axis, why, kind))

            return apply

        first, inner = factors[0], math.prod(f.size for f in factors[1:])
        if first.axis and not any(f.axis for f in factors[1:]) and (inner == 1 or not self.sharding.padded((first,))):
            return take(first, inner)(value, dim)
        actions = {i: take(f, 1) for i, f in enumerate(factors) if f.axis}
        return self._inside(value, dim, [f.size for f in factors], actions)

    def _inside(
        self, value: SSAValue, dim: int, sizes: Sequence[int], actions: dict[int, Callable[[SSAValue, int], SSAValue]]
    ) -> SSAValue:
        """Split a dimension into parts of `sizes`, do something along some of them, and merge again."""
        before: Shape = labelled_dims(value)
        element = tensor(value).element_type
        if len(sizes) > 1:
            split = [*before[:dim], *_labelled(before[dim], sizes), *before[dim + 1 :]]
            value = self.insert(tc.ReshapeOp(value, tensor_type(element, split)))
        for place, action in actions.items():
            value = action(value, dim + place)
        if len(sizes) > 1:
            whole = math.prod(shape_of(value)[dim : dim + len(sizes)])
            value = self.insert(tc.ReshapeOp(value, tensor_type(element, _resized(before, dim, whole))))
        return value

    @staticmethod
    def sized(value: SSAValue, dim: int, size: int) -> tc.TensorResult:
        """The type of a value with another size in one dimension; names stay."""
        return tensor_type(tensor(value).element_type, _resized(labelled_dims(value), dim, size))


def _resized(shape: Shape, dim: int, size: int) -> Shape:
    old = shape[dim]
    return [*shape[:dim], (old[0], size) if isinstance(old, tuple) else size, *shape[dim + 1 :]]


def _labelled(dim: Dim | tuple[str, int], sizes: Sequence[int]) -> Shape:
    """Parts of a dimension keep its symbols where there are as many: `B*S` in two parts is B and S."""
    names = dim[0].split("*") if isinstance(dim, tuple) else []
    return [(n, s) for n, s in zip(names, sizes, strict=True)] if len(names) == len(sizes) else list(sizes)


def local_type(value: SSAValue, shard: Shard, sharding: Sharding) -> tc.TensorResult:
    """The type of one unit's part of a value; names of dimensions stay."""
    shape: Shape = []
    for dim, size in zip(labelled_dims(value), shard.local_shape(sharding.mesh), strict=True):
        shape.append((dim[0], size) if isinstance(dim, tuple) else size)
    return tensor_type(tensor(value).element_type, shape)


def name_of(value: SSAValue, op: Operation) -> str:
    """A short name of an operand for messages: the weight's, the argument's, or the operation that made it."""
    owner = value.owner
    if isinstance(owner, tc.WeightOp):
        return owner.fqn.data
    if value.name_hint and not isinstance(owner, Operation):
        return value.name_hint
    place = list(op.operands).index(value) if value in op.operands else 0
    return f"operand {place}"
