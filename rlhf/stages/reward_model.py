"""A Bradley-Terry reward model: pairs from the policy where the data ships none, training, and normalised scores."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.config import ModelRewardConfig
from rlhf.learning.batches import batches
from rlhf.learning.losses import bradley_terry
from rlhf.learning.microbatched import MicroBatched
from rlhf.models.encoding import prompt_ids
from rlhf.models.stop_tokens import ended
from rlhf.models.value import score_texts
from rlhf.types import Pair, Prompt, Rollouts, Task, Tokenizer

Answered = tuple[str, str]  # the texts of a prompt and of an answer


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
    by: MicroBatched,
    seed: int,
) -> Iterator[dict[str, float]]:
    """Take `config.steps` steps on Bradley and Terry's loss, in place; yields each step's loss, accuracy and margin."""
    check_pairs(pairs)
    optimizer = by.optimizer(model, config.lr)
    length_of = _lengths(tokenizer, pairs)
    by_prompt: dict[str, list[Pair]] = {}
    for pair in pairs:
        by_prompt.setdefault(pair.prompt.text, []).append(pair)
    groups = list(
        by_prompt.values()
    )  # all pairs of a prompt in one batch: each answer is computed once for all of them
    for step, batch in enumerate(batches(len(groups), config.prompts_per_batch, config.steps, seed)):
        for group in optimizer.param_groups:
            group["lr"] = config.lr * min(1.0, 2 * (1 - step / config.steps))
        chosen = [groups[i] for i in batch]
        count = sum(map(len, chosen))

        def shares(part: Sequence[Pair], count: int = count) -> dict[str, Tensor]:
            chosen_N, rejected_N = pair_scores(model, tokenizer, part)
            loss_N = bradley_terry(chosen_N, rejected_N, centring=config.centring)
            margin_N = (chosen_N - rejected_N).detach()
            numbers = {"loss": loss_N, "accuracy": (margin_N > 0).float(), "margin": margin_N}
            return {name: value_N.sum() / count for name, value_N in numbers.items()}

        yield by.step(model, optimizer, micro_batches(chosen, length_of, by.tokens), shares)


def check_pairs(pairs: Sequence[Pair]) -> None:
    """ValueError where there are none."""
    if not pairs:
        raise ValueError(
            "no preference pairs to train the reward model on: every prompt's sampled answers have equal gold scores; "
            "raise reward.prompts or reward.samples, or change sft.steps so that the policy is right only sometimes"
        )


def micro_batches(groups: Sequence[Sequence[Pair]], length_of: Mapping[Answered, int], budget: int) -> list[list[Pair]]:
    """The pairs of prompts in parts of at most `budget` tokens, or one pair; all as they are where they fit in one.

    A prompt's pairs stay together where they fit in one part, as they have answers in common.
    """

    def tokens(pairs: Sequence[Pair]) -> int:
        rows = answers_of(pairs)
        return len(rows) * max(length_of[row] for row in rows)

    everything = [pair for group in groups for pair in group]
    if tokens(everything) <= budget:
        return [everything]
    parts: list[list[Pair]] = []
    for group in sorted(groups, key=lambda group: max(length_of[row] for row in answers_of(group))):
        whole = tokens(group) <= budget
        for unit in [list(group)] if whole else [[pair] for pair in group]:
            if parts and tokens([*parts[-1], *unit]) <= budget:
                parts[-1] += unit
            else:
                parts.append(unit)
    return parts


def answers_of(pairs: Sequence[Pair]) -> dict[Answered, Prompt]:
    """What is computed for these pairs: the texts of a prompt and an answer, once, with the prompt."""
    rows = [(pair.prompt.text, pair.chosen) for pair in pairs] + [(pair.prompt.text, pair.rejected) for pair in pairs]
    return dict(zip(rows, [pair.prompt for pair in pairs] * 2, strict=True))


def _lengths(tokenizer: Tokenizer, pairs: Sequence[Pair]) -> dict[Answered, int]:
    """Tokens of each prompt with each of its answers and what ends it."""
    rows = answers_of(pairs)
    prompts = list(rows.values())
    answers = ended(tokenizer, prompts, [answer for _, answer in rows])
    asked = prompt_ids(tokenizer, prompts)
    return {row: len(a) + len(b) for row, a, b in zip(rows, asked, answers, strict=True)}


def margins(model: PreTrainedModel, tokenizer: Tokenizer, pairs: Sequence[Pair]) -> torch.Tensor:
    """s_chosen - s_rejected, [pairs]."""
    chosen_B, rejected_B = pair_scores(model, tokenizer, pairs)
    return chosen_B - rejected_B


def pair_scores(
    model: PreTrainedModel, tokenizer: Tokenizer, pairs: Sequence[Pair]
) -> tuple[torch.Tensor, torch.Tensor]:
    """s_chosen and s_rejected, each [pairs]; an answer in several pairs is computed once."""
    prompts = answers_of(pairs)
    place = {row: index for index, row in enumerate(prompts)}
    scores_U = score_texts(model, tokenizer, list(prompts.values()), [answer for _, answer in prompts])
    sides = [(p.prompt.text, p.chosen) for p in pairs] + [(p.prompt.text, p.rejected) for p in pairs]
    chosen_B, rejected_B = scores_U[[place[side] for side in sides]].chunk(2)
    return chosen_B, rejected_B
