"""Small random models of every supported architecture, written as checkpoints, and the unmodified model to compare."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

_DECODER = {
    "vocab_size": 97,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _DECODER,
    "llama-tied": _DECODER | {"model_type": "llama", "tie_word_embeddings": True},
    "llama-rope3": _DECODER | {"model_type": "llama", "rope_parameters": _LLAMA3, "attention_bias": True},
    "mistral": _DECODER | {"sliding_window": 5, "head_dim": 8},
    "qwen2": _DECODER,
    "qwen2-window": _DECODER
    | {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "qwen3": _DECODER | {"head_dim": 16},
    "gemma2": _DECODER
    | {
        "head_dim": 16,
        "sliding_window": 4,
        "query_pre_attn_scalar": 24,
        "num_hidden_layers": 5,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 5.0,
        "tie_word_embeddings": True,
    },
    "gpt2": {
        "vocab_size": 97,
        "n_embd": 48,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "gpt2-scaled": {
        "model_type": "gpt2",
        "vocab_size": 97,
        "n_embd": 48,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 64,
        "scale_attn_by_inverse_layer_idx": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "bert": {
        "vocab_size": 97,
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 80,
        "max_position_embeddings": 64,
    },
}
"""Case name -> config; the model type is the name unless the config says otherwise."""


def make_config(case: str, **changes: Any) -> Any:
    """The transformers config of a case."""
    values = dict(CONFIGS[case]) | changes
    return transformers.AutoConfig.for_model(values.pop("model_type", case), **values)


def make_model(config: Any, seed: int = 0) -> Any:
    """The unmodified model with random weights, no two layers or channels alike, computing eagerly in f32."""
    torch.manual_seed(seed)
    encoder = config.model_type == "bert"
    build = transformers.AutoModel if encoder else transformers.AutoModelForCausalLM
    extra = {"add_pooling_layer": False} if encoder else {}
    model = build.from_config(config, dtype=torch.float32, attn_implementation="eager", **extra).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if parameter.dim() == 1:
                parameter.add_(0.2 * noise)
            else:
                parameter.copy_(noise * (1.0 if "emb" in name or "wte" in name else 2.0) / parameter.shape[-1] ** 0.5)
    return model


def save_model(case: str, directory: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Write a case's checkpoint; returns the model that was saved."""
    model = make_model(make_config(case, **changes))
    model.to(dtype).save_pretrained(directory)
    return model
