"""Answers in OpenAI's form, whole or as a stream of server-sent events."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf.gateway.forms import Request
from rlhf.types import Completion

MODEL = "policy"


@dataclass(frozen=True, slots=True)
class Choice:
    """One answer: of a chat a message, else a text."""

    completion: Completion
    tokens: list[str]  # the text of each
    message: dict[str, Any] = field(default_factory=dict)
    text: str = ""
    errors: tuple[str, ...] = ()  # of malformed calls

    @property
    def reason(self) -> str:
        """Why it ended, in OpenAI's words."""
        return "tool_calls" if self.message.get("tool_calls") else self.completion.finish_reason


def said_by(message: dict[str, Any]) -> dict[str, Any]:
    """A parsed message as OpenAI has it: with ids of its calls, whose arguments are JSON."""
    said = {"role": "assistant", "content": message["content"]}
    if "reasoning_content" in message:
        said["reasoning_content"] = message["reasoning_content"]
    if calls := message.get("tool_calls"):
        said["tool_calls"] = [_call(call) for call in calls]
        said["content"] = said["content"] or None
    return said


def _call(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = json.dumps(function["arguments"], ensure_ascii=False)
    called = {"name": function["name"], "arguments": arguments}
    return {"id": call.get("id") or f"call_{secrets.token_hex(12)}", "type": "function", "function": called}


def whole(request: Request, prompt: int, choices: Sequence[Choice]) -> dict[str, Any]:
    """The answer at once, to a prompt of so many tokens."""
    chat = bool(request.messages)
    return {
        **_head("chat.completion" if chat else "text_completion", chat),
        "choices": [_choice(request, index, choice, "message") for index, choice in enumerate(choices)],
        "usage": _usage(prompt, choices),
    }


def stream(request: Request, prompt: int, choices: Sequence[Choice]) -> bytes:
    """The answer as a stream, all of which is there."""
    return b"".join(b"data: " + each.encode() + b"\n\n" for each in _events(request, prompt, choices))


def _events(request: Request, prompt: int, choices: Sequence[Choice]) -> Iterator[str]:
    chat = bool(request.messages)
    head = _head("chat.completion.chunk" if chat else "text_completion", chat)
    for index, choice in enumerate(choices):
        told = _choice(request, index, choice, "delta")
        if chat:
            for place, call in enumerate(told["delta"].get("tool_calls", ())):
                call["index"] = place
            yield json.dumps({**head, "choices": [{**told, "finish_reason": None}]})
            told = {"index": index, "delta": {}, "finish_reason": choice.reason}
        yield json.dumps({**head, "choices": [told]})
    if request.usage:
        yield json.dumps({**head, "choices": [], "usage": _usage(prompt, choices)})
    yield "[DONE]"


def _head(kind: str, chat: bool) -> dict[str, Any]:
    name = f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}"
    return {"id": name, "object": kind, "created": int(time.time()), "model": MODEL}


def _choice(request: Request, index: int, choice: Choice, key: str) -> dict[str, Any]:
    told: dict[str, Any] = {"index": index, "finish_reason": choice.reason, "logprobs": None}
    if request.messages:
        told[key] = {each: value for each, value in choice.message.items()}
        if choice.errors:
            told["tool_call_errors"] = list(choice.errors)
    else:
        told["text"] = choice.text
    if request.logprobs:
        told["logprobs"] = _logprobs(bool(request.messages), choice)
    return told


def _logprobs(chat: bool, choice: Choice) -> dict[str, Any]:
    numbers = list(choice.completion.logprobs or ())
    if not chat:
        starts = [sum(map(len, choice.tokens[:place])) for place in range(len(choice.tokens))]
        return {"tokens": choice.tokens, "token_logprobs": numbers, "top_logprobs": None, "text_offset": starts}
    tokens = zip(choice.tokens, numbers, strict=True)
    content = [
        {"token": token, "bytes": list(token.encode()), "logprob": number, "top_logprobs": []}
        for token, number in tokens
    ]
    return {"content": content, "refusal": None}


def _usage(prompt: int, choices: Sequence[Choice]) -> dict[str, int]:
    sampled = sum(len(choice.completion.ids) for choice in choices)
    return {"prompt_tokens": prompt, "completion_tokens": sampled, "total_tokens": prompt + sampled}


def models() -> dict[str, Any]:
    """The one model that there is."""
    return {"object": "list", "data": [{"id": MODEL, "object": "model", "created": 0, "owned_by": "rlhf"}]}
