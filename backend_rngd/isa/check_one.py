"""Legality of one descriptor."""

from __future__ import annotations

from backend_rngd.isa.check_pass import check_exec
from backend_rngd.isa.check_sync import check_notify, check_wait
from backend_rngd.isa.check_transfer import check_call, check_dma, check_load_trf, check_load_vrf, check_memset
from backend_rngd.isa.descriptors import Context, Descriptor, Dma, Exec, LoadTrf, LoadVrf, Memset, Notify, Wait
from backend_rngd.isa.rules import Report, Violation
from backend_rngd.machine import Machine


def check(
    desc: Descriptor, machine: Machine, context: str | Context | None = None, absolute: bool = False
) -> list[Violation]:
    """Broken limits of one descriptor.

    context: the queue it runs in ("main", "sub", "dma", "control"), or None to leave that open. absolute: addresses are
    final (after placement), not relative to buffers, so that overlaps inside the instruction can be judged.
    """
    where = Context[context.upper()] if isinstance(context, str) else context
    report = Report(machine)
    if isinstance(desc, Exec):
        check_exec(report, desc, where, absolute)
    elif isinstance(desc, Dma):
        check_dma(report, desc, where, absolute)
    elif isinstance(desc, LoadTrf):
        check_load_trf(report, desc, where)
    elif isinstance(desc, LoadVrf):
        check_load_vrf(report, desc, where, absolute)
    elif isinstance(desc, Memset):
        check_memset(report, desc, where)
    elif isinstance(desc, Notify):
        check_notify(report, desc, where)
    elif isinstance(desc, Wait):
        check_wait(report, desc, where)
    else:
        check_call(report, desc, where)
    return report.violations
