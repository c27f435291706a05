"""Results of searches for mappings in the cache: a shape that any program had before is not searched again."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from backend_rngd.lowering.search import remembering
from rngdc.cache import Cache, key_of

KIND = "mapping"
_FILE = "found.json"


class Searches:
    """What was found, by shape, machine and compiler; see `backend_rngd.lowering.search.Memory`."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache

    def get(self, key: dict[str, Any]) -> dict[str, Any] | None:
        """What was put there, or None."""
        files = self.cache.get(KIND, key_of(key))
        try:
            return None if files is None else json.loads(files[_FILE])
        except (KeyError, ValueError):  # written by something else under this key
            return None

    def put(self, key: dict[str, Any], found: dict[str, Any]) -> None:
        """Keep a result."""
        self.cache.put(KIND, key_of(key), {_FILE: json.dumps(found).encode()}, {"shape": key["shape"]["what"]})


def remembered(directory: str | None) -> AbstractContextManager[None]:
    """Searches inside use the cache in a directory, if there is one."""
    return remembering(None if directory is None else Searches(Cache(Path(directory))))
