"""Each rule of the ATen table against torch, with symbolic batch and length, on values that make a wrong rule show."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.export import Dim
from torch.nn import functional as nnf
from xdsl.dialects.builtin import ModuleOp
from xdsl.dialects.func import ReturnOp
from xdsl.ir import Block

from frontend.aten import Meta
from frontend.blocks import Converter, Graph, make_function
from frontend.emit import erase_unused, full_view
from frontend.export import Exported, bypass_identities, functional
from ir.errors import Problem
from ir.interpreter import run
from ir.text import parse_module, print_module
from ir.types import tensor_type

Function = Callable[..., Any]


def convert(function: Function, *examples: Tensor) -> tuple[ModuleOp | None, list[Problem]]:
    """A module whose @main computes a function of tensors that all start with dimensions B, S."""

    class Wrapper(torch.nn.Module):
        def forward(self, xs: list[Tensor]) -> Any:
            return function(*xs)

    dims = {0: Dim("batch", min=2, max=64), 1: Dim("seq", min=2, max=64)}
    dynamic = {"xs": [dims if x.dim() > 1 and x.shape[:2] == (2, 3) else None for x in examples]}
    program = torch.export.export(Wrapper(), (list(examples),), dynamic_shapes=dynamic, strict=False)
    program, changed = functional(program)
    bypass_identities(program)
    first = next(n for n in program.graph.nodes if n.op == "placeholder").meta["val"]
    symbols = {first.shape[0].node.expr: "B", first.shape[1].node.expr: "S"}
    graph = Graph(Exported(program, "", symbols, [], changed), None, {})
    block = Block()
    inputs: dict[Any, Any] = {}
    for node in graph.inputs:
        meta = Meta(node, symbols)
        inputs[node] = full_view(
            block.insert_arg(tensor_type(meta.elem, meta.shape), len(block.args)), meta.shape, meta.elem
        )
    converter = Converter(graph, block, inputs.__getitem__)
    converter.convert(graph.calls)
    if graph.problems:
        return None, graph.problems
    results = [converter.result(n) for n in graph.outputs]
    block.add_op(ReturnOp(*(r.ssa for r in results if r is not None)))
    erase_unused(block)
    names = [f"r{i}" for i in range(len(results))]
    module = ModuleOp([make_function("main", block, [n.name for n in graph.inputs], names, None)])
    module.verify()
    return parse_module(print_module(module)), []


def check(function: Function, *shapes: tuple[int, ...], positive: bool = False) -> None:
    """Convert with B, S = 2, 3 and compare at B, S = 4, 5 with torch."""
    generator = torch.Generator().manual_seed(0)

    def tensors(sizes: dict[int, int]) -> list[Tensor]:
        made = [torch.randn([sizes.get(n, n) for n in shape], generator=generator) for shape in shapes]
        return [x.abs() + 0.1 for x in made] if positive else made

    module, problems = convert(function, *tensors({}))
    assert module is not None, problems
    values = tensors({2: 4, 3: 5})
    wanted = function(*values)
    wanted = list(wanted) if isinstance(wanted, (list, tuple)) else [wanted]
    arguments = [v.numpy() for v in values]
    results = list(run(module, arguments, lambda name: np.zeros(0)).values())
    assert len(results) == len(wanted)
    for ours, theirs in zip(results, wanted, strict=True):
        assert list(ours.shape) == list(theirs.shape)
        np.testing.assert_allclose(ours.astype(np.float32), theirs.float().numpy(), atol=1e-5, rtol=1e-5)


X = (2, 3, 8)
CASES: dict[str, tuple[Function, tuple[tuple[int, ...], ...]]] = {
    "arithmetic": (lambda x, y: (x + y * 2 - 3) / 4 - (5 - x), (X, X)),
    "add alpha": (lambda x, y: torch.add(x, y, alpha=2.5) + torch.sub(x, y, alpha=0.5), (X, X)),
    "broadcast": (lambda x, y: x * y[:, :, :1] + y[..., 0][..., None], (X, X)),
    "broadcast heads": (lambda x, y: x[:, :, None, :] * y[:, :, :, None], (X, X)),
    "vector": (lambda x, w: x * w + w, (X, (8,))),
    "trig": (lambda x: torch.sin(x) + torch.cos(x) * torch.tanh(x), (X,)),
    "activations": (lambda x: nnf.silu(x) + nnf.relu(x) + torch.sigmoid(x) + torch.erf(x), (X,)),
    "gelu": (lambda x: nnf.gelu(x) - 2 * nnf.gelu(x, approximate="tanh"), (X,)),
    "unary": (lambda x: -x + x.abs() + torch.exp(x) + torch.floor(x * 3) + x.square() + x.neg(), (X,)),
    "powers": (lambda x: x**2 + x**3 + x**1 + 2 * x**4.0, (X,)),
    "clamp": (lambda x: x.clamp(-0.5, 0.7) + x.clamp(min=0.1) + 2 * x.clamp(max=0.2) + x.clamp_min(0.3), (X,)),
    "min max": (lambda x, y: torch.maximum(x, y) - 2 * torch.minimum(x, y), (X, X)),
    "compare": (lambda x, y: (x < y).float() + 2 * (x >= 0.5).float() + 4 * (x != y).float(), (X, X)),
    "where": (lambda x, y: torch.where((x > y) & ~(x > 1), x, torch.zeros_like(y)), (X, X)),
    "masked fill": (lambda x: x.masked_fill(x > 0.3, -7.0), (X,)),
    "constants": (lambda x: x + torch.ones_like(x) * 2 + torch.full((8,), 1.5) + torch.zeros(8), (X,)),
    "arange": (lambda x: x * torch.arange(8), (X,)),
    "reshape": (lambda x: x.view(x.shape[0], x.shape[1], 2, 4).transpose(1, 2).reshape(x.shape[0], 2, -1, 4), (X,)),
    "merge and split": (lambda x: (x.view(-1, 8) * 2).view(x.shape), (X,)),
    "permute": (lambda x: x.permute(2, 0, 1).flatten(1) + 0, (X,)),
    "unflatten": (lambda x: x.unflatten(-1, (4, 2)) * 1.5, (X,)),
    "squeeze": (lambda x: (x[..., :1].squeeze(-1) * 2)[:, :, None] + x, (X,)),
    "expand": (lambda x, w: w[None, None].expand(x.shape[0], x.shape[1], -1) * 2 + x, (X, (8,))),
    "expand alone": (lambda x: x[:, :, None, :1].expand(-1, -1, 3, 8), (X,)),
    "slice": (lambda x: x[..., 2:5] + x[..., -3:] + x[:, :, :3], (X,)),
    "strided slice": (lambda x: x[..., ::2] - x[..., 1::2], (X,)),
    "select": (lambda x: x[..., 3] - x[..., -1], (X,)),
    "split": (lambda x: x.split([3, 5], -1)[1] * 2 + x.split(5, -1)[0], (X,)),
    "chunk": (lambda x: x.chunk(2, dim=-1)[1] * x.chunk(2, dim=-1)[0], (X,)),
    "unbind": (lambda x: x.view(x.shape[0], x.shape[1], 4, 2).unbind(-1)[1] * 3, (X,)),
    "cat": (lambda x, y: torch.cat([-x[..., 4:], y, x[..., :4]], -1), (X, X)),
    "stack": (lambda x, y: torch.stack([x, y * 2], dim=-1).flatten(-2), (X, X)),
    "repeat interleave": (lambda x: x.repeat_interleave(3, dim=-1), (X,)),
    "write into slice": (lambda x: torch.slice_scatter(x, x[..., :3] * 2, -1, 4, 7), (X,)),
    "write into element": (lambda x: torch.select_scatter(x, x[..., 0] * 5, -1, 2), (X,)),
    "in place": (lambda x: (x * 1).mul_(3).add_(x), (X,)),
    "linear": (lambda x, w, b: nnf.linear(x, w, b) + nnf.linear(x, w), (X, (6, 8), (6,))),
    "addmm": (lambda x, w, b: torch.addmm(b, x.view(-1, 8), w).view(*x.shape[:2], 6), (X, (8, 6), (6,))),
    "mm": (lambda x, w: (x.view(-1, 8) @ w).view(*x.shape[:2], 6), (X, (8, 6))),
    "matmul": (lambda x, y: x @ y.transpose(1, 2) @ y, (X, X)),
    "matmul heads": (
        lambda x, y: x.view(*x.shape[:2], 2, 4).transpose(1, 2) @ y.view(*y.shape[:2], 2, 4).permute(0, 2, 3, 1),
        (X, X),
    ),
    "matmul broadcast": (lambda x, y: x[:, None] @ y[:, None].transpose(2, 3).expand(-1, 3, -1, -1), (X, X)),
    "outer product": (lambda x, y: x[..., None] @ y[:, :, None], (X, X)),
    "rows": (lambda x, t: nnf.embedding((x[..., 0] > 0).long() + 1, t) + t[(x[..., 1] > 0).long()], (X, (4, 8))),
    "row zero": (lambda x, t: x + nnf.embedding(torch.zeros_like(x[..., 0]).long(), t), (X, (4, 8))),
    "mean": (lambda x: x.mean(-1) + x.mean(-1, keepdim=True)[..., 0], (X,)),
    "sum": (lambda x: x.sum(1) + (x - x.sum(1, keepdim=True)).sum((1,)), (X,)),
    "extremes": (lambda x: x.amax(-1, keepdim=True) * x - x.amin(-1, keepdim=True), (X,)),
    "softmax": (lambda x: torch.softmax(x * 3, -1) + torch.softmax(x, 1), (X,)),
    "layer norm": (lambda x, w, b: nnf.layer_norm(x, (8,), w, b, 1e-3) + nnf.layer_norm(x, (8,)), (X, (8,), (8,))),
    "rms norm": (lambda x, w: nnf.rms_norm(x, (8,), w, 1e-3) + nnf.rms_norm(x, (8,)), (X, (8,))),
    "bf16": (lambda x: (x.to(torch.bfloat16) * 3).float() + x.bfloat16().type_as(x), (X,)),
    "dropout": (lambda x: nnf.dropout(x, 0.5, False) * 2, (X,)),
    "two results": (lambda x: (x + 1, x[..., 0] * 2), (X,)),
}


@pytest.mark.parametrize("case", CASES)
def test_rule_computes_what_torch_computes(case: str) -> None:
    function, shapes = CASES[case]
    check(function, *shapes)


def test_rules_for_positive_numbers() -> None:
    check(
        lambda x: x.log() + x.sqrt() + x.rsqrt() + x.reciprocal() + x**0.5 + x**-0.5 + x**-1 + x**1.7, X, positive=True
    )
    check(lambda x, y: x**y, X, X, positive=True)


def test_what_has_no_rule_is_said() -> None:
    refused: dict[str, Function] = {
        "aten.cumsum": lambda x: torch.cumsum(x, -1),
        "symbolic axis": lambda x: x.mean(1) * x[:, 0],
        "range of symbolic length": lambda x: x + torch.arange(x.shape[1])[:, None],
        "step that does not divide": lambda x: x[..., ::3],
        "truncation": lambda x: x.long() + 1,
        "no product of B, S and KV": lambda x: x.sum(1)[:, None] * torch.ones(x.shape[0], x.shape[1] + 1, 8),
        "concatenation along a symbolic axis": lambda x: torch.cat([x, x], 1),
        "slice of a symbolic axis": lambda x: x[:, :1] * 2,
        "bitwise operation on integers": lambda x: (torch.full((8,), 3) & torch.full((8,), 1)) * x,
        "training mode": lambda x: nnf.dropout(x, 0.5, True),
        "float64": lambda x: x.double(),
        "vector": lambda x: x @ torch.ones(8),
    }
    for message, function in refused.items():
        module, problems = convert(function, torch.randn(2, 3, 8))
        assert module is None, message
        assert any(message in str(p) for p in problems), (message, problems)
        assert all("test_aten_rules.py" in p.what for p in problems)
