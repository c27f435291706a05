"""Assembly text of streams: `format_stream` and `parse_stream` are exact inverses of each other.

One instruction a line::

    main after(sub=3) exec(slices=64 fetch=(base=0 loops=[8:64 32:2] dtype=bf16 packet=32) commit=(...)) @0

A descriptor is `name(field=value ...)`; fields that have their default are left out. Enumerations are lower-case names,
tuples of varying length are `[a b c]`, tuples of fixed length (loops) are `a:b`. `@n` is the index of the source
location. The syntax of a class follows from its dataclass fields, so that a new field needs no new syntax.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import types
from collections.abc import Callable, Iterable
from enum import IntEnum
from functools import cache
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from backend_rngd.isa.descriptors import (
    After,
    Call,
    Context,
    Descriptor,
    Dma,
    Exec,
    Instruction,
    LoadTrf,
    LoadVrf,
    Memset,
    Notify,
    Routine,
    Stream,
    Wait,
)

KINDS: dict[str, type[Descriptor]] = {
    "exec": Exec,
    "load_trf": LoadTrf,
    "load_vrf": LoadVrf,
    "memset": Memset,
    "dma": Dma,
    "call": Call,
    "notify": Notify,
    "wait": Wait,
}
NAME_OF_KIND: dict[type[Descriptor], str] = {kind: name for name, kind in KINDS.items()}

_TOKEN = re.compile(r'[()\[\]=:@]|"(?:\\.|[^"\\])*"|[^\s()\[\]=:@"]+')

T = TypeVar("T")
Formatter = Callable[[Any], str]
Parser = Callable[["Cursor"], Any]


class TextError(ValueError):
    """Text that is not valid assembly; says which token and where."""


class Cursor:
    """Tokens of one line with a position."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens: list[str] = _TOKEN.findall(text)
        self.position = 0

    def peek(self) -> str:
        """The next token, or an empty string at the end."""
        return self.tokens[self.position] if self.position < len(self.tokens) else ""

    def take(self) -> str:
        """The next token, consumed."""
        if self.position >= len(self.tokens):
            raise TextError(f"unexpected end of {self.text!r}")
        self.position += 1
        return self.tokens[self.position - 1]

    def expect(self, token: str) -> None:
        """Consume exactly `token`."""
        found = self.take()
        if found != token:
            raise TextError(f"expected {token!r}, found {found!r} (token {self.position} of {self.text!r})")

    def accept(self, token: str) -> bool:
        """Consume `token` if it comes next."""
        if self.peek() != token:
            return False
        self.position += 1
        return True

    def integer(self) -> int:
        """The next token as an integer."""
        found = self.take()
        try:
            return int(found)
        except ValueError:
            raise TextError(f"expected an integer, found {found!r} in {self.text!r}") from None

    def end(self) -> None:
        """Nothing may follow."""
        if self.peek():
            raise TextError(f"unexpected {self.peek()!r} at the end of {self.text!r}")


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise TextError(f"expected a number, found {text!r}") from None


def _same(a: Any, b: Any) -> bool:
    """Equality that tells -0.0 from 0.0 and 1 from 1.0."""
    if isinstance(a, float) and isinstance(b, float):
        return (a == b and math.copysign(1, a) == math.copysign(1, b)) or (math.isnan(a) and math.isnan(b))
    return type(a) is type(b) and a == b


def _union_member(kind: Any) -> Any:
    """X of `X | None`."""
    members = [m for m in get_args(kind) if m is not type(None)]
    if len(members) != 1:
        raise TypeError(f"a field of type {kind} has no text form")
    return members[0]


@cache
def _formatter(kind: Any) -> Formatter:
    """How to write a value of a field type."""
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        return _formatter(_union_member(kind))
    if origin is tuple:
        arguments = get_args(kind)
        if arguments[-1] is Ellipsis:
            inner = _formatter(arguments[0])
            return lambda v: "[" + " ".join([inner(x) for x in v]) + "]"
        if all(a is int for a in arguments):
            return lambda v: ":".join(map(str, v))
        parts = [_formatter(a) for a in arguments]
        return lambda v: ":".join([f(x) for f, x in zip(parts, v, strict=True)])
    if kind is bool:
        return lambda v: "true" if v else "false"
    if kind is int:
        return str
    if kind is float:
        return lambda v: repr(float(v))
    if kind is str:
        return json.dumps
    if isinstance(kind, type) and issubclass(kind, IntEnum):
        names = {member: member.name.lower() for member in kind}
        return lambda v: names[v]
    if dataclasses.is_dataclass(cast(object, kind)):
        return _fields_formatter(cast(type[Any], kind))
    raise TypeError(f"a field of type {kind} has no text form")


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default  # MISSING for a required field


def _fields_formatter(kind: type[Any]) -> Formatter:
    hints = get_type_hints(kind)
    fields = [(f.name, f.name + "=", _formatter(hints[f.name]), _default(f)) for f in dataclasses.fields(kind)]

    def write(value: Any) -> str:
        out: list[str] = []
        for name, prefix, inner, default in fields:
            item = getattr(value, name)
            if item is default or (default is not dataclasses.MISSING and _same(item, default)):
                continue
            out.append(prefix + inner(item))
        return "(" + " ".join(out) + ")"

    return write


@cache
def _parser(kind: Any) -> Parser:
    """How to read a value of a field type."""
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        return _parser(_union_member(kind))
    if origin is tuple:
        arguments = get_args(kind)
        if arguments[-1] is Ellipsis:
            return _list_parser(_parser(arguments[0]))
        return _fixed_parser([_parser(a) for a in arguments])
    if kind is bool:
        return _boolean
    if kind is int:
        return Cursor.integer
    if kind is float:
        return lambda c: _float(c.take())
    if kind is str:
        return _string
    if isinstance(kind, type) and issubclass(kind, IntEnum):
        return _enum_parser(kind)
    if dataclasses.is_dataclass(cast(object, kind)):
        return _fields_parser(cast(type[Any], kind))
    raise TypeError(f"a field of type {kind} has no text form")


def _boolean(cursor: Cursor) -> bool:
    token = cursor.take()
    if token not in ("true", "false"):
        raise TextError(f"expected true or false, found {token!r} in {cursor.text!r}")
    return token == "true"


def _string(cursor: Cursor) -> str:
    token = cursor.take()
    if not token.startswith('"'):
        raise TextError(f"expected a quoted string, found {token!r} in {cursor.text!r}")
    return str(json.loads(token))


def _enum_parser(kind: type[IntEnum]) -> Parser:
    members = {member.name.lower(): member for member in kind}

    def read(cursor: Cursor) -> IntEnum:
        token = cursor.take()
        if token not in members:
            raise TextError(f"{token!r} is not a {kind.__name__.lower()}: {', '.join(members)}")
        return members[token]

    return read


def _list_parser(inner: Parser) -> Parser:
    def read(cursor: Cursor) -> tuple[Any, ...]:
        cursor.expect("[")
        out: list[Any] = []
        while not cursor.accept("]"):
            out.append(inner(cursor))
        return tuple(out)

    return read


def _fixed_parser(parts: list[Parser]) -> Parser:
    def read(cursor: Cursor) -> tuple[Any, ...]:
        out = [parts[0](cursor)]
        for part in parts[1:]:
            cursor.expect(":")
            out.append(part(cursor))
        return tuple(out)

    return read


def _fields_parser(kind: type[Any]) -> Parser:
    hints = get_type_hints(kind)
    fields = {f.name: _parser(hints[f.name]) for f in dataclasses.fields(kind)}
    required = [f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING]

    def read(cursor: Cursor) -> Any:
        cursor.expect("(")
        values: dict[str, Any] = {}
        while not cursor.accept(")"):
            name = cursor.take()
            if name not in fields:
                raise TextError(f"{kind.__name__} has no field {name!r}: {', '.join(fields)}")
            if name in values:
                raise TextError(f"field {name!r} is given twice in {cursor.text!r}")
            cursor.expect("=")
            values[name] = fields[name](cursor)
        missing = [name for name in required if name not in values]
        if missing:
            raise TextError(f"{kind.__name__} needs {', '.join(missing)} in {cursor.text!r}")
        return kind(**values)

    return read


# Descriptors and instructions ---------------------------------------------------------------------------------------
def format_descriptor(desc: Descriptor) -> str:
    """One descriptor, such as `memset(slices=64 base=0 bytes=128)`."""
    return NAME_OF_KIND[type(desc)] + _formatter(type(desc))(desc)


def _descriptor(cursor: Cursor) -> Descriptor:
    name = cursor.take()
    if name not in KINDS:
        raise TextError(f"unknown instruction {name!r}: {', '.join(KINDS)}")
    return _parser(KINDS[name])(cursor)


def parse_descriptor(text: str) -> Descriptor:
    """Inverse of `format_descriptor`; raises TextError."""
    cursor = Cursor(text)
    out = _descriptor(cursor)
    cursor.end()
    return out


def format_after(after: After) -> str:
    """Dependencies, such as `after(main=3 call=1)`; empty when there are none."""
    body = _formatter(After)(after)
    return "" if body == "()" else "after" + body


def _after(cursor: Cursor) -> After:
    return _parser(After)(cursor) if cursor.accept("after") else After()


def parse_after(text: str) -> After:
    """Inverse of `format_after`; raises TextError."""
    cursor = Cursor(text)
    out = _after(cursor)
    cursor.end()
    return out


_CONTEXT_NAMES = {c: c.name.lower() for c in Context}


def format_instruction(instruction: Instruction) -> str:
    """One instruction on one line."""
    after = format_after(instruction.after)
    head = _CONTEXT_NAMES[instruction.context]
    middle = f" {after} " if after else " "
    return f"{head}{middle}{format_descriptor(instruction.what)} @{instruction.location}"


def parse_instruction(text: str) -> Instruction:
    """Inverse of `format_instruction`; raises TextError."""
    cursor = Cursor(text)
    context = _parser(Context)(cursor)
    after = _after(cursor)
    what = _descriptor(cursor)
    cursor.expect("@")
    location = cursor.integer()
    cursor.end()
    return Instruction(context, after, what, location)


def _lines(stream: Stream) -> Iterable[str]:
    yield f"unit {stream.unit} slices {stream.slices}"
    for i, location in enumerate(stream.locations):
        yield f"location @{i} {json.dumps(location)}"
    for routine in stream.routines:
        yield f"routine {json.dumps(routine.name)}"
        for instruction in routine.instructions:
            yield "  " + format_instruction(instruction)


def format_stream(stream: Stream) -> str:
    """The whole stream as text, ending with a line break."""
    return "\n".join(_lines(stream)) + "\n"


def parse_stream(text: str) -> Stream:
    """Inverse of `format_stream`. Empty lines and lines that start with `;` are skipped. Raises TextError."""
    unit = slices = 0
    locations: list[str] = []
    routines: list[tuple[str, list[Instruction]]] = []
    seen_unit = False
    for number, raw in enumerate(text.split("\n"), 1):
        line = raw.strip()
        if not line or line.startswith(";"):
            continue
        try:
            word, _, rest = line.partition(" ")
            if word == "unit":
                cursor = Cursor(rest)
                unit = cursor.integer()
                cursor.expect("slices")
                slices = cursor.integer()
                cursor.end()
                seen_unit = True
            elif word == "location":
                cursor = Cursor(rest)
                cursor.expect("@")
                if cursor.integer() != len(locations):
                    raise TextError("locations must be numbered from 0 without gaps")
                locations.append(_string(cursor))
                cursor.end()
            elif word == "routine":
                cursor = Cursor(rest)
                routines.append((_string(cursor), []))
                cursor.end()
            elif not routines:
                raise TextError("an instruction before the first routine")
            else:
                routines[-1][1].append(parse_instruction(line))
        except TextError as e:
            raise TextError(f"line {number}: {e}") from None
    if not seen_unit:
        raise TextError("the line `unit N slices N` is missing")
    return Stream(unit, slices, tuple(Routine(n, tuple(body)) for n, body in routines), tuple(locations))
