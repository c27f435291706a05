"""The units of a tensor-parallel group: how they lie on cards, launch registers, notify and wait between them.

A *phase* is: publish a buffer, notify the others, wait for them, read theirs. Buffers that are published have fixed
addresses that are the same in every unit. Consecutive phases of a routine use different buffers: when a unit has waited
in phase k + 1, its partners have notified in k + 1 and so have read what it published in phase k.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from xdsl.ir import SSAValue

from backend_rngd.isa.descriptors import UNIT_STRIDE, Notify, Wait
from backend_rngd.lowering.emitter import Emitter
from backend_rngd.machine import Machine
from backend_rngd.sync_ops import NotifyOp, WaitOp
from ir.errors import UnsupportedError

if TYPE_CHECKING:
    from backend_rngd.lowering.context import Program


OWN_SEMAPHORES = 4  # of a scope in a routine: every form of a block is a routine


@dataclass(frozen=True)
class Scope:
    """Partners of a unit: (register + base) / UNIT_STRIDE is the first, `units` loops (size, stride) over them."""

    name: str
    register: int
    size: int
    stride: int


@dataclass
class _Phase:
    """One exchange of a routine; the wait's released buffers are known when the routine is complete."""

    scope: Scope
    published: SSAValue | None
    wait: WaitOp
    semaphore: int


class Units(Protocol):
    """What a group needs of the program around it; see `Program`."""

    units: int
    machine: Machine

    def launch_register(self, values: tuple[int, ...]) -> int:
        """The register that holds these values, one a unit of the group."""
        ...

    def semaphore(self) -> int:
        """A semaphore that no other phase uses."""
        ...


@dataclass
class Group:
    """The group as one routine sees it."""

    program: Units
    em: Emitter
    routine: str
    repeated: bool
    phases: list[_Phase] = field(default_factory=list[_Phase])

    @property
    def units(self) -> int:
        """Units of the group."""
        return self.program.units

    @property
    def cards(self) -> int:
        """Cards they lie on."""
        return -(-self.units // self.program.machine.pes_per_chip)

    @property
    def local(self) -> int:
        """Units of the group on a card."""
        return self.units // self.cards

    def register(self, on_card: int = 0, rank: int = 0, card: int = 0, part: int = 0, by_card: int = 0) -> int:
        """A launch register with a sum over the numbers of a unit: its number on its card times `on_card`, its rank
        (the same number) as a unit address times `rank`, its card's first unit as a unit address times `card`, its
        number in the group times `part`, its card's number times `by_card`. Register 0 if that is 0 for all."""
        values = [
            (u % self.local) * (on_card + UNIT_STRIDE * rank)
            + (u // self.local * self.local) * UNIT_STRIDE * card
            + u * part
            + u // self.local * by_card
            for u in range(self.units)
        ]
        return self.program.launch_register(tuple(values))

    @property
    def card_scope(self) -> Scope:
        """The units of the own card."""
        return Scope("card", self.register(card=1), self.local, 1)

    @property
    def rank_scope(self) -> Scope:
        """The units with the own number on all cards."""
        return Scope("rank", self.register(rank=1), self.cards, self.local)

    def publish(self, scope: Scope, space: str, nbytes: int, shared: bool = True) -> SSAValue:
        """The buffer that the next phase of `scope` publishes. shared: by all routines, which needs an even number of
        phases in each of them."""
        parity = len([p for p in self.phases if p.scope.name == scope.name]) % 2
        owner = "publish" if shared else self.routine
        name = f"{owner}.{scope.name}.{space}{parity}.{nbytes}"
        return self.em.global_buffer(name, space, nbytes, "activation")

    def exchange(self, scope: Scope, published: SSAValue | None, in_dm: bool = True) -> None:
        """All units of `scope` publish and wait for each other. `in_dm`: the buffer lies in DM (HBM needs no waits:
        only the DMA context, which is in order, touches it)."""
        semaphore = self._semaphore(scope)
        buffers = [published] if published is not None and in_dm else []
        self.em.add(
            NotifyOp(
                Notify(scope.register, 0, ((scope.size, scope.stride),), semaphore), buffers, location=self.em.location
            )
        )
        wait = WaitOp(Wait(semaphore, scope.size - 1), (), location=self.em.location)
        self.em.add(wait)
        self.phases.append(_Phase(scope, buffers[0] if buffers else None, wait, semaphore))

    def _semaphore(self, scope: Scope) -> int:
        """One of its own for each of the first phases of a scope; later ones take turns with the second half of them.

        When a unit has waited in a phase, all partners have notified in it and so have waited in those before. So two
        phases that share a semaphore need one between them, also from the last one of a call to the next call's first.
        """
        mine = [p for p in self.phases if p.scope.name == scope.name]
        if len(mine) < OWN_SEMAPHORES:
            return self.program.semaphore()
        half = OWN_SEMAPHORES // 2
        return mine[half + len(mine) % half].semaphore

    def finish(self) -> None:
        """Call when the routine is complete: an even number of phases, and what every wait releases."""
        scopes = {phase.scope.name: phase.scope for phase in self.phases}
        for name, scope in scopes.items():
            mine = [p for p in self.phases if p.scope.name == name]
            if self.repeated and len(mine) % 2:
                self.exchange(scope, None)
                mine.append(self.phases[-1])
            for i, phase in enumerate(mine):
                before = mine[i - 1].published
                if before is not None and len(mine) > 1:
                    _release(phase, before)


def _release(phase: _Phase, buffer: SSAValue) -> None:
    """Name the buffer that partners have finished reading when the phase's wait is over."""
    old = phase.wait
    phase.wait = WaitOp(old.descriptor, [buffer], location=old.where.data)  # type: ignore[arg-type]
    block = old.parent
    assert block is not None
    block.insert_op_before(phase.wait, old)
    old.detach()


def check_axis(program: Program, axis: str) -> None:
    """Collectives run among all units of the group. Raises UnsupportedError for a part of the mesh."""
    if program.mesh[axis] != program.units:
        raise UnsupportedError(
            f"a collective on axis {axis} of mesh {program.mesh}",
            "exchanges between a part of the units of a group are not lowered",
            "shard the dimension over all units (axis tp) in the plan",
        )
