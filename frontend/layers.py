"""Which layers of a model are equal: the layer stack, a signature of each layer, and pruning to one of each kind.

The signature of a layer is everything its modules hold except the layer's index: class names, parameter and buffer
shapes, and every scalar attribute (`sliding_window`, `scaling`, `layer_type`, ...). Layers of equal signature run the
same code on the same numbers, unless that code looks at the index itself. `LayerIndex` catches this: it is the index
during tracing, and records every use other than the cache's (`cache.update(k, v, layer_idx)`).
"""

from __future__ import annotations

import hashlib
import inspect
import operator
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from frontend.skeleton import truncate_config

_INDEX_NAMES = ("layer_idx", "layer_id", "layer_index", "layer_number", "block_idx")


_SCALARS = (bool, int, float, str, type(None), torch.dtype)


def _is_scalar(value: object) -> bool:
    return isinstance(value, _SCALARS)


@dataclass(frozen=True)
class LayerStack:
    """The module list that holds the layers: its FQN, and the signature of each layer."""

    path: str
    signatures: tuple[str, ...]

    def representatives(self) -> list[int]:
        """The first layer of each distinct signature, in order."""
        return [i for i, s in enumerate(self.signatures) if self.signatures.index(s) == i]

    def kinds(self) -> list[int]:
        """For each layer the index of its signature in `representatives()`."""
        order = list(dict.fromkeys(self.signatures))
        return [order.index(s) for s in self.signatures]


class LayerIndex:
    """A layer's index that notes every use but the cache's own look-up of its layer.

    It is no int on purpose: arithmetic of ints, floats and tensors with it comes back to its reflected methods, while
    a subclass of int would be read silently.
    """

    uses: ClassVar[list[str]] = []

    def __init__(self, value: int) -> None:
        self.value = value

    def __index__(self) -> int:
        caller = sys._getframe(1).f_code
        if not (caller.co_name == "update" and caller.co_filename == _CACHE_FILE):
            LayerIndex.uses.append(f"an index in {caller.co_name}")
        return self.value


_CACHE_FILE = inspect.getfile(Cache)


def _recording(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: LayerIndex, *args: Any) -> Any:
        LayerIndex.uses.append(name.strip("_"))
        return function(self.value, *args)

    return method


def _reflected(function: Callable[[Any, Any], Any]) -> Callable[[int, Any], Any]:
    return lambda value, other: function(other, value)


for _name in ("add", "sub", "mul", "floordiv", "truediv", "mod", "pow", "and_", "or_", "xor", "lshift", "rshift"):
    _function = getattr(operator, _name)
    _plain = _name.rstrip("_")
    setattr(LayerIndex, f"__{_plain}__", _recording(_plain, _function))
    setattr(LayerIndex, f"__r{_plain}__", _recording(_plain, _reflected(_function)))
for _name in ("lt", "le", "gt", "ge", "eq", "ne", "neg", "abs"):
    setattr(LayerIndex, f"__{_name}__", _recording(_name, getattr(operator, _name)))
for _name, _function in {"bool": bool, "int": int, "float": float, "str": str, "hash": hash}.items():
    setattr(LayerIndex, f"__{_name}__", _recording(_name, _function))


def find_stack(model: nn.Module, config: Any, buffers: Mapping[str, Tensor]) -> LayerStack | None:
    """The model's stack of layers, or None if there is no single list with one module per hidden layer.

    `buffers` holds the buffers' values by FQN: 0-dimensional ones end up as literals, so they belong to the signature.
    """
    depth = int(getattr(config.get_text_config(), "num_hidden_layers", 0))
    candidates = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth and depth > 0
    ]
    # Lists inside a layer (experts, convolutions) can have the same length by chance: only outermost ones count.
    names = {name for name, _ in candidates}
    outer = [(n, m) for n, m in candidates if not any(n != o and n.startswith(o + ".") for o in names)]
    if len(outer) != 1:
        return None
    path, stack = outer[0]
    return LayerStack(path, tuple(signature(layer, buffers, f"{path}.{i}.") for i, layer in enumerate(stack)))


def signature(layer: nn.Module, buffers: Mapping[str, Tensor], prefix: str) -> str:
    """A hash of a layer's structure without its index."""
    parts: list[str] = []
    for name, module in layer.named_modules():
        kind = type(module)
        parts.append(f"{name}:{kind.__module__}.{kind.__qualname__}")
        for key, value in sorted(vars(module).items()):
            if key in _INDEX_NAMES or key.startswith("_forward") or key == "training":
                continue
            if isinstance(value, _SCALARS) or (isinstance(value, (list, tuple)) and all(map(_is_scalar, value))):
                parts.append(f"  {key}={value!r}")
            elif inspect.isroutine(value):
                parts.append(f"  {key}={value.__module__}.{value.__qualname__}")
        for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
            described = "None" if tensor is None else f"{tuple(tensor.shape)} {tensor.dtype}"
            value = buffers.get(prefix + (f"{name}.{key}" if name else key))
            if value is not None and value.dim() == 0:
                described += f" {value.item()!r}"
            parts.append(f"  {key}: {described}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def keep_layers(model: nn.Module, config: Any, stack: LayerStack, keep: list[int]) -> None:
    """Reduce the model in place to some layers, renumbered from 0, and the config with it."""
    modules = model.get_submodule(stack.path)
    assert isinstance(modules, nn.ModuleList)
    kept = [modules[i] for i in keep]
    parent_path, _, attribute = stack.path.rpartition(".")
    setattr(model.get_submodule(parent_path), attribute, nn.ModuleList(kept))
    truncate_config(config, keep)
    for index, layer in enumerate(kept):
        for module in layer.modules():
            for name in _INDEX_NAMES:
                if isinstance(vars(module).get(name), int):
                    setattr(module, name, LayerIndex(index))
