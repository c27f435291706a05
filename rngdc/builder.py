"""`ArtifactBuilder`: what `rngdc build` does, from Python, with the names of the specification.

from rngdc import ArtifactBuilder

builder = ArtifactBuilder("meta-llama/Llama-3.1-8B-Instruct", tensor_parallel_size=8,
                          prefill_buckets=[(1, 512)], decode_buckets=[(4, 2048)])
print(builder.dry_run().to_json())
report = builder.build("./artifact", num_compile_workers=2)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ir.errors import Problem
from rngdc import defaults
from rngdc.buckets import BucketRequest
from rngdc.effort import DEFAULT as DEFAULT_LEVEL
from rngdc.options import BuildOptions, ParallelOptions
from rngdc.reference_options import apply_additional
from rngdc.work import WorkOptions

if TYPE_CHECKING:
    from rngdc.build import BuildReport
    from rngdc.dry_run import Plan

Pair = tuple[int, int]
PathLike = str | os.PathLike[str]


class ArtifactBuilder:
    """A model and how it is to be built. Nothing is read before `build` or `dry_run`."""

    def __init__(
        self,
        model_id_or_path: PathLike,
        name: str = "",
        *,
        tensor_parallel_size: int = defaults.TENSOR_PARALLEL,
        pipeline_parallel_size: int = defaults.PIPELINE_PARALLEL,
        prefill_buckets: Sequence[Pair] | None = None,
        decode_buckets: Sequence[Pair] | None = None,
        max_seq_len_to_capture: int | None = None,
        prefill_chunk_size: int | None = None,
        auto_bfloat16_cast: bool = False,
        trust_remote_code: bool = False,
        revision: str | None = None,
        num_hidden_layers: int | None = None,
        seed_for_random_weight: int | None = None,
        tensor_parallel_plan: PathLike | None = None,
        sequence_parallel: bool | None = None,
        opt_level: int = DEFAULT_LEVEL,
        device: str | int | None = None,
        additional_model_config: Mapping[str, object] | None = None,
    ) -> None:
        """`model_id_or_path`: a hub id, or a path that starts with `.`, `/` or `~`. Buckets are (batch, length).

        `max_seq_len_to_capture`: None for 2,048, or the model's positions if there are fewer, or the longest bucket.
        `seed_for_random_weight`: random weights instead of the model's. `device`: cards, as a number or text, that the
        artifact must fit. The other arguments are the options of
        `rngdc build` (docs/cli.md).
        """
        self.problems: list[Problem] = []
        self.request = BucketRequest(
            self._pairs("prefill_buckets", prefill_buckets),
            self._pairs("decode_buckets", decode_buckets),
            max_seq_len_to_capture,
            prefill_chunk_size,
        )
        plan = None if tensor_parallel_plan is None else Path(tensor_parallel_plan)
        self.parallel = ParallelOptions(tensor_parallel_size, pipeline_parallel_size, plan, sequence_parallel)
        self.model = os.fspath(model_id_or_path)
        self.name = name
        self.auto_bfloat16_cast = auto_bfloat16_cast
        self.trust_remote_code = trust_remote_code
        self.revision = revision
        self.num_hidden_layers = num_hidden_layers
        self.seed = seed_for_random_weight
        self.opt_level = opt_level
        self.device = None if device is None else str(device)
        self.settings = [f"{k}={str(v).lower()}" for k, v in (additional_model_config or {}).items()]

    def build(
        self,
        save_dir: PathLike,
        *,
        weights: str = "link",
        overwrite: bool = False,
        num_pipeline_builder_workers: int = 1,
        num_compile_workers: int = 1,
        cache: bool = True,
        cache_dir: PathLike | None = None,
        executor: str = "local",
        ray_address: str | None = None,
        fast_fail: bool = True,
        dump_ir: PathLike | None = None,
        progress: Callable[[str], None] = lambda _: None,
    ) -> BuildReport:
        """Write the artifact to the new directory `save_dir`. `progress` is told the current step.

        Raises UserError with every problem, before any work.
        """
        from rngdc.build import build

        work = WorkOptions(
            num_pipeline_builder_workers, num_compile_workers, executor, ray_address, cache,
            None if cache_dir is None else Path(cache_dir), fast_fail,
        )  # fmt: skip
        problems = list(self.problems)
        options = self._options(Path(save_dir), weights, work, problems)
        options.overwrite = overwrite
        options.dump_ir = None if dump_ir is None else Path(dump_ir)
        return build(options, progress, problems)

    def dry_run(self, save_dir: PathLike | None = None, *, weights: str = "link") -> Plan:
        """Check everything; what a build would make, and bounds of its times. Raises UserError with every problem."""
        from rngdc.dry_run import dry_run

        target = Path(save_dir) if save_dir is not None else Path(f"{Path(self.model).name}-artifact")
        problems = list(self.problems)
        return dry_run(self._options(target, weights, WorkOptions(), problems), lambda _: None, problems)

    def _options(self, save_dir: Path, weights: str, work: WorkOptions, problems: list[Problem]) -> BuildOptions:
        options = BuildOptions(
            model=self.model,
            output=save_dir,
            buckets=self.request,
            parallel=self.parallel,
            weights=weights if self.seed is None else f"random:{self.seed}",
            auto_bfloat16_cast=self.auto_bfloat16_cast,
            trust_remote_code=self.trust_remote_code,
            revision=self.revision,
            num_hidden_layers=self.num_hidden_layers,
            name=self.name,
            opt_level=self.opt_level,
            device=self.device,
            work=work,
        )
        return apply_additional(options, self.settings, problems)

    def _pairs(self, name: str, given: Sequence[Pair] | None) -> list[Pair]:
        """Buckets as they were given; what is no pair of positive integers becomes a problem."""
        pairs: list[Pair] = []
        for pair in given or ():
            numbers = tuple(pair)
            if len(numbers) != 2 or not all(type(n) is int and n > 0 for n in numbers):
                why = "a bucket is two positive integers, (batch, length)"
                self.problems.append(Problem(f"{name}: {pair!r}", why, "write it as (1, 512)"))
                continue
            pairs.append(numbers)
        return pairs
