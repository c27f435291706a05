"""Greedy generation and embeddings on simulated cards: chooses buckets, pads, keeps positions, counts its time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backend_rngd.artifact import ArtifactError, ArtifactProblem, Bucket
from runtime_sim.ports import Array
from runtime_sim.runtime import Device, Invocation

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

    Neighbouring prompts go to the same replica; the rows of a replica pass through its stages in micro-batches. Raises
    ArtifactError with everything that fits no bucket, before any work.
    """
    rows = [Generation(list(prompt)) for prompt in prompts]
    shares = _shares(len(rows), device.replicas)
    plans: list[_Plan] = []
    problems: dict[ArtifactProblem, None] = {}  # in order, each once
    for first, last in shares:
        try:
            plans.append(_plan(device, rows, first, last, max_tokens))
        except ArtifactError as error:
            problems |= dict.fromkeys(error.problems)
    if problems:
        raise ArtifactError(list(problems))
    for replica, plan in enumerate(plans):
        _Replica(device, replica, plan, max_tokens, stop_ids, listener).generate()
    return rows


def _shares(count: int, parts: int) -> list[tuple[int, int]]:
    """[first, last) of every part of `count` rows; empty parts are left out."""
    size = -(-count // parts) if count else 0
    return [(first, min(count, first + size)) for first in range(0, count, max(size, 1))]


@dataclass(frozen=True)
class _Read:
    """A program that reads a part of the prompts of `count` rows from `first` on: the tokens from `start` on, as many
    as it takes. `final`: the prompts end there."""

    first: int
    count: int
    bucket: Bucket
    start: int = 0
    final: bool = True


@dataclass(frozen=True)
class _Plan:
    """What a replica does: its rows, their number in the whole, which programs read their prompts, and the decode
    programs by size with the rows of each micro-batch."""

    rows: list[Generation]
    offset: int
    reads: list[_Read]
    decoders: list[Bucket]


class _Replica:
    """A replica at work on its rows."""

    def __init__(
        self,
        device: Device,
        replica: int,
        plan: _Plan,
        max_tokens: int,
        stop_ids: Sequence[int],
        listener: Listener | None,
    ) -> None:
        self.device, self.replica, self.plan = device, replica, plan
        self.max_tokens, self.stop_ids, self.listener = max_tokens, stop_ids, listener

    def generate(self) -> None:
        """First token of every row, then the others."""
        self._prefill()
        while any(self._active(row) for row in self.plan.rows):
            self._step()

    def _active(self, row: Generation) -> bool:
        return row.finish != "eos" and len(row.token_ids) < self.max_tokens

    def _prefill(self) -> None:
        rows, reads = self.plan.rows, self.plan.reads
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
        outputs = self.device.run_all(runs, self.replica)
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
        rows = self.plan.rows
        active = [row for row in rows if self._active(row)]
        longest = max(len(row.prompt_ids) + len(row.token_ids) for row in active)
        bucket = next(b for b in self.plan.decoders if b.attention_size >= longest)
        starts = [s for s in range(0, len(rows), bucket.batch) if any(map(self._active, rows[s : s + bucket.batch]))]
        outputs = self.device.run_all([self._decode(bucket, first) for first in starts], self.replica)
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
        for i, row in enumerate(self.plan.rows[first : first + bucket.batch]):
            ids[i, 0] = row.token_ids[-1]
            positions[i, 0] = min(len(row.prompt_ids) + len(row.token_ids) - 1, bucket.attention_size - 1)
        inputs = {"input_ids": ids, "position_ids": positions, "last": np.zeros(bucket.batch, np.int32)}
        return Invocation(bucket, inputs, first)

    def _take(self, index: int, logits: Array) -> None:
        row = self.plan.rows[index]
        token = int(np.argmax(logits))
        row.token_ids.append(token)
        if token in self.stop_ids:
            row.finish = "eos"
        if self.listener is not None:
            self.listener(self.plan.offset + index, token, logits)


def _logits(outputs: dict[str, Array]) -> Array:
    """Logits [batch, vocabulary] in f32; programs return one row a sequence, with or without an axis for it."""
    logits = outputs["logits"].astype(np.float32)
    return logits.reshape(logits.shape[0], logits.shape[-1])


def _plan(device: Device, everyone: Sequence[Generation], offset: int, end: int, max_tokens: int) -> _Plan:
    """What the replica of rows [offset, end) does. Raises ArtifactError."""
    rows = list(everyone[offset:end])
    buckets, problems = device.artifact.buckets, list[ArtifactProblem]()
    capacity = min((c.batch for c in device.artifact.manifest.caches), default=len(rows))
    prefill = sorted(
        (b for b in buckets if b.phase == "prefill" and b.outputs), key=lambda b: (b.batch, b.input_length)
    )
    decode = _decoders([b for b in buckets if b.phase == "decode"], len(rows), device.stages)
    if max_tokens < 1:
        problems.append(ArtifactProblem(f"{max_tokens} tokens", "there is nothing to generate", "ask for 1 or more"))
    if not prefill:
        problems.append(ArtifactProblem("no prefill bucket", "the artifact cannot read prompts", "build with -pb"))
    if not decode and max_tokens > 1:
        largest = max((b.batch for b in buckets if b.phase == "decode"), default=0)
        why = f"the largest decode bucket has {largest} rows"
        fix = "build a larger decode bucket (-db), or use more replicas"
        problems.append(ArtifactProblem(f"{len(rows)} prompts at once", why, fix))
    reach = max((b.attention_size for b in decode), default=0)
    vocab = device.artifact.manifest.model.vocab_size
    longest = max((b.input_length for b in prefill), default=0)
    for i, row in enumerate(rows):
        n = len(row.prompt_ids)
        name = f"prompt {offset + i + 1}" if len(everyone) > 1 else "the prompt"
        if not n:
            problems.append(ArtifactProblem(f"{name} is empty", "there is no token to start from", "write something"))
        if prefill and n > longest and _chunks(buckets, i, n) is None:
            longest = max([longest, *(b.attention_size for b in buckets if b.phase == "chunk" and b.outputs)])
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
    reads: list[_Read] = []
    at = 0
    while at < len(rows):
        n = len(rows[at].prompt_ids)
        bucket = next((b for b in prefill if b.input_length >= n), None)
        if bucket is None:
            reads += _chunks(buckets, at, n) or []
            at += 1
            continue
        count = 1
        while count < bucket.batch and at + count < len(rows):
            if len(rows[at + count].prompt_ids) > bucket.input_length:
                break
            count += 1
        reads.append(_Read(at, count, bucket))
        at += count
    if any(read.first + read.bucket.batch > capacity for read in reads):
        why = f"prefill buckets of several rows would write behind the {capacity} rows of the cache"
        raise ArtifactError([ArtifactProblem(f"{len(rows)} prompts", why, "build a prefill bucket with batch 1")])
    return _Plan(rows, offset, reads, decode)


def _chunks(buckets: Sequence[Bucket], row: int, n: int) -> list[_Read] | None:
    """Programs that read a prompt of `n` tokens part by part; None if there are none that do."""
    usable = [b for b in buckets if b.phase in ("prefill", "chunk") and b.batch == 1]
    reads: list[_Read] = []
    start = 0
    while True:
        # A program finds the tokens before its own in the caches, as far as its attention reaches.
        room = [b for b in usable if start + b.input_length <= b.attention_size]
        last = [b for b in room if b.outputs and start + b.input_length >= n]
        if last:
            bucket = min(last, key=lambda b: (b.input_length, b.attention_size))
            return [*reads, _Read(row, 1, bucket, start)]
        if not room:
            return None
        bucket = min(room, key=lambda b: (-b.input_length, b.attention_size, len(b.outputs)))
        reads.append(_Read(row, 1, bucket, start, False))
        start += bucket.input_length


def _decoders(buckets: Sequence[Bucket], rows: int, stages: int) -> list[Bucket]:
    """The decode programs to use, of one batch size, by attention size.

    With one stage the smallest batch that takes all rows. With more stages the largest one that makes a micro-batch for
    every stage, or as many micro-batches as can be; their rows must fit the caches, which are as large as the largest
    batch.
    """
    sizes = sorted({b.batch for b in buckets})
    largest = max(sizes, default=0)
    if not rows or rows > largest:
        return []
    fitting = [n for n in sizes if -(-rows // n) * n <= largest]
    if stages == 1:
        batch = next(n for n in sizes if n >= rows)
    else:
        busy = [n for n in fitting if -(-rows // n) >= stages]
        batch = max(busy) if busy else min(fitting)
    return sorted((b for b in buckets if b.batch == batch), key=lambda b: b.attention_size)


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
