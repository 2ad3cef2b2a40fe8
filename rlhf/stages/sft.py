"""Supervised fine-tuning on demonstrations: cross-entropy of the answer and of what ends it (stop_tokens.py)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from rlhf.config import OptimConfig, SftConfig
from rlhf.learning.batches import batches
from rlhf.learning.losses import counted
from rlhf.learning.optimizer import clip_gradients, make_optimizer
from rlhf.models.encoding import join
from rlhf.models.recompute import recomputing
from rlhf.models.stop_tokens import ended
from rlhf.types import Prompt, Tokenizer


def sft(
    policy: torch.nn.Module,
    tokenizer: Tokenizer,
    demonstrations: Sequence[tuple[Prompt, str]],
    config: SftConfig,
    optim: OptimConfig,
    seed: int,
) -> Iterator[dict[str, float]]:
    """Take `config.steps` gradient steps on the policy, in place; yields each step's loss in nats a token."""
    policy.eval()
    device = next(policy.parameters()).device
    optimizer = make_optimizer(policy, optim, config.lr)
    prompts = [prompt for prompt, _ in demonstrations]
    answers = ended(tokenizer, prompts, [answer for _, answer in demonstrations])
    rows = [(prompt.ids, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    for step, batch in enumerate(batches(len(rows), config.batch_size, config.steps, seed)):
        for group in optimizer.param_groups:  # linear decay: a warm-up has an end
            group["lr"] = config.lr * (1 - step / config.steps)
        ids_BL, mask_BL = join([rows[i] for i in batch], device)
        with recomputing(policy):
            logits_BLV = policy(input_ids=ids_BL, use_cache=False).logits[:, :-1].float()
        loss_BL = torch.nn.functional.cross_entropy(logits_BLV.transpose(1, 2), ids_BL[:, 1:], reduction="none")
        loss = counted(loss_BL, mask_BL[:, 1:]).sum() / mask_BL[:, 1:].sum()
        loss.backward()
        clip_gradients(optimizer, optim.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield {"loss": float(loss.detach())}
