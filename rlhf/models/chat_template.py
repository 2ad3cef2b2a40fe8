"""A tokenizer's chat template, as conversations are rendered with it; and what it puts behind an answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

ANSWER = "~answer~"  # is looked for in what the template makes of it
TURNS = ({"role": "user", "content": "?"}, {"role": "assistant", "content": ANSWER})


class RefusedError(ValueError):
    """The template has raised an error, as it is written to, or on a value of another kind than it expects."""


def rendered(tokenizer: Any, messages: Sequence[Any], given: Mapping[str, Any], ask: bool) -> str:
    """The conversation as a text, with what asks for an answer if `ask`; `given` are the template's other arguments."""
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=ask, **given)
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
        raise RefusedError(str(error)) from None


def behind_an_answer(tokenizer: Any) -> str:
    """What the template puts behind an assistant's text."""
    return rendered(tokenizer, TURNS, {}, ask=False).rpartition(ANSWER)[2]
