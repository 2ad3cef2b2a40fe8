"""A policy and a tokenizer that a Python program has made, as a run needs them; what it changed is put back."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.config import ModelConfig, Precision
from rlhf.models.loading import load_tokenizer, prepare
from rlhf.models.saving import GENERATION, Brought, carry
from rlhf.models.stop_tokens import carry_stop_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def check_policy(policy: Any) -> Precision:
    """The dtype of its weights; ValueError where no run can train the object, or no worker make one like it."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

    kind = type(policy).__name__
    if not isinstance(policy, PreTrainedModel):
        wrapped = ": give the model inside, and set model.lora.rank for an adapter" if hasattr(policy, "module") or (
            hasattr(policy, "peft_config")
        ) else ""  # fmt: skip
        raise ValueError(f"policy= must be a causal LM of transformers (got {kind}){wrapped}")
    shape = policy.config
    known = shape.model_type in CONFIG_MAPPING and MODEL_FOR_CAUSAL_LM_MAPPING.get(type(shape), None) is type(policy)
    if not (known or policy.is_remote_code()):
        raise ValueError(f"policy= must be what AutoModelForCausalLM makes of its config (got {kind})")
    weights = list(policy.parameters())
    if getattr(policy, "is_quantized", False) or getattr(policy, "peft_config", None):
        raise ValueError(f"policy= is quantised or has an adapter: give a plain {kind}, and set model.lora.rank")
    if len({weight.device for weight in weights}) > 1 or any(weight.is_meta for weight in weights):
        raise ValueError("policy= must lie on one device, with all its weights: load it without device_map")
    dtypes = sorted({str(weight.dtype).removeprefix("torch.") for weight in weights})
    allowed = [precision.value for precision in Precision]
    if len(dtypes) > 1 or dtypes[0] not in allowed:
        raise ValueError(f"policy= must have all weights in {' or in '.join(allowed)} (got {', '.join(dtypes)})")
    if frozen := [name for name, weight in policy.named_parameters() if not weight.requires_grad]:
        raise ValueError(
            f"policy= has {len(frozen)} weights that do not learn ({frozen[0]}, ...), and a run trains all: call "
            "policy.requires_grad_(True), or set model.lora.rank"
        )
    return Precision(dtypes[0])


def ready(policy: PreTrainedModel, config: ModelConfig) -> PreTrainedModel:
    """The same object, with the attention that the configuration asks for."""
    if config.implementation is not None:
        policy.set_attn_implementation(config.implementation)
    return policy


def given_tokenizer(
    tokenizer: PreTrainedTokenizerBase | None, policy: PreTrainedModel | None
) -> PreTrainedTokenizerBase | None:
    """A copy of the tokenizer as runs have it, or that of the folder or name that the policy was loaded from.

    None where the program gives neither. What it writes has the policy's generation_config.json.
    """
    if tokenizer is not None:
        tokenizer = copy.deepcopy(tokenizer)
        prepare(tokenizer, "tokenizer=")
    elif policy is not None:
        if not policy.name_or_path:
            raise ValueError("policy= was not loaded from anywhere, so that its tokenizer must be given: tokenizer=...")
        tokenizer = load_tokenizer(policy.name_or_path, "policy= without tokenizer=", policy.is_remote_code())
    if tokenizer is not None and policy is not None:
        _carry(tokenizer, policy)
    return tokenizer


def _carry(tokenizer: PreTrainedTokenizerBase, policy: PreTrainedModel) -> None:
    """Let it have what the policy says of the tokens that end an answer, and of how it is sampled by others."""
    text, said = policy.config.get_text_config(), policy.generation_config
    named = [getattr(said, "eos_token_id", None), policy.config.eos_token_id, text.eos_token_id]
    carry_stop_ids(tokenizer, named, text.vocab_size)
    files = {} if said is None else {GENERATION: said.to_json_string().encode()}
    carry(tokenizer, Brought(Path(), files))


@contextmanager
def borrowed(policy: PreTrainedModel | None) -> Iterator[None]:
    """Its weights are trained inside; all else is afterwards what it was, but for the device, and for an adapter."""
    if policy is None:
        yield
        return
    shapes = (policy.config, policy.config.get_text_config())
    ends = [{name: getattr(shape, name, None) for name in ("eos_token_id", "pad_token_id")} for shape in shapes]
    generation, training = policy.generation_config, policy.training
    attention = policy.config._attn_implementation
    layers = {each: each.gradient_checkpointing for each in policy.modules() if hasattr(each, "gradient_checkpointing")}
    try:
        yield
    finally:
        for shape, told in zip(shapes, ends, strict=True):
            shape.update(told)
        policy.generation_config = generation
        if policy.config._attn_implementation != attention:
            policy.set_attn_implementation(attention)
        for layer, was in layers.items():
            layer.gradient_checkpointing = was
        policy.train(training)
