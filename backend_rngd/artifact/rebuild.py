"""The command that makes an artifact anew, from what its manifest records, whatever version that has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError

from backend_rngd.artifact.schema import Manifest, Options


def rebuild_command(manifest: Manifest | Mapping[str, Any], directory: Path | str, **changes: Any) -> str:
    """`rngdc build ... --overwrite` for the artifact in `directory`, with `changes` of its options; for one in the
    cache of the hub with a directory to choose.

    `manifest` may be the JSON object of any version: what it does not record is left out.
    """
    if isinstance(manifest, Manifest):
        options = manifest.options or _from_programs(
            manifest.model_dump(include={"model", "parallel", "weights_mode", "buckets", "name"})
        )
    else:
        options = _recorded(manifest.get("options")) or _from_programs(manifest)
    options = options.model_copy(update=changes)
    if Path(directory).absolute().parent.name == "snapshots":  # in the hub's cache, which is not ours to write
        return options.command("OUT")
    return options.command(str(directory)) + " --overwrite"


def _recorded(data: object) -> Options | None:
    try:
        return Options.model_validate(data)
    except ValidationError:
        return None


def _from_programs(data: Mapping[str, Any]) -> Options:
    """Options of a manifest that does not record them (1.0 and 1.1), read off its programs."""
    model, parallel = _object(data.get("model")), _object(data.get("parallel"))
    listed = data.get("buckets")
    buckets = [_object(b) for b in cast("list[object]", listed)] if isinstance(listed, list | tuple) else []

    def pairs(*phases: str) -> tuple[tuple[int, int], ...]:
        found = [(b.get("batch"), b.get("attention_size")) for b in buckets if b.get("phase") in phases]
        return tuple((b, s) for b, s in found if isinstance(b, int) and isinstance(s, int))

    chunks = pairs("chunk")
    sizes = [n for b in buckets if b.get("phase") != "decode" and isinstance(n := b.get("input_length"), int)]
    weights = data.get("weights_mode")
    return Options(
        model=str(model.get("id", "MODEL")),
        prefill_buckets=tuple(dict.fromkeys(pairs("prefill", "encode"))),
        decode_buckets=pairs("decode"),
        max_seq_len_to_capture=max((length for _, length in chunks), default=None),
        prefill_chunk_size=max(sizes) if chunks else None,
        tensor_parallel_size=_number(parallel.get("tensor")),
        pipeline_parallel_size=_number(parallel.get("pipeline")),
        weights=weights if isinstance(weights, str) else "link",
        name=str(data.get("name") or ""),
    )


def _object(data: object) -> dict[str, Any]:
    return cast("dict[str, Any]", data) if isinstance(data, dict) else {}


def _number(data: object) -> int:
    return data if isinstance(data, int) else 1
