"""How a user's function is called: by the names of its parameters, in our form or in TRL's.

    f(prompts, completions, **columns)                      ours; whatever the first two are called, by position
    f(completions, **columns)                               TRL's; prompts and completion_ids are among the columns
    f(prompts, completions, completion_ids, **columns)      TRL's, too

Prompts and completions are texts; in TRL's forms, where the data are messages, they are lists of {role, content}: of an
episode with tools, all that was said after the prompt, calls and what they answered among it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.config.model import AUTO
from rlhf.rewards.columns import columns
from rlhf.rewards.samples import Samples
from rlhf.types import Prompt

GIVEN = ("prompts", "completions", "completion_ids")
OURS = GIVEN[:2]


@dataclass(frozen=True, slots=True)
class Form:
    """What a function is given by name, beside the columns; nothing: prompts and completions, by position."""

    names: tuple[str, ...]
    messages: bool

    @classmethod
    def of(cls, function: Callable[..., Any], messages: Any = AUTO) -> Form:
        """As the function's parameters have it; `messages` (auto: in TRL's forms) is `reward.messages`."""
        taken = _parameters(function)
        named = [name for name in GIVEN if name in taken and taken[name].kind is not inspect.Parameter.POSITIONAL_ONLY]
        if "completions" not in named:
            return cls((), messages is True)
        trl = "prompts" not in named or "completion_ids" in named
        if trl and any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in taken.values()):
            named = list(GIVEN)
        return cls(tuple(named), trl if messages == AUTO else bool(messages))

    @property
    def shown(self) -> str:
        """The call, for messages."""
        return f"({', '.join(self.names or OURS)}, **columns)"

    def arguments(self, samples: Samples) -> tuple[list[Any], dict[str, Any]]:
        """The function's arguments for these samples, by position and by name."""
        asked = [self._asked(prompt) for prompt in samples.prompts]
        talks = samples.messages or [[]] * len(samples)
        rows = zip(samples.prompts, samples.answers, talks, strict=True)
        said = [self._said(prompt, answer, talk) for prompt, answer, talk in rows]
        others = columns(samples.prompts)
        if not self.names:
            return [asked, said], others
        given = dict(zip(GIVEN, (asked, said, samples.ids), strict=True))
        return [], others | {name: given[name] for name in self.names}

    def check(self, function: Callable[..., Any], there: Sequence[str]) -> None:
        """TypeError unless the function takes what it will be given with these columns."""
        twice = [name for name in self.names if name in there]
        if twice:
            raise TypeError(f"multiple values for argument {twice[0]!r}")
        if not _parameters(function):
            return  # nobody can tell what a function of C takes
        by_place = () if self.names else OURS
        inspect.signature(function).bind(*by_place, **dict.fromkeys([*self.names, *there]))

    def _asked(self, prompt: Prompt) -> Any:
        return [dict(message) for message in prompt.messages] if self.messages and prompt.messages else prompt.text

    def _said(self, prompt: Prompt, answer: str, talk: list[dict[str, Any]]) -> Any:
        if not (self.messages and prompt.messages):
            return answer
        return [dict(message) for message in talk] or [{"role": "assistant", "content": answer}]


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}
