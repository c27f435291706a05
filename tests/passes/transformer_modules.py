"""Small transformers of any shape as `tc` text: what tensor parallelism is tested on without capturing a model."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from xdsl.dialects.builtin import ModuleOp

from ir.dialects import tc
from ir.interpreter import find_function, names_of
from ir.text import parse_module
from ir.types import NUMPY_DTYPES, elem_of, shape_of


@dataclass(frozen=True)
class Shape:
    """A decoder (or encoder) and one bucket of it."""

    batch: int = 2
    seq: int = 16
    slots: int = 24
    layers: int = 2
    kv: int = 2
    group: int = 2
    head: int = 4
    hidden: int = 12
    inner: int = 40
    vocab: int = 50
    packed: bool = False
    """q, k and v in one matrix with inputs first, as gpt2 has it; only without groups."""
    gated: bool = True
    bias: bool = False
    head_norm: bool = False
    tied: bool = False
    cap: bool = False
    """Logits pass a function behind the head."""
    encoder: bool = False
    flat: bool = False
    """The projection behind attention sees batch and tokens as one dimension."""


@dataclass
class Writer:
    """Lines of a function, and its arguments."""

    args: list[tuple[str, str, str]] = field(default_factory=list[tuple[str, str, str]])
    lines: list[str] = field(default_factory=list[str])

    def arg(self, name: str, kind: str, label: str) -> str:
        self.args.append((name, kind, label))
        return f"%{name}"

    def put(self, text: str, kind: str) -> str:
        name = f"%v{len(self.lines)}"
        self.lines.append(f"    {name} = {text} : {kind}")
        return name

    def function(self, name: str, results: list[tuple[str, str, str]], private: bool) -> str:
        args = ", ".join(f"%{n}: {k}" for n, k, _ in self.args)
        kinds = ", ".join(k for _, k, _ in results)
        labels = ", ".join(f'"{label}"' for _, _, label in self.args)
        names = ", ".join(f'"{label}"' for _, _, label in results)
        values = ", ".join(v for v, _, _ in results)
        return "\n".join(
            [
                f"  func.func {'private ' if private else ''}@{name}({args}) -> ({kinds}) "
                f"attributes {{arg_names = [{labels}], result_names = [{names}]}} {{",
                *self.lines,
                f"    func.return {values} : {kinds}",
                "  }",
            ]
        )


def rows(shape: Shape, *sizes: int, elem: str = "f32") -> str:
    """A type with batch, tokens and further sizes."""
    names = ",".join(["B", "S", *("_" for _ in sizes)])
    text = "x".join(str(n) for n in (shape.batch, shape.seq, *sizes))
    return f'tensor<{text}x{elem}, #tc.axes<"{names}">>'


def heads(shape: Shape, count: int, size: int) -> str:
    return f'tensor<{shape.batch}x{count}x{shape.seq}x{size}xf32, #tc.axes<"B,_,S,_">>'


def cache(shape: Shape) -> str:
    return f'tensor<{shape.batch}x{shape.kv}x{shape.slots}x{shape.head}xf32, #tc.axes<"B,_,KV,_">>'


def plain(*sizes: int) -> str:
    return f"tensor<{'x'.join(str(n) for n in sizes)}xf32>"


def norm(w: Writer, shape: Shape, x: str, weight: str) -> str:
    mean = w.put(f'tc.reduce add "div(square(a), {shape.hidden}.0)" over "b s h -> b s" ({x})', rows(shape))
    expr = "mul(a, mul(b, rsqrt(add(c, 1e-05))))"
    return w.put(f'tc.map "{expr}" over "h, b s h, b s -> b s h" ({weight}, {x}, {mean})', rows(shape, shape.hidden))


def block(shape: Shape) -> tuple[str, list[tuple[str, str]]]:
    """The text of @block_0, and its weights by name with their types."""
    w = Writer()
    count, width = shape.kv * shape.group, shape.head
    weights: list[tuple[str, str]] = []

    def weight(name: str, *sizes: int) -> str:
        weights.append((name, plain(*sizes)))
        return w.arg(name.replace(".", "_"), plain(*sizes), f"w:{name}")

    def linear(name: str, x: str, inputs: int, outputs: int) -> str:
        return with_bias(
            name,
            w.put(
                f'tc.contract "b s i, o i -> b s o" ({x}, {weight(f"{name}.weight", outputs, inputs)})',
                rows(shape, outputs),
            ),
            outputs,
        )

    def with_bias(name: str, y: str, outputs: int) -> str:
        if not shape.bias:
            return y
        bias = weight(f"{name}.bias", outputs)
        return w.put(f'tc.map "add(a, b)" over "b s h, h -> b s h" ({y}, {bias})', rows(shape, outputs))

    x = w.arg("x", rows(shape, shape.hidden), "x")
    positions = w.arg("position_ids", rows(shape, elem="i32"), "position_ids")
    lengths = w.arg("lengths", f'tensor<{shape.batch}xi32, #tc.axes<"B">>', "lengths") if shape.encoder else ""
    stored = [] if shape.encoder else [w.arg(f"cache_{n}", cache(shape), f"cache.{n}") for n in "kv"]
    n = norm(w, shape, x, weight("norm1.weight", shape.hidden))
    if shape.packed:
        total = 3 * count * width
        matrix = weight("attn.qkv.weight", shape.hidden, total)
        y = w.put(f'tc.contract "b s i, i o -> b s o" ({n}, {matrix})', rows(shape, total))
        y = with_bias("attn.qkv", y, total)
        flat = [
            w.put(f"tc.slice {y} axis 2 start {i * count * width} size {count * width}", rows(shape, count * width))
            for i in range(3)
        ]
    else:
        flat = [
            linear("attn.q", n, shape.hidden, count * width),
            linear("attn.k", n, shape.hidden, shape.kv * width),
            linear("attn.v", n, shape.hidden, shape.kv * width),
        ]
    split: list[str] = []
    for index, (y, number) in enumerate(zip(flat, (count, shape.kv, shape.kv), strict=True)):
        y = w.put(f"tc.reshape {y}", rows(shape, number, width))
        if shape.head_norm and index < 2:
            gain = weight(f"attn.norm{index}.weight", width)
            mean = w.put(
                f'tc.reduce add "div(square(a), {width}.0)" over "b s h i -> b s h" ({y})', rows(shape, number)
            )
            rule = "i, b s h i, b s h -> b h s i"
            y = w.put(
                f'tc.map "mul(a, mul(b, rsqrt(add(c, 1e-05))))" over "{rule}" ({gain}, {y}, {mean})',
                heads(shape, number, width),
            )
        else:
            y = w.put(f"tc.transpose {y} [0, 2, 1, 3]", heads(shape, number, width))
        if index < 2:
            half = width // 2
            low, high = (
                w.put(f"tc.slice {y} axis 3 start {s} size {half}", heads(shape, number, half)) for s in (0, half)
            )
            y = w.put(f"tc.concat ({high}, {low}) axis 3", heads(shape, number, width))
            y = w.put(
                f'tc.map "add(a, mul(b, 0.125))" over "b h s i, b s -> b h s i" ({y}, {positions})',
                heads(shape, number, width),
            )
        split.append(y)
    q, k, v = split
    if stored:
        k = w.put(f"tc.kv_update ({stored[0]}, {k}, {positions})", cache(shape))
        v = w.put(f"tc.kv_update ({stored[1]}, {v}, {positions})", cache(shape))
    more = f" lengths({lengths})" if shape.encoder else ""
    o = w.put(
        f"tc.attention ({q}, {k}, {v}, {positions}){more} scale 0.5 causal {'false' if shape.encoder else 'true'} "
        "window 0 softcap 0.0",
        rows(shape, count, width),
    )
    if shape.flat:
        many = shape.batch * shape.seq
        o = w.put(f"tc.reshape {o}", f'tensor<{many}x{count * width}xf32, #tc.axes<"B*S,_">>')
        matrix = weight("attn.o.weight", count * width, shape.hidden)
        o = w.put(
            f'tc.contract "n i, i o -> n o" ({o}, {matrix})', f'tensor<{many}x{shape.hidden}xf32, #tc.axes<"B*S,_">>'
        )
        o = with_bias("attn.o", w.put(f"tc.reshape {o}", rows(shape, shape.hidden)), shape.hidden)
    else:
        o = linear("attn.o", w.put(f"tc.reshape {o}", rows(shape, count * width)), count * width, shape.hidden)
    add = 'tc.map "add(a, b)" over "b s h, b s h -> b s h"'
    x = w.put(f"{add} ({x}, {o})", rows(shape, shape.hidden))
    n = norm(w, shape, x, weight("norm2.weight", shape.hidden))
    up = linear("mlp.up", n, shape.hidden, shape.inner)
    if shape.gated:
        gate = linear("mlp.gate", n, shape.hidden, shape.inner)
        up = w.put(f'tc.map "mul(silu(a), b)" over "b s h, b s h -> b s h" ({gate}, {up})', rows(shape, shape.inner))
    else:
        # Not zero at zero: padding must not matter.
        up = w.put(f'tc.map "add(sigmoid(a), 0.25)" over "b s h -> b s h" ({up})', rows(shape, shape.inner))
    x = w.put(f"{add} ({x}, {linear('mlp.down', up, shape.inner, shape.hidden)})", rows(shape, shape.hidden))
    results = [(x, rows(shape, shape.hidden), "y")]
    if not shape.encoder:
        results += [(k, cache(shape), "cache.k"), (v, cache(shape), "cache.v")]
    return w.function("block_0", results, private=True), weights


def module(shape: Shape) -> ModuleOp:
    """The whole module: embedding, layers, and head."""
    text, weights = block(shape)
    w = Writer()
    ids = w.arg("input_ids", rows(shape, elem="i32"), "input_ids")
    positions = w.arg("position_ids", rows(shape, elem="i32"), "position_ids")
    by_batch = f'tensor<{shape.batch}xi32, #tc.axes<"B">>'
    extra = w.arg("lengths" if shape.encoder else "last", by_batch, "lengths" if shape.encoder else "last")
    caches = [
        [w.arg(f"cache_{s}_{layer}", cache(shape), f"cache.{s}.{layer}") for s in "kv"]
        for layer in range(0 if shape.encoder else shape.layers)
    ]
    table = w.put('tc.weight "embed.weight"', plain(shape.vocab, shape.hidden))
    places = w.put('tc.weight "positions.weight"', plain(shape.slots, shape.hidden))
    own = rows(shape, shape.hidden)
    x = w.put(f'tc.gather "v h, b s -> b s h" ({table}, {ids})', own)
    p = w.put(f'tc.gather "v h, b s -> b s h" ({places}, {positions})', own)
    x = w.put(f'tc.map "add(mul(a, 3.5), b)" over "b s h, b s h -> b s h" ({x}, {p})', own)
    stored: list[tuple[str, str, str]] = []
    for layer in range(shape.layers):
        values = {n: w.put(f'tc.weight "layers.{layer}.{n}"', k) for n, k in weights}
        operands = [x, positions, *([extra] if shape.encoder else caches[layer]), *values.values()]
        kinds = [own, rows(shape, elem="i32"), *([by_batch] if shape.encoder else [cache(shape)] * 2)]
        kinds += [k for _, k in weights]
        results = [own] if shape.encoder else [own, cache(shape), cache(shape)]
        names = [f"%l{layer}_{i}" for i in range(len(results))]
        w.lines.append(
            f'    {", ".join(names)} = func.call @block_0({", ".join(operands)}) {{path = "layers.{layer}"}} : '
            f"({', '.join(kinds)}) -> ({', '.join(results)})"
        )
        x = names[0]
        stored += [(n, cache(shape), f"cache.{s}.{layer}") for s, n in zip("kv", names[1:], strict=False)]
    if shape.encoder:
        main = w.function("main", [(x, own, "last_hidden_state")], private=False)
    else:
        row = w.put(f'tc.gather "a b c, a -> a c" ({x}, {extra})', by_rows(shape, shape.hidden))
        head = table if shape.tied else w.put('tc.weight "lm_head.weight"', plain(shape.vocab, shape.hidden))
        y = w.put(f'tc.contract "b i, o i -> b o" ({row}, {head})', by_rows(shape, shape.vocab))
        if shape.cap:
            y = w.put(f'tc.map "add(tanh(a), 1.0)" over "b o -> b o" ({y})', by_rows(shape, shape.vocab))
        main = w.function("main", [(y, by_rows(shape, shape.vocab), "logits"), *stored], private=False)
    return parse_module(f"builtin.module {{\n{text}\n{main}\n}}")


def by_rows(shape: Shape, *sizes: int) -> str:
    text = "x".join(str(n) for n in (shape.batch, *sizes))
    return f'tensor<{text}xf32, #tc.axes<"{",".join(["B", *("_" for _ in sizes)])}">>'


def weights_of(model: ModuleOp) -> dict[str, np.ndarray]:
    """Random weights, of a size that keeps activations near 1. Call it before the module is partitioned."""
    found: dict[str, np.ndarray] = {}
    for op in model.walk():
        if isinstance(op, tc.WeightOp):
            rng = np.random.default_rng(len(found))
            sizes, elem = shape_of(op.result), elem_of(op.result)
            if elem == "i32":
                numbers = rng.integers(-(2**31), 2**31, sizes)
            elif elem == "i8":
                numbers = rng.integers(-127, 128, sizes)
            elif op.fqn.data.endswith("_scale"):
                numbers = rng.uniform(0.5, 1.5, sizes) * 0.02
            else:
                numbers = rng.standard_normal(sizes) * 0.4
            found[op.fqn.data] = np.asarray(numbers).astype(NUMPY_DTYPES[elem])
    return found


def inputs_of(model: ModuleOp, shape: Shape, seed: int = 0) -> dict[str, np.ndarray]:
    """Arguments of @main: ragged rows behind caches of their own length."""
    rng = np.random.default_rng(seed)
    main = find_function(model, "main")
    found: dict[str, np.ndarray] = {}
    past = rng.integers(0, shape.slots - shape.seq + 1, (shape.batch, 1))
    for name, value in zip(names_of(main, "arg_names", 0), main.body.block.args, strict=True):
        sizes = shape_of(value)
        if name == "input_ids":
            found[name] = rng.integers(0, shape.vocab, sizes).astype(np.int32)
        elif name == "position_ids":
            found[name] = (past + np.arange(shape.seq)).astype(np.int32)
        elif name == "last":
            found[name] = rng.integers(0, shape.seq, sizes).astype(np.int32)
        elif name == "lengths":
            found[name] = rng.integers(1, shape.seq + 1, sizes).astype(np.int32)
        else:
            assert elem_of(value) == "f32"
            found[name] = rng.standard_normal(sizes).astype(np.float32)
    return found
