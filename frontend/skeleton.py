"""Building a model without weights: parameters on the meta device, buffers computed for real.

Buffers such as `inv_freq` are not in checkpoints; their values come from the module's constructor (llama3 scaling
included). So the constructor runs normally, except that every parameter is moved to the meta device as it is
registered; afterwards the buffers' values are kept aside and the buffers join the parameters on the meta device.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.initialization import no_init_weights

from frontend.interfaces import IMPLEMENTATION
from frontend.resolve import ModelSource
from ir.errors import Problem, UserError

TORCH_DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}


@dataclass
class Skeleton:
    """A model on the meta device.

    `buffers` holds the real value of every buffer by FQN; `aliases` maps every parameter FQN to the first FQN of the
    same tensor, so tied weights have one name.
    """

    model: nn.Module
    config: Any
    buffers: dict[str, Tensor]
    aliases: dict[str, str]


@contextlib.contextmanager
def _parameters_on_meta() -> Generator[None]:
    register = nn.Module.register_parameter

    def register_on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and param.device.type != "meta":
            param = nn.Parameter(param.detach().to("meta"), requires_grad=False)
        register(self, name, param)

    nn.Module.register_parameter = register_on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def build_skeleton(source: ModelSource, num_hidden_layers: int | None = None) -> Skeleton:
    """Instantiate the model of a source in its compute dtype, optionally only its first layers."""
    try:
        config = AutoConfig.from_pretrained(
            source.directory, trust_remote_code=source.remote_code, local_files_only=True
        )
    except _refusals(source, OSError, StrictDataclassError) as error:
        what, fix = f"config.json of {source.name} is not valid", "correct the config"
        if source.remote_code:
            what, fix = f"the Python code of {source.name} cannot be used", "correct it, or download the model again"
        raise UserError([Problem(what, _first_line(error), fix)]) from error
    config = copy.deepcopy(config)
    if num_hidden_layers is not None:
        depth = int(config.get_text_config().num_hidden_layers)
        if not 1 <= num_hidden_layers <= depth:
            what = f"num_hidden_layers {num_hidden_layers} is out of range"
            raise UserError([Problem(what, f"the model has {depth} layers", f"use 1 to {depth}")])
        truncate_config(config, list(range(num_hidden_layers)))
    config.use_cache = source.architecture.kind == "decoder"
    model_class = AutoModelForCausalLM if source.architecture.kind == "decoder" else AutoModel
    extra: dict[str, Any] = {"trust_remote_code": True} if source.remote_code else {}
    if source.architecture.kind == "encoder" and source.model_type in ("bert",):
        extra["add_pooling_layer"] = False
    try:
        with no_init_weights(), _parameters_on_meta():
            model = model_class.from_config(
                config,
                dtype=TORCH_DTYPES[source.compute_dtype],
                attn_implementation=IMPLEMENTATION,
                **extra,
            )
    except _refusals(source, ZeroDivisionError, RuntimeError) as error:
        if isinstance(error, KeyError) and error.args == (IMPLEMENTATION,):
            what = f"{source.model_type} picks its attention from a list of its own, not from AttentionInterface"
            why = "padded buckets and rows of different length would be silently wrong"
            fix = "use a model whose attention goes through AttentionInterface"
            raise UserError([Problem(what, why, fix)]) from error
        problem = Problem(
            f"{source.model_type} cannot be built from {source.directory / 'config.json'}",
            _first_line(error),
            "correct the config, or check that this version of transformers knows the model",
        )
        raise UserError([problem]) from error
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation(IMPLEMENTATION)
    model.eval()
    model.tie_weights()
    buffers = {name: value.detach().clone() for name, value in model.named_buffers(remove_duplicate=False)}
    for module in model.modules():
        for name, value in list(module._buffers.items()):
            if value is not None:
                module._buffers[name] = value.detach().to("meta")
    return Skeleton(model, model.config, buffers, _aliases(model))


def _refusals(source: ModelSource, *more: type[Exception]) -> tuple[type[Exception], ...]:
    """What a config that is wrong makes transformers raise; code of the model's own may raise anything."""
    if source.remote_code:
        return (Exception,)
    return (ValueError, KeyError, TypeError, ImportError, AttributeError, *more)


def _aliases(model: nn.Module) -> dict[str, str]:
    first: dict[int, str] = {}
    names: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[name] = first.setdefault(id(parameter), name)
    return names


def truncate_config(config: Any, keep: list[int]) -> None:
    """Keep only some layers in a config: the layer count and every per-layer list, in place.

    A per-layer list is one whose length is the layer count (`layer_types`, `mlp_layer_types`, ...).
    """
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    depth = int(config.num_hidden_layers)
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == depth and name.endswith(("types", "type", "layers")):
            setattr(config, name, [value[i] for i in keep])
    config.num_hidden_layers = len(keep)


def _first_line(error: BaseException) -> str:
    if isinstance(error, KeyError) and len(error.args) == 1:
        return f"{error.args[0]!r} is not one of the names that it knows"
    lines = [line.strip() for line in str(error).strip().splitlines()]
    if len(lines) > 1 and lines[0].endswith(":"):  # "Validation error for field 'x':" and then what is wrong
        return f"{lines[0]} {lines[1]}"
    if not lines:
        return type(error).__name__
    return lines[0] if isinstance(error, (ValueError, TypeError, OSError)) else f"{type(error).__name__}: {lines[0]}"
