"""Which tokens end an answer: those at which a policy stops, and those that are put behind an answer of the data.

A run has one list of stop ids: that of its checkpoint's `generation_config.json`, else of `config.json`, else its
tokenizer's EOS. The tokenizer carries them, and from there they go to the workers, into every message that asks for
samples, and into the policy's config.

What is put behind an answer that nobody sampled (SFT, DPO, a reward model's texts) is what the policy will have to say
there: in a conversation, what the chat template puts behind an assistant's message, up to the first stop id; behind
plain text the tokenizer's EOS, at which base models have seen texts end, or the first stop id where EOS is none.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rlhf.models.chat_template import RefusedError, behind_an_answer
from rlhf.types import Prompt, Tokenizer

STOP = "stop_ids"  # the attribute of a tokenizer


def stop_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens that end an answer; the EOS token's where nobody has said otherwise."""
    return getattr(tokenizer, STOP, None) or (tokenizer.eos_token_id,)


def carry_stop_ids(tokenizer: Any, sources: Iterable[Any], vocabulary: int) -> None:
    """Let the tokenizer carry those of the first source (an id, several or None) that names any below `vocabulary`."""
    for source in (*sources, tokenizer.eos_token_id):
        named = source if isinstance(source, list | tuple) else [source]
        ids = [token for token in named if isinstance(token, int) and 0 <= token < vocabulary]
        if ids:  # others can never be sampled
            setattr(tokenizer, STOP, tuple(dict.fromkeys(ids)))
            return


def as_config(ids: Sequence[int]) -> int | list[int]:
    """Stop ids as transformers' configs have them."""
    return ids[0] if len(ids) == 1 else list(ids)


def stop_ids_of(config: Any) -> tuple[int, ...]:
    """The inverse; none where the config names none."""
    named = config.eos_token_id
    return tuple(named) if isinstance(named, list) else () if named is None else (named,)


def text_end(tokenizer: Tokenizer) -> list[int]:
    """What ends an answer to a plain text: one token."""
    ids = stop_ids(tokenizer)
    return [tokenizer.eos_token_id if tokenizer.eos_token_id in ids else ids[0]]


def turn_end(tokenizer: Tokenizer) -> list[int]:
    """What ends an answer in a conversation; as of a plain text where the chat template has no stop id there."""
    if not getattr(tokenizer, "chat_template", None):
        return text_end(tokenizer)
    try:
        text = behind_an_answer(tokenizer)
    except RefusedError:
        return text_end(tokenizer)
    ids = tokenizer.encode(text, add_special_tokens=False)
    stops = [place for place, token in enumerate(ids) if token in stop_ids(tokenizer)]
    return ids[: stops[0] + 1] if stops else text_end(tokenizer)


def ended(tokenizer: Tokenizer, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[list[int]]:
    """The token ids of each answer to its prompt, with those behind them that end it."""
    if not answers:
        return []
    rows = tokenizer(list(answers), add_special_tokens=False)["input_ids"]
    text = text_end(tokenizer)
    turn = turn_end(tokenizer) if any(prompt.messages for prompt in prompts) else text
    stops = stop_ids(tokenizer)  # at one of which a call of a tool may end, as its template has it
    return [
        ids if ids and ids[-1] in stops else ids + (turn if prompt.messages else text)
        for prompt, ids in zip(prompts, rows, strict=True)
    ]
