"""`rngdc check`: the same inputs through every level, and the first operation that disagrees.

Levels: `tc` as captured, `tc` after the passes (both by the reference kernels), and the instruction streams on the
simulated cards. With tensor parallelism the second level runs all units of a layer in lock step, and the streams of
every unit are judged. See `compare_passes` and `compare_streams`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from backend_rngd.artifact import Artifact, Bucket
from ir.compare import Disagreement, Metrics
from ir.interpreter import find_function, names_of, run
from ir.spmd import argument_shards
from ir.text import parse_module
from ir.types import numpy_dtype, shape_of
from rngdc.compare_passes import Fault, PassComparison, Weights, Worth, compare_passes
from rngdc.compare_streams import StreamComparison, compare_streams
from runtime_sim.runtime import Device

if TYPE_CHECKING:
    from xdsl.dialects.builtin import ModuleOp

Array = NDArray[Any]
Inputs = dict[str, Array]

CACHE_TOKENS = 48
"""Tokens that fill the caches before a decode program is checked."""
MORE_INPUTS = 7
"""Further inputs that are drawn where the results of the passes look too far off."""


@dataclass
class BucketCheck:
    """The comparisons of one bucket."""

    bucket: str
    passes: PassComparison | None
    streams: StreamComparison

    @property
    def agrees(self) -> bool:
        """Whether all levels agree."""
        return self.streams.agrees and (self.passes is None or self.passes.agrees)

    def to_json(self) -> dict[str, Any]:
        """A JSON-able form."""
        levels = {} if self.passes is None else {"passes": self.passes.to_json()}
        return {"bucket": self.bucket, "agrees": self.agrees, **levels, "streams": self.streams.to_json()}


@dataclass
class CheckReport:
    """The outcome of `rngdc check`."""

    artifact: str
    buckets: list[BucketCheck] = field(default_factory=list[BucketCheck])

    @property
    def agrees(self) -> bool:
        """Whether every bucket agrees at every level."""
        return bool(self.buckets) and all(b.agrees for b in self.buckets)

    def to_json(self) -> dict[str, Any]:
        """The report of `rngdc check --json`."""
        return {"artifact": self.artifact, "agrees": self.agrees, "buckets": [b.to_json() for b in self.buckets]}


def check(
    device: Device, buckets: Sequence[Bucket], seed: int = 0, progress: Callable[[str], None] = lambda _: None
) -> CheckReport:
    """Compare the levels of every given bucket. The device must be loaded. Raises SimulationError."""
    artifact = device.artifact
    weights = cache(artifact.weight)  # random ones take a while to make
    report = CheckReport(str(artifact.directory))
    source = None
    if (artifact.directory / "ir" / "model.mlir").is_file():
        source = parse_module(artifact.text("ir/model.mlir"), "ir/model.mlir")
    for bucket in buckets:
        module = parse_module(artifact.text(bucket.ir), bucket.ir)

        def draw(seed: int, bucket: Bucket = bucket, module: ModuleOp = module) -> Inputs:
            inputs = sample_inputs(artifact, bucket, module, seed)
            if bucket.phase in ("decode", "chunk") and source is not None:
                progress(f"{bucket.name}: caches")
                _fill_caches(artifact, source, inputs, weights, seed)
            return inputs

        inputs = draw(seed)
        passes = None
        if source is not None:
            progress(f"{bucket.name}: tc before and after the passes")
            more = (draw(seed + 2 * i) for i in range(1, MORE_INPUTS + 1))  # seed + 1 made the caches
            passes = compare_passes(source, module, inputs, weights, more)
        progress(f"{bucket.name}: streams")
        streams = compare_streams(device, bucket, module, inputs, weights)
        report.buckets.append(BucketCheck(bucket.name, passes, streams))
    return report


def sample_inputs(artifact: Artifact, bucket: Bucket, module: ModuleOp, seed: int = 0) -> Inputs:
    """Arguments of a bucket's `@main`: random tokens, rows of different length, empty caches.

    The names say what an argument means; any other integers count up, any other numbers are normal.
    """
    rng = np.random.default_rng(seed)
    function = find_function(module, "main")
    vocab = artifact.manifest.model.vocab_size or 2
    length, keys = bucket.input_length, bucket.attention_size
    inputs: Inputs = {}
    lengths = np.array([max(1, length - 3 - 5 * i) for i in range(bucket.batch)], np.int32)
    starts = np.zeros(bucket.batch, np.int32)
    if bucket.phase == "decode":
        lengths = np.ones(bucket.batch, np.int32)
        starts = np.array([max(0, keys - 2 - 7 * i) for i in range(bucket.batch)], np.int32)
    elif bucket.phase == "chunk":
        starts = np.full(bucket.batch, keys - length, np.int32)
    names = names_of(function, "arg_names", len(function.body.block.args))
    for name, value, shard in zip(names, function.body.block.args, argument_shards(function), strict=True):
        shape, dtype = shard.shape if shard is not None else shape_of(value), numpy_dtype(value)
        if name == "input_ids":
            inputs[name] = rng.integers(0, vocab, shape, np.int32)
        elif name == "position_ids" and len(shape) == 2:
            inputs[name] = starts[:, None] + np.arange(shape[1], dtype=np.int32)[None]
        elif name == "last":
            inputs[name] = lengths - 1
        elif name == "lengths":
            inputs[name] = lengths
        elif name.startswith("cache."):
            inputs[name] = np.zeros(shape, ml_dtypes.bfloat16)
        elif dtype.kind == "i":
            inputs[name] = np.arange(np.prod(shape), dtype=np.int32).reshape(shape) % max(1, keys or shape[-1])
        else:
            known = f"arg.{name}" in {w.name for w in artifact.manifest.weights}
            inputs[name] = artifact.weight(f"arg.{name}") if known else rng.standard_normal(shape).astype(dtype)
    return inputs


def _fill_caches(artifact: Artifact, source: ModuleOp, inputs: Inputs, weights: Weights, seed: int) -> None:
    """Caches as a prefill of random tokens leaves them: random numbers would make attention ill-conditioned."""
    starts = inputs["position_ids"][:, 0]
    batch, length = len(starts), min(CACHE_TOKENS, int(starts.max()))
    if not length:
        return
    rng = np.random.default_rng(seed + 1)
    vocab = artifact.manifest.model.vocab_size or 2
    prompt = {
        "input_ids": rng.integers(0, vocab, (batch, length), np.int32),
        "position_ids": np.tile(np.arange(length, dtype=np.int32), (batch, 1)),
        **{name: value for name, value in inputs.items() if name.startswith("cache.")},
    }
    results = run(source, prompt, weights)
    for name, value in results.items():
        if name.startswith("cache."):
            inputs[name] = np.array(value)
    inputs["position_ids"] -= np.maximum(starts - length, 0)[:, None]


def check_lines(report: CheckReport) -> list[str]:
    """The report for people."""
    lines: list[str] = []
    for bucket in report.buckets:
        lines.append(f"{bucket.bucket}: {'all levels agree' if bucket.agrees else 'LEVELS DISAGREE'}")
        if (passes := bucket.passes) is not None:
            together = f", {passes.inputs} inputs together" if passes.inputs > 1 else ""
            lines.append(f"  tc before and after the passes{together}")
            lines += _details(passes.results, passes.first)
        units = f" of {bucket.streams.units} units" if bucket.streams.units > 1 else ""
        lines.append(f"  tc and streams, {bucket.streams.compared} operations{units}")
        lines += _details(bucket.streams.results, bucket.streams.first)
        lines += [
            f"    {name}, with the rounding of the whole model: rms error {m.rms_rel:.3g}, cosine {m.cosine:.6f}"
            for name, m in bucket.streams.accumulated.items()
            if not name.startswith("cache.")
        ]
    return lines


def _details(results: Mapping[str, Metrics | Worth], first: Disagreement | Fault | None) -> list[str]:
    shown = {n: m for n, m in results.items() if not n.startswith("cache.") or not m.close}
    lines = [f"    {name}: {m}" for name, m in shown.items()]
    if first is not None:
        lines.append("    the first operation that disagrees:")
        lines += [f"      {line}" for line in str(first).splitlines()]
    return lines
