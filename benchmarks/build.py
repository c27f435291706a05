"""Build time and peak memory at the scale of real models, without weights, from a cold and from a warm cache.

    python benchmarks/build.py [--only NAME ...] [--runs N] [--workers N] [--json FILE]

    8b       Llama-3.1-8B, TP 8, the four buckets of the specification: at most 30 s and 1.5 GB; warm at most 5 s
    70b      Llama-3.1-70B, TP 8, PP 4, the same buckets: at most 1.3x of 8b
    405b     Llama-3.1-405B, TP 8, PP 18 (bf16 does not fit 16 cards), the same buckets: at most 1.3x of 8b
    preset   Llama-3.1-8B, TP 8: 46 decode buckets, 8 prefill buckets, 74 chunks: at most 240 s

Each build runs in a process of its own; the fastest of the cold runs counts, then one more with the cache of the last.
Seconds are those of the whole command, imports included. CPU seconds are of all its processes; they tell more on a
machine that others use as well. Memory is that of the largest process.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "tests" / "configs"
FOUR = ["-pb", "1,512", "-pb", "1,1024", "-db", "4,1024", "-db", "4,2048"]
SHAPES_405B = {
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_attention_heads": 128,
    "num_key_value_heads": 8,
    "num_hidden_layers": 126,
}
COLD_SECONDS, WARM_SECONDS, PRESET_SECONDS, GIGABYTES, DEPTH_FACTOR = 30.0, 5.0, 240.0, 1.5, 1.3


def preset() -> list[str]:
    """As many buckets of each kind as the vendor's preset has, up to 9,728 tokens (its 131,072 do not fit dense)."""
    prefill = [f"1,{n}" for n in range(32, 256, 32)]
    decode = [f"{b},{n}" for b in (1, 2, 4, 8, 16) for n in range(1024, 9217, 1024)] + ["1,9728"]
    flags = [x for p in prefill for x in ("-pb", p)] + [x for d in decode for x in ("-db", d)]
    return [*flags, "--prefill-chunk-size", "256"]


@dataclass(frozen=True)
class Case:
    """A build: the config it starts from, what is changed in it, and the options."""

    config: str
    changes: dict[str, Any]
    options: list[str]


CASES = {
    "8b": Case("llama-3.1-8b", {}, ["-tp", "8", *FOUR]),
    "70b": Case("llama-3.1-70b", {}, ["-tp", "8", "-pp", "4", *FOUR]),
    "405b": Case("llama-3.1-70b", SHAPES_405B, ["-tp", "8", "-pp", "18", *FOUR]),
    "preset": Case("llama-3.1-8b", {}, ["-tp", "8", *preset()]),
}


def build(case: Case, cache: Path, workers: int) -> dict[str, Any]:
    """The report of one build, with the seconds of the whole command. Raises RuntimeError if it fails."""
    with tempfile.TemporaryDirectory() as directory:
        base = Path(directory)
        (base / "model").mkdir()
        config = json.loads((CONFIGS / case.config / "config.json").read_text("utf-8")) | case.changes
        (base / "model" / "config.json").write_text(json.dumps(config), "utf-8")
        command = [sys.executable, "-c", "from rngdc.cli import main; main()", "build", str(base / "model")]
        command += [str(base / "out"), "--weights", "none", "--json", str(base / "report.json"), *case.options]
        command += ["--num-pipeline-builder-workers", str(workers), "--num-compile-workers", str(workers)]
        begun, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        ran = subprocess.run([*command, "--cache-dir", str(cache)], cwd=ROOT, capture_output=True, text=True)
        seconds = time.perf_counter() - begun
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        if ran.returncode:
            raise RuntimeError(f"the build failed:\n{ran.stderr[-3000:]}")
        return json.loads((base / "report.json").read_text("utf-8")) | {"command_seconds": seconds, "cpu_seconds": cpu}


def measure(case: Case, runs: int, workers: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reports of the fastest cold build and of a warm one."""
    cold: list[dict[str, Any]] = []
    for i in range(runs):
        with tempfile.TemporaryDirectory() as cache:
            cold.append(build(case, Path(cache), workers))
            warm = build(case, Path(cache), workers) if i == runs - 1 else cold[-1]
    return min(cold, key=lambda r: r["command_seconds"]), warm


def gigabytes(report: dict[str, Any]) -> float:
    """Memory of the largest process."""
    return max(report["peak_memory_bytes"], report["worker_memory_bytes"]) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
    missed: list[str] = []

    def limit(what: str, value: float, most: float) -> None:
        print(f"  {what}: {value:.2f} (limit {most:.2f}){' MISSED' if value > most else ''}", flush=True)
        if value > most:
            missed.append(what)

    for name in arguments.only:
        runs = 1 if name == "preset" else arguments.runs
        cold, warm = found[name] = measure(CASES[name], runs, arguments.workers)
        stages = ", ".join(f"{k} {v:.2f}" for k, v in cold["seconds"].items())
        print(f"{name}: {len(cold['buckets'])} buckets, {cold['num_layers']} layers; {stages}", flush=True)
        print(f"  CPU seconds: cold {cold['cpu_seconds']:.2f}, warm {warm['cpu_seconds']:.2f}", flush=True)
        seconds = cold["command_seconds"]
        limit(f"{name} cold seconds", seconds, PRESET_SECONDS if name == "preset" else COLD_SECONDS)
        limit(f"{name} warm seconds", warm["command_seconds"], WARM_SECONDS)
        limit(f"{name} gigabytes", gigabytes(cold), GIGABYTES)
        if name in ("70b", "405b") and "8b" in found:
            limit(f"{name} / 8b", seconds / found["8b"][0]["command_seconds"], DEPTH_FACTOR)
    if arguments.json is not None:
        reports = {name: {"cold": cold, "warm": warm} for name, (cold, warm) in found.items()}
        arguments.json.write_text(json.dumps(reports, indent=1) + "\n", "utf-8")
    if missed:
        print(f"missed: {', '.join(missed)}")
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
