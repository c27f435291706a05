"""Greedy generation and embeddings on a simulated card: chooses buckets, pads, keeps positions, counts its time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backend_rngd.artifact import ArtifactError, ArtifactProblem, Bucket
from runtime_sim.runtime import Array, Device

Listener = Callable[[int, int, Array], None]
"""Called with (row, token id, its logits as f32) for every token, in the order of computation."""


@dataclass
class Generation:
    """One row: its tokens, why it stopped (`eos` or `length`), and simulated times in seconds.

    `first` is the time of the prefill programs up to its first token; `steps` those of the decode programs after it.
    """

    prompt_ids: list[int]
    token_ids: list[int] = field(default_factory=list[int])
    finish: str = "length"
    first: float = 0.0
    steps: list[float] = field(default_factory=list[float])

    @property
    def ttft_us(self) -> float:
        """Time to the first token."""
        return self.first * 1e6

    @property
    def tpot_us(self) -> float | None:
        """Mean time of each further token; None if there is none."""
        return float(np.mean(self.steps)) * 1e6 if self.steps else None


@dataclass(frozen=True)
class Embedding:
    """A vector for a text, and the simulated time of its program in seconds."""

    prompt_ids: list[int]
    vector: NDArray[np.float32]
    seconds: float


def generate(
    device: Device,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    stop_ids: Sequence[int] = (),
    listener: Listener | None = None,
) -> list[Generation]:
    """Greedy continuations of `prompts`, all decoded together. A stop token ends a row and is its last token.

    Raises ArtifactError with everything that fits no bucket, before any work.
    """
    rows = [Generation(list(prompt)) for prompt in prompts]
    groups, decoders = _plan(device, rows, max_tokens)
    waited = 0.0
    for first, count, bucket in groups:
        group = rows[first : first + count]
        ids = np.zeros((bucket.batch, bucket.input_length), np.int32)
        last = np.zeros(bucket.batch, np.int32)
        for i, row in enumerate(group):
            ids[i, : len(row.prompt_ids)] = row.prompt_ids
            last[i] = len(row.prompt_ids) - 1
        # Padding stands behind the prompt and takes the positions that follow: no row sees it, decoding overwrites it.
        positions = np.tile(np.arange(bucket.input_length, dtype=np.int32), (bucket.batch, 1))
        logits = _logits(device.run(bucket, {"input_ids": ids, "position_ids": positions, "last": last}, row=first))
        waited += device.time(bucket).seconds
        for i, row in enumerate(group):
            row.first = waited
            _take(row, first + i, logits[i], stop_ids, listener)
    active: list[Generation] = [row for row in rows if row.finish != "eos" and len(row.token_ids) < max_tokens]
    while active:
        longest = max(len(row.prompt_ids) + len(row.token_ids) for row in active)
        bucket = next(b for b in decoders if b.attention_size >= longest)
        ids = np.zeros((bucket.batch, 1), np.int32)
        positions = np.zeros((bucket.batch, 1), np.int32)
        for i, row in enumerate(rows):
            ids[i, 0] = row.token_ids[-1]
            positions[i, 0] = min(len(row.prompt_ids) + len(row.token_ids) - 1, bucket.attention_size - 1)
        inputs = {"input_ids": ids, "position_ids": positions, "last": np.zeros(bucket.batch, np.int32)}
        logits = _logits(device.run(bucket, inputs))
        seconds = device.time(bucket).seconds
        for row in active:
            i = rows.index(row)
            row.steps.append(seconds)
            _take(row, i, logits[i], stop_ids, listener)
        active = [row for row in active if row.finish != "eos" and len(row.token_ids) < max_tokens]
    return rows


def _take(row: Generation, index: int, logits: Array, stop_ids: Sequence[int], listener: Listener | None) -> None:
    token = int(np.argmax(logits))
    row.token_ids.append(token)
    if token in stop_ids:
        row.finish = "eos"
    if listener is not None:
        listener(index, token, logits)


def _logits(outputs: dict[str, Array]) -> Array:
    """Logits [batch, vocabulary] in f32; programs return one row a sequence, with or without an axis for it."""
    logits = outputs["logits"].astype(np.float32)
    return logits.reshape(logits.shape[0], logits.shape[-1])


def _plan(
    device: Device, rows: Sequence[Generation], max_tokens: int
) -> tuple[list[tuple[int, int, Bucket]], list[Bucket]]:
    """Which prefill program reads which rows (first row, count, bucket), and the decode programs by size."""
    buckets, problems = device.artifact.buckets, list[ArtifactProblem]()
    prefill = sorted((b for b in buckets if b.phase == "prefill"), key=lambda b: (b.batch, b.input_length))
    decode = [b for b in buckets if b.phase == "decode" and b.batch >= len(rows)]
    decode.sort(key=lambda b: (b.batch, b.attention_size))
    decode = [b for b in decode if b.batch == decode[0].batch] if decode else []
    if max_tokens < 1:
        problems.append(ArtifactProblem(f"{max_tokens} tokens", "there is nothing to generate", "ask for 1 or more"))
    if not prefill:
        problems.append(ArtifactProblem("no prefill bucket", "the artifact cannot read prompts", "build with -pb"))
    if not decode and max_tokens > 1:
        largest = max((b.batch for b in buckets if b.phase == "decode"), default=0)
        why = f"the largest decode bucket has {largest} rows"
        problems.append(ArtifactProblem(f"{len(rows)} prompts at once", why, "build a larger decode bucket (-db)"))
    reach = max((b.attention_size for b in decode), default=0)
    vocab = device.artifact.manifest.model.vocab_size
    longest = max((b.input_length for b in prefill), default=0)
    for i, row in enumerate(rows):
        n = len(row.prompt_ids)
        name = f"prompt {i + 1}" if len(rows) > 1 else "the prompt"
        if not n:
            problems.append(ArtifactProblem(f"{name} is empty", "there is no token to start from", "write something"))
        if prefill and n > longest:
            why = f"the largest prefill bucket holds {longest}"
            problems.append(ArtifactProblem(f"{name} has {n} tokens", why, f"shorten it, or build with -pb 1,{n}"))
        if decode and n + max_tokens - 1 > reach:
            why = f"{n + max_tokens - 1} tokens are needed in the cache, the largest decode bucket holds {reach}"
            fix = f"ask for at most {max(0, reach - n + 1)}, or build with a larger -db"
            problems.append(ArtifactProblem(f"{name} has {n} tokens and {max_tokens} are asked for", why, fix))
        bad = [t for t in row.prompt_ids if t < 0 or (vocab is not None and t >= vocab)]
        if bad:
            what = f"{name} holds token ids {bad[:5]}"
            problems.append(
                ArtifactProblem(what, f"the vocabulary has ids 0 to {(vocab or 0) - 1}", "use its tokenizer")
            )
    if problems:
        raise ArtifactError(problems)
    groups: list[tuple[int, int, Bucket]] = []
    at = 0
    while at < len(rows):
        bucket = next(b for b in prefill if b.input_length >= len(rows[at].prompt_ids))
        count = 1
        while count < bucket.batch and at + count < len(rows):
            if len(rows[at + count].prompt_ids) > bucket.input_length:
                break
            count += 1
        groups.append((at, count, bucket))
        at += count
    capacity = min((c.batch for c in device.artifact.manifest.caches), default=len(rows))
    if any(first + bucket.batch > capacity for first, _, bucket in groups):
        why = f"prefill buckets of several rows would write behind the {capacity} rows of the cache"
        raise ArtifactError([ArtifactProblem(f"{len(rows)} prompts", why, "build a prefill bucket with batch 1")])
    return groups, decode


def embed(device: Device, prompt: Sequence[int]) -> Embedding:
    """The vector of a text: pooled last hidden state, normalised if the model asks for it. Raises ArtifactError."""
    pooling = device.artifact.manifest.model.pooling
    buckets = sorted(
        (b for b in device.artifact.buckets if b.phase == "encode"), key=lambda b: (b.input_length, b.batch)
    )
    n = len(prompt)
    if not n:
        raise ArtifactError([ArtifactProblem("the prompt is empty", "there is nothing to embed", "write something")])
    bucket = next((b for b in buckets if b.input_length >= n), None)
    if bucket is None or pooling is None:
        longest = max((b.input_length for b in buckets), default=0)
        fix = f"shorten it, or build with -pb 1,{n}"
        raise ArtifactError([ArtifactProblem(f"the prompt has {n} tokens", f"the largest bucket holds {longest}", fix)])
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
