"""Text and tables are exact inverses of streams."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from isa_builders import chain, constant, copy_pass, descriptors, instruction, load, matmul, stream, streams

from backend_rngd.isa.descriptors import After, Alu, Call, Descriptor, Exec, Op, Stream
from backend_rngd.isa.tables import TableError, decode, encode, load_npz, save_npz
from backend_rngd.isa.text import (
    TextError,
    format_after,
    format_descriptor,
    format_stream,
    parse_after,
    parse_descriptor,
    parse_stream,
)


@given(streams())
@settings(max_examples=200, deadline=None)
def test_stream_text_round_trip(s: Stream) -> None:
    text = format_stream(s)
    back = parse_stream(text)
    assert back == s
    assert format_stream(back) == text


@given(descriptors())
@settings(max_examples=200, deadline=None)
def test_descriptor_text_round_trip(desc: Descriptor) -> None:
    assert parse_descriptor(format_descriptor(desc)) == desc


@given(streams())
@settings(max_examples=200, deadline=None)
def test_tables_round_trip(s: Stream) -> None:
    assert decode(encode(s)) == s


def test_numbers_survive_exactly(tmp_path: Path) -> None:
    """The smallest f32, infinities, negative zero and an inexact decimal."""
    numbers = [1e-45, math.inf, -math.inf, -0.0, 0.1]
    s = stream([instruction(chain(constant(Alu.FP_MUL0, Op.MUL, x))) for x in numbers])
    save_npz(s, tmp_path / "s.npz")
    for back in (parse_stream(format_stream(s)), load_npz(tmp_path / "s.npz")):
        found = [i.what.vector[0].operand.value for i in back.routines[0].instructions if isinstance(i.what, Exec)]
        assert [repr(x) for x in found] == [repr(x) for x in numbers]


def test_file_round_trip(tmp_path: Path) -> None:
    s = stream([instruction(load()), instruction(matmul(), After(dma=1)), instruction(Call(1, ((8, 0, 64),)))], [])
    save_npz(s, tmp_path / "a.npz")
    assert load_npz(tmp_path / "a.npz") == s
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]


def test_equal_parts_are_stored_once() -> None:
    s = stream([instruction(dataclasses.replace(matmul(), slices=n)) for n in range(1, 65)])
    tables = encode(s)
    assert len(tables["Exec"]) == 64
    assert len(tables["Fetch"]) == len(tables["Contract"]) == len(tables["Commit"]) == 1


def test_text_is_readable() -> None:
    assert format_descriptor(load()) == (
        "dma(source=(space=hbm base=4096) destination=(space=dm base=0) loops=[64:1024:4194304] packet=1024)"
    )
    assert format_after(After()) == ""
    assert format_after(After(1, enter=False)) == "after(main=1 enter=false)"
    assert parse_after("") == After()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("exec(slices=64)", "needs fetch, commit"),
        ("exec(lanes=8)", "has no field 'lanes'"),
        ("execute(slices=64)", "unknown instruction"),
        ("memset(slices=64 base=0 bytes=x)", "expected an integer"),
        ("memset(slices=64 base=0 bytes=8", "unexpected end"),
        ("memset(slices=64 base=0 bytes=8) 7", "unexpected '7'"),
        ("memset(slices=64 slices=64 base=0 bytes=8)", "given twice"),
        ("dma(source=(space=sram base=0))", "is not a space"),
    ],
)
def test_errors_name_the_token(text: str, message: str) -> None:
    with pytest.raises(TextError, match=message.replace("(", r"\(")):
        parse_descriptor(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line `unit N slices N` is missing"),
        ("unit 0 slices 64\n  main memset(slices=64 base=0 bytes=8) @0", "line 2: an instruction before"),
        ('unit 0 slices 64\nlocation @1 "x"', "line 2: locations must be numbered"),
        ('unit 0 slices 64\nroutine "a"\n  main memset(slices=64 base=0 bytes=8)', "line 3: unexpected end"),
    ],
)
def test_stream_errors_name_the_line(text: str, message: str) -> None:
    with pytest.raises(TextError, match=message):
        parse_stream(text)


def test_comments_and_blank_lines_are_skipped() -> None:
    assert parse_stream('; hello\n\nunit 1 slices 128\nroutine "a"\n') == parse_stream('unit 1 slices 128\nroutine "a"')


def test_other_versions_are_refused() -> None:
    tables = encode(stream([instruction(load())]))
    header = bytes(tables["header"]).replace(b'"format": 3', b'"format": 9')
    with pytest.raises(TableError, match="stream format 9"):
        decode(tables | {"header": np.frombuffer(header, np.uint8)})
    with pytest.raises(TableError, match="not a stream"):
        decode({})
    with pytest.raises(TableError, match="damaged"):
        decode({k: v for k, v in tables.items() if k != "Dma"})
    with pytest.raises(TableError, match="other columns"):
        decode(tables | {"Dma": np.zeros(1, [("a", "<i8")])})


def test_tables_of_the_version_before_are_read() -> None:
    """Format 2 had no lookup; a stream without one means the same."""
    written = stream([instruction(load()), instruction(copy_pass())])
    tables = encode(written)
    header = bytes(tables["header"]).replace(b'"format": 3', b'"format": 2')
    names = [n for n in tables["Fetch"].dtype.names or () if n != "lookup"]
    older = tables | {"header": np.frombuffer(header, np.uint8), "Fetch": tables["Fetch"][names].copy()}
    assert decode(older) == written
    with pytest.raises(TableError, match="other columns"):
        decode(tables | {"Fetch": tables["Fetch"][[n for n in names if n != "packet"]].copy()})
