"""`rngdc run`, `rngdc simulate` and `rngdc check`: what the streams of an artifact do."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rngdc.commands.app import (
    ArtifactPath,
    BlocksPerStage,
    BucketNames,
    Devices,
    FixedByTheBuild,
    Json,
    ModeOption,
    Replicas,
    Stages,
    Target,
    app,
    integers,
    named_buckets,
    open_target,
    refuse,
    step_texts,
    timing_mode,
)

if TYPE_CHECKING:
    from ir.errors import Problem


@app.command(
    epilog="""\b
Examples:
  rngdc run ./smollm2 --chat --prompt "What is the capital of France?"
  rngdc run ./smollm2 --prompt-file story.txt --max-tokens 100 --json -
  rngdc run ./llama --prompt "Once upon a time" --devices npu:0,npu:1 -pp 2 -db 4,2048
  rngdc run ./minilm --prompt "A man is eating food." --json -"""
)
def run(
    artifact: ArtifactPath,
    prompt: Annotated[str | None, typer.Option(help="Text to continue or to embed.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(metavar="FILE", help="Read the prompt from a file.")] = None,
    prompt_ids: Annotated[str | None, typer.Option(metavar="ID,ID,...", help="The prompt as token ids.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    max_tokens: Annotated[int, typer.Option(metavar="N", help="Stop after N tokens.")] = 32,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after a stop token.")] = False,
    devices: Devices = None,
    pipeline_parallel_size: Stages = None,
    num_blocks_per_pp_stage: BlocksPerStage = None,
    data_parallel_size: Replicas = None,
    prefill_buckets: Annotated[
        list[str] | None,
        typer.Option("--prefill-buckets", "-pb", metavar="B,S", help="Use these only.", show_default="all"),
    ] = None,
    decode_buckets: Annotated[
        list[str] | None,
        typer.Option("--decode-buckets", "-db", metavar="B,S", help="Use these only.", show_default="all"),
    ] = None,
    tensor_parallel_size: FixedByTheBuild = None,
    revision: Annotated[
        str | None, typer.Option(metavar="NAME", help="Branch, tag or commit of a hub artifact.", show_default="main")
    ] = None,
    mode: ModeOption = "silicon",
    strict: Annotated[
        bool, typer.Option("--strict", help="Also find races, and reads of memory that nothing wrote (slower).")
    ] = False,
    json: Json = None,
) -> None:
    """Generate text, or embed it, on the simulated card. The tokens come from the instruction streams alone."""
    from ir.errors import UserError
    from rngdc.buckets import parse_pairs
    from rngdc.console import bar, err, print_notes, write_json
    from rngdc.console import out as stdout
    from rngdc.llm import LLM, row_json

    source = _source(prompt, prompt_file, prompt_ids)
    problems: list[Problem] = []
    pairs = [
        None if given is None else parse_pairs(flag, given, problems)
        for flag, given in (("-pb", prefill_buckets), ("-db", decode_buckets))
    ]
    if problems:
        raise UserError(problems)
    with bar() as progress:
        loading = progress.add_task("loading weights", total=None, visible=False)
        llm = LLM.load_artifact(
            artifact,
            revision=revision,
            devices=devices,
            data_parallel_size=data_parallel_size,
            pipeline_parallel_size=pipeline_parallel_size,
            num_blocks_per_pp_stage=integers("--num-blocks-per-pp-stage", num_blocks_per_pp_stage),
            prefill_buckets=pairs[0],
            decode_buckets=pairs[1],
            tensor_parallel_size=tensor_parallel_size,
            mode=timing_mode(mode),
            strict=strict,
            load_weights=False,
        )
        print_notes(llm.notes)
        ids = source if isinstance(source, list) else llm.encode(source, chat)
        llm.check([ids], max_tokens)
        llm.load(lambda done, total: progress.update(loading, completed=done, total=total, visible=True))
        report: dict[str, Any] = {"artifact": str(artifact), "mode": mode}
        if llm.artifact.manifest.model.kind == "encoder":
            working = progress.add_task("embedding", total=1)
            embedding = llm.embed(ids)
            progress.advance(working)
            report |= {
                "prompt_ids": embedding.prompt_ids,
                "embedding": [float(x) for x in embedding.vector],
                "time_us": embedding.seconds * 1e6,
            }
            shown = (
                "[" + ", ".join(f"{x:.4f}" for x in embedding.vector[:8]) + f", ...] ({len(embedding.vector)} numbers)"
            )
            timing = f"simulated: {report['time_us']:,.0f} us"
        else:
            answering = progress.add_task("answering", total=max_tokens)

            def advance(row: int, token: int, logits: object) -> None:
                progress.advance(answering)

            answer = llm.generate_tokens([ids], max_tokens, ignore_eos=ignore_eos, listener=advance)
            (row,) = answer.rows
            progress.update(answering, total=len(row.token_ids))
            text = answer.texts[0] if answer.texts is not None else None
            shown = text if text is not None else " ".join(map(str, row.token_ids))
            report |= {k: v for k, v in answer.to_json().items() if k != "rows"} | row_json(row, text)
            timing = f"simulated: first token {row.ttft_us:,.0f} us"
            if row.tpot_us is not None:
                timing += f", then {row.tpot_us:,.0f} us a token ({1e6 / row.tpot_us:,.0f} tokens/s)"
    if json is not None:
        write_json(report, json)
    if json != "-":
        stdout.print(shown, markup=False)
    err.print(timing)


@app.command(
    epilog="""\b
Examples:
  rngdc simulate ./smollm2
  rngdc simulate ./smollm2 --bucket decode_b1_kv512 --trace decode.json --report decode.html
  rngdc simulate ./llama -pp 4 --micro-batches 8
  rngdc simulate ./llama --set hbm.bandwidth=2x --ideal collectives
  rngdc simulate matmul.mlir --json -"""
)
def simulate(
    target: Target,
    bucket: BucketNames = None,
    trace: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a trace for the Perfetto viewer (needs one bucket).")
    ] = None,
    profile: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write spans in the schema of the vendor's device profile (needs one bucket)."
        ),
    ] = None,
    devices: Devices = None,
    pipeline_parallel_size: Stages = None,
    num_blocks_per_pp_stage: BlocksPerStage = None,
    data_parallel_size: Replicas = None,
    tensor_parallel_size: FixedByTheBuild = None,
    micro_batches: Annotated[
        int, typer.Option("--micro-batches", metavar="N", help="Runs of a program that follow each other.")
    ] = 1,
    report_file: Annotated[
        Path | None,
        typer.Option("--report", metavar="FILE.html", help="Write a page with drawings (needs one bucket)."),
    ] = None,
    hbm_window: Annotated[
        str | None,
        typer.Option(
            "--hbm-requests",
            metavar="START:END",
            help="Also play HBM request by request between two cycles (needs one bucket).",
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="NAME=VALUE", help="What if this machine parameter were VALUE, or 2x. Repeatable."
        ),
    ] = None,
    ideal: Annotated[
        list[str] | None,
        typer.Option(
            "--ideal",
            metavar="PART",
            help="What if this took no time: collectives, dma, hbm, issue, links or sync. Repeatable.",
        ),
    ] = None,
    mode: ModeOption = "silicon",
    json: Json = None,
) -> None:
    """Tell how long each program takes and where the time goes. Needs no weights."""
    from rngdc.console import err, write_json
    from rngdc.console import out as stdout
    from rngdc.llm import place
    from rngdc.report import add_hbm_requests, add_what_if, simulate_report, simulate_tables
    from runtime_sim.analysis import analyse
    from runtime_sim.load import LoadRequest
    from runtime_sim.what_if import WhatIfError, parse

    timing = timing_mode(mode)
    with open_target(target) as opened:
        buckets = named_buckets(opened, bucket)
        for name, file, shows in (
            ("--trace", trace, "a trace"), ("--report", report_file, "a page"), ("--profile", profile, "a profile"),
            ("--hbm-requests", hbm_window, "a window"),
        ):  # fmt: skip
            if file is not None and len(buckets) != 1:
                fix = f"add --bucket {buckets[0].name}"
                refuse(f"{name} with {len(buckets)} buckets", f"{shows} shows one program", fix)
        if micro_batches < 1:
            refuse(f"--micro-batches {micro_batches}", "there is nothing to time", "use 1 or more")
        request = LoadRequest(
            devices, data_parallel_size, pipeline_parallel_size,
            integers("--num-blocks-per-pp-stage", num_blocks_per_pp_stage), tensor_parallel_size=tensor_parallel_size,
        )  # fmt: skip
        _, device = place(opened, request, timing, need_weights=False)
        try:
            what_if = parse(settings or (), ideal or (), device.machine)
        except WhatIfError as error:
            refuse(error.what, error.why, error.fix)
        before: dict[str, float] = {}
        with step_texts() as show:
            if what_if.asked:
                for b in buckets:
                    show(f"timing {b.name} on the machine as described")
                    before[b.name] = device.time(b, micro_batches).cycles
                device.retime(what_if)
            for b in buckets:
                show(f"timing {b.name}")
                device.time(b, micro_batches)
        analyses = [analyse(device, b, micro_batches) for b in buckets]
        report = simulate_report(device, buckets, analyses, micro_batches)
        if what_if.asked:
            add_what_if(report, what_if, before)
        if hbm_window is not None:
            add_hbm_requests(report, analyses[0].result, hbm_window)
        if trace is not None:
            from runtime_sim.trace import write_trace

            written = write_trace(analyses[0], trace)
            if written.path != trace:
                err.print(f"{written.spans:,} spans are too many for JSON: the trace is {written.path}")
        if profile is not None:
            from runtime_sim.profile import write_profile

            write_profile(analyses[0], profile)
        if report_file is not None:
            from runtime_sim.report_page import write_report

            write_report(analyses[0], report_file, f"{target.name} {buckets[0].name}", what_if.describe())
        if target.suffix == ".mlir":
            report["artifact"] = str(target)
    if json is not None:
        write_json(report, json)
    if json != "-":
        for item in simulate_tables(report):
            stdout.print(item)


@app.command(
    epilog="""\b
Examples:
  rngdc check ./smollm2
  rngdc check ./smollm2 --bucket prefill_b1_s128_kv128 --json -
  rngdc check attention.mlir"""
)
def check(
    target: Target,
    bucket: BucketNames = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of the inputs.")] = 0,
    pipeline_parallel_size: Stages = None,
    json: Json = None,
) -> None:
    """Run every level on the same inputs: tc before the passes, tc after, and the streams. Exit 1 if two disagree.

    The first operation that disagrees is named, with its place in the model.
    """
    from rngdc.check import check as run_check
    from rngdc.check import check_lines
    from rngdc.console import out as stdout
    from rngdc.console import write_json
    from runtime_sim.runtime import Device

    with open_target(target) as opened, step_texts() as show:
        device = Device(opened, checks=True, pipeline_parallel_size=pipeline_parallel_size)
        show("loading weights")
        device.load()
        report = run_check(device, named_buckets(opened, bucket), seed, show)
    if target.suffix == ".mlir":
        report.artifact = str(target)
    if json is not None:
        write_json(report.to_json(), json)
    if json != "-":
        for line in check_lines(report):
            stdout.print(line, markup=False)
    if not report.agrees:
        raise typer.Exit(1)


def _source(prompt: str | None, prompt_file: Path | None, prompt_ids: str | None) -> str | list[int]:
    """The prompt as text or as token ids; exactly one of the three sources must be given."""
    given = [x for x in (prompt, prompt_file, prompt_ids) if x is not None]
    if len(given) != 1:
        what = "no prompt was given" if not given else "more than one prompt was given"
        refuse(what, "a run has one prompt", "use one of --prompt, --prompt-file and --prompt-ids")
    if prompt_ids is not None:
        fields = prompt_ids.replace(",", " ").split()
        if bad := [f for f in fields if not f.isdecimal()]:
            refuse(f"--prompt-ids {bad[0]!r}", "a token id is a number", "write them as 1,2,3")
        return [int(f) for f in fields]
    if prompt_file is not None:
        try:
            return prompt_file.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            refuse(f"{prompt_file} cannot be read", str(error), "check the path")
    assert prompt is not None
    return prompt
