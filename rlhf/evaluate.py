"""Held-out prompts, answered greedily and by sampling: the gold score beside the reward that is trained on.

`python -m rlhf.evaluate` does this, and pass@k, for a saved policy alone (evaluate_saved.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import comb

from rlhf.config import RunConfig
from rlhf.metrics import Recorder, mean
from rlhf.types import Reward, Sampler, Task

SEED_OFFSET = 1_000_003  # evaluation draws from seeds that training does not use


def evaluate(
    task: Task, sampler: Sampler, reward: Reward, config: RunConfig, record: Recorder, step: int
) -> dict[str, float]:
    """Log and return reward and gold score of sampled answers, and the share of greedy answers with gold score 1."""
    with record.time("evaluate"):
        metrics = measure(task, sampler, reward, config)
    record.evaluation(step, metrics)
    return metrics


def measure(task: Task, sampler: Sampler, reward: Reward, config: RunConfig) -> dict[str, float]:
    """The same without logging; what no held-out prompt has is left out."""
    prompts = list(task.held_out)
    seed = config.seed + SEED_OFFSET
    sampled = sampler.sample(prompts, n=1, temperature=config.rollout.temperature, seed=seed)
    greedy = sampler.sample(prompts, n=1, temperature=0.0, seed=seed)
    rewards = reward(prompts, sampled.texts)
    gold = [task.score(prompt, text) for prompt, text in zip(prompts, sampled.texts, strict=True)]
    exact = [task.score(prompt, text) for prompt, text in zip(prompts, greedy.texts, strict=True)]
    metrics = {
        "eval/reward": mean(rewards),
        "eval/gold": mean(gold),
        "eval/greedy_accuracy": mean(right(exact)),
    }
    return {name: value for name, value in metrics.items() if value is not None}


def right(gold: Sequence[float | None]) -> list[float | None]:
    """1 where the gold score is 1, else 0; None where there is none."""
    return [None if score is None else float(score == 1.0) for score in gold]


def pass_at_k(n: int, c: int, k: int) -> float:
    """The probability that one of k answers is right, without bias, from n answers of which c are (arXiv:2107.03374).

    1 - C(n-c, k) / C(n, k): the share of all choices of k among the n that hold a right one; k is at most n.
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n (got n={n}, c={c}, k={k})")
    return 1 - comb(n - c, k) / comb(n, k)


if __name__ == "__main__":
    from rlhf.evaluate_saved import main

    main()
