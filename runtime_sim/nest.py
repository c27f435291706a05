"""The fetch engine and the switch: a stream of elements as one loop nest over DM.

A stream is [A, B, C, elements]: the slices of the unit as (A, B, C) = (slice2, slice1, slice0) of the switch (without a
switch (slices, 1, 1)), with size 1 where all slices of the axis see the same elements. Switch kinds that move data
between slices only permute and re-stride loops, because the distance between slices is a stride like any other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backend_rngd.isa.descriptors import FLIT_BYTES, Dtype, Fetch, Lookup, Switch, SwitchKind
from runtime_sim.errors import SimulationError
from runtime_sim.memory import RowMemory
from runtime_sim.numeric import SCRATCH, STORAGE, lookup_table, widen, widened
from runtime_sim.views import Loops, count, merged, nd, sizes_of, split, strides_of

Lead = tuple[int, int, int]
ALL = slice(None)


@dataclass(frozen=True)
class Nest:
    """Elements of `dtype` at `base` + slice + loop offsets of a byte array."""

    memory: NDArray[np.uint8]
    dtype: Dtype
    base: int
    lead: Lead
    lead_strides: Lead
    loops: Loops

    @property
    def elements(self) -> int:
        """Elements a slice."""
        return count(self.loops)

    def view(self, loops: Loops | None = None) -> NDArray[Any]:
        """Strided view [A, B, C, *loops] of the stored elements."""
        loops = self.loops if loops is None else loops
        return nd(
            self.memory,
            STORAGE[self.dtype],
            self.base,
            (*self.lead, *sizes_of(loops)),
            (*self.lead_strides, *strides_of(loops)),
        )

    def load(self, cast: Dtype | None, slot: str = "fetch 0", rows: slice = ALL) -> NDArray[Any]:
        """Copy [A, B, C, elements], widened to 32 bit if `cast`, into a scratch buffer that the caller may change.

        rows: part of the first slice axis.
        """
        view = self.view()[rows]
        out = SCRATCH.take(slot, view.shape, STORAGE[cast or self.dtype])
        if cast is None or cast is self.dtype:
            out[...] = view
        else:
            widen(view, self.dtype, out)
        return out.reshape(*view.shape[:3], -1)

    def linear(self) -> tuple[Nest, Callable[[], None]]:
        """The same elements in a scratch array, and the function that copies them there.

        For the rare nests whose loops a later stage would have to cut in the middle.
        """
        view = self.view()
        scratch = np.zeros(view.shape, view.dtype)

        def fill() -> None:
            scratch[...] = view

        memory = scratch.reshape(-1).view(np.uint8)
        strides = scratch.strides[:3]
        return replace(
            self,
            memory=memory,
            base=0,
            lead_strides=(strides[0], strides[1], strides[2]),
            loops=((self.elements, self.dtype.bytes),),
        ), fill


@dataclass(frozen=True)
class Source:
    """What the fetch engine and the switch deliver: one nest, or two in pair mode (packets alternate)."""

    nests: tuple[Nest, ...]
    slices: Lead
    packet: int
    packets: int  # of one nest
    dtype: Dtype  # after the fetch adapter
    cast: Dtype | None
    fill: Callable[[], None] | None = None  # to be called before the nests are read

    @property
    def pair(self) -> bool:
        """Whether two tensors are interleaved."""
        return len(self.nests) == 2


def illegal(what: str, fix: str = "") -> SimulationError:
    """An instruction whose fields contradict each other or the hardware."""
    return SimulationError(SimulationError.ILLEGAL, what, fix)


def source_of(fetch: Fetch, switch: Switch | None, slices: int, dm: RowMemory) -> Source:
    """Nests of a fetch followed by an optional switch."""
    elements = count(fetch.loops)
    width = fetch.dtype.bytes
    if fetch.packet <= 0 or elements % fetch.packet:
        raise illegal(f"fetch of {elements} elements does not divide into packets of {fetch.packet}")
    if fetch.packet * width % 8:
        raise illegal(f"fetch packet of {fetch.packet * width} bytes is not a multiple of 8")
    if fetch.cast is not None and fetch.cast is not widened(fetch.raw):
        raise illegal(f"the fetch adapter does not cast {fetch.raw.name} to {fetch.cast.name}")
    if slices > dm.rows or slices < 1:
        raise illegal(f"{slices} slices on a unit of {dm.rows}")
    dtype = fetch.cast or fetch.dtype
    packets = elements // fetch.packet
    tensors = [(fetch.base, tuple(fetch.loops))]
    if fetch.second is not None:
        base, strides = fetch.second
        if len(strides) != len(fetch.loops):
            raise illegal(f"second tensor has {len(strides)} strides for {len(fetch.loops)} loops")
        tensors.append((base, tuple(zip(sizes_of(fetch.loops), strides, strict=True))))
    pitch = dm.pitch
    if fetch.lookup is not None:
        return _looked_up(fetch, fetch.lookup, switch, slices, dm, packets)
    if switch is None:
        nests = tuple(Nest(dm.bytes, fetch.dtype, b, (slices, 1, 1), (pitch, 0, 0), merged(lp)) for b, lp in tensors)
        return Source(nests, (slices, 1, 1), fetch.packet, packets, dtype, fetch.cast)
    return _switched(fetch, switch, slices, dm, tensors, packets, dtype)


def _looked_up(fetch: Fetch, lookup: Lookup, switch: Switch | None, slices: int, dm: RowMemory, packets: int) -> Source:
    """Keys replaced by the table's results, in a scratch array."""
    if switch is not None or fetch.second is not None or fetch.dtype is not Dtype.I8:
        raise illegal("a table lookup of a switched, interleaved or wide stream", "look up 1 B keys of one tensor")
    keys = Nest(dm.bytes, fetch.dtype, fetch.base, (slices, 1, 1), (dm.pitch, 0, 0), merged(fetch.loops))
    view, table = keys.view().view(np.uint8), lookup_table(lookup)
    scratch = np.zeros((*view.shape, lookup.results), table.dtype)

    def fill() -> None:
        np.take(table, view, axis=0, out=scratch, mode="clip")

    a, b, c = scratch.strides[:3]
    loops = ((keys.elements * lookup.results, lookup.dtype.bytes),)
    nest = Nest(scratch.reshape(-1), lookup.dtype, 0, (slices, 1, 1), (a, b, c), loops)
    packet = fetch.packet * lookup.results
    return Source((nest,), (slices, 1, 1), packet, packets, fetch.cast or lookup.dtype, fetch.cast, fill)


def _switched(
    fetch: Fetch,
    switch: Switch,
    slices: int,
    dm: RowMemory,
    tensors: list[tuple[int, Loops]],
    packets: int,
    dtype: Dtype,
) -> Source:
    s1, s0 = switch.slice1, switch.slice0
    if s1 < 1 or s0 < 1 or slices % (s1 * s0):
        raise illegal(f"ring of {s1} x {s0} slices does not divide {slices} slices")
    s2, pitch = slices // (s1 * s0), dm.pitch
    strides = (s1 * s0 * pitch, s0 * pitch, pitch)
    if switch.kind is SwitchKind.TRANSPOSE:
        lead = (s2, s0, s1)
        nests = tuple(
            Nest(dm.bytes, fetch.dtype, b, lead, (strides[0], strides[2], strides[1]), merged(lp)) for b, lp in tensors
        )
        return Source(nests, lead, fetch.packet, packets, dtype, fetch.cast)
    if len(tensors) == 2:
        raise SimulationError(
            SimulationError.UNSUPPORTED,
            f"two interleaved tensors through {switch.kind.name}",
            "fetch them in two passes",
        )
    time0 = 1
    if switch.kind is SwitchKind.BROADCAST01:
        time0 = switch.time0
        if time0 < 1 or packets % time0:
            raise illegal(f"time0 = {time0} does not divide {packets} packets")
    nest = Nest(dm.bytes, fetch.dtype, tensors[0][0], (s2, s1, s0), strides, merged(tensors[0][1]))
    fill = None
    parts = split(nest.loops, (packets // time0, time0, fetch.packet))
    if parts is None:
        nest, fill = nest.linear()
        parts = split(nest.loops, (packets // time0, time0, fetch.packet))
        assert parts is not None
    by2, by1, by0 = nest.lead_strides
    if switch.kind is SwitchKind.BROADCAST01:
        order = merged((*parts[0], (s1, by1), *parts[1], (s0, by0), *parts[2]))
        nest = replace(nest, lead=(s2, 1, 1), lead_strides=(by2, 0, 0), loops=order)
        return Source((nest,), (s2, s1, s0), fetch.packet, packets * s1 * s0, dtype, fetch.cast, fill)
    if switch.kind is SwitchKind.BROADCAST1:
        order = merged((*parts[0], (s1, by1), *parts[2]))
        nest = replace(nest, lead=(s2, 1, s0), lead_strides=(by2, 0, by0), loops=order)
        return Source((nest,), (s2, s1, s0), fetch.packet, packets * s1, dtype, fetch.cast, fill)
    raise SimulationError(
        SimulationError.UNSUPPORTED,
        f"switch kind {switch.kind.name} is timed but not executed",
        "use BROADCAST01, BROADCAST1 or TRANSPOSE",
    )


def flit_width(dtype: Dtype) -> int:
    """Elements of `dtype` in a 32-byte flit."""
    return FLIT_BYTES // dtype.bytes


def by_flits(values: NDArray[Any], packet: int, flit: int, valid: int) -> NDArray[Any]:
    """Keep the first `valid` elements of every flit of [..., packets * packet] elements.

    A packet is cut into flits of `flit` elements; the last one is padded with zeros, which `valid` may include (a
    commit writes at least 8 bytes).
    """
    if valid > flit:
        raise illegal(f"commit keeps {valid} elements of a flit of {flit}", "lower `valid`")
    shape = values.shape[:-1]
    rest = packet % flit
    if packet <= flit and valid <= packet:
        return values if valid == packet else values.reshape(*shape, -1, packet)[..., :valid]
    if rest == 0:
        return values if valid == flit else values.reshape(*shape, -1, flit)[..., :valid]
    flits = -(-packet // flit)
    padded = np.zeros((*shape, values.shape[-1] // packet, flits * flit), values.dtype)
    padded[..., :packet] = values.reshape(*shape, -1, packet)
    return padded.reshape(*shape, -1, flit)[..., :valid]
