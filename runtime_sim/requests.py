"""Which programs serve which prompts: the plan of a call, and everything that is wrong with it, before any work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from backend_rngd.artifact import Artifact, ArtifactError, ArtifactProblem, Bucket


@dataclass(frozen=True)
class Limits:
    """What a call may ask for, below what the buckets allow; None: no other limit than theirs.

    `max_prompt_len`: tokens of a prompt. `max_model_len`: prompt and answer together. `max_batch_size`: rows that a
    replica works on at once; more wait.
    """

    max_prompt_len: int | None = None
    max_model_len: int | None = None
    max_batch_size: int | None = None


@dataclass(frozen=True)
class Read:
    """A program that reads a part of the prompts of `count` rows from `first` on: the tokens from `start` on, as many
    as it takes. `final`: the prompts end there."""

    first: int
    count: int
    bucket: Bucket
    start: int = 0
    final: bool = True


@dataclass(frozen=True)
class Share:
    """What a replica does at once: the rows [first, last) of the call, which programs read their prompts, and the
    decode programs of one batch size, by attention size."""

    replica: int
    first: int
    last: int
    reads: list[Read]
    decoders: list[Bucket]


@dataclass(frozen=True)
class Schedule:
    """Waves of shares, one after the other, and how many tokens each row gets at most."""

    waves: list[list[Share]]
    budgets: list[int]


def longest_prompt(buckets: Sequence[Bucket]) -> int:
    """Tokens of the longest prompt that can be read, at once or in chunks; 0 if there is none."""
    low, high = 0, max((b.attention_size for b in buckets if b.outputs), default=0)
    while low < high:  # what can be read shorter can be read as well
        middle = (low + high + 1) // 2
        low, high = (middle, high) if readable(buckets, middle) else (low, middle - 1)
    return low


def readable(buckets: Sequence[Bucket], n: int) -> bool:
    """Whether a prompt of `n` tokens can be read."""
    whole = any(b.phase in ("prefill", "encode") and b.outputs and b.input_length >= n for b in buckets)
    return whole or chunk_reads(buckets, 0, n) is not None


def longest_sequence(buckets: Sequence[Bucket]) -> int:
    """Tokens that the largest decode program sees, or the largest encoder; the last token of an answer is not among
    them."""
    return max((b.attention_size for b in buckets if b.phase in ("decode", "encode")), default=0)


def schedule(
    artifact: Artifact,
    prompts: Sequence[Sequence[int]],
    max_tokens: int | None,
    stages: int,
    replicas: int,
    limits: Limits,
) -> Schedule:
    """Plan a call. `max_tokens` None: as many as fit. Neighbouring prompts go to the same replica.

    Raises ArtifactError with everything that fits no bucket or limit.
    """
    buckets = artifact.buckets
    problems: list[ArtifactProblem] = []
    if max_tokens is not None and max_tokens < 1:
        problems.append(ArtifactProblem(f"{max_tokens} tokens", "there is nothing to generate", "ask for 1 or more"))
    if not longest_prompt(buckets):
        problems.append(ArtifactProblem("no prefill bucket", "the artifact cannot read prompts", "build with -pb"))
    elif not any(b.phase == "decode" for b in buckets) and max_tokens != 1:
        problems.append(ArtifactProblem("no decode bucket", "the artifact makes one token only", "build with -db"))
    else:
        check_prompts(artifact, prompts, limits, problems)
    budgets = [_budget(buckets, len(prompt), max_tokens, limits, i, len(prompts), problems)
               for i, prompt in enumerate(prompts)]  # fmt: skip
    waves: list[list[Share]] = []
    capacity = min((c.batch for c in artifact.manifest.caches), default=len(prompts)) or 1
    rows = min(capacity, limits.max_batch_size or capacity)
    for start in range(0, len(prompts), rows * replicas) if not problems else ():
        end = min(len(prompts), start + rows * replicas)
        size = -(-(end - start) // replicas)
        shares: list[Share] = []
        for replica, first in enumerate(range(start, end, size)):
            last = min(end, first + size)
            lengths = [len(prompt) for prompt in prompts[first:last]]
            need = max(n + budget - 1 for n, budget in zip(lengths, budgets[first:last], strict=True))
            reads = _reads(buckets, lengths, capacity, problems)
            decoders = _decoders(buckets, last - first, stages, capacity, need)
            reach = max((b.attention_size for b in decoders), default=0)
            if reach < need and max(budgets[first:last]) > 1:
                why = f"no decode bucket for as many rows holds {need} tokens, the largest holds {reach}"
                fix = f"ask for {need - reach} tokens less, or build with -db {last - first},{need}"
                problems.append(ArtifactProblem(f"{last - first} prompts at once", why, fix))
            shares.append(Share(replica, first, last, reads, decoders))
        waves.append(shares)
    if problems:
        raise ArtifactError(list(dict.fromkeys(problems)))
    return Schedule(waves, budgets)


def check_prompts(
    artifact: Artifact, prompts: Sequence[Sequence[int]], limits: Limits, problems: list[ArtifactProblem]
) -> None:
    """Append a problem for every prompt that cannot be read."""
    longest = longest_prompt(artifact.buckets)
    vocab = artifact.manifest.model.vocab_size
    for i, prompt in enumerate(prompts):
        n, name = len(prompt), _name(i, len(prompts))
        if not n:
            problems.append(ArtifactProblem(f"{name} is empty", "there is no token to start from", "write something"))
        if limits.max_prompt_len is not None and n > limits.max_prompt_len:
            why = f"prompts have at most {limits.max_prompt_len} (max_prompt_len)"
            fix = "shorten it"
            if n <= longest:
                fix += f", or load with max_prompt_len={n}"
            problems.append(ArtifactProblem(f"{name} has {n} tokens", why, fix))
        elif n and not readable(artifact.buckets, n):
            why = f"the largest prefill bucket holds {longest}"
            problems.append(ArtifactProblem(f"{name} has {n} tokens", why, f"shorten it, or build with -pb 1,{n}"))
        if bad := [t for t in prompt if t < 0 or (vocab is not None and t >= vocab)]:
            why = f"the vocabulary has ids 0 to {(vocab or 0) - 1}"
            problems.append(ArtifactProblem(f"{name} holds token ids {bad[:5]}", why, "use its tokenizer"))


def _name(index: int, count: int) -> str:
    return f"prompt {index + 1}" if count > 1 else "the prompt"


def _budget(
    buckets: Sequence[Bucket],
    n: int,
    max_tokens: int | None,
    limits: Limits,
    index: int,
    count: int,
    problems: list[ArtifactProblem],
) -> int:
    """Tokens that a prompt of `n` gets at most; appends a problem if it cannot have as many as are asked for."""
    reach = longest_sequence(buckets)
    # The last token of an answer is not put into the caches.
    room = (limits.max_model_len if limits.max_model_len is not None else reach + 1 if reach else n + 1) - n
    if max_tokens is None:
        if room < 1 and n:
            why = f"a sequence has at most {n + room} (max_model_len)"
            problems.append(ArtifactProblem(f"{_name(index, count)} has {n} tokens", why, "shorten it"))
        return max(1, room)
    if max_tokens > room and reach:
        what = f"{_name(index, count)} has {n} tokens and {max_tokens} are asked for"
        if limits.max_model_len is not None:
            why = f"a sequence has at most {limits.max_model_len} (max_model_len), not {n + max_tokens}"
            fix = "shorten the prompt"
        else:
            why = f"{n + max_tokens - 1} tokens are needed in the cache, the largest decode bucket holds {reach}"
            fix = "build with a larger -db"
        fix = f"ask for at most {room}, or {fix}" if room > 0 else fix
        problems.append(ArtifactProblem(what, why, fix))
    return max_tokens


def _reads(
    buckets: Sequence[Bucket], lengths: Sequence[int], capacity: int, problems: list[ArtifactProblem]
) -> list[Read]:
    """The programs that read the prompts of a replica's rows."""
    prefill = sorted(
        (b for b in buckets if b.phase == "prefill" and b.outputs), key=lambda b: (b.batch, b.input_length)
    )
    reads: list[Read] = []
    at = 0
    while at < len(lengths):
        bucket = next((b for b in prefill if b.input_length >= lengths[at]), None)
        if bucket is None:
            reads += chunk_reads(buckets, at, lengths[at]) or []
            at += 1
            continue
        count = 1
        while count < bucket.batch and at + count < len(lengths) and lengths[at + count] <= bucket.input_length:
            count += 1
        reads.append(Read(at, count, bucket))
        at += count
    if any(read.first + read.bucket.batch > capacity for read in reads):
        why = f"prefill buckets of several rows would write behind the {capacity} rows of the cache"
        problems.append(ArtifactProblem(f"{len(lengths)} prompts", why, "build a prefill bucket with batch 1"))
    return reads


def chunk_reads(buckets: Sequence[Bucket], row: int, n: int) -> list[Read] | None:
    """Programs that read a prompt of `n` tokens part by part; None if there are none that do."""
    usable = [b for b in buckets if b.phase in ("prefill", "chunk") and b.batch == 1]
    reads: list[Read] = []
    start = 0
    while True:
        # A program finds the tokens before its own in the caches, as far as its attention reaches.
        room = [b for b in usable if start + b.input_length <= b.attention_size]
        last = [b for b in room if b.outputs and start + b.input_length >= n]
        if last:
            bucket = min(last, key=lambda b: (b.input_length, b.attention_size))
            return [*reads, Read(row, 1, bucket, start)]
        room = [b for b in room if start + b.input_length < n]
        if not room:
            return None
        bucket = min(room, key=lambda b: (-b.input_length, b.attention_size, len(b.outputs)))
        reads.append(Read(row, 1, bucket, start, False))
        start += bucket.input_length


def _decoders(buckets: Sequence[Bucket], rows: int, stages: int, capacity: int, need: int) -> list[Bucket]:
    """The decode programs to use, of one batch size, by attention size.

    Batches whose rows, in whole micro-batches, fit the `capacity` of the caches, and if there are such, that hold
    `need` tokens. Of these with one stage the smallest that takes all rows; with more stages the largest one that makes
    a micro-batch for every stage; else as few micro-batches as can be with one stage, as many with more.
    """
    reach: dict[int, int] = {}
    for b in buckets:
        if b.phase == "decode":
            reach[b.batch] = max(reach.get(b.batch, 0), b.attention_size)
    fitting = sorted(n for n in reach if -(-rows // n) * n <= capacity)
    fitting = [n for n in fitting if reach[n] >= need] or fitting
    if not fitting:
        return []
    if stages == 1:
        batch = next((n for n in fitting if n >= rows), fitting[-1])
    else:
        busy = [n for n in fitting if -(-rows // n) >= stages]
        batch = max(busy) if busy else fitting[0]
    return sorted((b for b in buckets if b.phase == "decode" and b.batch == batch), key=lambda b: b.attention_size)
