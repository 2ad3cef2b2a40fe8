"""How prompts begin as token ids."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf.types import Prompt, Tokenizer


def beginning(tokenizer: Tokenizer) -> list[int]:
    """The ids that the tokenizer itself puts before a text (BOS); what it puts behind one (EOS), no prompt has."""
    bare, whole = tokenizer.encode("a", add_special_tokens=False), tokenizer.encode("a", add_special_tokens=True)
    starts = range(len(whole) - len(bare) + 1)
    return next((whole[:at] for at in starts if whole[at : at + len(bare)] == bare), [])


def prompt_ids(tokenizer: Tokenizer, prompts: Sequence[Prompt]) -> list[list[int]]:
    """The ids of each prompt's text for a model with this tokenizer."""
    if not prompts:  # transformers' tokenizers take no empty list
        return []
    start, rows = beginning(tokenizer), tokenizer([prompt.text for prompt in prompts], add_special_tokens=False)
    return [begun(ids, start, bool(prompt.messages)) for ids, prompt in zip(rows["input_ids"], prompts, strict=True)]


def begun(ids: list[int], start: list[int], rendered: bool) -> list[int]:
    """A prompt's ids with `start` before them, unless they have it or a chat template has `rendered` the prompt."""
    return ids if rendered or ids[: len(start)] == start else [*start, *ids]
