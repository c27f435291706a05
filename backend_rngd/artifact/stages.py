"""Pipeline stages of a program: its entry cut at calls, and what each stage needs in HBM.

The entry of a stream calls `prepare`, `embed`, the blocks of the layers and `head`, in this order. A stage runs
[prepare][embed or receive][its blocks][head or send]; the routines are the same in every stage. A program that walks
its tokens in chunks does so once a chunk: `cut_0`, `prepare`, `embed`, the blocks, `pick_first`; `cut_1`, ..., `pick`;
in the end `head`. The number of stages is chosen when an artifact is loaded; the number of units of a layer is not.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from backend_rngd.artifact.errors import ArtifactError, ArtifactProblem
from backend_rngd.artifact.schema import Cache, HbmMap, Placement
from backend_rngd.isa.descriptors import After, Call, Context, Instruction, Routine, Stream
from backend_rngd.isa.footprint import footprint

PREPARE, EMBED, HEAD, RECEIVE, SEND = "prepare", "embed", "head", "receive", "send"
CUT, PICK, LAYER, TAIL = "cut", "pick", "layer", "_tail"
_ROLES = frozenset({PREPARE, EMBED, HEAD, RECEIVE, SEND, PICK})
Span = tuple[int, int]


def _refuse(what: str, why: str, fix: str) -> ArtifactError:
    return ArtifactError([ArtifactProblem(what, why, fix)])


@dataclass(frozen=True)
class Cuts:
    """The blocks [start, end) of every stage."""

    spans: tuple[Span, ...]

    @property
    def stages(self) -> int:
        """How many stages there are."""
        return len(self.spans)


def role(name: str) -> str:
    """What a routine that the entry calls is for: prepare, embed, head, receive, send, cut, pick, or layer."""
    name = family(name).removesuffix(TAIL)
    return CUT if name.startswith(f"{CUT}_") else name if name in _ROLES else LAYER


def family(name: str) -> str:
    """The name that variants of a routine share, whose values lie at the same places: `block_0` of `block_0_keys512`,
    `pick` of `pick_first`."""
    return re.sub(r"_keys\d+|_first", "", name)


def passes_of(stream: Stream) -> list[range]:
    """The entry's instructions, chunk by chunk; one range if the program is not walked in chunks."""
    entry = stream.routines[0].instructions
    starts = [i for i, item in enumerate(entry) if isinstance(item.what, Call) and role(_callee(stream, item)) == CUT]
    edges = [0, *starts[1:], len(entry)]
    return [range(a, b) for a, b in pairwise(edges)]


def blocks_of(stream: Stream) -> tuple[int, ...]:
    """Instruction indices of the entry's calls of blocks, in the order of the layers (those of the first chunk); empty
    if the entry is not made of calls only."""
    entry = stream.routines[0].instructions
    if not all(isinstance(i.what, Call) for i in entry):
        return ()
    return _layers(stream, passes_of(stream)[0])


def _layers(stream: Stream, part: range) -> tuple[int, ...]:
    entry = stream.routines[0].instructions
    return tuple(i for i in part if role(_callee(stream, entry[i])) == LAYER)


def _callee(stream: Stream, item: Instruction) -> str:
    assert isinstance(item.what, Call)
    return stream.routines[item.what.routine].name


def balance(costs: Sequence[float], stages: int) -> Cuts:
    """Contiguous spans, none empty, whose largest sum of costs is as small as can be (the earliest such cuts).

    Raises ArtifactError if there are fewer blocks than stages.
    """
    n = len(costs)
    if not 1 <= stages <= n:
        what = f"{stages} pipeline stages"
        raise _refuse(what, f"the program has {n} blocks to share out", f"choose 1 to {max(n, 1)}")
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)
    best = [0.0, *sums[1:]]  # smallest largest cost of the first i blocks in k stages; k = 1
    choice: list[list[int]] = []
    for k in range(2, stages + 1):
        now = [float("inf")] * (n + 1)
        cut = [0] * (n + 1)
        for i in range(k, n + 1):
            for j in range(k - 1, i):
                worst = max(best[j], sums[i] - sums[j])
                if worst < now[i]:
                    now[i], cut[i] = worst, j
        best = now
        choice.append(cut)
    ends = [n]
    for cut in reversed(choice):
        ends.append(cut[ends[-1]])
    ends.reverse()
    starts = [0, *ends[:-1]]
    return Cuts(tuple(zip(starts, ends, strict=True)))


def stage_stream(stream: Stream, cuts: Cuts, stage: int) -> Stream:
    """The stream with the entry of one stage. With one stage it is the stream itself.

    Raises ArtifactError if the program cannot be cut.
    """
    if cuts.stages == 1:
        return stream
    entry = stream.routines[0].instructions
    names = {r.name: i for i, r in enumerate(stream.routines)}
    parts = passes_of(stream) if blocks_of(stream) else []
    if not parts or RECEIVE not in names or any(len(_layers(stream, p)) != cuts.spans[-1][1] for p in parts):
        why = "its entry is not made of calls of blocks, or it cannot receive and send"
        raise _refuse(f"{cuts.stages} pipeline stages", why, "build it again, or use one stage")
    calls: list[Instruction] = []  # which wait for nothing: the instructions of the routines do
    for part in parts:
        blocks = _layers(stream, part)
        mine = blocks[slice(*cuts.spans[stage])]
        tail = TAIL if _callee(stream, entry[mine[0]]).endswith(TAIL) else ""
        for i in part:
            kind = role(_callee(stream, entry[i]))
            if kind in (PREPARE, CUT) or i in mine or kind == (EMBED if stage == 0 else None):
                if stage > 0 and i == mine[0]:
                    calls.append(_call(names[RECEIVE + tail], entry[i]))
                calls.append(entry[i])
                if stage < cuts.stages - 1 and i == mine[-1]:
                    calls.append(_call(names[SEND + tail], entry[i]))
            elif kind in (PICK, HEAD) and stage == cuts.stages - 1:
                calls.append(entry[i])
    return replace(stream, routines=(Routine(stream.routines[0].name, tuple(calls)), *stream.routines[1:]))


def _call(routine: int, model: Instruction) -> Instruction:
    return Instruction(Context.CONTROL, After(), Call(routine, ()), model.location)


def touched(stream: Stream) -> tuple[Span, ...]:
    """HBM ranges of the unit's own window that a run touches: sorted, disjoint.

    Registers that the host or a launch sets count as 0, which is right for caches (they select a row inside one). The
    indirect side of a gather counts from its base to its direct end.
    """
    summaries = [_accesses(r) for r in stream.routines]
    spans: set[Span] = set()

    def walk(routine: int, registers: dict[int, int]) -> None:
        for register, low, high in summaries[routine]:
            shift = registers.get(register, 0)
            spans.add((low + shift, high + shift))
        for item in stream.routines[routine].instructions:
            if isinstance(item.what, Call):
                inside = {d: registers.get(s, 0) + value for d, s, value in item.what.moves}
                walk(item.what.routine, {**registers, **inside})

    walk(0, {})
    return _merged(spans)


def _accesses(routine: Routine) -> tuple[tuple[int, int, int], ...]:
    """(register, first byte, byte after the last) of every access to HBM of a routine itself."""
    out = {
        (access.register, low, high)
        for item in routine.instructions
        for access in footprint(item.what)
        if access.space == "hbm"
        for low, high in access.intervals
    }
    return tuple(out)


def _merged(spans: Iterable[Span]) -> tuple[Span, ...]:
    out: list[Span] = []
    for low, high in sorted(spans):
        if out and low <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], high))
        else:
            out.append((low, high))
    return tuple(out)


def overlaps(spans: Sequence[Span], low: int, high: int) -> bool:
    """Whether sorted disjoint spans contain any byte of [low, high)."""
    at = bisect_right(spans, (low, high)) - 1
    return any(a < high and low < b for a, b in spans[max(at, 0) : at + 2])


@dataclass(frozen=True)
class Needs:
    """What a unit of a stage holds in HBM: images of weights, caches, and bytes by kind (whole pages of the map).

    `shared_bytes` (weights and constants) never change and exist once for all replicas on a card; `own_bytes` (caches
    and the area of temporaries) do not.
    """

    placements: tuple[Placement, ...]
    caches: tuple[Cache, ...]
    shared_bytes: int
    own_bytes: int


def needs(
    streams: Sequence[Stream], placements: Sequence[Placement], caches: Sequence[Cache], hbm: HbmMap, page: int
) -> Needs:
    """What the streams of a stage (one a bucket) touch of the artifact's map."""
    spans = _merged(span for stream in streams for span in touched(stream))
    held = tuple(p for p in placements if overlaps(spans, p.address, p.address + p.bytes))
    kept = tuple(c for c in caches if overlaps(spans, c.address, c.address + c.bytes))

    def pages(sizes: Iterable[int]) -> int:
        return sum(-(-n // page) * page for n in sizes)

    shared = pages(p.bytes for p in held) + hbm.constants
    return Needs(held, kept, shared, pages(c.bytes for c in kept) + pages([hbm.total - hbm.shared]))


def block_costs(stream: Stream) -> list[float]:
    """Cost of every block of a program for `balance`: bytes of HBM that it touches, which is the time of decoding.

    The embedding counts with the first block and the head with the last: they are in the same stage.
    """
    entry = stream.routines[0].instructions
    blocks = blocks_of(stream)
    costs = [_touched_bytes(stream, i) for i in blocks]
    for i in range(len(entry) if blocks else 0):
        kind = role(_callee(stream, entry[i]))
        if kind == HEAD or (kind == EMBED and i < blocks[0]):
            costs[-1 if kind == HEAD else 0] += _touched_bytes(stream, i)
    return [float(cost or 1) for cost in costs]


def _touched_bytes(stream: Stream, call: int) -> int:
    """Bytes of HBM that one call of the entry touches."""
    entry = Routine("", (stream.routines[0].instructions[call],))
    return sum(high - low for low, high in touched(replace(stream, routines=(entry, *stream.routines[1:]))))
