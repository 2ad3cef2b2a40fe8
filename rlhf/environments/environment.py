"""A user's class as an environment: its processes, and what its episodes have in common."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from threading import Semaphore
from typing import Any

from rlhf.config.task import EnvironmentTaskConfig
from rlhf.environments.dialogue import Dialogue, Message
from rlhf.environments.factory import Factory
from rlhf.environments.hosts import Hosts, Outcome, Seat
from rlhf.models.encoding import beginning, begun
from rlhf.models.stop_tokens import stop_ids
from rlhf.models.tool_calls import ToolFormat
from rlhf.types import DIED, GARBAGE, Completion, Prompt, Said, Then, Tokenizer

TRIAL_S = 10.0  # beyond a call's deadline, for what is tried before anything is trained


@dataclass(slots=True)
class Site:
    """What all episodes of a run share; a context with the processes that hold the instances."""

    config: EnvironmentTaskConfig
    factory: Factory
    tokenizer: Tokenizer
    tool_format: ToolFormat | None = None  # None: it is played
    schemas: list[dict[str, Any]] = field(default_factory=list)  # of its tools
    hosts: Hosts = field(init=False)

    def __post_init__(self) -> None:
        named = self.config.factory, tuple(self.config.tools)
        self.hosts = Hosts(named, self.config.processes, self.config.concurrency)

    def said(self, text: str, prompt: Prompt, answer: Completion) -> list[int]:
        """The ids of a text that is said to an answer: as a user's message, where the prompt has messages."""
        text = self.cut(text)
        if not prompt.messages:
            return self.tokenizer.encode(text, add_special_tokens=False)
        said = [{"role": "user", "content": text}]
        return Dialogue(self.tokenizer, prompt.given).after(said, ended=self.ended(answer))

    def ended(self, answer: Completion) -> bool:
        """Whether a stop id has ended it, and no stop text."""
        return answer.ids[-1] in stop_ids(self.tokenizer)

    def cut(self, text: str, parts: int = 1) -> str:
        """The text, or so much of it as has a share of `task.reply_tokens` tokens."""
        most = max(1, self.config.reply_tokens // parts)
        text = text.encode(errors="replace").decode()  # no tokenizer takes a surrogate that is alone
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return text if len(ids) <= most else self.tokenizer.batch_decode([ids[:most]], skip_special_tokens=False)[0]

    def prompted(self, prompt: Prompt, opening: Any) -> tuple[int, ...]:
        """The ids of a prompt with what `reset` has said: a text, behind the last message, or further messages."""
        if not prompt.messages:
            ids = self.tokenizer.encode(f"{prompt.text}{opening}", add_special_tokens=False)
            return tuple(begun(ids, beginning(self.tokenizer), False))
        messages = [dict(message) for message in prompt.messages]
        if isinstance(opening, str):
            messages[-1]["content"] = f"{messages[-1]['content']}{opening}"
        else:
            messages += [dict(message) for message in opening]
        text = Dialogue(self.tokenizer, prompt.given).asked(messages)
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))


class ClassEpisode:
    """One row's instance: it is made and reset, hears answers, and tells its reward at the end."""

    def __init__(self, site: Site, prompt: Prompt) -> None:
        self.site, self.prompt = site, prompt
        self.seat: Seat | None = None

    def begin(self, then: Then) -> None:
        """Make the instance, and reset it."""
        asked = [dict(message) for message in self.prompt.messages] or self.prompt.text
        arguments = self.site.factory.given({"prompt": asked, **self.prompt.columns})
        self._made("reset", arguments, then, lambda value: then(self._opened(value)))

    def end(self, then: Then) -> None:
        """Ask for its reward, if it has one."""
        if not self.site.factory.has("get_reward"):
            then(Said(score=self.score))
            return
        heard = partial(self._scored, then)
        self.there(then, lambda: self.call("get_reward", {}, then, heard))

    def there(self, then: Then, go_on: Callable[[], None]) -> None:
        """Go on with the instance, which is made first if nobody has had to reset it."""
        if self.seat is not None:
            go_on()
        else:
            self._made("", {}, then, lambda _: go_on())

    def close(self) -> None:
        """Drop the instance."""
        if self.seat is not None:
            self.seat.close()

    @property
    def score(self) -> float | None:
        """The reward so far, of an instance without get_reward."""
        return None

    @abstractmethod
    def hear(self, answer: Completion, text: str, then: Then) -> None: ...

    def call(self, name: str, arguments: Mapping[str, Any], then: Then, heard: Callable[[Any], None]) -> None:
        """Call a method; what it returns is heard, and a failure ends the episode."""
        assert self.seat is not None, "it has begun"
        self.seat.call(name, dict(arguments), self._unless_failed(then, heard))

    def _made(self, name: str, arguments: dict[str, Any], then: Then, heard: Callable[[Any], None]) -> None:
        """Make the instance, and call a method of it."""
        try:
            self.seat = self.site.hosts.seat()
        except ValueError as error:
            then(Said(failed=DIED, why=str(error)))
            return
        self.seat.make(name, arguments, self._unless_failed(then, heard))

    def _scored(self, then: Then, value: Any) -> None:
        then(scored(value, "get_reward()"))

    def _unless_failed(self, then: Then, heard: Callable[[Any], None]) -> Callable[[Outcome], None]:
        def told(outcome: Outcome) -> None:
            if outcome.failed:
                then(Said(failed=outcome.failed, why=outcome.why))
                return
            try:
                heard(outcome.value)
            except Exception as error:  # the row's failure, and not that of the thread that hears
                then(Said(failed=GARBAGE, why=f"{type(error).__name__}: {error}"))

        return told

    def _opened(self, value: Any) -> Said:
        """What reset has said; Gymnasium's form has an information beside it."""
        if isinstance(value, list) and len(value) == 2 and isinstance(value[1], dict) and "role" not in value[1]:
            value = value[0]
        if value is None or value == "":
            return Said(ids=())
        if not isinstance(value, str) and not is_messages(value):
            return Said(failed=GARBAGE, why=f"reset() must return a text, messages or None (got {value!r:.200})")
        if not isinstance(value, str) and not self.prompt.messages:
            return Said(failed=GARBAGE, why="reset() returned messages, and the prompt is a text: set task.chat=true")
        return Said(ids=(), prompt=self.site.prompted(self.prompt, value))


def is_messages(value: Any) -> bool:
    """Whether it is a list of messages."""
    return isinstance(value, list) and all(isinstance(each, dict) and "role" in each for each in value)


def scored(value: Any, what: str) -> Said:
    """The end of an episode with this reward."""
    if value is None:
        return Said()
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        if isinstance(value, bool):
            return Said(score=float(value))
        return Said(failed=GARBAGE, why=f"{what} must be a finite number or None (got {value!r:.200})")
    return Said(score=float(value))


class ClassEnvironment:
    """A `rlhf.types.Environment` around a user's class; to be used as a context."""

    def __init__(self, site: Site, episode: type[ClassEpisode], longest_reply: int) -> None:
        self._site, self._episode = site, episode
        self.longest_reply = longest_reply
        self.places = Semaphore(site.config.concurrency)
        self.opens = site.factory.has("reset")
        self.scores = site.factory.plays or site.factory.has("get_reward")

    def __enter__(self) -> ClassEnvironment:
        self._site.hosts.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._site.hosts.__exit__(*exception)

    @property
    def turns(self) -> int:
        """task.turns."""
        return self._site.config.turns

    @property
    def budget(self) -> int | None:
        """task.budget."""
        return self._site.config.budget

    @property
    def timeout_s(self) -> float | None:
        """task.timeout_s."""
        return self._site.config.timeout_s

    def episode(self, prompt: Prompt) -> ClassEpisode:
        """One of its own for a row with this prompt."""
        return self._episode(self._site, prompt)


def as_tool_messages(names: Sequence[str], contents: Sequence[str]) -> list[Message]:
    """What tools have answered."""
    return [{"role": "tool", "name": name, "content": content} for name, content in zip(names, contents, strict=True)]
