"""Artifacts on the Hugging Face hub, or in its local cache. Variables of huggingface_hub (HF_ENDPOINT, ...) work."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any, cast

from ir.errors import Problem, UserError

_ID = re.compile(r"[\w.-]+/[\w.-]+")
MANIFEST = "artifact.json"


def artifact_directory(path_or_id: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The directory of an artifact: a path, or a hub id (`owner/name`, unless there is such a directory).

    Of a hub id exactly the files that its manifest names are fetched, or found in the cache. Raises UserError.
    """
    name = os.fspath(path_or_id)
    path = Path(name).expanduser()
    if path.exists() or name.startswith((".", "/", "~")) or _ID.fullmatch(name) is None:
        if revision is not None:
            what = f"revision {revision} was given for the local path {name}"
            raise UserError([Problem(what, "only hub ids have revisions", "drop it")])
        return path
    return _fetch(name, revision)


def _fetch(name: str, revision: str | None) -> Path:
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    hub: Any = huggingface_hub  # its functions are typed in parts only
    what = f"artifact {name} cannot be fetched"
    try:
        manifest = Path(hub.hf_hub_download(name, MANIFEST, revision=revision))
        return Path(hub.snapshot_download(name, revision=revision, allow_patterns=[MANIFEST, *_files(manifest)]))
    except RepositoryNotFoundError as error:
        why = f"{constants.ENDPOINT} has no such repository, or it is private or gated"
        raise UserError(
            [Problem(f"{name} was not found", why, f"check the name, set HF_TOKEN, or write ./{name}")]
        ) from error
    except LocalEntryNotFoundError as error:
        why = f"it is not in the local cache and {constants.ENDPOINT} cannot be reached"
        fix = "connect to the network, unset HF_HUB_OFFLINE, or give a local path (./NAME)"
        raise UserError([Problem(what, why, fix)]) from error
    except EntryNotFoundError as error:
        fix = f"if it is a model, build it: rngdc build {name} OUT"
        raise UserError([Problem(f"{name} is no artifact", f"it has no {MANIFEST}", fix)]) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        fix = "check the id, the revision and the network (HF_ENDPOINT, HF_TOKEN)"
        raise UserError([Problem(what, (str(error).splitlines() or [type(error).__name__])[0], fix)]) from error


def _files(manifest: Path) -> list[str]:
    """The other files of the artifact; what is wrong with the manifest is said when it is opened."""
    try:
        data: Any = json.loads(manifest.read_text("utf-8"))
    except ValueError:
        return []
    files = cast("dict[str, Any]", data).get("files") if isinstance(data, dict) else None
    return sorted(cast("dict[str, Any]", files)) if isinstance(files, dict) else []
