"""Instruction descriptors at the level of the published virtual ISA (hardware.md 4.4, source B).

A *unit* is one PE (64 slices) or several fused PEs (128, 256 slices). It owns its DM (slices x 512 KB), TRF, VRF and
three in-order contexts: main, sub and dma. A stream is a list of routines; a routine is a list of instructions; every
instruction belongs to one context and says in `after` which earlier instructions of its routine must be complete.

Addresses
---------
* HBM: byte address = register + base. Registers hold 64 bits (hardware.md 4.3); register 0 is always 0. Addresses are
  virtual: every unit has a window of its own that starts at 0.
* DM inside a Tensor Unit instruction: byte offset inside every slice (SPMD over slices).
* DM inside a DMA: `slice * DM_SLICE_STRIDE + offset` (virtual stride between slices 4 MB, hardware.md 2.2).
* TRF: a lane of an instruction that uses L lanes owns 65536 / L bytes; addresses are byte offsets inside a lane
  (fewer lanes give each lane more rows, hardware.md 2.2). VRF: byte offset in 8 KB.

* Memory of other units (peer spaces): register + base = unit * UNIT_STRIDE + address in that unit's HBM window or DM.
  Units are numbered as a group sees them: 0 .. N-1 the N units of the group, N .. 2N-1 the group of the next pipeline
  stage, 2N .. 3N-1 that of the previous one. A peer address may name the own unit.

All units of a group run the same stream (SPMD). What differs from unit to unit are values of *launch registers*, which
the host sets before the entry: the own unit's number times UNIT_STRIDE, the place of its part inside a buffer, or sums
of such.

Sequencers enumerate *elements*: `loops` is outer to inner, each entry (size, stride in bytes); at most 8 entries after
merging, each size <= 65536 (hardware.md 2.3).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

DM_SLICE_STRIDE = 1 << 22
UNIT_STRIDE = 1 << 40  # between the memories of two units in a peer address
FLIT_BYTES = 32


class Dtype(IntEnum):
    """Element types of streams and memories."""

    BF16 = 1
    F32 = 2
    I32 = 3
    I16 = 4
    I8 = 5
    F8E4M3 = 6
    F8E5M2 = 7

    @property
    def bytes(self) -> int:
        """Bytes of one element."""
        return {Dtype.BF16: 2, Dtype.F32: 4, Dtype.I32: 4, Dtype.I16: 2}.get(self, 1)


class Context(IntEnum):
    """In-order queues of a unit. CONTROL holds routine calls."""

    MAIN = 0
    SUB = 1
    DMA = 2
    CONTROL = 3


class Space(IntEnum):
    """Memories a DMA can address: the own ones, and those of any unit of the program (PEER_*)."""

    HBM = 0
    DM = 1
    PEER_HBM = 2
    PEER_DM = 3

    @property
    def is_peer(self) -> bool:
        """Whether addresses carry a unit number."""
        return self in (Space.PEER_HBM, Space.PEER_DM)


@dataclass(frozen=True)
class After:
    """How many instructions of each context of this routine must be complete before this one starts.

    Counts are from the start of the routine, in program order and never beyond the instruction itself (no waiting for
    the future). `call` counts completed calls made by this routine. `enter` waits for everything issued before the
    routine was called.
    """

    main: int = 0
    sub: int = 0
    dma: int = 0
    call: int = 0
    enter: bool = True


class Lookup(IntEnum):
    """Contents of the fetch adapter's table (hardware.md 2.5), staged before the program starts.

    A key of 1 B holds two 4-bit numbers, the first in the low bits; the paired table of 256 entries gives both as
    f8e4m3, exactly. I4: integers from -8 to 7, 8 added to each. F4E2M1: floats (sign, 2 bits exponent, 1 bit mantissa).
    """

    I4_F8E4M3 = 1
    F4E2M1_F8E4M3 = 2

    @property
    def results(self) -> int:
        """Elements that a key becomes."""
        return 2

    @property
    def dtype(self) -> Dtype:
        """Type of the results."""
        return Dtype.F8E4M3


@dataclass(frozen=True)
class Fetch:
    """Fetch engine and adapter: read elements of a DM tensor in loop order, cut into packets (one packet a time step).

    packet: elements of a time step; packet * dtype.bytes is a multiple of 8. The access size is derived:
    gcd(contiguous run, packet bytes) among 1, 2, 4, 8, 16, 32 (main) or 8 (sub).
    cast: BF16 -> F32, F8 -> F32, I8/I16 -> I32 (fetch adapter), or None.
    second: base and strides of a second tensor with the same sizes, interleaved packet by packet as the innermost time
    digit (pair mode of the vector engine); None otherwise.
    lookup: elements are keys of a table; what it gives is cast. dtype is I8 (keys of 1 B), packets count keys.
    """

    base: int
    loops: tuple[tuple[int, int], ...]
    dtype: Dtype
    packet: int
    cast: Dtype | None = None
    second: tuple[int, tuple[int, ...]] | None = None
    lookup: Lookup | None = None

    @property
    def raw(self) -> Dtype:
        """Element type of the stream before a cast."""
        return self.dtype if self.lookup is None else self.lookup.dtype

    @property
    def results(self) -> int:
        """Stream elements that an element of memory becomes."""
        return 1 if self.lookup is None else self.lookup.results


class SwitchKind(IntEnum):
    """Switch configurations that move data between slices (hardware.md 2.6)."""

    BROADCAST01 = 1
    BROADCAST1 = 2
    TRANSPOSE = 3
    INTER_TRANSPOSE = 4
    TRANSPOSED_BROADCAST1 = 5


@dataclass(frozen=True)
class Switch:
    """Ring of slice1 * slice0 slices. The slice index is (slice2, slice1, slice0), the time index (time1, time0).

    BROADCAST01: every slice of a ring receives all packets; output time is (time1, slice1, time0, slice0).
    BROADCAST1: slices with equal slice0 exchange; output time is (time, slice1).
    TRANSPOSE: the packet stream of slice (s2, a, b) goes to slice (s2, b, a), time unchanged.
    Other kinds are timed but not executed yet.
    """

    kind: SwitchKind
    slice1: int
    slice0: int
    time0: int = 1


class LaneMode(IntEnum):
    """Lane folder (hardware.md 2.8): INTERLEAVED sends a column of all lanes a flit, SEQUENTIAL 8 columns of a lane."""

    INTERLEAVED = 0
    SEQUENTIAL = 1


REDUCE = 1  # the time digit is summed by the time reducer
BROADCAST = 2  # TimeBroadcast: the stream packet is reused over this digit (innermost digits only)


@dataclass(frozen=True)
class Contract:
    """Contraction engine: stream (after the switch) times TRF.

    pack: flits joined into one multiplier packet (1 or 2): P = pack * 32 / element bytes elements.
    loops: time digits outer to inner, (size, trf_stride, flags); digits without BROADCAST enumerate the stream's
    multiplier packets in order, digits with BROADCAST are innermost and reuse the packet.
    trf_read: elements read from TRF a step (power of two, <= P); P / trf_read copies fill the packet (PacketBroadcast).
    depth: packet-reducer depth: P / 2**depth columns remain, column c = sum of elements [c*2**depth, (c+1)*2**depth).
    Output order: kept digits, then INTERLEAVED: (column) flits of `lanes` values padded to 8; SEQUENTIAL: (lane,
    ceil(columns/8)) flits of 8 (or `columns` if fewer) values. Values are f32 (i32 for integers).
    """

    lanes: int
    pack: int
    trf_base: int
    loops: tuple[tuple[int, int, int], ...]
    trf_read: int
    depth: int
    mode: LaneMode


class Alu(IntEnum):
    """Vector-engine ALUs in stage order; each is usable once a pass (hardware.md 2.9)."""

    LOGIC_AND = 1
    LOGIC_OR = 2
    LOGIC_XOR = 3
    LOGIC_LSHIFT = 4
    LOGIC_RSHIFT = 5
    FXP_ADD = 10
    FXP_LSHIFT = 11
    FXP_MUL = 12
    FXP_RSHIFT = 13
    FXP_TO_FP = 20
    FP_FMA = 30
    FP_FPU = 31
    FP_EXP = 32
    FP_MUL0 = 33
    FP_MUL1 = 34
    REDUCE = 40
    FP_DIV = 50
    FP_TO_FXP = 60
    CLIP_ADD = 70
    CLIP_MAX = 71
    CLIP_MIN = 72

    @property
    def stage(self) -> int:
        """Position in the chain; ops of one stage run in the order written, stages never run backwards."""
        return int(self) // 10


class Op(IntEnum):
    """Operations; which ALU may run which op is `OPS_OF_ALU`."""

    AND = 1
    OR = 2
    XOR = 3
    SHL = 4
    LSHR = 5
    ASHR = 6
    ADD = 10
    SUB = 11
    MUL = 12
    FMA = 13
    DIV = 14
    MAX = 15
    MIN = 16
    EXP = 20
    NEG_EXP = 21
    SQRT = 22
    TANH = 23
    SIGMOID = 24
    ERF = 25
    LOG = 26
    SIN = 27
    COS = 28
    CONVERT = 30


OPS_OF_ALU: dict[Alu, frozenset[Op]] = {
    Alu.LOGIC_AND: frozenset({Op.AND}),
    Alu.LOGIC_OR: frozenset({Op.OR}),
    Alu.LOGIC_XOR: frozenset({Op.XOR}),
    Alu.LOGIC_LSHIFT: frozenset({Op.SHL}),
    Alu.LOGIC_RSHIFT: frozenset({Op.LSHR, Op.ASHR}),
    Alu.FXP_ADD: frozenset({Op.ADD, Op.SUB}),
    Alu.FXP_LSHIFT: frozenset({Op.SHL}),
    Alu.FXP_MUL: frozenset({Op.MUL}),
    Alu.FXP_RSHIFT: frozenset({Op.LSHR, Op.ASHR}),
    Alu.FXP_TO_FP: frozenset({Op.CONVERT}),
    Alu.FP_FMA: frozenset({Op.ADD, Op.SUB, Op.MUL, Op.FMA}),
    Alu.FP_FPU: frozenset({Op.SQRT, Op.TANH, Op.SIGMOID, Op.ERF, Op.LOG, Op.SIN, Op.COS, Op.DIV}),
    Alu.FP_EXP: frozenset({Op.EXP, Op.NEG_EXP}),
    Alu.FP_MUL0: frozenset({Op.MUL}),
    Alu.FP_MUL1: frozenset({Op.MUL}),
    Alu.REDUCE: frozenset({Op.ADD, Op.MAX, Op.MIN}),
    Alu.FP_DIV: frozenset({Op.DIV}),
    Alu.FP_TO_FXP: frozenset({Op.CONVERT}),
    Alu.CLIP_ADD: frozenset({Op.ADD}),
    Alu.CLIP_MAX: frozenset({Op.MAX}),
    Alu.CLIP_MIN: frozenset({Op.MIN}),
}


class Mode(IntEnum):
    """Argument order of a binary op. In pair mode a ZIP op takes the two groups and merges them."""

    STREAM_OPERAND = 0
    OPERAND_STREAM = 1
    STREAM_STREAM = 2
    ZIP01 = 3  # op(group 0, group 1)
    ZIP10 = 4  # op(group 1, group 0)
    UNARY = 5


class Source(IntEnum):
    """Where an operand comes from."""

    NONE = 0
    CONST = 1
    VRF = 2
    STASH = 3


@dataclass(frozen=True)
class Operand:
    """Operand of a vector op. CONST: value (f32, or i32 on integer stages). VRF: byte base and loops (size, stride)
    that enumerate the stream's elements in order (sizes multiply to the stream's element count a slice)."""

    source: Source = Source.NONE
    value: float = 0.0
    base: int = 0
    loops: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class VectorOp:
    """One ALU use. group: 0 both groups / merged stream, 1 only group 0, 2 only group 1 (pair mode before the zip).

    FMA is stream * operand + operand2 (operand2 a constant). REDUCE: the stream's elements are viewed as
    (outer, count, inner); count is reduced, inner <= 8 slots survive; each output packet has `inner` elements.
    stash: the result of this op is also written to the stash (single use).
    """

    alu: Alu
    op: Op
    mode: Mode = Mode.STREAM_OPERAND
    operand: Operand = Operand()
    operand2: float = 0.0
    group: int = 0
    count: int = 0
    inner: int = 0
    stash: bool = False


@dataclass(frozen=True)
class Commit:
    """Cast and commit. cast: F32 -> BF16/F8, I32 -> I8/I16, or None. valid: elements kept of every flit; valid * bytes
    is 8, 16, 24 or 32. loops enumerate the kept elements in order; contiguous runs of at least `valid` elements.
    A packet shorter than a flit (also after REDUCE) is padded with zeros, which may be kept: a reduction's single f32
    result is committed with its padding as 8 B (valid 2)."""

    base: int
    loops: tuple[tuple[int, int], ...]
    dtype: Dtype
    valid: int


@dataclass(frozen=True)
class Exec:
    """One Tensor Unit pass over slices [0, slices): fetch -> switch -> collect -> contract -> vector -> cast -> commit.

    stash_input: the stream is stashed on entry of the vector chain (single use).
    """

    slices: int
    fetch: Fetch
    commit: Commit
    switch: Switch | None = None
    contract: Contract | None = None
    vector: tuple[VectorOp, ...] = ()
    stash_input: bool = False


@dataclass(frozen=True)
class LoadTrf:
    """StoTRF: fetch (no cast) into TRF. The stream is lane-major: lane l receives packets [l*T/L, (l+1)*T/L) as
    contiguous bytes from `base` of its lane. fetch.packet * bytes is a multiple of 32."""

    slices: int
    fetch: Fetch
    lanes: int
    base: int


@dataclass(frozen=True)
class LoadVrf:
    """StoVRF: fetch (with optional cast to 32 bit) into contiguous VRF bytes from `base`."""

    slices: int
    fetch: Fetch
    base: int


@dataclass(frozen=True)
class Memset:
    """ITOS: fill `bytes` bytes at DM offset `base` of slices [0, slices) with a 32-bit pattern."""

    slices: int
    base: int
    bytes: int
    value: int = 0


@dataclass(frozen=True)
class Endpoint:
    """One side of a DMA. HBM: register + base. DM: slice * 4 MB + offset in `base` (register must be 0).

    PEER_HBM, PEER_DM: register + base = unit * UNIT_STRIDE + an HBM or DM address of that unit. A stride of such a side
    may be a number of units times UNIT_STRIDE plus a stride inside the memory: the transfer then becomes one descriptor
    a unit (a homogeneous aggregate, hardware.md 3.1)."""

    space: Space
    base: int
    register: int = 0


@dataclass(frozen=True)
class Index:
    """Indirect side of a DMA: 32-bit unsigned byte offsets read from HBM at register + base, one per loop step at
    sum(step * index stride); added to the source (gather) or destination (scatter) address."""

    register: int
    base: int
    strides: tuple[int, ...]
    scatter: bool


@dataclass(frozen=True)
class Dma:
    """Tensor DMA: loops (size, source stride, destination stride), innermost `packet` contiguous bytes (1..4096)."""

    source: Endpoint
    destination: Endpoint
    loops: tuple[tuple[int, int, int], ...]
    packet: int
    index: Index | None = None


@dataclass(frozen=True)
class Notify:
    """Add 1 to `semaphore` of other units, after all earlier transfers of the DMA context are complete (notify on an
    address, hardware.md 4.2).

    Units are (register + base) / UNIT_STRIDE plus every sum of steps of `units`, loops of (size, stride in units); the
    own unit is skipped. ranges: (DM offset, bytes) in every slice that is published: it must have been written before.
    """

    register: int
    base: int
    units: tuple[tuple[int, int], ...]
    semaphore: int
    ranges: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Wait:
    """Block the DMA context until the unit's `semaphore` is at least `count`, then subtract `count`.

    ranges: (DM offset, bytes) in every slice that other units have finished reading once this is complete.
    arrived: (DM offset, bytes) that other units have written into this unit once this is complete.
    """

    semaphore: int
    count: int
    ranges: tuple[tuple[int, int], ...] = ()
    arrived: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Call:
    """Run a routine. moves: (destination register, source register, immediate): reg[d] = reg[s] + imm, evaluated in
    the caller's registers; all other registers keep their values; the caller's registers are restored on return."""

    routine: int
    moves: tuple[tuple[int, int, int], ...]


Descriptor = Exec | LoadTrf | LoadVrf | Memset | Dma | Call | Notify | Wait


@dataclass(frozen=True)
class Instruction:
    """A descriptor in a context, with its dependencies and the index of its source location."""

    context: Context
    after: After
    what: Descriptor
    location: int = 0


@dataclass(frozen=True)
class Routine:
    """A straight-line list of instructions. Routine 0 is the entry."""

    name: str
    instructions: tuple[Instruction, ...]


@dataclass(frozen=True)
class Stream:
    """What one unit executes. locations: strings such as `model.layers.3.mlp.down_proj|tc.contract`."""

    unit: int
    slices: int
    routines: tuple[Routine, ...]
    locations: tuple[str, ...]
