"""One `torch.export` of a skeleton with symbolic batch, input length and KV length."""

from __future__ import annotations

import inspect
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from frontend.interfaces import BypassError, ExplicitCache, ExplicitCacheLayer, attention_context
from frontend.skeleton import Skeleton
from ir.errors import Problem, UserError

# Example sizes: pairwise different, none of them 0 or 1, and no product equal to another, so that no two symbols are
# taken for one another.
_BATCH, _SEQ, _KV = 3, 5, 37


class DecoderGraph(nn.Module):
    """`(input_ids (B, S), position_ids (B, S), past [(k, v)] (B, H, KV, D)) -> (logits, [(k, v)])`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, past: list[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """The model on an explicit cache; a token's slot is its position."""
        cache = ExplicitCache(past, position_ids)
        with attention_context(position_ids):
            out = self.model(
                input_ids=input_ids,
                position_ids=position_ids,
                attention_mask=None,
                past_key_values=cache,
                use_cache=True,
            )
        return out.logits, [_tensors(layer) for layer in cache.layers]


class EncoderGraph(nn.Module):
    """`(input_ids (B, S), position_ids (B, S), lengths (B,)) -> last_hidden_state (B, S, H)`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.token_types = "token_type_ids" in inspect.signature(model.forward).parameters

    def forward(self, input_ids: Tensor, position_ids: Tensor, lengths: Tensor) -> Tensor:
        """The encoder without padding mask: keys at or beyond a row's length are invisible; token type 0."""
        extra = {"token_type_ids": torch.zeros_like(input_ids)} if self.token_types else {}
        with attention_context(position_ids, lengths):
            out = self.model(input_ids=input_ids, position_ids=position_ids, attention_mask=None, **extra)
        return out.last_hidden_state


def _tensors(layer: Any) -> tuple[Tensor, Tensor]:
    assert isinstance(layer, ExplicitCacheLayer)
    assert layer.keys is not None
    assert layer.values is not None
    return layer.keys, layer.values


@dataclass
class Exported:
    """A functional exported program with what is needed to read it.

    `symbols` maps the symbol of each dynamic dimension to `B`, `S` or `KV`. `cache_shapes` are (heads, key size,
    value size) a layer.
    """

    program: ExportedProgram
    prefix: str
    symbols: dict[Any, str]
    cache_shapes: list[tuple[int, int, int]]
    functionalised: bool


def export_decoder(skeleton: Skeleton, depth: int, dtype: torch.dtype) -> Exported:
    """Export a causal language model of `depth` layers with one (k, v) pair of cache a layer."""
    wrapper = DecoderGraph(skeleton.model)
    ids = torch.zeros(_BATCH, _SEQ, dtype=torch.long, device="meta")
    positions = torch.zeros(_BATCH, _SEQ, dtype=torch.long, device="meta")
    shapes = _cache_shapes(skeleton, depth, ids, positions)
    past = [
        (
            torch.zeros(_BATCH, heads, _KV, key, dtype=dtype, device="meta"),
            torch.zeros(_BATCH, heads, _KV, value, dtype=dtype, device="meta"),
        )
        for heads, key, value in shapes
    ]
    batch, seq, kv = _dims()
    token_dims = {0: batch, 1: seq}
    dynamic = {
        "input_ids": token_dims,
        "position_ids": token_dims,
        "past": [({0: batch, 2: kv}, {0: batch, 2: kv}) for _ in past],
    }
    program = _export(wrapper, (ids, positions, past), dynamic)
    return _finish(program, shapes)


def export_encoder(skeleton: Skeleton) -> Exported:
    """Export an encoder with the rows' lengths as an input."""
    ids = torch.zeros(_BATCH, _SEQ, dtype=torch.long, device="meta")
    positions = torch.zeros(_BATCH, _SEQ, dtype=torch.long, device="meta")
    lengths = torch.zeros(_BATCH, dtype=torch.int32, device="meta")
    batch, seq, _ = _dims()
    dynamic = {"input_ids": {0: batch, 1: seq}, "position_ids": {0: batch, 1: seq}, "lengths": {0: batch}}
    return _finish(_export(EncoderGraph(skeleton.model), (ids, positions, lengths), dynamic), [])


def _dims() -> tuple[Any, Any, Any]:
    return Dim("batch", min=1, max=1024), Dim("seq", min=1, max=1 << 17), Dim("kv", min=2, max=1 << 17)


def _cache_shapes(skeleton: Skeleton, depth: int, ids: Tensor, positions: Tensor) -> list[tuple[int, int, int]]:
    """What each layer stores, found by running the model once on the meta device with an empty cache."""
    cache = ExplicitCache([(None, None)] * depth, positions)
    with torch.no_grad(), attention_context(positions), _Explained():
        skeleton.model(
            input_ids=ids, position_ids=positions, attention_mask=None, past_key_values=cache, use_cache=True
        )
    shapes: list[tuple[int, int, int]] = []
    for index, layer in enumerate(cache.layers):
        assert isinstance(layer, ExplicitCacheLayer)
        if layer.updates != 1 or layer.keys is None or layer.values is None:
            raise UserError(
                [
                    Problem(
                        f"layer {index} updates its KV cache {layer.updates} times in one step",
                        "a decoder layer must store its keys and values exactly once",
                        "the model cannot be captured",
                    )
                ]
            )
        shapes.append((layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3]))
    return shapes


class _Explained:
    """Turns what can go wrong inside a traced model into a user error that says where."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if error is None or isinstance(error, (UserError, KeyboardInterrupt, SystemExit)):
            return
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        where = _model_line(error)
        if isinstance(error, BypassError):
            fix = "the model needs a tc operation that can express it"
        elif kind is not None and "GuardOnDataDependent" in kind.__name__:
            why = f"the code depends on the values of a tensor ({why})"
            fix = "rope types dynamic and longrope, and data-dependent branches, cannot be captured"
        else:
            fix = "check the config; if it is right, this model's code cannot be traced"
        problem = Problem(f"the model cannot be traced{where}", f"{kind.__name__ if kind else ''}: {why}", fix)
        raise UserError([problem]) from error


def _model_line(error: BaseException) -> str:
    """` at modeling_x.py:123 (forward)`: the innermost frame inside a model's source file."""
    frame = error.__traceback__
    found = ""
    while frame is not None:
        code = frame.tb_frame.f_code
        if "modeling_" in code.co_filename or "transformers_modules" in code.co_filename:
            found = f" at {code.co_filename.rsplit('/', 1)[-1]}:{frame.tb_lineno} ({code.co_name})"
        frame = frame.tb_next
    return found


def _export(wrapper: nn.Module, args: tuple[Any, ...], dynamic: dict[str, Any]) -> ExportedProgram:
    with warnings.catch_warnings(), torch.no_grad(), _Explained():
        warnings.simplefilter("ignore")
        return torch.export.export(wrapper, args, dynamic_shapes=dynamic, strict=False)


def mutating_nodes(program: ExportedProgram) -> list[torch.fx.Node]:
    """The nodes that write into one of their arguments: torch.export's training IR is not functional."""
    return [
        node
        for node in program.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
    ]


def functional(program: ExportedProgram) -> tuple[ExportedProgram, bool]:
    """The program without mutating nodes, and whether it had any (functionalising costs as much as an export)."""
    if not mutating_nodes(program):
        return program, False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = program.run_decompositions({})
    left = mutating_nodes(program)
    if left:
        names = ", ".join(sorted({str(n.target) for n in left}))
        problem = Problem(f"the graph keeps mutating operators ({names})", "tc is functional", "rewrite the model")
        raise UserError([problem])
    return program, True


_IDENTITIES = frozenset(
    {
        torch.ops.aten.alias.default,
        torch.ops.aten.contiguous.default,
        torch.ops.aten.detach.default,
        torch.ops.aten.to.dtype,
        torch.ops.aten.to.device,
        torch.ops.aten.to.dtype_layout,
    }
)


def bypass_identities(program: ExportedProgram) -> None:
    """Let the users of an operator that changes nothing read its operand.

    `x.to(x.dtype)` is x itself in eager mode, and tracing then takes all later uses of x from that node: a tensor
    that all layers share would seem to come from the first of them.
    """
    for node in program.graph.nodes:
        if node.op != "call_function" or node.target not in _IDENTITIES:
            continue
        source = node.args[0]
        before, after = source.meta.get("val"), node.meta.get("val")
        if isinstance(before, Tensor) and isinstance(after, Tensor) and before.dtype == after.dtype:
            node.replace_all_uses_with(source)


def _finish(program: ExportedProgram, shapes: list[tuple[int, int, int]]) -> Exported:
    program, changed = functional(program)
    bypass_identities(program)
    placeholders = {n.name: n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder"}
    ids = placeholders["input_ids"]
    symbols: dict[Any, str] = {ids.shape[0].node.expr: "B", ids.shape[1].node.expr: "S"}
    if shapes:
        symbols[placeholders["past_0_0"].shape[2].node.expr] = "KV"
    return Exported(program, "model.", symbols, shapes, changed)
