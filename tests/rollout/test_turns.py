"""Conversations: what goes back to the workers, what is learned from, and that each row depends on its seeds alone."""

import pytest
import torch

from rlhf.config import GuessTaskConfig, HfRolloutConfig
from rlhf.episodes.loop import Episodes, conversing
from rlhf.learning.forward import collate, response_logprobs
from rlhf.models.tokenizer import make_tokenizer
from rlhf.rollout.client import RolloutClient, Wanted
from rlhf.rollout.columns import Expected, decode
from rlhf.rollout.sampling import seed_of
from rlhf.rollout.worker import Worker
from rlhf.tasks import make_task, read_task
from rlhf.tasks.tokenised import RepliesEpisode
from rlhf.types import Prompt
from transfer import make_transfer
from transfer.agreement.wire import BODY
from transfer.config import LocalConfig
from transfer.trainer.senders.direct import DirectSender

EOS = 1


class Listener:
    """Says "yes" (7, 8) after most answers, by their first letter; else it is over, as after `turns` answers."""

    longest_reply, places, budget, timeout_s, opens = 2, None, None, None, False

    def __init__(self, turns=3):
        self.turns, self.heard = turns, []

    def episode(self, prompt):
        return RepliesEpisode(self, prompt)

    def reply(self, prompt, answers):
        self.heard.append((prompt.ids, list(answers)))
        return "yes" if len(answers) < self.turns and ord((answers[-1] + "!")[0]) % 3 else None

    def encode(self, reply):
        assert reply == "yes"
        return [7, 8]


class Asked:
    """A sender that keeps what it was asked and answered."""

    def __init__(self, sender):
        self.name, self.sender, self.bodies, self.answers = sender.name, sender, [], []

    def call(self, verb, body, timeout_s=None):
        if verb != "completions":
            return self.sender.call(verb, body, timeout_s)
        self.bodies.append(body)
        answer = self.sender.call(verb, body, timeout_s)
        self.answers.append(decode(answer[BODY], Expected(len(body["prompt"]) * body["n"], body["max_tokens"])))
        return answer


PROMPTS = [Prompt("x", ids) for ids in [(3, 4, 5), (8,), (9, 2, 10), (4, 4)]]


@pytest.fixture
def clients(model, tokenizer, tmp_path):
    """`clients(workers)`: a client of that many workers around `model`, and what each of them is asked."""
    opened = []

    def made(count=1, **dials):
        transfer = make_transfer(LocalConfig(), tmp_path).__enter__()
        opened.append(transfer)
        senders = [Asked(DirectSender(Worker.around(model, transfer.endpoint), f"worker {i}")) for i in range(count)]
        transfer.open(model.state_dict(), senders)
        transfer.push(model.state_dict())
        return RolloutClient(senders, tokenizer, HfRolloutConfig(max_new_tokens=16, **dials)), senders

    yield made
    for transfer in opened:
        transfer.close()


def test_a_row_is_its_answers_with_the_replies_between_them_masked(clients):
    client, (asked,) = clients()
    rollouts = Episodes(client, Listener()).sample(PROMPTS, n=4, temperature=1.0, seed=3)
    turns = [len(said) // 2 + 1 for said in rollouts.conversations]
    assert {1, 2, 3} == set(turns), "conversations of every length"
    for row, said, text in zip(rollouts.completions, rollouts.conversations, rollouts.texts, strict=True):
        assert len(row.ids) == len(row.logprobs) == len(row.versions) == len(row.mask)
        said_by_us = [token for token, ours in zip(row.ids, row.mask, strict=True) if ours]
        replies = [token for token, ours in zip(row.ids, row.mask, strict=True) if not ours]
        assert replies == [7, 8] * (len(said) // 2) and said[1::2] == ["yes"] * (len(said) // 2)
        assert said_by_us.count(EOS) == len(said[::2]) - (row.finish_reason == "length")
        assert text == said[-1], "the last answer is what is scored"
        assert all(logprob == 0 for logprob, ours in zip(row.logprobs, row.mask, strict=True) if not ours)
        assert row.mask[-1], "no reply is the last word"
    assert rollouts.tokens == sum(len(sample.ids) for answer in asked.answers for sample in answer)
    assert len(rollouts.lags(5)) == rollouts.tokens and set(rollouts.lags(5)) == {5}


def test_workers_are_asked_with_the_tokens_that_were_sampled_and_each_answer_is_the_next_part_of_its_row(clients):
    client, (asked,) = clients()
    rollouts = Episodes(client, Listener()).sample(PROMPTS, n=9, temperature=1.0, seed=3)
    whole = [[*prompt.ids, *row.ids] for prompt, row in zip(rollouts.prompts_B, rollouts.completions, strict=True)]
    first, *later = asked.bodies
    assert first["prompt"] == [list(prompt.ids) for prompt in PROMPTS] and first["n"] == 9
    assert [body["n"] for body in later] == [1, 1] and set(later[0]) == set(first), "the same message as ever"
    for body, answer in zip(later, asked.answers[1:], strict=True):
        for prompt, sample in zip(body["prompt"], answer, strict=True):
            assert prompt[-2:] == [7, 8] and prompt[-3] == EOS
            assert any(row[: len(prompt) + len(sample.ids)] == [*prompt, *sample.ids] for row in whole)


def test_the_trainer_computes_the_log_probs_that_were_sampled_at_every_turn(clients, model):
    client, _ = clients()
    rollouts = Episodes(client, Listener()).sample(PROMPTS, n=4, temperature=0.6, seed=1)
    batch = collate(rollouts, torch.device("cpu"))
    assert batch.mask_BT.sum() == rollouts.tokens < sum(len(row.ids) for row in rollouts.completions)
    with torch.no_grad():
        ours = response_logprobs(model, batch, 0.6)
    assert ((ours - batch.sampled_BT).abs() * batch.mask_BT).max() < 1e-5
    assert (ours * (1 - batch.mask_BT)).abs().max() > 0.1, "the replies' tokens have log-probs, too, which nobody uses"


def test_a_conversation_is_the_same_whatever_the_workers_the_other_prompts_and_the_number_of_samples(clients):
    def rows(count, prompts, n):
        return Episodes(clients(count)[0], Listener()).sample(prompts, n=n, temperature=1.0, seed=9)

    alone = rows(1, PROMPTS, 4)
    assert rows(3, PROMPTS, 4).conversations == alone.conversations
    assert rows(1, PROMPTS[:2], 4).conversations == alone.conversations[:8]
    assert rows(1, PROMPTS, 2).conversations == [alone.conversations[4 * p + j] for p in range(4) for j in range(2)]
    assert rows(1, PROMPTS, 4).completions[5].ids == alone.completions[5].ids
    assert Episodes(clients()[0], Listener()).sample(PROMPTS, n=4, temperature=1.0, seed=8).texts != alone.texts


def test_each_answer_ends_at_any_of_the_models_stop_ids_which_is_no_part_of_what_is_heard(clients, tokenizer):
    tokenizer.stop_ids = (EOS, 5)
    client, (asked,) = clients()
    environment = Listener()
    rollouts = Episodes(client, environment).sample(PROMPTS, n=8, temperature=1.0, seed=3)
    assert {tuple(body["stop_token_ids"]) for body in asked.bodies} == {(EOS, 5)}
    ends = [answer.ids[-1] for answers in asked.answers for answer in answers if answer.finish_reason == "stop"]
    assert {EOS, 5} == set(ends) and max(map(len, rollouts.conversations)) > 1
    letter = tokenizer.batch_decode([[5]], skip_special_tokens=True)[0]
    assert not any(letter in answer for _, answers in environment.heard for answer in answers)
    assert not any(letter in answer for said in rollouts.conversations for answer in said[::2])


def test_no_two_turns_have_one_seed(clients):
    client, (asked,) = clients()
    Episodes(client, Listener()).sample(PROMPTS, n=4, temperature=1.0, seed=3)
    seeds = [seed for body in asked.bodies for seed in body["seeds"]]
    assert len(seeds) == len(set(seeds)) and seeds[:4] == [seed_of(3, index) for index in range(4)]


def test_an_answer_that_the_limit_has_cut_ends_its_conversation(clients):
    client, _ = clients()
    environment = Listener()
    rollouts = Episodes(client, environment).sample(PROMPTS, n=4, temperature=1.0, seed=3)
    rows = zip(rollouts.prompts_B, rollouts.completions, rollouts.conversations, strict=True)
    cut = [(prompt.ids, said[::2]) for prompt, row, said in rows if row.finish_reason == "length"]
    assert len(cut) > 3 and not any(one in environment.heard for one in cut) and environment.heard
    assert all(row.ids[-1] != EOS for row in rollouts.completions if row.finish_reason == "length")


def test_without_an_environment_the_client_samples_as_ever(clients):
    client, _ = clients()
    assert conversing(client, None) is client
    assert isinstance(conversing(client, Listener()), Episodes)
    plain = client.sample(PROMPTS, n=2, temperature=1.0, seed=0)
    assert plain.conversations == [] and plain.completions[0].mask.count(1) == len(plain.completions[0].ids)


def guessing(secret, guess):
    """A conversation of task=guess with this secret, in which `guess(range, hints so far)` plays."""
    raw = read_task(GuessTaskConfig(letters=12), seed=0)
    task = make_task(raw, make_tokenizer_for(raw))
    prompt = next(prompt for prompt in task.train if prompt.columns["answer"] == secret)
    answers, hints = [], []
    while True:
        answers.append(guess(prompt.text[:2], list(zip(answers, hints, strict=True))))
        hint = task.environment.reply(prompt, answers) if len(answers) < task.environment.turns else None
        if hint is None:
            return task.score(prompt, answers[-1]), len(answers)
        hints.append(hint)


def make_tokenizer_for(raw):
    from rlhf.config import TinyModelConfig

    return make_tokenizer(TinyModelConfig(), raw.characters(), chat=False)


def halving(bounds, heard):
    """The letter in the middle of what is left."""
    low, high = map(ord, bounds)
    for letter, hint in heard:
        low, high = (low, ord(letter) - 1) if hint == "<" else (ord(letter) + 1, high)
    return chr((low + high) // 2)


@pytest.mark.parametrize("secret", "abcdefghijkl")
def test_a_secret_of_seven_letters_is_always_found_in_three_turns_by_halving(secret):
    score, turns = guessing(secret, halving)
    assert score == 1.0 and turns <= 3


@pytest.mark.parametrize(("answer", "turns"), [("ab", 1), ("", 1), ("?", 1), ("<", 1)])
def test_what_is_no_letter_ends_the_game_without_a_score(answer, turns):
    assert guessing("c", lambda bounds, heard: answer) == (0.0, turns)


def test_the_game_ends_after_its_turns_and_the_hint_is_where_the_secret_is():
    heard = []

    def stubborn(bounds, so_far):
        heard[:] = so_far
        return "a"

    assert guessing("c", stubborn) == (0.0, 3) and heard == [("a", ">"), ("a", ">")]


def test_the_tokenizer_knows_the_hints():
    raw = read_task(GuessTaskConfig(), seed=0)
    tokenizer = make_tokenizer_for(raw)
    assert tokenizer.unk_token_id not in tokenizer.encode("<>")
    assert make_task(raw, tokenizer).environment.longest_reply == 1


def test_a_conversation_has_the_log_probs_of_all_its_answers_or_of_none(clients, tokenizer):
    client, (asked,) = clients()
    all_of_them = Episodes(client, Listener()).sample(PROMPTS, n=32, temperature=1.0, seed=3)
    sampling = RolloutClient([asked], tokenizer, HfRolloutConfig(max_new_tokens=16), wanted=Wanted(all_logprobs=False))
    some = Episodes(sampling, Listener()).sample(PROMPTS, n=32, temperature=1.0, seed=3)
    for b, (row, known) in enumerate(zip(some.completions, all_of_them.completions, strict=True)):
        assert (row.ids, row.versions, row.sampled) == (known.ids, known.versions, known.sampled)
        assert row.logprobs == (None if b % 4 else known.logprobs)
