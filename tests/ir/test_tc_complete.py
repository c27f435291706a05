"""Every operation of the dialect has all that the layers above rely on; a new one without it fails here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from xdsl.traits import Pure

from ir.dialects import tc
from ir.interpreter import TcFunctions
from ir.text import parse_module, print_module

FILES = Path(__file__).parents[1] / "filecheck" / "dialects" / "tc"
OPS_FILES = [FILES / "ops.mlir", FILES / "collectives.mlir", FILES / "quantized.mlir"]
OPERATIONS = list(tc.Tc.operations)

ARGUMENTS = """\
%x: tensor<?x?x576xbf16, #tc.axes<"B,S,_">>, %h: tensor<?x9x?x64xbf16, #tc.axes<"B,_,S,_">>,
%w: tensor<576x576xbf16>, %g: tensor<576xbf16>, %table: tensor<100x576xbf16>, %ids: tensor<?x?xi32, #tc.axes<"B,S">>,
%cache: tensor<?x3x?x64xbf16, #tc.axes<"B,_,KV,_">>, %new: tensor<?x3x?x64xbf16, #tc.axes<"B,_,S,_">>,
%n: tensor<?xi32, #tc.axes<"B">>, %packed: tensor<?x?x128xbf16, #tc.axes<"B,S,_">>,
%words: tensor<1536x72xi32>, %scales: tensor<1536x18xf32>,
%half: tensor<?x9x?x32xbf16, #tc.axes<"B,_,S,_">>, %tokens: tensor<?x?x9x64xbf16, #tc.axes<"B,S,_,_">>"""
RENAMED = {
    "tc.attention": {"q": "h", "k": "cache", "v": "cache", "pos": "ids"},
    "tc.kv_update": {"slots": "ids"},
    "tc.transpose": {"x": "tokens"},
    "tc.slice": {"x": "packed"},
    "tc.dequantize": {"packed": "words", "scale": "scales"},
    "tc.concat": {"a": "half", "b": "half"},
}
"""Names in the documentation of an operation that stand for these arguments."""


def documented(op: type[tc.TcOp]) -> str:
    """The mlir example in an operation's docstring."""
    match = re.search(r"```mlir\n(.*?)```", op.__doc__ or "", re.DOTALL)
    assert match, f"{op.name} has no mlir example in its docstring"
    return match[1].strip()


def test_the_dialect_is_not_empty() -> None:
    assert len(OPERATIONS) >= 17


@pytest.mark.parametrize("op", OPERATIONS, ids=lambda op: op.name)
class TestEveryOperation:
    def test_has_documentation_with_a_reason(self, op: type[tc.TcOp]) -> None:
        assert op.__doc__
        prose = op.__doc__.split("```")[0]
        assert len(prose.split()) >= 8
        assert documented(op)

    def test_documented_example_is_valid_and_round_trips(self, op: type[tc.TcOp]) -> None:
        example = documented(op)
        for name, argument in RENAMED.get(op.name, {}).items():
            example = re.sub(rf"%{name}\b", f"%{argument}", example)
        example = re.sub(r"^%\w+ =", "%result =", example)
        text = f"func.func @f({ARGUMENTS}) {{\n{example}\nfunc.return\n}}"
        printed = print_module(parse_module(text))
        assert op.name in printed
        assert print_module(parse_module(printed)) == printed

    def test_has_a_rule(self, op: type[tc.TcOp]) -> None:
        assert issubclass(op, tc.TcOp)
        assert "rule" in vars(op)

    def test_has_a_kernel(self, op: type[tc.TcOp]) -> None:
        assert op in dict(TcFunctions._impls())

    def test_has_a_round_trip_test(self, op: type[tc.TcOp]) -> None:
        checks = [line for file in OPS_FILES for line in file.read_text("utf-8").splitlines() if "CHECK" in line]
        assert any(re.search(rf"{re.escape(op.name)}\b", line) for line in checks)

    def test_is_pure(self, op: type[tc.TcOp]) -> None:
        assert op.has_trait(Pure)

    def test_documents_its_functions(self, op: type[tc.TcOp]) -> None:
        methods = [n for n, v in vars(op).items() if callable(v) and not n.startswith("_") and n in op.__dict__]
        missing = [
            n for n in methods if n not in vars(tc.TcOp) and n != "get_irdl_definition" and not getattr(op, n).__doc__
        ]
        assert not missing
