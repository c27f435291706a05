"""The `rngdc` command. Each subcommand imports what it needs when it runs, so that `--help` is immediate."""

from __future__ import annotations

import signal
import sys
import tempfile
import traceback

from rngdc import __version__
from rngdc.commands.app import app
from rngdc.commands.build import build
from rngdc.commands.cache import cache
from rngdc.commands.compare import compare
from rngdc.commands.diff import diff
from rngdc.commands.execute import check, run, simulate
from rngdc.commands.explain import explain
from rngdc.commands.look import disasm, inspect, opt
from rngdc.guard import foreign_packages

__all__ = [
    "app", "build", "cache", "check", "compare", "diff", "disasm", "explain", "inspect", "main", "opt", "run",
    "simulate",
]  # fmt: skip


def _terminated(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def _crash(error: BaseException) -> None:
    """A bug: keep everything in a file, show the short form."""
    with tempfile.NamedTemporaryFile("w", prefix="rngdc-crash-", suffix=".txt", delete=False, encoding="utf-8") as file:
        file.write(f"rngdc {__version__}: {' '.join(sys.argv)}\n\n")
        file.writelines(traceback.format_exception(error))
    text = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
    print(f"internal error: {type(error).__name__}: {text}\n  details: {file.name}", file=sys.stderr)


def main(argv: list[str] | None = None) -> None:
    """Entry point of the `rngdc` command. Exit status: 0 done, 1 a check failed, 2 the input is at fault, 3 a bug."""
    if foreign := foreign_packages():
        print("\n".join(f"error: {text}" for text in foreign), file=sys.stderr)
        raise SystemExit(2)
    arguments = sys.argv[1:] if argv is None else argv
    before = signal.signal(signal.SIGTERM, _terminated)  # so that a build that is stopped removes its files
    try:
        _run(arguments)
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(arguments: list[str]) -> None:
    """Run the command; every error becomes a message and an exit status."""
    from backend_rngd.artifact.errors import ArtifactError
    from ir.errors import UserError

    try:
        app(arguments, prog_name="rngdc", standalone_mode=True)
    except (UserError, ArtifactError) as error:
        from rngdc.console import print_problems

        print_problems(error.problems)
        raise SystemExit(2) from None
    except BrokenPipeError:
        sys.stderr.close()
        raise SystemExit(141) from None
    except OSError as error:
        from rngdc.console import print_problems
        from rngdc.places import problem_of

        print_problems([problem_of(error)])
        raise SystemExit(2) from None
    except Exception as error:
        from rngdc.work import BuildFailedError

        if isinstance(error, BuildFailedError):
            from rngdc.console import print_failures

            print_failures(error)
            raise SystemExit(3) from None
        from runtime_sim.errors import SimulationError

        if isinstance(error, SimulationError):
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(1) from None
        _crash(error)
        raise SystemExit(3) from None
