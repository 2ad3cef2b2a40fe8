from array import array

import numpy as np

from rlhf.rollout.sampling import Sample, seed_of, streams, uniforms
from rlhf.types import Completion, Prompt, Rollouts


def test_the_generator_is_splitmix64():
    zero = np.zeros(1, np.uint64)  # the reference generator's first outputs for seed 0
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [uniforms(zero, position)[0] for position in range(3)] == [(x >> 11) * 2.0**-53 for x in expected]


def test_neither_batch_nor_order_changes_a_samples_numbers():
    together = streams([7, 8, 9], 4)
    assert np.array_equal(together[4:8], streams([8], 4))
    assert np.array_equal(together[:2], streams([7], 2))
    assert uniforms(together, 5)[6] == uniforms(together[6:7], 5)[0]


def test_seeds_of_neighbouring_prompts_and_steps_share_no_stream():
    keys = np.concatenate([streams([seed_of(seed, index)], 8) for seed in range(50) for index in range(50)])
    assert len(set(keys.tolist())) == 50 * 50 * 8


def test_draws_are_uniform_along_samples_and_along_positions():
    keys = streams(range(100), 100)
    for draws in (uniforms(keys, 0), np.array([uniforms(keys[:1], position)[0] for position in range(10000)])):
        assert draws.min() >= 0 and draws.max() < 1
        counts = np.bincount((draws * 10).astype(int), minlength=10)
        assert ((counts - 1000) ** 2 / 1000).sum() < 33.7  # chi-squared, 9 degrees of freedom: p = 0.0001


def test_a_seed_fits_a_signed_64_bit_integer():
    assert all(0 <= seed_of(seed, index) < 2**63 for seed in (0, 2**64 - 1) for index in range(1000))


def test_numbers_become_columns_that_are_equal_whatever_they_were_made_of():
    made = Sample([3, 1], [-0.1, -0.2], [7, 7], "stop")
    assert made == Sample(array("i", [3, 1]), array("f", [-0.1, -0.2]), array("q", [7, 7]), "stop")
    completion = Completion([3, 1], [-0.1, -0.2], [7, 7], "stop")
    assert completion == Completion(made.ids, made.logprobs, made.versions, "stop")
    assert Completion([3], None, [7], "stop").logprobs is None


def test_a_sample_grows_in_place_and_keeps_log_probs_only_where_they_are_wanted():
    for wanted in (True, False):
        sample = Sample.empty(wanted)
        columns = sample.ids, sample.logprobs, sample.versions
        sample.grow([3], [-0.5], 7)
        sample.grow((4, 1), (-0.25, -1.0), 8)
        assert (sample.ids.tolist(), sample.versions.tolist()) == ([3, 4, 1], [7, 8, 8])
        assert sample.logprobs is None if not wanted else sample.logprobs.tolist() == [-0.5, -0.25, -1.0]
        now = sample.ids, sample.logprobs, sample.versions
        assert all(column is then for column, then in zip(now, columns, strict=True))


def test_lags_are_of_the_tokens_that_the_policy_has_sampled():
    plain = Completion([3, 1], None, [4, 5], "stop")
    talk = Completion([3, 9, 9, 1], None, [5, 5, 5, 6], "stop", [1, 0, 0, 1])
    rollouts = Rollouts([Prompt("x", (2,))], [plain, talk], ["", ""], [0], 2)
    assert rollouts.lags(6).tolist() == [2, 1, 1, 0]
    assert (rollouts.tokens, rollouts.version, talk.mask.tolist()) == (4, 4, [1, 0, 0, 1])
