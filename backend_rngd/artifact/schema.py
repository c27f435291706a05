"""The manifest of an artifact. Addresses and sizes are bytes; shapes and strides count elements and bytes.

`artifact.schema.json` beside this file is the same as a JSON Schema; `json_schema.py` makes it.
"""

from __future__ import annotations

import shlex
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

FORMAT = "rngdc-artifact"


class _Record(BaseModel):
    """Fields of a newer minor version are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)


class Version(_Record):
    """Version of the format."""

    major: int
    """Another one cannot be read."""
    minor: int
    """A larger one only adds fields, which an older reader ignores."""


VERSION = Version(major=1, minor=2)
"""1.1: chunks, launch registers, several units. 1.2: `options`."""


class Compiler(_Record):
    """What built the artifact."""

    name: str = "rngdc"
    """The compiler."""
    version: str
    """Its version."""


class MachineId(_Record):
    """The machine description that the streams were made for."""

    name: str
    """Name of the description."""
    digest: str
    """Hash of every number in it; another description is refused."""


class Pooling(_Record):
    """How an encoder's last hidden state becomes one vector."""

    mode: Literal["mean", "cls", "max"]
    """Over the tokens; `cls`: that of the first one."""
    normalise: bool
    """Whether the vector is scaled to length 1."""


class Model(_Record):
    """The model that was built."""

    id: str
    """Hub id or path, as it was given."""
    architecture: str
    """The model class that its config names."""
    model_type: str
    """`model_type` of its config."""
    kind: Literal["decoder", "encoder", "function"]
    """A decoder generates, an encoder embeds, a function is a single operation."""
    num_layers: int
    """Layers that were built."""
    vocab_size: int | None
    """Token ids are below it."""
    max_positions: int | None
    """The longest sequence of its positions."""
    eos_ids: tuple[int, ...] = ()
    """Token ids that end a text."""
    pooling: Pooling | None = None
    """Of an encoder."""


class Parallel(_Record):
    """How the model is spread. Only the number of stages may change when it is loaded."""

    tensor: int
    """Units that share every layer."""
    pipeline: int
    """The preferred number of stages."""
    units: int
    """Units that execute the streams of a bucket: those of one stage."""
    slices: int
    """Slices of a unit."""
    mesh: str = ""
    """Axes of a layer's units for the shard texts, such as `kv=4,r=2`; empty: one unit."""


class Options(_Record):
    """What the build was asked for: enough to ask for it again. Names are those of the specification."""

    model: str
    """Hub id, or an absolute path."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    prefill_buckets: tuple[tuple[int, int], ...] = ()
    """(batch, length), as asked for."""
    decode_buckets: tuple[tuple[int, int], ...] = ()
    """(batch, length), as asked for."""
    max_seq_len_to_capture: int | None = None
    """The longest sequence, if it was given."""
    prefill_chunk_size: int | None = None
    """Tokens of a chunk, if prompts are read in chunks."""
    tensor_parallel_size: int = 1
    """Units that share every layer."""
    pipeline_parallel_size: int = 1
    """Preferred stages."""
    tensor_parallel_plan: str | None = None
    """Absolute path of the user's placements."""
    sequence_parallel: bool | None = None
    """Whether norms and residuals work on a part of the tokens each; null: where all units get whole slices of them."""
    weights: str = "link"
    """`link`, `copy`, `none` or `random:SEED`."""
    auto_bfloat16_cast: bool = False
    """Whether an fp16 or fp32 checkpoint was cast."""
    trust_remote_code: bool = False
    """Whether code of the model was allowed to run."""
    num_hidden_layers: int | None = None
    """Layers, if not all."""
    name: str = ""
    """The user's name for the artifact."""
    opt_level: int = 2
    """Time that the build spent to make programs faster, 0 to 3."""
    device: str | None = None
    """Cards or devices that the build was checked for, if that was asked."""

    def command(self, out: str) -> str:
        """The command that builds this into the directory `out`."""
        words = ["rngdc", "build", self.model, out]
        for flag, pairs in (("-pb", self.prefill_buckets), ("-db", self.decode_buckets)):
            words += [word for batch, length in pairs for word in (flag, f"{batch},{length}")]
        valued: tuple[tuple[str, object], ...] = (
            ("--max-seq-len-to-capture", self.max_seq_len_to_capture),
            ("--prefill-chunk-size", self.prefill_chunk_size),
            ("-tp", self.tensor_parallel_size),
            ("-pp", self.pipeline_parallel_size if self.pipeline_parallel_size > 1 else None),
            ("--tensor-parallel-plan", self.tensor_parallel_plan),
            ("--weights", self.weights if self.weights != "link" else None),
            ("--num-hidden-layers", self.num_hidden_layers),
            ("--revision", self.revision),
            ("--name", self.name or None),
            ("-O", self.opt_level if self.opt_level != 2 else None),
            ("--device", self.device),
        )
        words += [word for flag, value in valued if value is not None for word in (flag, str(value))]
        switches = (
            ("--sequence-parallel", self.sequence_parallel),
            ("--no-sequence-parallel", self.sequence_parallel is False),
            ("--auto-bfloat16-cast", self.auto_bfloat16_cast),
            ("--trust-remote-code", self.trust_remote_code),
        )
        return shlex.join([*words, *(flag for flag, on in switches if on)])


class WeightSource(_Record):
    """A weight as stored. One of: a byte range of a file, inline bytes, a seed, or nothing (`none`)."""

    name: str
    """Name in the checkpoint."""
    dtype: str
    """Element type: bf16, f16, f32, i8, f8e4m3, ..."""
    shape: tuple[int, ...]
    """Elements of each dimension, row-major."""
    file: str | None = None
    """Relative to the artifact (mode `copy`) or absolute (mode `link`)."""
    offset: int = 0
    """First byte in the file."""
    inline: str | None = None
    """The bytes in base64."""
    seed: int | None = None
    """Of random numbers, which the name determines as well."""


class Placement(_Record):
    """An image of a weight in HBM: cut by `shard`, permute the axes, reshape to (rows, columns), pad both with zeros,
    cast, write."""

    name: str
    """Name of the image."""
    address: int
    """First byte in the HBM window of a unit."""
    bytes: int
    """Size of the image of a unit."""
    weight: str
    """The weight that it is made of."""
    permute: tuple[int, ...]
    """Order of the weight's axes."""
    reshape: tuple[int, int]
    """Rows and columns."""
    pad: tuple[int, int]
    """Multiples that rows and columns are padded to."""
    dtype: str
    """Element type of the image."""
    shard: str = ""
    """How units share the weight, such as `8@kv 4@r 128, 4096`; empty: a copy on every unit."""


class Constant(_Record):
    """Literal bytes of constants.bin that programs read."""

    name: str
    """Name of the constant."""
    address: int
    """First byte in the HBM window of a unit."""
    offset: int
    """First byte in constants.bin."""
    bytes: int
    """Size on a unit."""
    per_unit: bool = False
    """Every unit has its own; those of unit u begin at `offset` + u * `bytes`."""


class LinkedFile(_Record):
    """A file outside of the artifact that it refers to."""

    path: str
    """Absolute path."""
    bytes: int
    """Size."""
    sha256: str
    """Checksum."""


class HbmMap(_Record):
    """HBM of a unit from 0: weights, constants and caches up to `shared`, then one area that all buckets reuse."""

    weights: int
    """Bytes of weights."""
    constants: int
    """Bytes of constants."""
    caches: int
    """Bytes of caches."""
    shared: int
    """Where the area of temporaries begins."""
    total: int
    """Where it ends."""


class Cache(_Record):
    """Keys or values of a layer: dense bf16 [batch, heads, capacity, width]; a program uses a leading part."""

    name: str
    """Name of the cache."""
    address: int
    """First byte in the HBM window of a unit."""
    bytes: int
    """Size on a unit."""
    row_bytes: int
    """Size of a batch row."""
    batch: int
    """Rows."""
    heads: int
    """Heads of a unit; dimension 1 of `shard` says how those of all units are cut."""
    capacity: int
    """Tokens."""
    width: int
    """Elements of a head."""
    shard: str = ""
    """How units share the cache; empty: a copy on every unit."""


class Port(_Record):
    """A program input or output: element (i, j, ...) lies at address + sum(index * stride)."""

    name: str
    """Name of the value."""
    address: int
    """First byte in the HBM window of a unit."""
    bytes: int
    """Size of the area."""
    dtype: str
    """Element type."""
    shape: tuple[int, ...]
    """Elements of each dimension."""
    strides: tuple[int, ...]
    """Bytes from element to element of each dimension."""


class Bucket(_Record):
    """One program: static sizes, a stream, and the IR it was made of."""

    name: str
    """Unique name."""
    phase: Literal["prefill", "chunk", "decode", "encode", "function"]
    """A `chunk` reads tokens of a prompt behind those that are in the caches."""
    batch: int
    """Rows."""
    input_length: int
    """Tokens of a row that are read."""
    attention_size: int
    """Tokens of a row that are seen: those in the caches and those that are read."""
    stream: str
    """File of the instruction stream."""
    ir: str
    """File of the `tc` module after the passes."""
    debug: str
    """File that says where every value lies and when it is complete."""
    instructions: int
    """Instructions of the stream, those of each function once."""
    inputs: tuple[Port, ...]
    """What the host writes before a run."""
    outputs: tuple[Port, ...]
    """What it reads after a run. A program without `logits` among them only fills the caches."""
    row_registers: dict[int, int]
    """Bytes of a cache row -> register that selects the first batch row."""
    launch: dict[int, tuple[int, ...]] = Field(default_factory=dict[int, tuple[int, ...]])
    """Register -> its value on every unit of a layer, set before the program starts."""


class Manifest(_Record):
    """artifact.json: everything about an artifact, with checksums."""

    format: str = FORMAT
    """Always `rngdc-artifact`."""
    version: Version = VERSION
    """Which fields there are."""
    name: str = ""
    """The user's name for the artifact."""
    compiler: Compiler
    """What built it."""
    machine: MachineId
    """What it was built for."""
    options: Options | None = None
    """What the build was asked for; null for a single operation."""
    model: Model
    """What was built."""
    parallel: Parallel
    """How it is spread."""
    weights_mode: str
    """`link`, `copy`, `none` or `random:SEED`."""
    weights: tuple[WeightSource, ...]
    """Where the bytes of every weight are."""
    placements: tuple[Placement, ...]
    """What becomes of them in HBM."""
    constants: tuple[Constant, ...]
    """Literal bytes in HBM."""
    linked: tuple[LinkedFile, ...]
    """Files outside of the artifact."""
    hbm: HbmMap
    """Sizes of the areas of HBM."""
    caches: tuple[Cache, ...]
    """Where keys and values lie."""
    buckets: tuple[Bucket, ...]
    """The programs."""
    files: dict[str, str] = Field(default_factory=dict)
    """Every other file of the directory -> its SHA-256."""
    digest: str = ""
    """SHA-256 of this object without `digest`, as JSON with sorted keys and without spaces."""
