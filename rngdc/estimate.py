"""What a program costs, read off its `tc` module: memory, arithmetic and traffic of one processing element.

The times are bounds: arithmetic at the peak or HBM at its bandwidth, whichever takes longer, plus the collectives'
closed forms (`backend_rngd.machine.formulas`). `rngdc simulate` plays the streams instead.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise

from xdsl.dialects.builtin import IntegerAttr, ModuleOp, i64
from xdsl.dialects.func import CallOp, FuncOp
from xdsl.ir import BlockArgument, Operation, SSAValue

from backend_rngd.artifact.stages import EMBED, HEAD, LAYER, balance, role
from backend_rngd.machine import Machine
from backend_rngd.machine.formulas import CollectiveKind, best_collective
from ir.axes import Rule
from ir.dialects import tc
from ir.errors import Problem
from ir.interpreter import names_of
from ir.types import numpy_dtype, shape_of
from passes.chunk_tokens import CHUNK
from rngdc.cards import room_of, stages_of
from rngdc.options import ParallelOptions

CACHE = "cache."


@dataclass(frozen=True)
class Exchange:
    """A collective over `units` units: `nbytes` is the whole value, see `formulas.collective_time`."""

    kind: CollectiveKind
    nbytes: int
    units: int


@dataclass
class Work:
    """What a function costs one unit, with everything it calls."""

    macs: float = 0.0
    weight_bytes: float = 0.0
    """Weights that contractions read from HBM."""
    cache_bytes: float = 0.0
    """Keys and values that attention reads."""
    exchanges: list[Exchange] = field(default_factory=list[Exchange])

    def add(self, other: Work) -> None:
        """Add what another function costs."""
        self.macs += other.macs
        self.weight_bytes += other.weight_bytes
        self.cache_bytes += other.cache_bytes
        self.exchanges += other.exchanges


@dataclass(frozen=True)
class Memory:
    """Bytes of a unit's HBM for all layers: weights and caches of each call of `main`, in order."""

    calls: tuple[str, ...]
    weights: tuple[int, ...]
    caches: tuple[int, ...]

    @property
    def layers(self) -> list[int]:
        """Which calls are layers; embedding and head, which a program may lack, stay with the first and the last."""
        return [i for i, name in enumerate(self.calls) if role(name) == LAYER]

    def stages(self, count: int) -> list[tuple[int, int]]:
        """(weights, caches) of every stage, divided as `artifact.stages` divides the programs."""
        both = [w + c for w, c in zip(self.weights, self.caches, strict=True)]
        edges = [0, len(both)]
        if count > 1:
            layers = self.layers
            costs = [float(both[i]) for i in layers]
            costs[-1] += sum(both[layers[-1] + 1 :])
            edges[1:1] = [layers[start] for start, _ in balance(costs, count).spans[1:]]
        return [(sum(self.weights[a:b]), sum(self.caches[a:b])) for a, b in pairwise(edges)]

    def largest(self, stages: int) -> tuple[int, int]:
        """(weights, caches) of the stage that needs most."""
        return max(self.stages(stages), key=sum)

    def card(self, tensor: int, stages: int, machine: Machine, room: Sequence[int] | None = None) -> int:
        """Bytes of the fullest card: units of a layer side by side, and as many stages as a card has room for.

        `room`: stages that each card has room for, if they are not all whole.
        """
        room = room or [max(1, machine.pes_per_chip // tensor)] * stages
        needs = iter([sum(both) * min(tensor, machine.pes_per_chip) for both in self.stages(stages)])
        return max(sum(islice(needs, count)) for count in room)


@dataclass(frozen=True)
class Estimate:
    """Bounds of a program's time on a unit, in seconds, and what they come from."""

    seconds: float
    arithmetic: float
    traffic: float
    collectives: float
    work: Work


def work_of(module: ModuleOp) -> Work:
    """The cost of `@main`."""
    functions = {op.sym_name.data: op for op in module.ops if isinstance(op, FuncOp)}
    known: dict[tuple[str, tuple[bool, ...]], Work] = {}

    def visit(name: str, weights: tuple[bool, ...]) -> Work:
        """`weights`: which arguments are weights."""
        if (name, weights) in known:
            return known[name, weights]
        block = functions[name].body.block
        stored: set[SSAValue] = {arg for arg, yes in zip(block.args, weights, strict=True) if yes}
        total = Work()
        for op in block.ops:
            if isinstance(op, tc.WeightOp):
                stored.add(op.result)
            elif isinstance(op, CallOp):
                total.add(visit(op.callee.string_value(), tuple(v in stored for v in op.operands)))
            else:
                total.add(_operation(op, stored))
        known[name, weights] = total
        return total

    return visit("main", (False,) * len(functions["main"].body.block.args))


def operations_of(module: ModuleOp) -> int:
    """Operations that the backend lowers: those of every function once."""
    return sum(isinstance(op, tc.TcOp) for op in module.walk())


def _operation(op: Operation, stored: set[SSAValue]) -> Work:
    work = Work()
    if isinstance(op, tc.ContractOp):
        work.macs = math.prod(_axes(op.rule(), [shape_of(op.lhs), shape_of(op.rhs)]).values())
        work.weight_bytes = sum(_nbytes(v) for v in (op.lhs, op.rhs) if v in stored)
    elif isinstance(op, tc.AttentionOp):
        batch, heads, rows, width = shape_of(op.q)
        keys, out = op.key_count, shape_of(op.v)[3]
        work.macs = batch * heads * rows * keys * (width + out)
        work.cache_bytes = (_nbytes(op.k) + _nbytes(op.v)) * keys // shape_of(op.k)[2]
    elif isinstance(op, (tc.AllReduceOp, tc.AllGatherOp, tc.ReduceScatterOp)):
        kind: CollectiveKind = "all_reduce"
        if not isinstance(op, tc.AllReduceOp):
            kind = "all_gather" if isinstance(op, tc.AllGatherOp) else "reduce_scatter"
        whole = max(_nbytes(op.x), _nbytes(op.result))
        work.exchanges.append(Exchange(kind, whole, op.parts() or 1))
    return work


def _axes(rule: Rule, shapes: Iterable[list[int]]) -> dict[str, int]:
    """The size of every axis of a contraction."""
    sizes: dict[str, int] = {}
    for side, shape in zip(rule.inputs, shapes, strict=True):
        sizes |= {str(axis): size for axis, size in zip(side, shape, strict=True)}
    return sizes


def _nbytes(value: SSAValue) -> int:
    return math.prod(shape_of(value)) * numpy_dtype(value).itemsize


def memory_of(modules: Iterable[ModuleOp]) -> Memory:
    """What the programs of an artifact hold in HBM beside activations; the modules must be outlined.

    A cache is as large as the largest program needs. A weight counts once, with the call that reads it first. A program
    that is walked in chunks reads its weights and caches again in every chunk.
    """
    weights: dict[str, tuple[int, int]] = {}
    caches: dict[str, tuple[int, int]] = {}
    names: list[str] = []
    for module in modules:
        main = next(op for op in module.ops if isinstance(op, FuncOp) and op.sym_name.data == "main")
        calls = [op for op in main.body.block.ops if isinstance(op, CallOp) and _holds(op)]
        names = names if len(names) >= len(calls) else [c.callee.string_value() for c in calls]
        arguments = names_of(main, "arg_names", len(main.body.block.args))
        for number, call in enumerate(calls):
            for value in call.operands:
                if isinstance(value.owner, tc.WeightOp):
                    weights.setdefault(value.owner.fqn.data, (number, _nbytes(value)))
                elif isinstance(value, BlockArgument) and arguments[value.index].startswith(CACHE):
                    name, nbytes = arguments[value.index], _nbytes(value)
                    caches[name] = (number, max(nbytes, caches.get(name, (0, 0))[1]))
    totals = ([0] * len(names), [0] * len(names))
    for table, total in zip((weights, caches), totals, strict=True):
        for number, nbytes in table.values():
            total[number] += nbytes
    return Memory(tuple(names), tuple(totals[0]), tuple(totals[1]))


def _holds(call: CallOp) -> bool:
    """Whether a call is part of a stage: embedding, a layer, or the head; of several chunks only the first."""
    chunk = call.attributes.get(CHUNK)
    return role(call.callee.string_value()) in (EMBED, LAYER, HEAD) and (chunk is None or chunk == IntegerAttr(0, i64))


def memory_problems(
    memory: Memory, parallel: ParallelOptions, machine: Machine, device: str | None = None
) -> list[Problem]:
    """A problem if weights and caches do not fit the cards, with what would. `device`: as `--device` takes it."""
    room: list[int] | None = None
    if device is not None and (pes := room_of(device, machine, [])) is not None:
        room = stages_of(pes, parallel.tensor, machine)
    need, limit = memory.card(parallel.tensor, parallel.pipeline, machine, room), machine.hbm_usable_bytes
    if need <= limit:
        return []
    layers = max(1, len(memory.layers))
    fixes: list[str] = []

    def fits(stages: int) -> bool:
        """Whether every stage fits a card of its own."""
        return max(sum(both) for both in memory.stages(stages)) * min(parallel.tensor, machine.pes_per_chip) <= limit

    stages = next((p for p in range(1, layers + 1) if fits(p)), None)
    if stages is not None:
        fixes.append(f"-tp {max(parallel.tensor, machine.pes_per_chip)} -pp {stages}")
    # Replicated weights are few: over twice the cards, each holds half.
    for units in (2 * machine.pes_per_chip, 4 * machine.pes_per_chip):
        share = sum(memory.largest(1)) * parallel.tensor / units * machine.pes_per_chip
        if units > parallel.tensor and share <= limit:
            fixes.append(f"-tp {units}")
            break
    fixes.append("fewer rows or shorter buckets, or fewer layers (--num-hidden-layers)")
    sizes = f"-tp {parallel.tensor} -pp {parallel.pipeline}"
    why = f"weights and caches take {need / 1e9:,.1f} GB of a card that has {limit / 1e9:,.1f} GB"
    return [Problem(f"the model does not fit with {sizes}", why, "use " + ", or ".join(fixes))]


def estimate(work: Work, machine: Machine, units: int) -> Estimate:
    """Bounds for a program on `units` units of a layer, which fill cards one after another."""
    on_card = min(units, machine.pes_per_chip)
    cards = -(-units // machine.pes_per_chip)
    peak = machine.trf_lanes * machine.contraction_packet_bytes / 2 * machine.slices_per_pe
    rate = min(machine.hbm_bytes_per_cycle * machine.hbm_efficiency / on_card, machine.dma_engine_bytes_per_cycle)
    arithmetic, traffic = work.macs / peak, (work.weight_bytes + work.cache_bytes) / rate
    collectives = 0.0
    known: dict[Exchange, float] = {}
    for e in work.exchanges:
        if e not in known:
            over = cards if e.units == units else 1
            known[e] = best_collective(e.kind, e.nbytes, e.units, over, machine)[1]
        collectives += known[e]
    second = machine.seconds_per_cycle
    total = max(arithmetic, traffic) + collectives
    return Estimate(total * second, arithmetic * second, traffic * second, collectives * second, work)
