"""Binary form of streams: one structured table for each class of descriptor part, rows shared by equal parts.

`encode` gives named numpy arrays, `decode` the stream back; `save_npz` and `load_npz` store them. References are row
numbers (-1: absent); tuples of varying length are (offset, count) into a pool of equal width.
"""

from __future__ import annotations

import dataclasses
import io
import json
import types
from collections.abc import Callable
from enum import IntEnum
from functools import cache
from pathlib import Path
from typing import Any, Union, cast, get_args, get_origin, get_type_hints

import numpy as np

from backend_rngd.isa.descriptors import After, Context, Instruction, Operand, Routine, Stream, VectorOp
from backend_rngd.isa.text import KINDS

Tables = dict[str, np.ndarray]

FORMAT_VERSION = 3
READABLE_VERSIONS = (1, 2, 3)  # 2 added notify and wait, 3 fetch.lookup
_KIND_LIST = tuple(KINDS.values())


class TableError(ValueError):
    """Tables that are not a stream of this format version."""


def _optional(kind: Any) -> tuple[Any, bool]:
    if get_origin(kind) in (Union, types.UnionType):
        return next(a for a in get_args(kind) if a is not type(None)), True
    return kind, False


@cache
def _columns(kind: type[Any]) -> list[tuple[str, Any, bool]]:
    """(field, type, optional) of a dataclass."""
    hints = get_type_hints(kind)
    return [(f.name, *_optional(hints[f.name])) for f in dataclasses.fields(kind)]


@cache
def _dtype(kind: type[Any]) -> np.dtype[np.void]:
    """Structured dtype of the table of a dataclass."""
    fields: list[tuple[str, str]] = []
    for name, inner, _ in _columns(kind):
        if inner is float:
            fields.append((name, "<f8"))
        elif get_origin(inner) is tuple and get_args(inner)[-1] is Ellipsis:
            fields += [(name + ".offset", "<i8"), (name + ".count", "<i4")]
        elif get_origin(inner) is tuple:  # fetch.second: (base, strides)
            fields += [(name + ".base", "<i8"), (name + ".offset", "<i8"), (name + ".count", "<i4")]
        else:
            fields.append((name, "<i8"))
    return np.dtype(fields)


Cells = Callable[["_Writer", Any, list[Any]], None]


class _Writer:
    """Collects rows; equal parts share a row."""

    def __init__(self) -> None:
        self.rows: dict[type[Any], list[tuple[Any, ...]]] = {}
        self.known: dict[type[Any], dict[tuple[Any, ...], int]] = {}
        self.pools: dict[int, list[int]] = {}
        self.runs: dict[tuple[int, tuple[Any, ...]], int] = {}

    def part(self, value: Any) -> int:
        """Row of a dataclass instance."""
        kind = cast("type[Any]", type(value))
        names, cells = _row_writer(kind)
        row: list[Any] = []
        for name, cell in zip(names, cells, strict=True):
            cell(self, getattr(value, name), row)
        key = tuple(row)
        if kind in _WITH_FLOATS:  # 0.0 and -0.0 are equal keys but different numbers
            key = (*key, *[repr(x) for x in row if isinstance(x, float)])
        rows = self.rows.setdefault(kind, [])
        number = self.known.setdefault(kind, {}).setdefault(key, len(rows))
        if number == len(rows):
            rows.append(tuple(row))
        return number

    def run(self, values: tuple[Any, ...], width: int, row: list[Any]) -> None:
        """Append (offset, count) of `values` in the pool of `width` numbers each."""
        if not values:
            row += (0, 0)
            return
        key = (width, values)
        start = self.runs.get(key)
        if start is None:
            pool = self.pools.setdefault(width, [])
            start = self.runs[key] = len(pool) // width
            for v in values:
                pool.extend(v if width > 1 else (v,))
        row += (start, len(values))


_WITH_FLOATS = frozenset({Operand, VectorOp})


def _cell(kind: Any) -> Cells:
    """How to append the cells of one field."""
    if get_origin(kind) is tuple:
        inner = get_args(kind)[0]
        if get_args(kind)[-1] is not Ellipsis:
            return _based_run
        if dataclasses.is_dataclass(inner):
            return lambda w, v, row: w.run(tuple([w.part(x) for x in v]), 1, row)
        width = len(get_args(inner)) if get_origin(inner) is tuple else 1
        return lambda w, v, row: w.run(v, width, row)
    if dataclasses.is_dataclass(kind):
        return lambda w, v, row: row.append(-1 if v is None else w.part(v))
    if kind is float:
        return lambda _, v, row: row.append(float(v))
    return lambda _, v, row: row.append(-1 if v is None else int(v))


def _based_run(writer: _Writer, value: Any, row: list[Any]) -> None:
    """fetch.second: (base, strides) or None."""
    if value is None:
        row += (0, 0, -1)
    else:
        row.append(value[0])
        writer.run(value[1], 1, row)


@cache
def _row_writer(kind: type[Any]) -> tuple[list[str], list[Cells]]:
    columns = _columns(kind)
    return [name for name, _, _ in columns], [_cell(inner) for _, inner, _ in columns]


def _blob(value: Any) -> np.ndarray:
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


_ORDER = np.dtype([(n, "<i4") for n in ("context", "main", "sub", "dma", "call", "enter", "kind", "row", "location")])


def encode(stream: Stream) -> Tables:
    """Tables of a stream."""
    writer = _Writer()
    order: list[tuple[int, ...]] = []
    starts: list[int] = []
    kinds = {kind: i for i, kind in enumerate(_KIND_LIST)}
    for routine in stream.routines:
        starts.append(len(order))
        for i in routine.instructions:
            a = i.after
            order.append(
                (i.context, a.main, a.sub, a.dma, a.call, a.enter, kinds[type(i.what)], writer.part(i.what), i.location)
            )
    header = {
        "format": FORMAT_VERSION,
        "unit": stream.unit,
        "slices": stream.slices,
        "routines": [r.name for r in stream.routines],
        "starts": [*starts, len(order)],
        "locations": list(stream.locations),
    }
    tables: Tables = {"header": _blob(header), "order": np.array(order, _ORDER)}
    for kind, rows in writer.rows.items():
        tables[kind.__name__] = np.array(rows, _dtype(kind))
    for width, values in writer.pools.items():
        tables[f"pool{width}"] = np.array(values, np.int64).reshape(-1, width)
    return tables


class _Reader:
    """Builds descriptor parts from tables, each row once."""

    def __init__(self, tables: Tables) -> None:
        self.tables = tables
        self.parts: dict[type[Any], list[Any]] = {}
        self.pools = {w: tables[f"pool{w}"].tolist() for w in (1, 2, 3) if f"pool{w}" in tables}

    def all(self, kind: type[Any]) -> list[Any]:
        """Every row of a table as an instance."""
        if kind not in self.parts:
            table = self.tables.get(kind.__name__)
            if table is None:
                self.parts[kind] = []
            else:
                table = _current(kind, table)
                readers: list[Callable[[Any], Any]] = []
                for _, inner, optional in _columns(kind):
                    readers.append(self._reader(inner, optional))
                out: list[Any] = []
                for row in table.tolist():
                    cells = iter(row)
                    out.append(kind(*[read(cells) for read in readers]))
                self.parts[kind] = out
        return self.parts[kind]

    def _reader(self, kind: Any, optional: bool) -> Callable[[Any], Any]:
        if get_origin(kind) is tuple:
            if get_args(kind)[-1] is Ellipsis:
                run = self._run_reader(get_args(kind)[0])
                return lambda cells: run(next(cells), next(cells))
            numbers = self._run_reader(int)

            def pair(cells: Any) -> Any:
                base, offset, count = next(cells), next(cells), next(cells)
                return None if count < 0 else (base, numbers(offset, count))

            return pair
        if dataclasses.is_dataclass(kind):
            parts = self.all(kind)  # type: ignore[arg-type]
            return lambda cells: None if (row := next(cells)) < 0 else parts[row]
        if isinstance(kind, type) and issubclass(kind, IntEnum):
            members = {int(m): m for m in kind}
            if optional:
                return lambda cells: members.get(next(cells))
            return lambda cells: members[next(cells)]
        if kind is bool:
            return lambda cells: bool(next(cells))
        return next

    def _run_reader(self, kind: Any) -> Callable[[int, int], tuple[Any, ...]]:
        if dataclasses.is_dataclass(kind):
            parts = self.all(kind)  # type: ignore[arg-type]
            pool = self.pools.get(1, [])
            return lambda offset, count: tuple(parts[r[0]] for r in pool[offset : offset + count])
        if get_origin(kind) is tuple:
            wide = self.pools.get(len(get_args(kind)), [])
            return lambda offset, count: tuple(tuple(r) for r in wide[offset : offset + count])
        flat = self.pools.get(1, [])
        return lambda offset, count: tuple(r[0] for r in flat[offset : offset + count])


def _current(kind: type[Any], table: np.ndarray) -> np.ndarray:
    """A table with the columns of this version: fields that an older one did not have are absent from all rows."""
    wanted = _dtype(kind)
    if table.dtype == wanted:
        return table
    have = table.dtype.names or ()
    missing = [name for name in wanted.names or () if name not in have]
    absent = {f.name for f in dataclasses.fields(kind) if f.default is None}
    if not set(have) <= set(wanted.names or ()) or not set(missing) <= absent:
        raise TableError(f"table {kind.__name__} has other columns than this version expects")
    out = np.full(len(table), -1, wanted)
    for name in have:
        out[name] = table[name]
    return out


def decode(tables: Tables) -> Stream:
    """Inverse of `encode`; raises TableError if the tables are of another version or damaged."""
    try:
        header = json.loads(bytes(tables["header"]))
    except (KeyError, ValueError) as e:
        raise TableError(f"not a stream: {e}") from None
    if header.get("format") not in READABLE_VERSIONS:
        known = " and ".join(map(str, READABLE_VERSIONS))
        raise TableError(f"stream format {header.get('format')}, this version reads {known}")
    reader = _Reader(tables)
    contexts = list(Context)
    try:
        instructions: list[Instruction] = []
        rows = cast("list[tuple[int, ...]]", tables["order"].tolist())
        for context, main, sub, dma, call, enter, kind, row, location in rows:
            what = reader.all(_KIND_LIST[kind])[row]
            after = After(main, sub, dma, call, bool(enter))
            instructions.append(Instruction(contexts[context], after, what, location))
    except (KeyError, IndexError) as e:
        raise TableError(f"damaged tables: {e!r}") from None
    starts = header["starts"]
    routines = tuple(
        Routine(name, tuple(instructions[a:b]))
        for name, a, b in zip(header["routines"], starts, starts[1:], strict=False)
    )
    return Stream(header["unit"], header["slices"], routines, tuple(header["locations"]))


def save_npz(stream: Stream, path: str | Path) -> None:
    """Write a stream to one compressed file (exactly `path`)."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **encode(stream))
    Path(path).write_bytes(buffer.getvalue())


def load_npz(path: str | Path) -> Stream:
    """Read a stream written by `save_npz`."""
    with np.load(path, allow_pickle=False) as file:
        return decode({name: file[name] for name in file.files})
