"""From a hub id or a path to a `ModelSource`: config, tokenizer, weights, dtype, all problems at once.

Nothing here imports torch or transformers (only converting a GGUF file does), so that bad input is refused at once.
A name that starts with `.`, `/` or `~` is a local path, anything else a Hugging Face hub id. The hub is reached through
huggingface_hub, so `HF_ENDPOINT`, `HF_HOME`, `HF_HUB_OFFLINE` and the usual token variables work.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from frontend import gguf_convert
from frontend.architectures import REFUSED, SUPPORTED, Architecture, supported_names
from frontend.checkpoint import TensorRange, find_weight_files, read_tensors
from frontend.config_check import DTYPES, check_config
from frontend.quantization import Quantization, read_quantization
from ir.errors import Problem, UserError

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.jinja",
)
_SMALL_PATTERNS = ["*.json", "*.txt", "*.model", "*.jinja"]


@dataclass(frozen=True)
class ModelSource:
    """A model that was found and looks usable; everything later stages need to know about where it comes from."""

    name: str
    directory: Path
    revision: str | None
    config: dict[str, Any]
    model_type: str
    architecture_class: str | None
    architecture: Architecture
    remote_code: bool
    tokenizer_files: tuple[Path, ...]
    weight_files: tuple[Path, ...]
    gguf_file: Path | None
    declared_dtype: str
    """Element type of the checkpoint: `bf16`, `f16`, `f32`, ..."""
    compute_dtype: str
    """Element type of the captured graph: `bf16`, or the one that was asked for explicitly."""
    tensors: dict[str, TensorRange] = field(repr=False)
    quantization: Quantization | None = None
    """How the weights of linear layers are stored, if not as numbers of the declared type."""
    trusted: bool = False
    """Whether Python code that comes with the model may run."""

    @property
    def max_positions(self) -> int | None:
        """The longest sequence the model's positions allow, if the config says so."""
        for key in ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length"):
            value = self.text_config.get(key)
            if isinstance(value, int):
                return value
        return None

    @property
    def text_config(self) -> dict[str, Any]:
        """The part of the config that describes the language model."""
        nested = self.config.get("text_config")
        return cast("dict[str, Any]", nested) if isinstance(nested, dict) else self.config


def resolve_model(
    id_or_path: str | os.PathLike[str],
    revision: str | None = None,
    trust_remote_code: bool = False,
    *,
    auto_bfloat16_cast: bool = False,
    need_weights: bool = True,
    compute_dtype: str | None = None,
) -> ModelSource:
    """Find a model and check it. Raises `UserError` with every problem found.

    `need_weights=False` accepts a directory that holds only `config.json` and downloads no weights.
    `auto_bfloat16_cast` accepts fp16 and fp32 checkpoints, to be computed in bf16. `compute_dtype` (`bf16` or `f32`)
    overrides the element type of the graph; f32 is for comparisons, not for the device.
    """
    name = os.fspath(id_or_path)
    if name.startswith((".", "/", "~")):
        path = Path(name).expanduser()
        if revision is not None:
            _fail(f"revision {revision} was given for the local path {name}", "only hub ids have revisions", "drop it")
    else:
        path = _download(name, revision, trust_remote_code, need_weights)
    return _inspect(name, path, revision, trust_remote_code, auto_bfloat16_cast, need_weights, compute_dtype)


def _fail(what: str, why: str, fix: str) -> None:
    raise UserError([Problem(what, why, fix)])


def _inspect(
    name: str,
    path: Path,
    revision: str | None,
    trust_remote_code: bool,
    auto_bfloat16_cast: bool,
    need_weights: bool,
    compute_dtype: str | None,
) -> ModelSource:
    if not path.exists():
        _fail(
            f"{name} does not exist",
            "names starting with '.', '/' or '~' are local paths",
            "give a directory with config.json, a .gguf file, or a hub id such as owner/name",
        )
    directory, gguf_file = _gguf(path)
    problems: list[Problem] = []
    config = _read_config(directory, problems)
    weight_files, tensors = _read_weights(directory, need_weights, problems)
    if config is None:
        raise UserError(problems)
    model_type = str(config.get("model_type", ""))
    architecture, remote, class_name = _architecture(config, model_type, trust_remote_code, problems)
    check_config(config, None if architecture is None or remote else architecture.kind, problems)
    declared = _declared_dtype(config, tensors)
    quantization: Quantization | None = None
    if isinstance(config.get("quantization_config"), dict) and gguf_file is None:
        quantization = read_quantization(cast("dict[str, Any]", config["quantization_config"]), problems)
    elif declared in ("f16", "f32", "f64") and not auto_bfloat16_cast and compute_dtype is None:
        problems.append(
            Problem(
                f"the checkpoint is {declared}, the device computes in bf16",
                "casting changes the numbers, so it is not done silently",
                "pass --auto-bfloat16-cast (auto_bfloat16_cast=True)",
            )
        )
    if compute_dtype not in (None, "bf16", "f32"):
        problems.append(Problem(f"compute dtype {compute_dtype}", "graphs are bf16 or f32", "use bf16 or f32"))
    if problems:
        raise UserError(problems)
    assert architecture is not None
    tokenizer_files = tuple(directory / f for f in _TOKENIZER_FILES if (directory / f).is_file())
    return ModelSource(
        name=name,
        directory=directory,
        revision=revision,
        config=config,
        model_type=model_type,
        architecture_class=class_name,
        architecture=architecture,
        remote_code=remote,
        tokenizer_files=tokenizer_files,
        weight_files=tuple(weight_files),
        gguf_file=gguf_file,
        declared_dtype=declared,
        compute_dtype=compute_dtype or "bf16",
        tensors=tensors,
        quantization=quantization,
        trusted=trust_remote_code,
    )


def _gguf(path: Path) -> tuple[Path, Path | None]:
    """(model directory, gguf file it was made from): a `.gguf`, or a directory with nothing else, is converted."""
    if path.is_file():
        if path.suffix != ".gguf":
            fix = "give the model's directory"
            _fail(f"{path} is a file", "a model is a directory or one .gguf file", fix)
        return gguf_convert.converted(path), path
    if (path / "config.json").is_file():
        return path, None
    candidates = sorted(path.glob("*.gguf"))
    if not candidates:
        return path, None
    if len(candidates) > 1:
        names = ", ".join(c.name for c in candidates[:8])
        _fail(f"{path} holds {len(candidates)} .gguf files: {names}", "it is not clear which one is meant", "name one")
    return gguf_convert.converted(candidates[0]), candidates[0]


def _read_config(directory: Path, problems: list[Problem]) -> dict[str, Any] | None:
    file = directory / "config.json"
    if not file.is_file():
        fix = "give a directory in Hugging Face layout, or a .gguf file"
        problems.append(Problem(f"{directory} has no config.json", "it names the architecture and its sizes", fix))
        return None
    try:
        config = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        problems.append(Problem(f"{file} cannot be read", str(error), "download the model again"))
        return None
    if not isinstance(config, dict):
        problems.append(Problem(f"{file} is not a JSON object", "a config is one", "download the model again"))
        return None
    return cast("dict[str, Any]", config)


def _read_weights(
    directory: Path, need_weights: bool, problems: list[Problem]
) -> tuple[list[Path], dict[str, TensorRange]]:
    files, found = find_weight_files(directory)
    if not need_weights:
        # A table of shapes is all that is needed, but weights that are there still tell the checkpoint's dtype.
        tensors, broken = read_tensors(files)
        return ([], {}) if broken or found else (list(files.files), tensors)
    problems += found
    if not files.files and not found:
        pickled = sorted(f.name for pattern in ("*.bin", "*.pt", "*.pth") for f in directory.glob(pattern))
        if pickled:
            why = "pickled files can run code and have no readable index"
            fix = "convert the model to safetensors (save_pretrained of transformers does)"
            problems.append(Problem(f"{directory} has only {', '.join(pickled[:3])} as weights", why, fix))
        else:
            fix = "download them, or build with --weights none or random, which needs only config.json"
            problems.append(Problem(f"{directory} has no *.safetensors", "the weights are needed", fix))
    tensors, broken = read_tensors(files)
    problems += broken
    return list(files.files), tensors


def _architecture(
    config: dict[str, Any], model_type: str, trust_remote_code: bool, problems: list[Problem]
) -> tuple[Architecture | None, bool, str | None]:
    """(architecture, runs remote code, model class named by the config)."""
    listed = config.get("architectures")
    classes = [c for c in cast("list[Any]", listed) if isinstance(c, str)] if isinstance(listed, list) else []
    if len(classes) > 1:
        what = f"config.json lists more than one architecture: {', '.join(classes)}"
        problems.append(Problem(what, "capture would have to guess which model is meant", "keep one of them"))
    class_name = classes[0] if classes else None
    if "auto_map" in config and model_type not in SUPPORTED:
        if not trust_remote_code:
            what = f"model type {model_type or 'unknown'} comes with its own Python code"
            fix = "read that code, then pass --trust-remote-code"
            problems.append(Problem(what, "it would run on this machine", fix))
            return None, True, class_name
        encoder = class_name is not None and not any(w in class_name for w in ("CausalLM", "LMHead"))
        return Architecture("encoder" if encoder else "decoder"), True, class_name
    if model_type in REFUSED:
        what = f"model type {model_type} is not supported"
        problems.append(Problem(what, REFUSED[model_type], f"use one of: {supported_names()}"))
        return None, False, class_name
    if model_type not in SUPPORTED:
        what = f"unknown architecture: model type {model_type!r}" if model_type else "config.json has no model_type"
        problems.append(Problem(what, "no capture of it has been tested", f"supported are: {supported_names()}"))
        return None, False, class_name
    return SUPPORTED[model_type], False, class_name


def _declared_dtype(config: dict[str, Any], tensors: dict[str, TensorRange]) -> str:
    """The checkpoint's element type: that of most of its bytes, else what the config says, else bf16."""
    sizes: Counter[str] = Counter()
    for tensor in tensors.values():
        if tensor.dtype in ("bf16", "f16", "f32", "f64"):
            sizes[tensor.dtype] += tensor.nbytes
    if sizes:
        return sizes.most_common(1)[0][0]
    said = config.get("dtype", config.get("torch_dtype"))
    return DTYPES.get(str(said).removeprefix("torch."), "bf16") if said else "bf16"


def _download(name: str, revision: str | None, remote_code: bool, need_weights: bool) -> Path:
    """The local snapshot of a hub id (`owner/name`, or `owner/name/file.gguf` for one file)."""
    from huggingface_hub import constants, hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    parts = name.split("/")
    if any(not p for p in parts) or (len(parts) > 2 and not name.endswith(".gguf")):
        fix = "hub ids are owner/name or owner/name/file.gguf; local paths start with '.' or '/'"
        if Path(name).exists():
            fix = f"write ./{name} for the local path"
        _fail(f"{name} is neither a hub id nor a path", "it has the wrong form", fix)
    try:
        if len(parts) > 2:
            return Path(hf_hub_download("/".join(parts[:2]), "/".join(parts[2:]), revision=revision))
        patterns = [*_SMALL_PATTERNS, *(["*.py"] if remote_code else []), *(["*.safetensors"] if need_weights else [])]
        snapshot = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
        if (snapshot / "config.json").is_file():
            return snapshot
        return Path(snapshot_download(name, revision=revision, allow_patterns=["*.gguf"]))
    except RepositoryNotFoundError as error:
        why = f"{constants.ENDPOINT} has no such model, or it is private or gated"
        raise UserError([Problem(f"model {name} was not found", why, "check the name, or set HF_TOKEN")]) from error
    except LocalEntryNotFoundError as error:
        why = f"it is not in the local cache and {constants.ENDPOINT} cannot be reached"
        fix = "connect to the network, unset HF_HUB_OFFLINE, or give a local path"
        raise UserError([Problem(f"model {name} cannot be fetched", why, fix)]) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        fix = "check the id, the revision and the network (HF_ENDPOINT, HF_TOKEN)"
        raise UserError([Problem(f"model {name} cannot be fetched", str(error).splitlines()[0], fix)]) from error
