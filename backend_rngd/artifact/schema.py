"""The manifest of an artifact. Addresses and sizes are bytes; shapes and strides count elements and bytes."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

FORMAT = "rngdc-artifact"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Version(_Record):
    """Version of the format. Another `major` cannot be read; a `minor` only adds fields."""

    major: int
    minor: int


VERSION = Version(major=1, minor=1)


class Compiler(_Record):
    """What built the artifact."""

    name: str = "rngdc"
    version: str


class MachineId(_Record):
    """The machine description the streams were made for: its name and the hash of every number in it."""

    name: str
    digest: str


class Pooling(_Record):
    """How an encoder's last hidden state becomes one vector: `mean` over the tokens, or the first (`cls`)."""

    mode: Literal["mean", "cls", "max"]
    normalise: bool


class Model(_Record):
    """The model that was built. `kind` decides how it runs: a decoder generates, an encoder embeds."""

    id: str
    architecture: str
    model_type: str
    kind: Literal["decoder", "encoder", "function"]
    num_layers: int
    vocab_size: int | None
    max_positions: int | None
    eos_ids: tuple[int, ...] = ()
    pooling: Pooling | None = None


class Parallel(_Record):
    """How many units work on a layer (`tensor`, fixed), the preferred number of stages (`pipeline`), and the slices of
    a unit. `units` execute the streams of a bucket (those of one stage); `mesh` names the axes of a layer's units, such
    as `kv=4,r=2`, for the shard texts (empty: one unit)."""

    tensor: int
    pipeline: int
    units: int
    slices: int
    mesh: str = ""


class WeightSource(_Record):
    """A weight as stored. One of: a byte range of a file, inline bytes (base64), a seed, or nothing (`none`).

    `file` is relative to the artifact (mode `copy`) or absolute (mode `link`).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str | None = None
    offset: int = 0
    inline: str | None = None
    seed: int | None = None


class Placement(_Record):
    """An image of a weight in HBM: cut by `shard` (see shards.py), permute the axes, reshape to (rows, columns), pad
    both with zeros, cast, write."""

    name: str
    address: int
    bytes: int
    weight: str
    permute: tuple[int, ...]
    reshape: tuple[int, int]
    pad: tuple[int, int]
    dtype: str
    shard: str = ""


class Constant(_Record):
    """Literal bytes at `offset` of constants.bin that lie in HBM at `address`.

    `per_unit`: every unit has its own; those of unit u lie at `offset` + u * `bytes`.
    """

    name: str
    address: int
    offset: int
    bytes: int
    per_unit: bool = False


class LinkedFile(_Record):
    """A file outside of the artifact that it refers to."""

    path: str
    bytes: int
    sha256: str


class HbmMap(_Record):
    """HBM from 0: weights, constants and caches up to `shared`, then one area that all buckets reuse up to `total`."""

    weights: int
    constants: int
    caches: int
    shared: int
    total: int


class Cache(_Record):
    """Keys or values of a layer: dense bf16 [batch, heads, capacity, width]; a program uses a leading part.

    `heads` are those of a unit; dimension 1 of `shard` says how those of all units are cut.
    """

    name: str
    address: int
    bytes: int
    row_bytes: int
    batch: int
    heads: int
    capacity: int
    width: int
    shard: str = ""


class Port(_Record):
    """A program input or output: element (i, j, ...) lies at address + sum(index * stride); the area has `bytes`."""

    name: str
    address: int
    bytes: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Bucket(_Record):
    """One program. `row_registers`: bytes of a cache row -> register that selects the first batch row.

    A `chunk` reads `input_length` tokens of a prompt behind those that are in the caches. A program without `logits`
    among its outputs only fills the caches.
    `launch`: register -> its value on every unit of a layer, set before the program starts.
    """

    name: str
    phase: Literal["prefill", "chunk", "decode", "encode", "function"]
    batch: int
    input_length: int
    attention_size: int
    stream: str
    ir: str
    debug: str
    instructions: int
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    row_registers: dict[int, int]
    launch: dict[int, tuple[int, ...]] = Field(default_factory=dict[int, tuple[int, ...]])


class Manifest(_Record):
    """artifact.json. `files` maps each other file of the directory to its SHA-256; `digest` covers the manifest.

    `name` is the user's for the artifact, empty if none was given.
    """

    format: str = FORMAT
    version: Version = VERSION
    name: str = ""
    compiler: Compiler
    machine: MachineId
    model: Model
    parallel: Parallel
    weights_mode: str
    weights: tuple[WeightSource, ...]
    placements: tuple[Placement, ...]
    constants: tuple[Constant, ...]
    linked: tuple[LinkedFile, ...]
    hbm: HbmMap
    caches: tuple[Cache, ...]
    buckets: tuple[Bucket, ...]
    files: dict[str, str] = Field(default_factory=dict)
    digest: str = ""
