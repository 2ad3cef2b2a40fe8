"""The endpoint, asked by the package openai: what is sampled is what is recorded, token for token."""

from __future__ import annotations

import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import requests
import torch

from rlhf.gateway.session import Bounds

ASKED = [{"role": "user", "content": "go on"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}


def said(client, messages=ASKED, **more):
    return client.chat.completions.create(model="policy", messages=messages, **more)


def logprobs_of(policy, completion, temperature):
    """What the policy itself thinks of a row's tokens."""
    prompt = list(completion.prompt)
    with torch.no_grad():
        logits = policy(torch.tensor([[*prompt, *completion.ids]])).logits[0] / temperature
    of_tokens = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return of_tokens.gather(1, torch.tensor(completion.ids.tolist())[:, None])[:, 0]


def talk(client, turns, messages=ASKED, **more):
    """A conversation of so many answers."""
    messages = list(messages)
    for turn in range(turns):
        answer = said(client, messages, **more).choices[0].message
        messages += [answer.model_dump(exclude_none=turn % 2 == 0), {"role": "user", "content": f"and {turn}?"}]
    return messages


def test_a_conversation_is_one_row_with_the_policys_own_log_probs(endpoint, policy, tokenizer):
    session, _, client = endpoint.begin()
    talk(client, 4)
    (row,) = session.turns.sequences()
    assert row.turns == 4 and len(row.said) == 7 and row.said[1::2] == ["and 0?", "and 1?", "and 2?"]
    completion = row.completion
    assert tokenizer.batch_decode([completion.prompt]) == ["<|user|>go on<|assistant|>"]
    ours = logprobs_of(policy, completion, 0.7)
    mask = torch.tensor(completion.sampled.tolist(), dtype=torch.bool)
    assert (ours - torch.tensor(completion.logprobs.tolist()))[mask].abs().max() < 1e-4
    assert 0 < mask.sum() < len(mask) and set(completion.versions) == {0}
    assert session.counts == {"agent/calls": 4, "tools/malformed": 0}


def test_an_answer_that_was_cut_is_gone_on_with_behind_an_end_that_nobody_learns(endpoint, tokenizer):
    session, _, client = endpoint.begin(seed=1)
    messages = talk(client, 3, max_completion_tokens=1)
    assert len(messages) == 7
    (row,) = session.turns.sequences()
    text = tokenizer.batch_decode([row.completion.ids.tolist()])[0]
    assert row.completion.sampled.count(1) == 3, "a token each"
    assert text.count("<|user|>and") == 2


def test_what_was_sampled_depends_on_the_sessions_seed_and_sample_alone(endpoint):
    def told(**terms):
        session, _, client = endpoint.begin(**terms)
        talk(client, 2)
        return session.turns.sequences()[0].completion.ids.tolist()

    assert told() == told() and len({tuple(told(sample=sample)) for sample in range(4)}) > 1
    assert told(seed=6) != told() or told(seed=7) != told()
    assert told(temperature=0.0) == told(temperature=0.0, sample=3)


def test_a_rewritten_history_is_a_row_of_its_own_and_nothing_is_learned_twice(endpoint, policy):
    session, _, client = endpoint.begin(seed=3)
    messages = talk(client, 3)
    said(client, [{"role": "system", "content": "Be brief."}, *messages[:3]])
    said(client, [*messages[:3], {"role": "user", "content": "no: this"}])
    long, *others = session.turns.sequences()
    assert (long.turns, *(row.turns for row in others)) == (3, 2, 1)
    branch, other = (row.completion for row in others)
    length = len(long.completion.prompt) + long.completion.sampled.index(0)
    whole = [*long.completion.prompt, *long.completion.ids]
    assert list(branch.prompt[:length]) == whole[:length], "the tokens that were sampled, as a prompt"
    assert other.prompt[:length] != tuple(whole[:length])
    for row in (branch, other):
        assert set(row.sampled) == {1}
        assert (logprobs_of(policy, row, 0.7) - torch.tensor(row.logprobs.tolist())).abs().max() < 1e-4
    sampled = sum(row.completion.sampled.count(1) for row in (long, *others))
    assert sampled == sum(len(turn.answer.ids) for turn in session.turns.all)


def test_parallel_branches_of_one_conversation_are_rows(endpoint):
    session, _, client = endpoint.begin()
    messages = talk(client, 1)
    with ThreadPoolExecutor(4) as pool:
        asked = [[*messages[:-1], {"role": "user", "content": f"branch {n}"}] for n in range(4)]
        answers = list(pool.map(lambda each: said(client, each), asked))
    assert len({answer.id for answer in answers}) == 4
    first, *others = session.turns.sequences()
    assert first.turns == 2 and 0 in first.completion.sampled, "the first answer is learned with one of them"
    assert len(others) == 3 and all(set(row.completion.sampled) == {1} for row in others)


def test_choices_stop_texts_seeds_logprobs_and_lengths_are_as_openai_has_them(endpoint):
    session, _, client = endpoint.begin()
    answer = said(client, n=3, logprobs=True, temperature=0.7, seed=11)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert answer.usage.completion_tokens == sum(len(choice.logprobs.content) for choice in answer.choices)
    rows = [row.completion for row in session.turns.sequences()]
    assert len(rows) == 3 and len({row.prompt for row in rows}) == 1
    told = [[token.logprob for token in choice.logprobs.content] for choice in answer.choices]
    assert sorted(told) == sorted(row.logprobs.tolist() for row in rows)
    again = said(client, n=3, seed=11, max_tokens=500)
    assert [c.message.content for c in again.choices] == [c.message.content for c in answer.choices]
    long = max((c.message.content for c in answer.choices), key=len)
    stopped = said(client, n=3, seed=11, stop=[long[2]])
    assert long[:2] in [c.message.content for c in stopped.choices]
    short = said(client, max_tokens=2)
    assert short.usage.completion_tokens <= 2


def test_a_stream_says_what_the_whole_answer_would(endpoint):
    (_, _, one), (_, _, other) = endpoint.begin(), endpoint.begin()
    whole = said(one)
    chunks = list(said(other, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage


def test_texts_and_token_ids_are_gone_on_with(endpoint, tokenizer):
    session, _, client = endpoint.begin()
    first = client.completions.create(model="policy", prompt="Once ", logprobs=1).choices[0]
    assert first.logprobs.tokens and len(first.logprobs.token_logprobs) == len(first.logprobs.tokens)
    client.completions.create(model="policy", prompt=f"Once {first.text} and")
    (row,) = session.turns.sequences()
    assert row.turns == 2 and tokenizer.batch_decode([row.completion.prompt]) == ["Once "]
    ids = [*row.completion.prompt, *row.completion.ids]
    client.completions.create(model="policy", prompt=[*ids, 9, 9])
    (row,) = session.turns.sequences()
    assert row.turns == 3 and [*row.completion.prompt, *row.completion.ids][: len(ids) + 2] == [*ids, 9, 9]


def test_the_models_are_one(endpoint):
    _, _, client = endpoint.begin()
    assert [model.id for model in client.models.list()] == ["policy"]


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"temperature": 0.3}, "temperature must be left out, or the run's, 0.7"),
        ({"top_p": 0.9}, "top_p cannot be 0.9 here"),
        ({"extra_body": {"guided_json": {}}}, "guided_json is not known here"),
        ({"tool_choice": "required", "tools": [TOOL]}, "tool_choice must be auto or none"),
        ({"response_format": {"type": "json_object"}}, "response_format cannot be"),
        ({"n": 65}, "n must be an integer from 1 to 64"),
        ({"logprobs": True, "top_logprobs": 3}, "top_logprobs must be 0"),
        ({"messages": [*ASKED, {"role": "assistant", "content": "a"}]}, "the last message is the assistant's"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "must be a text"),
        ({"messages": [{"role": "nobody", "content": ""}]}, "must have a role"),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, "the model's context 512"),
    ],
)
def test_what_cannot_be_done_is_a_400_that_says_so(endpoint, wrong, why):
    session, _, client = endpoint.begin()
    with pytest.raises(openai.BadRequestError, match=why):
        said(client, **wrong)
    assert not session.turns.all and said(client).choices, "and the session goes on"


def test_only_a_live_sessions_key_is_let_in_and_only_to_its_own_reward(endpoint):
    session, key, client = endpoint.begin()
    other, others_key, _ = endpoint.begin()
    stranger = openai.OpenAI(base_url=f"{endpoint.url}/v1", api_key="rlhf-guess", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        said(stranger)
    said(client)
    rewarded = f"{endpoint.url}/sessions/{session.id}/reward"
    assert requests.post(rewarded, json={"reward": 1.0}, timeout=10).status_code == 401
    headers = {"Authorization": f"Bearer {others_key}"}
    assert requests.post(rewarded, json={"reward": 1.0}, headers=headers, timeout=10).status_code == 404
    headers = {"Authorization": f"Bearer {key}"}
    for bad in ({"reward": "good"}, {"reward": True}, {}, {"reward": 1, "more": 2}):
        assert requests.post(rewarded, json=bad, headers=headers, timeout=10).status_code == 400
    assert requests.post(rewarded, json={"reward": 0.5}, headers=headers, timeout=10).status_code == 200
    assert requests.post(rewarded, json={"reward": 1.0}, headers=headers, timeout=10).status_code == 409
    assert session.reward == 0.5 and other.reward is None
    with pytest.raises(openai.BadRequestError, match="the session has ended"):
        said(client)
    endpoint.sessions.close(session)
    with pytest.raises(openai.AuthenticationError):
        said(client)


def test_a_session_is_bounded_and_expires(endpoint):
    _, _, few = endpoint.begin(bounds=Bounds(calls=1))
    said(few)
    with pytest.raises(openai.BadRequestError, match="has made its 1 calls"):
        said(few)
    _, _, short = endpoint.begin(bounds=Bounds(tokens=15))
    with pytest.raises(openai.BadRequestError, match="used up its 15 tokens"):
        said(short)
    _, _, small = endpoint.begin(bounds=Bounds(nbytes=10))
    with pytest.raises(openai.BadRequestError, match="more than 10 bytes"):
        said(small)
    _, _, late = endpoint.begin(within_s=0.0)
    time.sleep(0.01)
    with pytest.raises(openai.AuthenticationError):
        said(late)


def test_a_program_that_has_gone_leaves_no_turn(endpoint):
    session, key, client = endpoint.begin()
    host, port = endpoint.url.removeprefix("http://").split(":")
    body = json.dumps({"messages": ASKED}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\n"
    with socket.create_connection((host, int(port))) as gone:
        gone.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body[:-1])
    said(client)
    assert len(session.turns.all) == 1


def test_calls_of_tools_are_told_and_their_answers_go_on_with_the_recorded_tokens(scripted, tokenizer):
    call = [{"type": "function", "function": {"name": "add", "arguments": {"a": 3}}}]
    spoken = f"Let me see.<|tool_calls|>{json.dumps(call)}"
    with scripted([spoken, "<|tool_calls|>[{]", "7"]) as endpoint:
        session, _, client = endpoint.begin()
        first = said(client, tools=[TOOL]).choices[0]
        assert first.finish_reason == "tool_calls" and first.message.content == "Let me see."
        (made,) = first.message.tool_calls
        assert (made.function.name, json.loads(made.function.arguments)) == ("add", {"a": 3})
        told = {"role": "tool", "tool_call_id": made.id, "content": "7"}
        messages = [*ASKED, first.message, told]
        broken = said(client, messages, tools=[TOOL]).choices[0]
        assert broken.message.content == "<|tool_calls|>[{]" and broken.finish_reason == "stop"
        assert "malformed tool call: it is not JSON" in broken.tool_call_errors[0]
        last = said(client, [*messages, broken.message, *ASKED], tools=[TOOL]).choices[0]
        assert last.message.content == "7"
        (row,) = session.turns.sequences()
        assert row.turns == 3 and session.counts["tools/malformed"] == 1
        text = tokenizer.batch_decode([row.completion.ids.tolist()])[0]
        assert text == f"{spoken}<eos><|tool|>7<|assistant|><|tool_calls|>[{{]<eos><|user|>go on<|assistant|>7<eos>"


def test_with_tool_choice_none_the_policy_sees_no_tools_and_calls_none(scripted, tokenizer):
    with scripted(['<|tool_calls|>[{"name": "add", "arguments": {}}]']) as endpoint:
        session, _, client = endpoint.begin()
        answer = said(client, tools=[TOOL], tool_choice="none").choices[0]
        assert answer.message.tool_calls is None and answer.finish_reason == "stop"
        (row,) = session.turns.sequences()
        assert "<|tools|>" not in tokenizer.batch_decode([row.completion.prompt])[0]


def test_a_streamed_call_is_put_together_by_its_client(scripted):
    with scripted(['<|tool_calls|>[{"name": "add", "arguments": {"a": 1}}]']) as endpoint:
        _, _, client = endpoint.begin()
        chunks = list(said(client, tools=[TOOL], stream=True))
        (call,) = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
        assert call.index == 0 and call.function.name == "add" and chunks[-1].choices[0].finish_reason == "tool_calls"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{",
        b'{"messages": NaN}',
        b'{"messages": [], "messages": []}',
        b'{"messages": ' + b"[" * 500 + b"]" * 500 + b"}",
        b'{"messages": [{"role": "user", "content": {"a": 1}}]}',
        b'{"messages": [{"role": "user"}], "tools": {}}',
        b'{"messages": [{"role": "user"}], "stream": 3}',
        b'{"messages": [{"role": "user"}], "seed": 1e9}',
        b'{"messages": [{"role": "user"}], "stop": [""]}',
        b'{"messages": [{"role": "user"}], "chat_template_kwargs": {"tools": []}}',
        b'{"messages": [{"role": "assistant", "tool_calls": 3}, {"role": "user"}]}',
    ],
)
def test_a_body_that_makes_no_sense_is_a_400(endpoint, body):
    session, key, _ = endpoint.begin()
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    answer = requests.post(f"{endpoint.url}/v1/chat/completions", data=body, headers=headers, timeout=10)
    assert answer.status_code == 400 and answer.json()["error"]["message"], answer.text
    assert not session.turns.all


def test_there_are_no_other_routes(endpoint):
    _, key, _ = endpoint.begin()
    headers = {"Authorization": f"Bearer {key}"}
    for method, path in (("GET", "/"), ("GET", "/v1/chat/completions"), ("POST", "/v1/models"), ("POST", "/pause")):
        answer = requests.request(method, endpoint.url + path, headers=headers, timeout=10)
        assert answer.status_code == 404, path
