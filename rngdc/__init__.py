"""The face of the project: the `rngdc` command, `ArtifactBuilder` and `LLM`.

Importing this package imports nothing heavy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rngdc.builder import ArtifactBuilder
    from rngdc.llm import LLM

__version__ = "0.1.0"
__all__ = ["LLM", "ArtifactBuilder", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "ArtifactBuilder":
        from rngdc.builder import ArtifactBuilder

        return ArtifactBuilder
    if name == "LLM":
        from rngdc.llm import LLM

        return LLM
    raise AttributeError(f"module 'rngdc' has no attribute {name!r}")
