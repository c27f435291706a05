"""What the commands compute and report, on a small model."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from backend_rngd.artifact import open_artifact
from backend_rngd.isa.text import parse_stream
from ir.interpreter import run as interpret
from ir.text import parse_module
from runtime_sim.runtime import Device
from tests.cli.conftest import Command
from tests.cli.small_models import write_model
from tests.cli.test_build_problems import refused

ROOT = Path(__file__).parents[2]


def reference_tokens(artifact: Path, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens by the reference kernels on the captured module, one full pass a token."""
    opened = open_artifact(artifact)
    module = parse_module(opened.text("ir/model.mlir"))
    tokens = list(prompt)
    for _ in range(count):
        arguments: dict[str, np.ndarray] = {
            "input_ids": np.array([tokens], np.int32),
            "position_ids": np.arange(len(tokens), dtype=np.int32)[None],
        }
        for cache in opened.manifest.caches:
            arguments[cache.name] = np.zeros((1, cache.heads, cache.capacity, cache.width), np.float32).astype(
                "bfloat16"
            )
        logits = interpret(module, arguments, opened.weight)["logits"]
        tokens.append(int(np.argmax(logits[0, -1].astype(np.float32))))
    return tokens[len(prompt) :]


def test_run_gives_the_tokens_of_the_model(rngdc: Command, artifact: Path) -> None:
    ran = rngdc(
        "run", artifact, "--prompt", "w5 w17 w40", "--max-tokens", "6", "--json", "-", "--ignore-eos", "--strict"
    )
    assert ran.status == 0, ran.err
    report = ran.json
    assert report["prompt_ids"] == [5, 17, 40]
    assert report["token_ids"] == reference_tokens(artifact, [5, 17, 40], 6)
    assert report["text"] == " ".join(f"w{t}" for t in report["token_ids"] if t > 2)
    assert 0 < report["tpot_us"] < 1e4
    assert 0 < report["ttft_us"] < 1e4
    simulated = {b["phase"]: b["time_us"] for b in rngdc("simulate", artifact, "--json", "-").json["buckets"]}
    assert report["ttft_us"] == pytest.approx(simulated["prefill"])
    assert report["tpot_us"] == pytest.approx(simulated["decode"])
    assert [p["runs"] for p in report["programs"]] == [1, 5]
    assert report["seconds"] == pytest.approx(sum(p["runs"] * p["time_us"] for p in report["programs"]) / 1e6)


def test_prompts_from_file_ids_and_chat(rngdc: Command, artifact: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("w5 w17 w40", "utf-8")
    ids = [
        rngdc("run", artifact, *arguments, "--max-tokens", "2", "--json", "-").json
        for arguments in (["--prompt-file", file], ["--prompt-ids", "5,17,40"])
    ]
    assert ids[0] == ids[1]
    chat = rngdc("run", artifact, "--prompt", "w5", "--chat", "--max-tokens", "1", "--json", "-").json
    assert chat["prompt_ids"] == [1, 5, 9]
    assert chat["tpot_us"] is None


def test_a_stop_token_ends_the_text(rngdc: Command, artifact: Path, tmp_path: Path) -> None:
    free = rngdc("run", artifact, "--prompt-ids", "5,17,40", "--max-tokens", "6", "--ignore-eos", "--json", "-").json
    stop = free["token_ids"][2]
    model = write_model(tmp_path / "m", eos_token_id=[99999, stop])
    assert rngdc("build", model, tmp_path / "out", "-pb", "1,16", "-db", "2,32", "-tp", "1").status == 0
    report = rngdc("run", tmp_path / "out", "--prompt-ids", "5,17,40", "--max-tokens", "6", "--json", "-").json
    assert report["token_ids"] == free["token_ids"][: free["token_ids"].index(stop) + 1]
    assert report["finish"] == "eos"


def test_prompts_that_fit_no_bucket(rngdc: Command, artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Device, "load", lambda *_: pytest.fail("weights were loaded"))
    long = ",".join(["5"] * 17)
    refused(rngdc("run", artifact, "--prompt-ids", long), "has 17 tokens", "holds 16", "-pb 1,17", "32 are asked for")
    refused(rngdc("run", artifact, "--prompt-ids", "500"), "token ids [500]", "ids 0 to 127")
    refused(rngdc("run", artifact, "--prompt", ""), "is empty")
    refused(rngdc("run", artifact, "--prompt-ids", "1,x"), "'x'")
    refused(rngdc("run", artifact), "no prompt was given")
    refused(rngdc("run", artifact, "--prompt", "a", "--prompt-ids", "1"), "more than one prompt")
    refused(rngdc("run", artifact, "--prompt-file", artifact / "nope"), "cannot be read")
    refused(rngdc("run", artifact, "--prompt", "w3", "--max-tokens", "0"), "0 tokens")
    refused(rngdc("run", artifact, "--prompt", "w3", "--mode", "fast"), "--mode fast")


def test_copied_weights_need_no_other_file(rngdc: Command, model: Path, tmp_path: Path, artifact: Path) -> None:
    source = write_model(tmp_path / "m")
    out = tmp_path / "out"
    assert rngdc("build", source, out, "-pb", "1,16", "-db", "2,32", "-tp", "1", "--weights", "copy").status == 0
    for path in sorted(source.rglob("*")):
        path.unlink()
    moved = tmp_path / "moved"
    out.rename(moved)
    arguments = ("--prompt-ids", "5,17", "--max-tokens", "3", "--json", "-")
    assert rngdc("run", moved, *arguments).json["token_ids"] == rngdc("run", artifact, *arguments).json["token_ids"]


def test_random_weights_follow_the_seed(rngdc: Command, tmp_path: Path) -> None:
    model = write_model(tmp_path / "m", weights=False)
    arguments = ("--prompt-ids", "5,17", "--max-tokens", "4", "--json", "-", "--ignore-eos")
    found: list[list[int]] = []
    for i, mode in enumerate(("random:3", "random:3", "random:4")):
        out = tmp_path / f"out{i}"
        assert rngdc("build", model, out, "-pb", "1,8", "-db", "1,16", "-tp", "1", "--weights", mode).status == 0
        found.append(rngdc("run", out, *arguments).json["token_ids"])
    assert found[0] == found[1] == reference_tokens(tmp_path / "out0", [5, 17], 4)
    assert found[0] != found[2]


def test_no_weights_is_for_timing_only(rngdc: Command, tmp_path: Path) -> None:
    model = write_model(tmp_path / "m", weights=False)
    out = tmp_path / "out"
    assert rngdc("build", model, out, "-db", "1,16", "--weights", "none").status == 0
    assert rngdc("simulate", out).status == 0
    refused(rngdc("run", out, "--prompt-ids", "1"), "no weights")
    refused(rngdc("check", out), "no weights")


def test_simulate_report(rngdc: Command, artifact: Path) -> None:
    report = rngdc("simulate", artifact, "--json", "-", "--mode", "documented").json
    assert report["mode"] == "documented"
    assert report["clock_ghz"] == 1.0
    assert [b["name"] for b in report["buckets"]] == ["prefill_b1_s16_kv16", "decode_b2_kv32"]
    for b in report["buckets"]:
        assert {"phase", "batch", "input_length", "attention_size", "instructions", "mac_utilization"} <= set(b)
        assert b["time_us"] == pytest.approx(b["cycles"] / report["clock_ghz"] / 1e3)
        assert b["hbm_bytes_read"] > 2 * 2 * (3 * 96 * 64 + 2 * 64 * 64)  # at least the layers' weights
        assert b["hbm_bytes_written"] > 0
        assert 0 < b["mac_utilization"] < 1
        assert 0 < b["hbm_utilization"] < 1
        assert set(b["engines"]) == {"main", "sub", "dma", "vector"}
        assert all(0 <= share <= 1 for share in b["engines"].values())
        names = ["prepare", "embed", "model.layers.0", "model.layers.1", "head"]
        assert [layer["name"] for layer in b["layers"]] == names
        assert sum(layer["cycles"] for layer in b["layers"]) == pytest.approx(b["cycles"])
        assert b["collective_share"] == 0
        assert b["bounds"]["lower"] <= b["cycles"] <= b["bounds"]["upper"]
        low, high = b["energy_per_token_joules"]
        assert (
            0 < 38 * b["time_us"] / 1e6 <= low * b["batch"] * b["input_length"] < high * b["batch"] * b["input_length"]
        )
    silicon = rngdc("simulate", artifact, "--json", "-", "--bucket", "decode_b2_kv32").json
    assert silicon["mode"] == "silicon"  # the default
    assert silicon["buckets"][0]["cycles"] > report["buckets"][1]["cycles"]  # issue and start-up cost time


@pytest.mark.parametrize("name", ["trace.json", "trace.pftrace"])
def test_trace(rngdc: Command, artifact: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    ran = rngdc("simulate", artifact, "--bucket", "decode_b2_kv32", "--trace", path)
    assert ran.status == 0, ran.err
    data = path.read_bytes()
    text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8", "replace")
    assert "model.layers.1" in text
    assert "q_proj" in text
    refused(rngdc("simulate", artifact, "--trace", path), "--trace with 2 buckets", "--bucket prefill_b1_s16_kv16")


def test_check_agrees(rngdc: Command, artifact: Path) -> None:
    ran = rngdc("check", artifact, "--json", "-")
    assert ran.status == 0, ran.out + ran.err
    report = ran.json
    assert report["agrees"]
    for bucket in report["buckets"]:
        assert bucket["passes"]["agrees"]
        assert bucket["streams"]["agrees"]
        assert bucket["streams"]["compared"] > 30
        assert bucket["streams"]["results"]["logits"]["close"]


def test_check_names_the_operation_at_fault(artifact: Path) -> None:
    """A wrong function in the MLP is found there, not where it shows."""
    from dataclasses import replace

    from backend_rngd.isa.descriptors import Exec, Op
    from rngdc.check import check

    opened = open_artifact(artifact)
    bucket = opened.buckets[0]
    stream = opened.stream(bucket)
    routines = list(stream.routines)
    number = next(i for i, r in enumerate(routines) if r.name == "block_0")
    instructions = list(routines[number].instructions)
    at = next(i for i, x in enumerate(instructions) if any(v.op == Op.SIGMOID for v in getattr(x.what, "vector", ())))
    what = instructions[at].what
    assert isinstance(what, Exec)
    vector = tuple(replace(v, op=Op.TANH) if v.op == Op.SIGMOID else v for v in what.vector)
    instructions[at] = replace(instructions[at], what=replace(what, vector=vector))
    routines[number] = replace(routines[number], instructions=tuple(instructions))
    opened._streams[bucket.name] = replace(stream, routines=tuple(routines))
    device = Device(opened)
    device.load()
    report = check(device, [bucket])
    assert not report.agrees
    first = report.buckets[0].streams.first
    assert first is not None
    assert first.calls == ("main", "block_0[0]")
    assert first.path == "mlp"
    assert "silu" in first.op


def test_inspect(rngdc: Command, artifact: Path) -> None:
    report = rngdc("inspect", artifact, "--json", "-").json
    assert report["model"]["architecture"] == "LlamaForCausalLM"
    assert report["buckets"][1]["inputs"]["input_ids"] == ["i32", 2, 1]
    assert report["buckets"][1]["outputs"]["logits"][1:] == [2, 1, 128]
    text = rngdc("inspect", artifact)
    assert text.status == 0
    assert "decode_b2_kv32" in text.out


def test_disasm_assembles_to_the_same_stream(rngdc: Command, artifact: Path) -> None:
    ran = rngdc("disasm", artifact, "--bucket", "decode_b2_kv32", "--pe", "0")
    opened = open_artifact(artifact)
    assert parse_stream(ran.out) == opened.stream(opened.bucket("decode_b2_kv32"))
    refused(rngdc("disasm", artifact), "no bucket was named")
    refused(rngdc("disasm", artifact, "--bucket", "x"), "bucket 'x'", "prefill_b1_s16_kv16")
    refused(rngdc("disasm", artifact, "--bucket", "decode_b2_kv32", "--pe", "1"), "--pe 1")


def test_dumps_can_be_continued(rngdc: Command, model: Path, tmp_path: Path) -> None:
    dumps = tmp_path / "dumps"
    arguments = ("-pb", "1,8", "-db", "1,16", "--dump-ir", dumps)
    assert rngdc("build", model, tmp_path / "out", *arguments).status == 0
    files = sorted(p.relative_to(dumps).as_posix() for p in dumps.rglob("*.mlir"))
    assert "model/00-input.mlir" in files
    assert "model/01-simplify.mlir" in files
    assert any(f.startswith("prefill_b1_s8_kv8/") and f.endswith("-rngd-schedule.mlir") for f in files)
    middle = next(f for f in files if f.startswith("model/02"))
    command, last = (dumps / middle).read_text("utf-8").splitlines()[0], max(f for f in files if f.startswith("model/"))
    pipeline = command.split("'")[1]
    continued = rngdc("opt", "-p", pipeline, dumps / middle)
    assert continued.status == 0, continued.err
    assert continued.out.split("\n", 1)[1].strip().endswith((dumps / last).read_text("utf-8").strip()[-200:])


def test_print_pipeline(rngdc: Command, model: Path, tmp_path: Path) -> None:
    ran = rngdc("build", model, tmp_path / "out", "--print-pipeline")
    assert ran.status == 0
    assert "fuse-elementwise" in ran.out
    assert "rngd-schedule" in ran.out
    assert "plan-tp{size=4" in ran.out
    assert "partition" in ran.out
    assert "plan-tp" not in rngdc("build", "--print-pipeline", "-tp", "1").out
    assert not (tmp_path / "out").exists()


def test_opt_problems(rngdc: Command, artifact: Path) -> None:
    refused(rngdc("opt", "-p", "nonsense", artifact / "ir" / "model.mlir"), "nonsense")
    refused(rngdc("opt", artifact / "ir" / "nowhere.mlir"), "nowhere.mlir")


@pytest.mark.parametrize("command", ["build", "run", "simulate", "check", "inspect", "disasm"])
def test_help_has_examples(rngdc: Command, command: str) -> None:
    ran = rngdc(command, "--help")
    assert ran.status == 0
    assert "Examples" in ran.out
    assert f"rngdc {command} " in ran.out


def test_json_into_a_file(rngdc: Command, artifact: Path, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    ran = rngdc("simulate", artifact, "--json", path)
    assert json.loads(path.read_text("utf-8"))["buckets"]
    assert "prefill_b1_s16_kv16" in ran.out  # people still get the table
    refused_io = rngdc("simulate", artifact, "--json", tmp_path / "no" / "such")
    assert refused_io.status == 2
    assert "Traceback" not in refused_io.err


BLOCKED = """
import sys
from importlib.abc import Loader
from importlib.machinery import PathFinder
class Raising(Loader):
    def create_module(self, spec):
        raise ImportError(spec.name + " is blocked")
    def exec_module(self, module):
        pass
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names!r}:
            spec = PathFinder.find_spec(name, path)
            if spec is not None:
                spec.loader = Raising()
            return spec
sys.meta_path.insert(0, Blocked())
from rngdc.cli import main
main(sys.argv[1:])
"""
NO_TORCH = ("torch", "transformers")
ONLY_RUNTIME = (*NO_TORCH, "xdsl", "frontend", "passes")


def test_the_block_works() -> None:
    command = [sys.executable, "-c", BLOCKED.format(names=("typer",))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)
    assert "typer is blocked" in done.stderr


@pytest.mark.parametrize(
    ("blocked", "arguments"),
    [
        (ONLY_RUNTIME, ["--help"]),
        (ONLY_RUNTIME, ["simulate", "OUT"]),
        (ONLY_RUNTIME, ["inspect", "OUT"]),
        (ONLY_RUNTIME, ["disasm", "OUT", "--bucket", "decode_b2_kv32"]),
        (ONLY_RUNTIME, ["run", "OUT", "--prompt", "w5 w6", "--max-tokens", "2"]),
        (NO_TORCH, ["check", "OUT", "--bucket", "prefill_b1_s16_kv16"]),
    ],
)
def test_what_does_not_capture_does_without_torch(
    artifact: Path, blocked: tuple[str, ...], arguments: list[str]
) -> None:
    arguments = [str(artifact) if a == "OUT" else a for a in arguments]
    command = [sys.executable, "-c", BLOCKED.format(names=blocked), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
