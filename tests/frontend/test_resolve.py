"""Finding models: local directories, hub ids (cache layout and a loopback server), and all problems at once."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from frontend.resolve import resolve_model
from ir.errors import UserError
from tests.frontend.loopback_hub import SHA, run_script, serving
from tests.frontend.tiny import make_config, save_model

ROOT = Path(__file__).parents[2]


def problems(*args: Any, **kwargs: Any) -> list[str]:
    """The problems that resolving raises, as texts."""
    with pytest.raises(UserError) as caught:
        resolve_model(*args, **kwargs)
    return [str(p) for p in caught.value.problems]


def edit_config(directory: Path, **changes: Any) -> None:
    """Change entries of config.json; None removes one."""
    file = directory / "config.json"
    config = json.loads(file.read_text("utf-8")) | changes
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}), "utf-8")


def test_resolving_imports_neither_torch_nor_transformers() -> None:
    script = (
        "import sys; from frontend.resolve import resolve_model; "
        "s = resolve_model(sys.argv[1], need_weights=False); print(s.model_type, s.max_positions); "
        "assert not {'torch', 'transformers'} & set(sys.modules), 'heavy import'"
    )
    config = ROOT / "tests" / "configs" / "llama-3.1-8b"
    done = subprocess.run([sys.executable, "-c", script, str(config)], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["llama", "131072"], done.stderr


def test_local_directory(tmp_path: Path) -> None:
    save_model("llama", tmp_path, torch.bfloat16)
    (tmp_path / "tokenizer.json").write_text("{}")
    source = resolve_model(tmp_path)
    assert (source.model_type, source.declared_dtype, source.compute_dtype) == ("llama", "bf16", "bf16")
    assert source.architecture_class == "LlamaForCausalLM"
    assert source.architecture.kind == "decoder"
    assert [f.name for f in source.weight_files] == ["model.safetensors"]
    assert [f.name for f in source.tokenizer_files] == ["tokenizer.json"]
    tensor = source.tensors["model.layers.0.mlp.up_proj.weight"]
    assert tensor.shape == (80, 48)
    assert tensor.nbytes == 80 * 48 * 2
    assert tensor.dtype == "bf16"


def test_relative_paths_start_with_a_dot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model("llama", tmp_path / "models" / "mine", torch.bfloat16)
    monkeypatch.chdir(tmp_path)
    assert resolve_model("./models/mine").model_type == "llama"
    assert "does not exist" in problems("./models/other")[0]
    assert "revision" in problems("./models/mine", revision="main")[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes_need_the_flag(dtype: torch.dtype, tmp_path: Path) -> None:
    save_model("llama", tmp_path, dtype)
    (text,) = problems(tmp_path)
    assert "--auto-bfloat16-cast" in text
    source = resolve_model(tmp_path, auto_bfloat16_cast=True)
    assert source.compute_dtype == "bf16"
    assert source.declared_dtype == ("f16" if dtype == torch.float16 else "f32")
    assert "compute dtype" in problems(tmp_path, compute_dtype="f64")[0]


def test_declared_dtype_without_weights(tmp_path: Path) -> None:
    make_config("llama").save_pretrained(tmp_path)
    edit_config(tmp_path, dtype=None, torch_dtype="float16")
    assert "--auto-bfloat16-cast" in problems(tmp_path, need_weights=False)[0]
    edit_config(tmp_path, torch_dtype="bfloat16")
    assert resolve_model(tmp_path, need_weights=False).declared_dtype == "bf16"


def test_missing_config_and_weights_are_reported_together(tmp_path: Path) -> None:
    texts = problems(tmp_path)
    assert any("no config.json" in t for t in texts)
    assert any("no *.safetensors" in t for t in texts)


def test_unknown_architecture_lists_the_supported_ones(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "frobnicate"}')
    texts = problems(tmp_path)
    assert len(texts) == 2, "the missing weights are reported as well"
    assert any("'frobnicate'" in t and "gemma2" in t and "qwen3" in t for t in texts)
    (tmp_path / "config.json").write_text("{}")
    assert any("no model_type" in t for t in problems(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "falcon"}')
    assert any("AttentionInterface" in t for t in problems(tmp_path))


def test_config_that_is_no_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    assert any("cannot be read" in t for t in problems(tmp_path, need_weights=False))
    (tmp_path / "config.json").write_text("[]")
    assert any("not a JSON object" in t for t in problems(tmp_path, need_weights=False))


def test_more_than_one_architecture(tmp_path: Path) -> None:
    save_model("llama", tmp_path, torch.bfloat16)
    edit_config(tmp_path, architectures=["LlamaForCausalLM", "LlamaModel"])
    assert "more than one architecture" in problems(tmp_path)[0]


def test_quantised_checkpoints_are_refused(tmp_path: Path) -> None:
    save_model("llama", tmp_path, torch.bfloat16)
    edit_config(tmp_path, quantization_config={"quant_method": "gptq"})
    assert "quantised (gptq)" in problems(tmp_path)[0]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b: b[:-100], "is truncated"),
        (lambda b: b[:5], "too short"),
        (lambda b: b[:200], "truncated or not one"),
        (lambda b: b"\xff" * 8 + b[8:], "truncated or not one"),
        (lambda b: b[:8] + b"x" + b[9:], "not JSON"),
        (lambda b: b.replace(b'"shape":[48]', b'"shape":[47]', 1), "its shape"),
    ],
)
def test_damaged_weights(damage: Any, message: str, tmp_path: Path) -> None:
    save_model("llama", tmp_path, torch.bfloat16)
    file = tmp_path / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    edit_config(tmp_path, model_type="frobnicate")
    texts = problems(tmp_path)
    assert any(message in t for t in texts), texts
    assert any("frobnicate" in t for t in texts), "all problems at once"


def test_missing_shard_and_pickled_weights(tmp_path: Path) -> None:
    model = save_model("llama", tmp_path / "a", torch.bfloat16)
    model.save_pretrained(tmp_path / "b", max_shard_size="30KB")
    shards = sorted((tmp_path / "b").glob("*.safetensors"))
    assert len(resolve_model(tmp_path / "b").weight_files) == len(shards)
    shards[1].unlink()
    assert any(shards[1].name in t for t in problems(tmp_path / "b"))
    (tmp_path / "a" / "model.safetensors").rename(tmp_path / "a" / "pytorch_model.bin")
    assert any("convert the model to safetensors" in t for t in problems(tmp_path / "a"))


def test_gguf_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"nothing of the kind")
    assert "not a GGUF file" in problems(tmp_path)[0]
    (tmp_path / "other.gguf").write_bytes(b"nothing")
    assert "2 .gguf files" in problems(tmp_path)[0]
    (tmp_path / "notes.txt").write_text("")
    assert "is a file" in problems(tmp_path / "notes.txt")[0]


# hub ids: the endpoint and the cache are read when huggingface_hub is imported, so each case runs in its own process

SCRIPT = """
import sys
from frontend.resolve import resolve_model
from ir.errors import UserError
try:
    s = resolve_model(sys.argv[1], revision=sys.argv[2] or None, need_weights=sys.argv[3] == "weights")
except UserError as error:
    print("ERROR", error)
else:
    print("OK", s.model_type, len(s.tensors), s.directory.name, *sorted(f.name for f in s.directory.iterdir()))
"""


def resolve_in_process(name: str, home: Path, revision: str = "", weights: str = "weights", **env: str) -> str:
    """Resolve a hub id in a fresh process with its own cache and endpoint."""
    return run_script(SCRIPT, name, revision, weights, home=home, **env)


def test_hub_id_from_the_cache_without_network(tmp_path: Path) -> None:
    repo = tmp_path / "hub" / "models--acme--tiny"
    save_model("qwen3", repo / "snapshots" / SHA, torch.bfloat16)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(SHA)
    out = resolve_in_process("acme/tiny", tmp_path, HF_HUB_OFFLINE="1")
    assert out.startswith("OK qwen3")
    assert SHA in out
    out = resolve_in_process("acme/other", tmp_path, HF_HUB_OFFLINE="1")
    assert out.startswith("ERROR model acme/other")
    assert "cache" in out


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """A loopback hub that serves acme/tiny; yields its address and the list of served files."""
    repositories = {"acme/tiny": tmp_path / "served", "acme/packed": tmp_path / "packed"}
    directory = repositories["acme/tiny"]
    save_model("mistral", directory, torch.bfloat16)
    repositories["acme/packed"].mkdir()
    (repositories["acme/packed"] / "model.Q4_1.gguf").write_bytes(b"not really")
    (directory / "README.md").write_text("not needed")
    (directory / "pytorch_model.bin").write_bytes(b"not needed")
    with serving(repositories) as found:
        yield found


def test_hub_id_from_a_server(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    address, served = hub
    out = resolve_in_process("acme/tiny", tmp_path / "home", weights="none", HF_ENDPOINT=address)
    assert out.startswith("OK mistral 0 ")
    assert "model.safetensors" not in served
    out = resolve_in_process("acme/tiny", tmp_path / "home", revision=SHA, HF_ENDPOINT=address)
    assert out.startswith("OK mistral")
    assert "model.safetensors" in served
    assert not {"README.md", "pytorch_model.bin"} & set(served)
    # Now it is in the cache and the server is not needed.
    assert resolve_in_process("acme/tiny", tmp_path / "home", HF_HUB_OFFLINE="1").startswith("OK mistral")
    out = resolve_in_process("acme/missing", tmp_path / "home", HF_ENDPOINT=address)
    assert out.startswith("ERROR model acme/missing was not found")
    assert "HF_TOKEN" in out


def test_gguf_on_the_hub(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    """A file of a repository, or a repository with nothing else; here it turns out to be no GGUF file."""
    address, served = hub
    for name in ("acme/packed", "acme/packed/model.Q4_1.gguf"):
        out = resolve_in_process(name, tmp_path / "home", HF_ENDPOINT=address)
        assert out.startswith("ERROR")
        assert "model.Q4_1.gguf is not a GGUF file" in out
    assert "model.Q4_1.gguf" in served


def test_names_that_are_neither_id_nor_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "b" / "c").mkdir(parents=True)
    assert "write ./a/b/c" in problems("a/b/c")[0]
    assert "hub ids are owner/name" in problems("x//y")[0]
