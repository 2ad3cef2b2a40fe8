"""Reward models that exist already: other people's, and those that a run has trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rlhf.config import ModelConfig
from rlhf.models.device import computing, resolve_device
from rlhf.models.loading import from_pretrained, load_tokenizer, load_weights, without_dropout

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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
    ours, options = trained_by_a_run(shape), computing(config) | {"config": shape, "trust_remote_code": trust}
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
