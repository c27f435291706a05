"""The command's root, and what its subcommands share: types of options, opening artifacts, refusals."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, cast

import typer

from rngdc import __version__

if TYPE_CHECKING:
    from backend_rngd.artifact import Artifact, Bucket

app = typer.Typer(
    name="rngdc",
    help="Compile Hugging Face models to RNGD instruction streams, and run them on simulated cards.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

Json = Annotated[
    str | None, typer.Option("--json", metavar="FILE|-", help="Write the report as JSON to FILE, or to stdout for -.")
]
ModeOption = Annotated[str, typer.Option("--mode", help="Timing mode: documented or silicon.")]
ArtifactPath = Annotated[
    Path,
    typer.Argument(metavar="OUT", help="An artifact, made by `rngdc build`, or its hub id.", show_default=False),
]
Stages = Annotated[
    int | None,
    typer.Option(
        "--pipeline-parallel-size",
        "-pp",
        metavar="N",
        help="Stages that the layers are divided into.",
        show_default="as built",
    ),
]
Replicas = Annotated[
    int | None,
    typer.Option(
        "--data-parallel-size",
        "-dp",
        metavar="N",
        help="Copies of the model.",
        show_default="1, with --devices as many as fit",
    ),
]
BlocksPerStage = Annotated[
    str | None,
    typer.Option(metavar="N,N,...", help="Blocks of every stage, in place of -pp.", show_default="balanced"),
]
FixedByTheBuild = Annotated[  # so that the refusal can name the command that builds another artifact
    int | None, typer.Option("--tensor-parallel-size", "-tp", hidden=True)
]
Devices = Annotated[
    list[str] | None,
    typer.Option(
        metavar="DEVICE,...",
        help="npu:CARD, npu:CARD:PE or npu:CARD:FIRST-LAST. Repeatable.",
        show_default="as many cards as are needed",
    ),
]
Target = Annotated[
    Path,
    typer.Argument(metavar="OUT|FILE.mlir", help="An artifact, or a file with one `tc` function.", show_default=False),
]
BucketNames = Annotated[
    list[str] | None, typer.Option("--bucket", metavar="NAME", help="Only this program. Repeatable.")
]


def _version(value: bool) -> None:
    if value:
        typer.echo(f"rngdc {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Compile Hugging Face models to RNGD instruction streams, and run them on simulated cards."""


def refuse(what: str, why: str, fix: str) -> NoReturn:
    """Raise a UserError with one problem."""
    from ir.errors import Problem, UserError

    raise UserError([Problem(what, why, fix)])


def timing_mode(text: str) -> Any:
    """A timing mode of the machine. Raises UserError for another word."""
    if text not in ("documented", "silicon"):
        refuse(f"--mode {text}", "there are two timing modes", "use documented or silicon")
    return text


def integers(option: str, text: str | None) -> list[int] | None:
    """Numbers separated by commas. Raises UserError."""
    if text is None:
        return None
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in words):
        refuse(f"{option} {text!r}", "it is a list of numbers", f"write it as {option} 16,16")
    return [int(word) for word in words]


def open_path(path: Path) -> Artifact:
    """An artifact, in a directory or on the hub, with its checksums verified. Raises ArtifactError or UserError."""
    from backend_rngd.artifact import open_artifact
    from rngdc.hub import artifact_directory

    return open_artifact(artifact_directory(path))


@contextmanager
def open_target(path: Path) -> Generator[Artifact]:
    """An artifact, or one made of a single function in a temporary directory."""
    if path.suffix != ".mlir":
        yield open_path(path)
        return
    from rngdc.function import build_function

    with tempfile.TemporaryDirectory(prefix="rngdc-") as directory:
        with step_texts() as show:
            opened = build_function(path, Path(directory) / "out", show)
        yield opened


@contextmanager
def step_texts() -> Generator[Callable[[str], None]]:
    """A spinner on stderr; call the result with the name of the current step."""
    from rngdc.console import steps

    with steps() as progress:
        yield lambda text: progress.update(cast(Any, 0), description=text)


def named_buckets(artifact: Artifact, names: list[str] | None) -> list[Bucket]:
    """The named buckets, or all; raises ArtifactError listing every unknown name."""
    from backend_rngd.artifact import ArtifactError

    if not names:
        return list(artifact.buckets)
    found: list[Bucket] = []
    problems: list[Any] = []
    for name in dict.fromkeys(names):
        try:
            found.append(artifact.bucket(name))
        except ArtifactError as error:
            problems += error.problems
    if problems:
        raise ArtifactError(problems)
    return found
