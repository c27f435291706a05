"""What can be wrong with an artifact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ArtifactProblem:
    """`what` is wrong, `why` it cannot be used, and how to `fix` it."""

    what: str
    why: str
    fix: str

    def __str__(self) -> str:
        return f"{self.what}: {self.why}; {self.fix}"


class ArtifactError(Exception):
    """All problems of an artifact at once."""

    def __init__(self, problems: Sequence[ArtifactProblem]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(str(p) for p in self.problems))
