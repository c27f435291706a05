"""One `tc` function in an `.mlir` file as an artifact, so that a single operation can be timed and checked."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from xdsl.dialects.builtin import StringAttr
from xdsl.dialects.func import FuncOp

from backend_rngd.artifact import Artifact, ArtifactWriter, Model, WeightSource, open_artifact
from backend_rngd.machine import load_machine
from ir.dialects import tc
from ir.errors import Problem, UserError
from ir.interpreter import names_of
from ir.text import read_module
from ir.types import dims_of, elem_of, shape_of
from rngdc.buckets import BucketSpec

if TYPE_CHECKING:
    from xdsl.dialects.builtin import ModuleOp

    from rngdc.build import Progress


def build_function(path: Path, out: Path, progress: Progress, machine_name: str = "rngd") -> Artifact:
    """Build the function of `path` into the new directory `out`, with random weights. Raises UserError."""
    from rngdc.build import compile_modules, single_unit
    from rngdc.write import write_programs

    module = read_module(path)
    function = _entry(module, path)
    if open_sizes := sorted({d for v in function.body.block.args for d in dims_of(v) if isinstance(d, str)}):
        why = f"the sizes {', '.join(open_sizes)} are open"
        fix = f"give them numbers: rngdc opt -p 'specialise{{batch=1 seq=64 kv=64}}' {path}"
        raise UserError([Problem(f"{path} cannot be built", why, fix)])
    machine = load_machine(machine_name)
    batch, keys = _cache_geometry(function)
    bucket = BucketSpec("function", batch, 1, keys)
    programs = compile_modules({bucket: module}, machine, progress)
    types = {f"arg.{n}": v for n, v in zip(_names(function), function.body.block.args, strict=True)}
    types |= {op.fqn.data: op.result for op in module.walk() if isinstance(op, tc.WeightOp)}
    weights = [
        WeightSource(name=name, dtype=elem_of(types[name]), shape=tuple(shape_of(types[name])), seed=0)
        for name in dict.fromkeys(p.weight for p in programs.placements)
    ]
    model = Model(
        id=path.name, architecture="function", model_type="function", kind="function", num_layers=0, vocab_size=None,
        max_positions=None,
    )  # fmt: skip
    with ArtifactWriter(out) as writer:
        write_programs(writer, programs, machine, model, single_unit(machine), "random:0", weights, [])
    return open_artifact(out)


def _names(function: FuncOp) -> list[str]:
    return names_of(function, "arg_names", len(function.body.block.args))


def _entry(module: ModuleOp, path: Path) -> FuncOp:
    """The function to run, renamed to `main`: the one of that name, or the only one."""
    functions = [op for op in module.ops if isinstance(op, FuncOp)]
    named = [f for f in functions if f.sym_name.data == "main"] or functions
    if len(named) != 1:
        why = f"it has {len(functions)} functions and none is called main" if functions else "it has no function"
        raise UserError([Problem(f"{path} cannot be built", why, "keep one `func.func`")])
    named[0].sym_name = StringAttr("main")
    return named[0]


def _cache_geometry(function: FuncOp) -> tuple[int, int]:
    """(batch, length) of the caches among the arguments; (1, 0) if there are none."""
    args = zip(_names(function), function.body.block.args, strict=True)
    shapes = [shape_of(v) for name, v in args if name.startswith("cache.")]
    return max((s[0] for s in shapes), default=1), max((s[2] for s in shapes), default=0)
