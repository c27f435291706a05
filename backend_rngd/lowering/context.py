"""What all functions of one lowering share."""

from __future__ import annotations

from typing import Any

import numpy as np
from xdsl.dialects import func
from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import SSAValue

from backend_rngd.dialect import CallOp, RoutineOp
from backend_rngd.isa.descriptors import DM_SLICE_STRIDE, Dtype
from backend_rngd.lowering.emitter import Emitter, dm, hbm
from backend_rngd.lowering.program import Lowered, LoweringOptions, Placement
from backend_rngd.lowering.tensor import round_up
from backend_rngd.lowering.values import Form
from backend_rngd.machine import Machine


class Program:
    """State shared by all functions of a module: globals, the entry routine, results for the host."""

    def __init__(self, module: ModuleOp, machine: Machine, options: LoweringOptions) -> None:
        self.source = module
        self.machine = machine
        self.options = options
        self.out = Lowered(ModuleOp([]))
        self.functions = {op.sym_name.data: op for op in module.body.block.ops if isinstance(op, func.FuncOp)}
        self.main = self.routine("main")
        self.forms: dict[str, list[Form]] = {}

    # Routines ------------------------------------------------------------
    def routine(self, name: str) -> RoutineOp:
        """The routine `name`, added to the module if it is new."""
        for op in self.out.module.body.block.ops:
            if isinstance(op, RoutineOp) and op.sym_name.data == name:
                return op
        made = RoutineOp(name, [])
        self.out.module.body.block.add_op(made)
        return made

    def _prologue(self) -> RoutineOp:
        """The routine that runs before all others: `prepare` if the entry is made of calls, else the entry."""
        entry = self.functions.get("main") or next(iter(self.functions.values()))
        if not any(isinstance(op, func.CallOp) for op in entry.body.block.ops):
            return self.main
        prepare = self.routine("prepare")
        if "prepare" not in self.functions and not any(
            isinstance(op, CallOp) and op.callee.string_value() == "prepare" for op in self.main.block.ops
        ):
            call, block = CallOp("prepare", [], "prepare"), self.main.block
            if block.first_op is None:
                block.add_op(call)
            else:
                block.insert_op_before(call, block.first_op)
        return prepare

    # Globals ------------------------------------------------------------
    def weight_global(self, em: Emitter, name: str, dtype: Dtype, form: Form) -> SSAValue:
        """The HBM image of weight `name` in `form`; equal forms share one image."""
        forms = self.forms.setdefault(name, [])
        if form not in forms:
            forms.append(form)
        index = forms.index(form)
        image = f"weight.{name}" if index == 0 else f"weight.{name}#{index}"
        rows, columns = (round_up(n, m) for n, m in zip(form.reshape, form.pad, strict=True))
        nbytes = rows * columns * dtype.bytes
        self.out.placements.setdefault(image, Placement(image, name, *form, dtype.name.lower(), nbytes))
        return em.global_buffer(image, "hbm", nbytes, "weight")

    def iota(self, em: Emitter, keys: int) -> SSAValue:
        """DM global with 0, 1, 2, ... f32 in every slice, loaded before anything else."""
        count = round_up(keys, 64)
        name = f"iota.{count}"
        buffer = em.global_buffer(f"dm.{name}", "dm", count * 4, "scratch")
        if name not in self.out.constants:
            block = self._prologue().block
            rest = list(block.ops)
            for op in rest:
                op.detach()
            first = Emitter(self.out.module, block, self.machine, self.options.slices, "constants")
            source = self.constant_global(first, name, np.arange(count, dtype=np.float32))
            target = first.global_buffer(f"dm.{name}", "dm", count * 4, "scratch")
            loops = [(first.slices, 0, DM_SLICE_STRIDE)]
            first.dma(hbm(source), dm(target), loops, count * 4)
            for op in rest:
                block.add_op(op)
        return buffer

    def constant_global(self, em: Emitter, name: str, values: np.ndarray[Any, Any]) -> SSAValue:
        """An HBM global with literal bytes."""
        self.out.constants[name] = values
        return em.global_buffer(name, "hbm", round_up(values.nbytes, 64), "constant")
