"""Episodes with tools: calls are made, errors are answered, and tokens are those of the chat template."""

import json
import queue
from array import array

import pytest
from chat_models import CHATML, tokenizer_with
from fake_client import FakeClient

from rlhf.config.task import EnvironmentTaskConfig
from rlhf.environments.dialogue import Dialogue
from rlhf.environments.factory import Factory
from rlhf.environments.make import environment_of
from rlhf.episodes.loop import Episodes
from rlhf.rewards.calling import Form
from rlhf.rewards.samples import Samples
from rlhf.tasks import make_task, read_task
from rlhf.types import Completion, gold_scores

CLASSES = "tests.environments.classes"
USER = {"role": "user", "content": "hello"}


@pytest.fixture
def tokenizer():
    made = tokenizer_with(CHATML)
    made.stop_ids = (made.convert_tokens_to_ids("<|im_end|>"),)
    return made


def call(name, **arguments):
    return f"\n<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def task_of(tokenizer, tmp_path, rows=4, **dials):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": [USER], "customer": str(k)}) + "\n" for k in range(rows)))
    others = "".join(json.dumps({"prompt": [{"role": "user", "content": f"hi {k}"}]}) + "\n" for k in range(3))
    path.write_text(path.read_text() + others)
    config = EnvironmentTaskConfig(path=str(path), held_out=1, **dials)
    return make_task(read_task(config, 0), tokenizer)


def played(tokenizer, task, answers, **dials):
    """Samples of the greeting, whose policy gives these answers one after the other."""
    prompts = [prompt for prompt in task.train if prompt.messages[-1]["content"] == "hello"][:1]
    end = tokenizer.stop_ids[0]

    def says(prompt):
        answered = text_of(tokenizer, prompt).count("<|im_start|>assistant") - 1
        return tokenizer.encode(answers[answered], add_special_tokens=False)

    with task.environment as environment:
        client = FakeClient(tokenizer, says)
        client.ends = tokenizer.stop_ids
        client.complete = with_end(client.complete, end)
        return Episodes(client, environment).sample(prompts, n=1, temperature=1.0, seed=0)


def with_end(complete, end):
    def completed(*arguments, **named):
        rows = complete(*arguments, **named)
        for row in rows:
            row.ids[-1] = end
        return rows

    return completed


def text_of(tokenizer, ids):
    return tokenizer.batch_decode([list(ids)], skip_special_tokens=False)[0]


def test_calls_are_made_and_what_they_answer_is_rendered_as_the_template_does(tokenizer, tmp_path):
    task = task_of(tokenizer, tmp_path, factory=f"{CLASSES}:Shop")
    answers = [call("price", item="pen", count=2) + call("sell", item="pen"), "done"]
    rollouts = played(tokenizer, task, answers)
    (told,), (row,) = rollouts.episodes, rollouts.completions
    assert told.said == [answers[0], '{"total": 6}\nsold pen', "done"]
    assert told.counts == {"tools/calls": 2.0, "tools/failures": 0.0} and not told.failed
    assert gold_scores(task, rollouts) == [1.0], "what get_reward says"
    asked, said = text_of(tokenizer, row.prompt), text_of(tokenizer, row.ids)
    assert '"name": "price"' in asked and "hello (for " in asked and asked.endswith("<|im_start|>assistant\n")
    assert said == (
        answers[0] + '<|im_end|>\n<|im_start|>user\n<tool_response>\n{"total": 6}\n</tool_response><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\nsold pen\n</tool_response><|im_end|>\n<|im_start|>assistant\ndone<|im_end|>"
    )
    replies = [token for token, ours in zip(row.ids, row.mask, strict=True) if not ours]
    assert text_of(tokenizer, replies).startswith("\n<|im_start|>user") and row.mask[-1] == 1


@pytest.mark.parametrize(
    ("answer", "said", "failures"),
    [
        (call("price", item="moon"), "KeyError: 'not for sale'", 1),
        (call("steal", item="pen"), "there is no tool steal; there are price, sell", 1),
        (call("price", thing="pen"), "TypeError", 1),
        ("\n<tool_call>\n{broken\n</tool_call>", "malformed tool call", 1),
    ],
)
def test_a_call_that_fails_is_answered_with_the_error_and_counted(tokenizer, tmp_path, answer, said, failures):
    task = task_of(tokenizer, tmp_path, factory=f"{CLASSES}:Shop", reply_tokens=400)
    (told,) = played(tokenizer, task, [answer, "done"]).episodes
    assert said in told.said[1] and told.said[2] == "done" and told.score == 0.0 and not told.failed
    assert told.counts == {"tools/calls": 1.0, "tools/failures": float(failures)}


def test_tools_that_exit_or_say_what_is_no_text_hurt_no_other_row(tokenizer, tmp_path):
    task = task_of(tokenizer, tmp_path, factory=f"{CLASSES}:Tools", reply_tokens=400, timeout_s=20.0)
    answer = "".join(call(name) for name in ("leave", "nothing", "half", "fine"))
    (told,) = played(tokenizer, task, [answer, "done"]).episodes
    left, nothing, half, fine = told.said[1].split("\n")
    assert "SystemExit: 3" in left and "StopIteration" in nothing and half == "?" and fine == "fine"
    assert told.counts == {"tools/calls": 4.0, "tools/failures": 2.0} and not told.failed


def test_a_reward_function_is_given_the_whole_conversation(tokenizer, tmp_path):
    task = task_of(tokenizer, tmp_path, factory=f"{CLASSES}:Shop")
    rollouts = played(tokenizer, task, [call("sell", item="pen"), "done"])

    def reward(completions, prompts, **columns):
        (said,) = completions
        assert [message["role"] for message in said] == ["assistant", "tool", "assistant"]
        assert said[0]["tool_calls"][0]["function"] == {"name": "sell", "arguments": {"item": "pen"}}
        assert said[1]["content"] == "sold pen" and said[2]["content"] == "done"
        return [0.25]

    form = Form.of(lambda completions, **columns: reward(completions, **columns))
    given, named = form.arguments(Samples.of(rollouts))
    assert reward(*given, **named) == [0.25]


def test_an_answer_that_a_stop_text_has_ended_is_ended_by_the_template(tokenizer, tmp_path):
    task = task_of(tokenizer, tmp_path, tools=[f"{CLASSES}:add"])
    prompt, answered = task.train[0], []
    calls = tokenizer.encode(call("add", left=3, right=4), add_special_tokens=False)
    for ids in ([*calls, tokenizer.stop_ids[0]], calls):
        with task.environment as environment:
            episode, heard = environment.episode(prompt), queue.SimpleQueue()
            row = Completion(array("i", ids), None, array("Q", [1] * len(ids)), "stop")
            episode.hear(row, "", heard.put)
            answered.append(text_of(tokenizer, heard.get(timeout=30).ids))
            episode.close()
    by_id, by_text = answered
    assert by_id.startswith("\n<|im_start|>user") and by_text == "<|im_end|>" + by_id and "7" in by_id


def test_functions_are_tools_of_rows_without_a_class(tokenizer, tmp_path):
    task = task_of(tokenizer, tmp_path, tools=[f"{CLASSES}:add"])
    (told,) = played(tokenizer, task, [call("add", left=3, right=4), "7"]).episodes
    assert told.said[1:] == ["7", "7"] and told.score is None


def test_what_a_tool_says_is_cut_at_the_tokens_that_it_may_have(tokenizer, tmp_path):
    task = task_of(tokenizer, tmp_path, tools=[f"{CLASSES}:add"], reply_tokens=5)
    (told,) = played(tokenizer, task, [call("add", left=10**9, right=1), "?"]).episodes
    assert told.said[1] == "10000"


def test_the_turns_and_the_budget_end_an_episode_whose_reward_is_asked_for(tokenizer, tmp_path):
    answers = [call("sell", item="pen")] * 5
    task = task_of(tokenizer, tmp_path, factory=f"{CLASSES}:Shop", turns=2)
    (told,) = played(tokenizer, task, answers).episodes
    assert told.score == 2.0 and len(told.said) == 3, "the last calls are made, and nobody is told what they answered"
    task = task_of(tokenizer, tmp_path, factory=f"{CLASSES}:Shop", turns=5, budget=90)
    (told,) = played(tokenizer, task, answers).episodes
    assert told.score == 1.0 and len(told.said) == 3


@pytest.mark.parametrize(
    ("dials", "why"),
    [
        ({"factory": f"{CLASSES}:Untyped"}, "its parameter where has no type"),
        ({"factory": f"{CLASSES}:Undocumented"}, "has no docstring"),
        ({"factory": f"{CLASSES}:Empty"}, "neither a method step nor a public method"),
        ({"factory": f"{CLASSES}:Nobody"}, "cannot import"),
        ({"factory": f"{CLASSES}:add"}, "must name a class"),
        ({"factory": f"{CLASSES}:Mischief", "tools": [f"{CLASSES}:add"]}, "has a method step"),
        ({"tools": [f"{CLASSES}:add"], "tool_format": "klingon"}, "task.tool_format must be one of"),
        ({"factory": f"{CLASSES}:Shop", "path": ""}, "has no rows"),
    ],
)
def test_what_is_wrong_with_a_class_is_one_line_before_anything_is_trained(tokenizer, tmp_path, dials, why):
    with pytest.raises(ValueError, match=why) as error:
        config = {"path": str(tmp_path / "none.jsonl")} | dials
        if config["path"]:
            task_of(tokenizer, tmp_path, **{key: value for key, value in dials.items() if key != "path"})
        else:
            read_task(EnvironmentTaskConfig(**config), 0)
    assert "\n" not in str(error.value)


def test_a_template_that_leaves_thoughts_out_is_refused_unless_they_are_to_be_kept(tmp_path):
    tokenizer = tokenizer_with(CHATML)
    said = [{"role": "user", "content": "more"}]
    Dialogue(tokenizer).check(said)
    tokenizer.chat_template = CHATML.replace(
        "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}",
        "{{- '<|im_start|>' + message.role + '\\n' + (message.content if loop.last else "
        "message.content.split('</think>')[-1].strip()) + '<|im_end|>\\n' }}",
    )
    with pytest.raises(ValueError, match="leaves out what was thought before messages of the role user"):
        Dialogue(tokenizer).check(said)
    config = EnvironmentTaskConfig(factory=f"{CLASSES}:Mischief", path="x")
    factory = Factory.of(config.factory, ())
    with pytest.raises(ValueError, match=r"task\.keeps_thoughts=true"):
        environment_of(config, factory, tokenizer, conversational=True)
    config.keeps_thoughts = True
    assert environment_of(config, factory, tokenizer, conversational=True).longest_reply > config.reply_tokens
