"""Cutting an exported graph at the layers and building `@main` and the block functions.

Nodes belong to a layer by their `nn_module_stack` path. A layer's body becomes a function of what it reads from
outside: activations first (in order of first use), then weights, then caches; it returns what is read outside, then
the caches. Bodies are compared by a hash of their text, so equal layers share one function.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch.export.graph_signature import InputKind
from torch.fx import Node
from torch.fx.node import map_arg
from xdsl.dialects.builtin import ArrayAttr, StringAttr
from xdsl.dialects.func import CallOp, FuncOp, ReturnOp
from xdsl.ir import Block, Region, SSAValue

from frontend.aten import NO_RULE, TABLE, Meta, convert
from frontend.emit import Emitter, NoRuleError, Splat, Value, View, erase_unused
from frontend.export import Exported
from ir.axes import Dim
from ir.errors import Problem
from ir.types import tensor_type

ArgumentKind = Literal["activation", "weight", "cache"]
POISON = object()
"""The value of a node that could not be converted; whatever depends on it is skipped without a second message."""


@dataclass(frozen=True)
class Argument:
    """One argument of a block function and the graph node that stands for it in the layer it was made from."""

    kind: ArgumentKind
    node: Node
    name: str
    target: str


@dataclass
class LayerBody:
    """The function made from one exported layer. `results` are the nodes read outside, `caches` follow them."""

    function: FuncOp
    arguments: list[Argument]
    results: list[Node]
    caches: list[tuple[Node, int]]
    digest: str


@dataclass
class Graph:
    """An exported program with what is needed to convert it: roles of the placeholders, live nodes, layer of a node."""

    exported: Exported
    stack_path: str | None
    buffers: dict[str, torch.Tensor]
    problems: list[Problem] = field(default_factory=list)
    weights: dict[Node, str] = field(default_factory=dict)
    caches: dict[Node, tuple[int, int]] = field(default_factory=dict)
    inputs: list[Node] = field(default_factory=list)
    live: set[Node] = field(default_factory=set)

    def __post_init__(self) -> None:
        signature = self.exported.program.graph_signature
        by_name = {n.name: n for n in self.exported.program.graph.nodes if n.op == "placeholder"}
        for spec in signature.input_specs:
            node = by_name[str(getattr(spec.arg, "name", ""))]
            if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
                self.weights[node] = str(spec.target).removeprefix(self.exported.prefix)
            elif match := re.fullmatch(r"past_(\d+)_(\d+)", node.name):
                self.caches[node] = (int(match[1]), int(match[2]))
            else:
                self.inputs.append(node)
        (output,) = [n for n in self.exported.program.graph.nodes if n.op == "output"]
        self.outputs: list[Node] = [n for n in output.args[0] if isinstance(n, Node)]  # type: ignore[union-attr]
        todo = list(self.outputs)
        while todo:
            node = todo.pop()
            if node not in self.live:
                self.live.add(node)
                todo += node.all_input_nodes
        self.calls = [
            n for n in self.exported.program.graph.nodes if n.op == "call_function" and n in self.live and is_tensor(n)
        ]
        self._pattern = None
        if self.stack_path is not None:
            self._pattern = re.compile(re.escape(self.exported.prefix + self.stack_path) + r"\.(\d+)(?:\.|$)")

    def layer(self, node: Node) -> int | None:
        """The index of the layer a node belongs to."""
        if self._pattern is None:
            return None
        for path, _ in node.meta.get("nn_module_stack", {}).values():
            if match := self._pattern.match(path):
                return int(match[1])
        return None

    def module_path(self, node: Node) -> str:
        """The path of the innermost module of a node, without the wrapper's prefix."""
        entries = list(node.meta.get("nn_module_stack", {}).values())
        path = str(entries[-1][0]) if entries else ""
        return path.removeprefix(self.exported.prefix) if path.startswith(self.exported.prefix) else ""

    def relative_path(self, node: Node) -> str:
        """The module path inside the node's layer, or the whole path outside of layers."""
        path = self.module_path(node)
        layer = self.layer(node)
        if layer is None:
            return path
        return path.removeprefix(f"{self.stack_path}.{layer}").removeprefix(".")


def is_tensor(node: Node) -> bool:
    """Whether a node yields a tensor or a list of tensors (not a symbolic size, not an assertion)."""
    value = node.meta.get("val")
    if isinstance(value, (list, tuple)):
        return bool(value) and all(isinstance(v, torch.Tensor) for v in value)
    return isinstance(value, torch.Tensor)


def source_line(node: Node) -> tuple[str, int] | None:
    """(file name, line) of the innermost frame in a model's source of the code that made a node."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', str(node.meta.get("stack_trace") or ""))
    if not frames:
        return None
    models = [f for f in frames if "modeling_" in f[0] or "transformers_modules" in f[0]]
    file, line = (models or frames)[-1]
    return file.rsplit("/", 1)[-1], int(line)


class Converter:
    """Converts nodes into one block; `lookup` gives the value of a node that is defined outside of it."""

    def __init__(self, graph: Graph, block: Block, lookup: Callable[[Node], Any]) -> None:
        self.graph = graph
        self.emitter = Emitter(block)
        self.values: dict[Node, Any] = {}
        self.lookup = lookup

    def value(self, node: Node) -> Any:
        """The value of a node: converted here, a symbolic size, or given from outside."""
        if node in self.values:
            return self.values[node]
        if not is_tensor(node):
            return node.meta.get("val")
        return self.lookup(node)

    def convert(self, nodes: Iterable[Node]) -> None:
        """Convert nodes in order; what fails is noted in the graph's problems."""
        for node in nodes:
            args = map_arg(node.args, self.value)
            kwargs = map_arg(node.kwargs, self.value)
            if _poisoned(args) or _poisoned(list(kwargs.values())):
                self.values[node] = POISON
                if node.target not in TABLE:
                    self.graph.problems.append(_unsupported(self.graph, node, NO_RULE))
                continue
            self.emitter.path = self.graph.relative_path(node)
            self.emitter.line = source_line(node)
            try:
                self.values[node] = convert(self.emitter, node, args, kwargs, self.graph.exported.symbols)
            except (NoRuleError, TypeError) as error:
                self.values[node] = POISON
                self.graph.problems.append(_unsupported(self.graph, node, error))

    def result(self, node: Node) -> View | None:
        """A node's value as a real tensor, to be returned or passed on; None if it could not be converted."""
        value = self.value(node)
        if value is POISON or isinstance(value, list):
            return None
        self.emitter.path, self.emitter.line = "", None
        return self.emitter.tensor(value)


def _poisoned(args: Any) -> bool:
    if args is POISON:
        return True
    return isinstance(args, (list, tuple)) and any(_poisoned(a) for a in args)


def _unsupported(graph: Graph, node: Node, error: Exception | str) -> Problem:
    line = source_line(node)
    where = f" at {line[0]}:{line[1]}" if line else ""
    module = graph.module_path(node) or "the model"
    return Problem(
        f"unsupported operator {node.target} in {module}{where}",
        str(error),
        "add a rule to the ATen table (frontend/aten), or use a model without it",
    )


def scalar_buffer(graph: Graph, name: str, meta: Meta) -> Splat | None:
    """A 0-dimensional buffer as a number."""
    value = graph.buffers.get(name)
    if value is None or meta.shape:
        return None
    return Splat(float(value), (), meta.elem)


def externals(graph: Graph, nodes: Sequence[Node]) -> list[Node]:
    """The tensor nodes that some nodes read from outside of themselves, in order of first use."""
    inside = set(nodes)
    found: dict[Node, None] = {}
    for node in nodes:
        for source in node.all_input_nodes:
            if source not in inside and is_tensor(source):
                found.setdefault(source)
    return list(found)


@dataclass(frozen=True)
class _Incoming:
    """An argument before its block exists: how the node's value looks from inside."""

    kind: ArgumentKind
    node: Node
    name: str
    target: str
    dims: tuple[int | None, ...]
    shape: tuple[Dim, ...]
    elem: str


def build_body(graph: Graph, index: int, outer: Callable[[Node], Any], previous: Sequence[Node]) -> LayerBody | None:
    """The function of one exported layer, None if something in it could not be converted.

    `outer` gives the value that a node has in `@main`; `previous` are the results of the layer before.
    """
    nodes = [n for n in graph.calls if graph.layer(n) == index]
    inside = set(nodes)
    constants, incoming = _incoming(graph, index, externals(graph, nodes), outer)
    if incoming is None:
        return None
    slots = {n: _cache_slot(graph, n) for n in nodes}
    caches = sorted(((n, s) for n, s in slots.items() if s >= 0), key=lambda pair: pair[1])
    results = [
        n
        for n in nodes
        if slots[n] < 0 and (n in graph.outputs or any(u not in inside and u in graph.live for u in n.users))
    ]
    incoming = _name_chain(graph, incoming, results, previous)
    block = Block(arg_types=[tensor_type(i.elem, _physical(i.shape, i.dims)) for i in incoming])
    bound: dict[Node, Any] = dict(constants)
    for item, value in zip(incoming, block.args, strict=True):
        bound[item.node] = View(value, item.dims, item.shape, item.elem)
        value.name_hint = re.sub(r"\W", "_", item.name.removeprefix("w:"))
    converter = Converter(graph, block, bound.__getitem__)
    converter.convert(nodes)
    returned = [converter.result(n) for n in [*results, *(n for n, _ in caches)]]
    if any(r is None for r in returned):
        return None
    block.add_op(ReturnOp(*(r.ssa for r in returned if r is not None)))
    erase_unused(block)
    names = ["y"] if len(results) == 1 else [f"y{i}" for i in range(len(results))]
    names += [f"cache.{'kv'[slot % 2]}" for _, slot in caches]
    function = make_function("block", block, [i.name for i in incoming], names, "private")
    arguments = [Argument(i.kind, i.node, i.name, i.target) for i in incoming]
    return LayerBody(function, arguments, results, caches, digest(function))


def _incoming(
    graph: Graph, index: int, sources: Sequence[Node], outer: Callable[[Node], Any]
) -> tuple[dict[Node, Value], list[_Incoming] | None]:
    """What a layer reads from outside: constants, and arguments in the order activations, weights, caches."""
    constants: dict[Node, Value] = {}
    taken: set[str] = set()
    groups: dict[ArgumentKind, list[_Incoming]] = {"activation": [], "weight": [], "cache": []}
    for node in sources:
        if node in graph.weights or node in graph.caches:
            meta = Meta(node, graph.exported.symbols)
            dims = tuple(range(len(meta.shape)))
            if node in graph.caches:
                name = f"cache.{'kv'[graph.caches[node][1]]}"
                groups["cache"].append(_Incoming("cache", node, name, "", dims, meta.shape, meta.elem))
                continue
            target = graph.weights[node]
            scalar = scalar_buffer(graph, target, meta)
            if scalar is not None:
                constants[node] = scalar
                continue
            name = f"w:{target.removeprefix(f'{graph.stack_path}.{index}.')}"
            groups["weight"].append(_Incoming("weight", node, name, target, dims, meta.shape, meta.elem))
            continue
        value = outer(node)
        if value is POISON or isinstance(value, list):
            return constants, None
        if isinstance(value, Splat):
            constants[node] = value
            continue
        name = _unique(_activation_name(node), taken)
        groups["activation"].append(_Incoming("activation", node, name, "", value.dims, value.shape, value.elem))
    return constants, [i for group in groups.values() for i in group]


def _name_chain(
    graph: Graph, incoming: list[_Incoming], results: Sequence[Node], previous: Sequence[Node]
) -> list[_Incoming]:
    """Name the activation from the layer before `x`; in the first layer, the only one of the result's type."""
    chain = [i for i in incoming if i.node in previous]
    if not chain and len(results) == 1:
        meta = Meta(results[0], graph.exported.symbols)
        activations = [i for i in incoming if i.kind == "activation"]
        chain = [i for i in activations if (i.shape, i.elem) == (meta.shape, meta.elem)]
    if len(chain) != 1:
        return incoming
    return [replace(i, name="x") if i is chain[0] else i for i in incoming]


def _physical(shape: Sequence[Dim], dims: Sequence[int | None]) -> list[Dim]:
    return [s for s, d in zip(shape, dims, strict=True) if d is not None]


def _cache_slot(graph: Graph, node: Node) -> int:
    """The position of a node among the flattened cache outputs (`2 * layer + which`), -1 if it is none."""
    try:
        position = graph.outputs.index(node)
    except ValueError:
        return -1
    return position - 1 if graph.caches and position > 0 else -1


def _activation_name(node: Node) -> str:
    """A name for an activation: the input's, cos or sin through casts and scalings, else the node's."""
    origin = node
    while origin.op == "call_function":
        packet = getattr(origin.target, "overloadpacket", None)
        name = getattr(packet, "__name__", "")
        if name in ("cos", "sin"):
            return name
        tensors = [a for a in origin.args if isinstance(a, Node) and is_tensor(a)]
        if name not in ("to", "_to_copy", "mul", "alias") or len(tensors) != 1:
            break
        origin = tensors[0]
    return node.name if origin.op == "call_function" else origin.name


def _unique(name: str, taken: set[str]) -> str:
    result, count = name, 1
    while result in taken:
        count += 1
        result = f"{name}_{count}"
    taken.add(result)
    return result


def make_function(
    name: str, block: Block, arguments: Sequence[str], results: Sequence[str], visibility: str | None
) -> FuncOp:
    """A function of one block whose last operation returns; argument and result names are attributes."""
    last = block.last_op
    assert last is not None
    types = ([a.type for a in block.args], [o.type for o in last.operands])
    function = FuncOp(name, types, Region(block), visibility=visibility)
    function.attributes["arg_names"] = ArrayAttr([StringAttr(a) for a in arguments])
    function.attributes["result_names"] = ArrayAttr([StringAttr(r) for r in results])
    return function


def digest(function: FuncOp) -> str:
    """A hash of a function's text without its name and argument names: equal bodies have equal digests."""
    copy = function.clone()
    copy.properties["sym_name"] = StringAttr("f")
    for block in copy.body.blocks:
        for value in [*block.args, *(r for op in block.ops for r in op.results)]:
            value.name_hint = None
    names = copy.attributes.pop("arg_names")
    assert isinstance(names, ArrayAttr)
    suffixes = [str(n) for n in names if '"w:' in str(n)]
    return hashlib.sha256((str(copy) + " ".join(suffixes)).encode()).hexdigest()[:16]


def make_call(name: str, operands: Sequence[SSAValue], function: FuncOp, path: str) -> CallOp:
    """A call of a block function on behalf of the layer at `path`."""
    call = CallOp(name, list(operands), list(function.function_type.outputs))
    call.attributes["path"] = StringAttr(path)
    return call
