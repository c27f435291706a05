"""Tensor types with named axes: builtin `TensorType` plus the encoding `#tc.axes<"B,S,_">`.

A name is a symbol or product (`B`, `B*S`), or `_`. A dynamic dimension must have a name; a static one may keep its
name as a label, which is what specialisation leaves behind. xDSL stores a dynamic size as `DYNAMIC_INDEX` (-2**63);
`shape_of` reports it as -1 and `dims_of` as its text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from typing_extensions import override
from xdsl.dialects.builtin import (
    DYNAMIC_INDEX,
    BFloat16Type,
    Float8E4M3FNType,
    Float16Type,
    Float32Type,
    NoneAttr,
    StringAttr,
    TensorType,
    bf16,
    f16,
    f32,
    i1,
    i8,
    i32,
)
from xdsl.ir import Attribute, ParametrizedAttribute, SSAValue
from xdsl.irdl import irdl_attr_definition
from xdsl.parser import AttrParser
from xdsl.printer import Printer
from xdsl.utils.exceptions import VerifyException

from ir.axes import Dim, Size
from ir.errors import RuleError

ELEMENTS: dict[str, Attribute] = {
    "bf16": bf16,
    "f16": f16,
    "f32": f32,
    "f8e4m3": Float8E4M3FNType(),
    "i32": i32,
    "i8": i8,
    "i1": i1,
}
"""Element types of `tc` tensors by name. f16 occurs only in checkpoints, before the dtype rule; f8e4m3 and i8 are
operands of contractions of quantized models."""

NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "f16": np.dtype(np.float16),
    "f32": np.dtype(np.float32),
    "f8e4m3": np.dtype(ml_dtypes.float8_e4m3fn),
    "i32": np.dtype(np.int32),
    "i8": np.dtype(np.int8),
    "i1": np.dtype(np.bool_),
}
"""The numpy dtype that carries each element type."""

ELEMENT_BYTES = {"bf16": 2, "f16": 2, "f32": 4, "f8e4m3": 1, "i32": 4, "i8": 1, "i1": 1}

ANONYMOUS = "_"


@irdl_attr_definition
class AxesAttr(ParametrizedAttribute):
    """One name per dimension of a tensor, written `#tc.axes<"B,S,_">`."""

    name = "tc.axes"
    names: StringAttr

    def __init__(self, names: Sequence[str] | StringAttr) -> None:
        super().__init__(names if isinstance(names, StringAttr) else StringAttr(",".join(names)))

    @property
    def data(self) -> tuple[str, ...]:
        """The names as a tuple."""
        return tuple(self.names.data.split(","))

    @classmethod
    @override
    def parse_parameters(cls, parser: AttrParser) -> Sequence[Attribute]:
        with parser.in_angle_brackets():
            return [StringAttr(parser.parse_str_literal())]

    @override
    def print_parameters(self, printer: Printer) -> None:
        with printer.in_angle_brackets():
            printer.print_string_literal(self.names.data)

    @override
    def verify(self) -> None:
        for axis in self.data:
            if axis == ANONYMOUS:
                continue
            try:
                size = Size.of(axis)
            except RuleError as error:
                raise VerifyException(str(error)) from None
            if not size.symbols or size.dim != axis:
                raise VerifyException(f"axis name '{axis}' must hold a symbol and be written {size.dim}")


def tensor_type(elem: str | Attribute, shape: Iterable[Dim | tuple[str, int]]) -> TensorType[Attribute]:
    """A tensor type; `"B"` or `"B*S"` in the shape is a symbolic size, `("B", 4)` a static one labelled B."""
    sizes: list[int] = []
    names: list[str] = []
    for dim in shape:
        label, size = (dim[0], Size.of(int(dim[1]))) if isinstance(dim, tuple) else (None, Size.of(_plain(dim)))
        sizes.append(DYNAMIC_INDEX if size.symbols else size.factor)
        names.append(label if label is not None else str(size.dim) if size.symbols else ANONYMOUS)
    encoding = NoneAttr() if all(n == ANONYMOUS for n in names) else AxesAttr(names)
    return TensorType(ELEMENTS[elem] if isinstance(elem, str) else elem, sizes, encoding)


def _plain(dim: Dim) -> Dim:
    return dim if isinstance(dim, str) else int(dim)


def tensor(value: SSAValue | Attribute) -> TensorType[Attribute]:
    """The tensor type of a value; raises VerifyException for any other type."""
    kind = value.type if isinstance(value, SSAValue) else value
    if not isinstance(kind, TensorType):
        raise VerifyException(f"a tensor is expected, not {kind}")
    return kind  # pyright: ignore[reportUnknownVariableType]


def shape_of(value: SSAValue | Attribute) -> list[int]:
    """The sizes, -1 where dynamic."""
    return [-1 if s == DYNAMIC_INDEX else s for s in tensor(value).get_shape()]


def axis_names(value: SSAValue | Attribute) -> list[str]:
    """The name of every dimension, `_` for an anonymous one."""
    kind = tensor(value)
    if isinstance(kind.encoding, AxesAttr):
        return list(kind.encoding.data)
    return [ANONYMOUS] * kind.get_num_dims()


def dims_of(value: SSAValue | Attribute) -> list[Dim]:
    """The sizes: an int where static, the text such as `B*S` where dynamic."""
    return [n if s == -1 else s for s, n in zip(shape_of(value), axis_names(value), strict=True)]


def elem_of(value: SSAValue | Attribute) -> str:
    """The element type by name, a key of `ELEMENTS`."""
    element = tensor(value).element_type
    for name, attr in ELEMENTS.items():
        if attr == element:
            return name
    raise VerifyException(f"element type {element} is none of {', '.join(ELEMENTS)}")


def is_float(value: SSAValue | Attribute) -> bool:
    """Whether the elements are floating-point numbers."""
    return isinstance(tensor(value).element_type, (BFloat16Type, Float16Type, Float32Type, Float8E4M3FNType))


def numpy_dtype(value: SSAValue | Attribute) -> np.dtype[Any]:
    """The numpy dtype that carries the elements of a value."""
    return NUMPY_DTYPES[elem_of(value)]


def with_elem(value: SSAValue | Attribute, elem: str) -> TensorType[Attribute]:
    """The tensor type with another element type."""
    kind = tensor(value)
    return TensorType(ELEMENTS[elem], kind.get_shape(), kind.encoding)


def labelled_dims(value: SSAValue | Attribute) -> list[Dim | tuple[str, int]]:
    """The shape in the form `tensor_type` takes, labels of static sizes included."""
    return [
        n if s == -1 else s if n == ANONYMOUS else (n, s)
        for s, n in zip(shape_of(value), axis_names(value), strict=True)
    ]


def specialised(value: SSAValue | Attribute, sizes: Mapping[str, int]) -> TensorType[Attribute]:
    """The type with numbers for symbols. Names stay as labels of sizes that become static."""
    shape: list[Dim | tuple[str, int]] = []
    for dim in labelled_dims(value):
        size = Size.of(dim).substitute(sizes) if isinstance(dim, str) else None
        if size is None or size.symbols:
            shape.append(dim if size is None else size.dim)
        else:
            shape.append((str(dim), size.factor))
    return tensor_type(tensor(value).element_type, shape)


def verify_tensor(value: SSAValue) -> None:
    """Check element type, and that every dynamic dimension has a name. Raises VerifyException."""
    kind = tensor(value)
    elem_of(kind)
    if not isinstance(kind.encoding, (AxesAttr, NoneAttr)):
        raise VerifyException(f"encoding {kind.encoding} is no #tc.axes")
    names = axis_names(kind)
    if len(names) != kind.get_num_dims():
        raise VerifyException(f"{kind} has {kind.get_num_dims()} dimensions but {len(names)} axis names")
    for index, (size, name) in enumerate(zip(shape_of(kind), names, strict=True)):
        if size == -1 and name == ANONYMOUS:
            raise VerifyException(f"dynamic dimension {index} of {kind} needs a name")
