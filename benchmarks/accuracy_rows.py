"""Rows of docs/accuracy.md: what was measured and what the simulator says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from runtime_sim.timing import TimingResult


@dataclass(frozen=True)
class Row:
    """One figure. Times in us.

    kind: fitted (instruction level, silicon), static (of the vendor compiler's schedule, instruction level) or
    predicted. judges: the mapping matters little. bound: no mapping can be faster (0: none is meant). binds: what
    bounds. traffic: HBM bytes our program moves for each it must. note: where a gap comes from, as far as known.
    busy: shares of our makespan in which main and dma contexts work.
    """

    name: str
    kind: str
    source: str
    prediction: float
    measured: float
    judges: bool = False
    bound: float = 0.0
    binds: str = ""
    traffic: float = 0.0
    note: str = ""
    busy: str = ""

    @property
    def error(self) -> float:
        """Relative to the measurement."""
        return self.prediction / self.measured - 1

    @property
    def cause(self) -> str:
        """Mapping or model: what the distances of both from the bound can tell."""
        if self.note or abs(self.error) < 0.05:
            return self.note
        if self.kind != "predicted":
            return "model"
        if not self.bound:
            return ""
        ours, theirs = self.prediction / self.bound, self.measured / self.bound
        if theirs < 1:
            return "measurement is below the bound: its time base or its bytes are other than ours"
        if self.judges and ours < 1.35 and theirs < 1.35:
            return "model: both run near the bound"
        if self.error > 0:
            moved = f"{self.traffic:.1f}x the least bytes" if self.traffic else ""
            hints = "; ".join(h for h in (self.busy, moved) if h)
            return f"mapping ({hints})" if hints else "mapping"
        return "faster than theirs: their mapping or the model, cannot be told apart"


def busy(result: TimingResult) -> str:
    """How much of the makespan the slowest unit's contexts have work."""
    shares = result.stalls[result.slowest]
    return ", ".join(f"{c} busy {shares[c]['busy'] / result.cycles:.0%}" for c in ("main", "dma"))


def mean_error(rows: Sequence[Row]) -> float:
    """Mean absolute relative error."""
    return float(np.mean([abs(r.error) for r in rows])) if rows else 0.0


def rank_correlation(rows: Sequence[Row]) -> float:
    """Spearman's, of predictions and measurements."""

    def ranks(values: list[float]) -> np.ndarray:
        array = np.array(values)
        return np.array([(array < v).sum() + ((array == v).sum() - 1) / 2 for v in array], float)

    return float(np.corrcoef(ranks([r.prediction for r in rows]), ranks([r.measured for r in rows]))[0, 1])


def number(us: float) -> str:
    """Four significant digits."""
    return f"{us:,.0f}" if us >= 1000 else f"{us:.4g}"
