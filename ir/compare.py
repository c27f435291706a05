"""How far two arrays, or two modules on the same inputs, are apart, and which operation is the first to disagree.

Operations of two modules correspond if they are alike (name, model path, number among their equals in one function
call). Where a pass changed how many there are, only the last of a path is compared: it is what the model's submodule
returns. Results of block calls are always compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from xdsl.dialects.builtin import FileLineColLoc, FusedLoc, LocationAttr, ModuleOp, StringAttr
from xdsl.dialects.func import CallOp
from xdsl.ir import Operation

from ir.interpreter import find_function, names_of, run
from ir.types import NUMPY_DTYPES

Array = NDArray[Any]


@dataclass(frozen=True)
class Tolerance:
    """When values count as equal: |a - e| <= relative * |e| + floor * rms(e), and rms error <= rms * rms(e).

    The floor keeps small elements of a sum of large terms from being judged by their own size.
    """

    relative: float
    floor: float
    rms: float
    outliers: float = 0.0
    """Fraction of elements that may miss the first test."""


BF16 = Tolerance(relative=1 / 64, floor=1 / 16, rms=0.02)
"""Values rounded to bf16 (8 bits) once or a few times; deep networks need `accumulated`."""

F32 = Tolerance(relative=1e-4, floor=1e-4, rms=1e-5)


def accumulated(layers: int, base: Tolerance = BF16) -> Tolerance:
    """The tolerance behind a stack of layers: independent rounding errors grow with the square root of their number.

    A few activations that are sums of large terms may be off by more.
    """
    growth = math.sqrt(max(1, layers))
    outliers = base.outliers if layers <= 1 else max(base.outliers, 1e-3)
    return Tolerance(base.relative * growth, base.floor * growth, base.rms * growth, outliers)


@dataclass(frozen=True)
class Metrics:
    """Distance of an array from the expected one.

    `close` is judged first: correlation-like numbers look good on near-constant data and bad on zeros.
    `max_rel` is relative to the larger of the element and the rms of all expected elements.
    """

    close: bool
    max_abs: float
    max_rel: float
    rms_rel: float
    cosine: float
    wrong: int
    """Number of elements outside the tolerance."""
    elements: int
    worst: tuple[int, ...] = ()
    """Index of the element with the largest error."""

    def __str__(self) -> str:
        state = (
            "close" if self.close else f"{self.wrong} of {self.elements} elements wrong, worst at {list(self.worst)}"
        )
        return (
            f"{state}: max abs {self.max_abs:.3g}, max rel {self.max_rel:.3g}, "
            f"rms rel {self.rms_rel:.3g}, cosine {self.cosine:.6f}"
        )


def metrics(actual: Array, expected: Array, tolerance: Tolerance | None = None) -> Metrics:
    """Compare two arrays of one shape. NaN equals NaN, infinities must agree.

    The default tolerance is exact for integers, F32 if both are f32, else BF16. Raises ValueError if shapes differ.
    """
    if actual.shape != expected.shape:
        raise ValueError(f"shapes {list(actual.shape)} and {list(expected.shape)} cannot be compared")
    integers = actual.dtype.kind in "iub" and expected.dtype.kind in "iub"
    if tolerance is None:
        both = actual.dtype == expected.dtype == np.float32
        tolerance = Tolerance(0, 0, 0) if integers else F32 if both else BF16
    a, e = actual.astype(np.float64), expected.astype(np.float64)
    if a.size == 0:
        return Metrics(True, 0.0, 0.0, 0.0, 1.0, 0, 0)
    with np.errstate(invalid="ignore"):
        same = (a == e) | (np.isnan(a) & np.isnan(e))
        error = np.where(same, 0.0, np.abs(a - e))
    # What is not finite on one side only is infinitely wrong, and must not hide in a NaN.
    error = np.where(np.isnan(error), np.inf, error)
    finite = np.where(np.isfinite(e), e, 0.0)
    rms = math.sqrt(float(np.mean(finite * finite)))
    wrong = int((error > tolerance.relative * np.abs(finite) + tolerance.floor * rms).sum())
    scale = np.maximum(np.abs(finite), rms)
    relative = np.divide(error, scale, out=np.where(error > 0, np.inf, 0.0), where=scale > 0)
    rms_error = math.sqrt(float(np.mean(error * error)))
    rms_rel = rms_error / rms if rms > 0 else (0.0 if rms_error == 0 else math.inf)
    worst = np.unravel_index(int(np.argmax(error)), error.shape)
    return Metrics(
        close=wrong <= tolerance.outliers * a.size and rms_rel <= tolerance.rms,
        max_abs=float(error.max()),
        max_rel=float(relative.max()),
        rms_rel=rms_rel,
        cosine=_cosine(np.where(np.isfinite(a), a, 0.0), finite),
        wrong=wrong,
        elements=a.size,
        worst=tuple(int(i) for i in worst),
    )


def _cosine(a: Array, e: Array) -> float:
    norms = float(np.linalg.norm(a)) * float(np.linalg.norm(e))
    if norms == 0:
        return 1.0 if not a.any() and not e.any() else 0.0
    return float(np.dot(a.ravel(), e.ravel())) / norms


@dataclass(frozen=True)
class Observation:
    """Results of one operation in a run. `calls` is the chain of function calls, `path` the model's module path."""

    op: Operation
    calls: tuple[str, ...]
    path: str
    arrays: tuple[Array, ...]

    @property
    def group(self) -> tuple[tuple[str, ...], str, str]:
        """What operations that may correspond have in common."""
        return self.calls, self.path, self.op.name


def observe(
    module: ModuleOp,
    args: Mapping[str, Array] | Sequence[Array],
    weights: Callable[[str], Array] | None = None,
    function: str = "main",
) -> tuple[dict[str, Array], list[Observation]]:
    """Run a function and keep what every operation (but weights and constants) returned."""
    seen: list[Observation] = []

    def note(op: Operation, results: list[Array], calls: tuple[str, ...]) -> None:
        if op.name not in ("tc.weight", "tc.constant"):
            path = op.attributes.get("path")
            seen.append(Observation(op, calls, path.data if isinstance(path, StringAttr) else "", tuple(results)))

    return run(module, args, weights, function, note), seen


@dataclass(frozen=True)
class Disagreement:
    """One operation whose results are not close."""

    op: str
    calls: tuple[str, ...]
    path: str
    location: str
    metrics: Metrics

    def __str__(self) -> str:
        place = f" at {self.location}" if self.location else ""
        return f"{'/'.join(self.calls)}: {self.path or '-'}: {self.op}{place}\n  {self.metrics}"


@dataclass
class Comparison:
    """Outcome of comparing two modules: metrics of each common result, and the first operation that disagrees."""

    results: dict[str, Metrics]
    first: Disagreement | None
    compared: int
    """Operations of the second module that had a counterpart."""
    unmatched: int
    """Operations of the second module without one (fused, new, or of another shape)."""
    skipped: list[str] = field(default_factory=list[str])
    """Results that only one module has or whose shapes cannot be compared."""

    @property
    def agrees(self) -> bool:
        """Whether every common result is close, and there is one."""
        return bool(self.results) and all(m.close for m in self.results.values())

    def to_json(self) -> dict[str, Any]:
        """A JSON-able form."""
        return {
            "agrees": self.agrees,
            "results": {name: asdict(m) for name, m in self.results.items()},
            "first_disagreement": None if self.first is None else asdict(self.first),
            "compared": self.compared,
            "unmatched": self.unmatched,
            "skipped": self.skipped,
        }


Pairs = list[tuple[Observation, list[Observation]]]
"""Operations of one run, each with what it may correspond to in the other, most likely first."""


def correspondence(before: Sequence[Observation], after: Sequence[Observation]) -> Pairs:
    """For each operation of the second run its possible counterparts in the first."""
    groups: dict[object, list[Observation]] = {}
    others: dict[object, list[Observation]] = {}
    for target, observations in ((groups, before), (others, after)):
        for seen in observations:
            target.setdefault(seen.group, []).append(seen)
    pairs: Pairs = []
    position: dict[object, int] = {}
    for seen in after:
        mine, theirs = others[seen.group], groups.get(seen.group, [])
        index = position.get(seen.group, 0)
        position[seen.group] = index + 1
        likely: list[Observation] = []
        if len(mine) == len(theirs):
            likely = [theirs[index]]
        elif theirs and index == len(mine) - 1:
            likely = [theirs[-1]]
        # A pass may also have changed the order, so any equal of that group excuses an operation.
        likely += [t for t in theirs if likely and t is not likely[0]]
        shapes = [a.shape for a in seen.arrays]
        pairs.append((seen, [t for t in likely if [a.shape for a in t.arrays] == shapes]))
    return pairs


def first_disagreement(
    pairs: Iterable[tuple[Observation, Sequence[Observation]]], tolerance: Callable[[Observation], Tolerance | None]
) -> Disagreement | None:
    """The first operation, in order of execution, whose results are close to those of no counterpart.

    The metrics are those of the likeliest one.
    """
    for seen, partners in pairs:
        # A call's results are those of operations inside, which come first.
        if not partners or isinstance(seen.op, CallOp):
            continue
        worst = [_farthest(seen, partner, tolerance(seen)) for partner in partners]
        if not any(m.close for m in worst):
            text = str(seen.op).split(" = ", 1)[-1]
            return Disagreement(text, seen.calls, seen.path, show_location(seen.op.location), worst[0])
    return None


def _farthest(seen: Observation, partner: Observation, tolerance: Tolerance | None) -> Metrics:
    found = [metrics(a, e, tolerance) for a, e in zip(seen.arrays, partner.arrays, strict=True)]
    return min(found, key=lambda m: (m.close, -m.rms_rel))


def show_location(location: LocationAttr) -> str:
    """`file:line` of a location, the first one of a fused location; empty if unknown."""
    if isinstance(location, FusedLoc):
        return next((text for part in _parts(location) if (text := show_location(part))), "")
    if isinstance(location, FileLineColLoc):
        return f"{location.filename.data}:{location.line.data}"
    return ""


def _parts(location: FusedLoc) -> list[LocationAttr]:
    return list(getattr(location.locations, "data", ()))


def compare_modules(
    before: ModuleOp,
    after: ModuleOp,
    args: Mapping[str, Array],
    weights: Callable[[str], Array] | None = None,
    function: str = "main",
    tolerance: Tolerance | None = None,
) -> Comparison:
    """Run both modules on the same inputs, `before` being the reference.

    Each function takes the arguments it has, in its own element types; if only `after` takes `last`, the reference's
    logits are cut to that row. Without a tolerance it follows from element types and the number of block calls.
    """
    expected, reference = observe(before, _own(before, function, args), weights, function)
    actual, observed = observe(after, _own(after, function, args), weights, function)
    if "last" in args and "logits" in expected and "logits" in actual:
        expected["logits"] = _row(expected["logits"], actual["logits"].shape, args["last"])
    depth = len({seen.calls for seen in observed})

    def limit(seen: Observation | None, array: Array | None = None) -> Tolerance | None:
        arrays = seen.arrays if seen is not None else (array,)
        exact = all(a is not None and a.dtype.kind in "iub" for a in arrays)
        return Tolerance(0, 0, 0) if exact else tolerance or accumulated(depth)

    results: dict[str, Metrics] = {}
    skipped: list[str] = sorted(set(expected) ^ set(actual))
    for name in [n for n in actual if n in expected]:
        if actual[name].shape != expected[name].shape:
            skipped.append(name)
        else:
            results[name] = metrics(actual[name], expected[name], limit(None, actual[name]))
    pairs = correspondence(reference, observed)
    matched = sum(bool(partners) for _, partners in pairs)
    return Comparison(results, first_disagreement(pairs, limit), matched, len(pairs) - matched, skipped)


def _own(module: ModuleOp, function: str, args: Mapping[str, Array]) -> dict[str, Array]:
    """The arguments that a function has; floating-point ones in its element type."""
    target = find_function(module, function)
    values = target.body.block.args
    own: dict[str, Array] = {}
    for name, value in zip(names_of(target, "arg_names", len(values)), values, strict=True):
        if name not in args:
            continue
        element = str(getattr(value.type, "element_type", ""))
        array = args[name]
        floating = element in ("bf16", "f16", "f32") and array.dtype.kind not in "iub"
        own[name] = array.astype(NUMPY_DTYPES[element]) if floating else array
    return own


def _row(logits: Array, shape: tuple[int, ...], last: Array) -> Array:
    if logits.shape == shape or logits.ndim != 3 or shape[1] != 1:
        return logits
    return logits[np.arange(logits.shape[0]), last][:, None]
