"""The trainer's side of sampling: prompts out to the workers, checked answers back, each sample taken once."""

from __future__ import annotations

import copy
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from rlhf.config import Cut, EvaluationConfig, RolloutConfig, RunConfig, all_logprobs
from rlhf.models.stop_tokens import stop_ids
from rlhf.rollout import columns
from rlhf.rollout.sampling import ABORTED, Sample, measured_rows, seed_of
from rlhf.rollout.stop_texts import completing_tokens, cut_at
from rlhf.shell.ending import RunError
from rlhf.types import FINISHED, Completion, Prompt, Rollouts, Tokenizer
from transfer.agreement.shown import shown
from transfer.agreement.wire import BODY, RemoteError

if TYPE_CHECKING:
    from transfer import Sender

Settings = dict[str, Any]  # the fields of a message that are the same for all workers
Heard = Callable[[str, float, float], object]  # of a request: which worker had it, from when to when (monotonic)


@dataclass(frozen=True, slots=True)
class Share:
    """Prompts for one worker, each with its seed and the numbers of its samples whose log-probs are wanted."""

    prompts: Sequence[Sequence[int]]
    seeds: Sequence[int]
    measured: Sequence[Sequence[int]]
    firsts: Sequence[int] | None = None  # of each prompt, the number of its first sample; None: 0

    def part(self, rows: Sequence[int]) -> Share:
        """These of the prompts."""
        prompts, seeds = [self.prompts[row] for row in rows], [self.seeds[row] for row in rows]
        firsts = None if self.firsts is None else [self.firsts[row] for row in rows]
        return Share(prompts, seeds, [self.measured[row] for row in rows], firsts)

    def rows(self, n: int) -> list[int]:
        """The rows, of n a prompt, whose log-probs are wanted."""
        return [place * n + sample for place, samples in enumerate(self.measured) for sample in samples]

    def message(self, settings: Settings) -> dict[str, Any]:
        """What the worker is asked."""
        n, rows = settings["n"], self.rows(settings["n"])
        body = {"prompt": [list(ids) for ids in self.prompts], "seeds": list(self.seeds), **settings}
        if self.firsts is not None and any(self.firsts):
            body["firsts"] = list(self.firsts)
        return body if len(rows) == len(self.prompts) * n else {**body, "logprobs_rows": rows}


@dataclass(frozen=True, slots=True)
class Wanted:
    """What an answer has: log-probs of all rows or of `measured_rows`; ids below `vocabulary`, where that is known."""

    all_logprobs: bool = True
    vocabulary: int | None = None
    context: int | None = None  # positions of prompt and answer together, where that is known


def wanted_of(config: RunConfig | EvaluationConfig, policy: Any) -> Wanted:
    """What a run wants of its workers' answers."""
    shape = policy.config.get_text_config()
    of_engine = getattr(config.rollout, "engine_args", {}).get("max_model_len")
    positions = [each for each in (getattr(shape, "max_position_embeddings", None), of_engine) if isinstance(each, int)]
    return Wanted(all_logprobs(config), shape.vocab_size, min(positions, default=None))


class RolloutClient:
    """Samples from the workers behind `senders`; a `rlhf.types.Sampler`.

    `recover` is asked when a worker fails: True if it has been started again and given its weights, so that its share
    can be sampled once more. Samples depend on seeds alone, so nobody sees a difference.
    """

    def __init__(
        self,
        senders: Sequence[Sender],
        tokenizer: Tokenizer,
        config: RolloutConfig,
        recover: Callable[[Sender], bool] = lambda sender: False,
        wanted: Wanted = Wanted(),
        heard: Heard = lambda worker, began, ended: None,
    ) -> None:
        self._wanted = wanted
        self._heard = heard
        self._senders = senders
        self._tokenizer = tokenizer
        self._config = config
        self._recover = recover
        self._recoveries: Counter[Sender] = Counter()
        vocabulary = wanted.vocabulary if config.stop else None
        completing = [] if vocabulary is None else completing_tokens(config.stop, tokenizer, vocabulary)
        self.ends = tuple(dict.fromkeys([*stop_ids(tokenizer), *completing]))
        self._turns: defaultdict[Sender, threading.Lock] = defaultdict(threading.Lock)

    def sample(self, prompts: Sequence[Prompt], *, n: int, temperature: float, seed: int) -> Rollouts:
        """Draw n answers a prompt, in parallel; RemoteError or RunError names a worker that fails or talks nonsense."""
        return self.sample_seeded(prompts, [seed_of(seed, index) for index in range(len(prompts))], n, temperature)

    def sample_seeded(
        self,
        prompts: Sequence[Prompt],
        seeds: list[int],
        n: int,
        temperature: float,
        firsts: Sequence[int] | None = None,
    ) -> Rollouts:
        """As `sample` does, with a seed of its own for each prompt, from its sample number `firsts` on; None: 0."""
        measured = None if self._wanted.all_logprobs else measured_rows(len(prompts) * n)
        completions = self.complete([prompt.ids for prompt in prompts], seeds, n, temperature, measured, firsts)
        return Rollouts(list(prompts), completions, self.texts(completions), seeds, n)

    @property
    def senders(self) -> Sequence[Sender]:
        """To the workers, as they are now: to be asked for at each use."""
        return tuple(self._senders)

    def of(self, sender: Sender) -> RolloutClient:
        """A client of one of the workers, which recovers none."""
        other = copy.copy(self)
        other._senders, other._recover, other._recoveries = [sender], lambda _: False, Counter()
        return other

    def ending(self, most: int | None, stop: Sequence[str]) -> RolloutClient:
        """As this one, for answers of at most so many tokens (None: as many as ever), which end with these texts, too.

        Those are sampled whole, and cut.
        """
        other = copy.copy(self)
        most = self._config.max_new_tokens if most is None else min(most, self._config.max_new_tokens)
        other._config = replace(self._config, max_new_tokens=most, stop=[*self._config.stop, *stop])
        return other

    def cut(self, cut: Cut) -> RolloutClient:
        """As this one, for samples of which some tokens are cut off."""
        other = copy.copy(self)
        other._config = replace(self._config, top_p=cut.top_p, top_k=cut.top_k, min_p=cut.min_p)
        return other

    @property
    def continuous(self) -> bool:
        """Whether rows of many requests share a worker's batch."""
        return self._config.continuous

    @property
    def wanted(self) -> Wanted:
        """What its workers' answers have."""
        return self._wanted

    @property
    def config(self) -> RolloutConfig:
        """How it samples."""
        return self._config

    @property
    def tokenizer(self) -> Tokenizer:
        """The policy's."""
        return self._tokenizer

    @property
    def all_logprobs(self) -> bool:
        """Whether the log-probs of all rows are wanted."""
        return self._wanted.all_logprobs

    @property
    def longest_prompt(self) -> int | None:
        """Tokens of a prompt that leave room for an answer; None where that is not known."""
        positions = self._wanted.context
        return None if positions is None else positions - self._config.max_new_tokens

    def turn_at(self, sender: Sender) -> AbstractContextManager[object]:
        """Hold while the worker is asked, so that it computes one batch at a time, whoever asks."""
        return nullcontext() if self.continuous else self._turns[sender]

    def recover(self, sender: Sender) -> bool:
        """Bring a worker that has failed back, in the thread that started it; whether it had died, and serves again."""
        back = self._recover(sender)
        self._recoveries[sender] += back
        return back

    def recoveries(self, sender: Sender) -> int:
        """How often it was brought back so, by whoever has asked."""
        return self._recoveries[sender]

    def texts(self, completions: Sequence[Completion]) -> list[str]:
        """Each completion without its special tokens, nor the stop id that ended it, which need not be special."""
        ends = frozenset(stop_ids(self._tokenizer))
        said = [c.ids.tolist()[:-1] if _stopped(c, ends) else c.ids.tolist() for c in completions]
        return self._tokenizer.batch_decode(said, skip_special_tokens=True)

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        n: int,
        temperature: float,
        measured: Sequence[int] | None = None,
        firsts: Sequence[int] | None = None,
    ) -> list[Completion]:
        """n answers to each of these prompts, token ids with a seed of their own; rows with log-probs, None: all.

        `firsts`: of each prompt, the number of its first sample, if that is not 0.
        """
        settings = {
            "n": n,
            "max_tokens": self._config.max_new_tokens,
            "temperature": temperature,
            **(self._config.cut.told if temperature else {}),
            "stop_token_ids": list(self.ends),
            "logprobs": 0,
            "return_token_ids": True,
            "encoding": "columns",
        }
        of_prompts: list[list[int]] = [[] for _ in prompts]
        for row in range(len(prompts) * n) if measured is None else measured:
            of_prompts[row // n].append(row % n)
        whole, senders = Share(prompts, seeds, of_prompts, firsts), self.senders
        jobs = [
            (sender, whole.part(range(len(prompts))[block]), settings)
            for sender, block in zip(senders, blocks(len(prompts), len(senders)), strict=True)
            if block.start < block.stop
        ]
        pool = ThreadPoolExecutor(max(1, len(jobs)))  # one worker's parts follow each other
        try:
            asked = [pool.submit(self._ask, *job) for job in jobs]
            answers = [self._answer(pool, job, future) for job, future in zip(jobs, asked, strict=True)]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # after a failure or Ctrl-C, do not wait for slow workers
        completions = [completion for answer in answers for completion in answer]
        return cut_at(self._config.stop, completions, self._tokenizer)

    def _answer(
        self, pool: ThreadPoolExecutor, job: tuple[Sender, Share, Settings], future: Future[list[Completion]]
    ) -> list[Completion]:
        """One worker's share, asked for again for as long as the worker can be recovered; of another if it has left."""
        while True:
            try:
                return future.result()
            except RemoteError:
                if job[0] not in (senders := self.senders):
                    job = (senders[0], *job[1:])
                elif not self.recover(job[0]):  # in this thread, which outlives the worker
                    raise
                future = pool.submit(self._ask, *job)

    def _ask(self, sender: Sender, share: Share, settings: Settings) -> list[Completion]:
        """One worker's share, in requests of at most `rows_per_request` rows."""
        size = max(1, self._config.rows_per_request // settings["n"])
        rows = range(len(share.prompts))
        parts = [share.part(rows[start : start + size]) for start in rows[::size]]
        return [completion for part in parts for completion in self._ask_until_whole(sender, part, settings)]

    def _ask_until_whole(self, sender: Sender, share: Share, settings: Settings) -> list[Completion]:
        """One request; prompts of which new weights cut a sample short are sampled again, all n samples."""
        deadline = time.monotonic() + self._config.timeout_s
        n, groups = settings["n"], self._ask_once(sender, share, settings)
        while cut := [index for index, group in enumerate(groups) if any(c.finish_reason == ABORTED for c in group)]:
            if time.monotonic() > deadline:
                raise RunError(
                    f"{sender.name}: {len(cut) * n} samples were cut short again and again for "
                    f"{self._config.timeout_s:g} s (rollout.timeout_s): is the worker paused, or updated all the time?"
                )
            for index, group in zip(cut, self._ask_once(sender, share.part(cut), settings), strict=True):
                groups[index] = group
        return [completion for group in groups for completion in group]

    def _ask_once(self, sender: Sender, share: Share, settings: Settings) -> list[list[Completion]]:
        """The n completions of each prompt."""
        n, measured = settings["n"], frozenset(share.rows(settings["n"]))
        message, began = share.message(settings), time.monotonic()
        try:
            answer = sender.call("completions", message, self._config.timeout_s)
        finally:
            self._heard(sender.name, began, time.monotonic())
        try:
            expected = columns.Expected(len(share.prompts) * n, settings["max_tokens"], self._wanted.vocabulary)
            samples = columns.decode(answer[BODY], expected)
            completions = [_completion(sample, row in measured, settings) for row, sample in enumerate(samples)]
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(f"{sender.name}: completions: the answer makes no sense: {shown(error, 400)}") from error
        return [completions[start : start + n] for start in range(0, len(completions), n)]


def blocks(count: int, parts: int) -> list[slice]:
    """`count` things as `parts` contiguous slices whose lengths differ by one at most."""
    bounds = [count * part // parts for part in range(parts + 1)]
    return [slice(start, stop) for start, stop in pairwise(bounds)]


def _stopped(completion: Completion, ends: Set[int]) -> bool:
    """Whether a stop id has ended it, and no stop text."""
    return completion.finish_reason == FINISHED and completion.ids[-1] in ends


def _completion(sample: Sample, measured: bool, settings: Settings) -> Completion:
    ids, reason = sample.ids, sample.finish_reason
    if (sample.logprobs is not None) != measured:
        raise ValueError("log-probs are not those of the rows that were asked for")
    if reason != ABORTED:
        if not ids:
            raise ValueError(f"finish_reason is {reason!r} after no tokens")
        if (reason == FINISHED) != (ids[-1] in settings["stop_token_ids"]):
            raise ValueError(f"finish_reason is {reason!r} and the last token {ids[-1]}")
    return Completion(ids, sample.logprobs, sample.versions, reason)
