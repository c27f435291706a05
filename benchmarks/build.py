"""Build time and peak memory of Llama-3.1-8B's shapes without weights, with 32 and with 80 layers.

    python benchmarks/build.py [--json FILE]

Each build runs in a process of its own, three times; the fastest counts. Depth must not matter: at most 1.3x.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "tests" / "configs" / "llama-3.1-8b" / "config.json"
BUCKETS = ["-pb", "1,512", "-db", "1,1024"]


def build(layers: int, runs: int = 3) -> dict[str, Any]:
    """The report of the fastest of `runs` builds."""
    reports: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as directory:
        base = Path(directory)
        model = base / "model"
        model.mkdir()
        config = json.loads(CONFIG.read_text("utf-8")) | {"num_hidden_layers": layers}
        (model / "config.json").write_text(json.dumps(config), "utf-8")
        for i in range(runs):
            command = [
                sys.executable,
                "-c",
                "from rngdc.cli import main; main()",
                "build",
                str(model),
                str(base / f"{i}"),
            ]
            command += ["--weights", "none", "--json", str(base / "report.json"), *BUCKETS]
            subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
            reports.append(json.loads((base / "report.json").read_text("utf-8")))
    return min(reports, key=lambda r: r["seconds"]["total"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    out = parser.parse_args().json
    reports = {layers: build(layers) for layers in (32, 80)}
    for layers, report in reports.items():
        seconds = ", ".join(f"{k} {v:.2f} s" for k, v in report["seconds"].items())
        print(f"{layers} layers: {seconds}; peak memory {report['peak_memory_bytes'] / 1e9:.2f} GB")
    ratio = reports[80]["seconds"]["total"] / reports[32]["seconds"]["total"]
    print(f"80 layers take {ratio:.2f}x of 32 (limit 1.3)")
    if out is not None:
        out.write_text(json.dumps(reports, indent=1) + "\n", "utf-8")
    sys.exit(ratio > 1.3)


if __name__ == "__main__":
    main()
