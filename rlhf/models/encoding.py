"""Texts as a model takes them: token ids, with what begins and what ends them, and padded rows of B x L."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlhf.models.stop_tokens import text_end
from rlhf.types import Prompt, Tokenizer

if TYPE_CHECKING:
    import torch


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


def encode(tokenizer: Tokenizer, texts: Sequence[str], end: bool = False) -> list[list[int]]:
    """Token ids of each text without special tokens, with the token that ends a plain text behind them if `end`."""
    if not texts:  # of which some tokenizers make an IndexError
        return []
    tail = text_end(tokenizer) if end else []
    return [ids + tail for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]


def join(
    rows: Sequence[tuple[Sequence[int], Sequence[int]]], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids [B, L] of prompt + answer, and a mask [B, L] that is 1 on the answer's tokens."""
    import torch

    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids_BL = torch.zeros(len(rows), width, dtype=torch.long)
    mask_BL = torch.zeros(len(rows), width)
    for b, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        ids_BL[b, :end] = torch.tensor([*prompt, *answer])
        mask_BL[b, len(prompt) : end] = 1.0
    return ids_BL.to(device), mask_BL.to(device)
