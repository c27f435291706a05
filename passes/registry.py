"""All passes by name, each behind a function that imports it when it is used."""

from __future__ import annotations

from collections.abc import Callable

from xdsl.passes import ModulePass

PassFactory = Callable[[], type[ModulePass]]


def _simplify() -> type[ModulePass]:
    from passes.simplify import Simplify

    return Simplify


def _fuse_elementwise() -> type[ModulePass]:
    from passes.fuse_elementwise import FuseElementwise

    return FuseElementwise


def _last_token() -> type[ModulePass]:
    from passes.last_token import LastToken

    return LastToken


def _bind_quantized() -> type[ModulePass]:
    from passes.bind_quantized import BindQuantized

    return BindQuantized


def _cast_bf16() -> type[ModulePass]:
    from passes.cast_bf16 import CastBf16

    return CastBf16


def _specialise() -> type[ModulePass]:
    from passes.specialise import Specialise

    return Specialise


def _drop_logits() -> type[ModulePass]:
    from passes.drop_logits import DropLogits

    return DropLogits


def _wide_logits() -> type[ModulePass]:
    from passes.wide_logits import WideLogits

    return WideLogits


def _plan_tp() -> type[ModulePass]:
    from passes.plan_tp import PlanTp

    return PlanTp


def _partition() -> type[ModulePass]:
    from passes.partition import Partition

    return Partition


def _split_stages() -> type[ModulePass]:
    from passes.split_stages import SplitStages

    return SplitStages


def _outline() -> type[ModulePass]:
    from passes.outline import Outline

    return Outline


def _chunk_tokens() -> type[ModulePass]:
    from passes.chunk_tokens import ChunkTokens

    return ChunkTokens


def get_passes() -> dict[str, PassFactory]:
    """The passes of this layer. To add one: a file, a factory above, a line here, a `.mlir` test."""
    return {
        "simplify": _simplify,
        "fuse-elementwise": _fuse_elementwise,
        "last-token": _last_token,
        "wide-logits": _wide_logits,
        "drop-logits": _drop_logits,
        "bind-quantized": _bind_quantized,
        "cast-bf16": _cast_bf16,
        "specialise": _specialise,
        "plan-tp": _plan_tp,
        "partition": _partition,
        "split-stages": _split_stages,
        "outline": _outline,
        "chunk-tokens": _chunk_tokens,
    }
