"""Instruction-level rows of docs/accuracy.md: single transfers, passes, synchronisation, reductions."""

from __future__ import annotations

from accuracy_bases import HP_PROFILER, HP_TRACE, NOMINAL, SILICON, ticks
from accuracy_rows import Row

from backend_rngd.isa.descriptors import (
    DM_SLICE_STRIDE,
    After,
    Alu,
    Commit,
    Context,
    Dma,
    Dtype,
    Endpoint,
    Exec,
    Fetch,
    Instruction,
    Mode,
    Op,
    Operand,
    Routine,
    Source,
    Space,
    Stream,
    Switch,
    SwitchKind,
    VectorOp,
)
from backend_rngd.machine import Machine
from backend_rngd.machine.formulas import dma_time, exec_cycles
from runtime_sim.timing import TimingResult, simulate
from runtime_sim.topology import Topology

MB15 = 512 * 30_720
# name, runs a slice, bytes a run, commands, ticks, source: HBM to all 512 slices
STREAMS = (
    ("o_weight, 15.7 MB, 120 runs of 256 B a slice", 120, 256, 1, 24_142.0, "5.4 ED"),
    ("k and v, 15.7 MB, a run of 15,360 B each", 1, 15_360, 2, 32_432.0, "5.4 ED"),
    ("down, 29.5 MB, 30 runs of 1,920 B", 30, 1_920, 1, 65_700.0, "5.4 ED"),
    ("down, 29.5 MB, 15 runs of 3,840 B", 15, 3_840, 1, 54_000.0, "5.4 ED"),
    ("block scales, 3.7 MB, a run of 7,200 B", 1, 7_200, 1, 10_093.0, "5.4 ED"),
    ("15.7 MB, runs of 128 B", 240, 128, 1, MB15 / 319, "5.4 KK"),
    ("15.7 MB, runs of 256 B", 120, 256, 1, MB15 / 618, "5.4 KK"),
    ("15.7 MB, runs of 2,048 B", 15, 2_048, 1, MB15 / 547, "5.4 KK"),
    ("15.7 MB, a run of 30,720 B", 1, 30_720, 1, MB15 / 465, "5.4 KK"),
)


def load(runs: int, run: int, commands: int, units: int, machine: Machine) -> TimingResult:
    """`units` PEs each load `runs` runs of `run` bytes into every slice with `commands` commands: a run of each slice
    after the other."""
    packet = next(p for p in range(min(run, 4096), 0, -8) if run % p == 0)
    inner = ((run // packet, packet, packet),) if run > packet else ()
    loops = ((runs, 64 * run, run), (64, run, DM_SLICE_STRIDE), *inner)
    size = 64 * runs * run
    body = tuple(
        Instruction(
            Context.DMA, After(), Dma(Endpoint(Space.HBM, n * size), Endpoint(Space.DM, n * runs * run), loops, packet)
        )
        for n in range(commands)
    )
    stream = Stream(0, 64, (Routine("load", body),), ("load",))
    return simulate(stream, machine, topology=Topology.of(machine, units))


def replicated(nbytes: int, machine: Machine) -> float:
    """Cycles until one engine has brought the same bytes from HBM to all 512 slices."""
    loops = ((nbytes // 256, 256, 256), (512, 0, DM_SLICE_STRIDE))
    return dma_time(Dma(Endpoint(Space.HBM, 0), Endpoint(Space.DM, 0), loops, 256), machine)


def through_hbm(machine: Machine) -> float:
    """Cycles of the vendor's sum of 8 KB over both clusters (hardware.md 7.2): partial sums to HBM, a synchronisation,
    both partial sums back into every slice, an addition."""
    store = Dma(Endpoint(Space.DM, 0), Endpoint(Space.HBM, 0), ((64, DM_SLICE_STRIDE, 128),), 128)
    add = Exec(64, Fetch(0, ((128, 4),), Dtype.F32, 8), Commit(0, ((128, 4),), Dtype.F32, 8))
    passes = exec_cycles(add, Context.MAIN, machine).total
    return dma_time(store, machine) + machine.cluster_sync_cycles + 2 * replicated(8192, machine) + passes


def silicon() -> list[Row]:
    """Rows of 5.4, 7.4 and the fixed costs of section 8; parameters may be fitted on these."""
    from scaling import all_reduce_seconds  # compiles programs: not needed to fit

    machine = SILICON
    rows: list[Row] = []
    for name, runs, run, commands, count, source in STREAMS:
        bound = 512 * runs * run * commands / machine.hbm_bytes_per_cycle * NOMINAL.us
        took = NOMINAL.of(load(runs, run, commands, 8, machine))
        note = "model: a request across a line counts as two; here it is less" if run == 7200 else ""
        rows.append(
            Row(f"load to 8 PEs: {name}", "fitted", source, took, ticks(count), bound=bound, binds="HBM", note=note)
        )
    alone = "published without its runs; taken as the"
    for name, runs, run, rate, which in (
        ("runs of 256 B (332 B a tick)", 240, 256, 332, "best"),
        ("a run of 61,440 B (262 B a tick)", 1, 61_440, 262, "worst"),
    ):
        rows.append(
            Row(f"load to one cluster: 15.7 MB, {name}", "fitted", "3.3 KK", NOMINAL.of(load(runs, run, 1, 4, machine)),
                ticks(MB15 / rate), bound=MB15 / 1024 * NOMINAL.us, binds="DM", note=f"{alone} {which} case")
        )  # fmt: skip
    weight = 7168 * 64 * 256
    one = load(7168, 256, 1, 1, HP_PROFILER.machine)
    small = Exec(64, Fetch(0, ((8, 4),), Dtype.F32, 8), Commit(4096, ((8, 4),), Dtype.F32, 8))
    empty = Dma(Endpoint(Space.HBM, 0), Endpoint(Space.DM, 0), ((1, 256, 256),), 256)
    cycle = NOMINAL.us
    rows += [
        Row("load to one PE: 117 MB", "fitted", "1.4 HP", HP_PROFILER.of(one), weight / 219e3,
            bound=HP_PROFILER.bound(0, weight, 1)[0], binds="DM"),
        Row("load of 7.5 KB to each of 512 slices (45 k ticks)", "fitted", "5.3 KK", replicated(7680, machine) * cycle,
            ticks(45_000)),
        Row("a pass over one flit (550-600 ticks)", "fitted", "4.5 KK",
            exec_cycles(small, Context.MAIN, machine).total * cycle, ticks(575)),
        Row("a DMA command of 256 B (1,900-2,700 ticks)", "fitted", "3.3 ED", dma_time(empty, machine) * cycle,
            ticks(2300)),
        Row("a further DMA descriptor", "fitted", "3.3 KK", machine.dma_descriptor_cycles * cycle, ticks(21)),
        Row("sync of two clusters, later ones (0.4 k ticks)", "fitted", "4.5 KK, ED",
            machine.cluster_sync_cycles * cycle, ticks(400)),
    ]  # fmt: skip
    ours = sum(all_reduce_seconds(2, width, HP_TRACE.machine) for width in (14336, 4096)) * 1e6
    theirs = 2 * through_hbm(HP_TRACE.machine) * HP_TRACE.us
    rows += [
        Row("both 8 KB all-reduces of a layer, 2 PEs", "fitted", "7.4 HP", ours, 3.67 + 1.98,
            note="measured as a difference of layers: 3.67 and 1.98"),
        Row("both 8 KB all-reduces of a layer, 8 PEs", "fitted", "7.4 HP", theirs,
            49.97 + 65.11, note="their algorithm (7.2) as instructions of ours; 49.97 and 65.11"),
    ]  # fmt: skip
    return rows


def static() -> list[Row]:
    """Rows of hardware.md 5.3 and 5.4 that our instructions can express, in cycles of 1 GHz."""
    machine = SILICON
    cycle = NOMINAL.us

    def vector(elements: int) -> float:
        ops = (VectorOp(Alu.FP_MUL0, Op.MUL, Mode.STREAM_OPERAND, Operand(Source.CONST, 2.0)),)
        fetch, commit = Fetch(0, ((elements, 4),), Dtype.F32, 8), Commit(0, ((elements, 4),), Dtype.F32, 8)
        return exec_cycles(Exec(64, fetch, commit, vector=ops), Context.MAIN, machine).total * cycle

    def store(pieces: int) -> float:
        loops = ((pieces, DM_SLICE_STRIDE, 120),)
        return dma_time(Dma(Endpoint(Space.DM, 0), Endpoint(Space.HBM, 0), loops, 120), machine) * cycle

    ring = Exec(
        256, Fetch(0, ((3840, 2),), Dtype.BF16, 16), Commit(0, ((8, 2),), Dtype.BF16, 8),
        Switch(SwitchKind.BROADCAST01, 1, 256, 1),
    )  # fmt: skip
    return [
        Row("broadcast of 240 flits round 256 slices", "static", "5.3 KK",
            exec_cycles(ring, Context.MAIN, machine).total * cycle, 62.215),
        Row("load to one cluster: 15.7 MB", "static", "5.3 KK", NOMINAL.of(load(240, 256, 1, 4, machine)), 26.475,
            bound=MB15 / 1024 / 1e3, binds="DM", note="the vendor compiler's constant is 0.61 TB/s a cluster"),
        Row("load to 8 PEs: 15.7 MB", "static", "5.3 KK", NOMINAL.of(load(120, 256, 1, 8, machine)), 13.5,
            bound=MB15 / 1536 / 1e3, binds="HBM"),
        Row("load of 7.5 KB to each of 512 slices", "static", "5.3 KK", replicated(7680, machine) * cycle, 18.4),
        Row("f32 vector chain, 64 K elements a slice (3.9 a cycle)", "static", "5.3 KK", vector(65_536),
            65.536 / 3.9),
        Row("store of 64 x 120 B (2,510 or 2,040)", "static", "5.3 KK, SS", store(64), 2.275),
        Row("store of 256 x 120 B", "static", "5.4 ED", store(256), 4.535),
        Row("lookup-table load", "static", "5.3 KK", machine.lookup_load_cycles * cycle, 0.838),
        Row("switch configuration load", "static", "5.3 KK", machine.switch_configuration_cycles * cycle, 0.719),
        Row("sync of two clusters", "static", "5.3 KK",
            machine.in_mode("documented").cluster_sync_cycles * cycle, 0.6),
    ]  # fmt: skip
