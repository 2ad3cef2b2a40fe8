"""A JSON-lines file as TRL users have it. Forms of a line, told apart by their columns:

    {"prompt": text | messages, "answer": text}                     a reference to score against, and a demonstration
    {"prompt": text | messages, "chosen": ..., "rejected": ...}     a preference; each a text or one assistant message
    {"chosen": messages, "rejected": messages}                      the same, the prompt being what both begin with
    {"messages": messages}                                          the last assistant message is a demonstration
    {"prompt": text | messages}                                     for a reward that needs no reference

Every other column goes to `Prompt.columns`. All bad lines are reported together, before anything starts.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

from rlhf.config import JsonlTaskConfig
from rlhf.tasks import Message, RawTask, Row

ROLES = ("system", "user", "assistant")
SHOWN = 10  # bad lines in one error message
FORMS = ("messages", "chosen", "rejected")


def jsonl_task(config: JsonlTaskConfig, seed: int) -> RawTask:
    """Read the file; ValueError with file, line numbers and reasons if any line is bad."""
    groups: dict[str, list[Row]] = {}  # by question, so that no held-out question is also trained on
    for row in _rows(config):
        groups.setdefault(json.dumps(row.question), []).append(row)
    questions = list(groups)
    if len(questions) <= config.held_out:
        raise ValueError(
            f"{config.path} has {len(questions)} different prompts, too few to hold {config.held_out} out and train on "
            f"the others: set task.held_out below {len(questions)}, or add lines to task.path"
        )
    random.Random(seed).shuffle(questions)
    return RawTask(
        train=[row for question in questions[: -config.held_out] for row in groups[question]],
        held_out=[groups[question][0] for question in questions[-config.held_out :]],
        gold=partial(same_answer, config.answer_column),
    )


def same_answer(answer_column: str, columns: Mapping[str, Any], answer: str) -> float | None:
    """1.0 if `answer` is the row's, outer white space aside, else 0.0; None if the row has none."""
    right = columns.get(answer_column)
    return None if right is None else float(answer.strip() == right.strip())


def parse_row(columns: Mapping[str, Any], config: JsonlTaskConfig) -> Row:
    """One line's columns as a row; ValueError says which column is wrong and how."""
    chosen = rejected = None
    if "chosen" in columns or "rejected" in columns:
        question, chosen, rejected = _preference(columns, config.prompt_column)
        demonstration: str | None = chosen
    elif "messages" in columns and not {config.prompt_column, config.answer_column} <= columns.keys():
        question, demonstration = _conversation(columns["messages"])
    else:
        question, demonstration = _question(columns, config.prompt_column), None
    others = {key: value for key, value in columns.items() if key not in (config.prompt_column, *FORMS)}
    if config.answer_column in columns:
        demonstration = others[config.answer_column] = _reply(columns[config.answer_column], config.answer_column)
    elif config.answer_column != "answer":  # the user named it, so it must be there
        raise ValueError(_no_column(config.answer_column, columns, "task.answer_column"))
    preference = None if chosen is None or rejected is None else (chosen, rejected)
    return Row(question, others, demonstration, preference)


def _rows(config: JsonlTaskConfig) -> list[Row]:
    """Every line as a row; ValueError with all (at most SHOWN) bad lines."""
    rows: list[Row] = []
    bad: list[tuple[int, str]] = []
    for number, line in _lines(config.path):
        try:
            rows.append(parse_row(_columns(line), config))
        except ValueError as error:
            bad.append((number, str(error)))
    if bad:
        raise ValueError(_report(config.path, bad, len(rows)))
    if not rows:
        raise ValueError(f"{config.path} is empty: task.path must name a file with one JSON object a line")
    return rows


def _lines(path: str) -> list[tuple[int, bytes]]:
    try:
        raw = Path(path).expanduser().read_bytes()
    except OSError as error:
        raise ValueError(f"task.path: cannot read {path} from {Path.cwd()}: {error.strerror}") from None
    except ValueError as error:  # a NUL in the name
        raise ValueError(f"task.path: cannot read {path!r}: {error}") from None
    lines = raw.removeprefix(b"\xef\xbb\xbf").splitlines()
    return [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]


def _report(path: str, bad: list[tuple[int, str]], good: int) -> str:
    first, reason = bad[0]
    if len(bad) > 1 and not good and {other for _, other in bad} == {reason}:
        return f"{path}:{first}: {reason} (and so in all {len(bad)} lines)"
    shown = [f"{path}:{number}: {reason}" for number, reason in bad[:SHOWN]]
    more = [f"and {len(bad) - SHOWN} more bad lines"] if len(bad) > SHOWN else []
    return "\n".join([*shown, *more])


def _columns(line: bytes) -> dict[str, Any]:
    try:
        columns = json.loads(line.decode())
        json.dumps(columns, ensure_ascii=False).encode()  # half a surrogate pair can be neither tokenised nor written
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except UnicodeError as error:
        raise ValueError(f"not UTF-8: {error.reason}") from None  # type: ignore[attr-defined]
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(columns, dict):
        raise ValueError(f"must be a JSON object, not {_kind(columns)}")
    return columns


def _question(columns: Mapping[str, Any], column: str) -> str | list[Message]:
    if column not in columns:
        raise ValueError(_no_column(column, columns, "task.prompt_column"))
    value = columns[column]
    if isinstance(value, list):
        return _asked(_messages(value, column), column)
    text = _text(value, column, "a text or a list of messages")
    if not text:
        raise ValueError(f"{column!r} is empty")
    return text


def _preference(columns: Mapping[str, Any], prompt_column: str) -> tuple[str | list[Message], str, str]:
    """(question, chosen, rejected); of two whole conversations, the question is what they share."""
    for column in ("chosen", "rejected"):
        if column not in columns:
            raise ValueError(f"a preference needs both 'chosen' and 'rejected': {column!r} is missing")
    chosen, rejected = columns["chosen"], columns["rejected"]
    if _is_whole(chosen) and _is_whole(rejected):
        chosen, rejected = _messages(chosen, "chosen"), _messages(rejected, "rejected")
        same = takewhile(lambda pair: pair[0] == pair[1], zip(chosen[:-1], rejected[:-1], strict=False))
        question: str | list[Message] = _asked([left for left, _ in same], "chosen")
        chosen, rejected = chosen[len(question) :], rejected[len(question) :]
    else:
        question = _question(columns, prompt_column)
    good, bad = _reply(chosen, "chosen"), _reply(rejected, "rejected")
    if good == bad:
        raise ValueError("'chosen' and 'rejected' are the same")
    return question, good, bad


def _is_whole(value: Any) -> bool:
    """Whether `value` is a conversation with its question, rather than an answer alone."""
    return isinstance(value, list) and value != [] and _messages(value[:1], "conversation")[0]["role"] != "assistant"


def _conversation(value: Any) -> tuple[list[Message], str]:
    messages = _messages(value, "messages")
    return _asked(messages[:-1], "messages"), _reply(messages[-1:], "messages")


def _asked(messages: list[Message], column: str) -> list[Message]:
    if not messages or messages[-1]["role"] == "assistant":
        raise ValueError(f"{column!r} must hold a user's message before the assistant's answer")
    return messages


def _reply(value: Any, column: str) -> str:
    """The answer in `value`: a text, or a list of exactly one assistant message."""
    if not isinstance(value, list):
        return _text(value, column, "a text or a list of one assistant message")
    messages = _messages(value, column)
    if [message["role"] for message in messages] != ["assistant"]:
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(
            f"{column!r} must end with exactly one assistant message after the prompt (got {roles or 'none'})"
        )
    return messages[0]["content"]


def _messages(value: Any, column: str) -> list[Message]:
    if not isinstance(value, list):
        raise ValueError(f"{column!r} must be a list of messages, not {_kind(value)}")
    return [_message(message, f"{column}[{place}]") for place, message in enumerate(value)]


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, dict) or not {"role", "content"} <= value.keys():
        raise ValueError(f"{where!r} must be an object with 'role' and 'content'")
    if value["role"] not in ROLES:
        raise ValueError(f"{where!r} has the unknown role {value['role']!r}; known: {', '.join(ROLES)}")
    return {"role": value["role"], "content": _text(value["content"], f"{where}.content", "a text")}


def _text(value: Any, column: str, allowed: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{column!r} must be {allowed}, not {_kind(value)}")
    return value


def _no_column(column: str, columns: Mapping[str, Any], key: str) -> str:
    return f"no column {column!r}; columns there: {', '.join(columns) or 'none'}; set {key} to the right one"


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "an array", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
