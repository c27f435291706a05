"""Where the makespan goes: the critical path's cycles by operation, by layer and by cause. Every table sums to it."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime_sim.timing_result import SHARED, TimingResult
from runtime_sim.timing_tables import CONTEXTS

CAUSES = (
    "busy_main",  # the main context computes
    "busy_sub",
    "busy_dma",  # bytes move at the speed they have alone
    "issue",  # issue, pipeline fill, DMA start-up
    "wait_sync",  # a notify on its way
    *SHARED,  # a shared resource is taken
)
OUTSIDE = "(entry routine)"


def path_causes(result: TimingResult) -> NDArray[np.float64]:
    """[path, CAUSES] cycles of every instruction of the critical path by cause; row i sums to `path_cycles[i]`.

    Time before a start is never here: on the path an instruction starts when its predecessor ends.
    """
    path = np.array(result.critical_path, np.int64)
    cycles = np.array(result.path_cycles)
    out = np.zeros((len(path), len(CAUSES)))
    if not len(path):
        return out
    waits = result.column("wait").astype(np.bool_)[path]
    out[:, 3] = np.where(waits, 0.0, result.column("overhead")[path])
    out[:, 4] = np.where(waits, cycles, 0.0)
    out[:, 5:] = np.where(waits[:, None], 0.0, result.shared[path])
    out[np.arange(len(path)), result.flat.context[path]] = cycles - out[:, 3:].sum(axis=1)
    return out


def operation_rows(result: TimingResult) -> list[dict[str, Any]]:
    """The rows of `TimingResult.operations` with `path_cycles` and `causes` (those above 0), most path cycles first."""
    total: dict[str, NDArray[np.float64]] = defaultdict(lambda: np.zeros(len(CAUSES)))
    for i, row in zip(result.critical_path, path_causes(result), strict=True):
        total[result.locations[i]] += row
    rows: list[dict[str, Any]] = []
    for operation in result.operations:
        causes = total[operation.location]
        rows.append(
            asdict(operation)
            | {
                "path_cycles": float(causes.sum()),
                "causes": {name: x for name, x in zip(CAUSES, causes.tolist(), strict=True) if x},
            }
        )
    return sorted(rows, key=lambda row: -row["path_cycles"])


def layer_names(result: TimingResult) -> list[str]:
    """Of every executed instruction, the call of the entry routine it belongs to."""
    names = [OUTSIDE] * len(result.flat)
    for call in result.flat.calls:
        if call.depth != 1:
            continue
        stream = result.flat.streams[call.unit]
        parent = result.flat.calls[call.parent]
        location = stream.routines[parent.routine].instructions[call.index].location
        name = stream.locations[location].split("|")[0]
        names[call.first : call.end] = [name] * (call.end - call.first)
    return names


def layer_path(result: TimingResult) -> dict[str, float]:
    """Cycles of the critical path by layer, in the order of the path; they sum to the makespan."""
    names = layer_names(result)
    out: dict[str, float] = {}
    for i, cycles in zip(result.critical_path, result.path_cycles, strict=True):
        out[names[i]] = out.get(names[i], 0.0) + cycles
    return out


def path_segments(result: TimingResult) -> list[dict[str, Any]]:
    """The critical path with neighbours of one operation, unit and context joined: location, layer, unit, context,
    instructions, begin and end in cycles. The segments follow each other without gaps from 0 to the makespan."""
    names = layer_names(result)
    out: list[dict[str, Any]] = []
    time = 0.0
    for i in result.critical_path:
        segment = {
            "location": result.locations[i],
            "layer": names[i],
            "unit": result.classes.members[int(result.flat.unit[i])][0],
            "context": CONTEXTS[int(result.flat.context[i])],
        }
        end = float(result.finish[i])
        if out and all(out[-1][key] == value for key, value in segment.items()):
            out[-1]["end"] = end
            out[-1]["instructions"] += 1
        else:
            out.append(segment | {"instructions": 1, "begin": time, "end": end})
        time = end
    return out


def path_groups(result: TimingResult) -> list[dict[str, Any]]:
    """The critical path by layer, operation, unit and context: instructions and cycles, which sum to the makespan."""
    names = layer_names(result)
    rows: dict[tuple[str, str, int, int], list[float]] = {}
    for i, cycles in zip(result.critical_path, result.path_cycles, strict=True):
        key = (names[i], result.locations[i], int(result.flat.unit[i]), int(result.flat.context[i]))
        row = rows.setdefault(key, [0, 0.0])
        row[0] += 1
        row[1] += cycles
    return [
        {
            "layer": layer,
            "location": location,
            "unit": result.classes.members[unit][0],
            "context": CONTEXTS[context],
            "instructions": int(count),
            "cycles": cycles,
        }
        for (layer, location, unit, context), (count, cycles) in rows.items()
    ]
