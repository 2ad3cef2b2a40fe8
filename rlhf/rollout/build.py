"""The model of a worker, made from its spec: transformers' config, the module, and what it can take."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from rlhf.models.stop_tokens import stop_ids_of
from rlhf.rollout.completions import Limits
from rlhf.rollout.spec import WorkerSpec

if TYPE_CHECKING:
    import torch


def architecture_of(model: Any) -> dict[str, Any]:
    """The `WorkerSpec.architecture` of a transformers model."""
    return json.loads(model.config.to_json_string(use_diff=False))


def _with_floats(value: Any) -> Any:
    """A setting with the numbers that JSON does not have: transformers writes {"__float__": "Infinity"}."""
    if isinstance(value, dict):
        if list(value) == ["__float__"]:
            return float(value["__float__"])
        return {name: _with_floats(each) for name, each in value.items()}
    return [_with_floats(each) for each in value] if isinstance(value, list) else value


def build_model(spec: WorkerSpec) -> torch.nn.Module:
    """A model of the spec's architecture; its weights, or those of its adapter, are nothing until the first update."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    from rlhf.models.adapter import AdapterSpec, load_base

    shape = config_of(spec)
    torch.backends.cuda.enable_cudnn_sdp(False)  # as in the trainer
    build = {"dtype": getattr(torch, spec.dtype), "attn_implementation": spec.attention}
    build["trust_remote_code"] = bool(spec.code)
    if spec.adapter is not None:
        based: torch.nn.Module = load_base(AdapterSpec(**spec.adapter), config=shape, **build)
        return based.to(spec.device).requires_grad_(False)
    with no_init_weights():  # on the CPU, where the trainer makes its model: rotary frequencies have the same bits
        model = AutoModelForCausalLM.from_config(shape, **build)
    model.tie_weights()
    return model.to(spec.device).eval().requires_grad_(False)


def config_of(spec: WorkerSpec) -> Any:
    """The transformers config of a spec's architecture; ValueError where nobody knows it."""
    from transformers import CONFIG_MAPPING, AutoConfig

    settings = {name: _with_floats(value) for name, value in spec.architecture.items()}
    model_type = settings.pop("model_type")
    if spec.code:
        made: Any = AutoConfig.from_pretrained(spec.code, trust_remote_code=True)
        return type(made).from_dict(settings | {"name_or_path": spec.code})  # where the model's code is looked for
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"model_type {model_type!r} of the architecture is none that transformers knows")
    return CONFIG_MAPPING[model_type].from_dict(settings)


def limits_of(text: Any, positions: int | None = None) -> Limits:
    """What a model with this transformers config can take, `positions` of its context at most."""
    return Limits(
        vocabulary=text.vocab_size,
        positions=positions or getattr(text, "max_position_embeddings", None),
        stop_ids=stop_ids_of(text),
    )
