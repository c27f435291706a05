"""The text of docs/scaling.md."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

MEASURED = {2: (3.67, 1.98), 8: (49.97, 65.11)}  # us after down_proj, after o_proj (hardware.md 7.4, HP)
LAYERS = 32  # of the 8B model


@dataclass(frozen=True)
class Point:
    """One bucket of one model on one arrangement. Shares are of the time of one run through all stages.

    step_seconds: between two results when every stage always has work (several sequences in flight). hbm_share: of the
    cards' peak. hbm_bytes_per_pe: bytes a second that a PE reads and writes, of the busiest. dm_share: of the port of
    a PE's data memory, of the busiest. dm_bytes: of every slice, of 512 KB. card_bytes: in HBM of the fullest card.
    """

    model: str
    bucket: str
    tensor: int
    pipeline: int
    cards: int
    seconds: float
    step_seconds: float
    collective_share: float
    hbm_share: float
    hbm_bytes_per_pe: float
    dm_share: float
    dm_bytes: int
    card_bytes: int
    fits: bool
    exact: dict[str, Any]


@dataclass(frozen=True)
class Failure:
    """A program that was not built, and why."""

    model: str
    bucket: str
    tensor: int
    why: str


HEAD = """# Scaling over processing elements and cards

Written by `python benchmarks/scaling.py`: predictions of the timing simulator in {mode} mode, not measurements.
Batch 1. Decode is one token against 1,024 cached ones, prefill is 1,024 tokens. TP: PEs that share every layer. PP:
stages of layers, each on a group of PEs of its own. Groups lie on neighbouring PEs, eight to a card.

* **ms**: one pass through all stages. **speed-up**: against TP 1, PP 1. **ms a step**: between two results when every
  stage always has work (as many sequences in flight as there are stages).
* **collectives**: share of the time that the critical path spends in transfers between units, notifies, waits for
  other units, and the passes that a collective was lowered to.
* **HBM**: share of the peak of all cards in use (1.54 TB/s each). **GB/s a PE**: of HBM, by the busiest PE. **DM
  port**: share of the 256 B a cycle that a PE's data memory moves, transfers of its peers included, of the busiest.
  **DM**: the largest part of a slice in use, of 512 KB.
* **GB a card**: weights, constants, caches and temporaries on the fullest card, of 51.0 GB. Where it says **too
  much** the arrangement cannot be loaded; its times say what it would take.
"""

COLUMNS = (
    "TP", "PP", "cards", "ms", "speed-up", "ms a step", "collectives", "HBM", "GB/s a PE", "DM port", "DM", "GB a card",
)  # fmt: skip

SUMS = """## All-reduce of 8 KB

One token of 4,096 bf16 features, in us.

* *in a program*: a row-parallel contraction, its all-reduce and the residual addition, less the same without the
  all-reduce, for the widths of `down_proj` (14,336 features) and `o_proj` (4,096).
* *closed form*: what the lowering chooses an algorithm by.
* *measured*: hardware.md 7.4 (source HP) with the vendor's compiler, after `down_proj` and after `o_proj`.

| PEs | in a program | closed form | measured |
|---|---|---|---|
"""

NOTE = """Two PEs are in one cluster; the prediction lies {place} the two measured values. On eight PEs the measured
reduction is {factor:.0f} times slower than ours. It is another algorithm: the vendor's compiler crosses between the
clusters through HBM with a synchronisation on either side (hardware.md 7.2), and the figure contains the skew between
the clusters' launches. Ours reads the other cluster's data memory at 128 B a cycle and takes 600 cycles for a notify;
the first is chosen, the second comes from a static schedule (`backend_rngd/machine/rngd.toml`), neither is measured.
Until they are, times at TP 8 and above are lower bounds in this respect: with the measured sums, decoding 8B at TP 8
would take {longer:.1f} ms longer.
"""

WHOLE = """## Beside measured whole models

On one card at TP 8 with the vendor's compiler (hardware.md 5.7), batch 1, bf16: decoding Llama-3.1-8B takes 15.19 ms a
token at 1,024 cached ones (source LENS; host time included), predicted {decode} ms. The layers of its prefill of 1,024
tokens sum to about 86 ms (source HP), predicted {prefill} ms. These are two compilers: the gap holds their mappings as
well as the model's error.
"""


def milliseconds(seconds: float) -> str:
    """Three significant digits."""
    value = seconds * 1e3
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def row(cells: Sequence[str]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def table(points: Sequence[Point], failures: Sequence[Failure]) -> list[str]:
    """One model and bucket."""
    lines = [row(COLUMNS), "|" + "---|" * len(COLUMNS)]
    base = next((p for p in points if p.tensor == 1 and p.pipeline == 1), None)
    for p in points:
        lines.append(
            row(
                [
                    str(p.tensor),
                    str(p.pipeline),
                    str(p.cards),
                    milliseconds(p.seconds),
                    f"{base.seconds / p.seconds:.2f}x" if base else "-",
                    milliseconds(p.step_seconds) if p.pipeline > 1 else "",
                    f"{p.collective_share:.1%}",
                    f"{p.hbm_share:.0%}",
                    f"{p.hbm_bytes_per_pe / 1e9:.0f}",
                    f"{p.dm_share:.0%}",
                    f"{p.dm_bytes / 1024:.0f} KB",
                    f"{p.card_bytes / 1e9:.1f}" + ("" if p.fits else " **too much**"),
                ]
            )
        )
    lines += [row([str(f.tensor), "", "", f"not built: {f.why}", *[""] * 8]) for f in failures]
    return lines


def report(points: Sequence[Point], failures: Sequence[Failure], sums: Sequence[dict[str, Any]], mode: str) -> str:
    """docs/scaling.md."""
    lines = [HEAD.format(mode=mode)]
    for name in dict.fromkeys([p.model for p in points] + [f.model for f in failures]):
        for phase, title in (("decode", "decode, one token"), ("prefill", "prefill, 1,024 tokens")):
            chosen = [p for p in points if p.model == name and p.bucket == phase]
            failed = [f for f in failures if f.model == name and f.bucket == phase]
            lines += [f"## {name}: {title}", "", *table(chosen, failed), ""]
    text = SUMS
    for entry in sums:
        seen = MEASURED.get(entry["units"])
        both = f"{entry['down_proj'] * 1e6:.2f}, {entry['o_proj'] * 1e6:.2f}"
        measured = f"{seen[0]}, {seen[1]}" if seen else "-"
        text += row([str(entry["units"]), both, f"{entry['closed_form'] * 1e6:.2f}", measured]) + "\n"
    two, eight = (next(e for e in sums if e["units"] == n) for n in (2, 8))
    inside = min(MEASURED[2]) <= two["down_proj"] * 1e6 <= max(MEASURED[2])
    ours = (eight["down_proj"] + eight["o_proj"]) * 1e6
    note = NOTE.format(
        place="between" if inside else "outside",
        factor=sum(MEASURED[8]) / ours,
        longer=LAYERS * (sum(MEASURED[8]) - ours) / 1e3,
    )
    whole = {p.bucket: p for p in points if (p.model, p.tensor, p.pipeline) == ("Llama-3.1-8B", 8, 1)}
    if len(whole) == 2:
        note += "\n" + WHOLE.format(**{phase: milliseconds(p.seconds) for phase, p in whole.items()})
    return "\n".join([*lines, text, note])
