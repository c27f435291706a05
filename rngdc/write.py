"""Writing an artifact: streams, IR, probes, constants, and where every weight comes from."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from backend_rngd.artifact import (
    ArtifactWriter,
    Compiler,
    LinkedFile,
    MachineId,
    Manifest,
    Model,
    Options,
    Parallel,
    WeightSource,
)
from backend_rngd.artifact.store import link
from backend_rngd.machine import Machine
from rngdc import __version__
from rngdc.copy_weights import copy_weights

if TYPE_CHECKING:
    from ir.weights import WeightTable
    from rngdc.cache import Cache
    from rngdc.program import Programs

Progress = Callable[[str], None]


def write_programs(
    writer: ArtifactWriter,
    programs: Programs,
    machine: Machine,
    model: Model,
    parallel: Parallel,
    mode: str,
    weights: list[WeightSource],
    linked: list[LinkedFile],
    options: Options | None = None,
) -> Manifest:
    """Write streams, IR, probes and constants, and finish the artifact."""
    for program in programs.programs:
        (writer.directory / program.record.stream).write_bytes(program.stream)
        (writer.directory / program.record.ir).write_text(program.ir, "utf-8")
        (writer.directory / program.record.debug).write_text(program.debug, "utf-8")
    (writer.directory / "constants.bin").write_bytes(programs.constant_bytes)
    return writer.finish(
        Manifest(
            name=options.name if options is not None else "",
            compiler=Compiler(version=__version__),
            machine=MachineId(name=machine.name, digest=machine.digest()),
            options=options,
            model=model,
            parallel=parallel,
            weights_mode=mode,
            weights=tuple(weights),
            placements=tuple(programs.placements),
            constants=tuple(programs.constants),
            linked=tuple(linked),
            hbm=programs.hbm,
            caches=tuple(programs.caches),
            buckets=tuple(p.record for p in programs.programs),
        )
    )


def weight_sources(
    table: WeightTable, mode: str, directory: Path, progress: Progress, cache: Cache | None = None
) -> tuple[list[WeightSource], list[LinkedFile]]:
    """Where the artifact finds every weight of the model; mode `copy` writes them into it."""
    if mode == "copy":
        table = copy_weights(table, directory, progress)
    sources: list[WeightSource] = []
    files: dict[str, None] = {}
    for ref in table.values():
        inline = None
        if ref.inline is not None:
            inline = base64.b64encode(ref.inline.tobytes()).decode("ascii")
        file = ref.file
        if file is not None and mode == "link":
            file = str(Path(file).absolute())
            files[file] = None
        sources.append(
            WeightSource(
                name=ref.name, dtype=ref.dtype, shape=ref.shape, file=file, offset=ref.offset or 0, inline=inline,
                seed=ref.seed,
            )
        )  # fmt: skip
    linked: list[LinkedFile] = []
    for file in files:
        progress(f"checksum of {Path(file).name}")
        linked.append(link(Path(file)) if cache is None else link(Path(file), cache.checksum))
    return sources, linked
