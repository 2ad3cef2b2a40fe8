"""Rows as TRL users have them. Forms of a row, told apart by their columns (one that is null is absent):

    {"prompt": text | messages, "answer": text | number}            a reference to score against, and a demonstration
    {"prompt": text | messages, "completion": text | messages}      a demonstration
    {"prompt": text | messages, "chosen": ..., "rejected": ...}     a preference; each a text or one assistant message
    {"chosen": messages, "rejected": messages}                      the same, the prompt being what both begin with
    {"messages": messages}, {"conversations": messages}             the last assistant message is a demonstration
    {"prompt": ..., "reward_model": {"ground_truth": ...}}          verl's form; the ground truth is the answer
    {"prompt": text | messages}                                     for a reward that needs no reference

`tools` and `chat_template_kwargs` are handed to the chat template of a conversation. Where an answer takes several
turns, each of the assistant's is a demonstration of its own, and what tools said is before it. Every other column goes
to `Prompt.columns`. How files are read is in json_lines.py and hf.py, and how rows become a task in files.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any

from rlhf.config import FileTaskConfig
from rlhf.tasks.chat import SPOKEN, Message
from rlhf.tasks.json_lines import kind_of
from rlhf.tasks.messages import answer_of, messages_in, text_in
from rlhf.tasks.raw import Answer, Row
from transfer.agreement.shown import shown

TEMPLATE = ("tools", "chat_template_kwargs")  # columns that chat templates are given
PREFERENCE = ("chosen", "rejected")
CONVERSATIONS = ("messages", "conversations")
SYSTEM = ("system", "developer")  # roles of a message that a conversation's own instructions are in
FORMS = ("messages", *PREFERENCE)  # columns that are no reward's
TEMPLATE_OWN = (  # of apply_chat_template: what to render, and into what
    "conversation", "tools", "documents", "chat_template", "add_generation_prompt", "continue_final_message",
    "tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask",
    "tokenizer_kwargs", "messages",
)  # fmt: skip


class TieError(ValueError):
    """A pair without a better answer."""


def parse_row(columns: Mapping[str, Any], config: FileTaskConfig, where: str = "") -> Row:
    """The columns of one as a row; ValueError says which column is wrong and how, TieError that a pair is none."""
    columns = _renamed(columns, config.columns)
    there = _with_system({key: value for key, value in columns.items() if value is not None})
    row, used = _in_its_form(there, config)
    others = {key: value for key, value in there.items() if key not in (config.prompt_column, *FORMS, *used)}
    if config.answer_column not in columns and config.answer_column != "answer":  # the user named it
        raise ValueError(_no_column(config.answer_column, columns, "task.answer_column"))
    reference = _reference(there, config.answer_column)
    demonstration = row.demonstration
    if reference is not None:
        others[config.answer_column] = reference
        demonstration = demonstration if "completion" in used else reference
    answers = (demonstration, *(row.preference or ()))
    if isinstance(row.question, str) and not config.chats and any(isinstance(answer, dict) for answer in answers):
        raise ValueError("an answer with more than a text (tool_calls, ...) needs a prompt of messages, not a text")
    given = {} if isinstance(row.question, str) and not config.chats else {**config.template, **_given(there)}
    return _asked_as(Row(row.question, others, demonstration, row.preference, given, row.turns, where), config)


def _renamed(columns: Mapping[str, Any], names: Mapping[str, str]) -> Mapping[str, Any]:
    """The columns by the names that `task.columns` gives them."""
    if not names:
        return columns
    for name in names.values():
        if name not in columns:
            raise ValueError(_no_column(name, columns, "task.columns"))
    gone = {*names, *names.values()}
    return {name: columns[data] for name, data in names.items()} | {
        name: value for name, value in columns.items() if name not in gone
    }


def _asked_as(row: Row, config: FileTaskConfig) -> Row:
    """The row with a text asked as a user's message, and behind a system message, where `config` says so."""
    if not config.chats:
        return row
    question = [{"role": "user", "content": row.question}] if isinstance(row.question, str) else row.question
    if config.system is None or question[0]["role"] in SYSTEM:
        return replace(row, question=question)
    before = [{"role": "system", "content": config.system}]
    turns = [([*before, *asked], answer) for asked, answer in row.turns]
    return replace(row, question=before + question, turns=turns)


def _with_system(there: dict[str, Any]) -> dict[str, Any]:
    """The columns, of which ShareGPT's `system` is the first message of its conversation."""
    said, system = there.get("conversations"), there.get("system")
    if not (isinstance(said, list) and said and isinstance(said[0], dict) and "from" in said[0] and system):
        return there
    others = {key: value for key, value in there.items() if key != "system"}
    return {**others, "conversations": [{"from": "system", "value": system}, *said]}


def _in_its_form(there: Mapping[str, Any], config: FileTaskConfig) -> tuple[Row, Sequence[str]]:
    """Question, demonstrations and preference of a row, and the columns that they were made of."""
    prompt = config.prompt_column
    conversation = next((column for column in CONVERSATIONS if column in there), None)
    if any(column in there for column in PREFERENCE):
        question, chosen, rejected = _preference(
            there, conversation if prompt not in there and conversation else prompt
        )
        return Row(question, {}, chosen, (chosen, rejected)), [conversation or prompt]
    if conversation and not (prompt in there and {config.answer_column, "completion"} & there.keys()):
        return _conversation(messages_in(there[conversation], conversation), conversation), [conversation]
    question = _question(there, prompt)
    if "completion" not in there or config.answer_column == "completion":
        return Row(question, {}), []
    return _completed(question, there["completion"]), ["completion"]


def _completed(question: str | list[Message], completion: Any) -> Row:
    """TRL's form; of a completion in several turns, the first is the prompt's answer."""
    if not isinstance(completion, list) or isinstance(question, str):
        return Row(question, {}, _reply(completion, "completion"))
    (_, first), *turns = _turns(question, messages_in(completion, "completion"), "completion")
    return Row(question, {}, first, turns=turns)


def _conversation(messages: list[Message], column: str) -> Row:
    """All of it but the last message is the question; what the assistant said since the user did is learned, too."""
    question = _asked(messages[:-1], column)
    asked = [place for place, message in enumerate(question, start=1) if message["role"] == "user"]
    begins = asked[-1] if asked else len(question)
    *turns, (_, last) = _turns(messages[:begins], messages[begins:], column)
    return Row(question, {}, last, turns=turns)


def _turns(question: list[Message], said: list[Message], column: str) -> list[tuple[list[Message], Answer]]:
    """What is before each of the assistant's messages, and the message."""
    roles = [message["role"] for message in said]
    if not said or roles[0] != "assistant" or roles[-1] != "assistant":
        raise ValueError(_no_answer(roles, column))
    at = [place for place, role in enumerate(roles) if role == "assistant"]
    for place in at:
        if not said[place]["content"] and not any(said[place].get(key) for key in SPOKEN):
            raise ValueError(f"{column!r} has an answer of the assistant that says nothing: leave it out")
    return [([*question, *said[:place]], answer_of(said[place])) for place in at]


def _reference(there: Mapping[str, Any], column: str) -> Answer | None:
    """The answer that others are compared with: a column of the row, or verl's ground truth, if that is a text."""
    if column in there:
        value = there[column]
        return json.dumps(value) if _is_number(value) else _reply(value, column)
    judge = there.get("reward_model")
    truth = judge.get("ground_truth") if isinstance(judge, dict) else None
    return json.dumps(truth) if _is_number(truth) else truth if isinstance(truth, str) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _given(there: Mapping[str, Any]) -> dict[str, Any]:
    """What the chat template gets beside messages."""
    given = there.get("chat_template_kwargs", {})
    if not isinstance(given, dict) or given.keys() & set(TEMPLATE_OWN):
        raise ValueError(
            f"'chat_template_kwargs' must be an object with arguments of the chat template (got {shown(given)})"
        )
    tools = there.get("tools", [])
    if isinstance(tools, str):  # as tables have it
        try:
            tools = json.loads(tools) if tools.strip() else []
        except (ValueError, RecursionError):
            raise ValueError(f"'tools' must be a list of objects, or JSON of one (got {shown(tools)})") from None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"'tools' must be a list of objects, not {kind_of(tools)} (got {shown(tools)})")
    return {**given, "tools": tools} if tools else dict(given)


def _question(columns: Mapping[str, Any], column: str) -> str | list[Message]:
    if column not in columns:
        raise ValueError(_no_column(column, columns, "task.prompt_column"))
    value = columns[column]
    if not isinstance(value, list):
        text = text_in(value, column, "a text or a list of messages")
        if not text:
            raise ValueError(f"{column!r} is empty")
        return text
    messages = messages_in(value, column)
    if messages and messages[-1]["role"] == "assistant":  # an answer that has begun
        if not isinstance(answer_of(messages[-1]), str):
            raise ValueError(f"{column!r} ends with a message that no answer can continue: it may have a text alone")
        _asked(messages[:-1], column)
        return messages
    return _asked(messages, column)


def _preference(columns: Mapping[str, Any], prompt_column: str) -> tuple[str | list[Message], Answer, Answer]:
    """(question, chosen, rejected); of two whole conversations, the question is what they share."""
    for column in PREFERENCE:
        if column not in columns:
            raise ValueError(f"a preference needs both 'chosen' and 'rejected': {column!r} is missing")
    chosen, rejected = columns["chosen"], columns["rejected"]
    if _is_whole(chosen) and _is_whole(rejected):
        chosen, rejected = messages_in(chosen, "chosen"), messages_in(rejected, "rejected")
        same = takewhile(lambda pair: pair[0] == pair[1], zip(chosen[:-1], rejected[:-1], strict=False))
        question: str | list[Message] = _asked([left for left, _ in same], "chosen")
        chosen, rejected = chosen[len(question) :], rejected[len(question) :]
    else:
        question = _question(columns, prompt_column)
    good, bad = _reply(chosen, "chosen"), _reply(rejected, "rejected")
    if good == bad:
        raise TieError("'chosen' and 'rejected' are the same")
    return question, good, bad


def _is_whole(value: Any) -> bool:
    """Whether `value` is a conversation with its question, rather than an answer alone."""
    return isinstance(value, list) and value != [] and messages_in(value[:1], "conversation")[0]["role"] != "assistant"


def _asked(messages: list[Message], column: str) -> list[Message]:
    if not messages or messages[-1]["role"] == "assistant":
        raise ValueError(f"{column!r} must hold a user's message before the assistant's answer")
    return messages


def _reply(value: Any, column: str) -> Answer:
    """The answer in `value`: a text, or a list of exactly one assistant message, or ShareGPT's, not in a list."""
    if isinstance(value, dict) and {"from", "value"} <= value.keys():
        value = [value]
    if not isinstance(value, list):
        return text_in(value, column, "a text or a list of one assistant message")
    messages = messages_in(value, column)
    if [message["role"] for message in messages] != ["assistant"]:
        raise ValueError(_no_answer([message["role"] for message in messages], column))
    return answer_of(messages[0])


def _no_answer(roles: Sequence[str], column: str) -> str:
    return f"{column!r} must end with exactly one assistant message after the prompt (got {', '.join(roles) or 'none'})"


def _no_column(column: str, columns: Mapping[str, Any], key: str) -> str:
    return f"no column {column!r}; columns there: {', '.join(columns) or 'none'}; set {key} to the right one"
