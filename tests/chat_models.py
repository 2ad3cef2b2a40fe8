"""Tokenizers and chat templates in the ways of known models, one token a character and a tag, for tests."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from rlhf.config import Device, TinyModelConfig
from rlhf.models.tokenizer import make_tokenizer

PRINTABLE = "".join(map(chr, range(32, 127))) + "\n"
CHATML_TAGS = ["<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]

# As Qwen2.5 has it: knows tools and their calls, and passes over roles that it does not know.
CHATML = """\
{%- if tools %}{{ '<|im_start|>system\\n' }}{% for tool in tools %}{{ tool | tojson + '\\n' }}{% endfor %}{{ '<|im_end|>\\n' }}{% endif %}
{%- for message in messages %}
{%- if message.role in ('user', 'system') or (message.role == 'assistant' and not message.tool_calls) %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- elif message.role == 'assistant' %}
{{- '<|im_start|>assistant' }}{% if message.content %}{{ '\\n' + message.content }}{% endif %}
{%- for call in message.tool_calls %}
{%- if call.function is defined %}{% set call = call.function %}{% endif %}
{{- '\\n<tool_call>\\n{"name": "' + call.name + '", "arguments": ' }}{{ call.arguments | tojson }}{{ '}\\n</tool_call>' }}
{%- endfor %}{{ '<|im_end|>\\n' }}
{%- elif message.role == 'tool' %}
{{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""  # noqa: E501

# As Qwen3 has it: what was thought before the last question is left out.
THINKING = """\
{%- set last = namespace(user=0) %}
{%- for message in messages %}{% if message.role == 'user' %}{% set last.user = loop.index0 %}{% endif %}{% endfor %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.reasoning_content and loop.index0 > last.user %}{{ '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}{% endif %}
{{- message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"""  # noqa: E501

# As DeepSeek has it: the arguments of a call are a text.
ARGUMENTS_ARE_TEXT = """\
{%- for message in messages %}
{%- if message['role'] == 'assistant' and message['tool_calls'] %}{{ '<|assistant|>' + message['content'] }}
{%- for call in message['tool_calls'] %}{{ '<|call|>' + call['function']['name'] + ' ' + call['function']['arguments'] }}{% endfor %}{{ '<|im_end|>' }}
{%- else %}{{ '<|' + message['role'] + '|>' + message['content'] }}{% if message['role'] == 'assistant' %}{{ '<|im_end|>' }}{% endif %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""  # noqa: E501

# As Gemma has it: it begins the text itself, its assistant is called model, and it knows neither system nor tools.
TURNS = """\
{{- bos_token }}
{%- for message in messages %}
{%- if message['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{{- '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' + message['content'] + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""  # noqa: E501


def tokenizer_with(template: str | None, tags: list[str] = CHATML_TAGS) -> PreTrainedTokenizerBase:
    """One token a printable character, and one a tag."""
    tokenizer = make_tokenizer(TinyModelConfig(device=Device.cpu), PRINTABLE, chat=False)
    tokenizer.add_tokens(tags)
    tokenizer.chat_template = template
    return tokenizer


def beginning_tokenizer(template: str | None = TURNS, end: bool = False) -> PreTrainedTokenizerBase:
    """The same, which puts BOS before a text by itself, as Gemma and Llama do, and EOS behind it if `end`."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tokenizer_with(template, ["<start_of_turn>", "<end_of_turn>"])
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    tokenizer.split_special_tokens = False
    ids = [("<bos>", tokenizer.bos_token_id), ("<eos>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"<bos> $A{' <eos>' if end else ''}", special_tokens=ids
    )
    return tokenizer
