"""split-stages: cut the calls of @main into contiguous pipeline stages of about equal cost.

Before:
    %1 = func.call @block_0(%0, ...) {path = "model.layers.0"}
    %2 = func.call @block_0(%1, ...) {path = "model.layers.1"}
After (stages=2):
    builtin.module attributes {tc.stages = 2}
    %1 = func.call @block_0(%0, ...) {path = "model.layers.0", stage = 0}
    %2 = func.call @block_0(%1, ...) {path = "model.layers.1", stage = 1}

The cost of a layer is the bytes of its weights; those of the embedding and of the head count for the first and the last
stage. Only the activations that one layer hands to the next may cross a cut. What every stage can compute from the
inputs (rotary tables) may be read anywhere; a weight or cache of two stages is an error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from typing_extensions import override
from xdsl.context import Context
from xdsl.dialects.builtin import IntegerAttr, ModuleOp, StringAttr, i64
from xdsl.dialects.func import CallOp, FuncOp, ReturnOp
from xdsl.ir import Operation, SSAValue
from xdsl.passes import ModulePass
from xdsl.utils.exceptions import PassFailedException

from ir.dialects import tc
from ir.errors import Problem, UserError
from ir.interpreter import find_function
from ir.types import ELEMENT_BYTES, elem_of, shape_of
from passes.arguments import argument_name
from passes.chunk_tokens import CHUNK
from passes.notes import add_notes
from passes.provenance import PATH

STAGE = "stage"
"""Attribute of a call: the number of its stage."""

STAGES = "tc.stages"
"""Module attribute: the number of stages."""


@dataclass(frozen=True)
class SplitStages(ModulePass):
    """Write `stage` on every layer's call of @main; `stages` is the number of stages."""

    name = "split-stages"
    stages: int = 1

    @override
    def apply(self, ctx: Context, op: ModuleOp) -> None:
        main = find_function(op, "main")
        layers = layer_calls(main)
        if self.stages < 1:
            raise PassFailedException(f"split-stages: stages must be positive, not {self.stages}")
        if self.stages > max(1, len(layers)):
            what = f"{self.stages} pipeline stages"
            why = f"the model has {len(layers)} layers that can be apart"
            raise UserError([Problem(what, why, f"use -pp 1 to {max(1, len(layers))}")])
        if any(CHUNK in call.attributes for call in layers):
            raise PassFailedException("split-stages: every chunk calls all layers; run it before chunk-tokens")
        graph = _Main(main, layers)
        first, last = graph.end_costs()
        costs = [graph.cost(call) for call in layers]
        costs[0] += first
        costs[-1] += last
        stage = [s for s, count in enumerate(balance(costs, self.stages)) for _ in range(count)]
        graph.verify(stage)
        for call, number in zip(layers, stage, strict=True):
            call.attributes[STAGE] = IntegerAttr(number, i64)
        op.attributes[STAGES] = IntegerAttr(self.stages, i64)
        if self.stages > 1:
            add_notes(op, graph.tied())


def layer_calls(main: FuncOp) -> list[CallOp]:
    """The calls that pass activations on: each reads a result of the one before."""
    calls = [op for op in main.body.block.ops if isinstance(op, CallOp)]
    own = [c for c in calls if isinstance(c.attributes.get(PATH), StringAttr) and _is_layer(c)]
    return own or calls


def _is_layer(call: CallOp) -> bool:
    return call.callee.string_value().startswith("block_")


def balance(costs: Sequence[int], stages: int) -> list[int]:
    """How many neighbouring items each stage takes, so that the most expensive stage is as cheap as possible.

    Among equal ones the earlier stages are kept cheap, since the last one has the head.
    """
    count = len(costs)
    total = [0]
    for cost in costs:
        total.append(total[-1] + cost)
    best: list[dict[int, tuple[int, int]]] = [{0: (0, 0)}]
    for _ in range(stages):
        row: dict[int, tuple[int, int]] = {}
        for end in range(1, count + 1):
            options = [(max(b, total[end] - total[start]), start) for start, (b, _) in best[-1].items() if start < end]
            if options:
                row[end] = min(options)
        best.append(row)
    counts: list[int] = []
    end = count
    for row in reversed(best[1:]):
        start = row[end][1]
        counts.append(end - start)
        end = start
    return counts[::-1]


class _Main:
    """What is before, inside and behind the layers of @main."""

    def __init__(self, main: FuncOp, layers: Sequence[CallOp]) -> None:
        self.main, self.layers = main, list(layers)
        self.number: dict[Operation, int] = {c: i for i, c in enumerate(self.layers)}
        self.behind: set[Operation] = set()
        """Operations that need a layer's result, layers excluded."""
        self.inputs: set[Operation] = set()
        for op in main.body.block.ops:
            if op in self.number or isinstance(op, ReturnOp):
                continue
            owners = {o.owner for o in op.operands}
            if owners & (self.behind | set(self.number)):
                self.behind.add(op)

    def cost(self, call: CallOp) -> int:
        """Bytes of the weights a call reads."""
        return sum(_bytes(o) for o in call.operands if isinstance(o.owner, tc.WeightOp))

    def end_costs(self) -> tuple[int, int]:
        """Bytes of the weights read before the first and behind the last layer (of a table: the rows that are read)."""
        before = after = 0
        for op in self.main.body.block.ops:
            if op in self.number or isinstance(op, (tc.WeightOp, ReturnOp)):
                continue
            size = sum(self._read(op, i) for i, o in enumerate(op.operands) if isinstance(o.owner, tc.WeightOp))
            if op in self.behind:
                after += size
            else:
                before += size
        return before, after

    def _read(self, op: Operation, index: int) -> int:
        """Bytes of an operand that an operation, or the function it calls, reads."""
        if isinstance(op, tc.GatherOp):
            return min(_bytes(op.operands[index]), _bytes(op.results[0]))
        if isinstance(op, CallOp):
            module = tc.module_of(op)
            assert module is not None
            argument = find_function(module, op.callee.string_value()).body.block.args[index]
            return max((self._read(u.operation, u.index) for u in argument.uses), default=0)
        return _bytes(op.operands[index])

    def verify(self, stage: Sequence[int]) -> None:
        """Raises UserError naming every weight or cache that two stages would need, and every skipped layer."""
        problems: list[Problem] = []
        last = max(stage, default=0)
        readers: dict[SSAValue, set[int]] = {}
        for call, number in zip(self.layers, stage, strict=True):
            for operand in call.operands:
                readers.setdefault(operand, set()).add(number)
        for value, stages in readers.items():
            owner = value.owner
            name = owner.fqn.data if isinstance(owner, tc.WeightOp) else argument_name(value)
            kind = "weight" if isinstance(owner, tc.WeightOp) else "cache" if name.startswith("cache.") else ""
            if kind and len(stages) > 1:
                text = ", ".join(str(s) for s in sorted(stages))
                problems.append(Problem(f"{kind} {name}", f"layers of stages {text} use it", "use fewer stages"))
            if isinstance(owner, CallOp) and owner in self.number:
                made = stage[self.number[owner]]
                apart = [s for s in stages if s not in (made, made + 1)]
                activation = value is owner.results[0]
                if apart or (not activation and stages != {made}):
                    why = f"stage {max(stages)} reads a result of stage {made} that is not handed from layer to layer"
                    problems.append(Problem(_name(owner), why, "use fewer stages"))
            elif isinstance(owner, Operation) and owner in self.behind and last > 0:
                problems.append(Problem(f"{owner.name}", "it computes between layers", "use -pp 1"))
        for op in self.behind:
            for operand in op.operands:
                owner = operand.owner
                if isinstance(owner, CallOp) and owner in self.number and stage[self.number[owner]] != last:
                    why = f"the head reads a result of stage {stage[self.number[owner]]}, not of the last stage"
                    problems.append(Problem(_name(owner), why, "use -pp 1"))
        if problems:
            raise UserError(problems)

    def tied(self) -> list[str]:
        """Weights that are read both before the first and behind the last layer: both end stages hold them."""
        found: list[str] = []
        for op in self.main.body.block.ops:
            if isinstance(op, tc.WeightOp):
                users = {u.operation for u in op.result.uses} - set(self.number)
                if users & self.behind and users - self.behind:
                    found.append(f"{op.fqn.data} is in the first and in the last pipeline stage (tied weights)")
        return found


def _name(call: CallOp) -> str:
    path = call.attributes.get(PATH)
    return path.data if isinstance(path, StringAttr) else f"call of @{call.callee.string_value()}"


def _bytes(value: SSAValue) -> int:
    return math.prod(shape_of(value)) * ELEMENT_BYTES[elem_of(value)]
