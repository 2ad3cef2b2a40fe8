"""The tokenizer of a run: a checkpoint's own, or, of a model made here, one token a character."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rlhf.config import HfModelConfig, ModelConfig, TinyModelConfig
from rlhf.models.loading import load_tokenizer, say_nothing_of_lengths

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

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
