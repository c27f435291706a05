"""The values of a program that walks its tokens in chunks, put together to those of one that does not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from xdsl.dialects.builtin import IntegerAttr, ModuleOp
from xdsl.dialects.func import CallOp
from xdsl.ir import Operation, SSAValue

from backend_rngd.artifact.stages import CUT, PICK, TAIL, family, role
from ir.compare import Observation
from ir.dialects import tc
from ir.interpreter import find_function
from ir.types import axis_names, shape_of
from passes.chunk_tokens import CHUNK

Array = NDArray[Any]


def joined(module: ModuleOp, seen: Sequence[Observation]) -> list[Observation]:
    """What every operation returned for all tokens, in the order of the first chunk and under the names of a program
    without chunks. Operations that some chunk lacks are left out; so is what only cuts tokens and picks a row."""
    calls = _calls(module)
    if not calls:
        return list(seen)
    chunks = 1 + max(chunk for chunk, _ in calls.values())
    places: dict[Operation, int] = {op: i for f in module.ops for r in f.regions for i, op in enumerate(r.block.ops)}
    found: dict[tuple[tuple[str, ...], int], list[Observation | None]] = {}
    out: list[tuple[Observation, list[Observation | None]]] = []
    for one in seen:
        depth = next((i for i, name in enumerate(one.calls) if name in calls), None)
        if depth is None:
            out.append((one, [one]))
            continue
        chunk, name = calls[one.calls[depth]]
        if role(name.split("[")[0]) in (CUT, PICK):
            continue
        renamed = replace(one, calls=(*one.calls[:depth], name, *one.calls[depth + 1 :]))
        key = renamed.calls, places[one.op]
        if key not in found:
            found[key] = [None] * chunks
            out.append((renamed, found[key]))
        found[key][chunk] = one
    rows = next(
        shape_of(a)[0] for a in find_function(module, "main").body.block.args if axis_names(a)[:2] == ["B", "S"]
    )
    return [replace(first, arrays=_whole(parts, rows)) for first, parts in out if None not in parts]


def _calls(module: ModuleOp) -> dict[str, tuple[int, str]]:
    """Calls of `@main` such as `block_0_keys512[3]`, with their chunk and the name without chunks, `block_0[1]`."""
    out: dict[str, tuple[int, str]] = {}
    numbers: Counter[str] = Counter()
    in_chunk: Counter[tuple[int, str]] = Counter()
    for op in find_function(module, "main").body.block.ops:
        if not isinstance(op, CallOp):
            continue
        name, chunk = op.callee.string_value(), op.attributes.get(CHUNK)
        if isinstance(chunk, IntegerAttr):
            key = chunk.value.data, family(name).removesuffix(TAIL)
            out[f"{name}[{numbers[name]}]"] = (key[0], f"{key[1]}[{in_chunk[key]}]")
            in_chunk[key] += 1
        numbers[name] += 1
    return out


def _whole(parts: Sequence[Observation | None], rows: int) -> tuple[Array, ...]:
    chunks = [part for part in parts if part is not None]
    op = chunks[0].op
    return tuple(_join(op, r, [part.arrays[i] for part in chunks], rows) for i, r in enumerate(op.results))


def _join(op: Operation, result: SSAValue, parts: Sequence[Array], rows: int) -> Array:
    """Parts along the tokens, by the axes' names. A cache holds what all chunks so far have written."""
    names = axis_names(result)
    dim = next((i for i, name in enumerate(names) if name in ("S", "B*S")), None)
    if len(parts) == 1 or dim is None or isinstance(op, tc.KvUpdateOp):
        return parts[-1]
    if names[dim] == "S":
        return np.concatenate(parts, axis=dim)
    split = [part.reshape(*part.shape[:dim], rows, -1, *part.shape[dim + 1 :]) for part in parts]
    return np.concatenate(split, axis=dim + 1).reshape(*parts[0].shape[:dim], -1, *parts[0].shape[dim + 1 :])
