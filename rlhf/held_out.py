"""Held-out prompts, answered greedily and by sampling: during a run (`evaluate`), and of a saved policy (`measure`).

The two are not the same thing: greedy answers may all be right where hardly any sampled one is, so both are measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import comb

from rlhf.config import EvaluationConfig, RunConfig, VerifierRewardConfig
from rlhf.monitor.metrics import Recorder, mean
from rlhf.rewards import rewarded
from rlhf.types import Prompt, Reward, RewardReport, Rollouts, Sampler, Task, gold_scores

SEED_OFFSET = 1_000_003  # evaluation draws from seeds that training does not use


def evaluate(held_out: Callable[[], dict[str, float]], record: Recorder, step: int) -> dict[str, float]:
    """Log and return what `held_out` says."""
    with record.time("evaluate"):
        metrics = held_out()
    record.evaluation(step, metrics)
    return metrics


def evaluated(task: Task, sampler: Sampler, reward: Reward, config: RunConfig) -> dict[str, float]:
    """What `measure` says of the held-out prompts, and the reward of their sampled answers, by the metrics' names."""
    numbers, sampled = measure(task, list(task.held_out), sampler, config)
    if isinstance(config.reward, VerifierRewardConfig):
        there = {"reward": numbers.get("gold")}  # the same score
    else:
        there = {"reward": mean(rewarded(reward, sampled))}
        report: RewardReport | None = getattr(reward, "report", None)
        there |= {f"reward_{name}": float(count) for name, count in report.counts.items()} if report else {}
    return {f"eval/{name}": value for name, value in {**there, **numbers}.items() if value is not None}


def measure(
    task: Task, prompts: Sequence[Prompt], sampler: Sampler, config: RunConfig | EvaluationConfig
) -> tuple[dict[str, float], Rollouts]:
    """The gold score of `evaluate.samples` answers a prompt, pass@k, and the share of greedy answers with gold score 1.

    With the sampled answers; what no prompt has a gold score for is left out.
    """
    seed, n = config.seed + SEED_OFFSET, config.evaluate.samples
    sampled = sampler.sample(prompts, n=n, temperature=temperature_of(config), seed=seed)
    greedy = sampler.sample(prompts, n=1, temperature=0.0, seed=seed)
    gold = gold_scores(task, sampled)
    numbers = {"gold": mean(gold), "greedy_accuracy": mean(right(gold_scores(task, greedy)))}
    hits = list(right_of_prompts(gold, n))
    numbers |= {f"pass_at_{k}": mean([pass_at_k(n, c, k) for c in hits]) for k in sorted(set(config.evaluate.k))}
    return {name: value for name, value in numbers.items() if value is not None}, sampled


def temperature_of(config: RunConfig | EvaluationConfig) -> float:
    """That of the sampled answers."""
    given = config.evaluate.temperature
    return config.rollout.temperature if given is None else given


def right(gold: Sequence[float | None]) -> list[float | None]:
    """1 where the gold score is 1, else 0; None where there is none."""
    return [None if score is None else float(score == 1.0) for score in gold]


def right_of_prompts(gold_B: Sequence[float | None], n: int) -> Iterator[int]:
    """How many of its n answers are right, of each prompt that has gold scores."""
    for start in range(0, len(gold_B), n):
        there = [hit for hit in right(gold_B[start : start + n]) if hit is not None]
        if len(there) == n:
            yield int(sum(there))


def pass_at_k(n: int, c: int, k: int) -> float:
    """The probability that one of k answers is right, without bias, from n answers of which c are (arXiv:2107.03374).

    1 - C(n-c, k) / C(n, k): the share of all choices of k among the n that hold a right one; k is at most n.
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n (got n={n}, c={c}, k={k})")
    return 1 - comb(n - c, k) / comb(n, k)
