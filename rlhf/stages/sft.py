"""Supervised fine-tuning on demonstrations: cross-entropy of the answer and of what ends it (stop_tokens.py)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from rlhf.config import SftConfig
from rlhf.learning.batches import batches
from rlhf.learning.losses import counted
from rlhf.learning.microbatched import MicroBatched
from rlhf.models.device import device_of
from rlhf.models.encoding import join
from rlhf.models.recompute import recomputing
from rlhf.models.stop_tokens import ended
from rlhf.types import Prompt, Tokenizer

Row = tuple[Sequence[int], Sequence[int]]  # token ids of a prompt and of its answer


def sft(
    policy: torch.nn.Module,
    tokenizer: Tokenizer,
    demonstrations: Sequence[tuple[Prompt, str]],
    config: SftConfig,
    by: MicroBatched,
    seed: int,
) -> Iterator[dict[str, float]]:
    """Take `config.steps` gradient steps on the policy, in place; yields each step's loss in nats a token."""
    policy.eval()
    optimizer = by.optimizer(policy, config.lr)
    prompts = [prompt for prompt, _ in demonstrations]
    answers = ended(tokenizer, prompts, [answer for _, answer in demonstrations])
    every: list[Row] = [(prompt.ids, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    for step, batch in enumerate(batches(len(every), config.batch_size, config.steps, seed)):
        for group in optimizer.param_groups:  # linear decay: a warm-up has an end
            group["lr"] = config.lr * (1 - step / config.steps)
        rows = [every[i] for i in batch]
        tokens = sum(_learned(row) for row in rows)
        parts = [[rows[i] for i in part] for part in by.split([len(prompt) + len(answer) for prompt, answer in rows])]
        yield by.step(policy, optimizer, parts, partial(_loss, policy, tokens))


def _learned(row: Row) -> int:
    """Tokens of the answer, but for one that nothing stands before."""
    prompt, answer = row
    return len(answer) - (not prompt and bool(answer))


def _loss(policy: torch.nn.Module, tokens: int, rows: Sequence[Row]) -> dict[str, Tensor]:
    """What these rows have in the loss of a batch with so many tokens to learn."""
    ids_BL, mask_BL = join(rows, device_of(policy))
    with recomputing(policy):
        logits_BLV = policy(input_ids=ids_BL, use_cache=False).logits[:, :-1].float()
    loss_BL = torch.nn.functional.cross_entropy(logits_BLV.transpose(1, 2), ids_BL[:, 1:], reduction="none")
    return {"loss": counted(loss_BL, mask_BL[:, 1:]).sum() / torch.tensor(float(tokens), device=loss_BL.device)}
