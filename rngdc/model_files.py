"""What an artifact keeps of a model's directory: config, tokenizer, stop tokens, pooling."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, cast

from backend_rngd.artifact import Pooling
from ir.errors import Problem, UserError

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


def copy_model_files(source: Path, target: Path, has_tokenizer: bool, trust_remote_code: bool) -> list[str]:
    """Copy config and tokenizer. tokenizer.json is written from the tokenizer that transformers makes of the files, so
    that running needs neither transformers nor a conversion. Returns notes.
    """
    for name in COPIED:
        if (source / name).is_file():
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, target / name)
    if not has_tokenizer:
        return ["the model has no tokenizer: prompts must be given as token ids (--prompt-ids)"]
    import transformers

    load: Any = cast(Any, transformers).AutoTokenizer.from_pretrained
    try:
        tokenizer: Any = load(source, trust_remote_code=trust_remote_code, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError) as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        fix = "put tokenizer.json and tokenizer_config.json beside config.json"
        raise UserError([Problem(f"{source} has no usable tokenizer", why, fix)]) from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return ["the tokenizer has no tokenizer.json form: prompts must be given as token ids (--prompt-ids)"]
    backend.save(str(target / "tokenizer.json"))
    special = {
        name: getattr(tokenizer, f"{name}_token")
        for name in ("bos", "eos", "pad", "unk")
        if isinstance(getattr(tokenizer, f"{name}_token", None), str)
    }
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, str):
        (target / "chat_template.jinja").write_text(template, "utf-8")
    (target / "special_tokens.json").write_text(json.dumps(special, indent=1) + "\n", "utf-8")
    return []


def eos_ids(source: Path, config: dict[str, Any]) -> tuple[int, ...]:
    """Token ids that end a text: those of generation_config.json, else those of config.json."""
    for data in (read_json(source / "generation_config.json"), config):
        value = data.get("eos_token_id")
        if isinstance(value, int):
            return (value,)
        if isinstance(value, list):
            return tuple(int(v) for v in cast("list[Any]", value))
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
