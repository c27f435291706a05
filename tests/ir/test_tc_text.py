from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from xdsl.dialects.builtin import FileLineColLoc, IntAttr, StringAttr

from ir.dialects import tc
from ir.errors import UserError
from ir.text import parse_module, print_module, read_module
from ir.types import axis_names, dims_of, elem_of, shape_of, specialised, tensor_type, with_elem


def test_types_name_their_dimensions() -> None:
    kind = tensor_type("bf16", ["B", "S*B", ("KV", 8), 4])
    assert str(kind) == 'tensor<?x?x8x4xbf16, #tc.axes<"B,B*S,KV,_">>'
    assert shape_of(kind) == [-1, -1, 8, 4]
    assert axis_names(kind) == ["B", "B*S", "KV", "_"]
    assert dims_of(kind) == ["B", "B*S", 8, 4]
    assert elem_of(with_elem(kind, "f32")) == "f32"
    assert str(tensor_type("f32", [2, 3])) == "tensor<2x3xf32>"


def test_specialised_types_keep_labels() -> None:
    kind = tensor_type("bf16", ["B", "B*S", 4])
    assert str(specialised(kind, {"B": 2})) == 'tensor<2x?x4xbf16, #tc.axes<"B,S*2,_">>'
    assert str(specialised(kind, {"B": 2, "S": 3})) == 'tensor<2x6x4xbf16, #tc.axes<"B,B*S,_">>'
    assert specialised(specialised(kind, {"B": 2, "S": 3}), {"S": 9}) == specialised(kind, {"B": 2, "S": 3})


@pytest.mark.parametrize(
    ("elem", "values"),
    [("bf16", [1.5, -0.0078125]), ("f32", [0.1, 3e38]), ("i32", [-7, 2**31 - 1]), ("i1", [True, False])],
)
def test_constants_hold_their_values(elem: str, values: list[float]) -> None:
    op = tc.ConstantOp(np.array(values), tensor_type(elem, [2]))
    op.verify()
    assert op.array().tolist() == pytest.approx(values, rel=1e-7)


def test_errors_name_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.mlir"
    path.write_text("func.func @main() {\n  %x = tc.weight 5\n}")
    with pytest.raises(UserError, match=r"(?s)bad.mlir is no valid module.*bad.mlir:2"):
        read_module(path)
    with pytest.raises(UserError, match=r"missing.mlir cannot be read"):
        read_module(tmp_path / "missing.mlir")


def test_locations_round_trip_on_request() -> None:
    module = parse_module('%x = tc.weight "w" : tensor<2xf32>')
    op = next(o for o in module.walk() if isinstance(o, tc.WeightOp))
    op.location = FileLineColLoc(StringAttr("model.py"), IntAttr(7), IntAttr(0))
    assert "model.py" not in print_module(module)
    again = parse_module(print_module(module, locations=True))
    assert next(o for o in again.walk() if isinstance(o, tc.WeightOp)).location == op.location
