"""`--config FILE`: options of `rngdc build` from a YAML file. What stands on the command line wins.

model: meta-llama/Llama-3.1-8B-Instruct
tensor-parallel-size: 8
prefill-buckets: [[1, 512], "1,1024"]
weights: none
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, cast

import yaml

from ir.errors import Problem, UserError

LISTS = ("prefill_buckets", "decode_buckets")
SETTINGS = "additional_model_config"


def read_config(path: Path, names: set[str]) -> dict[str, Any]:
    """The file's settings by parameter name. `names` are those the command has.

    Raises UserError with every key that is unknown and every value that is no plain one.
    """
    try:
        data: Any = yaml.safe_load(path.read_text("utf-8"))
    except OSError as error:
        raise UserError([Problem(f"--config {path} cannot be read", str(error.strerror), "check the path")]) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        why = " ".join(str(error).split())
        raise UserError([Problem(f"--config {path} is no YAML", why, "write one `option: value` a line")]) from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        why = "its top level is no mapping"
        raise UserError([Problem(f"--config {path} cannot be used", why, "write one `option: value` a line")])
    problems: list[Problem] = []
    settings: dict[str, Any] = {}
    for key, value in cast("dict[Any, Any]", data).items():
        name = str(key).lstrip("-").replace("-", "_")
        if name not in names:
            near = difflib.get_close_matches(name, sorted(names), 1)
            fix = f"did you mean {near[0].replace('_', '-')}?" if near else "see `rngdc build --help` for the options"
            problems.append(Problem(f"{path}: {key}", "there is no such option", fix))
        elif name in settings:
            problems.append(Problem(f"{path}: {key}", "it is given twice", "keep one of them"))
        elif name in LISTS:
            settings[name] = _list(value)
        elif name == SETTINGS:
            settings[name] = _settings(value)
        elif isinstance(value, (list, dict)):
            problems.append(Problem(f"{path}: {key}", "the option takes one value", f"write {key}: VALUE"))
        elif value is not None:
            settings[name] = value if isinstance(value, bool) else str(value)
    if problems:
        raise UserError(problems)
    return settings


def _settings(value: Any) -> list[str]:
    """Settings of the model as the command line writes them: `{num_hidden_layers: 2}` -> `["num_hidden_layers=2"]`."""
    if isinstance(value, dict):
        return [f"{k}={str(v).lower()}" for k, v in cast("dict[Any, Any]", value).items()]
    return [str(v) for v in cast("list[Any]", value if isinstance(value, list) else [value])]


def _list(value: Any) -> list[str]:
    """Buckets as the command line writes them: `[[1, 512], "1,1024"]` -> `["1,512", "1,1024"]`."""
    values = cast("list[Any]", value) if isinstance(value, list) else [value]
    if values and all(isinstance(v, int) for v in values):  # prefill-buckets: [1, 512] is one bucket
        values = [values]
    return [",".join(map(str, cast("list[Any]", v))) if isinstance(v, list) else str(v) for v in values]
