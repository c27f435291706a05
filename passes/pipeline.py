"""The stages of a build that work on `tc`: each is one function listing its passes. The list is the documentation.

`rngdc build --print-pipeline` prints them as they run; `rngdc opt -p '...'` runs any part.
"""

from __future__ import annotations

from collections.abc import Sequence

from xdsl.passes import ModulePass

from passes.bind_quantized import BindQuantized
from passes.cast_bf16 import CastBf16
from passes.chunk_tokens import ChunkTokens
from passes.drop_logits import DropLogits
from passes.fuse_elementwise import FuseElementwise
from passes.last_token import LastToken
from passes.outline import Outline
from passes.partition import Partition
from passes.plan_tp import PlanTp
from passes.simplify import Simplify
from passes.specialise import Specialise
from passes.wide_logits import WideLogits


def bind_stage() -> list[ModulePass]:
    """Once per model, before its text is kept as the reference: a quantized checkpoint's own arithmetic."""
    return [BindQuantized()]


def simplify_stage(auto_bfloat16_cast: bool = False, fuse: bool = True) -> list[ModulePass]:
    """Once per model, on the symbolic module that capture made. Without `fuse`, only what legality needs."""
    return [
        # Outer products become maps before the dtype rule, which would round positions to bf16.
        Simplify(),
        CastBf16(allow=auto_bfloat16_cast),
        # Before fusion, so that the head that is cut off is still made of small operations.
        LastToken(),
        *([FuseElementwise(), Simplify()] if fuse else []),
        WideLogits(),
    ]


def specialise_stage(batch: int, seq: int, kv: int | None, logits: bool = True) -> list[ModulePass]:
    """Once per bucket: `batch` sequences of `seq` new tokens, and `kv` cache slots (None for an encoder).

    Without `logits` the program only fills the caches.
    """
    return [
        Specialise(batch=batch, seq=seq, kv=kv),
        *([] if logits else [DropLogits()]),
        # Sizes that became 1 make reshapes and contractions trivial.
        Simplify(),
    ]


def shard_stage(
    tensor: int, sequence_parallel: bool = False, plan: str | None = None, sequence_rows: int = 0
) -> list[ModulePass]:
    """Once per bucket, after specialise: one program for `tensor` units. Empty for one unit without a user's plan.

    sequence_rows: see `plan-tp`.
    """
    if tensor == 1 and plan is None:
        return []
    place = PlanTp(size=tensor, sequence_parallel=sequence_parallel, plan=plan, sequence_rows=sequence_rows)
    # A plan for one unit is only checked.
    return [place, Partition()] if tensor > 1 else [place]


def outline_stage() -> list[ModulePass]:
    """Once per bucket, last: nothing but calls in `@main`, and no more tokens at once than data memory has room for."""
    return [Outline(), ChunkTokens()]


def spec(passes: Sequence[ModulePass]) -> str:
    """A stage as the text that `rngdc opt -p` takes."""
    return ",".join(str(p) for p in passes)
