"""GGUF files, converted once to a bf16 safetensors directory with tokenizer in the user's cache.

transformers de-quantises GGUF, but takes half a minute for 135M parameters every time; the saved directory loads at
once and can be memory-mapped. The cache entry is named by the file's content, and appears atomically.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from ir.errors import Problem, UserError
from ir.files import alive, remembered

_VERSION = "1"
"""Part of the cache key; raise it when the conversion changes."""


def cache_directory() -> Path:
    """Where converted models live: the platform's user cache for `rngdc`."""
    import platformdirs

    return Path(platformdirs.user_cache_path("rngdc")) / "gguf"


def converted(file: Path) -> Path:
    """The safetensors directory made from a GGUF file, converting it if the cache does not have it yet."""
    try:
        key = remembered(cache_directory() / f"keys-{_VERSION}", file, _key)
    except OSError as error:
        raise UserError([Problem(f"{file} cannot be read", str(error), "check its permissions")]) from error
    target = cache_directory() / key
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in target.parent.glob(".convert-*"):  # by conversions that were killed
        owner = left.name.removeprefix(".convert-").split("-")[0]
        if owner.isdecimal() and not alive(int(owner)):
            shutil.rmtree(left, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=f".convert-{os.getpid()}-", dir=target.parent))
    try:
        _convert(file, work)
        try:
            os.rename(work, target)
        except OSError:
            # Another process finished the same conversion first: its result is the same.
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def _key(file: Path) -> str:
    digest = hashlib.sha256(_VERSION.encode())
    with file.open("rb") as stream:
        magic = stream.read(4)
        if magic != b"GGUF":
            problem = Problem(f"{file} is not a GGUF file", "it does not start with GGUF", "download it again")
            raise UserError([problem])
        digest.update(magic)
        while chunk := stream.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()[:40]


def _convert(file: Path, target: Path) -> None:
    """Write config, tokenizer and bf16 safetensors of a GGUF file into an empty directory."""
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        why = f"transformers needs {' and '.join(missing)} for it"
        raise UserError([Problem(f"{file} cannot be read", why, "pip install 'rngdc[gguf]'")])
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    try:
        AutoConfig.from_pretrained(file.parent, **where)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **where)
        model: Any = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **where)
    except (ValueError, KeyError, OSError, ImportError, RuntimeError, NotImplementedError) as error:
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        fix = "use the safetensors checkpoint of the model"
        raise UserError([Problem(f"transformers cannot read {file}", why, fix)]) from error
    # 5.x marks the de-quantised, dense model as quantised and then refuses to save it.
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config
    model.hf_quantizer = None
    for attribute, value in (("is_quantized", False), ("quantization_method", None)):
        if hasattr(model, attribute):
            setattr(model, attribute, value)
    model.to(torch.bfloat16).save_pretrained(target)
    tokenizer.save_pretrained(target)
