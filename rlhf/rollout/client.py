"""The trainer's side of sampling: prompts out to the workers, checked answers back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from rlhf.config import RolloutConfig
from rlhf.ending import RunError
from rlhf.rollout.sampling import seed_of
from rlhf.types import FINISHED, TRUNCATED, Completion, Prompt, Rollouts, Tokenizer

if TYPE_CHECKING:
    from transfer import Sender


class RolloutClient:
    """Samples from the workers behind `senders`; a `rlhf.types.Sampler`."""

    def __init__(self, senders: Sequence[Sender], tokenizer: Tokenizer, config: RolloutConfig) -> None:
        self._senders = senders
        self._tokenizer = tokenizer
        self._config = config

    def sample(self, prompts: Sequence[Prompt], *, n: int, temperature: float, seed: int) -> Rollouts:
        """Draw n answers a prompt, in parallel; RemoteError or RunError names a worker that dies or talks nonsense."""
        seeds = [seed_of(seed, index) for index in range(len(prompts))]
        settings = {
            "n": n,
            "max_tokens": self._config.max_new_tokens,
            "temperature": temperature,
            "stop_token_ids": [self._tokenizer.eos_token_id],
            "logprobs": 0,
            "return_token_ids": True,
        }
        jobs = [
            (sender, {"prompt": [list(prompt.ids) for prompt in prompts[block]], "seeds": seeds[block], **settings})
            for sender, block in zip(self._senders, blocks(len(prompts), len(self._senders)), strict=True)
            if block.start < block.stop
        ]
        pool = ThreadPoolExecutor(max(1, len(jobs)))  # one worker's parts follow each other
        try:
            answers = list(pool.map(lambda job: self._ask(*job), jobs))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # after a failure or Ctrl-C, do not wait for slow workers
        completions = [completion for answer in answers for completion in answer]
        texts = self._tokenizer.batch_decode([c.ids for c in completions], skip_special_tokens=True)
        return Rollouts(list(prompts), completions, texts, n)

    def _ask(self, sender: Sender, body: dict[str, Any]) -> list[Completion]:
        """One worker's share, in requests of at most `rows_per_request` rows."""
        size = max(1, self._config.rows_per_request // body["n"])
        starts = range(0, len(body["prompt"]), size)
        parts = [{**body, **{key: body[key][start : start + size] for key in ("prompt", "seeds")}} for start in starts]
        return [completion for part in parts for completion in self._ask_once(sender, part)]

    def _ask_once(self, sender: Sender, body: dict[str, Any]) -> list[Completion]:
        answer = sender.call("completions", body, self._config.timeout_s)
        try:
            choices = sorted(answer["choices"], key=lambda choice: choice["index"])
            if [choice["index"] for choice in choices] != list(range(len(body["prompt"]) * body["n"])):
                raise ValueError(f"{len(choices)} choices for {len(body['prompt'])} prompts with n={body['n']}")
            return [_completion(choice, body) for choice in choices]
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(f"{sender.name}: completions: the answer makes no sense: {error!r}") from error


def blocks(count: int, parts: int) -> list[slice]:
    """`count` things as `parts` contiguous slices whose lengths differ by one at most."""
    bounds = [count * part // parts for part in range(parts + 1)]
    return [slice(start, stop) for start, stop in pairwise(bounds)]


def _completion(choice: dict[str, Any], body: dict[str, Any]) -> Completion:
    ids, logprobs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
    reason, version = choice["finish_reason"], int(choice["weight_version"])
    if not 1 <= len(ids) <= body["max_tokens"] or len(logprobs) != len(ids):
        raise ValueError(
            f"{len(ids)} tokens and {len(logprobs)} log-probs where 1 to {body['max_tokens']} were asked for"
        )
    if reason not in (FINISHED, TRUNCATED):
        raise ValueError(f"finish_reason is {reason!r}")
    if (reason == FINISHED) != (ids[-1] in body["stop_token_ids"]):
        raise ValueError(f"finish_reason is {reason!r} and the last token {ids[-1]}")
    if not all(math.isfinite(logprob) for logprob in logprobs):
        raise ValueError("a log-prob is not finite")
    return Completion(ids, logprobs, reason, version)
