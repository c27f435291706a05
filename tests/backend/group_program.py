"""A small Llama on several units, ready to run on the functional simulator, whole or changed."""

from __future__ import annotations

import dataclasses
from typing import Any

import ml_dtypes
import numpy as np
from mutants import DATA, MACHINE
from xdsl.context import Context

from backend_rngd.artifact import Placement, placed
from backend_rngd.artifact.shards import cut
from backend_rngd.emit import Emitted, emit
from backend_rngd.isa.descriptors import Dma, Instruction, Notify, Stream, Wait
from backend_rngd.isa.legality import errors
from backend_rngd.lowering import Lowered, LoweringOptions, lower
from backend_rngd.place import place
from backend_rngd.schedule import schedule
from ir.dialects import tc
from ir.placement import Mesh
from ir.text import parse_module
from ir.types import shape_of
from passes.outline import outline
from passes.partition import Partition
from passes.plan_tp import PlanTp
from runtime_sim.errors import SimulationError
from runtime_sim.group import Launch
from runtime_sim.system import System

Array = np.ndarray[Any, Any]


class GroupProgram:
    """A `tc` module partitioned for `units` units, with random weights, caches and tokens."""

    def __init__(self, name: str, units: int, positions: list[int]) -> None:
        module = parse_module((DATA / name).read_text("utf-8"))
        found = [op for op in module.walk() if isinstance(op, tc.WeightOp)]
        self.shapes = {op.fqn.data: tuple(shape_of(op.result.type)) for op in found}
        if units > 1:
            PlanTp(size=units).apply(Context(), module)
            Partition().apply(Context(), module)
        outline(module)
        self.mesh = Mesh.parse(getattr(module.attributes.get("tc.mesh"), "data", ""))
        self.units = units
        self.lowered: Lowered = lower(module, MACHINE, LoweringOptions(cache_capacity=32, cache_batch=2))
        self.top = place(self.lowered.module, MACHINE)
        schedule(self.lowered.module)
        self.emitted: Emitted = emit(self.lowered.module, MACHINE)
        self.stream = self.emitted.streams[0]
        self.rows = {register: row for row, register in self.emitted.row_registers.items()}  # second row of the caches
        self.memory = [self._memory(unit, positions) for unit in range(units)]
        places = self.emitted.globals
        self.checked = [
            (places[p.buffer].address, places[p.buffer].nbytes) for p in (*self.lowered.outputs, *self.lowered.caches)
        ]
        self.expected = self.run(self.stream)

    def _memory(self, unit: int, positions: list[int]) -> dict[int, Array]:
        rng = np.random.default_rng(7)
        out: dict[int, Array] = {}
        places = self.emitted.globals
        mesh = str(self.mesh)
        for name, p in self.lowered.placements.items():
            whole = rng.normal(0, 0.3, self.shapes[p.weight]).astype(np.float32)
            whole = np.abs(whole) + 0.05 if len(whole.shape) == 1 else whole
            dtype = np.dtype(np.float32 if p.dtype == "f32" else ml_dtypes.bfloat16)
            stored = Placement(
                name=name, address=places[name].address, bytes=p.bytes, weight=p.weight, permute=p.permute,
                reshape=p.reshape, pad=p.pad, dtype=p.dtype, shard=p.shard,
            )  # fmt: skip
            out[places[name].address] = placed(whole.astype(dtype), stored, mesh, unit)
        for port in self.lowered.caches:
            values = rng.normal(0, 1, (self.units, places[port.buffer].nbytes // 2))
            out[places[port.buffer].address] = values[unit].astype(ml_dtypes.bfloat16)
        for name, constant in self.lowered.constants.items():
            out[places[name].address] = constant
        for name, constant in self.lowered.unit_constants.items():
            out[places[name].address] = constant[unit]
        tokens = rng.integers(0, 1024, len(positions)).astype(np.int32)
        contents = {"input_ids": tokens, "position_ids": np.array(positions, np.int32)}
        contents["last"] = np.array([len(positions) - 1], np.int32)
        for port in self.lowered.inputs:
            image = np.zeros(places[port.buffer].nbytes, np.uint8)
            mine = cut(contents[port.name], port.shard, mesh, unit) if port.shard else contents[port.name]
            image[: len(mine) * 8].view(np.int32)[::2] = mine
            out[places[port.buffer].address] = image
        return out

    def run(self, stream: Stream) -> list[bytes]:
        """Outputs and caches of all units after running a stream; raises SimulationError."""
        system = System(MACHINE, tensor=self.units, hbm_bytes=self.top["hbm"] + 4096)
        for unit, contents in zip(system.units, self.memory, strict=True):
            for address, values in contents.items():
                unit.window.write(address, np.ascontiguousarray(values).view(np.uint8).ravel())
        system.run(
            {
                unit: [Launch(stream, {r: values[u] for r, values in self.emitted.launch.items()} | self.rows)]
                for u, unit in enumerate(system.units)
            }
        )
        return [unit.window.read(a, n).tobytes() for unit in system.units for a, n in self.checked]

    def verdict(self, stream: Stream) -> str:
        """How a changed stream is caught: the rule, `simulator`, `result`, or an empty string if nothing differs."""
        found = errors(dataclasses.replace(self.emitted, streams=(stream,)).check(MACHINE))
        if found:
            return found[0].rule
        try:
            return "result" if self.run(stream) != self.expected else ""
        except SimulationError:
            return "simulator"


def about_units(instruction: Instruction) -> bool:
    """Whether an instruction is a notify, a wait or a transfer with a peer side."""
    what = instruction.what
    peers = isinstance(what, Dma) and (what.source.space.is_peer or what.destination.space.is_peer)
    return peers or isinstance(what, (Notify, Wait))
