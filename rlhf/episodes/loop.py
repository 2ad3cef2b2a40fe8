"""All rows of a step, each with an episode of its own: whoever is ready is answered, and nobody waits for another.

    waits      for a place among the episodes that run at once
    begins     its environment is asked for what it says first
    ready      its next answer can be sampled
    asked      a worker samples it
    heard      its environment is asked what it says to that
    over       no further answer comes, and the environment has told its score, or has failed

The thread that samples does all but two things: workers are asked in threads (requests.py), and environments that take
long have threads or processes of their own. Both tell by a queue what has come.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from queue import Empty, SimpleQueue
from typing import Any

from rlhf.episodes.requests import Asked, Requests
from rlhf.episodes.row import Row
from rlhf.rollout.client import RolloutClient
from rlhf.rollout.sampling import measured_rows, seed_of
from rlhf.shell.ending import RunError
from rlhf.types import FINISHED, GARBAGE, TIMED_OUT, Completion, Environment, Prompt, Rollouts, Said
from transfer import Sender
from transfer.agreement.wire import RemoteError

SAMPLES = 65536  # more than there are samples a prompt: apart from each other are the seeds of turns
LOOK_S = 1.0  # until the step looks again: signals get through
PLACE_S = 0.05  # until it looks for a place that another step has given back


class Episodes:
    """Samples conversations; a `rlhf.types.Sampler`. An answer that the length limit has cut ends its conversation."""

    def __init__(self, client: RolloutClient, environment: Environment) -> None:
        self._client, self._environment = client, environment

    def sample(self, prompts: Sequence[Prompt], *, n: int, temperature: float, seed: int) -> Rollouts:
        """Draw n conversations a prompt; each depends on its own seeds, and on what its environment says.

        RunError if no row has come to an answer.
        """
        seeds = [seed_of(seed, index) for index in range(len(prompts))]
        rollouts = self.sample_seeded(prompts, seeds, n, temperature)
        if prompts and not rollouts.tokens:
            first = rollouts.episodes[0]
            raise RunError(f"no environment has come to a first answer: {first.failed}: {first.why}")
        return rollouts

    def sample_seeded(
        self,
        prompts: Sequence[Prompt],
        seeds: list[int],
        n: int,
        temperature: float,
        firsts: Sequence[int] | None = None,
    ) -> Rollouts:
        """As `sample` does, with a seed of its own for each prompt, from its sample number `firsts` on; None: 0."""
        measured = range(len(prompts) * n) if self._client.all_logprobs else measured_rows(len(prompts) * n)
        rows = [
            Row(p * n + sample, prompt, sample + (firsts[p] if firsts else 0), self._environment.episode(prompt))
            for p, prompt in enumerate(prompts)
            for sample in range(n)
        ]
        step = _Step(self._client, self._environment, rows, seeds, n, temperature, frozenset(measured))
        try:
            step.play()
        finally:
            step.close()
        return _rollouts(list(prompts), rows, seeds, n, self._client.ends[0])


@dataclass(slots=True)
class _Step:
    client: RolloutClient
    environment: Environment
    rows: Sequence[Row]
    seeds: Sequence[int]  # of the prompts
    n: int
    temperature: float
    measured: frozenset[int]  # rows whose log-probs are wanted
    events: SimpleQueue[Callable[[], None]] = field(default_factory=SimpleQueue)
    ready: list[Row] = field(default_factory=list)
    waiting: list[Row] = field(default_factory=list)  # for a place
    open: int = 0  # episodes
    beginning: Counter[int] = field(default_factory=Counter)  # of a prompt's rows, by prompt
    requests: Requests = field(init=False)

    def __post_init__(self) -> None:
        self.requests = Requests(self.client)
        self.waiting = list(reversed(self.rows))

    def play(self) -> None:
        """Until every row is over; RemoteError or RunError of a worker that fails."""
        while True:
            self._begin()
            self._ask()
            if not self.open and not self.waiting:
                return
            for event in self._events():
                event()

    def close(self) -> None:
        """Ask no environment any more."""
        begun = self.rows[: len(self.rows) - len(self.waiting)]
        for row in begun:
            if not row.over:
                row.episode.close()
                self._give_place_back()

    def _begin(self) -> None:
        """Give rows that wait a place, while there is one."""
        places = self.environment.places
        while self.waiting and (places is None or places.acquire(blocking=False)):
            row = self.waiting.pop()
            self.open += 1
            if self.environment.opens:
                self.beginning[row.number // self.n] += 1
                self._call(row, row.episode.begin)
            else:
                self.ready.append(row)

    def _events(self) -> Iterator[Callable[[], None]]:
        """What has come, or nothing for a while; then rows whose environments are late have failed."""
        wait = PLACE_S if self.waiting else LOOK_S
        due = [row.deadline for row in self.rows if row.deadline is not None]
        if due:
            wait = max(0.0, min(wait, min(due) - time.monotonic()))
        try:
            yield self.events.get(timeout=wait)
            while True:
                yield self.events.get_nowait()
        except Empty:
            pass
        now = time.monotonic()
        for row in self.rows:
            if row.deadline is not None and row.deadline <= now:
                why = f"no answer within {self.environment.timeout_s:g} s"
                self._heard(row, row.calls, Said(failed=TIMED_OUT, why=why))

    # --- environments -------------------------------------------------------------------------------------------------

    def _call(self, row: Row, call: Callable[..., None], *arguments: Any) -> None:
        """Ask the row's environment; what comes at once is heard at once."""
        row.calls += 1
        if self.environment.timeout_s is None:
            call(*arguments, partial(self._heard, row, row.calls))
            return
        tell = partial(self._tell, row, row.calls)
        try:
            call(*arguments, tell)
        except Exception as error:  # the row's failure: of what its environment has said, or of what it was asked
            tell(Said(failed=GARBAGE, why=f"{type(error).__name__}: {error}"))
        row.deadline = time.monotonic() + self.environment.timeout_s  # not before: a process may have had to start

    def _tell(self, row: Row, number: int, said: Said) -> None:
        self.events.put(partial(self._heard, row, number, said))

    def _heard(self, row: Row, number: int, said: Said) -> None:
        """What the environment has said to the call of that number."""
        if row.over or number != row.calls:
            return
        row.deadline = None
        row.counts.update(said.counts)
        if self.environment.opens and row.calls == 1:
            self.beginning[row.number // self.n] -= 1
        if said.ids is None:
            self._over(row, said)
            return
        if row.answers == self.environment.turns:  # what was said to the last answer, nobody is told
            row.note(said)
            self._call(row, row.episode.end)
            return
        most, tokens = self.client.longest_prompt, row.tokens_with(said)
        if most is None or tokens <= most:
            row.hear(said)
            self.ready.append(row)
        elif row.answers:
            row.note(said)
            self._call(row, row.episode.end)
        else:
            why = f"a prompt of {tokens} tokens leaves no room for an answer: it may have {most} at most"
            self._over(row, Said(failed=GARBAGE, why=why))

    def _over(self, row: Row, said: Said) -> None:
        row.end(said)
        row.episode.close()
        self.open -= 1
        self._give_place_back()

    def _give_place_back(self) -> None:
        if self.environment.places is not None:
            self.environment.places.release()

    # --- workers ------------------------------------------------------------------------------------------------------

    def _ask(self) -> None:
        """Ask workers for the next answers of rows that are ready."""
        self.ready.sort(key=lambda row: row.number)
        units = list(self._units())
        shares = self.requests.shares(len(units))
        taken: set[int] = set()
        for sender, part in shares:
            for n in sorted({len(unit) for unit in units[part]}, reverse=True):
                rows = [row for unit in units[part] if len(unit) == n for row in unit]
                self._request(sender, rows, n)
                taken.update(row.number for row in rows)
        self.ready = [row for row in self.ready if row.number not in taken]

    def _units(self) -> Iterator[list[Row]]:
        """Rows that are asked for together: all samples of a prompt, at the first answer, if they begin alike."""
        for prompt, of_prompt in groupby(self.ready, lambda row: row.number // self.n):
            rows = list(of_prompt)
            first = [row for row in rows if not row.answers]
            if self.beginning[prompt]:  # they wait for each other: what a worker computes of a prompt is computed once
                rows = [row for row in rows if row.answers]
            elif len(first) == self.n and len({tuple(row.asks_with) for row in first}) == 1:
                yield first
                continue
            yield from ([row] for row in rows)

    def _request(self, sender: Sender, rows: list[Row], n: int) -> None:
        heads = rows[::n]
        whole = len(self.measured) == len(self.rows)
        asked = Asked(
            [row.asks_with for row in heads],
            [self._seed(row) for row in heads],
            [0 if row.answers else row.sample for row in heads],
            n,
            self.temperature,
            None if whole else [place for place, row in enumerate(rows) if row.number in self.measured],
        )

        recoveries = self.client.recoveries(sender)

        def answered(told: list[Completion] | BaseException) -> None:
            self.events.put(partial(self._answered, sender, recoveries, rows, told))

        self.requests.ask(sender, asked, answered)

    def _seed(self, row: Row) -> int:
        """Of its next answer: that of the prompt, whose samples have numbers, or of a later turn."""
        seed = self.seeds[row.number // self.n]
        return seed_of(seed, row.answers * SAMPLES + row.sample) if row.answers else seed

    def _answered(
        self, sender: Sender, recoveries: int, rows: list[Row], told: list[Completion] | BaseException
    ) -> None:
        """What a worker has answered that had been brought back so often when it was asked."""
        self.requests.over(sender)
        if isinstance(told, BaseException):
            if not isinstance(told, RemoteError) or not self._back(sender, recoveries):
                raise told
            self.ready += rows
            return
        for row, answer, text in zip(rows, told, self.client.texts(told), strict=True):
            row.say(answer, text)
            if answer.finish_reason != FINISHED or self._full(row):
                self._call(row, row.episode.end)
            else:
                self._call(row, row.episode.hear, answer, text)

    def _back(self, sender: Sender, recoveries: int) -> bool:
        """Whether the rows of a worker that has failed may be asked for again: it has left, or serves again."""
        return (
            sender not in self.client.senders
            or self.client.recoveries(sender) != recoveries  # another of its requests has told before
            or self.client.recover(sender)
        )

    def _full(self, row: Row) -> bool:
        return self.environment.budget is not None and len(row.ids) >= self.environment.budget


def _rollouts(prompts: list[Prompt], rows: Sequence[Row], seeds: list[int], n: int, end: int) -> Rollouts:
    versions = [version for row in rows if row.answers for version in row.versions[-1:]] or [0]
    return Rollouts(
        prompts,
        [row.completion(versions[0], end) for row in rows],
        [row.text for row in rows],
        seeds,
        n,
        [row.told() for row in rows],
    )


def conversing(client: RolloutClient, environment: Environment | None) -> Any:
    """The client itself where answers are not replied to, else conversations through it, or what its environment has.

    A sampler, also with a seed of its own for each prompt (`sample_seeded`).
    """
    if environment is None:
        return client
    own = getattr(environment, "sampler", None)
    return Episodes(client, environment) if own is None else own(client)
