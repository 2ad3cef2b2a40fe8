"""Messages of a conversation as files have them: OpenAI's and TRL's role/content, and ShareGPT's from/value.

What a message has beside role and content (tool_calls, tool_call_id, name, reasoning_content, ...) stays in it, for the
model's chat template to render (chat.py). A key that is null is absent, as a union of data sets has it.
"""

from __future__ import annotations

import json
from typing import Any

from rlhf.tasks.chat import SPOKEN, Message
from rlhf.tasks.json_lines import kind_of
from rlhf.tasks.raw import Answer
from transfer.agreement.shown import shown

ROLES = ("system", "user", "assistant", "tool", "developer")
SHAREGPT = {  # `from` of LLaMA-Factory, FastChat and Axolotl -> role; a call's value is JSON
    "human": "user",
    "gpt": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}


def messages_in(value: Any, column: str) -> list[Message]:
    """The messages in a column; ValueError names the place of a bad one."""
    if not isinstance(value, list):
        raise ValueError(f"{column!r} must be a list of messages, not {kind_of(value)}")
    return [_message(message, f"{column}[{place}]") for place, message in enumerate(value)]


def _message(value: Any, where: str) -> Message:
    if isinstance(value, dict) and {"from", "value"} <= value.keys():
        value = _of_sharegpt(value, where)
    if not isinstance(value, dict) or "role" not in value:
        raise ValueError(f"{where!r} must be an object with 'role' and 'content'")
    message = {key: there for key, there in value.items() if there is not None}
    said = [key for key in SPOKEN if message.get(key)]
    if "content" not in value and not said:
        raise ValueError(f"{where!r} must be an object with 'role' and 'content'")
    if value["role"] not in ROLES:
        raise ValueError(f"{where!r} has the unknown role {shown(value['role'])}; known: {', '.join(ROLES)}")
    content = "" if said and "content" not in message else _content(value["content"], f"{where}.content")
    others = {key: there for key, there in message.items() if there != [] and key not in ("role", "content")}
    return {"role": value["role"], "content": content, **others}


def _content(value: Any, where: str) -> str:
    """A text, or a list of parts that are all texts."""
    if not isinstance(value, list):
        return text_in(value, where, "a text")
    for place, part in enumerate(value):
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            kind = shown(part.get("type")) if isinstance(part, dict) else kind_of(part)
            raise ValueError(f"{f'{where}[{place}]'!r} must be a part of type 'text' with a 'text' (got {kind})")
    return "".join(part["text"] for part in value)


def _of_sharegpt(value: dict[str, Any], where: str) -> dict[str, Any]:
    """The same as role and content."""
    others = {key: there for key, there in value.items() if key not in ("from", "value")}
    said = value["from"]
    if not isinstance(said, str):
        raise ValueError(f"{where!r} has the unknown role {shown(said)}; known: {', '.join((*SHAREGPT, *ROLES))}")
    if said != "function_call":
        return {"role": SHAREGPT.get(said, said), "content": value["value"], **others}
    try:
        calls = json.loads(value["value"])
        functions = [{"type": "function", "function": dict(call)} for call in _listed(calls)]
    except (TypeError, ValueError):
        raise ValueError(
            f"{where!r} must hold a call as JSON: {{name, arguments}} (got {shown(value['value'])})"
        ) from None
    return {"role": "assistant", "content": "", "tool_calls": functions, **others}


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def answer_of(message: Message) -> Answer:
    """A message that only has a text is that text; others are for the chat template."""
    return message["content"] if message.keys() == {"role", "content"} else message


def text_in(value: Any, column: str, allowed: str) -> str:
    """`value`, if it is a text; ValueError says what else is `allowed`."""
    if not isinstance(value, str):
        raise ValueError(f"{column!r} must be {allowed}, not {kind_of(value)}")
    return value
