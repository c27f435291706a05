"""Element-wise maps and reductions over features: where the steps of an expression run and on which bytes.

Iteration is (local rows, features); inputs without an axis are broadcast by stride 0 or through VRF. Work is cut into
chunks so that intermediate f32 values stay small, and values that live in HBM are brought in chunk by chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from backend_rngd.isa.descriptors import Alu, Commit, Dtype, Mode, Op, Operand, Source, Space, VectorOp
from backend_rngd.lowering.emitter import Emitter, operand_loops
from backend_rngd.lowering.expression import FLOAT_STAGE, LAST_STAGE, ChainOp, DoesNotFitError, Ref, Scheduler, Step
from backend_rngd.lowering.move import load_rows, store_rows
from backend_rngd.lowering.tensor import Dim, RowSpace, Tensor, feature_dims, round_up
from ir import expr as ex
from ir.errors import UnsupportedError

CHUNK_ELEMENTS = 8192  # f32 intermediates of a chunk: 32 KB of a slice's 512 KB
VRF_OPERAND_BYTES = 4096  # half of VRF, so that the next pass's operands can load meanwhile
REDUCED_SPACING = 8  # bytes between results of a reduction: a commit writes at least 8 B
TO_I8 = (
    VectorOp(Alu.FP_TO_FXP, Op.CONVERT, Mode.UNARY),
    VectorOp(Alu.CLIP_MAX, Op.MAX, Mode.STREAM_OPERAND, Operand(Source.CONST, -128.0)),
    VectorOp(Alu.CLIP_MIN, Op.MIN, Mode.STREAM_OPERAND, Operand(Source.CONST, 127.0)),
)
"""Nearest even and saturated; the cast engine behind it wraps (hardware.md 2.10)."""
REPEATED = "\0repeated"
"""Innermost axis along which one value is read again, so that it fills the smallest packet (8 B): of tensors that have
rows only, and of reductions over counts that are no whole packets."""


@dataclass(frozen=True)
class Axis:
    """A feature axis of the iteration."""

    name: str
    size: int


@dataclass(frozen=True)
class View:
    """A tensor seen from the iteration: byte strides of the row and of every feature axis (0: broadcast)."""

    tensor: Tensor
    row_stride: int
    strides: tuple[int, ...]


class Wanted(NamedTuple):
    """A compact tensor: features in `order` (indices into dims, outer to inner) row-major."""

    dims: Sequence[Dim]
    dtype: Dtype
    rows: RowSpace | None
    order: Sequence[int]
    spacing: int | None = None

    def layout(self) -> tuple[tuple[Dim, ...], int]:
        """Dimensions with their strides, and the pitch of a row."""
        strides, pitch = feature_dims([self.dims[i].size for i in self.order], self.dtype.bytes, self.spacing)
        out = list(self.dims)
        for i, stride in zip(self.order, strides, strict=True):
            out[i] = Dim("feature", self.dims[i].size, stride)
        return tuple(out), pitch


def output_tensor(em: Emitter, wanted: Wanted, spill: int) -> Tensor:
    """Allocate a tensor: in DM, or in HBM if it has rows that take more than `spill` bytes of a slice."""
    dims, pitch = wanted.layout()
    rows, order = wanted.rows, wanted.order
    nbytes = pitch * (rows.local if rows is not None else 1)
    if rows is not None and nbytes > spill:
        return Tensor(em.alloc(rows.physical * pitch, space="hbm"), Space.HBM, wanted.dtype, dims, rows, 0, pitch)
    buffer = em.alloc(nbytes)
    if order and dims[order[-1]].size % 4:
        em.memset(buffer, 0, nbytes)  # packets of four elements read the padding of odd rows
    return Tensor(buffer, Space.DM, wanted.dtype, dims, rows, 0, pitch)


@dataclass(frozen=True)
class VrfShape:
    """An operand in VRF: rows x sizes elements, `element` bytes apart."""

    rows: int
    sizes: tuple[int, ...]
    element: int

    @property
    def bytes(self) -> int:
        """VRF bytes it takes."""
        total = self.rows * self.element
        for n in self.sizes:
            total *= n
        return total


class VectorLowering:
    """Lowers one expression over placed tensors."""

    def __init__(self, em: Emitter, spill: int) -> None:
        self.em = em
        self.spill = spill
        self.allocate: Callable[[Wanted], Tensor] | None = None  # gives the next result instead of a new tensor

    def new(self, wanted: Wanted) -> Tensor:
        """The tensor of a result: where `allocate` says, else a new one."""
        allocate, self.allocate = self.allocate, None
        return output_tensor(self.em, wanted, self.spill) if allocate is None else allocate(wanted)

    def map(
        self,
        e: ex.Expr,
        inputs: Sequence[Tensor],
        names: Sequence[Sequence[str]],
        out_names: Sequence[str],
        dtype: Dtype,
        reduce: str | None = None,
        target: Tensor | None = None,
    ) -> Tensor:
        """`e` over `inputs` (axis names per dimension), result over `out_names`; `reduce` (add, max, min) the rest.

        Returns a compact tensor (rows like the inputs) or `target` filled in.
        """
        allocate, self.allocate = self.allocate, None  # it is for this result, not for what is computed on the way
        if reduce is not None and dtype.bytes < Dtype.F32.bytes:
            exact = self.map(e, inputs, names, out_names, Dtype.F32, reduce)
            self.allocate = allocate
            return self.map(ex.Input(0), [exact], [out_names], out_names, dtype, target=target)
        if dtype != Dtype.I32:
            e, inputs, names = self._hoist(e, inputs, names)
        rows = next((t.rows for t in inputs if t.rows is not None), None)
        row_kind: dict[str, Dim] = {}
        sizes: dict[str, int] = {}
        for t, ns in zip(inputs, names, strict=True):
            if t.rows is not None and t.rows != rows:
                raise UnsupportedError(
                    "an element-wise operation over two different sets of tokens",
                    f"rows {rows} and {t.rows} lie differently on the slices",
                    "gather one of them first",
                )
            for d, n in zip(t.dims, ns, strict=True):
                sizes[n] = max(sizes.get(n, 1), d.size)
                if d.is_row:
                    row_kind[n] = d
        for t, ns in zip(inputs, names, strict=True):
            if any(n in row_kind and d.kind == "feature" for d, n in zip(t.dims, ns, strict=True)):
                raise UnsupportedError(
                    "an element-wise operation that gives each token its own part of a constant",
                    f"tokens lie on the slices, the constant of {t.shape} is the same in all of them",
                    "make the constant an input, with tokens as its first axes",
                )
        lead = max(
            range(len(inputs)),
            key=lambda i: (len([d for d in inputs[i].dims if d.kind == "feature"]), inputs[i].rows is not None),
        )
        order = sorted(
            (n for n, d in zip(names[lead], inputs[lead].dims, strict=True) if d.kind == "feature"),
            key=lambda n: -inputs[lead].dims[list(names[lead]).index(n)].stride,
        )
        missing = [n for n in sizes if n not in order and n not in row_kind and sizes[n] > 1]
        order = [*missing, *order]
        if reduce is not None:
            order = [n for n in order if n in out_names] + [n for n in order if n not in out_names]
        axes = [Axis(n, sizes[n]) for n in order]
        kept = [n for n in order if n in out_names]
        if target is None:
            dims = [
                row_kind[n] if n in row_kind else Dim("feature" if sizes[n] > 1 else "one", sizes[n]) for n in out_names
            ]
            index = [list(out_names).index(n) for n in kept]
            spacing = REDUCED_SPACING if reduce is not None else None
            self.allocate = allocate
            target = self.new(Wanted(dims, dtype, rows, index, spacing))
        reduced = [n for n in order if n not in out_names]
        if any(n not in out_names for n in row_kind) and reduce is not None:
            raise UnsupportedError("a reduction over tokens", "tokens lie on different slices", "reduce on the host")
        self._chunks(e, inputs, names, axes, target, out_names, dtype, reduce, len(reduced))
        return target

    def _hoist(
        self, e: ex.Expr, inputs: Sequence[Tensor], names: Sequence[Sequence[str]]
    ) -> tuple[ex.Expr, list[Tensor], list[Sequence[str]]]:
        """Compute what depends on fewer axes than the whole (a norm's scale, a gain plus one) once, on its own axes."""
        tensors, axes = list(inputs), list(names)
        real = [[n for n, d in zip(ns, t.dims, strict=True) if d.size > 1] for t, ns in zip(inputs, names, strict=True)]
        everything = {n for r in real for n in r}

        def visit(part: ex.Expr) -> ex.Expr:
            used = ex.inputs(part)
            reach = {n for i in used for n in real[i]}
            # Integers are converted on their own axes too: VRF holds f32.
            if not isinstance(part, ex.Call) and not (used and tensors[used[0]].dtype == Dtype.I32):
                return part
            if used and reach != everything and len({tensors[i].rows for i in used} - {None}) <= 1:
                numbered = ex.renumber(part, {i: k for k, i in enumerate(used)})
                parts = [tensors[i] for i in used]
                seen: list[str] = []
                for i in used:
                    seen += [n for n in axes[i] if n not in seen]
                has_rows = any(t.rows is not None for t in parts)
                kept = [n for n in seen if has_rows or n in reach]
                tensors.append(self.map(numbered, parts, [axes[i] for i in used], kept, Dtype.F32))
                axes.append(kept)
                real.append([n for n in kept if n in reach])
                return ex.Input(len(tensors) - 1)
            if not isinstance(part, ex.Call):
                return part
            return ex.Call(part.fn, tuple(visit(a) for a in part.args))

        changed = visit(e)
        live = ex.inputs(changed)
        if changed is e or not live:
            return e, list(inputs), list(names)
        order = {i: k for k, i in enumerate(live)}
        return ex.renumber(changed, order), [tensors[i] for i in live], [axes[i] for i in live]

    # Chunks ------------------------------------------------------------
    def _chunks(
        self,
        e: ex.Expr,
        inputs: Sequence[Tensor],
        names: Sequence[Sequence[str]],
        axes: list[Axis],
        target: Tensor,
        out_names: Sequence[str],
        dtype: Dtype,
        reduce: str | None,
        reduced: int,
    ) -> None:
        local = target.rows.local if target.rows is not None else 1
        per_row = 1
        for a in axes:
            per_row *= a.size
        rows_chunk = max(1, min(local, CHUNK_ELEMENTS // max(per_row, 1)))
        split, pieces = self._feature_split(axes, reduced, per_row)
        width = axes[split].size // pieces if pieces > 1 else 0
        for row in range(0, local, rows_chunk):
            count = min(rows_chunk, local - row)
            for piece in range(pieces):
                chunk_axes = list(axes)
                views: list[Tensor] = []
                for t, ns in zip(inputs, names, strict=True):
                    view = _rows_view(t, row)
                    if pieces > 1 and axes[split].name in ns:
                        d = list(ns).index(axes[split].name)
                        if t.dims[d].size > 1:
                            view = view.slice(d, piece * width, width) or view
                    views.append(view)
                out = _rows_view(target, row)
                if pieces > 1:
                    chunk_axes[split] = Axis(axes[split].name, width)
                    sliced = out.slice(list(out_names).index(axes[split].name), piece * width, width)
                    assert sliced is not None
                    out = sliced
                self._one(e, views, names, chunk_axes, out, out_names, dtype, reduce, reduced, count)

    def _feature_split(self, axes: list[Axis], reduced: int, per_row: int) -> tuple[int, int]:
        """Which kept axis to cut and into how many equal pieces, so that a row's chunk stays small."""
        kept = len(axes) - reduced
        if per_row <= 2 * CHUNK_ELEMENTS or kept == 0:
            return 0, 1
        best = max(range(kept), key=lambda i: axes[i].size)
        wanted = -(-per_row // CHUNK_ELEMENTS)
        for pieces in range(wanted, axes[best].size + 1):
            if axes[best].size % pieces == 0 and (axes[best].size // pieces) % 8 == 0:
                return best, pieces
        return 0, 1

    def _one(
        self,
        e: ex.Expr,
        inputs: Sequence[Tensor],
        names: Sequence[Sequence[str]],
        axes: list[Axis],
        target: Tensor,
        out_names: Sequence[str],
        dtype: Dtype,
        reduce: str | None,
        reduced: int,
        rows: int,
    ) -> None:
        """One chunk, everything in DM."""
        placed = [
            load_rows(self.em, t, rows) if t.space == Space.HBM else t  # constants were loaded by the caller
            for t in inputs
        ]
        out = target
        if target.space == Space.HBM:
            order = sorted(
                (i for i, d in enumerate(target.dims) if d.kind == "feature"), key=lambda i: -target.dims[i].stride
            )
            strides, pitch = feature_dims([target.dims[i].size for i in order], dtype.bytes)
            dims = list(target.dims)
            for i, stride in zip(order, strides, strict=True):
                dims[i] = Dim("feature", target.dims[i].size, stride)
            out = Tensor(self.em.alloc(rows * pitch), Space.DM, dtype, tuple(dims), target.rows, 0, pitch)
        narrowest = min(t.dtype.bytes for t in [*placed, out])
        if "round_bf16" in ex.functions(e):
            narrowest = min(narrowest, Dtype.BF16.bytes)
        _Chunk(self.em, axes, rows, reduced, 8 // narrowest).run(e, placed, names, out, out_names, dtype, reduce)
        if target.space == Space.HBM:
            store_rows(self.em, out, target, rows)


def _rows_view(t: Tensor, row: int) -> Tensor:
    """The tensor from local row `row` on."""
    return t if t.rows is None else replace(t, base=t.base + row * t.pitch)


class _Chunk:
    """Runs the steps of an expression over `rows` local rows and `axes`."""

    def __init__(self, em: Emitter, axes: list[Axis], rows: int, reduced: int, packet: int) -> None:
        """reduced: how many of the innermost axes are; packet: elements that fill the smallest packet in every type."""
        self.em = em
        self.rows = rows
        self.kept = len(axes) - reduced
        self.repeated = packet if not axes or (reduced and axes[-1].size % packet) else 1
        self.axes = [*axes, Axis(REPEATED, packet)] if self.repeated > 1 else axes
        self.values: dict[Ref, View] = {}

    def run(
        self,
        e: ex.Expr,
        inputs: Sequence[Tensor],
        names: Sequence[Sequence[str]],
        out: Tensor,
        out_names: Sequence[str],
        dtype: Dtype,
        reduce: str | None,
    ) -> None:
        for i, (t, ns) in enumerate(zip(inputs, names, strict=True)):
            self.values[Ref("in", i)] = self._operand(t, ns)
        integer = dtype == Dtype.I32 and all(t.dtype == Dtype.I32 for t in inputs)
        converted = dtype == Dtype.I8 or (dtype == Dtype.I32 and not integer)  # which precedes the last stage
        last_stage = Alu.FP_DIV.stage if converted else LAST_STAGE
        scheduler = self._scheduler(e, FLOAT_STAGE if reduce else last_stage)
        try:
            steps = scheduler.run()
            fused = True
        except DoesNotFitError:
            if not reduce:
                raise
            scheduler = self._scheduler(e, LAST_STAGE)
            steps, fused = scheduler.run(), False
        target = self._target(out, out_names)
        if not steps or (reduce and not fused):
            steps = [*steps, Step(scheduler.root, None, [], scheduler.root)]
        for i, step in enumerate(steps):
            last = i == len(steps) - 1
            where = target if last else self._temporary(Dtype.BF16 if step.rounded else Dtype.F32)
            self._emit(step, where, integer, reduce if last else None)
            self.values[step.result] = where if not last else self.values.get(step.result, where)

    def _scheduler(self, e: ex.Expr, final: int) -> Scheduler:
        return Scheduler(e, self._through_vrf, self._dtype, self._repeats, self._vrf_room, final_stage=final)

    # Views ------------------------------------------------------------
    def _operand(self, t: Tensor, ns: Sequence[str]) -> View:
        by_name = {n: d for n, d in zip(ns, t.dims, strict=True)}
        strides = tuple(
            by_name[a.name].stride if a.name in by_name and by_name[a.name].kind == "feature" else 0 for a in self.axes
        )
        return View(t, t.pitch if t.rows is not None else 0, strides)

    def _target(self, out: Tensor, ns: Sequence[str]) -> View:
        by_name = {n: d for n, d in zip(ns, out.dims, strict=True)}
        return View(out, out.pitch, tuple(by_name[a.name].stride if a.name in by_name else 0 for a in self.axes))

    def _temporary(self, dtype: Dtype) -> View:
        if self.repeated > 1:
            strides, pitch = feature_dims([a.size for a in self.axes[:-1]], dtype.bytes, REDUCED_SPACING)
            strides.append(0)
        else:
            strides, pitch = feature_dims([a.size for a in self.axes], dtype.bytes)
        buffer = self.em.alloc(self.rows * pitch)
        if self.axes[-1].size % 4 and self.repeated == 1:
            self.em.memset(buffer, 0, self.rows * pitch)
        return View(Tensor(buffer, Space.DM, dtype, (), None, 0, pitch), pitch, tuple(strides))

    def _through_vrf(self, ref: Ref) -> bool:
        """Small f32 or bf16 tensors whose elements lie 8 B and more in a run: the sub context fetches 8 B at a time."""
        if ref not in self.values:
            return False
        v = self.values[ref]
        if v.tensor.dtype == Dtype.I32:
            return False
        shape = self._vrf_shape(v)
        inner = next((s for s in reversed(v.strides) if s), None)
        plain = inner is None or inner == shape.element or (inner == v.tensor.dtype.bytes and shape.element == 4)
        aligned = v.tensor.base % 8 == 0 and not any(s % 8 for s in (v.row_stride, *v.strides) if s > shape.element)
        return plain and aligned and shape.bytes <= VRF_OPERAND_BYTES

    def _vrf_room(self, refs: Sequence[Ref]) -> bool:
        machine = self.em.machine
        needed = sum(round_up(self._vrf_shape(self.values[ref]).bytes, 32) for ref in refs)
        return needed <= machine.vrf_bytes - machine.vrf_stash_bytes

    def _vrf_shape(self, v: View) -> VrfShape:
        """The part of an operand that is really there, the innermost axis padded to four elements.

        Results of reductions lie 8 B apart, value and padding; VRF keeps them so.
        """
        rows = self.rows if v.row_stride else 1
        sizes = [a.size if s else 1 for a, s in zip(self.axes, v.strides, strict=True)]
        inner = max((i for i, n in enumerate(sizes) if n > 1), default=None)
        spaced = inner is None or (v.tensor.dtype == Dtype.F32 and v.strides[inner] == REDUCED_SPACING)
        if inner is not None:
            sizes[inner] = round_up(sizes[inner], 4)
        return VrfShape(rows, tuple(sizes), 8 // v.tensor.dtype.bytes * 4 if spaced else 4)

    def _repeats(self, ref: Ref) -> bool:
        return ref in self.values and self.values[ref].strides[-1] == 0

    def _dtype(self, ref: Ref) -> Dtype:
        return self.values[ref].tensor.dtype

    # Emission ------------------------------------------------------------
    def _sizes(self, target: View, reduce: bool) -> tuple[list[int], int]:
        """Axis sizes with the innermost padded to a packet, and the packet's elements."""
        sizes = [a.size for a in self.axes]
        if self.repeated > 1:
            return sizes, self.repeated
        if sizes[-1] % 4 and reduce:
            return sizes, 2
        sizes[-1] = round_up(sizes[-1], 4)
        return sizes, 8 if sizes[-1] % 8 == 0 else 4

    def _emit(self, step: Step, target: View, integer: bool, reduce: str | None) -> None:
        em = self.em
        stream = self.values[step.stream]
        second = self.values[step.second] if step.second is not None else None
        if second is not None and second.tensor.dtype != stream.tensor.dtype:
            if stream.tensor.dtype != Dtype.F32:
                stream = self._widened(stream)
            if second.tensor.dtype != Dtype.F32:
                second = self._widened(second)
        sizes, packet = self._sizes(target, reduce is not None)
        if target.tensor.base % 8 or any(s % 8 for n, s in zip(sizes[:-1], target.strides, strict=False) if n > 1):
            raise UnsupportedError(
                f"a result whose pieces of {self.axes[-1].size} elements do not start on 8 B",
                "a commit writes multiples of 8 B (four bf16)",
                "use head and rotary sizes that are multiples of 8",
            )
        ops = list(step.ops)
        vector = self._vector(ops, sizes, integer)
        if stream.tensor.dtype == Dtype.I32 and not integer:
            vector.insert(0, VectorOp(Alu.FXP_TO_FP, Op.CONVERT, Mode.UNARY))
        outer = self.rows
        valid = packet
        out_sizes, out_strides = sizes, list(target.strides)
        dtype = target.tensor.dtype
        if reduce is not None:
            op = {"add": Op.ADD, "max": Op.MAX, "min": Op.MIN}[reduce]
            count = math.prod(sizes[self.kept :]) // self.repeated
            if count > 1:
                vector.append(VectorOp(Alu.REDUCE, op, Mode.UNARY, count=count, inner=self.repeated))
        if reduce is not None or self.repeated > 1:
            values = self.kept if reduce is not None else len(sizes) - 1
            valid = 8 // dtype.bytes
            out_sizes, out_strides = [*sizes[:values], valid], [*out_strides[:values], dtype.bytes]
        if dtype == Dtype.I32 and not integer:
            vector.append(VectorOp(Alu.FP_TO_FXP, Op.CONVERT, Mode.UNARY))
        if dtype == Dtype.I8 and stream.tensor.dtype != Dtype.I8:
            vector += TO_I8
        if packet * dtype.bytes < 8:
            raise UnsupportedError(
                f"{self.axes[-1].size} neighbours of {dtype.name.lower()}",
                "a commit writes multiples of 8 B",
                "use sizes that are multiples of 8",
            )
        plain = not vector and second is None
        cast = Dtype.F32 if stream.tensor.dtype == Dtype.BF16 and not (plain and dtype == Dtype.BF16) else None
        fetch = em.fetch(
            stream.tensor.base,
            [(outer, stream.row_stride), *zip(sizes, stream.strides, strict=True)],
            stream.tensor.dtype,
            packet,
            cast,
            None if second is None else (second.tensor.base, [second.row_stride, *second.strides]),
        )
        commit = Commit(
            target.tensor.base, ((outer, target.row_stride), *zip(out_sizes, out_strides, strict=True)), dtype, valid
        )
        em.execute(
            fetch,
            stream.tensor.buffer,
            commit,
            target.tensor.buffer,
            second=second.tensor.buffer if second is not None else None,
            vector=vector,
            stash_input=step.stash_input,
        )

    def _widened(self, v: View) -> View:
        """A f32 copy of a bf16 operand (one fetch has one element type), rows and axes as the iteration has them."""
        out = self._temporary(Dtype.F32)
        sizes, packet = self._sizes(out, False)
        fetch = self.em.fetch(
            v.tensor.base,
            [(self.rows, v.row_stride), *zip(sizes, v.strides, strict=True)],
            v.tensor.dtype,
            packet,
            Dtype.F32,
        )
        commit = Commit(0, ((self.rows, out.row_stride), *zip(sizes, out.strides, strict=True)), Dtype.F32, packet)
        self.em.execute(fetch, v.tensor.buffer, commit, out.tensor.buffer)
        return out

    def _vector(self, ops: Sequence[ChainOp], sizes: list[int], integer: bool) -> list[VectorOp]:
        out: list[VectorOp] = []
        for op in ops:
            alu, code = op.alu, op.op
            if integer:
                table = {
                    Op.MUL: Alu.FXP_MUL,
                    Op.ADD: Alu.FXP_ADD,
                    Op.SUB: Alu.FXP_ADD,
                    Op.MAX: Alu.CLIP_MAX,
                    Op.MIN: Alu.CLIP_MIN,
                }
                if code not in table:
                    raise UnsupportedError(
                        f"integer {code.name.lower()}", "no integer ALU runs it", "compute it in f32"
                    )
                alu = table[code]
            operand = Operand()
            if op.arg.kind == "const":
                operand = Operand(Source.CONST, op.arg.value)
            elif op.arg.kind == "stash":
                operand = Operand(Source.STASH)
            elif op.arg.kind == "vrf":
                assert op.arg.ref is not None
                operand = self._load_vrf(self.values[op.arg.ref], sizes)
            out.append(VectorOp(alu, code, op.mode, operand, group=op.group))
        return out

    def _load_vrf(self, v: View, iteration: list[int]) -> Operand:
        em = self.em
        shape = self._vrf_shape(v)
        strides: list[int] = []
        extent = shape.element
        for n in reversed(shape.sizes):
            strides.append(extent)
            extent *= n
        strides.reverse()
        base = em.vrf_space(round_up(shape.bytes, 32))
        least = 8 // v.tensor.dtype.bytes
        filled = [(least, v.tensor.dtype.bytes)] if shape.element > 4 else []
        inner = next((n for n in reversed(shape.sizes) if n > 1), 1) * (least if filled else 1)
        packet = 8 if inner % 8 == 0 else (4 if inner % 4 == 0 else 2)
        cast = Dtype.F32 if v.tensor.dtype == Dtype.BF16 else None
        loops = [(shape.rows, v.row_stride), *zip(shape.sizes, v.strides, strict=True), *filled]
        em.load_vrf(em.fetch(v.tensor.base, loops, v.tensor.dtype, packet, cast), v.tensor.buffer, base)
        use = [(self.rows, extent if v.row_stride else 0)]
        use += [(n, s if present else 0) for n, s, present in zip(iteration, strides, v.strides, strict=True)]
        return Operand(Source.VRF, base=base, loops=operand_loops(use))
