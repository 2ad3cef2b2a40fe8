"""Held-out prompts, answered greedily and by sampling: the gold score beside the reward that is trained on."""

from __future__ import annotations

from rlhf.config import RunConfig
from rlhf.metrics import Recorder, mean
from rlhf.types import Reward, Sampler, Task

SEED_OFFSET = 1_000_003  # evaluation draws from seeds that training does not use


def evaluate(
    task: Task, sampler: Sampler, reward: Reward, config: RunConfig, record: Recorder, step: int
) -> dict[str, float]:
    """Log and return reward and gold score of sampled answers, and the share of greedy answers with gold score 1."""
    prompts = list(task.held_out)
    with record.time("evaluate"):
        seed = config.seed + SEED_OFFSET
        sampled = sampler.sample(prompts, n=1, temperature=config.rollout.temperature, seed=seed)
        greedy = sampler.sample(prompts, n=1, temperature=0.0, seed=seed)
        rewards = reward(prompts, sampled.texts)
        gold = [task.score(prompt, text) for prompt, text in zip(prompts, sampled.texts, strict=True)]
        exact = [task.score(prompt, text) for prompt, text in zip(prompts, greedy.texts, strict=True)]
    metrics = {
        "eval/reward": mean(rewards),
        "eval/gold": mean(gold),
        "eval/greedy_accuracy": mean([None if score is None else float(score == 1.0) for score in exact]),
    }
    record.evaluation(step, {name: value for name, value in metrics.items() if value is not None})
    return {name: value for name, value in metrics.items() if value is not None}
