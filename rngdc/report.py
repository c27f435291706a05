"""`rngdc simulate`: times of an artifact's programs as JSON and as a table."""

from __future__ import annotations

from typing import Any

import numpy as np
from rich.table import Table

from backend_rngd.artifact import Bucket
from runtime_sim.runtime import Device


def simulate_report(device: Device, buckets: list[Bucket]) -> dict[str, Any]:
    """The report of `rngdc simulate --json`. Engines and utilisations are shares of the program's time."""
    machine = device.machine
    return {
        "artifact": str(device.artifact.directory),
        "machine": machine.name,
        "mode": machine.mode,
        "clock_ghz": machine.clock_hz * machine.clock_scale / 1e9,
        "buckets": [_bucket(device, bucket) for bucket in buckets],
    }


def _bucket(device: Device, bucket: Bucket) -> dict[str, Any]:
    result = device.time(bucket)
    cycles = result.cycles or 1.0
    lengths = result.finish - result.start
    vector = np.array([c.vector for c in result.costs], np.bool_)[result.number]
    return {
        "name": bucket.name,
        "phase": bucket.phase,
        "batch": bucket.batch,
        "input_length": bucket.input_length,
        "attention_size": bucket.attention_size,
        "instructions": len(result.flat),
        "cycles": result.cycles,
        "time_us": result.seconds * 1e6,
        "mac_utilization": result.mac_utilisation,
        "hbm_bytes_read": result.hbm_read_bytes,
        "hbm_bytes_written": result.hbm_write_bytes,
        "hbm_utilization": result.hbm_utilisation,
        "engines": {**result.utilisation(), "vector": float(lengths[vector].sum()) / cycles},
        "stalls": result.stalls[0],
        "layers": [{"name": layer.name.split("|")[0], "cycles": layer.advance} for layer in result.layers],
        "energy_joules": result.energy_joules(),
    }


def simulate_table(report: dict[str, Any]) -> Table:
    """The report for people."""
    table = Table(title=f"{report['machine']}, {report['mode']} mode, {report['clock_ghz']:.3g} GHz")
    table.add_column("bucket")
    for name in ("instructions", "cycles", "time", "MAC", "HBM", "HBM read", "main", "sub", "dma", "vector"):
        table.add_column(name, justify="right")
    for b in report["buckets"]:
        engines = [f"{b['engines'][name]:.0%}" for name in ("main", "sub", "dma", "vector")]
        table.add_row(
            b["name"], f"{b['instructions']:,}", f"{b['cycles']:,.0f}", f"{b['time_us']:,.1f} us",
            f"{b['mac_utilization']:.1%}", f"{b['hbm_utilization']:.1%}", f"{b['hbm_bytes_read'] / 1e6:,.1f} MB",
            *engines,
        )  # fmt: skip
    return table
