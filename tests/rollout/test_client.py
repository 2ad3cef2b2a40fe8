import time

import pytest

from rlhf.config import HfRolloutConfig
from rlhf.rollout.client import RolloutClient, Wanted, blocks
from rlhf.rollout.columns import encode
from rlhf.rollout.sampling import Sample, measured_rows, seed_of
from rlhf.rollout.worker import Worker
from rlhf.types import Prompt
from transfer import make_transfer
from transfer.agreement.wire import BODY, RemoteError
from transfer.config import HttpSenderConfig, IpcConfig, LocalConfig
from transfer.trainer.senders.direct import DirectSender

PROMPTS = [Prompt("x", ids) for ids in [(3, 4, 5), (8,), (9, 2, 10), (4, 4), (11, 3, 5, 2, 6)]]
CONFIG = HfRolloutConfig(max_new_tokens=10)


class FakeSender:
    """Answers each prompt with the letter b and the end; remembers what was asked; `spoil` changes the samples."""

    def __init__(self, spoil=lambda samples: samples, version=3):
        self.name, self.asked, self._spoil, self._version = "worker 5", [], spoil, version

    def call(self, verb, body, timeout_s=None):
        self.asked.append((verb, body, timeout_s))
        rows = range(len(body["prompt"]) * body["n"])
        measured = body.get("logprobs_rows", rows)
        logprobs = [[-0.5, -0.1] if row in measured else None for row in rows]
        samples = [Sample([3, 1], logprobs[row], [self._version] * 2, "stop") for row in rows]
        spoilt = self._spoil(samples)
        return spoilt if isinstance(spoilt, dict) else {BODY: encode(spoilt)}

    def close(self):
        pass


def test_prompts_are_split_in_order_and_each_has_a_seed_of_its_own(tokenizer):
    senders = [FakeSender(), FakeSender(version=2)]
    rollouts = RolloutClient(senders, tokenizer, CONFIG).sample(PROMPTS, n=2, temperature=0.5, seed=9)
    asked = [sender.asked[0] for sender in senders]
    assert [ids for _, body, _ in asked for ids in body["prompt"]] == [list(prompt.ids) for prompt in PROMPTS]
    assert [seed for _, body, _ in asked for seed in body["seeds"]] == [seed_of(9, index) for index in range(5)]
    assert {timeout for _, _, timeout in asked} == {CONFIG.timeout_s}
    assert (rollouts.prompts, rollouts.texts, rollouts.samples_per_prompt) == (PROMPTS, ["b"] * 10, 2)
    assert rollouts.completions[0].ids.tolist() == [3, 1]
    assert rollouts.version == 2


def test_a_sample_may_end_with_any_stop_id_which_is_then_no_part_of_its_text(tokenizer):
    tokenizer.stop_ids = (4, 1)
    ends = iter([1, 4] * 5)
    sender = FakeSender(lambda samples: [Sample([3, next(ends)], s.logprobs, s.versions, "stop") for s in samples])
    rollouts = RolloutClient([sender], tokenizer, CONFIG).sample(PROMPTS, n=2, temperature=1.0, seed=0)
    assert sender.asked[0][1]["stop_token_ids"] == [4, 1]
    assert rollouts.texts == ["b"] * 10 and {row.ids[-1] for row in rollouts.completions} == {1, 4}


def test_more_workers_than_prompts_leaves_some_idle(tokenizer):
    senders = [FakeSender() for _ in range(3)]
    rollouts = RolloutClient(senders, tokenizer, CONFIG).sample(PROMPTS[:1], n=2, temperature=1.0, seed=0)
    assert len(rollouts.completions) == 2
    assert sum(len(sender.asked) for sender in senders) == 1


def test_blocks_cover_everything_once_and_evenly():
    for count in range(20):
        for parts in range(1, 6):
            ranges = [range(count)[block] for block in blocks(count, parts)]
            assert [index for block in ranges for index in block] == list(range(count))
            assert max(map(len, ranges)) - min(map(len, ranges)) <= 1


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("rows_per_request", [1024, 100])
def test_log_probs_of_a_sample_are_those_of_the_same_rows_however_the_rows_are_divided(
    tokenizer, workers, rows_per_request
):
    senders = [FakeSender(cut_short([40 // workers])) for _ in range(workers)]
    config = HfRolloutConfig(max_new_tokens=10, rows_per_request=rows_per_request)
    client = RolloutClient(senders, tokenizer, config, wanted=Wanted(all_logprobs=False))
    rollouts = client.sample(PROMPTS * 8, n=24, temperature=1.0, seed=0)  # 960 rows
    found = [row for row, completion in enumerate(rollouts.completions) if completion.logprobs is not None]
    assert found == list(range(0, 960, 16)) == list(measured_rows(960))
    assert all(sum("logprobs_rows" in body for _, body, _ in sender.asked) > 1 for sender in senders)


def test_a_step_of_few_rows_has_log_probs_of_at_least_32_of_them():
    assert [len(measured_rows(rows)) for rows in (0, 1, 32, 63, 64, 512, 1024)] == [0, 1, 32, 63, 32, 32, 64]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda samples: {"choices": []}, "KeyError"),
        (lambda samples: {BODY: b"rlhf"}, "4 bytes are no columns"),
        (lambda samples: {BODY: encode(samples)[:-1]}, "bytes where the header speaks of"),
        (lambda samples: samples[:-1], "9 rows of 18 tokens where 10"),
        (lambda samples: [*samples[:-1], Sample([], [], [], "stop")], "'stop' after no tokens"),
        (
            lambda samples: [*samples[:-1], Sample([3] * 11, [-1.0] * 11, [1] * 11, "length")],
            "length is not from 0 to 10",
        ),
        (lambda samples: [*samples[:-1], Sample([1, 3], [-1.0] * 2, [1, 1], "stop")], "finish_reason is 'stop'"),
        (lambda samples: [*samples[:-1], Sample([3, 1], [-1.0] * 2, [1, 1], "length")], "finish_reason is 'length'"),
        (lambda samples: [*samples[:-1], Sample([3, 1], None, [1, 1], "stop")], "log-probs are not those of the rows"),
        (lambda samples: [*samples[:-1], Sample([1], [float("nan")], [1], "stop")], "not finite"),
        (lambda samples: [*samples[:-1], Sample([1], [5.0], [1], "stop")], "a log-prob is 5, and none is above 0"),
        (lambda samples: {BODY: "rlhf" * 10}, "str is not bytes"),
        (lambda samples: {BODY: None}, "NoneType is not bytes"),
        (lambda samples: {BODY: b"\x1b[2J" * 10**6}, r"the bytes begin with b'\\\\x1b\[2J"),
    ],
)
def test_an_answer_that_makes_no_sense_is_an_error_that_names_the_worker(tokenizer, spoil, message):
    client = RolloutClient([FakeSender(spoil)], tokenizer, CONFIG)
    with pytest.raises(RuntimeError, match=rf"worker 5: completions: .*{message}"):
        client.sample(PROMPTS, n=2, temperature=1.0, seed=0)


def test_the_number_of_workers_does_not_change_what_is_sampled(model, tokenizer, tmp_path):
    def sampled(count):
        with make_transfer(LocalConfig(), tmp_path) as transfer:
            senders = [
                DirectSender(Worker.around(model, transfer.endpoint), f"worker {index}") for index in range(count)
            ]
            transfer.open(model.state_dict(), senders)
            transfer.push(model.state_dict())
            return RolloutClient(senders, tokenizer, CONFIG).sample(PROMPTS, n=4, temperature=0.6, seed=1)

    alone = sampled(1)
    assert len(set(alone.texts)) > 5
    assert sampled(2).texts == sampled(5).texts == alone.texts


@pytest.mark.slow
def test_two_worker_processes_sample_what_one_in_process_samples(launch, model, tokenizer):
    def sampled(transfer, workers):
        with launch(transfer, workers) as fleet:
            client = RolloutClient(fleet.feed(model), tokenizer, CONFIG)
            return client.sample(PROMPTS, n=4, temperature=0.6, seed=1)

    local = sampled(LocalConfig(), 1)
    remote = sampled(IpcConfig(sender=HttpSenderConfig()), 2)
    assert [c.ids for c in remote.completions] == [c.ids for c in local.completions]
    assert remote.texts == local.texts
    for there, here in zip(remote.completions, local.completions, strict=True):
        assert list(there.logprobs) == pytest.approx(list(here.logprobs), abs=1e-5)
        assert there.versions == here.versions and set(here.versions) == {0}


def test_the_same_worker_gives_the_same_numbers_to_the_last_bit(http_fleet, tokenizer):
    client = RolloutClient(http_fleet.workers.senders(), tokenizer, CONFIG)
    first = client.sample(PROMPTS, n=4, temperature=0.6, seed=1)
    assert first == client.sample(PROMPTS, n=4, temperature=0.6, seed=1)
    assert first.texts != client.sample(PROMPTS, n=4, temperature=0.6, seed=2).texts


def test_a_refusal_reaches_the_trainer_in_the_workers_words(http_fleet, tokenizer):
    client = RolloutClient(http_fleet.workers.senders(), tokenizer, HfRolloutConfig(max_new_tokens=64))
    with pytest.raises(RemoteError, match=r"worker 0 .*body\.max_tokens must be between 1 and 59"):
        client.sample(PROMPTS, n=1, temperature=1.0, seed=0)


def cut_short(indices):
    """Spoils the first answer: these samples were cut short by new weights after their first token."""

    def spoil(samples):
        for index in indices if indices else ():
            samples[index] = Sample([3], samples[index].logprobs and [-0.5], [3], "abort")
        indices.clear()
        return samples

    return spoil


def test_prompts_whose_samples_were_cut_short_are_sampled_again_with_their_seeds(tokenizer):
    sender = FakeSender(cut_short([2, 3, 9]))
    rollouts = RolloutClient([sender], tokenizer, CONFIG).sample(PROMPTS, n=2, temperature=0.5, seed=9)
    first, second = [body for _, body, _ in sender.asked]
    assert second["prompt"] == [first["prompt"][1], first["prompt"][4]]
    assert second["seeds"] == [first["seeds"][1], first["seeds"][4]] and second["n"] == 2
    assert rollouts.texts == ["b"] * 10 and {c.finish_reason for c in rollouts.completions} == {"stop"}


def test_samples_that_are_cut_short_for_ever_end_with_the_key_to_change(tokenizer):
    def always(answer):
        return cut_short([0])(answer)

    client = RolloutClient([FakeSender(always)], tokenizer, HfRolloutConfig(max_new_tokens=10, timeout_s=0.2))
    with pytest.raises(RuntimeError, match=r"worker 5: 2 samples were cut short .*rollout\.timeout_s"):
        client.sample(PROMPTS, n=2, temperature=0.5, seed=9)


def test_the_share_of_a_worker_that_was_recovered_is_asked_for_again_and_only_that(tokenizer):
    def dies_once(answer):
        senders[1]._spoil = lambda answer: answer
        raise RemoteError("worker 5", "completions", 0, "the worker is gone")

    senders, recovered = [FakeSender(), FakeSender(dies_once)], []
    client = RolloutClient(senders, tokenizer, CONFIG, lambda sender: not recovered.append(sender))
    assert client.sample(PROMPTS, n=2, temperature=0.5, seed=9).texts == ["b"] * 10
    assert recovered == [senders[1]]
    assert [len(sender.asked) for sender in senders] == [1, 2]
    assert senders[1].asked[0] == senders[1].asked[1]


def test_a_worker_that_cannot_be_recovered_ends_sampling_with_its_error(tokenizer):
    def dies(answer):
        raise RemoteError("worker 5", "completions", 0, "the worker is gone")

    with pytest.raises(RemoteError, match="the worker is gone"):
        RolloutClient([FakeSender(dies)], tokenizer, CONFIG).sample(PROMPTS, n=2, temperature=0.5, seed=9)


def test_the_share_of_a_worker_that_has_left_meanwhile_is_asked_of_another(tokenizer):
    def leaves(answer):
        senders.remove(gone)
        raise RemoteError("worker 5", "completions", 0, "the worker has ended")

    gone, senders = FakeSender(leaves), [FakeSender()]
    senders.append(gone)
    client = RolloutClient(senders, tokenizer, CONFIG, lambda sender: pytest.fail("it is not to be started again"))
    assert client.sample(PROMPTS, n=2, temperature=0.5, seed=9).texts == ["b"] * 10
    assert client.senders == (senders[0],) and [len(sender.asked) for sender in (gone, senders[0])] == [1, 2]
    assert senders[0].asked[1] == gone.asked[0]


def test_when_each_worker_had_a_request_is_told_also_of_one_that_fails(tokenizer):
    class Failing(FakeSender):
        def call(self, verb, body, timeout_s=None):
            raise RemoteError(self.name, verb, 500, "gone")

    heard, senders = [], [FakeSender(), Failing()]
    before = time.monotonic()
    client = RolloutClient(senders, tokenizer, CONFIG, heard=lambda *told: heard.append(told))
    client.of(senders[0]).sample(PROMPTS, n=2, temperature=1.0, seed=0)
    with pytest.raises(RemoteError, match="gone"):
        client.sample(PROMPTS, n=2, temperature=1.0, seed=0)
    assert [name for name, _, _ in heard] == ["worker 5"] * 3
    assert all(before <= began <= ended <= time.monotonic() for _, began, ended in heard)
