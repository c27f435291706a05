"""Results of tasks as files for the cache, and back."""

from __future__ import annotations

import base64
import json
from typing import Any

from backend_rngd.artifact import Bucket, Cache
from rngdc.cache import Files
from rngdc.estimate import Memory
from rngdc.tasks import BuildTask, Built, Compiled, Result, SharedImage, Task

RESULT = "result.json"


def to_files(result: Result) -> Files:
    """The files of a result that is no refusal."""
    return _built_files(result) if isinstance(result, Built) else _compiled_files(result)


def from_files(task: Task, files: Files) -> Result:
    """The result of a task. Raises KeyError or ValueError if files are missing or of another form."""
    return _built(files) if isinstance(task, BuildTask) else _compiled(files)


def _json(data: Any) -> bytes:
    return json.dumps(data, separators=(",", ":")).encode()


def _built_files(result: Built) -> Files:
    memory = result.memory
    data = {
        "mesh": result.mesh,
        "units": result.units,
        "notes": result.notes,
        "memory": None if memory is None else [memory.calls, memory.weights, memory.caches],
        "images": [
            {
                "kind": i.kind,
                "key": i.key,
                "nbytes": i.nbytes,
                "name": i.name,
                "form": i.form,
                "images": [base64.b64encode(b).decode("ascii") for b in i.images],
                "per_unit": i.per_unit,
            }
            for i in result.images
        ],
    }
    return {"tc.mlir": result.text.encode(), RESULT: _json(data)}


def _built(files: Files) -> Built:
    data = json.loads(files[RESULT])
    memory = None if data["memory"] is None else Memory(*map(tuple, data["memory"]))
    images: list[SharedImage] = []
    for item in data["images"]:
        item["images"] = tuple(base64.b64decode(text) for text in item["images"])
        images.append(SharedImage(**item))
    return Built(files["tc.mlir"].decode(), data["mesh"], data["units"], data["notes"], memory, images)


def _compiled_files(result: Compiled) -> Files:
    assert result.record is not None
    data = {
        "record": result.record.model_dump(mode="json"),
        "caches": [c.model_dump(mode="json") for c in result.caches],
        "peak": result.peak,
        "notes": result.notes,
    }
    return {"stream.npz": result.stream, "debug.json": result.debug.encode(), RESULT: _json(data)}


def _compiled(files: Files) -> Compiled:
    data = json.loads(files[RESULT])
    record = Bucket.model_validate(data["record"])
    caches = [Cache.model_validate(c) for c in data["caches"]]
    return Compiled(files["stream.npz"], files["debug.json"].decode(), record, caches, data["peak"], data["notes"])
