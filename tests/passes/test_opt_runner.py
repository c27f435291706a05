from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from xdsl.context import Context
from xdsl.dialects.builtin import FileLineColLoc, FusedLoc, IntAttr, ModuleOp, StringAttr, UnknownLoc
from xdsl.passes import ModulePass
from xdsl.utils.exceptions import PassFailedException, VerifyException

from ir.compare import _parts
from ir.dialects import tc
from ir.errors import UserError
from ir.text import parse_module, print_module, read_module
from ir.types import tensor_type
from passes.opt import opt_main, parse_passes, run_pipeline
from passes.pipeline import simplify_stage, spec, specialise_stage
from passes.registry import get_passes

FILECHECK = Path(__file__).parents[1] / "filecheck" / "passes"
NORM = FILECHECK / "fuse_elementwise.mlir"


def test_registry_names_are_pass_names_and_each_has_tests() -> None:
    for name, factory in get_passes().items():
        kind = factory()
        assert kind.name == name
        assert kind.__doc__
        module = sys.modules[kind.__module__]
        assert module.__doc__ is not None
        assert "Before:" in module.__doc__ or name == "simplify"
        assert Path(str(module.__file__)).stem == name.replace("-", "_")
        assert (FILECHECK / f"{name.replace('-', '_')}.mlir").is_file()


def test_pass_files_stay_small() -> None:
    for path in Path(sys.modules["passes.opt"].__file__ or "").parent.glob("*.py"):
        assert len(path.read_text("utf-8").splitlines()) <= 300, path


def test_stages_print_as_pipelines() -> None:
    text = spec([*simplify_stage(True), *specialise_stage(1, 512, None)])
    assert text == (
        "simplify,cast-bf16{allow=true},last-token,fuse-elementwise,simplify,wide-logits,"
        "specialise{batch=1 seq=512},simplify"
    )
    assert spec(parse_passes(text)) == text


def test_dumps_are_numbered_and_continue(tmp_path: Path) -> None:
    module = read_module(NORM)
    run_pipeline(module, "simplify,fuse-elementwise,simplify", tmp_path)
    files = sorted(p.name for p in tmp_path.iterdir())
    assert files == ["00-input.mlir", "01-simplify.mlir", "02-fuse-elementwise.mlir", "03-simplify.mlir"]
    for index, rest in ((0, "simplify,fuse-elementwise,simplify"), (1, "fuse-elementwise,simplify"), (3, "")):
        path = tmp_path / files[index]
        assert path.read_text().splitlines()[0] == f"// rngdc opt -p '{rest}' {path.name}"
        again = read_module(path)
        run_pipeline(again, rest)
        assert print_module(again) == print_module(module)


@dataclass(frozen=True)
class BreaksTheModule(ModulePass):
    """Leaves a contraction whose sizes disagree."""

    name = "break-it"
    how: str = "verify"

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        if self.how == "raise":
            raise PassFailedException("cannot do that")
        first = op.body.block.first_op
        assert first is not None
        weight = tc.WeightOp("w", tensor_type("bf16", [2, 3]))
        op.body.block.insert_ops_before(
            [weight, tc.ContractOp(weight, weight, "a b, b c -> a c", tensor_type("bf16", [2, 2]))], first
        )


@pytest.mark.parametrize("how", ["verify", "raise"])
def test_a_failing_pass_leaves_its_module_and_a_reproducer(how: str, tmp_path: Path) -> None:
    factories = get_passes() | {"break-it": lambda: BreaksTheModule}
    module = read_module(NORM)
    with pytest.raises((VerifyException, PassFailedException)) as caught:
        run_pipeline(module, f"simplify,break-it{{how={how}}},simplify", tmp_path, factories=factories)
    assert caught.value.__notes__[-1].startswith("in pass 'break-it")
    failed = (tmp_path / "02-break-it-failed.mlir").read_text()
    assert failed.startswith("// failed in 'break-it")
    assert "simplify' 01-simplify.mlir" in failed.splitlines()[1]
    assert ("a b, b c -> a c" in failed) == (how == "verify")
    assert not (tmp_path / "03-simplify.mlir").exists()


@pytest.mark.parametrize(
    ("pipeline", "message"),
    [
        ("simplfy", "Unrecognized passes: \\['simplfy'\\]"),
        ("specialise{batch=}", "pipeline 'specialise"),
        ("specialise{batch=1,seq=2}", "Error parsing pass pipeline"),
        ("specialise{batch=x}", "batch"),
        ("specialise{bach=1}", "bach"),
        ("simplify,,", "pipeline 'simplify,,'"),
    ],
)
def test_bad_pipelines_are_errors_of_the_user(pipeline: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_passes(pipeline)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert opt_main([str(NORM), "-p", "fuse-elementwise", "--dump-ir", str(tmp_path), "--time-passes"]) == 0
    captured = capsys.readouterr()
    assert "rsqrt(add(c, 1e-06))" in captured.out
    assert "fuse-elementwise" in captured.err
    parse_module(captured.out)  # nothing but the module on stdout
    assert (tmp_path / "01-fuse-elementwise.mlir").is_file()


def test_command_reports_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "bad.mlir"
    bad.write_text("func.func @main() { tc.nothing }")
    assert opt_main([str(bad)]) == 2
    assert "bad.mlir:1" in capsys.readouterr().err
    assert opt_main([str(tmp_path / "missing.mlir")]) == 2
    assert opt_main([str(NORM), "-p", "frobnicate"]) == 2
    assert "fix: passes are simplify, fuse-elementwise" in capsys.readouterr().err
    bad.write_text('%x = tc.weight "w" : tensor<2xf32>\n%y = tc.transpose %x [1] : tensor<2xf32>')
    assert opt_main([str(bad)]) == 1
    assert "[1] is no permutation of 1 dimensions" in capsys.readouterr().err
    assert opt_main([str(FILECHECK / "last_token_refused.mlir"), "-p", "specialise{seq=8},last-token"]) == 1
    assert "in pass 'last-token'" in capsys.readouterr().err


def test_provenance_survives_the_whole_pipeline() -> None:
    module = read_module(NORM)
    for line, op in enumerate(module.walk()):
        op.location = FileLineColLoc(StringAttr("model.py"), IntAttr(line), IntAttr(0))
    before = {line for op in module.walk() for line in lines_of(op.location)}
    run_pipeline(module, "simplify,fuse-elementwise,simplify")
    for op in module.walk():
        assert not isinstance(op.location, UnknownLoc), op
    norm = next(op for op in module.walk() if isinstance(op, tc.MapOp))
    assert len(lines_of(norm.location)) > 3
    assert {line for op in module.walk() for line in lines_of(op.location)} <= before


def lines_of(location: Any) -> list[int]:
    if isinstance(location, FusedLoc):
        return [line for part in _parts(location) for line in lines_of(part)]
    return [location.line.data] if isinstance(location, FileLineColLoc) else []


def test_starts_without_torch() -> None:
    code = "import passes.opt, ir.compare, sys; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_constants_of_every_element_type_survive_the_dtype_rule() -> None:
    module = parse_module('%c = tc.constant dense<[1.0, 2.5]> : tensor<2xf16>\n%w = tc.weight "w" : tensor<2xf16>')
    run_pipeline(module, "cast-bf16{allow=true}")
    constant = next(op for op in module.walk() if isinstance(op, tc.ConstantOp))
    assert constant.array().dtype == tc.ConstantOp(np.array([1.0]), tensor_type("bf16", [1])).array().dtype
    assert constant.array().tolist() == [1.0, 2.5]
