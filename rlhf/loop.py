"""Sample, score, learn, hand the weights over; repeat. Backends, engines and algorithms are parts that run.py chose."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

from rlhf.checkpoint.keeper import Keeper
from rlhf.config import RunConfig
from rlhf.gather import Gather
from rlhf.held_out import evaluate
from rlhf.learning.batches import batches
from rlhf.learning.learner import Learner
from rlhf.monitor.metrics import Recorder
from rlhf.monitor.probe import Probe
from rlhf.types import Reward, Sampler, Task
from transfer import Transfer


@dataclass(slots=True)
class Parts:
    """What a run is made of."""

    task: Task
    sampler: Sampler
    reward: Reward
    transfer: Transfer
    probe: Probe
    record: Recorder
    keeper: Keeper


def train(parts: Parts, learner: Learner, config: RunConfig, version: int) -> None:
    """Run `config.steps` steps; the workers hold `version` at first, and each step's push makes the next one live."""
    record, reward, keeper = parts.record, parts.reward, parts.keeper
    gather = Gather(parts.sampler, reward, config, record)
    order = batches(len(parts.task.train), config.prompts_per_step, config.steps, config.seed)
    done = keeper.begin(learner, version)
    for step, rows in islice(enumerate(order, start=1), done, None):
        if (step - 1) % config.evaluate_every == 0:
            keeper.judge(evaluate(parts.task, parts.sampler, reward, config, record, step - 1))
        rollouts, rewards_B = gather(parts.task.train, rows, step)
        record.took(rollouts, version)
        with keeper.changing():
            with record.time("transfer"):
                parts.transfer.withdraw()
            with record.time("learn"):
                learned = learner.learn(learner.score(rollouts), rewards_B)
            with record.time("transfer"):
                version = parts.transfer.push(learner.weights())
            with record.time("verify"):
                parts.probe(version)
            record.step(step, rollouts, rewards_B, learned, parts.task)
            keeper.reached(step, version)
    keeper.judge(evaluate(parts.task, parts.sampler, reward, config, record, config.steps))
