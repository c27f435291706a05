"""Errors that a user can act on. Everything else is a bug and keeps its traceback."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: `what` it is, `why` it cannot work, and the flag or size that `fix`es it."""

    what: str
    why: str
    fix: str

    def __str__(self) -> str:
        return f"{self.what}: {self.why}; {self.fix}"


class UserError(Exception):
    """All problems of an input at once. The command prints each and exits with status 2."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(str(p) for p in self.problems))


class UnsupportedError(UserError):
    """Something that is valid but not built yet; never replaced by a silent fallback."""

    def __init__(self, what: str, why: str, fix: str) -> None:
        super().__init__([Problem(what, why, fix)])


class RuleError(ValueError):
    """An axis rule is malformed or does not fit the shapes it is applied to."""
