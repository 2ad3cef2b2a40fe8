"""What a user can have got wrong that shows without a model: found before torch is imported, which takes seconds.

Packages, folders, the task's data, how many rows of each kind there are, and the user's function. Whatever needs a
tokenizer or a model is for later (plan.py, lengths.py); nothing here may import torch, transformers, ray or matplotlib.
"""

from __future__ import annotations

import importlib.util

from rlhf.config import (
    EvaluationConfig,
    FunctionRewardConfig,
    HfModelConfig,
    HttpRewardConfig,
    JudgeRewardConfig,
    MathRewardConfig,
    ModelRewardConfig,
    RewardConfig,
    RunConfig,
    VerifierRewardConfig,
)
from rlhf.config.rules import named_as_part
from rlhf.models.loading import check_folder
from rlhf.monitor.loggers import check_loggers
from rlhf.preflight.amounts import check_amounts, judged_by_amounts
from rlhf.preflight.objects import NOTHING, Objects, check_given
from rlhf.tasks import RawTask, read_task


class Seen:
    """A task as it was read; given away once, so that nobody holds a large file's rows longer than they are needed.

    And the objects that a Python program gives the run.
    """

    def __init__(self, raw: RawTask, objects: Objects = NOTHING) -> None:
        self._held = [raw]
        self.objects = objects

    def take(self) -> RawTask:
        """The task's texts."""
        return self._held.pop()


def look(config: RunConfig | EvaluationConfig, objects: Objects = NOTHING) -> Seen:
    """Read the task, once for this and for the run; ValueError for whatever is wrong that shows without a model."""
    check_given(config, objects)
    if isinstance(config, RunConfig):
        check_loggers(config.logger)
    if config.model.lora.rank:
        _check_peft()
    if isinstance(config.model, HfModelConfig):
        check_folder(config.model.path, "model.path: cannot load a model")
    raw = read_task(config.task, config.seed, *objects.rows)
    if isinstance(config, RunConfig):
        check_amounts(config, raw)
        if not judged_by_amounts(config):
            _check_rewards(config.reward, raw, objects)
    else:
        _check_answers(raw)
    return Seen(raw, objects)


def _check_rewards(config: RewardConfig, raw: RawTask, objects: Objects) -> None:
    """ValueError where data, a folder or a function is not there, RunError where a server is not."""
    from rlhf.rewards.columns import names
    from rlhf.rewards.judge import check_judge
    from rlhf.rewards.make import check_http, check_model, check_verifier
    from rlhf.rewards.mathematics import check_math
    from rlhf.rewards.several import functions_of

    for name, part in config.weighted().items():
        with named_as_part(name):
            match part.reward:
                case FunctionRewardConfig() as own:
                    functions_of(own, objects.rewards).check_columns(names(raw.train))
                case HttpRewardConfig() as server:
                    check_http(server, raw)
                case JudgeRewardConfig() as judge:
                    check_judge(judge, raw)
                case MathRewardConfig() as mathematics:
                    check_math(mathematics, raw)
                case ModelRewardConfig(path=str() as path):
                    check_folder(path, "reward.path: cannot load a reward model")
                case ModelRewardConfig() as trained:
                    check_model(trained, raw)
                case VerifierRewardConfig() as verifier:
                    check_verifier(verifier, raw)


def _check_answers(raw: RawTask) -> None:
    """ValueError where an evaluation would have nothing to score against."""
    if all(raw.score(row, "") is None for row in raw.held_out):
        raise ValueError("no held-out row of the task has an answer to compare with: choose another task or task.path")


def _check_peft() -> None:
    if importlib.util.find_spec("peft") is None:
        raise ValueError("model.lora.rank needs the package peft: pip install 'rlhf-transfer[lora]', or set it to 0")
