"""Whether prompts, demonstrations and pairs fit the model's context: rows that do not are refused, or left out."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlhf.config import EnvironmentTaskConfig, EvaluationConfig, ModelRewardConfig, RunConfig
from rlhf.config.algo import DpoConfig
from rlhf.learning.pass_choice import context_of
from rlhf.models.stop_tokens import ended
from rlhf.preflight.plan import check_rows
from rlhf.preflight.rotary import change_of, check_rotary
from rlhf.tasks.json_lines import some
from rlhf.types import Environment, Pair, Prompt, Task, Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LONGER = "take a model with a longer context (model.context)"


@dataclass(slots=True)
class _Rows:
    """Rows of a task with their tokens, and those beyond the limit."""

    name: str
    where: Callable[[Any], str]
    rows: Sequence[Any]
    tokens: Sequence[int]
    limit: int

    @property
    def overlong(self) -> list[tuple[int, str]]:
        """Tokens, file and line, in the order of the file."""
        there = [(n, self.where(row)) for row, n in zip(self.rows, self.tokens, strict=True) if n > self.limit]
        return sorted(there, key=lambda row: (len(row[1]), row[1]))

    @property
    def fits(self) -> list[bool]:
        return [n <= self.limit for n in self.tokens]

    @property
    def fitting(self) -> list[Any]:
        return [row for row, fits in zip(self.rows, self.fits, strict=True) if fits]

    def listed(self) -> str:
        """How many rows are too long, and the first of them."""
        rows = [f"{where} ({tokens} tokens)" if where else f"{tokens} tokens" for tokens, where in self.overlong]
        return f"{len(rows)} of {len(self.rows)} {self.name}: {some(rows)}"


def check_lengths(
    config: RunConfig | EvaluationConfig, task: Task, policy: PreTrainedModel, tokenizer: Tokenizer
) -> list[str]:
    """Raise ValueError, with their rows, unless prompts and answers fit the model's context.

    With task.overlong=drop, they are left out of `task` instead. What a user should know, a line each: what was left
    out, and that rollout.max_new_tokens would cut most answers of a run, if they are like the demonstrations.
    """
    change = change_of(policy)
    if change is None:
        return _checked(config, task, tokenizer, context_of(policy))
    check_rotary(config, change)
    try:
        return _checked(config, task, tokenizer, min(change, context_of(policy)))
    except ValueError as error:
        raise ValueError(f"{error}; beyond {change} tokens its rotary factors change (longrope)") from error


def _checked(config: RunConfig | EvaluationConfig, task: Task, tokenizer: Tokenizer, limit: int) -> list[str]:
    notes, cut = _prompts(config, task, limit), []
    if isinstance(config, RunConfig):
        answers = _answer_lengths(task, tokenizer)
        shown = _demonstrations(task, answers, limit)
        if config.sft.steps and shown.overlong:
            notes.append(_dropped(config, shown, "or set sft.steps=0"))
            task.demonstrations = shown.fitting
            answers = [n for n, fits in zip(answers, shown.fits, strict=True) if fits]
        cut = _cut_answers(config, answers)
        if _learns_pairs(config) and (long := _pairs(task, tokenizer, limit)).overlong:
            notes.append(_dropped(config, long, "or choose another algo or reward"))
            task.preferences = long.fitting
        if notes:
            check_rows(config, task)
    if not task.train or not task.held_out:
        raise ValueError(f"no prompt is left to train on, or none to hold out: {'; '.join(notes)}")
    return notes + cut


def _prompts(config: RunConfig | EvaluationConfig, task: Task, limit: int) -> list[str]:
    new, told = config.rollout.max_new_tokens, task.environment
    later = (told.turns - 1) * (new + told.longest_reply) if told is not None else 0
    prompts = [*task.train, *task.held_out]
    long = _Rows("prompts", _of_prompt, prompts, [len(prompt.ids) for prompt in prompts], limit - new - later)
    if not long.overlong:
        return []
    if config.task.leaves_out_overlong:
        gone = {where for _, where in long.overlong}
        task.train = [prompt for prompt in task.train if prompt.where not in gone]
        task.held_out = [prompt for prompt in task.held_out if prompt.where not in gone]
        task.demonstrations = [(prompt, text) for prompt, text in task.demonstrations if prompt.where not in gone]
        task.preferences = [pair for pair in task.preferences if pair.prompt.where not in gone]
        return [_told(long, limit - new - later)]
    tokens, where = max(long.overlong, key=lambda row: row[0])
    named = f"the longest prompt ({tokens} tokens{', ' + where if where else ''})"
    rows = f"; too long are {long.listed()}; task.overlong=drop leaves them out" if where else ""
    if later:
        raise ValueError(
            f"{named} and {config.task.most_answers} answers ({config.task.turns_key}) of up to {new} tokens "
            f"(rollout.max_new_tokens) with {_replies(config, told)} do not fit the model's context of {limit} tokens: "
            f"lower one of them, or {LONGER}{rows}"
        )
    raise ValueError(
        f"{named} and rollout.max_new_tokens ({new}) do not fit the model's context of {limit} tokens: lower "
        f"rollout.max_new_tokens, or {LONGER}{rows}"
    )


def _replies(config: RunConfig | EvaluationConfig, told: Environment | None) -> str:
    """What is said between answers, and by which key it is bounded."""
    if told is None or not isinstance(config.task, EnvironmentTaskConfig):
        return "replies"
    return f"replies of up to {told.longest_reply} tokens (task.reply_tokens={config.task.reply_tokens})"


def _answer_lengths(task: Task, tokenizer: Tokenizer) -> list[int]:
    prompts, texts = [prompt for prompt, _ in task.demonstrations], [text for _, text in task.demonstrations]
    return [len(ids) for ids in ended(tokenizer, prompts, texts)]


def _demonstrations(task: Task, answers: Sequence[int], limit: int) -> _Rows:
    tokens = [len(prompt.ids) + answer for (prompt, _), answer in zip(task.demonstrations, answers, strict=True)]
    return _Rows("demonstrations", _of_demonstration, task.demonstrations, tokens, limit)


def _pairs(task: Task, tokenizer: Tokenizer, limit: int) -> _Rows:
    pairs = task.preferences
    prompts = [pair.prompt for pair in pairs]
    chosen = ended(tokenizer, prompts, [pair.chosen for pair in pairs])
    rejected = ended(tokenizer, prompts, [pair.rejected for pair in pairs])
    tokens = [
        len(pair.prompt.ids) + max(len(good), len(bad)) for pair, good, bad in zip(pairs, chosen, rejected, strict=True)
    ]
    return _Rows("preference pairs", _of_pair, pairs, tokens, limit)


def _learns_pairs(config: RunConfig) -> bool:
    """Whether the data's pairs are trained on, by DPO or by a reward model."""
    rewards = [part.reward for part in config.reward.weighted().values()]
    return isinstance(config.algo, DpoConfig) or any(
        isinstance(reward, ModelRewardConfig) and reward.path is None for reward in rewards
    )


def _dropped(config: RunConfig, long: _Rows, otherwise: str) -> str:
    """What was left out; ValueError where it is not to be."""
    if config.task.leaves_out_overlong:
        return _told(long, long.limit)
    leave = "set task.overlong=drop to leave those rows out, " if long.overlong[0][1] else ""
    raise ValueError(
        f"longer than the model's context of {long.limit} tokens are {long.listed()}: {leave}{LONGER}, {otherwise}"
    )


def _told(long: _Rows, limit: int) -> str:
    return f"warning: task.overlong=drop leaves out what has more than {limit} tokens: {long.listed()}"


def _of_prompt(prompt: Prompt) -> str:
    return prompt.where


def _of_demonstration(demonstration: tuple[Prompt, str]) -> str:
    return demonstration[0].where


def _of_pair(pair: Pair) -> str:
    return pair.prompt.where


def _cut_answers(config: RunConfig, lengths: Sequence[int]) -> list[str]:
    """A warning, if rollout.max_new_tokens would cut most answers as long as these; else none."""
    new = config.rollout.max_new_tokens
    if not lengths or statistics.median(lengths) <= new:
        return []
    return [
        f"warning: most answers will be cut: half of the demonstrations have {statistics.median(lengths):.0f} tokens "
        f"or more, and rollout.max_new_tokens is {new}; rollout.max_new_tokens={max(lengths)} fits them all"
    ]
