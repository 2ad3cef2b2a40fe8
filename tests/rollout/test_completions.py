import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.config import Cut
from rlhf.rollout.columns import Expected, decode
from rlhf.rollout.completions import Limits, Request, answer, parse
from rlhf.rollout.sampling import Sample, seed_of
from transfer.agreement.wire import Refused

LIMITS = Limits(vocabulary=12, positions=16, stop_ids=(1,))
GOOD = {"prompt": [[3, 4], [5]], "n": 2, "max_tokens": 4, "temperature": 0.5, "seeds": [8, 9], "stop_token_ids": [1, 2]}


def test_a_message_becomes_a_request():
    request = parse(GOOD | {"logprobs": 0, "return_token_ids": True, "model": "policy"}, LIMITS)
    assert (request.prompts, request.seeds, request.as_columns) == ([[3, 4], [5]], [8, 9], False)
    assert request.sampling.with_logprobs == {0, 1, 2, 3}
    sampling = request.sampling
    assert (sampling.n, sampling.max_tokens, sampling.temperature, sampling.stop_ids) == (2, 4, 0.5, (1, 2))


def test_a_message_may_cut_tokens_off_and_a_greedy_one_has_none_to_cut():
    cut = {"top_p": 0.9, "top_k": 7, "min_p": 0.05}
    assert parse(GOOD | cut, LIMITS).sampling.cut == Cut(**cut) and not parse(GOOD, LIMITS).sampling.cut
    assert not parse(GOOD | cut | {"temperature": 0}, LIMITS).sampling.cut


def test_a_stock_clients_message_gets_openais_defaults():
    request = parse({"prompt": [3, 4], "seed": 5}, LIMITS)
    assert (request.prompts, request.seeds, request.as_columns) == ([[3, 4]], [seed_of(5, 0)], False)
    assert request.sampling.with_logprobs == set()
    assert (request.sampling.n, request.sampling.temperature, request.sampling.stop_ids) == (1, 1.0, (1,))
    assert request.sampling.max_tokens == 14  # 16, were the model longer


def test_without_a_seed_two_messages_differ():
    assert parse({"prompt": [3]}, LIMITS).seeds != parse({"prompt": [3]}, LIMITS).seeds


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"best_of": 2}, "best_of"),
        ({"prompt": "text"}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[3], []]}, r"prompt\[1\]"),
        ({"prompt": [[3], 4]}, r"prompt\[1\]"),
        ({"prompt": [[3], [12]]}, r"prompt\[1\]"),
        ({"prompt": [[3], [-1]]}, r"prompt\[1\]"),
        ({"prompt": [[3], [True]]}, r"prompt\[1\]"),
        ({"prompt": [[3], [3.0]]}, r"prompt\[1\]"),
        ({"prompt": [[3] * 16, [4]]}, "prompt"),
        ({"prompt": [[3] * 13, [4]]}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "4"}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"n": 10**9}, "n"),
        ({"n": True}, "n"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 1e-9}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_p": True}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": 2.5}, "top_k"),
        ({"min_p": -0.1}, "min_p"),
        ({"min_p": 2}, "min_p"),
        ({"seeds": [8]}, "seeds"),
        ({"seeds": [8, -9]}, "seeds"),
        ({"seeds": [8, 2**64]}, "seeds"),
        ({"seed": 3}, "seed"),
        ({"stop_token_ids": [12]}, "stop_token_ids"),
        ({"stop_token_ids": 1}, "stop_token_ids"),
        ({"logprobs": 5}, "logprobs"),
        ({"return_token_ids": False}, "return_token_ids"),
        ({"logprobs": 0, "logprobs_rows": [4]}, "logprobs_rows"),
        ({"logprobs": 0, "logprobs_rows": [-1]}, "logprobs_rows"),
        ({"logprobs": 0, "logprobs_rows": 1}, "logprobs_rows"),
        ({"logprobs_rows": [1]}, "logprobs_rows"),
        ({"logprobs": None, "logprobs_rows": []}, "logprobs_rows"),
        ({"encoding": "pickle"}, "encoding"),
        ({"encoding": []}, "encoding"),
    ],
)
def test_a_mistake_is_refused_with_the_name_of_its_field(change, field):
    with pytest.raises(Refused, match=rf"body\.{field}\b|body\.{field}") as refusal:
        parse(GOOD | change, LIMITS)
    assert refusal.value.status == 422


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=6,
)


@given(
    st.dictionaries(st.sampled_from([*GOOD, "seed", "logprobs", "logprobs_rows", "encoding", "model", "x"]), VALUES),
    st.booleans(),
)
def test_whatever_the_message_it_is_answered_or_refused(change, mostly_good):
    try:
        assert isinstance(parse(GOOD | change if mostly_good else change, LIMITS), Request)
    except Refused as refusal:
        assert refusal.status == 422


def test_the_answer_has_vllms_form():
    request = parse({"prompt": [[3, 4]], "n": 2, "logprobs": 0}, LIMITS)
    samples = [Sample([5, 1], [-0.5, -0.25], [7, 8], "stop"), Sample([6], [-1.0], [8], "length")]
    got = json.loads(json.dumps(answer(request, samples)))
    assert [choice["index"] for choice in got["choices"]] == [0, 1]
    assert got["choices"][0] == {
        "index": 0,
        "text": "",
        "token_ids": [5, 1],
        "logprobs": {"token_logprobs": [-0.5, -0.25]},
        "finish_reason": "stop",
        "weight_version": 7,
        "weight_versions": [[7, 1], [8, 1]],
    }
    assert got["choices"][1]["weight_versions"] == [[8, 1]]
    assert got["usage"] == {"prompt_tokens": 2, "completion_tokens": 3}


def test_log_probs_are_in_the_answer_for_the_rows_that_were_named():
    request = parse({"prompt": [[3, 4]], "n": 2, "logprobs": 0, "logprobs_rows": [1]}, LIMITS)
    samples = [Sample([5, 1], [-0.5, -0.25], [7, 8], "stop"), Sample([6], [-1.0], [8], "length")]
    choices = answer(request, samples)["choices"]
    assert [choice["logprobs"] for choice in choices] == [None, {"token_logprobs": [-1.0]}]


def test_a_client_that_asks_for_columns_gets_bytes_with_the_same_samples():
    request = parse({"prompt": [[3, 4]], "n": 2, "logprobs": 0, "logprobs_rows": [1], "encoding": "columns"}, LIMITS)
    samples = [Sample([5, 1], [-0.5, -0.25], [7, 8], "stop"), Sample([6], [-1.0], [8], "length")]
    assert decode(answer(request, samples), Expected(2, 14, 12)) == [Sample([5, 1], None, [7, 8], "stop"), samples[1]]
