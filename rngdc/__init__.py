"""The face of the project: the `rngdc` command and `ArtifactBuilder`. Importing this package imports nothing heavy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rngdc.builder import ArtifactBuilder

__version__ = "0.1.0"
__all__ = ["ArtifactBuilder", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "ArtifactBuilder":
        from rngdc.builder import ArtifactBuilder

        return ArtifactBuilder
    raise AttributeError(f"module 'rngdc' has no attribute {name!r}")
