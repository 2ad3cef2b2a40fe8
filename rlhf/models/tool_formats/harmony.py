"""The format of gpt-oss: an answer is several messages, each on a channel, and one with a recipient is a call."""

from __future__ import annotations

import re

from rlhf.models.tool_formats.pieces import Call, Pieces, from_json

MESSAGE = re.compile(
    r"\s*(?:<\|start\|>assistant)?(?P<header>.*?)<\|message\|>(?P<body>.*?)(?:<\|end\|>|<\|call\|>|<\|return\|>|\Z)",
    re.DOTALL,
)
RECIPIENT = re.compile(r"to=(?:functions\.)?(?P<name>[^\s<]+)")


def harmony(text: str) -> Pieces:
    """`<|channel|>commentary to=functions.name <|constrain|>json<|message|>{...}`."""
    found = Pieces()
    said, thoughts, at = [], [], 0
    while message := MESSAGE.match(text, at):
        at, body = message.end(), message["body"]
        if recipient := RECIPIENT.search(message["header"]):
            try:
                found.calls.append(Call(recipient["name"], from_json(body)))
            except ValueError as error:
                found.errors.append(str(error))
                said.append(message[0])
        elif "<|channel|>analysis" in message["header"]:
            thoughts.append(body)
        else:
            said.append(body)
    said.append(text[at:])
    found.content, found.reasoning = "".join(said), "\n".join(thoughts)
    return found
