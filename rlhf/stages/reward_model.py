"""A Bradley-Terry reward model: pairs from the policy where the data ships none, training, and normalised scores."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence

import torch
from transformers import PreTrainedModel

from rlhf.config import ModelRewardConfig, OptimConfig
from rlhf.learning.batches import batches
from rlhf.learning.losses import bradley_terry
from rlhf.learning.optimizer import clip_gradients, make_optimizer
from rlhf.models.value import score_texts
from rlhf.types import Pair, Rollouts, Task, Tokenizer


def pairs_from(rollouts: Rollouts, task: Task, label_noise: float, seed: int) -> list[Pair]:
    """Every two of a prompt's answers whose gold scores differ, the better one chosen; some labels flipped.

    Stands in for people who rank several answers (arXiv:2203.02155) and err with probability `label_noise`.
    """
    draw = random.Random(seed)
    n = rollouts.samples_per_prompt
    pairs = []
    for p, prompt in enumerate(rollouts.prompts):
        answers = sorted(set(rollouts.texts[p * n : (p + 1) * n]))
        gold = {answer: task.score(prompt, answer) or 0.0 for answer in answers}
        for first, second in itertools.combinations(answers, 2):
            if gold[first] == gold[second]:
                continue
            better = (gold[first] > gold[second]) != (draw.random() < label_noise)
            pairs.append(Pair(prompt, first, second) if better else Pair(prompt, second, first))
    return pairs


def split(pairs: Sequence[Pair], held_out: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Training and held-out pairs, divided by prompt, so that no prompt is on both sides."""
    texts = sorted({pair.prompt.text for pair in pairs})
    random.Random(seed).shuffle(texts)
    kept = set(texts[: round(len(texts) * held_out)])
    return [p for p in pairs if p.prompt.text not in kept], [p for p in pairs if p.prompt.text in kept]


def train_reward_model(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    pairs: Sequence[Pair],
    config: ModelRewardConfig,
    optim: OptimConfig,
    seed: int,
) -> Iterator[dict[str, float]]:
    """Take `config.steps` steps on Bradley and Terry's loss, in place; yields each step's loss, accuracy and margin."""
    if not pairs:
        raise ValueError(
            "no preference pairs to train the reward model on: every prompt's sampled answers have equal gold scores; "
            "raise reward.prompts or reward.samples, or change sft.steps so that the policy is right only sometimes"
        )
    optimizer = make_optimizer(model, optim, config.lr)
    by_prompt: dict[str, list[Pair]] = {}
    for pair in pairs:
        by_prompt.setdefault(pair.prompt.text, []).append(pair)
    groups = list(
        by_prompt.values()
    )  # all pairs of a prompt in one batch: each answer is computed once for all of them
    for step, batch in enumerate(batches(len(groups), config.prompts_per_batch, config.steps, seed)):
        for group in optimizer.param_groups:
            group["lr"] = config.lr * min(1.0, 2 * (1 - step / config.steps))
        chosen_B, rejected_B = pair_scores(model, tokenizer, [pair for i in batch for pair in groups[i]])
        loss = bradley_terry(chosen_B, rejected_B, centring=config.centring).mean()
        loss.backward()
        clip_gradients(optimizer, optim.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        margins_B = (chosen_B - rejected_B).detach()
        yield {
            "loss": float(loss.detach()),
            "accuracy": float((margins_B > 0).float().mean()),
            "margin": float(margins_B.mean()),
        }


def margins(model: PreTrainedModel, tokenizer: Tokenizer, pairs: Sequence[Pair]) -> torch.Tensor:
    """s_chosen - s_rejected, [pairs]."""
    chosen_B, rejected_B = pair_scores(model, tokenizer, pairs)
    return chosen_B - rejected_B


def pair_scores(
    model: PreTrainedModel, tokenizer: Tokenizer, pairs: Sequence[Pair]
) -> tuple[torch.Tensor, torch.Tensor]:
    """s_chosen and s_rejected, each [pairs]; an answer in several pairs is computed once."""
    rows = [(pair.prompt.text, pair.chosen) for pair in pairs] + [(pair.prompt.text, pair.rejected) for pair in pairs]
    prompts = dict(zip(rows, [pair.prompt for pair in pairs] * 2, strict=True))
    place = {row: index for index, row in enumerate(prompts)}
    scores_U = score_texts(model, tokenizer, list(prompts.values()), [answer for _, answer in prompts])
    chosen_B, rejected_B = scores_U[[place[row] for row in rows]].chunk(2)
    return chosen_B, rejected_B
