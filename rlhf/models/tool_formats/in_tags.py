"""Calls whose arguments have a tag or a mark each, as Qwen3-Coder, GLM and Gemma write them.

What is between tags is text: of which type it is, the tool's schema tells.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from rlhf.models.tool_formats.pieces import Call, ended, from_json

FUNCTION = re.compile(r"\s*<function=(?P<name>[^>\n]+)>(?P<body>.*)</function>\s*", re.DOTALL)
PARAMETER = re.compile(r"\s*<parameter=(?P<key>[^>\n]+)>\n?(?P<value>.*?)\n?</parameter>\s*", re.DOTALL)
NAMED = re.compile(r"\s*(?P<name>[^\s<]+)\s*(?P<body>.*)", re.DOTALL)
ARGUMENT = re.compile(r"\s*<arg_key>(?P<key>.*?)</arg_key>\s*<arg_value>(?P<value>.*?)</arg_value>\s*", re.DOTALL)
GEMMA = re.compile(r"call:(?P<name>[^\s{]+)(?P<body>\{.*\})\s*", re.DOTALL)
GEMMA_QUOTED = re.compile(r'<\|"\|>(.*?)<\|"\|>', re.DOTALL)
GEMMA_KEY = re.compile(r'(?P<text>"(?:\\.|[^"\\])*")|(?P<before>[{,]\s*)(?P<key>[\w.-]+)(?=\s*:)')


def coder(match: re.Match[str]) -> Iterable[Call]:
    """`<function=name><parameter=key>value</parameter></function>`."""
    function = FUNCTION.fullmatch(ended(match, "</tool_call>"))
    if function is None:
        raise ValueError("there is no <function=...>...</function> in it")
    return [Call(function["name"].strip(), _arguments(PARAMETER, function["body"], "<parameter=...>...</parameter>"))]


def glm(match: re.Match[str]) -> Iterable[Call]:
    """`name<arg_key>key</arg_key><arg_value>value</arg_value>`."""
    named = NAMED.fullmatch(ended(match, "</tool_call>"))
    if named is None:
        raise ValueError("it has no name")
    form = "<arg_key>...</arg_key><arg_value>...</arg_value>"
    return [Call(named["name"], _arguments(ARGUMENT, named["body"], form))]


def gemma(match: re.Match[str]) -> Iterable[Call]:
    """`call:name{key:<|"|>text<|"|>,other:1}`."""
    call = GEMMA.fullmatch(ended(match, "<tool_call|>"))
    if call is None:
        raise ValueError("it is not call:name{...}")
    quoted = GEMMA_QUOTED.sub(lambda text: json.dumps(text[1]), call["body"])
    keyed = GEMMA_KEY.sub(lambda key: key["text"] or f'{key["before"]}"{key["key"]}"', quoted)
    return [Call(call["name"], from_json(keyed))]


def _arguments(pattern: re.Pattern[str], body: str, form: str) -> dict[str, str]:
    if pattern.sub("", body).strip():
        raise ValueError(f"its arguments are not {form}")
    return {found["key"].strip(): found["value"] for found in pattern.finditer(body)}


def typed(arguments: Mapping[str, Any], schema: Any) -> dict[str, Any]:
    """The arguments, of which texts become what the JSON schema of the tool's parameters says they are."""
    known = schema.get("properties") if isinstance(schema, dict) else None
    known = known if isinstance(known, dict) else {}
    return {key: _typed(value, _types(known.get(key))) for key, value in arguments.items()}


def _typed(value: Any, types: set[str]) -> Any:
    if not isinstance(value, str) or "string" in types or not types:
        return value
    try:
        return json.loads(value)
    except ValueError:
        return {"true": True, "false": False, "none": None}.get(value.strip().lower(), value)


def _types(schema: Any) -> set[str]:
    if not isinstance(schema, dict):
        return set()
    declared = schema.get("type", [])
    types = {declared} if isinstance(declared, str) else {each for each in declared if isinstance(each, str)}
    return types.union(*(_types(each) for key in ("anyOf", "oneOf") for each in schema.get(key) or ()))
