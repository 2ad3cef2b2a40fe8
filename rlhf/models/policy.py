"""The policy: made small, or loaded from a folder or the hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rlhf.config import GivenModelConfig, HfModelConfig, ModelConfig, TinyModelConfig
from rlhf.models.device import check_attention, computing, resolve_device
from rlhf.models.given import ready
from rlhf.models.loading import from_pretrained, load_weights, without_dropout
from rlhf.models.saving import brought_by
from rlhf.models.stop_tokens import as_config, stop_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Decoders that name their layers, heads, ... alike and have value heads. Not qwen2, though it would fit: AutoTokenizer
# reads any qwen2 folder with Qwen2Tokenizer, whatever tokenizer was saved in it.
ARCHITECTURES = ("llama", "mistral", "qwen3")


def make_policy(
    config: ModelConfig, tokenizer: PreTrainedTokenizerBase, seed: int, given: PreTrainedModel | None = None
) -> PreTrainedModel:
    """The policy on its device, in eval mode and without dropout; `seed` decides a new model's weights.

    `given`: the model itself, of a Python program.
    """
    import torch
    from transformers import GenerationConfig

    from rlhf.models.recompute import enable

    device = resolve_device(config.device)
    check_attention(config)
    torch.backends.cuda.enable_cudnn_sdp(False)  # its attention is planned anew, for 0.1 s, for each new length
    match config:
        case TinyModelConfig():
            policy = _new_policy(config, tokenizer, seed)
        case HfModelConfig():
            policy = _load_policy(config, tokenizer)
        case GivenModelConfig() if given is not None:
            policy = ready(given, config)
            _check_embeds(policy, tokenizer, "policy=: the tokenizer")
        case _:
            raise AssertionError(f"no policy is made from {type(config).__name__}")
    ends = {"eos_token_id": as_config(stop_ids(tokenizer)), "pad_token_id": tokenizer.pad_token_id}
    for shape in (policy.config, policy.config.get_text_config()):
        shape.update(ends)
    policy.generation_config = GenerationConfig(**ends)  # sampling is the run's to choose, not the checkpoint's
    if config.gradient_checkpointing:
        enable(policy)
    return policy.to(device).eval()  # type: ignore[arg-type]


def _new_policy(config: TinyModelConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if config.architecture not in ARCHITECTURES:
        allowed = ", ".join(ARCHITECTURES)
        raise ValueError(f"model.architecture must be one of {allowed} (got {config.architecture!r})")
    shape = AutoConfig.for_model(
        config.architecture,
        vocab_size=len(tokenizer),
        hidden_size=config.hidden,
        intermediate_size=config.intermediate,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        head_dim=config.hidden // config.heads,
        max_position_embeddings=config.context,
        tie_word_embeddings=True,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # weights are made on the CPU: the same on every device
        return AutoModelForCausalLM.from_config(shape, **computing(config))


def _load_policy(config: HfModelConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    from transformers import AutoConfig, AutoModelForCausalLM

    trust = {"trust_remote_code": config.trust_remote_code}
    shape = without_dropout(from_pretrained(AutoConfig, config.path, "model.path: cannot load a model", **trust))
    policy = load_weights(AutoModelForCausalLM, config.path, "model.path", config=shape, **computing(config), **trust)
    if (brought := brought_by(tokenizer)) is not None:
        brought.look_at_weights()  # which are here by now
    _check_embeds(policy, tokenizer, f"model.path: the tokenizer of {config.path}")
    return policy


def _check_embeds(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, said: str) -> None:
    rows = len(policy.get_input_embeddings().weight)  # type: ignore[arg-type]
    if len(tokenizer) > rows:
        raise ValueError(f"{said} has {len(tokenizer)} tokens, and the model embeds only {rows}")


def reload(policy: PreTrainedModel, folder: Path) -> None:
    """Overwrite the policy's weights with those that `save_model` wrote; ValueError if they are another model's."""
    from transformers import AutoModelForCausalLM

    auto = type(policy) if policy.is_remote_code() else AutoModelForCausalLM  # whose code is here: none is read again
    saved = load_weights(auto, str(folder), "the checkpoint's policy", dtype=policy.dtype)
    try:
        policy.load_state_dict(saved.state_dict())
    except RuntimeError as error:
        raise ValueError(
            f"{folder} holds another model than model names: {' '.join(str(error).split())[:300]}"
        ) from error
