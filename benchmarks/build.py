"""Time and peak memory of `rngdc build` for Llama-3.1 configs without weights, each build in a process of its own.

    python benchmarks/build.py [--runs 3] [--layers 32 80]

Prints, per number of layers of the 8B config and for the 70B config, the fastest of the runs: seconds of the whole
command, the seconds it reports itself (without importing torch), and peak memory; then the ratio of the deepest to the
shallowest, which says whether build time depends on depth.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "tests" / "configs"
BUCKETS = ["-pb", "1,512", "-db", "1,1024"]


def build(model: Path, out: Path) -> tuple[float, float, float]:
    """(seconds of the command, seconds it reports, peak memory in GB) of one build."""
    report = out.with_suffix(".json")
    command = [
        "-c",
        "import sys; from rngdc.cli import main; main(sys.argv[1:])",
        "build",
        str(model),
        str(out),
        *BUCKETS,
        "--weights",
        "none",
        "--json",
        str(report),
    ]
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise SystemExit(f"the build of {model} failed: run {' '.join(command)}")
    return seconds, float(json.loads(report.read_text("utf-8"))["seconds"]["total"]), usage.ru_maxrss / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--layers", type=int, nargs="+", default=[32, 80])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        cases: dict[str, Path] = {}
        config = json.loads((CONFIGS / "llama-3.1-8b" / "config.json").read_text("utf-8"))
        for layers in options.layers:
            model = Path(scratch) / f"8b-{layers}"
            model.mkdir()
            (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}), "utf-8")
            cases[f"8B, {layers} layers"] = model
        cases["70B"] = CONFIGS / "llama-3.1-70b"
        best: dict[str, tuple[float, float, float]] = {}
        for run in range(options.runs):
            for name, model in cases.items():
                result = build(model, Path(scratch) / f"{model.name}-out{run}")
                best[name] = min(best.get(name, result), result)
    for name, (command, reported, memory) in best.items():
        print(f"{name:16} {command:6.2f} s command  {reported:6.2f} s build  {memory:5.2f} GB")
    depth = [best[f"8B, {layers} layers"][1] for layers in options.layers]
    print(f"{options.layers[-1]} against {options.layers[0]} layers: {depth[-1] / depth[0]:.2f}x")


if __name__ == "__main__":
    main()
