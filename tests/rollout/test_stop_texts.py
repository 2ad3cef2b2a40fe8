"""Stop texts: rows end with the token that completes one, whoever has sampled them."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.config import HfRolloutConfig
from rlhf.episodes.loop import Episodes
from rlhf.rollout.client import RolloutClient, Wanted
from rlhf.rollout.stop_texts import completing_tokens, cut_at
from rlhf.rollout.worker import Worker
from rlhf.run import run
from rlhf.tasks.tokenised import RepliesEpisode
from rlhf.types import Completion, Prompt
from transfer import make_transfer
from transfer.config import LocalConfig
from transfer.trainer.senders.direct import DirectSender

VOCABULARY = 12


class Pieces:
    """Tokens of several characters, by their ids; one is half a character."""

    TEXTS = ("", "$", "a", "ab", "\n\n", "</an", "swer>", "x</answer>y", b"\xc3", b"\xa9", "E")

    def batch_decode(self, sequences, skip_special_tokens=False):
        pieces = [piece if isinstance(piece, bytes) else piece.encode() for piece in self.TEXTS]
        return [b"".join(pieces[token] for token in ids).decode(errors="replace") for ids in sequences]


def row(ids, reason="length", logprobs=True):
    told = [-float(place) for place in range(len(ids))] if logprobs else None
    return Completion(ids, told, range(len(ids)), reason)


@pytest.mark.parametrize(
    ("ids", "stop", "kept"),
    [
        ([2, 3, 4, 2], ["\n\n"], [2, 3, 4]),
        ([2, 5, 6, 2, 1], ["</answer>"], [2, 5, 6]),
        ([2, 7, 2, 1], ["</answer>"], [2, 7]),  # with all of the token that completes it
        ([2, 5, 6, 2], ["\n", "swer"], [2, 5, 6]),
        ([2, 2, 3], ["ab", "aa"], [2, 2]),  # the first that is complete
        ([8, 9, 2], ["é"], [8, 9]),
        ([2, 5, 6], ["</answer>"], [2, 5, 6]),
        ([2, 1], ["$"], [2, 1]),  # special tokens count
    ],
)
def test_a_row_ends_with_the_token_that_completes_a_stop_text(ids, stop, kept):
    (cut,) = cut_at(stop, [row(ids)], Pieces())
    assert cut.ids.tolist() == kept and cut.finish_reason == "stop"
    assert cut.logprobs.tolist() == [-float(place) for place in range(len(kept))]
    assert cut.versions.tolist() == list(range(len(kept)))
    (bare,) = cut_at(stop, [row(ids, logprobs=False)], Pieces())
    assert bare.ids.tolist() == kept and bare.logprobs is None


@given(st.lists(st.lists(st.integers(2, 10), min_size=1, max_size=12), max_size=4), st.sampled_from(["ab", "a", "\n"]))
def test_rows_without_a_stop_text_stay_and_others_have_it_with_their_last_token_first(rows, stop):
    cut = cut_at([stop], [row(ids) for ids in rows], Pieces())
    for ids, one in zip(rows, cut, strict=True):
        before, now = Pieces().batch_decode([one.ids.tolist()[:-1], one.ids.tolist()])
        if stop in Pieces().batch_decode([ids])[0]:
            assert stop in now and stop not in before and one.ids.tolist() == ids[: len(one.ids)]
        else:
            assert one.ids.tolist() == ids and one.finish_reason == "length"


# --- through a client -------------------------------------------------------------------------------------------------


class Script:
    """A worker that says what it is told to."""

    name = "worker 0"

    def __init__(self, *rows):
        self.rows = rows

    def call(self, verb, body, timeout_s=None):
        from rlhf.rollout.columns import encode
        from rlhf.rollout.sampling import Sample
        from transfer.agreement.wire import BODY

        return {BODY: encode([Sample(ids, [-0.5] * len(ids), [3] * len(ids), reason) for ids, reason in self.rows])}


def test_a_clients_texts_have_the_stop_text_and_no_token_is_lost(tokenizer):
    worker = Script(([2, 3, 4, 5, 1], "stop"), ([2, 2, 1], "stop"), ([4, 3, 4, 2], "length"), ([2, 3], "length"))
    client = RolloutClient([worker], tokenizer, HfRolloutConfig(max_new_tokens=8, stop=["bc", "zz"]))
    completions = client.complete([[5]] * 4, [1, 2, 3, 4], 1, 1.0)
    assert [one.ids.tolist() for one in completions] == [[2, 3, 4], [2, 2, 1], [4, 3, 4], [2, 3]]
    assert [one.finish_reason for one in completions] == ["stop", "stop", "stop", "length"]
    assert client.texts(completions) == ["abc", "aa", "cbc", "ab"]


def test_tokens_that_have_all_of_a_stop_text_are_told_to_workers(tokenizer):
    assert completing_tokens(["an", "swer>", "\n"], Pieces(), 11) == [4, 5, 6, 7]
    assert completing_tokens(["an"], Pieces(), 5) == [] and completing_tokens(["$"], Pieces(), 11) == [1]


@pytest.fixture
def served(model, tokenizer, tmp_path):
    """`served(stop)`: a client with stop texts, of a worker around `model`."""
    with make_transfer(LocalConfig(), tmp_path) as transfer:
        sender = DirectSender(Worker.around(model, transfer.endpoint), "worker 0")
        transfer.open(model.state_dict(), [sender])
        transfer.push(model.state_dict())

        def made(*stop):
            config = HfRolloutConfig(max_new_tokens=12, stop=list(stop))
            return RolloutClient([sender], tokenizer, config, wanted=Wanted(vocabulary=VOCABULARY))

        yield made


PROMPTS = [Prompt("x", ids) for ids in [(3, 4, 5), (8,), (9, 2, 10), (4, 4)]]


@pytest.mark.parametrize("stop", [("c",), ("dd",), ("c", "bj", "gd")])
def test_rows_are_those_without_stop_texts_up_to_the_first(served, tokenizer, stop):
    plain = served().sample(PROMPTS, n=8, temperature=1.0, seed=2)
    stopped = served(*stop).sample(PROMPTS, n=8, temperature=1.0, seed=2)
    ended = 0
    for whole, row, text in zip(plain.completions, stopped.completions, stopped.texts, strict=True):
        tokens = len(row.ids)
        assert row.ids == whole.ids[:tokens] and row.logprobs == whole.logprobs[:tokens]
        (before,) = tokenizer.batch_decode([row.ids[:-1]], skip_special_tokens=False)
        assert not any(each in before for each in stop)
        if any(each in text for each in stop):
            assert row.finish_reason == "stop" and text.endswith(stop)
            ended += 1
        else:
            assert (tokens, row.finish_reason) == (len(whole.ids), whole.finish_reason)
    assert 0 < ended < 32


def test_in_a_conversation_a_reply_follows_the_stop_text(served):
    class Listener:
        turns, longest_reply, places, budget, timeout_s, opens = 3, 2, None, None, None, False

        def episode(self, prompt):
            return RepliesEpisode(self, prompt)

        def reply(self, prompt, answers):
            return "yes" if answers[-1].endswith("c") else None

        def encode(self, reply):
            return [7, 8]

    rollouts = Episodes(served("c"), Listener()).sample(PROMPTS, n=8, temperature=1.0, seed=2)
    assert {1, 2, 3} == {len(said) // 2 + 1 for said in rollouts.conversations}
    for row, said in zip(rollouts.completions, rollouts.conversations, strict=True):
        ids = row.ids.tolist()
        replied = [place for place in range(len(ids)) if not row.mask[place]][::2]
        assert len(replied) == len(said) // 2 and all(ids[place - 1] == 4 for place in replied), "c is token 4"


def test_a_run_learns_from_rows_that_end_with_a_stop_text(compose_run, tmp_path):
    dials = ["experiment=smoke", "model=micro", "sft.steps=5", "logger=jsonl", "transfer=local", "steps=2"]
    config = compose_run(*dials, "evaluate_every=2", "task.held_out=16", "rollout.stop=[b]", "evaluate.top_k=1")
    run(config, tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    told = [(row["eval/greedy_accuracy"], row["eval/pass_at_1"]) for row in rows if "eval/gold" in row]
    assert len(told) == 2 and all(greedy == sampled for greedy, sampled in told), (
        "evaluations sample the likeliest token"
    )
    assert [row["train/excluded"] for row in rows if "train/loss" in row] == [0.0, 0.0]
    assert max(row["train/mismatch"] for row in rows if "train/loss" in row) < 1e-5
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    stopped = [row for row in samples if "b" in row["answer"]]
    assert stopped and all(row["answer"].index("b") == len(row["answer"]) - 1 for row in stopped)
    assert {row["finish_reason"] for row in stopped} == {"stop"}


def test_an_empty_stop_text_is_refused():
    with pytest.raises(ValueError, match=r"^rollout\.stop must be texts of a character at least \(got \['a', ''\]\)"):
        HfRolloutConfig(stop=["a", ""])
