"""`artifact.schema.json`: the JSON Schema of artifact.json. `python -m backend_rngd.artifact.json_schema` writes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from backend_rngd.artifact.schema import FORMAT, VERSION, Manifest

FILE = Path(__file__).with_name("artifact.schema.json")

ALWAYS = ("format", "version", "files", "digest")
"""Fields with defaults that every version has written and checks."""


def schema_text() -> str:
    """The schema of the current version, as the file holds it."""
    schema = Manifest.model_json_schema(mode="serialization")
    schema["properties"]["format"]["const"] = FORMAT
    schema["$defs"]["Version"]["properties"]["major"]["const"] = VERSION.major
    schema["required"] += [name for name in ALWAYS if name not in schema["required"]]
    head = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"rngdc artifact {VERSION.major}.{VERSION.minor}",
    }
    return json.dumps(head | _untitled(schema), indent=1) + "\n"


def _untitled(node: Any) -> Any:
    """Without the titles, which only repeat names."""
    if isinstance(node, list):
        return [_untitled(x) for x in cast("list[Any]", node)]
    if not isinstance(node, dict):
        return node
    items = cast("dict[str, Any]", node).items()
    return {k: _untitled(v) for k, v in items if not (k == "title" and isinstance(v, str))}


if __name__ == "__main__":
    FILE.write_text(schema_text(), "utf-8")
