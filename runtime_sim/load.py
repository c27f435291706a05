"""What may be chosen when an artifact is loaded, and every rule of it, checked at once before anything is loaded.

Free: devices, replicas, pipeline stages. A part: buckets. At most as built: lengths and batch. Fixed by the build:
tensor parallelism, chunk size, element type; for these the refusal names the command that builds another artifact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from backend_rngd.artifact import Artifact, ArtifactError, ArtifactProblem, Bucket
from backend_rngd.artifact.stages import Cuts
from backend_rngd.machine import Machine
from runtime_sim.devices import Pe, parse_devices
from runtime_sim.requests import Limits, longest_prompt, longest_sequence
from runtime_sim.residence import Residence, block_costs_of, cuts_of
from runtime_sim.topology import Topology

Pair = tuple[int, int]
PREFILL, DECODE = ("prefill", "chunk", "encode"), ("decode",)
BUILT_DTYPES = ("auto", "bf16", "bfloat16", "torch.bfloat16")


@dataclass(frozen=True)
class LoadRequest:
    """What a user asks for; None: as built, or whatever fits. Names are those of `rngdc.LLM.load_artifact`."""

    devices: str | Sequence[str] | None = None
    data_parallel_size: int | None = None
    pipeline_parallel_size: int | None = None
    num_blocks_per_pp_stage: Sequence[int] | None = None
    prefill_buckets: Sequence[Pair] | None = None
    decode_buckets: Sequence[Pair] | None = None
    max_prompt_len: int | None = None
    max_model_len: int | None = None
    max_batch_size: int | None = None
    tensor_parallel_size: int | None = None
    prefill_chunk_size: int | None = None
    dtype: str | None = None


@dataclass(frozen=True)
class LoadPlan:
    """A request that can be met: the programs to use, what lies in which stage, where the units sit, limits of calls,
    and what is worth knowing."""

    artifact: Artifact
    residence: Residence
    topology: Topology
    limits: Limits
    notes: list[str] = field(default_factory=list[str])


def plan_load(
    artifact: Artifact, request: LoadRequest, machine: Machine, need_weights: bool = True, even: bool = True
) -> LoadPlan:
    """Check a request against an artifact. `even`: another number of stages than the built one must divide the blocks.

    Raises ArtifactError with every violation.
    """
    problems: list[ArtifactProblem] = []
    notes: list[str] = []
    if need_weights:
        _check_weights(artifact, problems)
    _check_fixed(artifact, request, problems)
    chosen = _choose_buckets(artifact, request, problems)
    limits = _limits(chosen, request, problems, notes)
    cuts = _cuts(artifact, request, even, problems)
    topology = _topology(artifact, request, cuts, machine, problems)
    if cuts is None or topology is None:
        raise ArtifactError(problems)
    try:
        residence = Residence(chosen, cuts, machine)
    except ArtifactError as error:
        raise ArtifactError([*problems, *error.problems]) from error
    problems += residence.problems(topology, machine)
    if problems:
        raise ArtifactError(problems)
    return LoadPlan(chosen, residence, topology, limits, notes)


def _check_weights(artifact: Artifact, problems: list[ArtifactProblem]) -> None:
    """Weights that are there at all; `Device.load` compares checksums."""
    if artifact.manifest.weights_mode == "none":
        what = f"{artifact.directory} has no weights"
        fix = f"build with --weights link, copy or random to compute tokens: {artifact.rebuild(weights='link')}"
        problems.append(ArtifactProblem(what, "it was built for timing only (--weights none)", fix))
    for file in artifact.manifest.linked:
        path = Path(file.path)
        if not path.is_file() or path.stat().st_size != file.bytes:
            what = f"{path} {'has changed' if path.is_file() else 'is missing'}"
            fix = "restore it, or build again (--weights copy makes an artifact that needs no other files)"
            problems.append(ArtifactProblem(what, "the artifact links to its weights", fix))


def _check_fixed(artifact: Artifact, request: LoadRequest, problems: list[ArtifactProblem]) -> None:
    def refuse(name: str, asked: object, built: object, **changes: Any) -> None:
        why = f"the build fixes it, the artifact has {built}"
        problems.append(ArtifactProblem(f"{name} {asked}", why, f"build another one: {artifact.rebuild(**changes)}"))

    tensor, built = request.tensor_parallel_size, artifact.manifest.parallel.tensor
    if tensor is not None and tensor != built:
        refuse("tensor parallel size", tensor, built, tensor_parallel_size=tensor)
    chunk, chunks = request.prefill_chunk_size, [b.input_length for b in artifact.buckets if b.phase == "chunk"]
    if chunk is not None and chunk != max(chunks, default=None):
        refuse("prefill chunk size", chunk, max(chunks, default="none"), prefill_chunk_size=chunk)
    if request.dtype is not None and str(request.dtype) not in BUILT_DTYPES:
        why = "the streams compute in bfloat16, and how weights are stored is fixed by the build"
        problems.append(ArtifactProblem(f"dtype {request.dtype}", why, "leave it out, or build another checkpoint"))


# Buckets -------------------------------------------------------------------------------------------------------------
def _choose_buckets(artifact: Artifact, request: LoadRequest, problems: list[ArtifactProblem]) -> Artifact:
    """The artifact with the programs that were asked for."""
    asked = (("prefill", PREFILL, request.prefill_buckets), ("decode", DECODE, request.decode_buckets))
    before, kept = len(problems), list[Bucket]()
    for name, phases, pairs in asked:
        there = [b for b in artifact.buckets if b.phase in phases]
        if pairs is None:
            kept += there
            continue
        sizes = list(dict.fromkeys((b.batch, b.attention_size) for b in there))
        wanted = _pairs(name, pairs, problems)
        if missing := [pair for pair in wanted if pair not in sizes]:
            what = f"{name} buckets {_listed(missing)} are not in the artifact"
            add = {f"{name}_buckets": tuple(dict.fromkeys([*sizes, *missing]))}
            fix = f"choose among these, or build them as well: {artifact.rebuild(**add)}"
            if artifact.manifest.model.kind == "encoder" and not sizes:
                fix = f"leave {name}_buckets out: an encoder has prefill buckets only"
            problems.append(ArtifactProblem(what, f"it has {_listed(sizes) or 'none'}", fix))
        kept += [b for b in there if (b.batch, b.attention_size) in wanted]
    others = [b for b in artifact.buckets if b.phase not in (*PREFILL, *DECODE)]
    chosen = artifact.select([b for b in artifact.buckets if b in kept or b in others])
    if len(problems) == before and (request.prefill_buckets is not None or request.decode_buckets is not None):
        _check_choice(artifact, chosen, problems)
    return chosen


def _pairs(name: str, given: Sequence[Pair], problems: list[ArtifactProblem]) -> list[Pair]:
    found: list[Pair] = []
    for pair in given:
        try:
            numbers = tuple(pair)
        except TypeError:
            numbers = ()
        if len(numbers) == 2 and all(type(n) is int and n > 0 for n in numbers):
            found.append((numbers[0], numbers[1]))
            continue
        why = "a bucket is two positive integers, (batch, length)"
        problems.append(ArtifactProblem(f"{name} bucket {pair!r}", why, "write it as (1, 512)"))
    return found


def _check_choice(artifact: Artifact, chosen: Artifact, problems: list[ArtifactProblem]) -> None:
    """A chosen part of the buckets must be able to serve: read prompts and go on with each of them."""
    if artifact.manifest.model.kind == "encoder":
        if not chosen.buckets:
            why = "no text could be read"
            problems.append(ArtifactProblem("no bucket was chosen", why, "choose one, or leave prefill_buckets out"))
        return
    reading = [b for b in chosen.buckets if b.phase in PREFILL and b.outputs]
    decode = [b for b in chosen.buckets if b.phase in DECODE]
    for name, found, why in (
        ("prefill", reading, "no prompt could be read"),
        ("decode", decode, "it could not generate"),
    ):
        if not found:
            fix = f"choose a {name} bucket as well, or leave out both prefill_buckets and decode_buckets"
            problems.append(ArtifactProblem(f"no {name} bucket was chosen", why, fix))
    reach = max((b.attention_size for b in decode), default=0)
    for b in reading:
        pair = (b.batch, b.attention_size)
        if decode and b.attention_size > reach:
            why = f"the longest chosen decode bucket holds {reach} tokens, so such prompts could not be continued"
            fix = f"choose prefill_buckets of up to {reach} as well, or a longer decode bucket"
            problems.append(ArtifactProblem(f"prefill bucket {pair} is longer than every decode bucket", why, fix))


def _listed(pairs: Sequence[Pair]) -> str:
    return ", ".join(f"({batch}, {length})" for batch, length in pairs)


def _limits(artifact: Artifact, request: LoadRequest, problems: list[ArtifactProblem], notes: list[str]) -> Limits:
    """Lengths and batch that were asked for; they may be smaller than what the programs hold."""
    caches = min((c.batch for c in artifact.manifest.caches), default=None)
    longest, reach = longest_prompt(artifact.buckets), longest_sequence(artifact.buckets)
    bounds = (
        ("max_prompt_len", request.max_prompt_len, min(longest, reach) if reach else longest, "prompt", "-pb 1,{}"),
        ("max_model_len", request.max_model_len, reach or longest, "sequence", "-db 1,{}"),
        ("max_batch_size", request.max_batch_size, caches, "batch", "-db {},LENGTH"),
    )
    for name, asked, bound, what, flag in bounds:
        if asked is None:
            continue
        if asked < 1:
            problems.append(ArtifactProblem(f"{name} {asked}", f"a {what} has at least 1", "use 1 or more"))
        elif bound is not None and asked > bound:
            why = f"no chosen bucket serves it, the largest {what} is {bound}"
            fix = f"use up to {bound}, or build with {flag.format(asked)}"
            problems.append(ArtifactProblem(f"{name} {asked}", why, fix))
    prompt, model = request.max_prompt_len, request.max_model_len
    if prompt is not None and model is not None and prompt > model:
        why = "a prompt is a part of the sequence"
        problems.append(ArtifactProblem(f"max_prompt_len {prompt} with max_model_len {model}", why, "make it smaller"))
    if model is not None:
        for b in artifact.buckets:
            shorter = [x for x in artifact.buckets if x.phase == b.phase and x.batch == b.batch
                       and model <= x.attention_size < b.attention_size]  # fmt: skip
            if shorter and b.phase == "decode":
                notes.append(f"bucket {b.name} is not needed: no sequence is longer than {model} (max_model_len)")
    return Limits(prompt, model, request.max_batch_size)


# Stages, devices -----------------------------------------------------------------------------------------------------
def _cuts(artifact: Artifact, request: LoadRequest, even: bool, problems: list[ArtifactProblem]) -> Cuts | None:
    """The blocks of every stage; None if that is wrong."""
    built = artifact.manifest.parallel.pipeline
    stages, listed = request.pipeline_parallel_size, request.num_blocks_per_pp_stage
    before = len(problems)
    if stages is not None and listed is not None:
        what = f"pipeline parallel size {stages} and num_blocks_per_pp_stage {list(listed)}"
        problems.append(ArtifactProblem(what, "one follows from the other", "give one of them"))
    if stages is not None and stages < 1:
        what = f"pipeline parallel size {stages}"
        problems.append(ArtifactProblem(what, "there is nothing to run on", "choose 1 or more"))
    if listed is not None and (not listed or any(n < 1 for n in listed)):
        what = f"num_blocks_per_pp_stage {list(listed)}"
        problems.append(ArtifactProblem(what, "every stage has at least one block", "list a number for each stage"))
    if len(problems) > before:
        return None
    try:
        if listed is not None:
            return _listed_cuts(artifact, listed)
        cuts = cuts_of(artifact, stages or built)
    except ArtifactError as error:
        problems += error.problems
        return None
    blocks = cuts.spans[-1][1]
    if even and stages not in (None, built) and blocks % cuts.stages:
        sizes = ",".join(str(last - first) for first, last in cuts.spans)
        why = f"its {blocks} blocks do not divide evenly"
        fix = f"choose a number that divides {blocks}, or say how: num_blocks_per_pp_stage {sizes}"
        problems.append(ArtifactProblem(f"{cuts.stages} pipeline stages of {artifact.directory}", why, fix))
        return None
    return cuts


def _listed_cuts(artifact: Artifact, listed: Sequence[int]) -> Cuts:
    blocks = len(block_costs_of(artifact, len(listed)))
    if sum(listed) != blocks:
        what = f"num_blocks_per_pp_stage {list(listed)}"
        why = f"they are {sum(listed)} blocks, the programs have {blocks}"
        raise ArtifactError([ArtifactProblem(what, why, f"make them sum to {blocks}")])
    if len(listed) == 1:
        return cuts_of(artifact, 1)
    ends = [sum(listed[: i + 1]) for i in range(len(listed))]
    return Cuts(tuple(zip([0, *ends[:-1]], ends, strict=True)))


def _topology(
    artifact: Artifact, request: LoadRequest, cuts: Cuts | None, machine: Machine, problems: list[ArtifactProblem]
) -> Topology | None:
    """Where the units sit; None if there are too few devices or they do not fit, or without stages."""
    parallel, replicas = artifact.manifest.parallel, request.data_parallel_size
    before, pes = len(problems), tuple[Pe, ...]()
    if replicas is not None and replicas < 1:
        what = f"data parallel size {replicas}"
        problems.append(ArtifactProblem(what, "there is nothing to run on", "choose 1 or more"))
    if request.devices is not None:
        try:
            pes = parse_devices(request.devices, machine.pes_per_chip)
        except ArtifactError as error:
            problems += error.problems
    if cuts is None or len(problems) > before:
        return None
    stages, width = cuts.stages, max(1, parallel.slices // machine.slices_per_pe)
    if request.devices is None:
        return Topology.of(machine, parallel.units, stages, replicas or 1, width)
    group = parallel.units * width
    needed = group * stages * (replicas or 1)
    if needed > len(pes):
        what = f"not enough devices: {needed} PEs are required, {len(pes)} are given"
        why = f"tensor {group} x pipeline {stages} x data {replicas or 1} parallel"
        problems.append(ArtifactProblem(what, why, "give more devices, or choose fewer stages or replicas"))
        return None
    replicas = replicas or len(pes) // needed
    used = pes[: group * stages * replicas]
    for first in range(0, len(used), group):
        _check_group(used[first : first + group], machine.pes_per_chip, problems)
    if len(problems) > before:
        return None
    return Topology.at(machine, parallel.units, stages, replicas, [(pe.card, pe.number) for pe in used[::width]])


def _check_group(pes: Sequence[Pe], card: int, problems: list[ArtifactProblem]) -> None:
    """The PEs that share a layer are neighbours that begin at a multiple of their number, or whole cards."""
    size = min(len(pes), card)
    for first in range(0, len(pes), size):
        part = pes[first : first + size]
        if part[0].number % size or any(pe != Pe(part[0].card, part[0].number + i) for i, pe in enumerate(part)):
            what = f"devices {', '.join(map(str, part))} for one layer"
            why = f"the {size} processing elements that share it are neighbours on a card, from a multiple of {size} on"
            start = part[0].number - part[0].number % size
            fix = f"give for example npu:{part[0].card}:{start}-{start + size - 1}"
            problems.append(ArtifactProblem(what, why, fix))
            return
