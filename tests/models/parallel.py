"""Running one model on different numbers of processing elements and stages, and judging what differs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from backend_rngd.artifact import Artifact, Bucket, open_artifact
from ir.interpreter import run
from ir.text import parse_module
from rngdc.buckets import BucketRequest
from rngdc.build import BuildOptions, build
from rngdc.compare_passes import arguments, widened
from rngdc.options import ParallelOptions
from runtime_sim.runtime import Device

RATIO = 1.5
"""Error against f32, relative to that of one unit: partial sums are rounded to bf16 before they are added."""
FLOOR = 2.0**-8
"""Error that is always allowed, relative to the rms of the values: one rounding to bf16."""

Logits = np.ndarray[Any, np.dtype[np.float32]]


def built(model: Path, out: Path, tensor: int, request: BucketRequest, **options: Any) -> Artifact:
    """An artifact for `tensor` units."""
    build(BuildOptions(str(model), out, request, ParallelOptions(tensor), **options), lambda _: None)
    return open_artifact(out)


def loaded(artifact: Artifact, stages: int = 1, checks: bool = False) -> Device:
    device = Device(artifact, checks=checks, pipeline_parallel_size=stages)
    device.load()
    return device


@dataclass
class Script:
    """Prompts, and the tokens that are fed after them whatever the model says, so that every run sees the same."""

    prompts: list[list[int]]
    forced: list[list[int]] = field(default_factory=list[list[int]])

    def sequences(self) -> list[list[int]]:
        """All tokens that the model reads."""
        return [p + f for p, f in zip(self.prompts, self.forced, strict=True)]


def script(vocabulary: int, rows: int, steps: int, seed: int = 0, length: int = 11) -> Script:
    """Random prompts of different length with so many forced tokens."""
    rng = np.random.default_rng(seed)
    tokens = [rng.integers(3, vocabulary, length - 4 * i + steps).tolist() for i in range(rows)]
    return Script([t[:-steps] for t in tokens], [t[-steps:] for t in tokens])


def run_script(device: Device, text: Script) -> Logits:
    """Logits [rows, 1 + steps, vocabulary]: after the prompt, and after every forced token."""
    prefill, decode = _buckets(device)
    device.clear_caches()
    found: list[list[Logits]] = [[] for _ in text.prompts]
    for row, prompt in enumerate(text.prompts):
        ids = np.zeros((1, prefill.input_length), np.int32)
        ids[0, : len(prompt)] = prompt
        positions = np.arange(prefill.input_length, dtype=np.int32)[None]
        inputs = {"input_ids": ids, "position_ids": positions, "last": np.array([len(prompt) - 1], np.int32)}
        found[row].append(_logits(device.run(prefill, inputs, row=row))[0])
    for step in range(len(text.forced[0])):
        ids = np.zeros((decode.batch, 1), np.int32)
        positions = np.zeros((decode.batch, 1), np.int32)
        for row, (prompt, forced) in enumerate(zip(text.prompts, text.forced, strict=True)):
            ids[row, 0], positions[row, 0] = forced[step], len(prompt) + step
        inputs = {"input_ids": ids, "position_ids": positions, "last": np.zeros(decode.batch, np.int32)}
        logits = _logits(device.run(decode, inputs))
        for row in range(len(text.prompts)):
            found[row].append(logits[row])
    return np.array(found, np.float32)


def _buckets(device: Device) -> tuple[Bucket, Bucket]:
    return tuple(next(b for b in device.artifact.buckets if b.phase == p) for p in ("prefill", "decode"))  # type: ignore[return-value]


def _logits(outputs: dict[str, Any]) -> Logits:
    logits = outputs["logits"].astype(np.float32)
    return logits.reshape(logits.shape[0], logits.shape[-1])


def exact_logits(artifact: Artifact, text: Script) -> Logits:
    """What `run_script` would find in f32: the captured model, by the reference kernels."""
    module = widened(parse_module(artifact.text("ir/model.mlir")))
    steps = len(text.forced[0])
    out: list[Logits] = []
    for tokens in text.sequences():
        given: dict[str, Any] = {
            "input_ids": np.array([tokens], np.int32),
            "position_ids": np.arange(len(tokens), dtype=np.int32)[None],
        }
        parallel = artifact.manifest.parallel
        assert parallel.tensor == 1, "the caches of the reference hold all heads"
        for c in artifact.manifest.caches:
            given[c.name] = np.zeros((1, c.heads, c.capacity, c.width), np.float32)
        logits = run(module, arguments(module, given), artifact.weight)["logits"]
        out.append(logits[0, -steps - 1 :].astype(np.float32))
    return np.array(out, np.float32)


def rms(values: Any) -> float:
    return float(np.sqrt(np.mean(np.square(np.asarray(values, np.float64)))))


def judge(found: Logits, alone: Logits, exact: Logits) -> str:
    """Empty if `found` is as far from f32 as one unit's logits within reassociation error; else what is wrong."""
    ours, theirs, scale = rms(found - exact), rms(alone - exact), rms(exact)
    if not np.isfinite(ours) or ours > RATIO * theirs + FLOOR * scale:
        return f"error {ours:.4g} against {theirs:.4g} of one unit (rms of the logits {scale:.4g})"
    return ""
