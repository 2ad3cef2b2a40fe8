"""reward=judge against a real server: what a chat model is asked, what of its answers is a score, and what is none."""

from __future__ import annotations

import json
import threading
import time

import pytest
from test_rewards_http import Server, says

from rlhf.config import JudgeRewardConfig
from rlhf.rewards.judge import JudgeReward, check_judge, filled
from rlhf.shell.ending import RunError
from rlhf.types import Prompt

PROMPT = Prompt("2+2=", (1,), {"answer": "4", "completion": "no key of the template's own"})
TALK = Prompt("<|user|>Hi", (1,), {}, ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}))


def says_text(text: object) -> tuple[int, dict[str, str], bytes]:
    return says(200, {"choices": [{"message": {"role": "assistant", "content": text}}]})


@pytest.fixture
def server():
    with Server().running() as running:
        yield running


def judge(server: Server, **dials: object) -> JudgeReward:
    return JudgeReward(JudgeRewardConfig(**{"url": server.url, "model": "judge", "timeout_s": 5.0} | dials))


def test_a_judge_is_asked_a_request_a_sample_and_the_number_behind_the_mark_is_the_reward(server, monkeypatch):
    monkeypatch.setenv("RLHF_REWARD_TOKEN", "abc")
    server.script = [says_text("Right.\nScore: 9")]
    template = "{prompt} {completion} ({answer}) {lowest}-{highest}"
    asked = judge(server, template=template, highest=9.5, max_tokens=7, temperature=0.5)
    assert asked([PROMPT], ["{answer} 4"]) == [9.0] and asked.report.errors == 0
    content = "2+2= {answer} 4 (4) 0-9.5"  # what is put in is not looked into
    message = {"role": "user", "content": content}
    assert server.asked == [{"model": "judge", "messages": [message], "temperature": 0.5, "max_tokens": 7}]
    assert server.headers[0]["Authorization"] == "Bearer abc"


@pytest.mark.parametrize(
    ("said", "score"),
    [
        ("Score: 7", 7.0),
        ("Score: 3 would be too low.\n\n**Score:** 8.5/10.", 8.5),
        ("Score:\n 10.", 10.0),
        ("Score: .5", 0.5),
        ("Score: 11", None),
        ("Score: -1", None),
        ("Score: seven", None),
        ("7", None),
        ("", None),
        (None, None),
        (["Score: 7"], None),
    ],
)
def test_of_what_a_judge_says_only_a_number_in_its_range_behind_the_last_mark_is_a_score(server, said, score):
    server.script = [says_text(said)]
    asked = judge(server)
    assert asked([PROMPT], ["4"]) == [score]
    assert asked.report.counts == ({} if score is not None else {"not_a_number": 1})


def test_answers_that_are_no_chat_completions_and_requests_that_fail_cost_their_samples_by_class(server):
    server.script = [says(200, {}), says(200, b"[]"), says(500), lambda handler: time.sleep(20), says_text("Score: 1")]
    asked = judge(server, concurrency=1, timeout_s=0.5)
    assert asked([PROMPT] * 5, ["4"] * 5) == [None] * 4 + [1.0]
    assert asked.report.counts == {"not_a_number": 2, "refused": 1, "timed_out": 1} and asked.report.errors == 4


def test_so_many_samples_as_asked_for_are_judged_at_once_and_scores_are_in_order(server):
    together = threading.Barrier(4)

    def score(handler) -> None:
        together.wait(20)
        text = json.dumps({"choices": [{"message": {"content": "Score: 5"}}]})
        handler.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n" + text.encode())

    server.script = [score] * 8
    assert judge(server, concurrency=4, timeout_s=30)([PROMPT] * 8, ["4"] * 8) == [5.0] * 8


def test_of_a_conversation_the_judge_reads_who_says_what():
    config = JudgeRewardConfig(url="http://127.0.0.1:1/", model="judge")
    text = filled(config, TALK, "Hello.")
    assert "system: Be brief.\nuser: Hi\n" in text and "\nHello.\n" in text and "from 0 (bad) to 10 (perfect)" in text


def test_what_does_not_fit_is_told_before_anything_is_trained(server):
    class Task:
        train, demonstrations, preferences = (PROMPT,), (), ()

    config = JudgeRewardConfig(url=server.url, model="judge", template="{completion} {truth}")
    with pytest.raises(ValueError, match=r"^reward\.template has \{truth\} in it, and there are prompt, .*answer, "):
        check_judge(config, Task())
    check_judge(JudgeRewardConfig(url=server.url, model="judge", template="{completion} {answer}"), Task())
    gone = JudgeRewardConfig(url="http://127.0.0.1:9/", model="judge", retries=0)
    with pytest.raises(RunError, match=r"^reward\.url=http://127\.0\.0\.1:9/ refused the connection 1 time"):
        check_judge(gone, Task())


@pytest.mark.parametrize(
    ("dials", "message"),
    [
        ({"template": "Rate it."}, r"^reward\.template must have \{completion\} in it \(got 'Rate it\.'\)"),
        ({"score_after": " "}, r"^reward\.score_after must be a text like"),
        ({"highest": 0.0}, r"^reward\.highest must be greater than reward\.lowest \(0\.0; got 0\.0\)"),
        ({"max_tokens": 0}, r"^reward\.max_tokens must be at least 1"),
        ({"temperature": -1.0}, r"^reward\.temperature must be at least 0"),
        ({"concurrency": 0}, r"^reward\.concurrency must be at least 1"),
    ],
)
def test_dials_of_a_judge_that_make_no_sense_are_refused(dials, message):
    with pytest.raises(ValueError, match=message):
        JudgeRewardConfig(**{"url": "http://127.0.0.1:1/", "model": "judge"} | dials)
