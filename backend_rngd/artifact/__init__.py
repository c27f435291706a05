"""The artifact: a directory that holds everything a card needs to run a model, except linked weights.

    artifact.json         the manifest (`schema.Manifest`), with a checksum of every other file and of itself
    streams/<bucket>.npz  the instruction streams of a bucket
    ir/model.mlir         the captured model (`tc`, symbolic sizes), before the passes
    ir/<bucket>.mlir      `tc` after the passes, specialised to the bucket
    debug/<bucket>.json   where each value of the bucket's `tc` lies, and when it is complete
    constants.bin         literal bytes that programs read
    weights/              the weights (mode `copy`)
    config.json, tokenizer.json, ...

`artifact.schema.json` beside this file is the JSON Schema of the manifest; docs/artifact.md explains both.

An artifact appears atomically: it is written to a directory beside its place and renamed. Numpy and pydantic only.
"""

from backend_rngd.artifact.errors import ArtifactError, ArtifactProblem
from backend_rngd.artifact.schema import (
    FORMAT,
    VERSION,
    Bucket,
    Cache,
    Compiler,
    Constant,
    HbmMap,
    LinkedFile,
    MachineId,
    Manifest,
    Model,
    Options,
    Parallel,
    Placement,
    Pooling,
    Port,
    Version,
    WeightSource,
)
from backend_rngd.artifact.shards import ShardError, cut, join, local_shape
from backend_rngd.artifact.store import Artifact, ArtifactWriter, open_artifact
from backend_rngd.artifact.weights import placed, read_weight

__all__ = [
    "FORMAT",
    "VERSION",
    "Artifact",
    "ArtifactError",
    "ArtifactProblem",
    "ArtifactWriter",
    "Bucket",
    "Cache",
    "Compiler",
    "Constant",
    "HbmMap",
    "LinkedFile",
    "MachineId",
    "Manifest",
    "Model",
    "Options",
    "Parallel",
    "Placement",
    "Pooling",
    "Port",
    "ShardError",
    "Version",
    "WeightSource",
    "cut",
    "join",
    "local_shape",
    "open_artifact",
    "placed",
    "read_weight",
]
