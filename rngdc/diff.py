"""`rngdc diff`: everything in which two artifacts differ, from their manifests, streams, configs and weights."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, cast

from backend_rngd.artifact import Artifact, ArtifactError, Bucket, WeightSource
from backend_rngd.artifact.stages import touched
from backend_rngd.isa.descriptors import (
    UNIT_STRIDE,
    Call,
    Context,
    Descriptor,
    Dma,
    Endpoint,
    Exec,
    Instruction,
    LoadTrf,
    LoadVrf,
    Memset,
    Notify,
    Space,
    Stream,
    Wait,
)
from backend_rngd.isa.footprint import footprint

NAMED = ("weights", "placements", "constants", "caches", "buckets", "linked", "files")
"""Parts of the manifest that are compared name by name; all others field by field."""
Object = Mapping[str, Any]
Progress = Callable[[str], None]


def diff_artifacts(a: Artifact, b: Artifact, progress: Progress = lambda _: None) -> dict[str, Any]:
    """The report of `rngdc diff --json`. `progress` is told what is being compared.

    Raises ArtifactError if a stream cannot be read.
    """
    one, two = (_manifest(x) for x in (a, b))
    report: dict[str, Any] = {"a": str(a.directory), "b": str(b.directory), "equal": True}
    head = [{k: v for k, v in m.items() if k not in (*NAMED, "digest")} for m in (one, two)]
    fields = _fields(head[0], head[1])
    config = _fields(_config(a), _config(b))
    report |= {"fields": fields, "config": config, "programs": _programs(a, b, one, two, progress)}
    progress("weights")
    report["weights"] = _weights(a, b)
    for part in ("placements", "constants", "caches"):
        report[part] = _named(one, two, part)
    report["linked"] = _sets(
        {f.path: f.sha256 for f in a.manifest.linked}, {f.path: f.sha256 for f in b.manifest.linked}
    )
    report["files"] = _sets(a.manifest.files, b.manifest.files)
    parts: list[Any] = [v for k, v in report.items() if k not in ("a", "b", "equal")]
    report["equal"] = not any(any(part.values()) if hasattr(part, "values") else part for part in parts)
    return report


def _manifest(artifact: Artifact) -> dict[str, Any]:
    """The JSON as it stands, also fields that this version does not know."""
    return json.loads(artifact.text("artifact.json"))


def _config(artifact: Artifact) -> dict[str, Any]:
    path = artifact.directory / "config.json"
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}


def _fields(a: object, b: object, at: str = "") -> list[dict[str, Any]]:
    """Leaves that differ, with their paths."""
    if isinstance(a, dict) and isinstance(b, dict):
        one, two = cast("Object", a), cast("Object", b)
        found: list[dict[str, Any]] = []
        for key in dict.fromkeys((*one, *two)):
            found += _fields(one.get(key), two.get(key), f"{at}.{key}" if at else key)
        return found
    if isinstance(a, list) and isinstance(b, list):
        one, two = cast("list[Any]", a), cast("list[Any]", b)
        if (names := _item_names(one)) and names == _item_names(two):
            return [f for name, x, y in zip(names, one, two, strict=True) for f in _fields(x, y, f"{at}.{name}")]
    return [] if a == b else [{"field": at, "a": a, "b": b}]


def _item_names(items: Sequence[Any]) -> list[str]:
    """Names of the objects of a list; none if they have no names."""
    return [x["name"] for x in items] if all(isinstance(x, dict) and "name" in x for x in items) else []


def _sets(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, list[str]]:
    """Names that one of them lacks, and those with other values."""
    return {
        "removed": [name for name in a if name not in b],
        "added": [name for name in b if name not in a],
        "changed": [name for name in a if name in b and a[name] != b[name]],
    }


def _by_name(manifest: Object, part: str) -> dict[str, Object]:
    return {item["name"]: item for item in cast("list[Object]", manifest[part])}


def _named(one: Object, two: Object, part: str) -> dict[str, list[Any]]:
    a, b = _by_name(one, part), _by_name(two, part)
    found: dict[str, list[Any]] = {**_sets(a, b)}
    found["changed"] = [{"name": name, "fields": _fields(a[name], b[name])} for name in found["changed"]]
    if not any(found.values()) and list(a) != list(b):
        found["changed"] = [{"name": "", "fields": [{"field": "order", "a": list(a), "b": list(b)}]}]
    return found


# Programs ------------------------------------------------------------------------------------------------------------
def _programs(a: Artifact, b: Artifact, one: Object, two: Object, progress: Progress) -> dict[str, list[Any]]:
    """Buckets by name; a changed one has other fields, another stream, other IR or other places of its values."""
    records, files = (_by_name(one, "buckets"), _by_name(two, "buckets")), (a.manifest.files, b.manifest.files)
    found: dict[str, list[Any]] = {**_sets(*records)}
    changed: list[dict[str, Any]] = []
    for before in a.buckets:
        if before.name not in records[1]:
            continue
        after = b.bucket(before.name)
        fields = _fields(records[0][before.name], records[1][before.name])
        parts = [
            part
            for part in ("stream", "ir", "debug")
            if files[0].get(getattr(before, part)) != files[1].get(getattr(after, part))
        ]
        if fields or parts:
            progress(before.name)
            entry: dict[str, Any] = {"name": before.name, "changed_files": parts, "fields": fields}
            changed.append(entry | (_streams(a, before, b, after) if "stream" in parts else {}))
    found["changed"] = changed
    return found


def _streams(a: Artifact, before: Bucket, b: Artifact, after: Bucket) -> dict[str, Any]:
    one, two = a.stream(before), b.stream(after)
    first, second = functions_of(one), functions_of(two)
    names: dict[str, list[Any]] = {**_sets(first, second)}
    names["changed"] = [
        {
            "name": name,
            "only_hbm_addresses": _without_addresses(first[name]) == _without_addresses(second[name]),
            "instructions": _pairs(_static(first[name]), _static(second[name])),
        }
        for name in names["changed"]
    ]
    return {
        "functions": names,
        "instructions": _pairs(executed(one), executed(two)),
        "memory_per_pe": {
            "hbm_bytes_touched": [sum(high - low for low, high in touched(s)) for s in (one, two)],
            "dm_bytes": [dm_bytes(s) * s.slices for s in (one, two)],
        },
    }


def _pairs(a: Mapping[str, int], b: Mapping[str, int]) -> dict[str, list[int]]:
    return {kind: [a.get(kind, 0), b.get(kind, 0)] for kind in sorted({*a, *b})}


KINDS: dict[type, str] = {
    LoadTrf: "load_trf", LoadVrf: "load_vrf", Memset: "memset", Dma: "dma", Notify: "notify", Wait: "wait",
    Call: "call",
}  # fmt: skip


def kind_of(item: Instruction) -> str:
    """What an instruction does, in a word."""
    what = item.what
    if isinstance(what, Exec):
        return "contract" if what.contract is not None else "pass_sub" if item.context is Context.SUB else "pass"
    return KINDS[type(what)]


def executed(stream: Stream) -> Counter[str]:
    """How many instructions of each kind a unit executes, calls followed."""

    @cache
    def count(routine: int) -> tuple[tuple[str, int], ...]:
        found: Counter[str] = Counter()
        for item in stream.routines[routine].instructions:
            found[kind_of(item)] += 1
            if isinstance(item.what, Call):
                found.update(dict(count(item.what.routine)))
        return tuple(found.items())

    return Counter(dict(count(0)))


def dm_bytes(stream: Stream) -> int:
    """Bytes of a slice's data memory up to the last that an instruction touches."""
    items = (item for routine in stream.routines for item in routine.instructions)
    return max((x.high for item in items for x in footprint(item.what) if x.space == "dm"), default=0)


Function = tuple[tuple[Instruction, Hashable], ...]


def functions_of(stream: Stream) -> dict[str, Function]:
    """Routines by name; calls and source locations by name as well, so that numbering does not matter."""
    found: dict[str, Function] = {}
    for routine in stream.routines:
        name, copy = routine.name, 1
        while name in found:
            copy += 1
            name = f"{routine.name}#{copy}"
        found[name] = tuple((_plain(item), _names(stream, item)) for item in routine.instructions)
    return found


def _plain(item: Instruction) -> Instruction:
    what = replace(item.what, routine=0) if isinstance(item.what, Call) else item.what
    return replace(item, what=what, location=0)


def _without_addresses(function: Function) -> Function:
    """The function with all HBM addresses 0, to tell whether it only moved."""
    return tuple((replace(item, what=_unplaced(item.what)), names) for item, names in function)


def _unplaced(what: Descriptor) -> Descriptor:
    if isinstance(what, Call):
        return replace(what, moves=tuple((target, source, 0) for target, source, _ in what.moves))
    if not isinstance(what, Dma):
        return what
    index = None if what.index is None else replace(what.index, base=0)
    return replace(what, source=_anywhere(what.source), destination=_anywhere(what.destination), index=index)


def _anywhere(end: Endpoint) -> Endpoint:
    """The same memory, of the same unit, at its beginning."""
    return end if end.space in (Space.DM, Space.PEER_DM) else replace(end, base=end.base - end.base % UNIT_STRIDE)


def _names(stream: Stream, item: Instruction) -> Hashable:
    callee = stream.routines[item.what.routine].name if isinstance(item.what, Call) else ""
    return callee, stream.locations[item.location] if item.location < len(stream.locations) else ""


def _static(function: Function) -> Counter[str]:
    return Counter(kind_of(item) for item, _ in function)


# Weights -------------------------------------------------------------------------------------------------------------
def _weights(a: Artifact, b: Artifact) -> dict[str, list[Any]]:
    """Weights by name: shape, element type, and the checksum of their bytes."""
    one, two = ({w.name: w for w in x.manifest.weights} for x in (a, b))
    found: dict[str, list[Any]] = {
        "removed": [name for name in one if name not in two],
        "added": [name for name in two if name not in one],
        "changed": [],
    }
    for name in (name for name in one if name in two):
        sides = ((a, one[name]), (b, two[name]))
        if _source(*sides[0]) == _source(*sides[1]) and one[name].shape == two[name].shape:
            continue
        described = [
            {"shape": list(w.shape), "dtype": w.dtype, "seed": w.seed, "sha256": _checksum(x, w)} for x, w in sides
        ]
        same = described[0] == described[1]
        if not same or (described[0]["sha256"] is None and one[name].file is not None):
            found["changed"].append({"name": name, "a": described[0], "b": described[1]})
    return found


def _source(artifact: Artifact, weight: WeightSource) -> Hashable:
    """What decides on the bytes without reading them: a range of a file with a known checksum."""
    known = {f.path: f.sha256 for f in artifact.manifest.linked} | artifact.manifest.files
    file = None if weight.file is None else known.get(weight.file, f"{artifact.directory}:{weight.file}")
    return file, weight.offset, weight.dtype, weight.inline, weight.seed


def _checksum(artifact: Artifact, weight: WeightSource) -> str | None:
    """SHA-256 of the bytes; None for random numbers, for none, and if they cannot be read."""
    if weight.file is None and weight.inline is None:
        return None
    try:
        data: Any = artifact.weight(weight.name).reshape(-1).view("u1")
    except ArtifactError:
        return None
    return hashlib.sha256(data).hexdigest()


# For people ----------------------------------------------------------------------------------------------------------
MOST = 12
"""Entries of a list that are shown to people; the JSON has all."""


def diff_lines(report: Mapping[str, Any]) -> list[str]:
    """The report for people: what stands in A only with -, in B only with +, in both but different with ~."""
    if report["equal"]:
        return [f"{report['a']} and {report['b']} are equal"]
    out = [f"A: {report['a']}", f"B: {report['b']}"]
    out += _section("fields", [_field(f) for f in report["fields"]])
    out += _section("config.json", [_field(f) for f in report["config"]])
    programs = report["programs"]
    lines = [*_only(programs)]
    for program in programs["changed"]:
        lines += _program(program)
    out += _section("programs", lines, len(lines))
    weights = [_weight(w) for w in report["weights"]["changed"]]
    out += _section("weights", [*_only(report["weights"]), *weights])
    for part in ("placements", "constants", "caches"):
        changed = [f"~ {x['name']}: {'; '.join(_field(f)[2:] for f in x['fields'])}" for x in report[part]["changed"]]
        out += _section(part, [*_only(report[part]), *changed])
    for part in ("linked", "files"):
        out += _section(part, [*_only(report[part]), *(f"~ {name}" for name in report[part]["changed"])])
    return out


def _section(title: str, lines: Sequence[str], most: int = MOST) -> list[str]:
    if not lines:
        return []
    rest = [f"  ... and {len(lines) - most} more (--json lists all)"] if len(lines) > most else []
    return ["", title, *(f"  {line}" for line in lines[:most]), *rest]


def _only(part: Mapping[str, Iterable[str]]) -> list[str]:
    return [*(f"- {name}" for name in part["removed"]), *(f"+ {name}" for name in part["added"])]


def _field(entry: Mapping[str, Any]) -> str:
    return f"~ {entry['field']}: {_short(entry['a'])} -> {_short(entry['b'])}"


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _weight(entry: Mapping[str, Any]) -> str:
    sides = [entry[side] for side in ("a", "b")]
    shapes = [f"{side['dtype']}{side['shape']}" for side in sides]
    sums = [(side["sha256"] or ("random" if side["seed"] is not None else "unknown"))[:12] for side in sides]
    kept = shapes[0] if shapes[0] == shapes[1] else " -> ".join(shapes)
    return f"~ {entry['name']}: {kept}, bytes {sums[0]} -> {sums[1]}"


def _program(entry: Mapping[str, Any]) -> list[str]:
    out = [f"~ {entry['name']}: {', '.join(entry['changed_files']) or 'record'}"]
    out += [f"    {_field(f)}" for f in entry["fields"][:MOST]]
    if "functions" not in entry:
        return out
    out += [f"    {line} (function)" for line in _only(entry["functions"])]
    moved = [function["name"] for function in entry["functions"]["changed"] if function["only_hbm_addresses"]]
    if moved:
        out.append(f"    ~ other HBM addresses only: {', '.join(moved[:MOST])}{', ...' if len(moved) > MOST else ''}")
    for function in (function for function in entry["functions"]["changed"] if not function["only_hbm_addresses"]):
        out.append(f"    ~ {function['name']} (function): {_counts(function['instructions'])}")
    out.append(f"    instructions: {_counts(entry['instructions'])}")
    for name, (before, after) in entry["memory_per_pe"].items():
        if before != after:
            out.append(f"    {name.replace('_', ' ')} of a PE: {before:,} -> {after:,}")
    return out


def _counts(pairs: Mapping[str, Sequence[int]]) -> str:
    changed = [f"{kind} {a:,} -> {b:,}" for kind, (a, b) in pairs.items() if a != b]
    return ", ".join(changed) or "as many of each kind"
