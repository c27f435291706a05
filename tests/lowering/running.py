"""Lower a `tc` module, emit it, and run the stream on the functional simulator with every check on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from xdsl.dialects.builtin import ModuleOp

from backend_rngd.artifact import Placement as StoredPlacement
from backend_rngd.artifact import placed
from backend_rngd.artifact.shards import cut
from backend_rngd.dialect import GlobalOp
from backend_rngd.emit import Emitted, emit
from backend_rngd.isa.legality import check_stream
from backend_rngd.lowering import Lowered, LoweringOptions, Port, lower
from backend_rngd.machine import Machine, load_machine
from backend_rngd.place import place
from backend_rngd.schedule import schedule
from ir.placement import Mesh
from ir.text import parse_module
from passes.outline import outline
from runtime_sim.functional import Card, Unit
from runtime_sim.group import Launch
from runtime_sim.system import System

Array = NDArray[Any]
MACHINE = load_machine()
NUMPY = {
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "f32": np.dtype(np.float32),
    "i32": np.dtype(np.int32),
    "i8": np.dtype(np.int8),
    "f8e4m3": np.dtype(ml_dtypes.float8_e4m3fn),
}


def bf16(values: Array) -> Array:
    """Values rounded to bf16, as f32."""
    return values.astype(ml_dtypes.bfloat16).astype(np.float32)


def tensor_text(shape: tuple[int, ...], element: str) -> str:
    """`tensor<2x3xbf16>`."""
    return f"tensor<{'x'.join(map(str, shape))}x{element}>"


class Run:
    """A lowered module on a simulated unit."""

    def __init__(self, module: ModuleOp | str, **options: Any) -> None:
        self.module = parse_module(module) if isinstance(module, str) else module
        outline(self.module)
        self.module.verify()
        self.lowered: Lowered = lower(self.module, MACHINE, LoweringOptions(**options))
        self.lowered.module.verify()
        place(self.lowered.module, MACHINE)
        schedule(self.lowered.module)
        self.emitted: Emitted = emit(self.lowered.module, MACHINE)
        self.stream = self.emitted.streams[0]
        problems = check_stream(self.stream, MACHINE, None)
        assert not problems, "\n".join(map(str, problems[:10]))
        self.card = Card(MACHINE)
        self.unit = Unit(self.card, 64)

    def load(self, inputs: Mapping[str, Array], weights: Callable[[str], Array]) -> None:
        """Write weights, constants, inputs and caches (missing caches are zero)."""
        for p in self.lowered.placements.values():
            address = self.emitted.globals[p.name].address
            stored = StoredPlacement(
                name=p.name, address=address, bytes=p.bytes, weight=p.weight, permute=p.permute, reshape=p.reshape,
                pad=p.pad, dtype=p.dtype,
            )  # fmt: skip
            self.card.write(address, placed(np.asarray(weights(p.weight)).astype(NUMPY[p.dtype]), stored))
        for name, values in self.lowered.constants.items():
            self.card.write(self.emitted.globals[name].address, np.ascontiguousarray(values).view(np.uint8).ravel())
        for port in self.lowered.inputs:
            self._clear(port)
            self._write(port, inputs[port.name])
        for port in self.lowered.caches:
            self._clear(port)
            if port.name in inputs:
                self._write(port, inputs[port.name])

    def __call__(self, inputs: Mapping[str, Array], weights: Callable[[str], Array] | None = None) -> dict[str, Array]:
        """Outputs as f32. Without `weights`, rank-1 and rank-2 arguments of a single-op module come from `inputs`."""
        self.load(inputs, weights or (lambda name: inputs[name.removeprefix("arg.")]))
        self.unit.run(self.stream)
        return {p.name: self.read(p) for p in self.lowered.outputs}

    def read(self, port: Port) -> Array:
        """A program output or cache as f32."""
        dtype = NUMPY[port.dtype]
        span = sum((n - 1) * s for n, s in zip(port.shape, port.strides, strict=True)) + dtype.itemsize
        raw = np.array(self.card.read(self.emitted.globals[port.buffer].address + port.offset, span))
        view = np.lib.stride_tricks.as_strided(raw, (*port.shape, dtype.itemsize), (*port.strides, 1))
        return np.ascontiguousarray(view).view(dtype)[..., 0].astype(np.float32)

    def _clear(self, port: Port) -> None:
        place_ = self.emitted.globals[port.buffer]
        self.card.write(place_.address, np.zeros(place_.nbytes, np.uint8))

    def _write(self, port: Port, values: Array) -> None:
        place_ = self.emitted.globals[port.buffer]
        image = np.zeros(place_.nbytes, np.uint8)
        data = np.ascontiguousarray(np.asarray(values).astype(NUMPY[port.dtype]))
        view = np.lib.stride_tricks.as_strided(image, (*port.shape, data.itemsize), (*port.strides, 1))
        view[...] = data.view(np.uint8).reshape(*data.shape, data.itemsize)
        self.card.write(place_.address, image)

    def globals_of(self, kind: str) -> list[str]:
        """Names of the module's globals of a kind."""
        ops = self.lowered.module.body.block.ops
        return [op.sym_name.data for op in ops if isinstance(op, GlobalOp) and op.kind.data == kind]


def relative(got: Array, want: Array) -> float:
    """Root mean square error relative to the root mean square of `want`."""
    return float(np.sqrt(np.mean((got - want) ** 2)) / max(np.sqrt(np.mean(want**2)), 1e-12))


class GroupRun(Run):
    """A partitioned module on the units of a simulated group; inputs, weights and outputs are whole."""

    def __init__(self, module: ModuleOp | str, machine: Machine = MACHINE, **options: Any) -> None:
        self.module = parse_module(module) if isinstance(module, str) else module
        outline(self.module)
        self.module.verify()
        self.lowered = lower(self.module, machine, LoweringOptions(**options))
        self.lowered.module.verify()
        self.mesh = str(Mesh.parse(getattr(self.module.attributes.get("tc.mesh"), "data", "")))
        place(self.lowered.module, machine)
        schedule(self.lowered.module)
        self.emitted = emit(self.lowered.module, machine)
        self.stream = self.emitted.streams[0]
        problems = self.emitted.check(machine)
        assert not problems, "\n".join(map(str, problems[:10]))
        units = Mesh.parse(self.mesh).size
        self.system = System(machine, tensor=units)
        self.card = self.system.units[0].window

    def load(self, inputs: Mapping[str, Array], weights: Callable[[str], Array]) -> None:
        """Write every unit's part."""
        for u, unit in enumerate(self.system.units):
            window = unit.window
            for p in self.lowered.placements.values():
                address = self.emitted.globals[p.name].address
                stored = StoredPlacement(
                    name=p.name, address=address, bytes=p.bytes, weight=p.weight, permute=p.permute, reshape=p.reshape,
                    pad=p.pad, dtype=p.dtype, shard=p.shard,
                )  # fmt: skip
                window.write(
                    address, placed(np.asarray(weights(p.weight)).astype(NUMPY[p.dtype]), stored, self.mesh, u)
                )
            for name, values in self.lowered.constants.items():
                window.write(self.emitted.globals[name].address, np.ascontiguousarray(values).view(np.uint8).ravel())
            for name, values in self.lowered.unit_constants.items():
                window.write(self.emitted.globals[name].address, np.ascontiguousarray(values[u]).view(np.uint8).ravel())
            self.card = window
            for port in self.lowered.inputs:
                self._clear(port)
                self._write(port, inputs[port.name])
            for port in self.lowered.caches:
                self._clear(port)
                if port.name in inputs:
                    self._write(port, cut(inputs[port.name], port.shard, self.mesh, u))
        self.card = self.system.units[0].window

    def __call__(self, inputs: Mapping[str, Array], weights: Callable[[str], Array] | None = None) -> dict[str, Array]:
        """Outputs of unit 0 as f32; all units must hold the same bits."""
        self.load(inputs, weights or (lambda name: inputs[name.removeprefix("arg.")]))
        work = {
            unit: [Launch(self.stream, {r: values[u] for r, values in self.emitted.launch.items()})]
            for u, unit in enumerate(self.system.units)
        }
        self.system.run(work)
        found: list[dict[str, Array]] = []
        for unit in self.system.units:
            self.card = unit.window
            found.append({p.name: self.read(p) for p in self.lowered.outputs})
        for other in found[1:]:
            for name, values in other.items():
                np.testing.assert_array_equal(values, found[0][name])
        return found[0]
