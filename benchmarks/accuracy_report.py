"""The text of docs/accuracy.md around its rows."""

from __future__ import annotations

from collections.abc import Sequence

from accuracy_rows import Row, mean_error, number, rank_correlation

HEAD = """# Accuracy of the timing model

Written by `python benchmarks/accuracy.py`. Predictions are of the simulator, measurements are published ones with the
vendor's own code (hardware.md 5.3 to 5.7 and 7.4, reference-product.md 9.3; letters are its sources).

## Documented mode

Every worked case of hardware.md 5.2 is an exact test (`tests/backend/test_formulas.py`), and the same formulas are
tested at other parameters (`tests/backend/test_worked_cases.py`). What the model cannot say of them:

* Case 27 (sum over a cluster) is exact as a closed form; no instruction of ours uses the inter-slice reducer.
* Transposes (14 to 19) are closed forms; no instruction of ours uses the transpose engine, so programs never pay them.
* Case 6: reads of 24 B exist in the older book only. The closed form takes them, a fetch of ours reads 1 to 32 B in
  powers of two.

## Time bases

* Ticks of the on-device profiler are halved to cycles of 1 GHz (hardware.md 1.2: 2.0 GHz core clock assumed; KK, ED).
* The card of source HP ran at 1.6 GHz under load (1,599.9 MHz, measured), so its tensor clock was 0.8 of the nominal
  one while HBM kept its speed. Its figures are predicted with `Machine.at_clock(0.8)`. Figures of the profiler (5.6,
  the shards of gate_up and lm_head, 1.4) are ticks at 2 GHz: compared as two ticks a cycle. Layers from traces of
  programs (388.9 us, 46.9 us, steps of set B) are true us. What supports this: read as true us, lm_head would have
  moved more than the HBM's peak; read as ticks, the four one-token rows are met by one engine's rate that other cards
  showed as well.
* Static-schedule cycles are cycles of 1 GHz. They are what the vendor's compiler expects, not what silicon took.
* Whole steps of LENS and of sets A and B contain the host, about 1.07 ms a step (arithmetic of reference-product.md
  9.4); predictions are of the device alone and the host's part is added where a row says so.

A bound is what no mapping can beat at documented peaks: max(MACs / 16,384 a PE and cycle, minimal bytes / 1,536 GB/s of
HBM, minimal bytes / 256 B a PE's data memory and engine). Minimal bytes are weights, cached tokens, inputs and results,
each once.

The column *gap* is a rule's word, not a proof: a predicted row that is more than 5 % off is *mapping* where ours takes
longer than theirs (with how busy our contexts are and the bytes we move for each of the least), *model* where it judges
and both are within 1.35 of the bound. Where it is *mapping*, an error of the model in the same row is not seen. Rows of
one-PE norms and gates are whole programs of ours, with loads and stores of their operands; whether the measured ones
contain those is not published.
"""


def table(rows: Sequence[Row]) -> list[str]:
    """Markdown of one group."""
    lines = [
        "| figure | source | predicted us | measured us | error | judges | bound us | ours / theirs over it | gap |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        bound = f"{number(r.bound)} ({r.binds})" if r.bound else ""
        over = f"{r.prediction / r.bound:.2f} / {r.measured / r.bound:.2f}" if r.bound else ""
        judges = "yes" if r.judges else ""
        lines.append(
            f"| {r.name} | {r.source} | {number(r.prediction)} | {number(r.measured)} | {r.error:+.1%} | {judges} "
            f"| {bound} | {over} | {r.cause} |"
        )
    return lines


def summary(rows: Sequence[Row]) -> list[str]:
    """The figures of merit with their targets."""
    fitted = [r for r in rows if r.kind == "fitted"]
    static = [r for r in rows if r.kind == "static"]
    predicted = [r for r in rows if r.kind == "predicted"]
    judging = [r for r in predicted if r.judges]
    few = [r for r in judging if "2,048" not in r.name]
    many = [r for r in judging if "2,048" in r.name]
    return [
        "| rows | number | mean absolute error | target |",
        "|---|---|---|---|",
        f"| fitted, silicon | {len(fitted)} | {mean_error(fitted):.1%} | 10 % |",
        f"| static schedule | {len(static)} | {mean_error(static):.1%} | |",
        f"| judging the model | {len(judging)} | {mean_error(judging):.1%} | 15 % |",
        f"| ... one token (HBM-bound) | {len(few)} | {mean_error(few):.1%} | |",
        f"| ... 2,048 tokens (compute-bound) | {len(many)} | {mean_error(many):.1%} | |",
        f"| all predicted | {len(predicted)} | {mean_error(predicted):.1%} | |",
        "",
        f"Rank correlation (Spearman): {rank_correlation(rows):.3f} over all {len(rows)} rows, "
        f"{rank_correlation(predicted):.3f} over the predicted ones; target 0.98.",
    ]


TAIL = """## How transfers are modelled, and what was fitted

`python benchmarks/fit_silicon.py` prints values, ranges and residuals; `backend_rngd/machine/rngd.toml` holds both.

* *Run length.* Long runs a slice are slow (30,720 B: 465 B a tick; 256 B: 618 to 652). No power law is fitted. 32
  slices share a data-memory network of 128 B a cycle (documented), and an engine has some 10 KB on the way (fitted,
  `dmn_window_bytes`): while a burst to one network is longer than that, the other network of the pair idles, and an
  engine falls from its 177 B a cycle towards 128.
* *One engine's HBM rate*, `dma_hbm_bytes_per_cycle`, 177 GB/s: ED's 707 B a tick are eight of them, KK's best 332 B a
  tick of one cluster four, HP's 219 GB/s one at a clock of 0.8, and KK's 45 k ticks of a load to 512 slices one. So no
  further cap of a cluster is needed: 262 to 332 B a tick are four engines with the longest and the shortest runs.
* *Lines.* A request across a 256 B line is two (documented): that is the 29.5 MB stream of 1,920 B runs. Runs of 128 B
  move twice the lines. Both need no factor of their own any more.
* *Channels.* The published address map says which of 32 channels a line lies in; a transfer takes as long as its
  busiest channel. Stores of parts of a line read, modify and write it, 50 times as long: 64 x 120 B lie in 30 lines.
* *Rows.* A bank that opens a row for every request holds its channel (the 655,860 cycles of the book's example follow
  from its addresses). HBM's scheduler hides most others, and so does the model (64 requests a channel are reordered).
* *Reduction over both clusters.* Theirs (7.2) as instructions of ours: partial sums to HBM, a sync, both loaded to all
  512 slices by one engine as 5.3 measured it, an addition. Our compiler reads peers' data memory and is faster.

## What is missing

* 5.5 (Gemma-4 kernels) and 5.3's `mnist::forward` and example kernels: the programs are not ours to build.
* StoTab, StoVrf and the replicating copy of data memory (106 cycles a slice): no instruction of ours does what was
  measured.
* "Half of the networks is 1.66 times slower" (KK): the model says 1.3.
* First tokens of sets A and B and of LENS at the client: host work and prefix caches are in them.
* The launch skew of the two clusters, 0.3 to 14 k cycles at random a launch, is a parameter that is 0
  (`--set launch_skew_cycles=4000`). An engine of ours is a PE's; that the vendor's transfers of a whole cluster never
  overlap (KK, ED) says nothing of it.
"""


def report(rows: Sequence[Row], seconds: float) -> str:
    """docs/accuracy.md."""
    parts = [HEAD, "## Silicon mode: summary", "", *summary(rows), ""]
    titles = {
        "fitted": "## Instruction level, silicon (parameters may be fitted on these)",
        "static": "## Instruction level, the vendor compiler's static schedule",
        "predicted": "## Predicted: layers, whole models, steps (never fitted)",
    }
    for kind, title in titles.items():
        parts += [title, "", *table([r for r in rows if r.kind == kind]), ""]
    worst = sorted((r for r in rows if abs(r.error) > 0.25), key=lambda r: -abs(r.error))
    parts += ["## Misses above 25 %", "", *[f"* {r.name}: {r.error:+.0%}. {r.cause}" for r in worst], ""]
    return "\n".join([*parts, TAIL, f"Made in {seconds:.0f} s on one core.", ""])
