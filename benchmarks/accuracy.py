"""Predictions of silicon mode beside published measurements: writes docs/accuracy.md.

    python benchmarks/accuracy.py [--output FILE]

Instruction-level rows are simulated from single descriptors; layers are one-layer programs; whole models are built from
tests/configs without weights, as `rngdc build` does it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import accuracy_instructions
import accuracy_layers
import accuracy_models
from accuracy_report import report, summary
from accuracy_rows import Row

GROUPS: tuple[Callable[[], list[Row]], ...] = (
    accuracy_instructions.silicon,
    accuracy_instructions.static,
    accuracy_layers.layers,
    accuracy_models.whole,
    accuracy_models.qwen,
)


def main() -> None:
    """Predict, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "docs" / "accuracy.md")
    arguments = parser.parse_args()
    begun = time.perf_counter()
    rows: list[Row] = []
    for group in GROUPS:
        for row in group():
            rows.append(row)
            print(f"{row.error:+7.1%}  {row.kind:9}  {row.name}: {row.prediction:.4g} us, measured {row.measured:.4g}")
    print("\n".join(summary(rows)))
    arguments.output.write_text(report(rows, time.perf_counter() - begun), "utf-8")


if __name__ == "__main__":
    main()
