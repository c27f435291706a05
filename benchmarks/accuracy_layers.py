"""Predicted rows of docs/accuracy.md: layers on one PE (hardware.md 5.6) and shards of layers on eight (set C)."""

from __future__ import annotations

from accuracy_bases import HP_PROFILER, HP_TRACE, SILICON, Base
from accuracy_rows import Row, busy

from backend_rngd.emit import emit
from backend_rngd.lowering import LoweringOptions, lower
from backend_rngd.place import place
from backend_rngd.schedule import schedule
from ir.text import parse_module
from passes.opt import run_pipeline
from passes.outline import outline
from passes.pipeline import outline_stage
from rngdc.buckets import BucketSpec
from rngdc.build import compile_modules
from runtime_sim.timing import TimingResult, simulate
from runtime_sim.topology import Topology

HIDDEN, INNER, KV, VOCABULARY = 4096, 14336, 1024, 128256  # Llama-3.1-8B
HEAD = 128


def tensor(tokens: int, *rest: int) -> str:
    """A bf16 value with token axes."""
    axes = ",".join(["B", "S", *["_"] * len(rest)])
    return f'tensor<{"x".join(map(str, (1, tokens, *rest)))}xbf16, #tc.axes<"{axes}">>'


def plain(element: str, *shape: int) -> str:
    """A tensor type without axes."""
    return f"tensor<{'x'.join(map(str, shape))}x{element}>"


def function(arguments: dict[str, str], body: str, out: str) -> str:
    """`@main` around a body that defines %y."""
    names = ", ".join(f'"{n}"' for n in arguments)
    signature = ", ".join(f"%{n.replace('.', '_')}: {t}" for n, t in arguments.items())
    return (
        f"builtin.module {{\nfunc.func @main({signature}) -> {out} "
        f'attributes {{arg_names = [{names}], result_names = ["y"]}} {{\n{body}\nfunc.return %y : {out}\n}}\n}}'
    )


def linear(tokens: int, k: int, n: int) -> str:
    """A projection."""
    x, y = tensor(tokens, k), tensor(tokens, n)
    return function(
        {"x": x},
        f'%w = tc.weight "w" : tensor<{n}x{k}xbf16>\n%y = tc.contract "b s i, o i -> b s o" (%x, %w) : {y}',
        y,
    )


def norm(tokens: int) -> str:
    """RMSNorm."""
    x = tensor(tokens, HIDDEN)
    square = f'tensor<1x{tokens}xf32, #tc.axes<"B,S">>'
    expression = f"mul(mul(a, rsqrt(add(mul(b, {1 / HIDDEN}), 1e-05))), c)"
    body = f"""%w = tc.weight "w" : tensor<{HIDDEN}xbf16>
%m = tc.reduce add "mul(a, a)" over "b s h -> b s" (%x) : {square}
%y = tc.map "{expression}" over "b s h, b s, h -> b s h" (%x, %m, %w) : {x}"""
    return function({"x": x}, body, x)


def gate(tokens: int) -> str:
    """SiLU times up."""
    x = tensor(tokens, INNER)
    return function({"x": x, "u": x}, f'%y = tc.map "mul(silu(a), b)" over "b s h, b s h -> b s h" (%x, %u) : {x}', x)


def rotary(tokens: int, heads: int) -> str:
    """Rotary embedding of `heads` heads."""
    x, half = plain("bf16", 1, tokens, heads, HEAD), plain("bf16", 1, tokens, heads, HEAD // 2)
    angle = plain("f32", 1, tokens, HEAD)
    body = f"""%a = tc.slice %x axis 3 start 0 size {HEAD // 2} : {half}
%b = tc.slice %x axis 3 start {HEAD // 2} size {HEAD // 2} : {half}
%n = tc.map "neg(a)" over "b s h d -> b s h d" (%b) : {half}
%c = tc.concat (%n, %a) axis 3 : {x}
%y = tc.map "add(mul(a, b), mul(c, d))" over "b s h d, b s d, b s h d, b s d -> b s h d" (%x, %cos, %c, %sin) : {x}"""
    return function({"x": x, "cos": angle, "sin": angle}, body, x)


def attention(batch: int, tokens: int, cached: int, heads: int, kv: int) -> str:
    """Attention with its cache writes; the new tokens are among the `cached` ones."""
    q, new = plain("bf16", batch, tokens, heads, HEAD), plain("bf16", batch, tokens, kv, HEAD)
    cache, positions = plain("bf16", batch, kv, cached, HEAD), plain("i32", batch, tokens)
    types = {"position_ids": positions, "x": q, "x2": new, "x3": new, "cache.k.0": cache, "cache.v.0": cache}
    signature = ", ".join(f"%{n.replace('.', '_')}: {t}" for n, t in types.items())
    names = ", ".join(f'"{n}"' for n in types)
    return f"""builtin.module {{
func.func @main({signature}) -> ({q}, {cache}, {cache})
  attributes {{arg_names = [{names}], result_names = ["y", "cache.k.0", "cache.v.0"]}} {{
  %q = tc.transpose %x [0, 2, 1, 3] : {plain("bf16", batch, heads, tokens, HEAD)}
  %k = tc.transpose %x2 [0, 2, 1, 3] : {plain("bf16", batch, kv, tokens, HEAD)}
  %v = tc.transpose %x3 [0, 2, 1, 3] : {plain("bf16", batch, kv, tokens, HEAD)}
  %k1 = tc.kv_update (%cache_k_0, %k, %position_ids) : {cache}
  %v1 = tc.kv_update (%cache_v_0, %v, %position_ids) : {cache}
  %r = tc.attention (%q, %k1, %v1, %position_ids) scale 0.088 causal true window 0 softcap 0.0 : {q}
  func.return %r, %k1, %v1 : {q}, {cache}, {cache}
}}
}}"""


def timed(text: str, base: Base, pes: int, cached: int = 0, batch: int = 1) -> TimingResult:
    """A program without the front end, on `pes` PEs that all do the same."""
    module = parse_module(text)
    outline(module)
    lowered = lower(module, SILICON, LoweringOptions(cache_capacity=cached, cache_batch=batch))
    place(lowered.module, SILICON)
    schedule(lowered.module)
    emitted = emit(lowered.module, SILICON)
    return simulate(emitted.streams[0], base.machine, topology=Topology.of(base.machine, pes), launch=emitted.launch)


def attention_us(batch: int, tokens: int, cached: int, heads: int, kv: int, base: Base, pes: int = 1) -> float:
    """Attention of a layer, `heads` and `kv` heads a PE."""
    return base.of(timed(attention(batch, tokens, cached, heads, kv), base, pes, cached, batch))


def layer(
    name: str, text: str, tokens: int, measured: float, macs: float, hbm: float, pes: int = 1, base: Base = HP_PROFILER
) -> Row:
    """A one-layer program; on several PEs each runs the same shard. macs, hbm: the least for one PE."""
    bucket = BucketSpec("prefill", 1, tokens, tokens)
    module = parse_module(text)
    run_pipeline(module, outline_stage())
    emitted = compile_modules({bucket: module}, SILICON, lambda _: None).programs[0].emitted
    assert emitted is not None
    topology = Topology.of(base.machine, pes)
    result = simulate(emitted.streams[0], base.machine, topology=topology, launch=emitted.launch)
    moved = result.hbm_read_bytes + result.hbm_write_bytes
    least, binds = base.bound(macs * pes, hbm * pes, pes)
    label = f"{name}, {tokens:,} token{'s' if tokens > 1 else ''}"
    judges = bool(macs) and tokens in (1, 2048)
    return Row(
        label, "predicted", "5.6 HP" if pes == 1 else "set C HP", base.of(result), measured, judges, least, binds,
        moved / (hbm * pes), busy=busy(result),
    )  # fmt: skip


def layers() -> list[Row]:
    """One-PE layers (5.6) and the shards of set C."""
    steps = (1, 64, 128, 256, 512, 1024, 2048)
    qkv = (259.8, 255.6, 298.0, 536.6, 905.5, 1857, 3793)
    gate_up = (1198, 1231, 1217, 2907, 4959, 8095, 17276)
    norms = (3.4, 9.0, 16.2, 33.4, 63.7, 86.1, 172.8)
    silu = (2.5, 34.8, 68.4, 105.4, 184.3, 369, 739)
    rope = (8.7, 13.9, 24.0, 43.0, 80.2, 154.0)
    rows: list[Row] = []

    def product(name: str, tokens: int, n: int, seen: float, pes: int = 1) -> None:
        moved = 2.0 * (HIDDEN * n + tokens * (HIDDEN + n))
        macs = float(tokens * HIDDEN * n)
        rows.append(layer(name, linear(tokens, HIDDEN, n), tokens, seen, macs, moved, pes))

    for tokens, seen in zip(steps, qkv):
        product("qkv on one PE", tokens, 6144, seen)
    for tokens, seen in zip(steps, gate_up):
        product("gate_up on one PE", tokens, 2 * INNER, seen)
    product("gate_up shard on 8 PEs", 1, 2 * INNER // 8, 154, 8)
    product("gate_up shard on 8 PEs", 2048, 2 * INNER // 8, 2171, 8)
    product("lm_head shard on 8 PEs", 1, VOCABULARY // 8, 682, 8)
    for tokens, seen in zip(steps, norms):
        rows.append(layer("RMSNorm on one PE", norm(tokens), tokens, seen, 0, 4.0 * tokens * HIDDEN))
    for tokens, seen in zip((2, *steps[1:]), silu):
        rows.append(layer("SiLU x up on one PE", gate(tokens), tokens, seen, 0, 6.0 * tokens * INNER))
    for tokens, seen in zip(steps[:-1], rope):
        least = 4.0 * tokens * (HIDDEN + KV)
        took = HP_PROFILER.of(timed(rotary(tokens, (HIDDEN + KV) // HEAD), HP_PROFILER, 1))
        rows.append(
            Row(f"RoPE on one PE, {tokens:,} tokens", "predicted", "5.6 HP", took, seen, False,
                *HP_PROFILER.bound(0, least, 1), note="q and k at once; whether theirs is both is not published")
        )  # fmt: skip
    return rows + attentions()


def attentions() -> list[Row]:
    """Attention alone, on one PE with all heads (5.6) and a shard of each of eight (set C)."""
    rows: list[Row] = []

    def add(name: str, source: str, base: Base, pes: int, shape: tuple[int, int, int], seen: float) -> None:
        batch, tokens, cached = shape
        heads, kv = 32 // pes, 8 // pes
        pairs = tokens * (cached - (tokens - 1) / 2) * batch
        bytes_ = 4.0 * batch * (cached * kv + tokens * heads) * HEAD
        took = attention_us(batch, tokens, cached, heads, kv, base, pes)
        limit = base.bound(2.0 * pairs * heads * HEAD * pes, bytes_ * pes, pes)
        rows.append(Row(name, "predicted", source, took, seen, False, *limit))

    for shape, seen in (((1, 1, 128), 7.2), ((1, 1, 8192), 184.0), ((64, 1, 1024), 1843.0)):
        name = f"attention on one PE, decode, batch {shape[0]}, {shape[2]:,} cached"
        add(name, "5.6 HP", HP_PROFILER, 1, shape, seen)
    for tokens, seen in ((128, 29.0), (1024, 1016.0)):
        add(f"attention on one PE, prefill of {tokens:,}", "5.6 HP", HP_PROFILER, 1, (1, tokens, tokens), seen)
    for batch, seen in ((1, 48.3), (2, 54.8), (4, 52.0), (8, 67.6), (16, 96.5)):
        name = f"attention on 8 PEs, decode, batch {batch}, 1,024 cached"
        add(name, "set C HP", HP_TRACE, 8, (batch, 1, 1024), seen)
    for tokens, seen in ((128, 9.7), (1024, 135.0)):
        add(f"attention on 8 PEs, prefill of {tokens:,}", "set C HP", HP_TRACE, 8, (1, tokens, tokens), seen)
    return rows
