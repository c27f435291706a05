"""What an artifact keeps of a model's directory: config, tokenizer, stop tokens, pooling."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from backend_rngd.artifact import Pooling
from ir.errors import Problem, UserError

if TYPE_CHECKING:
    from frontend.resolve import ModelSource
    from rngdc.cache import Cache, Files

KIND, RESULT = "tokenizer", "result.json"
COPIED = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "modules.json",
    "1_Pooling/config.json",
)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, empty if there is no such file. Raises UserError if it cannot be read."""
    if not path.is_file():
        return {}
    try:
        data: Any = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError([Problem(f"{path} cannot be read", str(error), "download the model again")]) from error
    return cast("dict[str, Any]", data) if isinstance(data, dict) else {"": data}


def copy_model_files(source: Path, target: Path, tokenizer: Tokenizer) -> list[str]:
    """Copy the config and write the tokenizer. Returns notes."""
    for name in COPIED:
        if (source / name).is_file():
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, target / name)
    for name, data in tokenizer.files.items():
        (target / name).write_bytes(data)
    return [tokenizer.note] if tokenizer.note else []


@dataclass(frozen=True)
class Tokenizer:
    """What an artifact keeps of a tokenizer: tokenizer.json, special tokens, chat template; `note`: why it has none."""

    files: Files = field(default_factory=dict[str, bytes])
    note: str = ""


def read_tokenizer(source: ModelSource, cache: Cache | None) -> Tokenizer:
    """The tokenizer that transformers makes of a model's files, so that running needs neither it nor a conversion.

    Equal files make equal tokenizers, so the cache keeps the result by their contents. Raises UserError.
    """
    if not source.tokenizer_files:
        return Tokenizer(note="the model has no tokenizer: prompts must be given as token ids (--prompt-ids)")
    name = "" if cache is None else _tokenizer_key(source)
    if cache is not None and (known := cache.get(KIND, name)) is not None:
        with contextlib.suppress(KeyError, ValueError, TypeError):  # written by something else under this key
            return Tokenizer(note=json.loads(known.pop(RESULT))["note"], files=known)
    made = _convert(source)
    if cache is not None:
        meta = {"model": source.name}
        cache.put(KIND, name, {**made.files, RESULT: json.dumps({"note": made.note}).encode()}, meta)
    return made


def check_model_files(source: ModelSource, problems: list[Problem]) -> None:
    """Append a problem for every file beside the weights that cannot be used, as far as that shows at once."""

    def check(read: Callable[[], object]) -> None:
        try:
            read()
        except UserError as error:
            problems.extend(error.problems)

    for path in source.tokenizer_files:
        if path.suffix == ".json":
            check(partial(read_json, path))
    check(lambda: eos_ids(source.directory, source.config))
    if source.architecture.kind == "encoder":
        check(lambda: pooling(source.directory))


def _tokenizer_key(source: ModelSource) -> str:
    """Everything that a tokenizer is made of: the small files beside the config, transformers and tokenizers."""
    from rngdc.cache import key_of

    suffixes = {".json", ".txt", ".model", ".jinja", ".tiktoken", ".py"}
    digests = {
        path.relative_to(source.directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(source.directory.rglob("*"))
        if path.suffix in suffixes and path.is_file() and not path.name.endswith(".safetensors.index.json")
    }
    libraries = {name: version(name) for name in ("transformers", "tokenizers")}
    return key_of({"stage": KIND, "files": digests, "libraries": libraries, "remote": source.trusted})


def _convert(source: ModelSource) -> Tokenizer:
    import transformers

    load: Any = cast(Any, transformers).AutoTokenizer.from_pretrained
    try:
        tokenizer: Any = load(source.directory, trust_remote_code=source.trusted, local_files_only=True)
    except Exception as error:  # libraries and code of the model raise anything
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        fix = "put tokenizer.json and tokenizer_config.json beside config.json"
        raise UserError([Problem(f"{source.directory} has no usable tokenizer", why, fix)]) from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        note = "the tokenizer has no tokenizer.json form: prompts must be given as token ids (--prompt-ids)"
        return Tokenizer(note=note)
    special = {
        name: getattr(tokenizer, f"{name}_token")
        for name in ("bos", "eos", "pad", "unk")
        if isinstance(getattr(tokenizer, f"{name}_token", None), str)
    }
    files: Files = {
        "tokenizer.json": backend.to_str(pretty=True).encode(),
        "special_tokens.json": (json.dumps(special, indent=1) + "\n").encode(),
    }
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, str):
        files["chat_template.jinja"] = template.encode()
    return Tokenizer(files)


def eos_ids(source: Path, config: dict[str, Any]) -> tuple[int, ...]:
    """Token ids that end a text: those of generation_config.json, else those of config.json. Raises UserError."""
    for name, data in (
        ("generation_config.json", read_json(source / "generation_config.json")),
        ("config.json", config),
    ):
        value = data.get("eos_token_id")
        if value is None:
            continue
        ids = cast("list[Any]", value) if isinstance(value, list) else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            why = "it must be a token id, or a list of them"
            raise UserError([Problem(f"{name}: eos_token_id is {value!r}", why, "download the model again")])
        return tuple(ids)
    return ()


def pooling(source: Path) -> Pooling:
    """How a sentence-transformers directory pools and whether it normalises; plain encoders: mean, not normalised."""
    modules = read_json(source / "modules.json").get("", [])
    normalise = any(str(m.get("type", "")).endswith("Normalize") for m in modules)
    config = read_json(source / "1_Pooling" / "config.json")
    flags = {"cls": "pooling_mode_cls_token", "mean": "pooling_mode_mean_tokens", "max": "pooling_mode_max_tokens"}
    chosen = [mode for mode, key in flags.items() if config.get(key)]
    mode = config.get("pooling_mode")
    if not config:
        chosen = ["mean"]
    elif not chosen and mode in flags:
        chosen = [str(mode)]
    if len(chosen) != 1:
        why = "one of cls, mean and max is built"
        what = f"{source / '1_Pooling' / 'config.json'} asks for {' and '.join(chosen) or 'another'} pooling"
        raise UserError([Problem(what, why, "embed with the last hidden state of a plain encoder directory")])
    return Pooling.model_validate({"mode": chosen[0], "normalise": normalise})
