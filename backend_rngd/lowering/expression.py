"""Element-wise expressions to vector-engine passes: which ops share a pass. Pure; no IR, no addresses.

An expression becomes a list of `Step`s. Every step reads one stream (or two interleaved ones, pair mode), walks the
fixed stage order with each ALU used at most once (hardware.md 2.9) and yields one value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from backend_rngd.isa.descriptors import Alu, Dtype, Mode, Op
from ir import expr as ex
from ir.errors import UnsupportedError


@dataclass(frozen=True)
class Ref:
    """An input (`in`), an earlier node (`node`) or a number (`const`)."""

    kind: str
    index: int = 0
    value: float = 0.0


@dataclass(frozen=True)
class Node:
    """One primitive operation."""

    fn: str
    args: tuple[Ref, ...]


UNARY: dict[str, tuple[Alu, Op]] = {
    "exp": (Alu.FP_EXP, Op.EXP),
    "sqrt": (Alu.FP_FPU, Op.SQRT),
    "tanh": (Alu.FP_FPU, Op.TANH),
    "sigmoid": (Alu.FP_FPU, Op.SIGMOID),
    "erf": (Alu.FP_FPU, Op.ERF),
    "log": (Alu.FP_FPU, Op.LOG),
    "sin": (Alu.FP_FPU, Op.SIN),
    "cos": (Alu.FP_FPU, Op.COS),
}
# ALUs to try in order; an op may fall to a later stage but never to an earlier one.
BINARY: dict[str, tuple[tuple[Alu, Op], ...]] = {
    "mul": ((Alu.FP_MUL0, Op.MUL), (Alu.FP_MUL1, Op.MUL), (Alu.FP_FMA, Op.MUL)),
    "add": ((Alu.FP_FMA, Op.ADD), (Alu.CLIP_ADD, Op.ADD)),
    "sub": ((Alu.FP_FMA, Op.SUB),),
    "div": ((Alu.FP_DIV, Op.DIV), (Alu.FP_FPU, Op.DIV)),
    "max": ((Alu.CLIP_MAX, Op.MAX),),
    "min": ((Alu.CLIP_MIN, Op.MIN),),
}
MAGNITUDE = "abs"
COMMUTATIVE = frozenset({"mul", "add", "max", "min"})


class DoesNotFitError(Exception):
    """An operation has no ALU in the stages a pass may still use."""


class _Builder:
    """Hash-consing builder of primitive nodes."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.known: dict[Node, Ref] = {}

    def node(self, fn: str, *args: Ref) -> Ref:
        if all(a.kind == "const" for a in args) and fn != "round":
            folded = ex.Call(fn, tuple(ex.Const(a.value) for a in args))
            return const(float(ex.evaluate(folded, [])))
        node = Node(fn, args)
        if node not in self.known:
            self.nodes.append(node)
            self.known[node] = Ref("node", len(self.nodes) - 1)
        return self.known[node]

    def build(self, e: ex.Expr) -> Ref:
        if isinstance(e, ex.Input):
            return Ref("in", e.index)
        if isinstance(e, ex.Const):
            return const(e.value)
        args = [self.build(a) for a in e.args]
        if e.fn in UNARY:
            return self.node(e.fn, *args)
        if e.fn == "sub" and args[1].kind == "const":
            return self.node("add", args[0], const(-args[1].value))
        if e.fn == "div" and args[1].kind == "const":
            return self.node("mul", args[0], const(1.0 / args[1].value))
        if e.fn in BINARY:
            return self.node(e.fn, *args)
        rewrite = REWRITES.get(e.fn)
        if rewrite is None:
            raise UnsupportedError(
                f"element-wise function `{e.fn}`",
                "the vector engine has no operation for it and no expansion is written",
                "keep it on the host or add an expansion to backend_rngd/lowering/expression.py",
            )
        return rewrite(self, *args)


def const(value: float) -> Ref:
    """A number."""
    return Ref("const", 0, value)


def _gelu(b: _Builder, x: Ref) -> Ref:
    inner = b.node("add", b.node("erf", b.node("mul", x, const(math.sqrt(0.5)))), const(1.0))
    return b.node("mul", b.node("mul", inner, const(0.5)), x)


def _gelu_tanh(b: _Builder, x: Ref) -> Ref:
    c = math.sqrt(2.0 / math.pi)
    poly = b.node("add", b.node("mul", b.node("mul", x, x), const(0.044715 * c)), const(c))
    t = b.node("add", b.node("tanh", b.node("mul", poly, x)), const(1.0))
    return b.node("mul", b.node("mul", t, const(0.5)), x)


def _pow(b: _Builder, x: Ref, p: Ref) -> Ref:
    if p.kind == "const" and p.value in (1.0, 2.0, 3.0, 4.0):
        square = b.node("mul", x, x)
        return {1.0: x, 2.0: square}.get(p.value) or b.node("mul", square, x if p.value == 3.0 else square)
    if p.kind == "const" and p.value == 0.5:
        return b.node("sqrt", x)
    if p.kind == "const" and p.value == -0.5:
        return b.node("div", const(1.0), b.node("sqrt", x))
    raise UnsupportedError("a power other than 0.5, -0.5, 1, 2, 3, 4", "the vector engine has no pow", "expand it")


def _neg(b: _Builder, x: Ref) -> Ref:
    return b.node("mul", x, const(-1.0))


def _rsqrt(b: _Builder, x: Ref) -> Ref:
    return b.node("div", const(1.0), b.node("sqrt", x))


def _recip(b: _Builder, x: Ref) -> Ref:
    return b.node("div", const(1.0), x)


def _square(b: _Builder, x: Ref) -> Ref:
    return b.node("mul", x, x)


def _silu(b: _Builder, x: Ref) -> Ref:
    return b.node("mul", b.node("sigmoid", x), x)


def _relu(b: _Builder, x: Ref) -> Ref:
    return b.node("max", x, const(0.0))


def _abs(b: _Builder, x: Ref) -> Ref:
    return b.node(MAGNITUDE, x)


def _round(b: _Builder, x: Ref) -> Ref:
    return b.node("round", x)


REWRITES: dict[str, Callable[..., Ref]] = {
    "neg": _neg,
    "rsqrt": _rsqrt,
    "recip": _recip,
    "square": _square,
    "pow": _pow,
    "silu": _silu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": _relu,
    "abs": _abs,
    "round_bf16": _round,
}


@dataclass(frozen=True)
class Arg:
    """Operand of a chain op: a number, a tensor (through VRF), the stash, or nothing."""

    kind: str  # none | const | vrf | stash
    value: float = 0.0
    ref: Ref | None = None


@dataclass(frozen=True)
class ChainOp:
    """One ALU use of a step."""

    alu: Alu
    op: Op
    mode: Mode
    arg: Arg
    group: int = 0


@dataclass
class Step:
    """One pass: streams in, chain, value out. `rounded`: the value is committed as bf16."""

    stream: Ref
    second: Ref | None
    ops: list[ChainOp]
    result: Ref
    stash_input: bool = False
    rounded: bool = False


@dataclass
class _Chain:
    """A chain under construction."""

    used: set[Alu] = field(default_factory=set[Alu])
    stage: int = 0
    ops: list[ChainOp] = field(default_factory=list[ChainOp])

    def pick(self, options: Sequence[tuple[Alu, Op]], last_stage: int) -> tuple[Alu, Op] | None:
        for alu, op in options:
            if alu not in self.used and self.stage <= alu.stage <= last_stage:
                return alu, op
        return None

    def push(self, alu: Alu, op: Op, mode: Mode, arg: Arg, group: int = 0) -> None:
        self.used.add(alu)
        self.stage = max(self.stage, alu.stage)
        self.ops.append(ChainOp(alu, op, mode, arg, group))


SIGN_OFF = Arg("const", float(0x7FFFFFFF))  # the magnitude of an f32 is what remains of it (hardware.md 2.9: logic)
FLOAT_STAGE = Alu.FP_FMA.stage
LAST_STAGE = Alu.CLIP_ADD.stage


def _wide(ops: list[ChainOp]) -> list[ChainOp]:
    """The same chain with its sum in the clip stage, if that spares it the float stages: they are half as wide."""
    narrow = [op for op in ops if FLOAT_STAGE <= op.alu.stage <= Alu.FP_DIV.stage]
    used = {op.alu for op in ops}
    if len(narrow) != 1 or narrow[0].alu != Alu.FP_FMA or narrow[0].op != Op.ADD or Alu.CLIP_ADD in used:
        return ops
    return [replace(op, alu=Alu.CLIP_ADD) if op is narrow[0] else op for op in ops]


class Scheduler:
    """Greedy pass former. `through_vrf(ref)` says whether a tensor can be an operand from VRF.

    `dtype(ref)`: element type of an input (one fetch has one type, also of two interleaved tensors).
    `repeats(ref)`: the tensor has one value for a whole row of the iteration, so as a stream it would hit one bank.
    `vrf_room(refs)`: the operands that one pass takes from VRF fit there side by side.
    `final_stage`: last stage the final step may use (a reduction must still follow).
    """

    def __init__(
        self,
        e: ex.Expr,
        through_vrf: Callable[[Ref], bool],
        dtype: Callable[[Ref], Dtype],
        repeats: Callable[[Ref], bool] = lambda _: False,
        vrf_room: Callable[[Sequence[Ref]], bool] = lambda _: True,
        vrf_slots: int = 4,
        final_stage: int = LAST_STAGE,
    ) -> None:
        builder = _Builder()
        self.root = builder.build(e)
        self.nodes = builder.nodes
        self.through_vrf = through_vrf
        self.dtype = dtype
        self.repeats = repeats
        self.vrf_room = vrf_room
        self.vrf_slots = vrf_slots
        self.final_stage = final_stage
        self.consumers: dict[Ref, list[Ref]] = {}
        for i, node in enumerate(self.nodes):
            for a in dict.fromkeys(node.args):
                self.consumers.setdefault(a, []).append(Ref("node", i))
        self.done: set[Ref] = set()
        self.rounded: set[Ref] = set()

    def run(self) -> list[Step]:
        """All steps in order; empty if the expression is an input itself."""
        steps: list[Step] = []
        while self.root.kind == "node" and self.root not in self.done:
            step = self._next()
            self.done.add(step.result)
            if step.rounded:
                self.rounded.add(step.result)
            if step.result != self.root or self.final_stage == LAST_STAGE:
                step.ops = _wide(step.ops)
            steps.append(step)
        return steps

    def _ready(self, ref: Ref) -> bool:
        return ref.kind in ("in", "const") or ref in self.done

    def _tensor(self, ref: Ref) -> bool:
        return ref.kind == "in" or (ref.kind == "node" and ref in self.done)

    def _next(self) -> Step:
        waiting = [(Ref("node", i), node) for i, node in enumerate(self.nodes)]
        waiting = [(ref, node) for ref, node in waiting if ref not in self.done and self._needed(ref)]
        # Pairs first: what they take in would be passes of its own; the outermost takes in most.
        for ref, node in reversed(waiting):
            pair = self._pair(ref, node)
            if pair is not None:
                return self._extend(*pair, ref)
        for ref, node in waiting:
            if all(self._ready(a) for a in node.args):
                return self._extend(*self._single(node), ref)
        raise AssertionError("expression without a ready node")

    def _needed(self, ref: Ref) -> bool:
        """Whether some consumer that is needed itself still waits for `ref`."""
        return ref == self.root or any(c not in self.done and self._needed(c) for c in self.consumers.get(ref, ()))

    def _dtype(self, ref: Ref) -> Dtype:
        if ref.kind == "in":
            return self.dtype(ref)
        return Dtype.BF16 if ref in self.rounded else Dtype.F32

    # Starting a pass ------------------------------------------------------------
    def _single(self, node: Node) -> tuple[Step, _Chain]:
        chain = _Chain()
        first = next(a for a in node.args if a.kind != "const")
        tensors = list(dict.fromkeys(a for a in node.args if a.kind != "const"))
        if node.fn == "round":
            return Step(first, None, chain.ops, first, rounded=True), chain
        # The other tensor streams if it must, or if this one would be read at the same address over and over.
        swap = len(tensors) == 2 and self.through_vrf(tensors[0])
        if swap and (not self.through_vrf(tensors[1]) or self.repeats(tensors[0])):
            first = tensors[1]
        step = Step(first, None, chain.ops, first)
        if len(tensors) == 2 and not any(self.through_vrf(t) for t in tensors):
            alu, op = self._zip_alu(node.fn, chain)
            step.second = node.args[1]
            step.stream = node.args[0]
            chain.push(alu, op, Mode.ZIP01, Arg("none"))
            return step, chain
        if not self._push(chain, node, first, step):
            raise DoesNotFitError(node.fn)
        return step, chain

    def _zip_alu(self, fn: str, chain: _Chain) -> tuple[Alu, Op]:
        options = BINARY[fn]
        if fn == "div":
            options = ((Alu.FP_FPU, Op.DIV),)
        picked = chain.pick(options, LAST_STAGE)
        if picked is None:
            raise DoesNotFitError(fn)
        return picked

    def _pair(self, ref: Ref, node: Node) -> tuple[Step, _Chain] | None:
        """Pair mode: both sides are short chains over tensors that cannot come from VRF."""
        if node.fn not in BINARY or len(node.args) != 2 or node.args[0] == node.args[1]:
            return None
        sides = [self._side(a, ref) for a in node.args]
        if sides[0] is None or sides[1] is None or not (sides[0][1] or sides[1][1]):
            return None  # nothing to fold in: the ordinary start serves
        (base0, ops0), (base1, ops1) = sides[0], sides[1]
        if base0 == base1 or self.through_vrf(base0) or self.through_vrf(base1):
            return None
        if self._dtype(base0) != self._dtype(base1):
            return None
        chain = _Chain()
        step = Step(base0, base1, chain.ops, ref)
        for group, (base, ops) in enumerate(((base0, ops0), (base1, ops1))):
            current = base
            for n in ops:
                if not self._push(chain, self.nodes[n.index], current, step, group + 1):
                    return None
                current = n
        picked = chain.pick(((Alu.FP_FPU, Op.DIV),) if node.fn == "div" else BINARY[node.fn], LAST_STAGE)
        if picked is None:
            return None
        chain.push(picked[0], picked[1], Mode.ZIP01, Arg("none"))
        return step, chain

    def _side(self, ref: Ref, consumer: Ref) -> tuple[Ref, list[Ref]] | None:
        """Walk from `ref` down single-use nodes to a tensor in memory: (tensor, nodes bottom up). The nodes have no
        other tensor, but the tensor itself once more (from the stash)."""
        ops: list[Ref] = []
        again: Ref | None = None
        while not self._tensor(ref):
            if ref.kind != "node" or self.consumers.get(ref) != [consumer] or ref == self.root:
                return None
            node = self.nodes[ref.index]
            streams = [a for a in node.args if a.kind != "const" and not (self._tensor(a) and self.through_vrf(a))]
            held = [a for a in streams if self._tensor(a)]
            if len(streams) == 2 and len(held) == 1 and again is None:
                again = held[0]
                streams.remove(again)
            if node.fn == "round" or len(streams) != 1:
                return None
            ops.insert(0, ref)
            consumer, ref = ref, streams[0]
        return (ref, ops) if again in (None, ref) else None

    # Growing a pass ------------------------------------------------------------
    def _extend(self, step: Step, chain: _Chain, current: Ref) -> Step:
        while not step.rounded:
            users = [c for c in self.consumers.get(current, ()) if c not in self.done]
            if len(users) != 1 or current == self.root:
                break
            node = self.nodes[users[0].index]
            if node.fn == "round":
                step.rounded = True
                current = users[0]
                break
            if not self._push(chain, node, current, step):
                break
            current = users[0]
        step.result = current
        return step

    def _push(self, chain: _Chain, node: Node, current: Ref, step: Step, group: int = 0) -> bool:
        """Append `node` applied to the running value `current`; False if it does not fit."""
        final = self.final_stage if self.root.kind == "node" and node is self.nodes[self.root.index] else LAST_STAGE
        if group:
            final = min(final, FLOAT_STAGE)
        if node.fn in UNARY:
            picked = chain.pick((UNARY[node.fn],), final)
            if picked is None:
                return False
            chain.push(*picked, Mode.UNARY, Arg("none"), group)
            return True
        if node.fn == MAGNITUDE:
            picked = chain.pick(((Alu.LOGIC_AND, Op.AND),), final)
            if picked is None:
                return False  # it is the first stage: it starts a pass
            chain.push(*picked, Mode.STREAM_OPERAND, SIGN_OFF, group)
            return True
        if node.fn not in BINARY:
            return False
        left, right = node.args
        options = BINARY[node.fn]
        if left == current and right == current:
            if chain.stage > FLOAT_STAGE or (picked := chain.pick(options, final)) is None:
                return False
            chain.push(*picked, Mode.STREAM_STREAM, Arg("none"), group)
            return True
        mode = Mode.STREAM_OPERAND if left == current else Mode.OPERAND_STREAM
        other = right if left == current else left
        if mode == Mode.OPERAND_STREAM and node.fn in COMMUTATIVE:
            mode = Mode.STREAM_OPERAND
        if other.kind == "const":
            arg = Arg("const", other.value)
        elif not self._tensor(other):
            return False
        elif other == self._streams(step, group) and not step.stash_input:
            arg = Arg("stash")
        elif self.through_vrf(other) and self._has_vrf_room(chain, other):
            arg = Arg("vrf", ref=other)
        else:
            return False
        picked = chain.pick(options, final)
        if picked is None:
            return False
        if arg.kind == "stash":
            step.stash_input = True
        chain.push(*picked, mode, arg, group)
        return True

    @staticmethod
    def _streams(step: Step, group: int) -> Ref | None:
        """The tensor that a pass, or a group of it, reads; of a pair that was merged there is none."""
        if group == 0:
            return None if step.second is not None else step.stream
        return step.stream if group == 1 else step.second

    def _has_vrf_room(self, chain: _Chain, ref: Ref) -> bool:
        held = [o.arg.ref for o in chain.ops if o.arg.kind == "vrf" and o.arg.ref is not None]
        return len(held) < self.vrf_slots and self.vrf_room([*held, ref])
