"""Sets the dependencies of every instruction: which instructions of the other contexts must be complete before it.

before: ``rngd.exec main "exec(...)" (%a -> %b)``
after:  ``rngd.exec main "exec(...)" (%a -> %b) "after(sub=2 dma=5)"``

Needs placed buffers, because memory that was reused is a hazard too. Only latest conflicts count (contexts run in
order), and waits that another wait implies are left out. Calls are barriers.
"""

from __future__ import annotations

from dataclasses import dataclass

from xdsl.dialects.builtin import ModuleOp

from backend_rngd.addresses import AddressBook
from backend_rngd.dialect import AfterAttr, CallOp, InstructionOp, RoutineOp
from backend_rngd.isa.descriptors import After, Context
from backend_rngd.isa.footprint import footprint
from backend_rngd.isa.hazards import Hazards

CONTEXTS = {"main": Context.MAIN, "sub": Context.SUB, "dma": Context.DMA}


@dataclass(frozen=True)
class Waits:
    """How many waits a routine has, by the context that is waited for."""

    main: int
    sub: int
    dma: int


def schedule(module: ModuleOp) -> dict[str, Waits]:
    """Set `after` on every instruction of every routine; returns the number of waits by routine.

    Raises ValueError if a buffer is not placed.
    """
    book = AddressBook(module)
    return {op.sym_name.data: _routine(op, book) for op in module.body.block.ops if isinstance(op, RoutineOp)}


def _routine(routine: RoutineOp, book: AddressBook) -> Waits:
    found = [op for op in routine.block.ops if isinstance(op, (InstructionOp, CallOp))]
    accesses = [footprint(book.absolute(op), book.launch) if isinstance(op, InstructionOp) else () for op in found]
    hazards = Hazards(accesses)
    counts = [0, 0, 0]
    calls = 0
    seen_call = [0, 0, 0]  # calls that each context has waited for
    for op, touched in zip(found, accesses, strict=True):
        if isinstance(op, CallOp):
            calls += 1
            hazards.barrier()
            continue
        context = CONTEXTS[op.context.data]
        wait = hazards.unmet(context, hazards.required(context, touched))
        call = calls if seen_call[context] < calls else 0
        seen_call[context] = calls
        hazards.issue(context, touched, wait)
        for i, n in enumerate(wait):
            counts[i] += n > 0
        op.after = AfterAttr(_after(*wait, call))
    return Waits(*counts)


_KNOWN: dict[tuple[int, int, int, int], After] = {}


def _after(main: int, sub: int, dma: int, call: int) -> After:
    key = (main, sub, dma, call)
    if key not in _KNOWN:
        if len(_KNOWN) > 100_000:
            _KNOWN.clear()
        _KNOWN[key] = After(main, sub, dma, call)
    return _KNOWN[key]
