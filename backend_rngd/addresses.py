"""Where buffers are after placement, and descriptors with absolute addresses."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import BlockArgument, SSAValue

from backend_rngd.dialect import (
    AllocOp,
    DmaOp,
    ExecOp,
    GetGlobalOp,
    GlobalOp,
    InstructionOp,
    LaunchOp,
    LoadTrfOp,
    LoadVrfOp,
    MemsetOp,
    RoutineOp,
    bytes_of,
    space_of,
)
from backend_rngd.isa.descriptors import (
    Commit,
    Descriptor,
    Dma,
    Endpoint,
    Exec,
    Fetch,
    LoadTrf,
    LoadVrf,
    Memset,
    Source,
    VectorOp,
)
from backend_rngd.isa.shape import widest_packet
from backend_rngd.place import global_name
from backend_rngd.sync_ops import SyncOp, descriptor_with_ranges

FIRST_ROW_REGISTER = 1
FIRST_ARGUMENT_REGISTER = 8


@dataclass(frozen=True, slots=True)
class Address:
    """A place: HBM register + offset, or an offset inside a slice (register 0)."""

    register: int
    offset: int


class AddressBook:
    """Addresses of the buffers of a placed module."""

    def __init__(self, module: ModuleOp) -> None:
        """Reads globals; gives a row register to every distinct row size of the caches.

        Raises ValueError if there are more than seven row sizes, or launch registers do not fit together.
        """
        self.launch = _launch_registers(module)
        self.globals = {op.sym_name.data: op for op in module.body.block.ops if isinstance(op, GlobalOp)}
        rows = sorted({op.row_bytes.value.data for op in self.globals.values() if op.row_bytes is not None})
        if FIRST_ROW_REGISTER + len(rows) > FIRST_ARGUMENT_REGISTER:
            raise ValueError(f"{len(rows)} distinct cache row sizes, registers for 7")
        self.row_registers = {size: FIRST_ROW_REGISTER + i for i, size in enumerate(rows)}
        self._known: dict[SSAValue, Address] = {}

    def of_global(self, op: GlobalOp) -> Address:
        """Address of a global."""
        if op.address is None:
            raise ValueError(f"global @{op.sym_name.data} has no address: run place first")
        register = 0 if op.row_bytes is None else self.row_registers[op.row_bytes.value.data]
        return Address(register, op.address.value.data)

    def of(self, value: SSAValue) -> Address:
        """Address of a buffer value; raises ValueError if it is not placed."""
        found = self._known.get(value)
        if found is None:
            found = self._known[value] = self._find(value)
        return found

    def _find(self, value: SSAValue) -> Address:
        if isinstance(value, BlockArgument):
            if not isinstance(value.block.parent_op(), RoutineOp):
                raise ValueError("a buffer argument outside a routine")
            return Address(FIRST_ARGUMENT_REGISTER + value.index, 0)
        owner = value.owner
        if isinstance(owner, AllocOp):
            if owner.address is None:
                raise ValueError(f"buffer {owner.buffer_name.data!r} has no address: run place first")
            return Address(0, owner.address.value.data)
        if isinstance(owner, GetGlobalOp):
            return self.of_global(self.globals[global_name(owner)])
        raise ValueError(f"{value} is not a buffer")

    def absolute(self, op: InstructionOp) -> Descriptor:
        """The descriptor of an instruction with the addresses of its operands added."""
        desc = op.descriptor
        if isinstance(op, ExecOp):
            return self._exec(op, cast(Exec, desc))
        if isinstance(op, DmaOp):
            return self._dma(op, cast(Dma, desc))
        if isinstance(op, LoadTrfOp):
            load = cast(LoadTrf, desc)
            fetch = _fetch(load.fetch, self.of(op.source).offset, None)
            return LoadTrf(load.slices, fetch, load.lanes, load.base + self.of(op.target).offset)
        if isinstance(op, LoadVrfOp):
            vector = cast(LoadVrf, desc)
            fetch = _fetch(vector.fetch, self.of(op.source).offset, None)
            if fetch.packet != (widest := widest_packet(fetch)):
                fetch = replace(fetch, packet=widest)
            return LoadVrf(vector.slices, fetch, vector.base + self.of(op.target).offset)
        if isinstance(op, SyncOp):
            return self._sync(op)
        memset = cast(Memset, desc)
        return replace(memset, base=memset.base + self.of(cast(MemsetOp, op).target).offset)

    def _exec(self, op: ExecOp, desc: Exec) -> Exec:
        second = None if op.second is None else self.of(op.second).offset
        fetch = _fetch(desc.fetch, self.of(op.source).offset, second)
        commit = desc.commit
        commit = Commit(commit.base + self.of(op.target).offset, commit.loops, commit.dtype, commit.valid)
        contract = desc.contract
        if contract is not None and op.trf is not None and (base := self.of(op.trf).offset):
            contract = replace(contract, trf_base=contract.trf_base + base)
        vector = desc.vector
        if op.vrf:
            bases = iter([self.of(v).offset for v in op.vrf])
            vector = tuple(_with_base(v, next(bases)) if v.operand.source == Source.VRF else v for v in vector)
        return Exec(desc.slices, fetch, commit, desc.switch, contract, vector, desc.stash_input)

    def _dma(self, op: DmaOp, desc: Dma) -> Dma:
        index = desc.index
        if index is not None and op.index is not None:
            at = self.of(op.index)
            index = replace(index, register=at.register, base=index.base + at.offset)
        return Dma(
            self._endpoint(desc.source, op.source),
            self._endpoint(desc.destination, op.destination),
            desc.loops,
            desc.packet,
            index,
        )

    def _endpoint(self, endpoint: Endpoint, buffer: SSAValue) -> Endpoint:
        at = self.of(buffer)
        register = at.register if space_of(buffer) == "hbm" else 0
        if endpoint.space.is_peer and endpoint.register:
            if register:
                raise ValueError(
                    f"a peer address with the buffer in register {register} and the unit in register"
                    f" {endpoint.register}: there is one register, make the buffer a global without batch rows"
                )
            register = endpoint.register
        return Endpoint(endpoint.space, endpoint.base + at.offset, register)

    def _sync(self, op: SyncOp) -> Descriptor:
        """DM operands become ranges; HBM needs none."""
        ranges: dict[str, list[tuple[int, int]]] = {role: [] for role in op.ROLES}
        for role, value in op.roles():
            if space_of(value) == "dm":
                ranges[role].append((self.of(value).offset, bytes_of(value)))
        return descriptor_with_ranges(op, ranges)


def _launch_registers(module: ModuleOp) -> dict[int, tuple[int, ...]]:
    """Register -> value by unit."""
    out: dict[int, tuple[int, ...]] = {}
    for op in module.body.block.ops:
        if isinstance(op, LaunchOp):
            if op.number in out:
                raise ValueError(f"launch register {op.number} is given twice")
            out[op.number] = op.value_list
    if len({len(values) for values in out.values()}) > 1:
        raise ValueError("launch registers have values for different numbers of units")
    return out


def _fetch(fetch: Fetch, base: int, second: int | None) -> Fetch:
    pair = fetch.second
    if pair is not None:
        assert second is not None
        pair = (pair[0] + second, pair[1])
    return replace(fetch, base=fetch.base + base, second=pair)


def _with_base(op: VectorOp, base: int) -> VectorOp:
    if not base:
        return op
    return replace(op, operand=replace(op.operand, base=op.operand.base + base))
