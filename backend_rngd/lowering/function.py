"""The walk over one `tc` function: an environment of placed values and one method per operation."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import numpy as np
from xdsl.dialects import func
from xdsl.dialects.builtin import StringAttr
from xdsl.ir import Operation, SSAValue

from backend_rngd.dialect import RoutineOp
from backend_rngd.isa.descriptors import Dtype, Space
from backend_rngd.lowering.attention import AttentionLowering
from backend_rngd.lowering.attention_head import AttentionParams, Cache
from backend_rngd.lowering.collective import CollectiveLowering
from backend_rngd.lowering.context import Program
from backend_rngd.lowering.contract import ContractLowering
from backend_rngd.lowering.contract_base import N_MULTIPLE, Matrix, epilogue_ops, k_multiple
from backend_rngd.lowering.emitter import Emitter
from backend_rngd.lowering.exchange import dense
from backend_rngd.lowering.expression import ChainOp
from backend_rngd.lowering.group import Group, check_axis
from backend_rngd.lowering.indexed import as_keys, embedding, offsets, one_token, token_lengths, write_cache
from backend_rngd.lowering.move import load_constant, load_rows, move_rows
from backend_rngd.lowering.packed import bind_packed, packed_weight
from backend_rngd.lowering.program import SPILL_BYTES
from backend_rngd.lowering.scales import Scales, scales_of, scaling
from backend_rngd.lowering.tensor import Dim, RowSpace, Tensor, feature_dims, round_up, split_tokens
from backend_rngd.lowering.values import Form, Stored, Value, Weight, dtype_of, probe_layout, product
from backend_rngd.lowering.vector import VectorLowering, output_tensor
from ir import expr as ex
from ir.dialects import tc
from ir.errors import UnsupportedError
from ir.types import shape_of
from passes.outline import OUTLINED

MULTIPLIED = (Dtype.BF16, Dtype.I8, Dtype.F8E4M3)  # each with its own kind (hardware.md 2.8)
VIEWS = (tc.ReshapeOp, tc.TransposeOp, tc.SliceOp)


class FunctionLowering:
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
        self.contracts = ContractLowering(self.em, self.spill)
        outlined = OUTLINED in function.attributes or self.name == "main"
        self.group = Group(parent, self.em, self.name, not outlined)
        self.collectives = CollectiveLowering(self.group, self.em, self.spill)
        self.env: dict[SSAValue, Value] = {}
        self.resident: dict[SSAValue, Tensor] = {}
        self.offset_images: dict[tuple[SSAValue, int], SSAValue] = {}
        self.limits: dict[tuple[SSAValue, bool, RowSpace], Tensor] = {}
        self.fused: set[Operation] = set()
        self.outputs: dict[SSAValue, str] = {}  # values that the program returns, with the name of their HBM buffer
        self.index = 0

    # Values ------------------------------------------------------------
    def tensor(self, value: SSAValue) -> Tensor:
        """The placed tensor of an activation."""
        v = self.env[value]
        if isinstance(v, Weight):
            return self.vector_weight(value, v)
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
        self.resident[value] = load_constant(self.em, held)
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
            self.em.location = _location(op)
            if isinstance(op, func.ReturnOp):
                return list(op.operands)
            if op not in self.fused:
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

    def _probe(self, op: Operation) -> None:
        for i, result in enumerate(op.results):
            v = self.env.get(result)
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
        target = output_tensor(self.em, t.dims, t.dtype, t.rows, order, self.spill)
        return self.vector.map(ex.Input(0), [t], [names], names, t.dtype, target=target)

    def op_tc_transpose(self, op: tc.TransposeOp) -> None:
        """A view."""
        v = self.env[op.x]
        self.env[op.result] = (
            v.transpose(op.permutation) if isinstance(v, Weight) else self.tensor(op.x).transpose(op.permutation)
        )

    def op_tc_slice(self, op: tc.SliceOp) -> None:
        """A view of features."""
        axis, start, size = op.bounds()
        view = self.tensor(op.x).slice(axis, start, size)
        if view is None:
            raise UnsupportedError("a slice of tokens", "tokens lie on slices", "use a gather of one token a batch row")
        self.env[op.result] = view

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
        target = output_tensor(self.em, dims, parts[0].dtype, rows, order, self.spill)
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
        rule = op.rule()
        e = op.expression()
        inputs: list[Tensor] = []
        names: list[tuple[str, ...]] = []
        substitution: dict[int, ex.Expr] = {}
        for i, o in enumerate(op.operands):
            v = self.env[o]
            if (
                isinstance(v, Weight)
                and v.literal is not None
                and v.literal.size
                and np.all(v.literal == v.literal.flat[0])
            ):
                substitution[i] = ex.Const(float(v.literal.flat[0]))
                continue
            substitution[i] = ex.Input(len(inputs))
            inputs.append(self.in_dm(o))
            names.append(rule.inputs[i])
        dtype = dtype_of(op.results[0])
        self.env[op.results[0]] = self.vector.map(
            ex.substitute(e, substitution), inputs, names, rule.output, dtype, reduce
        )

    def op_tc_contract(self, op: tc.ContractOp) -> None:
        """Contraction engine, see `contract.py`. A result that the program returns goes straight to its output."""
        final = op.results[0]
        if self._epilogue(op)[1] is not None or self._scales(op) is not None:
            final = next(iter(final.uses)).operation.results[0]
        name = self._output_name(final)
        if name is not None:
            self._contract(op, lambda nbytes: self.em.global_buffer(name, "hbm", nbytes, "output"))
            return
        uses = list(final.uses)
        user = uses[0].operation if len(uses) == 1 else None
        if isinstance(user, tc.AllGatherOp) and self._output_name(user.result) is not None:
            self._contract(op, lambda nbytes: self.collectives.reserve(Space.HBM, nbytes, False))
        elif isinstance(user, tc.AllReduceOp) and user is op.next_op:
            # Nothing lies between the contraction and its all-reduce, so that the buffer is the next phase's.
            self._contract(op, None, lambda space, nbytes: self._reserve(op, space, nbytes))
        else:
            self._contract(op, None)

    def _reserve(self, op: tc.ContractOp, space: Space, nbytes: int) -> SSAValue:
        """The buffer of a contraction whose result the next operation adds over all units."""
        rows = self._rows_of(op)
        features = product(shape_of(op.result)) // (rows.batch * rows.length)
        pitch = nbytes // (rows.physical if space == Space.HBM else rows.local) // dtype_of(op.result).bytes
        padded = self.collectives.needs_padding(features, pitch, rows.replicated)
        return self.collectives.reserve(space, nbytes, not rows.replicated, padded)

    def _rows_of(self, op: tc.ContractOp) -> RowSpace:
        rows = [v.rows for o in op.operands if isinstance(v := self.env[o], Tensor) and v.rows is not None]
        return rows[0]

    def _output_name(self, value: SSAValue) -> str | None:
        """The program output that a value is, seen through views, if it is nothing else."""
        return self.outputs.get(_returned_view(value)) if len(list(value.uses)) == 1 else None

    def op_tc_dequantize(self, op: tc.DequantizeOp) -> None:
        """A weight that contractions expand, see `packed.py`."""
        words, scale = self.env[op.packed], self.env[op.scale]
        assert isinstance(words, Weight) and isinstance(scale, Weight)
        n, k = shape_of(op.result)
        self.env[op.result] = packed_weight(words, scale, (n, k))

    def _contract(
        self,
        op: tc.ContractOp,
        output: Callable[[int], SSAValue] | None,
        target: Callable[[Space, int], SSAValue] | None = None,
    ) -> Tensor:
        rule = op.rule()
        left, right = (self.env[o] for o in op.operands)
        sides = list(rule.inputs)
        operands = list(op.operands)
        if isinstance(left, Weight) and not isinstance(right, Weight):
            left, right, sides, operands = right, left, sides[::-1], operands[::-1]
        if not isinstance(right, Weight) or isinstance(left, Weight):
            raise UnsupportedError(
                f"contraction `{rule}` of two activations",
                "only weights can be laid out for the contraction engine",
                "use attention",
            )
        x = self.tensor(operands[0])
        if x.rows is None or x.dtype != right.dtype or x.dtype not in MULTIPLIED:
            raise UnsupportedError(
                f"contraction `{rule}` of {x.dtype.name} and {right.dtype.name}",
                "the contraction engine multiplies two operands of bf16, i8 or f8e4m3",
                "cast the model to bf16",
            )
        k_axes = [a for a in sides[0] if a in sides[1] and a not in rule.output]
        n_axes = [a for a in rule.output if a in sides[1]]
        if any(a in sides[0] for a in n_axes):
            raise UnsupportedError(f"batched contraction `{rule}` with a weight", "no mapping is written", "split it")
        sizes = {
            a: n
            for side, shape in ((sides[0], x.shape), (sides[1], right.sizes))
            for a, n in zip(side, shape, strict=True)
        }
        multiple = k_multiple(product(sizes[a] for a in k_axes), x.dtype.bytes)
        rows, columns = ([sides[1].index(a) for a in axes] for axes in (n_axes, k_axes))
        if right.packed is not None and (rows, columns) == ([0], [1]):
            packed = bind_packed(right)
            matrix = Matrix(packed.keys, round_up(right.shape[0], N_MULTIPLE), packed.k, right.dtype, packed)
        else:
            buffer, n, k = right.matrix(rows, columns, (N_MULTIPLE, multiple))
            matrix = Matrix(buffer, round_up(n, N_MULTIPLE), round_up(k, multiple), right.dtype)
        x = self._contiguous(x, [sides[0].index(a) for a in k_axes], matrix.k)
        by_axis = {a: d for a, d in zip(sides[0], x.dims, strict=True)}
        dims = [
            Dim("feature", sizes[a]) if a in n_axes and sizes[a] > 1 else by_axis.get(a, Dim("one", 1))
            for a in rule.output
        ]
        dtype = dtype_of(op.results[0])
        ops, final = self._epilogue(op)
        sums, scales = 0, None
        if (scaled := self._scales(op)) is not None:
            final, sums, scales = scaled
        if final is not None:
            dtype = dtype_of(final.results[0])
        produced = (final or op).results[0]
        sink = output(self._output_bytes(x, matrix, dtype)) if output is not None else None
        where = target if self.parent.units > 1 else None
        result = self.contracts.run(x, matrix, dims, dtype, ops, sink, where, scales)
        if final is not None:
            final_rule = final.rule()
            result = result.transpose([final_rule.inputs[sums].index(a) for a in final_rule.output])
            self.fused.add(final)
        self.env[produced] = result
        if produced is not op.results[0]:
            self.env.pop(op.results[0], None)
        return result

    def _output_bytes(self, x: Tensor, w: Matrix, dtype: Dtype) -> int:
        assert x.rows is not None
        return w.rows * max(4, x.rows.physical) * dtype.bytes

    def _epilogue(self, op: tc.ContractOp) -> tuple[list[ChainOp], tc.MapOp | None]:
        """A single map of the result and numbers rides in the contraction's own pass."""
        uses = list(op.results[0].uses)
        if len(uses) != 1 or not isinstance(uses[0].operation, tc.MapOp) or len(uses[0].operation.operands) != 1:
            return [], None
        user = uses[0].operation
        ops = epilogue_ops(user.expression())
        return (ops, user) if ops is not None else ([], None)

    def _scales(self, op: tc.ContractOp) -> tuple[tc.MapOp, int, Scales] | None:
        """The map of a quantized contraction's scales if it rides behind it, and which of its operands the sums are."""
        scaled = scaling(op)
        if scaled is None:
            return None
        weight = next((i for i, o in enumerate(op.operands) if isinstance(self.env[o], Weight)), None)
        channels = op.rule().inputs[weight] if weight is not None else ()
        channel = next((i for i, a in enumerate(op.rule().output) if a in channels), 0)
        scales = scales_of(*scaled, channel, self._rows_of(op), self.em.slices, self.env, self.tensor)
        return None if scales is None else (*scaled, scales)

    def _contiguous(self, x: Tensor, axes: Sequence[int], padded: int) -> Tensor:
        """x with the K axes contiguous in the given order, zero-padded to `padded` elements."""
        k = product(x.dims[a].size for a in axes)
        stride = x.dtype.bytes
        good = padded == k and x.base % 8 == 0
        for a in reversed(axes):
            d = x.dims[a]
            if d.size > 1:
                good = good and d.stride == stride
                stride *= d.size
        if good:
            return x
        assert x.rows is not None
        names = [f"d{i}" for i in range(len(x.dims))]
        order = [a for a in axes if x.dims[a].kind == "feature"]
        target = output_tensor(self.em, x.dims, x.dtype, x.rows, order, self.spill)
        if padded != k:
            if target.space == Space.HBM:
                raise UnsupportedError(
                    f"a contraction over {k} elements", "padding of spilled values is not built", "use a multiple of 16"
                )
            pitch = padded * x.dtype.bytes
            buffer = self.em.alloc(x.rows.local * pitch)
            self.em.memset(buffer, 0, x.rows.local * pitch)
            target = Tensor(buffer, Space.DM, x.dtype, target.dims, x.rows, 0, pitch)
        return self.vector.map(ex.Input(0), [x], [names], names, x.dtype, target=target)

    # Between units ------------------------------------------------------------
    def op_tc_all_reduce(self, op: tc.AllReduceOp) -> None:
        """See `collective.py`."""
        check_axis(self.parent, op.axis.data)
        if op.kind.data != "add":
            raise UnsupportedError(f"an all-reduce of kind {op.kind.data}", "only sums are lowered", "reduce locally")
        self.env[op.result] = self.collectives.all_reduce(self._dense(op.x))

    def op_tc_all_gather(self, op: tc.AllGatherOp) -> None:
        """See `collective.py`."""
        check_axis(self.parent, op.axis.data)
        name = self._output_name(op.result)
        dim, x = int(op.dim.value.data), self._dense(op.x)

        def sink(nbytes: int) -> SSAValue:
            return self.em.global_buffer(name, "hbm", nbytes, "output") if name else self.em.alloc(nbytes, space="hbm")

        self.env[op.result] = self.collectives.all_gather(x, dim, sink)

    def op_tc_reduce_scatter(self, op: tc.ReduceScatterOp) -> None:
        """See `collective.py`."""
        check_axis(self.parent, op.axis.data)
        self.env[op.result] = self.collectives.reduce_scatter(self._dense(op.x), int(op.dim.value.data))

    def op_tc_local_slice(self, op: tc.LocalSliceOp) -> None:
        """See `collective.py`."""
        check_axis(self.parent, op.axis.data)
        dim = int(op.dim.value.data)
        self.env[op.result] = self.collectives.local_slice(self._dense(op.x), dim, shape_of(op.result)[dim])

    def _dense(self, value: SSAValue) -> Tensor:
        t = self.tensor(value)
        return t if dense(t) or t.space == Space.HBM else self.copy(t)

    def op_tc_axis_index(self, op: tc.AxisIndexOp) -> None:
        """A number that differs between units: a literal in HBM, each unit has its own."""
        axis, scale = op.axis.data, int(op.scale.value.data)
        mesh = self.parent.mesh
        values = np.array([[mesh.coordinate(u, axis) * scale] for u in range(self.parent.units)], np.int32)
        name = f"index.{axis}.{scale}"

        def bind(form: Form) -> SSAValue:
            image = np.zeros((len(values), form.pad[0] * form.pad[1]), np.int32)
            image[:, :1] = values
            return self.parent.unit_constant(self.em, name, image)

        self.env[op.result] = Weight.of((), Dtype.I32, bind)

    # Indexed ------------------------------------------------------------
    def _offsets(self, value: SSAValue, scale: int) -> SSAValue:
        key = (value, scale)
        if key not in self.offset_images:
            index = self.tensor(value)
            made = self.parent.input_offsets(self.em, index, scale) if self.group.repeated else None
            self.offset_images[key] = made or offsets(self.em, self.vector, self.in_dm(value), scale)
        return self.offset_images[key]

    def op_tc_gather(self, op: tc.GatherOp) -> None:
        """Embedding rows, or one token a batch row."""
        rule = op.rule()
        table, index = self.env[op.operands[0]], self.tensor(op.operands[1])
        gathered = next(a for a in rule.inputs[0] if a not in rule.output)
        shape = shape_of(op.results[0])
        by_index = {a: d for a, d in zip(rule.inputs[1], index.dims, strict=True)}
        dims = [
            by_index[a] if a in by_index else (Dim("feature", n) if n > 1 else Dim("one", 1))
            for a, n in zip(rule.output, shape, strict=True)
        ]
        assert index.rows is not None
        if isinstance(table, Weight):
            side = list(rule.inputs[0])
            columns = [side.index(a) for a in rule.output if a in side]
            multiple = k_multiple(product(table.sizes[c] for c in columns))
            buffer, _, width = table.matrix([side.index(gathered)], columns, (N_MULTIPLE, multiple))
            row = round_up(width, multiple) * table.dtype.bytes
            at = self._offsets(op.operands[1], row)
            self.env[op.results[0]] = embedding(self.em, buffer, row, at, index.rows, dims, table.dtype, self.spill)
            return
        x = self.tensor(op.operands[0])
        if x.dims[list(rule.inputs[0]).index(gathered)].kind not in ("length", "one"):
            raise UnsupportedError(
                f"gather `{rule}` of activations", "only one token a batch row is gathered", "see docs/status.md"
            )
        if x.rows is not None and x.rows.length == 1:
            kept = [x.dims[rule.inputs[0].index(a)] for a in rule.output]
            self.env[op.results[0]] = Tensor(x.buffer, x.space, x.dtype, tuple(kept), index.rows, x.base, x.pitch)
            return
        self.env[op.results[0]] = one_token(self.em, self.vector, x, self.in_dm(op.operands[1]), dims)

    def op_tc_kv_update(self, op: tc.KvUpdateOp) -> None:
        """A scatter into the cache, in place."""
        cache = self.env[op.operands[0]]
        if not isinstance(cache, Stored):
            raise UnsupportedError(
                "kv_update of an activation", "caches are inputs of the program", "pass it as an argument"
            )
        if any(u.operation is not op and u.operation.parent is op.parent for u in op.operands[0].uses):
            raise UnsupportedError(
                "a cache that is read after it was updated", "updates are in place", "read the result"
            )
        new = self.tensor(op.operands[1])
        if new.dims[3].kind == "feature" and new.dims[3].stride != new.dtype.bytes:
            new = self.copy(new)
        view = self._cache(cache)
        at = self._offsets(op.operands[2], view.width * 2)
        if new.space == Space.DM:
            write_cache(self.em, new, view, at)
        else:
            for head in range(new.dims[1].size):  # a scatter reads DM
                part = new.slice(1, head, 1)
                assert part is not None
                assert new.rows is not None
                write_cache(self.em, load_rows(self.em, part, new.rows.local), view, at, head)
        self.env[op.results[0]] = Stored(cache.buffer, cache.shape)

    def _cache(self, c: Stored) -> Cache:
        _, heads, keys, width = c.shape
        head = self.parent.options.cache_capacity * width * 2
        return Cache(c.buffer, heads * head, head, keys, width)

    def op_tc_attention(self, op: tc.AttentionOp) -> None:
        """Scores, softmax and weighted sum, see `attention.py`."""
        q = self.tensor(op.q)
        k, v = self.env[op.k], self.env[op.v]
        assert q.rows is not None
        for name, extra in (("bias", op.bias), ("sinks", op.sinks)):
            if extra is not None:
                raise UnsupportedError(f"attention with {name}", "it is not lowered yet", "see docs/status.md")
        causal = bool(op.causal.value.data)
        keys = self._cache(k) if isinstance(k, Stored) else as_keys(self.em, self._keys(op.k))
        values = self._cache(v) if isinstance(v, Stored) else as_keys(self.em, self._keys(op.v))
        heads = shape_of(op.q)[1]
        kv_heads = shape_of(op.k)[1]
        params = AttentionParams(
            float(op.scale.value.data),
            causal,
            int(op.window.value.data),
            float(op.softcap.value.data),
            heads // kv_heads,
            kv_heads,
        )
        limit = self._limit(op, q.rows, causal)
        attention = AttentionLowering(self.em, lambda parts: self.parent.iota(self.em, keys.keys, parts), self.spill)
        if q.dims[3].kind == "feature" and q.dims[3].stride != 2:
            q = self.copy(q)
        self.env[op.results[0]] = attention.run(q, keys, values, limit, params)

    def _keys(self, value: SSAValue) -> Tensor:
        t = self.tensor(value)
        return self.copy(t) if t.dims[3].stride != t.dtype.bytes else t

    def _limit(self, op: tc.AttentionOp, rows: RowSpace, causal: bool) -> Tensor:
        """f32 per token: the last visible key (its position if causal, else length - 1)."""
        if causal and op.lengths is not None:
            raise UnsupportedError("causal attention with lengths", "one bound a token is lowered", "drop the lengths")
        source = op.positions if causal else op.lengths
        if source is None:
            raise UnsupportedError("full attention without lengths", "padding would be seen", "pass lengths")
        key = (source, causal, rows)
        if key not in self.limits:
            if causal:
                t, e = self.in_dm(source), ex.Input(0)
            else:
                t, e = token_lengths(self.em, self.tensor(source), rows), ex.Call("add", (ex.Input(0), ex.Const(-1.0)))
            names = [f"d{i}" for i in range(len(t.dims))]
            self.limits[key] = self.vector.map(e, [t], [names], names, Dtype.F32)
        return self.limits[key]


def _location(op: Operation) -> str:
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
