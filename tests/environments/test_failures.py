"""Environments that raise, hang, die or answer garbage: each row is accounted for, and nothing is left running."""

import random
from collections import Counter

import psutil
import pytest
from fake_client import FakeClient

from rlhf.config import TinyModelConfig
from rlhf.config.task import EnvironmentTaskConfig
from rlhf.environments.factory import Factory
from rlhf.environments.make import environment_of
from rlhf.episodes.loop import Episodes
from rlhf.models.tokenizer import make_tokenizer
from rlhf.types import Prompt

CLASSES = "tests.environments.classes"
FAILS = {  # what a row does -> the class of its failure
    "raise at reset": "raised",
    "garbage at reset": "garbage",
    "raise": "raised",
    "hang": "timed_out",
    "die": "died",
    "garbage": "garbage",
    "not a number": "garbage",
}


@pytest.fixture
def tokenizer():
    return make_tokenizer(TinyModelConfig(), "abcdefgho?GO", chat=False)


def environment(tokenizer, name, **dials):
    config = EnvironmentTaskConfig(factory=f"{CLASSES}:{name}", **dials)
    return environment_of(config, Factory.of(config.factory, config.tools), tokenizer, conversational=False)


def play(tokenizer, rows, n=1, seconds=0.0, **dials):
    """The samples of an episode a row, whose policy always says "a"."""
    says = tokenizer.encode("a")
    prompts = [Prompt("g?", tuple(tokenizer.encode("g?")), row) for row in rows]
    with environment(tokenizer, **dials) as played:
        client = FakeClient(tokenizer, lambda prompt: says, seconds=seconds)
        return Episodes(client, played).sample(prompts, n=n, temperature=1.0, seed=3)


def environments_left():
    children = psutil.Process().children(recursive=True)
    return [child for child in children if "rlhf.environments.host" in " ".join(child.cmdline())]


def check(rollouts, rows):
    for row, told, completion in zip(rows, rollouts.episodes, rollouts.completions, strict=True):
        assert told.failed == FAILS.get(row["does"], ""), (row, told)
        assert bool(told.why) == bool(told.failed)
        assert (told.score is None) == bool(told.failed)
        assert told.failed or (told.score == 1.5 and told.said == ["a", "go", "a", "go", "a"])
        assert completion.ids and len(completion.ids) == len(completion.versions)


@pytest.mark.slow
def test_each_way_of_failing_has_a_class_and_the_other_rows_of_its_process_go_on(tokenizer):
    rows = [{"does": does} for does in ["nothing", *(name for name in FAILS if name != "die"), "nothing"]]
    check(play(tokenizer, rows, name="Mischief", timeout_s=4.0), rows)
    assert not environments_left()


def test_a_process_that_dies_takes_the_rows_that_are_in_it_along_and_others_get_a_new_one(tokenizer):
    rows = [{"does": "die"}, *({"does": "nothing"} for _ in range(5))]
    rollouts = play(tokenizer, rows, name="Mischief", concurrency=1)
    check(rollouts, rows)
    assert "ended with code 3" in rollouts.episodes[0].why
    assert not environments_left()


@pytest.mark.slow
def test_a_thousand_episodes_are_accounted_for_by_class_and_nothing_is_left_running(tokenizer):
    draw = random.Random(0)
    does = ["nothing"] * 600 + ["raise"] * 150 + ["garbage"] * 150 + ["raise at reset"] * 50 + ["hang"] * 30
    does += ["die"] * 20
    draw.shuffle(does)
    rows = [{"does": each} for each in does]
    rollouts = play(tokenizer, rows, name="Mischief", timeout_s=2.0, concurrency=16, processes=4)
    found = Counter(told.failed for told in rollouts.episodes)
    assert sum(found.values()) == 1000 and set(found) == {"", "raised", "garbage", "timed_out", "died"}
    assert found["timed_out"] <= 30 and found["timed_out"] + found["died"] >= 50, found
    for row, told in zip(rows, rollouts.episodes, strict=True):
        assert told.failed in (FAILS.get(row["does"], ""), "died"), (row, told)
        assert (told.score is None) == bool(told.failed)
    assert found["died"] <= 20 * 16, "only those beside one that dies"
    assert not environments_left()
