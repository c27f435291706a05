"""Fits the transfer parameters of silicon mode to instruction-level measurements: prints value, range and residuals.

    python benchmarks/fit_silicon.py

Least squares of the relative error over the HBM-to-DM streams of hardware.md 5.4 (ED, KK), in cycles of 1 GHz (ticks
halved). Ranges are what leaves the root mean square within a tenth of the best. Layers and whole models are never used.
"""

from __future__ import annotations

import numpy as np

MB = 512 * 30_720
# (runs, bytes a run, commands, cycles), all into 512 slices
STREAMS = {
    "o_weight, 256 B": (120, 256, 1, 24_142 / 2),
    "KK, 256 B": (120, 256, 1, MB / 618 / 2),
    "KK, 2,048 B": (15, 2_048, 1, MB / 547 / 2),
    "down, 3,840 B": (15, 3_840, 1, 54_000 / 2),
    "k and v, 15,360 B": (1, 15_360, 2, 32_432 / 2),
    "KK, 30,720 B": (1, 30_720, 1, MB / 465 / 2),
}
OFF_LINE = {"down, 1,920 B": (30, 1_920, 1, 65_700 / 2), "block scales, 7,200 B": (1, 7_200, 1, 10_093 / 2)}
HALF_LINE = (240, 128, 1, MB / 319 / 2)  # 128 B: a request of the engine each
PEAK, ENGINE, STARTUP = 1536.0, 219.0, 1100.0


def cycles(streams: dict[str, tuple[int, int, int, float]], efficiency: float, exponent: float) -> np.ndarray:
    """Startup of every command + bytes at the peak times efficiency times (run / 256) ^ -exponent."""
    return np.array(
        [
            STARTUP * commands + 512 * runs * run * commands / (PEAK * efficiency) * (run / 256) ** exponent
            for runs, run, commands, _ in streams.values()
        ]
    )


def errors(streams: dict[str, tuple[int, int, int, float]], efficiency: float, exponent: float) -> np.ndarray:
    """Relative errors."""
    return cycles(streams, efficiency, exponent) / np.array([s[3] for s in streams.values()]) - 1


def fit(
    streams: dict[str, tuple[int, int, int, float]], exponents: np.ndarray
) -> tuple[float, float, list[np.ndarray]]:
    """Best efficiency and exponent on a grid, and all pairs nearly as good."""
    grid = [(e, x) for e in np.arange(0.6, 1.0001, 0.005) for x in exponents]
    rms = np.array([np.sqrt((errors(streams, e, x) ** 2).mean()) for e, x in grid])
    best = int(rms.argmin())
    near = [np.array(g) for g, r in zip(grid, rms) if r <= 1.1 * rms[best]]
    return *grid[best], near


def show(title: str, streams: dict[str, tuple[int, int, int, float]], exponents: np.ndarray) -> None:
    """One fit with its residuals."""
    efficiency, exponent, near = fit(streams, exponents)
    low, high = np.min(near, axis=0), np.max(near, axis=0)
    print(f"{title}: hbm_efficiency {efficiency:.3f} [{low[0]:.3f}, {high[0]:.3f}], run exponent {exponent:.3f} "
          f"[{low[1]:.3f}, {high[1]:.3f}]")  # fmt: skip
    residuals = errors(streams, efficiency, exponent)
    for name, error in zip(streams, residuals):
        print(f"  {error:+7.1%}  {name}")
    print(f"  mean absolute {np.abs(residuals).mean():.1%}")


def main() -> None:
    """Print the fits."""
    aligned = {n: s for n, s in STREAMS.items() if s[1] == 256}
    none = np.array([0.0])
    show("in rngd.toml, runs of 256 B", aligned, none)
    show("one efficiency for all runs", STREAMS, none)
    show("not in the model: efficiency falls with the run's length", STREAMS, np.arange(0, 0.2, 0.0025))
    efficiency, exponent, _ = fit(STREAMS, np.arange(0, 0.2, 0.0025))
    for name, stream in OFF_LINE.items():
        data = stream[3] - STARTUP
        free = cycles({name: stream}, efficiency, exponent)[0] - STARTUP
        print(f"pieces off a line, {name}: {data / free:.2f} times as long as on a line by that law")
    runs, _, _, measured = HALF_LINE
    engine = runs * 64 * 256 / ENGINE
    print(f"runs of 128 B: dma_unaligned_piece_factor {(measured - STARTUP) / engine:.2f} (one row)")


if __name__ == "__main__":
    main()
