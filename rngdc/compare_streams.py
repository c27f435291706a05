"""`tc` after the passes against the streams, operation by operation and unit by unit.

Every operation is judged on its own: the reference continues with the values that the streams computed, so that
rounding differences do not pile up and the operation that is named is the one at fault. With several units of a layer
the reference runs the module for all of them in lock step (`ir.spmd`), and each unit's values are judged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from backend_rngd.artifact import Bucket
from ir.compare import Disagreement, Metrics, metrics, show_location
from ir.dialects import tc
from ir.interpreter import run
from ir.spmd import join_results, run_spmd
from rngdc.probes import Key, ProbeReader, read_probes
from runtime_sim.runtime import Device

if TYPE_CHECKING:
    from xdsl.dialects.builtin import ModuleOp
    from xdsl.ir import Operation

Array = NDArray[Any]
Inputs = dict[str, Array]
Weights = Callable[[str], Array]
PerUnit = list[Array]


@dataclass
class StreamComparison:
    """`tc` after the passes against the streams: metrics of each result, and the first operation at fault."""

    results: dict[str, Metrics]
    first: Disagreement | None
    compared: int
    units: int = 1
    accumulated: dict[str, Metrics] = field(default_factory=dict[str, Metrics])
    """The distance from a reference run of its own: rounding of the whole model, for information."""

    @property
    def agrees(self) -> bool:
        """Whether no operation is at fault and every result is close."""
        return self.first is None and all(m.close for m in self.results.values())

    def to_json(self) -> dict[str, Any]:
        """A JSON-able form."""
        return {
            "agrees": self.agrees,
            "results": {name: asdict(m) for name, m in self.results.items()},
            "first_disagreement": None if self.first is None else asdict(self.first),
            "compared": self.compared,
            "units": self.units,
            "accumulated": {name: asdict(m) for name, m in self.accumulated.items()},
        }


def compare_streams(
    device: Device, bucket: Bucket, module: ModuleOp, inputs: Inputs, weights: Weights
) -> StreamComparison:
    """Run a program with probes and judge every probed value of every unit, the outputs and the caches."""
    artifact = device.artifact
    caches = {c.name: c for c in artifact.manifest.caches if c.name in inputs}
    device.clear_caches()
    for name, place in caches.items():
        device.write_cache(place, inputs[name])
    units = device.system.replica(0)
    streams = [device.residence.stream(bucket, stage) for stage in range(device.stages)]
    probes = read_probes(artifact, bucket)
    readers = {unit: ProbeReader(probes, streams, unit, unit.place.stage) for unit in units}
    outputs = device.run(bucket, inputs, observers=readers)
    for name, place in caches.items():
        outputs[name] = device.read_cache(place, bucket.batch, bucket.attention_size)
    values: list[dict[Key, Array]] = [{} for _ in range(artifact.manifest.parallel.units)]
    for unit, reader in readers.items():
        values[unit.place.rank] |= reader.values
    judge = _Judge(module, values)
    plain = _reference(module, inputs, weights)
    exact = _reference(module, inputs, weights, judge)
    found = {name: value.reshape(exact[name].shape) for name, value in outputs.items() if name in exact}
    # Probed operations replace their values, so what is left of the difference is the last operation's own.
    results = {name: metrics(value, exact[name]) for name, value in found.items()}
    whole = {name: metrics(value, plain[name]) for name, value in found.items()}
    return StreamComparison(results, judge.first, judge.compared, len(values), whole)


def _reference(module: ModuleOp, inputs: Inputs, weights: Weights, judge: _Judge | None = None) -> dict[str, Array]:
    """Whole results of the module, of all its units together if it was partitioned."""
    if tc.mesh_of(module) is None:
        return run(module, inputs, weights, observe=judge.one if judge is not None else None)
    return join_results(module, run_spmd(module, inputs, weights, observe=judge))


class _Judge:
    """Observer of a reference run: compares each probed value, then continues with the value of the streams."""

    def __init__(self, module: ModuleOp, values: list[dict[Key, Array]]) -> None:
        """`values`: those of the streams, for each unit of a layer."""
        self.values = values
        self.first: Disagreement | None = None
        self.compared = 0
        self._names: dict[Operation, str] = {}
        for function in module.ops:
            name = getattr(function, "sym_name", None)
            if name is not None:
                for index, op in enumerate(function.regions[0].block.ops):
                    self._names[op] = f"{name.data}#{index}"

    def one(self, op: Operation, results: list[Array], path: tuple[str, ...]) -> None:
        """For a run of a module for one unit."""
        for i, expected in enumerate(results):
            actual = self._judge(op, i, 0, expected, path)
            if actual is not None and expected.flags.writeable:
                expected[...] = actual

    def __call__(self, op: Operation, results: list[PerUnit], path: tuple[str, ...]) -> None:
        """For a run of all units in lock step."""
        for i, parts in enumerate(results):
            found = [self._judge(op, i, unit, expected, path) for unit, expected in enumerate(parts)]
            new = [e if a is None else a for a, e in zip(found, parts, strict=True)]
            # Equal values stay one object: what follows is then computed once.
            same = all(part is parts[0] for part in parts) and all(np.array_equal(n, new[0]) for n in new)
            parts[:] = [new[0]] * len(new) if same else new

    def _judge(self, op: Operation, index: int, unit: int, expected: Array, path: tuple[str, ...]) -> Array | None:
        """The streams' value if it was probed, judged."""
        actual = self.values[unit].get((path, f"{self._names[op]}.{index}"))
        if actual is None:
            return None
        actual = actual.reshape(expected.shape).astype(expected.dtype, copy=False)
        self.compared += 1
        found = metrics(actual, expected)
        if not found.close and self.first is None:
            text = str(op).split(" = ", 1)[-1]
            calls = (*path, f"unit {unit}") if len(self.values) > 1 else path
            where = op.attributes.get("path")
            self.first = Disagreement(text, calls, str(getattr(where, "data", "")), show_location(op.location), found)
        return actual
