"""Attention, KV cache and experts through the public extension points of transformers, as opaque custom operators.

With these in place a decoder layer traces to exactly one `rngd::attention` and two `rngd::kv_update`, no mask node is
built, and a mixture-of-experts block traces to one `rngd::moe_experts`. Two conventions make buckets possible without
any mask input: a token's cache slot is its absolute position, and key j is visible to query i iff j <= position(i).
Slots of padding tokens are therefore invisible until a real token overwrites them.

Each operator has a real implementation (the reference in the f32 sense) and a fake one for tracing.
Importing this module registers everything; it imports torch and transformers.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.integrations.moe import ExpertsInterface

IMPLEMENTATION = "rngd"
"""The name under which attention and experts are registered (`config._attn_implementation`)."""


class BypassError(RuntimeError):
    """The model asks for something its attention node could not express; capture turns this into a user error."""


@torch.library.custom_op("rngd::kv_update", mutates_args=())
def kv_update(cache: Tensor, new: Tensor, slots: Tensor) -> Tensor:
    """`out[b, h, slots[b, s], :] = new[b, h, s, :]`; cache (B, H, KV, D), new (B, H, S, D), slots (B, S)."""
    index = slots[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[3])
    return cache.scatter(2, index, new)


@kv_update.register_fake
def _(cache: Tensor, new: Tensor, slots: Tensor) -> Tensor:
    return torch.empty_like(cache)


@torch.library.custom_op("rngd::attention", mutates_args=())
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    lengths: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
) -> Tensor:
    """Grouped-query attention: query (B, H, S, D), key (B, K, T, D), value (B, K, T, E) -> (B, S, H, E), H = K * g.

    Key t is visible to query s of row b iff (not causal or t <= positions[b, s]) and (window == 0 or it lies less
    than `window` before the query, or around it if not causal) and (lengths is None or t < lengths[b]).
    Scores and softmax are f32; a row without a visible key yields zeros.
    """
    group = query.shape[1] // key.shape[1]
    keys = key.float().repeat_interleave(group, 1)
    values = value.float().repeat_interleave(group, 1)
    scores = query.float() @ keys.transpose(2, 3) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    if bias is not None:
        scores = scores + bias.float()
    key_index = torch.arange(key.shape[2], device=query.device)[None, None, None, :]
    distance = positions[:, None, :, None] - key_index
    visible = torch.ones_like(distance, dtype=torch.bool)
    if causal:
        visible &= distance >= 0
    if window:
        visible &= (distance if causal else distance.abs()) < window
    if lengths is not None:
        visible &= key_index < lengths[:, None, None, None]
    scores = scores.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        column = sinks.float().reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
        scores = torch.cat([scores, column], -1)
    weights = torch.softmax(scores, -1).nan_to_num(0.0)[..., : key.shape[2]]
    return (weights @ values).to(query.dtype).transpose(1, 2).contiguous()


@attention.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    lengths: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])


@torch.library.custom_op("rngd::moe_experts", mutates_args=())
def moe_experts(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    transposed: bool,
    concatenated: bool,
) -> Tensor:
    """Sum over the chosen experts of `down(act(gate(x)) * up(x))`: x (T, H), indices and weights (T, k) -> (T, H)."""
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    first = gate_up.transpose(1, 2) if transposed else gate_up
    second = down.transpose(1, 2) if transposed else down
    for expert in range(gate_up.shape[0]):
        token, choice = torch.where(indices == expert)
        if token.numel() == 0:
            continue
        hidden = functional.linear(x[token], first[expert], None if gate_up_bias is None else gate_up_bias[expert])
        gate, up = hidden.chunk(2, -1) if concatenated else (hidden[..., ::2], hidden[..., 1::2])
        hidden = _gated(activation, gate, up)
        y = functional.linear(hidden, second[expert], None if down_bias is None else down_bias[expert])
        out.index_add_(0, token, y.float() * weights[token, choice, None].float())
    return out.to(x.dtype)


@moe_experts.register_fake
def _(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    transposed: bool,
    concatenated: bool,
) -> Tensor:
    return torch.empty_like(x)


def _gated(activation: str, gate: Tensor, up: Tensor) -> Tensor:
    if activation == "swiglu_clamped":
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        return (up + 1) * (gate * torch.sigmoid(gate * 1.702))
    return {"silu": functional.silu, "gelu": functional.gelu, "relu": functional.relu}[activation](gate) * up


@dataclass(frozen=True)
class AttentionContext:
    """What every attention node of one forward call shares: positions (B, S), and lengths (B,) for encoders."""

    positions: Tensor
    lengths: Tensor | None


_context: contextvars.ContextVar[AttentionContext | None] = contextvars.ContextVar("rngd_attention", default=None)


@contextlib.contextmanager
def attention_context(positions: Tensor, lengths: Tensor | None = None) -> Generator[None]:
    """Within this context the registered attention uses these positions and lengths."""
    token = _context.set(AttentionContext(positions, lengths))
    try:
        yield
    finally:
        _context.reset(token)


_HARMLESS_TENSORS = frozenset({"position_ids", "cache_position", "position_embeddings", "input_ids"})


def _attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function behind `AttentionInterface["rngd"]`; returns (B, S, H, E) as transformers expects."""
    context = _context.get()
    if context is None:
        raise BypassError("attention was called outside of attention_context")
    name = type(module).__name__
    if attention_mask is not None:
        raise BypassError(f"{name} builds its own attention mask, which the attention node cannot carry")
    if dropout:
        raise BypassError(f"{name} asks for dropout {dropout}")
    extra = [k for k, v in kwargs.items() if isinstance(v, Tensor) and k not in _HARMLESS_TENSORS]
    if extra:
        raise BypassError(f"{name} passes {', '.join(extra)} to attention, which the attention node cannot carry")
    causal = is_causal if is_causal is not None else bool(getattr(module, "is_causal", True))
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    out = torch.ops.rngd.attention(
        query,
        key,
        value,
        context.positions,
        context.lengths,
        position_bias,
        s_aux,
        float(scale),
        bool(causal),
        int(sliding_window or 0),
        float(softcap or 0.0),
    )
    return out, None


_ACTIVATIONS = {"SiLUActivation": "silu", "SiLU": "silu", "GELUActivation": "gelu", "GELU": "gelu", "ReLU": "relu"}


def _experts_forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The function behind `ExpertsInterface["rngd"]`."""
    apply_gate = getattr(type(module)._apply_gate, "__qualname__", "")
    if apply_gate == "_default_apply_gate":
        activation = _ACTIVATIONS.get(type(module.act_fn).__name__)
    else:
        activation = "swiglu_clamped" if apply_gate.startswith("GptOss") else None
    if activation is None or not getattr(module, "has_gate", True):
        raise BypassError(f"{type(module).__name__} gates its experts in a way that is not known ({apply_gate})")
    return torch.ops.rngd.moe_experts(
        hidden_states,
        top_k_index,
        top_k_weights.to(hidden_states.dtype),
        module.gate_up_proj,
        module.down_proj,
        module.gate_up_proj_bias if module.has_bias else None,
        module.down_proj_bias if module.has_bias else None,
        activation,
        bool(module.is_transposed),
        bool(module.is_concatenated),
    )


AttentionInterface.register(IMPLEMENTATION, _attention_forward)  # no mask function: then transformers builds no mask
ExpertsInterface.register(IMPLEMENTATION, _experts_forward)


class ExplicitCacheLayer(CacheLayerMixin):
    """One layer's cache as plain tensors (B, H, KV, D) updated functionally by `rngd::kv_update`.

    Without tensors it is a probe: the new keys and values are the cache, and their shapes can be read afterwards.
    """

    is_sliding = False
    is_compileable = True

    def __init__(self, keys: Tensor | None, values: Tensor | None, slots: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.slots = keys, values, slots
        self.updates = 0
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the tensors are given."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store the new states at the slots and return the whole cache."""
        self.updates += 1
        if self.keys is not None and self.values is not None:
            key_states = torch.ops.rngd.kv_update(self.keys, key_states, self.slots)
            value_states = torch.ops.rngd.kv_update(self.values, value_states, self.slots)
        self.keys, self.values = key_states, value_states
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(key length, offset) for mask code, which never runs with this attention."""
        return (query_length if self.keys is None else self.keys.shape[2]), 0

    def get_seq_length(self) -> int:
        """Zero: positions are always passed explicitly, and code that calls int() on it must not get a tensor."""
        return 0

    def get_max_length(self) -> int:
        """The size of the KV bucket, -1 for a probe."""
        return -1 if self.keys is None else self.keys.shape[2]


class ExplicitCache(Cache):
    """A `Cache` of `ExplicitCacheLayer`, one (keys, values) pair a layer; slots (B, S) are the absolute positions."""

    def __init__(self, past: Sequence[tuple[Tensor | None, Tensor | None]], slots: Tensor) -> None:
        super().__init__(layers=[ExplicitCacheLayer(k, v, slots) for k, v in past])
