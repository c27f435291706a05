"""Buckets: the sizes that programs are built for. Parsing, defaults, chunks, and every check that needs no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ir.errors import Problem

DEFAULT_LENGTH = 2048
"""Longest sequence without `--max-seq-len-to-capture`, if the model has as many positions."""
SHORTEST_DECODE = 2
"""A decode program holds at least one token of the prompt and the new one."""
Phase = Literal["prefill", "chunk", "decode", "encode", "function"]


@dataclass(frozen=True)
class BucketSpec:
    """A program's sizes: `batch` rows of `input_length` tokens that see up to `attention_size` tokens each.

    A `chunk` reads a later part of a prompt, behind `attention_size - input_length` tokens that are in the caches.
    Without `logits` a program only fills the caches, for parts of a prompt that are not its end.
    """

    phase: Phase
    batch: int
    input_length: int
    attention_size: int
    logits: bool = True

    @property
    def name(self) -> str:
        """Such as `prefill_b1_s512_kv512`, `chunk_b1_s512_kv1024_nologits`, `decode_b4_kv1024` or `encode_b1_s128`."""
        if self.phase == "function":
            return "function"
        length = f"_s{self.input_length}" if self.phase != "decode" else ""
        keys = f"_kv{self.attention_size}" if self.phase != "encode" else ""
        return f"{self.phase}_b{self.batch}{length}{keys}" + ("" if self.logits else "_nologits")

    @property
    def flag(self) -> str:
        """How the bucket is written on the command line."""
        return f"{'-db' if self.phase == 'decode' else '-pb'} {self.batch},{self.attention_size}"


@dataclass
class BucketRequest:
    """What the user asked for: (batch, length) pairs, the longest sequence, and the tokens of a chunk."""

    prefill: list[tuple[int, int]]
    decode: list[tuple[int, int]]
    max_length: int | None = None
    chunk: int | None = None


def parse_pairs(flag: str, texts: Sequence[str], problems: list[Problem]) -> list[tuple[int, int]]:
    """`["1,512"]` -> `[(1, 512)]`; appends a problem for each text that is not two positive integers."""
    pairs: list[tuple[int, int]] = []
    for text in texts:
        fields = [f.strip() for f in text.split(",")]
        if len(fields) != 2 or not all(f.isdecimal() for f in fields) or 0 in (numbers := [int(f) for f in fields]):
            why = "a bucket is two positive integers, BATCH,LENGTH"
            problems.append(Problem(f"{flag} {text!r} cannot be understood", why, f"write it as {flag} 1,512"))
            continue
        pairs.append((numbers[0], numbers[1]))
    return pairs


def choose(
    request: BucketRequest,
    kind: str,
    max_positions: int | None,
    problems: list[Problem],
    notes: list[str],
    timing_only: bool = False,
) -> list[BucketSpec]:
    """The programs to build for a model of `kind` (decoder or encoder).

    Without any bucket: one prefill and, for a decoder, one decode bucket of the longest sequence, or with a chunk size
    the chunks in place of the prefill bucket. A decoder needs both phases unless the artifact is for timing only.
    Appends every problem; what is merely needless (duplicates, buckets that nothing reaches) is left out with a note.
    """
    _check_lengths(request, kind, max_positions, problems)
    longest = request.max_length or min(DEFAULT_LENGTH, max_positions or DEFAULT_LENGTH)
    prefill, decode = list(request.prefill), list(request.decode)
    if kind == "encoder" and decode:
        notes.append("an encoder has no decode phase: the decode buckets are ignored")
        decode = []
    if not request.prefill and not request.decode:
        prefill = [] if request.chunk else [(1, longest)]
        decode = [(1, longest)] if kind == "decoder" else []
    elif kind == "decoder" and not timing_only:
        if not decode:
            fix = f"add a decode bucket, for example -db {prefill[0][0]},{longest}"
            problems.append(Problem("prefill buckets without a decode bucket", "the model could not generate", fix))
        if not prefill and not request.chunk:
            fix = f"add a prefill bucket, for example -pb 1,{min(decode[0][1], longest)}"
            problems.append(Problem("decode buckets without a prefill bucket", "no prompt could be read", fix))
    found: list[BucketSpec] = []
    phase: Phase = "prefill" if kind == "decoder" else "encode"
    for batch, length in prefill:
        found.append(BucketSpec(phase, batch, length, length))
    if request.chunk and kind == "decoder":
        prompt = request.max_length or max((length for _, length in decode), default=longest)
        found = _without_chunked(found, request.chunk, notes) + chunks(request.chunk, prompt)
    found += [BucketSpec("decode", batch, 1, length) for batch, length in decode]
    unique = list(dict.fromkeys(found))
    if len(unique) != len(found):
        notes.append("duplicate buckets are built once")
    if request.max_length is not None:
        unique = _reachable(unique, request.max_length, notes)
    _check_buckets(unique, request, max_positions, problems)
    return unique


def chunks(size: int, prompt: int) -> list[BucketSpec]:
    """The programs that read a prompt of up to `prompt` tokens in parts of `size`, one row at a time.

    The part that ends at `prompt` is always the last. All others exist twice: with the logits, for a prompt that ends
    there, and without.
    """
    out: list[BucketSpec] = []
    for start in range(0, prompt, size):
        end = min(start + size, prompt)
        phase: Phase = "chunk" if start else "prefill"
        out += [BucketSpec(phase, 1, end - start, end, logits) for logits in (True, False) if logits or end < prompt]
    return out


def _check_lengths(request: BucketRequest, kind: str, positions: int | None, problems: list[Problem]) -> None:
    longest, chunk = request.max_length, request.chunk
    flag = f"--max-seq-len-to-capture {longest}"
    if longest is not None and longest < 1:
        problems.append(Problem(flag, "a sequence has tokens", "use 1 or more"))
    elif longest is not None and positions is not None and longest > positions:
        problems.append(Problem(flag, f"the model has {positions} positions", f"use a length up to {positions}"))
    if chunk is None:
        return
    flag = f"--prefill-chunk-size {chunk}"
    limit = longest or max((s for _, s in request.decode), default=min(DEFAULT_LENGTH, positions or DEFAULT_LENGTH))
    if kind == "encoder":
        problems.append(Problem(flag, "an encoder reads a text at once", "leave it out"))
    elif chunk < 1:
        problems.append(Problem(flag, "a chunk has tokens", "use 1 or more, for example 1024"))
    elif chunk > limit:
        why = f"a prompt has at most {limit} tokens"
        fix = f"use up to {limit}, or raise --max-seq-len-to-capture"
        problems.append(Problem(flag, why, fix))


def _without_chunked(prefill: list[BucketSpec], chunk: int, notes: list[str]) -> list[BucketSpec]:
    """The prefill buckets up to a chunk: longer prompts are read in chunks, whatever their length."""
    for bucket in prefill:
        if bucket.input_length > chunk:
            notes.append(f"{bucket.flag} is left out: prompts of more than {chunk} tokens are read in chunks")
    return [b for b in prefill if b.input_length <= chunk]


def _reachable(buckets: list[BucketSpec], longest: int, notes: list[str]) -> list[BucketSpec]:
    """Without the buckets that nothing reaches: a shorter one with as many rows already holds the longest sequence."""
    kept: list[BucketSpec] = []
    for bucket in buckets:
        shorter = [
            b
            for b in buckets
            if (b.phase, b.batch) == (bucket.phase, bucket.batch)
            and longest <= b.attention_size < bucket.attention_size
        ]
        if shorter and bucket.phase != "chunk":
            notes.append(
                f"{bucket.flag} is left out: no sequence is longer than {longest} (--max-seq-len-to-capture), "
                f"and {shorter[0].flag} holds those"
            )
        else:
            kept.append(bucket)
    return kept


def _check_buckets(
    buckets: list[BucketSpec], request: BucketRequest, positions: int | None, problems: list[Problem]
) -> None:
    asked = request.prefill or request.decode
    too_long = [b for b in buckets if positions is not None and b.attention_size > positions] if asked else []
    for bucket in too_long:
        if bucket.logits and (bucket.batch, bucket.attention_size) in (*request.prefill, *request.decode):
            why = f"the model has {positions} positions"
            problems.append(Problem(f"bucket {bucket.flag} is too long", why, f"use a length up to {positions}"))
    for bucket in buckets:
        if bucket.phase == "decode" and bucket.attention_size < SHORTEST_DECODE:
            why = "a decode program holds at least one token of the prompt and the new one, so nothing reaches it"
            fix = f"use -db {bucket.batch},{SHORTEST_DECODE} or longer"
            problems.append(Problem(f"bucket {bucket.flag} is too short", why, fix))
    reach = max((b.attention_size for b in buckets if b.phase == "decode"), default=0)
    for bucket in buckets:
        if bucket.phase in ("prefill", "chunk") and bucket.logits and reach and bucket.attention_size > reach:
            why = f"the longest decode bucket holds {reach} tokens, so such prompts could not be continued"
            fix = f"add -db {bucket.batch},{bucket.attention_size}"
            what = f"bucket {bucket.flag}" if bucket.phase == "prefill" else f"chunk {bucket.name}"
            problems.append(Problem(f"{what} is longer than every decode bucket", why, fix))
    last = [b for b in buckets if b.phase in ("decode", "encode")]
    if request.max_length is not None and last and asked:
        holds = max(b.attention_size for b in last)
        if holds < request.max_length:
            flag = "-db" if last[0].phase == "decode" else "-pb"
            why = f"the longest {last[0].phase} bucket holds {holds}"
            fix = f"add {flag} 1,{request.max_length}, or use --max-seq-len-to-capture {holds}"
            problems.append(Problem(f"no bucket holds --max-seq-len-to-capture {request.max_length}", why, fix))
