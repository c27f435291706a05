"""Copying the weights of a model into an artifact: safetensors files of bounded size, a piece of memory at a time."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ir.errors import Problem, UserError

if TYPE_CHECKING:
    from ir.weights import WeightRef, WeightTable

SHARD_BYTES = 5_000_000_000
"""Largest file, unless a single tensor is larger: what transformers writes."""
PIECE = 1 << 20
"""Bytes copied at a time: a buffer that stays in the processor's cache."""
FOLDER = "weights"


def copy_weights(table: WeightTable, directory: Path, progress: Callable[[str], None]) -> WeightTable:
    """Write all weights that are in files to `directory`/weights, and return the table that refers to them there.

    One file is `model.safetensors`, several have the usual numbered names and an index. Raises UserError.
    """
    from ir.weights import WeightTable

    shards: list[list[WeightRef]] = [[]]
    held = 0
    for ref in (ref for ref in table.values() if ref.file is not None):
        if shards[-1] and held + ref.stored_bytes > SHARD_BYTES:
            shards.append([])
            held = 0
        shards[-1].append(ref)
        held += ref.stored_bytes
    (directory / FOLDER).mkdir()
    copied: dict[str, WeightRef] = {}
    for i, refs in enumerate(shards):
        name = f"{FOLDER}/model.safetensors"
        if len(shards) > 1:
            name = f"{FOLDER}/model-{i + 1:05}-of-{len(shards):05}.safetensors"
        progress(f"copying the weights ({i + 1} of {len(shards)} files)")
        offsets = _write(table, refs, directory / name)
        for ref, offset in zip(refs, offsets, strict=True):
            copied[ref.name] = replace(ref, file=name, tensor=ref.name, offset=offset, nbytes=ref.stored_bytes)
    if len(shards) > 1:
        index: dict[str, Any] = {
            "metadata": {"total_size": sum(ref.stored_bytes for ref in copied.values())},
            "weight_map": {name: Path(ref.file or "").name for name, ref in copied.items()},
        }
        (directory / FOLDER / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", "utf-8")
    return WeightTable({name: copied.get(name, ref) for name, ref in table.items()}, base=directory)


def _write(table: WeightTable, refs: Sequence[WeightRef], path: Path) -> list[int]:
    """Write one file; returns the first byte of every tensor."""
    from ir.weights import safetensors_header

    header, offsets = safetensors_header([(ref.name, ref.dtype, ref.shape) for ref in refs])
    with path.open("wb") as target:
        target.write(struct.pack("<Q", len(header)) + header)
        for ref in refs:
            source, first, nbytes = table.place(ref)
            if nbytes != ref.stored_bytes:
                why = f"{nbytes} bytes are stored, {list(ref.shape)} {ref.dtype} needs {ref.stored_bytes}"
                raise UserError([Problem(f"weight {ref.name}", why, "use the checkpoint that was captured")])
            with source.open("rb", buffering=0) as file:
                _copy(file, first, nbytes, target, ref.name, source)
    return [8 + len(header) + offset for offset in offsets]


def _copy(file: Any, first: int, nbytes: int, target: BinaryIO, name: str, source: Path) -> None:
    file.seek(first)
    buffer = memoryview(bytearray(PIECE))
    while nbytes:
        count: int = file.readinto(buffer[: min(PIECE, nbytes)])
        if not count:
            raise UserError([Problem(f"weight {name}", f"{source} is cut off", f"restore {source}")])
        target.write(buffer[:count])
        nbytes -= count
