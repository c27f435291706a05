"""What moves at every moment: bytes and multiplications a cycle in equal parts of the time."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from runtime_sim.sites import TRAFFIC, Sites
from runtime_sim.timing_result import TimingResult

RATES = ("hbm_read_bytes", "hbm_write_bytes", *TRAFFIC[1:], "macs")


def spread(
    begin: NDArray[np.float64], end: NDArray[np.float64], amount: NDArray[np.float64], cycles: float, bins: int
) -> NDArray[np.float64]:
    """Amounts that flow evenly between `begin` and `end`, summed in `bins` equal parts of [0, cycles]."""
    width = (cycles or 1.0) / bins
    out = np.zeros(bins)
    short = end - begin <= 1e-9 * cycles  # what it flows in would be lost in rounding
    sudden = short & (amount != 0)
    np.add.at(out, np.minimum((end[sudden] / width).astype(np.int64), bins - 1), amount[sudden])
    use = ~short & (amount != 0)
    if use.any():
        speed = amount[use] / (end[use] - begin[use])
        times, place = np.unique(np.concatenate([begin[use], end[use]]), return_inverse=True)
        change = np.zeros(len(times))
        np.add.at(change, place, np.concatenate([speed, -speed]))
        flown = np.concatenate([[0.0], np.cumsum(np.cumsum(change)[:-1] * np.diff(times))])
        out += np.diff(np.interp(np.arange(bins + 1) * width, times, flown))
    return np.maximum(out, 0.0)


def rates(result: TimingResult, sites: Sites, unit: int, bins: int) -> dict[str, list[float]]:
    """RATES of a unit of a class: what flows in each part of the time. A transfer's bytes flow from its start-up to its
    end, those of a pass while it runs."""
    mine = result.flat.unit == unit
    begin = (result.start + np.where(result.flat.context == 2, result.column("overhead"), 0.0))[mine]
    end = result.finish[mine]
    amounts = {
        "hbm_read_bytes": result.column("read_bytes"),
        "hbm_write_bytes": result.column("write_bytes"),
        **{name: sites.traffic[:, column] for column, name in enumerate(TRAFFIC) if column},
        "macs": result.column("macs"),
    }
    return {
        name: spread(begin, end, values[mine].astype(np.float64), result.cycles, bins).tolist()
        for name, values in amounts.items()
    }
