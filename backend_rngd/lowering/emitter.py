"""Writes `rngd` operations in program order: canonical loops, buffers, register-file space, common transfers."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import Block, Operation, SSAValue

from backend_rngd.dialect import (
    EARLY,
    AllocOp,
    DmaOp,
    ExecOp,
    GetGlobalOp,
    GlobalOp,
    LoadTrfOp,
    LoadVrfOp,
    MemsetOp,
    ProbeOp,
)
from backend_rngd.isa.descriptors import (
    Commit,
    Contract,
    Dma,
    Dtype,
    Endpoint,
    Exec,
    Fetch,
    Index,
    LoadTrf,
    LoadVrf,
    Lookup,
    Memset,
    Space,
    Switch,
    VectorOp,
)
from backend_rngd.lowering.order import MAX_LOOP, best_order, canonical
from backend_rngd.machine import Machine

Loops = tuple[tuple[int, int], ...]


class Place(NamedTuple):
    """A byte of a buffer; in DM, `slice * DM_SLICE_STRIDE + offset`. register: launch register of a peer address."""

    buffer: SSAValue
    space: Space
    base: int
    register: int = 0


def hbm(buffer: SSAValue, base: int = 0) -> Place:
    """A byte of an HBM buffer."""
    return Place(buffer, Space.HBM, base)


def dm(buffer: SSAValue, base: int = 0) -> Place:
    """A byte of a DM buffer."""
    return Place(buffer, Space.DM, base)


class Offsets(NamedTuple):
    """Byte offsets in HBM that a transfer adds to its source (gather) or destination (scatter), one step a loop."""

    buffer: SSAValue
    base: int
    strides: Sequence[int]
    scatter: bool = False


@dataclass
class Emitter:
    """Appends operations to the block of one routine."""

    module: ModuleOp
    block: Block
    machine: Machine
    slices: int
    location: str = ""
    probes: bool = True
    early_bytes: int = 0  # of DM a slice that weights loaded before the routine starts may take
    clears_early: bool = True  # nothing that must be cleared for a contraction stands at the routine's start yet
    _early: list[tuple[int, SSAValue]] = field(default_factory=list[tuple[int, SSAValue]])  # buffers of that kind
    _start: Operation | None = None  # the first instruction that is not moved to the start
    _globals: dict[str, SSAValue] = field(default_factory=dict[str, SSAValue])
    _declared: dict[str, GlobalOp] = field(default_factory=dict[str, GlobalOp])
    _seen: Operation | None = None
    _vrf_next: int = 0
    _trf: SSAValue | None = None
    _vrf: SSAValue | None = None

    def add(self, op: Operation) -> None:
        """Append one operation."""
        self.block.add_op(op)

    # Buffers ------------------------------------------------------------
    def alloc(self, nbytes: int, name: str = "", space: str = "dm") -> SSAValue:
        """A local buffer: DM bytes a slice, HBM bytes in all. Live from first to last use."""
        op = AllocOp(space, nbytes, name)
        self.add(op)
        return op.results[0]

    def global_buffer(self, name: str, space: str, nbytes: int, kind: str, row_bytes: int = 0) -> SSAValue:
        """A buffer that lives as long as the program; the same name gives the same buffer."""
        if name not in self._globals:
            declared = self._declaration(name)
            if declared is None:
                declared = GlobalOp(name, space, nbytes, kind, row_bytes)
                first = self.module.body.block.first_op
                if first is None:
                    self.module.body.block.add_op(declared)
                else:
                    self.module.body.block.insert_op_before(declared, first)
            get = GetGlobalOp(name, declared.buffer_type)
            first_op = self.block.first_op
            if first_op is None:
                self.block.add_op(get)
            else:
                self.block.insert_op_before(get, first_op)
            self._globals[name] = get.results[0]
        return self._globals[name]

    def _declaration(self, name: str) -> GlobalOp | None:
        """The global of the module. New ones stand first, so only those before the first of the last time are new."""
        first = op = self.module.body.block.first_op
        while op is not None and op is not self._seen:
            if isinstance(op, GlobalOp):
                self._declared[op.sym_name.data] = op
            op = op.next_op
        self._seen = first
        return self._declared.get(name)

    def known_globals(self) -> dict[str, SSAValue]:
        """Globals this routine has asked for."""
        return self._globals

    def declared_bytes(self, name: str) -> int:
        """Size of a global of the module, 0 if there is none of that name."""
        declared = self._declaration(name)
        return declared.buffer_type.nbytes.data if declared is not None else 0

    @property
    def trf(self) -> SSAValue:
        """The whole TRF; halves are addressed by the descriptors."""
        if self._trf is None:
            self._trf = self.global_buffer("trf", "trf", self.machine.trf_bytes_per_slice, "scratch")
        return self._trf

    @property
    def vrf(self) -> SSAValue:
        """The whole VRF."""
        if self._vrf is None:
            self._vrf = self.global_buffer("vrf", "vrf", self.machine.vrf_bytes, "scratch")
        return self._vrf

    def vrf_space(self, nbytes: int) -> int:
        """Byte offset of `nbytes` of VRF, taken round robin so that the next pass's operands load during this one."""
        limit = self.machine.vrf_bytes - self.machine.vrf_stash_bytes
        if self._vrf_next + nbytes > limit:
            self._vrf_next = 0
        base = self._vrf_next
        self._vrf_next += nbytes
        return base

    def take_early(self, sizes: Sequence[int], last: bool = True) -> list[SSAValue]:
        """Buffers of so many bytes for what the routine reads first, which may be loaded while the routine before it is
        at work; none if they are too large together. last: there will be no more of them."""
        room = self.early_bytes
        self.early_bytes = 0 if last else max(0, room - sum(sizes))
        if sum(sizes) > room:
            return []
        first = len(self._early)
        taken = [self.global_buffer(f"early{first + i}.{n}", "dm", n, EARLY) for i, n in enumerate(sizes)]
        self._early += zip(sizes, taken, strict=True)
        return taken

    def read_early(self, nbytes: int) -> list[SSAValue]:
        """Buffers of `take_early` of at least so many bytes: free for others when what came early has been read."""
        return [buffer for size, buffer in self._early if size >= nbytes]

    @contextmanager
    def at(self, location: str) -> Generator[None]:
        """What is emitted inside belongs to the operation at `location`."""
        before, self.location = self.location, location
        yield
        self.location = before

    @contextmanager
    def at_start(self) -> Generator[None]:
        """Transfers and memsets emitted inside, with their buffers, stand before all other instructions of the routine,
        in order of emission."""
        last = self.block.last_op
        yield
        added = last.next_op if last is not None else self.block.first_op
        while added is not None:
            following = added.next_op
            if isinstance(added, (AllocOp, DmaOp, MemsetOp)):
                place = self._start
                if place is None:
                    place = next(op for op in self.block.ops if not isinstance(op, (GetGlobalOp, AllocOp)))
                    self._start = place
                if place is not added:
                    added.detach()
                    self.block.insert_op_before(added, place)
                else:
                    self._start = following
            added = following

    # Instructions ------------------------------------------------------------
    def fetch(
        self,
        base: int,
        loops: Iterable[tuple[int, int]],
        dtype: Dtype,
        packet: int,
        cast: Dtype | None = None,
        second: tuple[int, Sequence[int]] | None = None,
        lookup: Lookup | None = None,
    ) -> Fetch:
        """Fetch with canonical loops; `second` gives base and one stride per loop."""
        entries = list(loops)
        if second is None:
            merged = tuple((n, s) for n, s in canonical(entries)) or ((1, dtype.bytes),)
            return Fetch(base, merged, dtype, packet, cast, None, lookup)
        merged = canonical([(n, s, t) for (n, s), t in zip(entries, second[1], strict=True)])
        return Fetch(
            base, tuple((n, s) for n, s, _ in merged), dtype, packet, cast, (second[0], tuple(t for _, _, t in merged))
        )

    def execute(
        self,
        fetch: Fetch,
        source: SSAValue,
        commit: Commit,
        target: SSAValue,
        *,
        slices: int | None = None,
        second: SSAValue | None = None,
        switch: Switch | None = None,
        contract: Contract | None = None,
        vector: Sequence[VectorOp] = (),
        stash_input: bool = False,
        context: str = "main",
    ) -> None:
        """One Tensor Unit pass; the sub context has neither contraction nor cast and reads and writes 8 B a cycle."""
        commit = Commit(commit.base, _pairs(canonical(commit.loops)), commit.dtype, commit.valid)
        if contract is not None:
            contract = Contract(
                contract.lanes,
                contract.pack,
                contract.trf_base,
                _merge_digits(contract.loops),
                contract.trf_read,
                contract.depth,
                contract.mode,
            )
        desc = Exec(slices or self.slices, fetch, commit, switch, contract, tuple(vector), stash_input)
        uses_vrf = [self.vrf for op in vector if op.operand.source == 2]
        self.add(
            ExecOp(
                desc,
                source,
                target,
                second=second,
                trf=self.trf if contract is not None else None,
                vrf=tuple(uses_vrf),
                context=context,
                location=self.location,
            )
        )

    def load_trf(
        self, fetch: Fetch, source: SSAValue, lanes: int, base: int, slices: int | None = None, context: str = "sub"
    ) -> None:
        """Load TRF: in the sub context behind the main context's work (8 B a cycle a slice), or in the main context
        (32 B a cycle) when the next pass waits for it anyway."""
        self.add(
            LoadTrfOp(
                LoadTrf(slices or self.slices, fetch, lanes, base),
                source,
                self.trf,
                context=context,
                location=self.location,
            )
        )

    def load_vrf(self, fetch: Fetch, source: SSAValue, base: int, slices: int | None = None) -> None:
        """Load VRF in the sub context."""
        self.add(
            LoadVrfOp(
                LoadVrf(slices or self.slices, fetch, base), source, self.vrf, context="sub", location=self.location
            )
        )

    def memset(self, target: SSAValue, base: int, nbytes: int, value: int = 0) -> None:
        """Fill `nbytes` bytes of a DM buffer in every slice with a 32-bit pattern."""
        self.add(MemsetOp(Memset(self.slices, base, nbytes, value), target, context="sub", location=self.location))

    def dma(
        self,
        source: Place,
        target: Place,
        loops: Iterable[tuple[int, int, int]],
        packet: int,
        index: Offsets | None = None,
    ) -> None:
        """One transfer: `loops` are (size, source stride, destination stride), `packet` contiguous bytes innermost.

        The packet grows over contiguous inner loops up to 4,096 bytes and is cut to it.
        """
        nest = list(loops)
        steps = index.strides if index is not None else [0] * len(nest)
        given = [(*loop, step) for loop, step in zip(nest, steps, strict=True)]
        entries, packet = _fit_packet(given, packet, self.machine)
        merged, packet = best_order(canonical(entries), packet, source[1:], target[1:], self.machine)
        desc = Dma(
            Endpoint(source.space, source.base, source.register),
            Endpoint(target.space, target.base, target.register),
            tuple((n, a, b) for n, a, b, _ in merged),
            packet,
            Index(0, index.base, tuple(i for _, _, _, i in merged), index.scatter) if index else None,
        )
        where = index.buffer if index is not None else None
        self.add(DmaOp(desc, source.buffer, target.buffer, index=where, context="dma", location=self.location))

    def probe(self, buffer: SSAValue, value: str, layout: str) -> None:
        """Say that a `tc` value is complete in `buffer`."""
        if self.probes:
            self.add(ProbeOp(buffer, value, layout))


def operand_loops(loops: Iterable[tuple[int, int]]) -> Loops:
    """Canonical loops of a VRF operand."""
    return tuple((entry[0], entry[1]) for entry in canonical(loops)) or ((2, 0),)


def _pairs(loops: Iterable[tuple[int, ...]]) -> Loops:
    out = tuple((entry[0], entry[1]) for entry in loops)
    return out or ((1, 8),)


def _merge_digits(loops: Iterable[tuple[int, int, int]]) -> tuple[tuple[int, int, int], ...]:
    """Canonical contraction digits: drop size 1, merge neighbours with equal flags and a continuing TRF stride."""
    out: list[tuple[int, int, int]] = []
    for size, stride, flags in loops:
        if size == 1:
            continue
        if out and out[-1][2] == flags and out[-1][1] == size * stride and out[-1][0] * size <= MAX_LOOP:
            out[-1] = (out[-1][0] * size, stride, flags)
        else:
            out.append((size, stride, flags))
    return tuple(out)


def _fit_packet(
    entries: list[tuple[int, int, int, int]], packet: int, machine: Machine
) -> tuple[list[tuple[int, int, int, int]], int]:
    """Choose the innermost contiguous run: at most 4,096 B, at most 65,536 of anything."""
    limit, line = machine.dma_packet_max_bytes, machine.hbm_line_bytes
    while entries and entries[-1][1:] == (packet, packet, 0) and entries[-1][0] * packet <= limit:
        packet *= entries[-1][0]
        entries = entries[:-1]
    if packet > limit:
        # Whole lines where they divide it: a request that ends inside a line of HBM writes part of it.
        whole = [n for n in range(line, limit + 1, line) if packet % n == 0]
        size = max(whole) if whole else max(n for n in range(8, limit + 1, 8) if packet % n == 0)
        entries = [*entries, (packet // size, size, size, 0)]
        packet = size
    out: list[tuple[int, int, int, int]] = []
    for n, a, b, i in entries:
        if n > machine.max_loop_size:
            outer = n
            inner = 1
            while outer > machine.max_loop_size:
                factor = next(f for f in (2, 3, 5, 7, 11, 13, n) if outer % f == 0)
                outer //= factor
                inner *= factor
            out += [(outer, a * inner, b * inner, i * inner), (inner, a, b, i)]
        else:
            out.append((n, a, b, i))
    return out, packet
