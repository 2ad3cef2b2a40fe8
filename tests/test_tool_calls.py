"""Calls of tools in answers: each family's published form, and what is said of what is none."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from rlhf.models.tokenizer import CHAT_TEMPLATE
from rlhf.models.tool_calls import ToolFormat
from rlhf.models.tool_formats.table import FAMILIES

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer"},
                "units": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                "parts": {"type": "array", "items": {"type": "string"}},
            },
        },
    },
}
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}}
OTHER = {"type": "function", "function": {"name": "ping", "arguments": {}}}

TEMPLATES = {  # what chat templates of the family have in them
    "hermes": 'For each call return <tool_call>\n{"name": <function-name>, "arguments": <args>}\n</tool_call>',
    "qwen_coder": "<tool_call>\n<function=example>\n<parameter=p>\nvalue\n</parameter>\n</function>\n</tool_call>",
    "llama": 'Respond in the format {"name": name, "parameters": {}}. <|start_header_id|> <|python_tag|>',
    "mistral": "{{ '[AVAILABLE_TOOLS]' }}{{ '[TOOL_CALLS]' }}",
    "glm": "<tool_call>{function-name}\n<arg_key>{k}</arg_key>\n<arg_value>{v}</arg_value>\n</tool_call>",
    "deepseek": "{{ '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' }}",
    "harmony": "{{ '<|start|>assistant to=functions.' }}<|channel|>commentary json<|message|>",
    "gemma4": "{{ '<|tool_call>call:' }}{{ '}<tool_call|>' }}",
    "tiny": CHAT_TEMPLATE,
}
ANSWERS = {  # one call, and, where a family writes several, two of them; after reasoning and a text where it may
    "hermes": [
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}\n</tool_call>',
        '<think>\nhm\n</think>\n\nI look.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", '
        '"days": 3}}\n</tool_call>\n<tool_call>\n{"name": "ping", "arguments": {}}\n</tool_call>',
    ],
    "qwen_coder": [
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=days>\n3\n"
        "</parameter>\n</function>\n</tool_call>",
        "hm\n</think>\n\nI look.\n\n<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n"
        "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=ping>\n</function>\n"
        "</tool_call>",
    ],
    "llama": [
        '{"name": "get_weather", "parameters": {"city": "Paris", "days": 3}}',
        '<|python_tag|>{"type": "function", "name": "get_weather", "parameters": {"city": "Paris", "days": 3}}; '
        '{"name": "ping", "parameters": {}}',
    ],
    "mistral": [
        ' [TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}]',
        '[THINK]hm[/THINK]I look.[TOOL_CALLS]get_weather[ARGS]{"city": "Paris", "days": 3}[TOOL_CALLS]ping[ARGS]{}',
    ],
    "glm": [
        "\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n<arg_key>days</arg_key>\n"
        "<arg_value>3</arg_value>\n</tool_call>",
        "\n<think>hm</think>\nI look.\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n"
        "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>\n<tool_call>ping\n</tool_call>",
    ],
    "deepseek": [
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": "Paris", "days": 3}'
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "<think>hm</think>I look.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n"
        '```json\n{"city": "Paris", "days": 3}\n```<｜tool▁call▁end｜>\n'
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>ping\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    ],
    "harmony": [
        ' to=functions.get_weather<|channel|>commentary json<|message|>{"city": "Paris", "days": 3}',
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>commentary<|message|>I look.<|end|>"
        "<|start|>assistant<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>"
        '{"city": "Paris", "days": 3}<|call|><|start|>assistant<|channel|>commentary to=functions.ping '
        "<|constrain|>json<|message|>{}",
    ],
    "gemma4": [
        '<|tool_call>call:get_weather{city:<|"|>Paris<|"|>,days:3}<tool_call|>',
        '<|channel>thought\nhm\n<channel|>I look.<|tool_call>call:get_weather{city:<|"|>Paris<|"|>,days:3}<tool_call|>'
        "<|tool_call>call:ping{}<tool_call|>",
    ],
    "tiny": [
        f"<|tool_calls|>{json.dumps([CALL])}",
        f"<|reasoning_content|>hm<|reasoning_content|>I look.<|tool_calls|>{json.dumps([CALL, OTHER])}",
    ],
}
BROKEN = {
    "hermes": '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"\n</tool_call>',
    "qwen_coder": "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</function>\n</tool_call>",
    "llama": '{"name": "get_weather", "parameters": {"city": "Paris"',
    "mistral": "[TOOL_CALLS]get_weather[ARGS]{city}",
    "glm": "<tool_call>get_weather\n<arg_key>city</arg_key>\nParis\n</tool_call>",
    "deepseek": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "harmony": "<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{city: Paris}",
    "gemma4": "<|tool_call>get_weather(city)<tool_call|>",
    "tiny": '<|tool_calls|>[{"function": {"name": "get_weather"}}]',
}


def of(template: str, **others) -> ToolFormat:
    return ToolFormat.of(SimpleNamespace(chat_template=template, **others))


def test_the_tests_know_every_family():
    assert set(TEMPLATES) == set(ANSWERS) == set(BROKEN) == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_chat_template_tells_its_family_which_a_name_overrides(family):
    assert of(TEMPLATES[family]).name == family
    assert ToolFormat.of(SimpleNamespace(chat_template="no marks"), family).name == family


@pytest.mark.parametrize("family", FAMILIES)
def test_a_familys_published_form_of_a_call_is_read(family):
    parsed = of(TEMPLATES[family]).parse(ANSWERS[family][0], [WEATHER])
    assert parsed.message == {"role": "assistant", "content": "", "tool_calls": [CALL]} and not parsed.errors


@pytest.mark.parametrize("family", FAMILIES)
def test_several_calls_are_read_with_the_reasoning_and_the_text_before_them(family):
    parsed = of(TEMPLATES[family]).parse(ANSWERS[family][1], [WEATHER])
    assert parsed.message.pop("tool_calls") == [CALL, OTHER] and not parsed.errors
    spoken = {} if family == "llama" else {"reasoning_content": "hm"}
    assert parsed.message == {"role": "assistant", "content": "I look." if spoken else "", **spoken}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_malformed_call_is_said_in_one_line_with_the_form_and_stays_in_the_content(family):
    parsed = of(TEMPLATES[family]).parse(BROKEN[family], [WEATHER])
    assert "tool_calls" not in parsed.message and parsed.message["content"].strip() == BROKEN[family]
    (error,) = parsed.errors
    assert error.startswith("malformed tool call: ") and error.endswith(f"; a call is written {FAMILIES[family].form}")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plain_answer_and_an_answer_where_there_are_no_tools_stay_as_they_are(family):
    for text, tools in ((" Sunny, {really}!\n", [WEATHER]), (ANSWERS[family][0], [])):
        parsed = of(TEMPLATES[family]).parse(text, tools)
        assert parsed.message == {"role": "assistant", "content": text} and not parsed.errors


@pytest.mark.parametrize("family", ["hermes", "qwen_coder", "glm", "deepseek", "gemma4"])
def test_a_call_that_does_not_end_is_malformed(family):
    text = ANSWERS[family][0]
    cut = text[: text.rindex("</tool" if "</tool" in text else "<｜tool▁call▁end" if "｜" in text else "<tool_call|")]
    parsed = of(TEMPLATES[family]).parse(cut, [WEATHER])
    assert "tool_calls" not in parsed.message and "it does not end with" in parsed.errors[0]


def test_good_calls_beside_a_malformed_one_are_kept():
    parsed = of(TEMPLATES["hermes"]).parse(f"{BROKEN['hermes']}\n{ANSWERS['hermes'][0]}", [WEATHER])
    assert parsed.message["tool_calls"] == [CALL] and len(parsed.errors) == 1
    assert parsed.message["content"] == BROKEN["hermes"]


@pytest.mark.parametrize(
    "call", ["[1]", '{"name": "f"}', '{"name": 3, "arguments": {}}', '{"name": "f", "arguments": 7}']
)
def test_json_that_is_no_call_is_malformed(call):
    parsed = of(TEMPLATES["hermes"]).parse(f"<tool_call>{call}</tool_call>", [WEATHER])
    assert "tool_calls" not in parsed.message and len(parsed.errors) == 1


def test_json_inside_itself_thousands_of_times_is_malformed():
    parsed = of(TEMPLATES["hermes"]).parse(f"<tool_call>{'[' * 200_000}</tool_call>", [WEATHER])
    assert "tool_calls" not in parsed.message and len(parsed.errors) == 1 and len(parsed.errors[0]) < 500


def test_what_is_between_tags_has_the_type_that_the_schema_says():
    def argument(key, value):
        text = (
            f"<tool_call>\n<function=get_weather>\n<parameter={key}>\n{value}\n</parameter>\n</function>\n</tool_call>"
        )
        (call,) = of(TEMPLATES["qwen_coder"]).parse(text, [WEATHER]).message["tool_calls"]
        return call["function"]["arguments"][key]

    assert argument("city", "75001") == "75001" and argument("days", "3") == 3
    assert argument("days", "many") == "many", "the tool says that it is wrong"
    assert argument("parts", '["day", "night"]') == ["day", "night"]
    assert argument("city", "a\n b ") == "a\n b " and argument("unknown", "3") == "3"


def test_ids_of_calls_are_kept_where_a_family_writes_them():
    parsed = of(TEMPLATES["mistral"]).parse("[TOOL_CALLS]ping[CALL_ID]abc123def[ARGS]{}", [WEATHER])
    assert parsed.message["tool_calls"] == [{"id": "abc123def", **OTHER}]


RESPONSE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<me>",
    "fields": {
        "reasoning_content": {"open": "<hm>", "close": "</hm>"},
        "tool_calls": {
            "open": "<do>",
            "close": "</do>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {},
    },
}


def test_a_tokenizers_own_response_template_comes_first():
    known = of(TEMPLATES["hermes"], response_template=RESPONSE)
    assert known.name == "response_template"
    said = '<do>{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}</do>'
    assert known.parse(said, [WEATHER]).message["tool_calls"] == [CALL]
    begun = known.parse(f"why</hm>{said}", [WEATHER], prefix="<you>go<me><hm>").message
    assert begun["reasoning_content"] == "why" and begun["tool_calls"] == [CALL]


@pytest.mark.parametrize("call", ["{", "[]", '{"name": "f"}', '{"arguments": {}}', "7"])
def test_what_a_response_template_cannot_read_is_malformed(call):
    parsed = of("", response_template=RESPONSE).parse(f"<do>{call}</do>", [WEATHER])
    assert parsed.message == {"role": "assistant", "content": f"<do>{call}</do>"} and len(parsed.errors) == 1


def test_where_nobody_knows_the_format_a_line_says_what_to_do():
    with pytest.raises(ValueError, match=r"response_template in the checkpoint.*task\.tool_format to harmony, .*tiny$"):
        of("{{ messages }}")
    with pytest.raises(ValueError, match=r"task\.tool_format must be one of .*got 'hermetic'"):
        ToolFormat.of(SimpleNamespace(chat_template=None), "hermetic")
