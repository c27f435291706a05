"""The documented limits by name, and the collector that checks report to.

Every rule is a limit of the hardware (sources in hardware.md) or a canonical form. Canonical forms exist so that every
field of an instruction counts: two different encodings of the same behaviour would hide mistakes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from backend_rngd.machine import Machine

RULES: dict[str, str] = {
    # Sequencers
    "loop-count": "a sequencer has at most 8 entries (B:sequencer)",
    "loop-size": "an entry has 1 to 65,536 steps (B:sequencer)",
    "loop-one": "entries of size 1 are dropped (canonical)",
    "loop-merge": "adjacent entries that continue each other are merged (B:sequencer; canonical)",
    "stride-range": "strides are signed 32-bit (OB:sequencer)",
    "element-alignment": "addresses and strides are multiples of the element size",
    "bounds": "addresses stay inside the memory",
    # Fetch
    "slices": "a pass drives 1 to 256 slices of its unit (B:switch-engine)",
    "packet": "a fetch packet is a multiple of 8 B and divides the elements (B:fetch-engine)",
    "flit-packet": "with no switch or contraction a packet is at most a flit; of VRF loads the widest (canonical)",
    "fetch-cast": "the adapter widens bf16 and f8 to f32, i8 and i16 to i32 (B:fetch-adapter)",
    "lookup": "the main context looks up 1 B keys of one tensor; results do not go to TRF or VRF (B:fetch-adapter, KK)",
    "sub-access": "the sub context fetches in accesses of exactly 8 B (B:fetch-engine)",
    "second": "an interleaved tensor has a stride for every loop (B:fetch-engine)",
    # Switch
    "ring": "a ring has a power of two of slices, is fully live and moves something (B:switch-engine, ED)",
    "ring-time": "time0 divides the packets; it is all of them without slice1, and 1 where the kind has no time0",
    "ring-silicon": "Broadcast1 delivers only time step 0 on silicon (ED)",
    # Contraction
    "contract-context": "only the main context may contract (B:computing-tensors/index)",
    "contract-stream": "operands are bf16, f8 or i8, neither widened nor interleaved (B:outer)",
    "lanes": "1, 2, 4 or 8 lanes (B:outer)",
    "pack": "1 or 2 flits make a multiplier packet; the fetch packet is one (B:outer; canonical)",
    "digits": "digits that read the stream enumerate its packets; broadcast digits are innermost (B:outer)",
    "trf-read": "TRF reads are powers of two of elements, at most 64 B and the packet, naturally aligned (B:outer)",
    "depth": "the packet reducer halves the packet at most to one result and leaves at most 32 (B:packet-reducer)",
    "accumulators": "partial sums fit 128 / columns (interleaved) or 32 / lanes (sequential) slots (B:time-reducer)",
    "lane-mode": "one lane and one column make both modes equal: interleaved (canonical)",
    # Vector engine
    "vector-type": "the vector engine takes i32 and f32, each ALU its own (B:intra-slice-chain)",
    "stage-order": "stages run forwards only (B:intra-slice-chain)",
    "alu-once": "each ALU once a pass (B:intra-slice-chain)",
    "alu-op": "an ALU runs its own operations (B:intra-slice-chain)",
    "mode": "the mode fits the operation and has an operand exactly when it needs one; commuting ones are stream first",
    "unused-field": "fields that nothing reads are zero (canonical)",
    "constant": "integer stages take 32-bit integer constants",
    "vrf-count": "a VRF operand enumerates the elements of the stream",
    "group": "groups exist in pair mode before the zip (B:intra-slice-chain)",
    "stash": "one stash a pass, written once, read once, by as many elements (B:intra-slice-chain)",
    "reduce": "a reduction has 2 or more steps, at most 8 slots and whole packets (B:intra-slice-reduce, ED)",
    # Commit
    "commit-cast": "f32 narrows to bf16 and f8, i32 to i16 and i8, otherwise the type stays (B:cast-engine)",
    "valid": "8, 16, 24 or 32 B of a flit are kept, padding only to fill 8 B (B:commit-adapter)",
    "commit-count": "loops enumerate the kept elements",
    "commit-run": "kept elements of a flit are contiguous (B:commit-engine)",
    "commit-alignment": "base and strides are multiples of 8 B (B:commit-engine)",
    "write-twice": "an instruction writes no byte twice",
    "overlap": "an instruction overwrites what it reads only element by element in place",
    # Register files, memset
    "context": "the context may run this instruction (B:computing-tensors/index, KK)",
    "trf-load": "a TRF load brings contraction operands, a flit a packet, whole lanes (B:register-files; canonical)",
    "vrf-load": "VRF holds 32-bit elements (B:register-files)",
    "memset": "memset writes multiples of 8 B with a 32-bit pattern (B:commit-adapter)",
    "stash-space": "a program that stashes leaves the last 1,024 B of VRF free (FORUM:451)",
    # DMA
    "dma-packet": "an innermost run has 1 to 4,096 B (OB:dma-engine)",
    "dma-run": "a run is one packet where it fits (canonical)",
    "dma-alignment": "8 B for addresses and sizes between HBM and DM and for DM writes (B:dma-engine)",
    "dma-register": "registers 0 to 63, and only HBM addresses use one (FT:hal_pert_isa)",
    "gather": "gather reads HBM into DM, scatter writes DM to HBM, indices are aligned words in HBM (B:dma-engine)",
    # Other units
    "peer": "a peer address names a unit of the program and an address in its map, the own unit's only where it must",
    "semaphore": "a unit has a limited number of semaphores (chosen)",
    "notify-units": "a notify names whole units, each once (canonical)",
    "wait-count": "a wait consumes at least one notification",
    "sync-range": "ranges of a notify or wait are whole shared buffers, ascending and not touching (canonical)",
    "launch": "launch registers are their own and have a value of every unit",
    "deadlock": "every wait is notified often enough",
    "semaphore-balance": "every notification is waited for",
    "wait-order": "a wait is over only when those it is meant for have notified",
    "unit-race": "accesses of different units to the same bytes are ordered by notify and wait",
    # Streams
    "header": "units have 64, 128 or 256 slices; names, locations and routines are consistent",
    "call": "calls name a routine that has instructions, never recursively, and set registers once",
    "register": "registers that are read have been set",
    "hbm-bounds": "HBM accesses stay inside one buffer of the memory map",
    "dm-bounds": "DM accesses stay inside one live buffer of the memory plan",
    "future": "no wait for an instruction that comes later, nor for the own context",
    "race": "every conflict between contexts is covered by waits",
    "type": "bytes are read as the type they were written as",
    "useless-wait": "every wait protects something that no other wait implies",
    "bank-starvation": "64 hits of one bank in a row can starve DMA until the NoC times out (B:memory-performance)",
}
WARNINGS = frozenset({"bank-starvation", "ring-silicon"})
# Forms of what the hardware takes in other forms too: the simulator executes those.
CANONICAL = frozenset(
    {"loop-one", "loop-merge", "flit-packet", "lane-mode", "unused-field", "dma-run", "notify-units", "sync-range"}
)


@dataclass(frozen=True)
class Violation:
    """A broken rule. routine and index say where in a stream (-1: a descriptor alone)."""

    rule: str
    message: str
    routine: str = ""
    index: int = -1
    location: str = ""

    @property
    def severity(self) -> str:
        """error, or warning for limits that only some conditions make fatal."""
        return "warning" if self.rule in WARNINGS else "error"

    def __str__(self) -> str:
        where = f"{self.routine}[{self.index}] {self.location}: " if self.routine else ""
        return f"{where}{self.message} [{self.rule}: {RULES[self.rule]}]"


@dataclass
class Report:
    """Collects violations of one descriptor."""

    machine: Machine
    violations: list[Violation] = field(default_factory=list[Violation])

    def add(self, rule: str, message: str) -> None:
        """Report a broken rule."""
        assert rule in RULES, rule
        self.violations.append(Violation(rule, message))

    @property
    def clean(self) -> bool:
        """Nothing was reported."""
        return not self.violations


def check_loops(
    report: Report,
    what: str,
    loops: Sequence[tuple[int, ...]],
    strides: Sequence[Sequence[int]] | None = None,
) -> None:
    """Sequencer limits of entries (size, stride, ...): count, sizes, strides, canonical form.

    strides: those of every entry that must fit the stride field, if not all of the entry's (peer sides: without units).
    """
    machine = report.machine
    if len(loops) > machine.max_loops:
        report.add("loop-count", f"{what} has {len(loops)} loops")
    limit = 1 << (machine.max_stride_bits - 1)
    before: tuple[int, ...] | None = None
    for number, entry in enumerate(loops):
        size = entry[0]
        if size == 1:
            report.add("loop-one", f"{what} has a loop of size 1")
        elif not 1 < size <= machine.max_loop_size:
            report.add("loop-size", f"{what} has a loop of size {size}")
        for stride in entry[1:] if strides is None else strides[number]:
            if not -limit <= stride < limit:
                report.add("stride-range", f"{what} has a stride of {stride}")
        if before is not None and before[0] * size <= machine.max_loop_size:
            for outer, inner in zip(before[1:], entry[1:], strict=True):
                if outer != size * inner:
                    break
            else:
                report.add("loop-merge", f"{what}: loops of {before[0]} and {size} steps are one of {before[0] * size}")
        before = entry


def extent(base: int, loops: Sequence[tuple[int, ...]], unit: int, column: int = 1) -> tuple[int, int]:
    """First byte and one past the last byte of a loop nest."""
    low = high = base
    for entry in loops:
        reach = (entry[0] - 1) * entry[column]
        if reach < 0:
            low += reach
        else:
            high += reach
    return low, high + unit


def writes_twice(loops: Sequence[tuple[int, int]], unit: int) -> bool:
    """Whether steps may overlap: some stride is smaller than what the smaller strides already cover."""
    covered = unit
    for size, stride in sorted(((n, abs(s)) for n, s in loops if n > 1), key=lambda e: e[1]):
        if stride < covered:
            return True
        covered = (size - 1) * stride + covered
    return False
