"""Wrong inputs, one a test: options, config.json, weights, tokenizer, YAML files, places to write to.

Every one is refused with status 2 and a message that says what, why and what to do; nothing is written, nothing stays
beside the output, and the next build takes the same cache.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ir.weights import safetensors_refs
from tests.cli.conftest import Command, Ran
from tests.cli.small_models import CONFIG, write_model
from tests.cli.test_workers import ROOT, files

SIZES = ("-pb", "1,8", "-db", "1,16", "-tp", "1")
NAN, INF = float("nan"), float("inf")
Change = Callable[[Path], object]


def refused_cleanly(ran: Ran, out: Path, *texts: str) -> None:
    """Status 2, every problem with a fix, all of `texts`, no traceback, and nothing at or beside the output."""
    assert ran.status == 2, ran.err
    said = " ".join(ran.err.split())
    for text in texts:
        assert text in said, ran.err
    assert ran.err.count("error:") == ran.err.count("fix:") > 0, ran.err
    assert "Traceback" not in ran.err and "internal error" not in ran.err, ran.err
    if out.parent.is_dir():
        assert list(out.parent.iterdir()) == [], "something was left"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where the artifact would be: alone in its directory."""
    (tmp_path / "place").mkdir()
    return tmp_path / "place" / "out"


# Options -------------------------------------------------------------------------------------------------------------
OPTIONS: list[tuple[str, list[str]]] = [
    ("-pb 1", ["'1' cannot be understood", "-pb 1,512"]),
    ("-pb 1,2,3", ["'1,2,3' cannot be understood"]),
    ("-pb a,b", ["'a,b' cannot be understood"]),
    ("-pb 1,-8", ["'1,-8' cannot be understood"]),
    ("-db 0,8", ["-db '0,8'", "positive"]),
    ("-db 1;8", ["-db '1;8'"]),
    ("-db 2,1", ["-db 2,1 is too short"]),
    ("-pb 1,65", ["-pb 1,65 is too long", "64 positions"]),
    ("-db 1,99999999999999999999", ["too long", "64 positions"]),
    ("-pb 1,32", ["longer than every decode bucket", "-db 1,32"]),
    ("--max-seq-len-to-capture 0", ["a sequence has tokens"]),
    ("--max-seq-len-to-capture 65", ["the model has 64 positions"]),
    ("--max-model-len 60", ["no bucket holds", "-db 1,60"]),
    ("--prefill-chunk-size 0", ["a chunk has tokens"]),
    ("--prefill-chunk-size 65", ["at most", "--max-seq-len-to-capture"]),
    ("-tp 3", ["power of two"]),
    ("-tp -1", ["-tp -1"]),
    ("-tp 64", ["at most 4 cards"]),
    ("-pp 0", ["at least one stage"]),
    ("-pp 3", ["the model has 2 layers"]),
    ("--tensor-parallel-plan nowhere.yaml", ["no such file"]),
    ("--tensor-parallel-plan .", ["no such file"]),
    ("--weights some", ["--weights 'some'", "link, copy, random[:SEED] or none"]),
    ("--weights random:x", ["--weights 'random:x'"]),
    ("--revision main", ["only hub ids have revisions"]),
    ("--num-hidden-layers 0", ["a model has layers"]),
    ("--num-hidden-layers 3", ["the model has 2 layers"]),
    ("--name a\nb", ["--name"]),
    ("-O4", ["-O4", "no such optimisation level", "-O3"]),
    ("-O-1", ["-O-1"]),
    ("--device 0", ["--device 0", "number of cards"]),
    ("--device npu:0:0-2", ["npu:0:0-2", "cannot be fused"]),
    ("--device gpu:0", ["gpu:0", "npu:CARD"]),
    ("--device 1 -tp 8 -pp 2", ["needs 16 processing elements", "--device 2"]),
    ("--devices npu:0:0-3 -tp 8", ["needs 8 processing elements", "-tp 4"]),
    ("--device 2 -tp 32", ["needs 32 processing elements", "--device 4"]),
    ("--num-pipeline-builder-workers 0", ["at least one process"]),
    ("--num-compile-workers 9999", ["use 1 to 1024"]),
    ("--executor slurm", ["no such executor"]),
    ("--ray-address host:1", ["--executor ray"]),
    ("--cache-dir x --no-cache", ["leave one of them out"]),
    ("--additional-model-config num_hidden_layers", ["KEY=VALUE"]),
    ("--additional-model-config frob=1", ["unknown model configuration key 'frob'", "num_hidden_layers"]),
    ("--additional-model-config use_blockwise_compile=false", ["there is only true"]),
    ("--additional-model-config num_blocks_per_supertask=4", ["there is only 1"]),
    ("--additional-model-config seed=1 --weights copy", ["random weights"]),
    ("--quantization-artifact-path q", ["qformat.yaml", "compressed-tensors"]),
    ("--kv-cache-sharing-across-beams-config 4,128", ["greedy", "no beams"]),
    ("--kv-cache-sharing-across-beams-config x", ["two integers"]),
    ("--bundle-binaries", ["nothing to bundle", "--bundle-binaries"]),
    ("-dp 2", ["when an artifact is loaded"]),
]


@pytest.mark.parametrize(("flags", "texts"), OPTIONS, ids=[flags[:50] for flags, _ in OPTIONS])
def test_options(rngdc: Command, model: Path, out: Path, flags: str, texts: list[str]) -> None:
    refused_cleanly(rngdc("build", model, out, *SIZES, *flags.split(" ")), out, *texts)


@pytest.mark.parametrize("flags", [["-tp", "x"], ["-O", "fast"], ["--nonsense"], ["--num-layers", "1.5"], ["a", "b"]])
def test_options_that_the_parser_refuses(rngdc: Command, model: Path, out: Path, flags: list[str]) -> None:
    ran = rngdc("build", model, out, *flags)
    assert ran.status == 2
    assert flags[0] in ran.err and "Usage" in ran.err and "Traceback" not in ran.err
    assert list(out.parent.iterdir()) == []


def test_prefill_without_decode_and_the_reverse(rngdc: Command, model: Path, out: Path) -> None:
    refused_cleanly(rngdc("build", model, out, "-pb", "1,8"), out, "without a decode bucket")
    refused_cleanly(rngdc("build", model, out, "-db", "1,8"), out, "without a prefill bucket")


YAML = [
    ("tensor-paralel-size: 4", ["did you mean tensor-parallel-size?"]),
    ("weights: [a, b]", ["takes one value"]),
    ("- a", ["no mapping"]),
    ("a: [", ["is no YAML"]),
    ("name: a\n--name: b", ["given twice"]),
    ("prefill-buckets: [[1, 8, 9]]", ["'1,8,9' cannot be understood"]),
    ("additional-model-config: {frob: 1}", ["unknown model configuration key 'frob'"]),
]


@pytest.mark.parametrize(("text", "texts"), YAML)
def test_yaml_files(rngdc: Command, model: Path, tmp_path: Path, out: Path, text: str, texts: list[str]) -> None:
    (tmp_path / "build.yaml").write_text(text, "utf-8")
    refused_cleanly(rngdc("build", model, out, "--config", tmp_path / "build.yaml"), out, *texts)


# config.json ---------------------------------------------------------------------------------------------------------
REMOTE = {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.XForCausalLM"}
CONFIGS: list[tuple[dict[str, Any], list[str]]] = [
    ({"model_type": "nonesuch"}, ["unknown architecture", "supported are"]),
    ({"model_type": None}, ["unknown architecture"]),
    ({"model_type": "gptj"}, ["gptj is not supported", "AttentionInterface"]),
    ({"architectures": ["A", "B"]}, ["more than one architecture"]),
    ({"architectures": "LlamaForCausalLM"}, ["architectures", "must be a list"]),
    ({"architectures": ["LlamaForSequenceClassification"]}, ["another head would be left out"]),
    ({"rms_norm_eps": NAN}, ["rms_norm_eps is nan"]),
    ({"rms_norm_eps": -1.0}, ["rms_norm_eps is -1.0"]),
    ({"rms_norm_eps": "small"}, ["rms_norm_eps"]),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": INF}}, ["rope_parameters.rope_theta is inf"]),
    ({"rope_theta": 0}, ["rope_theta is 0"]),
    ({"hidden_size": -64}, ["hidden_size is -64"]),
    ({"hidden_size": 64.5}, ["hidden_size is 64.5"]),
    ({"vocab_size": None}, ["vocab_size is None"]),
    ({"num_hidden_layers": 0}, ["num_hidden_layers is 0"]),
    ({"num_hidden_layers": True}, ["num_hidden_layers is True"]),
    ({"num_attention_heads": "4"}, ["num_attention_heads is '4'"]),
    ({"num_attention_heads": 3}, ["multiple of the number of attention heads"]),
    ({"max_position_embeddings": 0}, ["max_position_embeddings is 0"]),
    ({"head_dim": 15}, ["even rotary dimension"]),
    ({"head_dim": 12}, ["multiples of 8"]),
    ({"hidden_act": "frob"}, ["'frob'"]),
    ({"dtype": "float4"}, ["dtype is 'float4'"]),
    ({"eos_token_id": ["x"]}, ["eos_token_id"]),
    ({"quantization_config": "int8"}, ["quantization_config is 'int8'"]),
    ({"quantization_config": {"quant_method": "gptq"}}, ["quantised (gptq)"]),
    ({"text_config": "x"}, ["text_config is 'x'"]),
    ({"model_type": "x", "auto_map": REMOTE}, ["its own Python code", "--trust-remote-code"]),
]


@pytest.mark.parametrize(("change", "texts"), CONFIGS, ids=[str(c)[:50] for c, _ in CONFIGS])
def test_configs(rngdc: Command, tmp_path: Path, out: Path, change: dict[str, Any], texts: list[str]) -> None:
    model = write_model(tmp_path / "m", weights=False)
    (model / "config.json").write_text(json.dumps(CONFIG | change), "utf-8")
    refused_cleanly(rngdc("build", model, out, *SIZES, "--weights", "none"), out, *texts)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"{", "cannot be read"),
        (b"[]", "not a JSON object"),
        (b"{}", "no model_type"),
        (b"\xff\xfe\0", "cannot be read"),
    ],
)
def test_configs_that_are_none(rngdc: Command, tmp_path: Path, out: Path, data: bytes, text: str) -> None:
    model = write_model(tmp_path / "m", weights=False)
    (model / "config.json").write_bytes(data)
    refused_cleanly(rngdc("build", model, out, "--weights", "none"), out, text)


@pytest.mark.parametrize(
    ("code", "text"),
    [(None, "configuration_x.py"), ("raise RuntimeError('boom')", "RuntimeError: boom"), ("def (:", "SyntaxError")],
)
def test_code_of_a_model_that_is_wrong(rngdc: Command, tmp_path: Path, out: Path, code: str | None, text: str) -> None:
    model = write_model(tmp_path / "m", weights=False)
    (model / "config.json").write_text(json.dumps(CONFIG | {"model_type": "x", "auto_map": REMOTE}), "utf-8")
    if code is not None:
        (model / "configuration_x.py").write_text(code, "utf-8")
        (model / "modeling_x.py").write_text("", "utf-8")
    ran = rngdc("build", model, out, *SIZES, "--weights", "none", "--trust-remote-code")
    refused_cleanly(ran, out, "the Python code of", text)


# Weights and tokenizer -----------------------------------------------------------------------------------------------
NORM = "model.norm.weight"


def header(change: Callable[[dict[str, Any]], Any]) -> Change:
    """Rewrite the header of a checkpoint."""

    def apply(model: Path) -> None:
        path = model / "model.safetensors"
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        text = json.dumps(change(json.loads(data[8 : 8 + length]))).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    return apply


def entry(**fields: Any) -> Change:
    return header(lambda h: h | {NORM: h[NORM] | fields})


def index(change: Callable[[dict[str, Any]], Any], name: str = "model-1.safetensors") -> Change:
    """Make a checkpoint of one shard with an index."""

    def apply(model: Path) -> None:
        (model / "model.safetensors").rename(model / name)
        listed = {r.name: name for r in safetensors_refs(model / name)}
        text = json.dumps({"weight_map": change(listed)})
        (model / "model.safetensors.index.json").write_text(text, "utf-8")

    return apply


def write(name: str, data: bytes) -> Change:
    return lambda model: (model / name).write_bytes(data)


def cut(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def twice(model: Path) -> None:
    shutil.copy(model / "model.safetensors", model / "a.safetensors")
    (model / "model.safetensors").rename(model / "b.safetensors")


DAMAGE: dict[str, tuple[Change, list[str]]] = {
    "no weights": (lambda m: (m / "model.safetensors").unlink(), ["has no *.safetensors", "--weights none"]),
    "pickle": (lambda m: (m / "model.safetensors").rename(m / "pytorch_model.bin"), ["pickled files can run code"]),
    "truncated": (cut, ["is truncated"]),
    "empty": (write("model.safetensors", b""), ["too short"]),
    "garbage": (write("model.safetensors", b"\x10" + b"\0" * 7 + b"x" * 100), ["not JSON"]),
    "long header": (write("model.safetensors", b"\xff" * 100), ["declares a header"]),
    "header is a list": (header(lambda h: [1]), ["not a JSON object"]),
    "entry is a number": (header(lambda h: h | {NORM: 3}), [NORM, "cannot be understood"]),
    "unknown type": (entry(dtype="Q4"), [NORM, "cannot be understood"]),
    "type of another kind": (entry(dtype="I16"), [f"weight {NORM} has another type", "i16"]),
    "another shape": (entry(shape=[8, 8]), [f"weight {NORM} has another shape", "[64]", "[8, 8]"]),
    "shape and bytes": (entry(shape=[65]), ["stores 128 bytes", "needs 130"]),
    "offsets": (entry(data_offsets="ab"), ["cannot be understood"]),
    "overlap": (entry(data_offsets=[0, 128]), ["in the same bytes"]),
    "missing tensor": (header(lambda h: {k: v for k, v in h.items() if k != NORM}), [f"weight {NORM} is missing"]),
    "two files": (twice, ["is there twice", "a.safetensors"]),
    "missing shard": (index(lambda w: w | {"x": "model-2.safetensors"}), ["1 of 2 weight files are missing"]),
    "entry not in the shard": (index(lambda w: w | {"frob": "model-1.safetensors"}), ["does not hold frob"]),
    "entry not in the index": (index(lambda w: {k: v for k, v in w.items() if k != NORM}), ["does not list", NORM]),
    "shard outside": (index(lambda w: w | {"x": "../x.safetensors"}), ["'../x.safetensors'"]),
    "shard is a number": (index(lambda w: w | {"x": 3}), ["gives 3"]),
    "no map in the index": (write("model.safetensors.index.json", b"{}"), ["no weight_map"]),
    "index is no JSON": (write("model.safetensors.index.json", b"{"), ["index.json cannot be read"]),
    "tokenizer": (write("tokenizer.json", b"{"), ["tokenizer.json cannot be read"]),
    "tokenizer of another kind": (write("tokenizer.json", b"{}"), ["no usable tokenizer", "beside config.json"]),
    "tokenizer's config": (write("tokenizer_config.json", b"{"), ["tokenizer_config.json cannot be read"]),
    "generation config": (write("generation_config.json", b"{"), ["generation_config.json cannot be read"]),
    "stop tokens": (write("generation_config.json", b'{"eos_token_id": "x"}'), ["eos_token_id is 'x'"]),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_checkpoints(rngdc: Command, tmp_path: Path, out: Path, name: str) -> None:
    damage, texts = DAMAGE[name]
    model = write_model(tmp_path / "m")
    damage(model)
    refused_cleanly(rngdc("build", model, out, *SIZES), out, *texts)


def test_models_that_are_none(rngdc: Command, tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").write_text("x", "utf-8")
    (tmp_path / "b.gguf").write_bytes(b"abcd")
    (tmp_path / "c.gguf").write_bytes(b"GGUF" + bytes(100))
    (tmp_path / "two").mkdir()
    for name in "ab":
        (tmp_path / "two" / f"{name}.gguf").write_bytes(b"x")
    monkeypatch.setattr("frontend.gguf_convert.cache_directory", lambda: tmp_path / "gguf")
    for model, text in (
        (tmp_path / "empty", "has no config.json"), (tmp_path / "nowhere", "does not exist"),
        (tmp_path / "a.txt", "a model is a directory"), (tmp_path / "b.gguf", "does not start with GGUF"),
        (tmp_path / "c.gguf", "transformers cannot read"), (tmp_path / "two", "not clear which one"),
        ("a/b/c", "neither a hub id nor a path"), ("nobody/nothing", "cannot be fetched"), ("", "neither a hub id"),
    ):  # fmt: skip
        refused_cleanly(rngdc("build", model, out), out, text)
    assert not list((tmp_path / "gguf").glob(".convert-*"))


# Places --------------------------------------------------------------------------------------------------------------
def test_outputs_that_cannot_be(rngdc: Command, model: Path, tmp_path: Path) -> None:
    """Nobody, not even root, can make a directory in a file; what is there stays."""
    (tmp_path / "file").write_text("mine", "utf-8")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine", "utf-8")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    before = sorted(tmp_path.rglob("*"))
    for place, flags, text in (
        ("file", (), "exists"), ("file", ("--overwrite",), "no artifact.json"), ("full", (), "exists"),
        ("full", ("--overwrite",), "no artifact.json"), ("empty", (), "exists"), ("link", (), "exists"),
        ("file/out", (), "is no directory"), ("x" * 300, (), "too long"),
    ):  # fmt: skip
        ran = rngdc("build", model, tmp_path / place, *SIZES, *flags)
        assert ran.status == 2 and text in ran.err and "fix:" in ran.err, ran.err
        assert "Traceback" not in ran.err
        assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "file").read_text("utf-8") == (tmp_path / "full" / "thesis.txt").read_text("utf-8") == "mine"


@pytest.mark.parametrize("flag", ["--build-report", "--json", "--dump-ir", "--cache-dir"])
def test_reports_that_cannot_be_written_are_found_before_the_work(
    rngdc: Command, model: Path, tmp_path: Path, out: Path, flag: str
) -> None:
    (tmp_path / "file").write_text("", "utf-8")
    ran = rngdc("build", model, out, *SIZES, flag, tmp_path / "file" / "report.json")
    refused_cleanly(ran, out, flag, "file")
    if flag in ("--build-report", "--json"):
        refused_cleanly(rngdc("build", model, out, *SIZES, flag, tmp_path), out, "it is a directory")


@pytest.mark.parametrize(("weights", "limit"), [("link", 2_000), ("copy", 20_000)])
def test_a_disk_that_is_full(rngdc: Command, model: Path, tmp_path: Path, out: Path, weights: str, limit: int) -> None:
    """The system refuses to write more than so many bytes of a file: the artifact's, or the cache's."""
    flags = (*SIZES, "--weights", weights, "--cache-dir", tmp_path / "cache")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        ran = rngdc("build", model, out, *flags)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    refused_cleanly(ran, out, "cannot be written", "larger files")
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file() and p.stat().st_size >= limit]
    assert list((tmp_path / "cache" / "unfinished").iterdir()) == []
    ran = rngdc("build", model, out, *flags)
    assert ran.status == 0 and "damaged" not in ran.err, ran.err


FILE_SYSTEM = """
set -e
mount -t tmpfs -o size={size} tmpfs "$1"
mkdir "$1/place" "$1/ro"
mount -t tmpfs -o ro tmpfs "$1/ro"
shift
"$@"; status=$?
exit $status
"""


def test_a_file_system_that_is_full_or_read_only(model: Path, tmp_path: Path) -> None:
    """The same on real ones, in a name space of their own."""
    (tmp_path / "fs").mkdir()
    probe = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", str(tmp_path / "fs")]
    if shutil.which("unshare") is None or subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("this system lets nobody mount a file system of their own")
    code = (
        "import sys, os; from pathlib import Path; from rngdc.cli import main\n"
        "fs, model = Path(sys.argv[1]), sys.argv[2]\n"
        "for out, text in ((fs / 'place' / 'out', 'full'), (fs / 'ro' / 'out', 'read-only')):\n"
        "    try: main(['build', model, str(out), *sys.argv[3:]])\n"
        "    except SystemExit as e: print(text, e.code, [p.name for p in out.parent.iterdir()])\n"
    )
    script = FILE_SYSTEM.format(size="96k")
    command = ["unshare", "-rm", "sh", "-c", script, "sh", str(tmp_path / "fs"), sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RNGDC_CACHE_DIR": str(tmp_path / "cache")}
    ran = subprocess.run(
        [*command, str(tmp_path / "fs"), str(model), *SIZES], env=environment, capture_output=True, text=True
    )
    assert ran.stdout.splitlines() == ["full 2 []", "read-only 2 []"], ran.stderr
    for text in ("No space left on device", "free space", "where you may write"):
        assert text in " ".join(ran.stderr.split()), ran.stderr


def test_weights_that_do_not_fit_are_found_before_the_work(
    rngdc: Command, model: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(model)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
    refused_cleanly(rngdc("build", model, out, *SIZES, "--weights", "copy"), out, "--weights copy", "are free")


def test_two_builds_into_the_same_output(rngdc: Command, model: Path, out: Path, tmp_path: Path) -> None:
    """One of them makes the artifact, the other says that it is there; whichever, it is whole."""
    assert rngdc("build", model, tmp_path / "alone", *SIZES).status == 0
    command = [sys.executable, "-c", "from rngdc.cli import main; main()", "build", str(model), str(out), *SIZES]
    running = [
        subprocess.Popen(
            command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        for _ in range(2)
    ]
    ends = [(p.communicate(timeout=100)[1].decode(), p.returncode) for p in running]
    assert sorted(code for _, code in ends) == [0, 2], ends
    for text, code in ends:
        assert code == 0 or ("exists" in text and "fix:" in text and "Traceback" not in text), text
    assert files(out) == files(tmp_path / "alone")
    assert [p.name for p in out.parent.iterdir()] == ["out"]


def test_an_output_that_appears_meanwhile(
    rngdc: Command, model: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is left alone without --overwrite, and replaced in one step with it."""
    import backend_rngd.artifact.store as store

    real = store.sha256

    def slow(path: Path) -> str:
        if not out.exists() and path.parent.parent == out.parent:
            out.mkdir()
            (out / "artifact.json").write_text("{}", "utf-8")
        return real(path)

    monkeypatch.setattr(store, "sha256", slow)
    ran = rngdc("build", model, out, *SIZES)
    assert ran.status == 2 and "another build has made it" in ran.err and "fix:" in ran.err, ran.err
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    assert (out / "artifact.json").read_text("utf-8") == "{}"
    assert rngdc("build", model, out, *SIZES, "--overwrite").status == 0
    assert (out / "artifact.json").stat().st_size > 1000
    assert [p.name for p in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("supported", [True, False])
def test_overwriting_is_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, supported: bool) -> None:
    """Whoever looks sees one of the two where the system can swap directories; everywhere they are swapped."""
    import backend_rngd.artifact.store as store

    if not supported:
        monkeypatch.setattr(store, "RENAME_EXCHANGE", 1 << 30)  # a flag that renameat2 does not know
    one, other = tmp_path / "one", tmp_path / "other"
    for path in (one, other):
        path.mkdir()
        (path / "name").write_text(path.name, "utf-8")
    missing, stop = list[int](), threading.Event()

    def look() -> None:
        while not stop.is_set():
            missing.extend([1] if not other.exists() else [])

    watcher = threading.Thread(target=look)
    watcher.start()
    for _ in range(201):
        assert store.exchange(one, other)
    stop.set()
    watcher.join()
    assert (other / "name").read_text("utf-8") == "one" and (one / "name").read_text("utf-8") == "other"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "other"]
    if supported:
        assert missing == []
    assert not store.exchange(one, tmp_path / "nowhere")
    assert (one / "name").exists()


def test_a_cache_that_is_damaged_everywhere(rngdc: Command, model: Path, tmp_path: Path, out: Path) -> None:
    """Entries that are cut, empty or of another one: noted, built again, and then fine."""
    cache = tmp_path / "cache"
    flags = (*SIZES, "--cache-dir", cache)
    assert rngdc("build", model, out, *flags).status == 0
    found = sorted(cache.rglob("*.rngdc"))
    assert len(found) == 6
    for i, path in enumerate(found):
        data = path.read_bytes()
        path.write_bytes([b"", data[: len(data) // 2], found[i - 1].read_bytes()][i % 3])
    for again in ("first", "second"):
        ran = rngdc("build", model, tmp_path / again, *flags)
        assert ran.status == 0, ran.err
        assert files(tmp_path / again) == files(out)
    assert "damaged" not in ran.err


def test_after_all_of_this_a_build_works(rngdc: Command, model: Path, out: Path) -> None:
    ran = rngdc("build", model, out, *SIZES)
    assert ran.status == 0, ran.err
    assert [p.name for p in out.parent.iterdir()] == ["out"]
