"""Buckets: the sizes that programs are built for. Parsing, defaults, and every check that needs no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ir.errors import Problem

DEFAULT_LENGTH = 2048
Phase = Literal["prefill", "decode", "encode", "function"]


@dataclass(frozen=True)
class BucketSpec:
    """A program's sizes: `batch` rows of `input_length` tokens that see up to `attention_size` tokens each."""

    phase: Phase
    batch: int
    input_length: int
    attention_size: int

    @property
    def name(self) -> str:
        """Such as `prefill_b1_s512_kv512`, `decode_b4_kv1024` or `encode_b1_s128`; `function` for a single function."""
        if self.phase == "function":
            return "function"
        length = f"_s{self.input_length}" if self.phase != "decode" else ""
        keys = f"_kv{self.attention_size}" if self.phase in ("prefill", "decode") else ""
        return f"{self.phase}_b{self.batch}{length}{keys}"

    @property
    def flag(self) -> str:
        """How the bucket is written on the command line."""
        return f"{'-db' if self.phase == 'decode' else '-pb'} {self.batch},{self.attention_size}"


@dataclass
class BucketRequest:
    """What the user asked for: (batch, length) pairs."""

    prefill: list[tuple[int, int]]
    decode: list[tuple[int, int]]


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

    Without any request: one prefill and, for a decoder, one decode bucket of the model's positions, at most 2,048.
    A decoder needs both phases unless the artifact is for timing only. Appends every problem; duplicates only make a
    note.
    """
    longest = min(DEFAULT_LENGTH, max_positions or DEFAULT_LENGTH)
    prefill, decode = list(request.prefill), list(request.decode)
    if not prefill and not decode:
        prefill = [(1, longest)]
        decode = [(1, longest)] if kind == "decoder" else []
    elif kind == "decoder" and not timing_only:
        if not decode:
            fix = f"add a decode bucket, for example -db {prefill[0][0]},{longest}"
            problems.append(Problem("prefill buckets without a decode bucket", "the model could not generate", fix))
        if not prefill:
            fix = f"add a prefill bucket, for example -pb 1,{min(decode[0][1], longest)}"
            problems.append(Problem("decode buckets without a prefill bucket", "no prompt could be read", fix))
    if kind == "encoder" and decode:
        notes.append("an encoder has no decode phase: the decode buckets are ignored")
        decode = []
    found: list[BucketSpec] = []
    for batch, length in prefill:
        phase: Phase = "prefill" if kind == "decoder" else "encode"
        found.append(BucketSpec(phase, batch, length, length))
    found += [BucketSpec("decode", batch, 1, length) for batch, length in decode]
    unique = list(dict.fromkeys(found))
    if len(unique) != len(found):
        notes.append("duplicate buckets are built once")
    for bucket in unique:
        if max_positions is not None and bucket.attention_size > max_positions:
            why = f"the model has {max_positions} positions"
            problems.append(Problem(f"bucket {bucket.flag} is too long", why, f"use a length up to {max_positions}"))
    reach = max((b.attention_size for b in unique if b.phase == "decode"), default=0)
    for bucket in unique:
        if bucket.phase == "prefill" and reach and bucket.attention_size > reach:
            why = f"the longest decode bucket holds {reach} tokens, so such prompts could not be continued"
            fix = f"add -db {bucket.batch},{bucket.attention_size}"
            problems.append(Problem(f"bucket {bucket.flag} is longer than every decode bucket", why, fix))
    return unique
