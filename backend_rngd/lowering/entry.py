"""The entry function: program inputs and outputs, weights by name, calls of block functions."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import numpy as np
from xdsl.dialects import func
from xdsl.dialects.builtin import ArrayAttr, StringAttr
from xdsl.ir import SSAValue, Use

from backend_rngd.artifact.stages import CUT, PREPARE, role
from backend_rngd.dialect import CallOp
from backend_rngd.isa.descriptors import Dtype, Space
from backend_rngd.lowering.block import BlockLowering
from backend_rngd.lowering.function import FunctionLowering
from backend_rngd.lowering.function_rows import ROW_WISE
from backend_rngd.lowering.handover import add_handover
from backend_rngd.lowering.move import load_rows
from backend_rngd.lowering.pieces import Pieces
from backend_rngd.lowering.program import INPUT_PITCH, Port
from backend_rngd.lowering.slots import Slots
from backend_rngd.lowering.tensor import Dim, RowSpace, Tensor, feature_dims, round_up
from backend_rngd.lowering.values import NUMPY, Form, Stored, Value, Weight, dtype_of, port_strides
from ir.dialects import tc
from ir.errors import UnsupportedError
from ir.types import axis_names, shape_of


class EntryLowering(FunctionLowering):
    """The entry function: inputs, weights by name, calls, outputs."""

    def run(self) -> None:
        """Lower the function."""
        f = self.function
        names = _names(f, "arg_names", "arg", len(f.body.block.args))
        self.blocks: dict[str, BlockLowering] = {}
        returned = self._returned(f)
        shards = _names(f, "arg_shards", "", len(names)) if "arg_shards" in f.attributes else [""] * len(names)
        for name, arg, shard in zip(names, f.body.block.args, shards, strict=True):
            self._argument(name, arg, shard)
        outputs = {v: n for v, n in returned if not n.startswith("cache.")}
        self.slots = Slots(f, outputs, self._inputs(f), self._caches(f))
        if not self.slots.calls:
            self.outputs = {v: n for v, n in returned}
        values = self.walk()
        self.em.location = "outputs"
        for value, (_, name) in zip(values, returned, strict=True):
            self._output(value, name)
        self.group.finish()
        if self.slots.calls:
            add_handover(self.parent, self.slots)

    def _inputs(self, f: func.FuncOp) -> dict[SSAValue, str]:
        """Arguments that blocks read in place."""
        ports = {port.buffer for port in self.parent.out.inputs}
        named = {arg: self._global_of(self.env[arg]) for arg in f.body.block.args}
        return {arg: name for arg, name in named.items() if name in ports}

    def _caches(self, f: func.FuncOp) -> list[SSAValue]:
        """Arguments and results of blocks that are caches."""
        found: list[SSAValue] = [arg for arg in f.body.block.args if isinstance(self.env[arg], Stored)]
        for op in f.body.block.ops:
            if isinstance(op, func.CallOp):
                returned = self.parent.functions[op.callee.string_value()].body.block.last_op
                assert isinstance(returned, func.ReturnOp)
                pairs = zip(returned.operands, op.results, strict=True)
                found += [result for value, result in pairs if isinstance(value.owner, tc.KvUpdateOp)]
        return found

    def _returned(self, f: func.FuncOp) -> list[tuple[SSAValue, str]]:
        op = f.body.block.last_op
        assert isinstance(op, func.ReturnOp)
        return list(zip(op.operands, _names(f, "result_names", "result", len(op.operands)), strict=True))

    def _argument(self, name: str, arg: SSAValue, shard: str) -> None:
        shape = tuple(shape_of(arg))
        dtype = dtype_of(arg)
        options = self.parent.options
        if name.startswith("cache."):
            _, k, t, d = shape
            if t > options.cache_capacity:
                raise UnsupportedError(
                    f"a bucket of {t} keys", f"the cache holds {options.cache_capacity}", "raise the capacity"
                )
            nbytes = options.cache_batch * k * options.cache_capacity * d * 2
            self.env[arg] = Stored(
                self.em.global_buffer(name, "hbm", nbytes, "cache", nbytes // options.cache_batch), shape
            )
            head = options.cache_capacity * d * 2
            self.parent.out.caches.append(Port(name, name, "bf16", shape, (k * head, head, d * 2, 2), 0, shard))
            return
        if dtype == Dtype.I32 and len(shape) in (1, 2):
            rows = RowSpace.make(shape[0], shape[1] if len(shape) == 2 else 1, options.slices)
            dims = [Dim("batch", shape[0])] + ([Dim("length", shape[1])] if len(shape) == 2 else [])
            buffer = self.em.global_buffer(name, "hbm", rows.physical * INPUT_PITCH, "input")
            self.env[arg] = Tensor(buffer, Space.HBM, dtype, tuple(dims), rows, 0, INPUT_PITCH)
            strides = (rows.batch_stride * INPUT_PITCH, INPUT_PITCH)[: len(shape)]
            self.parent.out.inputs.append(Port(name, name, "i32", shape, strides))
            return
        tokens = _token_dims(arg)
        if tokens:
            rows = RowSpace.make(shape[0], shape[1] if tokens == 2 else 1, options.slices)
            strides, pitch = feature_dims(list(shape[tokens:]), dtype.bytes)
            dims = [Dim("batch", shape[0]), Dim("length", rows.length)][:tokens]
            sizes = zip(shape[tokens:], strides, strict=True)
            dims += [Dim("feature", n, s) if n > 1 else Dim("one", 1) for n, s in sizes]
            buffer = self.em.global_buffer(name, "hbm", rows.physical * pitch, "input")
            held = Tensor(buffer, Space.HBM, dtype, tuple(dims), rows, 0, pitch)
            kept = rows.local * pitch > self.spill or (not rows.replicated and _row_wise(arg))
            self.env[arg] = held if kept else load_rows(self.em, held, rows.local)
            self.parent.out.inputs.append(Port(name, name, dtype.name.lower(), shape, port_strides(held)))
            return
        self._weight(arg, f"arg.{name}")

    def op_tc_weight(self, op: tc.WeightOp) -> None:
        """A parameter by name; it gets an address when its use says how it is laid out."""
        self._weight(op.result, op.fqn.data, op.shard.data if op.shard is not None else "")

    def _weight(self, value: SSAValue, name: str, shard: str = "") -> None:
        dtype = dtype_of(value)

        def bind(form: Form) -> SSAValue:
            return self.parent.weight_global(self.em, name, dtype, form, shard)

        self.env[value] = Weight.of(tuple(shape_of(value)), dtype, bind)

    def op_tc_constant(self, op: tc.ConstantOp) -> None:
        """A literal; uniform ones become immediates of the expressions that use them."""
        values = np.asarray(op.array())
        dtype = dtype_of(op.result)
        name = f"constant.{self.index}"

        def bind(form: Form) -> SSAValue:
            rows, columns = (round_up(n, m) for n, m in zip(form.reshape, form.pad, strict=True))
            image = np.zeros((rows, columns), NUMPY[dtype])
            image[: form.reshape[0], : form.reshape[1]] = values.transpose(form.permute).reshape(form.reshape)
            return self.parent.constant_global(self.em, name, image)

        self.env[op.result] = Weight.of(tuple(values.shape), dtype, bind, values)

    # Calls ------------------------------------------------------------
    def op_func_call(self, op: func.CallOp) -> None:
        """Call a block's routine with HBM addresses; activations lie where the caller and the block expect them."""
        name = op.callee.string_value()
        operands = [self.env[o] for o in op.operands]
        if name not in self.blocks:
            self.blocks[name] = BlockLowering(self.parent, self.parent.functions[name], operands, self.slots, op)
        block = self.blocks[name]
        arguments: list[SSAValue] = []
        for i, form in block.parameters:
            v = operands[i]
            assert not isinstance(v, (Tensor, Pieces))
            arguments.append(v.buffer if isinstance(v, Stored) else _bound(v, form))
        self.em.add(CallOp(name, arguments, self.em.location))
        for i, result in enumerate(op.results):
            r = block.results[i]
            if isinstance(r, int):
                source = operands[r]
                assert isinstance(source, Stored)
                self.env[result] = Stored(source.buffer, tuple(shape_of(result)))
            else:
                if isinstance(r, Pieces):
                    self.env[result] = replace(r, held=self._seen_here(result, r.held))
                else:
                    self.env[result] = self._seen_here(result, r)
                following = op.next_op
                if role(name) == CUT and isinstance(following, func.CallOp):
                    routine = following.callee.string_value()
                    if role(routine) == PREPARE:
                        self.parent.prepared[self.slots.name(result)] = routine

    def _seen_here(self, result: SSAValue, t: Tensor) -> Tensor:
        """A call's result as a value of this routine."""
        name = self.slots.outputs.get(result) or self.slots.name(result)
        buffer = self.em.global_buffer(name, t.space.name.lower(), self.em.declared_bytes(name), "activation")
        return replace(t, buffer=buffer)

    def _global_of(self, v: Value) -> str | None:
        if not isinstance(v, Tensor):
            return None
        return next((n for n, b in self.em.known_globals().items() if b is v.buffer), None)

    # Outputs ------------------------------------------------------------
    def _output(self, value: SSAValue, name: str) -> None:
        v = self.env[value]
        if isinstance(v, Stored):
            return
        t = self.tensor(value)
        if not self.slots.calls:
            t = self.output(t, name)
        self.parent.out.outputs.append(Port(name, name, t.dtype.name.lower(), t.shape, port_strides(t), t.base))


def _token_dims(arg: SSAValue) -> int:
    """How many leading dimensions of an argument are tokens: by its axis names, else two of three or more.

    0 for parameters: tensors of lower rank, and those that are only multiplied with.
    """
    names = axis_names(arg)
    if names[0] == "B":
        return 2 if names[1:2] == ["S"] else 1

    def multiplies(use: Use) -> bool:
        op = use.operation
        if not isinstance(op, tc.ContractOp) or use.index != 1:
            return False
        rule = op.rule()
        return not set(rule.inputs[0]) & set(rule.inputs[1]) & set(rule.output)  # a batch axis: two activations

    parameter = all(multiplies(u) for u in arg.uses)
    return 0 if parameter or len(names) < 3 else 2


def _row_wise(value: SSAValue) -> bool:
    """Whether only element-wise operations read a value, so that its rows may come from HBM when they are needed."""
    return all(
        isinstance(u.operation, ROW_WISE) and (not isinstance(u.operation, tc.SliceOp) or _row_wise(u.operation.result))
        for u in value.uses
    )


def _names(f: func.FuncOp, attribute: str, prefix: str, count: int) -> list[str]:
    """Names of arguments or results: the function's attribute, or numbered."""
    held = f.attributes.get(attribute)
    if isinstance(held, ArrayAttr):
        return [a.data for a in cast(ArrayAttr[StringAttr], held)]
    return [f"{prefix}{i}" for i in range(count)]


def _bound(v: Value, form: Form | None) -> SSAValue:
    assert isinstance(v, Weight)
    assert form is not None
    return v.bind(form)
