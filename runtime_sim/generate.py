"""Greedy generation and embeddings on simulated cards: chooses buckets, pads, keeps positions, counts its time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backend_rngd.artifact import ArtifactError, ArtifactProblem, Bucket
from runtime_sim.ports import Array
from runtime_sim.requests import Limits, Share, check_prompts, schedule
from runtime_sim.runtime import Device, Invocation

Listener = Callable[[int, int, Array], None]
"""Called with (row, token id, its logits as f32) for every token, in the order of computation."""


@dataclass
class Generation:
    """One row: its tokens, why it stopped (`eos` or `length`), and simulated times in seconds.

    `wait`: until its replica takes it up. `first`: of the prefill programs up to its first token. `steps`: of the
    decode programs after it. `budget`: it gets at most so many tokens.
    """

    prompt_ids: list[int]
    budget: int
    token_ids: list[int] = field(default_factory=list[int])
    finish: str = "length"
    wait: float = 0.0
    first: float = 0.0
    steps: list[float] = field(default_factory=list[float])

    @property
    def ttft_us(self) -> float:
        """Time to the first token."""
        return (self.wait + self.first) * 1e6

    @property
    def tpot_us(self) -> float | None:
        """Mean time of each further token; None if there is none."""
        return float(np.mean(self.steps)) * 1e6 if self.steps else None

    @property
    def end(self) -> float:
        """Seconds until its last token."""
        return self.wait + self.first + sum(self.steps)


@dataclass(frozen=True)
class Embedding:
    """A vector for a text, and the simulated time of its program in seconds."""

    prompt_ids: list[int]
    vector: NDArray[np.float32]
    seconds: float


def generate(
    device: Device,
    prompts: Sequence[Sequence[int]],
    max_tokens: int | None,
    stop_ids: Sequence[int] = (),
    listener: Listener | None = None,
    limits: Limits | None = None,
) -> list[Generation]:
    """Greedy continuations of `prompts`, at most `max_tokens` each (None: as many as fit). A stop token ends a row and
    is its last token.

    Neighbouring prompts go to the same replica; the rows of a replica are decoded together and pass through its stages
    in micro-batches. If there are more prompts than rows, the others wait until all rows have ended. Raises
    ArtifactError with everything that fits no bucket, before any work.
    """
    plan = schedule(device.artifact, prompts, max_tokens, device.stages, device.replicas, limits or Limits())
    rows = [Generation(list(prompt), budget) for prompt, budget in zip(prompts, plan.budgets, strict=True)]
    begun = 0.0
    for wave in plan.waves:
        taken = [row for share in wave for row in rows[share.first : share.last]]
        for row in taken:
            row.wait = begun
        for share in wave:
            _Replica(device, share, rows[share.first : share.last], stop_ids, listener).generate()
        begun = max(row.end for row in taken)
    return rows


class _Replica:
    """A replica at work on its rows."""

    def __init__(
        self,
        device: Device,
        share: Share,
        rows: list[Generation],
        stop_ids: Sequence[int],
        listener: Listener | None,
    ) -> None:
        self.device, self.share, self.rows = device, share, rows
        self.stop_ids, self.listener = stop_ids, listener

    def generate(self) -> None:
        """First token of every row, then the others."""
        self._prefill()
        while any(self._active(row) for row in self.rows):
            self._step()

    def _active(self, row: Generation) -> bool:
        return row.finish != "eos" and len(row.token_ids) < row.budget

    def _prefill(self) -> None:
        rows, reads = self.rows, self.share.reads
        runs: list[Invocation] = []
        for read in reads:
            bucket = read.bucket
            ids = np.zeros((bucket.batch, bucket.input_length), np.int32)
            last = np.zeros(bucket.batch, np.int32)
            for i, row in enumerate(rows[read.first : read.first + read.count]):
                tokens = row.prompt_ids[read.start : read.start + bucket.input_length]
                ids[i, : len(tokens)] = tokens
                last[i] = len(tokens) - 1
            # Padding stands behind the prompt and takes the positions that follow: no row sees it, decoding
            # overwrites it.
            positions = np.tile(np.arange(bucket.input_length, dtype=np.int32) + read.start, (bucket.batch, 1))
            runs.append(Invocation(bucket, {"input_ids": ids, "position_ids": positions, "last": last}, read.first))
        outputs = self.device.run_all(runs, self.share.replica)
        finished = self._finish_times([read.bucket for read in reads])
        for read, found, when in zip(reads, outputs, finished, strict=True):
            if not read.final:
                continue
            logits = _logits(found)
            for i in range(read.count):
                rows[read.first + i].first = when
                self._take(read.first + i, logits[i])

    def _finish_times(self, buckets: Sequence[Bucket]) -> list[float]:
        """When each of several programs in a row has ended. Equal ones overlap in the stages, others do not."""
        times: list[float] = []
        before, count = 0.0, 0
        for i, bucket in enumerate(buckets):
            if i and bucket.name != buckets[i - 1].name:
                before, count = times[-1], 0
            count += 1
            one = self.device.time(bucket).seconds
            if self.device.stages == 1:
                times.append(before + count * one)
            else:
                times.append(before + self.device.time(bucket, count).seconds)
        return times

    def _step(self) -> None:
        """One more token for every active row, in micro-batches that are in flight together."""
        rows = self.rows
        active = [row for row in rows if self._active(row)]
        longest = max(len(row.prompt_ids) + len(row.token_ids) for row in active)
        bucket = next(b for b in self.share.decoders if b.attention_size >= longest)
        starts = [s for s in range(0, len(rows), bucket.batch) if any(map(self._active, rows[s : s + bucket.batch]))]
        outputs = self.device.run_all([self._decode(bucket, first) for first in starts], self.share.replica)
        seconds = self._step_time(bucket, len(starts))
        for first, found in zip(starts, outputs, strict=True):
            logits = _logits(found)
            for i, row in enumerate(rows[first : first + bucket.batch]):
                if self._active(row):
                    row.steps.append(seconds)
                    self._take(first + i, logits[i])

    def _step_time(self, bucket: Bucket, batches: int) -> float:
        """Seconds from token to token once the stages are full: a row's next token begins when its last one has left
        the last stage, and every stage serves all micro-batches in between."""
        one = self.device.time(bucket).seconds
        if self.device.stages == 1 or batches == 1:
            return batches * one
        first, second = (self.device.time(bucket, n * batches).seconds for n in (1, 2))
        return max(one, second - first)

    def _decode(self, bucket: Bucket, first: int) -> Invocation:
        ids = np.zeros((bucket.batch, 1), np.int32)
        positions = np.zeros((bucket.batch, 1), np.int32)
        for i, row in enumerate(self.rows[first : first + bucket.batch]):
            ids[i, 0] = row.token_ids[-1]
            positions[i, 0] = min(len(row.prompt_ids) + len(row.token_ids) - 1, bucket.attention_size - 1)
        inputs = {"input_ids": ids, "position_ids": positions, "last": np.zeros(bucket.batch, np.int32)}
        return Invocation(bucket, inputs, first)

    def _take(self, index: int, logits: Array) -> None:
        row = self.rows[index]
        token = int(np.argmax(logits))
        row.token_ids.append(token)
        if token in self.stop_ids:
            row.finish = "eos"
        if self.listener is not None:
            self.listener(self.share.first + index, token, logits)


def _logits(outputs: dict[str, Array]) -> Array:
    """Logits [batch, vocabulary] in f32; programs return one row a sequence, with or without an axis for it."""
    logits = outputs["logits"].astype(np.float32)
    return logits.reshape(logits.shape[0], logits.shape[-1])


def embed(device: Device, prompt: Sequence[int], limits: Limits | None = None) -> Embedding:
    """The vector of a text: pooled last hidden state, normalised if the model asks for it. Raises ArtifactError."""
    problems: list[ArtifactProblem] = []
    pooling = device.artifact.manifest.model.pooling
    if pooling is None:
        what = f"model {device.artifact.manifest.model.id}"
        problems.append(ArtifactProblem(what, "it is no encoder, which has one vector for a text", "generate with it"))
    else:
        check_prompts(device.artifact, [prompt], limits or Limits(), problems)
    if problems or pooling is None:
        raise ArtifactError(problems)
    n = len(prompt)
    fitting = (b for b in device.artifact.buckets if b.phase == "encode" and b.input_length >= n)
    bucket = min(fitting, key=lambda b: (b.input_length, b.batch))
    ids = np.zeros((bucket.batch, bucket.input_length), np.int32)
    ids[0, :n] = prompt
    lengths = np.ones(bucket.batch, np.int32)
    lengths[0] = n
    positions = np.tile(np.arange(bucket.input_length, dtype=np.int32), (bucket.batch, 1))
    outputs = device.run(bucket, {"input_ids": ids, "position_ids": positions, "lengths": lengths})
    hidden = outputs["last_hidden_state"][0, :n].astype(np.float32)
    pools: dict[str, Callable[[Array], Any]] = {
        "mean": lambda h: h.mean(axis=0),
        "cls": lambda h: h[0],
        "max": lambda h: h.max(axis=0),
    }
    vector = np.asarray(pools[pooling.mode](hidden), np.float32)
    if pooling.normalise:
        vector = vector / max(float(np.linalg.norm(vector)), 1e-12)
    return Embedding(list(prompt), vector, device.time(bucket).seconds)
