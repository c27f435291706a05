"""Options of `furiosa-llm build` beyond the specification: those that mean something here, what replaces the others."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

from ir.errors import Problem

if TYPE_CHECKING:
    from rngdc.options import BuildOptions

ADDITIONAL = "--additional-model-config"
FIXED: dict[str, tuple[str, str]] = {
    "calculate_logit_only_for_last_token": ("true", "prefill programs compute the logits of each row's last token"),
    "optimize_logit_shape": ("true", "prefill programs compute the logits of each row's last token"),
    "use_blockwise_compile": ("true", "a block is compiled once and called for every layer"),
    "num_blocks_per_supertask": ("1", "a block is the unit that stages are made of, and calls cost nothing to split"),
    "do_decompositions_for_model_rewrite": ("false", "models are captured as contractions and fused expressions"),
    "embed_all_constants_into_graph": ("false", "weights stay in their files, so that no program depends on them"),
}
"""Keys with the only value there is, and why."""
COUNTED = ("num_hidden_layers", "seed", "seed_for_random_weight")
REPLACED = {
    "--quantization-artifact-path": (
        "a separate directory with qformat.yaml and qparam.npy is not read",
        "give a checkpoint that holds its quantization as MODEL: compressed-tensors W8A8, FP8 or W4A16, see "
        "docs/quantization.md",
    ),
    "--kv-cache-sharing-across-beams-config": (
        "decoding is greedy, so there are no beams whose caches could be shared",
        "leave it out, and give the rows of a batch their own bucket (-db ROWS,LENGTH)",
    ),
    "--bundle-binaries": (
        "an artifact is a directory whose streams are one compressed file a program; there is nothing to bundle",
        "leave it out, or pack the directory that was built (tar -czf OUT.tgz OUT)",
    ),
    "--data-parallel-size": (
        "replicas are chosen when an artifact is loaded, not when it is built",
        "leave it out here, and use `rngdc run OUT -dp N`",
    ),
    "--model-id": ("the model is the first argument", "rngdc build MODEL OUT"),
    "--paged-attention-num-blocks": (
        "caches have room for the largest decode bucket",
        "choose it with -db BATCH,LENGTH",
    ),
}
"""Options that are refused, with why and what to do instead."""


def refuse_replaced(given: dict[str, str], problems: list[Problem]) -> None:
    """Append a problem for every option of REPLACED that was given, by its value."""
    for flag, value in given.items():
        why, fix = REPLACED[flag]
        if flag.startswith("--kv-cache") and not re.fullmatch(r"\s*\d+\s*,\s*\d+\s*", value):
            why = f"it takes two integers, BEAM_WIDTH,MAX_NEW_TOKENS; besides, {why}"
        problems.append(Problem(f"{flag} {value}".rstrip(), why, fix))


def apply_additional(options: BuildOptions, texts: list[str], problems: list[Problem]) -> BuildOptions:
    """`key=value` settings of the model: the same as options that exist, or the only value there is."""
    seen: dict[str, str] = {}
    for text in texts:
        key, equals, value = (part.strip() for part in text.partition("="))
        what = f"{ADDITIONAL} {text}"
        if not equals or not key or not value:
            problems.append(Problem(what, "it takes KEY=VALUE", f"write it as {ADDITIONAL} num_hidden_layers=2"))
        elif key in seen:
            problems.append(Problem(what, f"{key} is given twice", "keep one of them"))
        elif key in FIXED:
            only, why = FIXED[key]
            if value.lower() != only:
                problems.append(Problem(what, f"there is only {only}: {why}", f"use {key}={only}, or leave it out"))
        elif key not in COUNTED:
            known = ", ".join((*COUNTED, *FIXED))
            problems.append(Problem(what, f"unknown model configuration key {key!r}", f"use one of {known}"))
        elif not value.isdecimal():
            problems.append(Problem(what, f"{key} is a number", f"use {key}=2"))
        elif key == "num_hidden_layers":
            if options.num_hidden_layers not in (None, int(value)):
                why = f"--num-hidden-layers {options.num_hidden_layers} says something else"
                problems.append(Problem(what, why, "keep one of them"))
            options = replace(options, num_hidden_layers=int(value))
        else:
            if options.weights not in ("link", f"random:{value}"):
                why = f"the seed is for random weights, and --weights is {options.weights}"
                problems.append(Problem(what, why, f"use --weights random:{value} alone"))
            options = replace(options, weights=f"random:{value}")
        seen[key] = value
    return options
