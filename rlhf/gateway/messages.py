"""Messages as programs send them: as chat templates take them, and what tells whether two conversations are the same.

An answer is known again by its content and its calls; clients leave out the rest, or add fields that are null.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from rlhf.tasks.chat import Message
from transfer.agreement.shown import shown
from transfer.agreement.wire import Refused

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
THOUGHTS = ("reasoning_content", "reasoning", "thinking")


def read_messages(value: Any) -> list[Message]:
    """The messages; Refused 400 where they are none that can be asked."""
    if not isinstance(value, list) or not value:
        raise Refused(400, "messages must be a list of messages, at least one")
    messages = [_message(place, each) for place, each in enumerate(value)]
    if messages[-1]["role"] == "assistant":
        raise Refused(400, "the last message is the assistant's: an answer that is begun cannot be gone on with")
    return messages


def _message(place: int, value: Any) -> Message:
    if not isinstance(value, dict) or value.get("role") not in ROLES:
        raise Refused(400, f"messages[{place}] must have a role of {', '.join(ROLES)} (got {shown(value)})")
    message = {key: each for key, each in value.items() if each is not None}
    if message["role"] == "developer":
        message["role"] = "system"
    message["content"] = _text(place, message.get("content", ""))
    if not isinstance(message.get("tool_calls", []), list):
        raise Refused(400, f"messages[{place}].tool_calls must be a list")
    return message


def _text(place: int, content: Any) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        return "".join(str(part.get("text", "")) for part in content)
    raise Refused(400, f"messages[{place}].content must be a text, or parts of type text (got {shown(content)})")


def key_of(given: Mapping[str, Any], messages: Sequence[Message]) -> str:
    """The same for two conversations that are the same."""
    told = json.dumps([given, [_known_by(message) for message in messages]], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()


def _known_by(message: Message) -> Any:
    if message["role"] != "assistant":
        return message
    calls = [_call(each) for each in message.get("tool_calls") or ()]
    return ["assistant", message["content"], calls]


def _call(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        return call
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        with suppress(ValueError, RecursionError):
            arguments = json.loads(arguments)
    return [call.get("id"), function.get("name"), arguments]


def since_answer(messages: Sequence[Message]) -> int:
    """How many messages there are until the last answer, with it."""
    return next((at for at in range(len(messages), 0, -1) if messages[at - 1]["role"] == "assistant"), 0)
