"""The policy and its tokenizer, and what is made from a policy: reward models and critics. B sequences, L positions."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.config import Device, HfModelConfig, ModelConfig, TinyModelConfig
from rlhf.models.loading import from_pretrained, load_tokenizer, load_weights, say_nothing_of_lengths, without_dropout
from rlhf.models.saving import brought_by
from rlhf.models.stop_tokens import as_config, stop_ids, stop_ids_of

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rlhf.models.adapter import AdapterSpec

# Decoders that name their layers, heads, ... alike and have value heads. Not qwen2, though it would fit: AutoTokenizer
# reads any qwen2 folder with Qwen2Tokenizer, whatever tokenizer was saved in it.
ARCHITECTURES = ("llama", "mistral", "qwen3")
SPECIAL = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
ROLES = ("system", "user", "assistant")
CHAT_TEMPLATE = (
    "{% if tools %}{{ '<|tools|>' + tools | tojson }}{% endif %}"
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['reasoning_content'] %}"
    "{{ '<|reasoning_content|>' + message['reasoning_content'] + '<|reasoning_content|>' }}{% endif %}"
    "{{ message['content'] or '' }}"
    "{% if message['tool_calls'] %}{{ '<|tool_calls|>' + message['tool_calls'] | tojson }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


class Head(Enum):
    """What a value model says about a sequence."""

    sequence = "sequence"  # one number for all of it: a reward model, see `scores`
    token = "token"  # one number a position: a critic


def resolve_device(device: Device) -> torch.device:
    """The device to use; ValueError if a GPU was asked for and there is none."""
    import torch

    available = torch.cuda.is_available()
    if device is Device.cuda and not available:
        raise ValueError(
            "model.device=cuda, and torch sees no CUDA device: choose model.device=cpu or model.device=auto"
        )
    return torch.device("cuda" if available and device is not Device.cpu else "cpu")


# --- tokenizer --------------------------------------------------------------------------------------------------------


def make_tokenizer(
    config: ModelConfig, characters: Iterable[str], chat: bool, tags: Iterable[str] = ()
) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer, or one token a character, with a chat template if `chat`; it pads on the left.

    `tags`: what messages are marked with, beside the usual roles, a token each.
    """
    match config:
        case TinyModelConfig():
            return _character_tokenizer(config, characters, [*ROLES, *sorted(set(tags) - set(ROLES))] if chat else [])
        case HfModelConfig():
            return load_tokenizer(config.path, "model.path", config.trust_remote_code)
    raise AssertionError(f"no tokenizer is made from {type(config).__name__}")


def _character_tokenizer(
    config: TinyModelConfig, characters: Iterable[str], tags: list[str]
) -> PreTrainedTokenizerBase:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_splitter(sorted(set(characters))),
        model_max_length=config.context,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,  # a text that spells "<eos>" is five characters, not the end
        **SPECIAL,
    )
    say_nothing_of_lengths(tokenizer)
    if tags:
        tokenizer.add_tokens([f"<|{tag}|>" for tag in tags])
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _splitter(characters: list[str]) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    words = [*SPECIAL.values(), *characters]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


# --- policy -----------------------------------------------------------------------------------------------------------


def make_policy(config: ModelConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """The policy on its device, in eval mode and without dropout; `seed` decides a new model's weights."""
    import torch
    from transformers import GenerationConfig

    from rlhf.models.recompute import enable

    device = resolve_device(config.device)
    _check_flash(config)
    torch.backends.cuda.enable_cudnn_sdp(False)  # its attention is planned anew, for 0.1 s, for each new length
    match config:
        case TinyModelConfig():
            policy = _new_policy(config, tokenizer, seed)
        case HfModelConfig():
            policy = _load_policy(config, tokenizer)
        case _:
            raise AssertionError(f"no policy is made from {type(config).__name__}")
    ends = {"eos_token_id": as_config(stop_ids(tokenizer)), "pad_token_id": tokenizer.pad_token_id}
    for shape in (policy.config, policy.config.get_text_config()):
        shape.update(ends)
    policy.generation_config = GenerationConfig(**ends)  # sampling is the run's to choose, not the checkpoint's
    if config.gradient_checkpointing:
        enable(policy)
    return policy.to(device).eval()  # type: ignore[arg-type]


def _check_flash(config: ModelConfig) -> None:
    """ValueError where transformers' FlashAttention is asked for, and its package is not there."""
    from transformers.utils import is_flash_attn_2_available

    if config.attention == "flash_attention_2" and not is_flash_attn_2_available():
        raise ValueError(
            "model.attention=flash_attention_2 needs a GPU and the package flash-attn: install it, or set "
            "model.attention=packed (torch's own FlashAttention) or sdpa"
        )


def _build(config: ModelConfig) -> dict[str, Any]:
    import torch

    return {"dtype": getattr(torch, config.dtype.value), "attn_implementation": config.implementation}


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
        return AutoModelForCausalLM.from_config(shape, **_build(config))


def _load_policy(config: HfModelConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    from transformers import AutoConfig, AutoModelForCausalLM

    trust = {"trust_remote_code": config.trust_remote_code}
    shape = without_dropout(from_pretrained(AutoConfig, config.path, "model.path: cannot load a model", **trust))
    policy = load_weights(AutoModelForCausalLM, config.path, "model.path", config=shape, **_build(config), **trust)
    if (brought := brought_by(tokenizer)) is not None:
        brought.look_at_weights()  # which are here by now
    rows = len(policy.get_input_embeddings().weight)  # type: ignore[arg-type]
    if len(tokenizer) > rows:
        raise ValueError(
            f"model.path: the tokenizer of {config.path} has {len(tokenizer)} tokens, and the model embeds only {rows}"
        )
    return policy


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


def load_base(spec: AdapterSpec, **options: Any) -> PreTrainedModel:
    """A worker's model, on the CPU: the base, and an adapter whose weights are nothing yet.

    ValueError where the base is not the trainer's.
    """
    from transformers import AutoModelForCausalLM

    from rlhf.models.adapter import add_adapter, base_digest

    model = load_weights(AutoModelForCausalLM, spec.base, "the worker's adapter.base", **options)
    found = base_digest(model, options["dtype"])
    if spec.digest and found != spec.digest:
        raise ValueError(
            f"the weights of {spec.base} have the digest {found}, and those that the trainer's adapter builds on "
            f"{spec.digest}"
        )
    add_adapter(model, spec.rank, spec.alpha, spec.target)
    return model


# --- reward model and critic ------------------------------------------------------------------------------------------


def value_model(policy: PreTrainedModel, head: Head) -> PreTrainedModel:
    """A copy of the policy's backbone under a new scalar head of zeros, which begins with no opinion."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

    from rlhf.models.adapter import base_weights
    from rlhf.models.recompute import enable, enabled

    auto = AutoModelForSequenceClassification if head is Head.sequence else AutoModelForTokenClassification
    shape = without_dropout(copy.deepcopy(policy.config))
    shape.num_labels = 1
    shape.classifier_dropout = 0.0
    if shape.pad_token_id in stop_ids_of(shape):  # transformers would take the end of a text for padding behind it
        shape.pad_token_id = None
    try:
        with torch.random.fork_rng(devices=[]):  # the weights drawn here are all overwritten
            model = auto.from_config(
                shape,
                dtype=policy.dtype,
                attn_implementation=policy.config._attn_implementation,
                trust_remote_code=policy.is_remote_code(),
            )
    except ValueError as error:
        raise ValueError(
            f"transformers has no {head.value} classifier of the architecture {shape.model_type!r}, which a reward "
            "model (reward=model) or a critic (algo=ppo) needs: choose another model, or reward=verifier and algo=grpo"
        ) from error
    model.base_model.load_state_dict(base_weights(policy.base_model))
    for parameter in score_layer(model).parameters():
        torch.nn.init.zeros_(parameter)
    if enabled(policy):
        enable(model)
    return model.to(policy.device).eval()


def load_reward_model(
    path: str, config: ModelConfig, trust: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A one-number sequence classifier and its tokenizer, with the policy's dtype and device.

    One that a run has trained (`trained_by_a_run`) has the policy's attention, too, and an end-of-sequence token.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification

    device = resolve_device(config.device)
    told = from_pretrained(AutoConfig, path, "reward.path: cannot load a reward model", trust_remote_code=trust)
    shape = without_dropout(told)
    if shape.num_labels != 1:
        raise ValueError(
            f"reward.path: {path} is no reward model: a sequence classifier with num_labels=1 is needed, "
            f"this is {', '.join(shape.architectures or ['a model'])} with num_labels={shape.num_labels}"
        )
    ours, options = trained_by_a_run(shape), _build(config) | {"config": shape, "trust_remote_code": trust}
    if not ours:
        del options["attn_implementation"]  # the policy's, which others may not have
    model = load_weights(AutoModelForSequenceClassification, path, "reward.path", **options)
    tokenizer = load_tokenizer(path, "reward.path", trust) if ours else _others_tokenizer(path, model, trust)
    return model.to(device).eval(), tokenizer  # type: ignore[arg-type]


def trained_by_a_run(config: Any) -> bool:
    """Whether a reward model's config says that it is one of ours, which notes how its scores are normalised."""
    return hasattr(config, "reward_mean")


def _others_tokenizer(path: str, model: PreTrainedModel, trust: bool) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    tokenizer = from_pretrained(AutoTokenizer, path, "reward.path: cannot load a tokenizer", trust)
    rows = len(model.get_input_embeddings().weight)  # type: ignore[arg-type]
    if len(tokenizer) > rows:
        raise ValueError(
            f"reward.path: the tokenizer of {path} has {len(tokenizer)} tokens, and the model embeds only {rows}"
        )
    return tokenizer


def scores(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """A sequence classifier's number [B], float32, at each row's last real token; `ids`, `mask` [B, L], any padding."""
    import torch

    positions = torch.arange(ids.shape[1], device=ids.device)
    last = (positions * mask.to(positions.dtype)).argmax(dim=1)  # by the mask: padding may be the token EOS
    hidden = _hidden(model, ids, mask)[torch.arange(len(ids), device=ids.device), last]
    return score_layer(model)(hidden).squeeze(-1).float()


def _hidden(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    from rlhf.models.recompute import recomputing

    positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
    with recomputing(model):
        output = model.base_model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
    return output.last_hidden_state


def score_layer(model: PreTrainedModel) -> Any:
    """The head of a reward model or a critic, from hidden states to one number."""
    return model.score if hasattr(model, "score") else model.classifier  # transformers' two names for it
