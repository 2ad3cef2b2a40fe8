"""Episodes in which the policy calls tools: an answer without a call is the last.

A tool that raises, one that nobody has, and a call that cannot be read are answered with the error, and counted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.environments.dialogue import Dialogue
from rlhf.environments.environment import ClassEpisode, Site, as_tool_messages
from rlhf.environments.hosts import Outcome
from rlhf.models.tool_calls import Parsed
from rlhf.types import GARBAGE, RAISED, Completion, Prompt, Said, Then

CALLS, FAILURES = "tools/calls", "tools/failures"
MOST_CALLS = 8  # in an answer; further ones are not made


class ToolEpisode(ClassEpisode):
    """A row's."""

    def __init__(self, site: Site, prompt: Prompt) -> None:
        super().__init__(site, prompt)
        self._format = site.tool_format
        self._ended = True  # the last answer, by a stop id

    def hear(self, answer: Completion, text: str, then: Then) -> None:
        """Make the calls of the answer, one after the other."""
        assert self._format is not None, "it has tools"
        ids, self._ended = answer.ids.tolist(), self.site.ended(answer)
        ids = ids[:-1] if self._ended else ids
        said = self.site.tokenizer.batch_decode([ids], skip_special_tokens=False)[0]
        parsed = self._format.parse(said, self.site.schemas)
        if not parsed.message.get("tool_calls") and not parsed.errors:
            self.end(then)
            return
        self.there(then, _Turn(self, parsed, then).go_on)

    def answered(
        self, answer: Mapping[str, Any], names: Sequence[str], contents: Sequence[str], counts: dict[str, float]
    ) -> Said:
        """What is said to the policy."""
        parts = len(contents)
        messages = as_tool_messages(names, [self.site.cut(content, parts) for content in contents])
        ids = Dialogue(self.site.tokenizer, self.prompt.given).after(messages, called=True, ended=self._ended)
        text = "\n".join(message["content"] for message in messages)
        return Said(ids, text, counts=counts, answer=answer, messages=messages)


class _Turn:
    """The calls of one answer."""

    def __init__(self, episode: ToolEpisode, parsed: Parsed, then: Then) -> None:
        self._episode, self._answer, self._then = episode, parsed.message, then
        calls, errors = list(parsed.message.get("tool_calls") or ()), list(parsed.errors)
        self._calls = calls[:MOST_CALLS]
        self._names: list[str] = []
        self._contents: list[str] = []
        self._failures = len(errors)
        self._all = len(calls) + len(errors)
        if len(calls) > MOST_CALLS:
            errors = [*errors, f"error: at most {MOST_CALLS} calls in an answer are made"]
        self._errors = errors

    def go_on(self) -> None:
        """Make the next call, or tell what has come of all; in whatever thread has heard of the one before."""
        try:
            self._go_on()
        except Exception as error:  # the row's failure, and not that of the thread
            self._then(Said(failed=GARBAGE, why=f"{type(error).__name__}: {error}"))

    def _go_on(self) -> None:
        if not self._calls:
            counts = {CALLS: float(self._all), FAILURES: float(self._failures)}
            names = [*self._names, *("" for _ in self._errors)]
            self._then(self._episode.answered(self._answer, names, [*self._contents, *self._errors], counts))
            return
        function = self._calls.pop(0)["function"]
        name, arguments = str(function["name"]), function.get("arguments") or {}
        if name not in self._episode.site.factory.tools:
            known = ", ".join(self._episode.site.factory.tools)
            self._failed(name, f"error: there is no tool {name}; there are {known}")
            return
        assert self._episode.seat is not None, "it has begun"
        self._episode.seat.call(name, dict(arguments), lambda outcome: self._heard(name, outcome))

    def _heard(self, name: str, outcome: Outcome) -> None:
        if outcome.failed == RAISED:
            self._failed(name, f"error: {outcome.why}")
        elif outcome.failed:
            self._then(Said(failed=outcome.failed, why=f"{name}: {outcome.why}"))
        else:
            self._took(name, outcome.value if isinstance(outcome.value, str) else json.dumps(outcome.value))

    def _failed(self, name: str, why: str) -> None:
        self._failures += 1
        self._took(name, why)

    def _took(self, name: str, content: str) -> None:
        self._names.append(name)
        self._contents.append(content)
        self.go_on()
