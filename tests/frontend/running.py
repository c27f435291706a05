"""Running a captured decoder with the tc interpreter as a server would: ragged rows, buckets, explicit caches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from xdsl.dialects.builtin import ArrayAttr
from xdsl.dialects.func import FuncOp

from frontend.capture import Captured
from ir.interpreter import run
from ir.types import numpy_dtype, shape_of


def function(captured: Captured, name: str) -> FuncOp:
    """A function of the module by name."""
    return next(f for f in captured.module.ops if isinstance(f, FuncOp) and f.sym_name.data == name)


def names(captured: Captured, name: str, attribute: str) -> list[str]:
    """`arg_names` or `result_names` of a function."""
    found = function(captured, name).attributes[attribute]
    assert isinstance(found, ArrayAttr)
    return [n.data for n in found]


def ops(captured: Captured, name: str, operation: str) -> list[Any]:
    """The operations of a kind in a function."""
    return [op for op in function(captured, name).body.block.ops if op.name == operation]


class Decoder:
    """A captured causal language model with a cache for `batch` rows of `kv` slots, filled with garbage at first."""

    def __init__(self, captured: Captured, batch: int, kv: int) -> None:
        self.captured = captured
        main = function(captured, "main")
        generator = np.random.default_rng(1)
        self.cache: dict[str, np.ndarray] = {}
        for name, argument in zip(names(captured, "main", "arg_names"), main.body.block.args, strict=True):
            if name.startswith("cache."):
                _, heads, _, size = shape_of(argument)
                noise = generator.standard_normal((batch, heads, kv, size), dtype=np.float32)
                self.cache[name] = noise.astype(numpy_dtype(argument))

    def step(self, tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Logits (B, S, V) in f32 of tokens (B, S) at positions (B, S); the cache is updated."""
        arguments = {"input_ids": tokens.astype(np.int32), "position_ids": positions.astype(np.int32)} | self.cache
        results = run(self.captured.module, arguments, self.captured.weights.load)
        self.cache = {name: results[name] for name in self.cache}
        return results["logits"].astype(np.float32)


def reference_logits(model: Any, tokens: Sequence[int]) -> np.ndarray:
    """Logits (S, V) of the unmodified model for one row alone, without padding or cache."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([list(tokens)])).logits[0].float().numpy()
