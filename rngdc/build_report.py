"""`--build-report FILE`: where the time and the memory of a build went."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rngdc import __version__

if TYPE_CHECKING:
    from rngdc.build import BuildReport


def report_json(report: BuildReport) -> dict[str, Any]:
    """Everything that is known about a build."""
    m = report.manifest
    return {
        **report.to_json(),
        "compiler": {"name": "rngdc", "version": __version__, "python": platform.python_version()},
        "machine": m.machine.model_dump(),
        "steps": {name: {k: round(v, 3) for k, v in times.items()} for name, times in report.steps.items()},
        "streams": {b.name: b.instructions for b in m.buckets},
        "weight_images": len(m.placements),
    }


def write_build_report(report: BuildReport, path: Path) -> None:
    """Write the report: JSON for a name that ends in .json, else text (Markdown). Raises OSError."""
    data = report_json(report)
    text = json.dumps(data, indent=1, ensure_ascii=False) + "\n" if path.suffix == ".json" else _markdown(data)
    path.write_text(text, "utf-8")


def _markdown(data: dict[str, Any]) -> str:
    parallel = data["parallel"]
    lines = [
        f"# Build of {data['model']}",
        "",
        f"{data['architecture']}, {data['num_layers']} layers, weights: {data['weights']}; "
        f"{parallel['tensor']} processing element(s) a layer, {parallel['pipeline']} stage(s); "
        f"rngdc {data['compiler']['version']}.",
        "",
        "| stage | seconds |",
        "|---|---:|",
        *(f"| {name} | {value:.2f} |" for name, value in data["seconds"].items()),
        "",
        f"Memory at the peak: {data['peak_memory_bytes'] / 1e9:.2f} GB.",
        "",
    ]
    steps = list(dict.fromkeys(step for times in data["steps"].values() for step in times))
    lines += [
        f"| {' | '.join(['bucket', 'instructions', *steps])} |",
        f"|---|---:|{'---:|' * len(steps)}",
    ]
    for name, times in data["steps"].items():
        cells = [f"{times[step]:.2f} s" if step in times else "cached" for step in steps]
        lines.append(f"| {' | '.join([name, format(data['streams'].get(name, 0), ','), *cells])} |")
    lines += ["", "| memory of a processing element | bytes |", "|---|---:|"]
    lines += [f"| HBM: {name} | {value:,} |" for name, value in data["hbm_bytes"].items()]
    lines += [f"| {name} at the peak | {value:,} |" for name, value in data["peak_bytes"].items()]
    if data["notes"]:
        lines += ["", "Notes:", "", *(f"- {note}" for note in data["notes"])]
    return "\n".join(lines) + "\n"
