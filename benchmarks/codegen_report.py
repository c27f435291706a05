"""The text of docs/performance.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace

PEAK = 1.5e12  # B/s of HBM that the target of the utilisation is a share of
UTILISATION = 0.92
SEARCH_COLD, SEARCH_WARM = 20.0, 2.0  # seconds
WORDS = {
    "busy_main": "main passes at work",
    "busy_sub": "sub passes at work",
    "busy_dma": "transfers at work",
    "issue": "issue and start-up",
    "wait_sync": "notifies on the way",
    "contention_hbm": "HBM shared with other units",
    "contention_dm": "data-memory ports shared",
    "contention_link": "way between clusters shared",
    "contention_card": "links of cards shared",
}


@dataclass(frozen=True)
class Cost:
    """Of an operation: macs and HBM bytes over all units; on one unit passes, transfers, bytes of these, and cycles in
    which they are at work (issue included)."""

    macs: float = 0.0
    hbm_bytes: float = 0.0
    passes: float = 0.0
    transfers: float = 0.0
    moved_bytes: float = 0.0
    pass_cycles: float = 0.0
    transfer_cycles: float = 0.0

    def scaled(self, factor: float) -> Cost:
        """All parts times `factor`."""
        return Cost(*(x * factor for x in astuple(self)))

    def plus(self, other: Cost) -> Cost:
        """The sum of two."""
        return Cost(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class Loss:
    """An operation on the critical path: cycles by cause, costs. `own`: of the layer, not of a module in it.

    In us: `lost` beyond `ideal`, the time of its own work at the peak of what bounds the row; `us` of a cycle.
    """

    name: str
    causes: dict[str, float]
    cost: Cost
    lost: float = 0.0
    ideal: float = 0.0
    us: float = 0.0

    @property
    def cycles(self) -> float:
        """On the critical path."""
        return sum(self.causes.values())

    def plus(self, other: Loss) -> Loss:
        """The same operation in another layer or chunk."""
        causes = {k: v + other.causes.get(k, 0.0) for k, v in self.causes.items()}
        return replace(self, causes=causes, cost=self.cost.plus(other.cost))

    def against(self, binds: str, rate: float, us: float) -> Loss:
        """With what was lost; `rate`: of all units, in macs or bytes a cycle."""
        ideal = (self.cost.macs if binds == "compute" else self.cost.hbm_bytes) / rate * us
        return replace(self, lost=self.cycles * us - ideal, ideal=ideal, us=us)

    def short(self) -> str:
        """For the table: operation and the cause with most cycles."""
        if not self.causes:
            return f"{self.name} {number(self.lost)} us"
        return f"{self.name} {number(self.lost)} us ({WORDS[max(self.causes, key=lambda k: self.causes[k])]})"

    def sentence(self) -> str:
        """In terms of instructions."""
        if not self.causes:
            return f"{self.name}: {number(self.lost)} us."
        shares = sorted(((v, k) for k, v in self.causes.items() if v > 0.05 * self.cycles), reverse=True)
        on_path = ", ".join(f"{WORDS[k]} {v / self.cycles:.0%}" for v, k in shares)
        c, parts = self.cost, list[str]()
        if c.passes >= 0.5:
            parts.append(f"{c.passes:,.0f} passes of {c.pass_cycles / c.passes:,.0f} cycles")
        if c.transfers >= 0.5:
            rate = c.moved_bytes / c.transfer_cycles if c.transfer_cycles else 0.0
            parts.append(
                f"{c.transfers:,.0f} commands of the DMA queue, {c.moved_bytes / c.transfers / 1024:,.0f} KB each "
                f"at {rate:,.0f} B a cycle"
            )
        return (
            f"`{self.name}` is {number(self.cycles * self.us)} us of the critical path ({on_path}), "
            f"{number(self.lost)} us more than its work at the peak; a PE executes {' and '.join(parts)} for it."
        )


@dataclass(frozen=True)
class Row:
    """A figure. Times in us by mode (`slow`: silicon at the vendor's clock); of the utilisation: bytes a second.

    losses: sorted. sustained: share of HBM's peak that transfers get in silicon mode. inside: of attention, us in the
    layer.
    """

    name: str
    vendor: float | None
    target: float | None
    times: dict[str, float]
    bounds: dict[str, tuple[float, str]]
    losses: list[Loss] = field(default_factory=list[Loss])
    sustained: float = 1.0
    inside: float | None = None
    rate: bool = False

    @staticmethod
    def utilisation(moved: dict[str, float], step: Row) -> Row:
        """Of HBM in a decode step, `moved` bytes a second."""
        bounds = {mode: (PEAK, "HBM") for mode in moved}
        return Row(
            "HBM in a decode step, batch 1",
            None,
            UTILISATION * PEAK,
            moved,
            bounds,
            step.losses,
            rate=True,
        )

    @property
    def verdict(self) -> str:
        """Whether the silicon mode meets the target."""
        if self.target is None:
            return "no target"
        time = self.times["silicon"]
        return "met" if (time >= self.target if self.rate else time <= self.target) else "missed"

    def share(self, mode: str) -> float:
        """Of the bound."""
        time, bound = self.times[mode], self.bounds[mode][0]
        return time / bound if self.rate else bound / time

    def value(self, amount: float | None) -> str:
        """us, or a share of the bandwidth."""
        if amount is None:
            return "-"
        return f"{amount / PEAK:.0%}" if self.rate else number(amount)


HEAD = """# Performance of generated code

Written by `python benchmarks/codegen.py`{level}: predictions of the timing simulator for Llama-3.1-8B in bf16, TP 8 on
one card, from fresh builds of its config. Times in us. Nothing here was measured on a card by us.

* **vendor**: measured with the vendor's compiler (hardware.md 5.6, 5.7; set C, source HP). Its card ran at
  {clock:.0%} of the nominal clock; **at its clock** is our time on such a card, the others are at the nominal clock
  that the targets mean.
* **bound**: the longest of multiplications at the peak, least bytes at the peak of HBM, and the same bytes through the
  ports of data memory. **of bound**: bound by time.
* *Dense part of a layer*: the cycles that the critical path of the whole program spends in a layer's operations other
  than attention and cache updates; mean of the layers but the first and the last. All chunks of a prompt count. Dense
  part and attention sum to what a layer adds to the program.
* *Attention* is a program of its own, so that nothing hides it; *in the layer* is what it adds to the critical path.
* **lost most**: operations by cycles of the critical path beyond what their own work takes at the peak of the resource
  that binds; these differences and the surplus of work over the least sum to time minus bound. In brackets: what most
  of the path's cycles there are.
"""

SEARCH = """## Time of the mapping

Every distinct function of a program is mapped once, and all layers share it: the time does not grow with the depth.
Four programs of the 8B model on one core: mapping {mapping:.1f} s cold (at most {cold:.0f} s), {warm_mapping:.1f} s
from the cache (at most {warm:.0f} s). All of the backend: {backend:.1f} s and {warm_backend:.1f} s. With capture:
{total:.1f} s and {warm_total:.1f} s.
"""


def number(us: float) -> str:
    """Three significant digits, none cut off in front of the point."""
    return f"{us:,.0f}" if abs(us) >= 100 else f"{us:.1f}"


def report(rows: Sequence[Row], cold: Mapping[str, float], warm: Mapping[str, float], level: int) -> str:
    """docs/performance.md."""
    from accuracy_bases import HP_CLOCK

    from rngdc.effort import DEFAULT

    text = [HEAD.format(level="" if level == DEFAULT else f" -O {level}", clock=HP_CLOCK)]
    for mode in ("silicon", "documented"):
        text += _table(rows, mode)
    text.append("## Where the time goes\n")
    for row in rows:
        if row.rate:
            continue
        lines = [f"### {row.name}: {row.verdict}\n"]
        if row.inside is not None:
            lines.append(f"In the layer it adds {number(row.inside)} us.")
        excess = row.times["silicon"] - row.bounds["silicon"][0]
        lines.append(f"{number(excess)} us above the bound ({row.bounds['silicon'][1]}).")
        if row.bounds["silicon"][1] == "HBM":
            limit = number(row.bounds["silicon"][0] / row.sustained)
            lines.append(f"Transfers get {row.sustained:.0%} of the peak of HBM in this mode: {limit} us at the least.")
        lines += [loss.sentence() for loss in row.losses[:3] if loss.lost > 0]
        text.append("\n".join(lines) + "\n")
    text.append(
        SEARCH.format(
            mapping=cold["mapping"], warm_mapping=warm["mapping"], backend=cold["backend"], cold=SEARCH_COLD,
            warm=SEARCH_WARM, warm_backend=warm["backend"], total=cold["total"], warm_total=warm["total"],
        )
    )  # fmt: skip
    return "\n".join(text)


def _table(rows: Sequence[Row], mode: str) -> list[str]:
    silicon = mode == "silicon"
    names = ["work", "vendor", "target", "bound", "time", "of bound"]
    names += ["at its clock", "", "lost most"] if silicon else []
    lines = [f"## In {mode} mode\n", _line(names), "|" + "---|" * len(names)]
    for row in rows:
        bound, binds = row.bounds[mode]
        cells = [row.name, row.value(row.vendor), row.value(row.target), f"{row.value(bound)} {binds}"]
        cells += [row.value(row.times[mode]), f"{row.share(mode):.0%}"]
        if silicon:
            most = "; ".join(loss.short() for loss in row.losses[:3] if loss.lost > 0)
            cells += [row.value(row.times["slow"]), row.verdict, "" if row.rate else most]
        lines.append(_line(cells))
    return [*lines, ""]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
