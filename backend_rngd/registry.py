"""What the backend adds to `rngdc opt`: the `rngd` dialect, and placement and scheduling as passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import Dialect
from xdsl.passes import ModulePass

from backend_rngd.machine import load_machine


@dataclass(frozen=True)
class RngdPlace(ModulePass):
    """Addresses of globals and locals, see `backend_rngd.place`; `prefetch` moves transfers of weights forward."""

    name = "rngd-place"
    machine: str = "rngd"
    prefetch: bool = True

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        """Place in place."""
        from backend_rngd.place import place

        place(op, load_machine(self.machine), prefetch=self.prefetch)


@dataclass(frozen=True)
class RngdSchedule(ModulePass):
    """Waits of every instruction, see `backend_rngd.schedule`."""

    name = "rngd-schedule"

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        """Schedule in place."""
        from backend_rngd.schedule import schedule

        schedule(op)


def _rngd() -> Dialect:
    from backend_rngd.dialect import RNGD

    return RNGD


def get_rngd_dialects() -> dict[str, Callable[[], Dialect]]:
    """Dialects by name, loaded when used."""
    return {"rngd": _rngd}


def get_rngd_passes() -> dict[str, Callable[[], type[ModulePass]]]:
    """Passes by name."""
    return {"rngd-place": lambda: RngdPlace, "rngd-schedule": lambda: RngdSchedule}
