"""`tc` before against `tc` after the passes, judged by what both are worth.

Passes change where values are rounded, so two correct modules differ, by how much depends on the model: attention of a
random model turns a rounding into another row. Hence a third run, the captured module in f32: the passes are right if
their results are about as close to it as those of the captured module, which rounds as the model itself does.

One rounding can cost one token three times the usual error, before the passes or after them, so results that look too
far off are judged once more over several inputs together. What is wrong stays wrong with all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from xdsl.dialects.builtin import FunctionType, ModuleOp
from xdsl.dialects.func import CallOp, FuncOp
from xdsl.ir import Attribute, Operation
from xdsl.rewriter import Rewriter
from xdsl.utils.exceptions import VerifyException

from ir.compare import Observation, correspondence, observe, show_location
from ir.dialects import tc
from ir.interpreter import find_function, names_of, run
from ir.spmd import join_results, run_spmd
from ir.types import elem_of, numpy_dtype, with_elem
from passes.outline import EMBED, HEAD, PREPARE
from rngdc.chunk_values import joined

Array = NDArray[Any]
Inputs = Mapping[str, Array]
Weights = Callable[[str], Array]

GROUPS = (PREPARE, EMBED, HEAD)
RMS_RATIO, RMS_FLOOR = 1.5, 2.0**-9
MAX_RATIO, MAX_FLOOR = 3.0, 2.0**-5
"""Error allowed after the passes: this many times the error before them, plus this part of the rms of the values.

The largest of a few rounding errors varies more than their mean. Half a bf16 step is 2**-9 of a value.
"""


@dataclass(frozen=True)
class Worth:
    """Distance from f32, after and before the passes."""

    close: bool
    rms_error: float
    rms_error_before: float
    max_error: float
    max_error_before: float

    def __str__(self) -> str:
        state = "close" if self.close else "TOO FAR"
        return (
            f"{state}: error to f32 rms {self.rms_error:.3g} (before the passes {self.rms_error_before:.3g}), "
            f"max {self.max_error:.3g} ({self.max_error_before:.3g})"
        )


@dataclass(frozen=True)
class Fault:
    """The first operation after the passes whose value is too far from f32."""

    op: str
    calls: tuple[str, ...]
    path: str
    location: str
    worth: Worth

    def __str__(self) -> str:
        place = f" at {self.location}" if self.location else ""
        return f"{'/'.join(self.calls)}: {self.path or '-'}: {self.op}{place}\n  {self.worth}"


@dataclass
class PassComparison:
    """The worth of every result, and the first operation at fault if one is too far off."""

    results: dict[str, Worth]
    first: Fault | None = None
    skipped: list[str] = field(default_factory=list[str])
    inputs: int = 1
    """How many inputs were judged together."""

    @property
    def agrees(self) -> bool:
        """Whether every result is as good as before the passes."""
        return bool(self.results) and all(w.close for w in self.results.values())

    def to_json(self) -> dict[str, Any]:
        """A JSON-able form."""
        return {
            "agrees": self.agrees,
            "inputs": self.inputs,
            "results": {name: asdict(w) for name, w in self.results.items()},
            "first_disagreement": None if self.first is None else asdict(self.first),
            "skipped": self.skipped,
        }


def compare_passes(
    before: ModuleOp, after: ModuleOp, inputs: Inputs, weights: Weights, more: Iterable[Inputs] = ()
) -> PassComparison:
    """Run both modules and the first one in f32 on the same inputs; names an operation only if a result is off.

    more: further inputs, used only if the results of the first are too far off.
    """
    modules = (widened(before), before, after)
    seen = [_results(modules, inputs, weights)]
    comparison = _judged(seen)
    if not comparison.agrees and (further := [_results(modules, i, weights) for i in more]):
        comparison = _judged(seen + further)
    if not comparison.agrees:
        comparison.first = _first_fault(modules, inputs, weights)
    return comparison


Results = dict[str, tuple[Array, Array | None, Array | None]]
"""Of each result: after the passes, in f32, before the passes; only the first if the captured module has none."""


def _results(modules: tuple[ModuleOp, ModuleOp, ModuleOp], inputs: Inputs, weights: Weights) -> Results:
    exact, rough, found = (run_whole(m, arguments(m, inputs), weights) for m in modules)
    last = inputs.get("last")
    results: Results = {}
    for name, value in found.items():
        if name not in exact:
            results[name] = (value, None, None)
            continue
        ours = value.reshape(value.shape[0], -1, value.shape[-1]) if name == "logits" else value
        results[name] = (ours, _row(name, exact[name], last), _row(name, rough[name], last))
    return results


def _judged(runs: list[Results]) -> PassComparison:
    """The results of some inputs together."""
    results: dict[str, Worth] = {}
    skipped: list[str] = []
    for name in runs[0]:
        ours, exact, rough = zip(*(run[name] for run in runs), strict=True)
        if exact[0] is None:
            skipped.append(name)
        else:
            results[name] = worth(np.stack(ours), np.stack(exact), np.stack(rough))
    return PassComparison(results, None, skipped, len(runs))


def _row(name: str, value: Array, last: Array | None) -> Array:
    """Logits of the last token of every sequence [batch, 1, vocabulary]; other results as they are."""
    return value[np.arange(value.shape[0]), last][:, None] if name == "logits" and last is not None else value


def worth(found: Array, exact: Array, rough: Array) -> Worth:
    """Judge a value. Raises ValueError if shapes differ."""
    if found.shape != exact.shape:
        raise ValueError(f"shapes {list(found.shape)} and {list(exact.shape)} cannot be compared")
    e = exact.astype(np.float64)
    ours, theirs = np.abs(found.astype(np.float64) - e), np.abs(rough.astype(np.float64) - e)
    ours = np.where(np.isnan(ours), np.inf, ours)
    scale = float(np.sqrt(np.mean(e * e))) if e.size else 0.0
    rms, rms_before = (float(np.sqrt(np.mean(x * x))) if x.size else 0.0 for x in (ours, theirs))
    largest, largest_before = (float(x.max()) if x.size else 0.0 for x in (ours, theirs))
    close = rms <= RMS_RATIO * rms_before + RMS_FLOOR * scale
    close = close and largest <= MAX_RATIO * largest_before + MAX_FLOOR * scale
    return Worth(close, rms, rms_before, largest, largest_before)


def arguments(module: ModuleOp, inputs: Inputs) -> dict[str, Array]:
    """The arguments that `@main` has, in its element types."""
    block = find_function(module, "main").body.block
    names = names_of(find_function(module, "main"), "arg_names", len(block.args))
    return {n: inputs[n].astype(numpy_dtype(v)) for n, v in zip(names, block.args, strict=True) if n in inputs}


def widened(module: ModuleOp) -> ModuleOp:
    """A copy of a module with f32 in place of bf16."""
    copy = module.clone()

    def wide(kind: Attribute) -> Attribute:
        try:
            return with_elem(kind, "f32") if elem_of(kind) == "bf16" else kind
        except VerifyException:
            return kind

    for op in copy.walk():
        for value in (*op.results, *(a for r in op.regions for b in r.blocks for a in b.args)):
            if (kind := wide(value.type)) != value.type:
                Rewriter.replace_value_with_new_type(value, kind)
        if isinstance(op, FuncOp):
            kind = op.function_type
            op.function_type = FunctionType.from_lists([wide(t) for t in kind.inputs], [wide(t) for t in kind.outputs])
    return copy


def run_whole(module: ModuleOp, args: Inputs, weights: Weights) -> dict[str, Array]:
    """Whole results of a module, of all its units together if it was partitioned."""
    if tc.mesh_of(module) is None:
        return run(module, args, weights)
    return join_results(module, run_spmd(module, args, weights))


def _observations(module: ModuleOp, inputs: Inputs, weights: Weights) -> list[Observation]:
    """What every operation returned. Of a partitioned module only what all units have alike: the rest are parts."""
    args = arguments(module, inputs)
    if tc.mesh_of(module) is None:
        seen = observe(module, args, weights)[1]
    else:
        seen = list[Observation]()

        def note(op: Operation, results: list[list[Array]], calls: tuple[str, ...]) -> None:
            if op.name in ("tc.weight", "tc.constant"):
                return
            if all(
                np.array_equal(part, parts[0], equal_nan=part.dtype.kind == "f") for parts in results for part in parts
            ):
                path = getattr(op.attributes.get("path"), "data", "")
                seen.append(Observation(op, calls, str(path), tuple(parts[0] for parts in results)))

        run_spmd(module, args, weights, observe=note)
    seen = joined(module, seen)
    # Functions that only group what was in `main` are no part of an operation's place in the model.
    return [replace(o, calls=tuple(c for c in o.calls if c.split("[")[0] not in GROUPS)) for o in seen]


def _first_fault(modules: tuple[ModuleOp, ModuleOp, ModuleOp], inputs: Inputs, weights: Weights) -> Fault | None:
    exact, rough, found = (_observations(m, inputs, weights) for m in modules)
    place = {id(seen): i for i, seen in enumerate(rough)}
    for seen, partners in correspondence(rough, found):
        if not partners or isinstance(seen.op, CallOp):
            continue
        judged = [_farthest(seen, exact[place[id(p)]], p) for p in partners]
        if not any(w.close for w in judged):
            text = str(seen.op).split(" = ", 1)[-1]
            return Fault(text, seen.calls, seen.path, show_location(seen.op.location), judged[0])
    return None


def _farthest(found: Observation, exact: Observation, rough: Observation) -> Worth:
    """The worth of the worst result of an operation."""
    judged = [worth(*arrays) for arrays in zip(found.arrays, exact.arrays, rough.arrays, strict=True)]
    return next((w for w in judged if not w.close), judged[0])
