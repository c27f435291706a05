"""How a weight is quantized, as text in the IR: `int8 channel dynamic`, `fp8 tensor static`, `int4 group 128`.

A quantized contraction multiplies stored numbers; scales turn its sums into values:

    y[t, n] = sum_k q(x)[t, k] * w[n, k] * input_scale[t] * weight_scale[n]

* `int8`, `fp8` (f8e4m3): weights and activations have 8 bits. Weight scales are per output `channel` or per `tensor`.
  Activations are quantized with a `dynamic` scale per token (its largest magnitude becomes the largest number) or with
  one `static` scale of the checkpoint.
* `int4`: weights have 4 bits and a scale per output channel and `group` of inputs (0: all); activations stay bf16.

A module that capture made names its quantized weights in the attribute `tc.quantized`; `bind-quantized` applies it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from xdsl.dialects.builtin import DictionaryAttr, ModuleOp, StringAttr

QUANTIZED = "tc.quantized"
Kind = Literal["int8", "fp8", "int4"]

LARGEST: dict[str, float] = {"int8": 127.5, "fp8": 448.0}
"""What the largest magnitude of a token becomes: half the range of the numbers (as compressed-tensors computes it)."""

ELEMENT: dict[str, str] = {"int8": "i8", "fp8": "f8e4m3"}
"""Element type of the stored numbers."""

SMALLEST_SCALE = 1e-12
"""Scale of a token of zeros; any number serves."""

PER_WORD = 8
"""4-bit numbers in a stored word of 32 bits, the first in the lowest bits, 8 added to each."""

WEIGHT = ".weight"


@dataclass(frozen=True)
class Scheme:
    """How a weight matrix [N, K] and the activations that it multiplies are quantized."""

    kind: Kind
    per_channel: bool = True
    dynamic: bool = True
    group: int = 0

    def __str__(self) -> str:
        if self.kind == "int4":
            return f"int4 group {self.group}"
        return f"{self.kind} {'channel' if self.per_channel else 'tensor'} {'dynamic' if self.dynamic else 'static'}"

    @staticmethod
    def parse(text: str) -> Scheme:
        """The inverse of `str`. Raises ValueError."""
        match text.split():
            case ["int4", "group", size] if size.isdecimal():
                return Scheme("int4", group=int(size))
            case ["int8" | "fp8" as kind, "channel" | "tensor" as scale, "dynamic" | "static" as inputs]:
                return Scheme("int8" if kind == "int8" else "fp8", scale == "channel", inputs == "dynamic")
            case _:
                raise ValueError(f"quantization scheme '{text}'")

    def tensors(self, fqn: str, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], str]]:
        """What stands in for the weight `fqn` of `shape` [N, K]: name -> (shape in the IR, element type)."""
        module = fqn.removesuffix(WEIGHT)
        n, k = shape
        scale = f"{module}.weight_scale"
        if self.kind == "int4":
            return {
                f"{module}.weight_packed": ((n, k // PER_WORD), "i32"),
                scale: ((n, k // (self.group or k)), "f32"),
            }
        found: dict[str, tuple[tuple[int, ...], str]] = {
            fqn: ((n, k), ELEMENT[self.kind]),
            scale: ((n,) if self.per_channel else (), "f32"),
        }
        if not self.dynamic:
            found[f"{module}.input_scale"] = ((), "f32")
        return found


def schemes_of(module: ModuleOp) -> dict[str, Scheme]:
    """The quantized weights of a module by name, as capture noted them."""
    held = module.attributes.get(QUANTIZED)
    if not isinstance(held, DictionaryAttr):
        return {}
    return {name: Scheme.parse(text.data) for name, text in held.data.items() if isinstance(text, StringAttr)}


def note_schemes(module: ModuleOp, schemes: Mapping[str, Scheme]) -> None:
    """Write the attribute that `schemes_of` reads."""
    if schemes:
        module.attributes[QUANTIZED] = DictionaryAttr({n: StringAttr(str(s)) for n, s in schemes.items()})
