"""Which samples a step learns from."""

from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest

from rlhf.gather import Gather
from rlhf.shell.ending import RunError
from rlhf.types import Completion, Prompt, Rollouts

TRAIN = [Prompt(str(index), (index,)) for index in range(50)]


@dataclass
class Sampler:
    """Every answer is its prompt's text and the sample's number; remembers what it was asked."""

    asked: list = field(default_factory=list)

    def sample(self, prompts, *, n, temperature, seed):
        self.asked.append((len(prompts), seed))
        texts = [f"{prompt.text}.{sample}" for prompt in prompts for sample in range(n)]
        completions = [Completion([1], [-1.0], [0], "stop") for _ in texts]
        return Rollouts(list(prompts), completions, texts, [seed * 1000 + p for p in range(len(prompts))], n)


class Clock:
    """Notes no time."""

    sampled = 0

    @contextmanager
    def time(self, phase):
        yield


def gather(compose_run, reward, *overrides):
    config = compose_run("prompts_per_step=8", "samples_per_prompt=4", "steps=100", *overrides)
    sampler = Sampler()
    return Gather(sampler, lambda prompts, answers: [reward(answer) for answer in answers], config, Clock()), sampler


def differs_for_even(answer):
    prompt, _, sample = answer.partition(".")
    return float(sample) if int(prompt) % 2 == 0 else 1.0


def test_without_dynamic_sampling_a_step_has_its_own_prompts_whatever_their_rewards(compose_run):
    take, sampler = gather(compose_run, lambda answer: 1.0)
    rollouts, rewards = take(TRAIN, range(8), step=3)
    assert [prompt.text for prompt in rollouts.prompts] == [str(row) for row in range(8)] and rewards == [1.0] * 32
    assert sampler.asked == [(8, 3)]


def test_groups_without_a_signal_give_way_to_others_until_the_step_is_full(compose_run):
    take, sampler = gather(compose_run, differs_for_even, "algo=dapo")
    rollouts, rewards = take(TRAIN, range(8), step=3)
    assert [int(prompt.text) % 2 for prompt in rollouts.prompts] == [0] * 8
    assert [prompt.text for prompt in rollouts.prompts[:4]] == ["0", "2", "4", "6"], "what was kept comes first"
    assert len(rewards) == len(rollouts.texts) == len(rollouts.completions) == 32 and rewards[:4] == [0, 1, 2, 3]
    assert [text.partition(".")[0] for text in rollouts.texts] == [p.text for p in rollouts.prompts_B]
    assert 1 < len(sampler.asked) <= 8 and len(set(rollouts.seeds)) == 8, "no two prompts are sampled with one seed"
    assert take.record.sampled == 32 * len(sampler.asked), "tokens of those that are left out, too"
    assert take(TRAIN, range(8), step=3)[0].texts == rollouts.texts, "the same step takes the same samples"


def test_a_sample_without_a_reward_is_no_signal(compose_run):
    take, _ = gather(compose_run, lambda answer: None if answer.endswith(".0") else 1.0, "algo=dapo")
    with pytest.raises(RunError, match="only 0 prompts with different rewards"):
        take(TRAIN, range(8), step=1)


def test_the_cap_on_batches_raises_with_the_keys_to_change(compose_run):
    take, sampler = gather(compose_run, lambda answer: 1.0, "algo=dapo", "algo.dynamic_sampling=3")
    with pytest.raises(RunError, match=r"step 2: 3 batches have only 0 .* of 8 .*algo\.dynamic_sampling \(3\)"):
        take(TRAIN, range(8), step=2)
    assert [seed for _, seed in sampler.asked] == [2, 102, 202], "seeds of no other step"
