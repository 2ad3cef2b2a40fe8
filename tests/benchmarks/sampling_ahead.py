"""How many steps a second sampling ahead makes where answers have long tails: workers and a trainer that only wait.

    python -m tests.benchmarks.sampling_ahead [--steps 40] [--mean-ms 40] [--sigma 1.0]

One worker draws up to 32 groups at once; the time of a group is lognormal, with this mean and sigma. A step has 32
groups, and learning takes twice a group's mean. The client, the queue and all that waits are those of a run; a
worker's answers and the gradient step are pauses, so that it does not matter how many cores there are. No pipeline is
faster than the longer of learning and of sampling at full load, which is the bound.
"""

from __future__ import annotations

import argparse
import random
import threading
import time
from collections.abc import Mapping
from contextlib import closing, nullcontext
from typing import Any

from rlhf.ahead.exact import Exact
from rlhf.ahead.free import Free
from rlhf.ahead.slots import Slots
from rlhf.ahead.stream import Stream
from rlhf.gather import Gather
from rlhf.learning.batches import batches
from rlhf.ranks.outside import Gathers
from rlhf.rollout import columns
from rlhf.rollout.client import RolloutClient
from rlhf.rollout.sampling import Sample
from rlhf.types import Prompt
from tests.composed import composed_run
from transfer.agreement.wire import BODY

GROUPS, AT_ONCE, LEARNING = 32, 32, 2.0  # groups a step, and at once; a step's learning in a group's mean time


class Tokenizer:
    """No text."""

    eos_token_id, all_special_ids = 2, (2,)

    def batch_decode(self, ids: Any, skip_special_tokens: bool) -> list[str]:
        """A text each."""
        return [""] * len(ids)


class Worker:
    """A worker whose completions are pauses; its batch has room for AT_ONCE groups."""

    name = "worker 0"

    def __init__(self, mean_s: float, sigma: float) -> None:
        self.version = 0
        self._mean_s, self._sigma = mean_s, sigma
        self._room = threading.Semaphore(AT_ONCE)

    def call(self, verb: str, body: Mapping[str, Any], timeout_s: float | None = None) -> dict[str, Any]:
        """The answers to a request, once the longest of its groups is there."""
        version = self.version
        drawing = [threading.Thread(target=self._draw, args=(seed,)) for seed in body["seeds"]]
        for thread in drawing:
            thread.start()
        for thread in drawing:
            thread.join()
        rows = [Sample([2], [-0.5], [version], "stop") for _ in range(len(body["seeds"]) * body["n"])]
        return {BODY: columns.encode(rows)}

    def _draw(self, seed: int) -> None:
        seconds = random.Random(seed).lognormvariate(-(self._sigma**2) / 2, self._sigma) * self._mean_s
        with self._room:
            time.sleep(seconds)


class Record:
    """What a recorder hears of."""

    def __init__(self) -> None:
        self.sampled, self.sampling_s = 0, 0.0
        self.ahead: dict[str, float] = {}

    def time(self, phase: str) -> Any:
        """Nothing is measured."""
        return nullcontext()

    def rewarded(self, report: Any) -> None:
        """Nothing is kept."""


def measured(lag: int, order: str, options: argparse.Namespace) -> tuple[float, float]:
    """Seconds a step, and the most versions that a sample was behind."""
    ahead = [f"rollout.ahead.lag={lag}", f"rollout.ahead.order={order}"] if lag else []
    config = composed_run(
        *("experiment=smoke", "algo.correction=tis", "rollout=vllm", "transfer.take=copy", "samples_per_prompt=2"),
        *(f"prompts_per_step={GROUPS}", f"steps={options.steps}", *ahead),
    )
    worker, record = Worker(options.mean_ms / 1000, options.sigma), Record()
    client = RolloutClient([worker], Tokenizer(), config.rollout)
    prompts = [Prompt(str(number), (3,)) for number in range(GROUPS * 8)]
    gather = Gather(client, lambda prompts, answers: [1.0] * len(answers), config, record)
    order_of_rows = list(batches(len(prompts), GROUPS, options.steps, 0))
    made: Gathers = gather
    if lag and order == "exact":
        made = Exact(gather, record, prompts, order_of_rows)
    elif lag:
        slots = Slots(GROUPS, lag, options.steps * GROUPS)
        made = Free(gather, record, client, client.of, Stream(prompts, GROUPS, 0), slots)
    oldest, began = 0.0, time.monotonic()
    with closing(made) if made is not gather else nullcontext():
        for step, rows in enumerate(order_of_rows, start=1):
            rollouts, _ = made(prompts, rows, step)
            oldest = max(oldest, rollouts.lags(worker.version).max())
            time.sleep(LEARNING * options.mean_ms / 1000)
            made.settle()
            worker.version += 1
            made.release()
    return (time.monotonic() - began) / options.steps, oldest


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--mean-ms", type=float, default=40.0)
    parser.add_argument("--sigma", type=float, default=1.0)
    options = parser.parse_args()
    print("order   lag   ms a step   faster   oldest sample")
    at_first = 0.0
    for lag, order in ((0, "exact"), (1, "exact"), (1, "free"), (2, "free"), (4, "free")):
        seconds, oldest = measured(lag, order, options)
        at_first = at_first or seconds
        print(f"{order:6} {lag:4} {seconds * 1000:11.1f} {at_first / seconds:7.2f}x {oldest:15.0f}", flush=True)
    bound = options.mean_ms / 1000 * max(LEARNING, GROUPS / AT_ONCE)
    print(f"{'bound':11} {bound * 1000:11.1f} {at_first / bound:7.2f}x")


if __name__ == "__main__":
    main()
