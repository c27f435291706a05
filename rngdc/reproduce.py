"""A compile task as a JSON file beside its module, so that `rngdc opt` can do it once more."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backend_rngd.lowering import LoweringOptions
from backend_rngd.machine import Machine
from ir.errors import Problem, UserError
from rngdc.buckets import BucketSpec

if TYPE_CHECKING:
    from rngdc.tasks import CompileTask


def save_task(task: CompileTask, directory: Path) -> Path:
    """Write everything but the module's text; returns the file."""
    path = directory / f"{task.name}.task.json"
    data = {
        "bucket": asdict(task.bucket), "machine": task.machine.model_dump(mode="json"),
        "lowering": asdict(task.lowering), "addresses": dict(task.addresses), "hbm_base": task.hbm_base,
    }  # fmt: skip
    path.write_text(json.dumps(data, indent=1) + "\n", "utf-8")
    return path


def load_task(path: Path, text: str) -> CompileTask:
    """The task of a file, for a module's text. Raises UserError if the file is none."""
    from rngdc.tasks import CompileTask

    try:
        data: Any = json.loads(path.read_text("utf-8"))
        return CompileTask(
            BucketSpec(**data["bucket"]), text, Machine.model_validate(data["machine"]),
            LoweringOptions(**data["lowering"]), data["addresses"], data["hbm_base"],
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = f"{type(error).__name__}: {error}"
        raise UserError([Problem(f"{path} holds no task", why, "give the file that the failed build wrote")]) from error
