"""Running pipelines: `run_pipeline` for the build, `opt_main` for `rngdc opt`. Both can dump the IR after every pass.

A dump directory gets `00-input.mlir`, `01-simplify.mlir`, ..., each headed by the command that continues from it. When
a pass fails, `NN-<pass>-failed.mlir` holds the module as the pass left it.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import ClassVar

from typing_extensions import override
from xdsl.context import Context
from xdsl.dialects.builtin import Builtin, ModuleOp
from xdsl.dialects.func import Func
from xdsl.ir import Dialect
from xdsl.passes import ModulePass, PassPipeline
from xdsl.printer import Printer
from xdsl.utils.exceptions import ArgSpecParseError, DiagnosticException, ParseError, VerifyException
from xdsl.xdsl_opt_main import xDSLOptMain

from ir.dialects.tc import Tc
from ir.errors import Problem, UserError
from ir.text import context, print_module
from passes.registry import PassFactory, get_passes


@dataclass(frozen=True)
class PassReport:
    """One pass that ran: its specification, wall time, and the number of operations behind it."""

    spec: str
    seconds: float
    operations: int


def parse_passes(text: str, factories: Mapping[str, PassFactory] | None = None) -> list[ModulePass]:
    """The passes of a pipeline text such as `simplify,specialise{batch=1 seq=512 kv=512}`. Raises UserError."""
    known = dict(factories if factories is not None else get_passes())
    try:
        return list(PassPipeline.parse_spec(known, text).passes)
    except (ArgSpecParseError, ValueError, TypeError) as error:  # the first is no Exception
        why = " ".join(str(error).split())
        raise UserError([Problem(f"pipeline '{text}'", why, f"passes are {', '.join(known)}")]) from None


def run_pipeline(
    module: ModuleOp,
    passes: str | Sequence[ModulePass],
    dump_dir: Path | str | None = None,
    *,
    ctx: Context | None = None,
    factories: Mapping[str, PassFactory] | None = None,
) -> list[PassReport]:
    """Run passes on a module in place and verify after each.

    `passes` is a pipeline text or a list. Raises what a pass raises, with the pass named in a note.
    """
    sequence = parse_passes(passes, factories) if isinstance(passes, str) else list(passes)
    dumps = Dumps(Path(dump_dir), sequence) if dump_dir is not None else None
    ctx = ctx or context()
    reports: list[PassReport] = []
    if dumps is not None:
        dumps.write(module, 0)
    for index, step in enumerate(sequence):
        start = time.perf_counter()
        try:
            step.apply(ctx, module)
            module.verify()
        except BaseException as error:
            if dumps is not None:
                dumps.write(module, index + 1, failed=True)
            error.add_note(f"in pass '{step}'")
            raise
        reports.append(PassReport(str(step), time.perf_counter() - start, sum(1 for _ in module.walk())))
        if dumps is not None:
            dumps.write(module, index + 1)
    return reports


class Dumps:
    """Numbered files of a module, each with the command that continues from it."""

    def __init__(self, directory: Path, passes: Sequence[ModulePass]) -> None:
        self.directory = directory
        self.passes = list(passes)
        directory.mkdir(parents=True, exist_ok=True)

    def path(self, index: int, failed: bool = False) -> Path:
        """The file after `index` passes."""
        name = self.passes[index - 1].name if index else "input"
        return self.directory / f"{index:02d}-{name}{'-failed' if failed else ''}.mlir"

    def write(self, module: ModuleOp, index: int, failed: bool = False) -> None:
        """Write the module after `index` passes; `failed` says that the last of them did not succeed."""
        path = self.path(index, failed)
        if failed:
            # Continuing means running the failed pass again on what it was given.
            header = f"// failed in '{self.passes[index - 1]}'\n{self.command(index - 1)}"
            text = print_anyway(module)
        else:
            header, text = self.command(index), print_module(module)
        path.write_text(header + text, "utf-8")

    def command(self, index: int) -> str:
        """The header line of the file after `index` passes."""
        rest = ",".join(str(p) for p in self.passes[index:])
        return f"// rngdc opt -p '{rest}' {self.path(index).name}\n"


def print_anyway(module: ModuleOp) -> str:
    """The text of a module that may be invalid: generic form if the custom one cannot be printed."""
    try:
        return print_module(module)
    except Exception as error:  # any: the module is broken, and the first failure must not be hidden
        stream = StringIO()
        with contextlib.suppress(Exception):
            Printer(stream, print_generic_format=True).print_op(module)
        return f"// not printable: {type(error).__name__}: {error}\n{stream.getvalue()}\n"


class RngdcOpt(xDSLOptMain):
    """`rngdc opt`: the optimiser driver with the dialects and passes of this project, and `--dump-ir`."""

    dialects: ClassVar[dict[str, Callable[[], Dialect]]] = {}
    """Dialects of layers above this one, registered by the command."""
    passes: ClassVar[dict[str, PassFactory]] = {}
    """Passes of layers above this one."""

    @override
    def register_all_dialects(self) -> None:
        own = {"builtin": lambda: Builtin, "func": lambda: Func, "tc": lambda: Tc}
        for name, factory in (own | self.dialects).items():
            self.ctx.register_dialect(name, factory)

    @override
    def register_all_passes(self) -> None:
        for name, factory in (get_passes() | self.passes).items():
            self.register_pass(name, factory)

    @override
    def register_all_arguments(self, arg_parser: argparse.ArgumentParser) -> None:
        super().register_all_arguments(arg_parser)
        arg_parser.prog = "rngdc opt"
        arg_parser.add_argument(
            "--dump-ir", type=Path, metavar="DIR", help="write the IR before and after every pass to numbered files"
        )

    @override
    def setup_pipeline(self) -> None:
        self.pipeline = PassPipeline(tuple(parse_passes(self.args.passes, self.available_passes)))

    @override
    def apply_passes(self, prog: ModuleOp) -> None:
        if not self.args.disable_verify:
            prog.verify()
        if not self.pipeline.passes:
            return
        reports = run_pipeline(prog, self.pipeline.passes, self.args.dump_ir, ctx=self.ctx)
        if self.args.time_passes:
            for report in reports:
                print(f"{report.seconds * 1e3:9.2f} ms {report.operations:6d} ops  {report.spec}", file=sys.stderr)


@contextlib.contextmanager
def reported_errors() -> Generator[list[int]]:
    """Turn errors of the input into messages on stderr and an exit status: 2 for what a user can fix, 1 otherwise."""
    status = [0]
    try:
        yield status
    except UserError as error:
        for problem in error.problems:
            print(f"error: {problem.what}: {problem.why}\n  fix: {problem.fix}", file=sys.stderr)
        status[0] = 2
    except (ParseError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        status[0] = 2
    except (VerifyException, DiagnosticException) as error:
        # The notes hold the module with the place marked; the last one names the pass.
        notes = getattr(error, "__notes__", [])
        print("\n".join([f"error: {error}", *notes]), file=sys.stderr)
        status[0] = 1


def opt_main(
    argv: Sequence[str],
    dialects: Mapping[str, Callable[[], Dialect]] | None = None,
    passes: Mapping[str, PassFactory] | None = None,
) -> int:
    """`rngdc opt`; returns the exit status. `dialects` and `passes` are those of the layers above."""

    class Tool(RngdcOpt):
        pass

    Tool.dialects, Tool.passes = dict(dialects or {}), dict(passes or {})
    with reported_errors() as status:
        Tool("Run passes on a module and print the result.", list(argv)).run()
    return status[0]
