"""What the walk over a `tc` function needs for every operation: placed values, views, element-wise passes."""

from __future__ import annotations

import json

import numpy as np
from xdsl.dialects import func
from xdsl.dialects.builtin import StringAttr
from xdsl.ir import Operation, SSAValue

from backend_rngd.dialect import RoutineOp
from backend_rngd.isa.descriptors import Dtype, Space
from backend_rngd.lowering.collective import CollectiveLowering
from backend_rngd.lowering.context import Program
from backend_rngd.lowering.contract import ContractLowering
from backend_rngd.lowering.emitter import Emitter
from backend_rngd.lowering.group import Group
from backend_rngd.lowering.indexed import token_range
from backend_rngd.lowering.move import load_rows, move_rows
from backend_rngd.lowering.pieces import Pieces, to_whole
from backend_rngd.lowering.program import SPILL_BYTES
from backend_rngd.lowering.tensor import Dim, RowSpace, Tensor, feature_dims, split_tokens
from backend_rngd.lowering.values import Stored, Value, Weight, dtype_of, probe_layout, probe_pieces, uniform
from backend_rngd.lowering.vector import VectorLowering, Wanted, output_tensor
from ir import expr as ex
from ir.dialects import tc
from ir.errors import UnsupportedError
from ir.types import shape_of
from passes.outline import OUTLINED

VIEWS = (tc.ReshapeOp, tc.TransposeOp, tc.SliceOp)


class FunctionBase:
    """Common part of the entry and of block functions: an environment and one method per op."""

    def __init__(self, parent: Program, function: func.FuncOp, routine: RoutineOp) -> None:
        self.parent = parent
        self.function = function
        self.name = function.sym_name.data
        self.em = Emitter(
            parent.out.module, routine.body.block, parent.machine, parent.options.slices, probes=parent.options.probes
        )
        self.spill = parent.options.spill_bytes
        self.vector = VectorLowering(self.em, self.spill)
        self.contracts = ContractLowering(self.em, self.spill, parent.options.in_flight, parent.search)
        outlined = OUTLINED in function.attributes or self.name == "main"
        self.group = Group(parent, self.em, self.name, not outlined or parent.called_often(self.name))
        self.collectives = CollectiveLowering(self.group, self.em, self.spill)
        self.env: dict[SSAValue, Value] = {}
        self.resident: dict[SSAValue, Tensor] = {}
        self.offset_images: dict[tuple[SSAValue, int], SSAValue] = {}
        self.limits: dict[tuple[SSAValue, bool, RowSpace], Tensor] = {}
        self.fused: set[Operation] = set()
        self.joined: dict[SSAValue, tc.ContractOp] = {}  # contractions that run when the map that joins them is reached
        self.scattered: dict[SSAValue, Tensor] = {}  # sums over units that were made while the parts were computed
        self.cut: dict[SSAValue, Pieces] = {}  # values, and the parts of parameters, that slices have pieces of
        self.cut_weights: dict[SSAValue, Tensor] = {}
        self.outputs: dict[SSAValue, str] = {}  # values that the program returns, with the name of their HBM buffer
        self.index = 0

    # Values ------------------------------------------------------------
    def tensor(self, value: SSAValue) -> Tensor:
        """The placed tensor of an activation."""
        v = self.env[value]
        if isinstance(v, Weight):
            return self.vector_weight(value, v)
        if isinstance(v, Pieces):
            if value not in self.resident:
                self.resident[value] = to_whole(self.em, v)
            return self.resident[value]
        if isinstance(v, Stored):
            raise UnsupportedError(
                "arithmetic on a KV cache", "caches are read by attention only", "update, then attend"
            )
        return v

    def vector_weight(self, value: SSAValue, w: Weight) -> Tensor:
        """A small parameter as a constant in DM of every slice."""
        if value in self.resident:
            return self.resident[value]
        count = int(np.prod(w.shape, dtype=np.int64))
        if count * w.dtype.bytes > SPILL_BYTES:
            raise UnsupportedError(
                f"a parameter of shape {w.shape} used element-wise",
                f"it takes more than {SPILL_BYTES} B of every slice",
                "use it in a contraction or a gather",
            )
        strides, pitch = feature_dims(list(w.shape), w.dtype.bytes)
        buffer = w.vector()
        dims = tuple(Dim("feature", n, s) if n > 1 else Dim("one", 1) for n, s in zip(w.shape, strides, strict=True))
        held = Tensor(buffer, Space.HBM, w.dtype, dims, None, 0, pitch)
        self.resident[value] = load_rows(self.em, held, 1)
        return self.resident[value]

    def in_dm(self, value: SSAValue) -> Tensor:
        """The tensor, loaded from HBM once if it is a program input."""
        t = self.tensor(value)
        if t.space == Space.HBM and t.dtype == Dtype.I32 and t.rows is not None:
            if value not in self.resident:
                self.resident[value] = load_rows(self.em, t, t.rows.local)
            return self.resident[value]
        return t

    # Walk ------------------------------------------------------------
    def walk(self) -> list[SSAValue]:
        """Lower all ops; returns the operands of the return op."""
        block = self.function.body.block
        for op in block.ops:
            self.em.location = location_of(op)
            if isinstance(op, func.ReturnOp):
                return list(op.operands)
            if op not in self.fused and not self.in_chunks(op):
                method = getattr(self, "op_" + op.name.replace(".", "_"), None)
                if method is None:
                    raise UnsupportedError(
                        f"`{op.name}` in @{self.name}",
                        "the backend has no lowering for it",
                        "see docs/status.md for what is built",
                    )
                method(op)
                self._probe(op)
            self.index += 1
        raise AssertionError("function without return")

    def in_chunks(self, op: Operation) -> bool:
        """Lower `op` and those after it that work on the same rows chunk by chunk, if that is their way."""
        return False

    def in_pieces(self, op: tc.MapOp | tc.ReduceOp, reduce: str | None) -> bool:
        """Lower an element-wise operation of values that lie in pieces on the slices, if it is one."""
        return False

    def _probe(self, op: Operation) -> None:
        for i, result in enumerate(op.results):
            v = self.env.get(result)
            if isinstance(v, Pieces):
                self.em.probe(v.held.buffer, f"{self.name}#{self.index}.{i}", json.dumps(probe_pieces(v)))
            if isinstance(v, Tensor) and v.rows is not None and not isinstance(op, VIEWS):
                self.em.probe(v.buffer, f"{self.name}#{self.index}.{i}", json.dumps(probe_layout(v)))

    # Views ------------------------------------------------------------
    def op_tc_reshape(self, op: tc.ReshapeOp) -> None:
        """A view where the bytes allow it, else a copy in logical order."""
        shape = shape_of(op.result)
        v = self.env[op.x]
        if isinstance(v, Weight) and (viewed := v.reshape(shape)) is not None:
            self.env[op.result] = viewed
            return
        t = self.tensor(op.x)
        view = t.reshape(shape)
        if view is None and any(d.kind == "tokens" for d in t.dims):
            view = split_tokens(t, shape)
        if view is None:
            view = self.copy(t).reshape(shape)
        if view is None:
            raise UnsupportedError(
                f"reshape {tuple(t.shape)} -> {tuple(shape)}", "it mixes tokens and features", "keep tokens apart"
            )
        self.env[op.result] = view

    def copy(self, t: Tensor) -> Tensor:
        """A compact row-major copy in logical order."""
        names = [f"d{i}" for i in range(len(t.dims))]
        order = [i for i, d in enumerate(t.dims) if d.kind == "feature"]
        target = output_tensor(self.em, Wanted(t.dims, t.dtype, t.rows, order), self.spill)
        return self.vector.map(ex.Input(0), [t], [names], names, t.dtype, target=target)

    def op_tc_transpose(self, op: tc.TransposeOp) -> None:
        """A view."""
        v = self.env[op.x]
        self.env[op.result] = (
            v.transpose(op.permutation) if isinstance(v, Weight) else self.tensor(op.x).transpose(op.permutation)
        )

    def op_tc_slice(self, op: tc.SliceOp) -> None:
        """A view of features, a copy of tokens."""
        axis, start, size = op.bounds()
        t = self.tensor(op.x)
        view = t.slice(axis, start, size)
        if view is None and t.dims[axis].kind != "length":
            raise UnsupportedError("a slice of the batch", "its rows lie on slices", "slice the tokens of a row")
        self.env[op.result] = view if view is not None else token_range(self.em, t, start, size)

    def op_tc_concat(self, op: tc.ConcatOp) -> None:
        """One buffer; every part is copied to its place."""
        parts = [self.tensor(o) for o in op.operands]
        axis = int(op.axis.value.data)
        dims = list(parts[0].dims)
        dims[axis] = Dim("feature", sum(p.dims[axis].size for p in parts))
        if any(p.dims[axis].is_row for p in parts):
            raise UnsupportedError("concatenation of tokens", "tokens lie on slices", "concatenate features")
        rows = next((p.rows for p in parts if p.rows is not None), None)
        order = [i for i, d in enumerate(dims) if d.kind == "feature"]
        target = self.vector.new(Wanted(dims, parts[0].dtype, rows, order))
        names = [f"d{i}" for i in range(len(dims))]
        start = 0
        for p in parts:
            piece = target.slice(axis, start, p.dims[axis].size)
            assert piece is not None
            self.vector.map(ex.Input(0), [p], [names], names, p.dtype, target=piece)
            start += p.dims[axis].size
        self.env[op.results[0]] = target

    def output(self, t: Tensor, name: str) -> Tensor:
        """`t` in the HBM buffer of program output `name`."""
        if t.rows is None:
            raise UnsupportedError(
                f"result {name}",
                "it depends on no token, so it has no rows to be stored by",
                "return a value of tokens",
            )
        if t.space == Space.HBM and self.em.known_globals().get(name) is t.buffer:
            return t
        order = sorted((i for i, d in enumerate(t.dims) if d.kind == "feature"), key=lambda i: -t.dims[i].stride)
        strides, pitch = feature_dims([t.dims[i].size for i in order], t.dtype.bytes)
        dims = list(t.dims)
        for i, s in zip(order, strides, strict=True):
            dims[i] = Dim("feature", t.dims[i].size, s)
        buffer = self.em.global_buffer(name, "hbm", t.rows.physical * pitch, "output")
        held = Tensor(buffer, Space.HBM, t.dtype, tuple(dims), t.rows, 0, pitch)
        self.move(t, held)
        return held

    def output_name(self, value: SSAValue) -> str | None:
        """The program output that a value is, seen through views, if it is nothing else."""
        return self.outputs.get(_returned_view(value)) if len(list(value.uses)) == 1 else None

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copy rows of `source` to `target`, which may lie in another memory."""
        if source.buffer is target.buffer and source.base == target.base:
            return
        if source.space == target.space == Space.DM:
            names = [f"d{n}" for n in range(len(source.dims))]
            self.vector.map(ex.Input(0), [source], [names], names, source.dtype, target=target)
        else:
            move_rows(self.em, source, target)

    # Arithmetic ------------------------------------------------------------
    def op_tc_map(self, op: tc.MapOp) -> None:
        """Vector-engine passes."""
        self._map(op, None)

    def op_tc_reduce(self, op: tc.ReduceOp) -> None:
        """Vector-engine passes that end in the intra-slice reducer."""
        self._map(op, op.kind.data)

    def _map(self, op: tc.MapOp | tc.ReduceOp, reduce: str | None) -> None:
        if self.in_pieces(op, reduce):
            return
        rule = op.rule()
        e = op.expression()
        inputs: list[Tensor] = []
        names: list[tuple[str, ...]] = []
        substitution: dict[int, ex.Expr] = {}
        for i, o in enumerate(op.operands):
            v = self.env[o]
            number = uniform(v) if isinstance(v, Weight) else None
            if number is not None:
                substitution[i] = ex.Const(number)
                continue
            substitution[i] = ex.Input(len(inputs))
            inputs.append(self.in_dm(o))
            names.append(rule.inputs[i])
        dtype = dtype_of(op.results[0])
        self.env[op.results[0]] = self.vector.map(
            ex.substitute(e, substitution), inputs, names, rule.output, dtype, reduce
        )


def location_of(op: Operation) -> str:
    """`layer path|operation`, shown by the disassembler, the trace and every error."""
    path = op.attributes.get("path")
    return f"{path.data if isinstance(path, StringAttr) else ''}|{op.name}"


def _returned_view(value: SSAValue) -> SSAValue:
    """Follow single-use reshapes from a value towards the return."""
    while True:
        uses = list(value.uses)
        view = uses[0].operation if len(uses) == 1 else None
        if isinstance(view, tc.SliceOp):
            view = view if view.bounds()[1] == 0 else None
        if not isinstance(view, (tc.ReshapeOp, tc.SliceOp)):
            return value
        value = view.results[0]
