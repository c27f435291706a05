"""`LLM`: an artifact on simulated cards, from Python.

from rngdc import LLM

llm = LLM.load_artifact("./llama", devices="npu:0,npu:1", decode_buckets=[(4, 1024)])
report = llm.generate(["The capital of France is", "Once upon a time"], max_new_tokens=16)
print(report.texts, report.seconds, report.tokens_per_second)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from backend_rngd.artifact import Artifact, ArtifactError, ArtifactProblem, open_artifact
from rngdc.hub import artifact_directory
from runtime_sim.generate import Embedding, Generation, Listener, embed, generate
from runtime_sim.load import LoadPlan, LoadRequest, plan_load
from runtime_sim.requests import check_prompts, schedule
from runtime_sim.runtime import Device, machine_of

if TYPE_CHECKING:
    from rngdc.text import TextModel

Pair = tuple[int, int]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ProgramUse:
    """How often a program ran in a call on all replicas, and how long one run takes alone."""

    bucket: str
    runs: int
    microseconds: float


@dataclass(frozen=True)
class Report:
    """What a call of `generate` made, in the order of the prompts, and how long it took on the simulated cards.

    `texts`: None if the artifact has no tokenizer. `seconds`: from the call to the last token of the last row.
    """

    rows: list[Generation]
    texts: list[str] | None
    seconds: float
    programs: list[ProgramUse]
    mode: str

    @property
    def token_ids(self) -> list[list[int]]:
        """The new tokens of every prompt."""
        return [row.token_ids for row in self.rows]

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all rows in a second of simulated time."""
        return sum(len(row.token_ids) for row in self.rows) / self.seconds if self.seconds else 0.0

    def to_json(self) -> dict[str, Any]:
        """The report as JSON."""
        texts = self.texts or [None] * len(self.rows)
        return {
            "mode": self.mode,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
            "rows": [row_json(row, text) for row, text in zip(self.rows, texts, strict=True)],
            "programs": [{"bucket": p.bucket, "runs": p.runs, "time_us": p.microseconds} for p in self.programs],
        }


def row_json(row: Generation, text: str | None) -> dict[str, Any]:
    """A row as JSON, with its times."""
    return {
        "prompt_ids": row.prompt_ids,
        "token_ids": row.token_ids,
        "text": text,
        "finish": row.finish,
        "ttft_us": row.ttft_us,
        "tpot_us": row.tpot_us,
    }


class LLM:
    """A model on simulated cards. Its tokens come from the instruction streams alone."""

    def __init__(self, plan: LoadPlan, device: Device) -> None:
        """Use `load_artifact`."""
        self.plan, self.device = plan, device
        self._text: TextModel | None = None

    @staticmethod
    def load_artifact(
        path_or_hub_id: str | os.PathLike[str],
        *,
        revision: str | None = None,
        devices: str | Sequence[str] | None = None,
        data_parallel_size: int | None = None,
        pipeline_parallel_size: int | None = None,
        num_blocks_per_pp_stage: Sequence[int] | None = None,
        prefill_buckets: Sequence[Pair] | None = None,
        decode_buckets: Sequence[Pair] | None = None,
        max_prompt_len: int | None = None,
        max_model_len: int | None = None,
        max_batch_size: int | None = None,
        tensor_parallel_size: int | None = None,
        prefill_chunk_size: int | None = None,
        dtype: str | None = None,
        mode: Literal["documented", "silicon"] = "silicon",
        strict: bool = False,
        load_weights: bool = True,
        progress: Progress | None = None,
    ) -> LLM:
        """Load an artifact and its weights.

        path_or_hub_id: a directory, or a hub id (`revision`: its branch, tag or commit).
        devices: such as `npu:0`, `npu:0:0-3` or `npu:0,npu:1`; without it as many cards as are needed.
        data_parallel_size: replicas; without it as many as the devices hold.
        pipeline_parallel_size: stages, a number that divides the blocks; num_blocks_per_pp_stage: the blocks of each.
        prefill_buckets, decode_buckets: (batch, length) of those to use, a part of those that were built.
        max_prompt_len, max_model_len, max_batch_size: at most what these hold.
        tensor_parallel_size, prefill_chunk_size, dtype: fixed by the build; another value is refused with the command
        that builds such an artifact.
        load_weights: False leaves them to `load`, so that `check` can refuse prompts before.
        mode: of timing. strict: find reads of memory that nothing wrote. progress(done, total): bytes of weights.

        Raises ArtifactError (or UserError, if the artifact is not found) with every problem, before anything is loaded.
        """
        request = LoadRequest(
            devices, data_parallel_size, pipeline_parallel_size, num_blocks_per_pp_stage, prefill_buckets,
            decode_buckets, max_prompt_len, max_model_len, max_batch_size, tensor_parallel_size, prefill_chunk_size,
            dtype,
        )  # fmt: skip
        plan, device = place(open_artifact(artifact_directory(path_or_hub_id, revision)), request, mode, strict)
        llm = LLM(plan, device)
        if load_weights:
            llm.load(progress)
        return llm

    def load(self, progress: Progress | None = None) -> None:
        """Copy the weights to the cards. Raises ArtifactError if linked files have changed."""
        self.device.load(progress)

    @property
    def artifact(self) -> Artifact:
        """The artifact, with the chosen buckets."""
        return self.plan.artifact

    @property
    def notes(self) -> list[str]:
        """What is worth knowing about how it was loaded."""
        return self.plan.notes

    @property
    def text(self) -> TextModel | None:
        """The tokenizer and chat template; None if the artifact has none."""
        if self._text is None and (self.artifact.directory / "tokenizer.json").is_file():
            from rngdc.text import TextModel

            self._text = TextModel(self.artifact.directory)
        return self._text

    def encode(self, prompt: str, chat: bool = False) -> list[int]:
        """Token ids of a text; `chat` puts it into the model's chat template. Raises UserError."""
        from rngdc.text import TextModel

        text = self.text or TextModel(self.artifact.directory)  # which says that there is none
        return text.chat(prompt) if chat else text.encode(prompt)

    def check(self, prompts: Sequence[Sequence[int]], max_new_tokens: int | None = 32) -> None:
        """Raise ArtifactError with everything that a call with these prompts would refuse, without weights or work."""
        problems: list[ArtifactProblem] = []
        if self.artifact.manifest.model.kind == "decoder":
            schedule(
                self.artifact, prompts, max_new_tokens, self.device.stages, self.device.replicas, self.plan.limits
            )  # fmt: skip
        else:
            check_prompts(self.artifact, prompts, self.plan.limits, problems)
        if problems:
            raise ArtifactError(problems)

    def generate(
        self,
        prompts: str | Sequence[str],
        max_new_tokens: int | None = 32,
        *,
        chat: bool = False,
        ignore_eos: bool = False,
        listener: Listener | None = None,
    ) -> Report:
        """Continue one text or several, greedily. The arguments are those of `generate_tokens`."""
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        ids = [self.encode(text, chat) for text in texts]
        return self.generate_tokens(ids, max_new_tokens, ignore_eos=ignore_eos, listener=listener)

    def generate_tokens(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int | None = 32,
        *,
        ignore_eos: bool = False,
        listener: Listener | None = None,
    ) -> Report:
        """Continue prompts of token ids, greedily. `max_new_tokens` None: as many as fit.

        More prompts than there are rows are taken up in turn. `listener(row, token, logits)` is called for every token.
        Raises ArtifactError with everything that fits no bucket or limit, before any work.
        """
        model, device = self.artifact.manifest.model, self.device
        if model.kind != "decoder":
            why = "it is no decoder, which makes one token after the other"
            raise ArtifactError([ArtifactProblem(f"model {model.id}", why, "embed with it")])
        before = dict(device.runs)
        stop = () if ignore_eos else model.eos_ids
        rows = generate(device, prompts, max_new_tokens, stop, listener, self.plan.limits)
        programs = [
            ProgramUse(b.name, runs, device.time(b).seconds * 1e6)
            for b in self.artifact.buckets
            if (runs := device.runs[b.name] - before.get(b.name, 0))
        ]
        texts = None if self.text is None else [self.text.decode(_kept(row)) for row in rows]
        return Report(rows, texts, max((row.end for row in rows), default=0.0), programs, device.machine.mode)

    def embed(self, prompt: str | Sequence[int]) -> Embedding:
        """The vector of a text or of token ids, of an encoder. Raises ArtifactError."""
        ids = self.encode(prompt) if isinstance(prompt, str) else prompt
        return embed(self.device, ids, self.plan.limits)


def place(
    artifact: Artifact, request: LoadRequest, mode: str, strict: bool = False, need_weights: bool = True
) -> tuple[LoadPlan, Device]:
    """The cards for an artifact, still without weights. Raises ArtifactError with every problem of the request."""
    problems: list[ArtifactProblem] = []
    if mode not in ("documented", "silicon"):
        problems.append(ArtifactProblem(f"mode {mode}", "there are two timing modes", "use documented or silicon"))
        timing = "documented"
    else:
        timing = "silicon" if mode == "silicon" else "documented"
    try:
        plan = plan_load(artifact, request, machine_of(artifact, timing), need_weights)
    except ArtifactError as error:
        raise ArtifactError([*problems, *error.problems]) from error
    if problems:
        raise ArtifactError(problems)
    return plan, Device(artifact, timing, strict, plan=plan)


def _kept(row: Generation) -> list[int]:
    """The tokens of a row without the stop token."""
    return row.token_ids[:-1] if row.finish == "eos" else row.token_ids
