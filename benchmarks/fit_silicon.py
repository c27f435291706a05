"""Fits the transfer parameters of silicon mode to instruction-level measurements: prints value, range and residuals.

    python benchmarks/fit_silicon.py

Every row is simulated as `benchmarks/accuracy.py` does it. One parameter at a time runs through a grid while the others
stay as in rngd.toml; its range is what leaves the mean absolute relative error within a tenth of the best (not the root
mean square: one stream that the model misses by a quarter would decide).
Layers and whole models are never used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from accuracy_bases import HP_CLOCK, SILICON, ticks
from accuracy_instructions import MB15, STREAMS, load, replicated

from backend_rngd.machine import Machine

HP_LOAD = 7168 * 64 * 256 / 219e3  # us, one PE


@dataclass(frozen=True)
class Figure:
    """A measurement in us of a profiler with 2 ticks a cycle, and how it is predicted."""

    name: str
    measured: float
    predict: Callable[[Machine], float]


def figures() -> list[Figure]:
    """All measured transfers whose geometry is known."""
    out: list[Figure] = []

    def add(name: str, measured: float, runs: int, run: int, commands: int, units: int, clock: float = 1.0) -> None:
        def predict(machine: Machine) -> float:
            machine = machine.at_clock(clock) if clock != 1.0 else machine
            return load(runs, run, commands, units, machine).cycles / 1e3

        out.append(Figure(name, measured, predict))

    for name, runs, run, commands, count, _ in STREAMS:
        add(name, ticks(count), runs, run, commands, 8)
    add("one cluster, runs of 256 B", ticks(MB15 / 332), 240, 256, 1, 4)
    add("one cluster, a run of 61,440 B", ticks(MB15 / 262), 1, 61_440, 1, 4)
    add("one PE, 117 MB", HP_LOAD, 7168, 256, 1, 1, HP_CLOCK)
    out.append(Figure("7.5 KB to 512 slices", ticks(45_000), lambda machine: replicated(7680, machine) / 1e3))
    return out


GRIDS: dict[str, list[float]] = {
    "dma_hbm_bytes_per_cycle": list(range(160, 201)),
    "hbm_efficiency": [0.8 + 0.01 * i for i in range(21)],
    "dmn_window_bytes": [256 * i for i in (1, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 128, 192)],
    "dma_startup_cycles": list(range(500, 2001, 50)),
}


def errors(machine: Machine, rows: list[Figure]) -> np.ndarray:
    """Relative errors."""
    return np.array([f.predict(machine) / f.measured - 1 for f in rows])


def fit(name: str, rows: list[Figure]) -> tuple[float, float, float]:
    """Best value of a parameter and the ends of its range."""
    grid = np.array(GRIDS[name])
    mean = [float(np.abs(errors(SILICON.model_copy(update={name: value}), rows)).mean()) for value in grid.tolist()]
    near = grid[np.array(mean) <= 1.1 * min(mean)]
    return float(grid[int(np.argmin(mean))]), float(near.min()), float(near.max())


def main() -> None:
    """Print the fits and the residuals of rngd.toml's values."""
    rows = figures()
    for name in GRIDS:
        best, low, high = fit(name, rows)
        parameter = SILICON.parameters[name]
        print(f"{name}: best {best:g} [{low:g}, {high:g}], in rngd.toml {getattr(SILICON, name):g} {parameter.range}")
    residuals = errors(SILICON, rows)
    for figure, error in zip(rows, residuals, strict=True):
        print(f"  {error:+7.1%}  {figure.name}")
    print(f"  mean absolute {np.abs(residuals).mean():.1%}")


if __name__ == "__main__":
    main()
