"""The walk over `tc` functions: every op becomes transfers and passes through the modules beside this one."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
from xdsl.dialects import func
from xdsl.dialects.builtin import BFloat16Type, Float32Type, IntegerType, ModuleOp
from xdsl.ir import Operation, SSAValue

from backend_rngd.dialect import BufferType, CallOp, RoutineOp, buffer_type
from backend_rngd.isa.descriptors import DM_SLICE_STRIDE, Dtype, Space
from backend_rngd.lowering.attention import AttentionLowering, AttentionParams, Cache, iota
from backend_rngd.lowering.contract import N_MULTIPLE, ContractLowering, Matrix, epilogue_ops, k_multiple
from backend_rngd.lowering.emitter import Emitter
from backend_rngd.lowering.expression import ChainOp
from backend_rngd.lowering.indexed import as_keys, embedding, offsets, one_token, token_lengths, write_cache
from backend_rngd.lowering.move import load_rows
from backend_rngd.lowering.tensor import Dim, RowSpace, Tensor, feature_dims, round_up
from backend_rngd.lowering.vector import VectorLowering, output_tensor
from backend_rngd.machine import Machine
from ir import expr as ex
from ir.axes import Rule
from ir.dialects import tc
from ir.errors import UnsupportedError
from ir.types import shape_of

SPILL_BYTES = 96 * 1024  # a value larger than this a slice lives in HBM and is walked in chunks
INPUT_PITCH = 8  # bytes between the i32 values of a program input: the smallest aligned DM write


@dataclass(frozen=True)
class LoweringOptions:
    """slices: slices of a unit. cache_capacity, cache_batch: geometry of the KV cache shared by all buckets."""

    slices: int = 64
    cache_capacity: int = 0
    cache_batch: int = 1
    probes: bool = True
    spill_bytes: int = SPILL_BYTES


@dataclass(frozen=True)
class Placement:
    """How the loader lays a tensor out in the HBM global `name`: permute, reshape to (rows, columns), pad with zeros."""

    name: str
    weight: str
    permute: tuple[int, ...]
    reshape: tuple[int, int]
    pad: tuple[int, int]
    dtype: str
    bytes: int


@dataclass(frozen=True)
class Port:
    """A program input, output or cache in HBM: global name, logical name, dtype, shape and byte strides."""

    name: str
    buffer: str
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0


@dataclass
class Lowered:
    """An `rngd` module with what the host must know to run it."""

    module: ModuleOp
    placements: dict[str, Placement] = field(default_factory=dict)
    constants: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    inputs: list[Port] = field(default_factory=list)
    outputs: list[Port] = field(default_factory=list)
    caches: list[Port] = field(default_factory=list)


@dataclass
class Weight:
    """A parameter not yet laid out; `bind(form)` returns its HBM buffer in that form."""

    shape: tuple[int, ...]
    dtype: Dtype
    bind: Callable[[tuple[int, ...], tuple[int, int], tuple[int, int]], SSAValue]
    literal: np.ndarray[Any, Any] | None = None


@dataclass
class Stored:
    """A KV cache: HBM buffer, `b k t d` shape of the bucket."""

    buffer: SSAValue
    shape: tuple[int, ...]


Value = Tensor | Weight | Stored
Form = tuple[tuple[int, ...], tuple[int, int], tuple[int, int]]


def dtype_of(element: object) -> Dtype:
    """Stream type of a builtin element type."""
    if isinstance(element, BFloat16Type):
        return Dtype.BF16
    if isinstance(element, Float32Type):
        return Dtype.F32
    if isinstance(element, IntegerType) and element.width.data == 32:
        return Dtype.I32
    raise UnsupportedError(f"element type {element}", "the lowering knows bf16, f32 and i32", "cast the model to bf16")


def lower(module: ModuleOp, machine: Machine, options: LoweringOptions | None = None) -> Lowered:
    """Lower a specialised `tc` module (all sizes static) with entry `@main`."""
    return _Lowering(module, machine, options or LoweringOptions()).run()


class _Lowering:
    def __init__(self, module: ModuleOp, machine: Machine, options: LoweringOptions) -> None:
        self.source = module
        self.machine = machine
        self.options = options
        self.out = Lowered(ModuleOp([]))
        self.functions = {op.sym_name.data: op for op in module.body.block.ops if isinstance(op, func.FuncOp)}
        self.blocks: dict[str, _Block] = {}
        self.forms: dict[str, list[Form]] = {}

    def run(self) -> Lowered:
        main = self.functions.get("main") or next(iter(self.functions.values()))
        self.main = RoutineOp("main", [])
        self.out.module.body.block.add_op(self.main)
        _Main(self, main, self.main).run()
        return self.out

    # Globals ---------------------------------------------------------------------------------------------------------
    def weight_global(self, em: Emitter, name: str, dtype: Dtype, form: Form) -> SSAValue:
        """The HBM image of weight `name` in `form`; equal forms share one image."""
        forms = self.forms.setdefault(name, [])
        if form not in forms:
            forms.append(form)
        index = forms.index(form)
        image = f"weight.{name}" if index == 0 else f"weight.{name}#{index}"
        rows, columns = (round_up(n, m) for n, m in zip(form[1], form[2], strict=True))
        nbytes = rows * columns * dtype.bytes
        self.out.placements.setdefault(
            image, Placement(image, name, form[0], form[1], form[2], dtype.name.lower(), nbytes)
        )
        return em.global_buffer(image, "hbm", nbytes, "weight")

    def iota(self, em: Emitter, keys: int) -> SSAValue:
        """DM global with 0, 1, 2, ... f32 in every slice, loaded by the entry routine before anything else."""
        count = round_up(keys, 64)
        name = f"iota.{count}"
        buffer = em.global_buffer(f"dm.{name}", "dm", count * 4, "scratch")
        if name not in self.out.constants:
            block = self.main.body.block
            rest = list(block.ops)
            for op in rest:
                op.detach()
            first = Emitter(self.out.module, block, self.machine, self.options.slices, "constants")
            source = self.constant_global(first, name, iota(count))
            target = first.global_buffer(f"dm.{name}", "dm", count * 4, "scratch")
            loops = [(first.slices, 0, DM_SLICE_STRIDE)]
            first.dma(source, Space.HBM, 0, target, Space.DM, 0, loops, count * 4)
            for op in rest:
                block.add_op(op)
        return buffer

    def constant_global(self, em: Emitter, name: str, values: np.ndarray[Any, Any]) -> SSAValue:
        """An HBM global with literal bytes."""
        self.out.constants[name] = values
        return em.global_buffer(name, "hbm", round_up(values.nbytes, 64), "constant")


class _Function:
    """Common part of the entry and of block functions: an environment and one method per op."""

    def __init__(self, parent: _Lowering, function: func.FuncOp, routine: RoutineOp) -> None:
        self.parent = parent
        self.function = function
        self.name = function.sym_name.data
        self.em = Emitter(
            parent.out.module, routine.body.block, parent.machine, parent.options.slices, probes=parent.options.probes
        )
        self.spill = parent.options.spill_bytes
        self.vector = VectorLowering(self.em, self.spill)
        self.contracts = ContractLowering(self.em, self.spill)
        self.env: dict[SSAValue, Value] = {}
        self.resident: dict[SSAValue, Tensor] = {}
        self.offset_images: dict[tuple[SSAValue, int], SSAValue] = {}
        self.limits: dict[tuple[SSAValue, bool, RowSpace], Tensor] = {}
        self.fused: set[Operation] = set()
        self.index = 0

    # Values ------------------------------------------------------------------------------------------------------------
    def tensor(self, value: SSAValue) -> Tensor:
        """The placed tensor of an activation."""
        v = self.env[value]
        if isinstance(v, Weight):
            return self.vector_weight(value, v)
        if isinstance(v, Stored):
            raise UnsupportedError("arithmetic on a KV cache", "caches are read by attention only", "update, then attend")
        return v

    def vector_weight(self, value: SSAValue, w: Weight) -> Tensor:
        """A small parameter as a constant in DM of every slice."""
        if value in self.resident:
            return self.resident[value]
        count = int(np.prod(w.shape, dtype=np.int64))
        if count * w.dtype.bytes > self.spill:
            raise UnsupportedError(
                f"a parameter of shape {w.shape} used element-wise",
                f"it takes more than {self.spill} B of every slice",
                "use it in a contraction or a gather",
            )
        strides, pitch = feature_dims(list(w.shape), w.dtype.bytes)
        buffer = w.bind(tuple(range(len(w.shape))), (1, count), (1, 32))
        dims = tuple(
            Dim("feature", n, s) if n > 1 else Dim("one", 1) for n, s in zip(w.shape, strides, strict=True)
        )
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

    # Walk --------------------------------------------------------------------------------------------------------------
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
                        f"`{op.name}` in @{self.name}", "the backend has no lowering for it", "see docs/status.md for what is built"
                    )
                method(op)
                self._probe(op)
            self.index += 1
        raise AssertionError("function without return")

    def _probe(self, op: Operation) -> None:
        for i, result in enumerate(op.results):
            v = self.env.get(result)
            if isinstance(v, Tensor) and v.rows is not None and not op.name.startswith(("tc.reshape", "tc.transpose", "tc.slice")):
                self.em.probe(v.buffer, f"{self.name}#{self.index}.{i}", json.dumps(layout(v)))

    # Views -------------------------------------------------------------------------------------------------------------
    def op_tc_reshape(self, op: tc.ReshapeOp) -> None:
        shape = shape_of(op.results[0])
        v = self.env[op.operands[0]]
        if isinstance(v, Weight):
            t: Tensor | None = self.tensor(op.operands[0])
        else:
            t = self.tensor(op.operands[0])
        view = t.reshape(shape) if t is not None else None
        if view is None and t is not None and any(d.kind == "tokens" for d in t.dims):
            from backend_rngd.lowering.tensor import split_tokens

            view = split_tokens(t, shape)
        if view is None:
            assert t is not None
            view = self.copy(t).reshape(shape)
        if view is None:
            raise UnsupportedError(
                f"reshape {tuple(shape_of(op.operands[0]))} -> {tuple(shape)}", "it mixes tokens and features", "keep tokens apart"
            )
        self.env[op.results[0]] = view

    def copy(self, t: Tensor) -> Tensor:
        """A compact row-major copy in logical order."""
        names = [f"d{i}" for i in range(len(t.dims))]
        order = [i for i, d in enumerate(t.dims) if d.kind == "feature"]
        target = output_tensor(self.em, t.dims, t.dtype, t.rows, order, self.spill)
        return self.vector.map(ex.Input(0), [t], [names], names, t.dtype, target=target)

    def op_tc_transpose(self, op: tc.TransposeOp) -> None:
        v = self.tensor(op.operands[0])
        self.env[op.results[0]] = v.transpose(op.permutation)

    def op_tc_slice(self, op: tc.SliceOp) -> None:
        axis, start, size = _int(op.axis), _int(op.start), _int(op.size)
        v = self.env[op.operands[0]]
        if isinstance(v, Weight) and int(np.prod(v.shape)) * v.dtype.bytes > self.spill:
            self.env[op.results[0]] = _weight_rows(v, axis, start, size)
            return
        view = self.tensor(op.operands[0]).slice(axis, start, size)
        if view is None:
            raise UnsupportedError("a slice of tokens", "tokens lie on slices", "use a gather of one token a batch row")
        self.env[op.results[0]] = view

    def op_tc_concat(self, op: tc.ConcatOp) -> None:
        parts = [self.tensor(o) for o in op.operands]
        axis = _int(op.axis)
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

    # Arithmetic --------------------------------------------------------------------------------------------------------
    def op_tc_map(self, op: tc.MapOp) -> None:
        self._map(op, None)

    def op_tc_reduce(self, op: tc.ReduceOp) -> None:
        self._map(op, _text(op.kind))

    def _map(self, op: tc.MapOp | tc.ReduceOp, reduce: str | None) -> None:
        rule = op.rule()
        e = ex.parse(_text(op.expr))
        inputs: list[Tensor] = []
        names: list[tuple[str, ...]] = []
        substitution: dict[int, ex.Expr] = {}
        for i, o in enumerate(op.operands):
            v = self.env[o]
            if isinstance(v, Weight) and v.literal is not None and v.literal.size and np.all(v.literal == v.literal.flat[0]):
                substitution[i] = ex.Const(float(v.literal.flat[0]))
                continue
            substitution[i] = ex.Input(len(inputs))
            inputs.append(self.in_dm(o))
            names.append(rule.inputs[i])
        dtype = dtype_of(op.results[0].type.get_element_type())  # pyright: ignore[reportAttributeAccessIssue, reportUnknownArgumentType, reportUnknownMemberType]
        self.env[op.results[0]] = self.vector.map(ex.substitute(e, substitution), inputs, names, rule.output, dtype, reduce)

    def op_tc_contract(self, op: tc.ContractOp) -> None:
        self._contract(op, None)

    def _contract(self, op: tc.ContractOp, output: str | None) -> Tensor:
        rule = op.rule()
        left, right = (self.env[o] for o in op.operands)
        sides = list(rule.inputs)
        operands = list(op.operands)
        if isinstance(left, Weight) and not isinstance(right, Weight):
            left, right, sides, operands = right, left, sides[::-1], operands[::-1]
        if not isinstance(right, Weight) or isinstance(left, Weight):
            raise UnsupportedError(
                f"contraction `{rule}` of two activations", "only weights can be laid out for the contraction engine", "use attention"
            )
        x = self.tensor(operands[0])
        if x.rows is None or x.dtype != Dtype.BF16 or right.dtype != Dtype.BF16:
            raise UnsupportedError(
                f"contraction `{rule}` of {x.dtype.name} and {right.dtype.name}",
                "the contraction engine multiplies bf16 (f8 and integers come with quantized checkpoints)",
                "cast the model to bf16",
            )
        k_axes = [a for a in sides[0] if a in sides[1] and a not in rule.output]
        n_axes = [a for a in rule.output if a in sides[1]]
        if any(a in sides[0] for a in n_axes):
            raise UnsupportedError(f"batched contraction `{rule}` with a weight", "no mapping is written", "split it")
        sizes = {a: n for side, shape in ((sides[0], x.shape), (sides[1], right.shape)) for a, n in zip(side, shape, strict=True)}
        n = _product(sizes[a] for a in n_axes)
        k = _product(sizes[a] for a in k_axes)
        permute = tuple(sides[1].index(a) for a in (*n_axes, *k_axes))
        multiple = k_multiple(k)
        buffer = right.bind(permute, (n, k), (N_MULTIPLE, multiple))
        matrix = Matrix(buffer, round_up(n, N_MULTIPLE), round_up(k, multiple))
        x = self._contiguous(x, [sides[0].index(a) for a in k_axes], matrix.k)
        by_axis = {a: d for a, d in zip(sides[0], x.dims, strict=True)}
        dims = [
            Dim("feature", sizes[a]) if a in n_axes and sizes[a] > 1 else by_axis.get(a, Dim("one", 1)) for a in rule.output
        ]
        dtype = dtype_of(op.results[0].type.get_element_type())  # pyright: ignore[reportAttributeAccessIssue, reportUnknownArgumentType, reportUnknownMemberType]
        ops, final = self._epilogue(op)
        if final is not None:
            dtype = dtype_of(final.results[0].type.get_element_type())  # pyright: ignore[reportAttributeAccessIssue, reportUnknownArgumentType, reportUnknownMemberType]
        produced = (final or op).results[0]
        sink = self.em.global_buffer(output, "hbm", self._output_bytes(x, matrix, dtype), "output") if output else None
        result = self.contracts.run(x, matrix, dims, dtype, ops, sink)
        if final is not None:
            final_rule = final.rule()
            result = result.transpose([final_rule.inputs[0].index(a) for a in final_rule.output])
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
        ops = epilogue_ops(ex.parse(_text(user.expr)))
        return (ops, user) if ops is not None else ([], None)

    def _contiguous(self, x: Tensor, axes: Sequence[int], padded: int) -> Tensor:
        """x with the K axes contiguous in the given order, zero-padded to `padded` elements."""
        k = _product(x.dims[a].size for a in axes)
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
                raise UnsupportedError(f"a contraction over {k} elements", "padding of spilled values is not built", "use a multiple of 16")
            buffer = self.em.alloc(x.rows.local * padded * 2)
            self.em.memset(buffer, 0, x.rows.local * padded * 2)
            target = Tensor(buffer, Space.DM, x.dtype, target.dims, x.rows, 0, padded * 2)
        return self.vector.map(ex.Input(0), [x], [names], names, x.dtype, target=target)

    # Indexed -----------------------------------------------------------------------------------------------------------
    def _offsets(self, value: SSAValue, scale: int) -> SSAValue:
        key = (value, scale)
        if key not in self.offset_images:
            self.offset_images[key] = offsets(self.em, self.vector, self.in_dm(value), scale)
        return self.offset_images[key]

    def op_tc_gather(self, op: tc.GatherOp) -> None:
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
            if rule.inputs[0][0] != gathered:
                raise UnsupportedError(f"gather `{rule}`", "rows of a table are its first axis", "transpose the table")
            columns = _product(table.shape[1:])
            multiple = k_multiple(columns)
            buffer = table.bind(tuple(range(len(table.shape))), (table.shape[0], columns), (N_MULTIPLE, multiple))
            row = round_up(columns, multiple) * table.dtype.bytes
            at = self._offsets(op.operands[1], row)
            self.env[op.results[0]] = embedding(self.em, buffer, row, at, index.rows, dims, table.dtype, self.spill)
            return
        x = self.tensor(op.operands[0])
        if x.dims[list(rule.inputs[0]).index(gathered)].kind not in ("length", "one"):
            raise UnsupportedError(f"gather `{rule}` of activations", "only one token a batch row is gathered", "see docs/status.md")
        if x.rows is not None and x.rows.length == 1:
            self.env[op.results[0]] = _drop_axis(x, list(rule.inputs[0]), list(rule.output), index.rows)
            return
        self.env[op.results[0]] = one_token(self.em, self.vector, x, self.in_dm(op.operands[1]), dims, self.spill)

    def op_tc_kv_update(self, op: tc.KvUpdateOp) -> None:
        cache = self.env[op.operands[0]]
        if not isinstance(cache, Stored):
            raise UnsupportedError("kv_update of an activation", "caches are inputs of the program", "pass it as an argument")
        if any(u.operation is not op and u.operation.parent is op.parent for u in op.operands[0].uses):
            raise UnsupportedError("a cache that is read after it was updated", "updates are in place", "read the result")
        new = self.tensor(op.operands[1])
        if new.space == Space.HBM or (new.dims[3].kind == "feature" and new.dims[3].stride != new.dtype.bytes):
            new = self.copy(new)
        view = self._cache(cache)
        at = self._offsets(op.operands[2], view.width * 2)
        write_cache(self.em, new, view, at)
        self.env[op.results[0]] = Stored(cache.buffer, cache.shape)

    def _cache(self, c: Stored) -> Cache:
        _, heads, keys, width = c.shape
        head = self.parent.options.cache_capacity * width * 2
        return Cache(c.buffer, heads * head, head, keys, width)

    def op_tc_attention(self, op: tc.AttentionOp) -> None:
        q = self.tensor(op.q)
        k, v = self.env[op.k], self.env[op.v]
        assert q.rows is not None
        for name, extra in (("bias", op.bias), ("sinks", op.sinks)):
            if extra is not None:
                raise UnsupportedError(f"attention with {name}", "it is not lowered yet", "see docs/status.md")
        causal = bool(_int(op.causal))
        keys = self._cache(k) if isinstance(k, Stored) else as_keys(self.em, self._keys(op.k))
        values = self._cache(v) if isinstance(v, Stored) else as_keys(self.em, self._keys(op.v))
        heads = shape_of(op.q)[1]
        kv_heads = shape_of(op.k)[1]
        params = AttentionParams(
            float(op.scale.value.data), causal, _int(op.window), float(op.softcap.value.data), heads // kv_heads, kv_heads
        )
        limit = self._limit(op, q.rows, causal)
        attention = AttentionLowering(self.em, self._iota(keys.keys))
        if q.dims[3].kind == "feature" and q.dims[3].stride != 2:
            q = self.copy(q)
        self.env[op.results[0]] = attention.run(q, keys, values, limit, params)

    def _keys(self, value: SSAValue) -> Tensor:
        t = self.tensor(value)
        return self.copy(t) if t.dims[3].stride != t.dtype.bytes or t.space == Space.HBM else t

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

    def _iota(self, keys: int) -> SSAValue:
        return self.parent.iota(self.em, keys)


class _Main(_Function):
    """The entry function: inputs, weights by name, calls, outputs."""

    def run(self) -> None:
        f = self.function
        names = [a.data for a in f.attributes["arg_names"]] if "arg_names" in f.attributes else [f"arg{i}" for i in range(len(f.body.block.args))]  # pyright: ignore
        self.held: dict[str, SSAValue] = {}
        self.iota_ready: SSAValue | None = None
        for name, arg in zip(names, f.body.block.args, strict=True):
            self._argument(str(name), arg)
        returned = self._returned(f)
        self.results = {v: n for v, n in returned}
        values = self.walk()
        self.em.location = "outputs"
        for value, (_, name) in zip(values, returned, strict=True):
            self._output(value, name)

    def _returned(self, f: func.FuncOp) -> list[tuple[SSAValue, str]]:
        op = f.body.block.last_op
        assert isinstance(op, func.ReturnOp)
        names = [a.data for a in f.attributes["result_names"]] if "result_names" in f.attributes else [f"result{i}" for i in range(len(op.operands))]  # pyright: ignore
        return list(zip(op.operands, [str(n) for n in names], strict=True))

    def _argument(self, name: str, arg: SSAValue) -> None:
        shape = tuple(shape_of(arg))
        dtype = dtype_of(arg.type.get_element_type())  # pyright: ignore[reportAttributeAccessIssue, reportUnknownArgumentType, reportUnknownMemberType]
        options = self.parent.options
        if name.startswith("cache."):
            b, k, t, d = shape
            if t > options.cache_capacity:
                raise UnsupportedError(f"a bucket of {t} keys", f"the cache holds {options.cache_capacity}", "raise the capacity")
            nbytes = options.cache_batch * k * options.cache_capacity * d * 2
            self.env[arg] = Stored(self.em.global_buffer(name, "hbm", nbytes, "cache", nbytes // options.cache_batch), shape)
            head = options.cache_capacity * d * 2
            self.parent.out.caches.append(Port(name, name, "bf16", shape, (k * head, head, d * 2, 2)))
            return
        if dtype == Dtype.I32 and len(shape) in (1, 2):
            rows = RowSpace.make(shape[0], shape[1] if len(shape) == 2 else 1, options.slices)
            dims = [Dim("batch", shape[0])] + ([Dim("length", shape[1])] if len(shape) == 2 else [])
            buffer = self.em.global_buffer(name, "hbm", rows.physical * INPUT_PITCH, "input")
            self.env[arg] = Tensor(buffer, Space.HBM, dtype, tuple(dims), rows, 0, INPUT_PITCH)
            strides = (rows.batch_stride * INPUT_PITCH, INPUT_PITCH)[: len(shape)]
            self.parent.out.inputs.append(Port(name, name, "i32", shape, strides))
            return
        # A single op on its own: dense operands. Rank 3 and more: tokens first; the rest are weights.
        if len(shape) >= 3 and name.startswith(("x", "arg", "q", "k", "v", "new")):
            rows = RowSpace.make(shape[0], shape[1], options.slices)
            strides, pitch = feature_dims(list(shape[2:]), dtype.bytes)
            dims = [Dim("batch", shape[0]), Dim("length", shape[1])]
            dims += [Dim("feature", n, s) if n > 1 else Dim("one", 1) for n, s in zip(shape[2:], strides, strict=True)]
            buffer = self.em.global_buffer(name, "hbm", rows.physical * pitch, "input")
            held = Tensor(buffer, Space.HBM, dtype, tuple(dims), rows, 0, pitch)
            self.env[arg] = load_rows(self.em, held, rows.local) if rows.local * pitch <= self.spill else held
            self.parent.out.inputs.append(
                Port(name, name, dtype.name.lower(), shape, (rows.batch_stride * pitch, pitch, *strides))
            )
            return
        self._weight(arg, f"arg.{name}", shape, dtype, None)

    def _weight(self, value: SSAValue, name: str, shape: tuple[int, ...], dtype: Dtype, literal: Any) -> None:
        def bind(permute: tuple[int, ...], reshape: tuple[int, int], pad: tuple[int, int]) -> SSAValue:
            return self.parent.weight_global(self.em, name, dtype, (permute, reshape, pad))

        self.env[value] = Weight(shape, dtype, bind, literal)

    def op_tc_weight(self, op: tc.WeightOp) -> None:
        result = op.results[0]
        self._weight(result, _text(op.fqn), tuple(shape_of(result)), dtype_of(result.type.get_element_type()), None)  # pyright: ignore

    def op_tc_constant(self, op: tc.ConstantOp) -> None:
        result = op.results[0]
        values = np.asarray(op.array())
        dtype = dtype_of(result.type.get_element_type())  # pyright: ignore
        name = f"constant.{self.index}"

        def bind(permute: tuple[int, ...], reshape: tuple[int, int], pad: tuple[int, int]) -> SSAValue:
            flat = np.zeros((round_up(reshape[0], pad[0]), round_up(reshape[1], pad[1])), values.dtype)
            flat[: reshape[0], : reshape[1]] = values.transpose(permute).reshape(reshape)
            return self.parent.constant_global(self.em, name, flat.astype(_numpy(dtype)))

        self.env[result] = Weight(tuple(values.shape), dtype, bind, values)

    def op_tc_contract(self, op: tc.ContractOp) -> None:
        uses = list(op.results[0].uses)
        final = op.results[0]
        if len(uses) == 1 and self._epilogue(op)[1] is not None:
            final = uses[0].operation.results[0]
        through = _returned_view(final)
        if through in self.results and len(list(final.uses)) == 1:
            self._contract(op, self.results[through])
        else:
            self._contract(op, None)

    # Calls ---------------------------------------------------------------------------------------------------------------
    def op_func_call(self, op: func.CallOp) -> None:
        name = op.callee.string_value()
        function = self.parent.functions[name]
        operands = [self.env[o] for o in op.operands]
        if name not in self.parent.blocks:
            direct = [self._input_of(v) for v in operands]
            self.parent.blocks[name] = _Block(self.parent, function, operands, direct)
        block = self.parent.blocks[name]
        for i, (o, v) in enumerate(zip(op.operands, operands, strict=True)):
            if isinstance(v, Tensor):
                self._fill_slot(block, i, o, v)
        arguments: list[SSAValue] = []
        for i, form in block.parameters:
            v = operands[i]
            assert not isinstance(v, Tensor)
            arguments.append(v.buffer if isinstance(v, Stored) else v.bind(*_required(form)))
        self.em.add(CallOp(name, arguments, self.em.location))
        for i, result in enumerate(op.results):
            r = block.results[i]
            if isinstance(r, int):
                source = operands[r]
                assert isinstance(source, Stored)
                self.env[result] = Stored(source.buffer, tuple(shape_of(result)))
            else:
                self.env[result] = block.result_tensor(i, self.em)

    def _global_of(self, v: Value) -> str | None:
        if not isinstance(v, Tensor):
            return None
        return next((n for n, b in self.em.known_globals().items() if b is v.buffer), None)

    def _input_of(self, v: Value) -> str | None:
        """The program input that a value is, if it is one: blocks then read it in place."""
        name = self._global_of(v)
        return name if name in {port.buffer for port in self.parent.out.inputs} else None

    def _fill_slot(self, block: _Block, i: int, value: SSAValue, v: Tensor) -> None:
        slot = block.slots[i]
        if slot.direct is not None:
            if self._global_of(v) != slot.direct:
                raise AssertionError("a block argument that was a global in the first call is another value now")
            return
        if self.held.get(slot.name) is value:
            return
        target = block.slot_tensor(i, self.em)
        if v.buffer is not target.buffer:
            names = [f"d{n}" for n in range(len(v.dims))]
            if v.space == Space.HBM:
                assert v.rows is not None
                self.em.dma(
                    v.buffer, Space.HBM, v.base, target.buffer, Space.HBM, target.base, [(v.rows.physical, v.pitch, target.pitch)],
                    round_up(v.row_bytes, 8),
                )
            else:
                self.vector.map(ex.Input(0), [v], [names], names, v.dtype, target=target)
        self.held[slot.name] = value

    # Outputs -------------------------------------------------------------------------------------------------------------
    def _output(self, value: SSAValue, name: str) -> None:
        v = self.env[value]
        if isinstance(v, Stored):
            return
        t = self.tensor(value)
        assert t.rows is not None
        if t.space == Space.DM or self._global_of(t) != name:
            order = sorted((i for i, d in enumerate(t.dims) if d.kind == "feature"), key=lambda i: -t.dims[i].stride)
            strides, pitch = feature_dims([t.dims[i].size for i in order], t.dtype.bytes)
            dims = list(t.dims)
            for i, s in zip(order, strides, strict=True):
                dims[i] = Dim("feature", t.dims[i].size, s)
            buffer = self.em.global_buffer(name, "hbm", t.rows.physical * pitch, "output")
            held = Tensor(buffer, Space.HBM, t.dtype, tuple(dims), t.rows, 0, pitch)
            if t.space == Space.HBM:
                self.em.dma(
                    t.buffer, Space.HBM, t.base, buffer, Space.HBM, 0, [(t.rows.physical, t.pitch, pitch)], round_up(t.row_bytes, 8)
                )
            else:
                from backend_rngd.lowering.move import store_rows

                store_rows(self.em, t, held, t.rows.local)
            t = held
        self.parent.out.outputs.append(Port(name, name, t.dtype.name.lower(), t.shape, _port_strides(t), t.base))


@dataclass
class _Slot:
    """Where an activation argument of a block lives: a global of its own or (direct) one of the caller's globals."""

    name: str
    like: Tensor
    direct: str | None


class _Block(_Function):
    """A block function, lowered once; weights and caches come as HBM addresses, activations in fixed slots.

    The routine gets one argument per weight form it asks for and one per cache: `parameters` lists them in order.
    """

    def __init__(
        self, parent: _Lowering, function: func.FuncOp, operands: Sequence[Value], direct: Sequence[str | None]
    ) -> None:
        routine = RoutineOp(function.sym_name.data, [])
        parent.out.module.body.block.add_op(routine)
        super().__init__(parent, function, routine)
        self.slots: dict[int, _Slot] = {}
        self.parameters: list[tuple[int, Form | None]] = []
        self.results: list[int | str] = []
        self.templates: list[Tensor | None] = []
        self.em.location = self.name
        for i, (arg, v) in enumerate(zip(function.body.block.args, operands, strict=True)):
            self.env[arg] = self._bind(i, v, direct[i])
        self._return(self.walk(), function)

    def _bind(self, i: int, v: Value, direct: str | None) -> Value:
        if isinstance(v, Stored):
            return Stored(self._parameter(i, None, _bytes(v.buffer)), v.shape)
        if isinstance(v, Weight):

            def bind(permute: tuple[int, ...], reshape: tuple[int, int], pad: tuple[int, int]) -> SSAValue:
                form: Form = (permute, reshape, pad)
                rows, columns = (round_up(n, m) for n, m in zip(reshape, pad, strict=True))
                return self._parameter(i, form, rows * columns * v.dtype.bytes)

            return Weight(v.shape, v.dtype, bind, v.literal)
        self.slots[i] = _Slot(direct or f"{self.name}.arg{i}", v, direct)
        return self.slot_tensor(i, self.em)

    def _parameter(self, i: int, form: Form | None, nbytes: int) -> SSAValue:
        """The routine argument that carries argument `i` in `form`."""
        block = self.em.block
        if (i, form) not in self.parameters:
            self.parameters.append((i, form))
            return block.insert_arg(buffer_type("hbm", nbytes), len(block.args))
        return block.args[self.parameters.index((i, form))]

    def slot_tensor(self, i: int, em: Emitter) -> Tensor:
        """The argument slot seen from the routine `em` writes."""
        slot = self.slots[i]
        return _in_global(slot.like, slot.name, em)

    def _return(self, values: Sequence[SSAValue], function: func.FuncOp) -> None:
        for n, value in enumerate(values):
            v = self.env[value]
            if isinstance(v, Stored):
                source = next(i for i, a in enumerate(function.body.block.args) if isinstance(self.env[a], Stored) and self.env[a].buffer is v.buffer)  # pyright: ignore
                self.results.append(source)
                self.templates.append(None)
                continue
            t = self.tensor(value)
            name = f"{self.name}.result{n}"
            target = _in_global(t, name, self.em)
            if t.space == Space.HBM:
                assert t.rows is not None
                self.em.dma(
                    t.buffer, Space.HBM, t.base, target.buffer, Space.HBM, target.base, [(t.rows.physical, t.pitch, target.pitch)],
                    round_up(t.row_bytes, 8),
                )
            else:
                names = [f"d{k}" for k in range(len(t.dims))]
                self.vector.map(ex.Input(0), [t], [names], names, t.dtype, target=target)
            self.results.append(name)
            self.templates.append(t)

    def result_tensor(self, n: int, em: Emitter) -> Tensor:
        """Result `n` seen from the caller."""
        template, name = self.templates[n], self.results[n]
        assert template is not None and isinstance(name, str)
        return _in_global(template, name, em)


# Helpers -----------------------------------------------------------------------------------------------------------------
def layout(t: Tensor) -> dict[str, Any]:
    """Probe layout of a tensor with rows (see the artifact's debug files)."""
    rows = t.rows
    assert rows is not None
    digits: list[list[int]] = []
    hbm = t.space == Space.HBM

    def row_digits(dim: int, size: int, step: int) -> None:
        if rows.replicated or hbm:
            digits.append([dim, size, 0, step * t.pitch])
        elif step % rows.local == 0:
            digits.append([dim, size, step // rows.local, 0])
        else:
            inner = min(rows.local, size)
            digits.append([dim, -(-size // inner), 1, 0])
            digits.append([dim, inner, 0, t.pitch])

    for i, d in enumerate(t.dims):
        if d.kind == "batch":
            row_digits(i, d.size, rows.batch_stride)
        elif d.kind == "length":
            row_digits(i, d.size, 1)
        elif d.kind == "tokens":
            row_digits(i, rows.batch, rows.batch_stride)
            row_digits(i, rows.length, 1)
        elif d.kind == "feature":
            digits.append([i, d.size, 0, d.stride])
    return {
        "dtype": t.dtype.name.lower(), "shape": list(t.shape), "base": t.base, "space": "hbm" if hbm else "dm", "digits": digits,
    }


def _port_strides(t: Tensor) -> tuple[int, ...]:
    rows = t.rows
    assert rows is not None
    by_kind = {"batch": rows.batch_stride * t.pitch, "length": t.pitch, "tokens": t.pitch, "one": 0}
    return tuple(d.stride if d.kind == "feature" else by_kind[d.kind] for d in t.dims)


def _in_global(like: Tensor, name: str, em: Emitter) -> Tensor:
    """A compact tensor like `like` in the global `name`; views of direct globals keep their own strides."""
    if name in em.known_globals() or em.declared(name):
        size = em.declared_bytes(name)
    else:
        size = 0
    order = sorted((i for i, d in enumerate(like.dims) if d.kind == "feature"), key=lambda i: -like.dims[i].stride)
    spacing = min((like.dims[i].stride for i in order), default=like.dtype.bytes)
    strides, pitch = feature_dims([like.dims[i].size for i in order], like.dtype.bytes, spacing)
    if not order:
        pitch = INPUT_PITCH
    dims = list(like.dims)
    for i, s in zip(order, strides, strict=True):
        dims[i] = Dim("feature", like.dims[i].size, s)
    count = 1 if like.rows is None else (like.rows.physical if like.space == Space.HBM else like.rows.local)
    space = "hbm" if like.space == Space.HBM else "dm"
    buffer = em.global_buffer(name, space, max(size, count * pitch), "activation")
    return Tensor(buffer, like.space, like.dtype, tuple(dims), like.rows, 0, pitch)


def _drop_axis(x: Tensor, names: list[str], kept: list[str], rows: RowSpace) -> Tensor:
    """x without its length axis of size 1, seen with the rows of the index."""
    dims = [x.dims[names.index(a)] for a in kept]
    return Tensor(x.buffer, x.space, x.dtype, tuple(dims), rows, x.base, x.pitch)


def _weight_rows(w: Weight, axis: int, start: int, size: int) -> Weight:
    raise UnsupportedError("a slice of a large parameter", "only whole parameters are placed", "slice it in the checkpoint")


def _required(form: Form | None) -> Form:
    assert form is not None
    return form


def _bytes(buffer: SSAValue) -> int:
    assert isinstance(buffer.type, BufferType)
    return buffer.type.nbytes.data


def _returned_view(value: SSAValue) -> SSAValue:
    """Follow single-use reshapes from a value towards the return."""
    while True:
        uses = list(value.uses)
        if len(uses) != 1 or not isinstance(uses[0].operation, tc.ReshapeOp):
            return value
        value = uses[0].operation.results[0]


def _location(op: Operation) -> str:
    attribute = op.attributes.get("path")
    where = attribute.data if attribute is not None and hasattr(attribute, "data") else ""  # pyright: ignore
    return f"{where}|{op.name}"


def _numpy(dtype: Dtype) -> Any:
    return {Dtype.BF16: ml_dtypes.bfloat16, Dtype.F32: np.float32, Dtype.I32: np.int32}[dtype]


def _product(values: Any) -> int:
    out = 1
    for v in values:
        out *= int(v)
    return out


def _text(attribute: Any) -> str:
    return str(attribute.data)


def _int(attribute: Any) -> int:
    return int(attribute.value.data)
