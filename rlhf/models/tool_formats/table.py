"""The families whose way of writing calls is known, and by what their chat templates are recognised."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf.models.tool_formats import in_json, in_tags
from rlhf.models.tool_formats.harmony import harmony
from rlhf.models.tool_formats.pieces import Reads, between

TOOL_CALL = r"<tool_call>(?P<body>.*?)(?P<end></tool_call>|\Z)"


@dataclass(frozen=True, slots=True)
class Family:
    """One way of writing calls."""

    marks: tuple[tuple[str, ...], ...]  # any of these, all of whose texts are in the chat template
    form: str  # how a call is written, to be shown to the policy
    reads: Reads
    texts: bool = False  # arguments are texts, whose types the schema tells

    def writes(self, template: str) -> bool:
        """Whether a chat template is of this family."""
        return any(all(mark in template for mark in marks) for marks in self.marks)


FAMILIES = {  # the first that fits a template: what is special comes before what is common
    "harmony": Family(
        (("<|channel|>", "<|message|>", "functions."),),
        '<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>{"KEY": VALUE}',
        harmony,
    ),
    "gemma4": Family(
        (("<|tool_call>", "<tool_call|>"),),
        '<|tool_call>call:NAME{KEY:<|"|>TEXT<|"|>}<tool_call|>',
        between(
            r"<\|tool_call>(?P<body>.*?)(?P<end><tool_call\|>|\Z)", in_tags.gemma, ("<|channel>thought", "<channel|>")
        ),
    ),
    "deepseek": Family(
        (("<｜tool▁call▁begin｜>",),),
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>NAME<｜tool▁sep｜>{"KEY": VALUE}'
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        between(
            r"(?:<｜tool▁calls▁begin｜>)?\s*<｜tool▁call▁begin｜>(?P<body>.*?)"
            r"(?P<end><｜tool▁call▁end｜>|\Z)\s*(?:<｜tool▁calls▁end｜>)?",
            in_json.deepseek,
        ),
    ),
    "mistral": Family(
        (("[TOOL_CALLS]",),),
        '[TOOL_CALLS][{"name": NAME, "arguments": {"KEY": VALUE}}]',
        between(r"\[TOOL_CALLS\](?P<body>.*?)(?=\[TOOL_CALLS\]|\Z)", in_json.mistral, ("[THINK]", "[/THINK]")),
    ),
    "qwen_coder": Family(
        (("<function=", "<parameter="),),
        "<tool_call>\n<function=NAME>\n<parameter=KEY>\nVALUE\n</parameter>\n</function>\n</tool_call>",
        between(TOOL_CALL, in_tags.coder),
        texts=True,
    ),
    "glm": Family(
        (("<arg_key>", "<arg_value>"),),
        "<tool_call>NAME\n<arg_key>KEY</arg_key>\n<arg_value>VALUE</arg_value>\n</tool_call>",
        between(TOOL_CALL, in_tags.glm),
        texts=True,
    ),
    "hermes": Family(
        (("<tool_call>",),),
        '<tool_call>\n{"name": NAME, "arguments": {"KEY": VALUE}}\n</tool_call>',
        between(TOOL_CALL, in_json.hermes),
    ),
    "llama": Family(
        (("<|python_tag|>",), ("<|start_header_id|>", '"parameters"')),
        '{"name": NAME, "parameters": {"KEY": VALUE}}',
        between(
            r"<\|python_tag\|>(?P<tagged>.*)\Z"
            r'|\A\s*(?P<bare>\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"(?:name|function)"\s*:.*)\Z',
            in_json.llama,
        ),
    ),
    "tiny": Family(
        (("<|tool_calls|>",),),
        '<|tool_calls|>[{"type": "function", "function": {"name": NAME, "arguments": {"KEY": VALUE}}}]',
        between(r"<\|tool_calls\|>(?P<body>.*)\Z", in_json.whole, ("<|reasoning_content|>", "<|reasoning_content|>")),
    ),
}
