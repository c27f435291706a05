"""What goes wrong silently in naive captures: each trap has a test that a wrong capture fails."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.models.llama import modeling_llama

from frontend import architectures
from frontend.capture import capture
from frontend.export import functional, mutating_nodes
from frontend.resolve import resolve_model
from ir.errors import UserError
from tests.frontend.running import Decoder, function, ops, reference_logits
from tests.frontend.tiny import make_config, save_model

TEXT = np.random.default_rng(11).integers(3, 97, size=10)


def check_logits(captured: Any, model: Any) -> None:
    """Prefill of most of the text, then one token at a time, against the unmodified model."""
    wanted = reference_logits(model, TEXT.tolist())
    decoder = Decoder(captured, 1, 17)
    tokens = np.concatenate([TEXT[:7], [0, 0]])[None]
    logits = decoder.step(tokens, np.arange(9)[None])[0]
    np.testing.assert_allclose(logits[:7], wanted[:7], atol=2e-5 * np.abs(wanted).max())
    for position in range(7, 10):
        logits = decoder.step(TEXT[None, position : position + 1], np.array([[position]]))[0]
        np.testing.assert_allclose(logits[0], wanted[position], atol=2e-5 * np.abs(wanted).max())


REMOTE = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP


class OddConfig(LlamaConfig):
    model_type = "odd"


class InPlaceMLP(LlamaMLP):
    def forward(self, x):
        gate = self.act_fn(self.gate_proj(x))
        gate.mul_(self.up_proj(x))
        gate[..., 3:7].mul_(0.5)
        return self.down_proj(gate)


class UnsupportedMLP(LlamaMLP):
    def forward(self, x):
        x = torch.cumsum(x, -1)
        y = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return torch.sort(y, dim=-1).values


class OddForCausalLM(LlamaForCausalLM):
    config_class = OddConfig

    def __init__(self, config):
        super().__init__(config)
        kind = UnsupportedMLP if config.hidden_act == "gelu" else InPlaceMLP
        for layer in self.model.layers:
            layer.mlp.__class__ = kind
"""


def odd_model(directory: Path, **changes: Any) -> Any:
    """A model with its own code, whose MLP works in place; returns the reference model."""
    model = save_model("llama", directory, **changes)
    (directory / "modeling_odd.py").write_text(REMOTE, "utf-8")
    config = json.loads((directory / "config.json").read_text("utf-8"))
    config["model_type"] = "odd"
    config["architectures"] = ["OddForCausalLM"]
    config["auto_map"] = {
        "AutoConfig": "modeling_odd.OddConfig",
        "AutoModelForCausalLM": "modeling_odd.OddForCausalLM",
    }
    (directory / "config.json").write_text(json.dumps(config), "utf-8")
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        directory, trust_remote_code=True, dtype=torch.float32, attn_implementation="eager"
    )
    del model
    return reference.eval()


def test_in_place_operators_of_remote_code_take_effect(tmp_path: Path) -> None:
    """Export IR is not functional: erasing unused nodes would drop `mul_` on a slice."""
    model = odd_model(tmp_path)
    captured = capture(resolve_model(tmp_path, trust_remote_code=True, compute_dtype="f32"))
    assert captured.info.functionalised
    assert captured.info.mode == "all layers"
    assert captured.info.exported_layers == 3
    assert captured.info.blocks == 1, "bodies found equal by their hash share one function"
    assert "remote code" in captured.info.notes[0]
    check_logits(captured, model)


def test_remote_code_needs_consent(tmp_path: Path) -> None:
    odd_model(tmp_path)
    with pytest.raises(UserError, match="trust-remote-code"):
        resolve_model(tmp_path, compute_dtype="f32")


def test_functional_keeps_what_mutations_did() -> None:
    class Module(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x * 2
            y[:, 1:3].zero_()
            y.add_(1)
            return y

    x = torch.randn(2, 5)
    program = torch.export.export(Module(), (x,), strict=False)
    assert len(mutating_nodes(program)) >= 2
    after, changed = functional(program)
    assert changed
    assert not mutating_nodes(after)
    assert torch.equal(after.module()(x), Module()(x))


def test_all_unsupported_operators_are_reported_with_their_lines(tmp_path: Path) -> None:
    odd_model(tmp_path, hidden_act="gelu", num_hidden_layers=2)
    with pytest.raises(UserError) as caught:
        capture(resolve_model(tmp_path, trust_remote_code=True, compute_dtype="f32"))
    texts = [str(p) for p in caught.value.problems]
    assert len([t for t in texts if "aten.cumsum" in t]) == 1
    assert len([t for t in texts if "aten.sort" in t]) == 1
    line = REMOTE.split("\n").index("        x = torch.cumsum(x, -1)") + 1
    assert any(f"model.layers.0.mlp at modeling_odd.py:{line}" in t for t in texts), texts


@pytest.mark.parametrize("model_type", ["gptj", "gpt_neo", "bloom", "codegen"])
def test_models_that_bypass_the_attention_interface_are_refused(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values: dict[str, Any] = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    if model_type == "gpt_neo":
        values = {"vocab_size": 97, "hidden_size": 32, "num_layers": 2, "num_heads": 4}
        values["attention_types"] = [[["global", "local"], 1]]
    if model_type == "bloom":
        values = {"vocab_size": 97, "hidden_size": 32, "n_layer": 2, "n_head": 4}
    if model_type in ("gptj", "codegen"):
        values["rotary_dim"] = 4
    transformers.AutoConfig.for_model(model_type, **values).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="AttentionInterface"):
        resolve_model(tmp_path, need_weights=False)
    # Even if the table let it pass, capture itself notices that attention nodes are missing.
    monkeypatch.delitem(architectures.REFUSED, model_type)
    monkeypatch.setitem(architectures.SUPPORTED, model_type, architectures.Architecture("decoder"))
    with pytest.raises(UserError, match="AttentionInterface"):
        capture(resolve_model(tmp_path, need_weights=False), weights="none")


def test_buffers_without_values_are_computed(tmp_path: Path) -> None:
    """`inv_freq` is in no checkpoint and has no value on the meta device; llama3 scaling must be in it."""
    model = save_model("llama-rope3", tmp_path)
    captured = capture(resolve_model(tmp_path, compute_dtype="f32"))
    stored = captured.weights.load("model.rotary_emb.inv_freq")
    np.testing.assert_array_equal(stored, model.model.rotary_emb.inv_freq.numpy())
    plain = 1 / 10000.0 ** (np.arange(0, 12, 2) / 12)
    assert not np.allclose(stored, plain)
    assert "model.rotary_emb.original_inv_freq" not in captured.weights


def test_scalar_buffers_become_literals(tmp_path: Path) -> None:
    save_model("gemma2", tmp_path)
    captured = capture(resolve_model(tmp_path, compute_dtype="bf16"))
    scale = float(torch.tensor(48**0.5).to(torch.bfloat16))
    assert any(f"mul(a, {scale!r})" in op.expr.data for op in ops(captured, "main", "tc.map"))
    assert not any("embed_scale" in name for name in captured.weights)


@pytest.mark.parametrize("kept", ["model.embed_tokens.weight", "lm_head.weight"])
def test_tied_weights_have_one_name(kept: str, tmp_path: Path) -> None:
    """Both users read one parameter; a checkpoint may store it under either name."""
    model = save_model("llama-tied", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    table = tensors.pop("model.embed_tokens.weight")
    tensors.pop("lm_head.weight", None)
    save_file(tensors | {kept: table}, tmp_path / "model.safetensors")
    captured = capture(resolve_model(tmp_path, compute_dtype="f32"))
    assert "lm_head.weight" not in captured.weights
    embedding = next(w for w in ops(captured, "main", "tc.weight") if w.fqn.data == "model.embed_tokens.weight")
    assert len(list(embedding.result.uses)) == 2
    assert captured.weights["model.embed_tokens.weight"].tensor == kept
    check_logits(captured, model)


def test_untied_weights_stay_apart(tmp_path: Path) -> None:
    save_model("llama", tmp_path)
    captured = capture(resolve_model(tmp_path, compute_dtype="f32"))
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= set(captured.weights)


def test_code_that_computes_with_the_layer_index_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that look equal but use their index are exported one by one."""
    original = modeling_llama.LlamaAttention.forward

    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        out, weights = original(self, hidden_states, *args, **kwargs)
        return out * (1.0 + self.layer_idx), weights

    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", forward)
    model = save_model("llama", tmp_path)
    captured = capture(resolve_model(tmp_path, compute_dtype="f32"))
    assert captured.info.mode == "all layers"
    assert captured.info.blocks == 3
    assert "layer's index" in captured.info.notes[0]
    check_logits(captured, model)


def test_layers_that_exchange_more_than_the_hidden_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A value that one layer keeps for all later ones makes the short cut illegal."""
    original, init = modeling_llama.LlamaDecoderLayer.forward, modeling_llama.LlamaDecoderLayer.__init__

    def different(self: Any, config: Any, layer_idx: int) -> None:
        init(self, config, layer_idx)
        self.kind = str(layer_idx)

    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        out = original(self, hidden_states, *args, **kwargs)
        shared = kwargs["position_embeddings"][0]
        if self.kind == "0":
            shared.first_output = out
            return out
        return out + 0.25 * shared.first_output

    monkeypatch.setattr(modeling_llama.LlamaDecoderLayer, "__init__", different)
    monkeypatch.setattr(modeling_llama.LlamaDecoderLayer, "forward", forward)
    model = save_model("llama", tmp_path)
    captured = capture(resolve_model(tmp_path, compute_dtype="f32"))
    assert captured.info.mode == "all layers"
    assert "more than the result of the layer before" in captured.info.notes[0]
    check_logits(captured, model)


def test_masks_and_bias_that_attention_cannot_carry_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = modeling_llama.LlamaAttention.forward

    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        kwargs["attention_mask"] = torch.zeros(1, 1, 1, 1, device=hidden_states.device)
        return original(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", forward)
    make_config("llama").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="own attention mask"):
        capture(resolve_model(tmp_path, need_weights=False), weights="none")


def test_one_attention_and_two_cache_updates_a_layer(tmp_path: Path) -> None:
    save_model("gemma2", tmp_path)
    captured = capture(resolve_model(tmp_path, compute_dtype="f32"))
    for block in ("block_0", "block_1"):
        assert len(ops(captured, block, "tc.attention")) == 1
        assert len(ops(captured, block, "tc.kv_update")) == 2
    windows = [ops(captured, f"block_{i}", "tc.attention")[0].window.value.data for i in (0, 1)]
    assert windows == [4, 0]
    paths = {str(op.attributes.get("path")) for op in function(captured, "block_0").body.block.ops}
    assert {'"mlp.down_proj"', '"self_attn.q_proj"', '"pre_feedforward_layernorm"'} <= paths
    lines = {str(op.location) for op in ops(captured, "block_0", "tc.attention")}
    assert all("modeling_gemma2.py" in line for line in lines)


def test_missing_and_misshapen_weights_are_listed_together(tmp_path: Path) -> None:
    save_model("llama", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"], tensors["model.norm.weight"]
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:50].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError) as caught:
        capture(resolve_model(tmp_path, compute_dtype="f32"))
    texts = sorted(p.what for p in caught.value.problems)
    assert texts == [
        "weight lm_head.weight has another shape",
        "weight model.layers.1.mlp.up_proj.weight is missing",
        "weight model.norm.weight is missing",
    ]


def test_random_weights_need_only_shapes(tmp_path: Path) -> None:
    make_config("qwen2").save_pretrained(tmp_path)
    source = resolve_model(tmp_path, need_weights=False)
    first, again, other = (capture(source, weights=w).weights for w in ("random:3", "random:3", "random:4"))
    name = "model.layers.2.self_attn.q_proj.bias"
    np.testing.assert_array_equal(first.load(name), again.load(name))
    assert not np.array_equal(first.load(name), other.load(name))
    nothing = capture(source, weights="none").weights
    assert set(nothing) == set(first)
    with pytest.raises(UserError):
        nothing.load(name)
    np.testing.assert_array_equal(nothing.load("model.rotary_emb.inv_freq"), first.load("model.rotary_emb.inv_freq"))
    for wrong in ("copy", "none:3", "random:x"):
        with pytest.raises(UserError, match="weights"):
            capture(source, weights=wrong)


def test_first_layers_only(tmp_path: Path) -> None:
    model = save_model("gemma2", tmp_path)
    captured = capture(resolve_model(tmp_path, compute_dtype="f32"), num_hidden_layers=3)
    assert captured.info.layers == 3
    assert captured.info.layer_kinds == [0, 1, 0]
    model.model.layers = model.model.layers[:3]
    model.config.num_hidden_layers = 3
    check_logits(captured, model)
    with pytest.raises(UserError, match="num_hidden_layers"):
        capture(resolve_model(tmp_path, compute_dtype="f32"), num_hidden_layers=9)


def test_sharded_checkpoint(tmp_path: Path) -> None:
    model = save_model("gpt2", tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="40KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    captured = capture(resolve_model(tmp_path / "many", compute_dtype="f32"))
    check_logits(captured, model)
    # A checkpoint of the base model has no `transformer.` prefix.
    model.transformer.save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text("utf-8"))
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"architectures": ["GPT2LMHeadModel"]}))
    assert "h.0.attn.c_attn.weight" in load_file(tmp_path / "base" / "model.safetensors")
    check_logits(capture(resolve_model(tmp_path / "base", compute_dtype="f32")), model)
    shutil.rmtree(tmp_path / "many")
