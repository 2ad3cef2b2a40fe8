"""Requests in OpenAI's form, of which what cannot be done is refused by its name, and not left out in silence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rlhf.gateway.messages import read_messages
from rlhf.tasks.chat import Message
from transfer.agreement.shown import shown
from transfer.agreement.wire import Refused

MOST_CHOICES = 64
MOST_STOPS = 16
SHARED = ("n", "max_tokens", "max_completion_tokens", "stop", "seed", "temperature", "stream", "stream_options")
OF_CHAT = ("messages", "tools", "tool_choice", "chat_template_kwargs", "logprobs", "top_logprobs")
OF_TEXT = ("prompt", "logprobs")
WITHOUT_MEANING = (  # for what is sampled here
    *("model", "user", "metadata", "store", "service_tier", "safety_identifier"),
    *("prompt_cache_key", "parallel_tool_calls", "verbosity"),
)
NEUTRAL: dict[str, tuple[Any, ...]] = {  # what would change the distribution that is learned from, or the answer's form
    "top_p": (1, None),
    "frequency_penalty": (0, None),
    "presence_penalty": (0, None),
    "repetition_penalty": (1, None),
    "min_p": (0, None),
    "top_k": (0, -1, None),
    "logit_bias": ({}, None),
    "response_format": ({"type": "text"}, None),
    "modalities": (["text"], None),
    "echo": (False, None),
    "best_of": (1, None),
    "suffix": ("", None),
    "functions": ([], None),
    "function_call": ("auto", "none", None),
}


@dataclass(frozen=True, slots=True)
class Request:
    """One call."""

    messages: list[Message] = field(default_factory=list)
    prompts: list[str | list[int]] = field(default_factory=list)  # of /v1/completions
    given: Mapping[str, Any] = field(default_factory=dict)  # what the chat template is given beside messages
    calls: bool = False  # whether an answer may call tools
    n: int = 1
    most: int | None = None  # tokens
    stop: tuple[str, ...] = ()
    seed: int | None = None
    logprobs: bool = False
    stream: bool = False
    usage: bool = False  # at the end of a stream, too


def read_chat(body: Mapping[str, Any], temperatures: tuple[float, ...]) -> Request:
    """A call of /v1/chat/completions; Refused 400."""
    _check_names(body, (*SHARED, *OF_CHAT))
    if body.get("top_logprobs"):
        raise Refused(400, "top_logprobs must be 0: the log-probs of the sampled tokens alone are kept")
    choice = body.get("tool_choice") or "auto"
    if choice not in ("auto", "none"):
        raise Refused(400, f"tool_choice must be auto or none: nothing is forced (got {shown(choice)})")
    tools, given = body.get("tools"), body.get("chat_template_kwargs")
    tools, given = [] if tools is None else tools, {} if given is None else given
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise Refused(400, "tools must be a list of objects")
    if not isinstance(given, dict) or {"tools", "messages", "add_generation_prompt", "tokenize"} & set(given):
        raise Refused(400, "chat_template_kwargs must be an object of the template's own arguments")
    calls = bool(tools) and choice == "auto"
    shared = _shared(body, temperatures)
    logprobs = _flag(body, "logprobs")
    messages = read_messages(body.get("messages"))
    return Request(
        messages, given={**given, "tools": tools} if calls else given, calls=calls, logprobs=logprobs, **shared
    )


def read_text(body: Mapping[str, Any], temperatures: tuple[float, ...]) -> Request:
    """A call of /v1/completions; Refused 400."""
    _check_names(body, (*SHARED, *OF_TEXT))
    prompt: Any = body.get("prompt")
    if isinstance(prompt, str) or _is_ids(prompt):
        prompts = [prompt]
    elif isinstance(prompt, list) and len(prompt) == 1 and (isinstance(prompt[0], str) or _is_ids(prompt[0])):
        prompts = prompt
    else:
        raise Refused(400, "prompt must be a text or a list of token ids; one a request")
    logprobs = body.get("logprobs")
    if logprobs not in (None, 0, 1) or logprobs is True:
        raise Refused(400, "logprobs must be 0, 1 or null: the log-probs of the sampled tokens alone are kept")
    return Request(prompts=prompts, logprobs=logprobs is not None, **_shared(body, temperatures))


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(each) is int and each >= 0 for each in value)


def _check_names(body: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for name, value in body.items():
        if name in known or name in WITHOUT_MEANING:
            continue
        if name not in NEUTRAL:
            raise Refused(400, f"{name[:80]} is not known here: leave it out")
        if value not in NEUTRAL[name]:
            raise Refused(400, f"{name} cannot be {shown(value)} here: leave it out")


def _shared(body: Mapping[str, Any], temperatures: tuple[float, ...]) -> dict[str, Any]:
    given = body.get("temperature")
    if given is not None and given not in temperatures:
        run = " or ".join(f"{each:g}" for each in temperatures)
        raise Refused(
            400, f"temperature must be left out, or the run's, {run}: what is learned from is sampled with it"
        )
    seed = body.get("seed")
    if seed is not None and (type(seed) is not int or abs(seed) >= 2**63):
        raise Refused(400, f"seed must be an integer (got {shown(seed)})")
    options = body.get("stream_options") or {}
    if not isinstance(options, dict):
        raise Refused(400, "stream_options must be an object")
    most = _count(body, "max_completion_tokens", None, 2**31) or _count(body, "max_tokens", None, 2**31)
    return {
        "n": _count(body, "n", 1, MOST_CHOICES),
        "most": most,
        "stop": _stops(body.get("stop")),
        "seed": seed,
        "stream": _flag(body, "stream"),
        "usage": bool(options.get("include_usage")),
    }


def _count(body: Mapping[str, Any], name: str, default: int | None, most: int) -> int | None:
    value = body.get(name)
    if value is None:
        return default
    if type(value) is not int or not 1 <= value <= most:
        raise Refused(400, f"{name} must be an integer from 1 to {most} (got {shown(value)})")
    return value


def _flag(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name)
    if value not in (None, True, False):
        raise Refused(400, f"{name} must be true or false (got {shown(value)})")
    return bool(value)


def _stops(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value or []
    good = isinstance(stops, list) and len(stops) <= MOST_STOPS
    if not good or not all(isinstance(stop, str) and stop for stop in stops):
        raise Refused(400, f"stop must be a text or at most {MOST_STOPS} of them (got {shown(value)})")
    return tuple(stops)
