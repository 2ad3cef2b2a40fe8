"""Calls that are JSON between marks: Hermes and Qwen, Llama, Mistral, DeepSeek, and the models made here."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

from rlhf.models.tool_formats.pieces import Call, call_of, calls_of, ended, from_json

FENCE = re.compile(r"\s*(?P<name>[^\n]*)\n```json\s*(?P<body>.*?)\s*```\s*", re.DOTALL)  # of DeepSeek before V3.1


def hermes(match: re.Match[str]) -> Iterable[Call]:
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`."""
    return [call_of(from_json(ended(match, "</tool_call>")))]


def llama(match: re.Match[str]) -> Iterable[Call]:
    """`{"name": ..., "parameters": {...}}`, also behind <|python_tag|>; several with ";" between them."""
    text, calls = (match["tagged"] or match["bare"] or "").strip(), []
    while text:
        try:
            value, at = json.JSONDecoder().raw_decode(text)
        except json.JSONDecodeError:
            value, at = from_json(text), len(text)  # says what is wrong
        calls += calls_of(value)
        text = text[at:].lstrip("; \n\t")
    return calls


def mistral(match: re.Match[str]) -> Iterable[Call]:
    """`[{"name": ..., "arguments": {...}}]` behind [TOOL_CALLS], or `name[ARGS]{...}`, maybe with [CALL_ID]."""
    body = match["body"].strip()
    if "[ARGS]" not in body:
        return calls_of(from_json(body))
    head, _, arguments = body.partition("[ARGS]")
    name, _, number = head.partition("[CALL_ID]")
    return [Call(name.strip(), from_json(arguments), number.strip() or None)]


def deepseek(match: re.Match[str]) -> Iterable[Call]:
    """`name<sep>{...}` of V3.1, or `function<sep>name` with fenced JSON of V3 and R1."""
    body = ended(match, "<｜tool▁call▁end｜>")
    name, mark, arguments = body.partition("<｜tool▁sep｜>")
    if not mark:
        raise ValueError("it has no <｜tool▁sep｜> behind its name")
    if fenced := FENCE.fullmatch(arguments):
        return [Call(fenced["name"].strip(), from_json(fenced["body"]))]
    return [Call(name.strip(), from_json(arguments))]


def whole(match: re.Match[str]) -> Iterable[Call]:
    """A list of calls."""
    return calls_of(from_json(match["body"].strip()))
