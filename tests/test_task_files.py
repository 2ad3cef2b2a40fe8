"""Files as people have them: what the policy is asked, what it learns to say, and what is refused.

Conversations are rendered by chat templates in the ways of known models; what is learned is what `join`'s mask says.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from chat_models import (
    ARGUMENTS_ARE_TEXT,
    CHATML,
    CHATML_TAGS,
    THINKING,
    TURNS,
    beginning_tokenizer,
    tokenizer_with,
)

from rlhf.config import Device, JsonlTaskConfig, TinyModelConfig
from rlhf.models.encoding import join
from rlhf.models.policy import make_policy
from rlhf.models.stop_tokens import carry_stop_ids, ended
from rlhf.models.tokenizer import make_tokenizer
from rlhf.models.value import Head, value_model
from rlhf.rewards.model import ModelReward
from rlhf.rewards.pretrained import PretrainedReward
from rlhf.rewards.rendering import OwnTemplate
from rlhf.tasks import make_task, read_task

SOURCE = {"role": "user", "content": "hello"}
ANSWER = {"role": "assistant", "content": "ab"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
CALLS = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "name": "f", "content": "3"}
TOOLS = [{"type": "function", "function": {"name": "f"}}]
LAST = {"prompt": "held out"}  # which a seed of 0 holds out of two rows


def write(folder: Path, rows: list[dict]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def task_of(folder: Path, rows: list[dict], tokenizer=None, **options):
    """The task of these rows, of which none is held out: a row more is."""
    path = write(folder, [*rows, LAST])
    for seed in range(100):
        raw = read_task(JsonlTaskConfig(path=path, held_out=1, **options), seed)
        if raw.held_out[0].question == "held out":
            break
    if tokenizer is None:
        config = TinyModelConfig(device=Device.cpu)
        tokenizer = make_tokenizer(config, raw.characters(), raw.conversational, raw.tags())
    return make_task(raw, tokenizer)


def learned(task, tokenizer) -> list[tuple[str, str]]:
    """Of each demonstration, the text without and with loss, by the mask that SFT has."""
    prompts, texts = zip(*task.demonstrations, strict=True)
    rows = [(prompt.ids, ids) for prompt, ids in zip(prompts, ended(tokenizer, prompts, texts), strict=True)]
    found = []
    for row in rows:
        ids, mask = join([row], torch.device("cpu"))
        sides = (ids[0][mask[0] == 0].tolist(), ids[0][mask[0] == 1].tolist())
        found.append(tuple(tokenizer.decode(side, skip_special_tokens=False) for side in sides))
    return found


def chatml(*turns: tuple[str, str]) -> str:
    return "".join(f"<|im_start|>{role}\n{said}<|im_end|>\n" for role, said in turns)


ASKED = "<|im_start|>assistant\n"
CALLED = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
SAID = "<tool_response>\n3\n</tool_response>"
OFFERED = chatml(("system", json.dumps(TOOLS[0]) + "\n"))


# --- tools ------------------------------------------------------------------------------------------------------------


def test_calls_and_answers_are_learned_with_the_tools_shown_and_what_tools_say_never_is(tmp_path):
    tokenizer = tokenizer_with(CHATML)
    task = task_of(tmp_path, [{"messages": [SOURCE, CALLS, RESULT, ANSWER], "tools": TOOLS}], tokenizer)
    asked = OFFERED + chatml(("user", "hello")) + ASKED
    later = OFFERED + chatml(("user", "hello"), ("assistant", CALLED), ("user", SAID)) + ASKED
    assert sorted(learned(task, tokenizer)) == sorted([(asked, CALLED + "<eos>"), (later, "ab<eos>")])
    assert task.train[0].text == later, "the last answer is what is sampled"
    assert tokenizer.unk_token_id not in task.train[0].ids
    assert tokenizer.convert_tokens_to_ids("<tool_call>") in task.train[0].ids, "a tag is one token"


def test_a_call_that_ends_a_row_is_its_demonstration(tmp_path):
    tokenizer = tokenizer_with(CHATML)
    task = task_of(tmp_path, [{"messages": [SOURCE, CALLS]}], tokenizer)
    assert learned(task, tokenizer) == [(chatml(("user", "hello")) + ASKED, CALLED + "<eos>")]


def test_a_call_that_ends_at_a_stop_of_its_own_is_not_ended_twice(tmp_path):
    called = "{%- endfor %}{{ '<|im_end|>\\n' }}"
    assert called in CHATML
    tokenizer = tokenizer_with(CHATML.replace(called, "{%- endfor %}{{ '<|call|>' }}"), [*CHATML_TAGS, "<|call|>"])
    carry_stop_ids(tokenizer, [tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|call|>"])], len(tokenizer))
    task = task_of(tmp_path, [{"messages": [SOURCE, CALLS]}, {"messages": [SOURCE, ANSWER]}], tokenizer)
    asked = chatml(("user", "hello")) + ASKED
    assert sorted(learned(task, tokenizer)) == sorted([(asked, CALLED + "<|call|>"), (asked, "ab<|im_end|>")])


def test_a_call_that_the_user_answers_is_rendered_in_its_place_and_not_learned(tmp_path):
    tokenizer = tokenizer_with(CHATML)
    task = task_of(tmp_path, [{"messages": [SOURCE, CALLS, {"role": "user", "content": "3"}, ANSWER]}], tokenizer)
    asked = chatml(("user", "hello"), ("assistant", CALLED), ("user", "3")) + ASKED
    assert learned(task, tokenizer) == [(asked, "ab<eos>")]


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)], ids=["list", "JSON, as tables have it"])
def test_the_column_tools_is_handed_to_the_chat_template_and_stays_a_column(tmp_path, tools):
    tokenizer = tokenizer_with(CHATML)
    task = task_of(tmp_path, [{"prompt": [SOURCE], "answer": "ab", "tools": tools}], tokenizer)
    assert task.train[0].text == OFFERED + chatml(("user", "hello")) + ASKED
    assert task.train[0].columns == {"answer": "ab", "tools": tools}
    assert task.score(task.train[0], "ab") == 1.0


@pytest.mark.parametrize(
    "spelling",
    [
        {"content": None, "tool_calls": [CALL]},
        {"tool_calls": [CALL]},
        {"content": None, "tool_calls": [{**CALL, "id": "1", "function": {"name": "f", "arguments": '{"x": 1}'}}]},
        {"content": "", "tool_calls": [CALL], "function_call": None, "reasoning_content": None},
    ],
    ids=["null content", "no content", "arguments as JSON", "null keys"],
)
@pytest.mark.parametrize("template", [CHATML, ARGUMENTS_ARE_TEXT])
def test_a_call_is_the_same_in_every_spelling_and_with_templates_of_both_kinds(tmp_path, spelling, template):
    tokenizer = tokenizer_with(template, [*CHATML_TAGS, "<|call|>"])
    task = task_of(tmp_path, [{"messages": [SOURCE, {"role": "assistant", **spelling}]}], tokenizer)
    [(_, answer)] = task.demonstrations
    assert answer == (CALLED if template is CHATML else '<|call|>f {"x": 1}')


def test_a_preference_between_a_call_and_a_text_has_both_as_the_template_renders_them(tmp_path):
    row = {"chosen": [SOURCE, CALLS, RESULT, CALLS], "rejected": [SOURCE, CALLS, RESULT, ANSWER], "tools": TOOLS}
    task = task_of(tmp_path, [row], tokenizer_with(CHATML))
    [pair] = task.preferences
    assert (pair.chosen, pair.rejected) == (CALLED, "ab")
    assert pair.prompt.text == OFFERED + chatml(("user", "hello"), ("assistant", CALLED), ("user", SAID)) + ASKED


def test_the_tiny_models_template_shows_tools_calls_results_and_thoughts(tmp_path):
    thinking = {**ANSWER, "reasoning_content": "so"}
    task = task_of(tmp_path, [{"messages": [SOURCE, CALLS, RESULT, thinking], "tools": TOOLS}])
    calls = "<|tool_calls|>" + json.dumps([CALL])
    asked = f"<|tools|>{json.dumps(TOOLS)}<|user|>hello<|assistant|>"
    later = f"{asked}{calls}<|tool|>3<|assistant|>"
    thought = "<|reasoning_content|>so<|reasoning_content|>ab"
    assert sorted((p.text, a) for p, a in task.demonstrations) == sorted([(asked, calls), (later, thought)])


# --- nothing is left out in silence -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "template", "said"),
    [
        ({"messages": [SOURCE, CALLS]}, THINKING, "does not render 'tool_calls' of message 2 (role 'assistant')"),
        ({"messages": [SOURCE, CALLS, RESULT, ANSWER]}, THINKING, "'tool_calls' of message 2"),
        ({"messages": [SOURCE, {**ANSWER, "function_call": {"name": "f"}}]}, CHATML, "'function_call' of message 2"),
        ({"messages": [SOURCE, {**ANSWER, "reasoning_content": "so"}]}, CHATML, "'reasoning_content' of message 2"),
        ({"messages": [{"role": "developer", "content": "be brief"}, SOURCE, ANSWER]}, CHATML, "role 'developer'"),
        ({"prompt": [SOURCE], "answer": "ab", "tools": TOOLS}, THINKING, "does not render 'tools'"),
        ({"messages": [{"role": "system", "content": "be brief"}, SOURCE, ANSWER]}, TURNS, "System role not supported"),
        ({"prompt": "hello", "completion": [CALLS]}, CHATML, "needs a prompt of messages, not a text"),
        ({"prompt": [SOURCE], "answer": "ab", "tools": "f"}, CHATML, "'tools' must be a list of objects"),
        ({"prompt": [SOURCE, CALLS], "answer": "ab"}, CHATML, "no answer can continue"),
        ({"prompt": [SOURCE], "chat_template_kwargs": {"tokenize": True}}, CHATML, "'chat_template_kwargs' must be"),
        ({"messages": [SOURCE, {"role": "assistant", "content": ""}]}, CHATML, "says nothing"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}, ANSWER]}, CHATML, "(got 'image')"),
        (
            {
                "messages": [SOURCE, {**ANSWER, "reasoning_content": "so"}],
                "chat_template_kwargs": {"enable_thinking": False},
            },
            THINKING,
            "set chat_template_kwargs in the row",
        ),
    ],
)
def test_what_the_template_would_leave_out_is_refused_with_its_row(tmp_path, row, template, said):
    rows = [{"prompt": [SOURCE], "answer": "ab"}, row]
    with pytest.raises(ValueError) as error:
        task_of(tmp_path, rows, tokenizer_with(template))
    assert str(error.value).startswith(f"{tmp_path}/rows.jsonl:2: ")
    assert said in str(error.value)


def test_a_call_that_the_template_leaves_out_is_named_among_others_that_it_shows(tmp_path):
    row = {"messages": [SOURCE, CALLS, RESULT, ANSWER, SOURCE, CALLS, RESULT, ANSWER]}
    with pytest.raises(ValueError, match=r"does not render 'tool_calls' of message 2 \(role 'assistant'\)"):
        task_of(tmp_path, [row], tokenizer_with(CHATML.replace("not message.tool_calls", "loop.index0 < 3")))


def test_looking_for_calls_that_are_left_out_takes_no_rendering_a_call(tmp_path, monkeypatch):
    tokenizer, rendered = tokenizer_with(CHATML), []
    plain = tokenizer.apply_chat_template
    monkeypatch.setattr(tokenizer, "apply_chat_template", lambda *a, **k: rendered.append(1) or plain(*a, **k))
    task = task_of(tmp_path, [{"messages": [SOURCE, *[CALLS, RESULT] * 12, ANSWER], "tools": TOOLS}], tokenizer)
    assert len(task.demonstrations) == 13
    assert len(rendered) <= 4 * 13 + 2  # a prompt, and three an answer; beside them, what the row is looked at with


def test_other_keys_that_a_template_leaves_out_are_told_once(tmp_path):
    rows = [{"messages": [{**SOURCE, "content": f"q{n}", "toxic": False, "name": "Ann"}, ANSWER]} for n in range(3)]
    task = task_of(tmp_path, rows, tokenizer_with(CHATML))
    assert task.notes == ["warning: the model's chat template leaves these keys of messages out: 'toxic'"]


def test_a_key_that_the_template_leaves_out_changes_nothing_of_an_answer(tmp_path):
    rows = [{"messages": [{**SOURCE, "content": f"q{n}"}, {**ANSWER, "score": 1}][: 2 + n]} for n in range(2)]
    tokenizer = tokenizer_with(THINKING.replace("loop.index0 > last.user", "true"))
    task = task_of(tmp_path, rows, tokenizer)
    assert [answer for _, answer in task.demonstrations] == ["ab", "ab"]


def test_pairs_that_the_template_renders_alike_are_left_out_and_counted(tmp_path):
    rows = [{"prompt": [SOURCE], "chosen": [{**ANSWER, "id": n}], "rejected": [{**ANSWER, "id": 7}]} for n in range(2)]
    rows.append({"prompt": [SOURCE], "chosen": [ANSWER], "rejected": [{**ANSWER, "content": "c"}]})
    task = task_of(tmp_path, rows, tokenizer_with(CHATML))
    assert [(pair.chosen, pair.rejected) for pair in task.preferences] == [("ab", "c")]
    [note] = task.notes
    assert note.startswith("warning: pairs of answers that the chat template renders alike are left out: 2 (")


def test_tools_beside_a_text_are_said_to_be_unseen(tmp_path):
    task = task_of(tmp_path, [{"prompt": "hello", "answer": "ab", "tools": TOOLS}])
    where = f"1 ({tmp_path}/rows.jsonl:1)"
    assert task.notes == [f"warning: 'tools' is for chat templates, and these prompts are texts: {where}"]


def test_thoughts_before_a_later_question_may_be_left_out_and_those_of_the_answer_are_learned(tmp_path):
    tokenizer = tokenizer_with(THINKING)
    thinking = {**ANSWER, "reasoning_content": "so"}
    task = task_of(tmp_path, [{"messages": [SOURCE, thinking, SOURCE, thinking]}], tokenizer)
    asked = chatml(("user", "hello"), ("assistant", "ab"), ("user", "hello")) + ASKED
    assert learned(task, tokenizer) == [(asked, "<think>\nso\n</think>\n\nab<eos>")]


def test_arguments_of_the_chat_template_are_those_of_the_row(tmp_path):
    row = {"prompt": [SOURCE], "answer": "ab", "chat_template_kwargs": {"enable_thinking": False}}
    task = task_of(tmp_path, [row], tokenizer_with(THINKING))
    assert task.train[0].text == chatml(("user", "hello")) + ASKED + "<think>\n\n</think>\n\n"


# --- other forms ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "hello"}]}, ANSWER]}, "ab"),
        ({"conversations": [SOURCE, ANSWER]}, "ab"),
        ({"conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "ab"}]}, "ab"),
        ({"prompt": [SOURCE], "completion": [ANSWER]}, "ab"),
        ({"prompt": [SOURCE], "completion": "ab"}, "ab"),
        ({"prompt": [SOURCE], "messages": None, "completion": [ANSWER], "answer": None}, "ab"),
        ({"prompt": [{**SOURCE, "name": None}], "answer": 7}, "7"),
        ({"prompt": [SOURCE], "reward_model": {"style": "rule", "ground_truth": "7"}}, "7"),
    ],
    ids=["parts", "conversations", "sharegpt", "completion", "text completion", "null columns", "number", "verl"],
)
def test_a_row_of_each_form_asks_the_same_and_has_its_demonstration(tmp_path, row, answer):
    tokenizer = tokenizer_with(CHATML)
    task = task_of(tmp_path, [row], tokenizer)
    assert learned(task, tokenizer) == [(chatml(("user", "hello")) + ASKED, answer + "<eos>")]


def test_sharegpts_calls_and_observations_are_calls_and_results_of_tools(tmp_path):
    said = [
        {"from": "human", "value": "hello"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"from": "observation", "value": "3"},
        {"from": "gpt", "value": "ab"},
    ]
    task = task_of(tmp_path, [{"conversations": said, "tools": json.dumps(TOOLS)}], tokenizer_with(CHATML))
    asked = OFFERED + chatml(("user", "hello"), ("assistant", CALLED), ("user", SAID)) + ASKED
    assert task.train[0].text == asked
    assert {answer for _, answer in task.demonstrations} == {CALLED, "ab"}


def test_sharegpts_system_column_is_the_first_message(tmp_path):
    said = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "ab"}]
    row = {"conversations": said, "system": "be brief", "source": "web"}
    [prompt] = task_of(tmp_path, [row], tokenizer_with(CHATML)).train
    assert prompt.text == chatml(("system", "be brief"), ("user", "hello")) + ASKED
    assert prompt.columns == {"source": "web"}


def test_sharegpts_preference_is_one(tmp_path):
    row = {
        "conversations": [{"from": "human", "value": "hello"}],
        "chosen": {"from": "gpt", "value": "ab"},
        "rejected": {"from": "gpt", "value": "c"},
    }
    [pair] = task_of(tmp_path, [row], tokenizer_with(CHATML)).preferences
    assert (pair.prompt.text, pair.chosen, pair.rejected) == (chatml(("user", "hello")) + ASKED, "ab", "c")


def test_a_completion_in_several_turns_is_learned_turn_by_turn_and_asked_by_its_prompt(tmp_path):
    tokenizer = tokenizer_with(CHATML)
    task = task_of(tmp_path, [{"prompt": [SOURCE], "completion": [CALLS, RESULT, ANSWER]}], tokenizer)
    later = chatml(("user", "hello"), ("assistant", CALLED), ("user", SAID)) + ASKED
    asked = chatml(("user", "hello")) + ASKED
    assert task.train[0].text == asked
    assert sorted(learned(task, tokenizer)) == sorted([(asked, CALLED + "<eos>"), (later, "ab<eos>")])


def test_a_completion_is_learned_where_an_answer_is_what_others_are_compared_with(tmp_path):
    task = task_of(tmp_path, [{"prompt": "1+1=", "completion": "let me see: 2", "answer": 2}])
    assert task.demonstrations == [(task.train[0], "let me see: 2")]
    assert task.score(task.train[0], "2") == 1.0


@pytest.mark.parametrize(("number", "text"), [(7, "7"), (0, "0"), (-2.5, "-2.5"), (10**30, "1" + "0" * 30)])
def test_a_number_is_an_answer_by_its_text(tmp_path, number, text):
    for row in ({"prompt": "a", "answer": number}, {"prompt": "a", "reward_model": {"ground_truth": number}}):
        task = task_of(tmp_path, [row])
        assert task.demonstrations == [(task.train[0], text)]
        assert task.score(task.train[0], f" {text}\n") == 1.0 and task.score(task.train[0], "x") == 0.0


def test_verls_other_columns_stay_columns_and_a_ground_truth_of_another_kind_is_its_rewards(tmp_path):
    rows = [
        {"prompt": [{**SOURCE, "content": str(n)}], "reward_model": {"ground_truth": truth}, "extra_info": {"index": n}}
        for n, truth in enumerate(["7", {"target": 7}])
    ]
    columns = [prompt.columns for prompt in task_of(tmp_path, rows, tokenizer_with(CHATML)).train]
    assert {"reward_model": {"ground_truth": "7"}, "extra_info": {"index": 0}, "answer": "7"} in columns
    assert {"reward_model": {"ground_truth": {"target": 7}}, "extra_info": {"index": 1}} in columns


def test_a_null_column_is_an_absent_one(tmp_path):
    rows = [
        {"prompt": "a", "answer": None, "chosen": "b", "rejected": "c", "note": None},
        {"prompt": "d", "answer": "e", "chosen": None, "rejected": None, "note": None},
        {"prompt": "f", "answer": None, "chosen": None, "rejected": None, "note": None},
    ]
    task = task_of(tmp_path, rows)
    assert {(pair.prompt.text, pair.chosen, pair.rejected) for pair in task.preferences} == {("a", "b", "c")}
    assert {(prompt.text, answer) for prompt, answer in task.demonstrations} == {("a", "b"), ("d", "e")}
    assert {prompt.text: prompt.columns for prompt in task.train} == {"a": {}, "d": {"answer": "e"}, "f": {}}


def test_a_prompt_that_ends_with_the_assistants_words_is_continued(tmp_path):
    tokenizer = tokenizer_with(CHATML)
    task = task_of(
        tmp_path, [{"prompt": [SOURCE, {"role": "assistant", "content": "It is"}], "answer": " ab"}], tokenizer
    )
    assert learned(task, tokenizer) == [(chatml(("user", "hello")) + ASKED + "It is", " ab<eos>")]


# --- how a prompt begins ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [False, True], ids=["BOS", "BOS and EOS"])
def test_a_text_begins_as_the_tokenizer_itself_begins_one(tmp_path, end):
    tokenizer = beginning_tokenizer(end=end)
    [prompt] = task_of(tmp_path, [{"prompt": "hello"}], tokenizer).train
    whole = tokenizer("hello")["input_ids"]
    assert list(prompt.ids) == (whole[:-1] if end else whole), "an EOS would end what is to be answered"
    assert prompt.ids[0] == tokenizer.bos_token_id and prompt.ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("row", [{"prompt": [SOURCE]}, {"prompt": "<bos><start_of_turn>user\nhello<end_of_turn>\n"}])
def test_a_prompt_that_begins_already_is_not_begun_twice(tmp_path, row):
    tokenizer = beginning_tokenizer()
    [prompt] = task_of(tmp_path, [row], tokenizer).train
    assert prompt.ids.count(tokenizer.bos_token_id) == 1 and prompt.ids[0] == tokenizer.bos_token_id


def test_a_template_that_begins_without_bos_is_left_as_it_is(tmp_path):
    tokenizer = beginning_tokenizer(CHATML)
    [prompt] = task_of(tmp_path, [{"prompt": [SOURCE]}], tokenizer).train
    assert list(prompt.ids) == tokenizer.apply_chat_template([SOURCE], add_generation_prompt=True)["input_ids"]
    assert tokenizer.bos_token_id not in prompt.ids


def test_a_reward_model_reads_a_text_as_its_own_tokenizer_begins_it(tmp_path, monkeypatch):
    from rlhf.models import value

    tokenizer = beginning_tokenizer()
    texts = task_of(tmp_path, [{"prompt": "hello"}, {"prompt": [SOURCE]}], tokenizer).train
    read = []
    model = torch.nn.Linear(1, 1)
    monkeypatch.setattr(value, "scores", lambda model, ids, mask: read.append(ids) or torch.zeros(len(ids)))
    value.score_texts(model, tokenizer, texts, ["ab", "ab"])
    for row, prompt in zip(read[0], texts, strict=True):
        assert tuple(row[: len(prompt.ids)].tolist()) == prompt.ids and prompt.ids[0] == tokenizer.bos_token_id


def test_reward_models_with_templates_of_their_own_are_shown_the_tools_and_the_answer_from_its_beginning(tmp_path):
    begins = {"role": "assistant", "content": "It is"}
    row = {"prompt": [SOURCE, begins], "tools": TOOLS}
    [prompt] = task_of(tmp_path, [row], tokenizer_with("{{ tools | tojson if tools }}" + THINKING)).train
    tokenizer = tokenizer_with(CHATML)
    model = value_model(make_policy(TinyModelConfig(device=Device.cpu, layers=1), tokenizer, 0), Head.sequence)
    own = OwnTemplate(tokenizer)
    asked = OFFERED + chatml(("user", "hello"))
    assert ModelReward(model, tokenizer, own)._asked(prompt).text == asked + ASKED + "It is"
    assert PretrainedReward(model, tokenizer, own)._text(prompt, " ab") == asked + chatml(("assistant", "It is ab"))
