"""Layers of equal signature are captured once: graph, export and time do not grow with depth."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from frontend.capture import Captured, capture
from frontend.resolve import resolve_model
from ir.text import parse_module, print_module
from tests.frontend.running import function, names, ops
from tests.frontend.tiny import make_config

CONFIGS = Path(__file__).parents[1] / "configs"


def captured_config(case: str, directory: Path, layers: int) -> Captured:
    key = "n_layer" if case == "gpt2" else "num_hidden_layers"
    make_config(case, **{key: layers}).save_pretrained(directory)
    return capture(resolve_model(directory, need_weights=False), weights="none")


@pytest.mark.parametrize(("case", "kinds"), [("llama", 1), ("gemma2", 2), ("gpt2", 1), ("bert", 1)])
def test_blocks_and_export_do_not_grow_with_depth(case: str, kinds: int, tmp_path: Path) -> None:
    shallow = captured_config(case, tmp_path / "4", 4)
    deep = captured_config(case, tmp_path / "8", 8)
    for captured in (shallow, deep):
        assert captured.info.mode == "representatives"
        assert not captured.info.notes
        assert captured.info.blocks == captured.info.exported_layers == kinds
        assert len(ops(captured, "main", "func.call")) == captured.info.layers
    assert shallow.info.graph_nodes == deep.info.graph_nodes
    for block in range(kinds):
        assert str(function(shallow, f"block_{block}")) == str(function(deep, f"block_{block}"))
    assert deep.info.layer_kinds == [i % kinds for i in range(8)]
    of_layer = [{re.sub(r"\.\d+\.", ".N.", n) for n in deep.weights if f".{i}." in n} for i in (2, 6)]
    assert of_layer[0] == of_layer[1]
    assert len(of_layer[0]) > 8


def test_each_layer_gets_its_own_weights_and_caches(tmp_path: Path) -> None:
    captured = captured_config("gemma2", tmp_path, 5)
    arguments = names(captured, "main", "arg_names")
    assert arguments[:2] == ["input_ids", "position_ids"]
    assert arguments[2:] == [f"cache.{kv}.{i}" for i in range(5) for kv in "kv"]
    assert names(captured, "main", "result_names") == ["logits", *arguments[2:]]
    main = function(captured, "main")
    for layer, call in enumerate(ops(captured, "main", "func.call")):
        block = call.callee.string_value()
        assert block == f"block_{layer % 2}"
        assert call.attributes["path"].data == f"model.layers.{layer}"
        for name, operand in zip(names(captured, block, "arg_names"), call.operands, strict=True):
            if name.startswith("w:"):
                assert operand.owner.fqn.data == f"model.layers.{layer}.{name[2:]}"
            elif name.startswith("cache."):
                assert operand is main.body.block.args[arguments.index(f"{name}.{layer}")]


def test_text_round_trip(tmp_path: Path) -> None:
    for case in ("gemma2", "gpt2", "bert"):
        module = captured_config(case, tmp_path / case, 3).module
        module.verify()
        again = parse_module(print_module(module))
        assert again.is_structurally_equivalent(module)


def test_full_size_configs_are_captured_from_config_alone() -> None:
    """Llama 3.1 8B and 70B: the same block up to sizes, and nearly the same time for 32 and 80 layers."""
    capture(resolve_model(CONFIGS / "llama-3.1-8b", need_weights=False), weights="none")  # warm torch up
    best: dict[str, float] = {}
    captured: Captured | None = None
    for model, layers in {"8b": 32, "70b": 80}.items():
        source = resolve_model(CONFIGS / f"llama-3.1-{model}", need_weights=False)
        for _ in range(3):
            start = time.process_time()
            captured = capture(source, weights="none")
            best[model] = min(best.get(model, 1e9), time.process_time() - start)
        assert captured is not None
        assert captured.info.layers == layers
        assert captured.info.blocks == 1
        assert source.max_positions == 131072
    assert best["70b"] <= 1.3 * best["8b"] + 0.1, best
