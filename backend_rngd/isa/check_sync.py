"""Legality of notify and wait."""

from __future__ import annotations

from collections.abc import Sequence

from backend_rngd.isa.check_transfer import MAX_UNITS
from backend_rngd.isa.descriptors import UNIT_STRIDE, Context, Notify, Wait
from backend_rngd.isa.rules import Report


def check_notify(report: Report, desc: Notify, context: Context | None) -> None:
    """A notify: DMA context, a semaphore that exists, whole units, legal loops over them, published bytes in DM."""
    _context(report, "notify", context)
    _semaphore(report, desc.semaphore)
    if not 0 <= desc.register < report.machine.registers:
        report.add("dma-register", f"register {desc.register} of a notify")
    if desc.base % UNIT_STRIDE:
        report.add("notify-units", f"base {desc.base} is not a whole number of units")
    if len(desc.units) > report.machine.max_loops:
        report.add("loop-count", f"notify has {len(desc.units)} loops over units")
    before: tuple[int, int] | None = None
    reach = 0
    for size, stride in sorted(desc.units, key=lambda loop: abs(loop[1])):
        if not 2 <= size <= MAX_UNITS or abs(stride) <= reach or abs(stride) > MAX_UNITS:
            report.add("notify-units", f"loops {desc.units} over units name a unit twice or do nothing")
            break
        reach += (size - 1) * abs(stride)
    if not 0 <= desc.base // UNIT_STRIDE < MAX_UNITS or reach >= MAX_UNITS:
        report.add("notify-units", f"units from {desc.base // UNIT_STRIDE} on, {reach} further")
    for size, stride in desc.units:
        if before is not None and before[1] == size * stride:
            report.add("loop-merge", f"notify: loops of {before[0]} and {size} units are one of {before[0] * size}")
        before = (size, stride)
    _ranges(report, "publishes", desc.ranges)


def check_wait(report: Report, desc: Wait, context: Context | None) -> None:
    """A wait: DMA context, a semaphore that exists, at least one notification, ranges in DM."""
    _context(report, "wait", context)
    _semaphore(report, desc.semaphore)
    if desc.count < 1:
        report.add("wait-count", f"count of {desc.count}")
    _ranges(report, "releases", desc.ranges)
    _ranges(report, "receives", desc.arrived)


def _context(report: Report, what: str, context: Context | None) -> None:
    if context is not None and context != Context.DMA:
        report.add("context", f"a {what} in context {context.name}")


def _semaphore(report: Report, semaphore: int) -> None:
    if not 0 <= semaphore < report.machine.semaphores:
        report.add("semaphore", f"semaphore {semaphore}")


def _ranges(report: Report, verb: str, ranges: Sequence[tuple[int, int]]) -> None:
    """Ascending, disjoint, not touching (one range is one range), of whole aligned pieces inside a slice's DM."""
    unit = report.machine.dma_alignment_bytes
    end = -1
    for offset, nbytes in ranges:
        if offset % unit or nbytes % unit or nbytes < unit:
            report.add("sync-range", f"{verb} {nbytes} B at {offset}")
        elif offset <= end:
            report.add("sync-range", f"{verb} ranges {tuple(ranges)} that are out of order or touch")
        if offset < 0 or offset + nbytes > report.machine.dm_slice_bytes:
            report.add("bounds", f"{verb} DM bytes [{offset}, {offset + nbytes})")
        end = offset + nbytes
