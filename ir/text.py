"""The text form of modules: parse, print, and the context that knows the dialects of this layer."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

from xdsl.context import Context
from xdsl.dialects.builtin import Builtin, ModuleOp
from xdsl.dialects.func import Func
from xdsl.parser import Parser
from xdsl.printer import Printer
from xdsl.utils.exceptions import ParseError, VerifyException

from ir.dialects.tc import Tc
from ir.errors import Problem, UserError


def context() -> Context:
    """A context with `builtin`, `func` and `tc`."""
    result = Context()
    result.load_dialect(Builtin)
    result.load_dialect(Func)
    result.load_dialect(Tc)
    return result


def parse_module(text: str, name: str = "<text>", ctx: Context | None = None) -> ModuleOp:
    """Read and verify a module. Raises UserError with the place of a syntax or verifier error."""
    try:
        module = Parser(ctx or context(), text, name).parse_module()
        module.verify()
    except (ParseError, VerifyException) as error:
        raise UserError([Problem(f"{name} is no valid module", str(error).strip(), "correct the text")]) from error
    return module


def read_module(path: Path | str, ctx: Context | None = None) -> ModuleOp:
    """Read and verify the module in a file. Raises UserError also if the file cannot be read."""
    try:
        text = Path(path).read_text("utf-8")
    except OSError as error:
        raise UserError([Problem(f"{path} cannot be read", str(error), "check the path")]) from error
    return parse_module(text, str(path), ctx)


def print_module(module: ModuleOp, locations: bool = False) -> str:
    """The text of a module, with a final newline; `locations` also prints the model source line of every op."""
    stream = StringIO()
    Printer(stream, print_debuginfo=locations).print_op(module)
    return stream.getvalue() + "\n"
