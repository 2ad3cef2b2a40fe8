"""top_p, top_k and min_p: which tokens are left is what transformers' generate leaves, and log-probs are of those."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import LogitsProcessorList, MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from rlhf.config import Cut, EvaluateConfig, HfRolloutConfig
from rlhf.rollout.client import RolloutClient
from rlhf.rollout.hf import HfEngine, draw, left
from rlhf.rollout.sampling import Sampling
from rlhf.rollout.worker import Worker
from rlhf.types import Prompt
from transfer import make_transfer
from transfer.config import LocalConfig
from transfer.trainer.senders.direct import DirectSender

EOS = 1
PROMPTS = [[3, 4, 5, 6, 7], [8], [9, 2, 10]]
SAMPLING = Sampling(n=4, max_tokens=8, temperature=0.8, stop_ids=(EOS,))
CUTS = [
    {"top_k": 1},
    {"top_k": 4},
    {"top_k": 50},
    {"top_p": 0.5},
    {"top_p": 0.95},
    {"top_p": 1e-6},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"top_k": 5, "top_p": 0.8},
    {"top_k": 5, "min_p": 0.1},
]


def generated(model, cut):
    """transformers' own samples of the prompts: raw logits and processed scores of each step, [steps * rows, V]."""
    torch.manual_seed(0)
    told = [
        model.generate(
            torch.tensor([prompt] * 16), do_sample=True, temperature=0.8, max_new_tokens=6, output_scores=True,
            output_logits=True, return_dict_in_generate=True, **{"top_k": 0, "top_p": 1.0, **cut},
        )
        for prompt in PROMPTS
    ]  # fmt: skip
    return (torch.cat([step for each in told for step in getattr(each, name)]) for name in ("logits", "scores"))


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_what_is_left_and_its_log_probs_are_those_of_transformers_generate(model, cut):
    logits, scores = generated(model, cut)
    ours = left(logits.float() / 0.8, Cut(**cut)).log_softmax(-1)
    theirs = scores.log_softmax(-1)
    assert torch.equal(ours.isinf(), theirs.isinf())
    assert torch.allclose(ours.exp(), theirs.exp(), atol=1e-6)
    assert cut in ({"top_k": 50}, {"top_p": 0.95}) or ours.isinf().any()


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("invariant", [False, True])
def test_an_engines_log_probs_are_those_of_the_cut_distribution_token_by_token(model, cut, invariant):
    engine = HfEngine(model, invariant=invariant)
    samples = engine.generate(PROMPTS, range(3), replace(SAMPLING, cut=Cut(**cut)), lambda: 0)
    for row, sample in enumerate(samples):
        for position, token in enumerate(sample.ids):
            ids = torch.tensor([[*PROMPTS[row // 4], *sample.ids[:position]]])
            with torch.no_grad():
                scores = processors(cut)(ids, model(ids).logits[:, -1].float() / 0.8)
            assert sample.logprobs[position] == pytest.approx(scores.log_softmax(-1)[0, token].item(), abs=1e-5)


def processors(cut):
    made = {"min_p": MinPLogitsWarper, "top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper}
    return LogitsProcessorList([made[name](cut[name]) for name in made if name in cut])


def test_where_min_p_and_top_p_both_cut_top_p_is_a_share_of_what_min_p_has_left():
    logits = torch.tensor([[0.5, 0.2, 0.15, 0.1, 0.05]]).log()
    both = {"min_p": 0.25, "top_p": 0.8}
    ours = left(logits, Cut(**both)).isinf()[0].tolist()
    assert ours == processors(both)(None, logits).isinf()[0].tolist() == [False, False, True, True, True]
    assert not left(logits, Cut(top_p=0.8)).isinf()[0, 2], "of all of it, 0.8 needs three"


def test_a_token_that_is_cut_off_is_never_drawn_and_others_are_as_often_as_they_are_probable():
    probabilities = torch.tensor([0.4, 0.3, 0.2, 0.1])
    uniform = np.linspace(0, 1, 10_000, endpoint=False)
    ids, logprobs = draw(probabilities.log().expand(10_000, 4), uniform, 1.0, Cut(top_k=2))
    assert (ids.bincount(minlength=4) / 10_000).tolist() == pytest.approx([4 / 7, 3 / 7, 0, 0], abs=1e-3)
    assert logprobs.exp().unique().tolist() == pytest.approx([3 / 7, 4 / 7])


def test_a_greedy_answer_and_an_uncut_one_are_to_the_bit_what_they_are_without_the_dials(model):
    engine = HfEngine(model)
    for changes in ({"temperature": 0.0}, {"cut": Cut(top_k=12)}):
        plain = engine.generate(PROMPTS, range(3), replace(SAMPLING, temperature=changes.get("temperature", 0.8)), TURN)
        with_dials = replace(SAMPLING, **{"cut": Cut(top_k=3), **changes})
        same = engine.generate(PROMPTS, range(3), with_dials, TURN)
        assert [(row.ids, row.logprobs) for row in plain] == [(row.ids, row.logprobs) for row in same]


def TURN():
    return 0


# --- through a client and a worker ------------------------------------------------------------------------------------


@pytest.fixture
def client(model, tokenizer, tmp_path):
    with make_transfer(LocalConfig(), tmp_path) as transfer:
        sender = DirectSender(Worker.around(model, transfer.endpoint), "worker 0")
        transfer.open(model.state_dict(), [sender])
        transfer.push(model.state_dict())
        yield RolloutClient([sender], tokenizer, HfRolloutConfig(max_new_tokens=8))


def test_a_client_asks_for_what_is_cut_off_and_greedy_answers_are_whole(client):
    prompts = [Prompt("x", tuple(ids)) for ids in PROMPTS]
    greedy = client.sample(prompts, n=1, temperature=0.0, seed=1)
    likeliest = client.cut(Cut(top_k=1))
    only = likeliest.sample(prompts, n=3, temperature=1.0, seed=1)
    assert [row.ids for row in only.completions] == [row.ids for row in greedy.completions for _ in range(3)]
    assert {logprob for row in only.completions for logprob in row.logprobs} == {0.0}
    again = likeliest.sample(prompts, n=1, temperature=0.0, seed=1)
    assert [row.logprobs for row in again.completions] == [row.logprobs for row in greedy.completions]
    assert any(min(row.logprobs) < -0.1 for row in client.sample(prompts, n=3, temperature=1.0, seed=1).completions)


# --- dials ------------------------------------------------------------------------------------------------------------


def test_an_evaluations_own_dials_win_over_those_of_all_samples():
    rollout = HfRolloutConfig(top_p=0.9, min_p=0.1)
    assert EvaluateConfig().cut(rollout.cut) == Cut(top_p=0.9, min_p=0.1)
    assert EvaluateConfig(top_p=1.0, top_k=3).cut(rollout.cut) == Cut(top_k=3, min_p=0.1)


@pytest.mark.parametrize("config", [HfRolloutConfig, EvaluateConfig])
@pytest.mark.parametrize(
    ("dial", "value", "allowed"),
    [
        ("top_p", 0.0, "greater than 0 and at most 1"),
        ("top_p", 1.5, "greater than 0 and at most 1"),
        ("top_k", -1, "at least 0"),
        ("min_p", -0.5, "between 0.0 and 1.0"),
    ],
)
def test_a_cut_that_leaves_nothing_is_refused(config, dial, value, allowed):
    with pytest.raises(ValueError, match=rf"\.{dial} must be {allowed} \(got {value}\)"):
        config(**{dial: value})
