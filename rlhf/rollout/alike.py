"""Does a worker that comes into a run sample as those that are there? A few prompts, with the same seeds, to both."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING

from rlhf.config import RolloutConfig
from rlhf.rollout.client import RolloutClient
from rlhf.shell.ending import RunError
from rlhf.types import Completion, Prompt, Tokenizer

if TYPE_CHECKING:
    from transfer import Sender

SEED = 7_000_004


def trial(
    prompts: Sequence[Prompt],
    tokenizer: Tokenizer,
    config: RolloutConfig,
    recover: Callable[[Sender], bool],
    tolerance: float,
) -> Callable[[Sender, Sender], None]:
    """What compares a new worker with one that is there: RunError if log-probs differ by more than `tolerance`, nats.

    Either may die meanwhile: it is started again by `recover`, if that can be.

    Of an answer only the tokens that both have sampled alike are compared: near a tie rounding decides between two.
    """

    def answers(sender: Sender) -> list[Completion]:
        client = RolloutClient([sender], tokenizer, config, recover)
        return client.sample(prompts, n=1, temperature=config.temperature, seed=SEED).completions

    def try_out(new: Sender, old: Sender) -> None:
        worst = difference(answers(new), answers(old))
        if not worst <= tolerance:
            raise RunError(
                f"{new.name}: its log-probs differ from those of {old.name} by up to {worst:.3g} nats, more than "
                f"{tolerance:g} (transfer.verify_tolerance), though both have the same weights"
            )

    return try_out


def difference(ones: Sequence[Completion], others: Sequence[Completion]) -> float:
    """The largest between log-probs of tokens before the first that is another one; infinite if there are none."""
    found: list[float] = []
    for one, other in zip(ones, others, strict=True):
        assert one.logprobs is not None and other.logprobs is not None
        pairs = zip(one.ids, other.ids, one.logprobs, other.logprobs, strict=False)
        alike = takewhile(lambda pair: pair[0] == pair[1], pairs)
        found += [abs(logprob - another) for _, _, logprob, another in alike]
    return max(found, default=math.inf)
