"""What `rngdc build` can be asked for, and every check that needs no model or only its config."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from backend_rngd.artifact import Options
from backend_rngd.machine import Machine
from ir.errors import Problem
from rngdc import defaults
from rngdc.buckets import BucketRequest
from rngdc.cards import check_cards
from rngdc.effort import DEFAULT as DEFAULT_LEVEL
from rngdc.effort import EFFORTS
from rngdc.places import check_directory
from rngdc.work import WorkOptions, check_work

if TYPE_CHECKING:
    from xdsl.passes import ModulePass

MAX_CARDS_OF_A_LAYER = 4
"""Cards that one layer may be spread over: tensor parallelism over PCIe gains nothing beyond."""
WEIGHT_MODES = r"link|copy|none|random(:\d+)?"


@dataclass(frozen=True)
class ParallelOptions:
    """How a model is spread.

    `tensor`: processing elements (PEs) that share every layer, fixed by the build. `pipeline`: stages of layers, a
    preference that loading may change. `plan`: a file with the user's placements, see docs/parallelism.md.
    `sequence`: norms and residuals work on a part of the tokens each; None: where all PEs get whole slices of them.
    """

    tensor: int = defaults.TENSOR_PARALLEL
    pipeline: int = defaults.PIPELINE_PARALLEL
    plan: Path | None = None
    sequence: bool | None = None


def shard_passes(parallel: ParallelOptions, machine: Machine) -> list[ModulePass]:
    """The passes that make a bucket the program of one PE of a group."""
    from passes.pipeline import shard_stage

    plan = str(parallel.plan) if parallel.plan is not None else None
    decide = parallel.sequence is None and parallel.tensor <= machine.pes_per_chip
    rows = machine.slices_per_pe if decide else 0
    return shard_stage(parallel.tensor, bool(parallel.sequence), plan, rows)


@dataclass
class BuildOptions:
    """What `rngdc build` was asked for. `weights`: link, copy, random[:SEED] or none."""

    model: str
    output: Path
    buckets: BucketRequest
    parallel: ParallelOptions = field(default_factory=ParallelOptions)
    weights: str = "link"
    auto_bfloat16_cast: bool = False
    trust_remote_code: bool = False
    revision: str | None = None
    num_hidden_layers: int | None = None
    name: str = ""
    overwrite: bool = False
    dump_ir: Path | None = None
    machine: str = "rngd"
    opt_level: int = DEFAULT_LEVEL
    device: str | None = None
    """Cards that the build is for: a number, or devices; None for as many as it takes."""
    dry_run: bool = False
    work: WorkOptions = field(default_factory=WorkOptions)


def recorded(options: BuildOptions) -> Options:
    """What the artifact keeps of the options: all that decides what is built, paths made absolute."""
    local = options.model.startswith((".", "/", "~"))
    plan = options.parallel.plan
    return Options(
        model=str(Path(options.model).expanduser().absolute()) if local else options.model,
        revision=options.revision,
        prefill_buckets=tuple(options.buckets.prefill),
        decode_buckets=tuple(options.buckets.decode),
        max_seq_len_to_capture=options.buckets.max_length,
        prefill_chunk_size=options.buckets.chunk,
        tensor_parallel_size=options.parallel.tensor,
        pipeline_parallel_size=options.parallel.pipeline,
        tensor_parallel_plan=None if plan is None else str(plan.expanduser().absolute()),
        sequence_parallel=options.parallel.sequence,
        weights=options.weights,
        auto_bfloat16_cast=options.auto_bfloat16_cast,
        trust_remote_code=options.trust_remote_code,
        num_hidden_layers=options.num_hidden_layers,
        name=options.name,
        opt_level=options.opt_level,
        device=options.device,
    )


def tensor_parallel_sizes(machine: Machine) -> tuple[list[int], list[int]]:
    """(sizes on a card, sizes over several cards) that `-tp` takes: powers of two; above a card, whole cards."""
    powers = [1 << i for i in range((machine.pes_per_chip * MAX_CARDS_OF_A_LAYER).bit_length())]
    return [n for n in powers if n <= machine.pes_per_chip], [n for n in powers if n > machine.pes_per_chip]


def check_options(options: BuildOptions, machine: Machine, problems: list[Problem]) -> None:
    """Append a problem for every option whose value cannot be used whatever the model is."""
    _check_parallel(options.parallel, machine, problems)
    check_work(options.work, options.dump_ir, problems)
    if not 0 <= options.opt_level < len(EFFORTS):
        fix = f"use -O0 to -O{len(EFFORTS) - 1}, see docs/cli.md"
        problems.append(Problem(f"-O{options.opt_level}", "there is no such optimisation level", fix))
    if options.dump_ir is not None:
        check_directory("--dump-ir", options.dump_ir, problems)
    if not re.fullmatch(WEIGHT_MODES, options.weights):
        why = "weights are linked, copied, random or left out"
        problems.append(Problem(f"--weights {options.weights!r}", why, "use link, copy, random[:SEED] or none"))
    if options.device is not None:
        check_cards(options.device, options.parallel, machine, problems)
    if options.num_hidden_layers is not None and options.num_hidden_layers < 1:
        what = f"--num-hidden-layers {options.num_hidden_layers}"
        problems.append(Problem(what, "a model has layers", "use 1 or more"))
    if options.name and not re.fullmatch(r"[\w .@/+-]{1,200}", options.name):
        why = "a name has letters, digits, spaces and . _ - + @ /, at most 200 of them"
        problems.append(Problem(f"--name {options.name!r}", why, "choose another name"))


def _check_parallel(parallel: ParallelOptions, machine: Machine, problems: list[Problem]) -> None:
    card, cards = tensor_parallel_sizes(machine)
    if parallel.tensor not in (*card, *cards):
        pes = machine.pes_per_chip
        if parallel.tensor > cards[-1]:
            why = f"a layer is spread over at most {MAX_CARDS_OF_A_LAYER} cards of {pes} processing elements"
        else:
            why = "the processing elements of a layer are a power of two"
        fix = f"use {_listed(card)} on a card, or {_listed(cards)} over several"
        if parallel.tensor > cards[-1]:
            fix += "; more cards serve a larger model as pipeline stages (-pp)"
        problems.append(Problem(f"-tp {parallel.tensor}", why, fix))
    if parallel.pipeline < 1:
        problems.append(Problem(f"-pp {parallel.pipeline}", "a model has at least one stage", "use 1 or more"))
    if parallel.plan is not None and not parallel.plan.is_file():
        why = "there is no such file"
        what = f"--tensor-parallel-plan {parallel.plan}"
        problems.append(Problem(what, why, "give a YAML file as docs/parallelism.md describes it"))


def check_stages(parallel: ParallelOptions, layers: int | None, problems: list[Problem]) -> None:
    """Append a problem if the model has fewer layers than the pipeline has stages."""
    if layers is not None and 0 < layers < parallel.pipeline:
        why = f"the model has {layers} layers, and a stage holds at least one"
        problems.append(Problem(f"-pp {parallel.pipeline}", why, f"use 1 to {layers}"))


def _listed(sizes: list[int]) -> str:
    return ", ".join(map(str, sizes[:-1])) + f" or {sizes[-1]}" if len(sizes) > 1 else str(sizes[0])
