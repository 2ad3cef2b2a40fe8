"""All rows of a step, each a program in a process of its own that is sampled through the endpoint.

A row is over when its program has told the reward and ended; a program that tells none has failed, whatever it did.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from array import array
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import urlsplit

from rlhf.agents.process import AgentProcess, Guard, words_of
from rlhf.config.task import AgentTaskConfig
from rlhf.gateway.calls import Calls, Limits
from rlhf.gateway.sampling import Sampling
from rlhf.gateway.server import serving
from rlhf.gateway.session import Bounds, Session, Sessions, Terms
from rlhf.rollout.client import RolloutClient
from rlhf.rollout.sampling import seed_of
from rlhf.shell.ending import RunError
from rlhf.types import (
    DIED,
    FINISHED,
    GARBAGE,
    IDS,
    SAMPLED,
    TIMED_OUT,
    VERSIONS,
    Completion,
    Prompt,
    Rollouts,
    Tokenizer,
    Told,
)

LOOK_S = 0.5  # until the step looks again at deadlines: signals get through
GRACE_S = 10.0  # to end, for a program that has told its reward
ROW_BYTES = 32 * 1024  # of a row in an environment variable; a longer one is in a file
PROXIES = ("NO_PROXY", "no_proxy")


@dataclass(eq=False, slots=True)
class Row:
    """A program that runs, or has run."""

    number: int
    prompt: Prompt
    terms: Terms
    session: Session | None = None
    process: AgentProcess | None = None
    deadline: float = 0.0
    failed: str = ""
    why: str = ""

    def told(self) -> Told:
        """What became of it."""
        assert self.session is not None
        sequences = self.session.turns.sequences()
        said = sequences[0].said if sequences else [""]
        score = None if self.failed else self.session.reward
        counts = {name: float(count) for name, count in self.session.counts.items()}
        return Told(said, score, self.failed, counts, self.why)

    def completion(self, version: int, end: int) -> Completion:
        """What is learned from; of a row without an answer a token `end` of that version, with mask 0."""
        assert self.session is not None
        rows = [sequence.completion for sequence in self.session.turns.sequences()]
        if not rows:
            said = array(IDS, (end,)), None, array(VERSIONS, (version,))
            return Completion(*said, FINISHED, array(SAMPLED, (0,)))
        prompt = None if rows[0].prompt == self.prompt.ids else rows[0].prompt
        return replace(rows[0], prompt=prompt, earlier=tuple(rows[1:]))


class Agents:
    """Samples what programs ask for; a `rlhf.types.Sampler`."""

    def __init__(self, client: RolloutClient, config: AgentTaskConfig, tokenizer: Tokenizer) -> None:
        self._client, self._config, self._tokenizer = client, config, tokenizer

    def sample(self, prompts: Sequence[Prompt], *, n: int, temperature: float, seed: int) -> Rollouts:
        """Let n programs run for each prompt; what each is told depends on its own seeds, and on what it asks."""
        return self.sample_seeded(prompts, [seed_of(seed, index) for index in range(len(prompts))], n, temperature)

    def sample_seeded(
        self,
        prompts: Sequence[Prompt],
        seeds: list[int],
        n: int,
        temperature: float,
        firsts: Sequence[int] | None = None,
    ) -> Rollouts:
        """As `sample` does, with a seed of its own for each prompt, and the number of its first sample, if not 0."""
        allowed = tuple(dict.fromkeys([temperature, self._client.config.temperature]))
        rows = [
            Row(p * n + sample, prompt, Terms(seeds[p], (firsts[p] if firsts else 0) + sample, temperature, allowed))
            for p, prompt in enumerate(prompts)
            for sample in range(n)
        ]
        wanted, sessions = self._client.wanted, Sessions()
        limits = Limits(self._client.config.max_new_tokens, wanted.context, wanted.vocabulary)
        with ExitStack() as stack:
            sampling = stack.enter_context(closing(Sampling(self._client)))
            calls = Calls(self._tokenizer, sampling.ask, limits, self._config.tool_format)
            url = stack.enter_context(serving(sessions, calls, self._config.host))
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rlhf-agents-")))
            place = Place(url, folder, stack.enter_context(Guard()))
            stack.enter_context(closing(step := _Step(self._config, sampling, sessions, place, rows))).play()
        return _rollouts(list(prompts), step.rows, seeds, n, self._client.ends[0])


@dataclass(frozen=True, slots=True)
class Place:
    """Where the programs of a step are."""

    url: str
    folder: Path
    guard: Guard

    def variables(self, row: Row, key: str) -> dict[str, str]:
        """What its program finds in its environment."""
        assert row.session is not None
        given = {**row.prompt.columns, "prompt": list(row.prompt.messages) or row.prompt.text}
        text = json.dumps(given, ensure_ascii=False, default=str)
        if len(text.encode()) > ROW_BYTES:
            path = self.folder / f"{row.number}.json"
            path.write_text(text, encoding="utf-8")
            text = f"@{path}"
        host = str(urlsplit(self.url).hostname)
        return {
            "OPENAI_BASE_URL": f"{self.url}/v1",
            "OPENAI_API_KEY": key,
            "RLHF_SESSION": f"{self.url}/sessions/{row.session.id}",
            "RLHF_ROW": text,
            **{name: ",".join(filter(None, [os.environ.get(name), host])) for name in PROXIES},
        }


@dataclass(slots=True)
class _Step:
    config: AgentTaskConfig
    sampling: Sampling
    sessions: Sessions
    place: Place
    rows: list[Row]
    running: list[Row] = field(default_factory=list)

    def play(self) -> None:
        """Until every row is over; RemoteError or RunError of a worker that fails."""
        waiting = list(reversed(self.rows))
        while waiting or self.running:
            while waiting and len(self.running) < self.config.concurrency:
                self._begin(waiting.pop())
            self.sampling.go_on(LOOK_S)
            now = time.monotonic()
            for row in [row for row in self.running if self._is_over(row, now)]:
                self._end(row)

    def close(self) -> None:
        """No program runs any more."""
        for row in self.running:
            if row.process is not None:
                row.process.close()

    def _begin(self, row: Row) -> None:
        bounds = Bounds(calls=self.config.calls)
        row.session, key = self.sessions.begin(row.terms, bounds, self.config.timeout_s + GRACE_S)
        row.deadline = time.monotonic() + self.config.timeout_s
        command, log = words_of(self.config.command), self.place.folder / f"{row.number}.log"
        try:
            row.process = AgentProcess(command, self.place.variables(row, key), log, self.place.guard)
        except OSError as error:
            raise RunError(f"task.command: {self.config.command} cannot be started: {error.strerror}") from None
        self.running.append(row)
        row.process.watch(lambda: self.sampling.tell(_nothing))

    def _is_over(self, row: Row, now: float) -> bool:
        """Whether its program has ended, or is to be ended."""
        assert row.session is not None and row.process is not None
        if row.session.rewarded and row.deadline > now + GRACE_S:
            row.deadline = now + GRACE_S
        return row.process.ended or row.deadline <= now

    def _end(self, row: Row) -> None:
        assert row.session is not None and row.process is not None
        self.running.remove(row)
        late = not row.process.ended
        self.sessions.close(row.session)
        code = row.process.close()
        if not row.session.rewarded:
            row.failed, row.why = self._failure(row, late, code)
        elif not row.session.turns.all:
            row.failed, row.why = GARBAGE, "it has told a reward, and has made no call"

    def _failure(self, row: Row, late: bool, code: int) -> tuple[str, str]:
        assert row.process is not None and row.session is not None
        words = row.process.last_words
        if late:
            return TIMED_OUT, f"no reward within {self.config.timeout_s:g} s (task.timeout_s): {words}"
        if code:
            return DIED, f"it has ended with code {code}: {words}"
        if not row.session.turns.all:
            return GARBAGE, f"it has ended without a call and without a reward: {words}"
        return GARBAGE, f"it has ended without a reward (POST $RLHF_SESSION/reward): {words}"


def _nothing() -> None:
    pass


def _rollouts(prompts: list[Prompt], rows: Sequence[Row], seeds: list[int], n: int, end: int) -> Rollouts:
    """RunError if no row has come to an answer."""
    versions = [turn.answer.versions[-1] for row in rows if row.session for turn in row.session.turns.all]
    if rows and not versions:
        raise RunError(f"no agent has come to a first answer: {rows[0].failed}: {rows[0].why}")
    told = [row.told() for row in rows]
    return Rollouts(
        prompts,
        [row.completion(versions[0], end) for row in rows],
        [each.said[-1] for each in told],
        seeds,
        n,
        told,
    )
