"""Assembling the module: block functions, and `@main` with one call a layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.fx import Node
from xdsl.dialects.builtin import ModuleOp, StringAttr
from xdsl.dialects.func import ReturnOp
from xdsl.ir import Block, SSAValue

from frontend.aten import Meta
from frontend.blocks import POISON, Converter, Graph, LayerBody, build_body, make_call, make_function, scalar_buffer
from frontend.emit import View, erase_unused, full_view
from frontend.export import Exported
from frontend.layers import LayerStack
from frontend.resolve import ModelSource
from ir.dialects import tc
from ir.errors import UserError
from ir.types import dims_of, elem_of, tensor_type

Mode = Literal["representatives", "all layers", "one function"]


@dataclass
class Attempt:
    """An export of the layers `keep` (indices in the whole model) and its bodies."""

    graph: Graph
    stack: LayerStack | None
    keep: list[int]
    mode: Mode


class MainBuilder:
    """Builds the module: block functions, and `@main` with one call a layer."""

    def __init__(
        self,
        source: ModelSource,
        attempt: Attempt,
        depth: int,
        aliases: dict[str, str],
        buffers: dict[str, torch.Tensor],
    ) -> None:
        self.source, self.attempt, self.depth = source, attempt, depth
        self.graph: Graph = attempt.graph
        self.exported: Exported = attempt.graph.exported
        self.aliases, self.buffers = aliases, buffers
        self.used_weights: dict[str, tuple[tuple[int, ...], str]] = {}
        self.functions: dict[str, LayerBody] = {}
        self.layer_blocks: list[int] = []
        self.block = Block()
        self.converter = Converter(self.graph, self.block, self._outside)
        self.inputs: dict[Node, View] = {}
        self.caches: list[tuple[SSAValue, SSAValue]] = []

    def build(self) -> ModuleOp:
        """The module; raises UserError listing every node that has no rule."""
        names = self._arguments()
        layered = [n for n in self.graph.calls if self.graph.layer(n) is not None]
        main = [n for n in self.graph.calls if self.graph.layer(n) is None]
        if layered:
            self._layers(main)
        else:
            self.converter.convert(main)
        results = [self.converter.result(n) for n in self.graph.outputs[:1]]
        if self.graph.problems or any(r is None for r in results):
            raise UserError(self.graph.problems)
        out_names = ["logits" if self.source.architecture.kind == "decoder" else "last_hidden_state"]
        values = [r.ssa for r in results if r is not None]
        if not layered and self.graph.caches:
            stored = [self.converter.result(n) for n in self.graph.outputs[1:]]
            pairs = [s.ssa for s in stored if s is not None]
            self.caches = list(zip(pairs[::2], pairs[1::2], strict=True))
        for i, (key, value) in enumerate(self.caches):
            out_names += [f"cache.k.{i}", f"cache.v.{i}"]
            values += [key, value]
        self.block.add_op(ReturnOp(*values))
        erase_unused(self.block)
        function = make_function("main", self.block, names, out_names, None)
        module = ModuleOp([body.function for body in self.functions.values()] + [function])
        module.attributes["tc.model"] = StringAttr(self.source.model_type)
        for op in self.block.ops:
            if isinstance(op, tc.WeightOp):
                self._note_weight(op)
        return module

    def _arguments(self) -> list[str]:
        """Create the arguments of `@main`: the inputs, then a key and a value cache a layer."""
        names: list[str] = []
        for node in self.graph.inputs:
            meta = Meta(node, self.exported.symbols)
            value = self.block.insert_arg(tensor_type(meta.elem, meta.shape), len(self.block.args))
            value.name_hint = node.name
            self.inputs[node] = full_view(value, meta.shape, meta.elem)
            names.append(node.name)
        if not self.graph.caches:
            return names
        kinds = self._kinds()
        by_slot = {slot: node for node, slot in self.graph.caches.items()}
        for layer in range(self.depth):
            pair: list[SSAValue] = []
            for which in (0, 1):
                node = by_slot[kinds[layer], which]
                meta = Meta(node, self.exported.symbols)
                value = self.block.insert_arg(tensor_type(meta.elem, meta.shape), len(self.block.args))
                value.name_hint = f"cache_{'kv'[which]}_{layer}"
                names.append(f"cache.{'kv'[which]}.{layer}")
                pair.append(value)
                if self.attempt.stack is None or self.attempt.mode == "all layers":
                    self.inputs[node] = full_view(value, meta.shape, meta.elem)
            self.caches.append((pair[0], pair[1]))
        return names

    def _kinds(self) -> list[int]:
        """For each layer of the model the exported layer that stands for it."""
        if self.attempt.mode == "representatives" and self.attempt.stack is not None:
            return self.attempt.stack.kinds()
        return list(range(self.depth))

    def _outside(self, node: Node) -> Any:
        """The value in `@main` of a placeholder."""
        if node in self.inputs:
            return self.inputs[node]
        if node in self.graph.weights:
            meta = Meta(node, self.exported.symbols)
            name = self.aliases.get(self.graph.weights[node], self.graph.weights[node])
            scalar = scalar_buffer(self.graph, name, meta)
            return scalar if scalar is not None else self.converter.emitter.weight(name, meta.shape, meta.elem)
        raise KeyError(node.name)

    def _layers(self, main: list[Node]) -> None:
        """Convert what precedes the layers, call each layer, convert what follows."""
        exported = len(self.attempt.keep)
        if self.attempt.mode == "representatives":
            before = self._independent(main)
            self.converter.convert(before)
            bodies: list[LayerBody | None] = []
            previous: Sequence[Node] = []
            for index in range(exported):
                body = build_body(self.graph, index, self._main_value, previous)
                previous = body.results if body is not None else []
                bodies.append(body)
            if any(b is None for b in bodies) or self.graph.problems:
                self._give_up(main)
                return
            self._call_all([b for b in bodies if b is not None])
            done = set(before)
            self.converter.convert([n for n in main if n not in done])
            return
        self._interleaved(main)

    def _independent(self, main: Sequence[Node]) -> list[Node]:
        """The nodes outside of layers that need no layer's result."""
        depends: set[Node] = {n for n in self.graph.calls if self.graph.layer(n) is not None}
        free: list[Node] = []
        for node in self.graph.calls:
            if node in depends:
                continue
            if any(s in depends for s in node.all_input_nodes):
                depends.add(node)
            else:
                free.append(node)
        wanted = set(main)
        return [n for n in free if n in wanted]

    def _main_value(self, node: Node) -> Any:
        """A node's value in `@main`. Of the result of an exported layer only shape and element type are right."""
        if self.graph.layer(node) is None:
            return self.converter.value(node)
        meta = Meta(node, self.exported.symbols)
        return full_view(self.block.args[0], meta.shape, meta.elem)

    def _give_up(self, main: Sequence[Node]) -> None:
        """Convert the rest only to collect its problems."""
        for node in self.graph.calls:
            if self.graph.layer(node) is not None:
                self.converter.values[node] = POISON
        self.converter.convert([n for n in main if n not in self.converter.values])

    def _function_of(self, body: LayerBody) -> tuple[int, LayerBody]:
        """The number and body of the block function with this text, added if it is new."""
        if body.digest not in self.functions:
            body.function.properties["sym_name"] = StringAttr(f"block_{len(self.functions)}")
            self.functions[body.digest] = body
        return list(self.functions).index(body.digest), self.functions[body.digest]

    def _call_all(self, bodies: list[LayerBody]) -> None:
        """One call a layer, each with the body of its kind, the chain and its own weights and caches."""
        kinds = self._kinds()
        chain: SSAValue | None = None
        for layer in range(self.depth):
            body = bodies[kinds[layer]]
            chain = self._call(layer, kinds[layer], body, chain)[0]
        assert chain is not None
        for body in bodies:
            meta = Meta(body.results[0], self.exported.symbols)
            self.converter.values[body.results[0]] = full_view(chain, meta.shape, meta.elem)

    def _call(self, layer: int, kind: int, body: LayerBody, chain: SSAValue | None) -> Sequence[SSAValue]:
        number, shared = self._function_of(body)
        assert self.attempt.stack is not None
        path = self.attempt.stack.path
        operands: list[SSAValue] = []
        for argument in body.arguments:
            if argument.kind == "cache":
                operands.append(self.caches[layer][self.graph.caches[argument.node][1]])
            elif argument.kind == "weight":
                name = argument.target
                if name.startswith(f"{path}.{kind}."):
                    name = f"{path}.{layer}.{name.removeprefix(f'{path}.{kind}.')}"
                meta = Meta(argument.node, self.exported.symbols)
                name = self.aliases.get(name, name)
                operands.append(self.converter.emitter.weight(name, meta.shape, meta.elem).ssa)
            elif argument.name == "x" and chain is not None:
                operands.append(chain)
            else:
                value = self.converter.value(argument.node)
                assert isinstance(value, View)
                operands.append(value.ssa)
        call = make_call(f"block_{number}", operands, shared.function, f"{path}.{layer}")
        self.block.add_op(call)
        self.layer_blocks.append(number)
        results = list(call.results)
        count = len(body.results)
        for (_, slot), value in zip(body.caches, results[count:], strict=True):
            pair = list(self.caches[layer])
            pair[slot % 2] = value
            self.caches[layer] = (pair[0], pair[1])
        return results[:count]

    def _interleaved(self, main: Sequence[Node]) -> None:
        """All layers were exported: convert in graph order, calling a layer where its first node stands."""
        done: set[int] = set()
        previous: Sequence[Node] = []
        pending: list[Node] = []
        for node in self.graph.calls:
            layer = self.graph.layer(node)
            if layer is None:
                pending.append(node)
                continue
            if layer in done:
                continue
            done.add(layer)
            waiting: list[Node] = []
            for candidate in pending:
                if all(self._available(s) for s in candidate.all_input_nodes):
                    self.converter.convert([candidate])
                else:
                    waiting.append(candidate)
            pending = waiting
            body = build_body(self.graph, layer, self.converter.value, previous)
            if body is None or self.graph.problems:
                self._give_up(main)
                return
            values = self._call(layer, layer, body, None)
            for result, value in zip(body.results, values, strict=True):
                meta = Meta(result, self.exported.symbols)
                self.converter.values[result] = full_view(value, meta.shape, meta.elem)
            previous = body.results
        self.converter.convert(pending)

    def _available(self, node: Node) -> bool:
        return node.op == "placeholder" or node in self.converter.values or node not in self.graph.live

    def _note_weight(self, op: Any) -> None:

        shape = tuple(int(s) for s in dims_of(op.result))
        self.used_weights[str(op.fqn.data)] = (shape, str(elem_of(op.result)))
