"""An answer's text as an assistant's message: reasoning, content and calls of tools; a malformed call is told.

The tokenizer says how: by its `response_template`, which transformers parses, or else by its chat template, in which
the marks of a known family are (tool_formats/table.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from rlhf.models.tool_formats.in_tags import typed
from rlhf.models.tool_formats.pieces import Call, Pieces, call_of, from_json
from rlhf.models.tool_formats.table import FAMILIES, Family
from transfer.agreement.shown import one_line, shown

Tools = Sequence[Mapping[str, Any]]  # as chat templates take them: {"type": "function", "function": {...}}
LONGEST_NAME = 256


@dataclass(frozen=True, slots=True)
class Parsed:
    """The message {role, content, reasoning_content?, tool_calls?}; of each malformed call, what is wrong with it.

    A malformed call is no part of `tool_calls`; its text stays in the content.
    """

    message: dict[str, Any]
    errors: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How a tokenizer's model writes calls."""

    name: str
    form: str  # how a call is written; "" where that is not known
    reads: Callable[[str, Tools, str], Pieces]
    texts: bool = False

    @classmethod
    def of(cls, tokenizer: Any, name: str | None = None) -> ToolFormat:
        """Of the family of that name, or as the tokenizer says; ValueError where nobody knows."""
        if name is not None:
            if name not in FAMILIES:
                raise ValueError(f"task.tool_format must be one of {', '.join(FAMILIES)}, or null (got {shown(name)})")
            return cls._of_family(name, FAMILIES[name])
        template = getattr(tokenizer, "response_template", None)
        if template is not None:
            return cls("response_template", "", partial(_by_template, template))
        chat = str(getattr(tokenizer, "chat_template", None) or "")
        for name, family in FAMILIES.items():
            if family.writes(chat):
                return cls._of_family(name, family)
        raise ValueError(
            "how the model writes calls of tools is not known: its chat template has no family's marks; set "
            f"response_template in the checkpoint's tokenizer_config.json, or task.tool_format to {', '.join(FAMILIES)}"
        )

    @classmethod
    def _of_family(cls, name: str, family: Family) -> ToolFormat:
        return cls(name, family.form, lambda text, tools, prefix: family.reads(text), family.texts)

    def parse(self, text: str, tools: Tools, prefix: str = "") -> Parsed:
        """The message of an answer, whose text has its special tokens but not the one that ended it.

        Without `tools` nothing is a call. `prefix`: the prompt's text, for a response_template, which may have to know
        what of the message was begun there.
        """
        pieces = self.reads(text, tools, prefix)
        if not tools and (pieces.calls or pieces.errors):
            pieces = Pieces(text)
        calls, errors = [], list(pieces.errors)
        for call in pieces.calls:
            try:
                calls.append(self._checked(call, tools))
            except ValueError as error:
                errors.append(str(error))
        message: dict[str, Any] = {"role": "assistant", "content": pieces.content}
        if pieces.reasoning:
            message["reasoning_content"] = pieces.reasoning
        if calls:
            message["tool_calls"] = calls
        return Parsed(message, tuple(self._told(error) for error in errors))

    def _checked(self, call: Call, tools: Tools) -> dict[str, Any]:
        name, arguments = call.name, call.arguments
        if not isinstance(name, str) or not 0 < len(name) <= LONGEST_NAME:
            raise ValueError("its name is no text")
        if isinstance(arguments, str):
            arguments = from_json(arguments or "{}")
        arguments = {} if arguments is None else arguments
        if not isinstance(arguments, dict):
            raise ValueError("its arguments are no object")
        if self.texts:
            arguments = typed(arguments, _parameters(name, tools))
        made = {"type": "function", "function": {"name": name, "arguments": arguments}}
        return {"id": call.id, **made} if isinstance(call.id, str) and call.id else made

    def _told(self, error: str) -> str:
        form = f"; a call is written {self.form}" if self.form else ""
        return f"malformed tool call: {one_line(error, 200)}{form}"


def _parameters(name: str, tools: Tools) -> Any:
    """The JSON schema of a tool's parameters; None of one that there is not."""
    for tool in tools:
        function = tool.get("function", tool)
        if isinstance(function, Mapping) and function.get("name") == name:
            return function.get("parameters")
    return None


def _by_template(template: Any, text: str, tools: Tools, prefix: str) -> Pieces:
    """As transformers parses it."""
    from transformers.utils.chat_parsing import parse_response

    try:
        message = parse_response(text, template, prefix=prefix, tools=[dict(tool) for tool in tools] or None)
        calls = [call_of(each) for each in message.get("tool_calls") or ()]
    except (ValueError, KeyError, TypeError) as error:
        return Pieces(text, errors=[str(error)])
    content, reasoning = message.get("content"), message.get("reasoning_content") or message.get("thinking")
    return Pieces(content if isinstance(content, str) else "", str(reasoning or ""), calls)
