"""From specialised `tc` modules to streams on one HBM map: all buckets share weights and caches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from xdsl.dialects.builtin import IntegerAttr, ModuleOp, StringAttr, i64

from backend_rngd.artifact import Bucket, Cache, Constant, HbmMap, Placement, Port
from backend_rngd.dialect import GlobalOp
from backend_rngd.emit import Emitted, emit
from backend_rngd.hoist import hoist, undo
from backend_rngd.lowering import Lowered, LoweringOptions, lower
from backend_rngd.lowering.context import MESH
from backend_rngd.machine import Machine
from backend_rngd.place import place
from backend_rngd.schedule import schedule
from ir.errors import Problem, UserError
from ir.placement import Mesh
from passes.outline import outline
from rngdc.buckets import BucketSpec

SPILL_SHARES = (1.0, 0.6, 0.4, 0.25, 0.12)
"""What is tried for a program that does not fit DM: shares of the size from which on values lie in HBM."""

Step = Callable[[str, BucketSpec], None]
"""Called before each step with its name."""
Dump = Callable[[str, BucketSpec, ModuleOp], None]
"""Called after each step with the module."""


@dataclass
class Program:
    """A bucket on its way from `tc` to streams."""

    bucket: BucketSpec
    tc: ModuleOp
    lowered: Lowered
    emitted: Emitted | None = None
    record: Bucket | None = None
    notes: list[str] = field(default_factory=list[str])

    @property
    def probes(self) -> list[dict[str, Any]]:
        """Contents of debug/<bucket>.json."""
        assert self.emitted is not None
        return [
            {
                "value": p.value,
                "routine": p.routine,
                "instructions": p.instructions,
                "space": p.space,
                "register": p.register,
                "address": p.address,
                "layout": p.layout,
            }
            for p in self.emitted.probes
        ]


@dataclass
class Programs:
    """All buckets of an artifact with the HBM map they share."""

    programs: list[Program]
    placements: list[Placement]
    constants: list[Constant]
    constant_bytes: bytes
    caches: list[Cache]
    hbm: HbmMap
    peak: dict[str, int] = field(default_factory=dict[str, int])
    mesh: str = ""
    units: int = 1


def compile_programs(
    modules: Mapping[BucketSpec, ModuleOp], machine: Machine, slices: int, step: Step, dump: Dump, probes: bool = True
) -> Programs:
    """Lower, place, schedule and emit every bucket. Raises UserError with all that cannot be built."""
    capacity = max((b.attention_size for b in modules), default=0)
    batch = max((b.batch for b in modules), default=1)
    options = LoweringOptions(slices=slices, cache_capacity=capacity, cache_batch=batch, probes=probes)
    programs: list[Program] = []
    problems: list[Problem] = []
    for bucket, module in modules.items():
        step("lower", bucket)
        outline(module)
        try:
            programs.append(Program(bucket, module, lower(module, machine, options)))
        except UserError as error:
            problems += [Problem(f"{bucket.name}: {p.what}", p.why, p.fix) for p in error.problems]
            continue
        dump("lower", bucket, programs[-1].lowered.module)
    if problems:
        raise UserError(problems)
    shared = _SharedMap(machine.hbm_map_alignment)
    for program in programs:
        shared.collect(program.lowered)
    hbm = shared.assign()
    total = hbm.shared
    peak: dict[str, int] = {}
    for program in programs:
        step("place", program.bucket)
        try:
            top = _place_program(program, machine, options, shared, hbm.shared, dump)
        except UserError as error:
            problems += [Problem(f"{program.bucket.name}: {p.what}", p.why, p.fix) for p in error.problems]
            continue
        module = program.lowered.module
        total = max(total, top["hbm"])
        for space, used in top.items():
            peak[space] = max(peak.get(space, 0), used)
        step("schedule", program.bucket)
        schedule(module)
        dump("schedule", program.bucket, module)
        step("emit", program.bucket)
        program.emitted = emit(module, machine, slices)
        program.record = _record(program)
    if problems:
        raise UserError(problems)
    caches = _caches(programs, batch, capacity)
    return Programs(
        programs, shared.placements(), shared.constants(), bytes(shared.constant_bytes), caches,
        hbm.model_copy(update={"total": total}), peak, *_mesh(modules),
    )  # fmt: skip


def _place_program(
    program: Program, machine: Machine, options: LoweringOptions, shared: _SharedMap, hbm_base: int, dump: Dump
) -> dict[str, int]:
    """Move transfers and place; if DM is too small, lower again with more values in HBM. Raises UserError."""
    first: UserError | None = None
    for share in SPILL_SHARES:
        if first is not None:
            spill = int(options.spill_bytes * share)
            program.lowered = lower(program.tc, machine, replace(options, spill_bytes=spill))
            program.notes = [f"values larger than {spill} B a slice lie in HBM: DM is too small for larger ones"]
        module = program.lowered.module
        shared.set_addresses(program.lowered)
        moves = hoist(module, machine)
        dump("hoist", program.bucket, module)
        try:
            return place(module, machine, hbm_base)
        except UserError as error:
            first = first or error
        undo(moves)  # early transfers keep buffers alive for longer
        try:
            return place(module, machine, hbm_base)
        except UserError:
            continue
    assert first is not None
    raise first


@dataclass(frozen=True)
class UnitBytes:
    """A literal that differs between units: its bytes for each of them."""

    images: tuple[bytes, ...]


class _SharedMap:
    """Weights, constants and caches of all buckets: equal ones once, each kind in one piece."""

    def __init__(self, alignment: int) -> None:
        self.alignment = alignment
        self.weights: dict[tuple[Any, ...], int] = {}
        self.literals: dict[bytes | UnitBytes, int] = {}
        self.caches: dict[str, int] = {}
        self.names: dict[bytes | UnitBytes, str] = {}
        self.address: dict[Any, int] = {}
        self.constant_bytes = bytearray()

    def _globals(self, lowered: Lowered) -> list[tuple[GlobalOp, Any, int]]:
        """(op, key, bytes) of every global that is shared between buckets."""
        out: list[tuple[GlobalOp, Any, int]] = []
        for op in lowered.module.body.block.ops:
            if not isinstance(op, GlobalOp) or op.buffer_type.space.data != "hbm":
                continue
            name, kind, nbytes = op.sym_name.data, op.kind.data, op.buffer_type.nbytes.data
            if kind == "weight":
                p = lowered.placements[name]
                out.append((op, (p.weight, p.permute, p.reshape, p.pad, p.dtype, p.shard), nbytes))
            elif name in lowered.unit_constants:
                rows = tuple(_padded(values, nbytes) for values in lowered.unit_constants[name])
                self.names.setdefault(UnitBytes(rows), name)
                out.append((op, UnitBytes(rows), nbytes))
            elif kind == "constant":
                raw = _padded(lowered.constants[name], nbytes)
                self.names.setdefault(raw, name)
                out.append((op, raw, nbytes))
            elif kind == "cache":
                out.append((op, name, nbytes))
        return out

    def collect(self, lowered: Lowered) -> None:
        """Note what a bucket needs."""
        for _, key, nbytes in self._globals(lowered):
            table: dict[Any, int] = self.caches
            if isinstance(key, (tuple, bytes, UnitBytes)):
                table = self.weights if isinstance(key, tuple) else self.literals
            table[key] = max(table.get(key, 0), nbytes)

    def assign(self) -> HbmMap:
        """Give every image an address; returns the ends of the areas (`total` is that of the shared ones)."""
        at = 0
        ends: list[int] = []
        kinds: tuple[dict[Any, int], ...] = (self.weights, self.literals, self.caches)
        for table in kinds:
            for key, nbytes in table.items():
                self.address[key] = at
                at += -(-nbytes // self.alignment) * self.alignment
            ends.append(at)
        return HbmMap(weights=ends[0], constants=ends[1] - ends[0], caches=ends[2] - ends[1], shared=at, total=at)

    def set_addresses(self, lowered: Lowered) -> None:
        """Write the addresses into a bucket's module."""
        for op, key, _ in self._globals(lowered):
            op.address = IntegerAttr(self.address[key], i64)

    def placements(self) -> list[Placement]:
        """The images of weights; further forms of a weight get a number behind their name."""
        forms: dict[str, int] = {}
        out: list[Placement] = []
        for key, nbytes in self.weights.items():
            weight, permute, reshape, pad, dtype, shard = key
            number = forms[weight] = forms.get(weight, -1) + 1
            name = f"{weight}#{number}" if number else weight
            out.append(
                Placement(
                    name=name,
                    address=self.address[key],
                    bytes=nbytes,
                    weight=weight,
                    permute=permute,
                    reshape=reshape,
                    pad=pad,
                    dtype=dtype,
                    shard=shard,
                )  # fmt: skip
            )
        return out

    def constants(self) -> list[Constant]:
        """The literals; fills `constant_bytes`."""
        self.constant_bytes.clear()
        out: list[Constant] = []
        for raw in self.literals:
            offset = len(self.constant_bytes)
            images = raw.images if isinstance(raw, UnitBytes) else (raw,)
            self.constant_bytes += b"".join(images)
            out.append(
                Constant(
                    name=self.names[raw],
                    address=self.address[raw],
                    offset=offset,
                    bytes=len(images[0]),
                    per_unit=isinstance(raw, UnitBytes),
                )  # fmt: skip
            )
        return out


def _mesh(modules: Mapping[BucketSpec, ModuleOp]) -> tuple[str, int]:
    """The mesh of the units and their number; all buckets have the same."""
    texts = {m.data if isinstance(m := module.attributes.get(MESH), StringAttr) else "" for module in modules.values()}
    if len(texts) > 1:
        raise ValueError(f"buckets with different meshes: {', '.join(sorted(texts))}")
    text = next(iter(texts), "")
    return text, Mesh.parse(text).size


def _padded(values: NDArray[Any], nbytes: int) -> bytes:
    raw = np.ascontiguousarray(values).tobytes()
    return raw + bytes(nbytes - len(raw))


def _record(program: Program) -> Bucket:
    emitted, lowered, bucket = program.emitted, program.lowered, program.bucket
    assert emitted is not None

    def ports(found: list[Any]) -> tuple[Port, ...]:
        out: list[Port] = []
        for p in found:
            at = emitted.globals[p.buffer]
            out.append(
                Port(
                    name=p.name,
                    address=at.address + p.offset,
                    bytes=at.nbytes - p.offset,
                    dtype=p.dtype,
                    shape=p.shape,
                    strides=p.strides,
                )  # fmt: skip
            )
        return tuple(out)

    return Bucket(
        name=bucket.name,
        phase=bucket.phase,
        batch=bucket.batch,
        input_length=bucket.input_length,
        attention_size=bucket.attention_size,
        stream=f"streams/{bucket.name}.npz",
        ir=f"ir/{bucket.name}.mlir",
        debug=f"debug/{bucket.name}.json",
        instructions=sum(len(r.instructions) for r in emitted.streams[0].routines),
        inputs=ports(lowered.inputs),
        outputs=ports(lowered.outputs),
        row_registers=emitted.row_registers,
        launch=emitted.launch,
    )


def _caches(programs: list[Program], batch: int, capacity: int) -> list[Cache]:
    found: dict[str, Cache] = {}
    for program in programs:
        assert program.emitted is not None
        for port in program.lowered.caches:
            at = program.emitted.globals[port.buffer]
            _, heads, _, width = port.shape
            found[port.name] = Cache(
                name=port.name, address=at.address, bytes=at.nbytes, row_bytes=at.row_bytes, batch=batch, heads=heads,
                capacity=capacity, width=width, shard=port.shard,
            )  # fmt: skip
    return list(found.values())
