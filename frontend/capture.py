"""Capture: a resolved model -> a symbolic tc module, a table of weight references, and what was done.

The model is built without weights, exported once with symbolic batch, input length and KV length, and only with one
layer of each distinct signature; `@main` calls each layer's block function with that layer's weights and caches. So
time does not grow with depth. Where layers cannot be proven equal (remote code, code that computes with the layer's
index, layers that exchange more than the hidden state) all layers are exported and equal bodies are found by hash;
`info.mode` and `info.notes` say so.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch.fx import Node
from xdsl.dialects.builtin import DictionaryAttr, ModuleOp, StringAttr

from frontend.assemble import Attempt, MainBuilder, Mode
from frontend.aten import Meta
from frontend.blocks import Graph, externals
from frontend.emit import NoRuleError
from frontend.export import export_decoder, export_encoder
from frontend.layers import LayerIndex, LayerStack, find_stack, keep_layers
from frontend.quantization import module_schemes
from frontend.resolve import ModelSource
from frontend.skeleton import TORCH_DTYPES, Skeleton, build_skeleton
from frontend.weights import weight_table
from ir.errors import Problem, UserError
from ir.quantization import note_schemes
from ir.weights import WeightTable


@dataclass
class CaptureInfo:
    """What capture found and did. Times are wall seconds."""

    model: str
    model_type: str
    kind: str
    dtype: str
    layers: int
    layer_kinds: list[int]
    """For each layer the number of its block function."""
    exported_layers: int
    mode: Mode
    blocks: int
    graph_nodes: int
    functionalised: bool
    max_positions: int | None
    vocab_size: int | None
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass
class Captured:
    """A symbolic module with `@main` and block functions, its weights by name, and how it was made."""

    module: ModuleOp
    weights: WeightTable
    info: CaptureInfo


class _NotUniformError(Exception):
    """The layers cannot be represented by one of each kind; the text says why."""


def capture(source: ModelSource, *, num_hidden_layers: int | None = None, weights: str = "link") -> Captured:
    """Capture a model.

    `num_hidden_layers` keeps only the first layers. `weights` is `link` (ranges of the checkpoint's files),
    `random[:SEED]` or `none` (shapes only). Raises `UserError` with every problem found.
    """
    collecting = gc.isenabled()
    gc.disable()  # graphs and modules are many small objects that stay: collections only cost time here
    try:
        return _capture(source, num_hidden_layers, weights)
    except NoRuleError as error:
        fix = "add it to the ATen table (frontend/aten), or use a model without it"
        raise UserError([Problem(f"{source.model_type} uses {error}", "tc cannot express it", fix)]) from error
    finally:
        if collecting:
            gc.enable()


def _capture(source: ModelSource, num_hidden_layers: int | None, weights: str) -> Captured:
    start = time.perf_counter()
    skeleton = build_skeleton(source, num_hidden_layers)
    stack = find_stack(skeleton.model, skeleton.config, skeleton.buffers)
    seconds = {"build": time.perf_counter() - start}
    depth = int(skeleton.config.get_text_config().num_hidden_layers)
    aliases, buffers = skeleton.aliases, skeleton.buffers
    notes: list[str] = []
    attempt: Attempt | None = None
    mode: Mode = "representatives"
    if stack is None:
        notes.append("no list of layers was found in the model: everything is one function")
        mode = "one function"
    elif source.remote_code:
        notes.append("remote code: every layer is exported, equal bodies are found by their hash")
        mode = "all layers"
    else:
        try:
            attempt = _attempt(source, skeleton, stack, stack.representatives(), mode, seconds)
        except _NotUniformError as reason:
            notes.append(f"every layer was exported: {reason}")
            mode = "all layers"
            skeleton = build_skeleton(source, num_hidden_layers)
    if attempt is None and stack is not None:
        try:
            attempt = _attempt(source, skeleton, stack, list(range(depth)), mode, seconds)
        except _NotUniformError as reason:
            notes.append(f"everything is one function: {reason}")
            mode = "one function"
            skeleton = build_skeleton(source, num_hidden_layers)
    if attempt is None:
        attempt = _attempt(source, skeleton, None, list(range(depth)), mode, seconds)
    began = time.perf_counter()
    builder = MainBuilder(source, attempt, depth, aliases, buffers)
    module = builder.build()
    _keep_plan(module, skeleton)
    seconds["convert"] = time.perf_counter() - began
    began = time.perf_counter()
    schemes = module_schemes(module, source.quantization)
    if source.quantization is not None and not schemes:
        what = "quantization_config names no linear layer of the model"
        raise UserError([Problem(what, "its targets match none", "use the config of this checkpoint")])
    note_schemes(module, schemes)
    table = weight_table(source, builder.used_weights, buffers, aliases, weights, schemes)
    seconds["weights"] = time.perf_counter() - began
    seconds["total"] = time.perf_counter() - start
    info = CaptureInfo(
        model=source.name,
        model_type=source.model_type,
        kind=source.architecture.kind,
        dtype=source.compute_dtype,
        layers=depth,
        layer_kinds=builder.layer_blocks,
        exported_layers=len(attempt.keep),
        mode=mode,
        blocks=len(builder.functions),
        graph_nodes=len(attempt.graph.exported.program.graph.nodes),
        functionalised=attempt.graph.exported.functionalised,
        max_positions=source.max_positions,
        vocab_size=getattr(skeleton.config.get_text_config(), "vocab_size", None),
        seconds=seconds,
        notes=notes,
    )
    return Captured(module, table, info)


def _keep_plan(module: ModuleOp, skeleton: Skeleton) -> None:
    """Store the model's own tensor-parallel plan (`base_model_tp_plan`, and the head's) for the pass plan-tp."""
    plan = getattr(skeleton.model, "_tp_plan", None)
    if plan:
        styles = {str(pattern): StringAttr(str(style)) for pattern, style in plan.items()}
        module.attributes["tc.tp_plan"] = DictionaryAttr(styles)


def _attempt(
    source: ModelSource,
    skeleton: Skeleton,
    stack: LayerStack | None,
    keep: list[int],
    mode: Mode,
    seconds: dict[str, float],
) -> Attempt:
    began = time.perf_counter()
    depth = len(keep)
    LayerIndex.uses.clear()
    if stack is not None:
        keep_layers(skeleton.model, skeleton.config, stack, keep)
    if source.architecture.kind == "decoder":
        exported = export_decoder(skeleton, depth, TORCH_DTYPES[source.compute_dtype])
    else:
        exported = export_encoder(skeleton)
    seconds["export"] = seconds.get("export", 0.0) + time.perf_counter() - began
    if mode == "representatives" and LayerIndex.uses:
        raise _NotUniformError(f"the model computes with the layer's index ({', '.join(sorted(set(LayerIndex.uses)))})")
    graph = Graph(exported, stack.path if stack is not None else None, skeleton.buffers)
    _check_interfaces(source, graph, depth)
    if stack is not None:
        _check_cut(graph, depth, mode)
    return Attempt(graph, stack, keep, mode)


def _check_interfaces(source: ModelSource, graph: Graph, depth: int) -> None:
    """Refuse a model that computes attention or keeps its cache in its own way: buckets would be silently wrong."""
    attention = torch.ops.rngd.attention.default
    update = torch.ops.rngd.kv_update.default
    wanted_updates = 2 if source.architecture.kind == "decoder" else 0
    bad: list[str] = []
    for layer in range(depth) if graph.stack_path is not None else [None]:
        nodes = [n for n in graph.calls if layer is None or graph.layer(n) == layer]
        scale = depth if layer is None else 1
        found = sum(n.target is attention for n in nodes)
        updates = sum(n.target is update for n in nodes)
        if found != scale or updates != wanted_updates * scale:
            name = "the model" if layer is None else f"{graph.stack_path}.{layer}"
            bad.append(f"{name} has {found} attention nodes and {updates} cache updates")
    if bad:
        raise UserError(
            [
                Problem(
                    f"{source.model_type} computes attention outside of transformers' AttentionInterface: {bad[0]}",
                    f"a layer needs exactly one attention node and {wanted_updates} cache updates, or rows of "
                    "different length in padded buckets would be silently wrong",
                    "use a model whose attention goes through AttentionInterface",
                )
            ]
        )


def _check_cut(graph: Graph, depth: int, mode: Mode) -> None:
    """Whether the graph falls apart into layers as the mode needs it."""
    layer_of = {n: graph.layer(n) for n in graph.calls}
    depends: dict[Node, bool] = {}
    for node in graph.calls:
        depends[node] = layer_of[node] is not None or any(depends.get(s, False) for s in node.all_input_nodes)
    order = {n: i for i, n in enumerate(graph.calls)}
    previous: set[Node] = set()
    for layer in range(depth):
        nodes = [n for n in graph.calls if layer_of[n] == layer]
        if not nodes:
            raise _NotUniformError(f"layer {layer} has no nodes of its own")
        outside = externals(graph, nodes)
        late = [n for n in outside if n in order and layer_of[n] is None and order[n] > order[nodes[0]]]
        if late:
            raise _NotUniformError(f"layer {layer} reads {late[0].name}, which is computed while the layer runs")
        inside = set(nodes)
        results = {
            n
            for n in nodes
            if not _is_cache_output(graph, n)
            and (n in graph.outputs or any(u not in inside and u in graph.live for u in n.users))
        }
        if mode == "representatives":
            chained = {n for n in outside if depends.get(n, False)}
            if len(results) != 1:
                raise _NotUniformError(f"layer {layer} has {len(results)} results besides its cache")
            if layer and chained != previous:
                raise _NotUniformError(f"layer {layer} reads more than the result of the layer before")
            if not layer and len(_same_type(graph, outside, next(iter(results)))) != 1:
                raise _NotUniformError("which input of the first layer is the hidden state is ambiguous")
        previous = results


def _is_cache_output(graph: Graph, node: Node) -> bool:
    return bool(graph.caches) and node in graph.outputs[1:]


def _same_type(graph: Graph, nodes: Sequence[Node], like: Node) -> list[Node]:
    wanted = Meta(like, graph.exported.symbols)
    activations = [n for n in nodes if n not in graph.weights and n not in graph.caches]
    metas = [(n, Meta(n, graph.exported.symbols)) for n in activations if isinstance(n.meta["val"], torch.Tensor)]
    return [n for n, m in metas if (m.shape, m.elem) == (wanted.shape, wanted.elem)]
