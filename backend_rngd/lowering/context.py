"""What all functions of one lowering share."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from xdsl.dialects import func
from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import SSAValue

from backend_rngd.dialect import CallOp, LaunchOp, RoutineOp
from backend_rngd.isa.descriptors import DM_SLICE_STRIDE, UNIT_STRIDE, Dtype, Space
from backend_rngd.lowering.emitter import Emitter, dm, hbm
from backend_rngd.lowering.indexed import offset_pitch, offsets
from backend_rngd.lowering.move import load_rows
from backend_rngd.lowering.program import Lowered, LoweringOptions, Placement
from backend_rngd.lowering.search import Search
from backend_rngd.lowering.tensor import Tensor, round_up
from backend_rngd.lowering.values import Form
from backend_rngd.lowering.vector import VectorLowering
from backend_rngd.machine import Machine
from ir import expr as ex
from ir.dialects import tc
from ir.errors import UnsupportedError
from ir.placement import Mesh
from passes.outline import PREPARE

LIMIT_BYTES = 8  # between the last visible keys of two tokens: a commit writes at least 8 B


class Program:
    """State shared by all functions of a module: globals, the entry routine, results for the host."""

    def __init__(self, module: ModuleOp, machine: Machine, options: LoweringOptions) -> None:
        self.source = module
        self.machine = machine
        self.options = options
        self.out = Lowered(ModuleOp([]))
        self.functions = {op.sym_name.data: op for op in module.body.block.ops if isinstance(op, func.FuncOp)}
        self.mesh = tc.mesh_of(module) or Mesh(())
        self.units = self.mesh.size
        self.search = Search(machine, options.slices, self.units, options.search)
        self._semaphores = 0
        self._offsets: set[str] = set()
        self._iotas: set[str] = set()
        self._subroutines: dict[Hashable, str] = {}
        self._launch: dict[tuple[int, ...], int] = {}
        self.prepared: dict[str, str] = {}
        """Buffers of a chunk's part of the program's inputs, with the routine that prepares for the chunk's layers."""
        self.own_unit = self.launch_register(tuple(u * UNIT_STRIDE for u in range(self.units)))
        self.main = self.routine("main")
        self.forms: dict[str, list[tuple[Form, str]]] = {}

    # Routines ------------------------------------------------------------
    def called_often(self, name: str) -> bool:
        """Whether a function is called more than once."""
        calls = (op for f in self.functions.values() for op in f.body.block.ops if isinstance(op, func.CallOp))
        return sum(op.callee.string_value() == name for op in calls) > 1

    def routine(self, name: str) -> RoutineOp:
        """The routine `name`, added to the module if it is new."""
        for op in self.out.module.body.block.ops:
            if isinstance(op, RoutineOp) and op.sym_name.data == name:
                return op
        made = RoutineOp(name, [])
        self.out.module.body.block.add_op(made)
        return made

    def subroutine(self, key: Hashable, like: Sequence[SSAValue], location: str) -> tuple[str, Emitter, bool]:
        """The routine of that key, which takes HBM buffers like these: name, writer, and whether it is still empty."""
        new = key not in self._subroutines
        name = self._subroutines.setdefault(key, f"tiles_{len(self._subroutines)}")
        routine = self.routine(name)
        if new:
            for i, value in enumerate(like):
                routine.block.insert_arg(value.type, i)
        em = Emitter(self.out.module, routine.block, self.machine, self.options.slices, location, probes=False)
        return name, em, new

    def _prologue(self) -> RoutineOp:
        """The routine that runs before all others: `prepare` if the entry is made of calls, else the entry."""
        entry = self.functions.get("main") or next(iter(self.functions.values()))
        if not any(isinstance(op, func.CallOp) for op in entry.body.block.ops):
            return self.main
        prepare = self.routine(PREPARE)
        if PREPARE not in self.functions and not any(
            isinstance(op, CallOp) and op.callee.string_value() == PREPARE for op in self.main.block.ops
        ):
            call, block = CallOp(PREPARE, [], PREPARE), self.main.block
            if block.first_op is None:
                block.add_op(call)
            else:
                block.insert_op_before(call, block.first_op)
        return prepare

    # Units ------------------------------------------------------------
    def launch_register(self, values: tuple[int, ...]) -> int:
        """The register that holds these values, one a unit of the group; register 0 if all are 0."""
        if not any(values):
            return 0
        if values not in self._launch:
            number = self.machine.registers - 1 - len(self._launch)
            self._launch[values] = number
            self.out.module.body.block.add_op(LaunchOp(number, values))
        return self._launch[values]

    def semaphore(self) -> int:
        """A semaphore that no other phase uses."""
        self._semaphores += 1
        if self._semaphores > self.machine.semaphores:
            raise UnsupportedError(
                f"a program with {self._semaphores} exchanges between units",
                f"a unit has {self.machine.semaphores} semaphores",
                "outline repeated layers, so that they share them",
            )
        return self._semaphores - 1

    def unit_constant(self, em: Emitter, name: str, values: np.ndarray[Any, Any]) -> SSAValue:
        """An HBM global with literal bytes that differ between units: `values` has one row a unit."""
        self.out.unit_constants[name] = values
        return em.global_buffer(name, "hbm", round_up(values[0].nbytes, 64), "constant")

    # Globals ------------------------------------------------------------
    def weight_global(self, em: Emitter, name: str, dtype: Dtype, form: Form, shard: str = "") -> SSAValue:
        """The HBM image of (the unit's part of) weight `name` in `form`; equal forms share one image."""
        forms = self.forms.setdefault(name, [])
        if (form, shard) not in forms:
            forms.append((form, shard))
        index = forms.index((form, shard))
        image = f"weight.{name}" if index == 0 else f"weight.{name}#{index}"
        rows, columns = (round_up(n, m) for n, m in zip(form.reshape, form.pad, strict=True))
        nbytes = rows * columns * dtype.bytes
        self.out.placements.setdefault(image, Placement(image, name, *form, dtype.name.lower(), nbytes, shard))
        return em.global_buffer(image, "hbm", nbytes, "weight")

    def iota(self, em: Emitter, count: int, parts: int = 1, step: int = 0) -> SSAValue:
        """DM global with `count` consecutive positions as f32, loaded before anything else. A slice of part i (of
        `parts`, neighbours hold neighbouring ones) has those from i * step on."""
        held = round_up(count, 8)
        name, target = f"iota.{(parts - 1) * step + held}", f"dm.iota.{held}.{parts}.{step}"
        buffer = em.global_buffer(target, "dm", held * 4, "scratch")
        if target not in self._iotas:
            self._iotas.add(target)
            block = self._prologue().block
            rest = list(block.ops)
            for op in rest:
                op.detach()
            first = Emitter(self.out.module, block, self.machine, self.options.slices, "constants")
            source = self.constant_global(first, name, np.arange((parts - 1) * step + held, dtype=np.float32))
            into = first.global_buffer(target, "dm", held * 4, "scratch")
            loops = [(first.slices // parts, 0, parts * DM_SLICE_STRIDE), (parts, step * 4, DM_SLICE_STRIDE)]
            first.dma(hbm(source), dm(into), loops, held * 4)
            for op in rest:
                block.add_op(op)
        return buffer

    def _before_layers(self, em: Emitter, index: Tensor) -> tuple[str, Emitter, Tensor] | None:
        """Of a program input, or a chunk's part of one: its name, a writer before the first of all layers, and the
        value seen from there; None if `index` is neither."""
        name = next((n for n, b in em.known_globals().items() if b is index.buffer), None)
        if name is None or index.rows is None:
            return None
        known = name in {port.buffer for port in self.out.inputs}
        if not known and name not in self.prepared:
            return None
        routine = self._prologue() if known else self.routine(self.prepared[name])
        first = Emitter(self.out.module, routine.block, self.machine, self.options.slices, "offsets")
        space, kind = ("hbm", "input") if known else ("dm", "activation")
        return name, first, replace(index, buffer=first.global_buffer(name, space, first.declared_bytes(name), kind))

    def input_offsets(self, em: Emitter, index: Tensor, scale: int) -> SSAValue | None:
        """HBM global with a program input (cache slots), or a chunk's part of one, times `scale`, computed once for all
        layers before the first of them; None if `index` is neither."""
        found = self._before_layers(em, index)
        if found is None or index.rows is None:
            return None
        name, first, source = found
        target = f"offsets.{name}.{scale}"
        nbytes = index.rows.physical * offset_pitch(index.rows, self.machine)
        if target not in self._offsets:
            self._offsets.add(target)
            image = first.global_buffer(target, "hbm", nbytes, "activation")
            offsets(first, VectorLowering(first, self.options.spill_bytes), source, scale, image)
        return em.global_buffer(target, "hbm", nbytes, "activation")

    def input_limits(self, em: Emitter, index: Tensor) -> Tensor | None:
        """f32 in DM of a program input (positions), or a chunk's part of one, as `input_offsets`."""
        found = self._before_layers(em, index)
        rows = index.rows
        if found is None or rows is None or any(d.kind == "feature" for d in index.dims):
            return None
        name, first, source = found
        target = f"dm.limits.{name}"
        held = replace(index, space=Space.DM, dtype=Dtype.F32, base=0, pitch=LIMIT_BYTES)
        nbytes = rows.local * LIMIT_BYTES
        if target not in self._offsets:
            self._offsets.add(target)
            here = load_rows(first, source, rows.local) if source.space == Space.HBM else source
            into = replace(held, buffer=first.global_buffer(target, "dm", nbytes, "scratch"))
            names = [f"d{i}" for i in range(len(index.dims))]
            VectorLowering(first, self.options.spill_bytes).map(
                ex.Input(0), [here], [names], names, Dtype.F32, target=into
            )
        return replace(held, buffer=em.global_buffer(target, "dm", nbytes, "scratch"))

    def constant_global(self, em: Emitter, name: str, values: np.ndarray[Any, Any]) -> SSAValue:
        """An HBM global with literal bytes."""
        self.out.constants[name] = values
        return em.global_buffer(name, "hbm", round_up(values.nbytes, 64), "constant")
