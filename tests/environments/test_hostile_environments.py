"""What a user's class, its rows, or a worker may do to the rows beside it."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from fake_client import FakeClient
from test_failures import environment, environments_left, play, tokenizer  # noqa: F401

from rlhf.environments.factory import Factory
from rlhf.episodes.loop import Episodes
from rlhf.shell.ending import RunError
from rlhf.types import Prompt
from transfer.agreement.wire import RemoteError


class Unknown:
    """Cannot be made in another process."""

    def __reduce__(self):
        return unknown, ()


def unknown():
    raise AttributeError("there is no such class here")


def test_a_process_that_does_not_listen_holds_up_nobody_who_asks_it(tokenizer):  # noqa: F811
    rows = [{"does": "hog"}, *({"does": "", "text": "x" * 20_000} for _ in range(64))]
    with pytest.raises(RunError, match="timed_out"):
        play(tokenizer, rows, name="Hostile", timeout_s=1.0)
    assert not environments_left()


def test_what_cannot_be_made_of_a_row_s_columns_is_the_failure_of_that_row(tokenizer):  # noqa: F811
    rows = [{"does": "nothing", "value": Unknown()}, {"does": "nothing"}]
    assert [told.failed for told in play(tokenizer, rows, name="Mischief").episodes] == ["raised", ""]


def test_rewards_whose_sum_is_infinite_are_garbage(tokenizer):  # noqa: F811
    (told,) = play(tokenizer, [{"does": ""}], name="Hostile").episodes
    assert (told.failed, told.score) == ("garbage", None)


def test_a_step_without_an_action_is_refused():
    with pytest.raises(ValueError, match=r"step.. of .*Still must take the action"):
        Factory.of("tests.environments.classes:Still", ())


def test_rows_of_one_request_that_all_fail_are_failed_rows_and_no_end(tokenizer):  # noqa: F811
    prompt = Prompt("g?", tuple(tokenizer.encode("g?")), {"does": "raise at reset"})
    with environment(tokenizer, "Mischief") as played:
        episodes = Episodes(FakeClient(tokenizer, lambda prompt: []), played)
        rollouts = episodes.sample_seeded([prompt], [1], 2, 1.0)
        assert [told.failed for told in rollouts.episodes] == ["raised"] * 2 and not rollouts.tokens
        with pytest.raises(RunError, match="first answer: raised"):
            episodes.sample([prompt], n=2, temperature=1.0, seed=1)


def test_a_prompt_that_reset_makes_too_long_is_the_failure_of_that_row_and_a_reply_the_end(tokenizer):  # noqa: F811
    prompts = [Prompt("g?", tuple(tokenizer.encode("g?")), {"does": each}) for each in ("long", "short")]
    with environment(tokenizer, "Speaker") as played:
        client = FakeClient(tokenizer, lambda prompt: tokenizer.encode("a"))
        client.longest_prompt = 12
        long, short = Episodes(client, played).sample(prompts, n=1, temperature=1.0, seed=1).episodes
    assert long.failed == "garbage" and "leaves no room" in long.why
    assert not short.failed and len(short.said) > 1 and short.score == (len(short.said) + 1) / 2


def test_episodes_at_once_are_those_of_all_who_sample_at_the_time(tokenizer):  # noqa: F811
    prompts = [Prompt("g?", tuple(tokenizer.encode("g?"))) for _ in range(4)]
    with environment(tokenizer, "Crowd", concurrency=1) as played, ThreadPoolExecutor(3) as pool:
        episodes = Episodes(FakeClient(tokenizer, lambda prompt: tokenizer.encode("a")), played)
        drawn = [pool.submit(episodes.sample, prompts, n=1, temperature=1.0, seed=seed) for seed in range(3)]
        assert {told.score for each in drawn for told in each.result(60).episodes} == {1.0}
        assert played.places.acquire(blocking=False), "all are given back"


def test_a_process_in_which_something_hangs_is_killed_once_its_rows_are_over(tokenizer):  # noqa: F811
    prompts = [Prompt("g?", tuple(tokenizer.encode("g?")), {"does": each}) for each in ("hang", "nothing")]
    with environment(tokenizer, "Mischief", timeout_s=1.0) as played:
        client = FakeClient(tokenizer, lambda prompt: tokenizer.encode("a"))
        rollouts = Episodes(client, played).sample(prompts, n=1, temperature=1.0, seed=1)
        assert rollouts.episodes[0].failed == "timed_out" and not environments_left()


class Dying(FakeClient):
    """Its worker dies while it has two requests, and can be brought back once."""

    def __init__(self, *given):
        super().__init__(*given)
        self.both, self.back = threading.Barrier(2), 0

    def complete(self, *asked, **named):
        if not self.back:
            self.both.wait(20)
            raise RemoteError("worker 0", "completions", 0, "it has died")
        return super().complete(*asked, **named)

    def recover(self, sender):
        self.back += 1
        return self.back == 1

    def recoveries(self, sender):
        return self.back


def test_a_worker_that_dies_with_two_requests_is_brought_back_once(tokenizer):  # noqa: F811
    prompts = [Prompt("g?", tuple(tokenizer.encode("g?")), {"does": "nothing"}) for _ in range(2)]
    with environment(tokenizer, "Mischief") as played:
        client = Dying(tokenizer, lambda prompt: tokenizer.encode("a"))
        rollouts = Episodes(client, played).sample(prompts, n=1, temperature=1.0, seed=1)
    assert client.back == 1 and [told.score for told in rollouts.episodes] == [1.5, 1.5]
