"""`rngdc build --suggest-buckets FILE.csv`: buckets for requests of known lengths.

A program computes its whole bucket whatever part of it a request needs, so few long buckets waste work on padding and
many buckets cost build time and memory. The lengths are chosen exactly (dynamic programming over the distinct
lengths) for one bucket, two, ... until another one saves less than a twentieth of the work.
"""

from __future__ import annotations

import csv
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ir.errors import Problem, UserError

GRANULE = 64
"""Lengths are multiples of this: the slices of a processing element work on as many tokens at once."""
MOST = 8
WORTH = 0.05
"""A further bucket must save this part of the computed tokens."""
PROMPT_NAMES = ("prompt", "prompt_tokens", "input", "input_tokens", "input_length", "prompt_length")
OUTPUT_NAMES = (
    "output",
    "output_tokens",
    "completion",
    "completion_tokens",
    "generated",
    "output_length",
    "max_tokens",
)


@dataclass(frozen=True)
class Choice:
    """Bucket lengths, and the tokens that programs compute for each token that is needed."""

    lengths: list[int]
    overhead: float


@dataclass(frozen=True)
class Suggestion:
    """Buckets for a trace of requests."""

    requests: int
    longest: int
    prefill: Choice
    decode: Choice

    @property
    def flags(self) -> str:
        """As options of `rngdc build`."""
        flags = [f"-pb 1,{n}" for n in self.prefill.lengths] + [f"-db 1,{n}" for n in self.decode.lengths]
        return " ".join([*flags, f"--max-seq-len-to-capture {self.longest}"])

    def to_json(self) -> dict[str, object]:
        """The report of `--json`."""
        return {
            "requests": self.requests,
            "longest": self.longest,
            "prefill_buckets": [[1, n] for n in self.prefill.lengths],
            "decode_buckets": [[1, n] for n in self.decode.lengths],
            "prefill_overhead": self.prefill.overhead,
            "decode_overhead": self.decode.overhead,
            "flags": self.flags,
        }

    def lines(self) -> list[str]:
        """The report for people."""
        return [
            self.flags,
            "",
            f"{self.requests:,} requests, the longest of {self.longest:,} tokens",
            f"prefill computes {self.prefill.overhead:.2f} tokens for each token of a prompt",
            f"decode reads {self.decode.overhead:.2f} cache positions for each that is filled",
            "A batch above 1 (-db 4,...) serves several requests at once.",
        ]


def read_lengths(path: Path) -> NDArray[np.int64]:
    """[requests, 2] prompt and output lengths of a CSV file, with or without a header line. Raises UserError."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.reader(file) if any(field.strip() for field in row)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError([Problem(f"{path} cannot be read", str(error), "check the path")]) from error
    at, first = (0, 1), 1
    if rows and not all(field.strip().isdecimal() for field in rows[0][:2]):
        names = [field.strip().lower() for field in rows[0]]
        found = [next((i for i, n in enumerate(names) if n in wanted), -1) for wanted in (PROMPT_NAMES, OUTPUT_NAMES)]
        if -1 in found:
            why = f"its header has {', '.join(names)}"
            fix = "name the columns prompt and output (numbers of tokens)"
            raise UserError([Problem(f"{path} has no lengths", why, fix)])
        at, first, rows = (found[0], found[1]), 2, rows[1:]
    problems: list[Problem] = []
    lengths: list[tuple[int, int]] = []
    for number, row in enumerate(rows, first):
        fields = [row[i].strip() if i < len(row) else "" for i in at]
        if not all(f.isdecimal() for f in fields) or int(fields[0]) < 1:
            why = "a line has the tokens of a prompt (1 or more) and of its answer"
            problems.append(Problem(f"{path}:{number}: {','.join(row)!r}", why, "write it as 512,128"))
        else:
            lengths.append((int(fields[0]), int(fields[1])))
    if not lengths and not problems:
        problems.append(Problem(f"{path} has no requests", "it has no line of lengths", "write prompt,output a line"))
    if problems:
        raise UserError(problems[:20])
    return np.array(lengths, np.int64)


def suggest(lengths: NDArray[np.int64]) -> Suggestion:
    """Buckets for [requests, 2] prompt and output lengths."""
    prompts, outputs = lengths[:, 0], lengths[:, 1]
    reads: Counter[int] = Counter()
    needed = int(prompts.sum())
    for prompt in prompts.tolist():
        reads[_rounded(prompt)] += 1
    # A decode step with n tokens in the cache, the new one included, needs a bucket of n.
    steps: Counter[int] = Counter()
    filled = 0
    for prompt, output in lengths.tolist():
        for end in range(_rounded(prompt + 1), _rounded(prompt + output) + 1, GRANULE):
            inside = min(end, prompt + output) - max(end - GRANULE, prompt)
            steps[end] += max(0, inside)
        filled += sum(range(prompt + 1, prompt + output + 1))
    longest = int((prompts + outputs).max())
    steps[_rounded(longest)] += 0  # whatever a prefill bucket holds, a decode bucket must hold
    return Suggestion(len(lengths), longest, _choose(reads, needed), _choose(steps, filled or 1))


def _rounded(n: int) -> int:
    return -(-n // GRANULE) * GRANULE


def _choose(counts: Counter[int], needed: int) -> Choice:
    """The cheapest lengths for `counts` programs of each length; cost: programs times bucket length."""
    sizes = sorted(counts)
    runs = np.concatenate([[0], np.cumsum([counts[s] for s in sizes])])
    n = len(sizes)
    # best[j]: cost of the first j sizes with the buckets so far; the last bucket ends at size j.
    best = np.array([0.0, *[np.inf] * n])
    cuts: list[NDArray[np.int64]] = []
    chosen: tuple[float, list[int]] = (np.inf, [])
    for used in range(1, min(MOST, n) + 1):
        cost = best[:, None] + (runs[None, 1:] - runs[:, None]) * np.array(sizes, np.float64)[None, :]
        cost = np.where(np.arange(n + 1)[:, None] <= np.arange(n)[None, :], cost, np.inf)
        cuts.append(np.argmin(cost, axis=0))
        best = np.concatenate([[np.inf], cost.min(axis=0)])
        if best[n] >= chosen[0] * (1 - WORTH):
            break
        at, picked = n, list[int]()
        for level in range(used - 1, -1, -1):
            picked.append(sizes[at - 1])
            at = int(cuts[level][at - 1])
        chosen = (float(best[n]), picked[::-1])
    return Choice(chosen[1], chosen[0] / needed)
