"""Defaults of the command's options. They stand here so that `--help` imports nothing else."""

from __future__ import annotations

TENSOR_PARALLEL = 4
PIPELINE_PARALLEL = 1
