"""Sample, score, learn, hand the weights over; repeat. Backend, engine and algorithm are parts, chosen in assembly/."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

from rlhf.checkpoint.keeper import Keeper
from rlhf.config import RunConfig
from rlhf.held_out import evaluate
from rlhf.learning.batches import batches
from rlhf.learning.learner import Learner
from rlhf.monitor.metrics import Recorder
from rlhf.monitor.probe import Probe
from rlhf.ranks.outside import Gathers
from rlhf.types import Sampler, Task
from transfer import Transfer


@dataclass(slots=True)
class Parts:
    """What a run is made of."""

    task: Task
    sampler: Sampler
    gather: Gathers
    measure: Callable[[], dict[str, float]]  # of the held-out prompts
    transfer: Transfer
    probe: Probe
    record: Recorder
    keeper: Keeper
    version: int  # live in every worker before the first step


def train(parts: Parts, learner: Learner, config: RunConfig) -> None:
    """Run `config.steps` steps; each one's push makes the next version live in every worker."""
    record, keeper, version = parts.record, parts.keeper, parts.version
    order = batches(len(parts.task.train), config.prompts_per_step, config.steps, config.seed)
    done = keeper.begin(learner, version)
    for step, rows in islice(enumerate(order, start=1), done, None):
        if (step - 1) % config.evaluate_every == 0:
            keeper.judge(evaluate(parts.measure, record, step - 1))
        rollouts, rewards_B = parts.gather(parts.task.train, rows, step)
        record.took(rollouts, version)
        with keeper.changing():
            with record.time("transfer"):
                parts.transfer.withdraw()
            with record.time("learn"):
                learned = learner.learn(learner.score(rollouts), rewards_B)
            with record.time("sample"):
                parts.gather.settle()
            with record.time("transfer"):
                version = parts.transfer.push(learner.weights())
            parts.gather.release()
            with record.time("verify"):
                parts.probe(version)
            record.step(step, rollouts, rewards_B, learned, parts.task)
            keeper.reached(step, version)
    keeper.judge(evaluate(parts.measure, record, config.steps))
