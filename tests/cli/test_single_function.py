"""`rngdc simulate` and `rngdc check` on a file with one `tc` function."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Command
from tests.cli.test_build_problems import refused

LINEAR = """
func.func @linear(%x: tensor<1x32x64xbf16>, %w: tensor<96x64xbf16>) -> tensor<1x32x96xbf16>
    attributes {arg_names = ["x", "w"], result_names = ["y"]} {
  %y = tc.contract "b s i, o i -> b s o" (%x, %w) : tensor<1x32x96xbf16>
  func.return %y : tensor<1x32x96xbf16>
}
"""
SILU = """
func.func @main(%x: tensor<2x24x128xbf16>) -> tensor<2x24x128xbf16> attributes {arg_names = ["x"]} {
  %y = tc.map "silu(a)" over "b s h -> b s h" (%x) : tensor<2x24x128xbf16>
  func.return %y : tensor<2x24x128xbf16>
}
"""


@pytest.mark.parametrize("text", [LINEAR, SILU], ids=["linear", "silu"])
def test_one_operation_is_timed_and_checked(rngdc: Command, tmp_path: Path, text: str) -> None:
    path = tmp_path / "op.mlir"
    path.write_text(text, "utf-8")
    checked = rngdc("check", path, "--json", "-")
    assert checked.status == 0, checked.out + checked.err
    (bucket,) = checked.json["buckets"]
    assert all(m["close"] for m in bucket["streams"]["results"].values())
    assert bucket["streams"]["results"]
    report = rngdc("simulate", path, "--json", "-").json
    assert report["artifact"] == str(path)
    assert report["buckets"][0]["cycles"] > 0
    trace = tmp_path / "trace.json"
    assert rngdc("simulate", path, "--trace", trace).status == 0
    assert trace.stat().st_size > 0


def test_problems_of_a_file(rngdc: Command, tmp_path: Path) -> None:
    path = tmp_path / "op.mlir"
    refused(rngdc("simulate", path), "cannot be read")
    path.write_text("func.func @main(", "utf-8")
    refused(rngdc("check", path), "is no valid module")
    path.write_text(SILU.replace("2x24x", "?x?x").replace("bf16>", 'bf16, #tc.axes<"B,S,_">>'), "utf-8")
    refused(rngdc("simulate", path), "the sizes B, S are open", "specialise{")
    path.write_text(LINEAR + LINEAR.replace("@linear", "@other"), "utf-8")
    refused(rngdc("simulate", path), "2 functions")
    path.write_text("builtin.module {}", "utf-8")
    refused(rngdc("simulate", path), "no function")


def test_what_the_backend_has_no_lowering_for(rngdc: Command, tmp_path: Path) -> None:
    path = tmp_path / "op.mlir"
    path.write_text(
        """
func.func @main(%x: tensor<1x8x64xbf16>, %q: tensor<1x8x64xbf16>) -> tensor<1x8x8xbf16>
    attributes {arg_names = ["x", "q"]} {
  %y = tc.contract "b s i, b t i -> b s t" (%x, %q) : tensor<1x8x8xbf16>
  func.return %y : tensor<1x8x8xbf16>
}
""",
        "utf-8",
    )
    refused(rngdc("simulate", path), "of two activations")
