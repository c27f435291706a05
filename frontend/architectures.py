"""Which architectures can be captured, and which are refused and why. A pure table: no torch, no transformers.

An architecture is listed as supported once a test compares its captured graph with the unmodified transformers model
on a ragged batch in a bucket with spare room (`tests/frontend/test_capture_numerics.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["decoder", "encoder"]


@dataclass(frozen=True)
class Architecture:
    """What capture must know about a model type beyond what it reads from the instantiated model.

    `kind` decides the wrapper (`@main` with KV cache and logits, or with lengths and the last hidden state).
    `base_prefixes` are the module prefixes that checkpoints of the family drop or add (`bert.`, `transformer.`).
    """

    kind: Kind
    base_prefixes: tuple[str, ...] = ()


_DECODER = Architecture("decoder", ("model.",))

SUPPORTED: dict[str, Architecture] = {
    "llama": _DECODER,
    "mistral": _DECODER,
    "qwen2": _DECODER,
    "qwen3": _DECODER,
    "gemma2": _DECODER,
    "gpt2": Architecture("decoder", ("transformer.",)),
    "bert": Architecture("encoder", ("bert.",)),
}
"""Model types (`config.json: model_type`) whose capture is tested."""

_BYPASS = (
    "its attention does not go through transformers' AttentionInterface, so padded buckets and rows of different "
    "length would be silently wrong"
)
REFUSED: dict[str, str] = {
    name: _BYPASS for name in ("gptj", "gpt_neo", "codegen", "falcon", "bloom", "mpt", "mpnet", "deberta", "deberta-v2")
} | {
    "mamba": "state-space layers have no tc operation yet",
    "mamba2": "state-space layers have no tc operation yet",
    "t5": "encoder-decoder models need two graphs with cross-attention caches, which capture does not build",
    "bart": "encoder-decoder models need two graphs with cross-attention caches, which capture does not build",
}
"""Model types that are known not to work, with the reason."""


def supported_names() -> str:
    """The supported model types as one comma-separated string, for messages."""
    return ", ".join(sorted(SUPPORTED))
