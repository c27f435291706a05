"""Sets the dependencies of every instruction: which instructions of the other contexts must be complete before it.

before: ``rngd.exec main "exec(...)" (%a -> %b)``
after:  ``rngd.exec main "exec(...)" (%a -> %b) "after(sub=2 dma=5)"``

Needs placed buffers, because memory that was reused is a hazard too. Only latest conflicts count (contexts run in
order), and waits that another wait implies are left out. Calls are barriers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from xdsl.dialects.builtin import ModuleOp

from backend_rngd.addresses import AddressBook
from backend_rngd.dialect import EARLY, AfterAttr, CallOp, DmaOp, GetGlobalOp, GlobalOp, InstructionOp, RoutineOp
from backend_rngd.instructions import CONTEXTS
from backend_rngd.isa.descriptors import After
from backend_rngd.isa.early import EarlyBytes, may_start_early, written
from backend_rngd.isa.footprint import Interval, footprint
from backend_rngd.isa.hazards import Hazards


@dataclass(frozen=True)
class Waits:
    """How many waits a routine has, by the context that is waited for."""

    main: int
    sub: int
    dma: int


def schedule(module: ModuleOp) -> dict[str, Waits]:
    """Set `after` on every instruction of every routine; returns the number of waits by routine.

    Transfers into globals of kind "early" do not wait for the routines before, if all routines are done with these
    buffers in time. Raises ValueError if a buffer is not placed.
    """
    book = AddressBook(module)
    kinds = {op.sym_name.data: op.kind.data for op in module.body.block.ops if isinstance(op, GlobalOp)}
    routines = [_Routine(op, book, kinds) for op in module.body.block.ops if isinstance(op, RoutineOp)]
    overwritten = [interval for r in routines for i in r.early for interval in written(r.accesses[i])]
    in_time = [r.set_waits(overwritten) for r in routines]
    if all(in_time):
        for r in routines:
            r.start_early()
    return {r.name: r.waits for r in routines}


class _Routine:
    """A routine while its dependencies are set. `early`: instructions that may start before those of other routines."""

    def __init__(self, routine: RoutineOp, book: AddressBook, kinds: dict[str, str]) -> None:
        self.name = routine.sym_name.data
        self.ops = [op for op in routine.block.ops if isinstance(op, (InstructionOp, CallOp))]
        self.accesses = [
            footprint(book.absolute(op), book.launch) if isinstance(op, InstructionOp) else () for op in self.ops
        ]
        self.early: list[int] = []
        self.waits = Waits(0, 0, 0)
        touched: set[str] = set()
        for i, op in enumerate(self.ops):
            names = {v.owner.symbol.string_value() for v in op.operands if isinstance(v.owner, GetGlobalOp)}
            mine = {n for n in names if kinds[n] == EARLY}
            if isinstance(op, DmaOp) and mine and not mine & touched and may_start_early(op.descriptor):
                self.early.append(i)
            touched |= mine

    def set_waits(self, overwritten: Sequence[Interval]) -> bool:
        """Dependencies inside the routine; whether it leaves no open access to the bytes `overwritten`."""
        hazards = Hazards(self.accesses)
        watch = EarlyBytes(overwritten)
        counts = [0, 0, 0]
        calls = 0
        in_time = True
        seen_call = [0, 0, 0]  # calls that each context has waited for
        for op, touched in zip(self.ops, self.accesses, strict=True):
            if isinstance(op, CallOp):
                calls += 1
                in_time = in_time and not watch.open(hazards)
                hazards.barrier()
                continue
            context = CONTEXTS[op.context.data]
            wait = hazards.unmet(context, hazards.required(context, touched))
            call = calls if seen_call[context] < calls else 0
            seen_call[context] = calls
            hazards.issue(context, touched, wait)
            watch.touch(context, touched, hazards.issued[context])
            for i, n in enumerate(wait):
                counts[i] += n > 0
            op.after = AfterAttr(_after(*wait, call))
        self.waits = Waits(*counts)
        return in_time and not watch.open(hazards)

    def start_early(self) -> None:
        """Let the early transfers go as soon as the DMA queue reaches them."""
        for i in self.early:
            op = self.ops[i]
            assert isinstance(op, DmaOp) and op.after is not None
            op.after = AfterAttr(replace(op.after.data, enter=False))


_KNOWN: dict[tuple[int, int, int, int], After] = {}


def _after(main: int, sub: int, dma: int, call: int) -> After:
    key = (main, sub, dma, call)
    if key not in _KNOWN:
        if len(_KNOWN) > 100_000:
            _KNOWN.clear()
        _KNOWN[key] = After(main, sub, dma, call)
    return _KNOWN[key]
