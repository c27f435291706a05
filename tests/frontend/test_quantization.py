"""quantization_config: what is read, what is refused, and that the tensors of a checkpoint are bound by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from frontend.capture import capture
from frontend.quantization import read_quantization
from frontend.resolve import resolve_model
from ir.dialects import tc
from ir.errors import Problem, UserError
from ir.quantization import Scheme, schemes_of
from ir.weights import safetensors_refs, write_safetensors
from tests.cli.quantized_models import BF16, config_of, is_linear, quantize, write_quantized

SCHEMES = {
    "int8": Scheme("int8"),
    "fp8-channel": Scheme("fp8"),
    "fp8-tensor": Scheme("fp8", per_channel=False, dynamic=False),
    "int4-32": Scheme("int4", group=32),
}


@pytest.mark.parametrize("name", list(SCHEMES))
def test_schemes_that_are_read(name: str) -> None:
    problems: list[Problem] = []
    found = read_quantization(config_of(name), problems)
    assert not problems and found is not None
    assert found.scheme_of("model.layers.3.mlp.up_proj") == SCHEMES[name]
    assert found.scheme_of("lm_head") is None
    assert Scheme.parse(str(SCHEMES[name])) == SCHEMES[name]


def test_targets_and_exceptions() -> None:
    config = config_of("int8")
    config["config_groups"]["group_0"]["targets"] = ["re:.*self_attn.*", "model.layers.0.mlp.up_proj"]
    config["ignore"] = ["re:.*o_proj$"]
    found = read_quantization(config, [])
    assert found is not None
    assert found.scheme_of("model.layers.1.self_attn.q_proj") is not None
    assert found.scheme_of("model.layers.0.mlp.up_proj") is not None
    assert found.scheme_of("model.layers.1.mlp.up_proj") is None
    assert found.scheme_of("model.layers.1.self_attn.o_proj") is None


GROUP, W, A = ("config_groups", "group_0"), "weights", "input_activations"


@pytest.mark.parametrize(
    ("scheme", "path", "value", "message"),
    [
        ("int8", ("quant_method",), "gptq", "quantised (gptq)"),
        ("int8", ("quant_method",), "awq", "quantised (awq)"),
        ("int8", ("quant_method",), "fp8", "quantised (fp8)"),
        ("int8", ("kv_cache_scheme",), {"num_bits": 8}, "a quantised KV cache"),
        ("int8", ("transform_config",), {"config_groups": {"u": 1}}, "transformed weights"),
        ("int8", ("sparsity_config",), {"format": "sparse-24-bitmask"}, "sparse"),
        ("int8", ("config_groups",), {}, "no config_groups"),
        ("int8", ("format",), "naive-quantized", "format naive-quantized"),
        ("int8", (*GROUP, "output_activations"), {"num_bits": 8}, "outputs are quantised"),
        ("int8", (*GROUP, W, "symmetric"), False, "weights have zero points"),
        ("int8", (*GROUP, A, "symmetric"), False, "activations have zero points"),
        ("int8", (*GROUP, W, "strategy"), "group", "scales per group"),
        ("int8", (*GROUP, W, "num_bits"), 6, "6-bit int weights"),
        ("int8", (*GROUP, A), None, "8-bit int weights and bf16 activations"),
        ("int8", (*GROUP, A, "dynamic"), "local", "dynamic: local"),
        ("int8", (*GROUP, A, "strategy"), "group", "activations with scales per group"),
        ("fp8-channel", (*GROUP, W, "strategy"), "block", "scales per block"),
        ("fp8-channel", (*GROUP, A, "type"), "int", "8-bit float weights and 8-bit int activations"),
        ("fp8-channel", (*GROUP, W, "num_bits"), 4, "4-bit float weights"),
        ("int4-32", (*GROUP, W, "symmetric"), False, "weights have zero points"),
        ("int4-32", (*GROUP, W, "actorder"), "group", "activations' order"),
        ("int4-32", (*GROUP, W, "group_size"), 16, "groups of 16"),
        ("int4-32", (*GROUP, A), {"num_bits": 8, "type": "int"}, "4-bit weights with quantised activations"),
    ],
)
def test_what_is_not_computed_is_refused(scheme: str, path: tuple[str, ...], value: Any, message: str) -> None:
    config: dict[str, Any] = json.loads(json.dumps(config_of(scheme)))
    at: Any = config
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    problems: list[Problem] = []
    assert read_quantization(config, problems) is None
    assert any(message in p.what for p in problems), [str(p) for p in problems]
    assert all(p.why and p.fix for p in problems)


def test_all_problems_at_once() -> None:
    config: dict[str, Any] = config_of("int8") | {"kv_cache_scheme": {"num_bits": 8}}
    config["config_groups"]["group_1"] = {"weights": {"num_bits": 3, "type": "int"}, "targets": ["lm_head"]}
    problems: list[Problem] = []
    read_quantization(config, problems)
    assert len(problems) == 2


# Capture -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", list(SCHEMES))
def test_tensors_are_bound_by_name(tmp_path: Path, name: str) -> None:
    """The module is that of the unquantized model; the table names the stored tensors instead."""
    write_quantized(tmp_path / "m", name)
    captured = capture(resolve_model(tmp_path / "m"))
    found = schemes_of(captured.module)
    assert set(found.values()) == {SCHEMES[name]}
    assert len(found) == 14 and all(is_linear(n) for n in found)
    weights = {op.fqn.data for op in captured.module.walk() if isinstance(op, tc.WeightOp)}
    for fqn, scheme in found.items():
        assert fqn in weights
        for part, (shape, _) in scheme.tensors(fqn, (64, 64)).items():
            assert captured.weights.load(part).size == np.prod(captured.weights[part].shape)
            assert len(captured.weights[part].shape) == len(shape)
    assert captured.weights["lm_head.weight"].dtype == "bf16"
    stored = captured.weights["model.layers.0.mlp.up_proj.weight_scale"]
    assert stored.dtype == "bf16"


def _edit(path: Path, **changes: Any) -> None:
    refs = safetensors_refs(path)
    from ir.weights import WeightTable

    table = WeightTable({r.name: r for r in refs})
    arrays = {name: np.array(table.load(name)) for name in table}
    for name, value in changes.items():
        if value is None:
            del arrays[name]
        else:
            arrays[name] = value
    write_safetensors(path, arrays)


UP = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{UP}.weight_scale": None}, f"weight {UP}.weight_scale is missing"),
        ({f"{UP}.weight_scale": np.ones((95, 1), BF16)}, f"weight {UP}.weight_scale has another shape"),
        ({f"{UP}.weight": np.ones((96, 64), BF16)}, f"weight {UP}.weight has another type"),
        ({f"{UP}.weight_scale": np.ones((96, 1), np.int32)}, f"weight {UP}.weight_scale has another type"),
        ({"lm_head.weight_scale": np.ones((128, 1), BF16)}, "weight lm_head.weight is quantized"),
    ],
)
def test_tensors_that_do_not_fit_the_config(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    write_quantized(tmp_path / "m", "int8")
    _edit(tmp_path / "m" / "model.safetensors", **change)
    with pytest.raises(UserError) as error:
        capture(resolve_model(tmp_path / "m"))
    assert [p.what for p in error.value.problems] == [message]


def test_a_config_that_names_no_layer(tmp_path: Path) -> None:
    write_quantized(tmp_path / "m", "int8")
    path = tmp_path / "m" / "config.json"
    config = json.loads(path.read_text("utf-8"))
    config["quantization_config"]["config_groups"]["group_0"]["targets"] = ["Conv2d"]
    path.write_text(json.dumps(config), "utf-8")
    with pytest.raises(UserError, match="names no linear layer"):
        capture(resolve_model(tmp_path / "m"))


@pytest.mark.parametrize("name", ["int8", "int4-32"])
def test_random_weights_need_only_the_config(tmp_path: Path, name: str) -> None:
    write_quantized(tmp_path / "m", name)
    (tmp_path / "m" / "model.safetensors").unlink()
    captured = capture(resolve_model(tmp_path / "m", need_weights=False), weights="random:1")
    part = "weight_packed" if name.startswith("int4") else "weight"
    values = captured.weights.load(f"model.layers.0.mlp.up_proj.{part}")
    assert len(np.unique(values)) > 50
    assert (captured.weights.load("model.layers.0.mlp.up_proj.weight_scale") > 0).all()


# The library's own code ----------------------------------------------------------------------------------------------
def test_packed_layout_is_that_of_the_library() -> None:
    library = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(3)
    stored = quantize(rng.standard_normal((16, 64)), "int4-32").tensors
    packed = torch.from_numpy(np.array(stored["weight_packed"]))
    numbers = library.unpack_from_int32(packed, 4, torch.Size([16, 64])).numpy()
    shifts = np.arange(0, 32, 4, dtype=np.uint32)
    ours = (stored["weight_packed"].view(np.uint32)[:, :, None] >> shifts & 15).astype(int).reshape(16, 64) - 8
    np.testing.assert_array_equal(numbers, ours)
