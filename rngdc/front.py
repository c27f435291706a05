"""The front of a build: a model captured and simplified, or what an earlier build found for the same config.

What capture reads is the config, the names, types and places of the weights, its own source and the code that comes
with the model, never the weights' values: these are the key in the cache. (A GGUF file is a directory by its contents.)
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ir.weights import WeightTable

if TYPE_CHECKING:
    from xdsl.dialects.builtin import ModuleOp

    from frontend.resolve import ModelSource
    from rngdc.cache import Cache, Files

KIND = "capture"
LIBRARIES = ("torch", "transformers")


@dataclass(frozen=True)
class ModelInfo:
    """What later stages need to know of a model."""

    kind: str
    layers: int
    vocab_size: int | None
    notes: list[str] = field(default_factory=list[str])


class FrontModel:
    """A model: `captured` is its text as captured, `text` and `module` are simplified."""

    def __init__(
        self, captured: str, text: str, weights: WeightTable, info: ModelInfo, module: ModuleOp | None = None
    ) -> None:
        self.captured = captured
        self.text = text
        self.weights = weights
        self.info = info
        self._module = module

    @property
    def held(self) -> ModuleOp | None:
        """The module, if somebody has needed it already."""
        return self._module

    @property
    def module(self) -> ModuleOp:
        """The module, read from the text if need be."""
        if self._module is None:
            from ir.text import parse_module

            self._module = parse_module(self.text, "model")
        return self._module


def key(source: ModelSource, layers: int | None, mode: str, cast: bool, fuse: bool) -> str | None:
    """The name of the model in the cache, None if it is not kept there."""
    from rngdc.cache import key_of

    code = _code(source)
    if code is None:
        return None
    files = [(str(p.absolute()), s.st_size, s.st_mtime_ns) for p in source.weight_files if (s := p.stat())]
    inputs = {
        "stage": KIND, "config": source.config, "class": source.architecture_class, "type": source.model_type,
        "declared": source.declared_dtype, "computed": source.compute_dtype,
        "tensors": {name: repr(place) for name, place in source.tensors.items()}, "files": files,
        "quantization": repr(source.quantization), "layers": layers, "weights": mode, "cast": cast, "fuse": fuse,
        "code": code,
        "directory": str(source.directory.absolute()) if files else "", "frontend": _frontend_digest(),
    }  # fmt: skip
    return key_of(inputs)


def _code(source: ModelSource) -> dict[str, str] | None:
    """Digests of the Python code that comes with a model; None if the config names code of another repository."""
    if not source.remote_code:
        return {}
    named = cast("dict[str, Any]", source.config.get("auto_map") or {})
    if any("--" in str(name) for name in named.values()):
        return None
    files = sorted(source.directory.rglob("*.py"))
    return {
        f.relative_to(source.directory).as_posix(): hashlib.sha256(f.read_bytes()).hexdigest() for f in files
    }  # fmt: skip


@lru_cache(maxsize=1)
def _frontend_digest() -> str:
    root = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for path in [*sorted((root / "frontend").rglob("*.py")), Path(__file__)]:
        digest.update(f"\0{path.relative_to(root).as_posix()}\0".encode())
        digest.update(path.read_bytes())
    for name in LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            digest.update(f"\0{name} {version(name)}".encode())
    return digest.hexdigest()


def load(cache: Cache, name: str) -> FrontModel | None:
    """The model of this key, or None."""
    files = cache.get(KIND, name)
    if files is None:
        return None
    try:
        data = json.loads(files["result.json"])
        weights = WeightTable.from_json(data["weights"])
        return FrontModel(
            files["captured.mlir"].decode(), files["model.mlir"].decode(), weights, ModelInfo(**data["info"])
        )
    except (KeyError, ValueError, TypeError):  # written by something else under this key
        return None


def store(cache: Cache, name: str, model: FrontModel, meta: dict[str, Any]) -> None:
    """Keep a model, unless large arrays belong to its graph."""
    try:
        weights = model.weights.to_json()
    except ValueError:
        return
    data = json.dumps({"weights": weights, "info": asdict(model.info)}, separators=(",", ":"))
    files: Files = {
        "captured.mlir": model.captured.encode(),
        "model.mlir": model.text.encode(),
        "result.json": data.encode(),
    }
    cache.put(KIND, name, files, meta)
