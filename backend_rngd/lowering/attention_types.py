"""What the parts of the attention lowering hand to each other."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

from xdsl.ir import SSAValue

from backend_rngd.lowering.emitter import Emitter
from backend_rngd.lowering.tensor import round_up


@dataclass(frozen=True)
class Cache:
    """K or V in HBM: `[batch][kv head][capacity][width]` bf16; `keys` of the capacity are looked at."""

    buffer: SSAValue
    batch_stride: int
    head_stride: int
    keys: int
    width: int

    @property
    def padded(self) -> int:
        """Values of a row in DM: whole flits (16 bf16), the rest zero."""
        return round_up(self.width, 16)


@dataclass(frozen=True)
class AttentionParams:
    """Attributes of the op. limit: last visible key of a row is its position (causal) or its length - 1."""

    scale: float
    causal: bool
    window: int
    softcap: float
    group: int
    kv_heads: int


@dataclass(frozen=True)
class Rows:
    """Rows of one step in a slice: `tokens` local tokens x `group` heads, q and limits given by strides.

    shared: all tokens have the limit of the first one.
    """

    tokens: int
    q: SSAValue
    q_base: int
    q_token: int
    q_head: int
    limit: SSAValue
    limit_base: int
    limit_token: int
    shared: bool = False

    @property
    def limits(self) -> int:
        """Tokens with a limit of their own."""
        return 1 if self.shared else self.tokens


@dataclass(frozen=True)
class Values:
    """Values of consecutive keys in DM, `[key][padded value]`. ring: the slices of a ring hold a part of them each;
    key i * ring + s is the i-th of slice s."""

    buffer: SSAValue
    base: int = 0
    ring: int = 1


class KeySource(Protocol):
    """Brings keys and values of one KV head into DM."""

    def keys(self, start: int, count: int) -> tuple[SSAValue, int]:
        """Buffer and byte of `[key][padded value]`, whole in every slice; at most `sub_tile` keys, never across a
        multiple of it."""
        ...

    def values(self, start: int, count: int) -> Values:
        """Values of the keys of a tile or, if they are no ring, of `value_chunk` of them."""
        ...

    @property
    def value_chunk(self) -> int:
        """Keys whose values `values` brings at once."""
        ...


@dataclass(frozen=True)
class State:
    """What the keys so far give: weighted sums `[row][padded value]` that are not divided yet, and `[2][row]`: the
    largest scores and the sums of the weights. f32, the statistics 8 B apart."""

    sums: SSAValue
    stats: SSAValue
    rows: int


class Host(Protocol):
    """What attention needs of the program around it."""

    def iota(self, em: Emitter, count: int, parts: int = 1, step: int = 0) -> SSAValue:
        """DM buffer with the positions of `count` keys as f32; the slices of part i hold those from i * step on."""
        ...

    def subroutine(self, key: Hashable, like: Sequence[SSAValue], location: str) -> tuple[str, Emitter, bool]:
        """The routine of that key, which takes HBM buffers like these: name, writer, and whether it is still empty."""
        ...
