"""Speed of the simulator: `python benchmarks/simulator.py [ARTIFACT]` prints one JSON object.

Seconds are of the wall clock; `cpu_seconds`, where given, are of the process alone (a busy machine adds to the first).
targets: what the timing simulator must reach on two cores, with what it reaches: one million instructions, a decode
step and a prefill of 1,024 tokens of Llama-3.1-8B at TP 8 after start-up, a cold `rngdc simulate` of both, and whether
equal units simulated once and two runs give the same cycles. In simulated cycles a CPU-second beside figures of others
(ONNXim 800 to 18,000, SCALE-Sim about 1,000).
event_loop: instructions a second of the timing core on a random program of eight units (after compilation).
stream_weights: bf16 weight bytes a second through contraction passes whose activations lie in TRF (decode).
stationary_weights: multiply-accumulates a second of passes whose weights lie in TRF (prefill).
vector: elements a second through a pass of four vector operations with a bf16 result.
units: seconds to time groups of units that run one stream of equal layers with two all-reduces each, every unit on its
own and equal units once; both give the same cycles.
With an artifact of a decoder: seconds of its largest prefill, tokens a second of its first decode program, CPU seconds
of each (which other load hardly changes), and the time to simulate their timing. SmolLM2-135M has to decode at least
two tokens a second on two cores: `rngdc build SmolLM2-135M-Instruct OUT -pb 1,128 -db 1,512`, then this with OUT.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from backend_rngd.artifact import Bucket, open_artifact
from backend_rngd.isa.descriptors import (
    BROADCAST,
    DM_SLICE_STRIDE,
    REDUCE,
    UNIT_STRIDE,
    After,
    Alu,
    Call,
    Commit,
    Context,
    Contract,
    Dma,
    Dtype,
    Endpoint,
    Exec,
    Fetch,
    Instruction,
    LaneMode,
    Mode,
    Notify,
    Op,
    Operand,
    Routine,
    Source,
    Space,
    Stream,
    Switch,
    SwitchKind,
    VectorOp,
    Wait,
)
from backend_rngd.machine import load_machine
from runtime_sim.event_core import Rates, Resources, execute
from runtime_sim.functional import Card, Unit
from runtime_sim.runtime import Device
from runtime_sim.timing import simulate
from runtime_sim.topology import Topology


def best(run: Callable[[], object], repeat: int = 5) -> float:
    """Seconds of the fastest of `repeat` runs after one that warms up."""
    run()
    times: list[float] = []
    for _ in range(repeat):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def event_loop(n: int = 1_000_000, units: int = 8) -> dict[str, float]:
    """A random program: a third of the instructions in each context, most of them waiting for a recent one."""
    rng = np.random.default_rng(0)
    key = rng.integers(0, 3 * units, n)
    queue = np.argsort(key, kind="stable")
    start = np.searchsorted(key[queue], np.arange(3 * units + 1))
    need = np.zeros((n, 3), np.int64)
    for unit in range(units):
        mine = key // 3 == unit
        for c in range(3):
            before = np.cumsum(key == 3 * unit + c)
            waits = rng.random(int(mine.sum())) < 0.4
            need[mine, c] = np.where(waits, np.maximum(before[mine] - 3, 0), 0)
    # 4,096 different instructions, a third of them transfers; those of the DMA context are drawn from the transfers.
    costs = 4096
    transfer = np.arange(costs) % 3 == 2
    number = rng.integers(0, costs // 3, n) * 3 + np.where(key % 3 == 2, 2, rng.integers(0, 2, n))
    fixed = np.where(transfer, 500.0, rng.integers(50, 2000, costs))
    work = np.where(transfer, rng.integers(100, 4000, costs).astype(np.float64), 0.0)
    demand = np.where(transfer, 256.0, 0.0)
    vector = ~transfer & (rng.random(costs) < 0.3)
    rates = Rates(fixed, work, demand, vector, np.zeros(costs, np.bool_))
    uses = np.concatenate([[0], np.cumsum(transfer)])
    pool = np.zeros(int(transfer.sum()), np.int64)
    resources = Resources(uses, pool, np.ones(len(pool)), np.array([1536.0]), np.zeros(1, np.int64))

    def run() -> None:
        times = execute(units, start, queue, need, number, rates, resources, jit=True)
        assert times.completed == n

    seconds = best(run, 3)
    return {"instructions": n, "seconds": seconds, "instructions_per_second": n / seconds}


def layers_stream(units: int, layers: int, instructions: int) -> Stream:
    """Calls of a block: weights are loaded ahead, passes use them, and the sum over all units follows twice."""
    weights = Dma(Endpoint(Space.HBM, 0, 1), Endpoint(Space.DM, 0), ((64, 1 << 16, DM_SLICE_STRIDE),), 4096)
    work = Exec(64, Fetch(0, ((4096, 4),), Dtype.F32, 8), Commit(1 << 17, ((4096, 4),), Dtype.F32, 8))
    gather = Dma(
        Endpoint(Space.PEER_DM, 0, 63),
        Endpoint(Space.DM, 1 << 18),
        ((64, DM_SLICE_STRIDE, DM_SLICE_STRIDE), (min(units, 8), UNIT_STRIDE, 128)),
        128,
    )
    body: list[Instruction] = []
    done = [0, 0]
    for half in range(2):
        for _ in range(instructions // 4):
            body.append(Instruction(Context.DMA, After(main=max(0, done[0] - 4), enter=False), weights))
            done[1] += 1
            body.append(Instruction(Context.MAIN, After(dma=done[1]), work))
            done[0] += 1
        body.append(Instruction(Context.DMA, After(main=done[0]), Notify(0, 0, ((units, 1),), half)))
        body.append(Instruction(Context.DMA, After(), Wait(half, units - 1)))
        body.append(Instruction(Context.DMA, After(), gather))
        done[1] += 3
        body.append(Instruction(Context.MAIN, After(dma=done[1]), work))
        done[0] += 1
    calls = tuple(Instruction(Context.CONTROL, After(), Call(1, ())) for _ in range(layers))
    return Stream(0, 64, (Routine("main", calls), Routine("block", tuple(body))), ("benchmark",))


def units(number: int, layers: int, instructions: int) -> dict[str, float]:
    """Time a group of `number` units, `instructions` a layer and unit."""
    machine = load_machine(mode="silicon")
    stream = layers_stream(number, layers, instructions)
    topology = Topology.of(machine, number)
    first = {63: tuple(u // 8 * 8 * UNIT_STRIDE for u in range(number))}  # of the own card
    out: dict[str, float] = {}
    cycles: list[float] = []
    for name, fold in (("once", True), ("each", False)):

        def run(fold: bool = fold) -> None:
            cycles.append(simulate(stream, machine, topology=topology, launch=first, fold=fold).cycles)

        out[f"{name}_seconds"] = best(run, 2)
    assert max(cycles) - min(cycles) <= 1e-9 * max(cycles), cycles
    return {"units": number, "layers": layers, "instructions": float(number * layers * instructions), **out}


def million() -> dict[str, float]:
    """One million instructions in calls of a block, on eight equal units, from the stream to the result."""
    machine, number = load_machine(mode="silicon"), 8
    stream, topology = layers_stream(number, 167, 6000), Topology.of(machine, number)
    first = {63: tuple(u // 8 * 8 * UNIT_STRIDE for u in range(number))}
    executed: list[int] = []

    def run() -> None:
        executed.append(len(simulate(stream, machine, topology=topology, launch=first).flat))

    seconds = best(run, 3)
    begun = time.process_time()
    run()
    return {"instructions": executed[0], "seconds": seconds, "cpu_seconds": time.process_time() - begun, "target": 0.5}


def llama(directory: Path) -> dict[str, dict[str, float]]:
    """Llama-3.1-8B at TP 8: builds decode and prefill without weights, then times their timing, warm and cold."""
    config, out = Path(__file__).parents[1] / "tests" / "configs" / "llama-3.1-8b", directory / "llama"
    rngdc = [sys.executable, "-c", "import sys; from rngdc.cli import main; sys.exit(main())"]
    build = ["build", str(config), str(out), "--weights", "none", "-tp", "8", "-pb", "1,1024", "-db", "1,1024"]
    subprocess.run([*rngdc, *build], check=True, capture_output=True)
    found: dict[str, dict[str, float]] = {}
    opened = open_artifact(out)
    device = Device(opened, "silicon")
    topology = device.system.topology
    for bucket in opened.buckets:
        stream = opened.stream(bucket)
        cycles: list[float] = []

        def run(fold: bool = True, stream: Stream = stream, b: Bucket = bucket, cycles: list[float] = cycles) -> None:
            result = simulate(stream, device.machine, topology=topology, launch=b.launch, fold=fold)
            cycles.append(result.cycles)

        seconds = best(run, 3)
        begun = time.process_time()
        run()
        cpu = time.process_time() - begun
        same = len(set(cycles)) == 1
        run(fold=False)
        found[bucket.phase] = {
            "seconds": seconds, "cpu_seconds": cpu, "target": 1.0 if bucket.phase == "decode" else 3.0,
            "cycles": cycles[0], "cycles_a_cpu_second": cycles[0] / cpu, "two_runs_alike": same,
            "every_unit_alike": cycles[-1] == cycles[0],
        }  # fmt: skip
    begun = time.perf_counter()
    subprocess.run([*rngdc, "simulate", str(out)], check=True, capture_output=True)
    found["cold_command"] = {"seconds": time.perf_counter() - begun, "target": 10.0}
    return found


def passes(op: Exec) -> float:
    """Seconds of one pass on a unit of 64 slices with random contents."""
    unit = Unit(Card(load_machine(), 1 << 20), 64, checks=False)
    rng = np.random.default_rng(0)
    unit.dm.bytes[:] = rng.integers(0, 0x3F, unit.dm.bytes.size, np.uint8)
    unit.trf.bytes[:] = rng.integers(0, 0x3F, unit.trf.bytes.size, np.uint8)
    if op.switch is None:
        unit.trf.grid[...] = unit.trf.grid[0]
    stream = Stream(0, 64, (Routine("main", (Instruction(Context.MAIN, After(), op, 0),)),), ("benchmark",))
    return best(lambda: unit.run(stream))


def stream_weights() -> dict[str, float]:
    """64 slices x 64 rows of 1,024 weights against one token in TRF."""
    rows, k = 64, 1024
    contract = Contract(4, 2, 0, ((rows, 0, 0), (k // 32, 64, REDUCE)), 32, 5, LaneMode.INTERLEAVED)
    commit = Commit(1 << 18, ((rows * 4, 2),), Dtype.BF16, 4)
    seconds = passes(Exec(64, Fetch(0, ((rows * k, 2),), Dtype.BF16, 32), commit, None, contract))
    return {"seconds": seconds, "weight_bytes_per_second": 64 * rows * k * 2 / seconds}


def stationary_weights() -> dict[str, float]:
    """512 tokens of 1,024 features, eight a slice, all to all, against 1,024 channels."""
    local, k = 8, 1024
    packets = k // 32
    loops = ((local, 0, 0), (packets, 64, REDUCE), (64, 0, 0), (2, k * 2, BROADCAST))
    contract = Contract(8, 2, 0, loops, 32, 5, LaneMode.INTERLEAVED)
    commit = Commit(1 << 18, ((local * 64 * 16, 2),), Dtype.BF16, 8)
    switch = Switch(SwitchKind.BROADCAST01, 1, 64, local * packets)
    seconds = passes(Exec(64, Fetch(0, ((local * k, 2),), Dtype.BF16, 32), commit, switch, contract))
    return {"seconds": seconds, "macs_per_second": 512 * 1024 * 1024 / seconds}


def vector() -> dict[str, float]:
    """Eight rows of 2,048 elements a slice: scale, exp, divide, add."""
    n = 8 * 2048
    ops = (
        VectorOp(Alu.FP_MUL0, Op.MUL, Mode.STREAM_OPERAND, Operand(Source.CONST, 0.5)),
        VectorOp(Alu.FP_DIV, Op.DIV, Mode.STREAM_OPERAND, Operand(Source.VRF, 0.0, 0, ((8, 0), (2048, 4)))),
        VectorOp(Alu.CLIP_ADD, Op.ADD, Mode.STREAM_OPERAND, Operand(Source.CONST, 1.0)),
        VectorOp(Alu.CLIP_MAX, Op.MAX, Mode.STREAM_OPERAND, Operand(Source.CONST, 0.0)),
    )
    fetch = Fetch(0, ((n, 2),), Dtype.BF16, 8, Dtype.F32)
    seconds = passes(Exec(64, fetch, Commit(1 << 18, ((n, 2),), Dtype.BF16, 8), None, None, ops))
    return {"seconds": seconds, "elements_per_second": 64 * n / seconds}


def artifact(path: str) -> dict[str, float]:
    """Whole programs of a decoder."""
    opened = open_artifact(path)
    device = Device(opened)
    device.load()
    out: dict[str, float] = {}
    prefill = max((b for b in opened.buckets if b.phase == "prefill"), key=lambda b: b.input_length)
    decode = next(b for b in opened.buckets if b.phase == "decode")
    for name, bucket, repeat in (("prefill", prefill, 2), ("decode", decode, 5)):
        inputs = {port.name: np.zeros(port.shape, np.int32) for port in bucket.inputs}
        out[f"{name}_seconds"] = best(lambda bucket=bucket, inputs=inputs: device.run(bucket, inputs), repeat)
        before = time.process_time()
        device.run(bucket, inputs)
        out[f"{name}_cpu_seconds"] = time.process_time() - before
        out[f"{name}_timing_seconds"] = best(lambda bucket=bucket: Device(opened).time(bucket), 2)
    out["decode_tokens_per_second"] = decode.batch / out["decode_seconds"]
    return out


def main() -> None:
    """Run everything and print JSON."""
    with tempfile.TemporaryDirectory() as directory:
        targets = {"million": million(), **llama(Path(directory))}
    results: dict[str, object] = {
        "targets": targets,
        "event_loop": event_loop(),
        "units_8": units(8, 32, 6000),
        "units_32": units(32, 80, 2000),
        "stream_weights": stream_weights(),
        "stationary_weights": stationary_weights(),
        "vector": vector(),
    }
    if len(sys.argv) > 1:
        results["artifact"] = artifact(sys.argv[1])
    json.dump(results, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
